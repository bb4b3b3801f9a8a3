"""What is installed, and that the commands in README, tox and CI are one thing."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def constraints() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9._-]*==[0-9][0-9a-z.]*", line) for line in lines), (
        "names and versions only"
    )
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


@pytest.mark.parametrize("extra", ["", "dev"])
def test_constraints_pin_what_is_declared(extra: str) -> None:
    pinned = constraints()
    for line in PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]:
        need = Requirement(line)
        assert pinned[canonicalize_name(need.name)] in need.specifier, line


@pytest.mark.parametrize("name", ["methods", "scenarios", "metrics"])
def test_links_in_the_root(name: str) -> None:
    link = ROOT / name
    assert link.is_symlink()
    assert link.readlink() == Path("clbench", name)
    assert (link / "__init__.py").is_file()


def test_the_wheel_holds_the_whole_package(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT / "clbench", source / "clbench", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    program = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", program, tmp_path], cwd=source, check=True, capture_output=True)
    wheel = next(tmp_path.glob("*.whl"))
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("clbench/")}
    there = {str(path.relative_to(source)) for path in (source / "clbench").rglob("*") if path.is_file()}
    assert packed == there
    assert wheel.name == f"clbench-{PROJECT['version']}-py3-none-any.whl"


def test_versions_agree() -> None:
    version = PROJECT["version"]
    assert f'version: "{version}"' in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_readme_tox_and_ci_are_one() -> None:
    readme = (ROOT / "README.md").read_text()
    commands = [line for line in readme.splitlines() if "pip install" in line]
    assert [command.rpartition("tox -e ")[2] for command in commands] == ["quickstart", "tests"]
    ci = (ROOT / ".ci/run").read_text().splitlines()
    assert commands[1] in ci
    assert any(line.endswith("tox -e lint,types") for line in ci)
    tox = ConfigParser()
    tox.read(ROOT / "tox.ini")
    assert tox["testenv:quickstart"]["commands"] == "clbench {posargs:run --method er --scenario split-digits}"
    for name in ("slow", "lint", "types", "benchmarks"):
        assert f"testenv:{name}" in tox
    assert len(readme.splitlines()) <= 60, "one screen"
