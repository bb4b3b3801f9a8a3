import re
import shlex
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from clbench.cli import main
from clbench.data import load
from clbench.interop.tables import read_parquet
from clbench.scenarios import build, find

PAGE = Path(__file__).parents[2] / "docs/interop.md"


def test_commands_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for line in re.findall(r"^clbench (.*)", PAGE.read_text(), re.MULTILINE):
        if "avalanche:" in line:  # test_strategies.py, where Avalanche is installed
            continue
        assert main(shlex.split(line)) == 0, line
    printed = capsys.readouterr().out
    store = load("digits")
    assert f"rows of digits, fingerprint {store.fingerprint}" in printed
    for file, seed in (("split-digits.parquet", 0), ("split-digits-1993.parquet", 1993)):
        scenario = build(find("split-digits"), [store.table()], seed)
        assert read_parquet(file).fingerprint == scenario.fingerprint
        assert f"fingerprint {scenario.fingerprint}" in printed
    assert "sha256" in pq.read_schema("split-digits-1993.parquet").names


def test_parameters_and_default_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", "split-digits", "--scenario-set", "tasks=2"]) == 0
    assert len(read_parquet("results/scenarios/split-digits@1.parquet").tasks) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["split-digits", "--to", "avalanche"], "known: parquet (Avalanche: clbench.interop.avalanche, from Python)"),
        (["split-digitz"], "did you mean 'split-digits'"),
        (["split-digits", "--out", "file/x.parquet"], "file is a file, not a folder"),
    ],
)
def test_bad_input_is_one_sentence(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert main(["export", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_show_counts_duplicates_and_leaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["show", "power-law-digits", "--statistics"]) == 0
    shown = dict(line.split() for line in capsys.readouterr().out.splitlines() if len(line.split()) == 2)
    assert int(shown["repeats"]) > 0
    assert shown["leaks"] == "0"
