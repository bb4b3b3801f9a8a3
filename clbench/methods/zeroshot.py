"""Zero-shot CLIP: the pretrained network as it is, asked by all prompts of a data set; no training.

The first row of the MTIL table (mtil card, section 2). Each task has one step that does nothing, so that the stream
goes on; the accuracy matrix has the same row behind every task.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from clbench.backbones.clip_model import as_clip
from clbench.backbones.clip_text import TextClassifier, class_texts, unit
from clbench.methods._clip import padded
from clbench.methods.base import Head, Method, Setting, freeze, hp
from clbench.scenarios.model import Task
from clbench.scenarios.prompts import PLAIN
from clbench.stream.types import Batch, Phase


@dataclass(frozen=True)
class ZeroShotConfig:
    """Nothing to learn; what to ask."""

    prompt: str = hp("", "one prompt in place of the data set's own, {} for the class",
                     source="zscl card, section 4: CIL has one")  # fmt: skip


class ZeroShot(Method):
    """The classifier is encoded once and never changes."""

    Config = ZeroShotConfig
    settings = frozenset({"class", "task"})
    small_backbone = "clip-small"
    aliases = ("zero-shot", "clip", "clip-zeroshot")
    config: ZeroShotConfig

    def __init__(self, config: ZeroShotConfig, backbone: nn.Module, setting: Setting) -> None:
        super().__init__(config, as_clip(backbone, "zeroshot"), setting)
        freeze(self.backbone)
        self.frozen_backbone = True
        one_prompt = config.prompt or ("" if setting.prompts else PLAIN[0])
        self._scale = as_clip(backbone, "zeroshot").scale
        self._prompts = TextClassifier(as_clip(backbone, "zeroshot"), class_texts(setting, one_prompt), setting.device)
        self._classifiers: dict[int | None, Tensor] = {}

    def phases(self, task: Task, index: int) -> Sequence[Phase]:
        return [Phase("nothing", source="none", iterations=1)]

    def step(self, batch: Batch) -> Mapping[str, Tensor]:
        return {}

    def classify(self, features: Tensor, allowed: Tensor, task: int | None) -> Tensor:
        """`scale * cos(image, class)`, in the columns of the task's classes (of all classes where `task` is None)."""
        return self._scale * unit(features.float()) @ self.classifier(task).mT

    def classifier(self, task: int | None) -> Tensor:
        """(C, D) class texts of all prompts."""
        if task not in self._classifiers:
            self._classifiers[task] = padded(self._prompts.weights(task), self.setting.num_classes)
        return self._classifiers[task]

    def head(self, task: int | None) -> Head:
        return Head("cosine", self.classifier(task), None, self._scale)


METHOD = ZeroShot
