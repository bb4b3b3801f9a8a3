"""Small studies on digits that take a second or two."""

import json
from pathlib import Path
from typing import Any

from clbench.protocol.search import SearchPlan
from clbench.protocol.space import Dimension
from clbench.protocol.study import StudyPlan

TINY = {"per_class": 12}  # of digits 0-4: 10 rows to train on and 2 for validation, per class
LR = Dimension("lr", low=0.001, high=0.3, scale="log", source="test")


def plan(out: Path, **changes: Any) -> StudyPlan:
    """Three trials of fine-tuning over lr and batch size, two seeds, one epoch."""
    given: dict[str, Any] = {
        "method": "finetune",
        "scenario": "split-digits-a",
        "search": SearchPlan("uniform", 3),
        "seeds": (0, 1),
        "params": TINY,
        "fixed": {"epochs": 1, "set": {"weight_decay": "0"}},
        "where": {"device": "cpu", "threads": 1, "data": []},
        "val_share": 0.2,
        "out": out,
    }
    return StudyPlan(**{**given, **changes})


def words(out: Path, *more: object) -> list[str]:
    """The same study as arguments of `clbench`."""
    return [
        "protocol", "run", "--method", "finetune", "--tune", "split-digits-a", "--trials", "3", "--tune-seeds", "2",
        "--scenario-set", "per_class=12", "--epochs", "1", "--set", "weight_decay=0", "--val-share", "0.2",
        "--device", "cpu", "--out", str(out), *map(str, more),
    ]  # fmt: skip


def records(folder: Path) -> list[Path]:
    """Finished run records below a folder."""
    return sorted(path.parent for path in folder.rglob("DONE"))


def same(one: bytes, other: bytes) -> bool:
    """Two study files: byte for byte, unless somebody changes the package while the test runs: then all but the code
    version (and the signature over it)."""
    if one == other:
        return True
    contents = [json.loads(one), json.loads(other)]
    codes = [content.pop("code") for content in contents]
    for content in contents:
        content.pop("signature")
    return bool(codes[0] != codes[1] and contents[0] == contents[1])
