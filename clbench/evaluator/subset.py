"""The rows that every observation looks at: drawn once per run, resident on the device in one tensor."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from clbench.data.reader import Reader
from clbench.errors import InputError
from clbench.rng import generator
from clbench.scenarios.model import Group, without_domain

__all__ = ["IMAGE_CACHE_BYTES", "ResidentImages", "Subset", "draw_subset"]

IMAGE_CACHE_BYTES = 512 * 2**20


class Subset(NamedTuple):
    """One group's slice is `starts[g]:starts[g + 1]`. rows, targets, group: (R,) int64; domain (R,) int64 or None."""

    rows: Tensor
    targets: Tensor
    domain: Tensor | None
    group: Tensor
    starts: list[int]


def draw_subset(groups: tuple[Group, ...], per_group: int, seed: int, device: torch.device) -> Subset:
    """At most `per_group` rows of each group, in listed order; a function of (groups, per_group, seed).

    Raises InputError if some groups say their rows' domains and others do not.
    """
    silent = without_domain(groups)
    if silent is not None:
        raise InputError(
            f"group {silent.name!r} does not say the domain of its rows, but other groups do; give all of them a domain"
        )
    rows, targets, domains, index, starts = [], [], [], [], [0]
    for number, group in enumerate(groups):
        rng = generator(seed, "evaluation-subset", number)
        keep = torch.randperm(len(group.rows), generator=rng)[:per_group].sort().values
        rows.append(group.rows[keep])
        targets.append(group.targets[keep])
        if group.domain is not None and len(group.rows):
            domains.append(group.domain[keep])
        index.append(torch.full((len(keep),), number))
        starts.append(starts[-1] + len(keep))
    return Subset(
        torch.cat(rows).to(device),
        torch.cat(targets).to(device),
        torch.cat(domains).to(device) if domains else None,
        torch.cat(index).to(device),
        starts,
    )


class ResidentImages:
    """Images of a subset under one view: read once and kept, or read again each time if they take too much room.

    A slice of those that are kept is no copy, so whoever is given one must not write into it; `unwritten` tells of
    writes that PyTorch counts: not of those through `.data`, numpy or a kernel of one's own.
    """

    def __init__(self, subset: Subset, read: Reader, view: str) -> None:
        self.subset = subset
        self.read = read
        self.view = view
        self._images: Tensor | None = None
        self._version = 0

    def __call__(self, chosen: Tensor | slice) -> Tensor:
        """(B,) int64 places in the subset, or a slice of them -> (B, C, H, W)."""
        subset = self.subset
        if self._images is None:
            view_bytes = 4 * math.prod(self.read.output_shape(self.view)) if self.view in self.read.views else 0
            if view_bytes * len(subset.rows) > IMAGE_CACHE_BYTES:
                domain = None if subset.domain is None else subset.domain[chosen]
                return self.read(subset.rows[chosen], domain, self.view)
            self._images = self.read(subset.rows, subset.domain, self.view)
            self._version = self._images._version
        return self._images[chosen]

    def unwritten(self) -> bool:
        """Whether the kept images are still those that were read. Asks the tensor's count of writes, not the device."""
        return self._images is None or self._images._version == self._version

    def as_read(self) -> bool:
        """The same whoever wrote: reads all of them again and compares, so it is for checks."""
        subset = self.subset
        return self._images is None or torch.equal(self._images, self.read(subset.rows, subset.domain, self.view))
