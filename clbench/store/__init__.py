"""Run records on disk: what they hold (`schema`), one of them (`record`), many of them (`scan`)."""

from clbench.store.environment import environment
from clbench.store.record import Matrix, RunRecord, run_id
from clbench.store.scan import FoundRun, find_runs, load_runs
from clbench.store.schema import SCHEMA_VERSION, Environment, Spec, Summary

__all__ = [
    "SCHEMA_VERSION",
    "Environment",
    "FoundRun",
    "Matrix",
    "RunRecord",
    "Spec",
    "Summary",
    "environment",
    "find_runs",
    "load_runs",
    "run_id",
]
