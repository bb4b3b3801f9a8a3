import subprocess
import sys
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from label_tables import balanced, real_layout

from clbench.data.views import parse_view
from clbench.errors import InputError
from clbench.scenarios import build, find, list_scenarios, registry
from clbench.scenarios import params as parameters
from clbench.scenarios.model import StreamDefaults
from clbench.scenarios.params import param

MINE = '''"""Two tasks of my own."""
from __future__ import annotations
from dataclasses import dataclass
import torch
from clbench.scenarios import class_incremental
from clbench.scenarios.model import StreamDefaults
from clbench.scenarios.params import param

DATASETS = ("digits",)
DEFAULTS = StreamDefaults(batch_size=7)

@dataclass(frozen=True)
class Params:
    tasks: int | None = param(2, "number of tasks", low=1)
    fail: bool = param(False, "whether to fail")

def build(tables, seed, params, *, id, defaults):
    if params.fail:
        raise RuntimeError("so it is")
    return class_incremental.build(tables, seed, class_incremental.Params(tasks=params.tasks), id=id, defaults=defaults)
'''


def mine(folder: Path, text: str = MINE, name: str = "mine.py") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def sentence(error: pytest.ExceptionInfo[InputError]) -> str:
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2
    return str(error.value)


# -- presets -----------------------------------------------------------------------------------------------------
def test_listing_imports_no_torch() -> None:
    code = (
        "import sys; from clbench.scenarios import list_scenarios; print(len(list_scenarios()), 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert int(out[0]) >= 9
    assert out[1] == "False"


def test_presets_can_be_found() -> None:
    ids = {row["id"] for row in list_scenarios()}
    wanted = ["digits", "mnist", "cifar10", "cifar100", "cifar100-20", "cifar100-b50", "tiny-imagenet"]
    assert ids >= {f"split-{name}@1" for name in wanted} | {"online-split-cifar10@1", "online-split-cifar100@1"}
    for row in list_scenarios():
        preset = find(row["id"])
        assert (preset.id, preset.name, preset.version) == (row["id"], row["name"], row["version"])
        assert is_dataclass(preset.params)
        assert preset.source
        assert preset.row_order == "canonical" or row["builder"] == "si_blurry"
        shape = (1, 28, 28) if preset.datasets[0] in ("mnist", "digits") else (3, 32, 32)
        if preset.size is not None:  # of many sizes in the files; views may cut 224 pixels out of what is stored
            shape = (3, preset.size, preset.size)
        shown = {parse_view(v).output_shape(shape) for v in (preset.defaults.train_view, preset.defaults.test_view)}
        assert shown == {(3, 224, 224) if (preset.size or 0) >= 224 else shape}
        assert not parse_view(preset.defaults.test_view).random


def test_names_versions_and_aliases(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find("split-cifar100").id == "split-cifar100@1"
    assert find("Split_CIFAR100").id == "split-cifar100@1"
    assert find("cifar100-b50-inc10").id == "split-cifar100-b50@1"
    entries = dict(registry.read_presets())
    for version in (2, 10):
        entries[f"split-cifar100@{version}"] = {**entries["split-cifar100@1"], "params": {"tasks": version}}
    monkeypatch.setattr(registry, "read_presets", lambda: entries)
    assert find("split-cifar100").id == "split-cifar100@10"
    assert find("split-cifar100@2").params.tasks == 2
    assert find("split-cifar100@1").params.tasks == 10
    assert [row["id"] for row in list_scenarios() if row["name"] == "split-cifar100" and row["newest"]] == [
        "split-cifar100@10"
    ]
    with pytest.raises(InputError, match=r"did you mean .*'split-cifar100@1"):
        find("split-cifar100@3")


def test_unknown_name() -> None:
    with pytest.raises(InputError) as caught:
        find("split-cifar1000")
    assert "did you mean 'split-cifar100'" in sentence(caught)


def test_sources_defaults() -> None:
    gap = find("split-cifar10").defaults  # stability_gap section 2
    assert (gap.batch_size, gap.epochs, gap.eval_every) == (256, 10, 1)
    online = find("online-split-cifar100").defaults  # online_baselines section 4
    assert (online.batch_size, online.epochs, online.drop_last, online.train_view) == (10, 1, True, "")
    assert find("split-digits").defaults.epochs * 1438 // 10 in range(500, 1001)


# -- parameters --------------------------------------------------------------------------------------------------
def test_text_from_the_command_line() -> None:
    preset = find("split-cifar100").with_params(
        {"per_class": "50", "val_share": "0.1", "online": "true", "order": "3, 1,2", "label_level": "none"}
    )
    params = preset.params
    assert (params.per_class, params.val_share, params.online, params.order) == (50, 0.1, True, (3, 1, 2))
    assert params.label_level is None
    assert params.tasks == 10
    assert preset.changed == {"per_class": 50, "val_share": 0.1, "online": True, "order": (3, 1, 2)}
    assert find("split-cifar100").changed == {}
    assert preset.with_params({"per_class": None}).params.per_class is None


def test_tasks_and_increment_replace_each_other() -> None:
    base = find("split-cifar100-b50")
    assert (base.params.init, base.params.increment, base.params.tasks) == (50, 10, None)
    assert base.with_params({"increment": "25"}).params.init == 50
    equal = base.with_params({"tasks": 4}).params
    assert (equal.tasks, equal.init, equal.increment) == (4, None, None)
    both = base.with_params({"tasks": 4, "init": 5})
    with pytest.raises(InputError, match="either tasks, or init and increment"):
        build(both, [real_layout("cifar100")], 0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"per_clas": "5"}, "unknown parameter of scenario split-cifar100@1 'per_clas'; did you mean 'per_class'"),
        ({"per_class": "0"}, "scenario split-cifar100@1: per_class must be at least 1, not 0"),
        ({"per_class": "many"}, "per_class must be a whole number or none, not 'many'"),
        ({"per_class": 2.5}, "per_class must be a whole number or none, not 2.5"),
        ({"per_class": True}, "per_class must be a whole number or none, not True"),
        ({"val_share": "1"}, "val_share must be at least 0 and below 1, not 1.0"),
        ({"val_share": "-0.1"}, "val_share must be at least 0 and below 1, not -0.1"),
        ({"val_share": "nan"}, "val_share must be a number, not 'nan'"),
        ({"online": "maybe"}, "online must be true or false, not 'maybe'"),
        ({"setting": "tasks"}, "unknown value of scenario split-cifar100@1: setting 'tasks'; did you mean 'task'"),
        ({"order": "sedeed"}, "did you mean 'seeded'? (or a list like 0,1,2)"),
        ({"tasks": "0"}, "tasks must be at least 1"),
        ({"batch_size": "5"}, "batch_size is no parameter of its tables; give it as an option of the run"),
        ({"dataset": ""}, "dataset is empty"),
    ],
)
def test_bad_parameters(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        find("split-cifar100").with_params(given)
    assert message in sentence(caught)


def test_other_data_set(tmp_path: Path) -> None:
    preset = find("split-tiny-imagenet").with_params({"dataset": "tiny-imagenet-subset", "tasks": "20"})
    assert preset.datasets == ("tiny-imagenet-subset",)
    assert preset.changed == {"dataset": "tiny-imagenet-subset", "tasks": 20}
    folder = tmp_path / "a,b"
    folder.mkdir()
    assert find("split-digits").with_params({"dataset": str(folder)}).datasets == (str(folder),)
    scenario = build(preset, [balanced("tiny-imagenet-subset", 12_000, 5_000, 200)], 0)
    assert scenario.datasets == ("tiny-imagenet-subset",)
    assert [len(task.rows) for task in scenario.tasks] == [600] * 20


def test_param_table() -> None:
    rows = {row["name"]: row for row in find("split-cifar100").param_table()}
    assert rows["tasks"] == {
        "name": "tasks",
        "type": "a whole number or none",
        "value": 10,
        "default": None,
        "help": "number of tasks, as equal in classes as can be, larger ones first",
    }
    assert rows["order"]["type"] == "'natural' or 'seeded' or a list like 0,1,2"
    assert all(row["help"] for row in rows.values())


@dataclass(frozen=True)
class Everything:
    whole: int = param(1, "", low=0, high=9)
    real: float = param(0.5, "")
    flag: bool = param(False, "")
    text: str = param("a", "")
    words: Literal["x", "y"] = param("x", "")
    list_of_numbers: tuple[float, ...] = param((), "")
    maybe: float | None = param(None, "")


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("whole", " 7 ", 7),
        ("real", "1e-3", 0.001),
        ("real", 2, 2.0),
        ("flag", "No", False),
        ("flag", "on", True),
        ("text", "b c", "b c"),
        ("words", "y", "y"),
        ("list_of_numbers", "1,2.5", (1.0, 2.5)),
        ("list_of_numbers", "[]", ()),
        ("list_of_numbers", [3], (3.0,)),
        ("maybe", "None", None),
        ("maybe", "0", 0.0),
    ],
)
def test_reading(name: str, given: Any, expected: Any) -> None:
    value = getattr(parameters.change(Everything(), {name: given}, "here"), name)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize("value", ["1.0", "", "ten", "1,2", "0x1"])
def test_not_a_whole_number(value: str) -> None:
    with pytest.raises(InputError, match="here: whole must be a whole number, not"):
        parameters.change(Everything(), {"whole": value}, "here")


# -- building ----------------------------------------------------------------------------------------------------
def test_build_passes_everything_on() -> None:
    preset = find("split-digits")
    scenario = build(preset, [real_layout("digits")], 0)
    assert scenario.id == "split-digits@1"
    assert scenario.defaults is preset.defaults
    assert scenario.params == {item.name: getattr(preset.params, item.name) for item in fields(preset.params)}
    with pytest.raises(InputError, match="needs 1 data sets, but got 2"):
        build(preset, [real_layout("digits")] * 2, 0)


# -- a user's file -----------------------------------------------------------------------------------------------
def test_users_file(tmp_path: Path) -> None:
    preset = find(mine(tmp_path))
    assert (preset.id, preset.title, preset.datasets) == ("mine@1", "Two tasks of my own.", ("digits",))
    assert preset.defaults == StreamDefaults(batch_size=7)
    scenario = build(preset.with_params({"tasks": "5"}), [real_layout("digits")], 0)
    assert scenario.id == "mine@1"
    assert len(scenario.tasks) == 5
    assert torch.equal(scenario.tasks[0].rows, build(find("split-digits"), [real_layout("digits")], 0).tasks[0].rows)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]  # no byte code beside it


def test_users_file_is_read_anew_and_shadows_nothing(tmp_path: Path) -> None:
    path = mine(tmp_path, name="json.py")
    before = find(path)
    mine(tmp_path, MINE.replace("param(2,", "param(3,"), "json.py")
    after = find(path)
    assert (before.params.tasks, after.params.tasks) == (2, 3)
    assert sys.modules["json"].__name__ == "json"
    assert before.module.__name__ != after.module.__name__


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import torch\nx = 1 / 0\n", "mine.py:2: ZeroDivisionError: division by zero (while the scenario file"),
        ("def build(:\n", "mine.py:1: SyntaxError: invalid syntax"),
        ("import no_such_module\n", "mine.py:1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise SystemExit(3)\n", "mine.py:1: SystemExit: 3"),
        ("DATASETS = ('digits',)\n", "has no function build(tables, seed, params, *, id, defaults)"),
        ("def build(): ...\n", "needs DATASETS"),
        ("def build(): ...\nDATASETS = ()\n", "needs DATASETS"),
        ("def build(): ...\nDATASETS = 'digits'\nDEFAULTS = {}\n", "DEFAULTS must be a StreamDefaults, not dict"),
        ("def build(): ...\nDATASETS = 'digits'\nVERSION = 0\n", "'mine@0' cannot be an id"),
        ("def build(): ...\nDATASETS = 'digits'\nclass Params: ...\n", "Params must be a frozen dataclass"),
        (MINE.replace('param(2, "number of tasks", low=1)', "None").replace(" = None", ""), "'tasks' needs a default"),
    ],
)
def test_users_file_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        find(mine(tmp_path, text))
    assert message in sentence(caught)


def test_users_file_that_fails_while_building(tmp_path: Path) -> None:
    preset = find(mine(tmp_path)).with_params({"fail": "yes"})
    with pytest.raises(InputError) as caught:
        build(preset, [real_layout("digits")], 0)
    assert "mine.py:19: RuntimeError: so it is (while the scenario was built)" in sentence(caught)
    wrong = find(mine(tmp_path, "def build(*args, **kwargs): return 3\nDATASETS = 'digits'\n"))
    with pytest.raises(InputError, match="must return a Scenario, not int"):
        build(wrong, [real_layout("digits")], 0)
    too_many = find(mine(tmp_path)).with_params({"tasks": "11"})
    with pytest.raises(InputError, match="tasks=11 is more than the 10 classes"):
        build(too_many, [real_layout("digits")], 0)


def test_users_file_that_is_not_there_or_has_a_taken_name(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        find(tmp_path / "none.py")
    assert "cannot read the scenario file" in sentence(caught)
    assert "No such file" in sentence(caught)
    with pytest.raises(InputError, match="has the name of the built-in scenario 'split-digits'; rename the file"):
        find(mine(tmp_path, name="split_digits.py"))
