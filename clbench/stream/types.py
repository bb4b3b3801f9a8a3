"""The words a method and the learner share: where a run is, what loop is asked for, what one iteration gets."""

from typing import Literal, NamedTuple

from torch import Tensor

__all__ = ["Batch", "Cursor", "Phase"]


class Cursor(NamedTuple):
    """The whole position of a run. `iteration` counts batches inside the phase (over all its epochs), `update` the
    optimiser steps on one batch, `step` all updates of the run so far."""

    task: int
    phase: int
    iteration: int
    update: int
    step: int


class Phase(NamedTuple):
    """A loop that a method asks the learner for.

    source: `task` rows of the current task, `val` its validation rows, `seen` rows of all tasks so far, `none` the
        method draws its own inputs (batches then have zero rows; give `iterations`).
    epochs, iterations: at most one; neither means the scenario's epochs (one if it is online).
    batch_size: None means the scenario's.  updates: None means the scenario's updates per batch.
    order: `shuffled` anew each epoch, or `listed`. Online scenarios always list the rows of source `task`.
    first: only the first so many rows of the source, in listed order.
    view: the view that images are read through; `features` for the cached features of a frozen backbone.
    drop_last: None means the scenario's.
    """

    name: str
    source: Literal["task", "val", "seen", "none"] = "task"
    epochs: int | None = None
    iterations: int | None = None
    batch_size: int | None = None
    order: Literal["shuffled", "listed"] = "shuffled"
    first: int | None = None
    view: str = "train"
    updates: int | None = None
    drop_last: bool | None = None


class Batch(NamedTuple):
    """One iteration's input; a function of (scenario, phase, cursor, seed).

    images: (B, C, H, W) float32, or (B, D) features if the phase's view is `features`.
    targets, rows: (B,) int64.  domain: (B,) int64 or None.
    seen: (num_classes,) bool, classes unlocked up to and including this batch.
    epoch: pass over the source, from 0.  last_update: no further update follows on this batch.
    """

    images: Tensor
    targets: Tensor
    rows: Tensor
    domain: Tensor | None
    seen: Tensor
    at: Cursor
    phase: Phase
    epoch: int
    last_update: bool = True
