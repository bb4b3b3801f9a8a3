"""Label trees: from the data's own hierarchy, or from a table of edges.

A table is a CSV file with the header `child,parent` or `child,parent,name` and a line per edge; lines that begin with
`# ` are comments. A data set's class is given by its name, or as `#12` by its number in the data set's order; every
other name is a coarse class. All classes must have the same number of ancestors.

A number stands for another class as soon as the data are in another order (a folder's classes are sorted by name, the
list of Stanford Cars is not). So a table may give the name behind each number: data that have these names, whatever
their case and signs, are matched by them, and numbers serve for data that have none of them.
"""

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clbench.data.classes import LabelTable
from clbench.errors import InputError, unknown_name
from clbench.scenarios.rows import Ints

__all__ = ["Tree", "find_tree", "own_tree", "tree_names"]

FOLDER = Path(__file__).parent
HEADERS = (["child", "parent"], ["child", "parent", "name"])


class Edge(NamedTuple):
    """name: of the class that stands as a number, or ""."""

    child: str
    parent: str
    name: str = ""


@dataclass(frozen=True)
class Tree:
    """H + 1 levels over C finest classes. names: per level, coarsest first.  at: (H + 1, C) int64, which class of a
    level a finest class belongs to; the last row counts 0 .. C-1."""

    names: tuple[tuple[str, ...], ...]
    at: Ints

    @property
    def num_levels(self) -> int:
        return len(self.names)


def tree_names() -> list[str]:
    """Names of the tables that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.csv"))


def find_tree(given: str | None, table: LabelTable, where: str) -> Tree:
    """The tree called `given` (a table of the package, or the path of a CSV file); None: the data's own hierarchy."""
    if given is None:
        return own_tree(table, where)
    path = Path(given) if given.endswith(".csv") else FOLDER / f"{given}.csv"
    if not given.endswith(".csv") and given not in tree_names():
        raise unknown_name(f"tree of {where}", given, tree_names(), "(or give the path of a .csv file)")
    finest = table.classes.level == table.classes.num_levels - 1
    names = [table.classes.names[i] for i in finest.nonzero()[:, 0].tolist()]
    place = f"tree {path.name} for {where}"
    return from_edges(in_order_of(read_edges(path), names, place), names, place)


def read_edges(path: Path) -> list[Edge]:
    """The lines of a table."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write a mark in front
            lines = [line for line in csv.reader(file) if line and not line[0].startswith("# ")]
    except OSError as error:
        raise InputError(f"cannot read the tree {path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"the tree {path} is no CSV file: {error}") from None
    if not lines or [part.strip() for part in lines[0]] not in HEADERS:
        raise InputError(f"the tree {path} must begin with the line child,parent (or child,parent,name)")
    out = []
    for line in lines[1:]:
        parts = [part.strip() for part in line]
        if not 2 <= len(parts) <= len(lines[0]) or not all(parts[:2]):
            raise InputError(f"the tree {path}: the line {','.join(line)!r} is not of the form {','.join(lines[0])}")
        out.append(Edge(*parts))
    return out


def in_order_of(edges: Sequence[Edge], names: Sequence[str], where: str) -> list[Edge]:
    """The edges with the numbers that classes have in these data, if the table and the data both have their names."""
    listed = {fold(edge.name): edge.child for edge in edges if edge.name}
    found = [listed.get(fold(name)) for name in names]
    if found.count(None) == len(names):
        return list(edges)
    if None not in found and len(set(found)) != len(listed):
        raise InputError(f"{where}: it names {len(listed)} classes, but {len(set(found))} of them are in the data")
    if None in found:
        raise InputError(
            f"{where}: it has names of these classes, but not of {names[found.index(None)]!r}; rename that class of "
            f"the data, or give a tree of your own"
        )
    number = {child: f"#{index}" for index, child in enumerate(found)}
    return [edge._replace(child=number.get(edge.child, edge.child)) for edge in edges]


def fold(name: str) -> str:
    """A name without case and signs: `Black_footed_Albatross` and `black footed albatross` are the same."""
    return re.sub(r"[\W_]+", " ", name).strip().casefold()


def from_edges(edges: Sequence[Edge], names: Sequence[str], where: str) -> Tree:
    """The tree over the classes `names`. Raises InputError for a cycle, an orphan, two parents, classes that are
    missing or unknown, and for classes of different depth."""
    known = {name: f"#{i}" for i, name in enumerate(names)}  # inside, a finest class goes by its number
    parent_of: dict[str, str] = {}
    for edge in edges:
        child, parent = known.get(edge.child, edge.child), known.get(edge.parent, edge.parent)
        if parent.startswith("#"):
            raise InputError(f"{where}: class {shown(parent, names)} is a parent; only coarse classes can be")
        if re.fullmatch(r"#\d+", child) and int(child[1:]) >= len(names):
            raise InputError(
                f"{where}: it has a class {child}, but the {len(names)} classes are #0 to #{len(names) - 1}"
            )
        if parent_of.setdefault(child, parent) != parent:
            raise InputError(f"{where}: {shown(child, names)} has two parents, {parent_of[child]!r} and {parent!r}")
    finest = [f"#{i}" for i in range(len(names))]
    parents = set(parent_of.values())
    for child in parent_of:
        if child not in parents and child not in finest:
            raise InputError(f"{where}: {child!r} is no class of the data and has no children: an orphan")
    paths = [climb(leaf, parent_of, where, names) for leaf in finest]
    if apart := parents - {name for path in paths for name in path}:  # each has a child, and none leads to a class
        raise InputError(f"{where}: {min(apart)!r} is its own ancestor: a cycle")
    depths = {len(path) for path in paths}
    if len(depths) > 1:
        short, long = paths[0], next(path for path in paths if len(path) != len(paths[0]))
        raise InputError(
            f"{where}: {shown(short[0], names)} has {len(short) - 1} ancestors and {shown(long[0], names)} has "
            f"{len(long) - 1}; every class needs as many"
        )
    return from_paths([path[:0:-1] for path in paths], names)


def climb(leaf: str, parent_of: Mapping[str, str], where: str, names: Sequence[str]) -> list[str]:
    """A class and its ancestors, upwards."""
    path = [leaf]
    while path[-1] in parent_of:
        path.append(parent_of[path[-1]])
        if path.count(path[-1]) > 1:
            raise InputError(f"{where}: {path[-1]!r} is its own ancestor: a cycle")
    if len(path) == 1:
        raise InputError(f"{where}: class {shown(leaf, names)} is not in the tree")
    return path


def shown(node: str, names: Sequence[str]) -> str:
    """A node as a message shows it: a finest class by its name."""
    number = int(node[1:]) if node.startswith("#") and node[1:].isdigit() else len(names)
    return repr(names[number] if number < len(names) else node)


def from_paths(paths: Sequence[Sequence[str]], names: Sequence[str]) -> Tree:
    """paths: per finest class its ancestors, coarsest first. Coarse classes are numbered in order of their names."""
    levels, rows = [], []
    for level in range(len(paths[0])):
        at_level = sorted({path[level] for path in paths})
        levels.append(tuple(at_level))
        rows.append([at_level.index(path[level]) for path in paths])
    return Tree((*levels, tuple(names)), np.array([*rows, list(range(len(names)))], np.int64))


def own_tree(table: LabelTable, where: str) -> Tree:
    """The hierarchy of the data's classes. Raises InputError if there is none, or if it is broken."""
    classes = table.classes
    level, parent = classes.level.numpy(), classes.parent.numpy()
    finest = int(level.max(initial=0))
    if finest == 0:
        raise InputError(
            f"{where}: its classes have one level only; give tree=NAME ({', '.join(tree_names())}) or a file"
        )
    ids = [np.flatnonzero(level == h) for h in range(finest + 1)]
    at = np.empty((finest + 1, len(ids[-1])), np.int64)
    node = ids[-1]
    for h in range(finest, -1, -1):
        if h < finest:
            broken = (node < 0) | (node >= len(level)) | (level[np.clip(node, 0, len(level) - 1)] != h)
            if broken.any():
                name = classes.names[int(ids[-1][broken.argmax()])]
                raise InputError(f"{where}: class {name!r} has no ancestor on level {h}: an orphan")
        ids[h] = np.unique(node)  # a coarse class without children is left out
        at[h] = np.searchsorted(ids[h], node)
        node = parent[node]
    return Tree(tuple(tuple(classes.names[i] for i in own.tolist()) for own in ids), at)
