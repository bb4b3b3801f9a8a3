"""UER (reimplementation): unbiased experience replay, angles for the stream and dot products for the memory.

Idea: a logit <z, w_c> = |z| |w_c| cos(z, w_c) is an angle and two norms. The bias to recent classes sits in the angles,
old knowledge in the norms; so the incoming batch is learned through cosine logits, which cannot change a norm to first
order, and the memory is replayed through the full product. Both use one weight matrix:

    L = mean CE(scale * cos(z, w), y) over the stream batch + mean CE(<z, w> + b, y) over the replay batch

Paper: arXiv 2309.04081. **There is no official code and the paper's body was not read** (card `uer`): the algorithm is
put together from its abstract and its authors' shared framework. What both leave open is a hyperparameter here:

    cosine_scale   factor of the cosine logits; default 1/0.09, that of the authors' cosine layer
    bias           whether dot logits have one; default none, since it is neither norm nor angle
    inputs         `train`: the run's training view, as ER; `raw`: without augmentation; `both`: the raw images and
                   those of the training view together in one forward pass, as PCR does
    predictor      `dot` or `cosine`; running both tells them apart, nothing else of the run changes
    stream_weight, replay_weight   default 1 : 1, a sum of two means

Shapes: B batch, D features, C classes of the scenario.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.errors import InputError
from clbench.methods.base import Head, Setting, hp
from clbench.methods.er import ER, Drawn, ERConfig
from clbench.scenarios.model import Task
from clbench.stream.types import Batch, Phase

__all__ = ["METHOD", "UER", "UERConfig", "cosine_logits", "dot_logits"]


@dataclass(frozen=True)
class UERConfig(ERConfig):
    cosine_scale: float = hp(
        11.11111111111111, "factor of the cosine logits of the stream", low=1e-3, high=1000.0, scale="log",
        source="card uer, section 2: the authors' cosLinear; 1 and 10 are the other readings",
        tune={"choices": [1.0, 10.0, 11.11111111111111]},
    )  # fmt: skip
    bias: bool = hp(
        False, "whether dot logits have a bias", source="card uer, section 2", tune={"choices": [False, True]}
    )
    inputs: str = hp(
        "train", "images trained on: those of the training view, the raw ones, or both in one forward pass",
        choices=("train", "raw", "both"), source="card uer, section 2: none (ER) or raw + augmented (PCR)",
    )  # fmt: skip
    predictor: str = hp("dot", "logits that answers are taken from", choices=("dot", "cosine"), source="card uer, 2")


def dot_logits(features: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(B, D) features, (C, D) weight, (C,) bias or None -> (B, C): |z| |w_c| cos(z, w_c) + b_c."""
    return F.linear(features, weight, bias)


def cosine_logits(features: Tensor, weight: Tensor, scale: float) -> Tensor:
    """(B, D) features, (C, D) weight -> (B, C): scale * cos(z, w_c), exact but for vectors of zeros, whose cosine to
    all is 0 and whose gradient is finite."""
    out: Tensor = scale * F.linear(direction(features), direction(weight))
    return out


def direction(vectors: Tensor) -> Tensor:
    """v / |v| of each row of (B, D), 0 for 0."""
    length: Tensor = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return vectors / length.masked_fill(length == 0, 1.0)


class UER(ER):
    """ER whose stream loss sees angles alone. See the module."""

    Config = UERConfig
    aliases = ("unbias-experience-replay", "unbiased-experience-replay")
    config: UERConfig
    classifier: nn.Linear

    def __init__(self, config: UERConfig, backbone: nn.Module, setting: Setting) -> None:
        super().__init__(config, backbone, setting)
        if self.frozen_backbone and config.inputs != "train":
            raise InputError(
                f"uer with train=head reads kept features, so inputs={config.inputs} cannot be had; leave inputs out"
            )

    def make_classifier(self, num_features: int, num_classes: int) -> nn.Module:
        return nn.Linear(num_features, num_classes, bias=self.config.bias)

    def phases(self, task: Task, index: int) -> Sequence[Phase]:
        return [Phase("train", view="raw" if self.config.inputs == "raw" else self.training_view)]

    def draw(self, batch: Batch) -> Drawn:
        """As ER's, with `both` the raw images ahead of those of the training view, each with its target."""
        if self.config.inputs != "both":
            return super().draw(batch)
        read, rng, step = self.setting.read, self.setting.rng, batch.at.step
        raw = read(batch.rows, batch.domain, "raw")
        doubled = batch._replace(images=torch.cat([raw, batch.images]), targets=batch.targets.repeat(2))
        if len(self.buffer) == 0:
            return Drawn(doubled)
        drawn = self.buffer.sample(self.config.replay_batch_size, rng("replay", step))
        views = [
            read(drawn.rows, drawn.domain, "raw"),
            read(drawn.rows, drawn.domain, batch.phase.view, rng("replay-view", step)),
        ]
        return Drawn(doubled, torch.cat(views), drawn.targets.repeat(2))

    def stream_loss(self, batch: Batch) -> Tensor:
        """Cross entropy of the cosine logits; the replay loss is ER's, on the dot logits that `classifier` gives."""
        features = self.features(batch.images, None)
        logits = cosine_logits(features, self.classifier.weight, self.config.cosine_scale)
        return self.cross_entropy(logits, batch.targets, batch.seen)

    def classify(self, features: Tensor, allowed: Tensor, task: int | None) -> Tensor:
        weight, bias = self.classifier.weight, self.classifier.bias
        if self.config.predictor == "cosine":
            return cosine_logits(features, weight, self.config.cosine_scale)
        return dot_logits(features, weight, bias)

    def head(self, task: int | None) -> Head:
        if self.config.predictor == "cosine":
            return Head("cosine", self.classifier.weight, None, self.config.cosine_scale)
        return super().head(task)


METHOD = UER
