"""The architecture, enforced: who may import whom, how long a file may be, what an import may need."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("hstu_compile", "passes", "ops", "bench", "tests")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))  # rglob follows no links
MAX_LINES = 500

# From -> to what it may import, by layer. A layer always sees itself.
MAY_IMPORT = {
    "backend": {"passes", "ops"},
    "passes": {"ops"},
    "ops": {"kernels"},
    "kernels": {"triton"},
    "bench": {"backend", "passes", "ops", "kernels", "triton"},
    "tests": {"backend", "passes", "ops", "kernels", "triton", "bench"},
}


def layer_of_module(name: str) -> str | None:
    """The layer that a dotted import name belongs to; None for what is not ours (triton is a layer of its own)."""
    parts = name.split(".")
    if parts[0] in ("triton", "bench", "tests"):
        return parts[0]
    if parts[:3] == ["hstu_compile", "ops", "kernels"]:
        return "kernels"
    if parts[0] == "hstu_compile":
        return parts[1] if parts[1:] and parts[1] in ("ops", "passes") else "backend"
    return None


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] in ("ops", "passes"):
        parts = ("hstu_compile", *parts)
    return ".".join(parts)


def imports(path: Path) -> Iterator[tuple[str, int, bool]]:
    """Every module that a file imports: (dotted name, line, whether at import time rather than inside a function)."""

    def walk(node: ast.AST, at_import: bool) -> Iterator[tuple[str, int, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield alias.name, child.lineno, at_import
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    parents = module_name(path).split(".")
                    keep = len(parents) - child.level + (path.name == "__init__.py" and 1)
                    base = ".".join([*parents[:keep], base]).rstrip(".")
                for alias in child.names:  # `from hstu_compile.ops import kernels` imports hstu_compile.ops.kernels
                    yield f"{base}.{alias.name}", child.lineno, at_import
            inside_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from walk(child, at_import and not inside_function)

    yield from walk(ast.parse(path.read_text(), str(path)), True)


def violations(path: Path) -> list[str]:
    own = layer_of_module(module_name(path))
    assert own is not None
    found = []
    for name, line, at_import in imports(path):
        target = layer_of_module(name)
        where = f"{path.relative_to(ROOT)}:{line}: {own} imports {name}"
        if target is None or target == own:
            continue
        if target not in MAY_IMPORT[own]:
            found.append(where)
        elif own == "ops" and target == "kernels" and at_import:
            found.append(f"{where} at import time; kernels are imported at the first launch")
    return found


def test_layers_import_only_downwards() -> None:
    assert not [line for path in SOURCES for line in violations(path)]


def test_the_walk_sees_the_code() -> None:
    """Guards the guard: every layer has files, and known imports are found."""
    layers = {layer_of_module(module_name(path)) for path in SOURCES}
    assert layers == {"backend", "passes", "ops", "kernels", "bench", "tests"}
    assert "pathlib.Path" in [name for name, _, _ in imports(Path(__file__).resolve())]


@pytest.mark.parametrize(
    "path, code",
    [
        ("passes/new.py", "from hstu_compile.ops.kernels import anything"),
        ("passes/new.py", "def f():\n    import triton.language as tl"),
        ("ops/new.py", "from hstu_compile.ops import kernels"),
        ("ops/new.py", "from hstu_compile.passes.report import Region"),
        ("ops/new.py", "from .kernels.silu import silu"),
        ("ops/kernels/new.py", "from hstu_compile.ops.kernel_table import x"),
        ("ops/kernels/new.py", "from ..kernel_table import x"),
        ("hstu_compile/new.py", "import triton"),
        ("hstu_compile/new.py", "from tests.error_budget import assert_within_budget"),
        ("bench/new.py", "import tests.error_budget"),
    ],
)
def test_a_wrong_import_is_found(path: str, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self: code)
    assert violations(ROOT / path)


def test_files_are_short() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}
    assert not {path: n for path, n in lengths.items() if n > MAX_LINES}


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PYTHONPATH": ".", "PATH": "", **env},
        capture_output=True,
        text=True,
    )


def test_import_without_triton_and_gpu() -> None:
    """A machine that has no triton at all: no import of it succeeds, ours or torch's."""
    result = run_python(
        """
import sys

class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoTriton())
import hstu_compile, torch
assert callable(hstu_compile.backend) and callable(hstu_compile.explain)
assert torch.ops.hstu_compile.hstu_attention.default is not None
assert "triton" not in sys.modules
assert not [name for name in sys.modules if name.startswith("hstu_compile.ops.kernels.")]
""",
        CUDA_VISIBLE_DEVICES="",
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", ["ops", "passes"])
def test_bare_names_do_not_import(name: str) -> None:
    result = run_python(f"import {name}")
    assert "ImportError" in result.stderr and f"hstu_compile.{name}" in result.stderr
