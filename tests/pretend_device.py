"""A device that computes on the processor and refuses, as an accelerator does, to mix its tensors with others.

    python tests/pretend_device.py '[["purify", ...], ["benchmark", ...]]'

runs commands of hf-tsc on it, in one process, and writes what each returned as the last line. `set_up` changes what
torch takes for the accelerator, for the rest of the process, so this is run as a program of its own.
"""

from __future__ import annotations

import json
import os
import sys
from glob import glob
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
aten = torch.ops.aten
_LIBRARY = torch.library.Library("aten", "IMPL", "PrivateUse1")
ACROSS_DEVICES = {aten.copy_.default, aten._to_copy.default}
WITH_INDICES = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class OnDevice(Tensor):
    """A tensor of the device; `inner` is where its numbers are."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        options: dict[str, Any] = {"dtype": inner.dtype, "layout": inner.layout, "device": torch.device(NAME, 0)}
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), **options
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})

    def __deepcopy__(self, memo):
        made: Tensor = OnDevice(self.inner.detach().clone())
        if isinstance(self, nn.Parameter):
            made = nn.Parameter(made, requires_grad=self.requires_grad)
        memo[id(self)] = made
        return made

    # of subclasses torch refuses these, and of devices it does not
    def tolist(self):
        return self.inner.detach().tolist()

    def data_ptr(self):
        return self.inner.data_ptr()

    def untyped_storage(self):
        return self.inner.untyped_storage()


def run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation on the numbers, if all tensors are where it takes them from."""
    flat, structure = tree_flatten((args, kwargs))
    there = [value for value in flat if isinstance(value, OnDevice)]
    if there and function not in ACROSS_DEVICES | WITH_INDICES:
        for value in flat:
            if isinstance(value, Tensor) and not isinstance(value, OnDevice) and value.dim() > 0:
                raise RuntimeError(f"Expected all tensors to be on the same device: {function} has some on two")
    inner = tree_unflatten([_inner(value) for value in flat], structure)
    result = function(*inner[0], **inner[1])
    if function is aten.copy_.default:
        return args[0]
    asked = kwargs.get("device")
    if not (there if asked is None else asked.type == NAME):
        return result
    wrapped = tree_map(lambda value: OnDevice(value) if isinstance(value, Tensor) else value, result)
    return return_and_correct_aliasing(function, args, kwargs, wrapped) if there else wrapped


def _inner(value: Any) -> Any:
    if isinstance(value, OnDevice):
        return value.inner
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == NAME else value


def _empty(size: Any, **options: Any) -> Tensor:
    """Where torch makes tensors below the modes, as a scalar of `torch.where`."""
    return OnDevice(torch.empty(size, dtype=options.get("dtype")))


class _Mode(TorchDispatchMode):
    """For what makes tensors of none."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if OnDevice not in types and kwargs.get("device") is None:
            return function(*args, **kwargs)
        return run(function, args, kwargs)


def set_up() -> None:
    """Make it the accelerator of this process."""
    _setup_privateuseone_for_python_backend(NAME)
    _LIBRARY.impl("empty.memory_format", _empty)
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) makes them on the processor first
    torch.accelerator.synchronize = lambda device=None: None  # it has no streams,
    torch.utils.data._utils.pin_memory.pin_memory = lambda data, device=None: data  # and no memory of its own
    os.environ["ACCELERATE_TORCH_DEVICE"] = f"{NAME}:0"


def refuses_to_mix() -> bool:
    """Whether it does what it is there for."""
    set_up()
    with _Mode():
        there, here = torch.ones(2, device=NAME), torch.ones(2)
        assert (there + there.to("cpu").to(NAME) + 1).tolist() == [3, 3]
        try:
            there + here
        except RuntimeError:
            return True
    return False


def main(commands: list[list[str]]) -> list[int]:
    """Exit codes of hf-tsc with each of the arguments; a path with a * in it is that of the one folder that fits."""
    set_up()
    from suspects_and_digits import InThisProcess

    from hf_tsc import cli
    from hf_tsc.benchmark import runner

    runner.ProcessPoolExecutor = InThisProcess
    codes = []
    with _Mode():
        for command in commands:
            codes.append(cli.main([glob(part)[0] if "*" in part else part for part in command]))
    return codes


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
