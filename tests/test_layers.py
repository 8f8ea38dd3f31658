"""A file imports from its own package and from lower ones, and no import goes in a circle."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = [
    *(f"lance_ref.{name}" for name in ("io", "engine", "algebra", "stores", "functional", "fused", "nn", "optim")),
    *(f"lance_ref.{name}" for name in ("datasets", "models", "convert", "train")),
    *(f"lance_ref.{name}" for name in ["lance", "device", "continual", "conformance"]), "lance_ref",
    *(f"analysis.{name}" for name in ("commands", "rules", "onnx", "peak", "steps", "ranks", "torch_modules")),
    *(f"analysis.{name}" for name in ("reports", "check")),
    "analysis.device", "analysis.planner", "analysis",
    "experiments",
]  # fmt: skip
"""From the lowest to the highest; files that lie in no package of these stand at their root's place."""


def modules(root: Path) -> dict[str, Path]:
    files = [path for top in ("lance_ref", "analysis", "experiments") for path in sorted((root / top).rglob("*.py"))]
    return {".".join(p.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): p for p in files}


def imports(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules of ours that a file imports anywhere in it: in functions and for type checkers too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from {name if name in known else node.module for name in names} & set(known)


def layer(module: str) -> int:
    return next(i for n in (2, 1) if (i := place(".".join(module.split(".")[:n]))) >= 0)


def place(name: str) -> int:
    return LAYERS.index(name) if name in LAYERS else -1


def wrong(root: Path) -> list[str]:
    """Imports from a higher layer, and circles."""
    known = modules(root)
    graph = {name: set(imports(path, known)) - {name} for name, path in known.items()}
    found = [f"{a} -> {b}" for a in graph for b in graph[a] if layer(b) > layer(a)]
    while leaves := [name for name, needs in graph.items() if not needs & set(graph)]:
        for name in leaves:
            del graph[name]
    return found + [f"in a circle: {name}" for name in graph if any(name in graph[other] for other in graph)]


def test_imports_go_down_and_never_in_a_circle() -> None:
    assert wrong(ROOT) == []


@pytest.mark.parametrize("planted", ["import lance_ref.continual", "def f():\n    from lance_ref.nn import module"])
def test_a_planted_upward_import_is_found(tmp_path: Path, planted: str) -> None:
    for name, text in (("engine/tensor", planted), ("nn/module", ""), ("continual/__init__", "")):
        path = tmp_path / "lance_ref" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert len(wrong(tmp_path)) == 1


def test_old_import_paths_give_the_same_modules() -> None:
    from analysis import moved as of_analysis
    from lance_ref import moved as of_library

    for old, new in {**of_library.MOVED, **of_analysis.MOVED}.items():
        assert importlib.import_module(old) is importlib.import_module(new), old
        assert importlib.import_module(new).__spec__.name == new


def test_old_commands_still_run() -> None:
    done = subprocess.run([sys.executable, "-m", "analysis.explain", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout
