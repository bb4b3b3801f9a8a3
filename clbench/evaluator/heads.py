"""From features to counts per group, in plain PyTorch: what the fused kernel (`clbench.evaluator.kernels`) must equal.

Shapes: N rows, D features, C classes, G groups, M masks.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.methods.base import Head

__all__ = ["LOSS_UNIT", "TOP", "GroupCounts", "head_counts_reference", "head_logits", "rounding_margin"]

TOP = 5
LOSS_UNIT = 2.0**-20  # nats; losses are added up as whole numbers of it, so that their order does not matter


class GroupCounts(NamedTuple):
    """Counts that are added to, (G,) int64 each. None is not counted.

    hits: rows whose target is the answer. top5: rows whose target is among the five best allowed classes, of equal
    logits the lower ids first. loss: cross entropy over the allowed classes, in units of `LOSS_UNIT`, rounded per row;
    a row whose target is not allowed counts in none of the three.
    """

    hits: Tensor
    top5: Tensor | None = None
    loss: Tensor | None = None

    @classmethod
    def zeros(
        cls, groups: int, device: torch.device | str = "cpu", *, top5: bool = False, loss: bool = False
    ) -> "GroupCounts":
        """All zero."""

        def made(wanted: bool) -> Tensor | None:
            return torch.zeros(groups, dtype=torch.int64, device=device) if wanted else None

        return cls(torch.zeros(groups, dtype=torch.int64, device=device), made(top5), made(loss))

    def loss_sums(self) -> Tensor:
        """(G,) float64, nats."""
        if self.loss is None:
            raise ValueError("losses were not counted; ask for zeros(..., loss=True)")
        return self.loss.double() * LOSS_UNIT


def head_logits(features: Tensor, head: Head) -> Tensor:
    """(N, D) -> (N, C) in the dtype of `features`; see `Head`."""
    weight = head.weight.to(features.dtype)
    if head.kind in ("cosine", "text"):
        features, weight = unit(features, head.eps), unit(weight, head.eps)
    logits = F.linear(features, weight)
    if head.kind in ("cosine", "text"):
        logits = logits * head.scale
    elif head.kind == "nearest":
        logits = 2 * logits - weight.square().sum(1)
    return logits if head.bias is None else logits + head.bias.to(features.dtype)


def unit(x: Tensor, eps: float) -> Tensor:
    out: Tensor = x / (x.norm(dim=1, keepdim=True) + eps)
    return out


def head_counts_reference(
    features: Tensor,
    head: Head,
    targets: Tensor,
    groups: Tensor,
    out: GroupCounts,
    allowed: Tensor | None = None,
    mask_index: Tensor | None = None,
) -> None:
    """Add the counts of N rows to `out`.

    features: (N, D). targets, groups: (N,) int64. allowed: bool, (C,) for all rows, or (M, C) with mask_index (N,)
    int64 saying which of the masks is a row's; None allows all.
    """
    logits = head_logits(features, head)
    if allowed is not None:
        rows = allowed if allowed.ndim == 1 else allowed[_required(mask_index)]
        logits = logits.masked_fill(~rows, -torch.inf)
    score = logits.gather(1, targets[:, None])
    open_target = score[:, 0] > -torch.inf
    right = (logits.argmax(dim=1) == targets) & open_target
    out.hits.index_add_(0, groups, right.to(torch.int64))
    if out.top5 is not None:
        classes = torch.arange(logits.shape[1], device=logits.device)
        before = (logits > score) | ((logits == score) & (classes < targets[:, None]))
        among = (before.sum(dim=1) < TOP) & open_target
        out.top5.index_add_(0, groups, among.to(torch.int64))
    if out.loss is not None:
        loss = torch.logsumexp(logits.double(), dim=1) - score[:, 0].double()
        units = torch.where(open_target, loss.clamp(min=0) / LOSS_UNIT, 0).round()
        out.loss.index_add_(0, groups, units.to(torch.int64))


def rounding_margin(features: Tensor, head: Head) -> Tensor:
    """(N,) float64: logits of a row that differ by less than this may change places between two ways of adding up.

    A sum of D products with unit roundoff u errs by at most about D u sum_d |f_d w_d| (Higham 2002, 3.5); both ways and
    both logits may err, and the norms of a cosine head add as much again. bf16 features: the kernel adds up in fp32, so
    u is that of fp32; the rounding of features and weights to bf16 is common to both ways.
    """
    u = torch.finfo(torch.float32).eps / 2
    f, w = features.double(), head.weight.to(features.dtype).double()
    size = f.abs() @ w.abs().T
    if head.kind in ("cosine", "text"):
        size = size / ((f.norm(dim=1, keepdim=True) + head.eps) * (w.norm(dim=1) + head.eps)) * head.scale
    elif head.kind == "nearest":
        size = 2 * size + w.square().sum(1)
    if head.bias is not None:
        size = size + head.bias.double().abs()
    terms = features.shape[1] + 8
    return 8 * terms * u * size.amax(dim=1)


def _required(mask_index: Tensor | None) -> Tensor:
    if mask_index is None:
        raise ValueError("several masks need mask_index, the mask of each row")
    return mask_index
