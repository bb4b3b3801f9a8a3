"""The per-iteration curve: counts of right answers per group at every evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Curve", "FloatArray", "IntArray"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Curve:
    """S evaluations of G groups. Step n means "behind update number n"; n = 0 is the untrained state.

    steps, task, phase: (S,) int64, not decreasing in (task, steps): when, and inside which task and phase.
    hits: (S, G) int64 right answers.  totals: (G,) int64 rows of each group's evaluation subset.
    valid: (S, G) bool, whether the group was evaluated there; elsewhere `hits` means nothing.
    groups: G names.  group_task: (G,) int64 task a group belongs to, -1 if to no single one.
    position: (S,) int64 stream position of each evaluation: samples that had been streamed; -1 where it is not known.
    task_ends: (K,) int64 step of the last update of each finished task. Task k owns the steps
        `task_ends[k-1] < n <= task_ends[k]`, so a second evaluation of task k at `n = task_ends[k-1]` is its state
        before the first update.
    """

    steps: IntArray
    task: IntArray
    phase: IntArray
    hits: IntArray
    totals: IntArray
    valid: NDArray[np.bool_]
    groups: tuple[str, ...]
    group_task: IntArray
    task_ends: IntArray
    position: IntArray

    @classmethod
    def of(
        cls,
        *,
        steps: ArrayLike,
        task: ArrayLike,
        hits: ArrayLike,
        totals: ArrayLike,
        group_task: ArrayLike,
        task_ends: ArrayLike,
        phase: ArrayLike | None = None,
        position: ArrayLike | None = None,
        valid: ArrayLike | None = None,
        groups: Sequence[str] | None = None,
    ) -> "Curve":
        """Build from anything array-like (CPU tensors too) and check it. `valid=None`: every group everywhere."""
        steps_ = np.asarray(steps, np.int64).reshape(-1)
        group_task_ = np.asarray(group_task, np.int64).reshape(-1)
        shape = (len(steps_), len(group_task_))
        curve = cls(
            steps=steps_,
            task=np.asarray(task, np.int64).reshape(-1),
            phase=np.zeros(shape[0], np.int64) if phase is None else np.asarray(phase, np.int64).reshape(-1),
            hits=np.asarray(hits, np.int64).reshape(shape),
            totals=np.asarray(totals, np.int64).reshape(-1),
            valid=np.ones(shape, np.bool_) if valid is None else np.asarray(valid, np.bool_).reshape(shape),
            groups=tuple(f"group {g}" for g in range(shape[1])) if groups is None else tuple(groups),
            group_task=group_task_,
            task_ends=np.asarray(task_ends, np.int64).reshape(-1),
            position=np.full(shape[0], -1) if position is None else np.asarray(position, np.int64).reshape(-1),
        )
        curve._check()
        return curve

    def _check(self) -> None:
        evaluations, groups = self.hits.shape
        if not len(self.steps) == len(self.task) == len(self.phase) == len(self.position) == evaluations:
            raise ValueError(f"steps, task, phase and position need {evaluations} entries, one per row of hits")
        if not len(self.totals) == len(self.groups) == groups:
            raise ValueError(f"totals and groups need {groups} entries, one per column of hits")
        if len(set(self.groups)) < groups:
            raise ValueError("groups need names of their own")
        if np.any((np.diff(self.task) < 0) | (np.diff(self.steps) < 0)):
            raise ValueError("evaluations must be in the order of the run")
        if np.any((self.hits < 0) | (self.hits > self.totals), where=self.valid):
            raise ValueError("hits must lie between 0 and the group's total")

    @cached_property
    def accuracy(self) -> FloatArray:
        """(S, G) fractions in [0, 1], NaN where a group was not evaluated."""
        out = np.full(self.hits.shape, np.nan)
        np.divide(self.hits, self.totals, out=out, where=self.valid & (self.totals > 0))
        return out

    @cached_property
    def mean_accuracy(self) -> FloatArray:
        """(S,) mean over the groups evaluated at each point, NaN where there is none."""
        measured = np.isfinite(self.accuracy)
        count = measured.sum(axis=1)
        out = np.full(len(self.steps), np.nan)
        np.divide(np.where(measured, self.accuracy, 0.0).sum(axis=1), count, out=out, where=count > 0)
        return out

    @property
    def num_tasks(self) -> int:
        """Tasks finished or begun."""
        return max(len(self.task_ends), int(self.task[-1]) + 1 if len(self.task) else 0)

    def left(self, group: int) -> slice:
        """The evaluations behind the last update of the group's own task (empty while that is being learned)."""
        owner = self.group_task[group]
        if owner < 0 or owner >= len(self.task_ends):
            return slice(len(self.steps), None)
        return slice(int(np.searchsorted(self.steps, self.task_ends[owner], side="right")), None)

    def during(self, task: int) -> slice:
        """The evaluations made inside a task, the one before its first update included."""
        return slice(*(int(edge) for edge in np.searchsorted(self.task, (task, task + 1))))
