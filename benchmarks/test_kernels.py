"""Counting answers and reading images: the plain forms against what one writes by hand, and, on a GPU, the Triton
kernels against the plain forms.

python -m pytest benchmarks/test_kernels.py --benchmark-enable -s

The kernels against the bounds of memory and arithmetic: `python benchmarks/gpu_evaluator.py`.
"""

import statistics
from collections.abc import Callable

import pytest
import torch
from parts import cifar_shaped, interleaved
from test_framework import record
from torch import Tensor

from clbench.data.reader import Reader
from clbench.evaluator.heads import GroupCounts, head_counts_reference
from clbench.evaluator.images import FusedReader
from clbench.methods.base import Head
from clbench.rng import generator

ROWS, WIDTH, GROUPS = 1000, 160, 5
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
VIEWS = {"test": "normalize(cifar100)", "train": "pad_crop(4) flip normalize(cifar100)"}


class Answers:
    """Features of five groups, a linear head, a mask of which half the classes are seen."""

    def __init__(self, classes: int, device: str) -> None:
        rng = generator(0, "kernels")
        self.features = torch.randn((ROWS, WIDTH), generator=rng).to(device)
        weight = torch.randn((classes, WIDTH), generator=rng).to(device)
        self.head = Head("linear", weight, torch.zeros(classes, device=device))
        self.targets = torch.randint(0, classes // 2, (ROWS,), generator=rng).to(device)
        self.groups = torch.arange(ROWS, device=device) // (ROWS // GROUPS)
        self.allowed = torch.arange(classes, device=device) < classes // 2
        self.counts = GroupCounts.zeros(GROUPS, device)

    def given(self) -> tuple[Tensor | Head | GroupCounts, ...]:
        return self.features, self.head, self.targets, self.groups, self.counts, self.allowed

    def by_hand(self) -> list[float]:
        """Group by group, as an evaluation loop over test sets does it."""
        out = []
        for group in range(GROUPS):
            cut = slice(group * ROWS // GROUPS, (group + 1) * ROWS // GROUPS)
            logits = self.features[cut] @ self.head.weight.T + self.head.bias
            logits = logits.masked_fill(~self.allowed, -torch.inf)
            out.append((logits.argmax(1) == self.targets[cut]).sum().item())
        return out


@pytest.mark.parametrize("classes", [100, 1000])
def test_counts_in_plain_pytorch(benchmark, classes: int) -> None:
    answers = Answers(classes, "cpu")
    head_counts_reference(*answers.given())
    assert answers.counts.hits.tolist() == answers.by_hand()
    repeats = 20

    def ours() -> None:
        for _ in range(repeats):
            head_counts_reference(*answers.given())

    def floor() -> None:
        for _ in range(repeats):
            answers.by_hand()

    ratio, left, right = interleaved(ours, floor, rounds=15)
    what = f"answers of {ROWS} rows counted, {classes} classes, plain form against a loop over groups"
    record(benchmark, what, 1.1, ratio, left / repeats, right / repeats, "evaluation")
    benchmark.pedantic(ours, rounds=3)


def test_images_read_in_plain_pytorch(benchmark) -> None:
    """Rows to normalised floats, against indexing and arithmetic on the same uint8 images."""
    store = cifar_shaped(10, 100, 20)
    reader, rows = Reader(store, VIEWS), torch.randperm(1000)[:256]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)))
    repeats = 20

    def ours() -> None:
        for _ in range(repeats):
            reader(rows, None, "test")

    def floor() -> None:
        for _ in range(repeats):
            (store.images[rows].float() / 255 - mean) / std

    ratio, left, right = interleaved(ours, floor, rounds=15)
    record(benchmark, "256 images read and normalised", 1.1, ratio, left / repeats, right / repeats, "batch")
    benchmark.pedantic(ours, rounds=3)


# -- on a GPU --------------------------------------------------------------------------------------------------------
def alternating(ours: Callable[[], None], floor: Callable[[], None], rounds: int = 15) -> tuple[float, float, float]:
    """As `parts.interleaved`, in milliseconds of the device between two events."""

    def timed(work: Callable[[], None]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(20):
            work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 20

    timed(ours), timed(floor)
    pairs = [(timed(ours), timed(floor)) for _ in range(rounds)]
    left, right = zip(*pairs, strict=True)
    return statistics.median(a / b for a, b in pairs), statistics.median(left), statistics.median(right)


@GPU
@pytest.mark.parametrize("classes", [100, 1000, 20_000])
def test_head_kernel(benchmark, classes: int) -> None:
    from clbench.evaluator.kernels import head_counts

    answers = Answers(classes, "cuda")
    pair = (lambda: head_counts(*answers.given())), (lambda: head_counts_reference(*answers.given()))
    ratio, left, right = alternating(*pair)
    record(benchmark, f"head kernel against the plain form, {classes} classes", 1.0, ratio, left, right, "evaluation")
    benchmark.pedantic(pair[0], rounds=3)


@GPU
def test_gather_kernel(benchmark) -> None:
    from clbench.evaluator.kernels import gather_images

    store = cifar_shaped(10, 100, 20).to("cuda")
    plain, rows = Reader(store, VIEWS), torch.randperm(1000, device="cuda")[:256]
    fused = FusedReader(store, VIEWS, gather=gather_images)
    draws = [torch.Generator("cuda").manual_seed(0) for _ in range(2)]
    pair = (lambda: fused(rows, None, "train", draws[0])), (lambda: plain(rows, None, "train", draws[1]))
    ratio, left, right = alternating(*pair)
    record(benchmark, "gather kernel against the plain view, crop, flip", 1.0, ratio, left, right, "batch")
    benchmark.pedantic(pair[0], rounds=3)
