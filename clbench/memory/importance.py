"""A memory that keeps classes balanced and, inside a class, what helps most: CLIB's sample-wise importance.

Every sample that arrives is stored. Once the memory is full, the class with most exemplars (the arriving one counted)
gives up the exemplar of least importance. An exemplar's importance is a running estimate of how much the loss of the
memory falls when it is trained on: refreshed from the losses of all exemplars, for those drawn since the last refresh.

Koh et al., ICLR 2022 (i-Blurry, CLIB); rule and quirks from the `hle` card, sections 1.4 and 5.6, and, where it is
silent (first value, ties), from reading methods/clib.py and utils/data_loader.py of naver-ai/i-Blurry.

Everything is preallocated on the device and nothing is read back: samples are stored one after the other, because each
eviction depends on the counts that the one before it left, by a short loop of device operations.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from clbench.memory.buffer import Exemplars

__all__ = ["NEVER", "ImportanceMemory", "ImportanceRule", "first_importance", "least_important", "updated_importance"]

ImportanceRule = Literal["released", "intended"]
NEVER = 2**40  # arrival number of what has not arrived yet
EQUAL = 1e-9  # importance, in units of the loss, that differs by less is equal: means round differently


def updated_importance(
    importance: Tensor, draws: Tensor, loss_change: Tensor, decay: float, rule: ImportanceRule
) -> Tensor:
    """(M,) new importance. draws: (M,) int64, how often each exemplar was trained on since the last refresh (0 leaves
    it as it is). loss_change: 0-d, mean change of the exemplars' losses since then, negative if they fell.

    With m the mean importance over the n draws, those drawn move by -(1 - decay) * (loss_change - m / n), rule
    `released`: the mean is divided by n once more and has the other sign than an average would need. Rule `intended`
    is the moving average itself: -(1 - decay) * (loss_change + m). Under `released` the draws of a slot also count for
    an exemplar that took the slot since.
    """
    number = draws.sum().clamp(min=1)
    mean = (importance * draws).sum() / number
    difference = loss_change - mean / number if rule == "released" else loss_change + mean
    return torch.where(draws > 0, importance - (1 - decay) * difference, importance)


def least_important(importance: Tensor, arrived: Tensor, candidates: Tensor) -> Tensor:
    """(1,) int64 slot of the least important candidate; of equal ones (to 1e-9) the one that arrived first.

    importance: (M,) float.  arrived: (M,) int64.  candidates: (M,) bool, at least one.
    """
    score = importance.masked_fill(~candidates, torch.inf)
    return arrived.masked_fill(score > score.min() + EQUAL, NEVER).argmin(0, keepdim=True)


def first_importance(importance: Tensor, same_class: Tensor, otherwise: Tensor) -> Tensor:
    """0-d: mean importance of the other exemplars of the new one's class (M,) bool, or `otherwise` if it has none."""
    number = same_class.sum()
    mean = (importance * same_class).sum() / number.clamp(min=1)
    return torch.where(number > 0, mean, otherwise)


class ImportanceMemory:
    """`capacity` exemplars of `num_classes` classes: rows, targets, importance.

    decay: of the running estimate. rule: see `updated_importance`.
    num_seen: samples that have arrived. counts: (C,) int64 exemplars per class. met: (C,) int64 number of the first
    sample of each class, NEVER before it came. arrived: (M,) int64 number of each exemplar.
    Raises ValueError for a capacity below 1.
    """

    def __init__(
        self,
        capacity: int,
        num_classes: int,
        device: torch.device | str = "cpu",
        *,
        decay: float = 0.9,
        rule: ImportanceRule = "released",
    ) -> None:
        if capacity < 1:
            raise ValueError(f"capacity is {capacity}, it must be 1 or more")
        self.capacity = capacity
        self.decay = decay
        self.rule: ImportanceRule = rule
        self.num_seen = 0
        self.refreshed_at = 0  # num_seen at the last refresh: what arrived before it has a loss of its own
        self.has_domain = False
        self.counts = torch.zeros(num_classes, dtype=torch.int64, device=device)
        self.met = torch.full((num_classes,), NEVER, dtype=torch.int64, device=device)
        self._index = torch.zeros((3, capacity), dtype=torch.int64, device=device)  # rows, targets, domain
        self._arrived = torch.full((capacity,), NEVER, dtype=torch.int64, device=device)
        self._draws = torch.zeros(capacity, dtype=torch.int64, device=device)
        self._importance = torch.zeros(capacity, dtype=torch.float64, device=device)
        self._loss = torch.zeros(capacity, dtype=torch.float64, device=device)

    def __len__(self) -> int:
        return min(self.num_seen, self.capacity)

    @property
    def rows(self) -> Tensor:
        """(len,) int64 rows held, by slot."""
        return self._index[0, : len(self)]

    @property
    def targets(self) -> Tensor:
        """(len,) int64 targets held, by slot."""
        return self._index[1, : len(self)]

    @property
    def domain(self) -> Tensor | None:
        """(len,) int64 domains held, by slot, or None."""
        return self._index[2, : len(self)] if self.has_domain else None

    @property
    def importance(self) -> Tensor:
        """(len,) float64."""
        return self._importance[: len(self)]

    @property
    def arrived(self) -> Tensor:
        """(len,) int64 number of each exemplar among all samples that arrived."""
        return self._arrived[: len(self)]

    @property
    def loss(self) -> Tensor:
        """(len,) float64 loss of each exemplar at the last refresh; 0 for those that arrived since."""
        return self._loss[: len(self)]

    def sample(self, size: int, rng: torch.Generator) -> Exemplars:
        """Draw min(size, len) distinct slots uniformly, whatever their class. What is trained on, `mark`."""
        slots = torch.randperm(len(self), generator=rng, device=rng.device)[:size]
        rows, targets, domain = self._index.index_select(1, slots).unbind()
        return Exemplars(
            slots, rows, targets, domain if self.has_domain else None,
            {"importance": self._importance.index_select(0, slots)},
        )  # fmt: skip

    def mark(self, slots: Tensor, used: Tensor | None = None) -> None:
        """Count that the exemplars at `slots` (m,) int64 were trained on; used: (m,) bool, those that were."""
        ones = torch.ones_like(slots) if used is None else used.to(torch.int64)
        self._draws.index_add_(0, slots, ones)

    def add(self, rows: Tensor, targets: Tensor, domain: Tensor | None = None, related: Tensor | None = None) -> None:
        """Store a batch: rows, targets (B,) int64, domain (B,) int64 or None.

        related: (C, k) int64 or None. With it, exemplars of the classes `related[c]` may be given up for class c too.
        """
        number = torch.arange(self.num_seen, self.num_seen + len(rows), device=targets.device)
        self.met.scatter_reduce_(0, targets, number, "amin")
        arriving = torch.stack([rows, targets, torch.zeros_like(rows) if domain is None else domain])
        self.has_domain |= domain is not None
        for index in range(len(rows)):
            self._store(arriving[:, index : index + 1], number[index : index + 1], related)

    def _store(self, entry: Tensor, number: Tensor, related: Tensor | None) -> None:
        """entry: (3, 1) row, target, domain. number: (1,) its place among all that arrived."""
        target = entry[1]
        if self.num_seen < self.capacity:
            slot = number
            otherwise = self._importance.new_zeros(())
        else:
            slot = self._victim(target, related)
            otherwise = self._importance.mean()
            self.counts.index_add_(0, self._index[1].index_select(0, slot), torch.full_like(slot, -1))
        self._index.index_fill_(1, slot, -1)
        importance = first_importance(self._importance, self._same_class(target), otherwise)
        self._index.index_copy_(1, slot, entry)
        self._importance.index_copy_(0, slot, importance[None])
        self._arrived.index_copy_(0, slot, number)
        self._loss.index_fill_(0, slot, 0.0)
        if self.rule == "intended":
            self._draws.index_fill_(0, slot, 0)
        self.counts.index_add_(0, target, torch.ones_like(target))
        self.num_seen += 1

    def _same_class(self, target: Tensor) -> Tensor:
        """(M,) bool: slots in use that hold class `target` (1,)."""
        return (self._index[1] == target) & (self._arrived < NEVER)

    def _victim(self, target: Tensor, related: Tensor | None) -> Tensor:
        """(1,) slot that a sample of class `target` (1,) takes: one of the largest class; of equally large classes, of
        the one met first."""
        frequency = self.counts.index_add(0, target, torch.ones_like(target))
        order = (frequency * NEVER - self.met).masked_fill(self.counts == 0, -1)  # what holds nothing gives nothing
        largest = order.argmax(0, keepdim=True)
        classes = largest if related is None else torch.cat([largest, related.index_select(0, largest)[0]])
        candidates = (self._index[1][:, None] == classes).any(1)
        return least_important(self._importance, self._arrived, candidates)

    def refresh(self, losses: Tensor) -> None:
        """Take the current losses (len,) of all exemplars, in slot order, and update the importance of those drawn
        since the last refresh. The change is averaged over the exemplars that were there at that refresh too (none: 0).
        """
        size = len(self)
        losses = losses.detach().to(self._loss.dtype)
        kept = self.arrived < self.refreshed_at
        change = (losses - self.loss).masked_fill(~kept, 0).sum() / kept.sum().clamp(min=1)
        self._importance[:size] = updated_importance(self.importance, self._draws[:size], change, self.decay, self.rule)
        self._loss[:size] = losses
        self._draws.zero_()
        self.refreshed_at = self.num_seen

    def num_bytes(self, bytes_per_image: int) -> int:
        """Bytes of the full memory as if the images themselves were kept, labels and importance (8 B each) included."""
        return self.capacity * (bytes_per_image + 16)

    def state_dict(self) -> dict[str, Any]:
        size = len(self)
        return {
            "num_seen": self.num_seen,
            "refreshed_at": self.refreshed_at,
            "has_domain": self.has_domain,
            "counts": self.counts.clone(),
            "met": self.met.clone(),
            "index": self._index[:, :size].clone(),
            "arrived": self._arrived[:size].clone(),
            "draws": self._draws[:size].clone(),
            "importance": self._importance[:size].clone(),
            "loss": self._loss[:size].clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.num_seen = state["num_seen"]
        self.refreshed_at = state["refreshed_at"]
        self.has_domain = state["has_domain"]
        self.counts.copy_(state["counts"])
        self.met.copy_(state["met"])
        size = len(self)
        self._index[:, :size] = state["index"]
        for name in ("arrived", "draws", "importance", "loss"):
            getattr(self, f"_{name}")[:size] = state[name]
