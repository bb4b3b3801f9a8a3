import json
from pathlib import Path

import numpy as np
import pytest

from clbench.scenarios.draws import class_permutation, frozen_random, row_keys

ORDERS = json.loads((Path(__file__).parent / "fixtures" / "class_order.json").read_text())


@pytest.mark.parametrize("num_classes", [100, 196, 200])
def test_orders_of_seed_1993(num_classes: int) -> None:
    assert class_permutation(1993, num_classes).tolist() == ORDERS[f"n{num_classes}"]
    assert class_permutation(1993, 1000)[:20].tolist() == ORDERS["n1000_first20"]


def test_order_of_the_online_protocol() -> None:
    # online_baselines section 4: seed 0 and 2026 on CIFAR-10, first run
    assert class_permutation(0, 10).tolist() == [2, 8, 4, 9, 1, 6, 7, 3, 0, 5]
    assert class_permutation(2026, 10).tolist() == [7, 3, 9, 8, 4, 5, 0, 2, 6, 1]


def test_the_new_generator_of_numpy_is_another_order() -> None:
    assert np.random.default_rng(1993).permutation(100).tolist() != ORDERS["n100"]


def test_frozen_draws_stay_as_they_are() -> None:
    # whoever changes these changes every pinned fingerprint: see tests/golden
    assert frozen_random(0, "subset").randint(0, 2**31, 3).tolist() == [2023098969, 1239591515, 573934367]
    assert frozen_random(0, "row order").random_sample(2).tolist() == [0.6852142909956122, 0.5021347835561761]


def test_row_keys() -> None:
    keys = row_keys(0, "subset", 10_000)
    assert keys.shape == (10_000,)
    assert 0 <= keys.min() < keys.max() < 1
    assert abs(keys.mean() - 0.5) < 0.01
    assert np.array_equal(row_keys(0, "subset", 100), keys[:100])
    assert not np.array_equal(row_keys(1, "subset", 100), keys[:100])
    assert not np.array_equal(row_keys(0, "row order", 100), keys[:100])
