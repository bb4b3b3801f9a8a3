"""SHARP: its nearest-neighbour answers against a loop over classes, its step against a dense one of the same network.

python -m tox -e benchmarks -- benchmarks/test_sharp.py
"""

import pytest
import torch
from parts import interleaved
from test_framework import record
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.backbones import build as build_backbone
from clbench.data.classes import ClassTable
from clbench.methods._class_vectors import ClassVectors
from clbench.methods.base import Setting
from clbench.methods.sharp import SHARP, SHARPConfig, has_partner, supcon_loss
from clbench.rng import generator
from clbench.scenarios.model import Task
from clbench.stream.types import Batch, Cursor

CLASSES, TASKS, VECTORS, WIDTH, NEIGHBOURS = 100, 10, 50, 1024, 5  # CIFAR-100, VGG_Small
PER_TASK = CLASSES // TASKS
QUERIES = 512  # what the evaluator asks at once


def loop_predict(queries: Tensor, stored: list[Tensor], units: list[Tensor], num: int) -> Tensor:
    """Distances class by class as differences of all pairs, then a vote for each query by itself."""
    distances, labels = [], []
    for label, (vectors, mask) in enumerate(zip(stored, units, strict=True)):
        own, asked = F.normalize(vectors[:, mask], dim=1), F.normalize(queries[:, mask], dim=1)
        distances.append((own[:, None] - asked[None]).square().sum(-1).sqrt())
        labels += [label] * len(vectors)
    together, names = torch.cat(distances), torch.tensor(labels)
    answers = [names[together[:, i].topk(num, largest=False).indices].mode().values for i in range(len(queries))]
    return torch.stack(answers)


def test_knn_against_a_loop_over_classes(benchmark) -> None:
    rng = generator(0, "bench")
    queries = torch.randn((QUERIES, WIDTH), generator=rng).relu()
    stored = [torch.randn((VECTORS, WIDTH), generator=rng).relu() for _ in range(CLASSES)]
    learned = torch.rand(WIDTH, generator=rng) * TASKS  # task in which a unit learned; classes know earlier ones
    units = [learned < label // PER_TASK + 1 for label in range(CLASSES)]
    memory = ClassVectors(CLASSES, torch.device("cpu"))
    for first in range(0, CLASSES, PER_TASK):
        classes = range(first, first + PER_TASK)
        memory.store([stored[label] for label in classes], classes, units[first])
    allowed = torch.ones(CLASSES, dtype=torch.bool)

    def ours() -> Tensor:
        return memory.votes(queries, allowed, NEIGHBOURS).argmax(1)

    def loop() -> Tensor:
        return loop_predict(queries, stored, units, NEIGHBOURS)

    assert torch.equal(ours(), loop())
    ratio, left, right = interleaved(ours, loop, rounds=5)
    what = "SHARP: answers to 512 images, 100 classes of 50 vectors, 1,024 units, against a loop over classes"
    record(benchmark, what, 1 / 20, ratio, left, right, "batch")
    benchmark.pedantic(ours, rounds=3)


class DenseStep:
    """The same maths with dense layers in bare PyTorch: replayed activations as floats in memory, no masks, no ages."""

    def __init__(self, net: nn.Module, activations: Tensor, labels: Tensor, temperature: float) -> None:
        self.net, self.activations, self.labels, self.temperature = net, activations, labels, temperature
        self.optimizer = torch.optim.Adadelta(net.parameters(), lr=1.0)

    def __call__(self, images: Tensor, targets: Tensor) -> None:
        drawn = torch.randint(len(self.labels), (len(targets),))
        hidden = torch.cat([self.net.early(images), self.activations[drawn]])
        labels = torch.cat([targets, self.labels[drawn]])
        keep = torch.cat([has_partner(targets), torch.ones(len(drawn), dtype=torch.bool)])
        loss = supcon_loss(self.net.from_early(hidden), labels, self.temperature, keep)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def sharp_on(name: str, shape: tuple[int, int, int], batch: int) -> SHARP:
    """SHARP in the first training phase of its second episode, half of its units learned."""
    device = torch.device("cpu")
    table = ClassTable(tuple("0123"), torch.zeros(4, dtype=torch.int64), torch.full((4,), -1))
    images = torch.rand((400, *shape), generator=generator(0, "images"))
    setting = Setting(
        classes=table, classes_per_task=(2, 2), task_classes=(torch.tensor([0, 1]), torch.tensor([2, 3])),
        image_shape=shape, image_bytes=images[0].numel(), device=device, scenario_id="bench@1", setting="class",
        online=False, epochs=1, batch_size=batch, updates_per_batch=1, prompts={},
        read=lambda rows, domain=None, view="train", rng=None: images[rows],
        rng=lambda purpose, *keys: generator(0, purpose, *keys),
    )  # fmt: skip
    method = SHARP(
        SHARPConfig(min_activation=50.0, tau_period=4.0), build_backbone(name, in_shape=shape, seed=0), setting
    )
    seen = torch.ones(4, dtype=torch.bool)
    for index in range(2):
        task = Task(torch.arange(100), torch.arange(100) % 2 + 2 * index, torch.tensor([2 * index, 2 * index + 1]))
        selection, training = method.phases(task, index)
        at = Cursor(index, 0, 0, 0, 0)
        method.step(Batch(images[:100], task.targets, task.rows, None, seen, at, selection, 0))
        method.end_phase(task, selection, at)
        method.open_phase(task, training, at._replace(phase=1))
        if index == 0:
            method.end_phase(task, training, at._replace(phase=1))
    assert len(method.memory) == 2
    assert (method.ages[-1] >= 2).any()
    return method


@pytest.mark.parametrize(
    ("name", "shape", "batch", "rounds"), [("mnistlike", (1, 28, 28), 256, 15), ("vgg-small", (3, 32, 32), 32, 5)]
)
def test_step_against_a_dense_one(benchmark, name: str, shape: tuple[int, int, int], batch: int, rounds: int) -> None:
    method = sharp_on(name, shape, batch)
    dense_net = build_backbone(name, in_shape=shape, seed=0).net
    activations = torch.cat([method.memory.of_class(label) for label in (0, 1)])
    dense = DenseStep(dense_net, activations, torch.arange(2).repeat_interleave(len(activations) // 2), 0.1)
    images = torch.rand((batch, *shape), generator=generator(1, "images"))
    targets = torch.arange(batch) % 2 + 2
    phase = method.phases(Task(targets, targets, targets), 1)[1]
    step = 0

    def ours() -> None:
        nonlocal step
        step += 1
        at = Cursor(1, 1, step, 0, step)
        method.step(Batch(images, targets, targets, None, torch.ones(4).bool(), at, phase, 0))

    def bare() -> None:
        dense(images, targets)

    ratio, left, right = interleaved(ours, bare, rounds)
    record(benchmark, f"SHARP: step of {name} with masks and 8-bit replay, batches of {batch}, against a dense step",
           1.10, ratio, left, right, "step")  # fmt: skip
    benchmark.pedantic(ours, rounds=1)
