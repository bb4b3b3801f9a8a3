"""The table of published numbers: every entry can be found, placed and judged, and the loader refuses what cannot."""

import math
from typing import Any

import pytest

from clbench.methods.registry import find as find_method
from clbench.metrics.registry import find_metric
from clbench.report.published import FILE, find, load, read_table
from clbench.scenarios import find as find_scenario

GOOD: dict[str, Any] = {
    "scenario": "online-split-cifar100", "metric": "final_accuracy", "source": "a paper", "status": "recalled",
    "spread": "std", "over": "capacity", "at": [500, 1000], "rows": {"er": [[10.0, 1.0], ""], "mir": [11, 12]},
}  # fmt: skip


def test_every_number_can_be_placed_and_judged() -> None:
    numbers = load()
    assert len(numbers) > 300
    for number in numbers:
        metric = find_metric(number.metric)
        assert metric.unit != "fraction" or 0 < number.value <= 1, number
        assert number.spread is None or 0 < number.spread < 0.1
        assert (number.spread is None) == (number.spread_kind is None)
        assert number.source
        if number.in_registry:
            assert find_scenario(number.scenario).name == number.scenario
            assert find_scenario(number.scenario).family == number.family
        if number.known:
            assert find_method(number.method).id == number.method
        assert all(math.isfinite(v) for v in number.setting.values() if isinstance(v, float))


def test_no_number_stands_twice() -> None:
    """Two numbers for one thing must differ in setting or source."""
    keys = [(n.scenario, n.method, n.metric, n.source, str(sorted(n.setting.items()))) for n in load()]
    assert len(keys) == len(set(keys))


def test_our_methods_go_by_their_ids() -> None:
    """A slug that is another spelling of one of our methods would hide the number from it."""
    from clbench.report.published import method_names

    for method in {number.method for number in load()}:
        assert method_names().get(method, method) == method


def test_numbers_of_the_cards() -> None:
    (onpro,) = find("online-split-cifar100-c@1", "OnPro", capacity=1000)
    assert (onpro.value, onpro.spread, onpro.spread_kind, onpro.status, onpro.family) == (
        pytest.approx(0.300), pytest.approx(0.004), "unknown", "second-hand", "C",
    )  # fmt: skip
    validation = find("online-split-cifar100-b", "er", capacity=2000, augmentation="none")
    assert [n.value for n in validation] == [pytest.approx(0.12)]
    assert validation[0].setting["scored_on"] == "validation"
    ace = [find("online-split-cifar100-b", "er-ace", capacity=c, augmentation="none")[0] for c in (2000, 5000, 10000)]
    assert [round(n.value, 3) for n in ace] == [0.179, 0.215, 0.246]
    assert {n.status for n in find("online-split-cifar100", "pcr")} == {"recalled"}
    (table3,) = find("mtil", "zscl", "last", order="I")
    assert (table3.value, table3.status) == (pytest.approx(0.836), "verified")
    assert [n.value for n in find("split-cifar100", "ncm", "final_accuracy", prototype="nmc")] == [pytest.approx(0.837)]


def test_find_narrows_down_and_gives_the_surest_first() -> None:
    assert find() != []
    assert find("no-such-scenario") == find("online-split-cifar100", "no-such-method") == []
    assert find("split-cifar100-10") == find("split-cifar100")  # an alias
    assert find("online-split-cifar100", "pcr", capacity=123) == []
    order = [number.status for number in find("split-cifar100")]
    assert order == sorted(order, key=["verified", "second-hand", "recalled"].index)


def test_families_are_never_mixed() -> None:
    for number in load():
        if number.scenario.startswith("online-split-"):
            assert number.family == {"b": "B", "c": "C"}.get(number.scenario.rpartition("-")[2], "A"), number


def test_rows_along_a_setting() -> None:
    numbers = list(read_table(GOOD, "table 1"))
    assert [(n.method, n.setting, n.value, n.spread) for n in numbers] == [
        ("er", {"capacity": 500}, 0.1, 0.01),
        ("mir", {"capacity": 500}, 0.11, None),
        ("mir", {"capacity": 1000}, 0.12, None),
    ]
    assert [n.known for n in numbers] == [True, False, False]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"colour": "red"}, "unknown keys"),
        ({"scenario": "nowhere"}, "in_registry = false"),
        ({"in_registry": False}, "in_registry = false"),
        ({"family": "A"}, "family is the preset's"),
        ({"status": "sure"}, "status"),
        ({"source": ""}, "source"),
        ({"spread": "sem"}, "spread"),
        ({"rows": {"er": [10.0]}}, "one number for each"),
        ({"rows": {"er": 10.0}}, "one number for each"),
        ({"rows": {"er": [10.0, [1, 2, 3]]}}, "no number"),
        ({"rows": {"er": [10.0, "11"]}}, "no number"),
    ],
)
def test_broken_entries_are_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        list(read_table({**GOOD, **change}, "table 1"))
    without_kind = {key: value for key, value in GOOD.items() if key != "spread"}
    with pytest.raises(ValueError, match="needs its kind"):
        list(read_table(without_kind, "table 1"))


def test_the_file_is_part_of_the_package() -> None:
    assert FILE.is_file()
