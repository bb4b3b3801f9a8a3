"""Parts that the benchmarks share: a CIFAR-shaped store, a learner made of real parts, and interleaved timing."""

import gc
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from clbench.data.classes import TEST, TRAIN, ClassTable
from clbench.data.reader import Reader
from clbench.data.store import ImageStore
from clbench.evaluator import Evaluator, Schedule
from clbench.learner.learner import Learner
from clbench.learner.resolve import make_method
from clbench.methods.base import Method
from clbench.rng import generator
from clbench.scenarios.class_incremental import Params, build
from clbench.scenarios.model import StreamDefaults
from clbench.stream import Cursor, Plan, Stream


def cifar_shaped(num_classes: int, train: int, test: int, size: int = 32) -> ImageStore:
    """Random uint8 images; speed does not depend on what they show."""
    per = train + test
    labels = torch.arange(num_classes).repeat_interleave(per)
    images = torch.randint(0, 256, (len(labels), 3, size, size), generator=generator(0, "bench"), dtype=torch.uint8)
    split = torch.where(torch.arange(len(labels)) % per < train, TRAIN, TEST).to(torch.uint8)
    names = tuple(map(str, range(num_classes)))
    classes = ClassTable(names, torch.zeros(num_classes, dtype=torch.int64), torch.full((num_classes,), -1))
    return ImageStore(images, labels, split, classes, "random", "0" * 64)


def online_learner(
    store: ImageStore,
    method: type[Method],
    backbone: nn.Module,
    *,
    tasks: int,
    batch: int,
    view: str = "",
    per_group: int = 100,
    **hyperparameters: object,
) -> Learner:
    """An online class-incremental learner without evaluation, put together as a run would be."""
    scenario = build(
        [store.table()], 0, Params(tasks=tasks, online=True), defaults=StreamDefaults(batch_size=batch, drop_last=True)
    )
    reader = Reader(store, {"train": view, "test": view})
    stream = Stream(scenario, reader, seed=0)
    made = make_method(method, method.Config(**hyperparameters), backbone, scenario, stream)
    evaluator = Evaluator(scenario, reader, view="test", mask="all", per_group=per_group, slots=4096, seed=0)
    return Learner(scenario, stream, made, evaluator, Schedule(0))


def loop_of(learner: Learner, task: int, steps: int) -> tuple[Plan, Callable[[], None]]:
    """The first phase of a task cut to `steps`, opened, and a function that runs it from its start: the learner's loop
    alone, without a task's end and without files."""
    plan = learner.plans()[task][0]._replace(iterations=steps)
    learner.task_starts += [0] * (task + 1)
    learner.method.open_phase(learner.scenario.tasks[task], plan.phase, learner.at)

    def run() -> None:
        learner.at = Cursor(task, 0, 0, 0, learner.at.step)
        for _ in learner._run_phase(plan):
            pass

    return plan, run


def task_learner(network: nn.Module, method: type[Method], config: object, *, num_classes: int, batch: int, size: int):
    """A learner of one task with the task id known, one batch per class, without evaluation."""
    store = cifar_shaped(num_classes, batch, 2, size)
    scenario = build([store.table()], 0, Params(tasks=1, setting="task"), defaults=StreamDefaults(batch_size=batch))
    reader = Reader(store, {"train": "", "test": ""})
    stream = Stream(scenario, reader, seed=0)
    made = make_method(method, config, network, scenario, stream)
    evaluator = Evaluator(scenario, reader, view="test", mask="task", per_group=1, slots=1, seed=0)
    return Learner(scenario, stream, made, evaluator, Schedule(0))


class Free(nn.Module):
    """A backbone that costs almost nothing: the pixels as features."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.num_features = pixels

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)


def interleaved(ours: Callable[[], None], floor: Callable[[], None], rounds: int) -> tuple[float, float, float]:
    """A B A B ...: median over rounds of the CPU-time ratio of neighbours, and both medians in milliseconds.

    Ratios of neighbours cancel what the machine does meanwhile; call with one torch thread.
    """
    ours(), floor()
    ratios, left, right = [], [], []
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            begin = time.process_time()
            ours()
            middle = time.process_time()
            floor()
            end = time.process_time()
            left.append((middle - begin) * 1e3)
            right.append((end - middle) * 1e3)
            ratios.append(left[-1] / right[-1])
    finally:
        gc.enable()
    return statistics.median(ratios), statistics.median(left), statistics.median(right)
