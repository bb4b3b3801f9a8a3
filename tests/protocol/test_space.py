"""Search spaces: declared once, changed from the command line, every value valid."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clbench.errors import InputError
from clbench.methods.base import hp
from clbench.methods.registry import builtin_names, find
from clbench.protocol.space import OPTIONS, Dimension, Space, declared_space, parse_dimension

UNIT = st.floats(0, 1, exclude_max=True)


@given(UNIT, st.floats(1e-6, 10), st.floats(1, 1e4), st.sampled_from(["linear", "log"]))
def test_values_stay_in_their_range(u: float, low: float, ratio: float, scale: str) -> None:
    value = Dimension("x", low=low, high=low * ratio, scale=scale).value(u)
    assert low * (1 - 1e-5) <= value <= low * ratio * (1 + 1e-5)


@given(UNIT, st.integers(1, 50), st.integers(0, 50), st.sampled_from(["linear", "log"]))
def test_whole_numbers_stay_whole_and_in_their_range(u: float, low: int, more: int, scale: str) -> None:
    value = Dimension("x", low=low, high=low + more, scale=scale, integer=True).value(u)
    assert isinstance(value, int)
    assert low <= value <= low + more


def test_choices_and_whole_numbers_are_equally_likely() -> None:
    grid = [(i + 0.5) / 1200 for i in range(1200)]
    choices = [Dimension("x", choices=("a", "b", "c")).value(u) for u in grid]
    assert {name: choices.count(name) for name in "abc"} == {"a": 400, "b": 400, "c": 400}
    numbers = [Dimension("x", low=1, high=4, integer=True).value(u) for u in grid]
    assert {n: numbers.count(n) for n in range(1, 5)} == dict.fromkeys(range(1, 5), 300)


def test_text_of_the_command_line() -> None:
    assert parse_dimension("lr", "0.1, 0.01").choices == (0.1, 0.01)
    assert parse_dimension("f", "true,none,3").choices == (True, "none", 3)
    wide = parse_dimension("lr", "log(1e-4,0.1)")
    assert (wide.low, wide.high, wide.scale, wide.integer) == (1e-4, 0.1, "log", False)
    whole = parse_dimension("batch_size", "logint(8,128)")
    assert (whole.low, whole.high, whole.scale, whole.integer) == (8, 128, "log", True)


@pytest.mark.parametrize("text", ["", "log(1)", "log(a,b)", "log(0,1)", "linear(2,1)", "triangle(0,1)"])
def test_bad_text_is_one_sentence(text: str) -> None:
    with pytest.raises(InputError, match="lr"):
        parse_dimension("lr", text)


@dataclass(frozen=True)
class Config:
    lr: float = hp(0.1, "rate", low=0, high=1, scale="log", tune={"low": 1e-3, "high": 0.5})
    width: int = hp(8, "width", low=1, high=64, tune={"low": 2, "high": 16})
    fixed: float = hp(1.0, "not searched")


def test_config_then_recipe_file_then_scenario(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("")
    file.with_suffix(".toml").write_text(
        '[[tune]]\nscenario = "split-*"\nsource = "a paper"\nlr = { choices = [0.1, 0.2] }\n'
        "epochs = { low = 1, high = 9 }\n\n[[tune]]\nbatch_size = { choices = [4] }\n"
    )
    plain = declared_space(Config, None, "split-digits@1")
    assert plain.names == ("lr", "width")
    assert isinstance(plain.at({"lr": 0.5, "width": 0.5})["width"], int)
    first = declared_space(Config, file, "split-digits@1")
    assert first.names == ("epochs", "lr", "width")
    assert first.describe()["lr"] == {"choices": [0.1, 0.2], "source": "a paper"}
    assert declared_space(Config, file, "split-digits@1", online=True).names == ("lr", "width")
    assert declared_space(Config, file, "other@1").names == ("batch_size", "lr", "width")


@pytest.mark.parametrize(
    ("table", "problem"),
    [("speed = { low = 0, high = 1 }", "speed"), ("lr = { lowest = 1 }", "lowest"), ("lr = {", "not valid TOML")],
)
def test_a_bad_recipe_file_is_one_sentence(tmp_path: Path, table: str, problem: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text("")
    file.with_suffix(".toml").write_text(f"[[tune]]\n{table}\n")
    with pytest.raises(InputError, match=problem):
        declared_space(Config, file, "split-digits@1")


@pytest.mark.parametrize("name", builtin_names())
@pytest.mark.parametrize("scenario", ["split-digits@1", "split-cifar100-a@1"])
def test_every_declared_space_gives_valid_values(name: str, scenario: str) -> None:
    from clbench.methods.config import make_config

    found = find(name)
    space = declared_space(found.cls.Config, found.path, scenario)
    for u in (0.0, 0.3, 0.999999):
        values = space.at(dict.fromkeys(space.names, u))
        options = {key: values.pop(key) for key in OPTIONS if key in values}
        make_config(found.cls.Config, {"search": values}, name)
        assert all(isinstance(value, int) and value > 0 for value in options.values())


def test_the_lists_of_the_literature_are_searched() -> None:
    """Card, section 2: lists without pretraining, for replay."""
    space = declared_space(find("er").cls.Config, find("er").path, "split-cifar100-a@1").describe()
    assert space["lr"]["choices"] == [0.05, 0.1, 0.15, 0.2, 0.3]
    assert space["batch_size"]["choices"] == [32, 64, 128, 256, 512]
    assert space["weight_decay"]["choices"] == [1e-4, 5e-4, 1e-3, 5e-3]
    assert space["epochs"]["choices"] == [30, 70, 120, 160, 200]


def test_space_is_ordered_and_can_be_changed() -> None:
    space = Space((Dimension("b", choices=(1,)), Dimension("a", choices=(2,))))
    assert space.names == ("a", "b")
    assert space.without(["a"]).names == ("b",)
    assert space.with_([Dimension("b", choices=(3,))]).at({"a": 0, "b": 0}) == {"a": 2, "b": 3}
