"""A memory that keeps its classes balanced as they come: GDumb's greedy sampler.

Source: `online_baselines` card, section 2.8; GDumb (Prabhu, Torr, Dokania, ECCV 2020) in the form of RaptorMai's code.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clbench.memory.buffer import Buffer, Exemplars

__all__ = ["ClassBalancedBuffer"]


class ClassBalancedBuffer(Buffer):
    """Greedy balanced memory of `capacity` exemplars. One sample (x, y) after the other:

    k = capacity // max(1, number of classes stored so far), before y counts as one of them; the sample is taken if y
    has never been stored or has fewer than k exemplars. If the memory is full, a uniformly drawn exemplar of the
    largest class gives way (of several largest ones, the class that came first).

    What is taken depends on labels, which lie on the device: counts stay there too, and nothing is read in `add` or
    `sample`. A batch costs B times some 20 small launches. `len`, `rows` and `targets` do read, so they are for the
    time between steps. Capacity 0 keeps nothing; ValueError for a negative one. payload: see `Buffer`.
    """

    def __init__(
        self,
        capacity: int,
        num_classes: int,
        device: torch.device | str = "cpu",
        *,
        payload: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        super().__init__(capacity, device, payload=payload)
        self.num_classes = num_classes
        self._index[1].fill_(-1)  # no class
        self.counts = torch.zeros(num_classes, dtype=torch.int64, device=device)
        self._arrival = torch.full((num_classes,), num_classes, device=device)  # rank of a class by its first exemplar
        self._num_stored = torch.zeros(1, dtype=torch.int64, device=device)  # classes that ever had an exemplar
        self._held = torch.zeros(1, dtype=torch.int64, device=device)

    def __len__(self) -> int:
        return int(self._held)

    def add(
        self, rows: Tensor, targets: Tensor, rng: torch.Generator, domain: Tensor | None = None, **payload: Tensor
    ) -> None:
        """Offer a batch, in order: rows, targets (B,) int64, domain (B,) or None, payload (B, ...) by name."""
        if payload.keys() != self._payload.keys():
            raise ValueError(f"the buffer stores {sorted(self._payload)}, got {sorted(payload)}")
        self.num_seen += len(rows)
        if self.capacity == 0 or len(rows) == 0:
            return
        uniform = torch.rand(len(rows), dtype=torch.float64, generator=rng, device=self._index.device)
        slots = self.place(targets, uniform)
        # a later sample of this batch may have taken the same slot: the last one stays
        again_later = (slots[:, None] == slots).triu_(diagonal=1).any(dim=1)
        slots = slots.masked_fill(again_later, self.capacity)
        self._index[0].index_copy_(0, slots, rows)
        if domain is not None:
            self.has_domain = True
            self._index[2].index_copy_(0, slots, domain)
        for name, value in payload.items():
            self._payload[name].index_copy_(0, slots, value.detach().to(self._payload[name].dtype))

    def place(self, targets: Tensor, uniform: Tensor) -> Tensor:
        """Take or refuse samples of classes `targets` (B,) int64 in order, and keep the books. Slot of each, `capacity`
        for those refused: (B,) int64. uniform: (B,) float64 in [0, 1), who gives way: the exemplar number floor(u * n)
        of the n of the largest class, counted in the order of slots."""
        return torch.cat([self._place(targets[i : i + 1], uniform[i : i + 1]) for i in range(len(targets))])

    def _place(self, target: Tensor, uniform: Tensor) -> Tensor:
        """`place` for one sample; target, uniform: (1,)."""
        labels, counts, arrival = self._index[1], self.counts, self._arrival
        rank = arrival.gather(0, target)
        new = rank == self.num_classes
        taken = new | (counts.gather(0, target) < self.capacity // self._num_stored.clamp(min=1))
        full = self._held >= self.capacity
        largest = (counts * (self.num_classes + 1) - arrival).argmax(dim=0, keepdim=True)
        leaving = (uniform * counts.gather(0, largest)).long()
        victim = torch.searchsorted((labels == largest).cumsum(0), leaving + 1)
        slot = torch.where(taken, torch.where(full, victim, self._held), self.capacity)
        labels.scatter_(0, slot, target)
        counts.scatter_add_(0, largest, -(taken & full).long())
        counts.scatter_add_(0, target, taken.long())
        arrival.scatter_(0, target, torch.where(new, self._num_stored, rank))
        self._num_stored += new
        self._held += taken & ~full
        return slot

    def sample(self, size: int, rng: torch.Generator) -> Exemplars:
        """Draw `size` slots uniformly, whatever their class: distinct ones, repeated where fewer are held."""
        if self.num_seen == 0 or self.capacity == 0:
            return self.take(torch.zeros(0, dtype=torch.int64, device=self._index.device))
        key = torch.rand(self.capacity, generator=rng, device=self._index.device)
        empty = torch.arange(self.capacity, device=key.device) >= self._held
        order = key.masked_fill_(empty, 2.0).argsort()  # those held first
        return self.take(order[torch.arange(size, device=key.device) % self._held])

    def state_dict(self) -> dict[str, Any]:
        books = {"counts": self.counts, "arrival": self._arrival, "num_stored": self._num_stored, "held": self._held}
        return {**super().state_dict(), **{name: value.clone() for name, value in books.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.counts.copy_(state["counts"])
        self._arrival.copy_(state["arrival"])
        self._num_stored.copy_(state["num_stored"])
        self._held.copy_(state["held"])
        self._index[1].fill_(-1)
        super().load_state_dict(state)
