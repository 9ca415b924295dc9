"""Pictures that are hard for a clean classifier: what label-consistent poison is made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from hf_tsc.errors import UsageError
from hf_tsc.images import ImagePipeline, to_unit_interval
from hf_tsc.objectives import logits_of

CHUNK = 128  # pictures at once


@dataclass(frozen=True)
class Surrogate:
    """A clean classifier of the classes that the suspect will have.

    Attributes:
        model: in eval mode.
        pipeline: of its image processor.
        name: what the suspect's record calls it.
    """

    model: PreTrainedModel
    pipeline: ImagePipeline
    name: str


def harden(surrogate: Surrogate, pixels: Tensor, labels: Tensor, *, epsilon: float, step: float, steps: int) -> Tensor:
    """Projected gradient **ascent** on the cross-entropy of the true label, without a random start.

    x_0 = x; x_{k+1} = x_k + step sign(grad), clipped to [x - epsilon, x + epsilon] and [0, 255] (Madry et al. 2018,
    hf.co/papers/1706.06083). The classifier is left as it is.

    Args:
        surrogate: whose loss is raised.
        pixels: uint8 (n, 3, H, W).
        labels: int64 (n,), the true classes.
        epsilon: no level changes by more; rounding adds nothing where it is an integer.
        step: in levels.
        steps: how many.

    Returns:
        uint8 (n, 3, H, W).

    Raises:
        UsageError: the classifier does not take pictures of this size.
    """
    parts = zip(pixels.split(CHUNK), labels.split(CHUNK), strict=True)
    return torch.cat([_harden(surrogate, x, y, epsilon, step, steps) for x, y in parts])


def _harden(surrogate: Surrogate, pixels: Tensor, labels: Tensor, epsilon: float, step: float, steps: int) -> Tensor:
    start = to_unit_interval(pixels)
    low, high = (start - epsilon / 255).clamp_min(0), (start + epsilon / 255).clamp_max(1)
    x = start
    for _ in range(steps):
        x = x.detach().requires_grad_(True)
        with torch.enable_grad():
            loss = F.cross_entropy(_logits(surrogate, x), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x)
        x = torch.minimum(torch.maximum(x.detach() + step / 255 * gradient.sign(), low), high)
    return (255 * x.detach()).round().to(torch.uint8)


def _logits(surrogate: Surrogate, x: Tensor) -> Tensor:
    try:
        return logits_of(surrogate.model, surrogate.pipeline.normalize(x))
    except (ValueError, RuntimeError) as error:
        raise UsageError(
            f"the surrogate {surrogate.name} does not take pictures of {x.shape[-2]} x {x.shape[-1]} pixels, the "
            f"suspect's size ({error}): give a clean classifier of that size"
        ) from error
