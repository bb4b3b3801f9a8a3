"""Hyperparameters: layers, types, ranges, and recipes that fit their methods."""

import tomllib
from dataclasses import dataclass

import pytest

from clbench.errors import InputError
from clbench.methods.base import hp
from clbench.methods.config import make_config
from clbench.methods.registry import FOLDER, FoundMethod, builtin_names, find, find_recipe


@dataclass(frozen=True)
class Config:
    lr: float = hp(0.1, "learning rate", low=0.0, high=1.0, source="paper, table 1")
    epochs: int | None = hp(None, "passes", low=1)
    rule: str = hp("batch", "rule", choices=("batch", "exact"))
    nesterov: bool = hp(False, "nesterov")


def test_later_layers_win_and_sources_are_kept() -> None:
    config, report = make_config(Config, {"recipe: A": {"lr": 0.2, "epochs": 3}, "--set": {"lr": "0.3"}}, "mine")
    assert config == Config(lr=0.3, epochs=3)
    assert report["lr"] == {"value": 0.3, "source": "--set"}
    assert report["epochs"] == {"value": 3, "source": "recipe: A"}
    assert report["rule"]["source"] == "default"
    assert make_config(Config, {}, "mine")[1]["lr"]["source"] == "default: paper, table 1"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"lrr": "1"}, "did you mean 'lr'"),
        ({"lr": "fast"}, "must be a number"),
        ({"lr": "nan"}, "number"),
        ({"lr": "-1"}, "between 0.0 and 1.0"),
        ({"lr": "1.5"}, "between 0.0 and 1.0"),
        ({"epochs": "0"}, "at least 1"),
        ({"epochs": "2.5"}, "whole number"),
        ({"rule": "exactt"}, "did you mean 'exact'"),
        ({"nesterov": "maybe"}, "true or false"),
    ],
)
def test_bad_values_are_named(given: dict[str, str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        make_config(Config, {"--set": given}, "mine")


@pytest.mark.parametrize(("text", "value"), [("none", None), ("4", 4)])
def test_optional_values(text: str, value: int | None) -> None:
    assert make_config(Config, {"--set": {"epochs": text}}, "mine")[0].epochs == value


def recipes() -> list[tuple[str, dict]]:
    out = []
    for path in sorted((FOLDER / "recipes").glob("*.toml")):
        assert path.stem in builtin_names(), f"{path.name} belongs to no method"
        out += [(path.stem, entry) for entry in tomllib.loads(path.read_text())["recipe"]]
    return out


@pytest.mark.parametrize(("method", "entry"), recipes(), ids=lambda v: v if isinstance(v, str) else v["scenario"])
def test_recipes_fit_their_methods(method: str, entry: dict) -> None:
    from clbench.data import parse_view

    assert set(entry) <= {"scenario", "source", "set", "run", "backbone", "backbone_options"}
    assert entry["source"]
    make_config(find(method).cls.Config, {"recipe": entry.get("set", {})}, method)
    for key in ("train_view", "test_view"):
        if key in entry.get("run", {}):
            parse_view(entry["run"][key])


def test_first_match_wins_and_versions_are_ignored() -> None:
    er = find("er")
    assert find_recipe(er, "online-split-cifar100@1").run["mask"] == "all"
    assert find_recipe(er, "no-such-scenario@1") is None


def test_recipe_beside_a_users_file(tmp_path) -> None:
    method = tmp_path / "mine.py"
    method.write_text("METHOD = None")
    found = FoundMethod("mine", None, "x", method)
    assert find_recipe(found, "split-digits@1") is None
    method.with_suffix(".toml").write_text('[[recipe]]\nscenario = "split-*"\nsource = "me"\nset = {lr = 0.5}\n')
    assert find_recipe(found, "split-digits@1").set == {"lr": 0.5}
    method.with_suffix(".toml").write_text("[[recipe")
    with pytest.raises(InputError, match="not valid TOML"):
        find_recipe(found, "split-digits@1")
