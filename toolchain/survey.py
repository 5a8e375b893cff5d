"""What can be said of a model and its samples before the work begins: its blocks, their plan, the memory, and what is refused."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from . import capacity
from .activations import LARGEST_CHUNK, chunk
from .config import LAYERWISE, Config
from .device import pick_device
from .errors import UsageError, near_misses
from .importing import cut_blocks
from .islands import IslandRow, find_islands, island_rows
from .memory import Demand, Work, demand
from .packing import FLOAT_TYPES
from .partition import Block, merge
from .placement import place
from .plan import BlockRow, Plan, block_rows, make_plan
from .samples import Samples, check_labels
from .selection import check_own_precisions, match_nodes, own_precisions
from .source import SourceModel, ValueTypes, infer_types

_ASSUMED_AXIS = 224


@dataclass(frozen=True)
class Survey:
    """Types of a model's values for its samples, the nodes left to ONNX Runtime with the reasons, and its blocks."""

    types: ValueTypes
    islands: Mapping[str, str]
    rows: tuple[BlockRow, ...]


def survey(source: SourceModel, samples: Samples, config: Config) -> Survey:
    """Partition the model, and refuse settings that name what it does not have: everything that can be said before the work begins."""
    types = infer_types(source, samples.shapes, samples.inputs)
    islands, kept = find_islands(source, types), match_nodes(source.graph, config.keep_float)
    if own := own_precisions(source.graph, config.own_bits):
        placement = place(source, types, config.scheme, config.precision, kept, islands, own)
        check_own_precisions(source.graph, config.own_bits, placement.met)
    rows = block_rows(source, types, cut_blocks(source, types, islands, config), config)
    if config.merge:
        make_plan(source, rows, config)
    return Survey(types, islands, rows)


def expected_memory(source: SourceModel, samples: Samples, found: Survey, config: Config) -> Demand:
    """What a run will take at its peak, from the shapes of the model's values.

    Raises:
        UsageError: more than the memory budget.
    """
    types, blocks = found.types, [row.block for row in found.rows]
    placement = place(source, types, config.scheme, config.precision, match_nodes(source.graph, config.keep_float))
    size, count = types.batch or pass_size(types, blocks, config), min(samples.count, config.calibration_samples)
    float_bytes, device = FLOAT_TYPES[config.cache_dtype].itemsize, pick_device(config.device)
    units = _possible_units(source, found.rows, config)
    work = Work(source, types, placement.activations.keys(), count, config.batch, size, is_divisible(types, blocks))
    expected = demand(work, blocks, placement, float_bytes, device, units)
    expected.room_in(config.memory)
    return expected


def _possible_units(source: SourceModel, rows: Sequence[BlockRow], config: Config) -> list[Block]:
    """The largest that blocks may be joined to from each of them on; none where they are not joined."""
    if not config.learns or config.algorithm in LAYERWISE or config.units in ("none", "manual"):
        return []
    allowed = capacity.mergeable([row.traits for row in rows], cross_stage=config.cross_stage)
    found = []
    for start in range(len(rows)):
        end = start
        while end in allowed and end - start < config.most_blocks - 1:
            end += 1
        if end > start:
            found.append(merge(source.graph, [row.block for row in rows[start : end + 1]]))
    return found


def pass_size(types: ValueTypes, blocks: Sequence[Block], config: Config) -> int:
    """Samples in a forward pass; a mini-batch, where mini-batches must be whole passes because not all values are arrays of samples."""
    return chunk(types) if _crossing(blocks) <= types.stacked else min(LARGEST_CHUNK, config.batch(types.largest(types.stacked)))


def is_divisible(types: ValueTypes, blocks: Sequence[Block]) -> bool:
    """Whether mini-batches can be learned from in parts: those that are no whole passes."""
    return types.batch is None and _crossing(blocks) <= types.stacked


def _crossing(blocks: Sequence[Block]) -> set[str]:
    return {value for block in blocks if block.weighted for value in (*block.inputs, *block.outputs)}


def check_classes(source: SourceModel, samples: Samples, where: str) -> None:
    """Refuse labels that are no classes of the model; a model without a class output takes any.

    Raises:
        DataError: saying what range the labels have and what the model.
    """
    if samples.labels is None:
        return
    types = infer_types(source, samples.shapes)
    classes = next((types.shapes[name][0] for name in source.graph.outputs if len(types.shapes.get(name, ())) == 1), 1)
    if classes > 1:
        check_labels(samples.labels, classes, where)


def inspect(source: SourceModel, shapes: Mapping[str, tuple[int, ...]], config: Config) -> tuple[Plan, tuple[IslandRow, ...]]:
    """The data-free plan for inputs of the given sample shapes, and what of the model is left to ONNX Runtime."""
    types = infer_types(source, shapes)
    islands = find_islands(source, types)
    blocks = cut_blocks(source, types, islands, config)
    return make_plan(source, block_rows(source, types, blocks, config), config), island_rows(source, blocks, islands)


def sample_shapes(source: SourceModel, given: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Shapes of one sample of each input where there are no samples; open axes that nobody gave are assumed, and those inputs listed."""
    names = [spec.name for spec in source.inputs]
    unknown = next((name for name in given if name not in names), None)
    if unknown is not None:
        raise UsageError(
            f"--input-shape: the model has no input {unknown!r}{near_misses(unknown, names)}; its inputs are {', '.join(names)}"
        )
    shapes = {
        spec.name: given.get(spec.name, tuple(axis if isinstance(axis, int) else _ASSUMED_AXIS for axis in spec.sample_shape))
        for spec in source.inputs
    }
    guessed = [s.name for s in source.inputs if s.name not in given and not all(isinstance(axis, int) for axis in s.sample_shape)]
    return shapes, guessed
