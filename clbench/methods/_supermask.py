"""Supermasks: which weights of a network with fixed weights are on, and that network as a few flat vectors.

Card `exssnet`, sections 1 and 2. A score belongs to every weight; in each layer the weights with the largest |score|
are on. All layers of a network, head included, lie behind each other in flat vectors (weights, scores, gradients,
masks): one operation in place of one per layer, and to change the task is to move pointers.

Shapes: P weights of all masked layers, S numbers of batch-norm statistics, T tasks.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from clbench.errors import InputError

__all__ = [
    "MaskedNetwork", "exclusive_mask", "num_kept", "overlap", "pack_bits", "score_gradient", "signed_constant",
    "top_mask", "unpack_bits",
]  # fmt: skip

Layer = nn.Linear | nn.Conv2d
BatchNorm = nn.modules.batchnorm._BatchNorm
SAMPLE = 4096  # scores of a layer that a first guess of its threshold is made from
BIT_VALUES = tuple(2**bit for bit in range(8))
ADVICE = "choose --backbone reduced-resnet18, resnet18-cifar, mlp or mlp-300-100"


# -- masks of one layer ----------------------------------------------------------------------------------------------
def num_kept(numel: int, density: float) -> int:
    """Weights of a layer that are on: `numel - int((1 - density) numel)`, in floating point as the official code.

    >>> num_kept(20, 0.1), num_kept(10, 0.7)
    (2, 7)
    """
    return numel - int((1 - density) * numel)


def top_mask(scores: Tensor, density: float) -> Tensor:
    """Supermask of one layer: bool like `scores`, true for the `num_kept` largest |score|; among equal ones any.
    Source: card, section 2."""
    mask = torch.empty(scores.numel(), device=scores.device)
    select_largest(scores.abs().flatten(), num_kept(scores.numel(), density), mask)
    return mask.view(scores.shape) != 0


def select_largest(values: Tensor, kept: int, mask: Tensor) -> None:
    """Write 1 into `mask` where `values` has its `kept` largest, else 0; among equal ones any. Both (n,) float."""
    torch.ops.clbench.select_largest(values, kept, mask)


def select_by_topk(values: Tensor, kept: int, mask: Tensor) -> None:
    mask.zero_().index_fill_(0, values.topk(kept, sorted=False).indices, 1.0)


def select_by_sample(values: Tensor, kept: int, mask: Tensor) -> None:
    """On a CPU, seven times faster on a large layer: two thresholds from a sample tell nearly all weights, and only
    those between the two are selected from. If the sample misleads, all are."""
    numbers, ones = values.numpy(), mask.numpy()
    sample = np.sort(numbers[:: max(len(numbers) // SAMPLE, 1)])
    expected = len(sample) * kept / len(numbers)
    margin = 2 + 4 * math.sqrt(expected * (1 - kept / len(numbers)))
    low, high = sample[max(int(len(sample) - expected - margin), 0)], sample[-max(int(expected - margin), 1)]
    above = numbers > high
    between = np.flatnonzero((numbers >= low) & ~above)
    missing = kept - int(np.count_nonzero(above))
    if len(numbers) < 4 * SAMPLE or not 0 <= missing <= len(between):
        select_by_topk(values, kept, mask)
        return
    np.copyto(ones, above, casting="unsafe")
    if missing:
        ones[between[np.argpartition(numbers[between], -missing)[-missing:]]] = 1


# An operator of PyTorch's, with a kernel per device. (torch.library.custom_op would import the compiler: 4 s per run.)
OPERATORS = torch.library.Library("clbench", "FRAGMENT")
OPERATORS.define("select_largest(Tensor values, int kept, Tensor(a!) mask) -> ()")
OPERATORS.impl("select_largest", select_by_sample, "CPU")
OPERATORS.impl("select_largest", select_by_topk, "CUDA")


def score_gradient(
    scores: Tensor, weights: Tensor, gradient: Tensor, *, signed: bool = True, out: Tensor | None = None
) -> Tensor:
    """Straight-through gradient of the scores: `sign(s) W dL/d(w_eff)`, for weights that are off as well.

    gradient: of the loss by the effective weights `W m`. signed: the mask is of |s|; else of s, without the sign.
    Source: card, section 2.
    """
    out = torch.mul(weights, gradient, out=out)
    return out.mul_(scores.sign()) if signed else out


def exclusive_mask(mask: Tensor, used: Tensor) -> Tensor:
    """Weights that a task may write: on in its mask (bool) and in no earlier one (`used`, bool). Card, section 2."""
    return mask & ~used


def overlap(mask: Tensor, used: Tensor) -> tuple[float, float]:
    """Percent of a task's mask that earlier masks have claimed, and the claimed part as percent of all weights.

    mask, used: bool of one shape. Source: card, section 4 (sparse and total overlap).
    """
    common = int((mask & used).sum())
    return 100 * common / max(int(mask.sum()), 1), 100 * common / mask.numel()


def signed_constant(weight: Tensor) -> Tensor:
    """`sign(w) sqrt(2 / fan_in)`, fan_in = numbers that feed one output. weight: (out, in, ...). Card, section 1."""
    return weight.sign() * math.sqrt(2 / weight[0].numel())


# -- bits ------------------------------------------------------------------------------------------------------------
def pack_bits(mask: Tensor) -> Tensor:
    """(P,) bool -> (ceil(P / 8),) uint8, first weight in the lowest bit; the last byte is filled with zeros."""
    padded = nn.functional.pad(mask.to(torch.uint8), (0, -len(mask) % 8)).view(-1, 8)
    return (padded * torch.tensor(BIT_VALUES, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, length: int) -> Tensor:
    """(ceil(P / 8),) uint8 -> (P,) bool, P = length."""
    values = torch.tensor(BIT_VALUES, dtype=torch.uint8, device=bits.device)
    return ((bits[:, None] & values) != 0).view(-1)[:length]


# -- a network of masked layers --------------------------------------------------------------------------------------
class MaskedNetwork:
    """The linear and convolution layers of a backbone and of a head over it, as one flat vector of P weights.

    Prepares the modules in place: biases and the affine part of batch norms are taken away (card, section 1), nothing
    requires gradients. What the modules compute with is what `install` was last given.
    weights: (P,) the signed constants they started from.  statistics: (S,) fresh running means and variances.
    Raises InputError for a network that masks cannot be put on; `method` names who asks.
    """

    def __init__(self, backbone: nn.Module, head: nn.Linear, density: float, method: str) -> None:
        check_network(backbone, method)
        norms = [module for module in backbone.modules() if isinstance(module, BatchNorm)]
        layers = [(name, module) for name, module in backbone.named_modules() if isinstance(module, Layer)]
        for norm in norms:
            norm.weight = norm.bias = None  # type: ignore[assignment]  # how PyTorch has it without affine
            norm.affine = False
            norm.num_batches_tracked = None  # of no use with a momentum, and state that no task holds
        for _, layer in [*layers, ("head", head)]:
            layer.bias = None
        self.backbone, self.head, self.norms = backbone, head, norms
        self.names = [f"{name}.weight" for name, _ in layers]  # parameters of the backbone; the head's comes last
        self._slots = [layer.weight.requires_grad_(False) for _, layer in [*layers, ("head", head)]]
        named = {id(buffer): (name, buffer) for name, buffer in backbone.named_buffers()}
        found = [named[id(b)] for norm in norms for b in (norm.running_mean, norm.running_var)]
        self._buffer_names, self._buffers = [name for name, _ in found], [buffer for _, buffer in found]
        self.sizes = [slot.numel() for slot in self._slots]
        self.kept = [num_kept(size, density) for size in self.sizes]
        for name, kept in zip([*self.names, "the head"], self.kept, strict=True):
            if kept == 0:
                raise InputError(
                    f"{method}: density={density} leaves no weight of {name.removesuffix('.weight')} on; raise it"
                )
        self._last = [channels_last(slot) for slot in self._slots]
        self.bounds = self.flatten([slot.new_full(slot.shape, slot[0].numel() ** -0.5) for slot in self._slots])
        self.weights = self.flatten([signed_constant(slot.detach()) for slot in self._slots])
        self._magnitudes = torch.empty_like(self.weights)
        parts = [torch.full_like(b, i % 2).flatten() for i, b in enumerate(self._buffers)]  # mean 0, variance 1
        self.statistics = torch.cat(parts) if parts else self.weights[:0].clone()
        self._installed = (self.weights, self.statistics)
        self.install(*self._installed)

    def __len__(self) -> int:
        """P."""
        return len(self.weights)

    def __call__(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, outputs of the head), with what is installed."""
        out: Tensor = self.head(self.backbone(images))
        return out

    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        """One tensor per layer -> (P,), in the order of the layer's memory."""
        parts = [t.permute(0, 2, 3, 1) if last else t for t, last in zip(tensors, self._last, strict=True)]
        return torch.cat([part.reshape(-1) for part in parts])

    def layers(self, flat: Tensor) -> list[Tensor]:
        """(P,) -> one view per layer with the layer's shape, head last."""
        out = []
        for piece, slot, last in zip(flat.split(self.sizes), self._slots, self._last, strict=True):
            if last:
                outputs, inputs, height, width = slot.shape
                out.append(piece.view(outputs, height, width, inputs).permute(0, 3, 1, 2))
            else:
                out.append(piece.view(slot.shape))
        return out

    def buffers(self, statistics: Tensor) -> dict[str, Tensor]:
        """(S,) -> a view per batch-norm buffer of the backbone, by name."""
        return dict(zip(self._buffer_names, self._split(statistics), strict=True))

    def _split(self, statistics: Tensor) -> Sequence[Tensor]:
        return statistics.split([buffer.numel() for buffer in self._buffers]) if self._buffers else ()

    # -- what the modules compute with ---------------------------------------------------------------------------
    def install(self, weights: Tensor, statistics: Tensor) -> None:
        """Let the modules' tensors be views of (P,) effective weights and (S,) batch-norm statistics."""
        for slot, piece in zip(self._slots, self.layers(weights), strict=True):
            slot.data = piece
        for buffer, piece in zip(self._buffers, self._split(statistics), strict=True):
            buffer.data = piece
        self._installed = (weights, statistics)

    @contextlib.contextmanager
    def showing(self, weights: Tensor, statistics: Tensor) -> Iterator[None]:
        """`install` inside the block; behind it what was there."""
        before = self._installed
        self.install(weights, statistics)
        try:
            yield
        finally:
            self.install(*before)

    def train(self, on: bool) -> None:
        """Training mode with gradients of the installed weights, or neither."""
        self.backbone.train(on)
        self.head.train(on)
        for slot in self._slots:
            slot.requires_grad_(on).grad = None

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """Of a loss by the installed weights, one per layer, head last."""
        for slot in self._slots:
            slot.grad = None
        loss.backward()
        return [slot.grad for slot in self._slots if slot.grad is not None]

    # -- scores and masks ----------------------------------------------------------------------------------------
    def draw_scores(self, rng: torch.Generator) -> Tensor:
        """(P,) fresh scores: uniform in +-1/sqrt(fan_in), which is Kaiming's with a = sqrt(5). Card, section 2."""
        drawn = torch.empty_like(self.weights).uniform_(-1, 1, generator=rng)
        return drawn.mul_(self.bounds)

    def mask(self, scores: Tensor, out: Tensor | None = None) -> Tensor:
        """(P,) scores -> (P,) of 0 and 1 in their dtype: `top_mask` of every layer, into `out` if given."""
        magnitudes = torch.abs(scores, out=self._magnitudes)
        out = torch.empty_like(scores) if out is None else out
        for piece, target, kept in zip(magnitudes.split(self.sizes), out.split(self.sizes), self.kept, strict=True):
            select_largest(piece, kept, target)
        return out


def channels_last(tensor: Tensor) -> bool:
    """Whether a weight lies in memory with its input channels last (and not in the usual order as well)."""
    return tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


def check_network(backbone: nn.Module, method: str) -> None:
    """Refuse a backbone that masks cannot be put on: the sentence says what is missing or left over."""
    name = getattr(backbone, "name", type(backbone).__name__)
    if getattr(backbone, "pretrained_on", ()):
        raise InputError(
            f"{method} starts all weights as signed constants, so the pretrained weights of backbone {name} would be "
            f"lost: leave out --weights, or give --backbone-set pretrained=false"
        )
    modules = list(backbone.modules())
    if not any(isinstance(module, Layer) for module in modules):
        raise InputError(f"{method} masks linear and 2-d convolution layers, but backbone {name} has none: {ADVICE}")
    covered = {
        id(p) for module in modules if isinstance(module, Layer | BatchNorm) for p in module.parameters(recurse=False)
    }
    rest = [n for n, p in backbone.named_parameters() if id(p) not in covered]
    if rest:
        raise InputError(
            f"{method} masks linear and 2-d convolution layers, but backbone {name} also learns {rest[0]} "
            f"({len(rest)} tensors in all), which no mask would cover: {ADVICE}"
        )
    if any(isinstance(m, BatchNorm) and (m.momentum is None or m.running_mean is None) for m in modules):
        raise InputError(
            f"{method} keeps running statistics of batch norms for each task, but those of backbone {name} have none "
            f"or no momentum: {ADVICE}"
        )
