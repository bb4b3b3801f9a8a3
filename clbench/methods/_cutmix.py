"""CutMix inside groups of classes, without a host read: a box of one image is pasted into another.

Yun et al., ICCV 2019, in the form of CLIB and HLE (si_blurry card, section 3; hle card, section 2): one box and one
draw for the batch, mixed with probability p, the share from Beta(1, 1), partners from the same label level.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Mixed", "cutmix", "partners"]


class Mixed(NamedTuple):
    """images: (B, C, H, W); partner: (B,) int64, whose box was pasted; share: 0-d, what is left of an image's own area
    (1 if nothing was mixed). The loss is share * loss(own target) + (1 - share) * loss(partner's target)."""

    images: Tensor
    partner: Tensor
    share: Tensor


def partners(group: Tensor, rng: torch.Generator) -> Tensor:
    """(B,) a random permutation that keeps each group (B,) int64 to itself."""
    shuffled = torch.randperm(len(group), generator=rng, device=group.device)
    mixed = shuffled[group[shuffled].argsort(stable=True)]
    return torch.empty_like(shuffled).index_copy_(0, group.argsort(stable=True), mixed)


def cutmix(images: Tensor, group: Tensor, probability: float, rng: torch.Generator) -> Mixed:
    """Mix the (B, C, H, W) images of each group (B,) int64 with each other."""
    height, width = images.shape[2:]
    apply, share, y, x = torch.rand(4, generator=rng, device=images.device).unbind()
    cut = (1 - share).sqrt()
    rows = inside(height, cut, y)
    columns = inside(width, cut, x)
    box = rows[:, None] & columns & (apply < probability)
    partner = partners(group, rng)
    return Mixed(torch.where(box, images[partner], images), partner, 1 - box.float().mean())


def inside(size: int, cut: Tensor, centre: Tensor) -> Tensor:
    """(size,) bool: the pixels of a line that a span of floor(size * cut) about floor(size * centre) covers, cut off at
    the ends."""
    middle, half = (size * centre).long(), (size * cut).long() // 2
    pixel = torch.arange(size, device=cut.device)
    return (pixel >= middle - half) & (pixel < middle + half)
