"""GDumb: collect a balanced memory greedily, and train a network from its start on that memory alone.

Idea: a baseline that questions the others. It learns nothing from the stream; at the end of a task (or of the stream)
whatever a class-balanced sampler has kept is all there is to learn from.

Paper: Prabhu, Torr, Dokania, ECCV 2020. Card `online_baselines`, section 2.8. Two learners:

    official    (drimpossible/GDumb) SGD with momentum 0.9, weight decay 1e-6, batches of 16, 256 passes, rate 0.05 to
                0.0005 by cosine with warm restarts of 1, 2, 4, ... passes, the first pass at a tenth; gradient norm cut
                at 10; CutMix with probability 0.5
    raptormai   (RaptorMai/online-continual-learning) plain SGD, rate 0.1, whole batches of 10, 30 passes; cut at 10

Each value is a hyperparameter of its own; `none` stands for the learner's.

Same as the official code: sampler (`clbench.memory.class_balanced`), schedule, last batch of a pass kept (official) or
dropped (raptormai). Different: "from its start" puts back the weights that the run began with, pretrained or drawn,
where the codes draw new ones; full precision, not fp16; accuracy at the end of the last pass, not the best pass on the
test set. The official code trains once behind the stream (`fit=last`); RaptorMai behind every task (`fit=every`).
Mammoth's GDumb keeps a reservoir instead and is not this method.

The loop behind a task has room for a full memory; with fewer exemplars its last iterations do nothing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.memory.class_balanced import ClassBalancedBuffer
from clbench.methods._cutmix import cutmix
from clbench.methods._softmax import width_of
from clbench.methods.base import Head, Method, Setting, hp
from clbench.scenarios.model import Task
from clbench.stream.types import Batch, Cursor, Phase

__all__ = ["METHOD", "GDumb", "GDumbConfig", "warm_restart_rate"]


class Recipe(NamedTuple):
    """How a learner trains on the memory. min_lr None: the rate stays."""

    lr: float
    min_lr: float | None
    momentum: float
    weight_decay: float
    batch: int
    passes: int
    clip: float
    cutmix: float
    drop_last: bool


LEARNERS = {
    "official": Recipe(0.05, 0.0005, 0.9, 1e-6, 16, 256, 10.0, 0.5, drop_last=False),
    "raptormai": Recipe(0.1, None, 0.0, 0.0, 10, 30, 10.0, 0.0, drop_last=True),
}


@dataclass(frozen=True)
class GDumbConfig:
    capacity: int = hp(1000, "exemplars in memory", low=1, high=10_000_000, unit="exemplars")
    learner: str = hp(
        "official", "whose way of training on the memory", choices=("official", "raptormai"), source="card 2.8"
    )
    fit: str = hp(
        "every", "train on the memory behind every task, or behind the last one only", choices=("every", "last"),
        source="card 2.8",
    )  # fmt: skip
    lr: float | None = hp(None, "learning rate, the highest of the schedule; none: the learner's", low=0.0, high=10.0)
    momentum: float | None = hp(None, "momentum; none: the learner's", low=0.0, high=0.999)
    weight_decay: float | None = hp(None, "weight decay; none: the learner's", low=0.0, high=1.0)
    memory_batch_size: int | None = hp(None, "exemplars per step; none: the learner's", low=1, high=100_000)
    passes: int | None = hp(None, "passes over the memory; none: the learner's", low=1, high=100_000)
    clip: float | None = hp(None, "largest norm of the gradient; none: the learner's", low=1e-6, high=1e6)
    cutmix: float | None = hp(None, "probability of CutMix; none: the learner's", low=0.0, high=1.0)

    def recipe(self) -> Recipe:
        """The learner with what was given in place of its own values."""
        base = LEARNERS[self.learner]
        given: dict[str, Any] = {
            "lr": self.lr, "momentum": self.momentum, "weight_decay": self.weight_decay,
            "batch": self.memory_batch_size, "passes": self.passes, "clip": self.clip, "cutmix": self.cutmix,
        }  # fmt: skip
        return base._replace(**{name: value for name, value in given.items() if value is not None})


def warm_restart_rate(epoch: int, high: float, low: float) -> float:
    """Learning rate of pass `epoch`: high / 10 in pass 0, then cosines from `high` to `low` over 1, 2, 4, ... passes,
    each starting at `high`."""
    if epoch == 0:
        return high * 0.1
    cycle = epoch.bit_length() - 1  # passes 2^n .. 2^(n+1) - 1 are a cycle of 2^n
    share = (epoch - 2**cycle) / 2**cycle
    return low + (high - low) * (1 + math.cos(math.pi * share)) / 2


class GDumb(Method):
    """See the module."""

    Config = GDumbConfig
    quick: ClassVar[Mapping[str, Any]] = {"capacity": 20, "passes": 2}
    config: GDumbConfig

    def __init__(self, config: GDumbConfig, backbone: nn.Module, setting: Setting) -> None:
        super().__init__(config, backbone, setting)
        self.classifier = nn.Linear(width_of(backbone), setting.num_classes)
        self.buffer = ClassBalancedBuffer(config.capacity, setting.num_classes, setting.device)
        self.optimizer: torch.optim.SGD | None = None
        self.num_held = 0  # exemplars in memory as its training began
        self.fits = 0  # trainings begun
        self.fitting = False
        self._recipe = config.recipe()
        self._start = [value.detach().clone() for value in self._weights()]
        self._order: tuple[tuple[int, int], Tensor] | None = None  # (task, pass), permutation of the memory

    def phases(self, task: Task, index: int) -> Sequence[Phase]:
        phases = [Phase("collect", epochs=1, updates=1, view="raw")]
        if self.config.fit == "every" or index == len(self.setting.task_classes) - 1:
            iterations = self._recipe.passes * self._batches(self.config.capacity)
            phases.append(Phase("memory", source="none", iterations=iterations))
        return phases

    @torch.no_grad()
    def begin_phase(self, task: Task, phase: Phase, at: Cursor) -> None:
        if phase.name == "memory":
            for value, start in zip(self._weights(), self._start, strict=True):
                value.copy_(start)
            self.num_held = len(self.buffer)
            self.fits += 1
            self.fitting = True

    def open_phase(self, task: Task, phase: Phase, at: Cursor) -> None:
        if phase.name == "memory":
            recipe = self._recipe
            self.optimizer = torch.optim.SGD(
                self._parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
            )
            self._order = None

    def step(self, batch: Batch) -> Mapping[str, Tensor]:
        if batch.phase.name == "memory":
            return self._learn(batch)
        rng = self.setting.rng("sampler", batch.at.step)
        self.buffer.add(batch.rows, batch.targets, rng, batch.domain)
        return {}

    def end_phase(self, task: Task, phase: Phase, at: Cursor) -> None:
        if phase.name == "memory":
            self.optimizer = None
            self.fitting = False

    def _learn(self, batch: Batch) -> Mapping[str, Tensor]:
        """One step on the memory; none once its passes are over."""
        recipe, at, rng = self._recipe, batch.at, self.setting.rng
        epoch, index = divmod(at.iteration, max(self._batches(self.num_held), 1))
        if self.num_held == 0 or epoch >= recipe.passes:
            return {}
        slots = self._permutation(at.task, epoch)[index * recipe.batch : (index + 1) * recipe.batch]
        held = self.buffer.take(slots)
        images = self.setting.read(held.rows, held.domain, batch.phase.view, rng("memory-view", at.step))
        mixed = cutmix(images, torch.zeros_like(slots), recipe.cutmix, rng("cutmix", at.step))
        assert self.optimizer is not None
        rate = recipe.lr if recipe.min_lr is None else warm_restart_rate(epoch, recipe.lr, recipe.min_lr)
        self.optimizer.param_groups[0]["lr"] = rate
        logits = self.classifier(self.backbone(mixed.images))
        own, other = F.cross_entropy(logits, held.targets), F.cross_entropy(logits, held.targets[mixed.partner])
        loss = mixed.share * own + (1 - mixed.share) * other
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters(), recipe.clip)
        self.optimizer.step()
        return {"loss": loss.detach()}

    def _batches(self, exemplars: int) -> int:
        """Batches of one pass over so many exemplars; fewer than one batch still give one."""
        size = self._recipe.batch
        whole = exemplars // size if self._recipe.drop_last else -(-exemplars // size)
        return max(whole, min(exemplars, 1))

    def _permutation(self, task: int, epoch: int) -> Tensor:
        """(num_held,) slots in the order of this pass."""
        if self._order is None or self._order[0] != (task, epoch):
            rng = self.setting.rng("memory-order", task, epoch)
            order = torch.randperm(self.num_held, generator=rng, device=self.setting.device)
            self._order = (task, epoch), order
        return self._order[1]

    def _parameters(self) -> list[nn.Parameter]:
        return [p for p in [*self.backbone.parameters(), *self.classifier.parameters()] if p.requires_grad]

    def _weights(self) -> list[Tensor]:
        """All that training changes: parameters, and buffers such as batch norm's."""
        return [*self.backbone.state_dict().values(), *self.classifier.state_dict().values()]

    def classify(self, features: Tensor, allowed: Tensor, task: int | None) -> Tensor:
        out: Tensor = self.classifier(features)
        return out

    def head(self, task: int | None) -> Head:
        return Head("linear", self.classifier.weight, self.classifier.bias)

    @property
    def features_version(self) -> int | None:
        """The network rests while the stream goes by."""
        return None if self.fitting else self.fits

    def memory_bytes(self) -> dict[str, int]:
        return {"buffer": self.buffer.num_bytes(self.setting.image_bytes)}


METHOD = GDumb
