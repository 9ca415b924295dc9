"""BatchNorm statistics of a point in weight space, recomputed over the clean images.

By default over these images as training shows them, augmented and mixed: weights that were trained with the statistics
of such images do not go with those of others. On a ResNet that is worth 2 to 3 points (docs/results.md).

Running statistics mean nothing on a curve. They are reset and averaged over fixed batches, weighted by the number of
images, so that the result does not depend on the order of the batches (it does on their size).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_tsc.functional import call_at
from hf_tsc.permutation import Params
from hf_tsc.processes import add_up, together

IMAGES = ("training", "clean")  # whose statistics: augmented and mixed, or as they are in the data set
PASSES = 2  # over the training images, each drawn anew


def batch_norm_buffers(model: nn.Module) -> list[str]:
    """Names of all running means and variances."""
    return [
        f"{name}.{buffer}"
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
        for buffer in ("running_mean", "running_var")
    ]


@torch.no_grad()
def recompute_statistics(
    model: nn.Module, params: Mapping[str, Tensor], batches: Iterable[dict[str, Tensor]], buffers: Mapping[str, Tensor]
) -> Params:
    """Running statistics of every BatchNorm layer for the given parameters.

    Args:
        model: the architecture; its own weights are not used.
        params: the point's parameters.
        batches: model inputs; of several processes each has its own.
        buffers: the model's buffers by name; not written to. Without BatchNorm layers they are returned as they are.

    Returns:
        All buffers: running means and variances (variances unbiased, as BatchNorm itself estimates them) are averages
        over the batches of all processes, weighted by their sizes.
    """
    names = batch_norm_buffers(model)
    if not names:
        return dict(buffers)
    total = {name: torch.zeros_like(buffers[name], dtype=torch.float64) for name in names}
    count = torch.zeros((), dtype=torch.float64, device=total[names[0]].device)
    modes = {module: module.training for module in model.modules()}
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    model.eval()
    for layer in layers:
        layer.train()
        layer.momentum = 1.0  # the running statistics become those of the last batch
    try:
        with together():
            for batch in batches:
                size = next(iter(batch.values())).shape[0]
                last = {name: tensor.clone() for name, tensor in buffers.items()}
                call_at(model, {**params, **last}, batch)
                for name in names:
                    total[name] += size * last[name].double()
                count += size
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
    add_up([*total.values(), count])
    return {**buffers, **{name: (total[name] / count).to(buffers[name].dtype) for name in names}}
