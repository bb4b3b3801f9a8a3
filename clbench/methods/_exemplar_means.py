"""Nearest class mean of the exemplars in a memory (SCR; iCaRL calls it nearest mean of exemplars).

Source: `online_baselines` card, section 2.6. Differs from `nmc`, which averages all samples of a frozen backbone and
leaves the mean as it is: here the features move at every step, so the means are those of the exemplars as the network
sees them now, and they are brought back to length 1.

Shapes: M exemplars, B queries, D features, C classes.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.backbones.passes import rows_per_pass
from clbench.memory.buffer import Buffer
from clbench.methods.base import Setting

__all__ = ["NEVER", "ExemplarMeans", "exemplar_means", "mean_scores", "squared_distances"]

NEVER = -1e4  # score of a class that has not been seen: finite, and below any score of unit vectors


def exemplar_means(features: Tensor, targets: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Mean of the normalised features of each class, normalised again.

    features: (M, D) as the encoder gives them; targets: (M,) int64. Returns means (C, D) of length 1 and counts (C,); a
    class without exemplars has mean 0. A product, not a scatter: the same bits on every device.
    """
    member = (targets == torch.arange(num_classes, device=targets.device)[:, None]).to(features.dtype)
    sums = member @ F.normalize(features, dim=1)
    return F.normalize(sums, dim=1), member.sum(dim=1)


def squared_distances(features: Tensor, means: Tensor) -> Tensor:
    """(B, D) features, normalised here, and (C, D) means -> (B, C) squared Euclidean distances."""
    return (F.normalize(features, dim=1)[:, None] - means).square().sum(dim=2)


def mean_scores(features: Tensor, means: Tensor, seen: Tensor) -> Tensor:
    """The order of `squared_distances` without its (B, C, D) differences: q . m, as all m have length 1.

    features: (B, D) of length 1; seen: (C,) bool, NEVER for the others. Returns (B, C).
    """
    return F.linear(features, means, torch.zeros_like(means[:, 0]).masked_fill_(~seen, NEVER))


class ExemplarMeans:
    """The means of a memory's exemplars, computed once for each state of weights and memory.

    An evaluation asks for them once per chunk of images, and the whole memory has to pass the network for an answer
    (M more images per observation where every step is watched): so the answer is kept until `version` moves.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.chunk = rows_per_pass(setting.image_shape, setting.device)
        self.computed = 0  # how often the memory went through the network
        self._kept: tuple[int, Tensor] | None = None

    def __call__(self, version: int, buffer: Buffer, encode: Callable[[Tensor], Tensor], width: int) -> Tensor:
        """(C, D) means of length 1. version: a number that changes whenever weights or memory do; encode: (m, C, H, W)
        -> (m, width) features. A class without exemplars gets a random direction, another one at each version."""
        if self._kept is None or self._kept[0] != version:
            self._kept = version, self._compute(version, buffer, encode, width)
            self.computed += 1
        return self._kept[1]

    def forget(self) -> None:
        """Weights or memory were replaced without a new version (a checkpoint was loaded)."""
        self._kept = None

    @torch.no_grad()
    def _compute(self, version: int, buffer: Buffer, encode: Callable[[Tensor], Tensor], width: int) -> Tensor:
        setting, num_classes = self.setting, self.setting.num_classes
        rng = setting.rng("missing-mean", version)
        drawn = torch.randn((num_classes, width), generator=rng, device=setting.device)
        means = F.normalize(drawn, dim=1)
        if len(buffer) == 0:
            return means
        held = buffer.take(torch.arange(len(buffer), device=setting.device))
        parts = []
        for start in range(0, len(buffer), self.chunk):
            cut = slice(start, start + self.chunk)
            domain = None if held.domain is None else held.domain[cut]
            parts.append(encode(setting.read(held.rows[cut], domain, "test")).float())
        with torch.autocast(setting.device.type, enabled=False):
            found, counts = exemplar_means(torch.cat(parts), held.targets, num_classes)
        return torch.where(counts[:, None] > 0, found, means)
