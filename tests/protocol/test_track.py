"""Studies in MLflow: nested, once, and without harm if the server fails."""

from pathlib import Path

import pytest
from studies import TINY, plan

from clbench.protocol.engines import InProcess
from clbench.protocol.search import SearchPlan
from clbench.protocol.track import EXPERIMENT, log_results
from clbench.protocol.two_phase import Target, run_protocol


def test_nested_runs_once_and_a_dead_server_costs_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mlflow import MlflowClient

    small = plan(tmp_path / "studies", search=SearchPlan("uniform", 2), seeds=(0,))
    results = run_protocol([small], Target("split-digits-b", (0, 1), TINY), InProcess())
    uri = f"sqlite:///{tmp_path / 'ml.db'}"
    for _ in range(2):
        assert log_results(results, uri)
        client = MlflowClient(tracking_uri=uri)
        experiment = client.get_experiment_by_name(EXPERIMENT)
        assert experiment is not None
        runs = client.search_runs([experiment.experiment_id])
        parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
        inside = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
        assert len(parents) == 1
        assert sorted(run.data.tags["clbench.phase"] for run in inside) == ["evaluation"] * 2 + ["tuning"] * 2
    study = results[0].study
    assert parents[0].data.params["lr"] == str(study["best"]["values"]["lr"])
    tuning = {run.info.run_name: run for run in inside if run.data.tags["clbench.phase"] == "tuning"}
    assert tuning["trial 1"].data.metrics["final_accuracy"] == study["trials"][1]["score"]
    files = {path: path.read_bytes() for path in (tmp_path / "studies").rglob("*.json")}
    capsys.readouterr()
    (tmp_path / "file").write_text("")
    assert not log_results(results, f"sqlite:///{tmp_path / 'file' / 'below.db'}")
    assert "nothing is lost" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "studies").rglob("*.json")} == files
