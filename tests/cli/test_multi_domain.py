"""A stream over several data sets from beginning to end, on folders of images of different sizes."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import CommandLine
from PIL import Image

SIDES = {"birds": (20, "RGB"), "coins": (28, "L"), "doors": (16, "RGB")}


@pytest.fixture
def domains(tmp_path: Path) -> str:
    """Three data sets by path: 2, 3 and 4 classes of 6 training and 3 test images, each with a level of its own."""
    rng = np.random.default_rng(0)
    for number, (name, (side, mode)) in enumerate(SIDES.items()):
        for label in range(number + 2):
            for part, count in (("train", 6), ("test", 3)):
                folder = tmp_path / "data" / name / part / f"kind_{label}"
                folder.mkdir(parents=True)
                for i in range(count):
                    pixels = rng.integers(0, 40, (side, side, 3), dtype=np.uint8) + np.uint8(50 * label)
                    Image.fromarray(pixels).convert(mode).save(folder / f"{i}.png")
    return ",".join(str(tmp_path / "data" / name) for name in SIDES)


@pytest.mark.parametrize("method", ["er", "nmc"])
def test_run(method: str, domains: str, clbench: CommandLine, tmp_path: Path) -> None:
    code, _, err = clbench(
        "run", "--method", method, "--scenario", "mtil-small", "--scenario-set", f"dataset={domains}",
        "--scenario-set", "size=16", "--scenario-set", "per_class=5", "--epochs", 2, "--batch-size", 5, "--threads", 1,
        "--train-view", "", "--test-view", "",
    )  # fmt: skip
    assert code == 0, err
    (record,) = (path.parent for path in (tmp_path / "results").rglob("spec.json"))
    spec = json.loads((record / "spec.json").read_text())
    assert spec["datasets"] == list(SIDES)
    assert spec["mask"] == "task"
    with open(record / "matrix.csv") as file:
        rows = [row for row in csv.reader(file) if row]
    head = next(row for row in rows if "birds" in row)
    assert [name for name in head if name in SIDES] == list(SIDES)
    summary = json.loads((record / "summary.json").read_text())
    metrics = summary.get("metrics", summary)
    for key in ("transfer", "avg", "last"):
        assert 0 <= metrics[key] <= 1, "all data sets are tested after every task, future ones too"
    assert metrics["last"] > 0.4, "chance is 0.36; the levels tell the classes apart"


def test_show_and_check(domains: str, clbench: CommandLine) -> None:
    given = ("mtil-small", "--scenario-set", f"dataset={domains}", "--scenario-set", "size=16")
    code, out, err = clbench("show", *given, "--out", "picture.png")
    assert code == 0, err
    assert "task-incremental" in out
    assert "9 classes" in out
    code, out, err = clbench("check", *given, "--scenario-set", "order=seeded")
    assert code == 0, out + err


def test_bad_input(domains: str, clbench: CommandLine, tmp_path: Path) -> None:
    code, _, err = clbench("run", "--method", "er", "--scenario", "mtil-small", "--scenario-set", f"dataset={domains}",
                           "--scenario-set", "size=none")  # fmt: skip
    assert code == 2
    assert "data sets of one stream need images of one size, not birds 20x20, coins 28x28, doors 16x16" in err
    code, _, err = clbench("run", "--method", "er", "--scenario", "mtil", "--data", tmp_path / "nowhere")
    assert code == 2
    assert "scenario mtil@1 needs 11 data sets that are not on this machine" in err
    assert "Traceback" not in err
