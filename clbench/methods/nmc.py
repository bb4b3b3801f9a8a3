"""NMC: nearest class mean of the normalised features of a frozen backbone.

Idea: never train; sum the features of each class in one pass and answer with the class whose mean is nearest.
Task-free, order-free, no exemplars; valid online as well.

Paper: Janson, Zhang, Aljundi, Elhoseiny: A Simple Baseline that Questions the Use of Pretrained-Models in Continual
Learning (arXiv 2210.04428). Official code: Pauljanson002/pretrained-cl at 19f2d86.
`prototype="simplecil"`: the variant of Zhou et al. (arXiv 2303.07338; LAMDA-PILOT at 2647455), mean of raw features and
cosine.

Same as the official code: features normalised, their mean not; Euclidean distance; ties go to the lowest class.
Different: running sums in float64 (the same means); a class without rows can't be answered (official: its NaN wins).
View: the official inputs are in [0, 1] without the backbone's own normalisation; that is the recipe's `test_view`.

Shapes: B batch, D features, C classes of the scenario.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.errors import RunFailed
from clbench.methods.base import Head, Method, Setting, freeze, hp
from clbench.scenarios.model import Task
from clbench.stream.types import Batch, Cursor, Phase

__all__ = ["METHOD", "NMC", "NMCConfig", "cosine_head", "nearest_mean_head"]

NEVER = -1e4  # score of a class without rows: finite, and below any score of unit vectors (at least -1.5)


@dataclass(frozen=True)
class NMCConfig:
    prototype: str = hp(
        "nmc", "class mean and metric: nmc (mean of normalised features, Euclidean) or simplecil (mean of raw "
        "features, cosine)", choices=("nmc", "simplecil"), source="card, section 2",
    )  # fmt: skip


def nearest_mean_head(sums: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest mean as a linear head: `argmin_c |g - m_c| = argmax_c (g . m_c - |m_c|^2 / 2)`, m_c = sums / counts.

    sums: (C, D) of normalised features; counts: (C,). Returns weight (C, D), bias (C,); without rows 0 and -1e4.
    """
    means = sums / counts.clamp(min=1)[:, None]
    bias = -0.5 * means.square().sum(dim=1)
    return means, bias.masked_fill(counts == 0, NEVER)


def cosine_head(sums: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine to the class mean as a linear head over normalised features; the mean's length cancels.

    sums: (C, D) of raw features; counts: (C,). Returns weight (C, D) and bias (C,), the latter 0 or -1e4 without rows.
    """
    return F.normalize(sums, dim=1), torch.zeros_like(sums[:, 0]).masked_fill(counts == 0, NEVER)


class NMC(Method):
    """See the module. One phase per task, one pass, no gradients."""

    Config = NMCConfig
    aliases = ("ncm",)
    config: NMCConfig
    view = "features"
    frozen_backbone = True

    def __init__(self, config: NMCConfig, backbone: nn.Module, setting: Setting) -> None:
        super().__init__(config, freeze(backbone), setting)
        width = int(backbone.num_features)  # type: ignore[arg-type]  # nn.Module hides the type of attributes
        self.sums = torch.zeros((setting.num_classes, width), dtype=torch.float64, device=setting.device)
        self.counts = torch.zeros(setting.num_classes, dtype=torch.float64, device=setting.device)
        self.tasks_begun = 0

    def phases(self, task: Task, index: int) -> Sequence[Phase]:
        return [Phase("statistics", epochs=1, order="listed", view=self.view, updates=1, drop_last=False)]

    def begin_phase(self, task: Task, phase: Phase, at: Cursor) -> None:
        if at.task < self.tasks_begun:
            raise RunFailed(f"nmc has the rows of task {at.task} in its means already; each task counts once")
        self.tasks_begun = at.task + 1

    @torch.no_grad()
    def step(self, batch: Batch) -> Mapping[str, Tensor]:
        features = super().features(batch.images, None).double()
        if self.config.prototype == "nmc":
            features = F.normalize(features, dim=1)
        self.sums.index_add_(0, batch.targets, features)
        self.counts.index_add_(0, batch.targets, torch.ones_like(features[:, 0]))
        return {}

    def features(self, images: Tensor, task: int | None) -> Tensor:
        """Normalised features `phi / max(|phi|, 1e-12)`: (B, C, H, W), or (B, D) of the backbone, -> (B, D)."""
        return F.normalize(super().features(images, task), dim=1)

    def classify(self, features: Tensor, allowed: Tensor, task: int | None) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):  # bf16 scores would tie
            return F.linear(features, *self._linear(features.dtype))

    def head(self, task: int | None) -> Head:
        return Head("linear", *self._linear(torch.float32))

    def _linear(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Weight (C, D) and bias (C,) over normalised features, computed in float64."""
        make = nearest_mean_head if self.config.prototype == "nmc" else cosine_head
        weight, bias = make(self.sums, self.counts)
        return weight.to(dtype), bias.to(dtype)

    def memory_bytes(self) -> dict[str, int]:
        return {"class_sums": self.sums.nbytes + self.counts.nbytes}


METHOD = NMC
