"""The per-iteration evaluator.

`observe` adds one row of hits per group to a table on the device and reads nothing back; `drain` is the only host copy.
Watching does not disturb: no generator of the run is touched, modules go into eval mode and back (or a snapshot is
evaluated, see `clbench.evaluator.engine`), batch-norm buffers stay as they are, so final weights are the same to the
bit with evaluation off, every 10 or every 1 iterations.
Source: `stability_gap` card; the subset of a group is fixed for the run (card section 5.1 says why).
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from clbench.data.reader import Reader
from clbench.errors import RunFailed
from clbench.evaluator.chunks import fitting_chunk, measured_chunk
from clbench.evaluator.engine import EngineName, make_engine, watching
from clbench.evaluator.heads import GroupCounts
from clbench.evaluator.subset import ResidentImages, draw_subset
from clbench.methods.base import Head, Method
from clbench.scenarios.model import Group, Scenario
from clbench.stream.stream import Unlocks

__all__ = ["Evaluator", "FullResult", "HeadCounts", "Mask", "answer", "watching"]

Mask = Literal["seen", "all", "task"]


class FullResult(NamedTuple):
    """Evaluation on all test rows. hits: (G,) int64; predictions: (sum of group sizes,) int32 in group order."""

    hits: Tensor
    predictions: Tensor


class HeadCounts(Protocol):
    """`clbench.evaluator.kernels.head_counts` or its reference."""

    def __call__(
        self,
        features: Tensor,
        head: Head,
        targets: Tensor,
        groups: Tensor,
        out: GroupCounts,
        allowed: Tensor | None = None,
        mask_index: Tensor | None = None,
    ) -> None: ...


class Evaluator:
    """Counts hits per group. `mask`: what predictions are taken over (see `Method.mask`); `slots`: how many
    observations the table holds; `per_group`: at most so many rows of each group per observation.

    chunk: rows of one forward pass; None: by a rule; `measure_chunk` chooses by time. It changes no result but in the
    last bits of logits. engine: see `clbench.evaluator.engine`. head_counts: counts from features and `Method.head`
    where a method has one, instead of from logits.
    """

    def __init__(
        self,
        scenario: Scenario,
        read: Reader,
        *,
        view: str,
        mask: Mask,
        per_group: int,
        slots: int,
        seed: int,
        device: torch.device | str = "cpu",
        chunk: int | None = None,
        engine: EngineName = "plain",
        head_counts: HeadCounts | None = None,
    ) -> None:
        self.scenario = scenario
        self.read = read
        self.view = view
        self.mask = mask
        self.device = torch.device(device)
        self.chunk = chunk or fitting_chunk(read, view, self.device)
        self.unlocks = Unlocks(scenario.first_seen, self.device)
        self.task_aware = scenario.setting == "task"
        self.subset = draw_subset(scenario.groups, per_group, seed, self.device)
        self.engine = make_engine(engine, self.device)
        self.head_counts = head_counts
        self.sizes = [b - a for a, b in zip(self.subset.starts, self.subset.starts[1:], strict=False)]
        self._answerable = self._answerable_classes()
        self._unlocks_at = [
            min((self.unlocks.first_seen[c] for c in group.targets.unique().tolist()), default=0)
            for group in scenario.groups
        ]
        groups = len(scenario.groups)
        self._table = torch.zeros((max(slots, 1), groups), dtype=torch.int64, device=self.device)
        self.points: list[tuple[int, int, int, int]] = []  # step, task, phase, stream position of each used slot
        self.active: list[tuple[int, ...]] = []  # groups evaluated at each used slot
        self._images = ResidentImages(self.subset, read, view)
        self._features: dict[int, tuple[int, Tensor]] = {}  # group -> (version, features of its subset)
        self._chosen: dict[tuple[tuple[int, ...], int], _Chosen] = {}

    # -- what to evaluate ----------------------------------------------------------------------------------------
    def active_groups(self, task: int, position: int) -> tuple[int, ...]:
        """Groups that count now: they have rows, their task has started and at least one class of their targets is
        unlocked."""
        return tuple(
            index
            for index, (group, unlock) in enumerate(zip(self.scenario.groups, self._unlocks_at, strict=True))
            if self.sizes[index] and (group.task is None or group.task <= task) and unlock < position
        )

    def observe(self, method: Method, task: int, phase: int, step: int, position: int) -> None:
        """Evaluate the live weights on the active groups' subsets, as the state behind update number `step`."""
        groups = self.active_groups(task, position)
        slot = len(self.points)
        if slot == len(self._table):
            self.engine.wait()
            self._table = torch.cat([self._table, torch.zeros_like(self._table)])
        seen = self.unlocks.index(position)
        version = None if self.task_aware else method.features_version

        def count(answering: Method, row: Tensor) -> None:
            self._count(answering, groups, seen, version, row)

        self.engine.observe(method, (groups, seen, version, self.chunk), count, self._table[slot])
        if not self._images.unwritten():
            raise RunFailed(
                f"{type(method).__name__} writes into the images it is given to classify, so later evaluations would "
                f"see other images; have its logits() and features() work on a copy"
            )
        self.points.append((step, task, phase, position))
        self.active.append(groups)

    def images_as_read(self) -> bool:
        """Whether the images that observations look at are what the data hold. Reads them anew: for checks."""
        return self._images.as_read()

    def phase_changed(self) -> None:
        """A phase has begun or ended: more of the method may have changed than its weights."""
        self.engine.changed()

    def measure_chunk(self, method: Method) -> int:
        """Choose `chunk` by the time that the method's answers take; returns it. Waits for the device, so it belongs
        ahead of the first step. Part of the state, so that a resumed run keeps it."""
        task = self._task_id(self.scenario.groups[0])
        allowed = self._allowed_for_method(None)

        def forward(count: int) -> None:
            method.logits(self._images(slice(0, count)), allowed, task)

        with watching(method):
            self.chunk = measured_chunk(forward, len(self.subset.rows), self.device)
        return self.chunk

    def full(self, method: Method, position: int, progress: Callable[[int, int], None] | None = None) -> FullResult:
        """Evaluate the deployed weights on every test row of every group, groups of future tasks included."""
        hits, predictions = [], []
        seen = self.unlocks.index(position)
        done, total = 0, sum(len(group.rows) for group in self.scenario.groups)
        with watching(method), method.deployed():
            for index, group in enumerate(self.scenario.groups):
                allowed = self._allowed(index, seen)
                correct = torch.zeros((), dtype=torch.int64, device=self.device)
                for start in range(0, len(group.rows), self.chunk):
                    rows = group.rows[start : start + self.chunk].to(self.device)
                    targets = group.targets[start : start + self.chunk].to(self.device)
                    domain = None if group.domain is None else group.domain[start : start + self.chunk].to(self.device)
                    images = self.read(rows, domain, self.view)
                    logits = method.logits(images, self._allowed_for_method(allowed), self._task_id(group))
                    predicted, right = answer(logits, targets, allowed)
                    correct += right.sum()
                    predictions.append(predicted.to(torch.int32))
                    done += len(rows)
                    if progress is not None:
                        progress(done, total)
                hits.append(correct)
        return FullResult(torch.stack(hits), torch.cat(predictions))

    # -- what came out -------------------------------------------------------------------------------------------
    def drain(self, start: int = 0) -> dict[str, Any]:
        """Copy the table to the host: `points` (S, 4) step, task, phase, stream position; `hits` (S, G); `valid`
        (S, G), from slot `start` on, and `totals` (G,)."""
        self.engine.wait()
        return {
            "points": self.points[start:],
            "hits": self._table[start : len(self.points)].cpu(),
            "valid": self._valid(start),
            "totals": torch.tensor(self.sizes),
        }

    def state_dict(self) -> dict[str, Any]:
        self.engine.wait()
        return {
            "chunk": self.chunk,
            "points": torch.tensor(self.points, dtype=torch.int64).reshape(-1, 4),
            "valid": self._valid(0),
            "hits": self._table[: len(self.points)].clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.engine.changed()
        self.chunk = state.get("chunk", self.chunk)  # checkpoints of schema 2 and older have none
        self.points = [(step, task, phase, position) for step, task, phase, position in state["points"].tolist()]
        self.active = [tuple(index for index, on in enumerate(row) if on) for row in state["valid"].tolist()]
        if len(self.points) > len(self._table):
            self._table = self._table.new_zeros((len(self.points), self._table.shape[1]))
        self._table[: len(self.points)] = state["hits"].to(self.device)

    # -- inside --------------------------------------------------------------------------------------------------
    def _count(self, method: Method, groups: tuple[int, ...], seen: int, version: int | None, row: Tensor) -> None:
        if self.task_aware:
            for index in groups:  # the network may differ by task: one forward pass each
                self._count_rows(method, (index,), seen, row, self._task_id(self.scenario.groups[index]), None)
        else:
            self._count_rows(method, groups, seen, row, None, version)

    def _count_rows(
        self, method: Method, groups: tuple[int, ...], seen: int, row: Tensor, task: int | None, version: int | None
    ) -> None:
        if not groups:
            return
        chosen = self._choose(groups, seen)
        head = method.head(task) if self.head_counts is not None else None
        features = None
        if version is not None:
            features = torch.cat([self._group_features(method, index, version) for index in groups])
        for start in range(0, len(chosen.places), self.chunk):
            cut = slice(start, start + self.chunk)
            part = chosen.part(cut)
            targets, group = self.subset.targets[part], self.subset.group[part]
            if head is not None and self.head_counts is not None:
                given = method.features(self._images(part), task) if features is None else features[cut]
                index = None if chosen.mask_index is None else chosen.mask_index[cut]
                self.head_counts(given, head, targets, group, GroupCounts(row), chosen.masks, index)
                continue
            mask = chosen.masks if chosen.rows is None else chosen.rows[cut]
            if features is not None:
                logits = method.classify(features[cut], self._allowed_for_method(mask), task)
            else:
                logits = method.logits(self._images(part), self._allowed_for_method(mask), task)
            _, right = answer(logits, targets, mask)
            row.index_add_(0, group, right.to(torch.int64))

    def _choose(self, groups: tuple[int, ...], seen: int) -> "_Chosen":
        key = (groups, seen)
        if key not in self._chosen:
            if not self.task_aware:
                self._chosen.clear()  # a newer state of the stream: the old choice does not come back
            places = self._places(groups)
            masks = [self._allowed(g, seen) for g in groups]
            if all(self._answerable[g] is self._answerable[groups[0]] for g in groups):
                self._chosen[key] = _Chosen(places, masks[0])
            else:
                full = torch.ones(self.scenario.num_classes, dtype=torch.bool, device=self.device)
                table = torch.stack([full if m is None else m for m in masks])
                sizes = torch.tensor([self.sizes[g] for g in groups], device=self.device)
                index = torch.arange(len(groups), device=self.device).repeat_interleave(sizes, output_size=len(places))
                self._chosen[key] = _Chosen(places, table, index, table[index] if self.head_counts is None else None)
        return self._chosen[key]

    def _places(self, groups: tuple[int, ...]) -> range | Tensor:
        starts = self.subset.starts
        if groups == tuple(range(groups[0], groups[0] + len(groups))):
            return range(starts[groups[0]], starts[groups[-1] + 1])
        return torch.cat([torch.arange(starts[g], starts[g + 1], device=self.device) for g in groups])

    def _group_features(self, method: Method, index: int, version: int) -> Tensor:
        cached = self._features.get(index)
        if cached is None or cached[0] != version:
            # one pass per group: its bits must not depend on which other groups are active, or a resume would differ
            start, end = self.subset.starts[index], self.subset.starts[index + 1]
            parts = [
                method.features(self._images(slice(a, min(a + self.chunk, end))), None)
                for a in range(start, end, self.chunk)
            ]
            cached = (version, torch.cat(parts))
            self._features[index] = cached
        return cached[1]

    def _allowed(self, index: int, seen: int) -> Tensor | None:
        """(C,) bool classes an answer to group `index` may come from, None for all of them."""
        answerable = self._answerable[index]
        if self.mask != "seen":
            return answerable
        mask = self.unlocks.mask(seen)
        return mask if answerable is None else mask & answerable

    def _allowed_for_method(self, allowed: Tensor | None) -> Tensor:
        if allowed is not None:
            return allowed
        return torch.ones(self.scenario.num_classes, dtype=torch.bool, device=self.device)

    def _answerable_classes(self) -> list[Tensor | None]:
        out: list[Tensor | None] = []
        known: dict[tuple[int, ...], Tensor | None] = {}  # groups with equal classes share one tensor
        for group in self.scenario.groups:
            mask = torch.zeros(self.scenario.num_classes, dtype=torch.bool)
            mask[group.classes] = True
            if self.mask == "task" and group.task is not None:
                own = torch.zeros_like(mask)
                own[self.scenario.tasks[group.task].classes] = True
                mask &= own
            key = tuple(mask.nonzero()[:, 0].tolist())
            if key not in known:
                known[key] = None if bool(mask.all()) else mask.to(self.device)
            out.append(known[key])
        return out

    def _task_id(self, group: Group) -> int | None:
        return group.task if self.task_aware else None

    def _valid(self, start: int) -> Tensor:
        valid = torch.zeros((len(self.points) - start, len(self.scenario.groups)), dtype=torch.bool)
        for slot, groups in enumerate(self.active[start:]):
            valid[slot, list(groups)] = True
        return valid


class _Chosen(NamedTuple):
    """What one observation looks at. places: R of the subset, a range where they lie in a row or (R,) int64. masks:
    None, one (C,) bool for all, or (M, C) with mask_index (R,) int64 and, unless heads are fused, the mask of every
    row, `rows` (R, C)."""

    places: range | Tensor
    masks: Tensor | None
    mask_index: Tensor | None = None
    rows: Tensor | None = None

    def part(self, cut: slice) -> slice | Tensor:
        """What to index the subset with: a slice, which copies nothing, where the places lie in a row."""
        places = self.places[cut]
        return slice(places.start, places.stop) if isinstance(places, range) else places


def answer(logits: Tensor, targets: Tensor, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
    """Predictions (B,) int64 and whether they are right (B,) bool; ties go to the lowest class id.

    logits: (B, C); allowed: (C,) or (B, C) bool, or None for all. Where nothing is allowed nothing is right.
    """
    if allowed is None:
        predicted = logits.argmax(dim=1)
        return predicted, predicted == targets
    predicted = logits.masked_fill(~allowed, -torch.inf).argmax(dim=1)
    open_target = allowed[targets] if allowed.ndim == 1 else allowed.gather(1, targets[:, None])[:, 0]
    return predicted, (predicted == targets) & open_target
