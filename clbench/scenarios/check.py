"""Conformance of a scenario: what must hold for every one, whoever wrote its builder (`clbench check FILE`)."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from clbench.data.classes import TEST, TRAIN, LabelTable
from clbench.errors import InputError
from clbench.scenarios import registry
from clbench.scenarios.model import Scenario, without_domain

__all__ = ["Check", "check_preset", "check_scenario"]


class Check(NamedTuple):
    """One invariant. message: what was found wrong, or "" if it holds."""

    name: str
    ok: bool
    message: str


def check_preset(preset: registry.Preset, tables: Sequence[LabelTable], order_seed: int = 0) -> list[Check]:
    """Build `preset` and check it, under `order_seed` and the next seed. InputError if it cannot be built at all."""
    out: dict[str, Check] = {}
    for seed in (order_seed, order_seed + 1):
        scenario = registry.build(preset, tables, seed)
        for check in check_scenario(scenario, tables, partial(registry.build, preset, tables, seed)):
            if check.name not in out or not check.ok:
                out[check.name] = check
    return list(out.values())


def check_scenario(
    scenario: Scenario, tables: Sequence[LabelTable], rebuild: Callable[[], Scenario] | None = None
) -> list[Check]:
    """Check every invariant of an index table built on `tables` (rows count through them, with offsets).

    rebuild: builds it once more, to see that the result is the same and the tables are left as they were. If the form
    is wrong, the other checks would stand on nothing and are not tried.
    """
    names = {
        "form": problems_of_form,
        "rows": problems_of_rows,
        "classes": problems_of_classes,
        "first seen": problems_of_first_seen,
        "groups": problems_of_groups,
        "labels": problems_of_labels,
        "domains": problems_of_domains,
        "defaults": problems_of_defaults,
    }
    out = []
    for name, problems in names.items():
        found = next(problems(scenario, tables), "")
        out.append(Check(name, not found, found))
        if name == "form" and found:
            return out
    if rebuild is not None:
        before = digest_of(tables)
        same = rebuild().fingerprint == scenario.fingerprint
        out.append(Check("same again", same, "" if same else "building it twice gives two different tables"))
        pure = digest_of(tables) == before
        out.append(Check("inputs kept", pure, "" if pure else "building it changes the label tables it is given"))
    return out


Problems = Iterator[str]


def problems_of_form(scenario: Scenario, tables: Sequence[LabelTable]) -> Problems:
    """Ids, shapes, types, and numbers that point at something."""
    num_rows = sum(len(table.labels) for table in tables)
    if not re.fullmatch(r"\S+@[1-9][0-9]*", scenario.id):
        yield f"id {scenario.id!r} is not of the form name@version"
    if scenario.setting not in ("class", "task", "domain"):
        yield f"setting {scenario.setting!r} is none of class, task, domain"
    if len(scenario.datasets) != len(tables):
        yield f"it names {len(scenario.datasets)} data sets but is built on {len(tables)}"
    if not any(len(task.rows) for task in scenario.tasks):
        yield "there is nothing to train on: all tasks are empty"
    if not scenario.groups:
        yield "there is nothing to test on: no groups"
    for where, columns in tables_of(scenario):
        for name, column in columns.items():
            if not (isinstance(column, Tensor) and column.dtype == torch.int64 and column.dim() == 1):
                yield f"{where}: {name} must be a 1-d int64 tensor"
                continue
            if name != "classes" and len(column) != len(columns["rows"]):
                yield f"{where}: {len(column)} {name} for {len(columns['rows'])} rows"
            most = (num_rows if name == "rows" else scenario.num_classes) - 1
            if name != "domain" and len(column) and not 0 <= int(column.min()) <= int(column.max()) <= most:
                yield f"{where}: {name} must be numbers from 0 to {most}"
    table = scenario.classes
    if not len(table.names) == len(table.level) == len(table.parent) == len(scenario.first_seen):
        yield "names, level, parent and first_seen must all have one entry per class"
    try:
        json.dumps(dict(scenario.params))
    except TypeError as error:
        yield f"params must be plain values, so that a record can hold them: {error}"


def tables_of(scenario: Scenario) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every set of columns that belong together, with its place in words."""
    for index, task in enumerate(scenario.tasks):
        columns = {"rows": task.rows, "targets": task.targets, "classes": task.classes}
        if task.domain is not None:
            columns["domain"] = task.domain
        yield f"task {index}", columns
        if task.val is not None:
            yield f"task {index}, validation", {"rows": task.val[0], "targets": task.val[1]}
    for group in scenario.groups:
        columns = {"rows": group.rows, "targets": group.targets, "classes": group.classes}
        if group.domain is not None:
            columns["domain"] = group.domain
        yield f"group {group.name!r}", columns


def problems_of_rows(scenario: Scenario, tables: Sequence[LabelTable]) -> Problems:
    """Rows are of the right split; validation rows are never trained on."""
    split = torch.cat([table.split for table in tables])
    for where, columns in tables_of(scenario):
        rows = columns["rows"]
        is_group = where.startswith("group")
        if is_group and scenario.recall:
            continue  # they are tested on what they have been shown: see below
        wrong = int((split[rows] != (TEST if is_group else TRAIN)).sum())
        if wrong:
            yield f"{where}: {wrong} of {len(rows)} rows are {'training' if is_group else 'test'} rows"
    trained = torch.zeros(len(split), dtype=torch.bool)
    for task in scenario.tasks:
        trained[task.rows] = True
    if scenario.recall:
        for group in scenario.groups:
            if not bool(trained[group.rows].all()):
                yield f"group {group.name!r}: {int((~trained[group.rows]).sum())} rows of a recall test are never shown"
    for index, task in enumerate(scenario.tasks):
        if task.val is not None and bool(trained[task.val[0]].any()):
            yield f"task {index}: {int(trained[task.val[0]].sum())} validation rows are also trained on"


def problems_of_classes(scenario: Scenario, tables: Sequence[LabelTable]) -> Problems:
    """Each class is introduced once, at the latest when first trained; parents stand one up."""
    num_classes = scenario.num_classes
    introduced = torch.zeros(num_classes, dtype=torch.bool)
    for index, task in enumerate(scenario.tasks):
        if bool(introduced[task.classes].any()) or repeats(task.classes):
            yield f"task {index} introduces a class that was introduced before"
        introduced[task.classes] = True
        used = torch.cat([task.targets, *([] if task.val is None else [task.val[1]])])
        missing = used[~introduced[used]]
        if len(missing):
            name = scenario.classes.names[int(missing[0])]
            yield f"task {index} trains class {name!r}, which neither it nor an earlier task introduces"
    level, parent = scenario.classes.level, scenario.classes.parent
    if bool((level < 0).any()) or bool((parent < -1).any()) or bool((parent >= num_classes).any()):
        yield "class levels start at 0, parents are class ids or -1"
        return
    child = parent >= 0
    if bool((level[parent[child]] != level[child] - 1).any()):
        yield "a class's parent must be one level above it"


def problems_of_first_seen(scenario: Scenario, tables: Sequence[LabelTable]) -> Problems:
    """A class unlocks as its task starts or with its first row, never later; one that never comes stays locked."""
    total = scenario.offsets[-1]
    first_row = torch.full((scenario.num_classes,), total)
    start = torch.full((scenario.num_classes,), total)
    for offset, task in zip(scenario.offsets, scenario.tasks, strict=False):
        positions = torch.arange(offset, offset + len(task.rows))
        first_row.scatter_reduce_(0, task.targets, positions, "amin")
        start[task.classes] = offset
    wrong = (scenario.first_seen != first_row) & (scenario.first_seen != start)
    for i in wrong.nonzero().flatten().tolist():
        yield (
            f"class {scenario.classes.names[i]!r} unlocks at {int(scenario.first_seen[i])}, but its task starts at "
            f"{int(start[i])} and its first row comes at {int(first_row[i])}"
        )


def problems_of_groups(scenario: Scenario, tables: Sequence[LabelTable]) -> Problems:
    """Groups can be answered, are named apart, and leave out nothing that is learned."""
    names = [group.name for group in scenario.groups]
    tested = torch.zeros(scenario.num_classes, dtype=torch.bool)
    for group in scenario.groups:
        where = f"group {group.name!r}"
        if names.count(group.name) > 1:
            yield f"{where}: two groups have this name"
        if len(group.rows) == 0:
            yield f"{where} has no rows"
        if repeats(group.classes):
            yield f"{where}: a class stands twice among its classes"
        if not bool(torch.isin(group.targets, group.classes).all()):
            yield f"{where}: a right answer is not among the classes that an answer may come from"
        if bool((scenario.classes.level[group.targets] != group.level).any()):
            yield f"{where}: level is {group.level}, but its targets are of another level"
        if group.task is None and scenario.setting == "task":
            yield f"{where} belongs to no task, which the setting 'task' needs"
        if group.task is not None and not 0 <= group.task < len(scenario.tasks):
            yield f"{where} belongs to task {group.task}, but the tasks are 0 to {len(scenario.tasks) - 1}"
        tested[group.targets] = True
    for task in scenario.tasks:
        for i in task.targets[~tested[task.targets]].tolist():
            yield f"class {scenario.classes.names[i]!r} is trained but in no group"


def problems_of_labels(scenario: Scenario, tables: Sequence[LabelTable]) -> Problems:
    """In tests a label means one class (per level and domain); in training it mostly does (noise is allowed). Where
    rows are recalled, each is a class of its own."""
    if scenario.recall:
        return
    offsets = [0]
    for table in tables:
        offsets.append(offsets[-1] + len(table.classes))
    labels = torch.cat([table.labels + offset for table, offset in zip(tables, offsets, strict=False)])
    level = scenario.classes.level
    meaning = torch.full((scenario.classes.num_levels, offsets[-1]), -1)
    for group in scenario.groups:
        at, label = level[group.targets], labels[group.rows]
        before = meaning[at, label]
        meaning[at, label] = group.targets
        if bool(((before >= 0) & (before != group.targets)).any()) or bool((meaning[at, label] != group.targets).any()):
            yield f"group {group.name!r}: test rows of one label have different targets"
    for index, task in enumerate(scenario.tasks):
        known = meaning[level[task.targets], labels[task.rows]]
        agree = (known == task.targets).sum()
        if len(task.rows) and int(agree) * 2 < len(task.rows):
            yield f"task {index}: most of its rows have other targets than test rows of the same label"


def problems_of_domains(scenario: Scenario, tables: Sequence[LabelTable]) -> Problems:
    """Domains that are named exist, and are what their kind says."""
    domains = scenario.domains
    if domains is not None and domains.kind == "permutation":
        expected = torch.arange(domains.table.shape[1]).expand_as(domains.table)
        if not torch.equal(domains.table.sort(dim=1).values, expected):
            yield "a row of the domain table is no permutation of the pixels"
    if domains is not None and domains.kind == "rotation" and domains.table.shape[1] != 1:
        yield f"a rotation has one number per domain, in degrees, not {domains.table.shape[1]}"
    if (
        domains is not None
        and domains.kind == "overlay"
        and not -1 <= domains.table.min() <= domains.table.max() <= 255
    ):
        yield "an overlay holds grey values from 0 to 255, or -1 where the image stays"
    silent = without_domain(scenario.groups)
    if silent is not None:
        yield f"group {silent.name!r} does not say the domain of its rows, but other groups do"
    for where, columns in tables_of(scenario):
        used = columns.get("domain")
        if used is None or len(used) == 0:
            continue
        if domains is None:
            yield f"{where} has domains, but the scenario has no domain table"
        elif not 0 <= int(used.min()) <= int(used.max()) < len(domains.table):
            yield f"{where}: domains must be 0 to {len(domains.table) - 1}"


def problems_of_defaults(scenario: Scenario, tables: Sequence[LabelTable]) -> Problems:
    """Batch size and the like are possible, views can be read, prompts belong to tasks."""
    from clbench.data.views import parse_view

    defaults = scenario.defaults
    for name in ("batch_size", "epochs", "updates_per_batch", "eval_per_group"):
        if getattr(defaults, name) < 1:
            yield f"defaults: {name} is {getattr(defaults, name)}, but must be at least 1"
    if defaults.eval_dense < 0 or (defaults.eval_every is not None and defaults.eval_every < 0):
        yield "defaults: eval_every and eval_dense cannot be negative"
    if defaults.eval_samples is not None and (defaults.eval_samples < 1 or not scenario.online):
        yield "defaults: eval_samples is a number of samples above 0, for online scenarios"
    for name in ("train_view", "test_view"):
        try:
            parse_view(getattr(defaults, name))
        except InputError as error:
            yield f"defaults: {name}: {error}"
    for task in scenario.prompts:
        if not 0 <= task < len(scenario.tasks):
            yield f"prompts are given for task {task}, but the tasks are 0 to {len(scenario.tasks) - 1}"


def repeats(ids: Tensor) -> bool:
    return len(set(ids.tolist())) < len(ids)


def digest_of(tables: Sequence[LabelTable]) -> str:
    digest = hashlib.sha256()
    for table in tables:
        for column in (table.labels, table.split, table.groups, table.classes.level, table.classes.parent):
            digest.update(b"-" if column is None else column.contiguous().numpy().tobytes())
    return digest.hexdigest()
