"""Every import points to a strictly lower floor, and the torch-free wing never imports torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "soloist"

# Floor of each part. Those of the torch-free wing are marked; the floors are drawn in docs/architecture.md.
FLOORS = {
    "errors": 0,
    "timing": 1,
    "specs": 1,
    "kernels": 2,
    "placement": 2,
    "transport": 3,
    "planner": 3,
    "scheduling": 3,
    "dispatch": 4,
    "simulator": 4,
    "frontend": 4,
    "launchers": 4,
    "moe": 5,
    "models": 6,
    "engine": 7,
    "probes": 7,
    "server": 8,
    "doctor": 8,
    "bench": 9,
    "cli": 10,
    "__main__": 11,
}
TORCH_FREE = ("errors", "specs", "placement", "planner", "scheduling", "simulator", "frontend", "launchers", "server")


def part_of(module: str) -> str:
    """`soloist.specs.model` → `specs`."""
    return module.split(".")[1] if "." in module else ""


def imports_of(path: Path) -> set[str]:
    """Absolute names of everything that a file imports, wherever it stands in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write absolute imports"
            found.add(node.module or "")
    return found


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    own = path.relative_to(SOURCE).with_suffix("").parts[0]
    if own == "__init__":
        return
    for module in imports_of(path):
        if module.startswith("soloist.") and part_of(module) != own:
            assert FLOORS[part_of(module)] < FLOORS[own], f"{own} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_torch_free_wing_names_no_torch(path: Path) -> None:
    if path.relative_to(SOURCE).with_suffix("").parts[0] in TORCH_FREE:
        assert not {m for m in imports_of(path) if m.split(".")[0] == "torch"}


def test_torch_free_wing_loads_no_torch() -> None:
    modules = [
        ".".join(("soloist", *path.relative_to(SOURCE).with_suffix("").parts))
        for path in FILES
        if path.relative_to(SOURCE).with_suffix("").parts[0] in TORCH_FREE and path.name not in ("__main__.py",)
    ]
    modules = [module.removesuffix(".__init__") for module in modules]
    code = f"import sys\nfor m in {modules!r}: __import__(m)\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
