"""The package as a whole: it starts light, and its rooms import only rooms above them."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import gptfl_dist

PACKAGE = Path(gptfl_dist.__file__).parent
# Ground floor first (CONTRIBUTING.md): a room imports itself and rooms that stand before it.
ROOMS = (
    "errors",
    "files",
    "lock",
    "config",
    "audio",
    "weights",
    "synthesis",
    "learning",
    "aggregation",
    "federation",
    "ledger",
    "security",
    "exchange",
    "launch",
    "observe",
    "run",
    "cli",
    "testing",
)
HEAVY = ("torch", "grpc", "diffusers", "transformers", "mpi4py")
NEVER = {
    "errors": {*HEAVY, "yaml", "pydantic"},
    "config": {*HEAVY, "numpy", "datasets"},
    "audio": {*HEAVY},
    "federation": {*HEAVY, "socket", "sqlite3"},
    "learning": {"grpc", "mpi4py"},
    "synthesis": {"grpc", "mpi4py"},
    "weights": {"grpc", "mpi4py"},
    "aggregation": {"grpc", "mpi4py"},
    "ledger": {"grpc", "mpi4py"},
    "security": {"torch"},
}
READS_AND_WRITES = {"open", "read_text", "read_bytes", "write_text", "write_bytes", "mkdir", "unlink"}


def modules(room: str) -> list[Path]:
    single = PACKAGE / f"{room}.py"
    return [single] if single.exists() else sorted(p for p in (PACKAGE / room).rglob("*.py") if "_pb2" not in p.name)


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """The line and full name of every import of a module, also those inside functions."""
    inside = file.relative_to(PACKAGE.parent).with_suffix("").parts
    for node in ast.walk(ast.parse(file.read_text(), filename=str(file))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(inside[: len(inside) - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            # `from gptfl_dist import x` imports the room x.
            whole = module == "gptfl_dist"
            yield from ((node.lineno, f"{module}.{alias.name}" if whole else module) for alias in node.names)


def test_every_module_stands_in_a_room() -> None:
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert found - {"__init__", "__main__"} <= set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_rooms_above_it(room: str) -> None:
    allowed = {*ROOMS[: ROOMS.index(room) + 1], "__version__"}
    wrong = [
        f"{file.relative_to(PACKAGE.parent)}:{line} imports {name}"
        for file in modules(room)
        for line, name in imports(file)
        if name.startswith("gptfl_dist.") and name.split(".")[1] not in allowed
    ]
    assert wrong == []


@pytest.mark.parametrize("room", NEVER)
def test_a_room_does_not_know_what_it_must_not(room: str) -> None:
    wrong = [
        f"{file.relative_to(PACKAGE.parent)}:{line} imports {name}"
        for file in modules(room)
        for line, name in imports(file)
        if name.split(".")[0] in NEVER[room]
    ]
    assert wrong == []


def test_the_state_machines_touch_no_file() -> None:
    wrong = []
    for file in modules("federation"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                if name in READS_AND_WRITES:
                    wrong.append(f"{file.name}:{node.lineno} calls {name}")
    assert wrong == []


def loaded_after(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter after `code`, which may end by SystemExit(0)."""
    program = f"""
import atexit, sys
sys.argv = ["gptfl", "--help"]
atexit.register(lambda: print("LOADED", *sorted({{name.split(".")[0] for name in sys.modules}})))
{code}
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=PACKAGE.parent
    )
    assert run.returncode == 0, run.stderr
    return set(run.stdout.splitlines()[-1].removeprefix("LOADED ").split())


@pytest.mark.parametrize(
    "code",
    [
        "import gptfl_dist",
        "import gptfl_dist.config, gptfl_dist.errors",
        "from gptfl_dist.cli.main import main; main()",
        "import gptfl_dist.run.status, gptfl_dist.run.operate, gptfl_dist.run.export",
    ],
)
def test_it_starts_without_the_heavy_libraries(code: str) -> None:
    assert loaded_after(code) & {*HEAVY, "matplotlib", "datasets", "pandas"} == set()
