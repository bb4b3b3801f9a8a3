"""The whole summary, the registry that describes it, and several seeds."""

import subprocess
import sys

import numpy as np
import pytest
from curves import Plain, plain_curves
from hypothesis import given
from hypothesis import strategies as st

from clbench.errors import InputError
from clbench.metrics import aggregate, find_metric, list_metrics, summarise, t_quantile

R = [[0.9, 0.2], [0.6, 0.8]]
CURVE = Plain({0: [(0, 0.1), (1, 0.9), (2, 0.2), (3, 0.5)], 1: [(2, 0.5), (3, 0.6)]}, [1, 3]).curve()


def test_settings_pool_or_average() -> None:
    given_ = {"group_task": [0, 1], "sizes": [30, 10], "mask": "all"}
    pooled = summarise(R, setting="class", **given_)
    assert pooled["final_accuracy"] == pooled["a_last"] == pytest.approx(0.65)
    assert pooled["average_incremental_accuracy"] == pytest.approx((0.9 + 0.65) / 2)
    for setting in ("task", "domain"):
        mean = summarise(R, setting=setting, **given_)
        assert mean["final_accuracy"] == mean["last"] == pytest.approx(0.7)
        assert mean["a_last"] == pytest.approx(0.65)


def test_transfers_are_none_where_they_are_zero_by_construction() -> None:
    given_ = {"group_task": [0, 1], "sizes": [10, 10], "setting": "class", "before": [0.1, 0.05]}
    seen = summarise(R, mask="seen", **given_)
    assert [seen[key] for key in ("forward_transfer", "transfer", "avg")] == [None, None, None]
    free = summarise(R, mask="all", **given_)
    assert free["forward_transfer"] == pytest.approx(0.15)
    assert free["transfer"] == pytest.approx(0.2)
    assert free["avg"] == pytest.approx(0.625)
    assert summarise(R, mask="all", **{**given_, "before": None})["forward_transfer"] is None


def test_every_key_of_the_registry_is_there_and_no_other() -> None:
    keys = [key for metric in list_metrics() for key in metric.keys]
    given_ = {"group_task": [0, 1], "sizes": [10, 10], "setting": "class", "mask": "all"}
    with_curve, without = summarise(R, curve=CURVE, before=[0, 0], **given_), summarise(R, **given_)
    assert list(with_curve) == list(without) == keys
    assert without["min_accuracy"] is without["wf_10"] is None
    undefined = {key for key, value in with_curve.items() if value is None}
    assert undefined == {
        "recovery_iterations", "lca",  # it does not recover, and has fewer than 10 evaluations
        "f_last", "facilitation_slope", "facilitation_missing",  # not of this protocol
        *(f"{key}_{what}" for key in ("min_accuracy", "worst_case_accuracy") for what in ("corrected", "low", "high")),
    }  # fmt: skip
    assert with_curve["recovery_missing"] == 1
    assert with_curve["min_accuracy"] == pytest.approx(0.2)
    assert with_curve["stability_gap"] == pytest.approx(0.7)


def test_keys_promised_to_readers_of_the_record() -> None:
    promised = """final_accuracy average_incremental_accuracy forgetting backward_transfer forward_transfer
        min_accuracy worst_case_accuracy wf_10 wf_100 wp_10 wp_100 stability_gap
        recovery_iterations a_auc a_last transfer avg last"""
    assert set(promised.split()) <= {metric.key for metric in list_metrics()}
    assert find_metric("min_accuracy").sampling_error
    assert find_metric("recovery_iterations").unit == "steps"
    with pytest.raises(InputError, match="did you mean 'forgetting'"):
        find_metric("forgeting")


@given(plain_curves())
def test_a_summary_is_never_nan(plain: Plain) -> None:
    size = len(plain.ends)
    matrix = np.tril(np.full((size, size), 0.5))
    out = summarise(
        matrix, group_task=np.arange(size), sizes=np.full(size, 10), setting="class", mask="all", curve=plain.curve()
    )
    assert all(value is None or np.isfinite(value) for value in out.values())
    fractions = [out[m.key] for m in list_metrics() if m.unit == "fraction" and out[m.key] is not None]
    assert all(-1 <= value <= 1 for value in fractions)


def test_list_is_read_without_torch() -> None:
    code = "import clbench.metrics as m, sys; assert len(m.list_metrics()) > 15; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# -- several seeds ----------------------------------------------------------------------------------------------------
def test_aggregate_by_hand() -> None:
    out = aggregate([{"a": 0.5, "b": None}, {"a": 0.7, "b": 0.1}, {"a": 0.9, "b": None}])
    assert out["a"].mean == pytest.approx(0.7)
    assert out["a"].std == pytest.approx(0.2)
    assert out["a"].half_width == pytest.approx(4.302652729911275 * 0.2 / np.sqrt(3))
    assert out["a"].num == 3
    assert (out["b"].mean, out["b"].std, out["b"].half_width, out["b"].num) == (0.1, None, None, 1)
    assert aggregate([{"a": None}]) == {}


@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
@pytest.mark.parametrize("degrees", [*range(1, 31), 50, 99, 100, 1000])
def test_t_quantile_is_scipys(degrees: int, level: float) -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    assert t_quantile(degrees, level) == pytest.approx(scipy_stats.t.ppf((1 + level) / 2, degrees), rel=1e-10)


def test_t_quantile_of_the_printed_tables() -> None:
    table = {1: 12.706, 2: 4.303, 4: 2.776, 9: 2.262, 30: 2.042, 120: 1.980}
    for degrees, value in table.items():
        assert t_quantile(degrees) == pytest.approx(value, abs=6e-4)
    with pytest.raises(ValueError, match="degree"):
        t_quantile(0)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=20))
def test_aggregate_is_numpys(values: list[float]) -> None:
    out = aggregate([{"a": value} for value in values])["a"]
    assert out.mean == pytest.approx(np.mean(values))
    assert out.std == pytest.approx(np.std(values, ddof=1), abs=1e-12)
