"""Search spaces: what a method declares, what the command line changes, and how a number in [0, 1) becomes a value.

A dimension is a hyperparameter of the method (`hp(..., tune=...)` of its Config) or an option of the run: the names
batch_size, epochs and updates_per_batch always mean the run's, whatever the Config has. Options, and ranges that differ
by scenario, stand in the method's recipe file:

    [[tune]]
    scenario = "*"                                # a glob on the id without version; the first match counts
    source = "two_phase_protocol card, section 2"
    batch_size = { choices = [32, 64, 128] }
    epochs = { low = 1, high = 20, scale = "log" }

Config < recipe file < command line. Every draw has a name: the same name in two methods gets the same number.
"""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from clbench.errors import InputError, unknown_name

__all__ = ["OPTIONS", "Dimension", "Space", "declared_space", "parse_dimension", "split_values"]

OPTIONS = ("batch_size", "epochs", "updates_per_batch")  # options of a run that may be searched; whole numbers
Scale = Literal["linear", "log"]


@dataclass(frozen=True)
class Dimension:
    """One searched name: either `choices`, or the closed range `low` to `high`, even in the value or in its logarithm.

    integer: values of the range are whole numbers. source: who declared it.
    """

    name: str
    choices: tuple[Any, ...] | None = None
    low: float | None = None
    high: float | None = None
    scale: Scale = "linear"
    integer: bool = False
    source: str = ""

    def __post_init__(self) -> None:
        if self.choices is not None:
            if not self.choices:
                raise InputError(f"search space of {self.name}: the list of choices is empty")
            return
        low, high = self.low, self.high
        if low is None or high is None or not low <= high:
            raise InputError(f"search space of {self.name}: give choices, or low and high with low <= high")
        if self.scale == "log" and low <= 0:
            raise InputError(f"search space of {self.name}: a logarithmic range begins above 0, not at {low}")

    def value(self, u: float) -> Any:
        """The value at quantile `u` in [0, 1).

        >>> Dimension("batch_size", choices=(16, 32)).value(0.6)
        32
        >>> round(Dimension("lr", low=0.001, high=0.1, scale="log").value(0.5), 6)
        0.01
        """
        if self.choices is not None:
            return self.choices[min(int(u * len(self.choices)), len(self.choices) - 1)]
        assert self.low is not None
        assert self.high is not None
        low, high = (self.low - 0.5, self.high + 0.5) if self.integer else (self.low, self.high)
        if self.integer:
            low = max(low, 0.5) if self.scale == "log" else low
        if self.scale == "log":
            drawn = low * (high / low) ** u
        else:
            drawn = low + u * (high - low)
        if self.integer:
            return int(min(max(round(drawn), self.low), self.high))
        return float(f"{min(max(drawn, self.low), self.high):.6g}")  # what is written is what is run

    def describe(self) -> dict[str, Any]:
        """Plain values for a study file."""
        if self.choices is not None:
            return {"choices": list(self.choices), "source": self.source}
        kind = {"integer": True} if self.integer else {}
        return {"low": self.low, "high": self.high, "scale": self.scale, **kind, "source": self.source}


@dataclass(frozen=True)
class Space:
    """Dimensions by name, in alphabetical order. `options`: those that are options of the run."""

    dimensions: tuple[Dimension, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "dimensions", tuple(sorted(self.dimensions, key=lambda d: d.name)))

    def __len__(self) -> int:
        return len(self.dimensions)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dimension.name for dimension in self.dimensions)

    def at(self, point: Mapping[str, float]) -> dict[str, Any]:
        """Values at a quantile per name."""
        return {dimension.name: dimension.value(point[dimension.name]) for dimension in self.dimensions}

    def without(self, names: Sequence[str]) -> "Space":
        return Space(tuple(d for d in self.dimensions if d.name not in names))

    def with_(self, others: Sequence[Dimension]) -> "Space":
        """The same space with dimensions added or replaced."""
        return Space((*self.without([d.name for d in others]).dimensions, *others))

    def describe(self) -> dict[str, Any]:
        return {dimension.name: dimension.describe() for dimension in self.dimensions}


def split_values(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Hyperparameters of the method, and options of the run."""
    options = {name: value for name, value in values.items() if name in OPTIONS}
    return {name: value for name, value in values.items() if name not in OPTIONS}, options


# -- what a method declares ------------------------------------------------------------------------------------------
def declared_space(config: type, method_file: Path | None, scenario_id: str, *, online: bool = False) -> Space:
    """The search space of a method on a scenario: its Config's, then the `[[tune]]` table of its recipe file.

    In an online scenario samples come once: epochs is left out. Raises InputError for a table that can't be used.
    """
    from clbench.methods.base import config_fields

    hints = get_type_hints(config)
    found = {}
    for name, item in config_fields(config).items():
        if item.metadata.get("tune") and name not in OPTIONS:
            table = {"scale": item.metadata.get("scale", "linear"), **item.metadata["tune"]}
            found[name] = from_table(name, table, is_integer(hints[name]), "method")
    for name, entry, source in recipe_tables(method_file, scenario_id):
        if name not in hints and name not in OPTIONS:
            raise unknown_name(f"name in [[tune]] of {source}", name, [*hints, *OPTIONS])
        found[name] = from_table(name, entry, name in OPTIONS or is_integer(hints[name]), source)
    if online:
        found.pop("epochs", None)
    return Space(tuple(found.values()))


def is_integer(hint: Any) -> bool:
    """Whether a field's type is a whole number (or None)."""
    return hint is int or (int in get_args(hint) and float not in get_args(hint))


def from_table(name: str, table: Mapping[str, Any], integer: bool, source: str) -> Dimension:
    odd = sorted(table.keys() - {"choices", "low", "high", "scale"})
    if odd:
        raise unknown_name(f"key in the search space of {name}", odd[0], ("choices", "low", "high", "scale"))
    if "choices" in table:
        return Dimension(name, choices=tuple(table["choices"]), source=source)
    return Dimension(
        name, low=table.get("low"), high=table.get("high"), scale=table.get("scale", "linear"), integer=integer,
        source=source,
    )  # fmt: skip


def recipe_tables(method_file: Path | None, scenario_id: str) -> list[tuple[str, Mapping[str, Any], str]]:
    """(name, table, source) of the first `[[tune]]` entry that matches the scenario."""
    if method_file is None:
        return []
    from clbench.methods import registry

    inside = method_file.parent == registry.FOLDER
    path = registry.FOLDER / "recipes" / f"{method_file.stem}.toml" if inside else method_file.with_suffix(".toml")
    if not path.is_file():
        return []
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8")).get("tune", [])
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"recipe file {path} is not valid TOML: {error}") from error
    for entry in entries:
        if fnmatchcase(scenario_id.partition("@")[0], entry.get("scenario", "*")):
            tables = {key: value for key, value in entry.items() if key not in ("scenario", "source")}
            return [(name, table, entry.get("source", path.name)) for name, table in tables.items()]
    return []


# -- what the command line changes -----------------------------------------------------------------------------------
RANGE = re.compile(r"(log|linear|int|logint)\(([^,]+),([^,]+)\)")


def parse_dimension(name: str, text: str) -> Dimension:
    """`0.01,0.1` lists choices; `log(1e-4,0.1)`, `linear(0,1)`, `int(1,8)`, `logint(1,64)` are ranges.

    >>> parse_dimension("lr", "log(1e-3,0.1)").high
    0.1
    """
    text = text.replace(" ", "")
    match = RANGE.fullmatch(text)
    if match:
        kind, low, high = match.groups()
        try:
            return Dimension(
                name, low=float(low), high=float(high), scale="log" if kind.startswith("log") else "linear",
                integer=kind.endswith("int"), source="--space",
            )  # fmt: skip
        except ValueError:
            raise InputError(f"--space {name}={text}: {low} and {high} must be numbers") from None
    if "(" in text or not text:
        raise InputError(
            f"--space {name}={text} cannot be read: write choices as 0.01,0.1 or a range as log(1e-4,0.1), "
            f"linear(0,1), int(1,8) or logint(1,64)"
        )
    return Dimension(name, choices=tuple(plain(part) for part in text.split(",")), source="--space")


def plain(text: str) -> Any:
    """A number where the text is one, else the text (true, false, names)."""
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)
