"""Find a scenario by name and build it: presets of `presets/*.toml`, or a user's own file.

A user's file `mine.py` holds `DATASETS` (names or paths), optionally `Params` (a frozen dataclass of `param`s),
`DEFAULTS` (StreamDefaults) and `VERSION`, and

    def build(tables, seed, params, *, id, defaults) -> Scenario

The same `build` and `Params` make a builder of this folder. Listing imports neither torch nor the builders.
"""

import importlib
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from clbench.errors import InputError, unknown_name
from clbench.scenarios import params as parameters
from clbench.scenarios.user_file import error_in_file, load_module

if TYPE_CHECKING:
    from clbench.data.classes import LabelTable
    from clbench.scenarios.model import Scenario, StreamDefaults

__all__ = ["Preset", "build", "find", "list_scenarios"]

ID = re.compile(r"[a-z0-9][a-z0-9-]*@[1-9][0-9]*")


def read_score(value: Any, where: str) -> str:
    if value not in ("test", "validation"):
        raise unknown_name(f"value of score of {where}", str(value), ("test", "validation"))
    return str(value)


def read_first_tasks(value: Any, where: str) -> int:
    num: int = parameters.read(int, value, f"{where}: first_tasks")
    return num


# parameters of every scenario: what is done to its tables once they are built (see `derive.py`)
#   score=validation: groups ask for validation rows in place of test rows.  first_tasks=K: only the first K tasks
DERIVED = {"score": read_score, "first_tasks": read_first_tasks}


@dataclass(frozen=True)
class NoParams:
    """For scenarios without parameters."""


@dataclass(frozen=True)
class Preset:
    """A scenario's recipe: a builder with its parameters.

    module: holds `build`. path: a user's file, or None. changed: what `with_params` changed, as values; a table with
    changes is another table under the same id, so whoever compares results shows and compares them too.
    derived: what is done to the built tables, see `DERIVED`. family: of `clbench.scenarios.families`, or None.
    """

    id: str
    title: str
    source: str
    datasets: tuple[str, ...]
    params: Any
    defaults: "StreamDefaults"
    module: ModuleType = field(repr=False, compare=False)
    path: Path | None = None
    changed: Mapping[str, Any] = field(default_factory=dict)
    derived: Mapping[str, Any] = field(default_factory=dict)
    family: str | None = None

    @property
    def name(self) -> str:
        return self.id.partition("@")[0]

    @property
    def version(self) -> int:
        return int(self.id.partition("@")[2])

    @property
    def row_order(self) -> str:
        """Order of rows that its data is loaded in: `canonical`, or `source` where an official stream needs it."""
        return str(getattr(self.params, "row_order", "canonical"))

    @property
    def size(self) -> int | None:
        """Side in pixels that its images are resized to once, as they are loaded; None leaves them as they are. Data
        sets that are streamed together must have one size."""
        size = getattr(self.params, "size", None)
        return None if size is None else int(size)

    def with_params(self, given: Mapping[str, Any]) -> "Preset":
        """Return this recipe with other parameters, which may be text from a command line.

        `dataset` replaces the data set by another one's name or path; several are separated by commas. Every scenario
        also has the parameters of `DERIVED`, unless its builder has one of that name.
        Raises InputError for an unknown name, a wrong type or a value out of range.
        """
        where = f"scenario {self.id}"
        given, datasets = dict(given), self.datasets
        if "dataset" in given:
            datasets = dataset_names(given.pop("dataset"), len(datasets), where)
        for name in given.keys() & {item.name for item in fields(self.defaults)}:
            raise InputError(f"{where}: {name} is no parameter of its tables; give it as an option of the run")
        own = vars(self.params)
        derived = {name: read(given.pop(name), where) for name, read in DERIVED.items() if name in given.keys() - own}
        params = parameters.change(self.params, given, where)
        old, new = vars(self.params), vars(params)
        changed = {**self.changed, **{name: new[name] for name in new if new[name] != old[name]}}
        if datasets != self.datasets:
            changed["dataset"] = ",".join(datasets)
        changed |= derived
        return replace(self, datasets=datasets, params=params, changed=changed, derived={**self.derived, **derived})

    def param_table(self) -> list[dict[str, Any]]:
        """One row per parameter: name, type, value, default, help."""
        return parameters.param_table(self.params)


def list_scenarios() -> list[dict[str, Any]]:
    """All presets, in the order of the files: id, name, version, newest, title, datasets, builder, family, aliases,
    source."""
    entries = read_presets()
    newest = {split_id(id)[0]: id for id in sorted(entries, key=split_id)}
    return [
        {
            "id": id,
            "name": split_id(id)[0],
            "version": split_id(id)[1],
            "newest": newest[split_id(id)[0]] == id,
            "title": entry["title"],
            "datasets": list(entry["datasets"]),
            "builder": entry["builder"],
            "family": entry.get("family"),
            "aliases": list(entry.get("aliases", ())),
            "source": entry["source"],
        }
        for id, entry in entries.items()
    ]


def find(name: str | Path) -> Preset:
    """Find a scenario: `split-cifar100` (newest version), `split-cifar100@1`, an alias, or the path of a .py file.

    Raises InputError with the nearest names, or with file and line if the user's file fails while it is imported.
    """
    if str(name).endswith(".py"):
        return from_file(Path(name))
    id = resolve_id(str(name))
    entry = read_presets()[id]
    module = importlib.import_module(f"clbench.scenarios.{entry['builder']}")
    from clbench.scenarios.model import StreamDefaults

    where = f"{entry['file']}, {id}"
    return Preset(
        id=id,
        title=entry["title"],
        source=entry["source"],
        datasets=tuple(entry["datasets"]),
        params=parameters.change(module.Params(), entry.get("params", {}), where),
        defaults=parameters.change(StreamDefaults(), entry.get("defaults", {}), where),
        module=module,
        family=entry.get("family"),
    )


def build(preset: Preset, tables: Sequence["LabelTable"], order_seed: int) -> "Scenario":
    """Build the tables of `preset` on the label tables of its data sets, in the order of `preset.datasets`.

    Raises InputError if a parameter cannot be met, and for whatever goes wrong inside a user's file.
    """
    from clbench.scenarios.model import Scenario

    if len(tables) != len(preset.datasets):
        raise InputError(f"scenario {preset.id} needs {len(preset.datasets)} data sets, but got {len(tables)}")
    try:
        scenario = preset.module.build(tables, order_seed, preset.params, id=preset.id, defaults=preset.defaults)
    except InputError:
        raise
    except Exception as error:
        if preset.path is None:
            raise
        raise error_in_file(preset.path, error, "while the scenario was built") from error
    if not isinstance(scenario, Scenario):
        raise InputError(f"scenario {preset.id}: build must return a Scenario, not {type(scenario).__name__}")
    if preset.derived:
        from clbench.scenarios import derive

        if (num := preset.derived.get("first_tasks")) is not None:
            scenario = derive.first_tasks(scenario, num)
        if preset.derived.get("score") == "validation":
            scenario = derive.score_on_validation(scenario)
    return scenario


@cache
def read_presets() -> dict[str, dict[str, Any]]:
    entries: dict[str, dict[str, Any]] = {}
    for path in sorted((Path(__file__).parent / "presets").glob("*.toml")):
        with path.open("rb") as file:
            found: dict[str, dict[str, Any]] = tomllib.load(file)
        for id, entry in found.items():
            if not ID.fullmatch(id):
                raise ValueError(f"{path.name}: {id!r} is not of the form name@version")
            if id in entries:
                raise ValueError(f"{path.name}: {id!r} stands in another file too")
            entries[id] = {**entry, "file": path.name}
    return entries


def split_id(id: str) -> tuple[str, int]:
    name, _, version = id.partition("@")
    return name, int(version)


def resolve_id(name: str) -> str:
    entries = read_presets()
    if name in entries:
        return name
    base, _, version = name.lower().replace("_", "-").partition("@")
    for id, entry in entries.items():
        if base in entry.get("aliases", ()):
            base = split_id(id)[0]
    versions = [id for id in entries if split_id(id)[0] == base and version in ("", str(split_id(id)[1]))]
    if not versions:
        known = entries if version else {split_id(id)[0] for id in entries}
        raise unknown_name("scenario", name, known, "(or give the path of a .py file)")
    return max(versions, key=split_id)


def from_file(path: Path) -> Preset:
    from clbench.scenarios.model import StreamDefaults

    module = load_module(path, "scenario")
    where = f"scenario file {path}"
    if not callable(getattr(module, "build", None)):
        raise InputError(f"{where} has no function build(tables, seed, params, *, id, defaults)")
    datasets = getattr(module, "DATASETS", None)
    datasets = (datasets,) if isinstance(datasets, str) else datasets
    if not (isinstance(datasets, list | tuple) and datasets and all(isinstance(name, str) for name in datasets)):
        raise InputError(f'{where} needs DATASETS, the names or paths of its data sets, as in DATASETS = ("digits",)')
    defaults = getattr(module, "DEFAULTS", StreamDefaults())
    if not isinstance(defaults, StreamDefaults):
        raise InputError(f"{where}: DEFAULTS must be a StreamDefaults, not {type(defaults).__name__}")
    id = f"{path.stem.lower().replace('_', '-')}@{getattr(module, 'VERSION', 1)}"
    if not ID.fullmatch(id):
        raise InputError(f"{where}: {id!r} cannot be an id; name the file with letters, digits and -, VERSION from 1")
    if split_id(id)[0] in {split_id(known)[0] for known in read_presets()}:
        raise InputError(f"{where} has the name of the built-in scenario {split_id(id)[0]!r}; rename the file")
    params = getattr(module, "Params", NoParams)
    parameters.param_types(params, where)
    return Preset(
        id=id,
        title=(module.__doc__ or path.stem).strip().split("\n")[0],
        source=str(path),
        datasets=tuple(datasets),
        params=params(),
        defaults=defaults,
        module=module,
        path=path,
    )


def dataset_names(given: Any, how_many: int, where: str) -> tuple[str, ...]:
    """Read `dataset=`: one name or path, or several with commas where the scenario takes several."""
    text = str(given).strip()
    names = [part.strip() for part in text.split(",")] if how_many > 1 else [text]
    if not all(names):
        raise InputError(f"{where}: dataset is empty; give a data set's name or path")
    return tuple(names)
