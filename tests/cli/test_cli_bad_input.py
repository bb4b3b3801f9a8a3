"""Whatever a user gets wrong ends as one sentence with the right exit code, and earlier results stay as they were."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import QUICK, CommandLine, Shown
from safetensors.torch import save_file

ER = ("run", "--method", "er", *QUICK)
SCENARIO = ("run", "--method", "er", "--scenario")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder full of things that can't be used, and one run."""
    folder = tmp_path_factory.mktemp("bad")
    finetune = (Path(__file__).parents[2] / "clbench/methods/finetune.py").read_text()
    class_body = "    Config = SgdConfig\n"
    (folder / "task_only.py").write_text(
        finetune.replace(class_body, class_body + '    settings = frozenset({"task"})\n')
    )
    (folder / "no_method.py").write_text("x = 1\n")
    (folder / "syntax.py").write_text("def broken(:\n")
    (folder / "crash.py").write_text("import torch\n\nMETHOD = undefined\n")
    (folder / "crash-scenario.py").write_text(
        "DATASETS = ('digits',)\n\ndef build(tables, seed, params, *, id, defaults):\n    return tables[3]\n"
    )
    (folder / "file").write_text("not a folder")
    (folder / "garbage.safetensors").write_bytes(b"\x00" * 100)
    save_file({"other.weight": torch.zeros(3, 3)}, str(folder / "other.safetensors"))
    torch.save({"other.weight": torch.zeros(3, 3)}, folder / "other.pt")
    (folder / "garbage.parquet").write_bytes(b"PAR1" + os.urandom(200) + b"PAR1")
    (folder / "empty").mkdir()
    return folder


# words of the command, and what its sentence must say: what is wrong, and the way out
CASES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "method": (("run", "--method", "slcaa", *QUICK), ("unknown method 'slcaa'", "'slca'")),
    "method file": (("run", "--method", "nowhere/mine.py", *QUICK), ("nowhere/mine.py", "does not exist")),
    "method without METHOD": (("run", "--method", "{}/no_method.py", *QUICK), ("no_method.py", "METHOD")),
    "method with a syntax error": (("run", "--method", "{}/syntax.py", *QUICK), ("syntax.py", "line 1", "SyntaxError")),
    "method that crashes": (("run", "--method", "{}/crash.py", *QUICK), ("crash.py", "line 3", "undefined")),
    "setting": (("run", "--method", "{}/task_only.py", *QUICK), ("task_only", "class-incremental")),
    "scenario": ((*SCENARIO, "split-digit"), ("unknown scenario 'split-digit'", "'split-digits'")),
    "scenario version": ((*SCENARIO, "split-digits@7"), ("split-digits@7", "split-digits@1")),
    "scenario file": ((*SCENARIO, "nowhere.py"), ("nowhere.py",)),
    "scenario that crashes": ((*SCENARIO, "{}/crash-scenario.py"), ("crash-scenario.py:4", "IndexError")),
    "scenario parameter": ((*ER, "--scenario-set", "task=3"), ("'task'", "'tasks'")),
    "scenario parameter type": ((*ER, "--scenario-set", "tasks=two"), ("tasks", "'two'")),
    "too many tasks": ((*ER, "--scenario-set", "tasks=11"), ("11", "10")),
    "dataset": ((*ER, "--scenario-set", "dataset=cifar101"), ("unknown dataset 'cifar101'", "'cifar100'")),
    "dataset path": ((*ER, "--scenario-set", "dataset=no/where"), ("no/where",)),
    "empty dataset": ((*ER, "--scenario-set", "dataset={}/empty"), ("empty",)),
    "broken dataset": ((*ER, "--scenario-set", "dataset={}/garbage.parquet"), ("garbage.parquet",)),
    "missing dataset": ((*SCENARIO, "split-cifar100"), ("cifar-100-python.tar.gz", "clbench data fetch cifar100")),
    "hyperparameter": ((*ER, "--set", "capacty=5"), ("'capacty'", "'capacity'")),
    "hyperparameter type": ((*ER, "--set", "capacity=many"), ("'capacity'", "'many'")),
    "hyperparameter range": ((*ER, "--set", "lr=-1"), ("'lr'", "-1", "0.0")),
    "hyperparameter choice": ((*ER, "--set", "reservoir=exct"), ("'exct'", "'exact'")),
    "no equals sign": ((*ER, "--set", "capacity"), ("--set 'capacity'", "key=value")),
    "given twice": ((*ER, "--set", "lr=1", "--set", "lr=2"), ("'lr' twice",)),
    "seeds": ((*ER, "--seeds", "a"), ("--seeds", "'a'")),
    "seed range": ((*ER, "--seeds", "5-2"), ("5-2",)),
    "negative seed": ((*ER, "--seeds=-1"), ("--seeds", "'-1'")),
    "huge seed range": ((*ER, "--seeds", "0-999999999"), ("0-999999999",)),
    "device": ((*ER, "--device", "gpu"), ("unknown device 'gpu'",)),
    "device that is not there": ((*ER, "--device", "cuda:99"), ("cuda:99", "--device cpu")),
    "precision": ((*ER, "--precision", "fp64"), ("--precision", "'fp64'", "'fp32' or 'bf16'")),
    "mask": ((*ER, "--mask", "sen"), ("--mask", "'sen'", "'seen'")),
    "eval-every": ((*ER, "--eval-every", "-1"), ("--eval-every", "-1")),
    "epochs": ((*ER, "--epochs", "0"), ("--epochs", "0")),
    "batch size": ((*ER, "--batch-size", "x"), ("'--batch-size'", "should be a valid integer")),
    "view": ((*ER, "--train-view", "flop"), ("flop", "flip")),
    "view argument": ((*ER, "--test-view", "center_crop(-3)"), ("center_crop",)),
    "backbone": ((*ER, "--backbone", "reduced-resnet17"), ("reduced-resnet17", "reduced-resnet18")),
    "backbone option": ((*ER, "--backbone-set", "widht=3"), ("widht",)),
    "weights that are not there": ((*ER, "--weights", "no.pt"), ("no.pt",)),
    "weights that do not fit": ((*ER, "--weights", "{}/other.safetensors"), ("other.safetensors",)),
    "torch weights that do not fit": ((*ER, "--weights", "{}/other.pt"), ("other.pt",)),
    "weights that are garbage": ((*ER, "--weights", "{}/garbage.safetensors"), ("garbage.safetensors",)),
    "folder that cannot be written": ((*ER, "--out", "{}/file/runs"), ("file/runs",)),
    "missing option": (("run", "--method", "er"), ("missing option '--scenario'",)),
    "unknown option": ((*ER, "--capacity", "5"), ("no such option", "--capacity")),
    "unknown command": (("rnu",), ("no such command 'rnu'", "'run'")),
    "listing": (("list", "methds"), ("unknown listing 'methds'", "'methods'")),
    "runs folder": (("list", "runs", "--runs", "nowhere"), ("nowhere",)),
    "show": (("show", "split-digit"), ("'split-digits'",)),
    "show into a file": (("show", "split-digits", "--out", "{}/file/a.png"), ("file/a.png",)),
    "check neither": (("check", "{}/no_method.py"), ("METHOD", "build")),
    "check nothing": (("check", "nowhere.py"), ("nowhere.py",)),
    "check syntax": (("check", "{}/syntax.py"), ("syntax.py", "line 1")),
    "fetch": (("data", "fetch", "mnits"), ("unknown dataset 'mnits'", "'mnist'")),
    "fetch what has no address": (("data", "fetch", "mnist-subset"), ("mnist-subset",)),
    "verify": (("data", "verify", "cifar100"), ("cifar100",)),
    "import": (("data", "import", "no/where", "--name", "mine"), ("no/where",)),
    "import under a bad name": (("data", "import", "{}/empty", "--name", "../x"), ("'../x'",)),
}  # fmt: skip


def assert_one_sentence(shown: Shown, code: int, *says: str) -> None:
    assert shown.code == code, shown
    lines = shown.err.strip().splitlines()
    assert len(lines) == 1, shown.err
    assert lines[0].startswith("error: ")
    for text in says:
        assert text in lines[0], lines[0]
    assert shown.out == ""


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case: str, files: Path, clbench: CommandLine, tmp_path: Path) -> None:
    words, says = CASES[case]
    kept = tmp_path / "results/runs/split-digits@1/er/0/summary.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("earlier")
    shown = clbench(*(word.replace("{}", str(files)) for word in words))
    assert_one_sentence(shown, 2, *says)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [kept]
    assert kept.read_text() == "earlier"


def test_a_process_exits_with_the_code_and_shows_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "clbench", "run", "--method", "nope", "--scenario", "split-digits"]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert_one_sentence(Shown(done.returncode, done.stdout, done.stderr), 2, "unknown method 'nope'")


def test_a_damaged_record_is_named_and_kept(run_quick: CommandLine, tmp_path: Path) -> None:
    run_quick()
    record = next(tmp_path.rglob("DONE")).parent
    (record / "summary.json").write_text("{")
    before = {path: path.read_bytes() for path in record.iterdir()}
    assert_one_sentence(run_quick(), 2, "summary.json", "--fresh")
    assert {path: path.read_bytes() for path in record.iterdir()} == before
    assert run_quick("--fresh").code == 0
    assert {path: path.read_bytes() for path in record.iterdir()} == before


def test_options_from_python_are_checked_too(clbench: CommandLine) -> None:
    import clbench as package

    with pytest.raises(package.InputError, match="did you mean 'epochs'"):
        package.run("er", "split-digits", epoch=3)
    with pytest.raises(package.InputError, match="whole numbers from 0 up"):
        package.run("er", "split-digits", seeds=[])
