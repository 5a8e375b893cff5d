"""Export one model of each architecture of timm, as today's PyTorch does by default; runs where timm, torch and onnxscript are installed.

usage: python timm_models.py FOLDER [--largest 40]

Weights are untrained (seed 0), with the running statistics of BatchNorm taken from one batch of noise. Of each module the smallest model by its
name is taken, and none of more than so many million parameters. What fails to export has a line.
"""

import argparse
import collections
import re
import sys
import warnings
from pathlib import Path

import timm
import torch

SMALL = ("atto", "femto", "pico", "nano", "xxs", "zepto", "xxt", "tiny", "micro", "mini", "_s0", "_050", "_m0", "_b0", "_small", "_xs", "_t0", "18", "_s")


def rank(name: str) -> tuple[int, int]:
    """Small models first, by what their names say."""
    place = next((place for place, word in enumerate(SMALL) if word in name), len(SMALL))
    return (len(SMALL) + 1 if re.search("384|512|448|giant|huge|large", name) else place), len(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--largest", type=float, default=40)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore")
    modules = collections.defaultdict(list)
    for name in timm.list_models():
        modules[timm.models._registry._model_to_module[name]].append(name)
    for module, names in sorted(modules.items()):
        name = min(names, key=rank)
        place = options.folder / f"{name}.onnx"
        if place.exists():
            continue
        try:
            torch.manual_seed(0)
            model = timm.create_model(name).eval()
            if sum(parameter.numel() for parameter in model.parameters()) > options.largest * 1e6:
                print(f"{module}: {name} is larger", flush=True)
                continue
            shape = model.default_cfg.get("input_size", (3, 224, 224))
            norms = [part for part in model.modules() if isinstance(part, torch.nn.modules.batchnorm._BatchNorm)]
            for part in norms:
                part.momentum = None
                part.train()
            with torch.no_grad():
                model(torch.randn(4, *shape))
            torch.onnx.export(model.eval(), (torch.randn(1, *shape),), str(place), dynamo=True, external_data=False, verbose=False)
        except Exception as error:  # of whatever kind: the next one
            print(f"{module}: {name}: {type(error).__name__}: {error}".replace("\n", " ")[:150], file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
