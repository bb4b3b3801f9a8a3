"""`list`, `show`, `check`, `data`, `doctor`: what they print, and that the quick ones import nothing heavy."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CommandLine
from PIL import Image

from clbench.cli import LISTINGS

HEAVY = {"torch", "pandas", "torchvision", "timm", "sklearn", "scipy", "matplotlib", "mlflow", "open_clip", "pyarrow"}
ROOT = Path(__file__).parents[2]

EXPECTED = {
    "methods": ("id", {"er", "finetune", "joint", "nmc", "slca"}),
    "scenarios": ("id", {"split-digits@1", "split-cifar100@1", "online-split-cifar100@1"}),
    "datasets": ("name", {"digits", "cifar100", "cifar10-subset"}),
    "backbones": ("name", {"mlp", "reduced-resnet18", "vit-tiny-32"}),
    "metrics": ("key", {"final_accuracy", "stability_gap", "wf_10"}),
    "runs": ("method", {"er"}),
}


@pytest.mark.parametrize("what", LISTINGS)
def test_list_prints_a_table_and_json(what: str, clbench: CommandLine, run_quick: CommandLine) -> None:
    if what == "runs":
        assert run_quick().code == 0
    key, names = EXPECTED[what]
    as_json, as_text = clbench("list", what, "--json"), clbench("list", what)
    assert (as_json.code, as_text.code, as_json.err, as_text.err) == (0, 0, "", "")
    assert names <= {row[key] for row in as_json.json}
    assert as_text.out.splitlines()[0].split()[0] == LISTINGS[what][1][0]
    assert len(as_text.out.splitlines()) == 1 + len(as_json.json)
    for name in names:
        assert name in as_text.out


def test_list_runs_tells_done_unfinished_and_damaged_apart(
    clbench: CommandLine, run_quick: CommandLine, tmp_path: Path
) -> None:
    assert clbench("list", "runs").out == "no runs in results/runs\n"
    run_quick("--seeds", "0-2")
    first, second, _ = sorted(path.parent for path in tmp_path.rglob("DONE"))
    (first / "DONE").unlink()
    (second / "summary.json").write_text("{")
    state = {Path(row["path"]).name: row["state"] for row in clbench("list", "runs", "--json").json}
    assert state[first.name] == "unfinished"
    assert state[second.name] == "damaged"
    assert sorted(state.values()) == ["damaged", "done", "unfinished"]


@pytest.mark.parametrize(
    "words", [("--help",), ("run", "--help"), ("--version",), *(("list", what) for what in LISTINGS)]
)
def test_quick_commands_import_nothing_heavy(words: tuple[str, ...], tmp_path: Path) -> None:
    program = (
        "import json, sys\nfrom clbench.cli import main\ncode = main(sys.argv[1:])\n"
        "print(json.dumps([code, sorted({name.split('.')[0] for name in sys.modules})]))"
    )
    command = [sys.executable, "-c", program, *words]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, check=True
    )
    code, modules = json.loads(done.stdout.splitlines()[-1])
    assert code == 0
    assert "clbench" in modules
    assert HEAVY.isdisjoint(modules)


def test_show_prints_the_task_table_and_draws_the_stream(clbench: CommandLine, tmp_path: Path) -> None:
    shown = clbench("show", "split-digits", "--scenario-set", "tasks=2", "--order-seed", "3", "--out", "stream.png")
    assert shown.code == 0, shown.err
    assert Image.open(tmp_path / "stream.png").width > 500
    assert "split-digits@1" in shown.out
    about = clbench("show", "split-digits", "--scenario-set", "tasks=2", "--json").json
    assert [task["train"] for task in about["tasks"]] == [721, 717]
    assert about["tasks"][1]["classes"] == ["5", "6", "7", "8", "9"]
    assert about["fingerprint"] in clbench("show", "split-digits", "--scenario-set", "tasks=2").out
    assert (tmp_path / "results/scenarios/split-digits@1.png").is_file()


@pytest.mark.parametrize("name", ["finetune", "split-digits"])
def test_check_passes_for_what_is_built_in(name: str, clbench: CommandLine) -> None:
    shown = clbench("check", name)
    assert shown.code == 0, shown.out
    assert "FAIL" not in shown.out
    assert shown.out.splitlines()[-1].endswith("checks passed")


def test_check_finds_a_method_that_reads_the_host(clbench: CommandLine, tmp_path: Path) -> None:
    text = (ROOT / "clbench/methods/er.py").read_text()
    honest = '{"stream_loss": stream_loss.detach()}'
    assert honest in text
    (tmp_path / "slow.py").write_text(
        text.replace(honest, '{"stream_loss": stream_loss.detach() + 0 * stream_loss.item()}')
    )
    shown = clbench("check", "slow.py")
    assert shown.code == 1
    failed = [line for line in shown.out.splitlines() if line.startswith("FAIL")]
    assert len(failed) == 1
    assert "host" in failed[0]


def test_check_finds_a_scenario_that_trains_on_test_rows(clbench: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "leaky.py").write_text(
        "from dataclasses import replace\n"
        "from clbench.scenarios import class_incremental\n"
        "DATASETS = ('digits',)\n"
        "def build(tables, seed, params, *, id, defaults):\n"
        "    two = class_incremental.Params(tasks=2)\n"
        "    made = class_incremental.build(tables, seed, two, id=id, defaults=defaults)\n"
        "    first = made.tasks[0]._replace(rows=made.groups[0].rows, targets=made.groups[0].targets)\n"
        "    return replace(made, tasks=(first, *made.tasks[1:]))\n"
    )
    shown = clbench("check", "leaky.py")
    assert shown.code == 1
    assert "FAIL  rows: task 0" in shown.out


def test_own_images_by_path_and_by_name(clbench: CommandLine, tmp_path: Path) -> None:
    for split, count in (("train", 6), ("test", 3)):
        for shade, label in enumerate(("dark", "grey", "light")):
            folder = tmp_path / "mine" / split / label
            folder.mkdir(parents=True)
            for index in range(count):
                value = 100 * shade + 3 * index + (split == "test")
                Image.new("RGB", (8, 8), (value, value, value)).save(folder / f"{index}.png")
    own = ("run", "--method", "er", "--scenario", "split-digits", "--scenario-set", "tasks=3", "--backbone", "mlp")
    assert clbench("data", "import", "mine", "--name", "shades").code == 0
    by_path = clbench(*own, "--scenario-set", f"dataset={tmp_path / 'mine'}", "--out", "a")
    by_name = clbench(*own, "--scenario-set", "dataset=shades", "--out", "b")
    assert (by_path.code, by_name.code) == (0, 0), by_path.err + by_name.err
    summaries = [json.loads(next((tmp_path / out).rglob("summary.json")).read_text()) for out in "ab"]
    assert summaries[0]["weights_sha256"] == summaries[1]["weights_sha256"]
    assert clbench("data", "verify", "shades").code == 0
    states = {row["name"]: row["state"] for row in clbench("data", "status", "--json").json}
    assert states["shades"] == "imported"
    assert states["digits"] in ("ready", "found")
    assert states["cifar100"] == "missing"
    assert "shades" in clbench("data", "status").out


def test_data_fetch_of_what_is_built_in(clbench: CommandLine) -> None:
    assert clbench("data", "fetch", "digits").out == "digits is built in: nothing to fetch\n"


def test_doctor_names_versions_device_and_data(clbench: CommandLine, tmp_path: Path) -> None:
    import torch

    shown = clbench("doctor", "--json")
    found = {entry["topic"]: entry for entry in shown.json}
    assert shown.code == 0
    assert found["torch"]["found"] == torch.__version__.split("+")[0]
    assert ("device" in found) != torch.cuda.is_available()
    assert {"python", "processor", "cache", "results", "data"} <= found.keys()
    text = clbench("doctor")
    assert text.code == 0
    assert "clbench data fetch NAME" in text.out


def test_doctor_finds_what_is_wrong(clbench: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CLBENCH_DATA", str(tmp_path / "nowhere"))
    shown = clbench("doctor")
    assert shown.code == 1
    assert f"{tmp_path / 'nowhere'} is not a folder" in shown.out


def test_doctor_survives_a_broken_package(clbench: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)  # import timm now raises ImportError
    shown = clbench("doctor", "--json")
    assert shown.code == 1
    broken = [entry for entry in shown.json if entry["topic"] == "timm"]
    assert broken[0]["state"] == "missing"
    assert "reinstall timm" in broken[0]["advice"]
    assert any(entry["topic"] == "data" for entry in shown.json)


def test_no_command_shows_the_help(clbench: CommandLine) -> None:
    shown = clbench()
    assert shown.code == 2
    assert "Usage: clbench" in shown.out
    assert shown.err == ""


def test_output_into_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    command = f"{sys.executable} -m clbench list metrics --json | head -1"
    shell = ["bash", "-o", "pipefail", "-c", command]
    env = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
    done = subprocess.run(shell, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[\n", "")
