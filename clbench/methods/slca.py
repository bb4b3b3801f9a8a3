"""SLCA: a slow learner for the representation, then alignment of the classifier on remembered Gaussians.

Idea: fine-tune a pretrained backbone with a learning rate 100 times below the head's, so that it drifts little; keep a
mean and covariance of features per class; after each task, train all heads together on samples of those Gaussians.
No exemplars and no task id at test; boundaries must be known while training.

Paper: Zhang, Wang, Kang, Chen, Wei: SLCA, ICCV 2023 (arXiv 2303.05118). Official code: GengDavid/SLCA at 169d4e6.
Each task is three phases, named as in the code below:

1. `train`: cross entropy over the new classes alone; SGD with rate `lr` for the new head, `lr * backbone_scale` below.
2. `statistics`: one pass of un-augmented features; mean and covariance of each new class. Never refreshed.
3. `align`, from the second task on: all heads on fresh Gaussian samples, with normalised logits.

Alignment is for answering only: the next task starts from the heads as they were before it ("recall").

Same as the official code: everything above, the mean shrink (in the code, not in the paper's text), the norm as the
mean of per-task norms. Different, with the same result up to rounding and random draws: each covariance is factored
once, in float64; few-shot covariances are kept as a low-rank factor of the same Gaussian; heads are rows of one matrix.
The task index of the mean shrink counts tasks; the official one goes wrong if tasks differ in size (a switch).
The official backbones replace the pretrained final norm by a fresh one: backbone option `final_norm = "fresh"`.
A class with one training row has no covariance: it gets `ridge * I`. SLCA++ is not part of this file.

Shapes: B batch, D features, C classes of the scenario, K classes seen, T tasks seen, S samples per class and batch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.errors import InputError, RunFailed
from clbench.methods.base import Head, Method, Setting, freeze, hp
from clbench.scenarios.model import Task
from clbench.stream.types import Batch, Cursor, Phase

__all__ = [
    "METHOD",
    "SLCA",
    "SLCAConfig",
    "alignment_loss",
    "class_statistics",
    "cosine_rate",
    "covariance_factor",
    "mean_norm",
    "mean_shrink",
    "sample_features",
    "slow_learner_loss",
    "step_rate",
]

NORM_EPS = 1e-7  # added to each task's norm of the logits, as in the official code
STATISTICS_BATCH = 256  # rows per forward pass without gradients; has no influence on the result


@dataclass(frozen=True)
class SLCAConfig:
    """Defaults are the paper's for Split CIFAR-100 with the IN21K-supervised ViT-B/16 (card, section 3)."""

    lr: float = hp(
        0.01, "learning rate of the new head in stage 1", low=0.0, high=10.0, scale="log",
        source="official configs", tune={"low": 0.001, "high": 0.1},
    )  # fmt: skip
    backbone_scale: float = hp(
        0.01, "backbone learning rate over head learning rate; 0 freezes the backbone (official `fix_bcb`)",
        low=0.0, high=1.0, scale="log", source="official: 1/100", tune={"low": 0.001, "high": 0.1},
    )  # fmt: skip
    momentum: float = hp(0.9, "SGD momentum of both stages", low=0.0, high=0.999, source="official code")
    weight_decay: float = hp(
        5e-4, "weight decay of both stages, on every trained parameter", low=0.0, high=1.0, scale="log",
        source="official code", tune={"choices": [0.0, 5e-4]},
    )  # fmt: skip
    milestone: int = hp(18, "epoch from which stage-1 rates are lower; 0 for never", low=0, unit="epochs",
                        source="official: 18 of 20, 40 of 50, 80 of 90")  # fmt: skip
    gamma: float = hp(0.1, "factor on stage-1 rates from the milestone on", low=0.0, high=1.0, source="official code")
    batch_norm: str = hp(
        "eval", "batch-norm statistics in stage 1: eval keeps the pretrained ones, train follows the batches",
        choices=("eval", "train"), source="ours; the paper's backbones have none",
    )  # fmt: skip
    align: bool = hp(True, "run the classifier alignment; False is the slow learner alone", source="paper's ablation")
    ca_epochs: int = hp(5, "alignment epochs per task", low=1, unit="epochs", source="official configs")
    ca_lr: float = hp(
        0.01, "learning rate of the alignment, cosine to 0 over its epochs", low=0.0, high=10.0, scale="log",
        source="official code", tune={"low": 0.001, "high": 0.1},
    )  # fmt: skip
    ca_samples: int = hp(256, "samples per class and epoch, and rows per alignment step", low=1, source="official code")
    temperature: float = hp(
        0.1, "logit normalisation of the alignment loss; 0 for plain cross entropy", low=0.0, high=10.0, scale="log",
        source="official configs; 0.05 for Cars-196", tune={"low": 0.02, "high": 0.5},
    )  # fmt: skip
    shrink_means: bool = hp(True, "draw older classes around means scaled by 0.9 to 1", source="official code")
    official_task_index: bool = hp(
        False, "compute that scale from `class // size of the newest task`, wrong for uneven tasks",
        source="official code; for parity on Cars-196",
    )  # fmt: skip
    ridge: float = hp(1e-4, "added to the diagonal of each covariance", low=1e-12, scale="log", source="official code")
    sampler: str = hp(
        "lowrank", "form of the kept covariances, of the same Gaussian; lowrank: smaller, for tasks whose classes all "
        "have fewer rows than features, else cholesky", choices=("lowrank", "cholesky"), source="official: cholesky",
    )  # fmt: skip


# -- losses and schedules --------------------------------------------------------------------------------------------
def slow_learner_loss(logits: Tensor, targets: Tensor, known: int = 0) -> Tensor:
    """Stage-1 loss `CE(h[:, known:], y - known)`: columns of older classes get a gradient of exactly 0.

    logits: (B, K); targets: (B,) int64 columns in `known..K-1`. Returns a scalar. Source: card, 2.1.
    """
    return F.cross_entropy(logits[:, known:], targets - known)


def mean_norm(logits: Tensor, sizes: Sequence[int]) -> Tensor:
    """`n(h) = 1/T sum_t (|h_t|_2 + 1e-7)`, h_t the logits of task t's classes: (B, K) -> (B,).

    sizes: number of classes of each task, in column order. The mean of norms is not the norm of all logits.
    """
    norms = [torch.linalg.vector_norm(part, dim=1) for part in torch.split(logits, list(sizes), dim=1)]
    return (torch.stack(norms, dim=1) + NORM_EPS).mean(dim=1)


def alignment_loss(logits: Tensor, targets: Tensor, sizes: Sequence[int], temperature: float) -> Tensor:
    """Stage-2 loss `CE(h / (n(h) * temperature), y)` with `n` of `mean_norm`; the gradient flows through the norm.

    Scaling all logits by k > 0 changes nothing. temperature 0: plain `CE(h, y)`.
    logits: (B, K); targets: (B,) int64 columns. Returns a scalar. Source: card, 2.3.
    """
    if temperature:
        logits = logits / (mean_norm(logits, sizes)[:, None] * temperature)
    return F.cross_entropy(logits, targets)


def step_rate(lr: float, epoch: int, milestone: int, gamma: float) -> float:
    """Stage-1 rate in `epoch` (from 0): `lr`, and `lr * gamma` from `milestone` on (0: never)."""
    return lr * gamma if milestone and epoch >= milestone else lr


def cosine_rate(lr: float, epoch: int, epochs: int) -> float:
    """Alignment rate in `epoch` (from 0): `lr (1 + cos(pi epoch / epochs)) / 2`.

    >>> cosine_rate(0.01, 1, 2)
    0.005
    """
    return lr * (1 + math.cos(math.pi * epoch / epochs)) / 2


# -- Gaussians -------------------------------------------------------------------------------------------------------
def class_statistics(features: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance `X^T X / (n - 1) + ridge I` (D, D) of one class's features (n, D), in float64.

    One row alone has covariance `ridge I`. Source: card, 2.2.
    """
    mean, centred = _centred(features)
    eye = torch.eye(centred.shape[1], dtype=torch.float64, device=features.device)
    return mean, centred.mT @ centred + ridge * eye


def covariance_factor(features: Tensor, ridge: float, *, low_rank: bool) -> tuple[Tensor, Tensor]:
    """Mean (D,) and factor F (r, D) of one class's features (n, D), both float64.

    Full: r = D and `F^T F` is the covariance of `class_statistics` (F: its Cholesky factor, transposed).
    Low rank: r = min(n, D) and `F^T F + ridge I` is that covariance (F: triangular factor of the centred features; it
    follows from the covariance up to signs of rows, so it holds no more about single images than that does).
    """
    if low_rank:
        mean, centred = _centred(features)
        return mean, torch.linalg.qr(centred, mode="r").R
    mean, covariance = class_statistics(features, ridge)
    return mean, torch.linalg.cholesky(covariance).mT


def _centred(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and `(X - mean) / sqrt(n - 1)` (n, D) in float64."""
    features = features.double()
    mean = features.mean(dim=0)
    return mean, (features - mean) / math.sqrt(max(len(features) - 1, 1))


def mean_shrink(tasks: Tensor, num_tasks: int) -> Tensor:
    """Scale of each class's mean, `0.9 + 0.1 (t_c + 1) / T`, in float64. tasks: (K,) int64 task t_c of each class.

    >>> mean_shrink(torch.tensor([0, 3]), num_tasks=4)
    tensor([0.9250, 1.0000], dtype=torch.float64)
    """
    return 0.9 + 0.1 * (tasks.double() + 1) / num_tasks


def sample_features(means: Tensor, factors: Tensor, noise: Tensor, ridge: float) -> Tensor:
    """`f = mean + z F`, plus `sqrt(ridge) e` for low-rank factors: S samples of k Gaussians, (k, S, D).

    means: (k, D); factors: (k, r, D) as `covariance_factor` gives; noise: (k, S, r) standard normal numbers z, or
    (k, S, r + D) for z and e.
    """
    rank = factors.shape[1]
    samples = torch.baddbmm(means[:, None], noise[..., :rank], factors)
    return samples if noise.shape[-1] == rank else samples.add_(noise[..., rank:], alpha=math.sqrt(ridge))


# -- the method ------------------------------------------------------------------------------------------------------
class SLCA(Method):
    """See the module. Heads are rows of one (C, D) matrix in order of arrival ("columns" of the logits), so that a
    task's head is a slice of it: the optimiser of a phase holds that slice and can't touch any other row.

    A checkpoint holds the factors of all classes seen: r x D numbers each, r the rows of the largest class of the task
    or D (a quarter to 2.4 MB per class for ViT-B/16); nothing left in a run could rebuild them.
    """

    Config = SLCAConfig
    settings = frozenset({"class", "task"})
    config: SLCAConfig

    def __init__(self, config: SLCAConfig, backbone: nn.Module, setting: Setting) -> None:
        super().__init__(config, backbone, setting)
        device, num_classes = setting.device, setting.num_classes
        tasks = _own_classes(setting)
        arrival = [c for classes in tasks for c in classes]
        arrival += sorted(set(range(num_classes)) - set(arrival))
        self._class_at = torch.tensor(arrival, device=device)  # column -> class id
        self._column = torch.argsort(self._class_at)  # class id -> column
        self._sizes = [len(classes) for classes in tasks]
        self._ends = list(accumulate(self._sizes))  # task -> columns seen behind it
        self._task_of = torch.tensor([t for t, size in enumerate(self._sizes) for _ in range(size)], device=device)

        if config.backbone_scale == 0:
            freeze(backbone)
            self.frozen_backbone = True
            self.view = "features"
        self._trainable = [p for p in backbone.parameters() if p.requires_grad]
        self.backbone_version: int | None = None  # None while it trains
        width = int(backbone.num_features)  # type: ignore[arg-type]  # nn.Module hides the type of attributes
        self.classifier = nn.Linear(width, num_classes, device="meta").to_empty(device=device).requires_grad_(False)
        self.classifier.weight.zero_()
        self.classifier.bias.zero_()
        self.recall_weight = self.classifier.weight.clone()  # the heads before alignment
        self.recall_bias = self.classifier.bias.clone()
        self.means = torch.zeros((num_classes, width), dtype=torch.float64, device=device)
        self.factors: list[Tensor] = []  # one (c, r, D) per task
        self.collected = torch.zeros((0, width), device=device)  # features of the task, during `statistics`
        self.collected_columns = torch.zeros(0, dtype=torch.int64, device=device)
        self.optimizer: torch.optim.SGD | None = None
        self._rows: list[Tensor] = []  # the slices of weight and bias that are being trained
        self._samples = self._order = self.means[:0]  # this alignment epoch's, see `_draw`
        self._drawn: tuple[int, int] | None = None  # task and epoch that they are for

    def phases(self, task: Task, index: int) -> Sequence[Phase]:
        phases = [Phase("train", view="features" if self.frozen_backbone else "train")]
        if self.config.align:
            phases.append(
                Phase("statistics", epochs=1, batch_size=STATISTICS_BATCH, order="listed", view=self.view,
                      updates=1, drop_last=False)
            )  # fmt: skip
            if index > 0:
                iterations = self.config.ca_epochs * self._ends[index]
                phases.append(Phase("align", source="none", iterations=iterations, updates=1))
        return phases

    def begin_phase(self, task: Task, phase: Phase, at: Cursor) -> None:
        if phase.name == "train":
            self._check_rows(task, at)
            self.backbone_version = None
            self._recall()
            weight, bias = self._head_rows(self._first(at), self._ends[at.task])
            nn.init.trunc_normal_(weight, std=0.02, generator=self.setting.rng("slca-head", at.task))
            bias.zero_()
        elif phase.name == "statistics":
            self.collected = self.recall_weight.new_zeros((len(task.rows), self.means.shape[1]))
            self.collected_columns = self._column.new_zeros(len(task.rows))

    def open_phase(self, task: Task, phase: Phase, at: Cursor) -> None:
        train_backbone = phase.name == "train" and not self.frozen_backbone
        self.backbone.train(train_backbone)
        if self.config.batch_norm == "eval":
            for module in self.backbone.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        for parameter in self._trainable:
            parameter.requires_grad_(train_backbone)
        if phase.name == "statistics":
            return
        self._drawn = None
        self._rows = self._head_rows(self._first(at) if phase.name == "train" else 0, self._ends[at.task])
        for rows in self._rows:
            rows.requires_grad_()
        config = self.config
        groups: list[dict[str, Any]] = [{"params": self._rows}]
        if train_backbone:
            groups.append({"params": self._trainable})
        self.optimizer = torch.optim.SGD(groups, lr=0.0, momentum=config.momentum, weight_decay=config.weight_decay)

    def step(self, batch: Batch) -> Mapping[str, Tensor]:
        config = self.config
        if batch.phase.name == "train":
            rate = step_rate(config.lr, batch.epoch, config.milestone, config.gamma)
            return self._update(self._slow_learner(batch), rate)
        with torch.autocast(self.setting.device.type, enabled=False):  # Gaussians in full precision
            if batch.phase.name == "statistics":
                self._collect(batch)
                return {}
            epoch, index = divmod(batch.at.iteration, self._ends[batch.at.task])
            rate = cosine_rate(config.ca_lr, epoch, config.ca_epochs)
            return self._update(self._alignment(batch.at.task, epoch, index), rate)

    def end_phase(self, task: Task, phase: Phase, at: Cursor) -> None:
        self.optimizer = None
        self._rows = []
        if phase.name == "train":
            self.backbone_version = at.task + 1
            self.recall_weight.copy_(self.classifier.weight)
            self.recall_bias.copy_(self.classifier.bias)
        elif phase.name == "statistics":
            self._summarise(at)
            self.collected, self.collected_columns = self.collected[:0].clone(), self.collected_columns[:0].clone()
        else:
            self._samples = self._order = self.means[:0]

    # -- stage 1: slow learner ---------------------------------------------------------------------------------------
    def _slow_learner(self, batch: Batch) -> Tensor:
        weight, bias = self._rows
        logits = F.linear(self.features(batch.images, None), weight, bias)  # of the new classes alone
        return slow_learner_loss(logits, self._column[batch.targets] - self._first(batch.at))

    @torch.no_grad()
    def _recall(self) -> None:
        """Put back the heads from before the last alignment (zeros, as they are, ahead of the first task)."""
        self.classifier.weight.copy_(self.recall_weight)
        self.classifier.bias.copy_(self.recall_bias)

    # -- class statistics --------------------------------------------------------------------------------------------
    @torch.no_grad()
    def _collect(self, batch: Batch) -> None:
        start = batch.at.iteration * STATISTICS_BATCH
        cut = slice(start, start + len(batch.targets))
        self.collected[cut] = self.features(batch.images, None)
        self.collected_columns[cut] = self._column[batch.targets]

    def _summarise(self, at: Cursor) -> None:
        """Mean and factor of each new class from the collected features; the only factorisation of the run."""
        if not bool(torch.isfinite(self.collected).all()):
            raise RunFailed(f"slca: features of task {at.task} are not finite: lower lr or backbone_scale")
        first, num_new, width = self._first(at), self._sizes[at.task], self.means.shape[1]
        counts = torch.bincount(self.collected_columns - first, minlength=num_new).tolist()
        low_rank = self.config.sampler == "lowrank" and max(counts) < width
        factors = self.collected.new_zeros((num_new, max(counts) if low_rank else width, width))
        grouped = torch.split(torch.argsort(self.collected_columns, stable=True), counts)
        for i, rows in enumerate(grouped):
            mean, factor = covariance_factor(self.collected[rows], self.config.ridge, low_rank=low_rank)
            self.means[first + i] = mean
            factors[i, : len(factor)] = factor
        self.factors = [*self.factors, factors]

    # -- stage 2: classifier alignment -------------------------------------------------------------------------------
    def _alignment(self, task: int, epoch: int, index: int) -> Tensor:
        """Loss on mini-batch `index` of an alignment epoch."""
        if self._drawn != (task, epoch):  # a new epoch, or the first step behind a resume
            self._samples, self._order = self._draw(task, epoch)
            self._drawn = task, epoch
        size = self.config.ca_samples
        rows = self._order[index * size : (index + 1) * size]
        weight, bias = self._rows
        logits = F.linear(self._samples[rows], weight, bias)
        return alignment_loss(logits, rows // size, self._sizes[: task + 1], self.config.temperature)

    def _draw(self, task: int, epoch: int) -> tuple[Tensor, Tensor]:
        """Samples (K * S, D), S of each seen class in column order, and the order (K * S,) in which they are used."""
        sizes, dtype = self._sizes[: task + 1], self.classifier.weight.dtype
        means = (self.means[: self._ends[task]] * self._mean_scale(task)[:, None]).to(dtype)
        noise, order = self._noise(task, epoch)
        samples = [
            sample_features(mean, factor, z, self.config.ridge)
            for mean, factor, z in zip(torch.split(means, sizes), self.factors, noise, strict=True)
        ]
        return torch.cat(samples).flatten(0, 1), order

    def _mean_scale(self, task: int) -> Tensor:
        """(K,) float64."""
        num_seen = self._ends[task]
        if not self.config.shrink_means:
            return self.means.new_ones(num_seen)
        tasks = self._task_of[:num_seen]
        if self.config.official_task_index:
            tasks = torch.arange(num_seen, device=tasks.device) // self._sizes[task]
        return mean_shrink(tasks, task + 1)

    def _noise(self, task: int, epoch: int) -> tuple[list[Tensor], Tensor]:
        """All that is random in an alignment epoch: for each task the noise that `sample_features` takes, and a
        permutation of the K * S samples."""
        rng, size = self.setting.rng("slca-align", task, epoch), self.config.ca_samples
        noise = []
        for factors in self.factors:
            classes, rank, width = factors.shape
            shape = (classes, size, width if rank == width else rank + width)
            noise.append(torch.randn(shape, generator=rng, dtype=factors.dtype, device=factors.device))
        return noise, torch.randperm(self._ends[task] * size, generator=rng, device=self.means.device)

    # -- answers -----------------------------------------------------------------------------------------------------
    def classify(self, features: Tensor, allowed: Tensor, task: int | None) -> Tensor:
        """Raw logits of the live heads: aligned ones from a task's alignment on until the next task begins."""
        weight, bias = self.classifier.weight, self.classifier.bias
        return F.linear(features.to(weight.dtype), weight, bias).index_select(1, self._column)

    def head(self, task: int | None) -> Head:
        weight, bias = self.classifier.weight, self.classifier.bias
        return Head("linear", weight.index_select(0, self._column), bias.index_select(0, self._column))

    @property
    def features_version(self) -> int | None:
        return 0 if self.frozen_backbone else self.backbone_version

    def memory_bytes(self) -> dict[str, int]:
        if not self.config.align:
            return {}
        return {
            "class_means": sum(len(factors) for factors in self.factors) * self.means[0].nbytes,
            "class_covariances": sum(factors.nbytes for factors in self.factors),
            "heads_before_alignment": self.recall_weight.nbytes + self.recall_bias.nbytes,
        }

    # -- inside ------------------------------------------------------------------------------------------------------
    def _update(self, loss: Tensor, rate: float) -> Mapping[str, Tensor]:
        """One optimiser step: `rate` for the head, scaled for the backbone."""
        assert self.optimizer is not None
        for group, scale in zip(self.optimizer.param_groups, (1.0, self.config.backbone_scale), strict=False):
            group["lr"] = rate * scale
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.detach()}

    def _first(self, at: Cursor) -> int:
        """Column of the first class of the current task."""
        return self._ends[at.task] - self._sizes[at.task]

    def _head_rows(self, first: int, last: int) -> list[Tensor]:
        """Rows `first..last-1` of weight and bias as tensors of their own over the same memory."""
        return [p.detach()[first:last] for p in (self.classifier.weight, self.classifier.bias)]

    def _check_rows(self, task: Task, at: Cursor) -> None:
        """Refuse what would give NaN: a target outside the task's head, a class without rows, hence without mean."""
        where = f"task {at.task} of {self.setting.scenario_id}"
        first, last = self._first(at), self._ends[at.task]
        counts = torch.bincount(self._column[task.targets.to(self._column.device)], minlength=last)[first:last].tolist()
        if sum(counts) != len(task.targets):
            raise InputError(
                f"slca gives each task a head of its own, but {where} has rows of other tasks' classes: "
                f"choose a scenario whose tasks do not share classes"
            )
        if self.config.align and 0 in counts:
            name = self.setting.classes.names[int(self._class_at[first + counts.index(0)])]
            raise InputError(
                f"slca needs a training row of every class for its mean, but {where} has none of class {name!r}: "
                f"keep at least one (scenario parameters per_class, val_share), or set align=false"
            )


def _own_classes(setting: Setting) -> list[list[int]]:
    """Class ids of each task; refuses scenarios that SLCA is not made for."""
    where = f"scenario {setting.scenario_id}"
    if setting.online:
        raise InputError(f"slca reads each task several times, but {where} is online: choose one with epochs")
    tasks: list[list[int]] = [classes.tolist() for classes in setting.task_classes]
    if not all(tasks) or len({c for classes in tasks for c in classes}) != sum(map(len, tasks)):
        raise InputError(
            f"slca gives each task a head of its own, but a task of {where} brings no new class or a class of an "
            f"earlier task: choose a scenario whose tasks do not share classes"
        )
    return tasks


METHOD = SLCA
