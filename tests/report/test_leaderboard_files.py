"""The page and the tables as files: complete, equal for equal records, and safe against names with markup."""

import base64
import csv
import hashlib
import io
import json
import re
import time
import tracemalloc
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made import hyperparameter, many, write

from clbench.metrics import Curve
from clbench.report.leaderboard import Written, write_report
from clbench.report.leaderboard.curves import confusion_of, pack_curve
from clbench.report.leaderboard.tables import csv_cell, md, tex

EVIL = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>"
SPREADSHEET = '=HYPERLINK("http://x","y")'


class Elements(HTMLParser):
    """Every tag with its attributes, and the text of the scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag == "script"
        if self.inside:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.scripts[-1] += data


def parsed(written: Written) -> Elements:
    elements = Elements()
    elements.feed(written.files[0].read_text(encoding="utf-8"))
    return elements


def content(elements: Elements) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(elements.scripts[0])
    return found


def unpack(blob: str) -> Any:
    return json.loads(zlib.decompress(base64.b64decode(blob), -15))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder = tmp_path_factory.mktemp("report")
    for seed in range(3):
        write(folder / "runs", "er", seed=seed, level=0.6)
        write(folder / "runs", "clib", seed=seed, level=0.8)
        write(
            folder / "runs", EVIL, seed=seed, level=0.7, backbone=f"net{EVIL}", recipe=EVIL,
            hyperparameters={"a|b_c$": hyperparameter(EVIL, f"--set {SPREADSHEET}")}, method_file="ab" * 32,
        )  # fmt: skip
    return write_report([folder / "runs"], folder / "out", title=EVIL, date="2026-01-01")


def test_it_is_one_file_that_asks_for_nothing(written: Written) -> None:
    elements = parsed(written)
    assert {tag for tag, _ in elements.tags} >= {"main", "style", "script", "dialog"}
    for tag, attributes in elements.tags:
        assert "src" not in attributes, (tag, attributes)
        link = attributes.get("href")
        assert link is None or link.startswith(("#", "data:", "leaderboard.")), (tag, link)
    style = re.search(r"<style>(.*?)</style>", written.files[0].read_text(), re.S)
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]


def test_only_its_own_two_scripts_may_run(written: Written) -> None:
    elements = parsed(written)
    policy = next(a["content"] for tag, a in elements.tags if tag == "meta" and "http-equiv" in a)
    assert policy is not None
    assert "default-src 'none'" in policy
    kinds = [a.get("type") for tag, a in elements.tags if tag == "script"]
    running = [text for text, kind in zip(elements.scripts, kinds, strict=True) if kind is None]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in running]
    assert len(running) == 2
    assert re.findall(r"'sha256-([^']+)'", policy) == hashes
    assert "unsafe-inline" not in policy.partition("script-src")[2].partition(";")[0]


def test_markup_in_names_stays_text(written: Written) -> None:
    elements = parsed(written)
    assert not any(tag == "img" for tag, _ in elements.tags)
    found = content(elements)
    assert found["made"]["title"] == EVIL, "it is in the data, as text"
    assert EVIL in [row["method"] for row in found["boards"][0]["rows"]]
    markdown = written.files[1].read_text()
    assert "<script" not in markdown
    assert "<img" not in markdown
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    cells = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
    assert len(cells) == 1, "a | in a name adds no column"


def test_the_page_holds_what_the_records_hold(written: Written) -> None:
    elements = parsed(written)
    found = content(elements)
    (board,) = found["boards"]
    assert [row["method"] for row in board["rows"]] == ["clib", EVIL, "er"]
    row = board["rows"][0]
    stats = written.boards[0].rows[0].stats["final_accuracy"]
    assert row["stats"]["final_accuracy"][:2] == pytest.approx([stats.mean, stats.std], rel=1e-5)
    run = found["runs"][row["runs"][0]]
    assert run["again"].startswith("clbench run --method clib --scenario made@1 --seeds 0")
    assert run["starts"][0][2], "the command of every start"
    assert found["environments"][run["starts"][0][1]]["torch"]
    pairs = board["tests"]["final_accuracy"]["pairs"]
    assert [pair[:3] for pair in pairs] == [[0, 1, 3], [0, 2, 3], [1, 2, 3]]
    blobs = {a["id"] for tag, a in elements.tags if tag == "script" and a.get("type") == "text/plain"}
    assert blobs == {f"{kind}{index}" for kind in "cmk" for index in range(9)}


def test_curves_in_the_page_are_the_records(written: Written) -> None:
    text = written.files[0].read_text()
    found = content(parsed(written))
    index = found["boards"][0]["rows"][0]["runs"][0]
    blob = re.search(rf'id="c{index}">([^<]+)<', text)
    assert blob is not None
    curve = unpack(blob[1])
    record = written.boards[0].rows[0].runs[(0, 0)].record.read_curve()
    assert np.cumsum(curve["steps"]).tolist() == record.steps.tolist()
    shown = np.cumsum(curve["mean"][2]) - 1  # the first group, in 1/10000; -1: not evaluated
    expected = np.where(np.isfinite(record.accuracy[:, 0]), np.rint(record.accuracy[:, 0] * 10000), -1)
    assert shown.tolist() == expected.tolist()


def test_tables_as_files(written: Written) -> None:
    rows = list(csv.DictReader(io.StringIO(written.files[2].read_text())))
    assert [row["rank"] for row in rows] == ["1", "2", "3"]
    mean = written.boards[0].rows[0].stats["final_accuracy"].mean
    assert float(rows[0]["final_accuracy_mean"]) == mean
    runs = list(csv.DictReader(io.StringIO(written.files[3].read_text())))
    assert len(runs) == 9
    assert {row["state"] for row in runs} == {"done"}
    latex = written.files[4].read_text()
    assert latex.count("\\toprule") == latex.count("\\bottomrule") == 1
    assert "\\mathbf" in latex
    body = latex[latex.index("\\midrule") : latex.index("\\bottomrule")]
    assert {line.count("&") for line in body.splitlines() if line.endswith("\\\\")} == {9}
    assert "\\textless{}/script\\textgreater{}" in latex


def test_escapes() -> None:
    assert tex("a_b & 50% $x^2 ~ {\\y} #1") == (
        "a\\_b \\& 50\\% \\$x\\textasciicircum{}2 \\textasciitilde{} \\{\\textbackslash{}y\\} \\#1"
    )
    assert md("a|b*c_`d`\n<b>") == "a\\|b\\*c\\_'d' &lt;b&gt;"
    assert csv_cell(SPREADSHEET) == f"'{SPREADSHEET}"
    assert csv_cell(-0.5) == -0.5


def test_the_same_records_give_the_same_bytes(written: Written, tmp_path: Path) -> None:
    folder = written.boards[0].rows[0].runs[(0, 0)].path.parents[2]
    again = write_report([folder], tmp_path, title=EVIL, date="2026-01-01")
    for first, second in zip(written.files, again.files, strict=True):
        assert first.read_bytes() == second.read_bytes(), first.name


def test_thinned_curves_keep_every_low_and_high() -> None:
    rng = np.random.default_rng(0)
    steps = np.arange(5000)
    hits = rng.integers(0, 101, (5000, 3))
    curve = Curve.of(
        steps=steps, task=steps * 3 // 5000, hits=hits, totals=[100] * 3, group_task=[0, 1, 2],
        task_ends=[1666, 3332, 4999],
    )  # fmt: skip
    found = unpack(pack_curve(curve, values=6000))
    tasks, at = np.cumsum(found["tasks"]), np.cumsum(found["steps"])
    assert len(at) < 6000 / 15 * 1.1
    assert set(tasks) == {0, 1, 2}
    for group in range(3):
        low, high = (np.cumsum(found[part][2 + group]) - 1 for part in ("low", "high"))
        for task in range(3):
            inside = hits[curve.task == task, group] * 100
            assert (low[tasks == task].min(), high[tasks == task].max()) == (inside.min(), inside.max())


def test_confusions_stand_in_the_order_of_learning() -> None:
    targets, answers = np.array([5, 5, 2, 2, 9]), np.array([5, 2, 2, 2, 5])
    found = confusion_of(targets, answers, np.array([2, 2, 1]), np.array([0, 1, 2]))
    assert found is not None
    assert found["classes"] == [5, 2, 9]
    assert found["bounds"] == [1, 2]
    matrix = np.zeros(9, int)
    matrix[np.cumsum(found["cells"])] = found["counts"]
    assert matrix.reshape(3, 3).tolist() == [[1, 1, 0], [0, 2, 0], [1, 0, 0]]
    assert confusion_of(np.arange(500), np.arange(500), None, None) is None


@pytest.mark.slow
def test_a_thousand_records_in_20_seconds_and_a_page_below_6_mb(tmp_path: Path) -> None:
    many(tmp_path, 1000)
    tracemalloc.start()
    begin = time.process_time()  # of this process: other work on the machine does not count
    written = write_report([tmp_path / "runs"], tmp_path / "out")
    spent, (_, peak) = time.process_time() - begin, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(len(row.runs) for board in written.boards for row in board.rows) == 1000
    assert written.files[0].stat().st_size < 6.2e6
    assert peak < 5e8
    assert spent < 20 * 2, "tracing memory about doubles the time"
