"""Which neighbouring blocks form one unit: measure the blocks, then apply a selector of `capacity`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import capacity, partition
from .activations import TorchModel
from .capacity import BlockTraits
from .config import LAYERWISE, Config
from .errors import UsageError, near_misses
from .losses import energy, full_loss
from .partition import Block
from .quant_table import QuantTable
from .samples import Samples
from .selection import own_precisions
from .source import SourceModel, ValueTypes
from .unit import learned_weights


@dataclass(frozen=True)
class BlockRow:
    """One block as the report shows it.

    `capacity` is data-free (ModCap); `loss` is measured in the calibrated, not yet reconstructed model against the float one, and `energy`
    is the mean energy of the float output that it compares with. Both are None where nothing was measured.
    """

    block: Block
    traits: BlockTraits
    capacity: float
    loss: float | None = None
    energy: float | None = None


@dataclass(frozen=True)
class Plan:
    """The blocks, the boundaries between them that are merged away, the units that follow, and the reason in words."""

    rows: tuple[BlockRow, ...]
    merged: frozenset[int]
    units: tuple[Block, ...]
    why: str


def make_plan(source: SourceModel, rows: Sequence[BlockRow], config: Config) -> Plan:
    """Choose the merges that the configuration asks for."""
    merged, why = _choose(rows, config)
    runs = capacity.groups(len(rows), merged)
    return Plan(tuple(rows), merged, tuple(partition.merge(source.graph, [rows[i].block for i in run]) for run in runs), why)


def block_rows(source: SourceModel, types: ValueTypes, blocks: Sequence[Block], config: Config) -> tuple[BlockRow, ...]:
    """The data-free half of the measurement: layers, transitions, ModCap."""
    rows, own = [], own_precisions(source.graph, config.own_bits)
    for block in blocks:
        layers = tuple(
            (source.constants[weight].size, own[node.name].weight_bits if node.name in own else config.weight_bits)
            for node in block.nodes
            if node.name in block.weighted and (weight := source.graph.weight(node)) is not None
        )
        shapes = [{types.shapes.get(name) for name in side} for side in (block.inputs, block.outputs)]
        traits = BlockTraits(layers, is_transition=shapes[0] != shapes[1])
        rows.append(BlockRow(block, traits, capacity.modcap(traits, config.capacity_alpha)))
    return tuple(rows)


def measured(
    rows: Sequence[BlockRow], model: TorchModel, table: QuantTable, finish: Callable[[Block, QuantTable], QuantTable], samples: Samples
) -> tuple[BlockRow, ...]:
    """Add each block's loss in the quantized stream: one pass of the calibrated, rounded-to-nearest model over the samples.

    Args:
        rows: the blocks, whose torch pieces are `model.pieces`.
        model: the imported blocks.
        table: calibrated grids with codes of rounding to nearest.
        finish: adds a block's biases to a table.
        samples: the samples to measure on.
    """
    floats, quantized = model.stream(samples.inputs), model.stream(samples.inputs, table)
    result = []
    for row, piece in zip(rows, model.pieces, strict=True):
        targets = model.run(piece, floats)
        table = finish(row.block, table)
        outputs = model.run(piece, quantized, table)
        if learned_weights(piece, table):
            aims = {name: targets[name] for name in row.block.learned_outputs}
            row = BlockRow(row.block, row.traits, row.capacity, full_loss(outputs, aims, floats.passes), energy(aims, floats.passes))
        result.append(row)
        floats.advance(targets)
        quantized.advance(outputs)
    return tuple(result)


def _choose(rows: Sequence[BlockRow], config: Config) -> tuple[frozenset[int], str]:
    traits = [row.traits for row in rows]
    allowed = capacity.mergeable(traits, cross_stage=config.cross_stage)
    if config.algorithm in LAYERWISE:
        return frozenset(), f"none: {config.algorithm} works layer by layer"
    if config.units == "none" or not config.learns:
        return frozenset(), "none: every block alone"
    if config.units == "manual":
        return _manual([row.block.name for row in rows], config.merge), "manual: as listed"
    if config.units == "transitions":
        merged = capacity.transitions(traits, allowed, max_group=config.max_group)
        return merged, "transitions: each block that opens a stage joins the one before it"
    metric = {
        "modcap": [row.capacity for row in rows],
        "loss": [row.loss or 0.0 for row in rows],
        "loss-normalised": [row.loss / row.energy if row.loss and row.energy else 0.0 for row in rows],
    }[config.units]
    selector = config.selector if config.selector != "auto" else ("topk" if config.units == "modcap" else "signed-drop")
    if selector == "topk":
        k = config.merge_count if config.merge_count is not None else sum(traits[i + 1].is_transition for i in allowed)
        gaps = capacity.gaps(metric).tolist()
        pairs_only = config.units == "modcap"  # the published ModCap grouping has no longer runs
        merged = capacity.topk(gaps, allowed, k=k, penalty=config.merge_penalty, max_group=2 if pairs_only else config.max_group)
        return merged, f"{config.units}: the largest gaps between neighbours, k = {k}" + (", in pairs" if pairs_only else "")
    merged = capacity.signed_drop(metric, allowed, k=config.merge_count, tol=config.merge_tolerance, max_group=config.max_group)
    stop = (
        f"{config.merge_count} merges"
        if config.merge_count is not None
        else f"the drops are below {config.merge_tolerance:.0%} of the loss"
    )
    return merged, f"{config.units}: where it drops from one block to the next, largest drop first, until {stop}"


def _manual(names: Sequence[str], merges: Sequence[str]) -> frozenset[int]:
    merged: set[int] = set()
    for entry in merges:
        parts = [part.strip() for part in entry.split("+")]
        unknown = next((part for part in parts if part not in names), None)
        if unknown is not None:
            raise UsageError(f"--merge {entry!r}: there is no block {unknown!r}{near_misses(unknown, names)}; `inspect` lists the blocks")
        positions = [names.index(part) for part in parts]
        if len(parts) < 2 or positions != list(range(positions[0], positions[0] + len(parts))):
            raise UsageError(f"--merge {entry!r}: must name two or more blocks that follow each other, such as {names[0]}+{names[-1]}")
        merged |= set(positions[:-1])
    return frozenset(merged)
