"""Which task images belong to, from the masks alone (SupSup's settings GNs and GNu; card `exssnet`, section 2).

All candidate masks are superposed, `W sum_i a_i m_i` with equal a_i; the task whose a_i would lower an objective of the
outputs fastest is the answer: at once (`oneshot`), or by dropping the worse half of the candidates again and again
(`binary`). Images that are taken to be of one task (a block) decide together.

Shapes: N blocks, V images per block, n candidate tasks, P weights, S batch-norm numbers, O outputs of the head.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call, vmap
from torch.nn import functional as F

from clbench.methods._supermask import MaskedNetwork

__all__ = ["entropy", "forward_blocks", "g_objective", "infer_tasks", "keep_better_half"]

Objective = Callable[[Tensor], Tensor]


def entropy(logits: Tensor) -> Tensor:
    """(..., O) -> (...): entropy of the softmax in nats: small where one output stands out."""
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)


def g_objective(logits: Tensor, num_real: int) -> Tensor:
    """(..., O) -> (...): log-sum-exp whose gradient reaches the outputs behind the first `num_real` alone: no class has
    those, training pushes them down, and under another task's mask they stay up."""
    return torch.cat([logits[..., :num_real].detach(), logits[..., num_real:]], -1).logsumexp(-1)


def keep_better_half(gradients: Tensor, keep: Tensor, count: int) -> Tensor:
    """Of `count` candidates in each row of `keep` (N, n) bool, the `ceil(count / 2)` of lowest gradient (N, n)."""
    order = gradients.masked_fill(~keep, torch.inf).argsort(dim=1, stable=True)
    return torch.zeros_like(keep).scatter_(1, order[:, : -(-count // 2)], True)


def forward_blocks(network: MaskedNetwork, weights: Tensor, statistics: Tensor, images: Tensor) -> Tensor:
    """Outputs (N, V, O) of blocks of images (N, V, ...), each block by weights (P,) and statistics (S,) of its own."""

    def one(flat: Tensor, numbers: Tensor, block: Tensor) -> Tensor:
        *body, head = network.layers(flat)
        state = dict(zip(network.names, body, strict=True)) | network.buffers(numbers)
        return F.linear(functional_call(network.backbone, state, (block,)), head)

    out: Tensor = vmap(one)(weights, statistics, images)
    return out


def infer_tasks(
    network: MaskedNetwork, weights: Tensor, statistics: Tensor, images: Tensor, objective: Objective, *, binary: bool
) -> Tensor:
    """(N,) int64, the candidate that each block of images (N, V, ...) belongs to.

    weights: (n, P) masked weights of the candidates; statistics: (n, S). While masks are superposed so are the batch
    norms' statistics (ours: the networks of the paper's experiments have no batch norm there). Ties: the lowest.
    """
    blocks, count = len(images), len(weights)
    keep = torch.ones((blocks, count), dtype=torch.bool, device=images.device)
    if count == 1:
        return keep.long().argmin(1)
    while True:
        gradients = coefficient_gradients(network, weights, statistics, images, objective, keep)
        if not binary or count == 2:
            return gradients.masked_fill(~keep, torch.inf).argmin(1)
        keep = keep_better_half(gradients, keep, count)
        count = -(-count // 2)


def coefficient_gradients(
    network: MaskedNetwork, weights: Tensor, statistics: Tensor, images: Tensor, objective: Objective, keep: Tensor
) -> Tensor:
    """(N, n): derivative of a block's mean objective by each coefficient, at equal ones over the kept candidates."""
    with torch.enable_grad():
        shares = (keep / keep.sum(1, keepdim=True)).to(weights.dtype).requires_grad_()
        outputs = forward_blocks(network, shares @ weights, (shares @ statistics).detach(), images)
        return torch.autograd.grad(objective(outputs).mean(1).sum(), shares)[0]


def named_objective(name: str, num_real: int) -> Objective:
    """`entropy`, or `g` with the outputs from `num_real` on as superfluous ones."""
    return entropy if name == "entropy" else functools.partial(g_objective, num_real=num_real)
