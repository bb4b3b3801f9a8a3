"""The fused head kernel against the bounds of a device's memory and arithmetic; section 3 of `gpu_evaluator.py`.

    python benchmarks/gpu_head.py [--tiles]

Ceilings and kernel are measured in turn, each as a CUDA graph of several launches, the kernel on features that lie in
other memory at every launch, so that a cache does not hold them. --tiles: also time other tiles than those that a run
uses and name the best (on a GPU; takes minutes, for every form is compiled). Lines are printed as they come.
"""

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported
sys.path.insert(0, str(Path(__file__).parent))

from gpu_timing import Row, graphed, interleaved, yes
from torch import Tensor

from clbench.evaluator.heads import GroupCounts, head_counts_reference
from clbench.evaluator.kernels import Tiles, head_counts
from clbench.methods.base import Head

__all__ = ["FULL", "REDUCED", "HeadSizes", "measure_head"]

GROUPS = 5
REPEATS = 8  # launches of one measurement
COPIES = 4  # of the features: together more than a cache holds
CANDIDATE_ROUNDS = 5
GOAL = 0.80  # of the bound


class HeadSizes(NamedTuple):
    """classes: of the linear head; the other forms are measured at the second of them."""

    rows: int
    features: int
    classes: tuple[int, ...]
    rounds: int


class Form(NamedTuple):
    """What is counted. mask: none, shared or per row."""

    kind: Literal["linear", "cosine", "nearest", "text"] = "linear"
    mask: str = "none"
    loss: bool = False

    def __str__(self) -> str:
        parts = [self.kind, "" if self.mask == "none" else f"mask {self.mask}", "with losses" if self.loss else ""]
        return ", ".join(part for part in parts if part)


FULL = HeadSizes(65_536, 512, (100, 1_000, 20_000), 30)
REDUCED = HeadSizes(512, 64, (100, 1_000), 3)
OTHERS = (Form("cosine"), Form("nearest"), Form("text"), Form(mask="shared"), Form(mask="per row"))


class Inputs(NamedTuple):
    """Arguments of `head_counts`, and what the bounds are of."""

    features: Tensor
    head: Head
    targets: Tensor
    groups: Tensor
    allowed: Tensor | None
    mask_index: Tensor | None

    def counts(self, counter, loss: bool, tiles: Tiles | None = None) -> GroupCounts:
        out = GroupCounts.zeros(GROUPS, self.features.device, loss=loss)
        self.add(counter, out, tiles)
        return out

    def add(self, counter, out: GroupCounts, tiles: Tiles | None = None) -> None:
        given = self.features, self.head, self.targets, self.groups, out, self.allowed, self.mask_index
        counter(*given, **({} if tiles is None else {"tiles": tiles}))

    def bytes(self) -> int:
        tensors = (self.features, self.head.weight, self.targets, self.groups, self.allowed, self.mask_index)
        return sum(x.nbytes for x in tensors if x is not None)

    def operations(self) -> int:
        return 2 * self.features.numel() * len(self.head.weight)


class Ceilings:
    """What the device can do: bytes per second that are read or copied, whichever are more, and floating-point
    operations per second of a bf16 product. `works` are measured beside the kernel."""

    def __init__(self, device: torch.device) -> None:
        self.numbers = torch.ones(2**28, device=device)  # 1 GiB
        self.target = torch.empty_like(self.numbers)
        self.side = 8192
        left, right = (torch.randn(self.side, self.side, device=device, dtype=torch.bfloat16) for _ in range(2))
        product = torch.empty_like(left)
        self.works = {
            "read": graphed(lambda: self.numbers.sum(), device),
            "copy": graphed(lambda: self.target.copy_(self.numbers), device),
            "product": graphed(lambda: [torch.mm(left, right, out=product) for _ in range(REPEATS)], device),
        }

    def speeds(self, times: dict[str, float]) -> tuple[float, float]:
        """(bytes, operations) per millisecond."""
        size = self.numbers.nbytes
        return max(size / times["read"], 2 * size / times["copy"]), REPEATS * 2 * self.side**3 / times["product"]


class Measured(NamedTuple):
    """Milliseconds of one launch, and those of its bound at the speeds found beside it."""

    kernel: float
    bound: float
    bytes_per_ms: float
    operations_per_ms: float

    @property
    def share(self) -> float:
        return self.bound / self.kernel


def measure_head(device: torch.device, sizes: HeadSizes, *, tiles: bool = False) -> Iterator[Row]:
    """One line for each form; on a CPU two, its time in plain PyTorch and whether the kernel counts the same in the
    interpreter."""
    forms = [(Form(loss=loss), classes) for classes in sizes.classes for loss in (False, True)]
    forms += [(form, sizes.classes[1]) for form in OTHERS]
    if device.type != "cuda":
        for form, classes in forms:
            yield from head_on_cpu(device, sizes, form, classes)
        return
    ceilings = Ceilings(device)
    for form, classes in forms:
        yield head_on_gpu(device, sizes, form, classes, ceilings)
    if tiles:
        for classes in sizes.classes:
            yield best_tiles(device, sizes, Form(), classes, ceilings)


def make_inputs(device: torch.device, sizes: HeadSizes, form: Form, classes: int, *, whole: bool = False) -> Inputs:
    """Rows sorted by group, as an observation has them. whole: fp32 whole numbers, whose sums are exact."""
    rng = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        if whole:
            return torch.randint(-2, 3, shape, generator=rng).float().to(device)
        return torch.randn(shape, generator=rng).to(torch.bfloat16).to(device)

    features, weight = draw(sizes.rows, sizes.features), draw(classes, sizes.features)
    targets = torch.randint(0, classes, (sizes.rows,), generator=rng).to(device)
    groups = (torch.arange(sizes.rows) * GROUPS // sizes.rows).to(device)
    allowed = {
        "none": None,
        "shared": torch.rand(classes, generator=rng) < 0.5,
        "per row": torch.rand((GROUPS, classes), generator=rng) < 0.5,
    }[form.mask]
    scale = {"cosine": 10.0, "text": torch.tensor(10.0, device=device)}.get(form.kind, 1.0)  # CLIP's is learned
    return Inputs(
        features, Head(form.kind, weight, scale=scale), targets, groups,
        None if allowed is None else allowed.to(device), groups if form.mask == "per row" else None,
    )  # fmt: skip


def describe(sizes: HeadSizes, form: Form, classes: int) -> str:
    return f"head, {sizes.rows:,} x {sizes.features}, {classes:,} classes, {form}"


def head_on_cpu(device: torch.device, sizes: HeadSizes, form: Form, classes: int) -> Iterator[Row]:
    inputs = make_inputs(device, sizes, form, classes)
    out = GroupCounts.zeros(GROUPS, device, loss=form.loss)
    taken = interleaved({"plain": lambda: inputs.add(head_counts_reference, out)}, device, sizes.rounds)["plain"]
    yield Row(f"{describe(sizes, form, classes)}: plain PyTorch", f"{taken:.2f} ms", "-", "-")
    if form.kind in ("cosine", "text"):
        return  # not exact in whole numbers; tests compare them with float64 within the rounding margin
    few = make_inputs(device, sizes._replace(rows=64), form, classes, whole=True)
    kernel, plain = few.counts(head_counts, False, Tiles(64, 64, 64)), few.counts(head_counts_reference, False)
    same = yes(torch.equal(kernel.hits, plain.hits))
    yield Row(f"head, {classes:,} classes, {form}: the kernel in the interpreter counts the same", same, "yes", same)


def measured(inputs: Inputs, form: Form, ceilings: Ceilings, rounds: int, tiles: Tiles | None = None) -> Measured:
    device = inputs.features.device
    out = GroupCounts.zeros(GROUPS, device, loss=form.loss)
    copies = [inputs._replace(features=inputs.features.clone()) for _ in range(COPIES)]

    def work() -> None:
        for number in range(REPEATS):
            copies[number % COPIES].add(head_counts, out, tiles)

    times = interleaved({"kernel": graphed(work, device), **ceilings.works}, device, rounds)
    bytes_per_ms, operations_per_ms = ceilings.speeds(times)
    bound = max(inputs.bytes() / bytes_per_ms, inputs.operations() / operations_per_ms)
    return Measured(times["kernel"] / REPEATS, bound, bytes_per_ms, operations_per_ms)


def head_on_gpu(device: torch.device, sizes: HeadSizes, form: Form, classes: int, ceilings: Ceilings) -> Row:
    """Share of the bound, with the tiles that a run uses."""
    inputs = make_inputs(device, sizes, form, classes)
    found = measured(inputs, form, ceilings, sizes.rounds)
    value = (
        f"{found.share:.3f} ({found.kernel:.4f} ms, bound {found.bound:.4f} ms at {found.bytes_per_ms / 1e6:,.0f} GB/s "
        f"and {found.operations_per_ms / 1e9:,.0f} TFLOP/s)"
    )
    what = f"{describe(sizes, form, classes)}, bf16: share of the bound"
    return Row(what, value, f">= {GOAL:.2f}", yes(found.share >= GOAL))


def best_tiles(device: torch.device, sizes: HeadSizes, form: Form, classes: int, ceilings: Ceilings) -> Row:
    inputs = make_inputs(device, sizes, form, classes)
    found: dict[Tiles, Measured] = {}
    for tiles in candidate_tiles():
        try:
            with quiet():
                found[tiles] = measured(inputs, form, ceilings, CANDIDATE_ROUNDS, tiles)
        except Exception as error:  # Triton's own classes: tiles that do not fit the device
            print(f"  {tuple(tiles)} left out: {type(error).__name__}: {error}"[:200], file=sys.stderr, flush=True)
            continue
        shown = f"{found[tiles].kernel:.4f} ms, {found[tiles].share:.3f}"
        print(f"  {tuple(tiles)}: {shown}", file=sys.stderr, flush=True)
    what = f"{describe(sizes, form, classes)}, bf16: best of {len(found)} tiles"
    if not found:
        return Row(what, "none could be compiled", "-", "-")
    best = max(found, key=lambda tiles: found[tiles].share)
    return Row(what, f"{found[best].share:.3f} ({found[best].kernel:.4f} ms, {tuple(best)})", "-", "-")


def candidate_tiles() -> list[Tiles]:
    """Some that a thread's registers may hold: the sums of a tile take rows x classes / threads of them. A processor
    has 65,536 registers, so 16 warps are capped at 128 each."""

    def fits(tiles: Tiles) -> bool:
        sums = tiles.rows * tiles.classes // (32 * tiles.warps)
        return 16 <= sums <= (64 if tiles.registers else 128) and (tiles.registers is not None or tiles.warps < 16)

    made = [
        Tiles(rows, classes, 64, 1, warps, stages, registers)
        for rows, classes in ((128, 64), (128, 128), (64, 128), (128, 256), (256, 128))
        for warps in (4, 8, 16)
        for stages in (3, 4)
        for registers in (None, 128)
    ]
    return [tiles for tiles in made if fits(tiles)]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Triton prints the whole program where its assembler refuses it."""
    sys.stdout.flush()
    kept = os.dup(1)
    with tempfile.TemporaryFile() as nowhere:
        os.dup2(nowhere.fileno(), 1)
        try:
            yield
        finally:
            sys.stdout.flush()
            os.dup2(kept, 1)
            os.close(kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", action="store_true", help="search for better tiles, too")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.tiles and device.type != "cuda":
        parser.error("--tiles times kernels on a GPU, and there is none")
    for row in measure_head(device, FULL if device.type == "cuda" else REDUCED, tiles=arguments.tiles):
        print(" | ".join(row), flush=True)


if __name__ == "__main__":
    main()
