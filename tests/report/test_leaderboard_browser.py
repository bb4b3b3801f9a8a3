"""The page in a real browser: it opens without an error, tables sort and filter, curves are picked and zoomed.

Needs Chromium with its driver (Debian: `apt-get install chromium chromium-driver`) and selenium; skipped without.
"""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made import hyperparameter, many, write

from clbench.report.leaderboard import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
RESULTS = Path(__file__).parents[2] / "results"
EVIL = "<img src=x onerror=document.title='owned'>"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="no Chromium with chromedriver on this machine"),
]
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1400,1000",
)  # fmt: skip


class Page:
    """A page in a browser. Everything is asked for by what a reader sees: headings, buttons, text."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, path: Path, hash: str = "") -> None:
        self.driver.get("about:blank")
        self.driver.get(path.resolve().as_uri() + hash)
        self.wait("document.querySelector('main h1') !== null")

    def js(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(f"return {script}", *arguments)

    def wait(self, condition: str, seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while not self.js(condition):
            assert time.monotonic() < end, f"never true: {condition}\n{self.problems()}"
            time.sleep(0.05)

    def click(self, selector: str) -> None:
        self.driver.execute_script("document.querySelector(arguments[0]).click()", selector)

    def type(self, selector: str, text: str) -> None:
        self.driver.execute_script(
            "const i = document.querySelector(arguments[0]); i.value = arguments[1];"
            "i.dispatchEvent(new Event('input', {bubbles: true}))", selector, text,
        )  # fmt: skip

    def rows(self) -> list[str]:
        return list(self.js("[...document.querySelectorAll('.results tr.row')].map((r) => r.dataset.label)"))

    def problems(self) -> list[str]:
        """Errors and warnings of the console, and refusals of the policy."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def emulate(self, width: int, scheme: str) -> None:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield Page(driver)
    driver.quit()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three scenarios with four methods, 4 seeds."""
    folder = tmp_path_factory.mktemp("made")
    for scenario in ("one@1", "three@1", "two@1"):
        for number, method in enumerate(("er", "clib", "slca", EVIL)):
            for seed in range(4 if method != "slca" else 3):
                values = {"lr": hyperparameter(0.1, "--set" if method == "er" else "default")}
                write(folder / "runs", method, scenario, seed, level=0.5 + 0.1 * number, hyperparameters=values)
    write(folder / "runs", "slca", "one@1", 3, level=0.7, state="unfinished", hyperparameters=values)
    return write_report([folder / "runs"], folder / "out", title=f"Made {EVIL}").files[0]


def test_the_committed_results_open_without_an_error(page: Page, tmp_path: Path) -> None:
    folders = sorted(RESULTS.glob("*/runs"))
    if not folders:
        pytest.skip("the committed results are not beside these tests")
    written = write_report(folders, tmp_path)
    page.problems()
    page.open(written.files[0])
    assert page.js("document.querySelectorAll('.grid tbody tr').length") == len(written.boards)
    for board in written.boards:
        page.open(written.files[0], f"#/board/{board.id}")
        assert set(page.rows()) == {row.label for row in board.rows}
        runs = [run for row in board.rows for run in row.runs.values() if run.summary["evaluations"]]
        if any((run.path / "curve.parquet").exists() for run in runs):
            page.wait("document.querySelector('.plot')?.plot !== undefined")
    for view in ("statistics", "records", "about"):
        page.open(written.files[0], f"#/{view}")
    assert page.js("performance.getEntriesByType('resource').length") == 0, "it asked for something"
    assert page.problems() == []


def test_sorting(page: Page, made: Path) -> None:
    page.open(made, "#/board/b1")
    assert page.rows() == [EVIL, "slca", "clib", "er"], "ranked by final accuracy"
    page.click("[data-sort='final_accuracy']")
    assert page.rows() == ["er", "clib", "slca", EVIL]
    assert page.js("document.querySelector('[data-sort=final_accuracy]').closest('th').ariaSort") == "ascending"
    page.click("[data-sort='label']")
    assert page.rows() == [EVIL, "clib", "er", "slca"]
    page.click("[data-sort='seeds']")
    assert page.rows()[-1] == "slca", "fewest seeds last"
    page.click("[data-sort='forgetting']")
    texts = page.js(
        "[...document.querySelectorAll('.results tr.row')].map((r) => r.cells[5].querySelector('b').textContent)"
    )
    means = [float(text.replace("−", "-")) for text in texts]
    assert means == sorted(means), "what is better when lower begins with the lowest"


def test_filtering(page: Page, made: Path) -> None:
    page.open(made, "#/board/b1")
    page.type("input[aria-label='filter rows']", "cli")
    assert page.rows() == ["clib"]
    page.type("input[aria-label='filter rows']", "no such row")
    assert page.rows() == []
    assert "No row matches" in page.js("document.querySelector('.results').textContent")
    page.type("input[aria-label='filter rows']", "")
    page.click(".chip[data-key='set by hand']")
    assert page.rows() == ["er"]
    page.click(".chip[data-key='set by hand']")
    assert len(page.rows()) == 4
    page.open(made)
    page.type("input[aria-label='filter scenarios']", "two")
    assert page.js("[...document.querySelectorAll('.grid tbody th a')].map((a) => a.textContent)") == ["two@1"]


SERIES = "document.querySelector('.plot').plot.series.filter((s) => s.width > 0 && s.label !== 'Value').length"


def test_curves_are_picked_hovered_and_zoomed(page: Page, made: Path) -> None:
    page.open(made, "#/board/b1")
    page.wait("document.querySelector('.plot')?.plot !== undefined")
    lines = page.js(SERIES)
    page.click(".controls .chip[data-key='3']")
    page.wait(f"document.querySelector('.plot')?.plot && {SERIES} === {lines + 1}")
    page.click(".controls .chip[data-key='g0']")
    page.wait(f"document.querySelector('.plot')?.plot && {SERIES} === {2 * (lines + 1)}")
    page.click(".controls .chip[data-key='mean']")
    page.wait(f"document.querySelector('.plot')?.plot && {SERIES} === {lines + 1}")
    page.js("document.querySelector('.plot').plot.setCursor({left: 200, top: 60})")
    page.wait("document.querySelector('.tip') && !document.querySelector('.tip').hidden")
    assert "task" in page.js("document.querySelector('.tip').textContent")
    right = page.js("document.querySelector('.plot').plot.scales.x.max")
    page.click(".zoom button")
    page.wait(f"document.querySelector('.plot').plot.scales.x.max < {right}")
    page.click(".zoom button:last-child")
    page.wait(f"document.querySelector('.plot').plot.scales.x.max === {right}")
    rows = page.js("document.querySelectorAll('.curves ~ details tbody tr').length")
    assert rows == 4 * 2, "a dip of each left task of each method"
    assert page.problems() == []


def test_a_run_is_one_click_away(page: Page, made: Path) -> None:
    page.open(made, "#/board/b1")
    page.click(".results .seed")
    assert page.js("document.getElementById('dialog').open")
    text = page.js("document.getElementById('dialog').textContent")
    assert "clbench run --method" in text
    assert "torch" in text
    assert "table of rows" in text
    page.click("#dialog .close")
    page.click(".results .name")
    assert page.js("document.querySelector('.detail').hidden") is False
    assert "Hyperparameters, and where each value comes from" in page.js(
        "document.querySelector('.detail').textContent"
    )
    assert "not finished" in page.js("document.querySelector('.results').textContent")


def test_matrix_cost_tests_confusion_and_ranks_are_there(page: Page, made: Path) -> None:
    page.open(made, "#/board/b1")
    page.wait("document.querySelectorAll('canvas[role=img]').length === 2")
    assert page.js("document.querySelectorAll('.scatter circle').length") == 4
    assert page.js("document.querySelectorAll('.tests tbody tr').length") == 6
    page.open(made, "#/statistics")
    page.wait("document.querySelector('.ranks svg') !== null")
    text = page.js("document.querySelector('.ranks').textContent")
    assert "critical difference" in text
    assert EVIL in text


def test_names_with_markup_have_no_effect(page: Page, made: Path) -> None:
    page.problems()
    for view in ("#/", "#/board/b1", "#/statistics", "#/records", "#/about"):
        page.open(made, view)
        time.sleep(0.2)
        assert page.js("document.title") == f"Made {EVIL} · clbench"
        assert page.js("document.images.length") == 0
    assert page.problems() == []


@pytest.mark.parametrize("width", [390, 820, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_follows_the_colour_scheme(page: Page, made: Path, width: int, scheme: str) -> None:
    page.emulate(width, scheme)
    try:
        for view in ("#/", "#/board/b1", "#/statistics", "#/records", "#/about"):
            page.open(made, view)
            time.sleep(0.3)
            assert page.js("document.documentElement.scrollWidth") <= width, f"{view} is wider than the window"
        assert (page.js("getComputedStyle(document.body).backgroundColor") == "rgb(15, 19, 24)") == (scheme == "dark")
        for kind, ground in (("light", "rgb(246, 247, 248)"), ("dark", "rgb(15, 19, 24)")):
            page.click("#theme")
            assert page.js("document.documentElement.dataset.theme") == kind
            assert page.js("getComputedStyle(document.body).backgroundColor") == ground
        page.click("#theme")
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_page_of_a_thousand_records_opens_in_three_seconds(page: Page, tmp_path: Path) -> None:
    many(tmp_path, 1000)
    path = write_report([tmp_path / "runs"], tmp_path / "out").files[0]
    page.open(path)
    took = page.js("performance.getEntriesByType('navigation')[0].loadEventEnd")
    assert page.js("document.querySelectorAll('.grid tbody tr').length") == 10
    begin = time.monotonic()
    page.open(path, "#/board/b5")
    page.wait("document.querySelector('.plot')?.plot !== undefined")
    print(f"load event {took:.0f} ms, a board with its curves {time.monotonic() - begin:.1f} s")
    assert took < 3000
    page.open(path, "#/records")
    assert page.js("document.querySelectorAll('.plain tbody tr').length") == 200, "the rest comes on demand"
