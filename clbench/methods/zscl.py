"""ZSCL: learn new data sets, and hold CLIP's answers on reference images still, in feature space and in weight space.

Idea: forgetting of a vision-language model starts with what it could do before the first task. So the student's
similarities between unlabelled reference images and unpaired reference texts are held to those of the frozen initial
CLIP (feature space), the weights to where the task began, and the model of a task is the mean of the weights along its
training (weight space). No data of earlier tasks.

Paper: Zheng, Ma, Wang, Qin, Yue, You: Preventing Zero-Shot Transfer Degradation in Continual Learning of
Vision-Language Models, ICCV 2023 (arXiv 2303.06628). Official code: Thunderbeee/ZSCL at b96e714. One phase per task:

    L = CE(task, label smoothing) + D(S0, S) + D(S0^T, S^T) + lambda |theta - theta_start|^2
    every `average_every` steps, counted from the first: mean <- (n mean + theta) / (n + 1), which begins as theta_start
    behind the task theta <- mean: it answers, and the next task starts from it

S0 and S are scaled cosines of the teacher's and the student's image features to the *teacher's* text features.

Same as the official code: all of that, among it 1001 steps with the last at rate 0, the start and the first step among
the twelve members of the mean, no gradient of the distillation in the text tower. Switches for what its scripts can
do: `averaging = "none"` with `consolidation = 0` is ZSCL*, without both distillations it is WE or WC alone;
`image_weight = text_weight = 0.5` is weight_adjust; `image_image_weight`, `feature_mse_weight`; `averaging = "pull"` is
moving_avg towards the start. The class-incremental variant is a recipe: distillation weights 5, a mean every 10 steps,
one pass, one prompt; `candidates = "seen"` and `negatives = 100` are its ce_method previous and ext.

Different, with the same result up to rounding and random draws: the teacher's features of reference images and texts
are computed once and kept on disk (`teacher = "cached"`; the official code encodes all captions at every step); task
and reference images go through the network together; the gradient of the anchor, 2 lambda (theta - theta_start), is
added without a graph; a ragged last reference batch is left out; reference batches are shuffled anew in each task. The
reference set is an option, since the paper's (ImageNet, captions of Conceptual Captions) is not everywhere.
Under `--precision bf16` the cached teacher has full precision, the live one runs as the student does.

Shapes: B batch, R reference batch, N reference texts, D features.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.backbones.clip_text import frozen_text_features, unit
from clbench.backbones.features import FeatureBank
from clbench.errors import InputError
from clbench.methods._clip import ClipConfig, ClipMethod, Cycle, Teacher, bytes_of, interpolate
from clbench.methods._distillation import distillation_losses, image_image_loss
from clbench.methods.base import Reference, ReferenceSpec, Setting, hp
from clbench.scenarios.model import Task
from clbench.stream.types import Batch, Cursor, Phase

__all__ = ["METHOD", "ZSCL", "ZSCLConfig", "consolidation_loss", "merge"]


@dataclass(frozen=True)
class ZSCLConfig(ClipConfig):
    """Defaults are the paper's for MTIL (zscl card, section 3), but for the reference set."""

    image_weight: float = hp(
        1.0, "weight of the distillation over texts", low=0.0, high=1000.0, source="zscl card, 2.6; CIL: 5",
        tune={"choices": [1.0, 5.0]},
    )  # fmt: skip
    text_weight: float = hp(
        1.0, "weight of the distillation over images", low=0.0, high=1000.0, source="zscl card, 2.6; CIL: 5",
        tune={"choices": [1.0, 5.0]},
    )  # fmt: skip
    temperature: float = hp(2.0, "temperature of the distillation", low=0.01, high=100.0, source="zscl card, section 3")
    image_image_weight: float = hp(0.0, "weight of the distillation between images and images", low=0.0, high=1000.0,
                                   source="official option, off")  # fmt: skip
    feature_mse_weight: float = hp(0.0, "weight of the mean squared distance of image features", low=0.0, high=1e6,
                                   source="official option, off")  # fmt: skip
    consolidation: float = hp(
        1.0, "lambda: pull to the weights at the start of the task (WC)", low=0.0, high=1e6,
        source="official ZSCL.sh: 1; CIL: 0",
    )  # fmt: skip
    averaging: str = hp(
        "ensemble", "ensemble: the mean of the weights along a task (WE); pull: the live weights go a little back to "
        "the start (official moving_avg)", choices=("ensemble", "pull", "none"), source="zscl card, section 2",
    )  # fmt: skip
    average_every: int = hp(100, "steps from one member of the mean to the next, the first step included", low=1,
                            unit="steps", source="zscl card, section 3; CIL: 10")  # fmt: skip
    pull: float = hp(0.999, "averaging=pull: share of the live weights", low=0.0, high=1.0, source="zscl card, 3")
    reference_images: tuple[str, ...] = hp(
        ("tiny-imagenet-subset",), "data sets or folders of unlabelled images, none of them part of the scenario",
        source="ours; paper: ImageNet-1k",
    )  # fmt: skip
    reference_texts: tuple[str, ...] = hp(
        ("imagenet-names",), "sources of sentences: imagenet-names, data sets (their prompts), or text files",
        source="official option; paper: captions of Conceptual Captions",
    )  # fmt: skip
    reference_rows: str = hp("all", "which of their rows", choices=("all", "train", "test"), source="ours")
    reference_limit: int = hp(100_000, "at most so many reference images", low=1, unit="images",
                              source="zscl card, section 4: more are never touched")  # fmt: skip
    reference_batch: int = hp(0, "reference images per step; 0 for as many as the batch", low=0, unit="images",
                              source="zscl card, section 3: 64")  # fmt: skip
    negatives: int = hp(0, "random reference texts added to each step's softmax as wrong answers", low=0, unit="texts",
                        source="official CIL option ce_method=ext: 100")  # fmt: skip
    teacher: str = hp(
        "cached", "features of the frozen CLIP for the reference set: computed once, or at every step; the same losses",
        choices=("cached", "live"), source="ours: cached; official: live",
    )  # fmt: skip


# -- weight space ----------------------------------------------------------------------------------------------------
def consolidation_loss(weights: Sequence[Tensor], anchor: Sequence[Tensor]) -> Tensor:
    """`sum |theta - theta_start|^2` over all parameters: a sum, not a mean, and without a half. Source: card, 2.5."""
    return torch.stack([(now - before).square().sum() for now, before in zip(weights, anchor, strict=True)]).sum()


@torch.no_grad()
def merge(mean: Sequence[Tensor], weights: Sequence[Tensor], members: int) -> None:
    """`mean <- (n mean + theta) / (n + 1)` in place, with n = `members` that the mean has. Source: card, section 2."""
    torch._foreach_lerp_(list(mean), list(weights), 1 / (members + 1))


# -- the method ------------------------------------------------------------------------------------------------------
class ZSCL(ClipMethod):
    """See the module. A checkpoint holds live, mean and start weights; the frozen teacher is built again."""

    Config = ZSCLConfig
    settings = frozenset({"class", "task"})
    quick: ClassVar[Mapping[str, Any]] = {
        **ClipMethod.quick, "average_every": 2, "reference_images": ("digits",), "reference_texts": ("digits",),
        "reference_limit": 40,
    }  # fmt: skip
    config: ZSCLConfig

    @classmethod
    def reference(cls, config: ZSCLConfig) -> ReferenceSpec | None:
        if not (distils(config) or config.negatives):
            return None
        rows = cast(Literal["all", "train", "test"], config.reference_rows)
        return ReferenceSpec(config.reference_images, config.reference_texts, rows, config.reference_limit)

    def __init__(self, config: ZSCLConfig, backbone: nn.Module, setting: Setting) -> None:
        super().__init__(config, backbone, setting)
        self._teacher = Teacher(self.backbone)
        self._cycle = Cycle(setting, "reference")
        self._images: FeatureBank | None = None  # the teacher's, of the reference images
        self._texts = torch.zeros((0, int(self.backbone.num_features)), device=setting.device)  # and texts
        self._tokens = torch.zeros((0, 1), dtype=torch.int64, device=setting.device)
        self._ready = False
        self.start: list[Tensor] = []  # weights as the task began
        self.mean: list[Tensor] = []  # of them and those along the task
        self.members = 0  # of the mean

    # -- the teacher ---------------------------------------------------------------------------------------------
    def prepare(self, report: Callable[[int, int], None] | None = None) -> None:
        """Encode the reference set by the initial CLIP, or find it on disk."""
        self._ready = True
        if self.reference(self.config) is None:
            return
        found, device = self._reference_set(), self.setting.device
        if self.config.teacher == "live" or self.config.negatives:
            self._tokens = self.backbone.tokenize(list(found.texts)).to(device)
        if self.config.teacher == "live":
            return
        self._texts = frozen_text_features(self._teacher.network, list(found.texts), device)
        parts = {"reference": found.fingerprint}
        self._images = FeatureBank(
            self._teacher.network, found.read, torch.arange(found.num_images), parts, device=device
        )
        self._images.extract(report)

    def _reference_set(self) -> Reference:
        if self.setting.reference is None:
            raise InputError("zscl needs a reference set: run it by `clbench run`, or give Setting.reference")
        return self.setting.reference

    def _teach(self, numbers: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's features of reference images (R, D) and of all reference texts (N, D)."""
        if self._images is None:
            return self._teacher.images(images), self._teacher.texts(self._tokens)
        return unit(self._images(numbers)), self._texts

    # -- training ------------------------------------------------------------------------------------------------
    def begin_phase(self, task: Task, phase: Phase, at: Cursor) -> None:
        super().begin_phase(task, phase, at)
        self.start = [weight.detach().clone() for weight in self._weights]
        self.mean = [weight.clone() for weight in self.start] if self.config.averaging == "ensemble" else []
        self.members = 1

    def open_phase(self, task: Task, phase: Phase, at: Cursor) -> None:
        super().open_phase(task, phase, at)
        if not self._ready:
            self.prepare()

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        extra = self._negatives(batch.at)
        if not distils(self.config):
            return {"ce": self.classify_loss(self.backbone(batch.images), batch, extra)}
        found = self._reference_set()
        size = self.config.reference_batch or self.setting.batch_size
        numbers = self._cycle.batch(found.num_images, size, batch.at)
        reference = found.read(numbers)
        features = self.backbone(torch.cat([batch.images, reference]))
        own, student = features.split([len(batch.images), len(reference)])
        teacher, texts = self._teach(numbers, reference)
        return {"ce": self.classify_loss(own, batch, extra), **self._distill(student, teacher, texts)}

    def _distill(self, student: Tensor, teacher: Tensor, texts: Tensor) -> dict[str, Tensor]:
        """Weighted terms of the feature space; student and teacher (R, D) of the same images, texts (N, D)."""
        config, scale = self.config, self.backbone.scale
        with torch.autocast(self.setting.device.type, enabled=False):
            student = student.float()
            image, text = distillation_losses(student, teacher, texts, scale, config.temperature)
            terms = {"image": config.image_weight * image, "text": config.text_weight * text}
            if config.image_image_weight:
                between = image_image_loss(student, teacher, scale, config.temperature)
                terms["image_image"] = config.image_image_weight * between
            if config.feature_mse_weight:
                terms["feature_mse"] = config.feature_mse_weight * F.mse_loss(unit(student), teacher)
        return terms

    def _negatives(self, at: Cursor) -> Tensor | None:
        """(E, D) features of random reference texts, by the student, or None."""
        if not self.config.negatives:
            return None
        rng = self.setting.rng("negatives", at.step)
        chosen = torch.randint(len(self._tokens), (self.config.negatives,), generator=rng, device=self.setting.device)
        return self.backbone.encode_text(self._tokens[chosen])

    @torch.no_grad()
    def adjust_gradients(self) -> dict[str, Tensor]:
        """The anchor: its gradient 2 lambda (theta - theta_start), and its term."""
        strength = self.config.consolidation
        if not strength:
            return {}
        trained = [(weight, start) for weight, start in zip(self._weights, self.start, strict=True)]
        moved = torch._foreach_sub([w.detach() for w, _ in trained], [start for _, start in trained])
        for (weight, _), by in zip(trained, moved, strict=True):
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            weight.grad.add_(by, alpha=2 * strength)
        lengths = torch.stack(torch._foreach_norm(moved))
        return {"wc": strength * lengths.square().sum()}

    def after_step(self, at: Cursor) -> None:
        if self.config.averaging == "none" or at.iteration % self.config.average_every:
            return
        if self.config.averaging == "ensemble":
            merge(self.mean, [weight.detach() for weight in self._weights], self.members)
            self.members += 1
        else:
            interpolate(self._weights, self.start, self.config.pull)

    def end_phase(self, task: Task, phase: Phase, at: Cursor) -> None:
        with torch.no_grad():
            for weight, mean in zip(self._weights, self.mean, strict=False):
                weight.copy_(mean)
        self.start, self.mean, self.members = [], [], 0
        super().end_phase(task, phase, at)

    # -- answers -------------------------------------------------------------------------------------------------
    @contextmanager
    def deployed(self) -> Iterator[None]:
        """Answer with the mean: between tasks the live weights are the last mean."""
        live = [weight.data for weight in self._weights]
        for weight, mean in zip(self._weights, self.mean, strict=False):
            weight.data = mean
        self._version += 1
        try:
            yield
        finally:
            for weight, data in zip(self._weights, live, strict=True):
                weight.data = data
            self._version += 1

    def memory_bytes(self) -> dict[str, int]:
        found = self.setting.reference
        kept = {"teacher": self._teacher.num_bytes, "weights_at_start": bytes_of(self._weights)}
        if self.config.averaging == "ensemble":
            kept["mean_of_weights"] = bytes_of(self._weights)
        if found is not None:
            kept["reference_images"] = found.num_images * self.setting.image_bytes
            kept["reference_texts"] = sum(len(text.encode()) for text in found.texts)
        return kept


def distils(config: ZSCLConfig) -> bool:
    """Whether any term needs reference images."""
    weights = (config.image_weight, config.text_weight, config.image_image_weight, config.feature_mse_weight)
    return any(weights)


METHOD = ZSCL
