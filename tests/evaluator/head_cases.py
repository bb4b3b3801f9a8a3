"""Cases for the fused head kernel, and the judge of what it counts: float64, row by row, close calls excepted."""

from typing import NamedTuple

import torch
from torch import Tensor

from clbench.evaluator.heads import TOP, GroupCounts, head_logits, rounding_margin
from clbench.methods.base import Head

KINDS = ("linear", "cosine", "nearest", "text")
MASKS = ("none", "shared", "per row")


class Case(NamedTuple):
    features: Tensor
    head: Head
    targets: Tensor
    groups: Tensor
    allowed: Tensor | None
    mask_index: Tensor | None
    num_groups: int

    def to(self, device: str) -> "Case":
        moved = [x.to(device) if isinstance(x, Tensor) else x for x in self]
        head = Head(*(x.to(device) if isinstance(x, Tensor) else x for x in self.head))
        return Case(*moved)._replace(head=head)

    def counts(self, counter, **options) -> GroupCounts:
        out = GroupCounts.zeros(self.num_groups, self.features.device, top5=True, loss=True)
        given = (self.features, self.head, self.targets, self.groups, out, self.allowed, self.mask_index)
        counter(*given, **options)
        return out


def make_case(
    kind: str,
    mask: str,
    seed: int,
    *,
    rows: int,
    classes: int,
    width: int,
    groups: int = 3,
    whole: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """Uneven groups, some of them empty. whole: whole numbers, so that sums are exact and many logits tie."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        if whole:
            return torch.randint(-1, 2, shape, generator=rng).float()
        return torch.randn(shape, generator=rng)

    weight = draw(classes, width)
    weight[classes // 2] = weight[0]  # a tie for every row
    bias = draw(classes) if kind == "linear" and seed % 2 else None
    if bias is not None:
        bias[classes // 2] = bias[0]
    scale = torch.tensor(14.0) if kind == "text" else 10.0
    index = torch.randint(0, groups, (rows,), generator=rng)
    allowed = mask_index = None
    if mask == "shared":
        allowed = torch.rand(classes, generator=rng) < 0.6
    elif mask == "per row":
        allowed = torch.rand((groups + 1, classes), generator=rng) < 0.6
        allowed[-1] = False  # nothing is allowed
        mask_index = torch.randint(0, groups + 1, (rows,), generator=rng)
    return Case(
        draw(rows, width).to(dtype),
        Head(kind, weight, bias, scale),
        torch.randint(0, classes, (rows,), generator=rng),
        index.sort().values if seed % 3 else index,
        allowed,
        mask_index,
        groups + 1,
    )


def assert_counts(case: Case, got: GroupCounts, *, exact: bool = False) -> None:
    """Hits and top-5 counts of every group are float64's, but for rows that a rounding may decide; losses are near."""
    case = case.to("cpu")
    got = GroupCounts(*(x.cpu() for x in got))
    head = case.head._replace(weight=case.head.weight.to(case.features.dtype).double())
    logits = head_logits(case.features.double(), head)
    margin = torch.zeros(len(logits), dtype=torch.float64) if exact else rounding_margin(case.features, case.head)
    if case.allowed is not None:
        rows = case.allowed if case.mask_index is None else case.allowed[case.mask_index]
        logits = logits.masked_fill(~rows, -torch.inf)
    targets = case.targets
    hits, top5, loss, close, close5 = (torch.zeros(case.num_groups, dtype=torch.float64) for _ in range(5))
    for row, (values, target, group) in enumerate(zip(logits, targets.tolist(), case.groups.tolist(), strict=True)):
        score = float(values[target])
        if score == -torch.inf:
            continue
        better = [c for c, v in enumerate(values.tolist()) if v > score or (v == score and c < target)]
        hits[group] += not better
        top5[group] += len(better) < TOP
        loss[group] += float(torch.logsumexp(values, 0)) - score
        others = torch.cat([values[:target], values[target + 1 :]])
        near = int(((others - score).abs() < margin[row]).sum())
        close[group] += near > 0
        close5[group] += near > 0
    rows_of = torch.bincount(case.groups, minlength=case.num_groups)
    assert bool(((got.hits - hits).abs() <= close).all()), (got.hits, hits, close)
    if got.top5 is not None:
        assert bool(((got.top5 - top5).abs() <= close5).all()), (got.top5, top5, close5)
    if got.loss is not None:
        scale = logits[logits > -torch.inf].abs().max() if bool((logits > -torch.inf).any()) else 0
        slack = rows_of * (2.0**-21 + 4 * float(margin.max()) + 2e-6 * (1 + scale))
        assert bool(((got.loss_sums() - loss).abs() <= slack).all()), (got.loss_sums(), loss, slack)
