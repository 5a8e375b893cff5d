"""What makes torch fast on CPUs and what makes it slow: settings of the whole process, and a word about its threads."""

import ctypes
import os
import sys
from collections.abc import Callable

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # from glibc's malloc.h


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next allocation instead of returning every large block to the kernel.

    A training step allocates and frees the same few large tensors over and over; fetched anew from the kernel, each page is faulted in and
    zeroed again, which costs more than the arithmetic on it (2-3 times the whole step on 1 MB activations). Does nothing where the C
    library is not glibc.
    """
    mallopt = _of_glibc("mallopt")
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def give_back_freed_memory() -> None:
    """Return to the system what glibc has kept, the holes between what is in use included.

    For where the work changes: the next allocations are of other sizes, which do not fit the holes.
    """
    malloc_trim = _of_glibc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _of_glibc(name: str) -> Callable[..., int] | None:
    """A function of the C library; None where that is not glibc."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        return getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError):
        return None


def crowding(threads: int) -> str | None:
    """A word about other work on the machine, where torch's threads would share their cores with it; None where they would not, or are one.

    Threads wait for each other at the end of every operation, and OpenMP's spin as they wait: with a core taken away from one of them,
    two have been seen to take ten to sixty times as long as one alone. The number stays as it is: results depend on it.
    """
    cores = os.cpu_count() or 1
    if threads < 2 or not hasattr(os, "getloadavg"):
        return None
    load = os.getloadavg()[0]
    if load + threads < cores + 1:
        return None
    return (
        f"this machine is busy (load {load:.1f} on {cores} cores): {threads} threads that share them with other work can take many times "
        "longer than one; if progress is slow, start again with OMP_NUM_THREADS=1"
    )
