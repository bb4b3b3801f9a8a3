"""The registry of methods is this folder: `--method slca` imports `slca.py` and nothing else.

Other people's methods: a path (`--method path/to/mine.py`) or an entry point of group `clbench.methods`. Listing reads
the files without importing them, and so never imports torch.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import sys
import tomllib
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from clbench.errors import InputError, unknown_name

if TYPE_CHECKING:
    from clbench.methods.base import Method

__all__ = ["FoundMethod", "Recipe", "find", "find_recipe", "list_methods"]

FOLDER = Path(__file__).parent
NOT_METHODS = {"__init__", "base", "registry", "config"}
GROUP = "clbench.methods"
# `avalanche:Replay`: prefix -> module whose `find` knows the rest. By name, since they stand above the methods.
FAMILIES = {"avalanche": "clbench.interop.strategies"}


@dataclass(frozen=True)
class FoundMethod:
    """A method by name. `digest`: sha256 of its file, for methods from outside the package (else empty)."""

    id: str
    cls: type[Method]
    digest: str = ""
    path: Path | None = None


@dataclass(frozen=True)
class Recipe:
    """How a source runs a method on a scenario: hyperparameters, run options, backbone, and the source's name."""

    source: str
    set: Mapping[str, Any]
    run: Mapping[str, Any]
    backbone: str | None = None
    backbone_options: Mapping[str, Any] | None = None


def builtin_names() -> list[str]:
    """Ids of the methods in this folder: their file names."""
    return sorted(p.stem for p in FOLDER.glob("*.py") if p.stem not in NOT_METHODS and not p.stem.startswith("_"))


def list_methods() -> list[dict[str, Any]]:
    """Id, title, settings, aliases and hyperparameters of every method, read from the source without importing it."""
    described = [describe_file(FOLDER / f"{name}.py") for name in builtin_names()]
    for point in importlib.metadata.entry_points(group=GROUP):
        described.append({"id": point.name, "title": f"from {point.value}", "settings": [], "aliases": [],
                          "hyperparameters": []})  # fmt: skip
    return described


def parse(path: Path) -> ast.Module:
    """The syntax tree of a file, read again only when the file has changed."""
    return parse_version(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=1024)
def parse_version(path: Path, changed: int) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def describe_file(path: Path) -> dict[str, Any]:
    """What `list_methods` says of one file."""
    tree = parse(path)
    doc = ast.get_docstring(tree) or ""
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    name = next(
        (ast.unparse(node.value) for node in tree.body if isinstance(node, ast.Assign)
         and any(isinstance(t, ast.Name) and t.id == "METHOD" for t in node.targets)),
        "",
    )  # fmt: skip
    attributes = class_attributes(classes[name]) if name in classes else {}
    return {
        "id": path.stem,
        "title": doc.split("\n")[0].rstrip("."),
        "settings": sorted(attributes.get("settings", ("class", "domain", "task"))),
        "aliases": sorted(attributes.get("aliases", ())),
        "hyperparameters": config_of(path, classes, attributes.get("Config", "Config")),
    }


def class_attributes(node: ast.ClassDef) -> dict[str, Any]:
    """Literal class attributes: settings, aliases, and the name of Config."""
    out: dict[str, Any] = {}
    for item in node.body:
        if isinstance(item, ast.Assign) and isinstance(item.targets[0], ast.Name):
            target, value = item.targets[0].id, item.value
        elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.value is not None:
            target, value = item.target.id, item.value
        else:
            continue
        if target == "Config":
            out[target] = ast.unparse(value)
        elif target in ("settings", "aliases"):
            if isinstance(value, ast.Call):  # frozenset({...})
                value = value.args[0]
            out[target] = ast.literal_eval(value)
    return out


def config_of(path: Path, classes: Mapping[str, ast.ClassDef], name: str) -> list[dict[str, Any]]:
    """Hyperparameters declared by `hp(...)` in a Config class and its bases, from this file or a sibling's."""
    if name not in classes:
        for sibling in [*imported_from(path, name), *sorted(path.parent.glob("_*.py"))]:
            tree = parse(sibling)
            found = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
            if name in found:
                return config_of(sibling, found, name)
        return []
    out: list[dict[str, Any]] = []
    for base in classes[name].bases:
        out += config_of(path, {k: v for k, v in classes.items() if k != name}, ast.unparse(base))
    for item in classes[name].body:
        if not (
            isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and isinstance(item.value, ast.Call)
        ):
            continue
        args = [literal(arg) for arg in item.value.args]
        entry = {"name": item.target.id, "type": ast.unparse(item.annotation), "default": args[0], "help": args[1]}
        entry |= {k.arg: literal(k.value) for k in item.value.keywords if k.arg}
        out = [known for known in out if known["name"] != entry["name"]] + [entry]
    return out


def imported_from(path: Path, name: str) -> list[Path]:
    """The file of this folder that `path` imports `name` from, if there is one."""
    tree = parse(path)
    sources = [
        FOLDER / f"{node.module.rpartition('.')[2]}.py"
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("clbench.methods.")
        and any(alias.name == name for alias in node.names)
    ]  # fmt: skip
    return [source for source in sources if source.is_file() and source != path]


def literal(node: ast.expr) -> Any:
    """The value of a literal, or its source text."""
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def find(name: str) -> FoundMethod:
    """Import a method by id, alias, path to a file, entry point, or as `avalanche:<strategy>`.

    Raises InputError if there is none, if its file can't be imported, or if it defines no METHOD.
    """
    if name.endswith(".py") or "/" in name:
        path = Path(name).expanduser()
        if not path.is_file():
            raise InputError(f"method file {name} does not exist; give the path of a Python file that defines METHOD")
        module = import_file(path)
        return FoundMethod(path.stem, method_of(module, str(path)), sha256(path.read_bytes()).hexdigest(), path)
    family, colon, rest = name.partition(":")
    if colon and family.lower() in FAMILIES:
        outside: FoundMethod = importlib.import_module(FAMILIES[family.lower()]).find(rest)
        return outside
    wanted = canonical(name)
    listed = {entry["id"]: entry for entry in list_methods()}
    by_alias = {canonical(alias): entry["id"] for entry in listed.values() for alias in entry["aliases"]}
    found = next((i for i in listed if canonical(i) == wanted), by_alias.get(wanted))
    if found is None:
        raise unknown_name("method", name, listed, "(or give the path of your own method file)")
    if found in builtin_names():
        module = importlib.import_module(f"clbench.methods.{found}")
        return FoundMethod(found, method_of(module, found), path=FOLDER / f"{found}.py")
    point = next(p for p in importlib.metadata.entry_points(group=GROUP) if p.name == found)
    try:
        cls = point.load()
    except Exception as error:
        raise InputError(f"method {found} (entry point {point.value}) can't be imported: {error}") from error
    source = Path(sys.modules[cls.__module__].__file__ or "")
    digest = sha256(source.read_bytes()).hexdigest() if source.is_file() else ""
    return FoundMethod(found, cls, digest, source)


def canonical(name: str) -> str:
    """`DER++`, `der_pp` and `derpp` are one name."""
    return name.lower().replace("++", "pp").replace("-", "").replace("_", "")


def import_file(path: Path) -> ModuleType:
    """Import a Python file under a name of its own; an error inside it becomes one sentence with the line."""
    name = f"clbench_user_{sha256(str(path.resolve()).encode()).hexdigest()[:12]}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} is not a Python file that can be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up here
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        if isinstance(error, SyntaxError):
            line = error.lineno
        else:
            frames = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
            line = frames[-1] if frames else None
        raise InputError(f"{path}, line {line}: {type(error).__name__}: {error}") from error
    return module


def method_of(module: ModuleType, where: str) -> type[Method]:
    """The METHOD of a module, checked to be a class with the methods a learner calls."""
    cls = getattr(module, "METHOD", None)
    if cls is None:
        raise InputError(f"{where} defines no METHOD; end the file with METHOD = YourClass")
    missing = [n for n in ("phases", "step", "logits", "state_dict", "load_state_dict") if not hasattr(cls, n)]
    if not isinstance(cls, type) or missing:
        raise InputError(f"METHOD of {where} lacks {', '.join(missing)}; derive it from clbench.methods.base.Method")
    return cls


def find_recipe(method: FoundMethod, scenario_id: str) -> Recipe | None:
    """The recipe of a method for a scenario, or None.

    Read from `recipes/<method>.toml` here, or from `<file>.toml` beside a user's method; `[[recipe]]` entries are tried
    in order, `scenario` is a glob on the id without its version. Raises InputError for a file that isn't TOML.
    """
    if method.path is None:
        return None
    inside = method.path.parent == FOLDER
    path = FOLDER / "recipes" / f"{method.id}.toml" if inside else method.path.with_suffix(".toml")
    if not path.is_file():
        return None
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8")).get("recipe", [])
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"recipe file {path} is not valid TOML: {error}") from error
    name = scenario_id.split("@")[0]
    for entry in entries:
        if fnmatchcase(name, entry["scenario"]):
            return Recipe(
                source=entry["source"],
                set=entry.get("set", {}),
                run=entry.get("run", {}),
                backbone=entry.get("backbone"),
                backbone_options=entry.get("backbone_options"),
            )
    return None
