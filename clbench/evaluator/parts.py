"""An evaluator that also counts each group's subset in random parts, for what noise does to minima.

The counts of a group are the sums over its parts, so nothing else of the evaluator changes: a part is a group to the
kernels. See `clbench.metrics.minimum_noise` for what the parts are good for.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clbench.errors import InputError
from clbench.evaluator.evaluator import Evaluator
from clbench.rng import generator

__all__ = ["PARTS", "PartsEvaluator"]

PARTS = 10


class PartsEvaluator(Evaluator):
    """`Evaluator` with G * PARTS counters; `drain` gives `parts` (S, G, PARTS) hits and `part_totals` (G, PARTS) rows
    besides. Which row is in which part is a function of the run's seed."""

    def __init__(self, *arguments: Any, seed: int, **options: Any) -> None:
        super().__init__(*arguments, seed=seed, **options)
        part = torch.cat([shares(size, seed, group) for group, size in enumerate(self.sizes)])
        number = self.subset.group * PARTS + part.to(self.device)
        self.subset = self.subset._replace(group=number)
        self._table = self._table.new_zeros((len(self._table), len(self.sizes) * PARTS))
        self.part_totals = torch.bincount(number.cpu(), minlength=self._table.shape[1]).reshape(-1, PARTS)

    def drain(self, start: int = 0) -> dict[str, Any]:
        drained = super().drain(start)
        parts = drained["hits"].reshape(-1, len(self.sizes), PARTS)
        return {**drained, "hits": parts.sum(dim=2), "parts": parts, "part_totals": self.part_totals}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["hits"].shape[1] != self._table.shape[1]:
            raise InputError("this checkpoint was made by an earlier version of clbench; use --fresh to start anew")
        super().load_state_dict(state)


def shares(size: int, seed: int, group: int) -> Tensor:
    """(size,) int64 part of each row of a group's subset: sizes that differ by at most 1, drawn once."""
    return torch.randperm(size, generator=generator(seed, "evaluation-parts", group)) % PARTS
