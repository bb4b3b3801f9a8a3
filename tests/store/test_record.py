"""The record of one run: what is written is read back, nothing is lost, and damage is named in one sentence."""

import contextlib
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import GROUPS, MATRIX, SIZES, curve, document, finished, summary

from clbench.errors import InputError, RunFailed
from clbench.metrics import Curve
from clbench.store import RunRecord, environment, run_id
from clbench.store.record import RECORDED
from clbench.store.schema import SCHEMA_VERSION


# -- run id -----------------------------------------------------------------------------------------------------------
def test_run_id_depends_on_every_value_and_on_nothing_else() -> None:
    base = {"seed": 0, "method": "er", "set": {"lr": 0.1, "n": 1}}
    assert run_id(base) == run_id({"set": {"n": 1, "lr": 0.1}, "method": "er", "seed": 0}) == "205980a7aa84"
    for other in ({**base, "seed": 1}, {**base, "set": {"lr": 0.1}}, {**base, "set": {"lr": 0.10000001, "n": 1}}):
        assert run_id(other) != run_id(base)


# -- round trips ------------------------------------------------------------------------------------------------------
def test_everything_written_is_read_back(tmp_path: Path) -> None:
    record = finished(tmp_path / "a" / "b")
    assert record.is_done()
    assert record.damage() == []
    assert record.read_spec().hyperparameters["capacity"].value == 200
    assert record.read_summary() == {"schema_version": SCHEMA_VERSION, **summary()}
    matrix = record.read_matrix()
    assert matrix.groups == tuple(GROUPS)
    assert matrix.accuracy.tolist() == MATRIX  # to the bit
    assert matrix.sizes.tolist() == SIZES
    assert matrix.before is None
    losses = record.read_table("losses")
    assert losses.to_dict("list") == {"step": [1, 1, 2], "name": ["loss", "replay", "loss"], "value": [2.5, 0.1, 2.0]}
    predictions = record.read_table("predictions")
    assert list(predictions.columns) == ["row", "target", "after_task", "prediction"]
    assert predictions.groupby("after_task").size().to_dict() == {0: 50, 1: 50}
    assert same(record.read_curve(), curve())
    assert not [name for name in os.listdir(record.path) if name.endswith(".tmp")]


def test_the_curve_table_is_long_and_holds_what_was_evaluated(tmp_path: Path) -> None:
    table = finished(tmp_path / "r").read_table("curve")
    assert list(table.columns) == ["step", "task", "phase", "position", "group", "hits", "total"]
    assert len(table) == 9
    assert table[table.group == GROUPS[1]].hits.tolist() == [1, 9, 16]
    about = json.loads(pq.read_schema(tmp_path / "r" / "curve.parquet").metadata[b"clbench"])
    assert about["phases"] == [["train", "align"], ["train", "align"]]


@given(st.data())
def test_any_curve_comes_back(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    groups, slots = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 6))
    table = st.lists(st.lists(st.integers(0, 9), min_size=groups, max_size=groups), min_size=slots, max_size=slots)
    valid = np.array(data.draw(table)).reshape(slots, groups) > 4
    valid[:, 0] = True  # an evaluation of nothing leaves no trace
    steps = sorted(data.draw(st.lists(st.integers(0, 5), min_size=slots, max_size=slots)))
    original = Curve.of(
        steps=steps, task=np.arange(slots) // 2, hits=np.where(valid, data.draw(table) or np.empty((0, groups)), 0),
        valid=valid, totals=[9] * groups, group_task=np.arange(groups) - 1, task_ends=[2, 5],
    )  # fmt: skip
    record = RunRecord(tmp_path_factory.mktemp("run"))
    record.write_curve(original)
    assert same(record.read_curve(), original)


def test_a_record_of_schema_version_1_is_read(tmp_path: Path) -> None:
    """Its curve has no positions, its summary lacks the metrics and tables that came later."""
    record = finished(tmp_path / "r")
    table = pq.read_table(record.path / "curve.parquet")
    pq.write_table(table.drop_columns("position"), record.path / "curve.parquet")
    content = json.loads((record.path / "summary.json").read_text())
    for key in ("f_last", "facilitation_slope", "facilitation_missing", "memory_per_task", "levels"):
        del content[key]
    (record.path / "summary.json").write_text(json.dumps({**content, "schema_version": 1}))
    assert same(record.read_curve(), curve())
    read = record.read_summary()
    assert (read["f_last"], read["memory_per_task"], read["levels"]) == (None, [], [])
    assert read["min_accuracy"] == summary()["min_accuracy"]


def test_matrix_with_a_row_before_and_gaps(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    record.write_matrix([[0.1 + 0.2, np.nan]], GROUPS, sizes=SIZES, before=[0.0, 0.25])
    back = record.read_matrix()
    assert back.accuracy[0, 0] == 0.1 + 0.2
    assert np.isnan(back.accuracy[0, 1])
    assert back.before is not None
    assert back.before.tolist() == [0.0, 0.25]


def test_weights_are_read_by_any_safetensors_reader(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    RunRecord(tmp_path).write_weights({"net.weight": torch.arange(6.0).reshape(2, 3)})
    assert torch.equal(load_file(tmp_path / "weights.safetensors")["net.weight"], torch.arange(6.0).reshape(2, 3))


def test_a_summary_with_a_metric_that_is_not_in_the_registry_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="finale_accuracy"):
        RunRecord(tmp_path).write_summary({**summary(), "finale_accuracy": 1.0})
    with pytest.raises(ValueError, match="forgetting"):
        RunRecord(tmp_path).write_summary({key: value for key, value in summary().items() if key != "forgetting"})
    with pytest.raises(ValueError, match="finite"):
        RunRecord(tmp_path).write_summary({**summary(), "forgetting": float("nan")})
    assert not (tmp_path / "summary.json").exists()


# -- starts -----------------------------------------------------------------------------------------------------------
def test_a_second_start_appends_to_env_and_keeps_the_spec(tmp_path: Path) -> None:
    record = RunRecord(tmp_path / "r")
    for _ in range(2):
        with record.lock():
            record.create(document())
            record.append_env()
    record.note("something odd")
    first, second = record.read_env()
    assert (first.notes, second.notes) == ([], ["something odd"])
    sourced = document(
        hyperparameters={"lr": {"value": 0.1, "source": "--set"}, "capacity": {"value": 200, "source": "x"}}
    )
    record.create(sourced)  # the same values from elsewhere are the same run
    with pytest.raises(InputError, match="another run"):
        record.create(document(seed=1))
    assert record.read_spec().seed == 0


@pytest.mark.parametrize("value", [(), (1, 2), {"a": (1,)}])
def test_a_second_start_knows_values_that_are_stored_in_another_form(tmp_path: Path, value: object) -> None:
    """A tuple comes back from spec.json as a list, and is the same value."""
    changes = {"hyperparameters": {"fast_tasks": {"value": value, "source": "--set"}}}
    for _ in range(2):
        RunRecord(tmp_path / "run").create(document(**changes))


def test_environment_names_versions_and_hides_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    found = environment("cpu", command=["run", f"--data={tmp_path}/sets", str(tmp_path)])
    assert found.command == ["run", "--data=~/sets", "~"]
    assert str(tmp_path) not in found.model_dump_json()
    assert found.torch == torch.__version__
    assert found.num_threads == torch.get_num_threads()
    assert found.device_name
    assert found.commit is None or len(found.commit) == 40
    assert (found.commit is None) == (found.dirty is None)


# -- one process at a time --------------------------------------------------------------------------------------------
HOLD = """
    import sys, time
    from pathlib import Path
    from clbench.store import RunRecord
    with RunRecord(Path(sys.argv[1])).lock():
        print("locked", flush=True)
        time.sleep(60)
"""


def test_two_processes_cannot_have_the_same_run_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLD), str(tmp_path / "r")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(InputError, match=f"process {holder.pid}"), RunRecord(tmp_path / "r").lock():
            pass
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    with RunRecord(tmp_path / "r").lock():
        pass


def test_the_lock_clears_what_a_killed_process_left_half_written(tmp_path: Path) -> None:
    stale = [tmp_path / ".curve.parquet.1-abc.tmp", tmp_path / "checkpoint" / ".new.pt.1-abc.tmp"]
    for path in stale:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    with RunRecord(tmp_path).lock():
        assert not any(path.exists() for path in stale)


# -- damage -----------------------------------------------------------------------------------------------------------
READERS = {
    "spec.json": RunRecord.read_spec,
    "env.json": RunRecord.read_env,
    "summary.json": RunRecord.read_summary,
    "matrix.csv": RunRecord.read_matrix,
    "curve.parquet": RunRecord.read_curve,
    "losses.parquet": lambda record: record.read_table("losses"),
    "predictions.parquet": lambda record: record.read_table("predictions"),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", ["truncated", "empty", "garbage", "other"])
def test_a_damaged_file_says_so_in_one_sentence(tmp_path: Path, name: str, kind: str) -> None:
    record = finished(tmp_path / "r")
    path = record.path / name
    whole = path.read_bytes()
    other = b"a,b\n1,2\n" if name.endswith("csv") else b'{"schema_version": 1}'
    path.write_bytes(
        {"truncated": whole[: len(whole) // 2], "empty": b"", "garbage": b"\xff\x00" * 50, "other": other}[kind]
    )
    if kind == "truncated" and name == "matrix.csv":
        path.write_bytes(whole[:-8])  # cut inside a line
    with pytest.raises(InputError, match="is damaged") as caught:
        READERS[name](record)
    assert str(path) in str(caught.value)
    assert "--fresh" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert any(name in problem for problem in record.damage())


def test_a_flipped_byte_is_found_by_the_deep_check(tmp_path: Path) -> None:
    record = finished(tmp_path / "r")
    path = record.path / "predictions.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert record.damage(deep=False) == []
    assert len(record.damage()) == 1
    assert "predictions.parquet" in record.damage()[0]


def test_a_missing_file_and_a_newer_schema_say_so(tmp_path: Path) -> None:
    record = finished(tmp_path / "r")
    (record.path / "losses.parquet").unlink()
    with pytest.raises(InputError, match="missing"):
        record.read_table("losses")
    newer = {**json.loads((record.path / "summary.json").read_text()), "schema_version": 99}
    (record.path / "summary.json").write_text(json.dumps(newer))
    with pytest.raises(InputError, match="newer clbench"):
        record.read_summary()


def test_done_vouches_for_every_file_of_the_record(tmp_path: Path) -> None:
    record = finished(tmp_path / "r")
    assert set(json.loads((record.path / "DONE").read_text())["files"]) == set(RECORDED) - {"weights.safetensors"}
    assert not (record.path / "checkpoint").exists()


# -- full disks and closed folders ------------------------------------------------------------------------------------
@contextlib.contextmanager
def small_disk() -> Iterator[None]:
    """Files may not grow beyond 2 kB: what a full disk looks like to the writer. Nor may a file that pytest writes its
    own output to, so it must be over before a test is."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_full_disk_leaves_the_earlier_files_as_they_were(tmp_path: Path) -> None:
    record = finished(tmp_path / "r")
    record.save_checkpoint({"step": 1, "weights": torch.zeros(2000)})
    before = {path: path.read_bytes() for path in record.path.rglob("*") if path.is_file()}
    rng = np.random.default_rng(0)
    with small_disk(), pytest.raises(RunFailed, match="disk is full"):
        record.save_checkpoint({"step": 2, "weights": torch.randn(20000)})
    with small_disk(), pytest.raises(RunFailed, match="disk is full"):
        record.write_losses(np.arange(5000), np.zeros(5000), rng.normal(size=5000), ["loss"])
    with small_disk(), pytest.raises(RunFailed, match="disk is full"):
        record.write_matrix(rng.normal(size=(40, 40)), [f"g{i}" for i in range(40)], sizes=np.ones(40))
    assert {path: path.read_bytes() for path in record.path.rglob("*") if path.is_file()} == before
    loaded = record.load_checkpoint()
    assert loaded is not None
    assert loaded["step"] == 1


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    record = RunRecord(tmp_path / "file" / "run")
    with pytest.raises(InputError, match=os.strerror(errno.ENOTDIR)), record.lock():
        pass


# -- checkpoints ------------------------------------------------------------------------------------------------------
def test_a_checkpoint_comes_back_to_the_bit(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    assert record.load_checkpoint() is None
    record.append_env()
    state = {"step": 7, "weights": {"w": torch.randn(50)}, "list": [1, (2, 3)], "rng": torch.Generator().get_state()}
    record.save_checkpoint(state)
    back = record.load_checkpoint()
    assert back is not None
    assert torch.equal(back["weights"]["w"], state["weights"]["w"])
    assert back["list"] == [1, (2, 3)]
    (path,) = (tmp_path / "checkpoint").iterdir()
    assert record.read_env()[-1].notes == [f"went on from checkpoint {path.name}"]
    assert torch.load(path, weights_only=True)["step"] == 7


def test_two_checkpoints_are_kept(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    for step in range(12):
        record.save_checkpoint({"step": step})
    assert sorted(path.name[:6] for path in (tmp_path / "checkpoint").iterdir()) == ["000011", "000012"]
    record.checkpoints.remove()
    assert not (tmp_path / "checkpoint").exists()


@pytest.mark.parametrize("kind", ["flipped", "truncated", "empty"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path, kind: str) -> None:
    record = RunRecord(tmp_path)
    record.append_env()
    for step in range(3):
        record.save_checkpoint({"step": step, "weights": torch.randn(100)})
    newest = max((tmp_path / "checkpoint").glob("*.pt"))
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes({"flipped": data, "truncated": data[:100], "empty": b""}[kind])
    back = RunRecord(tmp_path).load_checkpoint()
    assert back is not None
    assert back["step"] == 1
    damaged, resumed = record.read_env()[-1].notes
    assert newest.name in damaged
    assert "damaged" in damaged
    assert "000002" in resumed
    record.save_checkpoint({"step": 2})  # the good one is kept, not the damaged one
    kept = sorted((tmp_path / "checkpoint").iterdir())
    assert [torch.load(path, weights_only=True)["step"] for path in kept] == [1, 2]


def test_without_an_intact_checkpoint_nothing_is_guessed(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    record.append_env()
    record.save_checkpoint({"step": 1})
    for path in (tmp_path / "checkpoint").glob("*.pt"):
        path.write_bytes(b"no")
    for _ in range(2):  # asked again, the answer is the same
        with pytest.raises(InputError, match=r"no checkpoint in .* is intact"):
            record.load_checkpoint()


def test_a_state_that_could_not_be_loaded_again_is_refused_at_once(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    with pytest.raises(RunFailed, match="plain values"):
        record.save_checkpoint({"path": Path("x")})
    assert list((tmp_path / "checkpoint").iterdir()) == []


KILLED = """
    import sys, torch
    from pathlib import Path
    from clbench.store import RunRecord
    record = RunRecord(Path(sys.argv[1]))
    with record.lock():
        for step in range(10**9):
            record.save_checkpoint({"step": step, "weights": torch.full((20000,), float(step))})
            record.write_losses([step] * 1000, [0] * 1000, [1.0] * 1000, ["loss"])
            print(step, flush=True)
"""


def test_kill_9_while_writing_loses_nothing_that_was_saved(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    writer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert writer.stdout is not None
        for _ in range(10):
            said = int(writer.stdout.readline())
    finally:
        writer.kill()
        writer.wait()
    with record.lock():
        record.append_env()
        back = record.load_checkpoint()
    assert back is not None
    assert back["step"] >= said
    assert torch.equal(back["weights"], torch.full((20000,), float(back["step"])))
    assert len(record.read_env()[-1].notes) == 1  # none was damaged
    assert isinstance(record.read_table("losses"), pd.DataFrame)


def same(a: Curve, b: Curve) -> bool:
    return all(
        np.array_equal(value, getattr(b, key)) for key, value in vars(a).items() if key != "hits"
    ) and np.array_equal(np.where(a.valid, a.hits, 0), np.where(b.valid, b.hits, 0))
