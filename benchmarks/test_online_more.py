"""A step of the online methods that `test_online.py` leaves out against the same maths in bare PyTorch, interleaved.

As there: the floor has uint8 images and labels in tensors, augments with the same batched view, and makes the same
passes at the same batch sizes. Formulas of a paper come from the method's file (knn_shapley, ope_loss, ...); what is
around them is written as a notebook would: host numbers, `if`s, only what is needed.

python -m pytest benchmarks/test_online_more.py --benchmark-enable -s
"""

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from parts import cifar_shaped, interleaved, loop_of, online_learner
from scipy.stats import ttest_ind
from test_framework import record
from test_online import BATCH, BUDGET, CAPACITY, CLASSES, Memory
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.backbones import build as build_backbone
from clbench.data.classes import ClassTable
from clbench.data.reader import Reader
from clbench.data.views import parse_view
from clbench.evaluator import Evaluator, Schedule
from clbench.learner.learner import Learner
from clbench.learner.resolve import make_method
from clbench.methods.aser import knn_shapley
from clbench.methods.mvp import choose_prompts, feature_divisor, focal_loss, ignore_scores, prompt_contrast
from clbench.methods.onpro import instance_loss, mixed_cross_entropy, ope_loss, turned
from clbench.methods.plfms import frequent_label, pseudo_labels, relatives
from clbench.methods.registry import find
from clbench.scenarios import hle
from clbench.stream import Cursor, Plan, Stream

CROP = "pad_crop(4) flip"


# -- both sides of a measurement ---------------------------------------------------------------------------------------
def network_of(name: str) -> nn.Module:
    network = build_backbone(name, in_shape=(3, 32, 32), seed=0)
    return network if name == "vit-tiny-32" else network.to(memory_format=torch.channels_last)


def learner_of(name: str, backbone: str, view: str = "", batch: int = BATCH, **hyperparameters: Any) -> Learner:
    """Ten tasks of ten classes, online; only training is augmented."""
    store = cifar_shaped(CLASSES, 60, 10)
    learner = online_learner(
        store, find(name).cls, network_of(backbone), tasks=10, batch=batch, view=view, **hyperparameters
    )
    learner.stream.read.views["raw"] = learner.stream.read.views["test"] = parse_view("")
    return learner


def part_of(learner: Learner, plan: Plan, first: int, steps: int) -> Callable[[], None]:
    """As `loop_of`, for an opened phase of any number, from iteration `first` on."""
    cut = plan._replace(iterations=first + steps)

    def run() -> None:
        learner.at = Cursor(plan.task, plan.number, first, 0, learner.at.step)
        for _ in learner._run_phase(cut):
            pass

    return run


def seen_until(learner: Learner, task: int, number: int) -> tuple[Tensor, Tensor]:
    """Rows and targets of `number` training samples, drawn from all tasks up to and with this one."""
    tasks = learner.scenario.tasks[: task + 1]
    rows, targets = torch.cat([t.rows for t in tasks]), torch.cat([t.targets for t in tasks])
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:number]
    return rows[chosen], targets[chosen]


def measure(
    benchmark, learner: Learner, what: str, ours: Callable[[], None], bare: Callable[[], None], steps: int, rounds: int
) -> None:
    for _ in range(2):
        ours(), bare()
    ratio, left, right = interleaved(ours, bare, rounds)
    learner.losses.drain()  # fails if one of them is no number: a step that learns nothing is no measurement
    record(benchmark, f"{what}, online", BUDGET, ratio, left / steps, right / steps, "step")
    benchmark.pedantic(ours, rounds=1)


class Floor:
    """What the bare loops share: a task's images, a network, a linear head, an optimiser."""

    def __init__(
        self, learner: Learner, plan: Plan, view: str, optimizer: Callable[..., torch.optim.Optimizer]
    ) -> None:
        store = learner.stream.read.store
        self.images, self.labels, self.view = store.images[plan.rows], plan.targets, parse_view(view)
        self.rng, self.size = torch.Generator(), plan.batch_size
        self.backbone = copy.deepcopy(learner.method.backbone)
        self.num_classes = learner.scenario.num_classes
        self.head = nn.Linear(int(self.backbone.num_features), self.num_classes)
        self.parameters = [*self.backbone.parameters(), *self.head.parameters()]
        self.optimizer = optimizer(self.parameters)

    def batch(self, start: int) -> tuple[Tensor, Tensor]:
        return self.images[start : start + self.size], self.labels[start : start + self.size]

    def augment(self, x: Tensor) -> Tensor:
        return self.view(x, self.rng)

    def net(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.backbone(x))
        return out

    def descend(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def sgd(parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01)


# -- finetune ----------------------------------------------------------------------------------------------------------
def test_finetune(benchmark) -> None:
    steps = 6
    learner = learner_of("finetune", "reduced-resnet18", lr=0.01)
    plan, ours = loop_of(learner, 0, steps)
    floor = Floor(learner, plan, "", sgd)

    def bare() -> None:
        for step in range(steps):
            x, y = floor.batch(step * BATCH)
            floor.descend(F.cross_entropy(floor.net(floor.augment(x)), y))

    measure(benchmark, learner, "finetune step, reduced ResNet-18", ours, bare, steps, rounds=12)


# -- GDumb -------------------------------------------------------------------------------------------------------------
class BareGDumb(Floor):
    """Greedy balanced memory on the host, and a pass over it."""

    def __init__(self, learner: Learner, plan: Plan) -> None:
        super().__init__(learner, plan, "", sgd)
        self.x, self.y = torch.zeros((CAPACITY, 3, 32, 32), dtype=torch.uint8), torch.zeros(CAPACITY, dtype=torch.int64)
        self.places: dict[int, list[int]] = {}  # class -> slots, in the order of classes as they came
        self.held = 0

    def collect(self, x: Tensor, y: Tensor) -> None:
        for image, label in zip(x, y.tolist(), strict=True):
            share = CAPACITY // max(1, len(self.places))
            if label in self.places and len(self.places[label]) >= share:
                continue
            if self.held < CAPACITY:
                slot, self.held = self.held, self.held + 1
            else:
                largest = max(self.places.values(), key=len)
                slot = largest.pop(random.randrange(len(largest)))
            self.x[slot], self.y[slot] = image, label
            self.places.setdefault(label, []).append(slot)

    def learn(self, slots: Tensor) -> None:
        loss = F.cross_entropy(self.net(self.augment(self.x[slots])), self.y[slots])
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 10)
        self.optimizer.step()


def test_gdumb(benchmark) -> None:
    """RaptorMai's learner on split CIFAR-100 makes 3,000 steps on the memory behind 500 batches of a task."""
    steps, task = 6, 5
    learner = learner_of("gdumb", "reduced-resnet18", learner="raptormai", capacity=CAPACITY)
    collect, memory = learner.plans()[task]
    learner.task_starts += [0] * (task + 1)
    floor = BareGDumb(learner, collect)
    rows, targets = seen_until(learner, task - 1, 3000)
    learner.method.buffer.add(rows, targets, torch.Generator())
    floor.collect(learner.stream.read.store.images[rows], targets)
    learner.method.begin_phase(learner.scenario.tasks[task], memory.phase, learner.at)
    learner.method.open_phase(learner.scenario.tasks[task], memory.phase, learner.at)
    assert learner.method.num_held == floor.held == CAPACITY
    parts = part_of(learner, collect, 0, 1), part_of(learner, memory, 0, steps)
    order = torch.randperm(CAPACITY)

    def ours() -> None:
        for part in parts:
            part()

    def bare() -> None:
        floor.collect(*floor.batch(0))
        for step in range(steps):
            floor.learn(order[step * BATCH : (step + 1) * BATCH])

    what = "gdumb step on the memory and a sixth of a batch collected, reduced ResNet-18, capacity 1,000"
    measure(benchmark, learner, what, ours, bare, steps, rounds=12)


# -- ASER --------------------------------------------------------------------------------------------------------------
class BareASER(Floor):
    """K-nearest-neighbour Shapley values with a memory that is full."""

    def __init__(self, learner: Learner, plan: Plan) -> None:
        super().__init__(learner, plan, "", sgd)
        self.memory = Memory((3, 32, 32))

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        self.backbone.eval()
        features: Tensor = self.backbone(x / 255)
        self.backbone.train()
        return features

    def balanced(self, excluded: Tensor) -> Tensor:
        """Slots of two exemplars of each class, but for those excluded."""
        order = torch.randperm(CAPACITY)
        order = order[~excluded[order]]
        order = order[self.memory.y[order].argsort(stable=True)]
        labels = self.memory.y[order]
        counts = labels.bincount(minlength=CLASSES)
        return order[torch.arange(len(order)) - (counts.cumsum(0) - counts)[labels] < 2]

    def step(self, start: int) -> None:
        (x, y), memory = self.batch(start), self.memory
        excluded = torch.zeros(CAPACITY, dtype=torch.bool)
        mine = self.balanced(excluded)
        excluded[mine] = True
        theirs = self.balanced(excluded)
        features = self.encode(torch.cat([memory.x[mine], memory.x[theirs], x]))
        own, others, stream = features.split([len(mine), len(theirs), len(x)])
        along = knn_shapley(others, memory.y[theirs], own, memory.y[mine], 3).mean(0)
        against = knn_shapley(stream, y, own, memory.y[mine], 3).mean(0)
        slots = mine[(along - against).topk(BATCH).indices]
        images, labels = torch.cat([memory.x[slots], x]), torch.cat([memory.y[slots], y])
        self.descend(F.cross_entropy(self.net(self.augment(images)), labels))
        self.keep(x, y)

    def keep(self, x: Tensor, y: Tensor) -> None:
        memory, excluded = self.memory, torch.zeros(CAPACITY, dtype=torch.bool)
        points = self.balanced(excluded)
        excluded[points] = True
        drawn = torch.randperm(CAPACITY)
        drawn = drawn[~excluded[drawn]][: 2 * CLASSES]
        features = self.encode(torch.cat([memory.x[points], memory.x[drawn], x]))
        held, others, stream = features.split([len(points), len(drawn), len(x)])
        rare = (memory.y == y[:, None]).float().mean(1) < torch.rand(()) / CLASSES
        value = knn_shapley(
            torch.cat([held, stream[rare]]), torch.cat([memory.y[points], y[rare]]),
            torch.cat([others, stream]), torch.cat([memory.y[drawn], y]), 3,
        ).sum(0)  # fmt: skip
        best = torch.zeros(len(value), dtype=torch.bool)
        best[value.topk(len(drawn)).indices] = True
        leave, enter = drawn[~best[: len(drawn)]], best[len(drawn) :]
        memory.x[leave], memory.y[leave] = x[enter], y[enter]


@pytest.mark.parametrize("task", [9, 2])
def test_aser(benchmark, task: int) -> None:
    """As many of each class, so that both encode 410 images where all classes are seen: one more or less would decide
    whether an activation passes 32 MiB, which glibc then maps anew each time (11 to 36 % more CPU time)."""
    learner = learner_of("aser", "reduced-resnet18", lr=0.01, capacity=CAPACITY, replay_batch_size=BATCH)
    plan, ours = loop_of(learner, task, 1)
    floor = BareASER(learner, plan)
    rows, targets = seen_until(learner, task, 60 * CLASSES)
    rank = torch.stack([(targets == label).cumsum(0) for label in range(CLASSES)])[targets, torch.arange(len(targets))]
    chosen = rank.argsort(stable=True)[:CAPACITY]
    learner.method.buffer.add(rows[chosen], targets[chosen], torch.Generator())
    floor.memory.add(learner.stream.read.store.images[rows[chosen]], targets[chosen])
    what = f"aser step, reduced ResNet-18, capacity 1,000 full, {10 * task + 10} of 100 classes seen"
    measure(benchmark, learner, what, ours, lambda: floor.step(0), 1, rounds=6)


# -- CLIB and PL-FMS ---------------------------------------------------------------------------------------------------
HELD = 200


class BareImportance(Floor):
    """CLIB's memory and learning rate, both methods' steps. Losses run over seen classes of a sample's label level."""

    def __init__(self, learner: Learner, plan: Plan, view: str) -> None:
        super().__init__(learner, plan, view, lambda p: torch.optim.Adam(p, lr=3e-4, fused=True))
        classes = learner.scenario.classes
        self.level, self.kin = classes.level, relatives(classes.parent)
        self.same = self.level[:, None] == self.level
        self.related = torch.arange(self.num_classes)[:, None].repeat(1, classes.num_levels)
        self.length = learner.scenario.offsets[-1]
        self.x, self.y = torch.zeros((HELD, 3, 32, 32), dtype=torch.uint8), torch.zeros(HELD, dtype=torch.int64)
        self.importance, self.loss, self.draws = torch.zeros(HELD), torch.zeros(HELD), torch.zeros(HELD)
        self.arrived = torch.zeros(HELD, dtype=torch.int64)
        self.met: dict[int, int] = {}  # class -> number of its first sample
        self.open = torch.zeros(self.num_classes, dtype=torch.bool)
        self.count = self.refreshed_at = self.refreshes = self.turned_at = 0
        self.before, self.high, self.falls = torch.zeros(HELD), True, {True: [], False: []}
        self.rates = {True: 3e-4, False: 0.95 * 3e-4}

    def add(self, x: Tensor, y: Tensor) -> None:
        for image, label in zip(x, y.tolist(), strict=True):
            self.met.setdefault(label, self.count)
            self.open[label] = True
            slot = self.count
            if slot >= HELD:
                counts = self.y.bincount(minlength=self.num_classes)
                counts[label] += 1
                losing = (self.y[:, None] == self.related[int(counts.argmax())]).any(1).nonzero()[:, 0]
                slot = int(losing[self.importance[losing].argmin()])
            others = self.importance[: self.count][self.y[: self.count] == label]
            self.importance[slot] = others.mean() if len(others) else self.importance.mean()
            self.x[slot], self.y[slot], self.loss[slot], self.arrived[slot] = image, label, 0, self.count
            self.count += 1

    def losses(self, logits: Tensor, y: Tensor) -> Tensor:
        allowed = self.open if len(self.related[0]) == 1 else self.open & self.same[y]
        return F.cross_entropy(logits.masked_fill(~allowed, -torch.inf), y, reduction="none")

    def train(self, x: Tensor, y: Tensor) -> None:
        """CutMix inside each level half of the time, one step."""
        x = self.augment(x)
        if random.random() < 0.5:
            partner, span = torch.arange(len(y)), (1 - random.random()) ** 0.5
            for level in range(len(self.related[0])):
                group = (self.level[y] == level).nonzero()[:, 0]
                partner[group] = group[torch.randperm(len(group))]
            half, middle = int(32 * span) // 2, [int(32 * random.random()) for _ in range(2)]
            top, left = (max(m - half, 0) for m in middle)
            bottom, right = (min(m + half, 32) for m in middle)
            x[:, :, top:bottom, left:right] = x[partner][:, :, top:bottom, left:right]
            share = 1 - (bottom - top) * (right - left) / 32**2
            logits = self.net(x)
            loss = share * self.losses(logits, y) + (1 - share) * self.losses(logits, y[partner])
        else:
            loss = self.losses(self.net(x), y)
        self.descend(loss.mean())

    @torch.no_grad()
    def refresh(self) -> None:
        """All exemplars' losses, what they say of importance, pseudo-labels where there are levels, learning rate."""
        self.backbone.eval()
        logits = self.net(self.x / 255)
        self.backbone.train()
        loss = self.losses(logits, self.y)
        kept = self.arrived < self.refreshed_at
        change = (loss - self.loss)[kept].mean() if kept.any() else 0.0
        drawn, number = self.draws > 0, max(float(self.draws.sum()), 1)
        mean = (self.importance * self.draws).sum() / number
        self.importance[drawn] -= 0.1 * (change - mean / number)
        self.loss, self.refreshed_at = loss, self.count
        self.draws.zero_()
        if len(self.related[0]) > 1:
            allowed = self.kin[self.y] & self.open
            for level in range(len(self.related[0])):
                labels = pseudo_labels(logits, allowed & (self.level == level))
                self.related[:, level] = frequent_label(self.y, labels, self.num_classes)
        self.refreshes += 1
        if self.refreshes % 10 == 0:
            self.turn()

    def turn(self) -> None:
        """The other rate; Welch's test, if both have been in use ten times."""
        kept = self.arrived < self.turned_at
        if self.refreshes > 20:
            self.falls[self.high].append(float((self.before - self.loss)[kept].mean()) if kept.any() else 0.0)
        self.before, self.turned_at, self.high = self.loss.clone(), self.count, not self.high
        low, high = self.falls[False][-10:], self.falls[True][-10:]
        if len(low) == len(high) == 10:
            p = ttest_ind(low, high, equal_var=False, alternative="greater").pvalue
            if p < 0.05 or p > 0.95:
                factor = 0.95 if p < 0.05 else 1 / 0.95
                self.rates = {key: rate * factor for key, rate in self.rates.items()}
                self.falls = {True: [], False: []}
        self.optimizer.param_groups[0]["lr"] = self.rates[self.high]

    def clib(self, start: int) -> None:
        self.add(*self.batch(start))
        slots = torch.randperm(HELD)[:16]
        self.draws[slots] += 1
        self.train(self.x[slots], self.y[slots])
        self.refresh()

    def plfms(self, start: int, first: bool) -> None:
        x, y = self.batch(start)
        if first:
            self.add(x, y)
        elapsed = torch.tensor([self.count - 1 - self.met[label] for label in y.tolist()])
        used = torch.rand(len(y)) < elapsed * len(self.met) / self.length
        slots = torch.randperm(HELD)[: 2 * len(y) - int(used.sum())]
        self.draws[slots] += 1
        self.train(torch.cat([x[used], self.x[slots]]), torch.cat([y[used], self.y[slots]]))


def test_clib(benchmark) -> None:
    batch = 16
    learner = learner_of(
        "clib", "reduced-resnet18", CROP, batch, capacity=HELD, replay_batch_size=16, importance_every=1
    )
    plan, ours = loop_of(learner, 1, 1)
    floor = BareImportance(learner, plan, CROP)
    rows, targets = seen_until(learner, 0, 2 * HELD)
    learner.method.memory.add(rows, targets)
    floor.add(learner.stream.read.store.images[rows], targets)
    what = f"clib step, reduced ResNet-18, batches of 16, {HELD} exemplars whose losses are measured in every step"
    measure(benchmark, learner, what, ours, lambda: floor.clib(0), 1, rounds=8)


def two_level_learner(updates: int, **hyperparameters: Any) -> Learner:
    """100 fine classes, 5 to each coarse one; all images with coarse labels, then with fine ones in 5 tasks."""
    flat, name = cifar_shaped(CLASSES, 60, 10), "plfms"
    names = tuple(map(str, range(CLASSES + 20)))
    level = torch.tensor([1] * CLASSES + [0] * 20)
    parent = torch.cat([CLASSES + torch.arange(CLASSES) // 5, torch.full((20,), -1)])
    store = replace(flat, classes=ClassTable(names, level, parent))
    scenario = hle.build([store.table()], 0, hle.Params())
    reader = Reader(store, {"train": CROP, "test": ""})
    stream = Stream(scenario, reader, seed=0, batch_size=8, updates=updates)
    method = find(name).cls
    made = make_method(method, method.Config(**hyperparameters), network_of("reduced-resnet18"), scenario, stream)
    evaluator = Evaluator(scenario, reader, view="test", mask="all", per_group=1, slots=1, seed=0)
    return Learner(scenario, stream, made, evaluator, Schedule(0))


def test_plfms(benchmark) -> None:
    updates = 5
    learner = two_level_learner(updates, capacity=HELD, importance_every=updates)
    plan, _ = loop_of(learner, 1, 1)
    batch = HELD // plan.batch_size  # those ahead of it are in the memory: classes that are there have been seen
    ours = part_of(learner, plan, batch, 1)
    floor = BareImportance(learner, plan, CROP)
    coarse = learner.plans()[0][0]
    rows = torch.cat([coarse.rows[:HELD], plan.rows[:HELD]])
    targets = torch.cat([coarse.targets[:HELD], plan.targets[:HELD]])
    learner.method.memory.add(rows, targets)
    floor.add(learner.stream.read.store.images[rows], targets)

    def bare() -> None:
        for update in range(updates):
            floor.plfms(HELD, first=update == 0)
        floor.refresh()

    what = f"plfms step, reduced ResNet-18, two label levels, batches of 8 + 8, {HELD} exemplars measured every 5 steps"
    measure(benchmark, learner, what, ours, bare, updates, rounds=6)


# -- MVP ---------------------------------------------------------------------------------------------------------------
class BareMVP(Floor):
    """A frozen transformer with ten expert prompts and a reservoir (MVP-R)."""

    def __init__(self, learner: Learner, plan: Plan) -> None:
        super().__init__(learner, plan, CROP, sgd)
        self.net_ = self.backbone.net if hasattr(self.backbone, "net") else self.backbone
        self.net_.requires_grad_(False).eval()
        width = int(self.net_.embed_dim)
        self.general = nn.Parameter(torch.randn(2, 5, width))
        self.expert = nn.Parameter(torch.randn(10, 3, 20, width))
        self.keys = nn.Parameter(torch.randn(10, width))
        self.mask = nn.Parameter(torch.full((10, self.num_classes), -1.0))
        self.counts = torch.zeros(10, dtype=torch.int64)
        pool = [self.general, self.expert, self.keys, self.mask]
        self.optimizer = torch.optim.Adam([*pool, *self.head.parameters()], lr=5e-3)
        self.open = torch.zeros(self.num_classes, dtype=torch.bool)
        self.memory = Memory((3, 32, 32))

    def encode(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            tokens = self.net_._pos_embed(self.net_.patch_embed(x))
            query = tokens
            for block in self.net_.blocks[:-1]:
                query = block(query)
        self.choice = choose_prompts(query[:, 0], self.keys, self.counts)
        expert, number = self.expert[self.choice.picked], tokens.shape[1]
        for index, block in enumerate(self.net_.blocks):
            if index < 2:
                tokens = torch.cat([tokens, self.general[index].expand(len(x), -1, -1)], dim=1)
            elif index < 5:
                tokens = torch.cat([tokens, expert[:, index - 2]], dim=1)
            tokens = block(tokens)[:, :number]
        out: Tensor = self.net_.norm(tokens)[:, 0]
        return out

    def step(self, start: int) -> None:
        new, label = self.batch(start)
        self.open[label] = True
        slots = self.memory.draw(self.size)
        x = torch.cat([self.augment(new), self.augment(self.memory.x[slots])])
        y = torch.cat([label, self.memory.y[slots]])
        features = self.encode(x)
        mask = 2 * self.mask[self.choice.picked].sigmoid()
        divisor = feature_divisor(features, self.head.weight, y, 0.5)
        logits = (self.head(features / divisor[:, None]) * mask).masked_fill(~self.open, -torch.inf)
        losses = F.cross_entropy(logits, y, reduction="none")
        with torch.no_grad():
            plain = (self.head(features) * mask).masked_fill(~self.open, -torch.inf)
            ignored = ignore_scores(features, plain, mask, y)
        contrast = prompt_contrast(self.choice, self.keys, self.counts)
        self.counts += self.choice.picked.bincount(minlength=10)
        self.descend(focal_loss(losses, ignored, 0.5, 2.0) + contrast)
        self.memory.add(new, label)


def test_mvp(benchmark) -> None:
    learner = learner_of("mvp", "vit-tiny-32", CROP, capacity=CAPACITY, replay_batch_size=BATCH)
    plan, ours = loop_of(learner, 1, 1)
    floor = BareMVP(learner, plan)
    rows, targets = seen_until(learner, 0, CAPACITY)
    learner.method.buffer.add(rows, targets, torch.Generator())
    floor.memory.add(learner.stream.read.store.images[rows], targets)
    floor.open[learner.scenario.tasks[0].classes] = True
    what = "mvp step (MVP-R), vit-tiny-32 with random weights, batches of 10 + 10, capacity 1,000"
    measure(benchmark, learner, what, ours, lambda: floor.step(0), 1, rounds=8)


# -- OnPro -------------------------------------------------------------------------------------------------------------
class BareOnPro(Floor):
    """A step behind the first task, feedback included, with small batches and two variants of each image."""

    def __init__(self, learner: Learner, plan: Plan, replayed: int, variants: int) -> None:
        super().__init__(learner, plan, "flip gray(0.25) random_resized_crop(32,scale=0.3:1)", sgd)
        self.project = nn.Linear(int(self.backbone.num_features), 128)
        self.optimizer = torch.optim.Adam(
            [*self.parameters, *self.project.parameters()], lr=5e-4, betas=(0.9, 0.99), weight_decay=1e-4
        )
        self.memory, self.replayed, self.variants = Memory((3, 32, 32)), replayed, variants
        self.prototypes = torch.zeros(CLASSES, 128)

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.backbone(x)
        return F.normalize(features, dim=1), F.normalize(self.project(features), dim=1)

    def similarity(self, features: Tensor, projected: Tensor) -> Tensor:
        offset = random.randrange(features.shape[1] - 128)
        return projected @ features[:, offset : offset + 128].T + projected @ projected.T

    def twice(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.augment(x)])

    def mixed(self, slots: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Adaptive prototypical feedback: nine tenths mixed among each other, the rest pairs of close classes."""
        memory, even = self.memory, int(0.9 * len(slots))
        chosen = slots[torch.randperm(len(slots))]
        first, second = chosen.clone(), chosen.clone()
        second[:even] = chosen[:even][torch.randperm(even)]
        share = torch.zeros(len(slots))
        if random.random() < 0.2:
            share[:even] = 0.6 * torch.rand(even)
        known = self.prototypes.abs().sum(1).nonzero()[:, 0]
        pairs = torch.tensor(list(combinations(known.tolist(), 2)))
        distance = (self.prototypes[pairs[:, 0]] - self.prototypes[pairs[:, 1]]).norm(dim=1)
        wanted = pairs[torch.multinomial((1 / distance).softmax(0), len(slots) - even, replacement=True)]
        for place, pair in enumerate(wanted.tolist(), start=even):
            inside = [(memory.y == label).nonzero()[:, 0] for label in pair]
            first[place], second[place] = (random.choice(found) for found in inside)
            if random.random() < 0.2:
                share[place] = random.betavariate(0.4, 0.4)
        part = share[:, None, None, None]
        images = (1 - part) * (memory.x[first] / 255) + part * (memory.x[second] / 255)
        return images, memory.y[first], memory.y[second], share

    def step(self, start: int) -> None:
        (x, y), memory = self.batch(start), self.memory
        slots = memory.draw(self.replayed)
        images, first, second, share = self.mixed(slots)
        stream = self.twice(turned(x / 255, self.variants))
        features, projected = self.embed(torch.cat([stream, self.twice(turned(images, self.variants))]))
        cut, shift = len(stream), CLASSES * torch.arange(self.variants)[:, None]
        loss = instance_loss(
            self.similarity(features[:cut], projected[:cut]), (y + shift).flatten(), 0.07, plain=False
        ) + instance_loss(
            self.similarity(features[cut:], projected[cut:]),
            ((1 - share.double()) * first + share.double() * second + shift).flatten(), 0.07, plain=True,
        )  # fmt: skip
        own = ope_loss(projected[: len(x)], projected[cut // 2 : cut // 2 + len(x)], y, CLASSES, 0.5)[0]
        _, replayed = self.embed(self.twice(memory.x[slots] / 255))
        kept, one, two = ope_loss(*replayed.chunk(2), memory.y[slots], CLASSES, 0.5)
        self.prototypes = (one + two).detach() / 2
        logits = self.net(self.augment(images))
        self.descend(loss + own + kept + mixed_cross_entropy(logits, first, second, share))
        memory.add(x, y)


def test_onpro(benchmark) -> None:
    batch, replayed, variants = 4, 6, 2
    learner = learner_of(
        "onpro", "resnet18-cifar", "", batch, capacity=CAPACITY, replay_batch_size=replayed, variants=variants
    )
    plan, _ = loop_of(learner, 1, 1)
    ours = part_of(learner, plan, 1, 1)  # the first batch of a task has no feedback
    floor = BareOnPro(learner, plan, replayed, variants)
    rows, targets = seen_until(learner, 0, CAPACITY)
    learner.method.buffer.add(rows, targets, torch.Generator())
    floor.memory.add(learner.stream.read.store.images[rows], targets)
    floor.prototypes[:10] = torch.randn(10, 128)
    what = f"onpro step, ResNet-18 for CIFAR, batches of {batch} + {replayed}, {variants} variants, capacity 1,000"
    measure(benchmark, learner, what, ours, lambda: floor.step(0), 1, rounds=4)
