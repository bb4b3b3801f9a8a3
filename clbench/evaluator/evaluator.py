"""The per-iteration evaluator.

`observe` adds one row of hits per group to a table on the device and reads nothing back; `drain` is the only host copy.
Watching does not disturb: no generator of the run is touched, modules go into eval mode and back, batch-norm buffers
stay as they are, so final weights are the same to the bit with evaluation off, every 10 or every 1 iterations.
Source: `stability_gap` card; the subset of a group is fixed for the run (card section 5.1 says why).
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from clbench.data.reader import Reader
from clbench.methods.base import Method
from clbench.rng import generator
from clbench.scenarios.model import Group, Scenario
from clbench.stream.stream import Unlocks

__all__ = ["Evaluator", "FullResult", "Mask", "watching"]

Mask = Literal["seen", "all", "task"]
IMAGE_CACHE_BYTES = 512 * 2**20
CHUNK = 512  # rows of one forward pass on 32 px images; fewer of larger ones on a CPU, see `fitting_chunk`


class FullResult(NamedTuple):
    """Evaluation on all test rows. hits: (G,) int64; predictions: (sum of group sizes,) int32 in group order."""

    hits: Tensor
    predictions: Tensor


class _Subset(NamedTuple):
    """Rows evaluated at every observation: one group's slice is `starts[g]:starts[g + 1]`."""

    rows: Tensor
    targets: Tensor
    domain: Tensor | None
    group: Tensor
    starts: list[int]


class Evaluator:
    """Counts hits per group. `mask`: what predictions are taken over (see `Method.mask`); `slots`: how many
    observations the table holds; `per_group`: at most so many rows of each group per observation."""

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
    ) -> None:
        self.scenario = scenario
        self.read = read
        self.view = view
        self.mask = mask
        self.device = torch.device(device)
        self.chunk = chunk or fitting_chunk(read, view, self.device)
        self.unlocks = Unlocks(scenario.first_seen, self.device)
        self.task_aware = scenario.setting == "task"
        self.subset = self._subset(per_group, seed)
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
        self._images: Tensor | None = None
        self._features: dict[int, tuple[int, Tensor]] = {}  # group -> (version, features of its subset)
        self._chosen: dict[tuple[tuple[int, ...], int], tuple[Tensor, Tensor | None]] = {}

    # -- what to evaluate ----------------------------------------------------------------------------------------
    def active_groups(self, task: int, position: int) -> tuple[int, ...]:
        """Groups that count now: their task has started and at least one class of their targets is unlocked."""
        return tuple(
            index
            for index, (group, unlock) in enumerate(zip(self.scenario.groups, self._unlocks_at, strict=True))
            if (group.task is None or group.task <= task) and unlock < position
        )

    def observe(self, method: Method, task: int, phase: int, step: int, position: int) -> None:
        """Evaluate the live weights on the active groups' subsets, as the state behind update number `step`."""
        groups = self.active_groups(task, position)
        slot = len(self.points)
        if slot == len(self._table):
            self._table = torch.cat([self._table, torch.zeros_like(self._table)])
        with watching(method):
            self._count(method, groups, self.unlocks.index(position), self._table[slot])
        self.points.append((step, task, phase, position))
        self.active.append(groups)

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
        return {
            "points": self.points[start:],
            "hits": self._table[start : len(self.points)].cpu(),
            "valid": self._valid(start),
            "totals": torch.tensor(self.sizes),
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "points": torch.tensor(self.points, dtype=torch.int64).reshape(-1, 4),
            "valid": self._valid(0),
            "hits": self._table[: len(self.points)].clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.points = [(step, task, phase, position) for step, task, phase, position in state["points"].tolist()]
        self.active = [tuple(index for index, on in enumerate(row) if on) for row in state["valid"].tolist()]
        if len(self.points) > len(self._table):
            self._table = self._table.new_zeros((len(self.points), self._table.shape[1]))
        self._table[: len(self.points)] = state["hits"].to(self.device)

    # -- inside --------------------------------------------------------------------------------------------------
    def _count(self, method: Method, groups: tuple[int, ...], seen: int, row: Tensor) -> None:
        version = method.features_version if not self.task_aware else None
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
        chosen, allowed = self._choose(groups, seen)
        features = None
        if version is not None:
            features = torch.cat([self._group_features(method, index, version) for index in groups])
        for start in range(0, len(chosen), self.chunk):
            cut = slice(start, start + self.chunk)
            part = chosen[cut]
            mask = allowed if allowed is None or allowed.ndim == 1 else allowed[cut]
            if features is not None:
                logits = method.classify(features[cut], self._allowed_for_method(mask), task)
            else:
                logits = method.logits(self._read_subset(part), self._allowed_for_method(mask), task)
            _, right = answer(logits, self.subset.targets[part], mask)
            row.index_add_(0, self.subset.group[part], right.to(torch.int64))

    def _choose(self, groups: tuple[int, ...], seen: int) -> tuple[Tensor, Tensor | None]:
        """Subset positions (R,) of the groups, and their mask: None, one (C,) for all, or (R, C)."""
        key = (groups, seen)
        if key not in self._chosen:
            if not self.task_aware:
                self._chosen.clear()  # a newer state of the stream: the old choice does not come back
            starts = self.subset.starts
            chosen = torch.cat([torch.arange(starts[g], starts[g + 1], device=self.device) for g in groups])
            masks = [self._allowed(g, seen) for g in groups]
            allowed = masks[0]
            if any(self._answerable[g] is not self._answerable[groups[0]] for g in groups):
                full = torch.ones(self.scenario.num_classes, dtype=torch.bool, device=self.device)
                rows = [
                    (full if m is None else m).expand(self.sizes[g], -1) for g, m in zip(groups, masks, strict=True)
                ]
                allowed = torch.cat(rows)
            self._chosen[key] = (chosen, allowed)
        return self._chosen[key]

    def _group_features(self, method: Method, index: int, version: int) -> Tensor:
        cached = self._features.get(index)
        if cached is None or cached[0] != version:
            # one pass per group: its bits must not depend on which other groups are active, or a resume would differ
            start, end = self.subset.starts[index], self.subset.starts[index + 1]
            parts = [
                method.features(self._read_subset(torch.arange(a, min(a + self.chunk, end), device=self.device)), None)
                for a in range(start, end, self.chunk)
            ]
            cached = (version, torch.cat(parts))
            self._features[index] = cached
        return cached[1]

    def _read_subset(self, chosen: Tensor) -> Tensor:
        subset = self.subset
        if self._images is None:
            view_bytes = 4 * math.prod(self.read.output_shape(self.view)) if self.view in self.read.views else 0
            if view_bytes * len(subset.rows) > IMAGE_CACHE_BYTES:
                domain = None if subset.domain is None else subset.domain[chosen]
                return self.read(subset.rows[chosen], domain, self.view)
            self._images = self.read(subset.rows, subset.domain, self.view)
        return self._images[chosen]

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

    def _subset(self, per_group: int, seed: int) -> _Subset:
        rows, targets, domains, index, starts = [], [], [], [], [0]
        for number, group in enumerate(self.scenario.groups):
            rng = generator(seed, "evaluation-subset", number)
            keep = torch.randperm(len(group.rows), generator=rng)[:per_group].sort().values
            rows.append(group.rows[keep])
            targets.append(group.targets[keep])
            if group.domain is not None:
                domains.append(group.domain[keep])
            index.append(torch.full((len(keep),), number))
            starts.append(starts[-1] + len(keep))
        return _Subset(
            torch.cat(rows).to(self.device),
            torch.cat(targets).to(self.device),
            torch.cat(domains).to(self.device) if domains else None,
            torch.cat(index).to(self.device),
            starts,
        )

    def _valid(self, start: int) -> Tensor:
        valid = torch.zeros((len(self.points) - start, len(self.scenario.groups)), dtype=torch.bool)
        for slot, groups in enumerate(self.active[start:]):
            valid[slot, list(groups)] = True
        return valid


def fitting_chunk(read: Reader, view: str, device: torch.device) -> int:
    """Rows of one forward pass. On a CPU activations of large images fall out of the cache: mobilenetv2_100 at 128 px
    takes 3 times longer per image in batches of 256 than in batches of 16 to 32 (see `clbench.backbones.features`)."""
    if device.type != "cpu" or view not in read.views:
        return CHUNK
    return min(CHUNK, max(16, CHUNK * 3 * 32 * 32 // math.prod(read.output_shape(view))))


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


@contextlib.contextmanager
def watching(method: Method) -> Iterator[None]:
    """Eval mode for all modules of a method, without gradients; every module's own mode is put back."""
    training = [module for root in method.modules() for module in root.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
