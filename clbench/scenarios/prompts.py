"""Prompt templates and class texts of data sets, for text encoders (`prompts.toml`)."""

import tomllib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from clbench.errors import InputError

__all__ = ["PLAIN", "class_texts", "templates"]

PLAIN = ("a photo of a {}.",)  # for data sets that the table does not know


@cache
def _table() -> dict[str, Any]:
    return tomllib.loads((Path(__file__).parent / "prompts.toml").read_text(encoding="utf-8"))


def templates(dataset: str) -> tuple[str, ...]:
    """The prompts of a data set, `{}` in the place of the class; the first one is for training."""
    table = _table()
    found = table["templates"].get(table["same_as"].get(dataset, dataset), PLAIN)
    return tuple(found)


def class_texts(dataset: str, names: Sequence[str], where: str) -> tuple[str, ...]:
    """What stands for each class in a prompt. names: the data set's class names in the order of their ids.

    Raises InputError if the table has a list for this data set and the number of classes is another one.
    """
    table = _table()
    if dataset in table["texts"]:
        texts = table["texts"][dataset]
        if len(texts) != len(names):
            raise InputError(f"{where}: {dataset} has {len(names)} classes, but its prompts name {len(texts)}")
        return tuple(texts)
    rename = table["rename"].get(dataset, {})
    return tuple(rename.get(name, name.replace("_", " ")) for name in names)
