"""What reprogramming costs: a CLR step in clbench's loop against a bare step of the network with frozen convolutions.

Both train all batch norms and a head by Adam; CLR adds its depthwise kernels, its norm penalty, and the loop.

python -m pytest benchmarks/test_clr.py --benchmark-enable -s
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
from clbench.methods.clr import CLR, batch_norms
from clbench.stream import Cursor

BATCH, CLASSES = 32, 10


def clr_learner(network: nn.Module, size: int) -> Learner:
    config = CLR.Config()
    return task_learner(network, CLR, config, num_classes=CLASSES, batch=BATCH, size=size)


class DenseStep:
    """The floor: batch norms and head by Adam, convolutions frozen, float images in memory, nothing else."""

    def __init__(self, network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.network, self.images, self.labels = network.requires_grad_(False).train(), images, labels
        self.head = nn.Linear(int(network.num_features), CLASSES)
        affine = [p.requires_grad_() for norm in batch_norms(network) for p in norm.parameters()]
        self.optimizer = torch.optim.Adam([*affine, *self.head.parameters()], lr=1e-3, fused=True)

    def step(self, index: int) -> None:
        cut = slice(index * BATCH, (index + 1) * BATCH)
        loss = F.cross_entropy(self.head(self.network(self.images[cut])), self.labels[cut])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


# A kernel costs what its channels cost to move: little beside full convolutions, half a step beside depthwise ones.
@pytest.mark.parametrize(
    ("name", "size", "steps", "rounds", "budget"),
    [("reduced-resnet18", 32, 2, 15, 1.35), ("resnet18", 64, 1, 10, 1.25), ("mobilenetv2_100", 64, 1, 10, 1.65)],
)
def test_clr_step(benchmark, name: str, size: int, steps: int, rounds: int, budget: float) -> None:
    options = {} if name == "reduced-resnet18" else {"pretrained": False}
    network = build_backbone(name, in_shape=(3, size, size), seed=0, options=options)
    network.to(memory_format=torch.channels_last)  # as a run has it
    plain = copy.deepcopy(network)
    learner = clr_learner(network, size)
    task = learner.scenario.tasks[0]
    plan = learner.plans()[0][0]._replace(iterations=steps)
    learner.task_starts.append(0)
    learner.method.begin_phase(task, plan.phase, learner.at)
    learner.method.open_phase(task, plan.phase, learner.at)

    def ours() -> None:
        learner.at = Cursor(0, 0, 0, 0, learner.at.step)
        for _ in learner._run_phase(plan):
            pass

    floor = DenseStep(plain, learner.stream.read.store.images[plan.rows].float() / 255, plan.targets)

    def bare() -> None:
        for index in range(steps):
            floor.step(index)

    ratio, left, right = interleaved(ours, bare, rounds)
    what = f"CLR step, {name}, {size} px, batch {BATCH}, against frozen convolutions without kernels"
    record(benchmark, what, budget, ratio, left / steps, right / steps, "step")
    benchmark.pedantic(ours, rounds=1)
