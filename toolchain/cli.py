"""The command line: parse, call, show, exit code. Everything heavy is imported inside the commands, so that `--help` is immediate."""

import dataclasses
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import click
from rich.console import Console
from rich.markup import escape

from . import __version__
from .config import Config, DataConfig, dump_config, flag, load_config, parse_precision, split
from .errors import AccuracyGateError, ExportError, MrecgError, TargetRuleError, UsageError, near_misses
from .scheme import TARGETS

if TYPE_CHECKING:
    from .quant_table import QuantTable
    from .run_folder import RunFolder
    from .samples import Samples
    from .source import SourceModel
    from .validation import ValidationReport

EXIT_CODES = """\b
Exit codes: 0 done, 2 usage, 3 unsupported model, 4 bad data, 5 failed export or parity,
6 accuracy drop above --max-drop (the model is written), 7 broken installation, 8 run folder cannot be written (full disk),
9 rules of a target broken (`check`), 130 interrupted, 143 terminated."""
_EXACTNESS_SAMPLES = 4  # every value of the network is held for them
_FILE_COLUMNS = 120  # of a table that is written to a file
_MOST_LAYERS = 15  # in the table of `diagnose`
_SENSITIVITY_SHARE = 0.1  # of the time that the run took before
_SECTIONS = {
    "precision": "Precision",
    "method": "Method",
    "data": "Data",
    "images": "Image folders",
    "calibration": "Calibration",
    "units": "Units (MRECG)",
    "reconstruction": "Reconstruction",
}
_PATH = click.Path(path_type=Path)


class _SectionedCommand(click.Command):
    """Groups the options of `--help` under the sections that the configuration fields name."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        grouped: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                grouped.setdefault(getattr(parameter, "section", "Options"), []).append(record)
        for title in ("Options", *_SECTIONS.values()):
            if title in grouped:
                with formatter.section(title):
                    formatter.write_dl(grouped[title])


class _Option(click.Option):
    def __init__(self, *args: Any, section: str = "Options", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


def _completing(choices: Iterable[Any] | None) -> Callable[[click.Context, click.Parameter, str], list[str]] | None:
    """What the shell offers for an option: its choices; None leaves it to the option's type (paths, numbers)."""
    known = [str(choice) for choice in choices or ()]
    return (lambda context, parameter, incomplete: [word for word in known if word.startswith(incomplete)]) if known else None


def _config_options(*halves: type, only: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """One option for each field of the configuration classes, or of one section; None means that the flag was not given."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for half in reversed(halves):
            hints = get_type_hints(half)
            for spec in reversed([spec for spec in dataclasses.fields(half) if only in (None, spec.metadata["section"])]):
                kinds = [kind for kind in (get_args(hints[spec.name]) or (hints[spec.name],)) if kind is not type(None)]
                choices = spec.metadata.get("choices")
                text = spec.metadata["help"]
                if spec.default not in (None, ()):
                    shown = ("off", "on")[spec.default] if isinstance(spec.default, bool) else spec.default
                    text += f"  [default: {shown}]"
                common: dict[str, Any] = {
                    "shell_complete": _completing(choices),
                    "default": None,
                    "help": text,
                    "section": _SECTIONS[spec.metadata["section"]],
                    "cls": _Option,
                }
                name = flag(spec.name)
                if hints[spec.name] == tuple[str, ...]:
                    command = click.option(name, spec.name, multiple=True, metavar="TEXT", **common)(command)
                elif kinds == [bool]:
                    command = click.option(f"{name}/--no-{name[2:]}", spec.name, **common)(command)
                else:
                    metavar = "|".join(map(str, choices)) if choices else None
                    command = click.option(name, spec.name, type=kinds[0], metavar=metavar, **common)(command)
        return command

    return decorate


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}, epilog=EXIT_CODES)
@click.version_option(__version__, prog_name="mrecg-onnx")
def main() -> None:
    """Low-bit post-training quantization of ONNX models with MRECG block reconstruction, validated under ONNX Runtime.

    \b
    A first run:
      mrecg-onnx inspect net.onnx                       what is in the model, without data
      mrecg-onnx quantize net.onnx -p w4a8 --preset fast \\
          --calibration-data calib.npz --eval-data eval.npz
    and then open net.w4a8.report/report.html.

    \b
    Results go to standard output, progress and errors to standard error. NO_COLOR is honoured.
    Completion of commands and options, here for bash (zsh_source and fish_source exist too):
      eval "$(_MRECG_ONNX_COMPLETE=bash_source mrecg-onnx)"
    """


@main.command(cls=_SectionedCommand, epilog=EXIT_CODES)
@click.argument("model", type=_PATH)
@click.option("-o", "--output", type=_PATH, help="The quantized model. Default: NAME.w4a4.onnx beside MODEL, after its precision.")
@click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")
@click.option(
    "-p", "--precision", metavar="W4A4", help="Shorthand for --weight-bits and --activation-bits: w4a4, w3a3, w2a4, w4a8, w8a8, w4a16 ..."
)
@click.option(
    "--report", type=_PATH, metavar="DIR", help="Folder of report.json and report.html. Default: OUTPUT without .onnx, plus .report."
)
@click.option(
    "--sensitivity/--no-sensitivity",
    default=None,
    help="Measure how much each layer hurts. Default: where it takes less than a tenth of the run.",
)
@click.option("--config", "config_file", type=_PATH, metavar="FILE", help="TOML file with these options by name; flags win over it.")
@click.option("--save-config", type=_PATH, metavar="FILE", help="Write the resolved options as TOML.")
@click.option("--resume", is_flag=True, help="Continue an interrupted run of the same output where it stopped, if there is one.")
@click.option("--keep-run", is_flag=True, help="Keep the run folder (OUTPUT without .onnx, plus .run) after success.")
@click.option("--encodings", type=_PATH, metavar="FILE", help="Write the quantization table as JSON, for `export`.")
@click.option("--dry-run", is_flag=True, help="Check everything and show the plan, but do not quantize.")
@click.option("--json", "as_json", is_flag=True, help="Print the facts of report.json to standard output instead of the summary.")
@click.option("-v", "--verbose", is_flag=True, help="Show the whole validation, the units, and tracebacks.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
@_config_options(Config, DataConfig)
def quantize(
    model: Path,
    output: Path | None,
    overwrite: bool,
    precision: str | None,
    report: Path | None,
    sensitivity: bool | None,
    config_file: Path | None,
    save_config: Path | None,
    resume: bool,
    keep_run: bool,
    encodings: Path | None,
    dry_run: bool,
    as_json: bool,
    verbose: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Quantize MODEL, a trained float ONNX file, and validate the result.

    \b
    mrecg-onnx quantize model.onnx --calibration-data calib.npz --eval-data eval.npz
    """
    with _reported(verbose):
        given = {name: value for name, value in options.items() if value not in (None, ())}
        values = load_config(config_file) if config_file is not None else {}
        config, data = split(values | (parse_precision(precision) if precision else {}) | given)
        output = output or model.with_name(f"{model.stem}.w{config.weight_bits}a{config.activation_bits}.onnx")
        run_path = output.with_name(f"{output.name.removesuffix('.onnx')}.run")
        _check_output(model, output, overwrite or resume)
        if encodings is not None:
            _check_output(model, encodings, overwrite or resume, "--encodings")
        if save_config is not None:
            _save_text(save_config, dump_config(config, data))
        if data.calibration_data is None:
            raise UsageError(
                "--calibration-data is missing: samples of the model's real input are needed (npz, npy, image folder, module:function)"
            )
        folder = report or output.with_name(f"{output.name.removesuffix('.onnx')}.report")
        mode = _Mode(overwrite, resume, keep_run, dry_run, sensitivity, encodings)
        with _interruptible(run_path):
            _quantize(model, output, folder, run_path, config, data, mode, _Shown(as_json, verbose, quiet))


@dataclasses.dataclass(frozen=True)
class _Mode:
    """How a run goes about its files and its report, which leaves the result as it is."""

    overwrite: bool
    resume: bool
    keep_run: bool
    dry_run: bool
    sensitivity: bool | None
    encodings: Path | None = None


@dataclasses.dataclass(frozen=True)
class _Shown:
    """What a command prints: results to standard output, progress to standard error, so that a pipe carries the results only."""

    as_json: bool = False
    verbose: bool = False
    quiet: bool = False

    @property
    def out(self) -> Console:
        return Console(quiet=self.quiet or self.as_json, highlight=False)

    @property
    def log(self) -> Console:
        return Console(stderr=True, quiet=self.quiet, highlight=False)


def _quantize(
    model: Path, output: Path, report_folder: Path, run_path: Path, config: Config, data: DataConfig, mode: _Mode, shown: _Shown
) -> None:
    started = time.perf_counter()
    import onnx
    import torch

    from exporters import export_qdq, write_model
    from exporters.qdq import write_text

    from . import encodings, pipeline, report, run_folder, runtime, terminal
    from .cpu import keep_freed_memory
    from .kernels import check_simulation
    from .plan import make_plan
    from .source import load_source
    from .validation import validate
    from .wording import duration

    if config.memory is None:  # what is kept is in pieces that the next block may not fit: faster, but not within a budget
        keep_freed_memory()
    device = pipeline.pick_device(config.device)
    if config.device == "cuda":
        runtime.pick_provider("cuda")
    source = load_source(model)
    assert data.calibration_data is not None
    calibration = _samples(data.calibration_data, source, data, "--calibration-data", config.calibration_samples)
    evaluation = calibration
    if data.eval_data is not None:
        evaluation = _samples(data.eval_data, source, data, "--eval-data", data.eval_samples)
    rows = pipeline.survey(source, calibration, config)
    memory = pipeline.expected_memory(source, calibration, rows, config).describe(config.memory) if config.learns else ""
    if mode.dry_run:
        facts = report.finite(report.plan_report(make_plan(source, rows, config)))
        if shown.as_json:
            click.echo(report.as_json(facts), nl=False)
        shown.out.print(terminal.block_table(facts))
        shown.out.print(f"[dim]{escape(memory)}[/dim]")
        shown.out.print(f"[dim]{escape(facts['plan']['why'])}; dry run, nothing was written[/dim]")
        return
    environment = report.environment(str(device))
    machine = f"{environment['gpu'] or environment['processor']}, {torch.get_num_threads()} threads"
    fingerprint = run_folder.fingerprint(source, calibration, config, environment)
    run = _open_run(run_path, output, fingerprint, machine, mode, shown.log)
    if memory:
        shown.log.print(escape(memory))
    with terminal.progress_on(shown.log) as progress:
        quantized = pipeline.quantize(source, calibration, config, progress, run)
    metadata = {
        "version": __version__,
        "source_sha256": source.sha256,
        "precision": f"w{config.weight_bits}a{config.activation_bits}",
        "target": config.target,
        "config": dump_config(config, dataclasses.replace(data, calibration_data=None, eval_data=None, labels=None)),
    }
    exported = export_qdq(source.model, quantized.table, metadata, config.scheme)
    try:
        runtime.session(exported)
    except MrecgError as error:
        raise ExportError(f"the exported model does not load: {error}") from error
    run.begin_export()
    write_model(exported, output)
    if mode.encodings is not None:
        learned = encodings.Encodings(quantized.table, source.sha256, config.target, config.precision.convention)
        write_text(encodings.dumps(learned), mode.encodings)
    simulated = pipeline.simulate(source, quantized.table, evaluation, torch.device(device), quantized.islands)
    few = pipeline.few_samples(source, evaluation, _EXACTNESS_SAMPLES)
    values = pipeline.simulated_values(source, quantized.table, few, quantized.islands)
    exactness = check_simulation(exported, quantized.table, values, few.inputs)
    checked = validate(onnx.load(model), output, evaluation, model.stat().st_size, config.device, simulated, exactness)
    limit = {True: None, False: 0.0, None: _SENSITIVITY_SHARE * (time.perf_counter() - started)}[mode.sensitivity]
    with terminal.progress_on(shown.log) as progress:
        fits, layers = pipeline.examine(source, quantized, evaluation, limit, progress)
    facts = report.run_report(source, output, config, data, quantized, checked, fits, layers, time.perf_counter() - started)
    page = report.write_report(facts, report_folder)
    if not mode.keep_run:
        run.remove()
    for path in run.damaged:
        shown.log.print(f"[yellow]{escape(str(path))} was damaged; that stage was done again[/yellow]")
    if shown.as_json:
        click.echo(report.as_json(facts), nl=False)
    if shown.verbose:
        shown.out.print(terminal.details(facts))
    shown.out.print(terminal.summary(facts))
    shown.out.print(f"wrote {output} and {page} in {duration(facts['seconds']['total'])}", markup=False, soft_wrap=True)
    _check_parity(checked)
    _check_drop(checked, data.max_drop)


@main.command("report", epilog=EXIT_CODES)
@click.argument("report_file", metavar="REPORT.json", type=_PATH)
@click.option("--overlay", type=_PATH, metavar="OTHER.json", help="Report of another run of the same model, whose losses are drawn too.")
@click.option("-o", "--output", type=_PATH, help="The page. Default: report.html beside REPORT.json.")
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks.")
def report_command(report_file: Path, overlay: Path | None, output: Path | None, verbose: bool) -> None:
    """Draw the page of a `quantize` run again from its REPORT.json, alone or with another run's losses over it.

    \b
    mrecg-onnx quantize net.onnx --units none -o plain.onnx ...
    mrecg-onnx quantize net.onnx --units loss -o joined.onnx ...
    mrecg-onnx report joined.report/report.json --overlay plain.report/report.json
    """
    with _reported(verbose):
        from . import report
        from .page import report_page

        facts = report.load_report(report_file)
        other = report.load_report(overlay) if overlay is not None else None
        if other is not None and other["model"]["sha256"] != facts["model"]["sha256"]:
            raise UsageError(f"--overlay {overlay}: is of another model ({other['model']['path']}, not {facts['model']['path']})")
        place = output or report_file.with_suffix(".html")
        report.write_text(place, report_page(facts, other))
        click.echo(f"wrote {place}")


@main.command(epilog=EXIT_CODES)
@click.argument("model", type=_PATH)
@click.option(
    "--input-shape", multiple=True, metavar="NAME:3x224x224", help="Shape of one sample of an input whose axes are open. Repeatable."
)
@click.option(
    "--units", metavar="modcap|transitions", default="modcap", show_default=True, help="Selector for the proposed units (data-free)."
)
@click.option(
    "--format",
    "format_",
    metavar="table|json|html|svg",
    default="table",
    show_default=True,
    help="A table, the facts, a page, or the picture of the blocks alone.",
)
@click.option("-o", "--output", type=_PATH, help="Write to this file instead of standard output.")
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks.")
def inspect(model: Path, input_shape: tuple[str, ...], units: str, format_: str, output: Path | None, verbose: bool) -> None:
    """Show the blocks of MODEL, their capacities, the units proposed, and what stays float. Needs no data.

    \b
    mrecg-onnx inspect net.onnx
    mrecg-onnx inspect net.onnx --format html -o net.html
    """
    with _reported(verbose):
        formats = ("table", "json", "html", "svg")
        for name, value, known in (("--units", units, ("modcap", "transitions")), ("--format", format_, formats)):
            if value not in known:
                raise UsageError(f"{name} {value}: must be one of {', '.join(known)}")
        from . import pipeline, report, terminal
        from .source import load_source

        source = load_source(model)
        shapes, guessed = pipeline.sample_shapes(source, dict(_shape(entry) for entry in input_shape))
        plan, islands = pipeline.inspect(source, shapes, Config(units=units))
        facts = {
            "model": {
                "path": str(model),
                "sha256": source.sha256,
                "opset": source.opset,
                "inputs": [str(spec) for spec in source.inputs],
                "notes": list(source.notes),
            },
            **report.plan_report(plan),
            "guessed_axes": guessed,
            "shapes": {name: list(shape) for name, shape in shapes.items()},
            "islands": [dataclasses.asdict(row) for row in islands],
        }
        if format_ == "table":
            if output is None:
                terminal.show_inspection(Console(highlight=False), facts)
                return
            console = Console(file=io.StringIO(), width=_FILE_COLUMNS, highlight=False, record=True)
            terminal.show_inspection(console, facts)
            report.write_text(output, console.export_text())
            return
        from .block_picture import block_picture

        if format_ == "html":
            from .page import inspect_page

            text = inspect_page(report.finite(facts))
        else:
            text = report.as_json(facts) if format_ == "json" else block_picture(facts, standalone=True) + "\n"
        if output is None:
            click.echo(text, nl=False)
        else:
            report.write_text(output, text)


@main.command("diagnose", cls=_SectionedCommand, epilog=EXIT_CODES)
@click.argument("float_model", metavar="FP32", type=_PATH)
@click.argument("quantized_model", metavar="QDQ", type=_PATH)
@click.option("--data", "place", metavar="DATA", help="Samples to run: .npz, .npy, an image folder, or module:function.")
@click.option(
    "--samples", type=int, default=16, show_default=True, help="Most samples to use; every compared value is held for all of them."
)
@click.option("--try", "tried", type=int, default=8, show_default=True, help="Layers to run float one at a time, worst first.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("-v", "--verbose", is_flag=True, help="Show all layers, and tracebacks.")
@_config_options(DataConfig, only="images")
def diagnose_command(
    float_model: Path, quantized_model: Path, place: str | None, samples: int, tried: int, as_json: bool, verbose: bool, **options: Any
) -> None:
    """Find where the error of QDQ, a file that `quantize` wrote from FP32, enters, and what to try against it.

    \b
    Added: the noise of a layer whose quantizers read the float model's values. Total: what it comes to in the file as it runs.
    A layer with much added noise makes it; one with much total but little added noise only passes it on.

    \b
    mrecg-onnx diagnose net.onnx net.w4a4.onnx --data calib.npz
    """
    with _reported(verbose):
        if place is None:
            raise UsageError("--data is missing: samples of the model's real input")
        if samples < 1 or tried < 0:
            raise UsageError("--samples must be at least 1 and --try at least 0")
        if not quantized_model.is_file():
            raise UsageError(f"{quantized_model}: no such file")
        import onnx

        from . import report, terminal
        from .diagnosis import diagnose
        from .source import load_source

        data = DataConfig(**{name: value for name, value in options.items() if value not in (None, ())})
        source = load_source(float_model)
        found = _samples(place, source, data, "--data", samples).first(samples)
        shown = _Shown(as_json, verbose)
        with terminal.progress_on(shown.log) as progress:
            result = diagnose(
                source,
                onnx.load(quantized_model),
                found,
                tried,
                lambda done, total: progress("trying layers in float", done, total, float("nan")),
            )
        facts = report.finite({"float": str(float_model), "quantized": str(quantized_model), **dataclasses.asdict(result)})
        if as_json:
            click.echo(report.as_json(facts), nl=False)
        else:
            shown.out.print(terminal.diagnosis_table(facts, None if verbose else _MOST_LAYERS))


@main.command(epilog=EXIT_CODES)
@click.argument("model", type=_PATH)
@click.argument("table", type=_PATH)
@click.option("--target", metavar="|".join(TARGETS), help="Runtime to export for. Default: the one that the table was learned for.")
@click.option("--storage", metavar="fast|small", help="How weights below 8 bits are stored. Default: the target's.")
@click.option("--format", "format_", metavar="onnx|aimet", default="onnx", show_default=True, help="QDQ file, or float file and encodings.")
@click.option("-o", "--output", type=_PATH, required=True, help="The file to write; with --format aimet, its encodings go beside it.")
@click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks.")
def export(
    model: Path, table: Path, target: str | None, storage: str | None, format_: str, output: Path, overwrite: bool, verbose: bool
) -> None:
    """Write MODEL with the grids of TABLE, for another target, without learning again.

    TABLE is what `quantize --encodings` wrote, or a file of AIMET encodings (1.0.0 or 0.6.1), whose weights are rounded to nearest.
    """
    with _reported(verbose):
        for name, value, known in (
            ("--target", target, tuple(TARGETS)),
            ("--storage", storage, ("fast", "small")),
            ("--format", format_, ("onnx", "aimet")),
        ):
            if value is not None and value not in known:
                raise UsageError(f"{name} {value}: must be one of {', '.join(known)}{near_misses(value, known)}")
        _check_output(model, output, overwrite)
        _export(model, table, target, storage, format_, output, Console(highlight=False))


def _export(model: Path, table_file: Path, target: str | None, storage: str | None, format_: str, output: Path, console: Console) -> None:
    from exporters import aimet, export_qdq, write_model
    from exporters.qdq import write_text

    from . import encodings, runtime
    from .placement import channel_axis
    from .scheme import scheme_for
    from .source import load_source

    try:
        text = table_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{table_file}: cannot be read: {error}") from error
    source = load_source(model)
    learned_for = None
    if '"activation_encodings"' in text:
        axes = {weight: channel_axis(source, node) for node in source.graph.weighted if (weight := source.graph.weight(node)) is not None}
        table = aimet.from_aimet(aimet.loads(text, str(table_file)), source.constants, axes, str(table_file))
    else:
        loaded = encodings.loads(text, str(table_file))
        table, learned_for = loaded.table, loaded.target
        if loaded.source_sha256 != source.sha256:
            raise UsageError(
                f"{table_file}: was learned on another model (SHA-256 {loaded.source_sha256[:12]}, {model} has {source.sha256[:12]})"
            )
    known = {*source.constants, *source.graph.inputs, *(value for node in source.graph.nodes for value in node.outputs)}
    stray = next((name for name in table if name not in known), None)
    if stray is not None:
        raise UsageError(f"{table_file}: {model} has no value {stray!r}{near_misses(stray, known)}")
    scheme = scheme_for(target or learned_for or "ort-cpu", None, None, storage)
    if learned_for is not None and learned_for in TARGETS and learned_for != scheme.name:
        console.print(f"learned for {learned_for}; {scheme.name} would have learned under other rules:")
        for difference in TARGETS[learned_for].differences(scheme):
            console.print(f"  {escape(difference)}")
    if format_ == "aimet":
        place = output.with_suffix(".encodings")
        write_model(aimet.with_rounded_weights(source.model, table), output)
        write_text(aimet.dumps(table), place)
        console.print(f"wrote {escape(str(output))} and {escape(str(place))}")
        return
    metadata = {"version": __version__, "source_sha256": source.sha256, "target": scheme.name, "learned_for": learned_for or "another tool"}
    exported = export_qdq(source.model, table, metadata, scheme)
    try:
        runtime.session(exported)
    except MrecgError as error:
        raise ExportError(f"the exported model does not load: {error}") from error
    write_model(exported, output)
    console.print(f"wrote {escape(str(output))} for {scheme.name}")


@main.command(epilog=EXIT_CODES)
@click.argument("file", type=_PATH)
@click.option("--target", required=True, metavar="tensorrt|openvino|qnn|ort-cpu|portable", help="Runtime whose rules are checked.")
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks.")
def check(file: Path, target: str, verbose: bool) -> None:
    """Check FILE, a QDQ model from any tool, against the rules that a runtime's parser documents; name each violation and its node."""
    with _reported(verbose):
        if not file.is_file():
            raise UsageError(f"{file}: no such file")
        from exporters import check as rules

        from .normalise import read

        if target not in rules.CHECKED:
            raise UsageError(f"--target {target}: must be one of {', '.join(rules.CHECKED)}{near_misses(target, rules.CHECKED)}")
        found = rules.check(read(file), target)
        console = Console(highlight=False)
        for violation in found:
            colour = "red" if violation.is_error else "yellow"
            where = " ".join(part for part in (violation.op_type, violation.node) if part)
            console.print(f"[{colour}]{'error' if violation.is_error else 'slow'}:[/{colour}] {escape(where)}: {escape(violation.rule)}")
        errors = sum(violation.is_error for violation in found)
        if errors:
            raise TargetRuleError(f"{file}: {errors} nodes break the rules of {target}")
        console.print(f"{escape(file.name)} keeps to the rules of {target}; {len(found)} nodes cost speed")


@main.command("compare", cls=_SectionedCommand, epilog=EXIT_CODES)
@click.argument("model", type=_PATH)
@click.option("-o", "--output", type=_PATH, required=True, metavar="RESULTS.json", help="Results; a page of the same name is drawn beside.")
@click.option("--methods", default="mse,adaround,brecq,qdrop,mrecg+brecq,mrecg+qdrop", show_default=True, help="What to compare.")
@click.option("--precisions", default="w4a4", show_default=True, help="At which bit widths.")
@click.option("--seeds", default="0,1,2", show_default=True, help="Seeds, whose spread is shown.")
@click.option("--json", "as_json", is_flag=True, help="Print the facts instead of the table.")
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
@_config_options(Config, DataConfig)
def compare(
    model: Path, output: Path, methods: str, precisions: str, seeds: str, as_json: bool, verbose: bool, quiet: bool, **options: Any
) -> None:
    """Run several methods on MODEL with the same data, batch and iterations, and measure each exported file under ONNX Runtime.

    \b
    A method is an algorithm (every block alone), or mrecg+ALGORITHM (units by loss), or mrecg:UNITS+ALGORITHM.
    Rows that RESULTS.json has already for the same model, data and settings are not run again.

    \b
    mrecg-onnx compare net.onnx --calibration-data calib.npz --eval-data eval.npz \\
        --methods mse,brecq,mrecg+brecq --precisions w4a4,w2a4 --preset fast -o compare.json
    """
    with _reported(verbose):
        from . import comparison, report, terminal
        from .page import comparison_page

        shown = _Shown(as_json, verbose, quiet)
        source, calibration, evaluation, base = _experiment(
            model, output, options, ("algorithm", "units", "seed", "weight_bits", "activation_bits")
        )
        todo = comparison.jobs(_listed(methods), _listed(precisions), _integers("--seeds", seeds), base)
        with terminal.progress_on(shown.log) as progress:
            facts = comparison.run_jobs(source, calibration, evaluation, todo, _writer(source), output, progress)
        lines = comparison.summary(facts["rows"])
        page = output.with_suffix(".html")
        report.write_text(page, comparison_page(facts, lines))
        if as_json:
            click.echo(report.as_json(facts | {"summary": lines}), nl=False)
        shown.out.print(terminal.comparison_table(lines))
        shown.out.print(f"wrote {output} and {page}", markup=False, soft_wrap=True)


@main.command("study", cls=_SectionedCommand, epilog=EXIT_CODES)
@click.argument("model", type=_PATH)
@click.option("-o", "--output", type=_PATH, required=True, metavar="RESULTS.json", help="Results; a page of the same name is drawn beside.")
@click.option("--claims", default="oscillation,final-error,accuracy,data,theorem", show_default=True, help="What to study.")
@click.option("-p", "--precision", metavar="W4A4", help="Shorthand for --weight-bits and --activation-bits.")
@click.option("--schemes", type=int, default=20, show_default=True, help="Random unit schemes behind `final-error` and `accuracy`.")
@click.option("--json", "as_json", is_flag=True, help="Print the facts instead of the verdicts.")
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
@_config_options(Config, DataConfig)
def study(
    model: Path, output: Path, claims: str, precision: str | None, schemes: int, as_json: bool, verbose: bool, quiet: bool, **options: Any
) -> None:
    """Test the claims behind MRECG on MODEL: each gives a figure, its numbers, and a sentence of verdict, also where it does not hold.

    \b
    oscillation  the loss along the network with AdaRound, BRECQ and MRECG
    final-error  the final error against the largest earlier one, over random unit schemes
    accuracy     the accuracy against the final error, over the same schemes
    data         the accuracy against batch size and sample count
    theorem      how often the loss rises between equivalent neighbours

    Runs that RESULTS.json has already are not made again.
    """
    with _reported(verbose):
        from . import comparison, pipeline, report, terminal
        from .capacity import mergeable
        from .page import study_page
        from .study import CLAIMS, findings, study_jobs

        names = _listed(claims)
        unknown = next((name for name in names if name not in CLAIMS), None)
        if unknown is not None:
            raise UsageError(f"--claims {unknown}: must be among {', '.join(CLAIMS)}{near_misses(unknown, CLAIMS)}")
        if schemes < 4:
            raise UsageError(f"--schemes {schemes}: a correlation needs at least 4")
        shown = _Shown(as_json, verbose, quiet)
        options |= parse_precision(precision) if precision else {}
        source, calibration, evaluation, base = _experiment(model, output, options, ("units", "merge"))
        rows = pipeline.survey(source, calibration, dataclasses.replace(base, units="none"))
        boundaries = sorted(mergeable([row.traits for row in rows], cross_stage=True))
        count = min(calibration.count, base.calibration_samples)
        todo = study_jobs(names, base, boundaries, [row.block.name for row in rows], schemes, count)
        with terminal.progress_on(shown.log) as progress:
            facts = comparison.run_jobs(source, calibration, evaluation, todo, _writer(source), output, progress)
        facts |= {"findings": report.finite(findings(names, facts["rows"]))}
        page = output.with_suffix(".html")
        report.write_text(page, study_page(facts))
        if as_json:
            click.echo(report.as_json(facts), nl=False)
        shown.out.print(terminal.study_findings(facts["findings"]))
        shown.out.print(f"wrote {output} and {page}", markup=False, soft_wrap=True)


def _experiment(
    model: Path, output: Path, options: dict[str, Any], varied: tuple[str, ...]
) -> "tuple[SourceModel, Samples, Samples, Config]":
    """Model, data and common settings of several runs; what the runs vary cannot be given."""
    from .cpu import keep_freed_memory
    from .source import load_source

    given = {name: value for name, value in options.items() if value not in (None, ())}
    taken = next((name for name in varied if name in given), None)
    if taken is not None:
        raise UsageError(f"{flag(taken)}: is what the runs differ in; see --help")
    if not output.parent.is_dir():
        raise UsageError(f"--output {output}: the folder {output.parent} does not exist")
    config, data = split(given)
    if data.calibration_data is None or data.eval_data is None:
        raise UsageError("--calibration-data and --eval-data are both needed: methods are compared on samples that none of them has seen")
    keep_freed_memory()
    source = load_source(model)
    calibration = _samples(data.calibration_data, source, data, "--calibration-data", None)
    return source, calibration, _samples(data.eval_data, source, data, "--eval-data", data.eval_samples), config


def _writer(source: "SourceModel") -> "Callable[[QuantTable, Config, Path], None]":
    from exporters import export_qdq, write_model

    return lambda table, config, path: write_model(export_qdq(source.model, table, scheme=config.scheme), path)


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _integers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in _listed(text)]
    except ValueError:
        raise UsageError(f"{option} {text!r}: expected integers separated by commas") from None


@main.command("validate", cls=_SectionedCommand, epilog=EXIT_CODES)
@click.argument("float_model", metavar="FP32", type=_PATH)
@click.argument("quantized_model", metavar="QDQ", type=_PATH)
@click.option("--device", metavar="auto|cuda|cpu", default="auto", show_default=True, help="Execution provider.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks.")
@_config_options(DataConfig)
def validate_command(float_model: Path, quantized_model: Path, device: str, as_json: bool, verbose: bool, **options: Any) -> None:
    """Compare QDQ, a quantized model, with FP32, the float model it was made from, under ONNX Runtime."""
    with _reported(verbose):
        if device not in ("auto", "cuda", "cpu"):
            raise UsageError(f"--device {device}: must be one of auto, cuda, cpu")
        data = DataConfig(**{name: value for name, value in options.items() if value not in (None, ())})
        if data.eval_data is None:
            raise UsageError("--eval-data is missing: samples to compare the models on")
        if not quantized_model.is_file():
            raise UsageError(f"{quantized_model}: no such file")
        import onnx

        from . import report, terminal
        from .source import load_source
        from .validation import validate

        source = load_source(float_model)
        samples = _samples(data.eval_data, source, data, "--eval-data", data.eval_samples)
        checked = validate(onnx.load(float_model), quantized_model, samples, float_model.stat().st_size, device)
        facts = report.validation_report(checked)
        if as_json:
            click.echo(report.as_json(facts), nl=False)
        else:
            Console(highlight=False).print(terminal.validation_table(report.finite(facts) | {"evaluated_on": data.eval_data}))
        _check_drop(checked, data.max_drop)


def _samples(place: str, source: "SourceModel", data: DataConfig, option: str, limit: int | None) -> "Samples":
    from .pipeline import check_classes
    from .samples import Preprocessing, load_samples

    labels = Path(data.labels) if data.labels is not None and option == "--eval-data" else None
    samples = load_samples(place, source.inputs, Preprocessing.of(data), option, labels, limit)
    check_classes(source, samples, f"{option} {place}")
    return samples if limit is None or option == "--calibration-data" else samples.first(limit)


def _open_run(path: Path, output: Path, fingerprint: Mapping[str, Any], machine: str, mode: _Mode, console: Console) -> "RunFolder":
    """The run folder of this run: the one that is there with --resume, else a new one."""
    from .run_folder import RunFolder, holds_run, progress_of

    unfinished = holds_run(path)
    if not unfinished or not mode.resume:
        if unfinished and not mode.overwrite:
            raise UsageError(f"{path}: holds an unfinished run ({progress_of(path)}); --resume continues it, --overwrite starts anew")
        if mode.resume:
            _check_output(None, output, mode.overwrite)
            console.print(f"no unfinished run in {escape(str(path))}; starting from the beginning")
        return RunFolder.create(path, fingerprint, machine)
    run = RunFolder.resume(path, fingerprint)
    _check_output(None, output, mode.overwrite or run.exporting)
    console.print(f"resuming {progress_of(path)}")
    if run.machine != machine:
        was = f"started on {escape(run.machine)}, continued on {escape(machine)}"
        console.print(f"[yellow]{was}: sums in another order may flip codes[/yellow]")
    return run


def _check_output(model: Path | None, output: Path, overwrite: bool, option: str = "--output") -> None:
    """Refuse, before any work, what could not be written after it."""
    if model is not None and output.exists() and output.resolve() == model.resolve():
        raise UsageError(f"{option} {output}: is the source model; choose another name")
    if output.exists() and not overwrite:
        raise UsageError(f"{output}: exists; give --overwrite or another {option}")
    if not output.parent.is_dir():
        raise UsageError(f"{option} {output}: the folder {output.parent} does not exist")
    if not os.access(output.parent, os.W_OK):
        raise UsageError(f"{option} {output}: the folder {output.parent} is not writable")


def _save_text(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--save-config {path}: cannot be written: {error.strerror}") from error


def _shape(entry: str) -> tuple[str, tuple[int, ...]]:
    name, _, dims = entry.rpartition(":")
    try:
        return name, tuple(int(d) for d in dims.split("x"))
    except ValueError:
        raise UsageError(f"--input-shape {entry!r}: expected NAME:3x224x224, one sample without the batch axis") from None


def _check_parity(checked: "ValidationReport") -> None:
    """Refuse a file that ONNX Runtime computes differently from what was learned."""
    from .verdict import parity_problem

    problem = parity_problem(checked)
    if problem is not None:
        raise ExportError(problem)


def _check_drop(checked: "ValidationReport", limit: float | None) -> None:
    if limit is None:
        return
    if checked.drop is None:
        raise AccuracyGateError("--max-drop: the model has no class output [N, C], so that there is no accuracy to compare")
    if checked.drop > limit:
        what = "top-1 accuracy" if checked.top1_float is not None else "agreement with the float model"
        raise AccuracyGateError(f"{what} dropped by {checked.drop:.2f} points, more than --max-drop {limit:g}")


@contextmanager
def _reported(verbose: bool) -> Iterator[None]:
    """Turn the project's errors into one line and their exit code."""
    try:
        yield
    except MrecgError as error:
        if verbose and error.__cause__ is not None:
            import traceback

            traceback.print_exception(error)
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt as interruption:
        terminated = isinstance(interruption, _Terminated)
        click.echo(f"{'terminated' if terminated else 'interrupted'}{interruption or '; nothing was written'}", err=True)
        sys.exit(143 if terminated else 130)


class _Terminated(KeyboardInterrupt):
    """SIGTERM: what a batch system sends before it takes the machine away."""


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise _Terminated


@contextmanager
def _interruptible(run_path: Path) -> Iterator[None]:
    """Make SIGTERM an interruption like Ctrl-C, say what is left to resume, and leave no folder that holds nothing."""
    handles = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _terminate) if handles else None
    try:
        yield
    except BaseException as error:
        from .run_folder import discard_if_empty, holds_run, progress_of

        discard_if_empty(run_path)
        if isinstance(error, KeyboardInterrupt) and holds_run(run_path):
            raise type(error)(f" {progress_of(run_path)}; --resume continues") from None
        raise
    finally:
        if handles:
            signal.signal(signal.SIGTERM, before)
