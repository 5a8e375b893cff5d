"""`mrecg-onnx quantize`: check, learn, write, validate, report."""

import dataclasses
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.markup import escape

from .. import __version__
from ..config import Config
from ..config_file import dump_config, load_config, parse_precision, split
from ..data_config import DataConfig
from ..errors import UsageError
from ..processes import Processes
from .endings import check_drop, check_parity, interruptible, reported
from .files import calibration_at, check_loads, check_output, samples_at, save_text
from .options import EXIT_CODES, PATH, SectionedCommand, config_options, given
from .shown import Shown

if TYPE_CHECKING:
    import onnx

    from ..metric import Metric
    from ..pipeline import Quantized
    from ..plan import BlockRow
    from ..run_folder import RunFolder
    from ..samples import Samples
    from ..source import SourceModel
    from ..validation import ValidationReport

_EXACTNESS_SAMPLES = 4  # every value of the network is held for them
_SENSITIVITY_SHARE = 0.1  # of the time that the run took before


@click.command(cls=SectionedCommand, epilog=EXIT_CODES, short_help="Quantize a model, write it, validate it, report on it.")
@click.argument("model", type=PATH)
@click.option("-o", "--output", type=PATH, help="The quantized model. Default: NAME.w4a4.onnx beside MODEL, after its precision.")
@click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")
@click.option(
    "-p", "--precision", metavar="W4A4", help="Shorthand for --weight-bits and --activation-bits: w4a4, w3a3, w2a4, w4a8, w8a8, w4a16 ..."
)
@click.option(
    "--report", type=PATH, metavar="DIR", help="Folder of report.json and report.html. Default: OUTPUT without .onnx, plus .report."
)
@click.option(
    "--sensitivity/--no-sensitivity",
    default=None,
    help="Measure how much each layer hurts. Default: where it takes less than a tenth of the run.",
)
@click.option("--config", "config_file", type=PATH, metavar="FILE", help="TOML file with these options by name; flags win over it.")
@click.option("--save-config", type=PATH, metavar="FILE", help="Write the resolved options as TOML.")
@click.option("--resume", is_flag=True, help="Continue an interrupted run of the same output where it stopped, if there is one.")
@click.option("--keep-run", is_flag=True, help="Keep the run folder (OUTPUT without .onnx, plus .run) after success.")
@click.option("--encodings", type=PATH, metavar="FILE", help="Write the quantization table as JSON, for `export`.")
@click.option("--dry-run", is_flag=True, help="Check everything and show the plan, but do not quantize.")
@click.option("--json", "as_json", is_flag=True, help="Print the facts of report.json to standard output instead of the summary.")
@click.option("-v", "--verbose", is_flag=True, help="Show the whole validation, the units, and tracebacks.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
@config_options(Config, DataConfig)
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
    processes = Processes.of(os.environ)
    with processes.ending(), reported(verbose, "" if processes.is_first else f"process {processes.rank}: "):
        values = load_config(config_file) if config_file is not None else {}
        config, data = split(values | (parse_precision(precision) if precision else {}) | given(options))
        output = output or model.with_name(f"{model.stem}.{config.label}.onnx")
        run_path = output.with_name(f"{output.name.removesuffix('.onnx')}.run")
        check_output(model, output, overwrite or resume)
        if encodings is not None:
            check_output(model, encodings, overwrite or resume, "--encodings")
        if save_config is not None and processes.is_first:
            save_text(save_config, dump_config(config, data))
        if data.calibration_data is None:
            raise UsageError(
                "--calibration-data is missing: samples of the model's real input are needed (npz, npy, image folder, module:function)"
            )
        folder = report or output.with_name(f"{output.name.removesuffix('.onnx')}.report")
        mode = _Mode(overwrite, resume, keep_run, dry_run, sensitivity, encodings)
        if not processes.is_first:
            if not dry_run:
                _assist(model, config, data, processes)
            return
        with interruptible(lambda: _left(run_path)):
            _quantize(model, output, folder, run_path, config, data, mode, Shown(as_json, verbose, quiet), processes)


@dataclasses.dataclass(frozen=True)
class _Mode:
    """How a run goes about its files and its report, which leaves the result as it is."""

    overwrite: bool
    resume: bool
    keep_run: bool
    dry_run: bool
    sensitivity: bool | None
    encodings: Path | None = None


def _left(run_path: Path) -> str:
    """What a run that broke off left to go on from, in words; a folder that holds nothing does not stay."""
    from ..run_folder import discard_if_empty, holds_run, progress_of

    discard_if_empty(run_path)
    return f" {progress_of(run_path)}; --resume continues" if holds_run(run_path) else ""


def _assist(model: Path, config: Config, data: DataConfig, processes: Processes) -> None:
    """Learn along with the first process, which alone shows and writes anything."""
    from .. import pipeline
    from ..cpu import keep_freed_memory
    from ..device import pick_device
    from ..source import load_source

    if config.memory is None:
        keep_freed_memory()
    source = load_source(model)
    assert data.calibration_data is not None
    calibration = calibration_at(data.calibration_data, source, config, data, config.calibration_samples, Shown(quiet=True).log)
    with processes.joined(pick_device(config.device)):
        pipeline.quantize(source, calibration, config, processes=processes)


def _quantize(
    model: Path,
    output: Path,
    report_folder: Path,
    run_path: Path,
    config: Config,
    data: DataConfig,
    mode: _Mode,
    shown: Shown,
    processes: Processes,
) -> None:
    started = time.perf_counter()
    import torch

    from exporters import export_qdq, write_model
    from exporters.qdq import write_text

    from .. import encodings, pipeline, report, run_folder, runtime, terminal
    from ..cpu import crowding, keep_freed_memory
    from ..device import pick_device
    from ..examination import examine
    from ..metric import Metric
    from ..raising import opset_of
    from ..source import load_source
    from ..survey import expected_memory, survey
    from ..validation import judged

    metric = Metric.at(data.metric) if data.metric is not None else None
    if config.memory is None:  # what is kept is in pieces that the next block may not fit: faster, but not within a budget
        keep_freed_memory()
    device = pick_device(config.device)
    if config.device == "cuda":
        runtime.pick_provider("cuda")
    source = load_source(model)
    assert data.calibration_data is not None
    calibration = calibration_at(data.calibration_data, source, config, data, config.calibration_samples, shown.log)
    if calibration.note is not None:
        source = dataclasses.replace(source, notes=(*source.notes, calibration.note))
    evaluation = calibration
    if data.eval_data is not None:
        evaluation = samples_at(data.eval_data, source, data, "--eval-data", data.eval_samples)
    if metric is not None:
        judged(metric, model, evaluation, config.device)  # one that fails does so now, not after learning
    found = survey(source, calibration, config)
    memory = expected_memory(source, calibration, found, config).describe(config.memory) if config.learns else ""
    if mode.dry_run:
        _show_plan(source, found.rows, config, memory, shown)
        return
    environment = report.environment(str(device))
    machine = f"{environment['gpu'] or environment['processor']}, {torch.get_num_threads()} threads" + (
        f", {processes.count} processes" if processes.count > 1 else ""
    )
    fingerprint = run_folder.fingerprint(source, calibration, config, environment)
    run = _open_run(run_path, output, fingerprint, machine, mode, shown.log)
    if memory:
        shown.log.print(escape(memory))
    busy = crowding(torch.get_num_threads()) if config.learns and device.type == "cpu" else None
    if busy is not None:
        shown.log.print(busy)
    with terminal.progress_on(shown.log) as progress, processes.joined(device):
        quantized = pipeline.quantize(source, calibration, config, progress, run, processes)
    made = _metadata(source, config, data)
    exported = export_qdq(source.model, quantized.table, made, config.scheme)
    check_loads(exported)
    if opset_of(exported) > source.opset:
        raised = f"opset {source.opset} was raised to {opset_of(exported)} in the file, for the types of its codes"
        quantized = dataclasses.replace(quantized, notes=(*quantized.notes, raised))
    run.begin_export()
    write_model(exported, output)
    if mode.encodings is not None:
        learned = encodings.Encodings(quantized.table, source.sha256, config.target, config.precision.convention, made["config"])
        write_text(encodings.dumps(learned), mode.encodings)
    checked = _validated(model, output, source, quantized, exported, evaluation, config, metric)
    limit = {True: None, False: 0.0, None: _SENSITIVITY_SHARE * (time.perf_counter() - started)}[mode.sensitivity]
    with terminal.progress_on(shown.log) as progress:
        fits, layers = examine(source, quantized, evaluation, limit, progress)
    facts = report.run_report(source, output, config, data, quantized, checked, fits, layers, time.perf_counter() - started)
    page = report.write_report(facts, report_folder)
    if not mode.keep_run:
        run.remove()
    for path in run.damaged:
        shown.log.print(f"[yellow]{escape(str(path))} was damaged; that stage was done again[/yellow]")
    _show(facts, output, page, shown)
    check_parity(checked)
    check_drop(checked, data.max_drop)


def _metadata(source: "SourceModel", config: Config, data: DataConfig) -> dict[str, str]:
    """What the file says of its making; places of data are left out, since they say nothing elsewhere."""
    return {
        "version": __version__,
        "source_sha256": source.sha256,
        "precision": config.label,
        "target": config.target,
        "config": dump_config(config, dataclasses.replace(data, calibration_data=None, eval_data=None, labels=None)),
    }


def _validated(
    model: Path,
    output: Path,
    source: "SourceModel",
    quantized: "Quantized",
    exported: "onnx.ModelProto",
    evaluation: "Samples",
    config: Config,
    metric: "Metric | None",
) -> "ValidationReport":
    """The written file against the float model, and against what was learned."""
    import torch

    from .. import large
    from ..kernels import check_simulation
    from ..simulation import few_samples, simulate, simulated_values
    from ..validation import validate

    table, islands = quantized.table, quantized.islands
    simulated = simulate(source, table, evaluation, torch.device(quantized.device), islands, config.scheme)
    few = few_samples(source, evaluation, _EXACTNESS_SAMPLES)
    exactness = check_simulation(exported, table, simulated_values(source, table, few, islands), few.inputs)
    elsewhere = config.scheme.elsewhere
    return validate(
        model, output, evaluation, large.file_bytes(model), config.device, simulated, exactness, elsewhere=elsewhere, metric=metric
    )


def _show_plan(source: "SourceModel", rows: "tuple[BlockRow, ...]", config: Config, memory: str, shown: Shown) -> None:
    from .. import report, terminal
    from ..plan import make_plan

    facts = report.finite(report.plan_report(make_plan(source, rows, config)))
    if shown.as_json:
        click.echo(report.as_json(facts), nl=False)
    shown.out.print(terminal.block_table(facts, shown.out.width))
    shown.out.print(f"[dim]{escape(memory)}[/dim]")
    shown.out.print(f"[dim]{escape(facts['plan']['why'])}; dry run, nothing was written[/dim]")


def _show(facts: dict[str, Any], output: Path, page: Path, shown: Shown) -> None:
    from .. import report, terminal
    from ..wording import duration

    if shown.as_json:
        click.echo(report.as_json(facts), nl=False)
    if shown.verbose:
        shown.out.print(terminal.details(facts))
    shown.out.print(terminal.summary(facts))
    shown.out.print(f"wrote {output} and {page} in {duration(facts['seconds']['total'])}", markup=False, soft_wrap=True)


def _open_run(path: Path, output: Path, fingerprint: Mapping[str, Any], machine: str, mode: _Mode, console: Console) -> "RunFolder":
    """The run folder of this run: the one that is there with --resume, else a new one."""
    from ..run_folder import RunFolder, holds_run, progress_of

    unfinished = holds_run(path)
    if not unfinished or not mode.resume:
        if unfinished and not mode.overwrite:
            raise UsageError(f"{path}: holds an unfinished run ({progress_of(path)}); --resume continues it, --overwrite starts anew")
        if mode.resume:
            check_output(None, output, mode.overwrite)
            console.print(f"no unfinished run in {escape(str(path))}; starting from the beginning")
        return RunFolder.create(path, fingerprint, machine)
    run = RunFolder.resume(path, fingerprint)
    check_output(None, output, mode.overwrite or run.exporting)
    console.print(f"resuming {progress_of(path)}")
    if run.machine != machine:
        was = f"started on {escape(run.machine)}, continued on {escape(machine)}"
        console.print(f"[yellow]{was}: sums in another order may flip codes[/yellow]")
    return run
