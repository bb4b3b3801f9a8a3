"""The record of one run: a folder whose files are described in `schema.py`.

Every file is written whole or not at all, and a file that cannot be read says so in one sentence. Neither torch, pandas
nor pyarrow is imported before a file needs it, so that records can be listed at once.
"""

import contextlib
import csv
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike
from pydantic import BaseModel, TypeAdapter, ValidationError

from clbench.atomic import atomic_path, atomic_write_bytes, explain_os_error
from clbench.errors import InputError
from clbench.metrics import Curve
from clbench.metrics.curve import FloatArray, IntArray
from clbench.store.checkpoint import Checkpoints, file_sha256
from clbench.store.environment import environment
from clbench.store.schema import (
    CURVE,
    LOSSES,
    PREDICTIONS,
    SCHEMA_VERSION,
    Column,
    Done,
    Environment,
    FileMark,
    Spec,
    Summary,
)

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    import torch

__all__ = ["RECORDED", "Matrix", "RunRecord", "run_id"]

RECORDED = (  # what DONE vouches for, as far as it is there
    "spec.json", "env.json", "curve.parquet", "losses.parquet", "matrix.csv", "predictions.parquet", "summary.json",
    "weights.safetensors",
)  # fmt: skip
TABLES = {"curve": CURVE, "losses": LOSSES, "predictions": PREDICTIONS}
ENTRIES = TypeAdapter(list[Environment])
M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")


class Matrix(NamedTuple):
    """matrix.csv. groups: G names; accuracy: (K, G) fractions, NaN where a group was not evaluated; sizes: (G,) test
    rows; before: (G,) accuracy before any training, or None."""

    groups: tuple[str, ...]
    accuracy: FloatArray
    sizes: IntArray
    before: FloatArray | None


def run_id(identity: Mapping[str, Any]) -> str:
    """12 hex digits of the sha256 of `identity`: plain values that decide what a run gives. Key order does not matter.

    >>> run_id({"seed": 0, "method": "er"}) == run_id({"method": "er", "seed": 0})
    True
    """
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass
class RunRecord:
    """The record in folder `path`. Hold `lock()` around everything that writes.

    Writing raises InputError for a folder that cannot be written and RunFailed for a full disk, and leaves the file as
    it was before; reading raises InputError for a file that is missing or damaged.
    """

    path: Path

    # -- the folder ---------------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes away from this run; makes the folder. The lock dies with its process, however that ends.

        Raises InputError if another process has it.
        """
        import fcntl

        path = self.path / ".lock"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = path.open("a+")
        except OSError as error:
            raise explain_os_error(error, path) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                owner = file.read().strip() or "another process"
                raise InputError(
                    f"run {self.path} is being run by {owner}; wait for it, or use --fresh to start anew beside it"
                ) from None
            file.truncate(0)
            file.write(f"process {os.getpid()}")
            file.flush()
            for stale in [*self.path.glob(".*.tmp"), *self.path.glob("checkpoint/.*.tmp")]:  # of a killed process
                stale.unlink(missing_ok=True)
            yield

    def create(self, document: Mapping[str, Any]) -> None:
        """Write spec.json, fields as in `Spec`. If there is one already, it must be of the same run."""
        spec = Spec.model_validate(document)
        if (self.path / "spec.json").exists():
            if self.read_spec().decisive() != spec.decisive():
                raise InputError(f"{self.path} holds another run; choose another --out, or delete that folder")
            return
        self._write_json("spec.json", spec)

    def is_done(self) -> bool:
        return (self.path / "DONE").exists()

    def finish(self, *, keep_checkpoint: bool = False) -> None:
        """Mark the run complete: DONE vouches for the files there are now. Then delete the checkpoints."""
        present = [self.path / name for name in RECORDED if (self.path / name).exists()]
        marks = {path.name: FileMark(bytes=path.stat().st_size, sha256=file_sha256(path)) for path in present}
        self._write_json("DONE", Done(files=marks))
        if not keep_checkpoint:
            self.checkpoints.remove()

    def damage(self, *, deep: bool = True) -> list[str]:
        """What is wrong with a finished run's files, one sentence each. deep: compare contents, not only sizes."""
        found = []
        for name, mark in self._read_json("DONE", Done).files.items():
            path = self.path / name
            if not path.exists():
                found.append(f"{path} is missing")
            elif path.stat().st_size != mark.bytes:
                found.append(f"{path} has {path.stat().st_size} bytes instead of {mark.bytes}")
            elif deep and file_sha256(path) != mark.sha256:
                found.append(f"{path} has changed since the run finished: its sha256 differs")
        return found

    # -- spec, env, summary -------------------------------------------------------------------------------------------
    def read_spec(self) -> Spec:
        return self._read_json("spec.json", Spec)

    def append_env(self, *, device: "torch.device | str" = "cpu") -> None:
        """Describe this start in env.json."""
        self._write_env([*self.read_env(), environment(device)])

    def note(self, text: str) -> None:
        """Add a note to the entry of this start."""
        *earlier, last = self.read_env()
        self._write_env([*earlier, last.model_copy(update={"notes": [*last.notes, text]})])

    def read_env(self) -> list[Environment]:
        """One entry per start; empty before the first."""
        if not (self.path / "env.json").exists():
            return []
        return self._parse("env.json", ENTRIES.validate_json)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """summary.json, keys as in `Summary`."""
        self._write_json("summary.json", Summary.model_validate(summary))

    def read_summary(self) -> dict[str, Any]:
        return self._read_json("summary.json", Summary).model_dump()

    # -- curve, losses, predictions -----------------------------------------------------------------------------------
    def write_curve(self, curve: Curve, phases: Sequence[Sequence[str]] = ()) -> None:
        """curve.parquet: a row per evaluated group and point, and in the metadata what else the `Curve` holds.

        phases: names of the phases of each task.
        """
        import pyarrow as pa

        slot, group = np.nonzero(curve.valid)
        sizes, tasks = curve.totals.tolist(), curve.group_task.tolist()
        about = {
            "schema_version": SCHEMA_VERSION,
            "groups": [
                {"name": name, "task": task, "size": size}
                for name, task, size in zip(curve.groups, tasks, sizes, strict=True)
            ],
            "task_ends": curve.task_ends.tolist(),
            "phases": [list(names) for names in phases],
        }
        columns = {
            "step": curve.steps[slot],
            "task": curve.task[slot],
            "phase": curve.phase[slot],
            "position": curve.position[slot],
            "group": pa.DictionaryArray.from_arrays(pa.array(group, pa.int32()), pa.array(curve.groups, pa.string())),
            "hits": curve.hits[slot, group],
            "total": curve.totals[group],
        }
        self._write_table("curve", columns, about)

    def read_curve(self) -> Curve:
        return self._parse("curve.parquet", lambda data: _curve(_table("curve", data)))

    def write_losses(self, steps: ArrayLike, name_ids: ArrayLike, values: ArrayLike, names: Sequence[str]) -> None:
        """losses.parquet: (n,) step, index into `names`, and value of every loss."""
        import pyarrow as pa

        ids = pa.array(np.asarray(name_ids), pa.int32())
        name = pa.DictionaryArray.from_arrays(ids, pa.array(names, pa.string()))
        self._write_table("losses", {"step": steps, "name": name, "value": values})

    def write_predictions(self, rows: ArrayLike, targets: ArrayLike, predictions: ArrayLike) -> None:
        """predictions.parquet. rows, targets: (N,) of the test set; predictions: (K, N) class ids, by task."""
        answers = np.asarray(predictions)
        tasks, number = answers.shape
        columns = {
            "row": np.tile(np.asarray(rows), tasks),
            "target": np.tile(np.asarray(targets), tasks),
            "after_task": np.repeat(np.arange(tasks), number),
            "prediction": answers.reshape(-1),
        }
        self._write_table("predictions", columns)

    def read_table(self, name: str) -> "pd.DataFrame":
        """`curve`, `losses` or `predictions` as the long table that it is on disk."""
        frame: pd.DataFrame = self._parse(f"{name}.parquet", lambda data: _table(name, data).to_pandas())
        return frame

    # -- matrix, weights ----------------------------------------------------------------------------------------------
    def write_matrix(
        self, accuracy: ArrayLike, groups: Sequence[str], *, sizes: ArrayLike, before: ArrayLike | None = None
    ) -> None:
        """matrix.csv; arguments as in `Matrix`."""
        rows: list[tuple[str, list[float]]] = [("size", np.asarray(sizes, np.int64).tolist())]
        if before is not None:
            rows.append(("before", np.asarray(before, np.float64).tolist()))
        rows += [(str(task), row) for task, row in enumerate(np.asarray(accuracy, np.float64).tolist())]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["after_task", *groups])
        writer.writerows([label, *("" if np.isnan(value) else repr(value) for value in row)] for label, row in rows)
        atomic_write_bytes(self.path / "matrix.csv", text.getvalue().encode())

    def read_matrix(self) -> Matrix:
        return self._parse("matrix.csv", _matrix)

    def write_weights(self, weights: Mapping[str, "torch.Tensor"]) -> None:
        """weights.safetensors: name -> contiguous CPU tensor."""
        from safetensors.torch import save

        atomic_write_bytes(self.path / "weights.safetensors", save(dict(weights)))

    # -- checkpoints --------------------------------------------------------------------------------------------------
    @cached_property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.path / "checkpoint")

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """See `Checkpoints.save`."""
        self.checkpoints.save(state)

    def load_checkpoint(self, map_location: Any = "cpu") -> dict[str, Any] | None:
        """The newest intact state, None if there is none; env.json notes which one, and which ones were damaged.

        Raises InputError if there are checkpoints but none is intact.
        """
        loaded = self.checkpoints.load(map_location)
        if loaded is None:
            return None
        for text in loaded.notes:
            self.note(text)
        return loaded.state

    # -- inside -------------------------------------------------------------------------------------------------------
    def _write_json(self, name: str, entry: BaseModel) -> None:
        atomic_write_bytes(self.path / name, (entry.model_dump_json(indent=2) + "\n").encode())

    def _write_env(self, entries: list[Environment]) -> None:
        atomic_write_bytes(self.path / "env.json", ENTRIES.dump_json(entries, indent=2) + b"\n")

    def _write_table(self, name: str, columns: Mapping[str, Any], about: Mapping[str, Any] | None = None) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = _arrow_schema(TABLES[name]).with_metadata({"clbench": json.dumps(about)} if about else None)
        arrays = [part if isinstance(part, pa.Array) else pa.array(np.asarray(part)) for part in columns.values()]
        cast = [array.cast(column.type) for array, column in zip(arrays, schema, strict=True)]
        table = pa.Table.from_arrays(cast, schema=schema)
        with atomic_path(self.path / f"{name}.parquet") as temporary:
            pq.write_table(table, temporary, compression="zstd")

    def _read_json(self, name: str, model: type[M]) -> M:
        def parse(data: bytes) -> M:
            version = json.loads(data)["schema_version"]
            if version > SCHEMA_VERSION:
                raise InputError(f"{self.path / name} has schema version {version}; this needs a newer clbench")
            return model.model_validate_json(data)

        return self._parse(name, parse)

    def _parse(self, name: str, parse: Callable[[bytes], T]) -> T:
        """`parse(contents of the file)`, with every way in which that can fail turned into one sentence."""
        path = self.path / name
        try:
            return parse(path.read_bytes())
        except FileNotFoundError:
            raise InputError(f"{path} is missing: the run is unfinished, or {self.path} is no run") from None
        except OSError as error:  # pyarrow's errors are of this kind, too, but without a number
            if error.errno is not None:
                raise explain_os_error(error, path, "read") from error
            reason = str(error)
        except ValidationError as error:
            first = error.errors()[0]
            reason = ": ".join([".".join(str(part) for part in first["loc"]), first["msg"]]).removeprefix(": ")
        except (ValueError, LookupError, TypeError) as error:
            reason = f"{type(error).__name__} {error}"
        reason = reason.strip().splitlines()[0]
        raise InputError(f"{path} is damaged ({reason}); delete {self.path} or use --fresh, and run it again")


def _arrow_schema(columns: Sequence[Column]) -> "pa.Schema":
    import pyarrow as pa

    names = pa.dictionary(pa.int32(), pa.string())
    return pa.schema([(c.key, names if c.kind == "name" else pa.type_for_alias(c.kind)) for c in columns])


def _table(name: str, data: bytes) -> "pa.Table":
    import pyarrow as pa
    import pyarrow.parquet as pq

    table, expected = pq.read_table(pa.BufferReader(data)), _arrow_schema(TABLES[name])
    if name == "curve" and "position" not in table.schema.names:  # schema version 1
        at = expected.get_field_index("position")
        table = table.add_column(at, expected.field(at), pa.array(np.full(len(table), -1)))
    if not table.schema.equals(expected, check_metadata=False):
        raise ValueError(f"its columns are {', '.join(table.schema.names)}, not {', '.join(expected.names)}")
    return table


def _curve(table: "pa.Table") -> Curve:
    about = json.loads(table.schema.metadata[b"clbench"])
    names = [entry["name"] for entry in about["groups"]]
    keys = ("step", "task", "phase", "position")
    points = np.stack([table.column(key).to_numpy().astype(np.int64) for key in keys], axis=1)
    coded = table.unify_dictionaries().column("group").chunks
    order = [names.index(name) for name in coded[0].dictionary.to_pylist()] if coded else []
    group = np.array(order, np.int64)[np.concatenate([part.indices.to_numpy() for part in coded] or [np.empty(0, int)])]
    # a new evaluation starts where step, task or phase change, or where the groups start over
    new = np.r_[True, np.any(points[1:] != points[:-1], axis=1) | (group[1:] <= group[:-1])][: len(points)]
    slot = np.cumsum(new) - 1
    hits = np.zeros((int(new.sum()), len(names)), np.int64)
    valid = np.zeros(hits.shape, np.bool_)
    hits[slot, group], valid[slot, group] = table.column("hits").to_numpy(), True
    steps, task, phase, position = points[new].T
    return Curve.of(
        steps=steps, task=task, phase=phase, position=position, hits=hits, valid=valid, groups=names,
        totals=[entry["size"] for entry in about["groups"]],
        group_task=[entry["task"] for entry in about["groups"]],
        task_ends=about["task_ends"],
    )  # fmt: skip


def _matrix(data: bytes) -> Matrix:
    (_, *groups), *lines = csv.reader(io.StringIO(data.decode()))
    if any(len(line) != len(groups) + 1 for line in lines):
        raise ValueError("a line is too short or too long")
    rows = {label: np.array([float(text) if text else np.nan for text in values]) for label, *values in lines}
    sizes, before = rows.pop("size").astype(np.int64), rows.pop("before", None)
    if not rows or list(rows) != [str(task) for task in range(len(rows))]:
        raise ValueError("its rows are not size, before (if measured), 0, 1, 2 ...")
    return Matrix(tuple(groups), np.stack(list(rows.values())), sizes, before)
