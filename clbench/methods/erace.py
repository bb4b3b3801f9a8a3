"""ER-ACE: experience replay whose stream loss leaves the classes alone that are not in the incoming batch.

Caccia et al. 2022 (AML), card `online_baselines`, section 2.4: the softmax of the stream batch runs over the classes
that are in it, so that new classes don't push old ones away; the softmax of the replay batch runs over all classes.
Everything else is ER (two forward passes, one step, reservoir).

Differences from the official code, all hyperparameters: it also keeps every class from the largest one seen so far
upwards (`masking=official`), which is meant for classes that arrive in ascending order and un-masks an old class where
they do not; its head is a cosine classifier (`head=cosine`). The defaults are the paper's rule and ER's linear head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clbench.backbones.heads import CosineHead
from clbench.methods.base import Head, Setting, hp
from clbench.methods.er import ER, ERConfig
from clbench.stream.types import Batch

__all__ = ["ERACE", "ERACEConfig", "kept_classes"]


def kept_classes(targets: Tensor, num_classes: int, seen: Tensor | None = None) -> Tensor:
    """(C,) bool: classes that the stream's softmax runs over.

    targets: (B,) int64 of the incoming batch. seen: None for the paper's rule, the classes of the batch; or (C,) bool
    classes that have come so far, this batch included, for the official one: also every class from the largest seen.
    """
    kept = torch.zeros(num_classes, dtype=torch.bool, device=targets.device).index_fill_(0, targets, True)
    if seen is None:
        return kept
    ids = torch.arange(num_classes, device=targets.device)
    return kept | (ids >= (ids * seen).amax())


@dataclass(frozen=True)
class ERACEConfig(ERConfig):
    """Hyperparameters of ER-ACE."""

    masking: str = hp(
        "strict", "stream softmax: over the classes in the batch (strict), or also over those from the largest seen on",
        choices=("strict", "official"), source="card 2.4: strict where the class order is random",
    )  # fmt: skip
    head: str = hp("linear", "classifier: linear, or cosine times 10", choices=("linear", "cosine"), source="card 2.4")


class ERACE(ER):
    """ER with asymmetric cross entropy."""

    Config = ERACEConfig
    aliases = ("er-ace", "ace")
    graphable = True

    def __init__(self, config: ERACEConfig, backbone: nn.Module, setting: Setting) -> None:
        super().__init__(config, backbone, setting)
        self.seen = torch.zeros(setting.num_classes, dtype=torch.bool, device=setting.device)

    def make_classifier(self, num_features: int, num_classes: int) -> nn.Module:
        """Linear, or cosine with scale 10 and eps 1e-5; PyTorch's initialisation of a linear layer."""
        linear = nn.Linear(num_features, num_classes)
        if self.config.head == "linear":
            return linear
        cosine = CosineHead(num_features, num_classes, scale=10.0, eps=1e-5)
        with torch.no_grad():
            cosine.weight.copy_(linear.weight)
        return cosine

    def stream_loss(self, batch: Batch) -> Tensor:
        """Mean cross entropy of the stream batch over the kept classes."""
        self.seen.index_fill_(0, batch.targets, True)
        seen = self.seen if self.config.masking == "official" else None
        kept = kept_classes(batch.targets, self.setting.num_classes, seen)
        logits = self.classifier(self.features(batch.images, None))
        return self.cross_entropy(logits.masked_fill(~kept, -torch.inf), batch.targets, batch.seen)

    def head(self, task: int | None) -> Head:
        if isinstance(self.classifier, CosineHead):
            return Head("cosine", self.classifier.weight, None, self.classifier.scale)
        return super().head(task)


METHOD = ERACE
