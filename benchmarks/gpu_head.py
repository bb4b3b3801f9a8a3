"""The fused head kernel against the bounds of a device's memory and arithmetic; section 3 of `gpu_evaluator.py`.

    python benchmarks/gpu_head.py [--tiles]

--tiles: also time other tiles than those that a run uses, one by one, and name the best (a GPU; takes minutes, for
every form is compiled). Lines are printed as they come.
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
REPEATS = 10  # launches of one measurement
CANDIDATE_ROUNDS = 5
GOAL = 0.80  # of the bound


class HeadSizes(NamedTuple):
    """classes: of the linear head; the other forms are measured at the middle one."""

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


class Ceilings(NamedTuple):
    """Measured here: bytes per second of a copy, floating-point operations per second of a bf16 product."""

    bandwidth: float
    arithmetic: float

    def milliseconds(self, inputs: Inputs) -> float:
        return 1e3 * max(inputs.bytes() / self.bandwidth, inputs.operations() / self.arithmetic)


def measure_head(device: torch.device, sizes: HeadSizes, *, tiles: bool = False) -> Iterator[Row]:
    """One line for each form; on a CPU two, its time in plain PyTorch and whether the kernel counts the same in the
    interpreter."""
    forms = [(Form(loss=loss), classes) for classes in sizes.classes for loss in (False, True)]
    forms += [(form, sizes.classes[1]) for form in OTHERS]
    if device.type != "cuda":
        for form, classes in forms:
            yield from head_on_cpu(device, sizes, form, classes)
        return
    ceilings = measure_ceilings(device, sizes.rounds)
    found = f"{ceilings.bandwidth / 1e9:,.0f} GB/s copy, {ceilings.arithmetic / 1e12:,.1f} TFLOP/s bf16"
    yield Row("ceilings measured here", found, "-", "-")
    for form, classes in forms:
        yield head_on_gpu(device, sizes, form, classes, ceilings)
    if tiles:
        for classes in sizes.classes:
            yield best_tiles(device, sizes, Form(), classes, ceilings)


def measure_ceilings(device: torch.device, rounds: int) -> Ceilings:
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    side = 8192
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = interleaved({"copy": lambda: target.copy_(source), "product": lambda: left @ right}, device, rounds)
    return Ceilings(2 * len(source) / times["copy"] * 1e3, 2 * side**3 / times["product"] * 1e3)


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
    scale = 10.0 if form.kind in ("cosine", "text") else 1.0
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


def milliseconds(inputs: Inputs, form: Form, rounds: int, tiles: Tiles | None = None) -> float:
    device = inputs.features.device
    out = GroupCounts.zeros(GROUPS, device, loss=form.loss)

    def work() -> None:
        for _ in range(REPEATS):
            inputs.add(head_counts, out, tiles)

    return interleaved({"kernel": graphed(work, device)}, device, rounds)["kernel"] / REPEATS


def head_on_gpu(device: torch.device, sizes: HeadSizes, form: Form, classes: int, ceilings: Ceilings) -> Row:
    """Share of the bound, with the tiles that a run uses."""
    inputs = make_inputs(device, sizes, form, classes)
    bound, taken = ceilings.milliseconds(inputs), milliseconds(inputs, form, sizes.rounds)
    value = f"{bound / taken:.3f} ({taken:.4f} ms, bound {bound:.4f} ms)"
    what = f"{describe(sizes, form, classes)}, bf16: share of the bound"
    return Row(what, value, f">= {GOAL:.2f}", yes(bound / taken >= GOAL))


def best_tiles(device: torch.device, sizes: HeadSizes, form: Form, classes: int, ceilings: Ceilings) -> Row:
    inputs = make_inputs(device, sizes, form, classes)
    bound, found = ceilings.milliseconds(inputs), {}
    for tiles in candidate_tiles():
        try:
            with quiet():
                found[tiles] = milliseconds(inputs, form, CANDIDATE_ROUNDS, tiles)
        except Exception as error:  # Triton's own classes: tiles that do not fit the device
            print(f"  {tuple(tiles)} left out: {type(error).__name__}", file=sys.stderr, flush=True)
            continue
        print(f"  {tuple(tiles)}: {found[tiles]:.4f} ms, {bound / found[tiles]:.3f}", file=sys.stderr, flush=True)
    best = min(found, key=lambda tiles: found[tiles])
    value = f"{bound / found[best]:.3f} ({found[best]:.4f} ms, {tuple(best)})"
    return Row(f"{describe(sizes, form, classes)}, bf16: best of {len(found)} tiles", value, "-", "-")


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
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiles", action="store_true", help="search for the best tiles, too")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    for row in measure_head(device, FULL if device.type == "cuda" else REDUCED, tiles=arguments.tiles):
        print(" | ".join(row), flush=True)


if __name__ == "__main__":
    main()
