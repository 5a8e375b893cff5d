"""Nodes named on the command line: by name, operator type or regular expression."""

import re
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from .errors import UsageError, near_misses
from .graph import Graph
from .scheme import Precision


def match_nodes(graph: Graph, patterns: Sequence[str], option: str = "--keep-float") -> frozenset[str]:
    """The names of the nodes that patterns select: a node name, an operator type, or a regular expression of node names.

    Raises:
        UsageError: a pattern that selects nothing, or is no regular expression.
    """
    found: set[str] = set()
    for pattern in patterns:
        selected = {node.name for node in graph.nodes if pattern in (node.name, node.op_type)}
        if not selected:
            try:
                selected = {node.name for node in graph.nodes if re.fullmatch(pattern, node.name)}
            except re.error as error:
                raise UsageError(f"{option} {pattern!r}: names no node and no operator, and is no regular expression: {error}") from error
        if not selected:
            known = {node.name for node in graph.nodes} | {node.op_type for node in graph.nodes}
            raise UsageError(f"{option} {pattern!r}: matches no node name and no operator type{near_misses(pattern, known)}")
        found |= selected
    return frozenset(found)


def own_precisions(graph: Graph, asked: Sequence[tuple[str, Precision]]) -> dict[str, Precision]:
    """The nodes that `--bits` gives bits of their own, by name; later patterns win.

    Raises:
        UsageError: a pattern that selects nothing.
    """
    return {name: precision for pattern, precision in asked for name in sorted(match_nodes(graph, [pattern], "--bits"))}


def check_own_precisions(graph: Graph, asked: Sequence[tuple[str, Precision]], met: AbstractSet[str]) -> None:
    """Refuse bits for nodes that are not among the `met` ones, which no quantizer meets and where bits would change nothing.

    Raises:
        UsageError: a `--bits` pattern selects such nodes only.
    """
    kinds = {node.name: node.op_type for node in graph.nodes}
    for pattern, _ in asked:
        selected = match_nodes(graph, [pattern], "--bits")
        if selected.isdisjoint(met):
            what, meeting = (", ".join(sorted({kinds[name] for name in names})) for names in (selected, met))
            near = near_misses(pattern, met | {kinds[name] for name in met})
            raise UsageError(
                f"--bits {pattern!r}: selects nodes ({what}) that no quantizer meets, so that bits change nothing there; they matter to "
                f"{meeting or 'nothing in this model'}{near}"
            )
