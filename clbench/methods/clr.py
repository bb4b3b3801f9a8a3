"""CLR: a frozen CNN that each task reprograms by depthwise kernels behind its convolutions, batch norms and a head.

Idea: the convolutions of a pretrained network (the anchor) never change; a task learns one 3x3 kernel per channel of
their outputs, all batch norms (affine and running statistics) and a linear head: under 0.6 % of a ResNet-50. Nothing
is shared but the anchor, so nothing is forgotten. The task must be known at test. No exemplars.

Paper: Ge, Li, Ni, Zhao, Yang, Itti: CLR, Channel-wise Lightweight Reprogramming, ICCV 2023 (arXiv 2307.11386).
Official code: gyhandy/Channel-wise-Lightweight-Reprogramming. Spec: card `clr`.

Variants (official `--method`): `clr` (Ghost_reduced_v1) puts 3x3 kernels behind convolutions larger than 1x1; `full`
(Ghost) behind every convolution; `v2` (Ghost_reduced_v2) 3x3 behind larger ones and one scale per channel behind 1x1;
`linear` (Linear) trains the head alone: the probe on kept features of the anchor. The depthwise convolutions of
MobileNets and the like are convolutions as any other.

Same as the official code: initial kernels are deltas, Adam, steps of the rate at thirds of the epochs, an unsquared
norm penalty on every tensor of the reprogrammed blocks (frozen ones add a constant, computed once), the best epoch on
held-out rows by strict comparison. Different: those rows come from the training set (`val_share` of the scenario), not
from what is reported; without them the last epoch counts. A last batch of one image is left out, as batch norm cannot
take it. Not here: `Ghost_a`, `li18/li50`, `Finetune`, `Resnet_Scratch`.

A task's kernels and batch norms are one flat row ("pack") of a (T, P) matrix, and the network's own tensors are views
of the row in use: to change the task is to move pointers. Tasks don't depend on each other: the pack of task t is the
same to the bit whichever tasks ran before it (without dropout or random views), so they may train in parallel.

Shapes: B batch, C classes of the scenario, c classes of a task, D features, T tasks, P numbers of a pack.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.errors import InputError, RunFailed
from clbench.methods.base import Head, Method, Setting, freeze, hp
from clbench.scenarios.model import Task
from clbench.stream.types import Batch, Cursor, Phase

__all__ = [
    "CLR", "METHOD", "CLRConfig", "PackSize", "Reprogrammed", "batch_norms", "identity_kernel", "kernel_behind",
    "norm_penalty", "pack_size", "reprogram", "step_rate",
]  # fmt: skip

# Side of the kernel behind a convolution larger than 1x1, and behind a 1x1 convolution; 0 for none.
KERNELS = {"clr": (3, 0), "full": (3, 3), "v2": (3, 1), "linear": (0, 0)}
STAGES = 3  # the rate falls behind each third of the epochs


@dataclass(frozen=True)
class CLRConfig:
    """Defaults are the official ones, the same for all 53 tasks of the paper (card, section 3)."""

    variant: str = hp(
        "clr", "kernels behind convolutions above 1x1 (clr), behind all (full), scales behind 1x1 too (v2); linear: "
        "the head alone", choices=("clr", "full", "v2", "linear"), source="card, section 2",
    )  # fmt: skip
    lr: float = hp(
        1e-3, "learning rate of Adam", low=0.0, high=10.0, scale="log", source="official code",
        tune={"low": 1e-4, "high": 1e-2},
    )  # fmt: skip
    gamma: float = hp(0.1, "factor on the rate behind each third of the epochs", low=0.0, high=1.0,
                      source="official code")  # fmt: skip
    penalty: float = hp(
        1e-5, "weight of the sum of Euclidean norms (unsquared) of all tensors of the reprogrammed blocks, batch norms "
        "and head", low=0.0, high=1.0, scale="log", source="official code",
    )  # fmt: skip
    batch_norm: str = hp(
        "train", "batch norms while training: train uses the batch and updates the task's running statistics; eval "
        "keeps the anchor's statistics and learns scale and shift alone", choices=("train", "eval"),
        source="official code: train; eval is ours, for anchors that small batches harm",
    )  # fmt: skip
    selection: str = hp(
        "auto", "which epoch of a task is kept: the best on validation rows (val), the last (last); auto: val where "
        "the scenario keeps such rows (its parameter val_share), else last", choices=("auto", "val", "last"),
        source="official code: the best, on the split that it reports",
    )  # fmt: skip
    patience: int = hp(21, "with validation rows: stop once so many epochs in a row and one more were no better",
                       low=0, unit="epochs", source="official code")  # fmt: skip


# -- the parts of the method -----------------------------------------------------------------------------------------
def identity_kernel(channels: int, size: int) -> Tensor:
    """Depthwise kernel that changes nothing: (channels, 1, size, size), 1 in the centre. size: odd.

    >>> identity_kernel(1, 3)[0, 0].tolist()
    [[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    """
    kernel = torch.zeros((channels, 1, size, size))
    kernel[:, :, size // 2, size // 2] = 1
    return kernel


class Reprogrammed(nn.Module):
    """A frozen convolution, then one kernel per channel: `F'_c = K_c * F_c` (stride 1, zero padding, no bias).

    kernel: (C, 1, size, size). Output as the convolution's: the padding keeps height and width.
    """

    def __init__(self, conv: nn.Conv2d, size: int) -> None:
        super().__init__()
        self.conv = conv
        self.kernel = nn.Parameter(identity_kernel(conv.out_channels, size).to(conv.weight))
        self.padding = size // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.conv(x), self.kernel, padding=self.padding, groups=len(self.kernel))


def kernel_behind(conv: nn.Conv2d, variant: str) -> int:
    """Side of the kernel that a variant puts behind a convolution; 0: it stays bare. Source: card, section 2."""
    larger, pointwise = KERNELS[variant]
    return larger if max(conv.kernel_size) > 1 else pointwise


def reprogram(network: nn.Module, variant: str) -> list[Reprogrammed]:
    """Replace the convolutions of `network` that the variant reprograms, in place; returns what stands there now."""
    made: dict[nn.Conv2d, Reprogrammed] = {}
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d) and (size := kernel_behind(child, variant)):
                if child not in made:
                    made[child] = Reprogrammed(child, size)
                setattr(parent, name, made[child])
    return list(made.values())


def batch_norms(network: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """All batch norms of a network, timm's with an activation included."""
    return [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


class PackSize(NamedTuple):
    """Numbers that a task keeps besides its head: kernels, batch-norm scales and shifts, running statistics."""

    kernels: int
    affine: int
    statistics: int

    @property
    def learned(self) -> int:
        return self.kernels + self.affine

    @property
    def total(self) -> int:
        return self.learned + self.statistics


def pack_size(network: nn.Module, variant: str) -> PackSize:
    """Count a task's numbers from a network as it comes, before `reprogram`; works on the meta device.

    Closed form `9 C_dw + 2 C_bn + 2 C_bn` for `clr`. Source: card, section 5.
    """
    if variant == "linear":
        return PackSize(0, 0, 0)
    convs = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    norms = batch_norms(network)
    return PackSize(
        sum(conv.out_channels * kernel_behind(conv, variant) ** 2 for conv in convs),
        sum(p.numel() for norm in norms for p in (norm.weight, norm.bias) if p is not None),
        sum(b.numel() for norm in norms for b in (norm.running_mean, norm.running_var) if b is not None),
    )


def norm_penalty(flat: Tensor, lengths: Tensor) -> Tensor:
    """Sum of the Euclidean norms (unsquared) of consecutive pieces of `flat`: a pull of constant strength on each.

    flat: (n,); lengths: (pieces,) int64, of sum n. Returns a scalar; an all-zero piece has gradient 0 (the official
    code skips it). Source: card, section 2, step 5.
    """
    squares = torch.segment_reduce(flat.square(), "sum", lengths=lengths, unsafe=True)
    return squares.clamp(min=torch.finfo(flat.dtype).tiny).sqrt().sum()


def step_rate(lr: float, epoch: int, epochs: int, gamma: float) -> float:
    """Rate in `epoch` (from 0): `lr gamma^(epoch // (epochs // 3))`, as the official scheduler: with a number of epochs
    that 3 does not divide it falls once more. Source: card, section 2, step 4.

    >>> [step_rate(1.0, epoch, 60, 0.1) for epoch in (0, 19, 20)]
    [1.0, 1.0, 0.1]
    """
    return lr * gamma ** (epoch // max(epochs // STAGES, 1))


# -- the method ------------------------------------------------------------------------------------------------------
class CLR(Method):
    """See the module. One phase per task. Heads are rows of one (C, D) matrix in order of arrival, so that a task's
    head is a slice of it; classes of other tasks get logit 0 from a task's head.

    A task that hasn't begun answers with the anchor and a head of zeros.
    """

    Config = CLRConfig
    settings = frozenset({"task"})
    mask = "task"
    small_backbone = "reduced-resnet18"
    config: CLRConfig

    def __init__(self, config: CLRConfig, backbone: nn.Module, setting: Setting) -> None:
        super().__init__(config, backbone, setting)
        device, num_tasks = setting.device, len(setting.task_classes)
        self._tasks = own_classes(setting)
        check_network(backbone, config.variant)
        self._size = pack_size(backbone, config.variant)
        blocks = reprogram(backbone, config.variant)
        norms = [] if config.variant == "linear" else batch_norms(backbone)
        freeze(backbone)  # what a task learns of it lies in `packs`
        if config.variant == "linear":
            self.frozen_backbone, self.view = True, "features"

        affine = [p for norm in norms for p in (norm.weight, norm.bias) if p is not None]
        statistics = [b for norm in norms for b in (norm.running_mean, norm.running_var) if b is not None]
        for norm in norms:
            norm.num_batches_tracked = None  # of no use with a momentum, and state that no pack holds
        self._norms = norms
        self._learned: list[Tensor] = [*(block.kernel for block in blocks), *affine]
        self._slots = [*self._learned, *statistics]  # tensors of the network, in the order of a pack
        self._slot_sizes = [slot.numel() for slot in self._slots]
        self._lengths = torch.tensor(self._slot_sizes[: len(self._learned)], dtype=torch.int64, device=device)
        self._frozen = [p.detach() for block in blocks for p in block.conv.parameters()]
        self._frozen_norms = sum((p.norm() for p in self._frozen), torch.zeros((), device=device))

        dtype = next((p.dtype for p in backbone.parameters()), torch.float32)
        self._anchor = torch.cat([slot.detach().flatten() for slot in self._slots] or [torch.zeros(0, dtype=dtype)])
        self._anchor = self._anchor.to(device)
        self.packs = self._anchor.repeat(num_tasks, 1)  # (T, P)
        self._installed = -1  # the task whose pack the network shows; -1: the anchor's
        self._install(-1)

        arrival = [c for classes in self._tasks for c in classes]
        arrival += sorted(set(range(setting.num_classes)) - set(arrival))
        self._head_row = torch.argsort(torch.tensor(arrival, device=device))  # class id -> row of the head
        self._ends = list(accumulate(map(len, self._tasks)))  # task -> rows of the head up to it
        self._task_classes = [torch.tensor(classes, device=device) for classes in self._tasks]
        width = int(backbone.num_features)  # type: ignore[arg-type]  # nn.Module hides the type of attributes
        self.classifier = nn.Linear(width, setting.num_classes, device="meta").to_empty(device=device).to(dtype)
        self.classifier.requires_grad_(False)
        self.classifier.weight.zero_()
        self.classifier.bias.zero_()

        self.num_trained = 0
        self.epoch = 0  # of the task, passes done
        self.best_epoch, self.best_hits = 0, -1
        self.best: list[Tensor] = []  # pack and rows of the head at the best epoch
        self.optimizer: torch.optim.Adam | None = None
        self._rows: list[Tensor] = []  # the slices of weight and bias that are being trained
        self._flat = self._anchor[:0]  # the learned part of the pack that is being trained

    def phases(self, task: Task, index: int) -> Sequence[Phase]:
        where = f"task {index} of {self.setting.scenario_id}"
        if self.config.selection == "val" and not has_validation(task):
            raise InputError(
                f"clr is to select epochs on validation rows, but {where} keeps none: give the scenario a val_share "
                f"(--scenario-set val_share=0.1), or set selection=last"
            )
        if self.frozen_backbone:
            return [Phase("train", view="features")]
        size, drop_last = self.setting.batch_size, None
        if self.config.batch_norm == "train":
            if min(len(task.rows), size) < 2:
                raise InputError(
                    f"clr trains batch norms, which need two images at least, but {where} has {len(task.rows)} rows "
                    f"in batches of {size}: raise --batch-size, or set batch_norm=eval"
                )
            drop_last = True if len(task.rows) % size == 1 else None
        return [Phase("train", drop_last=drop_last)]

    def begin_phase(self, task: Task, phase: Phase, at: Cursor) -> None:
        if not bool(torch.isin(task.targets, task.classes).all()):
            raise InputError(
                f"clr gives each task a head of its own, but task {at.task} of {self.setting.scenario_id} has rows of "
                f"other tasks' classes: choose a scenario whose tasks do not share classes"
            )
        self.packs[at.task] = self._anchor
        rng = self.setting.rng("clr-head", at.task)
        bound = 1 / math.sqrt(self.classifier.in_features)  # nn.Linear's default, for weight and bias
        for rows in self._head_rows(at.task):
            rows.uniform_(-bound, bound, generator=rng)
        self.epoch, self.best_epoch, self.best_hits = 0, 0, -1

    def open_phase(self, task: Task, phase: Phase, at: Cursor) -> None:
        self._install(at.task)
        self._rows = self._head_rows(at.task)
        self._learn(self.packs[at.task])
        learned = [self._flat.requires_grad_(), *(rows.requires_grad_() for rows in self._rows)]
        self.optimizer = torch.optim.Adam([p for p in learned if p.numel()], lr=self.config.lr, fused=True)
        if self._selects(task):
            self.best = [tensor.detach().clone() for tensor in (self.packs[at.task], *self._rows)]

    def step(self, batch: Batch) -> Mapping[str, Tensor]:
        assert self.optimizer is not None
        config = self.config
        weight, bias = self._rows
        self.optimizer.zero_grad(set_to_none=False)
        features = batch.images if self.frozen_backbone else self.backbone(batch.images)
        logits = F.linear(features, weight, bias)
        loss = F.cross_entropy(logits, self._head_row[batch.targets] - self._first(batch.at.task))
        if config.penalty:
            loss = loss + config.penalty * (self._frozen_norms + self._norm_sum())
        loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = step_rate(config.lr, batch.epoch, self.setting.epochs, config.gamma)
        self.optimizer.step()
        return {"loss": loss.detach()}

    def end_epoch(self, task: Task, phase: Phase, at: Cursor) -> bool:
        """Compare with the best epoch so far on the validation rows; True once `patience` is over."""
        self.epoch += 1
        if not self._selects(task):
            return False
        hits = self._validation_hits(task, at.task)
        if hits > self.best_hits:
            self.best_hits, self.best_epoch = hits, self.epoch
            for best, now in zip(self.best, (self.packs[at.task], *self._rows), strict=True):
                best.copy_(now.detach())
        return self.epoch - self.best_epoch > self.config.patience

    def end_phase(self, task: Task, phase: Phase, at: Cursor) -> None:
        if self.best:
            for best, now in zip(self.best, (self.packs[at.task], *self._head_rows(at.task)), strict=True):
                now.copy_(best)
        self.backbone.eval().requires_grad_(False)
        for slot in self._learned:
            slot.grad = None
        self._install(-1)
        self.optimizer, self.best, self._rows, self._flat = None, [], [], self._anchor[:0]
        self.num_trained = at.task + 1

    # -- answers -----------------------------------------------------------------------------------------------------
    def features(self, images: Tensor, task: int | None) -> Tensor:
        """(B, C, H, W) -> (B, D) by the network as `task` reprogrammed it; of the variant `linear`: kept features."""
        if self.frozen_backbone:
            return images
        with self._network_of(required(task)):
            out: Tensor = self.backbone(images)
        return out

    def classify(self, features: Tensor, allowed: Tensor, task: int | None) -> Tensor:
        task = required(task)
        weight, bias = self._head_rows(task)
        logits = F.linear(features.to(weight.dtype), weight, bias)
        every = logits.new_zeros((len(logits), self.setting.num_classes))
        return every.index_copy_(1, self._task_classes[task], logits)

    def head(self, task: int | None) -> Head:
        """All heads: rows of classes that are not the task's are of other tasks' features."""
        weight, bias = self.classifier.weight, self.classifier.bias
        return Head("linear", weight.index_select(0, self._head_row), bias.index_select(0, self._head_row))

    def memory_bytes(self) -> dict[str, int]:
        """Bytes of the packs and heads of the tasks trained so far: what CLR adds to the anchor."""
        item, trained = self.packs.element_size(), self.num_trained
        rows = self._ends[trained - 1] if trained else 0
        heads = {"heads": rows * (self.classifier.in_features + 1) * item}
        if self.frozen_backbone:
            return heads
        return {
            "kernels": trained * self._size.kernels * item,
            "batch_norm_affine": trained * self._size.affine * item,
            "batch_norm_statistics": trained * self._size.statistics * item,
            **heads,
        }

    # -- inside ------------------------------------------------------------------------------------------------------
    def _install(self, task: int) -> None:
        """Let the network's own tensors be views of a task's pack; -1: of the anchor's."""
        pack = self._anchor if task < 0 else self.packs[task]
        for slot, piece in zip(self._slots, pack.split(self._slot_sizes), strict=True):
            slot.data = piece.view(slot.shape)
        self._installed = task

    @contextlib.contextmanager
    def _network_of(self, task: int) -> Iterator[None]:
        """The network as a task has it; behind it the one that was there."""
        before = self._installed
        if before == task:
            yield
            return
        self._install(task)
        try:
            yield
        finally:
            self._install(before)

    def _learn(self, pack: Tensor) -> None:
        """Make the learned part of a pack one leaf, whose gradient the tensors of the network add theirs to: one update
        and one penalty over a flat vector in place of hundreds over small tensors."""
        self.backbone.train(not self.frozen_backbone)
        if self.config.batch_norm == "eval":
            for norm in self._norms:
                norm.eval()
        self._flat = pack[: self._size.learned].detach()
        self._flat.grad = torch.zeros_like(self._flat)
        pieces = self._flat.grad.split(self._slot_sizes[: len(self._learned)]) if self._learned else ()
        for slot, piece in zip(self._learned, pieces, strict=True):
            slot.requires_grad_().grad = piece.view(slot.shape)

    def _norm_sum(self) -> Tensor:
        """Norms of all learned tensors, head included."""
        norms = torch.stack([torch.linalg.vector_norm(rows) for rows in self._rows]).sum()
        return norms + norm_penalty(self._flat, self._lengths) if self._learned else norms

    def _selects(self, task: Task) -> bool:
        """Whether epochs are compared."""
        return self.config.selection != "last" and has_validation(task)

    @torch.no_grad()
    def _validation_hits(self, task: Task, index: int) -> int:
        """Validation rows that the live weights answer right."""
        assert task.val is not None
        device, size = self.setting.device, self.setting.batch_size
        training = [module for module in self.backbone.modules() if module.training]
        self.backbone.eval()
        hits = torch.zeros((), dtype=torch.int64, device=device)
        for rows, targets in zip(*(part.to(device).split(size) for part in task.val), strict=True):
            images = self.setting.read(rows, None, self.view)
            logits = F.linear(self.features(images, index), *self._head_rows(index))
            hits += (logits.argmax(1) == self._head_row[targets] - self._first(index)).sum()
        for module in training:
            module.training = True
        return int(hits)

    def _first(self, task: int) -> int:
        """Row of the head of the first class of a task."""
        return self._ends[task] - len(self._tasks[task])

    def _head_rows(self, task: int) -> list[Tensor]:
        """A task's rows of weight and bias, as tensors of their own over the same memory."""
        rows = slice(self._first(task), self._ends[task])
        return [p.detach()[rows] for p in (self.classifier.weight, self.classifier.bias)]


def has_validation(task: Task) -> bool:
    return task.val is not None and len(task.val[0]) > 0


def required(task: int | None) -> int:
    """The task id, which CLR cannot answer without."""
    if task is None:
        raise RunFailed("clr cannot answer without the task of an image: every test group must belong to one task")
    return task


def own_classes(setting: Setting) -> list[list[int]]:
    """Class ids of each task; refuses scenarios whose tasks share classes or bring none."""
    tasks: list[list[int]] = [classes.tolist() for classes in setting.task_classes]
    if not all(tasks) or len({c for classes in tasks for c in classes}) != sum(map(len, tasks)):
        raise InputError(
            f"clr gives each task a head of its own, but a task of scenario {setting.scenario_id} brings no new class "
            f"or a class of an earlier task: choose a scenario whose tasks do not share classes"
        )
    return tasks


def check_network(backbone: nn.Module, variant: str) -> None:
    """Refuse a backbone without the layers that a variant works on."""
    if variant == "linear":
        return
    name = getattr(backbone, "name", type(backbone).__name__)
    advice = (
        "choose a convolutional network (--backbone reduced-resnet18, resnet50.tv_in1k, mobilenetv2_100.ra_in1k ...), "
        "or set variant=linear for the probe"
    )
    convs = [module for module in backbone.modules() if isinstance(module, nn.Conv2d)]
    if not any(kernel_behind(conv, variant) for conv in convs):
        kind = "2-d convolution" if variant != "clr" else "2-d convolution with a kernel above 1x1"
        raise InputError(f"clr reprograms convolutions, but backbone {name} has no {kind}: {advice}")
    norms = batch_norms(backbone)
    if not norms:
        raise InputError(f"clr learns batch norms for each task, but backbone {name} has none: {advice}")
    if any(norm.momentum is None for norm in norms):
        raise InputError(f"clr needs batch norms with a momentum, but those of backbone {name} have none: {advice}")


METHOD = CLR
