"""Studies and evaluations in MLflow, as nested runs, after the fact: the files on disk are the truth, MLflow a view.

A study is a parent run; its trials and its evaluation seeds are runs inside it. Logged once: a study that is there
already (tag `clbench.signature`) is left alone. A tracking server that fails costs a warning and nothing else.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from clbench.tracking.client import connect, experiment_id, find_run, log_values, reason_of

if TYPE_CHECKING:
    from clbench.protocol.two_phase import MethodResult

__all__ = ["log_results"]

EXPERIMENT = "clbench protocol"


def log_results(results: "Sequence[MethodResult]", uri: str) -> bool:
    """Log all results to the MLflow store at `uri`; False, with a warning on stderr, if that fails."""
    try:
        client = connect(uri)
        experiment = experiment_id(client, EXPERIMENT, uri)
        for result in results:
            log_study(client, experiment, result.study, result.evaluation)
            if result.conventional is not None:
                log_study(client, experiment, *result.conventional)
    except Exception as error:  # whatever a server does, the results are on disk
        print(f"warning: not logged to MLflow at {uri}: {reason_of(error)}; nothing is lost, the files are complete",
              file=sys.stderr)  # fmt: skip
        return False
    return True


def log_study(client: Any, experiment: str, study: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> None:
    """One study with its trials and, if there is one, its evaluation."""
    mark = f"{study['signature']}/{evaluation['signature'] if evaluation else ''}"
    if find_run(client, experiment, "clbench.signature", mark):
        return
    method, tuned = study["method"]["id"], study["tuned_on"]["scenario"]
    tags = {"clbench.study": study["study"], "clbench.method": method, "clbench.tuned_on": tuned,
            "clbench.scored_on": study["tuned_on"]["score_on"]}  # fmt: skip
    parent = client.create_run(experiment, run_name=f"{method} on {tuned}", tags=tags).info.run_id
    params = {**study["best"]["values"], "trials": len(study["trials"]), "search": study["search"]["kind"]}
    log_values(client, parent, params, {"tuning_score": study["best"]["score"]})
    for trial in study["trials"]:
        score = {} if trial["score"] is None else {study["score"]: trial["score"]}
        seeds = {f"{study['score']}.seed_{seed}": value for seed, value in trial["scores"].items()}
        inside = {"mlflow.parentRunId": parent, "clbench.phase": "tuning", "clbench.reason": trial["reason"]}
        child(client, experiment, f"trial {trial['trial']}", inside, trial["values"], score | seeds, trial["status"])
    for run in evaluation["runs"] if evaluation else ():
        assert evaluation is not None
        phase = "in-scenario evaluation" if evaluation["in_scenario"] else "evaluation"
        inside = {"mlflow.parentRunId": parent, "clbench.phase": phase, "clbench.reason": run["reason"],
                  "clbench.evaluated_on": evaluation["evaluated_on"]["scenario"],
                  "clbench.hyperparameters": f"tuned on {tuned}"}  # fmt: skip
        metrics = {name: value for name, value in run["metrics"].items() if value is not None}
        params = {**evaluation["values"], "seed": run["seed"]}
        child(client, experiment, f"evaluation, seed {run['seed']}", inside, params, metrics, run["status"])
    client.set_tag(parent, "clbench.signature", mark)  # last: an interrupted logging is done again
    client.set_terminated(parent)


def child(
    client: Any, experiment: str, name: str, tags: Mapping[str, str], params: Mapping[str, Any],
    metrics: Mapping[str, float], status: str,
) -> None:  # fmt: skip
    run = client.create_run(experiment, run_name=name, tags=dict(tags)).info.run_id
    log_values(client, run, params, metrics)
    client.set_terminated(run, "FINISHED" if status == "done" else "FAILED")
