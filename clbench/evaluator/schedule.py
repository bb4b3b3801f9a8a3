"""When to evaluate: densely behind a task switch, where the stability gap is, then sparsely."""

from bisect import bisect, bisect_left
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Schedule", "fit_schedule"]


class Schedule(NamedTuple):
    """Evaluate after each of the first `dense` steps of a task, then after every `every`-th; `every=0` never.

    samples: evaluate by samples instead (Si-Blurry protocol, card section 1): behind the batch with which more than a
    further multiple of so many samples has been streamed, at most once per batch.
    """

    every: int
    dense: int = 0
    samples: int | None = None

    @property
    def on(self) -> bool:
        """Whether there is any evaluation between task ends."""
        return self.every > 0 or self.samples is not None

    def due_by_samples(self, position: int, done: int) -> bool:
        """Whether to evaluate behind a batch that ends at stream position `position`, after `done` such evaluations."""
        return self.samples is not None and position > (done + 1) * self.samples

    def due(self, step_in_task: int) -> bool:
        """Whether to evaluate after the `step_in_task`-th step (from 1) of a task."""
        return self.every > 0 and (step_in_task <= self.dense or step_in_task % self.every == 0)

    def count(self, steps: int, samples: int = 0) -> int:
        """Evaluations of a task of `steps` steps and `samples` rows, its end included (by samples: at most)."""
        if steps == 0 or not self.on:
            return 0
        if self.samples is not None:
            return samples // self.samples + 2
        dense = min(self.dense, steps)
        sparse = steps // self.every - dense // self.every
        return dense + sparse + (not self.due(steps))


def fit_schedule(steps: Sequence[int], train_images: Sequence[int], eval_images: Sequence[int], dense: int) -> Schedule:
    """The densest schedule whose evaluations cost no more than training.

    steps, train_images, eval_images: per task, its steps, the images it trains on, the images of one evaluation. A
    training image counts three forward passes, an evaluated one counts one. If `dense` alone costs more than half of
    the budget, it is cut to what half of it pays. Depends on the scenario and the phases only, never on the machine.
    """
    budget = 3 * sum(train_images)

    def cost(schedule: Schedule) -> int:
        return sum(schedule.count(n) * images for n, images in zip(steps, eval_images, strict=True))

    longest = max(steps, default=1) or 1
    # both costs are monotonic: bisect finds the last `dense` and the first `every` that are paid for
    dense = max(bisect(range(dense + 1), budget / 2, key=lambda few: cost(Schedule(longest, few))) - 1, 0)
    every = 1 + bisect_left(range(1, longest), -budget, key=lambda often: -cost(Schedule(often, dense)))
    return Schedule(every, dense if every > 1 else 0)
