"""Curves for the tests: one group per task, evaluated behind every update, and the same as plain lists."""

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from clbench.metrics import Curve

TOTAL = 1000


@dataclass
class Plain:
    """series[k] = [(step, accuracy), ...] of task k; ends[k] = last step of task k."""

    series: dict[int, list[tuple[int, float]]]
    ends: list[int]

    def curve(self, total: int = TOTAL) -> Curve:
        steps = sorted({step for series in self.series.values() for step, _ in series})
        hits = np.zeros((len(steps), len(self.series)), np.int64)
        valid = np.zeros(hits.shape, bool)
        for task, series in self.series.items():
            for step, accuracy in series:
                slot = steps.index(step)
                hits[slot, task], valid[slot, task] = round(accuracy * total), True
        return Curve.of(
            steps=steps, task=[self.task_at(step) for step in steps], hits=hits, valid=valid,
            totals=[total] * len(self.series), group_task=list(self.series), task_ends=self.ends,
        )  # fmt: skip

    def task_at(self, step: int) -> int:
        return next(task for task, end in enumerate(self.ends) if step <= end)


@st.composite
def plain_curves(draw: st.DrawFn, min_tasks: int = 1, max_tasks: int = 4) -> Plain:
    """Every seen task behind every update; the untrained state for task 0."""
    lengths = draw(st.lists(st.integers(1, 12), min_size=min_tasks, max_size=max_tasks))
    ends = np.cumsum(lengths).tolist()
    series = {}
    for task in range(len(lengths)):
        first = 0 if task == 0 else ends[task - 1] + 1
        points = range(first, ends[-1] + 1)
        hits = draw(st.lists(st.integers(0, TOTAL), min_size=len(points), max_size=len(points)))
        series[task] = [(step, h / TOTAL) for step, h in zip(points, hits, strict=True)]
    return Plain(series, ends)
