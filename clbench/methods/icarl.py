"""iCaRL for CLIP: a memory of herded exemplars, on which the answers of the initial CLIP are kept.

Rebuffi et al., CVPR 2017, in the form of the MTIL table (mtil card, section 2, baselines, and 6.2, 6.4): fine-tuning on
the task, and ZSCL's two distillation losses on images of the memory instead of a reference set, with the current task's
prompts as reference texts. No loss asks for the exemplars' own classes. The teacher is zero-shot CLIP, as the official
code of MTIL leaves it; `teacher = "previous"` is the network as the task began, as its class-incremental code has it.

The memory: K exemplars. The first data set gives its first K images in its own order; behind data set t (from 1) the
earlier ones are cut to K // t each, first come first kept, and the new one gets K - K // t by herding. For t >= 3 that
is more than K in all (card, 6.2); `shares = "equal"` gives each K // t.

Same as the official code: all of the above, exemplars in a fixed cycle. Different: the released command weighs the
distillation with 0 and trains five iterations, which is no recipe (card, 6.2): the weights are 1 as in `lwf`. An
exemplar is a row number, read anew through the test view, where the official code stores preprocessed images.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from clbench.memory.herding import herding_order
from clbench.methods._clip import ClipConfig, ClipMethod, Teacher
from clbench.methods._distillation import distillation_losses
from clbench.methods.base import Setting, hp
from clbench.scenarios.model import Task
from clbench.stream.types import Batch, Cursor, Phase

HERDING_BATCH = 256  # rows per forward pass without gradients; has no influence on the result


@dataclass(frozen=True)
class ICaRLConfig(ClipConfig):
    """The common recipe, the distillation, and the memory."""

    capacity: int = hp(10_000, "exemplars K", low=1, high=10_000_000, unit="exemplars",
                       source="mtil card, section 2; CIL: 5,000")  # fmt: skip
    scanned: int = hp(30_000, "at most so many images of a data set are looked at for herding", low=1, unit="images",
                      source="mtil card, section 2")  # fmt: skip
    shares: str = hp("official", "sizes of the data sets' parts of the memory", choices=("official", "equal"),
                     source="mtil card, 6.2")  # fmt: skip
    image_weight: float = hp(1.0, "weight of the loss over texts", low=0.0, high=1000.0, source="mtil card, section 2")
    text_weight: float = hp(1.0, "weight of the loss over images", low=0.0, high=1000.0, source="mtil card, section 2")
    temperature: float = hp(2.0, "temperature of the distillation", low=0.01, high=100.0, source="mtil card, section 2")
    reference_batch: int = hp(64, "exemplars per step", low=1, unit="exemplars", source="mtil card, section 2")
    teacher: str = hp("initial", "whose answers are kept: the initial CLIP's, or the network's as the task began",
                      choices=("initial", "previous"), source="mtil card, 6.4")  # fmt: skip


def memory_shares(capacity: int, tasks: int, shares: str) -> tuple[int, int]:
    """What each earlier data set is cut to and what the new one gets, behind data set number `tasks` (from 1).

    >>> memory_shares(10_000, 1, "official"), memory_shares(10_000, 3, "official"), memory_shares(10_000, 3, "equal")
    ((10000, 10000), (3333, 6667), (3333, 3333))
    """
    kept = capacity // tasks
    return kept, (capacity - kept if shares == "official" and tasks > 1 else kept)


class ICaRL(ClipMethod):
    """`exemplars` holds rows of the memory, one tensor per data set, best first."""

    Config = ICaRLConfig
    settings = frozenset({"class", "task"})
    quick: ClassVar[Mapping[str, Any]] = {**ClipMethod.quick, "capacity": 12, "reference_batch": 5}
    aliases = ("icarl-clip", "clip-icarl")
    config: ICaRLConfig

    def __init__(self, config: ICaRLConfig, backbone: nn.Module, setting: Setting) -> None:
        super().__init__(config, backbone, setting)
        self.teacher = Teacher(self.backbone)
        self.teacher_texts = torch.zeros((0, int(self.backbone.num_features)), device=setting.device)
        self.exemplars: list[Tensor] = []
        self._memory = torch.zeros(0, dtype=torch.int64, device=setting.device)  # all of them

    def begin_phase(self, task: Task, phase: Phase, at: Cursor) -> None:
        super().begin_phase(task, phase, at)
        if self.config.teacher == "previous":
            self.teacher.follow(self.backbone)
        self.teacher_texts = self.teacher.texts(self.train_tokens(at.task))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        if not self.exemplars:
            return super().losses(batch)
        reference = self.setting.read(self._next_exemplars(batch.at), None, "test")
        features = self.backbone(torch.cat([batch.images, reference]))
        own, student = features.split([len(batch.images), len(reference)])
        config = self.config
        with torch.autocast(self.setting.device.type, enabled=False):
            image, text = distillation_losses(
                student.float(), self.teacher.images(reference), self.teacher_texts, self.backbone.scale,
                config.temperature,
            )  # fmt: skip
        terms = {"image": config.image_weight * image, "text": config.text_weight * text}
        return {"ce": self.classify_loss(own, batch), **terms}

    def _next_exemplars(self, at: Cursor) -> Tensor:
        """(R,) int64 rows: the next of a fixed cycle through the memory."""
        if len(self._memory) != sum(map(len, self.exemplars)):
            self._memory = torch.cat(self.exemplars)
        number, size = len(self._memory), self.config.reference_batch
        start = at.iteration * size
        return self._memory[torch.arange(start, start + min(size, number), device=self._memory.device) % number]

    def end_phase(self, task: Task, phase: Phase, at: Cursor) -> None:
        super().end_phase(task, phase, at)
        self.teacher_texts = self.teacher_texts[:0].clone()
        kept, new = memory_shares(self.config.capacity, at.task + 1, self.config.shares)
        self.exemplars = [rows[:kept].clone() for rows in self.exemplars]
        self.exemplars.append(self._select(task.rows.to(self.setting.device)[: self.config.scanned], new, at.task))
        self._memory = self._memory[:0]

    @torch.no_grad()
    def _select(self, rows: Tensor, count: int, index: int) -> Tensor:
        """The rows of the new data set to keep, best first."""
        if index == 0 or count >= len(rows):
            return rows[:count].clone()
        self.backbone.eval()
        parts = [self.backbone(self.setting.read(part, None, "test")) for part in rows.split(HERDING_BATCH)]
        return rows[herding_order(torch.cat(parts).float(), count)]

    def memory_bytes(self) -> dict[str, int]:
        exemplars = sum(map(len, self.exemplars)) * self.setting.image_bytes
        return {"exemplars": exemplars, "teacher": self.teacher.num_bytes}


METHOD = ICaRL
