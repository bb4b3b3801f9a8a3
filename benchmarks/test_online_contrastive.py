"""A step of UER and of SCR against the same maths in bare PyTorch, interleaved in one process.

As `test_online.py`: the floor has uint8 images and labels in tensors, a vectorised reservoir, and augments with the
same batched view. It runs the losses as a notebook would have them; answers are no part of a step.

python -m pytest benchmarks/test_online_contrastive.py -s
"""

import copy

import pytest
import torch
from parts import cifar_shaped, interleaved, loop_of, online_learner
from test_framework import record
from test_online import AUGMENTED, BATCH, BUDGET, CAPACITY, CLASSES, Memory
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.backbones import build as build_backbone
from clbench.data.views import parse_view
from clbench.methods.registry import find

VIEWS = {"uer": "", "scr": AUGMENTED}
REPLAY = {"uer": BATCH, "scr": 100}
STEPS = {"uer": 3, "scr": 1}


class Floor:
    """Bare loops of both methods on one set of images."""

    def __init__(self, name: str, images: Tensor, labels: Tensor, backbone: nn.Module) -> None:
        self.images, self.labels, self.view = images, labels, parse_view(VIEWS[name])
        self.rng = torch.Generator()
        self.backbone = copy.deepcopy(backbone)
        projection = nn.Sequential(nn.Linear(160, 160), nn.ReLU(), nn.Linear(160, 128))
        self.head: nn.Module = projection if name == "scr" else nn.Linear(160, CLASSES, bias=False)
        self.optimizer = torch.optim.SGD([*self.backbone.parameters(), *self.head.parameters()], lr=0.01)
        self.memory = Memory(tuple(images.shape[1:]))
        self.step = {"uer": self.uer, "scr": self.scr}[name]

    def uer(self, start: int) -> None:
        x, y = self.images[start : start + BATCH], self.labels[start : start + BATCH]
        self.optimizer.zero_grad()
        cosines = F.normalize(self.backbone(x / 255), dim=1) @ F.normalize(self.head.weight, dim=1).T
        F.cross_entropy(cosines / 0.09, y).backward()
        slots = self.memory.draw(BATCH)
        if len(slots):
            F.cross_entropy(self.head(self.backbone(self.memory.x[slots] / 255)), self.memory.y[slots]).backward()
        self.optimizer.step()
        self.memory.add(x, y)

    def scr(self, start: int) -> None:
        x, y = self.images[start : start + BATCH], self.labels[start : start + BATCH]
        slots = self.memory.draw(REPLAY["scr"])
        if len(slots):
            images, labels = torch.cat([self.memory.x[slots], x]), torch.cat([self.memory.y[slots], y])
            views = [self.head(self.backbone(view)) for view in (images / 255, self.view(images, self.rng))]
            z, labels = F.normalize(torch.cat(views), dim=1), labels.repeat(2)
            itself = torch.eye(len(z), dtype=torch.bool)
            positive = (labels[:, None] == labels) & ~itself
            log_prob = (z @ z.T / 0.1).masked_fill(itself, -torch.inf).log_softmax(1)
            loss = -(log_prob.masked_fill(~positive, 0).sum(1) / positive.sum(1)).mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        self.memory.add(x, y)


@pytest.mark.parametrize("name", list(VIEWS))
def test_step_reduced_resnet18(benchmark, name: str) -> None:
    steps = STEPS[name]
    network = build_backbone("reduced-resnet18", in_shape=(3, 32, 32), seed=0)
    network.to(memory_format=torch.channels_last)
    store = cifar_shaped(CLASSES, 60, 10)
    learner = online_learner(
        store, find(name).cls, network, tasks=10, batch=BATCH, view=VIEWS[name], capacity=CAPACITY,
        replay_batch_size=REPLAY[name], lr=0.01,
    )  # fmt: skip
    learner.stream.read.views["raw"] = learner.stream.read.views["test"] = parse_view("")
    plan, ours = loop_of(learner, 0, steps)
    floor = Floor(name, store.images[plan.rows], plan.targets, network)

    def bare() -> None:
        for step in range(steps):
            floor.step(step * BATCH)

    memory = learner.method.buffer
    while len(memory) < REPLAY[name]:  # whole replay batches in both
        cut = slice(len(memory), len(memory) + BATCH)
        memory.add(plan.rows[cut], plan.targets[cut], torch.Generator())
        floor.memory.add(floor.images[cut], floor.labels[cut])
    for _ in range(2):
        ours(), bare()
    ratio, left, right = interleaved(ours, bare, rounds=12)
    what = f"{name} step, reduced ResNet-18, online, 10 tasks of 10 classes, capacity 1,000, {REPLAY[name]} replayed"
    record(benchmark, what, BUDGET, ratio, left / steps, right / steps, "step")
    benchmark.pedantic(ours, rounds=1)
