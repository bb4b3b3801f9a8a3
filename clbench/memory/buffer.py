"""A buffer of exemplars. An exemplar is a row number, its target, and what a method stores with it.

Everything is preallocated on the device and updated without a host read: one extra slot at the end takes whatever is
not kept. Source: `online_baselines` card, section 2.1.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor

__all__ = ["Buffer", "Exemplars", "ReservoirRule", "reservoir_slots"]

ReservoirRule = Literal["batch", "exact"]


class Exemplars(NamedTuple):
    """Drawn entries: slots, rows, targets (m,) int64; domain (m,) int64 or None; payload name -> (m, ...)."""

    slots: Tensor
    rows: Tensor
    targets: Tensor
    domain: Tensor | None
    payload: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.slots)


def reservoir_slots(
    num_seen: int, num_new: int, capacity: int, rule: ReservoirRule, uniform: Tensor | None = None
) -> Tensor:
    """Slot of each of `num_new` arriving samples, `capacity` for those that are not kept: (num_new,) int64.

    The first `capacity - num_seen` samples fill the free slots in order. For the rest, with n samples seen before them:
    rule `batch`: slot floor(u * n), the same n for all of them (RaptorMai, PCR, OnPro code);
    rule `exact`: slot floor(u * (n + 1)), n counted sample by sample (Vitter's algorithm R).
    Slots beyond the capacity are not kept; of several samples with one slot the last stays.
    uniform: (num_new - filled,) float64 in [0, 1), one draw for each sample behind the fill.
    """
    filled = min(max(capacity - num_seen, 0), num_new)
    rest = num_new - filled
    if rest == 0:
        return torch.arange(num_seen, num_seen + filled, device=None if uniform is None else uniform.device)
    if uniform is None:
        raise ValueError(f"{rest} samples arrive behind the fill and need a draw each")
    drawn = uniform * (num_seen + filled)
    if rule == "exact":
        drawn = uniform * torch.arange(num_seen + filled + 1, num_seen + num_new + 1, device=uniform.device)
    slots = drawn.long()
    if filled:
        slots = torch.cat([torch.arange(num_seen, num_seen + filled, device=uniform.device), slots])
    # a later sample of this batch may take the same slot, even one that has just filled the buffer: the last one stays
    again_later = (slots[:, None] == slots).triu_(diagonal=1).any(dim=1)
    return slots.masked_fill_(again_later, capacity).clamp_(max=capacity)


class Buffer:
    """Reservoir of `capacity` exemplars.

    payload: name -> shape of one entry, stored as float32 (logits, features).
    rule: see `reservoir_slots`.
    Raises ValueError for a negative capacity or an unknown rule; capacity 0 keeps nothing and draws nothing.
    """

    def __init__(
        self,
        capacity: int,
        device: torch.device | str = "cpu",
        *,
        payload: Mapping[str, tuple[int, ...]] | None = None,
        rule: str = "batch",
    ) -> None:
        if capacity < 0:
            raise ValueError(f"capacity is {capacity}, it must be 0 or more")
        if rule not in get_args(ReservoirRule):
            raise ValueError(f"reservoir rule {rule!r} is none of {', '.join(get_args(ReservoirRule))}")
        self.capacity = capacity
        self.rule = cast(ReservoirRule, rule)
        self.num_seen = 0
        self.has_domain = False
        self._index = torch.zeros((3, capacity + 1), dtype=torch.int64, device=device)  # rows, targets, domain
        self._payload = {
            name: torch.zeros((capacity + 1, *shape), device=device) for name, shape in (payload or {}).items()
        }

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

    def sample(self, size: int, rng: torch.Generator) -> Exemplars:
        """Draw min(size, len) distinct slots uniformly, whatever their class."""
        slots = torch.randperm(len(self), generator=rng, device=rng.device)[:size]
        return self.take(slots)

    def take(self, slots: Tensor) -> Exemplars:
        """Entries at `slots` (m,) int64."""
        rows, targets, domain = self._index.index_select(1, slots).unbind()
        payload = {name: value.index_select(0, slots) for name, value in self._payload.items()}
        return Exemplars(slots, rows, targets, domain if self.has_domain else None, payload)

    def add(
        self, rows: Tensor, targets: Tensor, rng: torch.Generator, domain: Tensor | None = None, **payload: Tensor
    ) -> None:
        """Offer a batch: rows, targets (B,) int64, domain (B,) or None, payload (B, ...) by name."""
        if payload.keys() != self._payload.keys():
            raise ValueError(f"the buffer stores {sorted(self._payload)}, got {sorted(payload)}")
        num_new = len(rows)
        if self.capacity > 0:
            rest = num_new - min(max(self.capacity - self.num_seen, 0), num_new)
            device = self._index.device
            uniform = torch.rand(rest, dtype=torch.float64, generator=rng, device=device)
            slots = reservoir_slots(self.num_seen, num_new, self.capacity, self.rule, uniform)
            arrived = [rows, targets]
            if domain is not None:
                self.has_domain = True
                arrived.append(domain)
            self._index[: len(arrived)].index_copy_(1, slots, torch.stack(arrived))
            for name, value in payload.items():
                self._payload[name].index_copy_(0, slots, value.detach().to(self._payload[name].dtype))
        self.num_seen += num_new

    def write(self, slots: Tensor, **payload: Tensor) -> None:
        """Replace the payload at `slots` (m,): refreshed logits, for example."""
        for name, value in payload.items():
            self._payload[name].index_copy_(0, slots, value.detach().to(self._payload[name].dtype))

    def num_bytes(self, bytes_per_image: int) -> int:
        """Bytes of the full memory as if the images themselves were kept, labels (8 B) and payload included."""
        payload = sum(value[0].numel() * value.element_size() for value in self._payload.values())
        return self.capacity * (bytes_per_image + 8 + payload)

    def state_dict(self) -> dict[str, Any]:
        count = len(self)
        return {
            "num_seen": self.num_seen,
            "has_domain": self.has_domain,
            "index": self._index[:, :count].clone(),
            "payload": {name: value[:count].clone() for name, value in self._payload.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.num_seen = state["num_seen"]
        self.has_domain = state["has_domain"]
        count = len(self)
        self._index[:, :count] = state["index"]
        for name, value in state["payload"].items():
            self._payload[name][:count] = value
