"""Experience Replay: train on each incoming batch and on a batch drawn from a reservoir memory.

Chaudhry et al. 2019, in the form of the online class-incremental literature (RaptorMai, PCR, HPCR code; card
`online_baselines`, sections 2.1-2.3): loss = mean CE of the stream batch + mean CE of the replay batch, from two
separate forward passes (each with its own batch-norm statistics), one SGD step, then the reservoir sees the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from clbench.memory.buffer import Buffer
from clbench.methods._softmax import SgdConfig, SoftmaxMethod
from clbench.methods.base import Setting, hp
from clbench.stream.types import Batch


@dataclass(frozen=True)
class ERConfig(SgdConfig):
    """Hyperparameters of ER."""

    capacity: int = hp(1000, "exemplars in memory", low=0, high=10_000_000, unit="exemplars")
    replay_batch_size: int = hp(10, "exemplars drawn per step", low=1, high=100_000, source="card, families A and B")
    reservoir: str = hp(
        "batch", "reservoir rule: one draw range per batch (the field's code) or per sample (textbook)",
        choices=("batch", "exact"), source="card 2.1",
    )  # fmt: skip
    stream_weight: float = hp(1.0, "weight of the stream's loss", low=0.0, high=100.0, source="card 2.3")
    replay_weight: float = hp(1.0, "weight of the replay loss", low=0.0, high=100.0, source="card 2.3")


class Drawn(NamedTuple):
    """What one update computes with: replay images (b, C, H, W), targets (b,); None while the memory is empty."""

    batch: Batch
    images: Tensor | None = None
    targets: Tensor | None = None


class ER(SoftmaxMethod):
    """Stream batch + replay batch. Weights (1, 1) are the online literature's, (lambda, 1 - lambda) the stability-gap
    paper's; there lambda scales the loss of the first task too."""

    Config = ERConfig
    aliases = ("experience-replay", "replay")
    graphable = True

    def __init__(self, config: ERConfig, backbone: nn.Module, setting: Setting) -> None:
        super().__init__(config, backbone, setting)
        self.buffer = Buffer(config.capacity, setting.device, rule=config.reservoir)

    def draw(self, batch: Batch) -> Drawn:
        """The batch, and exemplars to go with it."""
        step, rng = batch.at.step, self.setting.rng
        if len(self.buffer) == 0:
            return Drawn(batch)
        drawn = self.buffer.sample(self.config.replay_batch_size, rng("replay", step))
        images = self.setting.read(drawn.rows, drawn.domain, batch.phase.view, rng("replay-view", step))
        return Drawn(batch, images, drawn.targets)

    def update(self, inputs: Drawn) -> Mapping[str, Tensor]:
        """Both losses, one step of the optimiser."""
        batch = inputs.batch
        self.optimizer.zero_grad()
        stream_loss = self.stream_loss(batch)
        (self.config.stream_weight * stream_loss).backward()
        losses = {"stream_loss": stream_loss.detach()}
        if inputs.images is not None and inputs.targets is not None:
            replay_loss = self.loss(inputs.images, inputs.targets, batch.seen)
            (self.config.replay_weight * replay_loss).backward()
            losses["replay_loss"] = replay_loss.detach()
        self.optimizer.step()
        return losses

    def keep(self, batch: Batch) -> None:
        """The reservoir sees each sample of the stream once."""
        if batch.last_update and batch.epoch == 0:
            self.buffer.add(batch.rows, batch.targets, self.setting.rng("reservoir", batch.at.step), batch.domain)

    def stream_loss(self, batch: Batch) -> Tensor:
        """Mean loss of the incoming batch."""
        return self.loss(batch.images, batch.targets, batch.seen)

    def memory_bytes(self) -> dict[str, int]:
        return {"buffer": self.buffer.num_bytes(self.setting.image_bytes)}


METHOD = ER
