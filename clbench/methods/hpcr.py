"""HPCR: PCR with a temperature cycle and two distillation terms from logits and features stored with each exemplar.

Lin et al., TNNLS 2025 (arXiv 2309.15038), card `hpcr`:

    L = tau_s(i) * L_PCR + [task > 0] * (alpha * L_PCD + beta * L_SCD)

tau_s(i) scales the gradient as another temperature would that stands outside the softmax; it runs from `scale_min` to
`scale_max` and back within `period` batches, anew in each task. L_PCD keeps the scores of replayed images at those they
had when they came, L_SCD the similarities among them. What is stored is that of the un-augmented image in train mode,
before the update of its step, and is never refreshed. Steps, views, memory and answers are PCR's.

Differences from the official code: see `pcr`. Its memory misaligns stored features in the one batch that crosses the
fill boundary (card, section 6); ours does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from clbench.memory.buffer import Exemplars
from clbench.methods._proxy import class_counts, cosine_scores, unit
from clbench.methods.base import hp
from clbench.methods.pcr import PCR, Drawn, PCRConfig
from clbench.stream.types import Batch

__all__ = ["HPCR", "HPCRConfig", "pcd_loss", "scd_loss", "temperature_cycle"]


def temperature_cycle(iteration: int, low: float, high: float, period: int) -> float:
    """`low` at 0, `high` half a period later, a cosine in between.

    >>> [temperature_cycle(i, 0.5625, 1.8, 500) for i in (0, 250, 500)]
    [0.5625, 1.8, 0.5625]
    """
    return low + (high - low) * (1 - math.cos(2 * math.pi * iteration / period)) / 2


def pcd_loss(scores: Tensor, stored: Tensor, counts: Tensor) -> Tensor:
    """Mean squared difference of scores, each class weighted by its share of the batch, 0-d.

    scores, stored: (m, C) now and as kept with the exemplars; counts: (C,) rows of each class in the combined batch.
    Equals the mean over columns indexed by the batch's targets, with repetition.
    """
    return ((scores - stored).square() * (counts / counts.sum())).sum(1).mean()


def scd_loss(features: Tensor, stored: Tensor, temperature: float) -> Tensor:
    """Cross entropy between the similarities among the rows as kept (teacher) and now, 0-d.

    features, stored: (m, D), raw. A row's similarities are the softmax over all other rows of cosine / temperature.
    """
    itself = torch.eye(len(features), dtype=torch.bool, device=features.device)
    now, kept = (unit(x) @ unit(x).T / temperature for x in (features, stored))
    teacher = kept.masked_fill(itself, -torch.inf).softmax(1)
    logs = now.masked_fill(itself, -torch.inf).log_softmax(1).masked_fill(itself, 0)
    return -(teacher * logs).sum(1).mean()


@dataclass(frozen=True)
class HPCRConfig(PCRConfig):
    """Hyperparameters of HPCR."""

    scale_min: float = hp(
        0.5625, "smallest factor of the contrastive loss: 0.09 / 0.16", low=0.0, high=100.0, source="card 3"
    )
    scale_max: float = hp(
        1.8, "largest factor of the contrastive loss: 0.09 / 0.05", low=0.0, high=100.0, source="card 3"
    )
    period: int = hp(
        500, "batches of one cycle of that factor", low=1, high=10_000_000, unit="batches", source="card 2"
    )
    alpha: float = hp(
        0.1, "weight of the proxy distillation", low=0.0, high=100.0, source="card 3: CIFAR-100, Mini-ImageNet",
        tune={"low": 0.0, "high": 0.5},
    )  # fmt: skip
    beta: float = hp(
        0.5, "weight of the similarity distillation", low=0.0, high=100.0, source="card 3",
        tune={"low": 0.0, "high": 1.0},
    )  # fmt: skip


class HPCR(PCR):
    """PCR whose memory also holds (C,) logits and (D,) features."""

    Config = HPCRConfig
    settings = frozenset({"class", "domain"})
    aliases = ("holistic-pcr",)
    graphable = True

    def recalled(self, drawn: Exemplars, batch: Batch) -> dict[str, Tensor]:
        """This batch's factor of the contrastive loss, and from the second task on what was stored."""
        config, at = self.config, batch.at
        scale = temperature_cycle(at.iteration, config.scale_min, config.scale_max, config.period)
        stored = drawn.payload if at.task > 0 else {}
        return {"scale": torch.full((), scale, device=self.setting.device), **stored}

    def losses(self, replayed: Tensor, fresh: Tensor, inputs: Drawn) -> dict[str, Tensor]:
        """`loss`, and the terms it is made of."""
        assert inputs.scale is not None
        config, terms = self.config, {"pcr": super().losses(replayed, fresh, inputs)["loss"]}
        loss = inputs.scale * terms["pcr"]
        if inputs.logits is not None and inputs.features is not None and inputs.targets is not None:
            counts = class_counts(torch.cat([inputs.targets, inputs.batch.targets]), self.setting.num_classes)
            scores = cosine_scores(replayed, self.proxies.weight, config.temperature)
            terms["pcd"] = pcd_loss(scores, inputs.logits.repeat(2, 1), counts)
            terms["scd"] = scd_loss(replayed, inputs.features.repeat(2, 1), config.temperature)
            loss = loss + config.alpha * terms["pcd"] + config.beta * terms["scd"]
        return {"loss": loss, **terms}

    def payload_shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        return {"logits": (self.setting.num_classes,), "features": (width,)}

    def payload(self, features: Tensor) -> dict[str, Tensor]:
        logits = cosine_scores(features, self.proxies.weight.detach(), self.config.temperature)
        return {"logits": logits, "features": features}


METHOD = HPCR
