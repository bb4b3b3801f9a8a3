"""What clbench adds to the maths, against the bare floor in the same process, interleaved.

python -m tox -e benchmarks
"""

import subprocess
import sys
import time

import torch
from floor import FloorER, floor_evaluate
from parts import Free, cifar_shaped, interleaved, loop_of, online_learner
from torch import nn

from clbench.backbones import build as build_backbone
from clbench.methods.er import ER
from clbench.rng import generator
from clbench.stream import Cursor

BATCH, CAPACITY = 10, 1000


def record(benchmark, what: str, budget: float, ratio: float, ours_ms: float, floor_ms: float, per: str, better="low"):
    benchmark.extra_info.update(
        what=what, budget=budget, ratio=round(ratio, 3), ours_ms=round(ours_ms, 4), floor_ms=round(floor_ms, 4),
        per=per, better=better,
    )  # fmt: skip
    print(f"\n{what}: {ratio:.3f} x floor (budget {budget}); {ours_ms:.3f} ms against {floor_ms:.3f} ms per {per}")


def er_pair(backbone: nn.Module, head: int, steps: int, tasks: int = 1):
    """Two closures of `steps` ER steps each, on the same images: clbench's whole loop, and the floor's."""
    store = cifar_shaped(head, 60, 10)
    learner = online_learner(
        store, ER, backbone, tasks=tasks, batch=BATCH, capacity=CAPACITY, replay_batch_size=BATCH, lr=0.01
    )
    plan, ours = loop_of(learner, 0, steps)
    images = store.images[plan.rows].float() / 255
    features = int(backbone.num_features)
    copy = type(backbone)(*backbone.arguments) if hasattr(backbone, "arguments") else backbone
    model = nn.Sequential(copy, nn.Linear(features, head))
    floor = FloorER(images, plan.targets, model, lr=0.01, capacity=CAPACITY, batch=BATCH)

    def bare() -> None:
        for step in range(steps):
            floor.step(step * BATCH)

    return ours, bare


def test_er_step_free_model(benchmark) -> None:
    steps = 50
    ours, bare = er_pair(Free(3072), 10, steps)
    for _ in range(3):  # fill the memories
        ours(), bare()
    ratio, left, right = interleaved(ours, bare, rounds=25)
    record(benchmark, "one ER step, model that costs nothing", 1.5, ratio, left / steps, right / steps, "step")
    benchmark.pedantic(ours, rounds=3)


def test_stream_and_replay_batch_no_model(benchmark) -> None:
    steps = 50
    store = cifar_shaped(10, 60, 10)
    learner = online_learner(store, ER, Free(3072), tasks=1, batch=BATCH, capacity=CAPACITY)
    stream, method = learner.stream, learner.method
    plan = learner.plans()[0][0]
    count = 0

    def ours() -> None:
        nonlocal count
        for iteration in range(steps):
            batch = stream.batch(plan, Cursor(0, 0, iteration, 0, count))
            drawn = method.buffer.sample(BATCH, generator(0, "replay", count))
            stream.read(drawn.rows, None, "train")
            method.buffer.add(batch.rows, batch.targets, generator(0, "reservoir", count))
            count += 1

    images = store.images[plan.rows].float() / 255
    floor = FloorER(images, plan.targets, nn.Linear(1, 1), lr=0.01, capacity=CAPACITY, batch=BATCH)

    def bare() -> None:
        for step in range(steps):
            floor.draw(step * BATCH)

    for _ in range(3):
        ours(), bare()
    ratio, left, right = interleaved(ours, bare, rounds=25)
    record(benchmark, "stream + replay batch, no model", 1.5, ratio, left / steps, right / steps, "step")
    benchmark.pedantic(ours, rounds=3)


def evaluation_pair(backbone: nn.Module, per_group: int, chunk: int):
    store = cifar_shaped(10, 10, per_group // 2)
    learner = online_learner(store, ER, backbone, tasks=5, batch=BATCH, per_group=per_group, capacity=10)
    evaluator, method = learner.evaluator, learner.method
    model = nn.Sequential(method.backbone, method.classifier)
    subset = evaluator.subset
    images = store.images[subset.rows].float() / 255
    hits = torch.zeros(5, dtype=torch.int64)

    def ours() -> None:
        evaluator.points.clear(), evaluator.active.clear()
        evaluator.observe(method, 4, 0, 1, 10**6)

    def bare() -> None:
        floor_evaluate(model, images, subset.targets, subset.group, hits, chunk)

    return ours, bare


def test_one_evaluation_of_500_images_free_model(benchmark) -> None:
    ours, bare = evaluation_pair(Free(3072), 100, 100)
    ratio, left, right = interleaved(ours, bare, rounds=60)
    record(benchmark, "one evaluation of 500 images, model that costs nothing", 1.5, ratio, left, right, "evaluation")
    benchmark.pedantic(ours, rounds=5)


def test_er_step_reduced_resnet18(benchmark) -> None:
    steps = 4
    network = build_backbone("reduced-resnet18", in_shape=(3, 32, 32), seed=0)
    ours, bare = er_pair(network, 100, steps, tasks=10)
    ratio, left, right = interleaved(ours, bare, rounds=20)
    record(
        benchmark,
        "ER step, reduced ResNet-18, online, 10 tasks of 10 classes, capacity 1,000",
        1.05,
        ratio,
        left / steps,
        right / steps,
        "step",
    )
    benchmark.pedantic(ours, rounds=1)


def test_evaluation_throughput_reduced_resnet18(benchmark) -> None:
    network = build_backbone("reduced-resnet18", in_shape=(3, 32, 32), seed=0)
    ours, bare = evaluation_pair(network, 200, 500)
    ratio, left, right = interleaved(ours, bare, rounds=10)
    record(benchmark, "evaluation of 1,000 images, reduced ResNet-18, against a bare forward of 500", 1 / 0.95,
           ratio, left, right, "evaluation")  # fmt: skip
    benchmark.pedantic(ours, rounds=1)


def test_help_answers_at_once(benchmark) -> None:
    def ask(*arguments: str) -> float:
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-m", "clbench", *arguments], check=True, capture_output=True)
        return time.perf_counter() - begin

    ask("--help")
    seconds = sorted(max(ask("--help"), ask("list", "methods")) for _ in range(5))[2]
    benchmark.extra_info.update(what="--help and list methods, wall", budget=1.0, ratio=round(seconds, 3), per="call",
                                ours_ms=round(seconds * 1e3, 1), floor_ms=None, better="low")  # fmt: skip
    print(f"\n--help and list methods: {seconds:.2f} s (budget 1 s)")
    benchmark.pedantic(lambda: ask("--help"), rounds=1)
