"""Batches as a function of the cursor.

Nothing is iterated: the rows of iteration i of a phase follow from the scenario, the phase and the seed alone, so a
run resumes at any iteration by its cursor, and evaluation can't shift what training sees.
"""

import bisect
from typing import NamedTuple

import torch
from torch import Tensor

from clbench.data.reader import Reader
from clbench.rng import generator
from clbench.scenarios.model import Scenario
from clbench.stream.types import Batch, Cursor, Phase

__all__ = ["Plan", "Stream", "Unlocks"]


class Plan(NamedTuple):
    """Phase `number` of a task laid out. rows, targets: (n,) int64 on the device, domain (n,) or None.
    `iterations` counts batches over all epochs, `per_epoch` those of one."""

    phase: Phase
    task: int
    number: int
    rows: Tensor
    targets: Tensor
    domain: Tensor | None
    batch_size: int
    per_epoch: int
    iterations: int
    updates: int
    listed: bool

    @property
    def steps(self) -> int:
        """Optimiser steps, if the phase isn't ended early."""
        return self.iterations * self.updates


class Unlocks:
    """Which classes are seen at a stream position; masks live on the device, one for each moment that unlocks any."""

    def __init__(self, first_seen: Tensor, device: torch.device) -> None:
        self.positions: list[int] = sorted(set(first_seen.tolist()))
        self.first_seen: list[int] = first_seen.tolist()
        self._masks = [torch.zeros(len(first_seen), dtype=torch.bool, device=device)]
        self._masks += [(first_seen <= position).to(device) for position in self.positions]

    def index(self, position: int) -> int:
        """Number of unlocking moments before `position` (a class is seen if its first_seen < position)."""
        return bisect.bisect_left(self.positions, position)

    def mask(self, index: int) -> Tensor:
        """(C,) bool, classes seen after `index` unlocking moments."""
        return self._masks[index]


class Stream:
    """Lays out phases and makes their batches. `read` is the store's reader; sizes default to the scenario's."""

    def __init__(
        self,
        scenario: Scenario,
        read: Reader,
        *,
        seed: int,
        device: torch.device | str = "cpu",
        batch_size: int | None = None,
        epochs: int | None = None,
        updates: int | None = None,
    ) -> None:
        defaults = scenario.defaults
        self.scenario = scenario
        self.read = read
        self.seed = seed
        self.device = torch.device(device)
        self.batch_size = batch_size or defaults.batch_size
        self.epochs = 1 if scenario.online else (epochs or defaults.epochs)
        self.updates = updates or defaults.updates_per_batch
        self.unlocks = Unlocks(scenario.first_seen, self.device)
        self._shuffle: tuple[tuple[int, int, int], Tensor] | None = None

    def plan(self, task: int, phase: Phase, index: int) -> Plan:
        """Lay out phase number `index` of task number `task`."""
        if phase.epochs is not None and phase.iterations is not None:
            raise ValueError(f"phase {phase.name!r} gives both epochs and iterations")
        rows, targets, domain = self._source(task, phase)
        if phase.first is not None:
            rows, targets = rows[: phase.first], targets[: phase.first]
            domain = domain[: phase.first] if domain is not None else None
        batch_size = phase.batch_size or self.batch_size
        drop_last = self.scenario.defaults.drop_last if phase.drop_last is None else phase.drop_last
        # a task smaller than one batch still gives one
        per_epoch = max(len(rows) // batch_size, min(len(rows), 1)) if drop_last else -(-len(rows) // batch_size)
        if phase.iterations is not None:
            iterations = phase.iterations if per_epoch or phase.source == "none" else 0
        else:
            iterations = per_epoch * (self.epochs if phase.epochs is None else phase.epochs)
        return Plan(
            phase, task, index,
            rows.to(self.device), targets.to(self.device), None if domain is None else domain.to(self.device),
            batch_size, per_epoch, iterations, phase.updates or (self.updates if phase.source == "task" else 1),
            listed=phase.order == "listed" or (self.scenario.online and phase.source == "task"),
        )  # fmt: skip

    def position(self, plan: Plan, iteration: int) -> int:
        """Stream position behind this iteration: samples that have been streamed, ahead of any later batch."""
        start, end = self.scenario.offsets[plan.task], self.scenario.offsets[plan.task + 1]
        if not (self.scenario.online and plan.phase.source == "task"):
            return end
        return min(start + (iteration + 1) * plan.batch_size, end)

    def batch(self, plan: Plan, at: Cursor) -> Batch:
        """The batch at a cursor. Pure: the same arguments give the same batch to the bit."""
        phase = plan.phase
        seen = self.unlocks.mask(self.unlocks.index(self.position(plan, at.iteration)))
        last_update = at.update == plan.updates - 1
        if phase.source == "none":
            none = plan.rows[:0]
            images = torch.empty((0,), device=self.device)
            return Batch(images, none, none, None, seen, at, phase, 0, last_update)
        epoch, inside = divmod(at.iteration, plan.per_epoch)
        cut = slice(inside * plan.batch_size, (inside + 1) * plan.batch_size)
        if plan.listed:
            rows, targets = plan.rows[cut], plan.targets[cut]
            domain = None if plan.domain is None else plan.domain[cut]
        else:
            chosen = self._permutation(plan, epoch)[cut]
            rows, targets = plan.rows[chosen], plan.targets[chosen]
            domain = None if plan.domain is None else plan.domain[chosen]
        view = self.read.views.get(phase.view)
        rng = generator(self.seed, "view", at.step, device=self.device) if view is not None and view.random else None
        images = self.read(rows, domain, phase.view, rng)
        return Batch(images, targets, rows, domain, seen, at, phase, epoch, last_update)

    def _permutation(self, plan: Plan, epoch: int) -> Tensor:
        key = (plan.task, plan.number, epoch)
        if self._shuffle is None or self._shuffle[0] != key:
            rng = generator(self.seed, "shuffle", *key)
            self._shuffle = (key, torch.randperm(len(plan.rows), generator=rng).to(self.device))
        return self._shuffle[1]

    def _source(self, index: int, phase: Phase) -> tuple[Tensor, Tensor, Tensor | None]:
        task = self.scenario.tasks[index]
        empty = torch.empty(0, dtype=torch.int64)
        if phase.source == "none":
            if phase.iterations is None:
                raise ValueError(f"phase {phase.name!r} draws its own inputs and must give iterations")
            return empty, empty, None
        if phase.source == "val":
            rows, targets = task.val if task.val is not None else (empty, empty)
            return rows, targets, None
        if phase.source == "seen":
            tasks = self.scenario.tasks[: index + 1]
            domains = [t.domain for t in tasks if t.domain is not None]
            if domains and len(domains) != len(tasks):
                raise ValueError(f"scenario {self.scenario.id}: some tasks have domains and others have none")
            domain = torch.cat(domains) if domains else None
            return torch.cat([t.rows for t in tasks]), torch.cat([t.targets for t in tasks]), domain
        return task.rows, task.targets, task.domain
