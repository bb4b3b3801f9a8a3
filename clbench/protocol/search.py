"""Which trials run, in which order, and how long each.

A search is a generator: it yields a list of `Ask`s and is sent their scores (trial -> score, larger is better; None for
a failed trial), until it returns. Nothing but those scores decides what it yields, so a study that was killed asks
again for the same runs and finds the finished ones on disk.
"""

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

from clbench.errors import InputError
from clbench.protocol.draws import quasi_points, uniform_points
from clbench.protocol.space import Dimension, Space
from clbench.rng import derive_seed

__all__ = ["KINDS", "Ask", "Kind", "Scores", "SearchPlan", "asks"]

Kind = Literal["uniform", "quasi", "tpe", "halving"]
KINDS: tuple[Kind, ...] = ("uniform", "quasi", "tpe", "halving")
Scores = Mapping[int, float | None]


@dataclass(frozen=True)
class SearchPlan:
    """kind: how trials are drawn. trials: R. seed: of the draws. batch: trials that `tpe` draws before it looks at
    scores again: part of the study, so that one machine and a cluster draw the same. eta: `halving` keeps one in eta.
    first_tasks: tasks of halving's first rung."""

    kind: Kind
    trials: int
    seed: int = 0
    batch: int = 4
    eta: int = 3
    first_tasks: int = 3

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise InputError(f"--trials is {self.trials}: a study needs at least one trial")
        if self.batch < 1 or self.eta < 2 or self.first_tasks < 1:
            raise InputError("--tpe-batch must be at least 1, --eta at least 2, --first-tasks at least 1")

    def describe(self) -> dict[str, Any]:
        """What of it decides the trials."""
        used = {"tpe": ("batch",), "halving": ("eta", "first_tasks")}.get(self.kind, ())
        return {name: getattr(self, name) for name in ("kind", "trials", "seed", *used)}


@dataclass(frozen=True)
class Ask:
    """Run trial number `trial` with `values` for `seeds`, on the first tasks alone if `first_tasks` is given."""

    trial: int
    values: Mapping[str, Any]
    seeds: tuple[int, ...]
    first_tasks: int | None = None


def asks(plan: SearchPlan, space: Space, seeds: tuple[int, ...], num_tasks: int) -> Generator[list[Ask], Scores, None]:
    """The search of a plan. Trials that the last list asks for with all `seeds` and tasks are those to choose from."""
    if plan.kind == "tpe":
        return tpe(plan, space, seeds)
    if plan.kind == "halving":
        return halving(plan, space, seeds, num_tasks)
    return at_once(plan, space, seeds)


def draw(plan: SearchPlan, space: Space) -> list[dict[str, Any]]:
    """Values of all trials, for searches that draw them in advance."""
    points = quasi_points if plan.kind == "quasi" else uniform_points
    return [space.at(point) for point in points(space.names, plan.trials, plan.seed)]


def at_once(plan: SearchPlan, space: Space, seeds: tuple[int, ...]) -> Generator[list[Ask], Scores, None]:
    yield [Ask(trial, values, seeds) for trial, values in enumerate(draw(plan, space))]


def halving(
    plan: SearchPlan, space: Space, seeds: tuple[int, ...], num_tasks: int
) -> Generator[list[Ask], Scores, None]:
    """Successive halving in step, over uniform draws: the first tasks with one seed, all tasks with one seed, all tasks
    with all seeds; each rung keeps the best 1/eta. (The card, section 7: the first three tasks predict the final rank.)

    In step means that a rung is complete before the next begins. Optuna's own pruner decides as results come in, so
    that its choice depends on which worker was faster; this one gives the same study wherever it runs.
    """
    drawn = draw(plan, space)
    rungs: list[tuple[tuple[int, ...], int | None]] = []
    if plan.first_tasks < num_tasks:
        rungs.append((seeds[:1], plan.first_tasks))
    if len(seeds) > 1 or not rungs:
        rungs.append((seeds[:1], None))
    rungs.append((seeds, None))
    alive = list(range(plan.trials))
    for number, (rung_seeds, first) in enumerate(dict.fromkeys(rungs)):
        if number:
            alive = alive[: max(ceil(len(alive) / plan.eta), 1)]
        scores = yield [Ask(trial, drawn[trial], rung_seeds, first) for trial in sorted(alive)]
        scored = [(score, -trial) for trial, score in scores.items() if score is not None]
        alive = [-negative for _, negative in sorted(scored, reverse=True)]
        if not alive:
            return


def tpe(plan: SearchPlan, space: Space, seeds: tuple[int, ...]) -> Generator[list[Ask], Scores, None]:
    """Optuna's tree-structured Parzen estimator, `batch` trials at a time."""
    try:
        import optuna
    except ImportError:
        raise InputError("--search tpe needs optuna: install clbench[tune], or use uniform, quasi or halving") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(
        seed=derive_seed(plan.seed, "tpe") % 2**32, n_startup_trials=min(10, max(plan.trials // 3, 1))
    )
    study = optuna.create_study(direction="maximize", sampler=sampler)
    space_of = {dimension.name: distribution(optuna, dimension) for dimension in space.dimensions}
    for start in range(0, plan.trials, plan.batch):
        drawn = [study.ask(space_of) for _ in range(min(plan.batch, plan.trials - start))]
        values = [{name: rounded(trial.params[name]) for name in space.names} for trial in drawn]
        scores = yield [Ask(start + i, values[i], seeds) for i in range(len(drawn))]
        for index, trial in enumerate(drawn):
            score = scores[start + index]
            if score is None:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                study.tell(trial, score)


def distribution(optuna: Any, dimension: Dimension) -> Any:
    """A dimension in optuna's terms."""
    if dimension.choices is not None:
        return optuna.distributions.CategoricalDistribution(dimension.choices)
    log = dimension.scale == "log"
    assert dimension.low is not None
    assert dimension.high is not None
    if dimension.integer:
        return optuna.distributions.IntDistribution(int(dimension.low), int(dimension.high), log=log)
    return optuna.distributions.FloatDistribution(dimension.low, dimension.high, log=log)


def rounded(value: Any) -> Any:
    """Six digits: what is written is what is run."""
    return float(f"{value:.6g}") if isinstance(value, float) else value
