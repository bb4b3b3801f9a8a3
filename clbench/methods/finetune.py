"""Sequential fine-tuning: train on each task as it comes, keep nothing. The lower bound."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from clbench.methods._softmax import SgdConfig, SoftmaxMethod
from clbench.stream.types import Batch


class Finetune(SoftmaxMethod):
    """One phase per task, cross entropy on the stream."""

    Config = SgdConfig
    aliases = ("seqft", "naive", "sgd")

    def step(self, batch: Batch) -> Mapping[str, Tensor]:
        loss = self.loss(batch.images, batch.targets, batch.seen)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.detach()}


METHOD = Finetune
