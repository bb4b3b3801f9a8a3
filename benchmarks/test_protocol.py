"""What the protocol adds to a trial: wall-clock seconds per trial beyond the same run called directly. Budget: 1 s.

    OMP_NUM_THREADS=1 python -m pytest benchmarks/test_protocol.py -s

Interleaved: a study of n trials, then the same n runs through `resolve` and `run`, several times; medians are compared.
For Ray the start of the cluster is left out (one trial is run first), and the trials run one at a time, so that the
difference is what a task costs.
"""

import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from clbench.learner.resolve import resolve
from clbench.learner.run import run
from clbench.learner.spec import RunSpec
from clbench.protocol.engines import InProcess, Ray
from clbench.protocol.search import SearchPlan
from clbench.protocol.space import Dimension
from clbench.protocol.study import StudyPlan, make_job, prepare, tune

TRIALS, REPEATS, BUDGET_S = 6, 3, 1.0


def plan(out: Path) -> StudyPlan:
    return StudyPlan(
        method="finetune", scenario="split-digits-a", search=SearchPlan("uniform", TRIALS), seeds=(0,),
        overrides=(Dimension("lr", low=0.001, high=0.3, scale="log"),),
        fixed={"epochs": 1, "batch_size": 10, "set": {"weight_decay": "0"}},
        where={"device": "cpu", "threads": 1, "data": []}, out=out,
    )  # fmt: skip


def study_seconds(out: Path, engine: Any) -> float:
    begin = time.perf_counter()
    study = tune(prepare(plan(out)), engine)
    assert len(study["trials"]) == TRIALS
    return time.perf_counter() - begin


def direct_seconds(out: Path) -> float:
    """The same runs, each as `clbench run` does it inside one process."""
    prepared = prepare(plan(out / "plan"))
    from clbench.protocol.search import draw

    jobs = [
        make_job(replace(prepared.plan, where={**prepared.plan.where, "out": str(out)}), prepared.found, "x", values, 0)
        for values in draw(prepared.plan.search, prepared.space)
    ]
    begin = time.perf_counter()
    for job in jobs:
        run(resolve(RunSpec.model_validate({**job.spec, **job.where})))
    return time.perf_counter() - begin


@pytest.mark.parametrize("name", ["in-process", pytest.param("ray", marks=pytest.mark.slow)])
def test_overhead_per_trial(tmp_path: Path, name: str) -> None:
    torch.set_num_threads(1)
    engine: Any = InProcess()
    if name == "ray":
        pytest.importorskip("ray")
        engine = Ray(cpus=1.0)
        import ray

        ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        study_seconds(tmp_path / "warm", engine)
        direct_seconds(tmp_path / "warm-direct")
        with_study, without = [], []
        for number in range(REPEATS):
            with_study.append(study_seconds(tmp_path / f"study-{number}", engine))
            without.append(direct_seconds(tmp_path / f"direct-{number}"))
    finally:
        if name == "ray":
            engine.close()
    extra = (statistics.median(with_study) - statistics.median(without)) / TRIALS
    print(
        f"\n{name}: {TRIALS} trials, median of {REPEATS}: study {statistics.median(with_study):.2f} s, "
        f"the same runs directly {statistics.median(without):.2f} s: {1000 * extra:.0f} ms per trial beyond the trial"
    )
    assert extra < BUDGET_S
