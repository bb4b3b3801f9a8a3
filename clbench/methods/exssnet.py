"""ExSSNeT: a supermask per task, then training of the weights in it that no earlier mask has.

Idea: SupSup finds a subnetwork of fixed random weights for each task. ExSSNeT goes on and trains those of its weights
that lie in no earlier task's mask. A task computes with all of its mask, earlier tasks' trained weights included
(forward transfer), but writes only what is unclaimed, so earlier tasks' answers stay the same to the bit. KKT may give
a new task the scores of an earlier one to start from. The task must be known at test. No exemplars.

Paper: Yadav, Bansal: Exclusive Supermask Subnetwork Training for Continual Learning (arXiv 2210.10209, Findings of ACL
2023). Official code: prateeky2806/exessnet. Spec: card `exssnet`. What is shared with SupSup, and what differs from the
official code: `_mask_training.py`.

Capacity: with density k the t-th task finds about (1 - k)^t of its mask free. Once nothing is, a task keeps the mask
over weights as they are, as in SupSup; its weight phase then does nothing and ends behind its first epoch.

Shapes: P masked weights.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clbench.errors import InputError
from clbench.methods._mask_training import MaskTraining, WeightConfig
from clbench.methods._supermask import exclusive_mask, unpack_bits
from clbench.methods.base import Setting
from clbench.scenarios.model import Task
from clbench.stream.types import Batch, Cursor, Phase

__all__ = ["METHOD", "ExSSNeT", "mask_rate"]


def mask_rate(config: WeightConfig, weight_epochs: int) -> float:
    """Learning rate of the scores: the official code takes the weights' rate whenever weights are trained at all."""
    return config.weight_lr if config.rates == "official" and weight_epochs else config.mask_lr


class ExSSNeT(MaskTraining):
    """See the module: phase `weight` behind the mask's, over `effective` weights, of which only editable ones move."""

    Config = WeightConfig
    settings = frozenset({"task"})
    exclusive = True
    config: WeightConfig

    def __init__(self, config: WeightConfig, backbone: nn.Module, setting: Setting) -> None:
        super().__init__(config, backbone, setting)
        if config.weight_decay > 0:
            raise InputError(
                f"{self._name} must not decay weights, since that would move weights of earlier tasks: set "
                f"weight_decay=0"
            )
        self._weight_epochs = setting.epochs if config.weight_epochs is None else config.weight_epochs
        self.training_weights = False
        self.free = 0  # weights that the current task may write
        self.editable = torch.zeros_like(self.weights)  # 1 where it may

    def more_phases(self, common: Mapping[str, Any]) -> Sequence[Phase]:
        return [Phase("weight", epochs=self._weight_epochs, **common)] if self._weight_epochs else []

    def begin_phase(self, task: Task, phase: Phase, at: Cursor) -> None:
        super().begin_phase(task, phase, at)
        if phase.name == "weight":
            mask, used = (unpack_bits(bits, len(self._network)) for bits in (self.masks[at.task], self.used))
            self.editable.copy_(exclusive_mask(mask, used) if self.exclusive else mask)
            self.free = int(self.editable.sum())
            self.training_weights = True
            if self.free and self.config.selection == "phase":
                self.best, self.best_hits = [], -1

    def open_phase(self, task: Task, phase: Phase, at: Cursor) -> None:
        if phase.name == "weight":
            self.open_training(self.effective, self.config.weight_lr, phase, at)
        elif phase.name == "mask":
            self.open_training(self.scores, mask_rate(self.config, self._weight_epochs), phase, at)
        else:
            super().open_phase(task, phase, at)

    def step(self, batch: Batch) -> Mapping[str, Tensor]:
        if batch.phase.name != "weight":
            return super().step(batch)
        if not self.free:
            return {}
        loss = self.loss(batch)
        layers = self._network.layers
        parts = zip(self._network.gradients(loss), layers(self.editable), layers(self._gradient), strict=True)
        for gradient, editable, out in parts:
            torch.mul(gradient, editable, out=out)
        self.effective.grad = self._gradient
        assert self.optimizer is not None
        self.optimizer.step()  # a fresh Adam without decay moves nothing whose gradient is always 0
        return {"loss": loss.detach()}

    def end_epoch(self, task: Task, phase: Phase, at: Cursor) -> bool:
        if phase.name == "weight" and not self.free:
            return True
        return super().end_epoch(task, phase, at)

    def end_phase(self, task: Task, phase: Phase, at: Cursor) -> None:
        if phase.name == "weight":
            self.weights.copy_(self.live_weights())
            self.training_weights = False
        super().end_phase(task, phase, at)

    def live_weights(self) -> Tensor:
        """(P,) weights; while they are trained, with what the current task has written so far."""
        if not self.training_weights:
            return self.weights
        return torch.where(self.editable != 0, self.effective.detach(), self.weights)

    @property
    def weights_rest(self) -> bool:
        return self.exclusive or not self.training_weights

    def memory_bytes(self) -> dict[str, int]:
        used = {"used_weights": self.used.nbytes if self.num_finished else 0} if self.exclusive else {}
        return {**super().memory_bytes(), **used}


METHOD = ExSSNeT
