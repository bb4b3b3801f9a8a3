"""What the scripts for a GPU share: times of a device, interleaved, and the lines of their table."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

__all__ = ["Row", "graphed", "interleaved", "timed", "yes"]

WARM_UP = 3


class Row(NamedTuple):
    """One line of the table, in words."""

    what: str
    value: str
    goal: str
    met: str


def yes(condition: bool) -> str:
    return "yes" if condition else "NO"


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Milliseconds until the device has done it."""
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        work()  # joins the streams it used beside this one
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end))
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


def interleaved(works: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, float]:
    """Median milliseconds of each, taken in turn, behind a few rounds that warm up."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + WARM_UP):
        for name, work in works.items():
            each = timed(work, device)
            if number >= WARM_UP:
                taken[name].append(each)
    return {name: statistics.median(values) for name, values in taken.items()}


def graphed(work: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """`work` as a CUDA graph, which it keeps with all that it reads and writes; itself on a CPU."""
    if device.type != "cuda":
        return work
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()

    def replay(kept: Callable[[], object] = work) -> None:
        graph.replay()

    return replay
