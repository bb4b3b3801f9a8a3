"""Continual-learning benchmark suite: scenarios, methods, per-iteration evaluation, comparable results.

    import clbench

    results = clbench.run(method="er", scenario="split-digits", seeds="0-2")
    results.mean("final_accuracy")
    runs = clbench.load_runs("results/runs")  # pandas: one row per run

Nothing heavy is imported until it is used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clbench.api import DryRun, Results, dry_run, load_runs, run
    from clbench.errors import ClbenchError, InputError, RunFailed

__all__ = [
    "ClbenchError", "DryRun", "InputError", "Results", "RunFailed", "__version__", "dry_run", "load_runs", "run",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("clbench")
        except PackageNotFoundError:  # run from a source tree that is not installed
            return "0+unknown"
    if name in ("ClbenchError", "InputError", "RunFailed"):
        from clbench import errors

        return getattr(errors, name)
    if name in __all__:
        from clbench import api

        return getattr(api, name)
    raise AttributeError(f"module 'clbench' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
