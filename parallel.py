"""The process of a run: the device and dtype it computes with, the memory it takes, the signals that stop it."""

import os
import resource
import signal

import torch


def choose_device(name):
    """The torch.device called name; 'auto' is CUDA where there is one. Raises ValueError for one that is not here."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise ValueError(f"device={name} is not a device: write cpu, cuda or cuda:1") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device={name}, but torch sees {torch.cuda.device_count()} CUDA devices here; try --device=cpu"
        )
    return device


def choose_dtype(name, device, config):
    """The torch.dtype of matrix products; 'auto': the fastest that trains safely on this device, for this GPTConfig."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    # bfloat16 pays on a CPU with AMX once the matrices are large: 192 × 768 gained (1.3 times), 128 × 512 lost (0.9).
    largest = config.n_embd * max(config.vocab_size, 4 * config.n_embd)
    return torch.bfloat16 if torch.cpu._is_amx_tile_supported() and largest > 2**17 else torch.float32


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
