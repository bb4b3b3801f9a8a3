"""Classifiers over features, with all classes from the start: static shapes, rows that can be drawn anew.

`as_head()` gives (kind, weight, bias, scale), the fields of `clbench.methods.base.Head`.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["CosineHead", "LinearHead"]

HeadFields = tuple[str, Tensor, Tensor | None, float]


class LinearHead(nn.Module):
    """(B, D) -> (B, C): F W^T + b. weight: (C, D), bias: (C,) or None; all zero until `reset`."""

    def __init__(self, num_features: int, num_classes: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_classes, num_features))
        self.bias = nn.Parameter(torch.zeros(num_classes)) if bias else None

    def reset(self, rows: Tensor, rng: torch.Generator, std: float | None = 0.02) -> None:
        """Draw the rows (r,) int64 of weight and bias anew from `rng`, without a host read; no other row changes.

        std: weights normal with this deviation, cut to [-2, 2], bias 0 (SLCA). None: PyTorch's default for linear
        layers, weights and bias uniform in +-1/sqrt(D).
        """
        weight = torch.empty((len(rows), self.weight.shape[1]), device=rng.device)
        bias = torch.zeros(len(rows), device=rng.device)
        if std is None:
            bound = 1 / math.sqrt(self.weight.shape[1])
            weight.uniform_(-bound, bound, generator=rng)
            bias.uniform_(-bound, bound, generator=rng)
        else:
            nn.init.trunc_normal_(weight, std=std, generator=rng)
        with torch.no_grad():
            self.weight.index_copy_(0, rows, weight.to(self.weight))
            if self.bias is not None:
                self.bias.index_copy_(0, rows, bias.to(self.bias))

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight, self.bias)

    def as_head(self) -> HeadFields:
        return "linear", self.weight, self.bias, 1.0


class CosineHead(nn.Module):
    """(B, D) -> (B, C): scale * F/(|F| + eps) . W/(|W| + eps), no bias. weight: (C, D), zero (logits 0) until `reset`.

    Source: online_baselines card, 2.4 (scale 10, eps 1e-5).
    """

    def __init__(self, num_features: int, num_classes: int, *, scale: float = 10.0, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_classes, num_features))
        self.scale = scale
        self.eps = eps

    def reset(self, rows: Tensor, rng: torch.Generator, std: float = 0.02) -> None:
        """Draw the rows (r,) int64 anew from `rng`, as `LinearHead.reset`."""
        weight = torch.empty((len(rows), self.weight.shape[1]), device=rng.device)
        nn.init.trunc_normal_(weight, std=std, generator=rng)
        with torch.no_grad():
            self.weight.index_copy_(0, rows, weight.to(self.weight))

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * F.linear(self._unit(features), self._unit(self.weight))

    def _unit(self, x: Tensor) -> Tensor:
        # The smallest normal number keeps the norm's gradient finite at 0 and changes no other value.
        return x / (x.square().sum(1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny).sqrt() + self.eps)

    def as_head(self) -> HeadFields:
        return "cosine", self.weight, None, self.scale
