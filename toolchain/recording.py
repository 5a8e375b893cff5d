"""Work that a device repeats, captured once as a CUDA graph: thousands of kernels are then started as one, without Python between them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

import torch

# Calls before a function is captured: libraries choose their algorithms, optimisers make their state, and loops are compiled in them.
_AS_IT_IS = 3

T = TypeVar("T")


class NotCapturedError(Exception):
    """A device could not capture what it was given, for a reason that the message names."""


class Capture(Protocol):
    """Captures a function; returns what it returned, to be overwritten by each replay, and the replay. Capturing computes nothing."""

    def __call__(self, function: Callable[[], T], /) -> tuple[T, Callable[[], None]]: ...


class Recorded(Generic[T]):
    """A function of no arguments that does the same to the same memory at every call: called as it is at first, then replayed."""

    def __init__(self, function: Callable[[], T], capture: Capture) -> None:
        self._function, self._capture = function, capture
        self._calls = 0
        self._captured: tuple[T, Callable[[], None]] | None = None

    def __call__(self) -> T:
        """What the function returns; the next call overwrites it.

        Raises:
            NotCapturedError: the function cannot be captured. What it would have done at this call is not done.
        """
        if self._calls < _AS_IT_IS:
            self._calls += 1
            return self._function()
        if self._captured is None:
            self._captured = self._capture(self._function)
        result, replay = self._captured
        replay()
        return result


@contextmanager
def capturing(generator: torch.Generator) -> Iterator[Capture]:
    """What captures functions on a CUDA device, which draw from one generator; until the end, the device works on a stream of its own.

    All that is captured later must have run on that stream before: autograd runs a backward pass on the streams of its forward pass.
    """
    device = generator.device
    before, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    stream.wait_stream(before)
    try:
        with torch.cuda.stream(stream):
            yield lambda function: _captured(function, stream, generator)
    finally:
        before.wait_stream(stream)


def _captured(function: Callable[[], T], stream: torch.cuda.Stream, generator: torch.Generator) -> tuple[T, Callable[[], None]]:
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    try:
        # The stream twice: where a capture fails, torch does not go back to the one before. Other threads may use the device.
        with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            result = function()
    except RuntimeError as error:
        first = _first(error)
        if isinstance(first, torch.OutOfMemoryError):
            raise first from None
        reason = next((line.strip() for line in str(first).splitlines() if line.strip()), type(first).__name__)
        raise NotCapturedError(reason) from error
    return result, graph.replay


def _first(error: BaseException) -> Any:
    """Where a capture fails, so does its end: the error that came first says why."""
    while error.__context__ is not None:
        error = error.__context__
    return error
