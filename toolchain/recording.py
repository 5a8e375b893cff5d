"""Work that a device repeats, captured once as a CUDA graph: thousands of kernels are then started as one, without Python between them."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

import torch

from .errors import first_line

# Calls before a function is captured: libraries choose their algorithms, optimisers make their state, and loops are compiled in them.
_AS_IT_IS = 3

T = TypeVar("T")


class NotCapturedError(Exception):
    """A device could not capture what it was given, for a reason that the message names."""


class Capture(Protocol):
    """Captures functions."""

    def rehearsed(self, function: Callable[[], T], /) -> T:
        """Call a function that is to be captured next.

        Raises:
            NotCapturedError: it does what cannot be captured, such as waiting for the device; it may have been done in part.
        """
        ...

    def captured(self, function: Callable[[], T], /) -> tuple[T, Callable[[], None]]:
        """What a function returns, which each replay overwrites, and the replay. Capturing computes nothing.

        Raises:
            NotCapturedError: the device refused.
        """
        ...


class Recorded(Generic[T]):
    """A function of no arguments that does the same to the same memory at every call: called as it is at first, then replayed."""

    def __init__(self, function: Callable[[], T], capture: Capture) -> None:
        self._function, self._capture = function, capture
        self._calls = 0
        self._captured: tuple[T, Callable[[], None]] | None = None

    def __call__(self) -> T:
        """What the function returns; the next call overwrites it.

        Raises:
            NotCapturedError: the function cannot be captured, or not on this device.
        """
        self._calls += 1
        if self._calls < _AS_IT_IS:
            return self._function()
        if self._calls == _AS_IT_IS:
            return self._capture.rehearsed(self._function)
        if self._captured is None:
            self._captured = self._capture.captured(self._function)
        result, replay = self._captured
        replay()
        return result


@contextmanager
def capturing(generator: torch.Generator) -> Iterator[Capture]:
    """What captures functions on a CUDA device, which draw from one generator; until the end, the device works on a stream of its own.

    All that is captured later must have run on that stream before: autograd runs a backward pass on the streams of its forward pass.

    Raises:
        NotCapturedError: a capture failed on this device before, which leaves the memory that torch keeps for it between two states.
    """
    device = generator.device
    if device in _broken:
        raise NotCapturedError("an earlier capture failed")
    before, stream = torch.cuda.current_stream(device), _stream(device)
    stream.wait_stream(before)
    try:
        with torch.cuda.stream(stream):
            yield _Graphs(stream, generator)
    finally:
        before.wait_stream(stream)


_broken: set[torch.device] = set()


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all units: libraries keep a workspace for each stream that they have seen."""
    return torch.cuda.Stream(device)


class _Graphs:
    def __init__(self, stream: torch.cuda.Stream, generator: torch.Generator) -> None:
        self._stream, self._generator = stream, generator

    def rehearsed(self, function: Callable[[], T]) -> T:
        mode, refusal = torch.cuda.get_sync_debug_mode(), None
        torch.cuda.set_sync_debug_mode("error")  # most of what cannot be captured is found here, where nothing is left behind
        try:
            return function()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            refusal = first_line(error)
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        raise NotCapturedError(refusal)  # not from the error, which holds all that was computed

    def captured(self, function: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        if torch.__version__ < "2.14":  # from then on a graph finds the generators by itself, and says so at each call
            graph.register_generator_state(self._generator)
        try:
            # The stream twice: where a capture fails, torch does not go back to the one before. Other threads may use the device.
            with torch.cuda.stream(self._stream), torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                result = function()
        except RuntimeError as error:
            is_full, reason = isinstance(_first(error), torch.OutOfMemoryError), first_line(_first(error))
        else:
            return result, graph.replay
        if is_full:
            raise torch.OutOfMemoryError(reason)
        _broken.add(self._generator.device)
        raise NotCapturedError(reason)


def _first(error: BaseException) -> BaseException:
    """Where a capture fails, so does its end: the error that came first says why."""
    while error.__context__ is not None:
        error = error.__context__
    return error
