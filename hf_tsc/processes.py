"""What the processes of one training do together: divide rows, add up, agree, and fail.

A single process is the usual case; everything here is then the identity. The processes themselves are accelerate's
and torch's.

Letters: n rows of a batch in one process, W processes.
"""

from __future__ import annotations

import gc
import os
import pickle
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor

from hf_tsc.errors import HfTscError, ProcessError, UsageError

T = TypeVar("T")
SECONDS_TO_TELL = 10.0


def number_of_processes() -> int:
    """W: those that train together, not those that a launcher has started."""
    available: Any = dist.is_available() and dist.is_initialized()
    return dist.get_world_size() if available else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if number_of_processes() > 1 else 0


def is_main_process() -> bool:
    """Whether this process is the one that writes and speaks for all."""
    return rank() == 0


def speaks_of(error: BaseException) -> bool:
    """Whether this process is to report an error: the main one, and one that fails alone."""
    if number_of_processes() > 1:
        return is_main_process() or not getattr(error, "everywhere", False)
    return os.environ.get("RANK", "0") == "0"  # before they have met, all have read the same command line


def let_main_process_tell() -> None:
    """In the others: wait, before ending with an error that the main process reports.

    A launcher ends all as soon as one of them has ended with an error; it would end the main process in mid-word.
    """
    time.sleep(SECONDS_TO_TELL)


@contextmanager
def silent_but_in_main_process() -> Iterator[None]:
    """What other processes print is dropped; their errors are not."""
    if os.environ.get("RANK", "0") == "0":
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


def leave_processes(*, failed: bool = False) -> None:
    """Part from the other processes, at the end of a program.

    Gloo's threads let go of what they have exchanged last, which takes the interpreter: where that is going already,
    the process aborts (torch 2.13) in place of giving its exit code. So they end first, after a failure, too.

    Args:
        failed: the others may be anywhere; another backend than Gloo would wait for them, and is left as it is.
    """
    if number_of_processes() > 1 and (not failed or dist.get_backend() == dist.Backend.GLOO):
        gc.collect()  # what is left of a training holds the group, and with it the threads
        PartialState().destroy_process_group()


def meet_processes(*, use_cpu: bool, timeout: int) -> None:
    """Let the processes that a launcher has started know each other, if they do not yet.

    Args:
        use_cpu: they stay off accelerators.
        timeout: seconds that one waits for another, which may be measuring meanwhile.

    Raises:
        UsageError: they would train alone; see `check_world_size`.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        on_cpu = use_cpu or parse_flag_from_env("ACCELERATE_USE_CPU")
        PartialState(cpu=on_cpu, timeout=timedelta(seconds=timeout))
    check_world_size()


def working_device(*, use_cpu: bool) -> torch.device:
    """The accelerator, where there is one that may be used, or else the CPU."""
    found = None if use_cpu else torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None else found


def check_world_size() -> None:
    """Raises UsageError where a launcher has started several processes and each is about to train alone.

    torch's process group says nothing of that: without an accelerator, accelerate makes one and does not use it.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    training = PartialState().num_processes if PartialState._shared_state else 1
    if launched > 1 and training == 1:
        error = UsageError(
            f"WORLD_SIZE={launched}, but this process would train alone, and so would the others: on processors give "
            "use_cpu (--use_cpu), or start with `hf-tsc purify --accelerate_config multi_cpu`"
        )
        error.everywhere = True
        raise error


@dataclass(frozen=True)
class Rows:
    """Some rows of a larger batch.

    Attributes:
        index: int64 (n,), which.
        total: of how many.
    """

    index: Tensor
    total: int

    def of(self, drawn: Tensor) -> Tensor:
        """(total, ...) -> (n, ...)."""
        return drawn[self.index.to(drawn.device)]

    def twice(self) -> Rows:
        """The same rows of two batches, one after the other."""
        return Rows(torch.cat([self.index, self.total + self.index]), 2 * self.total)


def own_rows(n: int) -> Rows | None:
    """Where the n rows of this process stand among those of all, which have n each; None for a single process.

    What is drawn for all rows, and then taken for one's own, does not depend on the number of processes.
    """
    count = number_of_processes()
    return None if count == 1 else Rows(torch.arange(n) + rank() * n, count * n)


def across_processes(tensor: Tensor) -> Tensor:
    """(n, ...) of this process -> (W · n, ...) of all of them, in the order of their ranks.

    The gradient reaches this process' own rows alone; see `loss_of_all`.
    """
    if number_of_processes() == 1:
        return tensor
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(number_of_processes())]
    dist.all_gather(parts, tensor.detach().contiguous())
    parts[rank()] = tensor
    return torch.cat(parts)


def loss_of_all(loss: Tensor) -> Tensor:
    """A loss that every process has computed from the rows of all, ready for an average of gradients.

    Each process has the gradient with respect to its own rows. The gradient of the whole is their sum; distributed
    training averages, which takes a factor of the number of processes. The value stays.
    """
    return loss.detach() + number_of_processes() * (loss - loss.detach()) if number_of_processes() > 1 else loss


def counted_once(value: Tensor) -> Tensor:
    """A value that every process computes alike from the parameters themselves, for use in a `loss_of_all`.

    There each process' gradient is taken for a part of the whole.
    """
    if number_of_processes() == 1:
        return value
    return value.detach() + (value - value.detach()) / number_of_processes()


def add_up(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over the processes, in place."""
    if number_of_processes() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def of_all(value: T) -> list[T]:
    """What each process has, in the order of their ranks; pickled on the way."""
    if number_of_processes() == 1:
        return [value]
    found: list[Any] = [None] * number_of_processes()
    dist.all_gather_object(found, value)
    return found


@contextmanager
def together() -> Iterator[None]:
    """For what each process does by itself: an error in one of them is raised in all.

    The others would wait in vain where the processes meet next. All have to enter, and must not meet inside.
    """
    if number_of_processes() == 1:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    errors = of_all(None if error is None else _message(error))
    first = next((number for number, one in enumerate(errors) if one is not None), None)
    if first is not None:
        raised_by_all: Any = error if first == rank() else errors[first]
        raised_by_all.everywhere = True
        raise raised_by_all


def on_main_process(call: Callable[[], T]) -> T:
    """What a call gives in the main process, in all of them; its error, too. The others wait."""
    found: Any = None
    with together():
        if is_main_process():
            found = call()
    result: T = of_all(found)[0]
    return result


def _message(error: Exception) -> Exception:
    """The error, or what can be said of it where it cannot be sent."""
    try:
        if isinstance(error, HfTscError | OSError) and str(pickle.loads(pickle.dumps(error))) == str(error):
            return error
    except Exception:  # an exception may have any constructor
        pass
    return ProcessError(f"process {rank()} failed: {type(error).__name__}: {error}")
