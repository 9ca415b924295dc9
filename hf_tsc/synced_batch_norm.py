"""BatchNorm that normalises with the batches of all processes, on any device.

`torch.nn.SyncBatchNorm` does so on accelerators alone, and by classes of layers; here the function that all kinds of
BatchNorm layers call is another one while a loss is computed.

    mean = Σ x / N,    var = Σ (x - mean)² / N,    sums over the N positions of all processes' images, a channel each
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hf_tsc.processes import add_up, number_of_processes

_BATCH_NORM = inspect.signature(F.batch_norm)


class SyncedBatchNorm(TorchFunctionMode):
    """Inside, `F.batch_norm` in training takes its mean and variance over all processes.

    They must have equally many images each. Running statistics are left as they are.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            given = _BATCH_NORM.bind(*args, **kwargs)
            given.apply_defaults()
            if given.arguments["training"]:
                names = ("input", "weight", "bias", "eps")
                return _normalised(*(given.arguments[name] for name in names))
        return func(*args, **kwargs)


def _normalised(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(n, channels, ...) -> the same, as `F.batch_norm` of all processes' x."""
    wide = x if x.dtype == torch.float64 else x.float()
    over = [dim for dim in range(x.ndim) if dim != 1]
    shape = [-1 if dim == 1 else 1 for dim in range(x.ndim)]
    count = number_of_processes() * x.numel() // x.shape[1]
    centred = wide - (_Sum.apply(wide.sum(over)) / count).view(shape)
    variance = _Sum.apply(centred.square().sum(over)) / count
    scale = (variance + eps).rsqrt() if weight is None else (variance + eps).rsqrt() * weight
    result = centred * scale.view(shape)
    return (result if bias is None else result + bias.view(shape)).to(x.dtype)


class _Sum(torch.autograd.Function):
    """The sum over the processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        add_up([total])
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        add_up([total])
        return total
