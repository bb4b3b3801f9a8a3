"""Every command in README and docs is run, page by page, in a folder of its own, on less data where it can be."""

import importlib.util
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import CommandLine
from test_docs import PAGES, blocks

LESS = {"split-digits": ("--scenario-set", "per_class=12"), "split-digits-a": ("--scenario-set", "per_class=12")}
OUTSIDE = ("cifar", "mtil", "omniglot")  # scenarios whose data are not part of clbench
ELSEWHERE = ("--address",)  # needs a running cluster: tests/protocol/test_ray.py


def lines_of(page: Path) -> list[str]:
    return re.findall(r"^clbench .*", page.read_text(encoding="utf-8"), re.MULTILINE)


def images(folder: Path) -> None:
    """A user's image folder: two classes of noise, 32 px."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            place = folder / split / name
            place.mkdir(parents=True)
            for index in range(8):
                pixels = draw.integers(0, 256, (32, 32, 3)).astype("uint8")
                Image.fromarray(pixels).save(place / f"{index}.png")


def prepared(line: str, folder: Path) -> list[str]:
    """The words of a command, with a real run in place of RUN, on less data."""
    for method in ("er", "finetune"):
        if f"{method}/RUN" in line:
            run = next((folder / "results/runs/split-digits@1" / method).glob("*/DONE")).parent
            line = line.replace(f"{method}/RUN", f"{method}/{run.name}")
    words = shlex.split(line.replace(" CLASS", " 0"))[1:]
    scenario = next((b for a, b in pairwise(words) if a in ("--scenario", "--tune")), "")
    if words[0] in ("run", "sweep", "protocol") and "dataset=" not in line:
        words += LESS.get(scenario.split(",")[0], ())
    return words


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if lines_of(page)], ids=lambda page: page.stem)
def test_commands_of_a_page_run(clbench: CommandLine, tmp_path: Path, page: Path) -> None:
    (tmp_path / "anchor.py").write_text(blocks("docs/add-a-method.md", "python")[0])
    (tmp_path / "mislabelled-digits.py").write_text(blocks("docs/add-a-scenario.md", "python")[0])
    images(tmp_path / "path/to/mine")
    if "/RUN" in page.read_text(encoding="utf-8"):
        for method in ("er", "finetune"):
            assert clbench(*prepared(f"clbench run --method {method} --scenario split-digits", tmp_path)).code == 0
    ran = 0
    for line in lines_of(page):
        if any(word in line for word in ELSEWHERE) or ("--engine ray" in line and not importlib.util.find_spec("ray")):
            continue
        done = clbench(*prepared(line, tmp_path))
        assert "Traceback" not in done.err, line
        if "avalanche:" in line and not importlib.util.find_spec("avalanche"):
            assert done.code == 2, line
            assert "clbench[avalanche]" in done.err
        elif done.code == 2 and any(name in line for name in OUTSIDE):
            assert re.search(r"data|weights|folder|not", done.err), line  # it says what is missing
        else:
            assert done.code in ((0, 1) if "doctor" in line else (0,)), f"{line}: {done.err}"
        ran += 1
    assert ran or "address" in page.read_text(encoding="utf-8")
