"""Protocol families A, B and C of the online literature: named, each with its own settings, never mixed."""

import tomllib
from fnmatch import fnmatchcase
from typing import Any

import pytest

from clbench.backbones.catalogue import EMBEDDED
from clbench.data.views import parse_view
from clbench.learner.resolve import resolve
from clbench.learner.spec import RunSpec
from clbench.methods.registry import FOLDER, find_recipe
from clbench.methods.registry import find as find_method
from clbench.scenarios import find, list_scenarios
from clbench.scenarios.families import FAMILIES
from clbench.store.schema import Spec

IN_FAMILY = {row["name"]: row["family"] for row in list_scenarios() if row["family"]}


def recipes() -> list[tuple[str, dict[str, Any]]]:
    return [
        (path.stem, entry)
        for path in sorted((FOLDER / "recipes").glob("*.toml"))
        for entry in tomllib.loads(path.read_text()).get("recipe", [])
    ]


def test_every_online_preset_has_a_family() -> None:
    assert set(IN_FAMILY.values()) == set(FAMILIES)
    assert {name for name in IN_FAMILY if name.startswith("online-split-")} == set(IN_FAMILY)
    for family in FAMILIES.values():
        assert family.backbone in EMBEDDED
    assert find("split-cifar100").family is None


@pytest.mark.parametrize(("name", "family"), IN_FAMILY.items())
def test_what_each_family_fixes(name: str, family: str) -> None:
    """online_baselines section 1, onpro section 4."""
    preset = find(name)
    defaults, params = preset.defaults, preset.params
    assert (params.online, defaults.batch_size, preset.family) == (True, 10, family)
    assert params.order == ("seeded" if family == "A" else "natural")
    assert defaults.train_view == defaults.test_view
    assert not parse_view(defaults.test_view).random
    assert defaults.test_view.partition("(")[0] == {"A": "", "B": "scale", "C": "normalize"}[family]
    assert defaults.drop_last == (family == "A")
    tasks = {("cifar10", "A"): 5, ("cifar10", "B"): 5, ("cifar10", "C"): 5, ("cifar100", "A"): 10,
             ("cifar100", "B"): 20, ("cifar100", "C"): 10, ("tiny-imagenet", "C"): 100}  # fmt: skip
    assert params.tasks == tasks[preset.datasets[0], family]


@pytest.mark.parametrize(("method", "entry"), recipes(), ids=lambda v: v if isinstance(v, str) else v["scenario"])
def test_no_recipe_covers_two_families(method: str, entry: dict[str, Any]) -> None:
    """A glob that was meant for one family would give its settings to another one's scenario."""
    covered = [name for name in IN_FAMILY if fnmatchcase(name, entry["scenario"])]
    families = {IN_FAMILY[name] for name in covered}
    assert len(families) <= 1, f"{method}: {entry['scenario']} covers {covered}"
    for family in families:
        if "backbone" in entry:
            assert entry["backbone"] == FAMILIES[family].backbone
            assert not entry.get("backbone_options")
        assert f"family {family}" in entry["source"], f"{method}, {entry['scenario']}: name the family in the source"
        if "train_view" in entry.get("run", {}):  # augmentation goes before what brings pixels into the family's range
            assert entry["run"]["train_view"].endswith(find(covered[0]).defaults.test_view)


@pytest.mark.parametrize("method", ["finetune", "er", "erace", "derpp", "pcr", "hpcr"])
@pytest.mark.parametrize("name", IN_FAMILY)
def test_online_methods_have_a_recipe_everywhere(method: str, name: str) -> None:
    recipe = find_recipe(find_method(method), f"{name}@1")
    assert recipe is not None
    wanted = {"A": ("sgd", 10), "B": ("sgd", 10), "C": ("adam", 64)}[IN_FAMILY[name]]
    assert recipe.set.get("optimizer", "sgd") == wanted[0]
    assert recipe.set.get("replay_batch_size", wanted[1]) == wanted[1]


def test_a_record_says_its_family_and_what_it_changed() -> None:
    """Nothing but what was asked for: a recipe's own settings are no change; without a recipe the family's backbone."""
    own = {"scenario": "online-split-cifar10", "scenario_params": {"dataset": "digits"}, "device": "cpu"}
    document = resolve(RunSpec(method="er", **own)).document
    assert (document["protocol_family"], document["protocol_changes"]) == ("A", ["dataset"])
    changed = RunSpec(method="er", **own, backbone="mlp", batch_size=7, mask="seen", eval_per_group=5)
    assert resolve(changed).document["protocol_changes"] == ["backbone", "batch_size", "mask", "dataset"]
    narrow = RunSpec(method="er", **own, backbone_options={"nf": 4})
    assert resolve(narrow).document["protocol_changes"] == ["backbone", "dataset"]
    grey = {**own, "scenario": "online-split-cifar10-c", "train_view": "", "test_view": ""}
    joint = resolve(RunSpec(method="joint", **grey))
    assert find_recipe(joint.found, "online-split-cifar10-c@1") is None
    assert (joint.document["backbone"], joint.document["protocol_family"]) == ("resnet18-cifar", "C")
    assert joint.document["sources"]["backbone"] == "protocol family C"
    plain = resolve(RunSpec(method="er", scenario="split-digits", device="cpu")).document
    assert (plain["protocol_family"], plain["protocol_changes"]) == (None, [])


def test_the_family_is_no_part_of_a_runs_identity() -> None:
    """Records made before families were named are still those of the same runs."""
    resolved = resolve(RunSpec(method="er", scenario="online-split-cifar10", scenario_params={"dataset": "digits"}))
    spec = Spec.model_validate(resolved.document)
    older = Spec.model_validate({k: v for k, v in resolved.document.items() if not k.startswith("protocol_")})
    assert older.protocol_family is None
    assert spec.decisive() == older.decisive()
    assert not any(key.startswith("protocol_") for key in resolved.identity)
