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

Same as the official code: everything above, the mean shrink (in the code, not in the paper's text), the norm as the mean
of per-task norms. Different, with the same result up to rounding and random draws: each covariance is factored once, in
float64; few-shot covariances are kept as a low-rank factor of the same Gaussian; heads are rows of one matrix.
The task index of the mean shrink counts tasks; the official one goes wrong if tasks differ in size (a switch).
The official backbones replace the pretrained final norm by a fresh one: backbone option `final_norm = "fresh"`.
A class with one training row has no covariance: it gets `ridge * I`. SLCA++ is not part of this file.

Shapes: B batch, D features, C classes of the scenario, K classes seen, T tasks seen, S samples per class and batch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

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
        "auto", "form of the kept covariance; the same Gaussian. auto: whichever is smaller for the task's classes",
        choices=("auto", "cholesky", "lowrank"), source="official: cholesky",
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
    norms = [torch.linalg.vector_norm(part, dim=1) for part in logits.split(list(sizes), dim=1)]
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
    Low rank: r = min(n, D) and `F^T F + ridge I` is that covariance (F: triangular factor of the centred features, which
    is determined by the covariance up to signs of rows, so it holds no more about single images than that does).
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


def mean_shrink(sizes: Sequence[int], official: bool = False) -> list[float]:
    """Scale of each class's mean, `0.9 + 0.1 (t_c + 1) / T`: K numbers in column order.

    t_c: the task of class c; official: `c // sizes[-1]`, which runs past the last task if that one is smaller.

    >>> mean_shrink([1, 1])
    [0.95, 1.0]
    """
    if official:
        tasks = [column // sizes[-1] for column in range(sum(sizes))]
    else:
        tasks = [task for task, size in enumerate(sizes) for _ in range(size)]
    return [0.9 + 0.1 * (task + 1) / len(sizes) for task in tasks]


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
    """See the module. Heads are rows of one (C, D) matrix in order of arrival ("columns" of the logits), so that a task's
    head is a slice of it: the optimiser of a phase holds that slice and can't touch any other row."""

    Config = SLCAConfig
    settings = frozenset({"class", "task"})
    config: SLCAConfig

    def __init__(self, config: SLCAConfig, backbone: nn.Module, setting: Setting) -> None:
        super().__init__(config, backbone, setting)
        if setting.online:
            raise InputError(
                f"slca reads each task more than once, but scenario {setting.scenario_id} is online: "
                f"choose a scenario with epochs"
            )
        tasks = [classes.tolist() for classes in setting.task_classes]
        arrival = [c for classes in tasks for c in classes]
        if len(set(arrival)) != len(arrival) or not all(tasks):
            raise InputError(
                f"slca gives each task a head of its own, but in scenario {setting.scenario_id} some task brings "
                f"no new class or one that came before: choose a scenario whose tasks have classes of their own"
            )
        self._sizes = [len(classes) for classes in tasks]
        self._ends = list(accumulate(self._sizes))
        arrival += sorted(set(range(setting.num_classes)) - set(arrival))
        self._class_at = torch.tensor(arrival, device=setting.device)  # column -> class id
        self._column = torch.argsort(self._class_at)  # class id -> column

        if config.backbone_scale == 0:
            freeze(backbone)
            self.frozen_backbone = True
            self.view = "features"
        self._trainable = [p for p in backbone.parameters() if p.requires_grad]
        width: int = backbone.num_features  # type: ignore[assignment]  # nn.Module's __getattr__ hides the type
        self.classifier = nn.Linear(width, setting.num_classes, device=setting.device).requires_grad_(False)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)
        self.recall_weight = self.classifier.weight.detach().clone()  # the heads before alignment
        self.recall_bias = self.classifier.bias.detach().clone()
        self.backbone_version: int | None = None
        self.means = torch.zeros((setting.num_classes, width), dtype=torch.float64, device=setting.device)
        self.factors: list[Tensor] = []  # one (c, r, D) per task
        self.task_features: Tensor | None = None  # (n, D) while the statistics are collected
        self.task_columns: Tensor | None = None  # (n,)
        self.optimizer: torch.optim.SGD | None = None
        self._rows: list[Tensor] = []  # the slices of weight and bias that are trained
        self._samples: Tensor | None = None  # (K * S, D), this alignment epoch's
        self._order: Tensor | None = None  # (K * S,)
        self._drawn: tuple[int, int] | None = None  # task and epoch that they are of

    def phases(self, task: Task, index: int) -> Sequence[Phase]:
        train = Phase("train", view="features" if self.frozen_backbone else "train")
        if not self.config.align:
            return [train]
        statistics = Phase(
            "statistics", epochs=1, batch_size=STATISTICS_BATCH, order="listed", view=self.view, updates=1, drop_last=False
        )
        if index == 0:
            return [train, statistics]
        steps = self.config.ca_epochs * self._ends[index]
        return [train, statistics, Phase("align", source="none", iterations=steps, updates=1)]

    # -- phases ------------------------------------------------------------------------------------------------------
    def begin_phase(self, task: Task, phase: Phase, at: Cursor) -> None:
        if phase.name == "train":
            self._check(task, at)
            self.backbone_version = None
            self._recall()
            weight, bias = self._head_rows(self._first(at), self._ends[at.task])
            nn.init.trunc_normal_(weight, std=0.02, generator=self.setting.rng("slca-head", at.task))
            bias.zero_()
        elif phase.name == "statistics":
            self.task_features = self.means.new_zeros(
                (len(task.rows), self.means.shape[1]), dtype=self.classifier.weight.dtype
            )
            self.task_columns = torch.zeros_like(task.rows, device=self.setting.device)

    def open_phase(self, task: Task, phase: Phase, at: Cursor) -> None:
        slow = phase.name == "train" and not self.frozen_backbone
        self.backbone.train(slow)
        for parameter in self._trainable:
            parameter.requires_grad_(slow)
        config = self.config
        if phase.name == "statistics":
            return
        self._rows = self._head_rows(self._first(at) if phase.name == "train" else 0, self._ends[at.task])
        for rows in self._rows:
            rows.requires_grad_()
        groups = [{"params": self._rows, "lr": config.lr if phase.name == "train" else config.ca_lr}]
        if slow:
            groups.append({"params": self._trainable, "lr": config.lr * config.backbone_scale})
        self.optimizer = torch.optim.SGD(groups, momentum=config.momentum, weight_decay=config.weight_decay)

    def step(self, batch: Batch) -> Mapping[str, Tensor]:
        if batch.phase.name == "statistics":
            return self._collect(batch)
        if batch.phase.name == "train":
            loss = self._slow_learner(batch)
        else:
            with torch.autocast(self.setting.device.type, enabled=False):
                loss = self._alignment(batch.at)
        assert self.optimizer is not None
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.optimizer.step()
        return {"loss": loss.detach()}

    def end_phase(self, task: Task, phase: Phase, at: Cursor) -> None:
        self.optimizer = None
        self._rows = []
        if phase.name == "train":
            self.backbone_version = at.task + 1
            self.recall_weight.copy_(self.classifier.weight)
            self.recall_bias.copy_(self.classifier.bias)
        elif phase.name == "statistics":
            self._summarise(at)
            self.task_features = self.task_columns = None
        else:
            self._samples = self._order = self._drawn = None

    # -- stage 1: slow learner ---------------------------------------------------------------------------------------
    def _slow_learner(self, batch: Batch) -> Tensor:
        config, first = self.config, self._first(batch.at)
        head, *backbone = self._groups()
        head["lr"] = step_rate(config.lr, batch.epoch, config.milestone, config.gamma)
        for group in backbone:
            group["lr"] = head["lr"] * config.backbone_scale
        logits = F.linear(self.features(batch.images, None), *self._rows)
        return slow_learner_loss(logits, self._column[batch.targets] - first)

    def _recall(self) -> None:
        """Put back the heads from before the last alignment; before the first task these are zeros like the heads."""
        with torch.no_grad():
            self.classifier.weight.copy_(self.recall_weight)
            self.classifier.bias.copy_(self.recall_bias)

    def _check(self, task: Task, at: Cursor) -> None:
        """The head of a task has its own classes alone, and a class without rows has no mean."""
        counts = torch.bincount(self._column.cpu()[task.targets.cpu()], minlength=len(self._column))
        first, last = self._first(at), self._ends[at.task]
        if int(counts[first:last].sum()) != len(task.targets):
            raise InputError(
                f"slca: task {at.task} of {self.setting.scenario_id} has rows of classes from other tasks; "
                f"choose a scenario whose tasks have classes of their own"
            )
        if (empty := torch.nonzero(counts[first:last] == 0).flatten().tolist()) and self.config.align:
            name = self.setting.classes.names[int(self._class_at[first + empty[0]])]
            raise InputError(
                f"slca: class {name!r} of task {at.task} of {self.setting.scenario_id} has no training row, so no "
                f"mean; keep at least one (per_class, val_share), or set align=false"
            )

    # -- class statistics --------------------------------------------------------------------------------------------
    @torch.no_grad()
    def _collect(self, batch: Batch) -> Mapping[str, Tensor]:
        assert self.task_features is not None
        assert self.task_columns is not None
        cut = slice(batch.at.iteration * STATISTICS_BATCH, batch.at.iteration * STATISTICS_BATCH + len(batch.targets))
        with torch.autocast(self.setting.device.type, enabled=False):
            self.task_features[cut] = self.features(batch.images, None)
        self.task_columns[cut] = self._column[batch.targets]
        return {}

    def _summarise(self, at: Cursor) -> None:
        """Mean and factor of each new class from the collected features, once per class and run."""
        assert self.task_features is not None
        assert self.task_columns is not None
        if not bool(torch.isfinite(self.task_features).all()):
            raise RunFailed(f"slca: features of task {at.task} are not finite after training; lower lr or backbone_scale")
        first, last = self._first(at), self._ends[at.task]
        counts = torch.bincount(self.task_columns - first, minlength=last - first).tolist()
        order = torch.argsort(self.task_columns, stable=True)
        width = self.means.shape[1]
        rank = min(max(counts), width)
        low_rank = self.config.sampler == "lowrank" or (self.config.sampler == "auto" and 2 * rank <= width)
        factors = self.task_features.new_zeros((last - first, rank if low_rank else width, width))
        for i, rows in enumerate(order.split(counts)):
            mean, factor = covariance_factor(self.task_features[rows], self.config.ridge, low_rank=low_rank)
            self.means[first + i] = mean
            factors[i, : len(factor)] = factor
        self.factors = [*self.factors, factors]

    # -- stage 2: classifier alignment -------------------------------------------------------------------------------
    def _alignment(self, at: Cursor) -> Tensor:
        size = self.config.ca_samples
        epoch, inside = divmod(at.iteration, self._ends[at.task])
        if self._drawn != (at.task, epoch):  # a new epoch, or the first step behind a resume
            self._samples, self._order = self._draw(at.task, epoch)
            self._drawn = at.task, epoch
        assert self._samples is not None
        assert self._order is not None
        self._groups()[0]["lr"] = cosine_rate(self.config.ca_lr, epoch, self.config.ca_epochs)
        rows = self._order[inside * size : (inside + 1) * size]
        logits = F.linear(self._samples[rows], *self._rows)
        targets = torch.div(rows, size, rounding_mode="floor")
        return alignment_loss(logits, targets, self._sizes[: at.task + 1], self.config.temperature)

    def _draw(self, task: int, epoch: int) -> tuple[Tensor, Tensor]:
        """Samples (K * S, D), S of each seen class in column order, and the order (K * S,) in which they are used."""
        sizes, dtype = self._sizes[: task + 1], self.classifier.weight.dtype
        means = self.means[: self._ends[task]]
        if self.config.shrink_means:
            scale = mean_shrink(sizes, self.config.official_task_index)
            means = means * torch.tensor(scale, dtype=means.dtype, device=means.device)[:, None]
        noise, order = self._noise(task, epoch)
        samples = [
            sample_features(*inputs, self.config.ridge)
            for inputs in zip(means.to(dtype).split(sizes), self.factors, noise, strict=True)
        ]
        return torch.cat(samples).flatten(0, 1), order

    def _noise(self, task: int, epoch: int) -> tuple[list[Tensor], Tensor]:
        """All that is drawn for an alignment epoch: for each task normal numbers (c, S, r) or, for low-rank factors,
        (c, S, r + D), and a permutation of K * S rows."""
        rng = self.setting.rng("slca-align", task, epoch)
        size, device = self.config.ca_samples, self.setting.device
        noise = []
        for factors in self.factors:
            classes, rank, width = factors.shape
            drawn = rank if rank == width else rank + width
            noise.append(torch.randn((classes, size, drawn), generator=rng, dtype=factors.dtype, device=device))
        return noise, torch.randperm(self._ends[task] * size, generator=rng, device=device)

    # -- answers -----------------------------------------------------------------------------------------------------
    def classify(self, features: Tensor, allowed: Tensor, task: int | None) -> Tensor:
        """Raw logits of the live heads, which are aligned from a task's alignment to the next task's training."""
        weight, bias = self.classifier.weight, self.classifier.bias
        return F.linear(features.to(weight.dtype), weight, bias).index_select(1, self._column)

    def head(self, task: int | None) -> Head:
        weight, bias = self.classifier.weight, self.classifier.bias
        return Head("linear", weight.index_select(0, self._column), bias.index_select(0, self._column))

    @property
    def features_version(self) -> int | None:
        return 0 if self.frozen_backbone else self.backbone_version

    def memory_bytes(self) -> dict[str, int]:
        return {
            "class_means": self._ends_seen() * self.means[0].nbytes,
            "class_covariances": sum(factors.nbytes for factors in self.factors),
            "heads_before_alignment": self.recall_weight.nbytes + self.recall_bias.nbytes if self.config.align else 0,
        }

    # -- inside ------------------------------------------------------------------------------------------------------
    def _first(self, at: Cursor) -> int:
        """Column of the first class of the current task."""
        return self._ends[at.task] - self._sizes[at.task]

    def _head_rows(self, first: int, last: int) -> list[Tensor]:
        """Rows `first..last-1` of weight and bias as tensors of their own over the same memory."""
        return [p.detach()[first:last] for p in (self.classifier.weight, self.classifier.bias)]
