"""How a run shows that it lives: a bar on a terminal, a plain line now and then elsewhere (a log file, CI)."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

__all__ = ["BarProgress", "LineProgress", "Together", "live_progress"]

LINE_SECONDS = 10.0


def live_progress(label: str, stream: TextIO | None = None) -> BarProgress | LineProgress:
    """The fitting kind for `stream` (stderr by default), which the results on stdout never mix with."""
    stream = sys.stderr if stream is None else stream
    console = Console(file=stream)
    return BarProgress(label, console) if console.is_terminal else LineProgress(label, stream)


class BarProgress:
    """A bar with steps, rate, time left, task, phase and current accuracy; see `clbench.learner.learner.Progress`.

    A context manager: leaving it leaves the last state of the bar on the screen.
    """

    def __init__(self, label: str, console: Console) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[state]}"),
            console=console,
        )
        self._label = label
        self._steps: TaskID | None = None
        self._clock = Clock()
        self._stage: tuple[str, TaskID] | None = None

    def __enter__(self) -> BarProgress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end_stage()
        self._bar.stop()

    def begin(self, done: int, total: int) -> None:
        self._end_stage()
        self._clock = Clock(done)
        self._steps = self._bar.add_task(self._label, total=total, completed=done, rate="", state="")

    def update(self, done: int, *, task: int, num_tasks: int, phase: str, accuracy: float | None) -> None:
        if self._steps is None:
            return
        self._end_stage()
        state = state_text(task, num_tasks, phase, accuracy)
        self._bar.update(self._steps, completed=done, rate=f"{self._clock.rate(done):.0f} steps/s", state=state)

    def stage(self, name: str, done: int, total: int) -> None:
        if self._stage is None or self._stage[0] != name:
            self._end_stage()
            self._stage = (name, self._bar.add_task(f"  {name}", total=total, rate="", state=""))
        self._bar.update(self._stage[1], completed=done, total=total)

    def finish(self, done: int) -> None:
        """All steps are done."""
        self._end_stage()
        if self._steps is not None:
            self._bar.update(self._steps, completed=done, state="done")

    def _end_stage(self) -> None:
        if self._stage is not None:
            self._bar.remove_task(self._stage[1])
            self._stage = None


class LineProgress:
    """One line at the start and then about every ten seconds. Implements `clbench.learner.learner.Progress`."""

    def __init__(self, label: str, stream: TextIO) -> None:
        self._label = label
        self._stream = stream
        self._total = 0
        self._clock = Clock()
        self._shown = 0.0

    def __enter__(self) -> LineProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stream.flush()

    def begin(self, done: int, total: int) -> None:
        self._total, self._clock, self._shown = total, Clock(done), time.monotonic()
        self._say(f"{total} steps" + (f", going on from step {done}" if done else ""))

    def update(self, done: int, *, task: int, num_tasks: int, phase: str, accuracy: float | None) -> None:
        rate = self._clock.rate(done)
        left = f"{(self._total - done) / rate:.0f} s left, " if rate else ""
        if self._due():
            share = f"step {done} of {self._total}, {rate:.0f} steps/s, {left}"
            self._say(share + state_text(task, num_tasks, phase, accuracy))

    def stage(self, name: str, done: int, total: int) -> None:
        if self._due():
            self._say(f"{name} {done} of {total}")

    def finish(self, done: int) -> None:
        """All steps are done."""
        self._say(f"{done} steps done")

    def _due(self) -> bool:
        now = time.monotonic()
        if now - self._shown < LINE_SECONDS:
            return False
        self._shown = now
        return True

    def _say(self, text: str) -> None:
        print(f"{self._label}: {text}", file=self._stream, flush=True)


class Together:
    """One display for several runs that take turns: the sum of their steps, the state of the one that told last."""

    def __init__(self, display: BarProgress | LineProgress, num_runs: int) -> None:
        self._display = display
        self._num_runs = num_runs
        self._steps: dict[int, int] = {}  # run -> steps done

    def share(self, index: int) -> Share:
        """What run number `index` tells its progress to."""
        return Share(self, index)

    def begin(self, index: int, done: int, total: int) -> None:
        first = not self._steps
        self._steps[index] = done
        if first:  # runs that have not begun are taken to be as long as this one
            self._display.begin(done, total * self._num_runs)

    def update(self, index: int, done: int, **state: Any) -> None:
        self._steps[index] = done
        self._display.update(sum(self._steps.values()), **state)


class Share:
    """The part of one run in a display that several share; see `clbench.learner.learner.Progress`."""

    def __init__(self, together: Together, index: int) -> None:
        self._together = together
        self._index = index

    def begin(self, done: int, total: int) -> None:
        self._together.begin(self._index, done, total)

    def update(self, done: int, *, task: int, num_tasks: int, phase: str, accuracy: float | None) -> None:
        self._together.update(self._index, done, task=task, num_tasks=num_tasks, phase=phase, accuracy=accuracy)

    def stage(self, name: str, done: int, total: int) -> None:
        """Full tests of one of many runs are not shown."""


class Clock:
    """Steps per second since this process took over."""

    def __init__(self, done: int = 0) -> None:
        self._begin = (done, time.monotonic())

    def rate(self, done: int) -> float:
        seconds = time.monotonic() - self._begin[1]
        return (done - self._begin[0]) / seconds if seconds > 0 else 0.0


def state_text(task: int, num_tasks: int, phase: str, accuracy: float | None) -> str:
    text = f"task {task + 1}/{num_tasks} {phase}"
    return text if accuracy is None else f"{text}, accuracy {accuracy:.3f}"
