"""Runs in MLflow: against a real server, a sqlite file, and servers that fail."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import clbench
from clbench.cli import main
from clbench.tracking.runs import EXPERIMENT, extremes, store_uri, sync_runs, track_run

SMALL: dict[str, Any] = {"scenario_params": {"per_class": 6}, "epochs": 1, "device": "cpu", "eval_every": 1}
SERVER_SECONDS = 400


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of one method and one of another."""
    out = tmp_path_factory.mktemp("runs")
    clbench.run("er", "split-digits", seeds="0-1", out=out, **SMALL)
    clbench.run("nmc", "split-digits", out=out, **SMALL)
    return out


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URI of an MLflow server of our own."""
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder / 'server.db'}", "--artifacts-destination", str(folder / "files"),
    ]  # fmt: skip
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        uri = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + SERVER_SECONDS
        while True:
            try:
                urlopen(f"{uri}/health", timeout=5).close()
                break
            except (URLError, OSError):
                log_text = (folder / "log").read_text(errors="replace")
                assert process.poll() is None, f"the server has ended: {log_text}"
                assert time.monotonic() < deadline, f"the server does not answer: {log_text}"
                time.sleep(0.5)
        yield uri
        process.terminate()


def logged(uri: str) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    return [] if experiment is None else list(client.search_runs([experiment.experiment_id]))


def test_a_real_server_gets_nested_runs_with_metrics_curves_and_files(runs: Path, server: str, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    results = clbench.run("er", "split-digits", seeds="0-1", out=runs, track=server, **SMALL)
    found = logged(server)
    parents = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    inside = {run.data.tags["clbench.run_id"]: run for run in found if "mlflow.parentRunId" in run.data.tags}
    assert len(parents) == 1
    assert sorted(inside) == sorted(result.path.name for result in results)
    client = MlflowClient(tracking_uri=server)
    for seed, result in zip(results.seeds, results, strict=True):
        run = inside[result.path.name]
        assert run.data.tags["mlflow.parentRunId"] == parents[0].info.run_id
        assert run.data.params["seed"] == str(seed)
        assert run.data.params["capacity"] == "1000"
        assert run.data.metrics["final_accuracy"] == result.summary["final_accuracy"]
        history = client.get_metric_history(run.info.run_id, "curve.mean")
        recorded = clbench.store.RunRecord(result.path).read_curve()
        assert {(point.step, point.value) for point in history} <= {
            (int(step), float(value)) for step, value in zip(recorded.steps, recorded.mean_accuracy, strict=True)
        }
        assert min(point.value for point in history) == recorded.mean_accuracy.min()
        names = {file.path for file in client.list_artifacts(run.info.run_id)}
        assert {"spec.json", "summary.json", "curve.parquet", "curve.png", "matrix.csv"} <= names
        copy = client.download_artifacts(run.info.run_id, "summary.json", str(tmp_path))
        assert Path(copy).read_bytes() == (result.path / "summary.json").read_bytes()
    assert all(track_run(result.path, server) for result in results)  # a second time changes nothing
    assert len(logged(server)) == len(found)


def test_a_dead_server_loses_nothing_and_sync_logs_later(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dead = f"http://127.0.0.1:{free_port()}"
    before = {path: path.read_bytes() for path in runs.rglob("summary.json")}
    results = clbench.run("nmc", "split-digits", out=runs, track=dead, **SMALL)
    assert "nothing is lost" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in runs.rglob("summary.json")} == before
    assert not clbench.store.RunRecord(results[0].path).damage()
    assert json.loads((results[0].path / "tracking.json").read_text())["state"] == "pending"
    assert main(["sync", "--runs", str(runs)]) == 1  # it is still dead
    assert "0 runs logged, 0 had been logged before, 1 failed" in capsys.readouterr().out
    uri = f"sqlite:///{tmp_path / 'below' / 'mlflow.db'}"
    assert main(["sync", "--runs", str(runs), "--track", uri]) == 0
    assert "3 runs logged, 0 had been logged before, 0 failed" in capsys.readouterr().out
    assert len([run for run in logged(uri) if "clbench.run_id" in run.data.tags]) == 3
    assert (tmp_path / "below" / "mlartifacts").is_dir()
    assert main(["sync", "--runs", str(runs)]) == 0
    assert "0 runs logged, 0 had been logged before, 0 failed" in capsys.readouterr().out


def test_a_run_that_breaks_takes_no_earlier_one_along(tmp_path: Path) -> None:
    folders = clbench.dry_run("nmc", "split-digits", seeds="0-1", out=tmp_path, **SMALL).folders
    uri = f"sqlite:///{tmp_path / 'm.db'}"
    busy = clbench.store.RunRecord(folders[1])
    folders[1].mkdir(parents=True)
    with busy.lock(), pytest.raises(clbench.errors.InputError, match="is being run"):
        clbench.run("nmc", "split-digits", seeds="0-1", out=tmp_path, track=uri, **SMALL)
    inside = [run.data.tags.get("clbench.run_id") for run in logged(uri)]
    assert folders[0].name in inside
    assert json.loads((folders[0] / "tracking.json").read_text())["state"] == "logged"


def test_damaged_records_are_named_and_stop_nothing(runs: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "runs"
    shutil.copytree(runs, copy)
    broken = sorted(copy.rglob("summary.json"))[0]
    broken.write_text("{")
    (sorted(copy.rglob("DONE"))[1].parent / "tracking.json").write_text("[]")
    done = sync_runs(copy, f"sqlite:///{tmp_path / 'm.db'}")
    assert len(done.logged) == 1
    assert {path for path, _ in done.failed} >= {broken.parent}
    assert all("damaged" in reason for _, reason in done.failed)
    assert len(done.failed) == 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["sync", "--runs", "nowhere"], "is no folder"),
        (["sync", "--runs", ".", "--track", "ftp:nothing"], None),
    ],
)
def test_bad_input(
    arguments: list[str], expected: str | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    code = main(arguments)
    said = capsys.readouterr()
    if expected is None:  # nothing to log: the URI is never used
        assert code == 0
    else:
        assert code == 2
        assert expected in said.err


def test_local_is_a_file_among_the_records(tmp_path: Path) -> None:
    assert store_uri("local", tmp_path) == f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert store_uri("http://host:1", tmp_path) == "http://host:1"


@given(arrays(np.float64, st.integers(0, 500), elements=st.floats(0, 1)), st.integers(2, 50))
def test_sampling_keeps_ends_and_extremes(values: Any, points: int) -> None:
    chosen = list(extremes(values, points))
    assert chosen == sorted(set(chosen))
    assert len(chosen) <= points + 2
    if len(values):
        assert chosen[0] == 0
        assert chosen[-1] == len(values) - 1
        kept = values[chosen]
        assert kept.min() == values.min()
        assert kept.max() == values.max()
