"""Vectors of classes, each class compared on units of its own, that vote for the answer (card `sharp`, `Prediction`).

Shapes: B queries, C classes of the scenario, D units, n units of a group of classes, v vectors of a group.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["ClassVectors", "squared_distances"]

TINY = 1e-30


def squared_distances(queries: Tensor, vectors: Tensor, norms: Tensor) -> Tensor:
    """(B, n) queries as they are, (n, v) normalised columns and their norms (v,), 1 or 0 -> (B, v) squared distances of
    the normalised queries: `|a|^2 + |b|^2 - 2 a.b`, where |a| is 1, or 0 for a query of zeros."""
    lengths = queries.square().sum(1, keepdim=True).sqrt()
    scale = -2 / lengths.clamp(min=TINY)
    return torch.addcmul((lengths > 0).to(queries.dtype) + norms, queries @ vectors, scale)


class ClassVectors:
    """Vectors that are stored together are compared on the same units: one matrix product for all their classes."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.num_classes = num_classes
        self.device = device
        self.groups: list[dict[str, Tensor]] = []  # units (n,), vectors (n, v), norms (v,), labels (v,)

    def store(self, vectors: Sequence[Tensor], labels: Sequence[int], units: Tensor) -> None:
        """Keep (k, D) vectors of each class, k may differ, in place of any that are there; units: (D,) bool."""
        self.groups = [kept for group in self.groups if len((kept := without(group, labels))["labels"])]
        chosen = units.nonzero()[:, 0]
        normalised = F.normalize(torch.cat(list(vectors))[:, chosen], dim=1)
        counts = torch.tensor([len(own) for own in vectors], device=self.device)
        self.groups.append(
            {
                "units": chosen,
                "vectors": normalised.T.contiguous(),
                "norms": normalised.any(1).to(normalised.dtype),
                "labels": torch.tensor(labels, device=self.device).repeat_interleave(counts),
            }
        )

    def votes(self, queries: Tensor, allowed: Tensor, num: int) -> Tensor:
        """(B, D) -> (B, C) votes of the `num` nearest: argmax is their most frequent class, the lowest of equals.

        Euclidean distance; query and vector cut to the class's units and normalised there. allowed: (C,) or (B, C)
        bool, classes that may vote. Reads nothing on the host.
        """
        votes = queries.new_zeros((len(queries), self.num_classes))
        if not self.groups:
            return votes
        distances = torch.cat(
            [squared_distances(queries[:, g["units"]], g["vectors"], g["norms"]) for g in self.groups], dim=1
        )
        labels = torch.cat([group["labels"] for group in self.groups])
        distances.masked_fill_(~allowed[..., labels], torch.inf)
        nearest = distances.topk(min(num, len(labels)), largest=False)
        return votes.scatter_add_(1, labels[nearest.indices], nearest.values.isfinite().to(votes.dtype))

    def num_bytes(self) -> int:
        """Vectors on their own units alone, and what says which those are."""
        return sum(value.nbytes for group in self.groups for value in group.values())

    def state_dict(self) -> dict[str, Any]:
        return {"groups": self.groups}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.groups = [{name: value.to(self.device) for name, value in group.items()} for group in state["groups"]]


def without(group: Mapping[str, Tensor], labels: Sequence[int]) -> dict[str, Tensor]:
    """A group less the vectors of some classes."""
    stay = ~torch.isin(group["labels"], torch.tensor(labels, device=group["labels"].device))
    return {
        "units": group["units"],
        "vectors": group["vectors"][:, stay],
        "norms": group["norms"][stay],
        "labels": group["labels"][stay],
    }
