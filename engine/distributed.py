"""The processes of a run: the model spread over them, and what they tell each other.

A run of N processes under torchrun is the run of one: they share the sequences of a step and the windows of an
evaluation, and average what they compute. Gradients meet once a step, after the last micro-batch.
"""

import functools
import os
import sys
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist


class World(NamedTuple):
    """This process among those of the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this machine: the number of its GPU

    def share(self, items):
        """This process's part of a sequence, whose length the number of processes divides."""
        n = len(items) // self.size
        return items[self.rank * n : (self.rank + 1) * n]

    def gather(self, array):
        """The numpy arrays of all processes, one after the other."""
        parts = [array] * self.size
        if self.size > 1:
            dist.all_gather_object(parts, array)
        return np.concatenate(parts)

    def mean(self, tensor):
        """The mean of the tensors of all processes."""
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor / self.size

    def any(self, flag):
        """Whether flag is true in some process."""
        count = torch.tensor(int(flag))  # on the CPU: no GPU is waited for
        if self.size > 1:
            dist.all_reduce(count)
        return count.item() > 0

    def wait(self):
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()


@functools.cache
def world():
    """The World of this process, which torchrun describes in the environment; joins the other processes, once."""
    if "RANK" not in os.environ:
        return World()
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if dist.get_rank():  # the first process speaks for all
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)
    return World(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]))


def leave():
    """Part from the other processes, at the end of the program."""
    if dist.is_initialized():
        dist.destroy_process_group()


def spread(model, compiled, shard, world, device):
    """(the model to train with, how to switch its gradients' meeting on and off) for a GPT on its device.

    shard: 'none', each process has all of the model (DistributedDataParallel); 'full', parameters, gradients and
    optimizer state are cut into a piece for each process (FSDP2), in place.
    """
    if world.size > 1 and shard == "full":
        from torch.distributed.fsdp import fully_shard

        for block in model.transformer.h:
            fully_shard(block)
        fully_shard(model)
    fast = torch.compile(model) if compiled else model
    if world.size == 1:
        return fast, lambda on: None
    if shard == "full":
        return fast, model.set_requires_gradient_sync
    own = [device] if device.type == "cuda" else None
    options = dict(broadcast_buffers=False, gradient_as_bucket_view=True)
    fast = torch.nn.parallel.DistributedDataParallel(fast, device_ids=own, **options)
    return fast, functools.partial(setattr, fast, "require_backward_grad_sync")


def whole(tree):
    """A state dict with each sharded tensor put together, on the first process's CPU; None in its place elsewhere.

    Every process must call it.
    """
    if isinstance(tree, dict):
        return {key: whole(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [whole(value) for value in tree]
    if not hasattr(tree, "full_tensor"):
        return tree
    full = tree.full_tensor()
    return full.cpu() if world().rank == 0 else None


def cut(optimizer, state):
    """An optimizer's state dict of whole tensors, cut as the optimizer's parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def piece(value, parameter):
        if not hasattr(parameter, "full_tensor") or value.dim() == 0:
            return value
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)

    entries = {
        index: {name: piece(value, parameters[index]) for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return {**state, "state": entries}
