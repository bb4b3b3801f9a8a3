"""LwF for CLIP: keep the similarities that the network of the previous task gives to the images at hand.

Li and Hoiem, ECCV 2016, in the form of the MTIL table (mtil card, section 2, baselines): ZSCL's two distillation
losses with the current task's own images, un-augmented and drawn apart from the training batch, as reference images,
the task's prompts as reference texts, and the network as it was when the task began as teacher. No mean of weights, no
anchor.

At the first step of every task student and teacher agree, so the distillation has no gradient there.
Same as the official code: all of the above. Different: a ragged last reference batch is left out; the teacher's text
features, which are constant through a task, are encoded once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clbench.methods._clip import ClipConfig, ClipMethod, Cycle, Teacher
from clbench.methods._distillation import distillation_losses
from clbench.methods.base import Setting, hp
from clbench.scenarios.model import Task
from clbench.stream.types import Batch, Cursor, Phase


@dataclass(frozen=True)
class LwFConfig(ClipConfig):
    """The common recipe and the distillation."""

    image_weight: float = hp(1.0, "weight of the loss over texts", low=0.0, high=1000.0, source="mtil card, section 2")
    text_weight: float = hp(1.0, "weight of the loss over images", low=0.0, high=1000.0, source="mtil card, section 2")
    temperature: float = hp(2.0, "temperature of the distillation", low=0.01, high=100.0, source="mtil card, section 2")
    reference_batch: int = hp(0, "reference images per step; 0 for as many as the batch", low=0, unit="images",
                              source="zscl card, section 3: 64")  # fmt: skip


class LwF(ClipMethod):
    """The teacher is part of a checkpoint, since it is a network of the run."""

    Config = LwFConfig
    settings = frozenset({"class", "task"})
    aliases = ("clip-lwf",)
    config: LwFConfig

    def __init__(self, config: LwFConfig, backbone: nn.Module, setting: Setting) -> None:
        super().__init__(config, backbone, setting)
        self.teacher = Teacher(self.backbone)
        self.teacher_texts = torch.zeros((0, int(self.backbone.num_features)), device=setting.device)
        self._cycle = Cycle(setting, "reference")
        self._rows = torch.zeros(0, dtype=torch.int64, device=setting.device)

    def begin_phase(self, task: Task, phase: Phase, at: Cursor) -> None:
        super().begin_phase(task, phase, at)
        self.teacher.follow(self.backbone)
        self.teacher_texts = self.teacher.texts(self.reference_tokens(at.task))

    def open_phase(self, task: Task, phase: Phase, at: Cursor) -> None:
        super().open_phase(task, phase, at)
        self._rows = task.rows.to(self.setting.device)

    def reference_tokens(self, task: int) -> Tensor:
        """(N, L) int64: the reference texts of a task, its training prompts."""
        return self.train_tokens(task)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        size = self.config.reference_batch or self.setting.batch_size
        rows = self._rows[self._cycle.batch(len(self._rows), size, batch.at)]
        reference = self.setting.read(rows, None, "test")
        features = self.backbone(torch.cat([batch.images, reference]))
        own, student = features.split([len(batch.images), len(reference)])
        return {"ce": self.classify_loss(own, batch), **self.distill(student, self.teacher.images(reference))}

    def distill(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """Weighted losses of student and teacher features (R, D) of the reference images."""
        with torch.autocast(self.setting.device.type, enabled=False):
            image, text = distillation_losses(
                student.float(), teacher, self.teacher_texts, self.backbone.scale, self.config.temperature
            )
        return {"image": self.config.image_weight * image, "text": self.config.text_weight * text}

    def end_phase(self, task: Task, phase: Phase, at: Cursor) -> None:
        super().end_phase(task, phase, at)
        self.teacher_texts = self.teacher_texts[:0].clone()

    def memory_bytes(self) -> dict[str, int]:
        return {"teacher": self.teacher.num_bytes}


METHOD = LwF
