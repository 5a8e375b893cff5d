"""What the command line prints, whole: help, tables, summaries and errors, as files to be read in tests/golden/cli.

Measured figures are masked (kernels differ between processors, and so do ties), so that the layout and every word are held. Delete a
file to write it anew from what is printed today.
"""

import io
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from rich.console import Console

from tests import zoo
from tests.test_comparison import row
from toolchain import runtime, study, terminal
from toolchain.cli import main

pytestmark = pytest.mark.skipif(int(metadata.version("rich").split(".")[0]) < 14, reason="rich before 14 lays the same words out otherwise")
GOLDEN = Path(__file__).parent / "golden" / "cli"
COMMANDS = ("quantize", "validate", "report", "inspect", "diagnose", "allocate", "equalize", "diff", "export", "check", "compare", "study")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, samples labelled by the float model itself, and a quantized file."""
    folder = tmp_path_factory.mktemp("golden")
    onnx.save(zoo.tiny_resnet(), folder / "net.onnx")
    x = zoo.images(64).inputs["x"]
    scores = next(iter(runtime.run(runtime.session(folder / "net.onnx"), {"x": x}).values()))
    np.savez(folder / "data.npz", x=x, labels=scores.argmax(1))
    printed(folder, "quantize net.onnx -p w3a4 --algorithm mse --calibration-data data.npz -q -o net.w3a4.onnx")
    return folder


def printed(place: Path, line: str, columns: int = 80) -> str:
    """A command as it is typed in the folder, what it prints (progress left out), and its exit code where it failed."""
    words = [str(place / word) if word.endswith((".onnx", ".npz", ".json")) else word for word in line.split()]
    if words[0] in ("quantize", "compare") and "-h" not in words:
        words += ["--device", "cpu"]
    result = CliRunner().invoke(main, words, prog_name="mrecg-onnx", env={"COLUMNS": str(columns), "NO_COLOR": "1"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    shown = result.output if result.exit_code else result.stdout
    lines = [f"$ mrecg-onnx {line}", *(text.rstrip() for text in shown.replace(f"{place}/", "").splitlines())]
    return "\n".join([*lines, *([f"exit code {result.exit_code}"] if result.exit_code else [])]) + "\n"


def masked(text: str) -> str:
    """Digits of measured figures as #, and the words that follow from them as one."""
    found = re.compile(r"(?<![\w.])[+-]?\d+\.\d+(e[+-]?\d+)?|(?<![\w.])\d+(?= (%|(s|ms|min|MB|kB|step|integer kernels)\b))")
    text = re.sub(r"(fast|slow)er|(?<=\d )steps\b", lambda m: "step" if m[0] == "steps" else "faster", text)
    lines = text.splitlines()
    return "\n".join([lines[0], *(found.sub(lambda m: re.sub(r"[0-9]+", "#", m[0]).replace("-", "+"), line) for line in lines[1:])]) + "\n"


def check(name: str, text: str) -> None:
    """Hold a text against its file."""
    golden = GOLDEN / f"{name}.txt"
    if not golden.exists():
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(text, encoding="utf-8")
        pytest.fail(f"{golden.name} was written anew; read it and run again")
    assert text == golden.read_text(encoding="utf-8")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help(command: str, place: Path) -> None:
    text = printed(place, f"{command} -h".strip())
    if command:
        text = text.partition("\n  Exit codes:")[0]  # the same everywhere
    if command in ("compare", "study", "validate"):
        text = text.partition("\nPrecision:")[0].partition("\nData:")[0]  # from here on as in `quantize`
    check(f"help_{command or 'all'}", text)


def test_inspect(place: Path) -> None:
    check("inspect", printed(place, "inspect net.onnx") + printed(place, "inspect net.onnx", columns=60))


def test_quantize(place: Path) -> None:
    """At two bits the verdict is beyond doubt."""
    line = "quantize net.onnx -p w2a2 --algorithm mse --calibration-data data.npz --eval-data data.npz --no-sensitivity -o out.onnx"
    check("quantize", masked(printed(place, line)))


def test_diagnose(place: Path) -> None:
    line = "diagnose net.onnx net.w3a4.onnx --data data.npz"
    check("diagnose", masked(printed(place, line)) + masked(printed(place, f"{line} --try 2", columns=60)))


def test_compare(place: Path) -> None:
    line = "compare net.onnx --calibration-data data.npz --eval-data data.npz --methods minmax,mse --seeds 0,1 -o results.json"
    check("compare", masked(printed(place, line)) + masked(printed(place, line, columns=60)))  # the second is drawn from the file


def test_study() -> None:
    """The verdicts on runs that were made up: a claim that holds, one that does not, and one that cannot be decided."""
    rough = [1.0, 3.0, 2.0, 4.0]
    joined = ["b00", "b01+b02", "b03"]
    rows = [row("adaround", rough), row("brecq", [1.0, 3.0, 2.0, 1.0])]
    rows.append(row("mrecg+brecq", [1.0, 1.5, 1.0], units=joined, learned_units=joined, blocks=["b00", "b01", "b02", "b03"]))
    rows += [row(f"scheme {i}", [1.0, 2.0 + i / 9, 2.0 - i / 9], "schemes", top1=80.0 + (i * 7 % 10) / 10) for i in range(10)]
    sized: list[Mapping[str, Any]] = [
        row("batch", [1.0], "batch", top1=top1, settings={"batch-size": size}) for size, top1 in ((8, 80.0), (128, 84.0))
    ]
    sized += [row("samples", [1.0], "samples", top1=top1, calibration_samples=count) for count, top1 in ((64, 80.0), (512, 80.1))]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(terminal.study_findings(study.findings(list(study.CLAIMS), [*rows, *sized])))
    check("study", "\n".join(line.rstrip() for line in console.export_text().splitlines()) + "\n")


ERRORS = (
    "quantize none.onnx --calibration-data data.npz",
    "quantize net.onnx",
    "quantize net.onnx --calibration-data none.npz",
    "quantize net.onnx --calibration-data data.npz -p w1a4",
    "quantize net.onnx --calibration-data data.npz --algorithm qdropp",
    "quantize net.onnx --calibration-data data.npz --keep-float Convv",
    "quantize net.onnx --calibration-data data.npz -o net.w3a4.onnx",
    "quantize data.npz --calibration-data data.npz",
    "validate net.onnx net.w3a4.onnx",
    "inspect net.onnx --input-shape y:3x8x8",
    "inspect net.onnx --format pdf",
    "diagnose net.onnx net.w3a4.onnx",
    "diagnose net.onnx net.onnx --data data.npz",
    "diff net.onnx net.onnx",
    "check net.w3a4.onnx --target tensorrtt",
    "compare net.onnx --calibration-data data.npz --eval-data data.npz --methods brecqq -o results.json",
    "study net.onnx --calibration-data data.npz --eval-data data.npz --claims accurcy -o results.json",
    "report none.json",
)


def test_errors(place: Path) -> None:
    """Each says what, where and what next, in words, with its exit code."""
    check("errors", "\n".join(printed(place, line) for line in ERRORS))
