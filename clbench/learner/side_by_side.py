"""Several runs in one process, taking turns step by step.

A small network leaves a GPU almost idle: its step is hundreds of launches of kernels that take microseconds. Here
every run has a CUDA stream of its own, and a turn only launches work, so that the kernels of many runs overlap; where
steps are captured in CUDA graphs, a turn is one launch. The images of a data set are on the device once for all runs.

Nothing of a run is global between two of its steps (every draw depends on the run's own seed and cursor), so the
results are those of single runs: to the bit on a CPU, and on a GPU as far as its kernels are deterministic, which is
the default.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

from clbench.errors import ClbenchError, InputError
from clbench.learner.learner import Progress
from clbench.learner.resolve import Resolved
from clbench.learner.run import RunResult, process_state, run_folder, start

__all__ = ["run_side_by_side"]


class _Turn(NamedTuple):
    number: int  # of the run
    running: Generator[None, None, RunResult]
    place: Callable[[], AbstractContextManager[Any]]  # its stream


def run_side_by_side(
    runs: Sequence[Resolved], width: int, progress: Callable[[int], Progress | None] = lambda index: None, *,
    fresh: bool = False,
) -> Iterator[tuple[int, RunResult | ClbenchError]]:  # fmt: skip
    """Run `runs`, at most `width` at a time, and give (index, result) as they end; a run that breaks gives its error
    and does not disturb the others.

    runs: all on one device, each with a record of its own. progress: what run number `index` tells its progress to.

    Raises InputError if two runs would share a record or a device differs, KeyboardInterrupt when stopped: all
    checkpoints are saved by then.
    """
    if not runs:
        return
    device = runs[0].device
    if any(each.device != device for each in runs):
        raise InputError("runs side by side must be on one device; give --device cuda:N")
    if len({run_folder(each) for each in runs}) < len(runs):
        raise InputError("two of the runs side by side have the same specification; give each its own seed or options")
    waiting = deque(enumerate(runs))
    turns: deque[_Turn] = deque()
    stopped_early = False
    with process_state(device, runs[0].spec.threads) as stop:
        while waiting or turns:
            while waiting and len(turns) < width and not stopped_early:
                index, resolved = waiting.popleft()
                turns.append(_Turn(index, start(resolved, stop, progress(index), fresh=fresh), own_stream(device)))
            if not turns:
                break
            turn = turns.popleft()
            try:
                with turn.place():
                    next(turn.running)
            except StopIteration as end:
                yield turn.number, end.value
            except KeyboardInterrupt:  # its checkpoint is saved; the others save theirs behind their next step
                stopped_early = True
            except ClbenchError as error:
                yield turn.number, error
            else:
                turns.append(turn)
    if stopped_early:
        raise KeyboardInterrupt


def own_stream(device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """A place to launch work from: a new CUDA stream that begins behind all that is launched, or just here."""
    if device.type != "cuda":
        return nullcontext
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return lambda: torch.cuda.stream(stream)
