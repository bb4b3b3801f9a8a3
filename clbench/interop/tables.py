"""A scenario's index table as one Parquet file, for other frameworks; and back.

One row per place in a table, in order. Columns:

    part      `train`, `val` or `test`
    task      task index; of a test row, the task its group belongs to, or null
    group     index of the test group; null for `train` and `val`
    position  train: place in the whole stream, from 0; val and test: place in its task's or group's list
    row       row of the data, through all data sets in their order
    target    class id
    domain    index into `domains`, or null
    sha256    of the image's (C, H, W) bytes as stored, before its domain, if digests were given

All else (names, classes, groups, domains, parameters, fingerprints) is JSON in the schema's metadata, key `clbench`.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from clbench.atomic import atomic_path
from clbench.data.classes import TRAIN, ClassTable, LabelTable
from clbench.errors import InputError
from clbench.scenarios.model import Domains, Group, Scenario, StreamDefaults, Task

__all__ = ["export_parquet", "read_parquet"]

FORMAT = 1
KEY = b"clbench"
PARTS = ("train", "val", "test")


def export_parquet(
    scenario: Scenario,
    path: str | os.PathLike[str],
    tables: Sequence[LabelTable],
    *,
    row_order: str = "canonical",
    size: int | None = None,
    digests: NDArray[np.uint64] | None = None,
) -> Path:
    """Write the scenario to one Parquet file, whole or not at all; returns its path.

    tables: what it was built on, for the fingerprints of the data. row_order, size: how the data were loaded.
    digests: (N, 4) of every row (`clbench.data.loading.pixel_digests`), for the column `sha256`.
    Raises InputError if the tables are not the scenario's or the file cannot be written, RunFailed for a full disk.
    """
    names = tuple(table.dataset for table in tables)
    if names != scenario.datasets:
        raise InputError(
            f"scenario {scenario.id} is built on {', '.join(scenario.datasets)}; its export needs their label tables, "
            f"not those of {', '.join(names) or 'none'}"
        )
    table = as_table(scenario, digests)
    about = {**describe(scenario), "data": describe_data(tables, row_order, size)}
    table = table.replace_schema_metadata({KEY: json.dumps(about).encode()})
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")
    return Path(path)


def as_table(scenario: Scenario, digests: NDArray[np.uint64] | None) -> pa.Table:
    """The columns of the module's docstring."""
    parts = list(columns_of(scenario))
    sizes = [len(part["row"]) for part in parts]

    def joined(name: str, kind: Any) -> Any:
        values = [part[name] for part in parts]
        given = np.repeat([value is not None for value in values], sizes)
        filled = [
            np.full(size, -1 if value is None else value) if np.isscalar(value) or value is None else value.numpy()
            for value, size in zip(values, sizes, strict=True)
        ]
        return pa.array(np.concatenate(filled), type=kind, mask=~given)

    code = np.repeat([PARTS.index(part["part"]) for part in parts], sizes)
    columns = {"part": pa.DictionaryArray.from_arrays(pa.array(code, pa.int8()), list(PARTS))}
    for name in ("task", "group"):
        columns[name] = joined(name, pa.int32())
    for name in ("position", "row", "target"):
        columns[name] = joined(name, pa.int64())
    columns["domain"] = joined("domain", pa.int32())
    if digests is not None:
        text = digests[np.asarray(columns["row"])].astype(">u8").tobytes().hex()
        columns["sha256"] = pa.array([text[at : at + 64] for at in range(0, len(text), 64)], pa.string())
    return pa.table(columns)


def columns_of(scenario: Scenario) -> Iterator[dict[str, Any]]:
    """The columns of every task, validation part and group: a tensor, one number for all, or None."""
    for index, task in enumerate(scenario.tasks):
        place = torch.arange(len(task.rows)) + scenario.offsets[index]
        yield {"part": "train", "task": index, "group": None, "position": place, "row": task.rows,
               "target": task.targets, "domain": task.domain}  # fmt: skip
    for index, task in enumerate(scenario.tasks):
        if task.val is not None:
            rows, targets = task.val
            yield {"part": "val", "task": index, "group": None, "position": torch.arange(len(rows)), "row": rows,
                   "target": targets, "domain": None}  # fmt: skip
    for index, group in enumerate(scenario.groups):
        yield {"part": "test", "task": group.task, "group": index, "position": torch.arange(len(group.rows)),
               "row": group.rows, "target": group.targets, "domain": group.domain}  # fmt: skip


def describe(scenario: Scenario) -> dict[str, Any]:
    """What the columns do not hold."""
    num = scenario.num_classes

    def ids(classes: Tensor) -> Any:
        return "all" if torch.equal(classes, torch.arange(num)) else classes.tolist()

    table = scenario.classes
    return {
        "format": FORMAT,
        "id": scenario.id,
        "fingerprint": scenario.fingerprint,
        "datasets": list(scenario.datasets),
        "setting": scenario.setting,
        "online": scenario.online,
        "recall": scenario.recall,
        "classes": {
            "name": list(table.names),
            "level": table.level.tolist(),
            "parent": table.parent.tolist(),
            "first_seen": scenario.first_seen.tolist(),
        },
        "tasks": [
            {
                "name": task.name,
                "introduces": task.classes.tolist(),
                "has_domain": task.domain is not None,
                "has_val": task.val is not None,
            }
            for task in scenario.tasks
        ],
        "groups": [
            {
                "name": group.name,
                "task": group.task,
                "level": group.level,
                "answers": ids(group.classes),
                "has_domain": group.domain is not None,
            }
            for group in scenario.groups
        ],
        "domains": None
        if scenario.domains is None
        else {"kind": scenario.domains.kind, "table": scenario.domains.table.tolist()},
        "prompts": {str(task): list(texts) for task, texts in scenario.prompts.items()},
        "parameters": dict(scenario.params),
        "defaults": asdict(scenario.defaults),
    }


def describe_data(tables: Sequence[LabelTable], row_order: str, size: int | None) -> list[dict[str, Any]]:
    """Per data set: the rows it has here, and by what another framework sees that its rows are the same."""
    out, first = [], 0
    for table in tables:
        num_train = int((table.split == TRAIN).sum())
        out.append(
            {
                "name": table.dataset,
                "fingerprint": table.fingerprint,
                "first_row": first,
                "num_rows": len(table.labels),
                "num_train": num_train,
                "row_order": row_order,
                "size": size,
            }
        )
        first += len(table.labels)
    return out


# -- and back ---------------------------------------------------------------------------------------------------------
def read_parquet(path: str | os.PathLike[str]) -> Scenario:
    """The scenario of a file that `export_parquet` wrote, with the same fingerprint.

    Raises InputError if the file cannot be read, is none of ours, of a later format, or does not hold what it says.
    """
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"cannot read {path}: {str(error).splitlines()[0]}") from None
    text = (table.schema.metadata or {}).get(KEY)
    if text is None:
        raise InputError(f"{path} is no exported scenario: write one with `clbench export SCENARIO --to parquet`")
    about = json.loads(text)
    if about["format"] > FORMAT:
        raise InputError(f"{path} has format {about['format']}, but this clbench reads up to {FORMAT}; update clbench")
    try:
        scenario = as_scenario(table, about)
        whole = scenario.fingerprint == about["fingerprint"]
    except (KeyError, TypeError, ValueError, RuntimeError):  # columns or entries are gone, or of another form
        whole = False
    if not whole:
        raise InputError(f"{path} does not hold the table that its fingerprint names; export it again")
    return scenario


def as_scenario(table: pa.Table, about: dict[str, Any]) -> Scenario:
    """Put columns and metadata together again."""
    encoded = table["part"].combine_chunks().dictionary_encode()
    part, names = np.asarray(encoded.indices), encoded.dictionary.to_pylist()
    columns = {
        name: torch.from_numpy(table[name].fill_null(-1).to_numpy().astype(np.int64))
        for name in ("task", "group", "row", "target", "domain")
    }

    def pieces(kind: str, by: str, number: int) -> list[dict[str, Tensor]]:
        """The rows of one part, cut by task or group."""
        at = torch.from_numpy(np.flatnonzero(part == names.index(kind)) if kind in names else np.empty(0, np.int64))
        sizes = torch.bincount(columns[by][at], minlength=number).tolist()
        cut = {name: columns[name][at].split(sizes) for name in ("row", "target", "domain")}
        return [{name: values[i] for name, values in cut.items()} for i in range(number)]

    num_classes = len(about["classes"]["name"])
    train = pieces("train", "task", len(about["tasks"]))
    val = pieces("val", "task", len(about["tasks"]))
    test = pieces("test", "group", len(about["groups"]))
    tasks = tuple(
        Task(
            rows=own["row"],
            targets=own["target"],
            classes=ints(task["introduces"]),
            domain=own["domain"] if task["has_domain"] else None,
            val=(kept["row"], kept["target"]) if task["has_val"] else None,
            name=task["name"],
        )
        for task, own, kept in zip(about["tasks"], train, val, strict=True)
    )
    groups = tuple(
        Group(
            name=group["name"],
            rows=own["row"],
            targets=own["target"],
            classes=torch.arange(num_classes) if group["answers"] == "all" else ints(group["answers"]),
            task=group["task"],
            domain=own["domain"] if group["has_domain"] else None,
            level=group["level"],
        )
        for group, own in zip(about["groups"], test, strict=True)
    )
    domains, classes = about["domains"], about["classes"]
    return Scenario(
        id=about["id"],
        datasets=tuple(about["datasets"]),
        setting=about["setting"],
        tasks=tasks,
        groups=groups,
        classes=ClassTable(tuple(classes["name"]), ints(classes["level"]), ints(classes["parent"])),
        first_seen=ints(classes["first_seen"]),
        online=about["online"],
        defaults=StreamDefaults(**about["defaults"]),
        domains=None if domains is None else Domains(domains["kind"], ints(domains["table"])),
        prompts={int(task): tuple(texts) for task, texts in about["prompts"].items()},
        recall=about["recall"],
        params=about["parameters"],
    )


def ints(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)
