"""Speeds that can be compared: turns A B A B …, a ratio for each pair of turns, medians with their spread."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from engine import devices
from speed import hardware


@dataclass
class Arm:
    """One of several models whose speeds are compared, and the GPU memory that it keeps between its turns."""

    name: str
    device: torch.device
    resident: int = 0  # bytes


@dataclass
class Work:
    """Something that an arm does again and again."""

    arm: Arm
    call: Callable[[], object]
    tokens: int  # that one call works through
    flops: float | None = None  # of a token: model operations, for utilisation; None: no matrix products
    dtype: torch.dtype | None = None  # of these


@dataclass
class Timing:
    """What a Work took: a speed for each turn, in the order of turns."""

    rates: list  # tokens/s
    peak_bytes: int | None  # GPU memory of the arm alone at its worst; None on a CPU
    calls: int  # in a turn


def interleave(works, repeats, warmup=1, min_seconds=0.0, clock=time.perf_counter):
    """Time works, name -> Work, in turns A B C A B C …; name -> Timing with `repeats` speeds.

    warmup: untimed calls of each. A turn has as many calls as the fastest needs for min_seconds, the same for all. The
    device is waited for at both ends of a turn.
    """

    def seconds_of(work, calls):
        device = work.arm.device
        hardware.synchronise(device)
        devices.reset_peak_memory(device)
        held = devices.allocated_bytes(device)
        began = clock()
        for _ in range(calls):
            work.call()
        hardware.synchronise(device)
        seconds = clock() - began
        # Whatever else is held now belongs to the others: it is there before and after.
        peak = work.arm.resident + devices.peak_memory_bytes(device) - held if device.type == "cuda" else None
        work.arm.resident += devices.allocated_bytes(device) - held
        return seconds, peak

    for work in works.values():
        for _ in range(warmup):
            seconds_of(work, 1)
    calls = 1
    if min_seconds:
        fastest = min(seconds_of(work, 1)[0] for work in works.values())
        calls = max(1, math.ceil(min_seconds / fastest))
    turns = [{name: seconds_of(work, calls) for name, work in works.items()} for _ in range(repeats)]
    return {
        name: Timing(
            [calls * work.tokens / turn[name][0] for turn in turns],
            max(turn[name][1] for turn in turns) if turns[0][name][1] is not None else None,
            calls,
        )
        for name, work in works.items()
    }


def middle(values):
    """(median, lower quartile, upper quartile) of numbers; the middle half lies between the quartiles."""
    lower, median, upper = np.percentile(values, [25, 50, 75])
    return float(median), float(lower), float(upper)


def ratios(timing, reference):
    """The speed of each turn over that of the reference's turn in the same round."""
    return [a / b for a, b in zip(timing.rates, reference.rates, strict=True)]


def utilisation(rate, flops, limit):
    """The share of `limit` operations a second that `rate` tokens a second of `flops` operations are; None: n/a."""
    return rate * flops / limit if flops and limit else None
