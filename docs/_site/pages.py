"""Pages that are made from the code: one per method and per scenario, all with the same headings."""

import ast
import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from figures import measured, published_rows, results_rows

from clbench.methods.registry import FOLDER, list_methods
from clbench.scenarios.families import FAMILIES
from clbench.scenarios.registry import Preset, list_scenarios
from clbench.scenarios.registry import find as find_scenario

__all__ = ["HEADINGS", "method_page", "methods_index", "scenario_page", "scenarios_index"]

HEADINGS = (
    "Idea", "What we implement", "Recipe", "Our numbers against published ones", "Differences from official code",
    "Cost",
)  # fmt: skip
OURS = "Ours, in percent, mean ± standard deviation over seeds; small CPU recipes unless the folder says otherwise:"
PUBLISHED = "Published, in percent (status: verified in a paper or its files, second-hand, or recalled):"
FAMILY_PAGE = "What is ours is said per family in [scenarios](../scenarios.md)."
STATISTICS = Path(__file__).parents[2] / "tests/golden/statistics.json"
DIFFERS = ("Difference", "Different", "Same as the official", "Where the code differs", "Where the codes differ",
           "The two codes differ", "Deviation", "Not here")  # fmt: skip


# -- methods ------------------------------------------------------------------------------------------------------
def method_page(entry: dict[str, Any]) -> str:
    """The page of one method; entry: of `list_methods`."""
    name = entry["id"]
    doc = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))) or ""
    title, idea, body, differs = parts(doc)
    recipes = recipe_table(name)
    rows = [row for row in measured() if row.method == name]
    lines = [f"# {name}", "", title, "", f"Settings: {', '.join(entry['settings'])}-incremental."]
    if entry["aliases"]:
        lines[-1] += f" Also called {', '.join(f'`{alias}`' for alias in entry['aliases'])}."
    lines += [f" Source: `clbench/methods/{name}.py`.", ""]
    lines += section("Idea", idea or [title])
    lines += section("What we implement", [*body, "Hyperparameters (`--set name=value`):", *hyperparameters(entry)])
    lines += section("Recipe", [f"```\nclbench run --method {name} --scenario NAME\n```", *recipes])
    ours = list(results_rows(rows, "scenario")) if rows else []
    lines += section("Our numbers against published ones", numbers(ours, list(published_rows(method=name))))
    lines += section("Differences from official code", differs or ["None known."])
    return "\n".join([*lines, *section("Cost", cost(rows))])


def parts(doc: str) -> tuple[str, list[str], list[str], list[str]]:
    """A module's docstring as title, idea, what is implemented, and how it differs from official code."""
    title, *paragraphs = [clean(paragraph) for paragraph in doc.split("\n\n")]
    idea, body, differs = [], [], []
    for paragraph in paragraphs:
        if paragraph.startswith("Idea:"):
            said = paragraph.removeprefix("Idea:").strip()
            idea.append(said[:1].upper() + said[1:])
        elif paragraph.startswith(DIFFERS) or "differ" in paragraph.split(".")[0].lower():
            differs.append(paragraph)
        else:
            body.append(paragraph)
    return title, idea, body, differs


def clean(paragraph: str) -> str:
    """Docstring text as Markdown: indented formulas become blocks, everything else stays."""
    lines = paragraph.split("\n")
    if all(line.startswith("    ") for line in lines if line):
        return "```\n" + "\n".join(line[4:] for line in lines) + "\n```"
    return paragraph.replace("<", "&lt;")


def hyperparameters(entry: dict[str, Any]) -> list[str]:
    """A table of what can be set."""
    if not entry["hyperparameters"]:
        return ["none."]
    rows = ["| name | default | meaning | source |", "|---|---|---|---|"]
    for item in entry["hyperparameters"]:
        source = cell(item.get("source") or "–")
        rows.append(f"| `{item['name']}` | {default(item['default'])} | {cell(item['help'])} | {source} |")
    return ["\n".join(rows)]


def default(value: Any) -> str:
    """As one would give it to `--set`."""
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return f"`{text}`" if text else "empty"


def recipe_table(name: str) -> list[str]:
    """What the recipe file says, scenario by scenario."""
    path = FOLDER / "recipes" / f"{name}.toml"
    if not path.is_file():
        return ["No published recipe; the defaults are used everywhere."]
    rows = ["| scenario | backbone | hyperparameters and options | source |", "|---|---|---|---|"]
    for entry in tomllib.loads(path.read_text(encoding="utf-8")).get("recipe", []):
        values = {**entry.get("set", {}), **entry.get("run", {})}
        said = ", ".join(f"{key}={value}" for key, value in values.items())
        rows.append(
            f"| `{entry['scenario']}` | {entry.get('backbone', '–')} | {cell(said)} | {cell(entry['source'])} |"
        )
    return ["\n".join(rows)] if len(rows) > 2 else ["No published recipe; the defaults are used everywhere."]


def cost(rows: list[Any]) -> list[str]:
    """What the committed runs took."""
    if not rows:
        return ["Not measured yet: no run of it is committed. `--dry-run` estimates time, memory and disk."]
    lines = ["| scenario | backbone | parameters | kept besides the network | ms per step |", "|---|---|---|---|---|"]
    for row in rows:
        first = row.summaries[0]
        steps = [s["times"]["train_s"] / s["steps"] for s in row.summaries if s["steps"]]
        kept = sum(first["memory_bytes"].values())
        taken = f"{1000 * median(steps):.1f}" if steps else "–"
        lines.append(
            f"| {row.scenario} | {row.backbone} | {first['num_parameters']:,} | {kept / 2**20:.2f} MiB | {taken} |"
        )
    return [
        "\n".join(lines),
        "Wall-clock on two shared CPU cores, other jobs running: an order of magnitude, not a speed claim.",
    ]


# -- scenarios ----------------------------------------------------------------------------------------------------
def scenario_page(preset: Preset) -> str:
    """The page of one scenario."""
    title, idea, body, differs = parts(preset.module.__doc__ or "")
    rows = [row for row in measured() if row.scenario == preset.id]
    lines = [f"# {preset.name}", "", f"{preset.title}. Version {preset.version}; data: {', '.join(preset.datasets)}."]
    if preset.family:
        lines += ["", f"Protocol family {preset.family}: {FAMILIES[preset.family].title}."]
    table = ["| parameter | value | meaning |", "|---|---|---|"]
    for item in preset.param_table():
        table.append(f"| `{item['name']}` | `{cell(str(item['value']))}` | {cell(item['help'])} |")
    values = ", ".join(f"{key} = {value}" for key, value in vars(preset.defaults).items() if value not in (None, ""))
    run = f"```\nclbench show {preset.name}\nclbench run --method er --scenario {preset.name} --dry-run\n```"
    lines += ["", *section("Idea", idea or [title])]
    lines += section("What we implement", [*body, "Parameters (`--scenario-set name=value`):", "\n".join(table)])
    lines += section("Recipe", [run, f"Source: {preset.source}.", f"Stream: {values}."])
    ours = list(results_rows(rows, "method")) if rows else []
    published = list(published_rows(scenario=preset.name))
    lines += section("Our numbers against published ones", numbers(ours, published))
    lines += section("Differences from official code", [*differs, FAMILY_PAGE])
    return "\n".join([*lines, *section("Cost", statistics(preset.id))])


def statistics(scenario_id: str) -> list[str]:
    """Sizes and leaks, as far as the data were there when they were counted."""
    found = json.loads(STATISTICS.read_text()).get(scenario_id)
    build = "Building the tables takes milliseconds: [measured](../results/benchmarks.md)."
    if found is None:
        return ["Sizes were not counted: the data were not at hand.", build]
    rows = f"{sum(found['train']):,} training and {sum(found['test']):,} test rows"
    twice = f"duplicate training rows {found['duplicates']}, images with two labels {found['label_conflicts']}"
    return [f"{len(found['train'])} tasks, {rows}; {twice}, test images also trained on {found['shared_test']}.", build]


# -- both ---------------------------------------------------------------------------------------------------------
def numbers(ours: list[str], published: list[str]) -> list[str]:
    """Both tables, in percent."""
    said = [OURS, "\n".join(ours)] if ours else ["No run of it is committed yet."]
    if not published:
        return [*said, "No published number is on record."]
    return [*said, PUBLISHED, "\n".join(published)]


def section(heading: str, paragraphs: list[str]) -> Iterator[str]:
    yield from (f"## {heading}", "")
    for paragraph in paragraphs:
        yield from (paragraph, "")


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def methods_index() -> str:
    rows = [
        f"| [{entry['id']}]({entry['id']}.md) | {cell(entry['title'])} | {', '.join(entry['settings'])} |"
        for entry in list_methods()
    ]
    return "\n".join(["# Methods", "", "| id | what | settings |", "|---|---|---|", *rows, ""])


def scenarios_index() -> str:
    rows = [
        f"| [{entry['id']}]({entry['id'].partition('@')[0]}.md) | {cell(entry['title'])} |"
        for entry in list_scenarios()
    ]
    return "\n".join(["# All scenarios", "", "| id | what |", "|---|---|", *rows, ""])


def presets() -> list[Preset]:
    return [find_scenario(entry["id"]) for entry in list_scenarios()]
