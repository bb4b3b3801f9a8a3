"""What evaluation at every iteration costs on a GPU, in one command; on a CPU the same code at reduced size.

    python benchmarks/gpu_evaluator.py [--device cuda] [--out results/benchmarks/gpu_evaluator.md]

1. Evaluation throughput: one observation as `--evaluator graph` carries it out, against a CUDA-graphed forward pass
   over the same images at the batch size that is best for it. Goal: at least 0.95 of it.
2. A training step with an evaluation of 5 x 200 images behind it, against a bare CUDA-graphed training step plus a bare
   CUDA-graphed forward pass of those images. Goal: at most 1.05 times. The evaluation runs from a snapshot, beside.
3. The fused head kernel at 100, 1,000 and 20,000 classes, against the time that the device's memory or its arithmetic
   needs at the ceilings measured here, whichever is longer. Goal: at least 0.80 of that bound.

Times are medians of interleaved rounds. On a CPU there are no streams, graphs or kernels: observations are made from a
snapshot, and 3 times the plain PyTorch form and checks the kernel in Triton's interpreter. Its figures say nothing of a
GPU.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported
sys.path.insert(0, str(Path(__file__).parent))

from parts import cifar_shaped
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.backbones import build as build_backbone
from clbench.data.reader import Reader
from clbench.evaluator import Evaluator, Schedule
from clbench.evaluator.heads import GroupCounts, head_counts_reference
from clbench.learner.graphed_step import GraphedStep
from clbench.learner.learner import Learner
from clbench.learner.resolve import make_method
from clbench.methods.base import Head
from clbench.methods.er import ER
from clbench.methods.finetune import Finetune
from clbench.scenarios.class_incremental import Params, build
from clbench.scenarios.model import StreamDefaults
from clbench.stream import Cursor, Stream

IN_A_ROW = 5  # steps between two readings of the clock


class Row(NamedTuple):
    """One line of the table. share: of the goal's measure."""

    what: str
    value: str
    goal: str
    met: str


class Sizes(NamedTuple):
    """What is measured on a GPU, or reduced on a CPU."""

    per_group: int
    batch: int
    rounds: int
    batches: tuple[int, ...]
    head_rows: int
    features: int
    classes: tuple[int, ...]
    width: int  # of the network's first stage


FULL = Sizes(200, 10, 50, (64, 128, 256, 512, 1000), 65_536, 512, (100, 1_000, 20_000), 20)
REDUCED = Sizes(8, 10, 3, (20, 40), 512, 64, (100, 1_000), 4)
WARM_UP = 3


# -- time --------------------------------------------------------------------------------------------------------------
def timed(work: Callable[[], object], device: torch.device) -> float:
    """Milliseconds until the device has done it."""
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        work()  # joins the streams it used beside this one
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end))
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


def interleaved(works: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, float]:
    """Median milliseconds of each, taken in turn, behind a few rounds that warm up."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + WARM_UP):
        for name, work in works.items():
            each = timed(work, device)
            if number >= WARM_UP:
                taken[name].append(each)
    return {name: statistics.median(values) for name, values in taken.items()}


def graphed(work: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """`work` as a CUDA graph; itself on a CPU."""
    if device.type != "cuda":
        return work
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


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


def measure_step(device: torch.device, sizes: Sizes, chunk: int) -> list[Row]:
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
    return [
        Row(f"step of {sizes.batch} images + evaluation of {count}, {engine}: times bare training + forward", value,
            "<= 1.05", yes(ratio <= 1.05)),
    ]  # fmt: skip


# -- the head kernel ---------------------------------------------------------------------------------------------------
class Ceilings(NamedTuple):
    """Measured here: bytes per second of a copy, floating-point operations per second of a bf16 product."""

    bandwidth: float
    arithmetic: float


def measure_ceilings(device: torch.device, rounds: int) -> Ceilings:
    large = device.type == "cuda"
    source = torch.empty(2**30 if large else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    side = 8192 if large else 512
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = interleaved({"copy": lambda: target.copy_(source), "product": lambda: left @ right}, device, rounds)
    return Ceilings(2 * len(source) / times["copy"] * 1e3, 2 * side**3 / times["product"] * 1e3)


def make_head(device: torch.device, sizes: Sizes, classes: int) -> tuple[Tensor, Head, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    features = torch.randn(sizes.head_rows, sizes.features, generator=rng).to(torch.bfloat16)
    head = Head("linear", torch.randn(classes, sizes.features, generator=rng).to(torch.bfloat16).to(device))
    targets = torch.randint(0, classes, (sizes.head_rows,), generator=rng)
    groups = torch.arange(5).repeat_interleave(-(-sizes.head_rows // 5))[: sizes.head_rows]
    return features.to(device), head, targets.to(device), groups.to(device)


def measure_head(device: torch.device, sizes: Sizes) -> list[Row]:
    """One line or two for each number of classes."""
    if device.type != "cuda":
        return [row for classes in sizes.classes for row in head_on_cpu(device, sizes, classes)]
    ceilings = measure_ceilings(device, sizes.rounds)
    found = f"{ceilings.bandwidth / 1e9:,.0f} GB/s copy, {ceilings.arithmetic / 1e12:,.1f} TFLOP/s bf16"
    rows = [head_on_gpu(device, sizes, classes, ceilings) for classes in sizes.classes]
    return [*rows, Row("ceilings measured here", found, "-", "-")]


def describe(sizes: Sizes, classes: int) -> str:
    return f"head, {sizes.head_rows:,} x {sizes.features} bf16 features, {classes:,} classes"


def head_on_cpu(device: torch.device, sizes: Sizes, classes: int) -> list[Row]:
    """Time of the plain form; the kernel counts the same in the interpreter, on a few rows of whole numbers."""
    from clbench.evaluator.kernels import Tiles, head_counts

    features, head, targets, groups = make_head(device, sizes, classes)
    out = [GroupCounts.zeros(5, device) for _ in range(3)]
    taken = interleaved(
        {"plain": lambda: head_counts_reference(features, head, targets, groups, out[0])}, device, sizes.rounds
    )["plain"]
    whole = features[:64].round().float(), head._replace(weight=head.weight.round().float()), targets[:64], groups[:64]
    head_counts(*whole, out[1], tiles=Tiles(64, 64, 64))
    head_counts_reference(*whole, out[2])
    same = yes(torch.equal(out[1].hits, out[2].hits))
    return [
        Row(f"{describe(sizes, classes)}: plain PyTorch", f"{taken:.2f} ms", "-", "-"),
        Row(f"head, {classes:,} classes: the kernel in the interpreter counts the same", same, "yes", same),
    ]


def head_on_gpu(device: torch.device, sizes: Sizes, classes: int, ceilings: Ceilings) -> Row:
    """Share of the bound, with the tiles that a run uses; the best of some others beside it."""
    from clbench.evaluator.kernels import Tiles, head_counts

    features, head, targets, groups = make_head(device, sizes, classes)
    out = GroupCounts.zeros(5, device, loss=True)
    repeats = 10

    def milliseconds(tiles: Tiles | None) -> float:
        def work() -> None:
            for _ in range(repeats):
                head_counts(features, head, targets, groups, out, tiles=tiles)

        return interleaved({"kernel": graphed(work, device)}, device, sizes.rounds)["kernel"] / repeats

    needed = features.nbytes + head.weight.nbytes + targets.nbytes + groups.nbytes
    products = 2 * sizes.head_rows * sizes.features * classes
    bound = 1e3 * max(needed / ceilings.bandwidth, products / ceilings.arithmetic)
    chosen, others = milliseconds(None), {}
    for tiles in candidate_tiles():
        try:
            others[tiles] = milliseconds(tiles)
        except Exception as error:  # Triton's own classes: tiles that do not fit the device's shared memory
            print(f"  {tiles} left out: {type(error).__name__}", file=sys.stderr)
    best = min(others, key=lambda tiles: others[tiles])
    value = (
        f"{bound / chosen:.3f} ({chosen:.4f} ms, bound {bound:.4f} ms; {others[best]:.4f} ms with tiles {tuple(best)})"
    )
    return Row(f"{describe(sizes, classes)}: share of the bound", value, ">= 0.80", yes(bound / chosen >= 0.80))


def candidate_tiles() -> list:
    """Tiles to try beside the chosen ones."""
    from clbench.evaluator.kernels import Tiles

    return [
        Tiles(rows, classes, width, 1, warps, stages, registers)
        for rows, classes in ((128, 128), (128, 256), (256, 128), (64, 128))
        for width in (64, 128)
        for warps in (4, 8)
        for stages in (3, 4)
        for registers in (None, 128)
    ]


# -- the table ---------------------------------------------------------------------------------------------------------
def yes(condition: bool) -> str:
    return "yes" if condition else "NO"


def report(rows: list[Row], device: torch.device) -> str:
    if device.type == "cuda":
        where = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
        note = ""
    else:
        where = f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"
        note = "No CUDA device: reduced size, no graphs, kernels in the interpreter. These are no GPU figures.\n\n"
    lines = [f"| {row.what} | {row.value} | {row.goal} | {row.met} |" for row in rows]
    return (
        f"# Evaluation at every iteration\n\n`python benchmarks/gpu_evaluator.py`: {where}, torch {torch.__version__}."
        f"\n\n{note}| what | measured | goal | met |\n|---|---|---|---|\n" + "\n".join(lines) + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="file for the table, besides the screen")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    sizes = FULL if device.type == "cuda" else REDUCED
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    else:
        torch.set_num_threads(1)
    rows, chunk = measure_throughput(device, sizes)
    rows += measure_step(device, sizes, chunk)
    rows += measure_head(device, sizes)
    text = report(rows, device)
    print(text)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
