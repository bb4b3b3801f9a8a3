"""Published numbers as data (`published.toml`): value, setting, source, and how sure one may be of them."""

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from clbench.methods.registry import canonical, list_methods
from clbench.metrics.registry import find_metric
from clbench.scenarios.families import FAMILIES
from clbench.scenarios.registry import list_scenarios

__all__ = ["Published", "find", "load"]

FILE = Path(__file__).with_name("published.toml")
STATUSES = ("verified", "second-hand", "recalled")
SPREADS = ("std", "ci95", "unknown")
KEYS = {
    "scenario", "in_registry", "family", "metric", "source", "status", "spread", "runs", "note",
    "setting", "over", "at", "rows",
}  # fmt: skip


@dataclass(frozen=True)
class Published:
    """One published number.

    method: id of ours (`known`), or a slug. scenario: name of a preset without version (`in_registry`), or a slug.
    metric: key of `summary.json`. value, spread: in the metric's unit, so accuracies are fractions in [0, 1].
    spread_kind: `std`, `ci95` or `unknown`; None without a spread. runs: how many it is the mean of, None if not told.
    setting: what else fixes it, named as in a run's spec and hyperparameters where there is such a name.
    family: protocol family of the scenario. source: paper, table or file, and our card.
    status: `verified` (paper, or files of its authors), `second-hand`, `recalled` (a plausibility band, no target).
    """

    method: str
    known: bool
    scenario: str
    in_registry: bool
    metric: str
    value: float
    spread: float | None
    spread_kind: Literal["std", "ci95", "unknown"] | None
    runs: int | None
    setting: Mapping[str, Any]
    family: str | None
    source: str
    status: Literal["verified", "second-hand", "recalled"]
    note: str = ""


def find(
    scenario: str | None = None, method: str | None = None, metric: str | None = None, **setting: Any
) -> list[Published]:
    """Published numbers, the surest first; every argument narrows them down.

    scenario: with or without version, or an alias. method: in any of its spellings. setting: values that a number must
    have, such as capacity=1000; a number that doesn't tell is left out. No match is an empty list.
    """
    names, methods = scenario_names(), method_names()
    found = []
    for number in load():
        if scenario is not None and number.scenario != names.get(key := scenario.partition("@")[0].lower(), key):
            continue
        if method is not None and number.method != methods.get(canonical(method), method):
            continue
        if metric is not None and number.metric != metric:
            continue
        if all(name in number.setting and number.setting[name] == value for name, value in setting.items()):
            found.append(number)
    return sorted(found, key=lambda number: STATUSES.index(number.status))


@cache
def load() -> tuple[Published, ...]:
    """All published numbers, in the order of the file. Raises ValueError for an entry that breaks the file's rules."""
    with FILE.open("rb") as file:
        tables = tomllib.load(file)["table"]
    return tuple(number for index, table in enumerate(tables) for number in read_table(table, f"table {index + 1}"))


def read_table(table: Mapping[str, Any], where: str) -> Iterator[Published]:
    """The numbers of one `[[table]]`; see the head of the file."""
    where = f"{FILE.name}, {where} ({table.get('scenario')})"
    if unknown := set(table) - KEYS:
        raise ValueError(f"{where}: unknown keys {sorted(unknown)}")
    families = scenario_families()
    scenario, in_registry = table["scenario"], table.get("in_registry", True)
    if in_registry != (scenario in families):
        raise ValueError(f"{where}: in_registry = false is for scenarios that are no preset, and only for them")
    family = families[scenario] if in_registry else table.get("family")
    if ("family" in table and in_registry) or (family is not None and family not in FAMILIES):
        raise ValueError(f"{where}: family is the preset's, or one of {list(FAMILIES)} for what is no preset")
    if table["status"] not in STATUSES or table.get("spread", "std") not in SPREADS or not table["source"]:
        raise ValueError(f"{where}: needs a source, a status of {STATUSES} and a spread of {SPREADS}")
    metric = find_metric(table["metric"])
    scale = 100 if metric.unit == "fraction" else 1
    ids = set(method_names().values())
    for method, cells in table["rows"].items():
        for setting, value, spread in read_row(table, cells, f"{where}, {method}"):
            if spread is not None and "spread" not in table:
                raise ValueError(f"{where}, {method}: a spread needs its kind, spread = one of {SPREADS}")
            yield Published(
                method=method, known=method in ids, scenario=scenario, in_registry=in_registry, metric=metric.key,
                value=value / scale, spread=None if spread is None else spread / scale,
                spread_kind=None if spread is None else table["spread"], runs=table.get("runs"), setting=setting,
                family=family, source=table["source"], status=table["status"], note=table.get("note", ""),
            )  # fmt: skip


def read_row(table: Mapping[str, Any], cells: Any, where: str) -> Iterator[tuple[dict[str, Any], float, float | None]]:
    """(setting, value, spread) of each number of a row."""
    setting = dict(table.get("setting", {}))
    if "over" not in table:
        yield setting, *read_cell(cells, where)
        return
    if not isinstance(cells, list) or len(cells) != len(table["at"]):
        raise ValueError(f"{where}: has not one number for each of {table['at']}")
    for position, cell in zip(table["at"], cells, strict=True):
        if cell != "":
            yield {**setting, table["over"]: position}, *read_cell(cell, where)


def read_cell(cell: Any, where: str) -> tuple[float, float | None]:
    """A value, or [value, spread]."""
    parts = cell if isinstance(cell, list) else [cell]
    if not 1 <= len(parts) <= 2 or not all(isinstance(part, int | float) for part in parts):
        raise ValueError(f"{where}: {cell!r} is no number and no [number, spread]")
    return float(parts[0]), float(parts[1]) if len(parts) == 2 else None


@cache
def scenario_families() -> dict[str, str | None]:
    """Name of a preset -> its protocol family."""
    return {row["name"]: row["family"] for row in list_scenarios()}


@cache
def scenario_names() -> dict[str, str]:
    """Alias -> name of a preset."""
    return {alias: row["name"] for row in list_scenarios() for alias in (row["name"], *row["aliases"])}


@cache
def method_names() -> dict[str, str]:
    """Spelling without signs -> id of a method."""
    return {canonical(name): entry["id"] for entry in list_methods() for name in (entry["id"], *entry["aliases"])}
