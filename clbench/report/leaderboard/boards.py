"""Which runs may stand in one table, and which of them are one row.

A *board* is a table of results that may be compared: one scenario version with the same parameters, data, setting and
answer mask, and the same table of rows for the same order seed. What differs in any of these is another board. Where
two runs claim the same order seed of the same scenario but their fingerprints differ, the fewer are moved to a board
of their own, with the reason.

A *row* is one method with one set of values: hyperparameters, backbone, views, budget (epochs, batch, updates), file.
Only its seeds differ. Runs with another budget or another memory are another row, never more seeds of this one.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

from clbench.metrics import Aggregate, aggregate, list_metrics
from clbench.report.leaderboard.provenance import BADGES, Provenance, provenance
from clbench.report.leaderboard.records import LeftOut, Run
from clbench.report.table import main_metrics
from clbench.store.schema import Spec

__all__ = ["CURVE_METRICS", "Board", "Row", "Seed", "make_boards", "row_identity", "schedule"]

# metrics of the per-iteration curve: they depend on how often and on how many rows it was evaluated
OF_CURVE = (
    "min_accuracy",
    "worst_case_accuracy",
    "wf_",
    "wp_",
    "stability_gap",
    "recovery_",
    "lca",
    "a_auc",
    "facilit",
)
CURVE_METRICS = frozenset(metric.key for metric in list_metrics() if metric.key.startswith(OF_CURVE))
# of a spec: seeds, what follows from them, and how a run is carried out, which does not change what it measures
NOT_OF_ROW = ("seed", "order_seed", "scenario_fingerprint", "device_type", "contaminated", "num_tasks", "eval_dense",
              "compile", "cuda_graph", "fused")  # fmt: skip

Seed = tuple[int, int]  # order seed, run seed


def schedule(spec: Spec) -> str:
    """How densely the curve was evaluated, in words."""
    when = f"every {spec.eval_every} steps" if spec.eval_every else ""
    if spec.eval_samples:
        when = f"every {spec.eval_samples} samples"
    if spec.eval_dense:
        when += f", the first {spec.eval_dense} of a task each"
    return f"{when}, {spec.eval_per_group} rows per group" if when else "at task ends only"


def row_identity(spec: Spec) -> dict[str, Any]:
    """What makes runs seeds of one row: everything that decides the result but the seeds and what follows from them.

    The device is not in it, nor how its work is carried out, nor a schedule of evaluations that the scenario chose:
    watching does not change a run.
    """
    content = spec.decisive()
    for name in NOT_OF_ROW:
        del content[name]
    if not spec.pretrained_on and spec.weights is None:
        del content["backbone_fingerprint"]  # random weights: drawn from the seed
    if spec.sources.get("eval_every", "").startswith("scenario"):
        del content["eval_every"]
    return content


def board_identity(spec: Spec) -> tuple[str, ...]:
    known = {key: value for key, value in (preset_params(spec.scenario) or {}).items() if key != "dataset"}
    params = _text({**known, **spec.scenario_params})  # an older record lacks parameters that came later
    return (spec.scenario, params, spec.data_fingerprint, spec.setting, spec.mask, *family(spec))


def family(spec: Spec) -> tuple[str, str]:
    """The protocol family of a run, and whether it keeps to its settings: numbers of different families never mix."""
    return spec.protocol_family or "", "changed" if spec.protocol_changes else ""


@dataclass
class Row:
    """A method with one set of values, over its seeds.

    runs: seed -> the run that counts.  pending: seed -> unfinished or damaged run.  copies: records of the same seeds
    with the same results, each with the run that counts instead.  notes: what must be said of it.
    """

    identity: str
    runs: dict[Seed, Run] = field(default_factory=dict)
    pending: dict[Seed, Run] = field(default_factory=dict)
    missing: list[Seed] = field(default_factory=list)
    copies: list[tuple[Run, Run]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    label: str = ""

    @property
    def all_runs(self) -> list[Run]:
        return [*self.runs.values(), *self.pending.values()]

    @cached_property
    def spec(self) -> Spec:
        return self.all_runs[0].known

    @property
    def method(self) -> str:
        return self.spec.method

    @cached_property
    def stats(self) -> dict[str, Aggregate]:
        """Every metric over the seeds where it is defined."""
        keys = [metric.key for metric in list_metrics()]
        return aggregate({key: run.summary.get(key) for key in keys} for run in self.runs.values())

    @cached_property
    def provenance(self) -> Provenance:
        return provenance(self.spec)

    @cached_property
    def contaminated(self) -> str | None:
        return next((run.known.contaminated for run in self.all_runs if run.known.contaminated), None)

    @cached_property
    def schedule(self) -> str:
        """The evaluation schedule of its runs; `mixed` where seeds differ."""
        found = list(dict.fromkeys(schedule(run.known) for run in self.all_runs))
        return found[0] if len(found) == 1 else "mixed: " + "; ".join(found)

    def values(self, metric: str) -> dict[Seed, float]:
        return {
            seed: float(run.summary[metric]) for seed, run in self.runs.items() if run.summary.get(metric) is not None
        }

    @cached_property
    def cost(self) -> dict[str, float]:
        """Mean over seeds: `memory_bytes` kept between tasks, `num_parameters`, `time_s` without evaluation and
        saving, `peak_memory_bytes`, `forward_flops_per_image`, `images_trained`. What a record lacks is left out."""
        found = [_cost(run.summary) for run in self.runs.values()]
        return {key: stats.mean for key, stats in aggregate(found).items()}


def _cost(summary: Mapping[str, Any]) -> dict[str, float | None]:
    times = summary.get("times", {})
    spent = sum(value for name, value in times.items() if name not in ("evaluate_s", "save_s"))
    flops = summary.get("forward_flops_per_image")
    return {
        "memory_bytes": float(sum(summary.get("memory_bytes", {}).values())),
        "num_parameters": summary.get("num_parameters"),
        "time_s": spent if times else None,
        "peak_memory_bytes": summary.get("peak_memory_bytes"),
        "forward_flops_per_image": flops or None,  # 0: not recorded, or a backbone that computes nothing
        "images_trained": summary.get("images_trained"),
    }


@dataclass
class Board:
    """One table. label: the scenario and what was changed of it. metrics: columns, the first one ranks.

    rows: the best first; those without a finished run last.
    """

    id: str
    spec: Spec
    label: str
    rows: list[Row]
    metrics: list[str]
    notes: list[str] = field(default_factory=list)

    @property
    def scenario(self) -> str:
        return self.spec.scenario

    @property
    def primary(self) -> str:
        return self.metrics[0]

    @cached_property
    def seeds(self) -> list[Seed]:
        return sorted({seed for row in self.rows for seed in (*row.runs, *row.pending)})

    @cached_property
    def fingerprints(self) -> dict[int, str]:
        """Order seed -> fingerprint of the table of rows."""
        specs = [run.known for row in self.rows for run in row.all_runs]
        return {spec.order_seed: spec.scenario_fingerprint for spec in sorted(specs, key=lambda s: s.order_seed)}

    @cached_property
    def main_schedule(self) -> str:
        """The evaluation schedule that most rows share; curve metrics of other rows are not ranked against it."""
        counts = Counter(row.schedule for row in self.rows if row.runs)
        return counts.most_common(1)[0][0] if counts else ""

    def comparable(self, row: Row, metric: str) -> bool:
        """Whether a row may be ranked by this metric on this board."""
        return metric in row.stats and (metric not in CURVE_METRICS or row.schedule == self.main_schedule)


def make_boards(runs: Sequence[Run]) -> tuple[list[Board], list[LeftOut]]:
    """Sort runs into boards and rows. Returns the boards by scenario, and runs that count nowhere, with reasons."""
    out: list[LeftOut] = []
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(board_identity(run.known), []).append(run)
    made: list[tuple[tuple[str, ...], list[Run], str]] = []
    for key, members in groups.items():
        made += [(key, part, reason) for part, reason in split_by_table(members)]
    boards = []
    for _, members, reason in sorted(made, key=lambda item: (item[0][0], item[2] != "", -len(item[1]), item[0])):
        board = _make_board(members, out)
        if reason:
            board.notes.append(reason)
        boards.append(board)
    _name(boards)
    return boards, out


def split_by_table(runs: Sequence[Run]) -> list[tuple[list[Run], str]]:
    """Runs of one board whose tables agree for every order seed, and apart from them those whose tables do not.

    A row of one folder goes as a whole: if one of its seeds ran on another table, so, most likely, did the others.
    """
    tables: dict[int, Counter[str]] = {}
    for run in runs:
        tables.setdefault(run.known.order_seed, Counter())[run.known.scenario_fingerprint] += 1
    chosen = {seed: max(sorted(found), key=lambda print_: found[print_]) for seed, found in tables.items()}
    units: dict[tuple[int, str], list[Run]] = {}
    for run in runs:
        units.setdefault((run.root, _text(row_identity(run.known))), []).append(run)
    main: list[Run] = []
    others: dict[str, list[Run]] = {}
    for unit in units.values():
        odd = [run for run in unit if run.known.scenario_fingerprint != chosen[run.known.order_seed]]
        if odd:
            others.setdefault(odd[0].known.scenario_fingerprint, []).extend(unit)
        else:
            main += unit
    parts = [(main, "")] if main else []
    for print_, members in sorted(others.items()):
        seed = next(run.known.order_seed for run in members if run.known.scenario_fingerprint == print_)
        reason = (
            f"kept apart: for order seed {seed} these runs were made on table {print_[:12]} of "
            f"{runs[0].known.scenario}, most others on table {chosen[seed][:12]}; the same name and version, but not "
            "the same rows"
        )
        parts += [(part, reason) for part, _ in (split_by_table(members) if main else [(members, "")])]
    return parts


def _make_board(runs: Sequence[Run], out: list[LeftOut]) -> Board:
    rows: dict[str, Row] = {}
    for run in runs:
        identity = _text(row_identity(run.known))
        _add(rows.setdefault(identity, Row(identity)), run, out)
    finished = [run for row in rows.values() for run in row.runs.values()]
    spec = (finished or runs)[0].known
    metrics = main_metrics([run.summary for run in finished], multi_domain=len(spec.datasets) > 1)
    board = Board("", spec, "", list(rows.values()), metrics or main_metrics())
    for row in board.rows:
        if row.copies:
            other, kept = row.copies[0]
            more = f" and {len(row.copies) - 1} more" if len(row.copies) > 1 else ""
            why = f"the same runs as {kept.name}{more}, with the same results: each is counted once"
            out.append(LeftOut(other.name + more, why))
        row.missing = [seed for seed in board.seeds if seed not in row.runs and seed not in row.pending]
    _label_rows(board.rows)
    board.rows.sort(key=lambda row: _rank_key(board, row))
    _say_what_differs(board)
    return board


def _add(row: Row, run: Run, out: list[LeftOut]) -> None:
    """Count a run, unless its seed is there already: then say whether the two agree."""
    seed = (run.known.order_seed, run.known.seed)
    if run.state != "done":
        if seed not in row.runs:
            row.pending.setdefault(seed, run)
        return
    row.pending.pop(seed, None)
    if seed not in row.runs:
        row.runs[seed] = run
        return
    first = row.runs[seed]
    differing = _differences(first.summary, run.summary)
    if not differing:
        # the record with the better-founded values counts: a study elsewhere may have found what a search here found
        kept, other = sorted((first, run), key=lambda each: BADGES.index(provenance(each.known).badge))
        row.runs[seed] = kept
        row.copies.append((other, kept))
        return
    devices = f" ({first.known.device_type} and {run.known.device_type})"
    out.append(
        LeftOut(
            run.name,
            f"conflicts with {first.name}: the same seed of the same row, but {', '.join(differing[:4])} differ"
            f"{devices if first.known.device_type != run.known.device_type else ''}; only the first is counted",
        )
    )
    row.notes.append(f"seed {seed[1]}: two records disagree, {first.name} is counted, {run.name} is not")


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    keys = [key for metric in list_metrics() for key in metric.keys if key in a and key in b]
    return [key for key in [*keys, "weights_sha256"] if a.get(key) != b.get(key)]


def _rank_key(board: Board, row: Row) -> tuple[Any, ...]:
    metric = next(metric for metric in list_metrics() if metric.key == board.primary)
    found = row.stats.get(board.primary)
    if found is None:
        return (1, 0.0, row.label)
    return (0, -found.mean if metric.higher_is_better else found.mean, row.label)


def _say_what_differs(board: Board) -> None:
    odd = [row for row in board.rows if row.runs and row.schedule != board.main_schedule]
    if odd and any(metric in CURVE_METRICS for metric in board.metrics):
        board.notes.append(
            f"{len(odd)} of {len(board.rows)} rows were evaluated on another schedule than the others "
            f"({board.main_schedule}); their curve metrics are shown in grey, neither ranked nor tested"
        )
    kinds = {run.known.device_type for row in board.rows for run in row.runs.values()}
    if len(kinds) > 1:
        board.notes.append("runs on CPUs and GPUs stand side by side: times and peak memory do not compare")
    if any(row.contaminated for row in board.rows):
        board.notes.append("rows marked contaminated: the backbone had seen the images of this scenario before")
    if board.spec.protocol_family and board.spec.protocol_changes:
        board.notes.append(
            f"these runs changed settings of protocol family {board.spec.protocol_family} (each row says which): they "
            "are kept apart from the runs that keep to it"
        )
    if board.spec.scenario_params.get("score") == "validation":
        board.notes.append("scored on validation rows, not on the test set")


# -- names ------------------------------------------------------------------------------------------------------------
def _label_rows(rows: Iterable[Row]) -> None:
    """A row's label: the method, and what sets it apart from other rows of that method on the board."""
    by_method: dict[str, list[Row]] = {}
    for row in rows:
        by_method.setdefault(row.method, []).append(row)
    for method, members in by_method.items():
        flat = [_flat(json.loads(row.identity)) for row in members]
        keys = [
            key for key in dict.fromkeys(k for each in flat for k in each) if len({_text(f.get(key)) for f in flat}) > 1
        ]
        keys = [key for key in keys if not key.endswith("fingerprint")] or keys
        for row, values in zip(members, flat, strict=True):
            parts = [f"{key}={_short(values.get(key))}" for key in keys]
            shown = parts[:3] + ([f"+{len(parts) - 3} more"] if len(parts) > 3 else [])
            row.label = " · ".join([method, *shown])


def _flat(content: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in content.items():
        out |= value if key in ("hyperparameters", "scenario_params") else {key: value}
    return out


def _short(value: Any, most: int = 28) -> str:
    text = str(value)
    return text if len(text) <= most else text[: most - 1] + "…"


def _name(boards: list[Board]) -> None:
    """Labels and ids: the scenario, and of its parameters those that are not the preset's or differ between boards."""
    by_scenario: dict[str, list[Board]] = {}
    for board in boards:
        by_scenario.setdefault(board.scenario, []).append(board)
    for scenario, members in by_scenario.items():
        preset = preset_params(scenario)
        flat = [{**b.spec.scenario_params, "dataset": _datasets(b.spec)} for b in members]
        differing = {key for each in flat for key in each if len({_text(f.get(key)) for f in flat}) > 1}
        several = {b.spec.setting for b in members}, {(b.spec.setting, b.spec.mask) for b in members}
        for board, values in zip(members, flat, strict=True):
            shown = [k for k, v in values.items() if (k in differing if preset is None else preset.get(k, ...) != v)]
            parts = [f"{key}={_short(values[key])}" for key in shown]
            if len(several[0]) > 1 and "setting" not in values:
                parts.append(f"{board.spec.setting}-incremental")
            if len(several[1]) > len(several[0]):
                parts.append(f"answers from {board.spec.mask}")
            if board.spec.protocol_family:
                parts.append(f"family {board.spec.protocol_family}" + ", changed" * bool(board.spec.protocol_changes))
            board.label = ", ".join([scenario, *parts])
    taken: Counter[str] = Counter()
    for board in boards:
        taken[board.label] += 1
        if taken[board.label] > 1:
            board.label += f", table {next(iter(board.fingerprints.values()))[:8]}"
    for number, board in enumerate(boards, 1):
        board.id = f"b{number}"


@cache
def preset_params(scenario: str) -> dict[str, Any] | None:
    """Parameters of a scenario's preset as a record writes them; None for one that is not in this package."""
    from clbench.errors import ClbenchError
    from clbench.scenarios import registry

    try:
        preset = registry.find(scenario)
    except ClbenchError:
        return None
    params: dict[str, Any] = json.loads(json.dumps(vars(preset.params), default=str))  # tuples become lists
    return {**params, "dataset": ",".join(sorted(preset.datasets))}


def _datasets(spec: Spec) -> str:
    return ",".join(sorted(spec.datasets))


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
