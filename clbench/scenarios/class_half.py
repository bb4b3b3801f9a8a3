"""One half of a data set's classes, cut into tasks as `class_incremental` does: the pairs of the two-phase protocol.

Source: csm9493/GTEP (`two_phase_protocol` card, section 3): classes 0-49 of CIFAR-100 to tune on, 50-99 to evaluate on;
the order seed shuffles the order inside a half only. Those halves go by class id, which is alphabetical there;
`half_seed` draws the halves at random instead.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Literal

import numpy as np

from clbench.data.classes import LabelTable
from clbench.errors import InputError
from clbench.scenarios import class_incremental
from clbench.scenarios.draws import class_permutation
from clbench.scenarios.model import Scenario, StreamDefaults
from clbench.scenarios.params import param
from clbench.scenarios.rows import Ints, labels_at

__all__ = ["Params", "build", "half_of"]

DEFAULTS = StreamDefaults()


@dataclass(frozen=True)
class Params(class_incremental.Params):
    half: Literal["first", "second"] = param(
        "first", "which half of the classes; of an odd number the last is left out"
    )
    half_seed: int | None = param(
        None, "draws the two halves at random, the same for both; without it they go by class id", low=0
    )


def build(
    tables: Sequence[LabelTable],
    seed: int,
    params: Params,
    *,
    id: str = "class-half@1",
    defaults: StreamDefaults = DEFAULTS,
) -> Scenario:
    """`class_incremental.build` on the classes of one half; `order=seeded` is numpy's permutation of the half, and a
    list must hold classes of the half only. Raises InputError if a parameter cannot be met."""
    if len(tables) != 1:
        raise InputError(f"{id}: a class-incremental scenario takes one data set, not {len(tables)}")
    where = f"{id} on {tables[0].dataset}"
    _, names = labels_at(tables[0], params.label_level, where)
    if len(names) < 2:
        raise InputError(f"{where}: one class cannot be halved")
    ids = half_of(len(names), params.half, params.half_seed)
    if params.order == "seeded":
        ids = ids[class_permutation(seed, len(ids))]
    elif params.order != "natural":
        outside = sorted(set(params.order) - set(ids.tolist()))
        if outside:
            raise InputError(f"{where}: order holds class {outside[0]}, which is not in the {params.half} half")
        ids = np.asarray(params.order, dtype=np.int64)
    plain = {item.name: getattr(params, item.name) for item in fields(class_incremental.Params)}
    whole = class_incremental.Params(**{**plain, "order": tuple(ids.tolist())})
    built = class_incremental.build(tables, seed, whole, id=id, defaults=defaults)
    return replace(built, params=asdict(params))


def half_of(num_classes: int, half: str, half_seed: int | None) -> Ints:
    """Ascending ids of the `first` or `second` half of the classes.

    >>> half_of(7, "second", None).tolist()
    [3, 4, 5]
    """
    ids = np.arange(num_classes) if half_seed is None else class_permutation(half_seed, num_classes)
    size = num_classes // 2
    return np.sort(ids[:size] if half == "first" else ids[size : 2 * size])
