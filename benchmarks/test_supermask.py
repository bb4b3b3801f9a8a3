"""What supermasks cost: steps of ExSSNeT in clbench's loop against a bare dense step of the same network.

Both train the network's convolutions or linear layers by Adam on the same images. The mask phase adds a selection of
the largest scores in each layer, masked weights and the gradient of the scores; the weight phase a product with what
may be written; both the loop. Targets are positions within the task and batch norms not affine in both.

python -m pytest benchmarks/test_supermask.py --benchmark-enable -s
"""

import copy

import pytest
import torch
from parts import interleaved, task_learner
from test_framework import record
from torch import nn
from torch.nn import functional as F

from clbench.backbones import build as build_backbone
from clbench.learner.learner import Learner
from clbench.methods.exssnet import ExSSNeT
from clbench.stream import Cursor

BATCH, CLASSES = 64, 20


def exssnet_learner(network: nn.Module, size: int) -> Learner:
    config = ExSSNeT.Config(selection="last", scheduler="cosine")
    return task_learner(network, ExSSNeT, config, num_classes=CLASSES, batch=BATCH, size=size)


class DenseStep:
    """The floor: all weights by Adam, no biases, batch norms without affine part, float images in memory."""

    def __init__(self, network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.weight = module.bias = None
            elif isinstance(module, nn.Linear | nn.Conv2d):
                module.bias = None
        self.network, self.images, self.labels = network.train(), images, labels
        self.head = nn.Linear(int(network.num_features), CLASSES, bias=False)
        self.optimizer = torch.optim.Adam([*network.parameters(), *self.head.parameters()], lr=1e-3, fused=True)

    def step(self, index: int) -> None:
        cut = slice(index * BATCH, (index + 1) * BATCH)
        loss = F.cross_entropy(self.head(self.network(self.images[cut])), self.labels[cut])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


@pytest.mark.parametrize("phase", ["mask", "weight"])
@pytest.mark.parametrize(
    ("name", "size", "steps", "rounds"),
    [("reduced-resnet18", 32, 1, 12), ("mlp-300-100", 16, 10, 40)],  # 16 px: 768 inputs, MNIST has 784
)
def test_supermask_step(benchmark, name: str, size: int, steps: int, rounds: int, phase: str) -> None:
    network = build_backbone(name, in_shape=(3, size, size), seed=0)
    network.to(memory_format=torch.channels_last)  # as a run has it
    plain = copy.deepcopy(network)
    learner = exssnet_learner(network, size)
    method, task = learner.method, learner.scenario.tasks[0]
    for number, plan in enumerate(learner.plans()[0]):  # on to the phase in question, without its steps
        learner.at = learner.at._replace(phase=number)
        method.begin_phase(task, plan.phase, learner.at)
        method.open_phase(task, plan.phase, learner.at)
        if plan.phase.name == phase:
            break
        method.end_phase(task, plan.phase, learner.at)
    plan = plan._replace(iterations=steps)
    learner.task_starts.append(0)

    def ours() -> None:
        learner.at = Cursor(0, plan.number, 0, 0, learner.at.step)
        for _ in learner._run_phase(plan):
            pass

    floor = DenseStep(plain, learner.stream.read.store.images[plan.rows].float() / 255, plan.targets)

    def bare() -> None:
        for index in range(steps):
            floor.step(index)

    ratio, left, right = interleaved(ours, bare, rounds)
    what = f"ExSSNeT {phase} step, {name}, 3 x {size} x {size}, batch {BATCH}, against a dense step"
    record(benchmark, what, 1.1, ratio, left / steps, right / steps, "step")
    benchmark.pedantic(ours, rounds=1)
