"""The few calls of MLflow that runs and studies share."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clbench.errors import InputError

__all__ = ["connect", "experiment_id", "find_run", "log_values", "reason_of"]

PER_REQUEST = 900  # MLflow refuses more than 1,000 metrics in one request
PARAM_CHARACTERS = 500  # what old servers take


def connect(uri: str) -> Any:
    """A client of the store at `uri` (a server, or sqlite:///FILE, whose folder is made). Raises InputError for an URI
    that MLflow does not know."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).absolute().parent.mkdir(parents=True, exist_ok=True)
    try:
        return MlflowClient(tracking_uri=uri)
    except MlflowException as error:
        raise InputError(
            f"--track {uri} is nothing that MLflow knows ({reason_of(error)}); give http://HOST:PORT or sqlite:///FILE"
        ) from error


def experiment_id(client: Any, name: str, uri: str) -> str:
    """The id of the experiment, which is made if it is not there. Artifacts of a sqlite file lie beside it."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    if uri.startswith("sqlite:///"):
        folder = Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlartifacts"
        return str(client.create_experiment(name, artifact_location=folder.as_uri()))
    return str(client.create_experiment(name))


def find_run(client: Any, experiment: str, tag: str, value: str) -> str | None:
    """Id of the run that has this tag, None if there is none."""
    found = client.search_runs([experiment], filter_string=f"tags.`{tag}` = '{value}'", max_results=1)
    return str(found[0].info.run_id) if found else None


def log_values(
    client: Any, run: str, params: Mapping[str, Any], metrics: Mapping[str, float] | Sequence[tuple[str, float, int]]
) -> None:
    """Parameters, and metrics as name -> value or as (name, value, step), in as few requests as MLflow allows."""
    from mlflow.entities import Metric, Param

    rows = [(name, value, 0) for name, value in metrics.items()] if isinstance(metrics, Mapping) else list(metrics)
    points = [Metric(name, float(value), 0, step) for name, value, step in rows]
    first = [Param(name, str(value)[:PARAM_CHARACTERS]) for name, value in params.items()]
    for start in range(0, max(len(points), 1), PER_REQUEST):
        client.log_batch(run, metrics=points[start : start + PER_REQUEST], params=first)
        first = []


def reason_of(error: BaseException) -> str:
    """The first line of what an error says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
