"""A step of each online method against the same maths in bare PyTorch, interleaved in one process.

The floor is what a careful person writes in a notebook: images, labels and stored logits in tensors, a vectorised
reservoir, one loss and one optimiser step. It augments with the same batched view, which is arithmetic of the method;
what is measured is all that clbench adds: cursor, generators, reader, buffer, loss log, schedule.

python -m pytest benchmarks/test_online.py -s
"""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from parts import cifar_shaped, interleaved, loop_of, online_learner
from test_framework import record
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.backbones import build as build_backbone
from clbench.data.views import parse_view
from clbench.methods.registry import find

BATCH, CAPACITY, CLASSES = 10, 1000, 100
AUGMENTED = "random_resized_crop(32,scale=0.2:1) flip color_jitter(0.4,0.4,0.4,0.1,p=0.8) gray(0.2)"
VIEWS = {"er": "", "erace": "", "derpp": "pad_crop(4) flip", "pcr": AUGMENTED, "hpcr": AUGMENTED}
BUDGET = 1.05


class Memory:
    """Reservoir of uint8 images with labels and whatever else is stored, by the field's batch rule."""

    def __init__(self, shape: tuple[int, ...], **extra: int) -> None:
        self.x = torch.zeros((CAPACITY, *shape), dtype=torch.uint8)
        self.y = torch.zeros(CAPACITY, dtype=torch.int64)
        self.extra = {name: torch.zeros(CAPACITY, width) for name, width in extra.items()}
        self.seen = 0

    def draw(self, size: int) -> Tensor:
        return torch.randperm(min(self.seen, CAPACITY))[:size]

    def add(self, x: Tensor, y: Tensor, **extra: Tensor) -> None:
        place = max(min(CAPACITY - self.seen, len(x)), 0)
        slots = torch.arange(self.seen, self.seen + place)
        if place < len(x):
            slots = torch.cat([slots, (torch.rand(len(x) - place) * (self.seen + place)).long()])
        keep = slots < CAPACITY
        self.x[slots[keep]], self.y[slots[keep]] = x[keep], y[keep]
        for name, value in extra.items():
            self.extra[name][slots[keep]] = value[keep]
        self.seen += len(x)


class Floor:
    """Bare loops of the five methods on one set of images."""

    def __init__(self, name: str, images: Tensor, labels: Tensor, backbone: nn.Module) -> None:
        self.images, self.labels, self.view = images, labels, parse_view(VIEWS[name])
        self.rng = torch.Generator()
        self.backbone = copy.deepcopy(backbone)
        self.head = nn.Linear(160, CLASSES, bias=name not in ("pcr", "hpcr"))
        self.optimizer = torch.optim.SGD([*self.backbone.parameters(), *self.head.parameters()], lr=0.01)
        stored = {"derpp": {"logits": CLASSES}, "hpcr": {"logits": CLASSES, "features": 160}}
        self.memory = Memory(tuple(images.shape[1:]), **stored.get(name, {}))
        self.step: Callable[[int], None] = getattr(self, name)

    def augment(self, x: Tensor) -> Tensor:
        return self.view(x, self.rng)

    def net(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.backbone(x))
        return out

    def batch(self, start: int) -> tuple[Tensor, Tensor]:
        return self.images[start : start + BATCH], self.labels[start : start + BATCH]

    def er(self, start: int, masked: bool = False) -> None:
        x, y = self.batch(start)
        self.optimizer.zero_grad()
        logits = self.net(self.augment(x))
        if masked:
            absent = torch.ones(CLASSES, dtype=torch.bool)
            absent[y] = False
            logits = logits.masked_fill(absent, -torch.inf)
        F.cross_entropy(logits, y).backward()
        slots = self.memory.draw(BATCH)
        if len(slots):
            F.cross_entropy(self.net(self.augment(self.memory.x[slots])), self.memory.y[slots]).backward()
        self.optimizer.step()
        self.memory.add(x, y)

    def erace(self, start: int) -> None:
        self.er(start, masked=True)

    def derpp(self, start: int) -> None:
        x, y = self.batch(start)
        self.optimizer.zero_grad()
        logits, memory = self.net(self.augment(x)), self.memory
        loss = F.cross_entropy(logits, y)
        if memory.seen:
            one, two = memory.draw(BATCH), memory.draw(BATCH)
            loss = loss + 0.2 * F.mse_loss(self.net(self.augment(memory.x[one])), memory.extra["logits"][one])
            loss = loss + F.cross_entropy(self.net(self.augment(memory.x[two])), memory.y[two])
        loss.backward()
        self.optimizer.step()
        memory.add(x, y, logits=logits.detach())

    def pcr(self, start: int, distil: bool = False) -> None:
        x, y = self.batch(start)
        memory, slots = self.memory, self.memory.draw(BATCH)
        fresh = self.backbone(torch.cat([x / 255, self.augment(x)]))
        stored = {}
        if distil:
            features = fresh[:BATCH].detach()
            stored = {"logits": cosines(features, self.head.weight.detach()), "features": features}
        if len(slots):
            old = memory.x[slots]
            replayed = self.backbone(torch.cat([old / 255, self.augment(old)]))
            targets = torch.cat([memory.y[slots].repeat(2), y.repeat(2)])
            log_counts = torch.bincount(targets, minlength=CLASSES).log()
            scores = cosines(torch.cat([replayed, fresh]), self.head.weight)
            loss = F.cross_entropy(scores + log_counts, targets) + log_counts[targets].mean()
            if distil:
                loss = (0.5625 + 0.61875 * (1 - math.cos(0.0126 * start))) * loss
                kept = {name: value[slots].repeat(2, 1) for name, value in memory.extra.items()}
                loss = loss + 0.1 * ((scores[: len(replayed)] - kept["logits"]).square()[:, targets]).mean()
                itself = torch.eye(len(replayed), dtype=torch.bool)
                now, then = (cosines(v, v).masked_fill(itself, -torch.inf) for v in (replayed, kept["features"]))
                loss = loss - 0.5 * (then.softmax(1) * now.log_softmax(1).masked_fill(itself, 0)).sum(1).mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        memory.add(x, y, **stored)

    def hpcr(self, start: int) -> None:
        self.pcr(start, distil=True)


def cosines(a: Tensor, b: Tensor) -> Tensor:
    return F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / 0.09


@pytest.mark.parametrize("name", list(VIEWS))
def test_step_reduced_resnet18(benchmark, name: str) -> None:
    steps = 3
    network = build_backbone("reduced-resnet18", in_shape=(3, 32, 32), seed=0)
    network.to(memory_format=torch.channels_last)
    store = cifar_shaped(CLASSES, 60, 10)
    cls = find(name).cls
    learner = online_learner(
        store, cls, network, tasks=10, batch=BATCH, view=VIEWS[name], capacity=CAPACITY, replay_batch_size=BATCH,
        lr=0.01,
    )  # fmt: skip
    learner.stream.read.views["raw"] = learner.stream.read.views["test"] = parse_view("")
    plan, ours = loop_of(learner, 1, steps)  # the second task: HPCR distils from it on
    floor = Floor(name, store.images[plan.rows], plan.targets, network)

    def bare() -> None:
        for step in range(steps):
            floor.step(step * BATCH)

    for _ in range(2):  # something in both memories
        ours(), bare()
    ratio, left, right = interleaved(ours, bare, rounds=12)
    what = f"{name} step, reduced ResNet-18, online, 10 tasks of 10 classes, capacity 1,000"
    record(benchmark, what, BUDGET, ratio, left / steps, right / steps, "step")
    benchmark.pedantic(ours, rounds=1)
