"""Triton kernels of the evaluator. Import this only where they are wanted: on a CPU they run in Triton's interpreter
alone (`TRITON_INTERPRET=1` before Triton is imported), thousands of times slower than plain PyTorch; that is for tests.

`head_counts`: features x head -> mask -> argmax and log-sum-exp -> counts per group. Logits are never written: a
program walks over the classes in tiles and keeps per row the largest logit, its class (of equal ones the lowest id),
the sum of exponentials and the target's logit. Where there are few rows the classes are split among programs, and a
second kernel joins their parts. Counts are whole numbers, so the order of the atomic additions does not matter.
Reference: `clbench.evaluator.heads.head_counts_reference`.

`gather_images`: uint8 rows by index -> crop, flip, normalise -> channels-last float images, in one pass over the bytes.
Reference: `clbench.evaluator.images.gather_images_reference`.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# kernels: their arguments are pointers and numbers of the compiler, which have no Python types

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from clbench.evaluator.heads import LOSS_UNIT, TOP, GroupCounts
from clbench.evaluator.images import refuse_halves
from clbench.methods.base import Head

__all__ = ["INTERPRETED", "Tiles", "choose_tiles", "gather_images", "head_counts"]

LOG2E = tl.constexpr(1.4426950408889634)  # of exp2, of which the device has an instruction
FUSED = {"enable_fp_fusion": True}  # said, since Triton warns where it is not that its default will change
INTERPRETED: bool = triton.knobs.runtime.interpret


class Tiles(NamedTuple):
    """How the head kernel cuts its work: rows, classes and features of a tile (powers of two, at least 16), parts that
    the classes are split into, warps and pipeline stages of a program, and how many registers a thread may have (None:
    as many as the compiler wants)."""

    rows: int = 64
    classes: int = 64
    features: int = 32
    splits: int = 1
    warps: int = 4
    stages: int = 3
    registers: int | None = None


# -- one tile of logits ----------------------------------------------------------------------------------------------
@triton.jit
def _squares(x, rows, N, D, stride, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """(BLOCK_N,) fp32 sums of squares of `rows`."""
    total = tl.zeros((BLOCK_N,), tl.float32)
    row_start = x + rows.to(tl.int64)[:, None] * stride
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        value = tl.load(row_start + d[None, :], mask=(rows < N)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        total += tl.sum(value * value, axis=1)
    return total


@triton.jit
def _tile_logits(
    f, w, gain, offset, row_gain, rows, cols, N, C, D, stride_f, stride_w,
    GAIN: tl.constexpr, OFFSET: tl.constexpr, TWICE: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(BLOCK_N, BLOCK_C) fp32 logits of `rows` and `cols`."""
    total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    row_start = f + rows.to(tl.int64)[:, None] * stride_f
    col_start = w + cols.to(tl.int64)[None, :] * stride_w
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        a = tl.load(row_start + d[None, :], mask=(rows < N)[:, None] & (d < D)[None, :], other=0.0)
        b = tl.load(col_start + d[:, None], mask=(cols < C)[None, :] & (d < D)[:, None], other=0.0)
        if UPCAST:  # the interpreter multiplies bf16 as raw bits; products of two bf16 are exact in fp32
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
    if GAIN:
        total = total * tl.load(gain + cols, mask=cols < C, other=0.0)[None, :] * row_gain[:, None]
    if TWICE:
        total = 2 * total
    if OFFSET:
        total += tl.load(offset + cols, mask=cols < C, other=0.0)[None, :]
    return total


@triton.jit
def _row_gain(
    f, rows, N, D, stride_f, eps, GAIN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """(BLOCK_N,) one over the length of each row, or ones that are not used."""
    if GAIN:
        return 1 / (tl.sqrt(_squares(f, rows, N, D, stride_f, BLOCK_N, BLOCK_D)) + eps)
    return tl.full((BLOCK_N,), 1.0, tl.float32)


@triton.jit
def _masked(
    logits, allowed, mask_rows, cols, C, MASK: tl.constexpr
):  # fmt: skip
    """-inf where the class is not there or not allowed. MASK: 0 none, 1 one for all rows, 2 one for each row."""
    inside = cols < C
    if MASK == 0:
        is_open = inside[None, :]
    elif MASK == 1:
        is_open = (tl.load(allowed + cols, mask=inside, other=0) != 0)[None, :]
    else:
        place = mask_rows[:, None] * C + cols[None, :]
        is_open = tl.load(allowed + place, mask=inside[None, :], other=0) != 0
    return tl.where(is_open, logits, float("-inf"))


@triton.jit
def _add_to_groups(counts, group, value, inside):
    """Add int64 `value` to `counts[group]`: once per program where its rows are all of one group, as mostly."""
    low = tl.min(tl.where(inside, group, 2147483647), axis=0)
    high = tl.max(tl.where(inside, group, -1), axis=0)
    if low == high:
        tl.atomic_add(counts + low, tl.sum(tl.where(inside, value, 0), axis=0))
    else:
        tl.atomic_add(counts + group, value, mask=inside)


@triton.jit
def _finish(
    best, best_class, total, score, target, group, rows, inside, hits, loss, scores,
    LOSS: tl.constexpr, KEEP: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    is_open = inside & (score > float("-inf"))
    right = is_open & (best_class == target)
    _add_to_groups(hits, group, right.to(tl.int64), inside)
    if LOSS:
        safe_score = tl.where(is_open, score, 0.0)
        safe_best = tl.where(is_open, best, 0.0)
        nats = tl.log(tl.where(is_open, total, 1.0)) + (safe_best - safe_score)
        units = tl.where(is_open, tl.maximum(nats, 0.0) * UNITS + 0.5, 0.0)
        _add_to_groups(loss, group, units.to(tl.int64), inside)
    if KEEP:
        tl.store(scores + rows, score, mask=inside)


# -- the kernels -----------------------------------------------------------------------------------------------------
@triton.jit
def squares_kernel(x, out, N, D, stride, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(out + rows, _squares(x, rows, N, D, stride, BLOCK_N, BLOCK_D), mask=rows < N)


@triton.jit
def head_kernel(
    f, w, gain, offset, allowed, mask_index, targets, groups, hits, loss, scores, part_float, part_class,
    N, C, D, stride_f, stride_w, classes_per_split, eps,
    GAIN: tl.constexpr, OFFSET: tl.constexpr, TWICE: tl.constexpr, MASK: tl.constexpr, LOSS: tl.constexpr,
    KEEP: tl.constexpr, SPLITS: tl.constexpr, UNITS: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (i, s): rows of block i against the classes of split s."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < N
    target = tl.load(targets + rows, mask=inside, other=-1).to(tl.int32)
    group = tl.load(groups + rows, mask=inside, other=0).to(tl.int32)
    mask_rows = rows
    if MASK == 2:
        mask_rows = tl.load(mask_index + rows, mask=inside, other=0).to(tl.int32)
    best = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    best_class = tl.zeros((BLOCK_N,), tl.int32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    score = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    row_gain = _row_gain(f, rows, N, D, stride_f, eps, GAIN, BLOCK_N, BLOCK_D)
    first = tl.program_id(1) * classes_per_split
    for start in range(first, tl.minimum(first + classes_per_split, C), BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        logits = _tile_logits(
            f, w, gain, offset, row_gain, rows, cols, N, C, D, stride_f, stride_w, GAIN, OFFSET, TWICE, UPCAST,
            BLOCK_N, BLOCK_C, BLOCK_D,
        )  # fmt: skip
        logits = _masked(logits, allowed, mask_rows, cols, C, MASK)
        here = tl.max(logits, axis=1)
        here_class = tl.full((BLOCK_N,), -1, tl.int32)  # some class that is no row's target
        if tl.max(((target >= start) & (target < start + BLOCK_C)).to(tl.int32), axis=0) > 0:
            here_class = tl.min(tl.where(logits == here[:, None], cols[None, :], 2147483647), axis=1)
            score = tl.maximum(score, tl.max(tl.where(cols[None, :] == target[:, None], logits, float("-inf")), axis=1))
        best_class = tl.where(here > best, here_class, best_class)  # on a tie the earlier tile's, a lower id
        larger = tl.maximum(best, here)
        if LOSS:
            shift = tl.where(larger > float("-inf"), larger, 0.0)
            total = total * tl.exp2((best - shift) * LOG2E) + tl.sum(tl.exp2((logits - shift[:, None]) * LOG2E), axis=1)
        best = larger
    if SPLITS == 1:
        _finish(best, best_class, total, score, target, group, rows, inside, hits, loss, scores, LOSS, KEEP, UNITS)
    else:
        place = tl.program_id(1) * N + rows
        size = SPLITS * N
        tl.store(part_class + place, best_class, mask=inside)
        tl.store(part_float + place, best, mask=inside)
        tl.store(part_float + size + place, score, mask=inside)
        if LOSS:
            tl.store(part_float + 2 * size + place, total, mask=inside)


@triton.jit
def join_kernel(
    targets, groups, hits, loss, scores, part_float, part_class, N,
    LOSS: tl.constexpr, KEEP: tl.constexpr, SPLITS: tl.constexpr, UNITS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Join the parts of a row, lower classes first."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < N
    target = tl.load(targets + rows, mask=inside, other=-1).to(tl.int32)
    group = tl.load(groups + rows, mask=inside, other=0).to(tl.int32)
    best = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    best_class = tl.zeros((BLOCK_N,), tl.int32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    score = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    size = SPLITS * N
    for split in range(SPLITS):
        place = split * N + rows
        here = tl.load(part_float + place, mask=inside, other=float("-inf"))
        here_class = tl.load(part_class + place, mask=inside, other=0)
        best_class = tl.where(here > best, here_class, best_class)
        larger = tl.maximum(best, here)
        if LOSS:
            shift = tl.where(larger > float("-inf"), larger, 0.0)
            part = tl.load(part_float + 2 * size + place, mask=inside, other=0.0)
            total = total * tl.exp2((best - shift) * LOG2E) + part * tl.exp2((here - shift) * LOG2E)
        best = larger
        score = tl.maximum(score, tl.load(part_float + size + place, mask=inside, other=float("-inf")))
    _finish(best, best_class, total, score, target, group, rows, inside, hits, loss, scores, LOSS, KEEP, UNITS)


@triton.jit
def rank_kernel(
    f, w, gain, offset, allowed, mask_index, targets, scores, ranks,
    N, C, D, stride_f, stride_w, classes_per_split, eps,
    GAIN: tl.constexpr, OFFSET: tl.constexpr, TWICE: tl.constexpr, MASK: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add to `ranks` how many classes of this split stand before the target: the same tiles as `head_kernel`, so the
    same logits, and an exact tie stays one."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < N
    target = tl.load(targets + rows, mask=inside, other=-1).to(tl.int32)
    score = tl.load(scores + rows, mask=inside, other=0.0)
    mask_rows = rows
    if MASK == 2:
        mask_rows = tl.load(mask_index + rows, mask=inside, other=0).to(tl.int32)
    before = tl.zeros((BLOCK_N,), tl.int32)
    row_gain = _row_gain(f, rows, N, D, stride_f, eps, GAIN, BLOCK_N, BLOCK_D)
    first = tl.program_id(1) * classes_per_split
    for start in range(first, tl.minimum(first + classes_per_split, C), BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        logits = _tile_logits(
            f, w, gain, offset, row_gain, rows, cols, N, C, D, stride_f, stride_w, GAIN, OFFSET, TWICE, UPCAST,
            BLOCK_N, BLOCK_C, BLOCK_D,
        )  # fmt: skip
        logits = _masked(logits, allowed, mask_rows, cols, C, MASK)
        other = cols[None, :] != target[:, None]
        lower = cols[None, :] < target[:, None]
        ahead = other & ((logits > score[:, None]) | ((logits == score[:, None]) & lower))
        before += tl.sum(ahead.to(tl.int32), axis=1)
    tl.atomic_add(ranks + rows, before, mask=inside)


@triton.jit
def gather_kernel(
    images, rows, top, left, flip, gain, offset, out, C, H, W, h, w, fill,
    MOVED: tl.constexpr, FLIPPED: tl.constexpr, AFFINE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (b, k): elements k * BLOCK ... of output image b, channels fastest."""
    b = tl.program_id(0)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = element < C * h * w
    channel = element % C
    y = element // C // w
    x = element // C % w
    if FLIPPED:
        x = tl.where(tl.load(flip + b) != 0, w - 1 - x, x)
    if MOVED:
        y += tl.load(top + b).to(tl.int32)
        x += tl.load(left + b).to(tl.int32)
    on_image = (y >= 0) & (y < H) & (x >= 0) & (x < W)
    start = tl.load(rows + b).to(tl.int64) * (C * H * W)
    raw = tl.load(images + start + (channel * H + y) * W + x, mask=inside & on_image, other=0)
    value = tl.where(on_image, raw.to(tl.float32), fill)
    if AFFINE:
        value = value * tl.load(gain + channel, mask=inside, other=0.0)
        value = value + tl.load(offset + channel, mask=inside, other=0.0)
    else:
        value = tl.math.div_rn(value, 255.0)
    place = b.to(tl.int64) * (C * h * w) + element
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


# -- how they are called ---------------------------------------------------------------------------------------------
def choose_tiles(
    num_rows: int, num_classes: int, dtype: torch.dtype, processors: int, *, mask_per_row: bool = False
) -> Tiles:
    """A rule, the same on every call, so that a resumed run adds up in the same order. The classes are split until
    there are about two programs for each of the device's `processors`."""
    wide = dtype in (torch.bfloat16, torch.float16)
    rows, classes = (128, 128) if wide else (64, 64)
    if mask_per_row:  # addresses of a tile of masks need registers, too
        classes = 64
    classes = max(16, min(classes, triton.next_power_of_2(num_classes)))
    rows = max(16, min(rows, triton.next_power_of_2(num_rows)))
    programs = triton.cdiv(num_rows, rows)
    splits = max(1, min(triton.cdiv(num_classes, classes), 2 * processors // programs))
    if not wide:
        return Tiles(rows, classes, 32, splits, 4, 3)
    # two programs of 8 warps share a processor, so that one multiplies while the other looks for its largest logit
    return Tiles(rows, classes, 64, splits, 8, 3, registers=128)


def head_counts(
    features: Tensor,
    head: Head,
    targets: Tensor,
    groups: Tensor,
    out: GroupCounts,
    allowed: Tensor | None = None,
    mask_index: Tensor | None = None,
    tiles: Tiles | None = None,
) -> None:
    """Add the counts of N rows to `out`; arguments as `head_counts_reference`. features: fp32 or bf16, weights are
    converted to that; sums are fp32 without TF32. Reads nothing back, may be captured in a CUDA graph. What a row with
    NaN among its logits counts as is left open.

    Raises RuntimeError for CPU tensors outside Triton's interpreter, ValueError for shapes that do not fit.
    """
    refuse_cpu(features)
    num_rows, width = features.shape
    num_classes = len(head.weight)
    if head.weight.shape[1] != width:
        raise ValueError(f"the head takes {head.weight.shape[1]} features, but there are {width}")
    if allowed is not None and allowed.shape[-1] != num_classes:
        raise ValueError(f"the mask is over {allowed.shape[-1]} classes, but the head has {num_classes}")
    mask_per_row = allowed is not None and allowed.ndim == 2
    if mask_per_row and mask_index is None:
        raise ValueError("several masks need mask_index, the mask of each row")
    if allowed is not None and allowed.numel() >= 2**31:  # the kernel counts places in 32 bits
        raise ValueError(f"the masks have {allowed.numel():,} values, but there may be {2**31 - 1:,}")
    if num_rows == 0:
        return
    device = features.device
    targets, groups = targets.contiguous(), groups.contiguous()
    features = features if features.stride(1) == 1 else features.contiguous()
    weight = head.weight.to(features.dtype)
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    tiles = tiles or choose_tiles(num_rows, num_classes, features.dtype, processors(device), mask_per_row=mask_per_row)
    per_split = triton.cdiv(triton.cdiv(num_classes, tiles.splits), tiles.classes) * tiles.classes
    splits = triton.cdiv(num_classes, per_split)
    gain, offset = class_terms(weight, head)
    wants_loss, wants_top = out.loss is not None, out.top5 is not None
    nothing = out.hits  # stands for a pointer that is not read
    mask = nothing if allowed is None else allowed.contiguous().view(torch.uint8)
    kind = {
        "GAIN": gain is not None, "OFFSET": offset is not None, "TWICE": head.kind == "nearest",
        "MASK": 0 if allowed is None else allowed.ndim, "UPCAST": INTERPRETED,
    }  # fmt: skip
    blocks = {"BLOCK_N": tiles.rows, "BLOCK_C": tiles.classes, "BLOCK_D": tiles.features}
    launch = {"num_warps": tiles.warps, "num_stages": tiles.stages, "maxnreg": tiles.registers, **FUSED}
    given = (features, weight, nothing if gain is None else gain, nothing if offset is None else offset, mask)
    masks = nothing if mask_index is None else mask_index.contiguous()
    numbers = (num_rows, num_classes, width, features.stride(0), weight.stride(0), per_split, head.eps)
    scores = torch.empty(num_rows, device=device) if wants_top else nothing
    part_float = part_class = nothing
    if splits > 1:
        part_float = torch.empty((2 + wants_loss, splits, num_rows), device=device)
        part_class = torch.empty((splits, num_rows), dtype=torch.int32, device=device)
    loss = nothing if out.loss is None else out.loss
    ends: dict[str, Any] = {"LOSS": wants_loss, "KEEP": wants_top, "SPLITS": splits, "UNITS": 1 / LOSS_UNIT}
    grid = (triton.cdiv(num_rows, tiles.rows), splits)
    head_kernel[grid](
        *given, masks, targets, groups, out.hits, loss, scores, part_float, part_class, *numbers,
        **kind, **ends, **blocks, **launch,
    )  # fmt: skip
    if splits > 1:
        join_kernel[(triton.cdiv(num_rows, 128),)](
            targets, groups, out.hits, loss, scores, part_float, part_class, num_rows, **ends, **FUSED, BLOCK_N=128
        )
    if out.top5 is not None:
        ranks = torch.zeros(num_rows, dtype=torch.int32, device=device)
        rank_kernel[grid](*given, masks, targets, scores, ranks, *numbers, **kind, **blocks, **launch)
        among = (ranks < TOP) & (scores > -torch.inf)
        out.top5.index_add_(0, groups, among.to(torch.int64))


def class_terms(weight: Tensor, head: Head) -> tuple[Tensor | None, Tensor | None]:
    """(C,) fp32 factor and summand of each class's products with the features, None where there is none; the factor of
    a row is the kernel's."""
    bias = None if head.bias is None else head.bias.float().contiguous()
    if head.kind == "linear":
        return None, bias
    num_classes, width = weight.shape
    squares = torch.empty(num_classes, device=weight.device)
    squares_kernel[(triton.cdiv(num_classes, 16),)](
        weight, squares, num_classes, width, weight.stride(0), **FUSED, BLOCK_N=16, BLOCK_D=128
    )
    if head.kind == "nearest":
        return None, -squares if bias is None else bias - squares
    return head.scale / (squares.sqrt_() + head.eps), bias


def gather_images(
    images: Tensor,
    rows: Tensor,
    size: tuple[int, int],
    *,
    top: Tensor | None = None,
    left: Tensor | None = None,
    flip: Tensor | None = None,
    gain: Tensor | None = None,
    offset: Tensor | None = None,
    fill: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(N, C, H, W) uint8 at `rows` (B,) int64 -> (B, C, h, w) `dtype`, channels last; arguments as
    `gather_images_reference`. Raises RuntimeError for CPU tensors outside Triton's interpreter, ValueError where
    one of a pair is missing."""
    refuse_cpu(images)
    refuse_halves(top, left, gain, offset)
    channels, height, width = images.shape[1:]
    out = torch.empty(
        (len(rows), channels, *size), dtype=dtype, device=images.device, memory_format=torch.channels_last
    )
    if out.numel() == 0:
        return out
    block = 1024
    flips = rows if flip is None else flip.view(torch.uint8)
    grid = (len(rows), triton.cdiv(channels * size[0] * size[1], block))
    gather_kernel[grid](
        images, rows, rows if top is None else top, rows if left is None else left, flips,
        images if gain is None else gain, images if offset is None else offset, out,
        channels, height, width, *size, float(fill),
        MOVED=top is not None, FLIPPED=flip is not None, AFFINE=gain is not None, BLOCK=block,
        enable_fp_fusion=False,  # gain and offset are rounded apart, as in plain PyTorch
    )  # fmt: skip
    return out


def processors(device: torch.device) -> int:
    """Streaming multiprocessors; 1 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def refuse_cpu(tensor: Tensor) -> None:
    if tensor.device.type == "cpu" and not INTERPRETED:
        raise RuntimeError("Triton kernels need a CUDA device, or TRITON_INTERPRET=1 set before Triton is imported")
