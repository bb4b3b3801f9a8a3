"""Many records: one row per run, damaged ones named, nothing imported that listing does not need."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from runs import document, finished

from clbench.errors import InputError
from clbench.store import RunRecord, find_runs, load_runs


def test_one_row_per_run_with_its_metrics_and_state(tmp_path: Path) -> None:
    finished(tmp_path / "s" / "er" / "aaa")
    finished(tmp_path / "s" / "er" / "bbb", seed=1)
    with RunRecord(tmp_path / "s" / "slca" / "ccc").lock():
        RunRecord(tmp_path / "s" / "slca" / "ccc").create(document(method="slca"))
    (tmp_path / "s" / "slca" / "empty").mkdir()
    runs = load_runs(tmp_path)
    assert runs.state.tolist() == ["done", "done", "unfinished"]
    assert runs.seed.tolist() == [0, 1, 0]
    assert runs.method.tolist() == ["er", "er", "slca"]
    assert runs["hp.capacity"].tolist() == [200, 200, 200]
    assert runs["scenario.order"].tolist() == ["natural"] * 3
    assert runs.final_accuracy[0] == pytest.approx((30 / 3 + 16) / 50)
    assert runs["times.train_s"][0] == 1.5
    assert runs.final_accuracy.isna().tolist() == [False, False, True]
    assert runs.path[0] == str(tmp_path / "s" / "er" / "aaa")


@pytest.mark.parametrize(
    ("name", "reason"),
    [("spec.json", "spec.json"), ("summary.json", "summary.json"), ("DONE", "DONE"), ("curve.parquet", "bytes")],
)
def test_a_damaged_run_is_named_and_the_others_are_read(tmp_path: Path, name: str, reason: str) -> None:
    finished(tmp_path / "a")
    bad = finished(tmp_path / "b")
    (bad.path / name).write_bytes(b"{")
    finished(tmp_path / "c")
    runs = load_runs(tmp_path)
    assert runs.state.tolist() == ["done", "damaged", "done"]
    assert reason in runs.reason[1]
    assert str(bad.path) in runs.reason[1]


def test_a_run_without_its_spec_is_damaged(tmp_path: Path) -> None:
    record = finished(tmp_path / "a")
    (record.path / "spec.json").unlink()
    (found,) = find_runs(tmp_path)
    assert found.state == "damaged"
    assert "spec.json is missing" in found.reason


def test_what_lies_inside_a_run_is_no_second_run(tmp_path: Path) -> None:
    record = finished(tmp_path / "a")
    (record.path / "old").mkdir()
    (record.path / "old" / "spec.json").write_text("{}")
    assert [run.path for run in find_runs(tmp_path)] == [record.path]


def test_no_folder_and_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        find_runs(tmp_path / "nowhere")
    assert load_runs(tmp_path).empty
    assert list(load_runs(tmp_path).columns) == ["path", "state", "reason"]


def test_rows_are_plain_enough_for_json(tmp_path: Path) -> None:
    finished(tmp_path / "a")
    rows = [run.as_row() for run in find_runs(tmp_path)]
    assert json.loads(json.dumps(rows))[0]["method"] == "er"


def test_listing_imports_neither_torch_nor_pandas(tmp_path: Path) -> None:
    finished(tmp_path / "a")
    code = (
        "import sys; from pathlib import Path; from clbench.store.scan import find_runs; "
        "assert find_runs(Path(sys.argv[1]))[0].state == 'done'; "
        "assert not {'torch', 'pandas', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
