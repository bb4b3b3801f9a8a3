"""DER++: replay that keeps the answers of the past, by their logits and by their labels.

Buzzega et al. 2020 (mammoth, AML), card `online_baselines`, section 2.5:

    L = CE(stream) + alpha * mean over all entries of (o(m1) - l1)^2 + beta * CE(o(m2), y2)

m1, m2: two replay batches. l1: all C logits of an exemplar as the network gave them when it came, in the forward pass
of its stream batch (augmented, train mode, before that step's update); the image is kept un-augmented. beta = 0 is DER.

The two codes differ, both are hyperparameters: mammoth draws twice and runs two forward passes (`draws=two`,
`forward=apart`, the defaults, as the card writes the loss); AML draws 2 x `replay_batch_size` once, splits them in
halves and runs one pass (`draws=one`, `forward=together`), which differs in batch-norm statistics. A term of weight 0
costs no forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.memory.buffer import Buffer, Exemplars
from clbench.methods._softmax import SgdConfig, SoftmaxMethod
from clbench.methods.base import Setting, hp
from clbench.stream.types import Batch

__all__ = ["DERPP", "DERPPConfig", "derpp_loss"]


def derpp_loss(
    stream_loss: Tensor,
    recalled: tuple[Tensor, Tensor] | None,
    labelled_loss: Tensor | None,
    alpha: float,
    beta: float,
) -> Tensor:
    """stream_loss + alpha * mean((o1 - l1)^2) + beta * labelled_loss.

    recalled: logits now and as stored, (m, C) each; labelled_loss: mean cross entropy of the second replay batch, 0-d;
    None leaves a term out.
    """
    loss = stream_loss
    if recalled is not None:
        loss = loss + alpha * F.mse_loss(*recalled)
    if labelled_loss is not None:
        loss = loss + beta * labelled_loss
    return loss


@dataclass(frozen=True)
class DERPPConfig(SgdConfig):
    """Hyperparameters of DER++."""

    capacity: int = hp(1000, "exemplars in memory", low=0, high=10_000_000, unit="exemplars")
    replay_batch_size: int = hp(
        10, "exemplars in each of the two replay batches", low=1, high=100_000, source="card, families A and B"
    )
    reservoir: str = hp(
        "batch", "reservoir rule: one draw range per batch (the field's code) or per sample (textbook)",
        choices=("batch", "exact"), source="card 2.1",
    )  # fmt: skip
    alpha: float = hp(
        0.2, "weight of the distance to the stored logits", low=0.0, high=100.0, source="card 3: CCL-DC",
        tune={"low": 0.1, "high": 1.0},
    )  # fmt: skip
    beta: float = hp(
        1.0, "weight of the second batch's cross entropy; 0 is DER", low=0.0, high=100.0, source="card 3: CCL-DC, AML"
    )
    draws: str = hp(
        "two", "two independent replay draws, or one of double size split in halves", choices=("two", "one"),
        source="card 2.5: mammoth, AML",
    )  # fmt: skip
    forward: str = hp(
        "apart", "the two replay batches in two forward passes, or together in one", choices=("apart", "together"),
        source="card 2.5: mammoth, AML",
    )  # fmt: skip


class Drawn(NamedTuple):
    """What one update computes with: images (b, C, H, W) and stored logits (b, C) of the first replay batch, images and
    targets (b,) of the second; None for a weight of 0 and while the memory is empty."""

    batch: Batch
    recalled: Tensor | None = None
    logits: Tensor | None = None
    labelled: Tensor | None = None
    targets: Tensor | None = None


class DERPP(SoftmaxMethod):
    """Dark experience replay, with labels."""

    Config = DERPPConfig
    aliases = ("der++",)
    graphable = True

    def __init__(self, config: DERPPConfig, backbone: nn.Module, setting: Setting) -> None:
        super().__init__(config, backbone, setting)
        payload = {"logits": (setting.num_classes,)}
        self.buffer = Buffer(config.capacity, setting.device, payload=payload, rule=config.reservoir)
        self._logits = torch.zeros((setting.batch_size, setting.num_classes), device=setting.device)  # of this step

    def draw(self, batch: Batch) -> Drawn:
        """The batch, and two replay batches to go with it."""
        if len(self.buffer) == 0:
            return Drawn(batch)
        read, rng, step = self.setting.read, self.setting.rng, batch.at.step
        first, second = self.sample(step)
        recalled = logits = labelled = targets = None
        if self.config.alpha > 0:
            recalled = read(first.rows, first.domain, batch.phase.view, rng("replay-logits-view", step))
            logits = first.payload["logits"]
        if self.config.beta > 0:
            labelled = read(second.rows, second.domain, batch.phase.view, rng("replay-view", step))
            targets = second.targets
        return Drawn(batch, recalled, logits, labelled, targets)

    def sample(self, step: int) -> tuple[Exemplars, Exemplars]:
        """The exemplars whose logits are recalled, and those whose labels are learned."""
        size, rng = self.config.replay_batch_size, self.setting.rng
        if self.config.draws == "two":
            return self.buffer.sample(size, rng("replay-logits", step)), self.buffer.sample(size, rng("replay", step))
        slots = self.buffer.sample(2 * size, rng("replay", step)).slots
        half = (len(slots) + 1) // 2  # of an odd number the middle one is in both halves
        return self.buffer.take(slots[:half]), self.buffer.take(slots[len(slots) - half :])

    def update(self, inputs: Drawn) -> Mapping[str, Tensor]:
        """All three terms, one step of the optimiser."""
        batch = inputs.batch
        stream = self.logits_of(batch.images)
        self._logits[: len(stream)].copy_(stream.detach())
        stream_loss = self.cross_entropy(stream, batch.targets, batch.seen)
        recalled, labelled = self.replay(inputs)
        pair = None if recalled is None or inputs.logits is None else (recalled, inputs.logits)
        labelled_loss = None
        if labelled is not None and inputs.targets is not None:
            labelled_loss = self.cross_entropy(labelled, inputs.targets, batch.seen)
        loss = derpp_loss(stream_loss, pair, labelled_loss, self.config.alpha, self.config.beta)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.detach(), "stream_loss": stream_loss.detach()}

    def replay(self, inputs: Drawn) -> tuple[Tensor | None, Tensor | None]:
        """Logits of the two replay batches, from one forward pass or from one each."""
        first, second = inputs.recalled, inputs.labelled
        if first is not None and second is not None and self.config.forward == "together":
            both = self.logits_of(torch.cat([first, second]))
            return both[: len(first)], both[len(first) :]
        return (None if first is None else self.logits_of(first)), (None if second is None else self.logits_of(second))

    def logits_of(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C)."""
        logits: Tensor = self.classifier(self.features(images, None))
        return logits

    def keep(self, batch: Batch) -> None:
        """The reservoir sees each sample of the stream once, with its logits from the stream's forward pass."""
        if batch.last_update and batch.epoch == 0:
            rng = self.setting.rng("reservoir", batch.at.step)
            self.buffer.add(batch.rows, batch.targets, rng, batch.domain, logits=self._logits[: len(batch.rows)])

    def memory_bytes(self) -> dict[str, int]:
        return {"buffer": self.buffer.num_bytes(self.setting.image_bytes)}


METHOD = DERPP
