"""The documentation builds, without a link that leads nowhere, and its generated pages have what they promise."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from clbench.methods.registry import list_methods
from clbench.scenarios.registry import list_scenarios

ROOT = Path(__file__).parents[2]
HEADINGS = (
    "Idea", "What we implement", "Recipe", "Our numbers against published ones", "Differences from official code",
    "Cost",
)  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built pages; mkdocs is strict, so a warning is an error."""
    pytest.importorskip("material")
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_one_page_per_method_and_scenario_with_the_same_headings(site: Path) -> None:
    names = [f"methods/{entry['id']}" for entry in list_methods() if "." not in entry["id"]]
    names += [f"scenarios/{entry['id'].partition('@')[0]}" for entry in list_scenarios()]
    for name in names:
        text = (site / name / "index.html").read_text(encoding="utf-8")
        headings = [re.sub(r"<.*?>|&para;", "", found).strip() for found in re.findall(r"<h2[^>]*>(.*?)</h2>", text)]
        assert tuple(headings) == HEADINGS, name


def test_pages_ask_nobody_else(site: Path) -> None:
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        loaded = re.findall(
            r"<(?:script|img|iframe)[^>]+src=\"(https?:[^\"]+)|<link[^>]+stylesheet[^>]+href=\"(https?:[^\"]+)", text
        )
        assert not loaded, f"{path.relative_to(site)} loads {loaded}"


def test_our_numbers_stand_on_the_pages(site: Path) -> None:
    text = (site / "methods/er/index.html").read_text(encoding="utf-8")
    assert "results/foundation" in text
    assert re.search(
        r"split-digits@1</a></td>\s*<td[^>]*>[^<]*</td>\s*<td[^>]*>mlp</td>\s*<td[^>]*>3</td>\s*<td[^>]*>94\.9", text
    )
