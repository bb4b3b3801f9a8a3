"""What CLIB and PL-FMS share: a memory that evicts by importance, whose losses are measured as training goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.errors import InputError
from clbench.memory.importance import ImportanceMemory, ImportanceRule
from clbench.methods._adaptive_rate import AdaptiveRate
from clbench.methods._cutmix import cutmix
from clbench.methods._softmax import SgdConfig, SoftmaxMethod
from clbench.methods.base import Setting, hp
from clbench.stream.types import Batch

__all__ = ["ImportanceConfig", "ImportanceReplay", "Prepared"]

MEASURED = 512  # exemplars of one forward pass as their losses are measured


@dataclass(frozen=True)
class ImportanceConfig(SgdConfig):
    """Hyperparameters of CLIB, most of which PL-FMS takes over."""

    lr: float = hp(
        3e-4, "learning rate to begin with", low=0.0, high=10.0, scale="log", source="hle card, section 2",
        tune={"low": 1e-4, "high": 1e-2},
    )  # fmt: skip
    optimizer: str = hp(
        "adam", "Adam, AdamW or SGD", choices=("sgd", "adam", "adamw"), source="hle and si_blurry cards, section 2"
    )
    train_classes: str = hp(
        "seen", "classes the training softmax runs over, in the class setting", choices=("all", "seen"),
        source="hle card 1: heads grow with the classes; si_blurry card 1: others are -inf",
    )  # fmt: skip
    capacity: int = hp(
        2000, "exemplars in memory", low=0, high=1_000_000, unit="exemplars", source="hle, si_blurry cards, section 2"
    )
    cutmix: float = hp(
        0.5, "probability that a batch is mixed by CutMix", low=0.0, high=1.0, source="hle card 2; si_blurry card 3"
    )
    importance_decay: float = hp(
        0.9, "decay of the running estimate of importance", low=0.0, high=1.0, source="hle card 1.4"
    )
    importance_every: int = hp(
        1, "updates between two refreshes of importance (a forward pass over the memory each)", low=1, high=1_000_000,
        unit="updates", source="hle card 7",
    )  # fmt: skip
    importance_rule: str = hp(
        "released", "released: the estimate as the code moves it (mean divided by the number drawn once more, other "
        "sign); intended: a moving average", choices=("released", "intended"), source="hle card 5.6",
    )  # fmt: skip
    lr_step: float = hp(0.95, "low rate over high rate; 1: constant", low=0.01, high=1.0, source="hle card 1.5")
    lr_period: int = hp(10, "refreshes that a rate stays in use", low=1, high=1_000_000, source="hle card 1.5")
    lr_length: int = hp(10, "turns of each rate that the t-test compares", low=3, high=1000, source="hle card 1.5")
    lr_significance: float = hp(0.05, "significance of the t-test", low=0.0, high=0.5, source="hle card 1.5")
    lr_clock: str = hp(
        "update", "what lr_period counts: update: every refresh (Si-Blurry); batch: only those behind the last update "
        "on a stream batch (the code of i-Blurry and HLE)", choices=("update", "batch"), source="hle card 1.5",
    )  # fmt: skip


class Prepared(NamedTuple):
    """Inputs of an update. images: (B, C, H, W); targets: (B,); seen: (C,) bool; valid: (B,) bool or None for all.
    pasted: (B,) targets of what CutMix pasted into each image; share: 0-d, what is left of its own (see `cutmix`)."""

    images: Tensor
    targets: Tensor
    seen: Tensor
    valid: Tensor | None = None
    pasted: Tensor | None = None
    share: Tensor | None = None


class ImportanceReplay(SoftmaxMethod):
    """Memory, training on a batch of it, and the refresh of importance and learning rate behind an update."""

    config: Any
    name = "importance replay"

    def __init__(self, config: Any, backbone: nn.Module, setting: Setting) -> None:
        if config.capacity == 0:
            raise InputError(f"{self.name} trains on its memory, but capacity is 0: set capacity to at least 1")
        if config.train == "head" and config.cutmix > 0:
            raise InputError(
                f"{self.name} with train=head reads kept features, which CutMix cannot mix: set cutmix=0, or train=all"
            )
        super().__init__(config, backbone, setting)
        rule: ImportanceRule = "released" if config.importance_rule == "released" else "intended"
        self.memory = ImportanceMemory(
            config.capacity, setting.num_classes, setting.device, decay=config.importance_decay, rule=rule
        )
        self.rate = AdaptiveRate(
            config.lr, self.memory, step=config.lr_step, period=config.lr_period, length=config.lr_length,
            significance=config.lr_significance,
        )  # fmt: skip
        self.optimizer = make_fused(config, [p for group in self.optimizer.param_groups for p in group["params"]])
        self.updates = 0
        alone = self._siblings
        self._group = (
            torch.zeros(setting.num_classes, dtype=torch.int64, device=setting.device)
            if alone is None
            else alone.int().argmax(1)
        )  # (C,): classes of one softmax have one number

    def remembers(self, batch: Batch) -> bool:
        """Whether this is the first update on samples that have not come before."""
        return batch.at.update == 0 and batch.epoch == 0

    def sample_losses(self, logits: Tensor, targets: Tensor, seen: Tensor) -> Tensor:
        """(B,) cross entropy of each sample over the classes that its softmax runs over."""
        if self._siblings is not None:
            logits = logits.masked_fill(~self._siblings[targets], -torch.inf)
        if self.config.train_classes == "seen":
            logits = logits.masked_fill(~seen, -torch.inf)
        return F.cross_entropy(logits, targets, reduction="none")

    def prepared(self, images: Tensor, targets: Tensor, batch: Batch, valid: Tensor | None = None) -> Prepared:
        """What an update trains on: (B, C, H, W) images and (B,) targets, mixed by CutMix; valid: (B,) bool, those that
        count (all)."""
        for parameters in self.optimizer.param_groups:  # a checkpoint puts another tensor there
            parameters["lr"] = self.rate.rate
        if self.config.cutmix == 0:
            return Prepared(images, targets, batch.seen, valid)
        group = self._group[targets]
        if valid is not None:
            group = torch.where(valid, group, -1)
        mixed = cutmix(images, group, self.config.cutmix, self.setting.rng("cutmix", batch.at.step))
        return Prepared(mixed.images, targets, batch.seen, valid, targets[mixed.partner], mixed.share)

    def update(self, inputs: Prepared) -> Mapping[str, Tensor]:
        """Mean cross entropy of the samples that count, one step of the optimiser."""
        logits = self.classifier(self.features(inputs.images, None))
        losses = self.sample_losses(logits, inputs.targets, inputs.seen)
        if inputs.share is not None and inputs.pasted is not None:
            pasted = self.sample_losses(logits, inputs.pasted, inputs.seen)
            losses = inputs.share * losses + (1 - inputs.share) * pasted
        valid = inputs.valid
        loss = losses.mean() if valid is None else (losses * valid).sum() / valid.sum().clamp(min=1)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.detach()}

    def keep(self, batch: Batch) -> None:
        """Refresh importance and learning rate, if it is time."""
        self.updates += 1
        if self.updates % self.config.importance_every == 0:
            self.refresh(batch.seen)
            if self.config.lr_clock == "update" or batch.last_update:
                self.rate.refreshed()

    @torch.no_grad()
    def refresh(self, seen: Tensor) -> None:
        """Measure the loss of every exemplar as a test image, and tell the memory."""
        rows, targets, domain = self.memory.rows, self.memory.targets, self.memory.domain
        view = self.view if self.view == "features" else "test"
        training = self.backbone.training
        self.backbone.eval()
        parts = []
        for start in range(0, len(rows), MEASURED):
            cut = slice(start, start + MEASURED)
            images = self.setting.read(rows[cut], None if domain is None else domain[cut], view)
            parts.append(self.classifier(self.features(images, None)))
        self.backbone.train(training)
        logits = torch.cat(parts)
        self.memory.refresh(self.sample_losses(logits, targets, seen))
        self.measured(logits, targets, seen)

    def measured(self, logits: Tensor, targets: Tensor, seen: Tensor) -> None:
        """Look at the (len, C) logits of all exemplars; for methods that do more with them."""

    def memory_bytes(self) -> dict[str, int]:
        return {"memory": self.memory.num_bytes(self.setting.image_bytes)}


def make_fused(config: Any, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser that a config names, with a tensor as learning rate: fused, so that it isn't read back."""
    lr = torch.tensor(config.lr, dtype=torch.float32, device=parameters[0].device)
    if config.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=lr, weight_decay=config.weight_decay, fused=True)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=config.weight_decay, fused=True)
    return torch.optim.SGD(parameters, lr=lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=True)
