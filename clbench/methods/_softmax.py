"""What finetune, joint and er share: a backbone with one linear head of static size, trained by SGD or Adam."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clbench.methods.base import Head, Method, Setting, freeze, hp
from clbench.scenarios.model import Task
from clbench.stream.types import Phase

__all__ = ["OptimizerConfig", "SgdConfig", "SoftmaxMethod"]


@dataclass(frozen=True)
class OptimizerConfig:
    """Which optimiser trains, and how fast."""

    lr: float = hp(
        0.1, "learning rate", low=0.0, high=10.0, scale="log", source="online_baselines card, family A",
        tune={"low": 1e-3, "high": 0.3},
    )  # fmt: skip
    optimizer: str = hp(
        "sgd", "SGD, or Adam or AdamW with their usual betas", choices=("sgd", "adam", "adamw"),
        source="si_blurry card, section 2: adam; online_baselines card, family C: adam, adamw",
    )  # fmt: skip
    momentum: float = hp(0.0, "momentum of SGD", low=0.0, high=0.999)
    weight_decay: float = hp(0.0, "weight decay", low=0.0, high=1.0, scale="log")


@dataclass(frozen=True)
class SgdConfig(OptimizerConfig):
    """Optimiser and loss of a softmax classifier."""

    train: str = hp(
        "all", "all: backbone and head; head: the backbone stays as it is, and its features are kept (no augmentation)",
        choices=("all", "head"), source="si_blurry card, section 2: ER there trains the head",
    )  # fmt: skip
    train_classes: str = hp(
        "all", "classes the training softmax runs over, in the class setting", choices=("all", "seen"),
        source="online_baselines card 2.3: all",
    )  # fmt: skip


class SoftmaxMethod(Method):
    """Backbone, linear head, one optimiser. In the task setting a sample's softmax runs over the classes of its own
    task, and where classes have several label levels over those of its own level: one head per level."""

    def __init__(self, config: Any, backbone: nn.Module, setting: Setting) -> None:
        super().__init__(config, backbone, setting)
        if config.train == "head":
            self.frozen_backbone, self.view = True, "features"
            freeze(backbone)
        self.classifier = self.make_classifier(width_of(backbone), setting.num_classes)
        learned = [p for p in [*backbone.parameters(), *self.classifier.parameters()] if p.requires_grad]
        self.optimizer = make_optimizer(config, learned)
        self._siblings = siblings(setting)

    def make_classifier(self, num_features: int, num_classes: int) -> nn.Module:
        """(B, D) -> (B, C): a linear layer with PyTorch's initialisation."""
        return nn.Linear(num_features, num_classes)

    def phases(self, task: Task, index: int) -> Sequence[Phase]:
        """One loop over the task."""
        return [Phase("train", view=self.training_view)]

    @property
    def training_view(self) -> str:
        """What images are trained through: kept features where only the head learns."""
        return "features" if self.frozen_backbone else "train"

    def loss(self, images: Tensor, targets: Tensor, seen: Tensor) -> Tensor:
        """Mean cross entropy of (B, C, H, W) images and (B,) int64 targets; `seen`: (C,) bool."""
        return self.cross_entropy(self.classifier(self.features(images, None)), targets, seen)

    def cross_entropy(self, logits: Tensor, targets: Tensor, seen: Tensor) -> Tensor:
        """Mean cross entropy of (B, C) logits over the classes that a sample's softmax runs over."""
        if self._siblings is not None:
            logits = logits.masked_fill(~self._siblings[targets], -torch.inf)
        if self.config.train_classes == "seen":
            logits = logits.masked_fill(~seen, -torch.inf)
        return nn.functional.cross_entropy(logits, targets)

    def update(self, inputs: Any) -> Mapping[str, Tensor]:
        """Cross entropy on the batch, one step of the optimiser."""
        loss = self.loss(inputs.images, inputs.targets, inputs.seen)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.detach()}

    def classify(self, features: Tensor, allowed: Tensor, task: int | None) -> Tensor:
        out: Tensor = self.classifier(features)
        return out

    def head(self, task: int | None) -> Head:
        assert isinstance(self.classifier, nn.Linear)
        return Head("linear", self.classifier.weight, self.classifier.bias)


def width_of(backbone: nn.Module) -> int:
    """D of a backbone."""
    width = backbone.num_features
    assert isinstance(width, int)
    return width


def make_optimizer(config: OptimizerConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser that a config names."""
    if config.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=config.lr, weight_decay=config.weight_decay)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)


def siblings(setting: Setting) -> Tensor | None:
    """(C, C) bool: whether two classes are told apart by one softmax, or None if all are: those of one task in the task
    setting, and of one label level. A class that no task introduces has no siblings but itself."""
    level = setting.classes.level
    same = level[:, None] == level[None, :]
    if setting.setting == "task":
        together = torch.eye(setting.num_classes, dtype=torch.bool)
        for classes in setting.task_classes:
            together[classes[:, None], classes[None, :]] = True
        same &= together
    return None if bool(same.all()) else same.to(setting.device)
