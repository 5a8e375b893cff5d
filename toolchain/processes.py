"""Processes that learn together (torchrun): each takes its share of every mini-batch, and gradients are summed before the optimiser's step.

Everything else each process does alike, from the same seed: the calibration, the activations of all samples, the draw of mini-batches and
of dropped elements. So the result is that of one process with the same mini-batches, up to the order of sums.
"""

import atexit
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from .config import BATCH, Config
from .errors import ProcessError, UsageError

if TYPE_CHECKING:
    import torch

_SHARING = ("adaround", "brecq", "qdrop")
T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among those of the run: `rank` of `count`, with `local` its number on its machine."""

    rank: int = 0
    count: int = 1
    local: int = 0

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Processes":
        """What torchrun set in the environment; one process where it did not start this one."""
        if not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"} <= environment.keys():
            return ALONE
        return cls(*(int(environment[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))

    @property
    def is_first(self) -> bool:
        """The first process reads and writes the run folder, prints, exports and validates."""
        return self.rank == 0

    @contextmanager
    def joined(self, device: "torch.device") -> Iterator[None]:
        """Connect the processes, over NCCL where they compute on CUDA devices (one each), else over gloo."""
        if self.count == 1:
            yield
            return
        import torch
        import torch.distributed as dist

        if device.type == "cuda":
            if self.local >= torch.cuda.device_count():
                raise UsageError(
                    f"torchrun: process {self.local} of this machine has no CUDA device; there are {torch.cuda.device_count()}"
                )
            torch.cuda.set_device(self.local)
        with _together():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        yield
        with _together():  # not behind an error: the others may never get here
            dist.barrier()  # nobody leaves while another one still talks to it
        dist.destroy_process_group()

    @contextmanager
    def ending(self) -> Iterator[None]:
        """End the process behind this where it is one of several, with its exit code, and without the interpreter's own end.

        Threads of gloo that still run there, after an error of another process too, abort it, which torchrun takes for a failure.
        """
        if self.count == 1:
            yield
            return
        code: Any = 0
        try:
            yield
        except SystemExit as ended:
            code = ended.code
        except BaseException:
            traceback.print_exc()
            code = 1
        atexit._run_exitfuncs()  # files that vanish with the process
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else code is not None)

    def check(self, config: Config, samples: int) -> None:
        """Refuse what cannot be shared.

        Raises:
            UsageError: saying what to change.
        """
        if self.count == 1:
            return
        if config.algorithm not in _SHARING:
            raise UsageError(f"torchrun: --algorithm {config.algorithm} has no mini-batches to share: start it as one process")
        batch = min(config.batch_size or BATCH, samples)
        if batch % self.count:
            raise UsageError(f"torchrun: mini-batches of {batch} samples do not divide among {self.count} processes; change --batch-size")

    def share(self, size: int) -> slice:
        """This process's rows of a mini-batch."""
        return slice(size * self.rank // self.count, size * (self.rank + 1) // self.count)

    def sum(self, tensors: Sequence["torch.Tensor"]) -> None:
        """Replace tensors by their sums over all processes, the same bits in each."""
        if self.count == 1:
            return
        import torch
        import torch.distributed as dist

        joined = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with _together():
            dist.all_reduce(joined)
        for tensor, total in zip(tensors, joined.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def first(self, value: T) -> T:
        """The first process's value."""
        if self.count == 1:
            return value
        import torch.distributed as dist

        box: list[Any] = [value]
        with _together():
            dist.broadcast_object_list(box)
        return box[0]


ALONE = Processes()


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ProcessError(f"the other processes of this run cannot be reached; one of them may have said why ({error})") from error
