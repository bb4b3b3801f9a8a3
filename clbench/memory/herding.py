"""Herding: the exemplars of a class whose mean stays closest to the mean of all its samples.

Source: iCaRL (Rebuffi, Kolesnikov, Sperl, Lampert, CVPR 2017), Algorithms 4 and 5: exemplars are ordered by how early
they were picked, so that a memory is made smaller by cutting each class's list at its end.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.memory.buffer import Buffer

__all__ = ["HerdedBuffer", "herding_order"]


def herding_order(features: Tensor, count: int) -> Tensor:
    """The first `count` exemplars of one class in order of herding: (min(count, n),) int64 indices, each once.

    features: (n, D), normalised here. Pick number k is the sample not yet picked whose inclusion brings the mean of the
    k picked ones closest to the mean of all n; ties go to the lower index. No host read.
    """
    vectors = F.normalize(features.double(), dim=1)
    mean = vectors.mean(dim=0)
    total = torch.zeros_like(mean)
    length = vectors.square().sum(dim=1)
    picked = torch.zeros_like(length, dtype=torch.bool)
    order = []
    for k in range(1, min(count, len(vectors)) + 1):
        # |mean - (total + v) / k|^2 * k^2 = const - 2 (k mean - total) . v + |v|^2
        distance = length - 2 * (vectors @ (k * mean - total))
        chosen = distance.masked_fill(picked, torch.inf).argmin(dim=0, keepdim=True)
        picked.scatter_(0, chosen, True)
        total = total + vectors.index_select(0, chosen)[0]
        order.append(chosen)
    return torch.cat(order) if order else torch.zeros(0, dtype=torch.int64, device=features.device)


class HerdedBuffer(Buffer):
    """A memory of at most `capacity` exemplars that changes between tasks, not at every step.

    `reduce(quota)` cuts every class to its first `quota` exemplars, `add_class` appends those of a new one in the order
    of herding (`add` is refused). Both may read the host; `sample` and `take` read nothing. payload: see `Buffer`.
    """

    def __init__(
        self,
        capacity: int,
        device: torch.device | str = "cpu",
        *,
        payload: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        super().__init__(capacity, device, payload=payload)
        self.held = 0
        self._rank = torch.zeros(capacity + 1, dtype=torch.int64, device=device)  # place in the list of its class

    def __len__(self) -> int:
        return self.held

    @property
    def ranks(self) -> Tensor:
        """(len,) int64: 0 for the exemplar of a class that was picked first."""
        return self._rank[: self.held]

    def add(
        self, rows: Tensor, targets: Tensor, rng: torch.Generator, domain: Tensor | None = None, **payload: Tensor
    ) -> None:
        raise TypeError("a herded memory takes whole classes: call add_class")

    def reduce(self, quota: int) -> None:
        """Keep the first `quota` exemplars of each class."""
        keep = (self.ranks < quota).nonzero()[:, 0]
        self.held = len(keep)
        self._index[:, : self.held] = self._index.index_select(1, keep)
        self._rank[: self.held] = self._rank.index_select(0, keep)
        for value in self._payload.values():
            value[: self.held] = value.index_select(0, keep)

    def add_class(
        self, features: Tensor, rows: Tensor, target: int, quota: int, domain: Tensor | None = None, **payload: Tensor
    ) -> int:
        """Keep the first `quota` samples of a class in order of herding, at most as many as there are and as fit.

        features: (n, D); rows: (n,) int64; domain: (n,) or None; payload: (n, ...) by name. Returns how many were kept.
        """
        if payload.keys() != self._payload.keys():
            raise ValueError(f"the buffer stores {sorted(self._payload)}, got {sorted(payload)}")
        order = herding_order(features, min(quota, self.capacity - self.held))
        place = slice(self.held, self.held + len(order))
        self._index[0, place] = rows.index_select(0, order)
        self._index[1, place] = target
        if domain is not None:
            self.has_domain = True
            self._index[2, place] = domain.index_select(0, order)
        self._rank[place] = torch.arange(len(order), device=self._rank.device)
        for name, value in payload.items():
            self._payload[name][place] = value.detach().index_select(0, order).to(self._payload[name].dtype)
        self.held += len(order)
        self.num_seen += len(rows)
        return len(order)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "held": self.held, "rank": self.ranks.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.held = state["held"]
        self._rank[: self.held] = state["rank"]
        super().load_state_dict(state)
