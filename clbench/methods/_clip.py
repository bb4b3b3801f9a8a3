"""What methods on a dual encoder (CLIP) share: the classifier of prompts, the task's loss, the training recipe of MTIL.

Every method of the MTIL table trains alike (mtil card, section 2; official code of ZSCL at b96e714): cross entropy over
the classes of the current data set, with its first prompt, both towers, AdamW without weight decay, warm-up and cosine;
the temperature `logit_scale` stays as it is. Answers come from all prompts of a data set, averaged per class.

In a class-incremental scenario the classes of a task take the place of a data set, and one prompt serves for all
(zscl card, CIL variant).

Shapes: B batch, D features, c classes of a task, C classes of the scenario.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.backbones.clip_model import ClipBackbone, as_clip
from clbench.backbones.clip_text import TextClassifier, class_texts, unit
from clbench.errors import InputError
from clbench.methods._distillation import similarity
from clbench.methods.base import Head, Method, Setting, freeze, hp
from clbench.scenarios.model import Task
from clbench.scenarios.prompts import PLAIN
from clbench.stream.types import Batch, Cursor, Phase

__all__ = ["ClipConfig", "ClipMethod", "Cycle", "Teacher", "interpolate", "task_loss", "warmup_cosine"]


@dataclass(frozen=True)
class ClipConfig:
    """The common training recipe. Defaults are those of MTIL (mtil card, sections 2 and 3)."""

    lr: float = hp(
        1e-5, "learning rate", low=0.0, high=1.0, scale="log", source="mtil card, section 3",
        tune={"low": 1e-6, "high": 1e-3},
    )  # fmt: skip
    fast_lr: float = hp(
        5e-5, "learning rate of the data sets in fast_tasks", low=0.0, high=1.0, scale="log",
        source="mtil card, section 3",
    )  # fmt: skip
    fast_tasks: tuple[str, ...] = hp(
        ("aircraft", "mnist"), "data sets that are trained at fast_lr", source="mtil card, section 3"
    )
    iterations: int = hp(
        1000, "N: each task has N + 1 steps, the last at rate 0; 0 takes N from the scenario's epochs", low=0,
        unit="steps", source="mtil card, section 2; zscl card, 6.3",
    )  # fmt: skip
    warmup: int = hp(100, "steps over which the rate rises", low=0, unit="steps", source="mtil card, section 2")
    weight_decay: float = hp(0.0, "AdamW's weight decay", low=0.0, high=1.0, scale="log", source="mtil card, section 2")
    label_smoothing: float = hp(
        0.2, "share of the target that is spread over all candidates", low=0.0, high=0.999,
        source="mtil card, section 2",
    )  # fmt: skip
    prompt: str = hp("", "one prompt for training and answers, {} for the class; empty takes the data set's own",
                     source="zscl card, section 4: CIL has one")  # fmt: skip
    candidates: str = hp(
        "task", "classes that the training softmax runs over: the current task's, or all seen (official "
        "ce_method=previous)", choices=("task", "seen"), source="zscl card, section 2",
    )  # fmt: skip


# -- losses and schedules --------------------------------------------------------------------------------------------
def task_loss(images: Tensor, texts: Tensor, labels: Tensor, scale: float, smoothing: float) -> Tensor:
    """Cross entropy of `scale * cos(image, class text)` with label smoothing.

    images: (B, D) and texts: (c, D) features of any length; labels: (B,) int64 in 0..c-1. Scalar.
    Source: zscl card, 2.1.
    """
    return F.cross_entropy(similarity(images, texts, scale), labels, label_smoothing=smoothing)


def warmup_cosine(lr: float, step: int, warmup: int, total: int) -> float:
    """Rate of a step from 0: a line to `lr` over `warmup` steps, then a cosine to 0 at step `total`.

    >>> [warmup_cosine(1.0, step, 2, 6) for step in (0, 1, 2, 4, 6)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1))) / 2


@torch.no_grad()
def interpolate(weights: Sequence[Tensor], others: Sequence[Tensor], alpha: float) -> None:
    """`weights = alpha weights + (1 - alpha) others`, in place."""
    torch._foreach_lerp_(list(weights), list(others), 1 - alpha)


# -- parts -----------------------------------------------------------------------------------------------------------
class Teacher:
    """A copy of the network that only answers: no gradients, and none of the method's own modules, so that it is
    neither evaluated nor counted nor shipped. Part of a checkpoint where its attribute's name has no underscore."""

    def __init__(self, network: ClipBackbone) -> None:
        self.network = copy.deepcopy(network)
        freeze(self.network)

    def follow(self, network: ClipBackbone) -> None:
        """Take over the weights of `network` as they are now."""
        self.network.load_state_dict(network.state_dict())

    @torch.no_grad()
    def images(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D) of length 1."""
        return unit(self.network(images).float())

    @torch.no_grad()
    def texts(self, tokens: Tensor) -> Tensor:
        """(N, L) int64 -> (N, D) of length 1."""
        return unit(self.network.encode_text(tokens).float())

    @property
    def num_bytes(self) -> int:
        return sum(p.nbytes for p in self.network.parameters())

    def state_dict(self) -> dict[str, Any]:
        return self.network.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.network.load_state_dict(state)


class Cycle:
    """Batches out of `number` things, shuffled anew in every pass (a ragged last batch is left out): a function of task
    and iteration, so it needs no state."""

    def __init__(self, setting: Setting, purpose: str) -> None:
        self._setting = setting
        self._purpose = purpose
        self._order: tuple[tuple[int, int, int], Tensor] | None = None

    def batch(self, number: int, size: int, at: Cursor) -> Tensor:
        """(size,) int64 on the device, different ones in 0..number-1; all of them where there are fewer than `size`."""
        epoch, inside = divmod(at.iteration, max(number // size, 1))
        key = (number, at.task, epoch)
        if self._order is None or self._order[0] != key:
            rng = self._setting.rng(self._purpose, at.task, epoch)
            self._order = (key, torch.randperm(number, generator=rng, device=self._setting.device))
        return self._order[1][inside * size : (inside + 1) * size]


# -- the base of the methods -----------------------------------------------------------------------------------------
class ClipMethod(Method):
    """Fine-tuning of both towers, task by task. Methods below it change `losses` (named terms, summed), and what
    happens around a step or a task."""

    Config: ClassVar[type] = ClipConfig
    settings = frozenset({"class", "task"})
    small_backbone = "clip-small"
    quick: ClassVar[Mapping[str, Any]] = {"iterations": 2, "warmup": 1}
    memory_advice = (
        "--batch-size, or the images of one pass, which changes no result: --backbone-set micro_batch=16 "
        "micro_texts=64 grad_checkpointing=true; or --precision bf16"
    )
    config: Any
    backbone: ClipBackbone

    def __init__(self, config: Any, backbone: nn.Module, setting: Setting) -> None:
        name = type(self).__module__.rpartition(".")[2]
        super().__init__(config, as_clip(backbone, name), setting)
        if setting.online:
            raise InputError(
                f"{name} draws batches of a task again and again, but scenario {setting.scenario_id} is online: choose "
                f"one with epochs"
            )
        self._name = name
        one_prompt = config.prompt or ("" if setting.prompts else PLAIN[0])
        self._texts_of = class_texts(setting, one_prompt)
        self._prompts = TextClassifier(self.backbone, self._texts_of, setting.device)
        self._weights = self.backbone.trainable()
        self._rate = 0.0  # of the current task
        self._total = 0  # its steps, less one
        self._version = 0  # of the weights, to know when `_classifiers` are stale
        self._classifiers: dict[int | None, tuple[int, Tensor]] = {}
        self.optimizer: torch.optim.Optimizer | None = None

    # -- training ----------------------------------------------------------------------------------------------------
    def phases(self, task: Task, index: int) -> Sequence[Phase]:
        return [Phase("train", iterations=self.num_iterations(task) + 1, updates=1)]

    def num_iterations(self, task: Task) -> int:
        """N of a task; its steps are N + 1."""
        if self.config.iterations:
            return int(self.config.iterations)
        return math.ceil(len(task.rows) / self.setting.batch_size) * self.setting.epochs

    def begin_phase(self, task: Task, phase: Phase, at: Cursor) -> None:
        if not bool(torch.isin(task.targets, task.classes).all()):
            raise InputError(
                f"{self._name} asks for each image among the classes that its task introduces, but task {at.task} of "
                f"{self.setting.scenario_id} has images of other classes: choose a scenario whose tasks are apart"
            )

    def open_phase(self, task: Task, phase: Phase, at: Cursor) -> None:
        self.backbone.train()
        self._rate = self.config.fast_lr if task.name in self.config.fast_tasks else self.config.lr
        self._total = self.num_iterations(task)
        self.optimizer = torch.optim.AdamW(self._weights, lr=0.0, weight_decay=self.config.weight_decay, fused=True)

    def step(self, batch: Batch) -> Mapping[str, Tensor]:
        assert self.optimizer is not None
        terms = self.losses(batch)
        loss = torch.stack(list(terms.values())).sum()
        self.optimizer.zero_grad()
        loss.backward()
        terms = {**terms, **self.adjust_gradients()}
        for group in self.optimizer.param_groups:
            group["lr"] = warmup_cosine(self._rate, batch.at.iteration, self.config.warmup, self._total)
        self.optimizer.step()
        self._version += 1
        self.after_step(batch.at)
        parts = {name: term.detach() for name, term in terms.items()}
        return {"loss": torch.stack(list(parts.values())).sum(), **(parts if len(parts) > 1 else {})}

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The terms of the loss, weights included: scalars."""
        return {"ce": self.classify_loss(self.backbone(batch.images), batch)}

    def adjust_gradients(self) -> dict[str, Tensor]:
        """Between backward and step: add gradients that need no graph. Returns the terms they belong to."""
        return {}

    def after_step(self, at: Cursor) -> None:
        """Behind the step at a cursor."""

    def classify_loss(self, features: Tensor, batch: Batch, extra: Tensor | None = None) -> Tensor:
        """Cross entropy of image features (B, D) over the candidate classes, with further wrong texts (E, D)."""
        task = batch.at.task
        known = range(task + 1) if self.config.candidates == "seen" else [task]
        texts = [self._prompts.train_features(index) for index in known]
        before = sum(len(each) for each in texts[:-1])
        labels = self._prompts.columns(task)[batch.targets] + before
        with torch.autocast(self.setting.device.type, enabled=False):  # the scale makes logits large
            candidates = torch.cat(texts + ([] if extra is None else [extra])).float()
            return task_loss(features.float(), candidates, labels, self.backbone.scale, self.config.label_smoothing)

    def end_phase(self, task: Task, phase: Phase, at: Cursor) -> None:
        self.optimizer = None
        for weight in self._weights:
            weight.grad = None
        self._version += 1

    def train_tokens(self, task: int) -> Tensor:
        """(c, L) int64: the training prompts of a task's classes."""
        return self.backbone.tokenize(self._texts_of.tasks[task].prompts[0]).to(self.setting.device)

    # -- answers -----------------------------------------------------------------------------------------------------
    def classify(self, features: Tensor, allowed: Tensor, task: int | None) -> Tensor:
        """`scale * cos(image, class)`, in the columns of the task's classes (of all classes where `task` is None)."""
        with torch.autocast(self.setting.device.type, enabled=False):
            return self.backbone.scale * unit(features.float()) @ self.classifier(task).mT

    def classifier(self, task: int | None) -> Tensor:
        """(C, D) class texts, of all prompts, by the weights as they are now; kept until they change."""
        version, weights = self._classifiers.get(task, (-1, None))
        if weights is None or version != self._version:
            weights = padded(self._prompts.weights(task), self.setting.num_classes)
            self._classifiers[task] = (self._version, weights)
        return weights

    def head(self, task: int | None) -> Head:
        return Head("cosine", self.classifier(task), None, self.backbone.scale)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._version += 1


def padded(weights: Tensor, rows: int) -> Tensor:
    """(rows, D): zeros for classes of the scenario that no task introduces (`first_tasks`)."""
    return F.pad(weights, (0, 0, 0, rows - len(weights)))


def bytes_of(tensors: Sequence[Tensor]) -> int:
    """Their size in memory."""
    return sum(tensor.nbytes for tensor in tensors)
