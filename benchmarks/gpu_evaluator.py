"""What evaluation at every iteration costs on a GPU, in one command; on a CPU the same code at reduced size.

    python benchmarks/gpu_evaluator.py [--out results/benchmarks/gpu_evaluator.md] [--tiles]

1. Evaluation throughput: one observation as `--evaluator graph` carries it out, against a CUDA-graphed forward pass
   over the same images at the batch size that is best for it. Goal: at least 0.95 of it.
2. A training step with an evaluation of 5 x 200 images behind it, against a bare CUDA-graphed training step plus a bare
   CUDA-graphed forward pass of those images. Goal: at most 1.05 times. The evaluation runs from a snapshot, beside.
3. The fused head kernel at 100, 1,000 and 20,000 classes, against the time that the device's memory or its arithmetic
   needs at the ceilings measured here, whichever is longer. Goal: at least 0.80 of that bound. See `gpu_head.py`, which
   can be run alone and searches for better tiles; --tiles does so here.

Times are medians of interleaved rounds; lines are printed and written as they come. On a GPU all of it runs as a run
does (no TF32, deterministic algorithms), the floor too. Without one there are no streams, graphs or kernels:
observations are made from a snapshot, and 3 times the plain PyTorch form and checks the kernel in Triton's interpreter.
Its figures say nothing of a GPU.
"""

import argparse
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent))

import gpu_head  # the first to import clbench: it chooses Triton's interpreter where there is no GPU
from gpu_timing import Row, graphed, interleaved, yes
from parts import cifar_shaped
from torch import nn
from torch.nn import functional as F

from clbench.atomic import atomic_write_bytes
from clbench.backbones import build as build_backbone
from clbench.data.reader import Reader
from clbench.evaluator import Evaluator, Schedule
from clbench.learner.graphed_step import GraphedStep
from clbench.learner.learner import Learner
from clbench.learner.resolve import make_method
from clbench.learner.run import exact_arithmetic
from clbench.methods.er import ER
from clbench.methods.finetune import Finetune
from clbench.scenarios.class_incremental import Params, build
from clbench.scenarios.model import StreamDefaults
from clbench.stream import Cursor, Stream

IN_A_ROW = 5  # steps between two readings of the clock


class Sizes(NamedTuple):
    """What is measured on a GPU, or reduced on a CPU."""

    per_group: int
    batch: int
    rounds: int
    batches: tuple[int, ...]
    width: int  # of the network's first stage
    head: gpu_head.HeadSizes


FULL = Sizes(200, 10, 50, (64, 128, 256, 512, 1000), 20, gpu_head.FULL)
REDUCED = Sizes(8, 10, 3, (20, 40), 4, gpu_head.REDUCED)


# -- a run -------------------------------------------------------------------------------------------------------------
def make_learner(
    device: torch.device, sizes: Sizes, method: type[Finetune] | type[ER], engine: str, chunk: int
) -> Learner:
    """Online class-incremental, 5 tasks of 2 classes, reduced ResNet-18, as a run would put it together."""
    store = cifar_shaped(10, 200, sizes.per_group // 2).to(device)
    scenario = build(
        [store.table()], 0, Params(tasks=5, online=True),
        defaults=StreamDefaults(batch_size=sizes.batch, drop_last=True),
    )  # fmt: skip
    reader = Reader(store, {"train": "", "test": ""})
    stream = Stream(scenario, reader, seed=0, device=device)
    network = build_backbone("reduced-resnet18", in_shape=(3, 32, 32), seed=0, options={"nf": sizes.width})
    network.to(device, memory_format=torch.channels_last)
    made = make_method(method, method.Config(lr=0.01), network, scenario, stream)
    evaluator = Evaluator(
        scenario, reader, view="test", mask="all", per_group=sizes.per_group, slots=100_000, seed=0, device=device,
        chunk=chunk, engine=engine,
    )  # fmt: skip
    return Learner(scenario, stream, made, evaluator, Schedule(0))


def observe(learner: Learner) -> None:
    """All five groups, as the state behind a step."""
    learner.evaluator.observe(learner.method, 4, 0, 1, 10**6)


def bare_forward(learner: Learner, batch: int) -> Callable[[], object]:
    """Forward of the evaluation's images in eval mode, the right answers added up; images in memory."""
    method, subset = learner.method, learner.evaluator.subset
    images, targets = learner.stream.read(subset.rows, None, "test"), subset.targets
    hits = torch.zeros(5, dtype=torch.int64, device=images.device)
    model = nn.Sequential(method.backbone, method.classifier)

    def forward() -> None:
        with torch.no_grad():
            for start in range(0, len(images), batch):
                cut = slice(start, start + batch)
                right = model(images[cut]).argmax(1) == targets[cut]
                hits.index_add_(0, subset.group[cut], right.long())

    def whole() -> None:
        model.eval()
        forward()
        model.train()

    if images.device.type != "cuda":
        return whole
    model.eval()
    replay = graphed(forward, images.device)
    model.train()
    return replay


def measure_throughput(device: torch.device, sizes: Sizes) -> tuple[list[Row], int]:
    engine = "graph" if device.type == "cuda" else "snapshot"
    floor_learner = make_learner(device, sizes, Finetune, "plain", 1)
    count = len(floor_learner.evaluator.subset.rows)
    floors = {f"{n}": bare_forward(floor_learner, n) for n in sizes.batches}
    times = interleaved(floors, device, sizes.rounds)
    best = min(times, key=lambda name: times[name])
    learner = make_learner(device, sizes, Finetune, engine, int(best))

    def ours() -> None:
        observe(learner)
        learner.evaluator.engine.wait()

    pair = interleaved({"floor": floors[best], "ours": ours}, device, sizes.rounds)
    share = pair["floor"] / pair["ours"]
    value = (
        f"{share:.3f} ({count / pair['ours'] * 1e3:,.0f} images/s against {count / pair['floor'] * 1e3:,.0f} "
        f"in batches of {best})"
    )
    plain = make_learner(device, sizes, Finetune, "plain", int(best))
    observe(plain)
    same = torch.equal(plain.evaluator.drain()["hits"][0], learner.evaluator.drain()["hits"][-1])
    return [
        Row(f"evaluation of {count} images, {engine}: share of the bare forward's throughput", value, ">= 0.95",
            yes(share >= 0.95)),
        Row("its hits are those of a plain evaluation", yes(same), "yes", yes(same)),
    ], int(best)  # fmt: skip


def measure_step(device: torch.device, sizes: Sizes, chunk: int) -> Row:
    engine = "graph" if device.type == "cuda" else "snapshot"
    learner = make_learner(device, sizes, Finetune, engine, chunk)
    floor_learner = make_learner(device, sizes, Finetune, "plain", chunk)
    plan = learner.plans()[0][0]
    step = GraphedStep(learner.method, device)
    number = 0

    def ours() -> None:
        nonlocal number
        number += 1
        step(learner.stream.batch(plan, Cursor(0, 0, number % plan.iterations, 0, number)))
        observe(learner)

    images, targets = learner.stream.read(plan.rows, None, "train"), plan.targets
    batch_images, batch_targets = images[: sizes.batch].clone(), targets[: sizes.batch].clone()
    method = floor_learner.method
    model = nn.Sequential(method.backbone, method.classifier)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def train() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(batch_images), batch_targets).backward()
        optimizer.step()

    replay, forward = graphed(train, device), bare_forward(floor_learner, chunk)
    at = 0

    def floor() -> None:
        nonlocal at
        at = (at + sizes.batch) % (len(images) - sizes.batch)
        batch_images.copy_(images[at : at + sizes.batch])
        batch_targets.copy_(targets[at : at + sizes.batch])
        replay()
        forward()

    count = len(learner.evaluator.subset.rows)

    def ours_in_a_row() -> None:  # so that what runs beside has something to run beside
        for _ in range(IN_A_ROW):
            ours()
        learner.evaluator.engine.wait()

    def floor_in_a_row() -> None:
        for _ in range(IN_A_ROW):
            floor()

    pair = interleaved({"floor": floor_in_a_row, "ours": ours_in_a_row}, device, sizes.rounds)
    ratio = pair["ours"] / pair["floor"]
    value = f"{ratio:.3f} ({pair['ours'] / IN_A_ROW:.3f} ms against {pair['floor'] / IN_A_ROW:.3f} ms)"
    what = f"step of {sizes.batch} images + evaluation of {count}, {engine}: times bare training + forward"
    return Row(what, value, "<= 1.05", yes(ratio <= 1.05))


# -- the table ---------------------------------------------------------------------------------------------------------
def measure(device: torch.device, sizes: Sizes, tiles: bool) -> Iterator[Row]:
    rows, chunk = measure_throughput(device, sizes)
    yield from rows
    yield measure_step(device, sizes, chunk)
    yield from gpu_head.measure_head(device, sizes.head, tiles=tiles)


def report(rows: list[Row], device: torch.device) -> str:
    if device.type == "cuda":
        where = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
        note = ""
    else:
        where = f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"
        note = "No CUDA device: reduced size, no graphs, kernels in the interpreter. These are no GPU figures.\n\n"
    command = " ".join(["python", "benchmarks/gpu_evaluator.py", *sys.argv[1:]])
    lines = [f"| {row.what} | {row.value} | {row.goal} | {row.met} |" for row in rows]
    return (
        f"# Evaluation at every iteration\n\n`{command}`: {where}, torch {torch.__version__}.\n\n{note}"
        "| what | measured | goal | met |\n|---|---|---|---|\n" + "\n".join(lines) + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file for the table, besides the screen")
    parser.add_argument("--tiles", action="store_true", help="search for better tiles, too; takes minutes")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.tiles and device.type != "cuda":
        parser.error("--tiles times kernels on a GPU, and there is none")
    if device.type == "cpu":
        torch.set_num_threads(1)
    rows: list[Row] = []
    with exact_arithmetic(device):
        for row in measure(device, FULL if device.type == "cuda" else REDUCED, arguments.tiles):
            rows.append(row)
            print(" | ".join(row), flush=True)
            if arguments.out is not None:  # each time: what is there stays, should the rest be cut off
                atomic_write_bytes(arguments.out, report(rows, device).encode())
    if arguments.out is None:
        print(f"\n{report(rows, device)}")


if __name__ == "__main__":
    main()
