"""CLIB's adaptive learning rate: two rates in turns, and Welch's t-test on which of them lowers the memory's loss more.

Koh et al., ICLR 2022; `hle` card, section 1.5. All of it is decided on the device: the rate is a tensor that the
optimiser reads, so no test result has to come back to the host.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clbench.memory.importance import ImportanceMemory

__all__ = ["AdaptiveRate", "student_tail", "welch_p_value"]

WARM_UP = 20  # refreshes whose loss changes are not counted
NODES = 48


@lru_cache(maxsize=8)
def quadrature(device: torch.device) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre nodes and weights for [0, 1], float64."""
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    return torch.from_numpy((nodes + 1) / 2).to(device), torch.from_numpy(weights / 2).to(device)


def student_tail(t: Tensor, df: Tensor) -> Tensor:
    """0-d P(T > t) of Student's t distribution with df >= 2 degrees of freedom (float64).

    With t = sqrt(df) tan(angle) the density turns into cos(angle)^(df - 1), smooth on a bounded interval.
    """
    nodes, weights = quadrature(t.device)
    angle = torch.atan(t / df.sqrt())
    part = angle * (weights * torch.cos(angle * nodes) ** (df - 1)).sum()
    half = math.sqrt(math.pi) / 2 * torch.exp(torch.lgamma(df / 2) - torch.lgamma((df + 1) / 2))
    return (0.5 * (1 - part / half)).clamp(0, 1)


def welch_p_value(a: Tensor, b: Tensor) -> Tensor:
    """0-d p-value of Welch's one-sided t-test that the mean of a (n,) is greater than that of b (m,); NaN if neither
    varies."""
    a, b = a.double(), b.double()
    spread_a, spread_b = a.var() / len(a), b.var() / len(b)
    spread = spread_a + spread_b
    df = spread**2 / (spread_a**2 / (len(a) - 1) + spread_b**2 / (len(b) - 1))
    return student_tail((a.mean() - b.mean()) / spread.sqrt(), df)


class AdaptiveRate:
    """`rate`, a 0-d float32 tensor, is in turns a high rate and `step` times it, for `period` refreshes each.

    At each turn the mean fall of the losses of the exemplars that were there at the last one is noted for the rate that
    was in use. When the last `length` falls of both are known and differ (one-sided Welch test, p < `significance`),
    both rates move by `step` towards the better one, and the falls are forgotten.
    """

    def __init__(
        self,
        rate: float,
        memory: ImportanceMemory,
        *,
        step: float = 0.95,
        period: int = 10,
        length: int = 10,
        significance: float = 0.05,
    ) -> None:
        device = memory.counts.device
        self.memory = memory
        self.step, self.period, self.length, self.significance = step, period, length, significance
        self.count = 0  # refreshes so far
        self.turned_at = 0  # the memory's num_seen at the last turn; 0 before the first
        self.rates = torch.tensor([step * rate, rate], dtype=torch.float64, device=device)  # low, high
        self.high = torch.ones((), dtype=torch.bool, device=device)
        self.falls = torch.zeros((2, length), dtype=torch.float64, device=device)  # of the low and the high rate
        self.known = torch.zeros(2, dtype=torch.int64, device=device)
        self.rate = torch.tensor(rate, dtype=torch.float32, device=device)
        self._before = torch.zeros(memory.capacity, dtype=torch.float64, device=device)

    def refreshed(self) -> None:
        """Tell that the memory's losses are new."""
        self.count += 1
        if self.count % self.period:
            return
        if self.turned_at and self.count > WARM_UP:
            self._note()
        memory = self.memory
        self._before[: len(memory)] = memory.loss
        self.turned_at = memory.num_seen
        self.high.logical_not_()
        self._decide()
        self.rate.copy_(torch.where(self.high, self.rates[1], self.rates[0]))

    def _note(self) -> None:
        """Append the mean fall since the last turn to the list of the rate in use."""
        memory = self.memory
        stayed = memory.arrived < self.turned_at
        fall = (self._before[: len(memory)] - memory.loss).masked_fill(~stayed, 0).sum() / stayed.sum().clamp(min=1)
        used = torch.stack([~self.high, self.high])
        longer = torch.cat([self.falls[:, 1:], fall.expand(2, 1)], dim=1)
        self.falls.copy_(torch.where(used[:, None], longer, self.falls))
        self.known.add_(used).clamp_(max=self.length)

    def _decide(self) -> None:
        full = (self.known == self.length).all()
        p = welch_p_value(self.falls[0], self.falls[1])
        down, up = full & (p < self.significance), full & (p > 1 - self.significance)
        low, high = self.rates.unbind()
        lower, higher = torch.stack([low * self.step, low]), torch.stack([high, high / self.step])
        self.rates.copy_(torch.where(down, lower, torch.where(up, higher, self.rates)))
        decided = down | up
        self.known.masked_fill_(decided, 0)
        self.high.logical_xor_(decided)  # the source turns once more as it decides

    def state_dict(self) -> dict[str, Any]:
        return {
            "count": self.count,
            "turned_at": self.turned_at,
            "rates": self.rates.clone(),
            "high": self.high.clone(),
            "falls": self.falls.clone(),
            "known": self.known.clone(),
            "rate": self.rate.clone(),
            "before": self._before[: min(self.turned_at, self.memory.capacity)].clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count, self.turned_at = state["count"], state["turned_at"]
        for name in ("rates", "high", "falls", "known", "rate"):
            getattr(self, name).copy_(state[name])
        self._before[: len(state["before"])] = state["before"]
