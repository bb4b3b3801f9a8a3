"""Run the command line in this process, and see what a user would see."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from clbench.cli import main

QUICK = ("--scenario", "split-digits", "--scenario-set", "per_class=24", "--epochs", "1")


class Shown(NamedTuple):
    """Exit code, stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


CommandLine = Callable[..., Shown]


@pytest.fixture
def clbench(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CommandLine:
    """`clbench(*words)` in an empty folder, without data sets from outside."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CLBENCH_DATA", raising=False)

    def call(*words: object) -> Shown:
        capsys.readouterr()
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Shown(code, captured.out, captured.err)

    return call


@pytest.fixture
def run_quick(clbench: CommandLine) -> CommandLine:
    """A run of a second."""
    return lambda *words: clbench("run", "--method", "er", *QUICK, *words)
