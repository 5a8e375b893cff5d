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
    """The blocks, the boundaries between them that are merged away, the units that follow, and the reason in words.

    `reasons` has for each boundary why it is merged or left.
    """

    rows: tuple[BlockRow, ...]
    merged: frozenset[int]
    units: tuple[Block, ...]
    why: str
    reasons: tuple[str, ...]


def make_plan(source: SourceModel, rows: Sequence[BlockRow], config: Config) -> Plan:
    """Choose the merges that the configuration asks for."""
    merged, why, because = _choose(rows, config)
    apart = [_kept_apart(rows, boundary, merged, config) for boundary in range(len(rows) - 1)]
    reasons = ["; ".join(part for part in (because(boundary), limit) if part) for boundary, limit in enumerate(apart)]
    runs = capacity.groups(len(rows), merged)
    units = tuple(partition.merge(source.graph, [rows[i].block for i in run]) for run in runs)
    return Plan(tuple(rows), merged, units, why, tuple(reasons))


def block_rows(source: SourceModel, types: ValueTypes, blocks: Sequence[Block], config: Config) -> tuple[BlockRow, ...]:
    """The data-free half of the measurement: layers, transitions, ModCap."""
    rows, own = [], own_precisions(source.graph, config.own_bits)
    for block in blocks:
        layers = tuple(
            (source.constants[weight].size, own[node.name].weight_bits if node.name in own else config.weight_bits)
            for node in block.nodes
            if node.name in block.weighted and (weight := source.graph.weight(node)) is not None
        )
        read, made = ({types.shapes.get(name) for name in side} for side in (block.inputs, block.outputs))
        traits = BlockTraits(layers, is_transition=not made <= read)  # what else a block reads, such as a mask, opens no stage
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


def _choose(rows: Sequence[BlockRow], config: Config) -> tuple[frozenset[int], str, Callable[[int], str]]:
    """The merged boundaries, the rule in words, and what the rule goes by at each boundary."""
    traits = [row.traits for row in rows]
    allowed = capacity.mergeable(traits, cross_stage=config.cross_stage)
    if config.algorithm in LAYERWISE:
        return frozenset(), f"none: {config.algorithm} works layer by layer", lambda _: ""
    if config.units == "none" or not config.learns:
        return frozenset(), "none: every block alone", lambda _: ""
    if config.units == "manual":
        return _manual([row.block.name for row in rows], config.merge), "manual: as listed", lambda _: ""
    if config.units == "transitions":
        merged = capacity.transitions(traits, allowed, max_group=config.max_group)
        why = "transitions: each block that opens a stage joins the one before it"
        return merged, why, lambda i: f"{rows[i + 1].block.name} opens a stage" if traits[i + 1].is_transition else "no stage opens"
    metric = {
        "modcap": [row.capacity for row in rows],
        "loss": [row.loss or 0.0 for row in rows],
        "loss-normalised": [row.loss / row.energy if row.loss and row.energy else 0.0 for row in rows],
    }[config.units]
    if config.unit_selector == "topk":
        k = config.merge_count if config.merge_count is not None else sum(traits[i + 1].is_transition for i in allowed)
        gaps = capacity.gaps(metric).tolist()
        merged = capacity.topk(gaps, allowed, k=k, penalty=config.merge_penalty, max_group=config.most_blocks)
        rank = {boundary: place for place, boundary in enumerate(sorted(allowed, key=lambda i: (-gaps[i], i)), 1)}
        why = f"{config.units}: the largest gaps between neighbours, k = {k}" + (", in pairs" if config.most_blocks == 2 else "")
        return merged, why, lambda i: f"gap {rank[i]} of {len(rank)} by size" if i in rank else ""
    merges = capacity.signed_drop(metric, allowed, k=config.merge_count, tol=config.merge_tolerance, max_group=config.most_blocks)
    merged = frozenset(merge.boundary for merge in merges)
    stop = (
        f"{config.merge_count} merges"
        if config.merge_count is not None
        else f"the drops are below {config.merge_tolerance:.0%} of the loss"
    )
    # At a boundary that is left, the group behind it ends where the plan's does; at a merged one, where it did when the two were joined.
    ends = {run[0] - 1: run[-1] for run in capacity.groups(len(rows), merged)} | {merge.boundary: merge.end for merge in merges}

    def change(boundary: int) -> str:
        before, after = metric[boundary], metric[ends[boundary]]
        word = "falls" if after < before else "rises"
        share = f" by {abs(after / before - 1):.0%}" if before else ""
        return f"{word}{share} from {rows[boundary].block.name} to {rows[ends[boundary]].block.name}"

    return merged, f"{config.units}: where it drops from one block to the next, largest drop first, until {stop}", change


def _kept_apart(rows: Sequence[BlockRow], boundary: int, merged: frozenset[int], config: Config) -> str:
    """Why a boundary cannot be merged, whatever a metric says; empty where it can, or where nothing is to be joined."""
    if boundary in merged or config.units in ("none", "manual") or config.algorithm in LAYERWISE or not config.learns:
        return ""
    traits = [row.traits for row in rows]
    if boundary not in capacity.mergeable(traits, cross_stage=True):
        return "next to the stem or the head, or without weights"
    if boundary not in capacity.mergeable(traits, cross_stage=config.cross_stage):
        return "a stage opens, and --no-cross-stage"
    size = next(len(run) for run in capacity.groups(len(rows), merged | {boundary}) if boundary in run)
    return f"would be {size} blocks, of {config.most_blocks} at most" if size > config.most_blocks else ""


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
