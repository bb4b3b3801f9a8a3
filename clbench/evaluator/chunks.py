"""Rows of one forward pass of an evaluation: by a rule, or measured."""

import math
import statistics
import time
from collections.abc import Callable

import torch

from clbench.backbones.passes import MOST, rows_per_pass
from clbench.data.reader import Reader

__all__ = ["fitting_chunk", "measured_chunk"]

CANDIDATES = (16, 32, 64, 128, 256, 512, 1024, 2048)
WORTH = 0.97  # a larger chunk must take less than this share of the time of a smaller one
REPEATS = 3
ENOUGH_S = 0.1  # a pass that takes longer is timed once


def fitting_chunk(read: Reader, view: str, device: torch.device) -> int:
    """By the rule of `rows_per_pass`; features that are read from a bank cost nothing, so as many as may be."""
    return rows_per_pass(read.output_shape(view), device) if view in read.views else MOST


def measured_chunk(forward: Callable[[int], None], rows: int, device: torch.device) -> int:
    """The candidate with the least time per row, the smaller one unless a larger is clearly better.

    forward(n): one pass over n rows. rows: how many there are; no candidate is much larger. Waits for the device, so it
    belongs ahead of the first step. Candidates grow until two in a row are worse than the best so far.
    """
    best, best_time, worse = 0, math.inf, 0
    for count in CANDIDATES:
        if best and count >= 2 * rows:
            break
        taken = min(count, rows)
        each = timed(lambda taken=taken: forward(taken), device) / taken  # type: ignore[misc]  # mypy has no default
        if each < WORTH * best_time:
            best, best_time, worse = count, each, 0
        elif each > best_time:
            worse += 1
            if worse == 2:
                break
    return best


def timed(work: Callable[[], None], device: torch.device) -> float:
    """Seconds of one call: the median of a few, behind one that warms up."""

    def once() -> float:
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    once()
    taken = [once()]
    while len(taken) < REPEATS and taken[0] < ENOUGH_S:
        taken.append(once())
    return statistics.median(taken)
