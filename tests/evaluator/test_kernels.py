"""The fused kernels against float64 and plain PyTorch: in Triton's interpreter on a CPU, on a GPU with `-m gpu`."""

import math

import pytest
import torch
from head_cases import KINDS, MASKS, Case, assert_counts, make_case
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import make_store
from torch import Tensor

from clbench.data.reader import Reader
from clbench.errors import InputError
from clbench.evaluator.heads import GroupCounts, head_counts_reference, head_logits, rounding_margin
from clbench.evaluator.images import FusedReader, fuse, gather_images_reference
from clbench.methods.base import Head
from clbench.rng import generator

pytest.importorskip("triton")
from clbench.evaluator import kernels
from clbench.evaluator.kernels import Tiles, choose_tiles, gather_images, head_counts

interpreted = pytest.mark.skipif(not kernels.INTERPRETED, reason="Triton's interpreter is off: this process has a GPU")
KIND, MASK = st.sampled_from(KINDS), st.sampled_from(MASKS)
SEED = st.integers(0, 10_000)


# -- features x head -> counts -----------------------------------------------------------------------------------------
@given(
    KIND, MASK, SEED, st.integers(1, 90), st.integers(1, 40), st.integers(1, 40), st.booleans(),
    st.sampled_from([Tiles(16, 16, 16), Tiles(32, 16, 32, 2), Tiles(64, 32, 16, 3), Tiles(16, 64, 64, 9)]),
)  # fmt: skip
@settings(max_examples=20, deadline=None)
@interpreted
def test_counts_are_those_of_float64(kind, mask, seed, rows, classes, width, whole, tiles) -> None:
    case = make_case(kind, mask, seed, rows=rows, classes=classes, width=width, whole=whole)
    exact = whole and kind in ("linear", "nearest")  # whole numbers below 2^24: no rounding, ties are ties
    assert_counts(case, case.counts(head_counts, tiles=tiles), exact=exact)
    assert_counts(case, case.counts(head_counts_reference), exact=exact)


@given(KIND, SEED, st.integers(1, 60), st.integers(6, 24), st.sampled_from([Tiles(16, 16, 16), None]))
@settings(max_examples=12, deadline=None)
@interpreted
def test_bf16_counts_are_those_of_the_rounded_inputs(kind, seed, rows, classes, tiles) -> None:
    """Within the margin of fp32 sums: features and weights are rounded to bf16, everything behind that is fp32."""
    case = make_case(kind, "shared", seed, rows=rows, classes=classes, width=24, dtype=torch.bfloat16)
    assert_counts(case, case.counts(head_counts, tiles=tiles))


@interpreted
def test_vectors_of_zeros() -> None:
    """All cosines are 0: the lowest id answers, and every class is as likely."""
    head = Head("cosine", torch.zeros(5, 16), scale=torch.tensor(14.0))
    case = Case(torch.zeros(4, 16), head, torch.tensor([0, 1, 2, 0]), torch.zeros(4, dtype=torch.int64), None, None, 1)
    counts = case.counts(head_counts)
    assert counts.hits.tolist() == [2]
    assert counts.loss_sums().tolist() == pytest.approx([4 * math.log(5)], abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("splits", [1, 3])
@interpreted
def test_of_equal_logits_the_lowest_id_answers(kind: str, splits: int) -> None:
    """Axes times powers of two: norms and products are exact in all kinds of head."""
    weight = torch.zeros(48, 16)
    weight[torch.arange(48), torch.arange(48) % 16] = 1.0  # classes 0, 16 and 32 tie, in different tiles and splits
    features = torch.eye(16) * 2
    out = {}
    for first in (0, 16, 32):
        targets = torch.arange(16) + first
        counts = GroupCounts.zeros(1, top5=True)
        head_counts(
            features, Head(kind, weight), targets, torch.zeros(16, dtype=torch.int64), counts,
            tiles=Tiles(16, 16, 16, splits),
        )  # fmt: skip
        out[first] = (int(counts.hits), int(counts.top5))
    assert out == {0: (16, 16), 16: (0, 16), 32: (0, 16)}
    head = Head(kind, torch.ones(48, 16))  # all classes tie: the five lowest ids are the best five
    counts = GroupCounts.zeros(48, top5=True)
    classes = torch.arange(48)
    head_counts(torch.ones(48, 16), head, classes, classes, counts, tiles=Tiles(16, 16, 16, splits))
    assert counts.hits.tolist() == [1] + [0] * 47
    assert counts.top5.tolist() == [1] * 5 + [0] * 43


@pytest.mark.parametrize("rows", [1, 65, 2000])
@interpreted
def test_any_number_of_rows(rows: int) -> None:
    case = make_case("linear", "shared", rows, rows=rows, classes=20, width=8, whole=True)
    assert_counts(case, case.counts(head_counts), exact=True)


@interpreted
def test_counts_are_added() -> None:
    case = make_case("linear", "none", 1, rows=30, classes=5, width=4)
    once = case.counts(head_counts)
    again = GroupCounts(*(x.clone() for x in once))
    head_counts(case.features, case.head, case.targets, case.groups, again)
    assert again.hits.tolist() == (2 * once.hits).tolist()
    assert again.loss.tolist() == (2 * once.loss).tolist()
    before = [x.clone() for x in again]
    head_counts(case.features[:0], case.head, case.targets[:0], case.groups[:0], again)
    assert all(torch.equal(a, b) for a, b in zip(before, again, strict=True)), "no rows count nothing"


@interpreted
def test_inputs_may_lie_across_memory() -> None:
    case = make_case("cosine", "none", 2, rows=30, classes=20, width=6)
    across = case._replace(
        features=case.features.T.contiguous().T, head=case.head._replace(weight=case.head.weight.T.contiguous().T)
    )
    assert_counts(case, across.counts(head_counts))


@pytest.mark.parametrize("kind", KINDS)
@interpreted
def test_every_other_of_a_longer_tensor(kind: str) -> None:
    case = make_case(kind, "per row", 1, rows=30, classes=20, width=6)
    expected = case.counts(head_counts)

    def spread(x: Tensor) -> Tensor:
        return torch.stack([x, x.flip(0)], dim=1).flatten()[::2]

    head = case.head if case.head.bias is None else case.head._replace(bias=spread(case.head.bias))
    apart = case._replace(
        head=head, targets=spread(case.targets), groups=spread(case.groups), mask_index=spread(case.mask_index)
    )
    assert apart.targets.stride() == (2,)
    for got, value in zip(apart.counts(head_counts), expected, strict=True):
        assert torch.equal(got, value)


def test_shapes_that_do_not_fit_are_named() -> None:
    case = make_case("linear", "per row", 2, rows=3, classes=4, width=6)
    out = GroupCounts.zeros(4)
    if kernels.INTERPRETED or torch.cuda.is_available():
        case = case.to("cpu" if kernels.INTERPRETED else "cuda")
        out = GroupCounts.zeros(4, case.features.device)
    with pytest.raises(ValueError, match="takes 6 features, but there are 5"):
        head_counts(case.features[:, :5], case.head, case.targets, case.groups, out)
    with pytest.raises(ValueError, match="mask is over 3 classes"):
        head_counts(case.features, case.head, case.targets, case.groups, out, case.allowed[0, :3])
    with pytest.raises(ValueError, match="mask_index"):
        head_counts(case.features, case.head, case.targets, case.groups, out, case.allowed)
    with pytest.raises(ValueError, match="mask_index"):
        head_counts_reference(case.features, case.head, case.targets, case.groups, out, case.allowed)
    many = torch.zeros((1, 4), dtype=torch.bool, device=case.features.device).expand(2**29, -1)  # takes no memory
    with pytest.raises(ValueError, match="masks have 2,147,483,648 values, but there may be 2,147,483,647"):
        head_counts(case.features, case.head, case.targets, case.groups, out, many, case.mask_index)
    with pytest.raises(ValueError, match="loss=True"):
        out.loss_sums()


def test_a_cpu_is_refused_outside_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    case = make_case("linear", "none", 1, rows=3, classes=4, width=6)
    with pytest.raises(RuntimeError, match="CUDA device"):
        case.counts(head_counts)


@given(KIND, MASK, SEED, st.integers(1, 100_000), st.booleans())
@example("linear", "none", 1, 1, True)
@example("cosine", "per row", 3, 100_000, False)
@example("nearest", "shared", 2, 100_000, True)
@settings(max_examples=15, deadline=None)
def test_reference_up_to_a_hundred_thousand_rows(kind: str, mask: str, seed: int, rows: int, whole: bool) -> None:
    """The plain path against float64's argmax, row by row: all of them where sums are exact, else all whose two best
    logits are further apart than the rounding margin."""
    case = make_case(kind, mask, seed, rows=rows, classes=10, width=8, whole=whole)
    per_row = case._replace(groups=torch.arange(rows), num_groups=rows).counts(head_counts_reference)
    logits = head_logits(case.features.double(), case.head._replace(weight=case.head.weight.double()))
    if case.allowed is not None:
        logits.masked_fill_(~(case.allowed if case.mask_index is None else case.allowed[case.mask_index]), -torch.inf)
    right = (logits.argmax(1) == case.targets) & (logits.amax(1) > -torch.inf)
    # classes 0 and 5 are one and the same, so between them there is no close call but an exact tie
    apart = logits.index_fill(1, torch.tensor([5]), -torch.inf).where(logits[:, :1] > -torch.inf, logits)
    best = apart.topk(2, dim=1).values
    sure = ~((best[:, 0] - best[:, 1]) < rounding_margin(case.features, case.head))  # NaN: nothing is allowed
    if whole and kind in ("linear", "nearest"):
        sure.fill_(True)
    elif not whole:
        assert int((~sure).sum()) <= 0.001 * rows
    assert torch.equal(per_row.hits.bool()[sure], right[sure])
    grouped = case.counts(head_counts_reference)
    assert torch.equal(
        grouped.hits, torch.bincount(case.groups, weights=per_row.hits, minlength=len(grouped.hits)).long()
    )


def test_tiles_split_the_classes_where_there_are_few_rows() -> None:
    few, many = choose_tiles(1000, 20_000, torch.bfloat16, 132), choose_tiles(10**6, 20_000, torch.bfloat16, 132)
    assert many.splits == 1
    programs = few.splits * -(-1000 // few.rows)
    assert 132 <= programs <= 2 * 132
    assert choose_tiles(1, 1, torch.float32, 132).splits == 1
    assert choose_tiles(10**6, 1000, torch.bfloat16, 132).classes == 128
    assert choose_tiles(10**6, 1000, torch.bfloat16, 132, mask_per_row=True).classes == 64


# -- rows -> images ----------------------------------------------------------------------------------------------------
VIEWS = [
    "", "flip", "normalize(0.5,0.25)", "pad_crop(2) flip", "pad_crop(1,77) flip(0.3) normalize(0.4,0.2)",
    "random_crop(5) flip", "center_crop(3) scale(-1,1)", "random_crop(4)",
]  # fmt: skip


@pytest.mark.parametrize("text", VIEWS)
@pytest.mark.parametrize("gather", [gather_images_reference, pytest.param(gather_images, marks=interpreted)])
def test_fused_reading_is_the_view_to_the_bit(text: str, gather) -> None:
    store = make_store()
    rows = torch.tensor([0, 5, 5, 100, 107, 3, 42])
    plain = Reader(store, {"test": text})(rows, None, "test", generator(1, "view"))
    fused = FusedReader(store, {"test": text}, gather=gather)(rows, None, "test", generator(1, "view"))
    assert torch.equal(plain, fused)
    assert fused.is_contiguous(memory_format=torch.channels_last)
    assert gather(store.images, rows[:0], (6, 6)).shape == (0, 1, 6, 6)


@given(SEED, st.integers(1, 9), st.integers(1, 3), st.integers(1, 7), st.integers(1, 7), st.booleans())
@settings(max_examples=8, deadline=None)
@interpreted
def test_gather_is_its_reference(seed: int, batch: int, channels: int, height: int, width: int, affine: bool) -> None:
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (5, channels, height, width), generator=rng, dtype=torch.uint8)
    rows = torch.randint(0, 5, (batch,), generator=rng)
    given = {
        "top": torch.randint(-3, height, (batch,), generator=rng),
        "left": torch.randint(-3, width, (batch,), generator=rng),
        "flip": torch.rand(batch, generator=rng) < 0.5,
        "fill": float(seed % 256),
    }
    if affine:
        given |= {"gain": torch.rand(channels, generator=rng), "offset": torch.rand(channels, generator=rng)}
    size = (1 + seed % 5, 1 + seed % 4)
    expected = gather_images_reference(images, rows, size, **given)
    assert torch.equal(gather_images(images, rows, size, **given), expected)
    half = gather_images(images, rows, size, **given, dtype=torch.bfloat16)
    # the interpreter cuts bits off where the device rounds: one unit in the last place of bf16
    torch.testing.assert_close(half.float(), expected, rtol=2.0**-7, atol=1e-30)


@pytest.mark.parametrize("gather", [gather_images_reference, pytest.param(gather_images, marks=interpreted)])
@pytest.mark.parametrize("one", ["top", "left", "gain", "offset"])
def test_one_of_a_pair_is_refused(gather, one: str) -> None:
    images, rows = torch.zeros((2, 3, 4, 4), dtype=torch.uint8), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=rf"{one}\b.*give both or none"):
        gather(images, rows, (4, 4), **{one: torch.zeros(3 if one in ("gain", "offset") else 2)})


def test_views_that_do_more_are_left_to_the_reader() -> None:
    store = make_store()
    from clbench.data.views import parse_view

    device = torch.device("cpu")
    for text in ("resize(8)", "flip pad_crop(2)", "pad_crop(2) flip brightness(0.2)", "rgb normalize(cifar10)"):
        assert fuse(parse_view(text), store.image_shape, device) is None, text
    reader = FusedReader(store, {"test": "resize(8)"}, gather=gather_images_reference)
    rows = torch.arange(4)
    assert torch.equal(reader(rows, None, "test"), Reader(store, {"test": "resize(8)"})(rows, None, "test"))
    with pytest.raises(ValueError, match="needs a generator"):
        FusedReader(store, {"test": "flip"}, gather=gather_images_reference)(rows, None, "test")
    with pytest.raises(InputError, match="view"):
        reader(rows, None, "tset")


# -- on the device -----------------------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 10, 64), (1000, 100, 160), (777, 1003, 77), (3000, 333, 512)])
def test_counts_on_the_device(kind, mask, dtype, shape) -> None:
    rows, classes, width = shape
    case = make_case(kind, mask, rows, rows=rows, classes=classes, width=width, dtype=dtype, groups=7)
    for tiles in (None, Tiles(32, 32, 32, 3)):
        assert_counts(case, case.to("cuda").counts(head_counts, tiles=tiles))
    whole = make_case(kind, mask, rows, rows=rows, classes=classes, width=width, dtype=dtype, whole=True)
    assert_counts(whole, whole.to("cuda").counts(head_counts), exact=kind in ("linear", "nearest"))


@pytest.mark.gpu
def test_a_hundred_thousand_rows_on_the_device() -> None:
    case = make_case("linear", "shared", 5, rows=100_000, classes=100, width=64, whole=True)
    got, expected = case.to("cuda").counts(head_counts), case.counts(head_counts_reference)
    assert torch.equal(got.hits.cpu(), expected.hits)
    assert torch.equal(got.top5.cpu(), expected.top5)


@pytest.mark.gpu
@pytest.mark.parametrize("text", VIEWS)
def test_fused_reading_on_the_device(text: str) -> None:
    store = make_store().to("cuda")
    rows = torch.arange(100, device="cuda")
    plain = Reader(store, {"test": text})(rows, None, "test", generator(1, "view", device="cuda"))
    reader = FusedReader(store, {"test": text}, gather=gather_images)
    fused = reader(rows, None, "test", generator(1, "view", device="cuda"))
    assert torch.equal(plain, fused)
    given = reader.fused["test"].arguments(100, store.image_shape, store.device, generator(1, "view", device="cuda"))
    half = gather_images(store.images, rows, reader.fused["test"].size, **given, dtype=torch.bfloat16)
    assert torch.equal(half, plain.to(torch.bfloat16))
