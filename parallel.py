"""The processes of a run: their devices, the model spread over them, what they tell each other, what stops them.

A run of N processes under torchrun is the run of one: they share the sequences of a step and the windows of an
evaluation, and average what they compute. Gradients meet once a step, after the last micro-batch.
"""

import contextlib
import functools
import os
import resource
import signal
import sys
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from linear_cross_entropy import linear_cross_entropy


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


def smaller_batch_size(n_sequences, limit):
    """The largest micro-batch of at most `limit` sequences into which n_sequences divide."""
    return max(size for size in range(1, max(1, min(limit, n_sequences)) + 1) if n_sequences % size == 0)


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


def recompute_activations(model):
    """Keep of each block its input alone, and compute the rest again in the backward pass: less memory, more work."""
    from torch.utils.checkpoint import checkpoint

    for block in model.transformer.h:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def choose_device(name):
    """The torch.device called name; 'auto' is CUDA where there is one, the process's own under torchrun.

    Raises ValueError for a device that is not here.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise ValueError(f"device={name} is not a device: write cpu, cuda or cuda:1") from error
    if device.type == "cuda" and device.index is None and world().size > 1:
        device = torch.device("cuda", world().local_rank)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device={name}, but torch sees {torch.cuda.device_count()} CUDA devices here; try --device=cpu"
        )
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # FSDP2 takes the current device
    return device


def choose_dtype(name, device, config, n_decoded=None, compiled=False):
    """The torch.dtype of matrix products; 'auto': the fastest that is safe on this device, for this GPTConfig.

    n_decoded: sequences that are generated at once; None: to train or evaluate. compiled: generated by torch.compile.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    # bfloat16 pays on a CPU with AMX unless matrices are small. Training: 128 × 512 gained (1.6 times), 64 × 320 lost
    # (0.93). Decoding: 384 × 50,304 gained at 4 sequences and more (1.2 to 1.5 times) and lost at 1 to 3 (0.6 to 0.96),
    # 128 × 512 lost at 8 (0.6 to 0.9). A compiled step casts all weights again for each token, and takes twice as long.
    largest = config.n_embd * max(config.vocab_size, 4 * config.n_embd)
    pays = largest >= 2**16 if n_decoded is None else n_decoded >= 4 and not compiled and largest >= 2**18
    return torch.bfloat16 if pays and torch.cpu._is_amx_tile_supported() else torch.float32


def autocast(device, dtype):
    """The context in which matrix products on a torch.device are in dtype; float32 is no change."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def dtype_name(dtype):
    """A torch.dtype's name without its module: 'bfloat16'."""
    return str(dtype).removeprefix("torch.")


def choose_loss(chunked, vocab_size, device, dtype, compiled):
    """`linear_cross_entropy`, or None for the loss from all logits at once; chunked: TrainConfig's chunked_loss.

    Raises ValueError for float16, whose loss scale would come after the gradients of the logits are rounded.
    """
    if chunked and dtype == torch.float16:
        raise ValueError("chunked_loss=True does not go with dtype=float16: leave it out, or take dtype=bfloat16")
    if chunked is None:
        # torch.compile fuses the loss. Else, on a CPU, chunks pay from 1,024 logits a token (1.0 to 1.5 times as fast,
        # 1.1 to 2.8 times at 50,304) and lose at 320 (0.8 to 0.95).
        chunked = device.type == "cpu" and dtype != torch.float16 and not compiled and vocab_size >= 1024
    if not chunked:
        return None
    # A compiled graph would hold every chunk.
    return torch.compiler.disable(linear_cross_entropy) if compiled else linear_cross_entropy


def prefer_attention(device):
    """A context in which scaled_dot_product_attention on CUDA takes cuDNN's kernel where that can be, then flash.

    torch's own order differs between GPUs. On an H100 cuDNN's is reported to be twice as fast as FlashAttention-2.
    """
    if device.type != "cuda":
        return contextlib.nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
    return sdpa_kernel(list(order), set_priority=True)


def describe_device(device):
    """The device's name, for people."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def peak_memory_bytes(device):
    """The most memory that this process has used so far: the device's on CUDA, resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class StopSignal:
    """Within `with`, the first Ctrl-C or SIGTERM sets `requested`; the second acts as if this were not here."""

    def __enter__(self):
        self.requested = False
        self._handlers = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _request(self, *_):
        self.requested = True
        self.__exit__()
        os.write(2, b"\nstopping after this step; once more to stop at once\n")  # print may not be re-entered
