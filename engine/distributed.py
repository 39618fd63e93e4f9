"""The processes of a run: the model wrapped for them, its state dicts gathered and sharded, and what they exchange.

A run of N processes under torchrun is the run of one: they share the sequences of a step and the windows of an
evaluation, and average what they compute. Gradients are all-reduced once a step, after the last micro-batch.
"""

import inspect
import os
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist


class World(NamedTuple):
    """This process among those of the run."""

    rank: int = 0
    size: int = 1
    local_rank: int | None = None  # on this machine: the number of its GPU; None without torchrun

    def say(self, line):
        """Print a line, in the first process alone."""
        if self.rank == 0:
            print(line, flush=True)

    def share(self, items):
        """This process's part of a sequence, whose length the number of processes divides."""
        n = len(items) // self.size
        return items[self.rank * n : (self.rank + 1) * n]

    def gather(self, array):
        """The numpy arrays of all processes, concatenated."""
        parts = [array] * self.size
        if self.size > 1:
            dist.all_gather_object(parts, array)
        return np.concatenate(parts)

    def mean(self, tensor):
        """The mean of a tensor over all processes (all-reduce)."""
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor / self.size

    def any(self, flag):
        """Whether flag is true in any process."""
        count = torch.tensor(int(flag))  # on the CPU: no GPU is waited for
        if self.size > 1:
            dist.all_reduce(count)
        return count.item() > 0

    def barrier(self):
        """Wait until all processes are here."""
        if self.size > 1:
            dist.barrier()


ALONE = World()  # without torchrun


def start():
    """Join the other processes that torchrun started, unless that is done; the World of this one."""
    if "RANK" not in os.environ:
        return ALONE
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return World(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]))


def shutdown():
    """Leave the process group, at the end of the program, once all processes are there."""
    if dist.is_initialized():
        dist.barrier()  # one that leaves while another still talks to it would abort
        dist.destroy_process_group()


def wrap_model(model, compiled, shard, world, device):
    """The model to train with, for a GPT on its device: compiled and wrapped for the processes of a World.

    shard: 'none', each process has all of the model (DistributedDataParallel); 'full', parameters, gradients and
    optimizer state are sharded over the processes (FSDP2), in place.
    """
    if world.size > 1 and shard == "full":
        from torch.distributed.fsdp import fully_shard

        for block in model.transformer.h:
            fully_shard(block)
        fully_shard(model)
    fast_model = torch.compile(model) if compiled else model
    if world.size == 1 or shard == "full":
        return fast_model
    wrapper = torch.nn.parallel.DistributedDataParallel
    new, old = "forward_sync_buffers", "broadcast_buffers"  # since torch 2.13, and before
    buffers_stay = {new if new in inspect.signature(wrapper).parameters else old: False}  # they are the same everywhere
    device_ids = [device] if device.type == "cuda" else None
    return wrapper(fast_model, device_ids=device_ids, gradient_as_bucket_view=True, **buffers_stay)


def sync_gradients(fast_model, on):
    """Have the next backward pass of a wrapped model all-reduce the gradients, or only accumulate them."""
    if isinstance(fast_model, torch.nn.parallel.DistributedDataParallel):
        fast_model.require_backward_grad_sync = on
    elif hasattr(fast_model, "set_requires_gradient_sync"):  # FSDP2
        fast_model.set_requires_gradient_sync(on)


def gather_full_state_dict(tree):
    """A state dict with each sharded tensor gathered on the first process's CPU; None in its place elsewhere.

    Every process must call it.
    """
    if isinstance(tree, dict):
        return {key: gather_full_state_dict(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [gather_full_state_dict(value) for value in tree]
    if not hasattr(tree, "full_tensor"):
        return tree
    full = tree.full_tensor()
    return full.cpu() if dist.get_rank() == 0 else None


def shard_optimizer_state(optimizer, state):
    """An optimizer's state dict of full tensors, sharded as the optimizer's parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def shard(value, parameter):
        if not hasattr(parameter, "full_tensor") or value.dim() == 0:
            return value
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)

    entries = {
        index: {name: shard(value, parameters[index]) for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return {**state, "state": entries}
