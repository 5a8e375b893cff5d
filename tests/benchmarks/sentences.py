"""Real sentences for text models: those of the standard library's documentation, as the token numbers of a model's own tokenizer.

usage: python -m tests.benchmarks.sentences TOKENIZER.json FOLDER [--count 256] [--length 20]

Needs `tokenizers` (pip install tokenizers). Writes FOLDER/sentences_calibration.npz and FOLDER/sentences_evaluation.npz, with `input_ids`
and `attention_mask` of int64 [count, length]: the first tokens of one sentence in each row, which has as many. Nothing is padding: what an
encoder makes of it would count where results are means over all tokens. Other Python versions have other sentences.
"""

import argparse
import importlib
import random
import re
import warnings
from pathlib import Path

import numpy as np

MODULES = """
    argparse asyncio collections csv datetime decimal email enum fractions functools heapq http.server inspect itertools json logging
    math multiprocessing os pathlib pickle random re shutil socket sqlite3 statistics string subprocess tarfile tempfile textwrap
    threading time turtle typing unittest urllib.parse xml.dom zipfile zlib difflib doctest calendar cmd codecs concurrent.futures
    configparser contextlib copy ctypes bdb ast
"""


def sentences() -> list[str]:
    """The sentences of 40 to 300 characters, in a random but fixed order."""
    found: set[str] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in MODULES.split():
            module = importlib.import_module(name)
            for thing in (module, *(getattr(module, attribute) for attribute in dir(module))):
                text = getattr(thing, "__doc__", None)
                if isinstance(text, str):
                    found.update(re.sub(r"\s+", " ", part).strip() for part in re.split(r"\n\n|(?<=\.)\s", text))
    chosen = sorted(text for text in found if 40 < len(text) < 300 and re.match(r"[A-Z][a-z]", text))
    random.Random(0).shuffle(chosen)
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--length", type=int, default=20)
    arguments = parser.parse_args()
    from tokenizers import Tokenizer  # pyright: ignore[reportMissingImports]

    tokenizer = Tokenizer.from_file(str(arguments.tokenizer))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    rows = [numbers[: arguments.length] for text in sentences() if len(numbers := tokenizer.encode(text).ids) >= arguments.length]
    for position, name in enumerate(("calibration", "evaluation")):
        some = np.array(rows[position * arguments.count : (position + 1) * arguments.count], np.int64)
        np.savez(arguments.folder / f"sentences_{name}.npz", input_ids=some, attention_mask=np.ones_like(some))
        print(f"sentences_{name}.npz: {len(some)} of {len(rows)} sentences")


if __name__ == "__main__":
    main()
