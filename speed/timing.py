"""Speeds that can be compared: models take turns (A B A B …), and a ratio is taken within each round of turns."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from engine import devices
from speed import hardware


@dataclass
class TimedModel:
    """One of the models whose speeds are compared, and the GPU memory that it keeps between its turns."""

    name: str
    device: torch.device
    resident: int = 0  # bytes


@dataclass
class Workload:
    """What a model does in its turns, as often as the turn lasts."""

    model: TimedModel
    call: Callable[[], object]
    tokens: int  # processed by one call
    flops: float | None = None  # model FLOPs per token, for the utilisation; None: no matrix products, or not known
    dtype: torch.dtype | None = None  # of the matrix products


@dataclass
class Timing:
    """What `interleave` measured of one Workload, in the order of the turns."""

    rates: list  # tokens/s of each turn
    peak_bytes: int | None  # peak GPU memory of this model alone; None on a CPU
    calls: int  # in each turn


def interleave(workloads, repeats, warmup=1, min_seconds=0.0, clock=time.perf_counter):
    """Time workloads, a dict name -> Workload, in turns A B C A B C …; name -> Timing, with `repeats` turns of each.

    warmup: untimed calls of each. min_seconds: every turn has the number of calls that the fastest workload needs to
    last this long, the same for all. The device is synchronised at both ends of a turn.
    """

    def take_turn(workload, calls):
        """(seconds, peak memory in bytes or None) of some calls."""
        model = workload.model
        hardware.synchronise(model.device)
        devices.reset_peak_memory(model.device)
        allocated = devices.allocated_bytes(model.device)
        began = clock()
        for _ in range(calls):
            workload.call()
        hardware.synchronise(model.device)
        seconds = clock() - began
        # What else is allocated belongs to the other models and does not change during this turn.
        on_cuda = model.device.type == "cuda"
        peak = model.resident + devices.peak_memory_bytes(model.device) - allocated if on_cuda else None
        model.resident += devices.allocated_bytes(model.device) - allocated
        return seconds, peak

    for workload in workloads.values():
        for _ in range(warmup):
            take_turn(workload, 1)
    calls = 1
    if min_seconds:
        fastest = min(take_turn(workload, 1)[0] for workload in workloads.values())
        calls = max(1, math.ceil(min_seconds / fastest))
    rounds = [{name: take_turn(workload, calls) for name, workload in workloads.items()} for _ in range(repeats)]
    timings = {}
    for name, workload in workloads.items():
        seconds, peaks = zip(*(turns[name] for turns in rounds), strict=True)
        rates = [calls * workload.tokens / duration for duration in seconds]
        timings[name] = Timing(rates, None if None in peaks else max(peaks), calls)
    return timings


def median_and_iqr(values):
    """(median, lower quartile, upper quartile) of numbers; the interquartile range lies between the quartiles."""
    lower, median, upper = np.percentile(values, [25, 50, 75])
    return float(median), float(lower), float(upper)


def ratios(timing, reference):
    """The speed of each turn divided by that of the reference's turn in the same round."""
    return [a / b for a, b in zip(timing.rates, reference.rates, strict=True)]


def utilisation(rate, flops, limit):
    """The share of `limit`, in FLOP/s, that `rate` tokens/s of `flops` FLOPs each reach; None where one is unknown."""
    return rate * flops / limit if flops and limit else None
