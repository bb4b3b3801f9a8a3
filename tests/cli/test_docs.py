"""The documentation is true: options exist, links lead somewhere, examples run."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from conftest import CommandLine

from clbench.cli import app
from clbench.data.views import OPERATIONS, parse_view

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(name: str, language: str = "") -> list[str]:
    """The fenced blocks of one language of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / name).read_text(), re.MULTILINE | re.DOTALL)


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], set[str]]]:
    """Every command with its options."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), {option for item in command.params for option in item.opts if option.startswith("--")}


COMMANDS = dict(commands(typer.main.get_command(app)))


def test_every_command_and_option_is_described() -> None:
    text = (ROOT / "docs/command-line.md").read_text()
    sections = {("run",): text[text.index("## clbench run") : text.index("## The other commands")]}
    for path, options in COMMANDS.items():
        if path not in sections:
            rows = [line for line in text.splitlines() if line.startswith(f"| `clbench {' '.join(path)}")]
            assert len(rows) == 1, path
            sections[path] = rows[0]
        described = set(re.findall(r"--[a-z][a-z-]*", sections[path]))
        missing = options - described
        assert not missing, f"{' '.join(path)}: {missing} not in docs/command-line.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_pages_exist(page: Path) -> None:
    for line in re.findall(r"^clbench .*", page.read_text(), re.MULTILINE):
        words = shlex.split(line.replace("CLASS", "x"))[1:]
        if words[0].startswith("--"):
            continue
        path = tuple(words[:2]) if words[0] in ("data", "protocol") else (words[0],)
        assert path in COMMANDS, line
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert given <= COMMANDS[path], line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_view_operation_is_described() -> None:
    text = (ROOT / "docs/data.md").read_text()
    section = text[text.index("## Views") :]
    named = set(re.findall(r"`([a-z_]+)[(`]", section))
    assert OPERATIONS.keys() <= named
    for example in re.findall(r"`([a-z_]+(?:\([^)`]*\))?)`", section):
        if "..." not in example:
            parse_view(example)


def test_the_method_of_the_page_conforms_and_runs(clbench: CommandLine, tmp_path: Path) -> None:
    method, recipe = blocks("docs/add-a-method.md", "python")[0], blocks("docs/add-a-method.md", "toml")[0]
    (tmp_path / "anchor.py").write_text(method)
    check = clbench("check", "anchor.py")
    assert check.code == 0, check.out
    (tmp_path / "anchor.toml").write_text(recipe)
    run = clbench("run", "--method", "anchor.py", "--scenario", "split-digits", "--scenario-set", "per_class=24")
    assert run.code == 0, run.err
    spec = (next(tmp_path.rglob("DONE")).parent / "spec.json").read_text()
    assert tomllib.loads(recipe)["recipe"][0]["source"] in spec
    report = clbench("report", "--runs", "results/runs", "--out", "board")
    assert report.code == 0, report.err
    assert "anchor" in (tmp_path / "board/leaderboard.md").read_text()
    assert "anchor" in (tmp_path / "board/index.html").read_text()


def test_the_scenario_of_the_page_conforms_and_runs(clbench: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "mislabelled-digits.py").write_text(blocks("docs/add-a-scenario.md", "python")[0])
    words = ("--scenario-set", "noise=0.5")
    check = clbench("check", "mislabelled-digits.py", *words)
    assert check.code == 0, check.out
    assert clbench("show", "mislabelled-digits.py", *words).code == 0
    run = clbench("run", "--method", "finetune", "--scenario", "mislabelled-digits.py", *words, "--epochs", "1")
    assert run.code == 0, run.err
    assert (tmp_path / "results/runs/mislabelled-digits@1/finetune").is_dir()


def test_the_python_of_the_quick_start_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(blocks("docs/quickstart.md", "python")[0], {})
    printed = capsys.readouterr().out
    assert 0.5 < float(printed.splitlines()[0]) <= 1
    assert re.search(r"split-digits@1\s+er\s+0\.\d+\s+0\.\d+\s+3", printed)


def test_files_of_a_record_are_the_ones_listed(run_quick: CommandLine, tmp_path: Path) -> None:
    run_quick()
    record = next(tmp_path.rglob("DONE")).parent
    text = (ROOT / "docs/quickstart.md").read_text()
    table = text[text.index("## What a run leaves") : text.index("## From Python")]
    listed = set(re.findall(r"`([a-z]+\.[a-z]+|DONE)`", table))
    there = {path.name for path in record.iterdir() if path.is_file() and not path.name.startswith(".")}
    assert listed == there


def test_the_sample_of_the_readme_is_what_is_printed(run_quick: CommandLine) -> None:
    sample = next(block for block in blocks("README.md") if "record  " in block).strip().splitlines()
    printed = run_quick().out.strip().splitlines()
    assert len(sample) == len(printed)
    assert sample[0].split() == printed[0].split()
    assert [line.split()[:1] for line in sample] == [line.split()[:1] for line in printed]
