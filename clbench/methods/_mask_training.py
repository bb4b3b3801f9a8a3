"""What SupSup, SSNeT and ExSSNeT share: one supermask per task over weights that the tasks have in common.

Card `exssnet`. Each task has a mask and batch-norm statistics of its own; all layers are masked, the one head included,
so that masks alone tell the tasks' heads apart. Targets are positions within the task.

Same as the official code: signed constants, fresh Kaiming scores per task, top-k of |s| in each layer, straight-through
gradients, Adam, its two readings of rate and scheduler (`rates`, `scheduler`), the weight phase behind the last mask
epoch, KKT. Different: epochs are compared on rows kept out of training, not on the test set, and what is compared is
what is kept (there, the last task's answers come from its last epoch). Of those few rows many epochs get all right, so
that the official comparison over all phases (`selection=task`) mostly drops the weight phase; the default compares the
epochs of the last phase. Every earlier task sees the same images in KKT; a mask is selected, not sorted for.

Shapes: B batch, C classes of the scenario, c outputs of the head, D features, P masked weights, S batch-norm numbers, T
tasks.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau

from clbench.errors import InputError
from clbench.methods._knn_transfer import choose_sources, mean_scores, neighbour_accuracy, num_batches
from clbench.methods._supermask import MaskedNetwork, overlap, pack_bits, score_gradient, unpack_bits
from clbench.methods.base import Method, Setting, freeze, hp
from clbench.scenarios.model import Task
from clbench.stream.types import Batch, Cursor, Phase

__all__ = ["MaskTraining", "SupermaskConfig", "WeightConfig"]

CACHE_BYTES = 256 * 2**20  # masked weights of earlier tasks that are kept ready
SURELY_ALL = 20  # rows kept out per class, from which on a class without any is no chance
NEVER = -1e4  # logit of classes that a task's head does not have


@dataclass(frozen=True)
class SupermaskConfig:
    """Defaults are those of the official vision configuration (card, section 3)."""

    density: float = hp(
        0.1, "share of each layer's weights that a mask keeps", low=0.0, high=1.0, source="official code",
        tune={"choices": [0.05, 0.1, 0.2, 0.5]},
    )  # fmt: skip
    mask_lr: float = hp(
        0.01, "learning rate of the scores (Adam)", low=0.0, high=10.0, scale="log", source="official code",
        tune={"low": 1e-4, "high": 1e-2},
    )  # fmt: skip
    weight_decay: float = hp(0.0, "weight decay of the scores", low=0.0, high=1.0, source="official code: 0")
    scheduler: str = hp(
        "official", "rate over a phase: cosine to 0 (cosine), or that and a plateau rule which is fed the accuracy and "
        "cuts the rate while it rises (official)", choices=("official", "cosine"), source="official code; card, 6.2",
    )  # fmt: skip
    selection: str = hp(
        "phase", "what of a task is kept: on rows kept out of training the best epoch of its last phase, the latest of "
        "equal ones (phase), or of all its phases, the first of equal ones (task); or its last epoch (last)",
        choices=("phase", "task", "last"), source="ours; official code: task, on the test set (card, 6.3 and 6.4)",
    )  # fmt: skip
    val_share: float = hp(
        0.1, "share of a task's training rows kept out where the scenario keeps none (its parameter val_share)",
        low=0.0, high=0.9, source="ours; card, 6.3",
    )  # fmt: skip
    transfer: str = hp(
        "none", "scores that a task starts from: random (none), or by KKT those of the earlier task whose features "
        "tell its classes apart best (knn_best; knn_always: also at chance; knn_all: mean of all above chance)",
        choices=("none", "knn_best", "knn_always", "knn_all"), source="official code: none; the paper's KKT: knn_best",
    )  # fmt: skip
    neighbours: int = hp(200, "nearest neighbours of KKT", low=1, high=100_000, source="official code")


@dataclass(frozen=True)
class WeightConfig(SupermaskConfig):
    """Rates as in the official command (card, section 3)."""

    weight_lr: float = hp(
        1e-3, "learning rate of the weights (Adam)", low=0.0, high=10.0, scale="log", source="official README",
        tune={"low": 1e-4, "high": 1e-2},
    )  # fmt: skip
    weight_epochs: int | None = hp(
        None, "epochs of the weight phase; without it as many as the mask phase has (--epochs)", low=0, high=100_000
    )
    rates: str = hp(
        "official", "rate of the mask phase: weight_lr too, as the official code has it (official), or mask_lr (own)",
        choices=("official", "own"), source="official code; card, 6.1",
    )  # fmt: skip


class MaskTraining(Method):
    """Trains a mask per task: phases `probe` (KKT) and `mask`. A subclass may add phases behind them.

    A task that hasn't begun answers with the mask of its first scores.

    State, all flat: `weights` (P,); `scores` (P,) of the current task; `effective` (P,) what the current task computes
    with; `masks` (T, P/8) and `used` (P/8,) bits; `statistics` (T, S); scores of finished tasks only for KKT.
    """

    mask: ClassVar[Any] = "task"
    small_backbone = "mlp-300-100"
    signed = True  # masks of |s|; else of s
    extra_outputs = 0  # outputs of the head that no class has
    config: SupermaskConfig

    def __init__(self, config: SupermaskConfig, backbone: nn.Module, setting: Setting) -> None:
        super().__init__(config, backbone, setting)
        self._name = type(self).__name__.lower()
        device, num_tasks = setting.device, len(setting.task_classes)
        self._tasks = own_classes(setting, self._name)
        self._num_outputs = max(map(len, self._tasks))
        width = int(backbone.num_features)  # type: ignore[arg-type]  # nn.Module hides the type of attributes
        self.classifier = nn.Linear(width, self._num_outputs + self.extra_outputs, bias=False).to(device)
        self._network = MaskedNetwork(backbone, self.classifier, config.density, self._name)
        freeze(backbone), freeze(self.classifier)  # what is learned lies in the flat vectors
        self._position = torch.zeros(setting.num_classes, dtype=torch.int64, device=device)  # of a class in its task
        for classes in self._tasks:
            self._position[classes] = torch.arange(len(classes), device=device)
        self._class_at = [torch.tensor(classes, device=device) for classes in self._tasks]
        last = list(backbone.modules())[-1]
        self._last_relu = last if isinstance(last, nn.ReLU) else None  # of a network that ends in one

        network, num_bytes = self._network, math.ceil(len(self._network) / 8)
        self.weights = network.weights
        self.scores = torch.zeros_like(self.weights)
        self.effective = torch.zeros_like(self.weights)
        self.masks = torch.zeros((num_tasks, num_bytes), dtype=torch.uint8, device=device)
        self.used = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self.statistics = network.statistics.repeat(num_tasks, 1)
        self.finished_scores: list[Tensor] = []  # one (P,) per finished task, with `transfer`
        self.num_finished = 0
        self.current: int | None = None  # the task whose network is in `effective`
        self.overlaps: list[float] = []  # per finished task, percent of its mask that was used
        self.sources: list[list[int]] = []  # per begun task, where its scores came from

        self.best_hits = -1
        self.best: list[Tensor] = []  # weights, scores and statistics at the best epoch of the task
        self.probe_features = self.weights[:0].clone()  # (t, N, D) under each earlier mask
        self.probe_targets = torch.zeros(0, dtype=torch.int64, device=device)
        self.probed = 0  # images looked at
        self.optimizer: torch.optim.Adam | None = None
        self.plateau: ReduceLROnPlateau | None = None
        self.cosine: CosineAnnealingLR | None = None
        self._cache: dict[int, Tensor] = {}
        self._gradient = torch.zeros_like(self.weights)  # of what is being trained

    # -- phases --------------------------------------------------------------------------------------------------
    def phases(self, task: Task, index: int) -> Sequence[Phase]:
        self._check_rows(task, index)
        rows = len(task.rows) - self._num_held(task)
        alone = bool(self._network.norms) and rows % self.setting.batch_size == 1  # no batch norm over one image
        common: dict[str, Any] = {"first": rows, "drop_last": alone}
        phases = []
        if self.config.transfer != "none" and index > 0:
            batches = num_batches(-(-rows // self.setting.batch_size))
            phases.append(Phase("probe", iterations=batches, updates=1, first=rows, drop_last=False))
        return [*phases, Phase("mask", epochs=self.setting.epochs, **common), *self.more_phases(common)]

    def more_phases(self, common: Mapping[str, Any]) -> Sequence[Phase]:
        """Phases behind the mask's, over the same rows."""
        return []

    def begin_phase(self, task: Task, phase: Phase, at: Cursor) -> None:
        self._cache.clear()
        if phase.name == "probe":
            rows = min(phase.first or 0, (phase.iterations or 0) * self.setting.batch_size)
            self.probe_features = self.weights.new_zeros((self.num_finished, rows, self.classifier.in_features))
            self.probe_targets = self._position.new_zeros(rows)
            self.probed = 0
        elif phase.name == "mask":
            sources = self.sources[at.task] if len(self.sources) > at.task else []
            self.sources = [*self.sources[: at.task], sources]
            if sources:
                self.scores.copy_(mean_scores([self.finished_scores[j] for j in sources]))
            else:
                self.scores.copy_(self._first_scores(at.task))
            self.statistics[at.task] = self._network.statistics
            self.current, self.best, self.best_hits = at.task, [], -1
            self._refresh()

    def open_phase(self, task: Task, phase: Phase, at: Cursor) -> None:
        if phase.name == "probe":
            self._network.train(False)
        elif phase.name == "mask":
            self.open_training(self.scores, self.config.mask_lr, phase, at, self.config.weight_decay)

    def open_training(self, learned: Tensor, rate: float, phase: Phase, at: Cursor, decay: float = 0.0) -> None:
        """Adam over one flat vector, the schedulers, and the current task's network in training mode."""
        self._network.install(self.effective, self.statistics[at.task])
        self._network.train(True)
        self.optimizer = torch.optim.Adam([learned], lr=rate, weight_decay=decay, fused=True)
        if self.config.scheduler == "official":
            self.plateau = ReduceLROnPlateau(self.optimizer)
        self.cosine = CosineAnnealingLR(self.optimizer, T_max=max(phase.epochs or 1, 1))

    def step(self, batch: Batch) -> Mapping[str, Tensor]:
        if batch.phase.name == "probe":
            self._probe(batch)
            return {}
        loss = self.loss(batch)
        layers = self._network.layers
        parts = zip(layers(self.scores), layers(self.weights), self._network.gradients(loss), strict=True)
        for (scores, weights, gradient), out in zip(parts, layers(self._gradient), strict=True):
            score_gradient(scores, weights, gradient, signed=self.signed, out=out)
        self.scores.grad = self._gradient
        assert self.optimizer is not None
        self.optimizer.step()
        self._refresh()
        return {"loss": loss.detach()}

    def loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy of a batch by the current task's network, over all outputs of the head."""
        return F.cross_entropy(self._network(batch.images), self._position[batch.targets])

    def end_epoch(self, task: Task, phase: Phase, at: Cursor) -> bool:
        """Keep the epoch if it is the best of the task so far, and move the rate. Both readings are the official
        scheduler's recursion: cosine first, then the plateau rule."""
        if phase.name == "probe":
            return False
        hits, num = self._validate(task, at.task) if self._wants_validation else (0, 1)
        first_of_equal = self.config.selection == "task"
        if self.config.selection != "last" and hits >= self.best_hits + first_of_equal:
            self.best_hits = hits
            self.best = [self.live_weights().clone(), self.scores.clone(), self.statistics[at.task].clone()]
        assert self.cosine is not None
        self.cosine.step()
        if self.plateau is not None:
            self.plateau.step(hits / num)
        return False

    def end_phase(self, task: Task, phase: Phase, at: Cursor) -> None:
        if phase.name == "probe":
            self._choose(at.task)
            return
        self.close_training()
        self.masks[at.task] = pack_bits(self._mask() != 0)
        if phase.name == self.phases(task, at.task)[-1].name:
            self.finish(at.task)

    def close_training(self) -> None:
        self._network.train(False)
        self.optimizer = self.plateau = self.cosine = None
        self.scores.grad = self.effective.grad = None

    def finish(self, task: int) -> None:
        """Behind a task: the best epoch's network is the task's; its mask counts as used."""
        if self.best:
            weights, scores, statistics = self.best
            self.weights.copy_(weights)
            self.scores.copy_(scores)
            self.statistics[task] = statistics
            self.masks[task] = pack_bits(self._mask() != 0)
        mask, used = (unpack_bits(bits, len(self._network)) for bits in (self.masks[task], self.used))
        self.overlaps = [*self.overlaps[:task], overlap(mask, used)[0]]
        self.used |= self.masks[task]
        if self.config.transfer != "none":
            self.finished_scores = [*self.finished_scores[:task], self.scores.clone()]
        self.current, self.best = None, []
        self.num_finished = task + 1
        self._cache.clear()
        self._network.install(self.weights, self._network.statistics)

    # -- KKT -----------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def _probe(self, batch: Batch) -> None:
        """Features of a batch under every earlier mask."""
        cut = slice(self.probed, self.probed + len(batch.targets))
        for earlier in range(self.num_finished):
            with self._network.showing(self.effective_of(earlier), self.statistics[earlier]):
                self.probe_features[earlier, cut] = self._penultimate(batch.images)
        self.probe_targets[cut] = self._position[batch.targets]
        self.probed += len(batch.targets)

    def _choose(self, task: int) -> None:
        """Where the scores of a task come from."""
        targets, num_classes = self.probe_targets[: self.probed], len(self._tasks[task])
        accuracies = [
            float(neighbour_accuracy(features[: self.probed], targets, self.config.neighbours, num_classes))
            for features in self.probe_features
        ]
        chosen = choose_sources(accuracies, num_classes, self.config.transfer)
        before = self.sources[:task] + [[]] * (task - len(self.sources))
        self.sources = [*before, chosen]
        self.probe_features, self.probe_targets = self.probe_features[:0].clone(), self.probe_targets[:0].clone()

    def _penultimate(self, images: Tensor) -> Tensor:
        """What KKT compares: features, of a network that ends in a ReLU what goes into it (card, section 2)."""
        if self._last_relu is None:
            features: Tensor = self.backbone(images)
            return features
        seen: list[Tensor] = []
        hook = self._last_relu.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        try:
            self.backbone(images)
        finally:
            hook.remove()
        return seen[-1]

    # -- networks of the tasks -----------------------------------------------------------------------------------
    def effective_of(self, task: int) -> Tensor:
        """(P,) weights that a task computes with: masked weights of finished tasks are kept ready while they last."""
        if task == self.current:
            return self.effective
        cached = self._cache.get(task)
        if cached is not None:
            return cached
        if task < self.num_finished:
            mask = unpack_bits(self.masks[task], len(self._network)).to(self.weights.dtype)
        else:
            mask = self._mask(self._first_scores(task))
        effective = self.live_weights() * mask
        if self.weights_rest:
            if (len(self._cache) + 1) * effective.nbytes > CACHE_BYTES and self._cache:
                self._cache.pop(next(iter(self._cache)))
            self._cache[task] = effective
        return effective

    @property
    def weights_rest(self) -> bool:
        """Whether no step changes weights of finished tasks now."""
        return True

    def live_weights(self) -> Tensor:
        """(P,) weights as they are at this step."""
        return self.weights

    def _first_scores(self, task: int) -> Tensor:
        return self._network.draw_scores(self.setting.rng("supermask-scores", task))

    def _mask(self, scores: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """(P,) of 0 and 1."""
        return self._network.mask(self.scores if scores is None else scores, out)

    def _refresh(self) -> None:
        """Effective weights from the scores as they are now."""
        with torch.no_grad():
            self._mask(out=self.effective)
            self.effective.mul_(self.weights)

    # -- answers -------------------------------------------------------------------------------------------------
    def features(self, images: Tensor, task: int | None) -> Tensor:
        """(B, C, H, W) -> (B, D) by the network of `task`."""
        task = self.required(task)
        with self._network.showing(self.effective_of(task), self.statistics[task]):
            out: Tensor = self.backbone(images)
        return out

    def classify(self, features: Tensor, allowed: Tensor, task: int | None) -> Tensor:
        task = self.required(task)
        weight = self._network.layers(self.effective_of(task))[-1]
        classes = self._class_at[task]
        logits = F.linear(features.to(weight.dtype), weight)[:, : len(classes)]
        every = logits.new_full((len(logits), self.setting.num_classes), NEVER)
        return every.index_copy_(1, classes, logits)

    def required(self, task: int | None) -> int:
        """The task id, which a mask cannot be chosen without."""
        if task is None:
            raise InputError(
                f"{self._name} cannot answer without the task of an image: every test group must belong to one task"
            )
        return task

    def memory_bytes(self) -> dict[str, int]:
        """Bytes kept for the tasks finished so far: bits of masks, batch-norm statistics, scores that KKT may copy."""
        return {
            "masks": self.num_finished * self.masks.shape[1],
            "batch_norm_statistics": self.num_finished * self.statistics.shape[1] * self.statistics.element_size(),
            "scores": sum(scores.nbytes for scores in self.finished_scores),
        }

    # -- validation ----------------------------------------------------------------------------------------------
    @property
    def _wants_validation(self) -> bool:
        return self.config.selection != "last" or self.config.scheduler == "official"

    def _num_held(self, task: Task) -> int:
        """Last rows of a task that are not trained on: in canonical order they are a random sample."""
        if not self._wants_validation or (task.val is not None and len(task.val[0])):
            return 0
        return round(self.config.val_share * len(task.rows))

    def _num_val(self, task: Task) -> int:
        return self._num_held(task) or (0 if task.val is None else len(task.val[0]))

    @torch.no_grad()
    def _validate(self, task: Task, index: int) -> tuple[int, int]:
        """Validation rows that the current network answers right, and how many there are."""
        device, size, held = self.setting.device, max(self.setting.batch_size, 256), self._num_held(task)
        if held:
            rows, targets = task.rows[-held:], task.targets[-held:]
            domain = None if task.domain is None else task.domain[-held:].to(device)
        else:
            assert task.val is not None
            (rows, targets), domain = task.val, None
        rows, targets = rows.to(device), targets.to(device)
        self.backbone.eval()
        hits = torch.zeros((), dtype=torch.int64, device=device)
        for start in range(0, len(rows), size):
            cut = slice(start, start + size)
            images = self.setting.read(rows[cut], None if domain is None else domain[cut], self.view)
            logits = self._network(images)[:, : len(self._tasks[index])]
            hits += (logits.argmax(1) == self._position[targets[cut]]).sum()
        self.backbone.train()
        return int(hits), len(rows)

    def _check_rows(self, task: Task, index: int) -> None:
        """Refuse rows that a task's head or its validation cannot work with."""
        where, config = f"task {index} of {self.setting.scenario_id}", self.config
        if not bool(torch.isin(task.targets, task.classes).all()):
            raise InputError(
                f"{self._name} gives each task classes of its own, but {where} has rows of other tasks' classes: "
                f"choose a scenario whose tasks do not share classes"
            )
        if self._wants_validation and not self._num_val(task):
            raise InputError(
                f"{self._name} compares epochs on rows kept out of training, but {where} keeps none: raise val_share, "
                f"or set selection=last and scheduler=cosine"
            )
        held = self._num_held(task)
        num_left = len(task.targets) - held
        left, kept = (part.unique().tolist() for part in task.targets.split([num_left, held]))
        classes = set(left) | set(kept)
        lacking = classes - set(left)
        if held >= SURELY_ALL * len(classes):  # of that many rows each class has one, unless they are sorted by class
            lacking |= classes - set(kept)
        if lacking:
            raise InputError(
                f"{self._name} keeps the last {held} rows of {where} for validation, but class "
                f"{self.setting.classes.names[min(lacking)]!r} is then only in one of the two parts: let the scenario "
                f"keep validation rows (--scenario-set val_share={config.val_share}), or set selection=last and "
                f"scheduler=cosine"
            )
        if self._network.norms and min(num_left, self.setting.batch_size) < 2:
            raise InputError(
                f"{self._name} trains with batch norms, which need two images at least, but {where} has {num_left} "
                f"rows in batches of {self.setting.batch_size}: raise --batch-size"
            )


def own_classes(setting: Setting, method: str) -> list[list[int]]:
    """Class ids of each task; refuses scenarios whose tasks share classes or bring none, and online ones."""
    where = f"scenario {setting.scenario_id}"
    if setting.online:
        raise InputError(f"{method} reads each task several times, but {where} is online: choose one with epochs")
    tasks: list[list[int]] = [classes.tolist() for classes in setting.task_classes]
    if not all(tasks) or len({c for classes in tasks for c in classes}) != sum(map(len, tasks)):
        raise InputError(
            f"{method} gives each task classes of its own, but a task of {where} brings no new class or a class of an "
            f"earlier task: choose a scenario whose tasks do not share classes"
        )
    return tasks
