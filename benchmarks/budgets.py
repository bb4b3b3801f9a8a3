"""Every budget of the performance policy in one interleaved run: clbench, floor, clbench, floor ..., case after case,
for several rounds. CPU time, one thread; a ratio is the median over the rounds of the ratio of neighbours.

python benchmarks/budgets.py [--rounds 7] > results/benchmarks/budgets.md

Exit code 1 if a budget is not met.
"""

import argparse
import gc
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from floor import FloorER
from parts import Free, cifar_shaped, online_learner
from test_framework import BATCH, CAPACITY, er_pair, evaluation_pair
from torch import nn

from clbench.backbones import build as build_backbone
from clbench.methods.er import ER
from clbench.rng import generator
from clbench.stream import Cursor

Pair = tuple[Callable[[], None], Callable[[], None]]
HEAD = """# Budgets

Each row against a bare PyTorch loop that does the same maths on tensors in memory, in one process. All rows are
measured in turn, round after round, ours and the floor as neighbours; CPU time of one thread; ratio: median over the
rounds of the ratio of neighbours, with the lower and upper quartile. Milliseconds are medians and depend on what else
the machine does.

```
python benchmarks/budgets.py --rounds {rounds} > results/benchmarks/budgets.md
```
"""


def load_pair(steps: int) -> Pair:
    """Stream and replay batches without a model."""
    store = cifar_shaped(10, 60, 10)
    learner = online_learner(store, ER, Free(3072), tasks=1, batch=BATCH, capacity=CAPACITY)
    stream, buffer, plan = learner.stream, learner.method.buffer, learner.plans()[0][0]
    floor = FloorER(
        store.images[plan.rows].float() / 255, plan.targets, nn.Linear(1, 1), lr=0.01, capacity=CAPACITY, batch=BATCH
    )
    count = 0

    def ours() -> None:
        nonlocal count
        for iteration in range(steps):
            batch = stream.batch(plan, Cursor(0, 0, iteration, 0, count))
            stream.read(buffer.sample(BATCH, generator(0, "replay", count)).rows, None, "train")
            buffer.add(batch.rows, batch.targets, generator(0, "reservoir", count))
            count += 1

    def bare() -> None:
        for step in range(steps):
            floor.draw(step * BATCH)

    return ours, bare


def network() -> nn.Module:
    return build_backbone("reduced-resnet18", in_shape=(3, 32, 32), seed=0)


def cases() -> dict[str, tuple[Pair, int, int, float]]:
    """What -> the pair, units of one call, calls of one round, budget."""
    return {
        "one ER step, model that costs nothing": (er_pair(Free(3072), 10, 50), 50, 3, 1.5),
        "stream + replay batch, no model": (load_pair(50), 50, 5, 1.5),
        "one evaluation of 500 images, model that costs nothing": (evaluation_pair(Free(3072), 100, 100), 1, 20, 1.5),
        "ER step, reduced ResNet-18, 10 tasks of 10 classes": (er_pair(network(), 100, 2, tasks=10), 2, 1, 1.05),
        "evaluation of 1,000 images, reduced ResNet-18, against a bare forward in batches of 500": (
            evaluation_pair(network(), 200, 500), 1, 1, 1 / 0.95,
        ),
        "the same against a bare forward in batches of 128, the best size on a CPU": (
            evaluation_pair(network(), 200, 128), 1, 1, 1 / 0.95,
        ),
    }  # fmt: skip


def timed(work: Callable[[], None], calls: int) -> float:
    begin = time.process_time()
    for _ in range(calls):
        work()
    return (time.process_time() - begin) * 1e3


def answer_time() -> float:
    """CPU seconds of `--help` and of `list methods`, the larger."""

    def ask(*arguments: str) -> float:
        before = os.times()
        subprocess.run([sys.executable, "-m", "clbench", *arguments], check=True, capture_output=True)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    ask("--help")
    return statistics.median(max(ask("--help"), ask("list", "methods")) for _ in range(3))


def main(rounds: int) -> int:
    torch.set_num_threads(1)
    pairs = cases()
    for (ours, floor), *_ in pairs.values():
        ours(), floor()  # warm: caches, memories
    found: dict[str, list[tuple[float, float]]] = {what: [] for what in pairs}
    gc.disable()
    for _ in range(rounds):
        for what, ((ours, floor), units, calls, _) in pairs.items():
            gc.collect()
            found[what].append(tuple(timed(work, calls) / (units * calls) for work in (ours, floor)))
    gc.enable()
    print(HEAD.format(rounds=rounds))
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {datetime.now(UTC):%Y-%m-%d}.\n")
    print("| what | ratio | quartiles | budget | clbench, ms | floor, ms | met |\n|---|---|---|---|---|---|---|")
    missed = 0
    for what, (_, _, _, budget) in pairs.items():
        ratios = [a / b for a, b in found[what]]
        low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
        ours_ms, floor_ms = (statistics.median(column) for column in zip(*found[what], strict=True))
        missed += ratio > budget
        met = "yes" if ratio <= budget else "NO"
        cells = (
            what,
            f"{ratio:.3f}",
            f"{low:.3f}-{high:.3f}",
            f"{budget:.3g}",
            f"{ours_ms:.3f}",
            f"{floor_ms:.3f}",
            met,
        )
        print(f"| {' | '.join(cells)} |")
    seconds = answer_time()
    missed += seconds > 1
    met = "yes" if seconds <= 1 else "NO"
    print(f"| --help and list methods, CPU seconds | {seconds:.2f} | – | 1 | – | – | {met} |")
    print("| data and bookkeeping per iteration on a GPU, host time | – | – | 50 us | – | – | not measured: no GPU |")
    return 1 if missed else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    sys.path.insert(0, str(Path(__file__).parent))
    raise SystemExit(main(parser.parse_args().rounds))
