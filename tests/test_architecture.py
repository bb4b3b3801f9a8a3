"""The one picture of docs/architecture.md, held true: imports go one way, and the engine needs few packages."""

import ast
import sys
from pathlib import Path

import clbench

ROOT = Path(clbench.__file__).parent
ORDER = [
    "errors", "atomic", "rng", "params", "data", "scenarios", "stream", "backbones", "memory", "methods", "evaluator",
    "metrics", "store", "learner", "report", "interop", "pretrain", "tracking", "protocol", "doctor", "api", "cli",
]  # fmt: skip
ENGINE = {
    "torch", "numpy", "pandas", "pyarrow", "timm", "pydantic", "PIL", "safetensors",
    # lazily, inside one function each: the digits, the download of standard files, the exchange with Avalanche
    "sklearn", "torchvision", "huggingface_hub", "scipy", "avalanche",
    "open_clip",  # lazily: CLIP models
    "triton",  # comes with torch on GPU machines; clbench.evaluator.kernels alone, which nothing imports on a CPU
}  # fmt: skip
SHOWN = {"report", "pretrain", "tracking", "protocol", "doctor", "api", "cli"}


def imports(path: Path) -> list[tuple[str, bool]]:
    """Modules a file imports, and whether it does so as it is imported itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)
    }
    typing_only = {
        id(n)
        for i in ast.walk(tree)
        if isinstance(i, ast.If) and "TYPE_CHECKING" in ast.unparse(i.test)
        for n in ast.walk(i)
    }
    out = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            if node.module == "clbench":
                names = [f"clbench.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        if id(node) not in typing_only:
            out += [(name, id(node) not in inside) for name in names]
    return out


def layer(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def files() -> list[Path]:
    return [p for p in sorted(ROOT.rglob("*.py")) if p.name not in ("__init__.py", "__main__.py") or p.parent != ROOT]


def test_every_layer_is_in_the_picture() -> None:
    found = {p.relative_to(ROOT).parts[0].removesuffix(".py") for p in files()}
    assert found <= set(ORDER), f"not in the order of layers: {sorted(found - set(ORDER))}"


def test_imports_go_one_way() -> None:
    wrong = []
    for path in files():
        own = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for module, _ in imports(path):
            other = layer(module)
            if module.startswith("clbench.") and other in ORDER and ORDER.index(other) > ORDER.index(own):
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong, wrong


def test_engine_needs_few_packages() -> None:
    wrong = []
    for path in files():
        if path.relative_to(ROOT).parts[0].removesuffix(".py") in SHOWN:
            continue
        for module, _ in imports(path):
            top = module.split(".")[0]
            if top not in ENGINE | set(sys.stdlib_module_names) | {"clbench"}:
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong, wrong


def test_heavy_packages_are_imported_late() -> None:
    heavy = {"torchvision", "sklearn", "matplotlib", "mlflow", "huggingface_hub", "rich", "avalanche"}
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in files()
        for module, at_import in imports(path)
        if at_import and module.split(".")[0] in heavy and path.relative_to(ROOT).parts[0] not in SHOWN
    ]
    assert not wrong, wrong
