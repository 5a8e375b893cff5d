"""The claims of the MRECG poster as instruments for the user's own model: the runs that test each one, and a sentence on what they show.

Each claim is judged by what its runs measured and nothing else; a claim that does not hold, or that so few runs cannot decide, is said so.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .capacity import groups, oscillation
from .comparison import Job, method
from .config import Config
from .intervals import paired_difference, pearson, spearman
from .outcomes import differing

CLAIMS = {
    "oscillation": "the loss oscillates along the network with AdaRound and BRECQ, and MRECG smooths it",
    "final-error": "the largest error of the earlier units decides the final error",
    "accuracy": "the smaller the final error, the better the accuracy",
    "data": "larger batches and more samples improve the accuracy, with diminishing returns",
    "theorem": "between equivalent neighbours the loss does not fall (Theorem 1)",
}
_METHODS = ("adaround", "brecq", "mrecg+brecq")
_MATERIAL = 0.05  # of the drops: as for joining blocks, less does not count
_BATCHES, _SHARES = (8, 32, 128), (0.125, 0.5, 1.0)


def study_jobs(
    claims: Sequence[str], base: Config, boundaries: Sequence[int], names: Sequence[str], schemes: int, samples: int
) -> list[Job]:
    """The runs that the claims need; a run that two claims share is made once.

    Args:
        claims: some of `CLAIMS`.
        base: all other settings; random schemes and data use its algorithm.
        boundaries: boundaries between blocks that may be merged away.
        names: of the blocks.
        schemes: how many random unit schemes to draw.
        samples: calibration samples at hand.
    """
    jobs: list[Job] = []
    if "oscillation" in claims or "theorem" in claims:
        jobs += [Job(text, method(text, base), "oscillation") for text in _METHODS]
    if "final-error" in claims or "accuracy" in claims:
        for index, merges in enumerate(random_schemes(boundaries, names, schemes, base.max_group, base.seed)):
            units = {"units": "manual", "merge": merges} if merges else {"units": "none"}
            jobs.append(Job(f"scheme {index}", dataclasses.replace(base, **units), "schemes"))
    if "data" in claims:
        for batch in _BATCHES:
            jobs.append(Job(f"batch {batch}", dataclasses.replace(base, batch_size=batch), "batch"))
        for share in _SHARES:
            count = max(round(samples * share), 1)
            jobs.append(Job(f"{count} samples", dataclasses.replace(base, calibration_samples=count), "samples"))
    return jobs


def random_schemes(boundaries: Sequence[int], names: Sequence[str], count: int, max_group: int, seed: int) -> list[tuple[str, ...]]:
    """Distinct random unit schemes as `--merge` has them: each boundary is merged with a probability drawn anew for each scheme."""
    rng = np.random.default_rng(seed)
    found: dict[tuple[str, ...], None] = {}
    for _ in range(100 * count):
        if len(found) == count:
            break
        share = rng.uniform(0.0, 0.7)
        merged: set[int] = set()
        for boundary in rng.permutation(list(boundaries)):
            if rng.random() < share and max(map(len, groups(len(names), merged | {int(boundary)}))) <= max_group:
                merged.add(int(boundary))
        runs = [run for run in groups(len(names), merged) if len(run) > 1]
        found[tuple("+".join(names[i] for i in run) for run in runs)] = None
    return list(found)


def findings(claims: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each claim: the claim in words, its figures, and the verdict in one sentence."""
    by_group = {group: [row for row in rows if row["group"] == group] for group in ("oscillation", "schemes", "batch", "samples")}
    found = {
        "oscillation": lambda: _oscillation(by_group["oscillation"]),
        "final-error": lambda: _final_error(by_group["schemes"]),
        "accuracy": lambda: _accuracy(by_group["schemes"]),
        "data": lambda: _data(by_group["batch"], by_group["samples"]),
        "theorem": lambda: _theorem([row for row in by_group["oscillation"] if row["label"] == "brecq"]),
    }
    return {claim: {"claim": CLAIMS[claim], **found[claim]()} for claim in claims}


def final_losses(row: Mapping[str, Any]) -> list[float]:
    """The loss of each unit as it is in the table."""
    return [min(before, after) if after is not None else before for before, after in row["unit_losses"]]


def _oscillation(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The sums of the drops; BRECQ's also over the blocks alone at which MRECG's units end, since fewer places have fewer drops."""
    lines = []
    for row in rows:
        losses, ends = final_losses(row), [unit.split("+")[-1] for unit in row["learned_units"]]
        places = [(row["blocks"].index(end) + 1) / len(row["blocks"]) for end in ends]
        lines.append({"method": row["label"], "ends": ends, "places": places, "losses": losses, "oscillation": oscillation(losses)})
    by_name = {line["method"]: line for line in lines}
    plain, joined = by_name["brecq"], by_name["mrecg+brecq"]
    there = [loss for end, loss in zip(plain["ends"], plain["losses"], strict=True) if end in joined["ends"]]
    text = (
        f"The drops of the loss sum to {by_name['adaround']['oscillation']:.4g} with AdaRound (per layer), {plain['oscillation']:.4g} with "
        f"BRECQ and {joined['oscillation']:.4g} with MRECG"
    )
    if plain["oscillation"] <= 0:
        verdict, holds = f"{text}: with BRECQ nothing oscillates here, so that there is nothing to smooth.", None
    elif len(rows[-1]["units"]) == len(rows[-1]["blocks"]):
        verdict, holds = f"{text}: no blocks are joined here, so that the two are the same.", None
    else:
        same = oscillation(there)
        holds = joined["oscillation"] < (1 - _MATERIAL) * same if same > 0 or joined["oscillation"] > 0 else None
        word = {
            True: "MRECG smooths it",
            False: f"MRECG leaves out the blocks where it drops, but does not lower by {100 * _MATERIAL:.0f} % the drops that are left",
            None: "MRECG leaves out the blocks where it drops, and no drop is left with either",
        }[holds]
        verdict = f"{text}; over the {len(there)} blocks at which MRECG's units end, BRECQ's sum to {same:.4g}: {word} (one seed)."
    return {"lines": lines, "same_places": oscillation(there), "verdict": verdict, "holds": holds}


def _final_error(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Whether both go together; where the largest is that of the neighbour, it says no more than that errors pass on to the next unit."""
    several = [losses for row in rows if len(losses := final_losses(row)) > 1]
    facts = _correlated([(max(losses[:-1]), losses[-1]) for losses in several], "largest earlier loss", "final loss", positive=True)
    near = sum(max(losses[:-1]) == losses[-2] for losses in several)
    verdict = f"{facts['verdict'].removesuffix('.')}; in {near} of {len(several)} schemes the largest is that of the unit before the last."
    return facts | {"verdict": verdict}


def _accuracy(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    key = "top1" if all(row["top1"] is not None for row in rows) else "agreement"
    points = [(final_losses(row)[-1], row[key]) for row in rows if row[key] is not None]
    name = "top-1 accuracy, %" if key == "top1" else "agreement with the float model, %"
    return _correlated(points, "final loss", name, positive=False)


def _correlated(points: Sequence[tuple[float, float]], x: str, y: str, *, positive: bool) -> dict[str, Any]:
    """Both correlations with their intervals; the claim holds where the whole interval of the ranks' has the claimed sign."""
    first, second = [p[0] for p in points], [p[1] for p in points]
    linear, ranks = pearson(first, second), spearman(first, second)
    facts = {"x": x, "y": y, "points": [list(p) for p in points], "pearson": linear, "spearman": ranks}
    named = y.removesuffix(", %")
    if linear is None or ranks is None:
        return facts | {
            "verdict": f"The {len(points)} schemes differ too little to correlate {x} and {named}.",
            "holds": None,
        }
    text = (
        f"Over {len(points)} random unit schemes the {x} and the {named} correlate with r = {linear[0]:+.2f} "
        f"(95 %: {linear[1]:+.2f} to {linear[2]:+.2f}), rank correlation {ranks[0]:+.2f} ({ranks[1]:+.2f} to {ranks[2]:+.2f})"
    )
    low, high = ranks[1:] if positive else (-ranks[2], -ranks[1])
    holds = True if low > 0 else False if high < 0 else None
    word = {True: "the claim holds here", False: "the opposite of the claim", None: "undecided, the interval includes zero"}[holds]
    return facts | {"verdict": f"{text}: {word}.", "holds": holds}


def _data(batches: Sequence[Mapping[str, Any]], samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    key = "top1" if all(row["top1"] is not None for row in [*batches, *samples]) else "agreement"
    series = {
        "batch size": [(row["settings"]["batch-size"], row) for row in batches],
        "calibration samples": [(row["calibration_samples"], row) for row in samples],
    }
    texts, holds = [], []
    for name, runs in series.items():
        (least, first), (most, last) = runs[0], runs[-1]
        gain, noise = last[key] - first[key], _noise(first, last)
        holds.append(True if gain > noise else False if gain < -noise else None)
        texts.append(f"{name}, {least} to {most}: {first[key]:.2f} to {last[key]:.2f} % ({gain:+.2f} points, within {noise:.2f} is chance)")
    decided = True if all(h is True for h in holds) else False if any(h is False for h in holds) else None
    word = {True: "both improve it", False: "not confirmed here", None: "undecided for at least one of them"}[decided]
    return {
        "series": {name: [[x, row[key], _noise(row, runs[-1][1])] for x, row in runs] for name, runs in series.items()},
        "metric": key,
        "verdict": f"By {'; by '.join(texts)}: {word} (one seed).",
        "holds": decided,
    }


def _noise(first: Mapping[str, Any], last: Mapping[str, Any]) -> float:
    """Half the 95 % interval of the difference of two runs on the same samples, in points; it knows nothing of the spread between seeds."""
    low, high = paired_difference(*differing(first["outcomes"], last["outcomes"], first["samples"]), first["samples"])
    return (high - low) / 2


def equivalent_neighbours(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Neighbouring blocks of a run, every block alone, with the same layers and no new stage, and whether the loss rises or stays."""
    losses = dict(zip(row["learned_units"], final_losses(row), strict=True))
    position = {name: index for index, name in enumerate(row["blocks"])}
    pairs = []
    for a, b in itertools.pairwise(row["blocks"]):
        same = row["block_layers"][position[a]] == row["block_layers"][position[b]] and not row["block_opens"][position[b]]
        if same and a in losses and b in losses:
            pairs.append({"blocks": [a, b], "losses": [losses[a], losses[b]], "rises": losses[b] >= losses[a]})
    return pairs


def _theorem(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    (row,) = rows
    pairs = equivalent_neighbours(row)
    if not pairs:
        return {"pairs": pairs, "verdict": "The model has no equivalent neighbours (same layers, no new stage).", "holds": None}
    count = sum(pair["rises"] for pair in pairs)
    word = (
        "as the theorem says"
        if count == len(pairs)
        else "more often than not"
        if 2 * count > len(pairs)
        else "the theorem does not describe it"
    )
    text = f"The loss rises or stays in {count} of {len(pairs)} pairs of equivalent neighbours (BRECQ, every block alone): {word}."
    return {"pairs": pairs, "verdict": text, "holds": count == len(pairs)}
