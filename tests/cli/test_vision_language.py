"""Vision-language runs from the command line: what a record says of the reference set, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import CommandLine
from PIL import Image

GREEDY = '''
"""Asks for more memory than there is."""
import torch
from clbench.methods.finetune import Finetune


class Greedy(Finetune):
    memory_advice = "--set pieces=2"

    def step(self, batch):
        torch.empty(2**50)


METHOD = Greedy
'''


@pytest.fixture
def domains(tmp_path: Path) -> dict[str, str]:
    """Three data sets of two classes, 16 px: two for a stream and one to refer to."""
    rng = np.random.default_rng(0)
    for name in ("birds", "coins", "doors"):
        for label in ("old", "new"):
            for part, count in (("train", 4), ("test", 2)):
                folder = tmp_path / "data" / name / part / f"{label} {name}"
                folder.mkdir(parents=True)
                for i in range(count):
                    Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return {name: str(tmp_path / "data" / name) for name in ("birds", "coins", "doors")}


def arguments(domains: dict[str, str], *more: object) -> list[object]:
    return [
        "--scenario", "mtil-small", "--scenario-set", f"dataset={domains['birds']},{domains['coins']}",
        "--scenario-set", "size=16", "--backbone", "clip-small", "--backbone-set", "pretrained=false", "--threads", 1,
        "--eval-every", 0, "--batch-size", 4, "--set", "iterations=2", "--set", "warmup=1", "--train-view", "",
        "--test-view", "", *more,
    ]  # fmt: skip


def test_zscl_records_its_reference(domains: dict[str, str], clbench: CommandLine, tmp_path: Path) -> None:
    given = ("--set", f"reference_images={domains['doors']}", "--set", "average_every=1")
    code, _, err = clbench("run", "--method", "zscl", *arguments(domains, *given))
    assert code == 0, err
    (record,) = (path.parent for path in (tmp_path / "results").rglob("spec.json"))
    spec = json.loads((record / "spec.json").read_text())
    assert spec["reference"]["images"] == ["doors"]
    assert spec["reference"]["num_images"] == 12
    assert spec["reference"]["num_texts"] == 1000
    assert spec["reference"]["overlap"] is None
    assert spec["reference_fingerprint"] == spec["reference"]["fingerprint"]
    assert spec["contaminated"] is None
    summary = json.loads((record / "summary.json").read_text())
    assert summary["steps"] == 6
    assert all(0 <= summary[key] <= 1 for key in ("transfer", "avg", "last"))


def test_a_reference_of_the_stream_is_refused_or_marked(
    domains: dict[str, str], clbench: CommandLine, tmp_path: Path
) -> None:
    given = ("--set", f"reference_images={domains['coins']}")
    code, _, err = clbench("run", "--method", "zscl", *arguments(domains, *given))
    assert code == 2
    assert "reference images of coins come from where the scenario's images" in err
    assert "--allow-contamination" in err
    code, _, err = clbench("run", "--method", "zscl", *arguments(domains, *given, "--allow-contamination"))
    assert code == 0, err
    (path,) = (tmp_path / "results").rglob("spec.json")
    assert "reference images of coins" in json.loads(path.read_text())["contaminated"]


def test_a_backbone_without_texts_is_refused(domains: dict[str, str], clbench: CommandLine) -> None:
    changed = ["reduced-resnet18" if part == "clip-small" else part for part in arguments(domains)]
    changed = [part for part in changed if part not in ("pretrained=false", "--backbone-set")]
    code, _, err = clbench("run", "--method", "lwf", *changed)
    assert code == 2
    assert "no text tower" in err
    assert "Traceback" not in err


def test_out_of_memory_names_what_to_lower(clbench: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "greedy.py").write_text(GREEDY)
    code, _, err = clbench("run", "--method", tmp_path / "greedy.py", "--scenario", "split-digits", "--threads", 1)
    assert code == 1
    assert "out of memory on cpu: lower --set pieces=2" in err
    assert "Traceback" not in err
