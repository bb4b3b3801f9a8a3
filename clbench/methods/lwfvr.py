"""LwF-VR: LwF with sentences of random words as reference texts, so that more than the task's own words are kept.

Ding et al., 2022 (arXiv 2207.09248), as in the MTIL table (mtil card, section 2, baselines): 1,000 sentences of ten
random ids of the text vocabulary between the marks of start and end, drawn once per task; the rest as `lwf`.

Different from the official code: ids of the marks themselves are not drawn, so that a text ends where its end mark is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.backbones.clip_model import ClipBackbone
from clbench.methods.base import hp
from clbench.methods.lwf import LwF, LwFConfig


@dataclass(frozen=True)
class LwFVRConfig(LwFConfig):
    """LwF's, and the random sentences."""

    sentences: int = hp(1000, "random sentences per task", low=1, source="mtil card, section 2")
    words: int = hp(10, "random ids per sentence", low=1, source="mtil card, section 2")


def random_sentences(model: ClipBackbone, count: int, words: int, rng: torch.Generator) -> Tensor:
    """(count, words + 2) int64: the start mark, random ids below it, the end mark. Source: mtil card, section 2."""
    marks = model.tokenize(["a"])[0]
    start, end = int(marks[0]), int(marks.max())
    ids = torch.randint(start, (count, words), generator=rng, device=rng.device)
    return F.pad(F.pad(ids, (1, 0), value=start), (0, 1), value=end)


class LwFVR(LwF):
    """Only the reference texts differ from LwF."""

    Config = LwFVRConfig
    settings = frozenset({"class", "task"})
    quick: ClassVar[Mapping[str, Any]] = {**LwF.quick, "sentences": 20}
    aliases = ("lwf-vr",)
    config: LwFVRConfig

    def reference_tokens(self, task: int) -> Tensor:
        rng = self.setting.rng("random-sentences", task)
        return random_sentences(self.backbone, self.config.sentences, self.config.words, rng)


METHOD = LwFVR
