"""The rules that keep the rooms apart, held against the source text, and the start-up time they buy."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted([*(ROOT / "toolchain").rglob("*.py"), *(ROOT / "exporters").rglob("*.py")])


def imports(path: Path) -> Iterator[str]:
    """Absolute names of the modules that a file imports."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def importers(name: str) -> set[str]:
    """Files that import a package or a module of it."""
    return {str(path.relative_to(ROOT)) for path in FILES if any(i == name or i.startswith(f"{name}.") for i in imports(path))}


def test_each_library_has_its_room() -> None:
    commands = {str(path.relative_to(ROOT)) for path in (ROOT / "toolchain" / "commands").glob("*.py")}
    assert importers("click") <= {"toolchain/cli.py", *commands}
    assert importers("onnxruntime") == {"toolchain/runtime.py"}
    assert importers("onnx2torch") == {"toolchain/torch_import/fallback.py"}
    assert {path for path in importers("exporters") if path.startswith("toolchain")} <= commands
    assert importers("PIL") == {"toolchain/samples.py"}
    assert importers("rich") <= {"toolchain/terminal.py", *commands}
    assert importers("matplotlib") == {"toolchain/figures.py", "toolchain/plot.py"}


def test_exporters_know_only_tables_and_errors() -> None:
    for path in (ROOT / "exporters").rglob("*.py"):
        for name in imports(path):
            if name.startswith("toolchain"):
                assert name.split(".")[1] in ("copies", "errors", "graph", "large", "quant_table", "repeats", "scheme")
            assert not name.startswith("torch")


@pytest.mark.parametrize("leaf", ["errors", "quant_table", "graph", "scheme", "capacity", "intervals", "wording"])
def test_leaves_import_nothing_of_the_project(leaf: str) -> None:
    names = list(imports(ROOT / "toolchain" / f"{leaf}.py"))
    assert not [name for name in names if name.startswith("toolchain")]
    assert not [name for name in names if name.split(".")[0] in ("torch", "onnx")]


def test_configuration_needs_no_torch() -> None:
    reachable, queue = set(), ["toolchain.config"]
    while queue:
        name = queue.pop()
        path = ROOT / Path(*name.split(".")).with_suffix(".py")
        if name in reachable or not path.is_file():
            continue
        reachable.add(name)
        assert "torch" not in {i.split(".")[0] for i in imports(path)}
        queue += [i for i in imports(path) if i.startswith("toolchain.")]


def test_no_catch_all_modules() -> None:
    assert not {path.stem for path in FILES} & {"utils", "util", "common", "helpers", "misc"}


def test_help_loads_no_torch() -> None:
    code = (
        "import sys; from toolchain.cli import main\n"
        "try:\n    main(['quantize', '--help'])\nexcept SystemExit: pass\n"
        "print('LOADED', [m for m in ('torch', 'onnx', 'onnxruntime') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "--calibration-data" in out
    assert "LOADED []" in out
