"""Drawing trials: points in [0, 1) per named dimension. Seeded; the same name gets the same numbers in every method."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clbench.rng import derive_seed

__all__ = ["quasi_points", "uniform_points"]

# columns of the Sobol sequence by name: the ones that many methods share come first
COMMON = ("lr", "batch_size", "weight_decay", "epochs", "momentum", "temperature", "replay_batch_size", "alpha", "beta")
SOBOL_COLUMNS = 64

Points = list[dict[str, float]]


def uniform_points(names: Sequence[str], trials: int, seed: int) -> Points:
    """Independent uniform draws, a pure function of (seed, trial, name): `random search` of the card.

    >>> uniform_points(["lr"], 2, 0)[1]["lr"] == uniform_points(["wd", "lr"], 5, 0)[1]["lr"]
    True
    """
    return [{name: derive_seed(seed, "trial", trial, name) / 2**63 for name in names} for trial in range(trials)]


def quasi_points(names: Sequence[str], trials: int, seed: int) -> Points:
    """Scrambled Sobol points (scipy), which fill the space more evenly than independent draws do.

    One column per name: a fixed one for the names of `COMMON`, the next free ones, in alphabetical order, for others.
    """
    from scipy.stats import qmc

    others = [name for name in sorted(names) if name not in COMMON]
    column = {name: COMMON.index(name) for name in names if name in COMMON}
    column |= {name: len(COMMON) + index for index, name in enumerate(others)}
    width = max(SOBOL_COLUMNS, len(COMMON) + len(others))  # fixed, as the scrambling depends on it
    made: Any = qmc.Sobol(width, scramble=True, rng=np.random.default_rng(derive_seed(seed, "sobol")))
    points: NDArray[np.float64] = made.random_base2(max(int(trials - 1).bit_length(), 0))[:trials]
    return [{name: float(row[column[name]]) for name in names} for row in points]
