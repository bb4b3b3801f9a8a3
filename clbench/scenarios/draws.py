"""Random draws that end up in index tables.

A fingerprint pinned today must hold under every later version of the libraries. numpy promises this for the stream of
its legacy `RandomState`; torch promises nothing for `randperm`, nor numpy for `default_rng`.
"""

import numpy as np
import numpy.typing as npt

from clbench.errors import InputError
from clbench.rng import derive_seed

__all__ = ["class_permutation", "frozen_random", "row_keys"]


def class_permutation(seed: int, num_classes: int) -> npt.NDArray[np.int64]:
    """(C,) class order of the field: `np.random.seed(seed); np.random.permutation(C)` (PyCIL, PILOT, SLCA).

    >>> class_permutation(1993, 100)[:5].tolist()
    [68, 56, 78, 8, 23]
    """
    if not 0 <= seed < 2**32:
        raise InputError(f"order seed {seed} is out of range: numpy's permutation takes 0 to {2**32 - 1}")
    return np.random.RandomState(seed).permutation(num_classes).astype(np.int64)


def frozen_random(seed: int, purpose: str, *keys: int | str) -> np.random.RandomState:
    """Return a fresh generator that depends on the arguments alone (see `clbench.rng`)."""
    value = derive_seed(seed, purpose, *keys)
    return np.random.RandomState(np.array([value & 0xFFFFFFFF, value >> 32], dtype=np.uint32))


def row_keys(seed: int, purpose: str, num_rows: int) -> npt.NDArray[np.float64]:
    """(N,) uniform in [0, 1), one per row of the store: sort by them to shuffle, take the smallest to draw a subset.
    A row's key does not depend on which other rows, classes or orders are in use."""
    return frozen_random(seed, purpose).random_sample(num_rows)
