"""The model cut into blocks around its float islands, and the blocks in torch."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from . import partition
from .activations import TorchModel
from .config import LAYERWISE, Config
from .import_check import check_import
from .partition import Block, Rules
from .samples import Samples
from .source import SourceModel, ValueTypes


def cut_blocks(source: SourceModel, types: ValueTypes, islands: Mapping[str, str], config: Config) -> tuple[Block, ...]:
    """The blocks of a model around its islands."""
    rules = Rules(types.batched, types.shared, islands.keys(), config.boundary)
    if config.algorithm in ("adaquant", "bit-split"):  # they look at what a weighted node makes, before its activation
        behind = [node.outputs[0] for node in source.graph.weighted if node.name not in islands]
        rules = replace(rules, boundaries=(*rules.boundaries, *behind))
    return (partition.layers if config.algorithm in LAYERWISE else partition.partition)(source.graph, rules)


def imported(
    source: SourceModel, types: ValueTypes, islands: Mapping[str, str], samples: Samples, config: Config, device: torch.device
) -> tuple[TorchModel, dict[str, str], float]:
    """The blocks in torch, the islands between them, and the worst difference to ONNX Runtime that is left.

    To the islands that are known come nodes that torch computes differently, or not at all when it comes to it.
    """
    islands = dict(islands)
    while True:
        model = TorchModel.of(source, types, cut_blocks(source, types, islands, config), device)
        error, strays = check_import(model, samples)
        if not strays:
            return model, islands, error
        islands |= strays
