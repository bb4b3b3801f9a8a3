"""mkdocs hooks: add the pages that are made from code and results, and mend links that lead out of docs/."""

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))
import pages

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
GUIDES = ("add-a-method", "add-a-scenario", "stability-gap", "protocol", "cluster", "reports", "interop")


def generated() -> dict[str, str]:
    """Path below docs/ -> Markdown."""
    out = {"methods/index.md": pages.methods_index(), "scenarios/index.md": pages.scenarios_index()}
    out |= {f"methods/{entry['id']}.md": pages.method_page(entry) for entry in pages.list_methods()}
    out |= {f"scenarios/{preset.name}.md": pages.scenario_page(preset) for preset in pages.presets()}
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        texts = [folder / "README.md", *sorted(p for p in folder.glob("*.md") if p.name != "README.md")]
        found = [path.read_text(encoding="utf-8") for path in texts if path.is_file()]
        if found and folder.name != "leaderboard":
            out[f"results/{folder.name}.md"] = "\n\n".join(found)
    out["index.md"] = (ROOT / "README.md").read_text(encoding="utf-8")
    out["changelog.md"] = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    out["contributing.md"] = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return {path: outward(path, text) for path, text in out.items()}


def outward(path: str, text: str) -> str:
    """Links of files that stand elsewhere in the repository: to their pages where they have one, else plain text."""

    def mend(match: re.Match[str]) -> str:
        said, target = match[1], match[2]
        if re.match(r"[a-z]+:|#", target) or path.startswith(("methods/", "scenarios/")):
            return match[0]
        up = "" if "/" not in path else "../"
        if page := re.match(r"(?:\.\./)*docs/(.*)", target):
            return f"[{said}]({up}{page[1]})"
        if page := re.match(r"(?:\.\./)*results/([a-z_]+)/[\w.]*$", target):
            return f"[{said}]({up}results/{page[1]}.md)"
        if path.startswith("results/") and (page := re.match(r"\.\./([a-z_]+)/", target)):
            return f"[{said}]({page[1]}.md)"
        if target in ("CHANGELOG.md", "CONTRIBUTING.md"):
            return f"[{said}]({target.lower()})"
        if target.endswith((".png", ".svg")):
            return match[0]
        return said

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", mend, text)


def on_config(config: Any) -> Any:
    methods = [f"methods/{entry['id']}.md" for entry in pages.list_methods()]
    scenarios = [f"scenarios/{preset.name}.md" for preset in pages.presets()]
    results = [f"results/{path.parent.name}.md" for path in sorted(RESULTS.glob("*/README.md"))]
    results += ["results/benchmarks.md"] if "results/benchmarks.md" not in results else []
    config.nav = [
        {"Start": ["index.md", "quickstart.md", "command-line.md", "data.md"]},
        {"Guides": [f"{name}.md" for name in GUIDES]},
        {"Methods": ["methods/index.md", *methods]},
        {"Scenarios": ["scenarios.md", "scenarios/index.md", *scenarios]},
        {"Results": results},
        {"About": ["architecture.md", "changelog.md", "contributing.md"]},
    ]  # fmt: skip
    return config


def on_files(files: Files, config: Any) -> Files:
    for path, text in generated().items():
        files.append(File.generated(config, path, content=text))
    for picture in sorted(RESULTS.glob("*/*.png")) + sorted(RESULTS.glob("*/*.svg")):
        files.append(File.generated(config, f"results/{picture.name}", abs_src_path=str(picture)))
    board = RESULTS / "leaderboard" / "index.html"
    if board.is_file():
        files.append(File.generated(config, "leaderboard/index.html", abs_src_path=str(board)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Hand-written pages link to results/ and to files of the repository."""
    if page.file.generated_by:
        return markdown
    markdown = markdown.replace("](../results/leaderboard/index.html)", "](leaderboard/index.html)")
    return re.sub(r"\]\(\.\./results/([a-z_]+)/[\w.]*\)", r"](results/\1.md)", markdown)
