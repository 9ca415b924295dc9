"""Trigger inversion for encoders: how small a patch makes all images look the same to it?

DECREE (Feng et al. 2023, hf.co/papers/2303.15180): one search, without classes. It takes the pooled features of an
image encoder, or of the image tower of a dual encoder. Finding nothing is no proof; and features that are alike for
all images in the first place are easily made more so: the similarity of clean images stands beside the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_tsc.derive import example_inputs
from hf_tsc.evidence.search import FoundTrigger, Normalize, frozen, search_trigger
from hf_tsc.evidence.settings import ENCODER_SEARCH, LARGE_FLOOR, LARGE_SIDE, SMALL_FLOOR, Search
from hf_tsc.images import to_unit_interval
from hf_tsc.objectives import features_of
from hf_tsc.seeds import derived_seed


@dataclass(frozen=True)
class EncoderTrigger:
    """The smallest trigger that makes images alike.

    Attributes:
        found: what each search found, or None.
        pixels: H · W, the largest norm that there is.
        similarity: mean cosine of the features of two clean images.
        images: that were searched on.
    """

    found: tuple[FoundTrigger | None, ...]
    pixels: int
    similarity: float
    images: int

    @property
    def trigger(self) -> FoundTrigger | None:
        """The smallest."""
        return min((one for one in self.found if one is not None), key=lambda one: one.norm, default=None)

    @property
    def share(self) -> float | None:
        """|m|₁ / (H W), the published score; None where nothing was found."""
        return None if self.trigger is None else self.trigger.norm / self.pixels

    def to_dict(self) -> dict[str, Any]:
        """For a report; None stands for what was not found."""
        trigger, share = self.trigger, self.share
        return {
            "kind": "encoder",
            "images": self.images,
            "norms": [None if one is None else round(one.norm, 3) for one in self.found],
            "share": None if share is None else round(share, 6),
            "success": None if trigger is None else round(trigger.success, 4),
            "similarity": round(self.similarity, 4),
        }


def features_function(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """Model inputs (n, 3, H, W) -> pooled features (n, d); a dual encoder gets some text beside them, any will do."""
    texts = {name: one.to(model.device) for name, one in example_inputs(model, batch_size=1).items()}
    texts.pop("pixel_values")
    return lambda inputs: features_of(partial(model, **texts), inputs)


def invert_encoder(
    model: PreTrainedModel,
    pixels: Tensor,
    normalize: Normalize,
    *,
    how: Search = ENCODER_SEARCH,
    seed: int = 0,
    progress: bool = False,
    title: str = "Searching for triggers",
) -> EncoderTrigger:
    """Search for the smallest trigger that makes the features of all images point the same way.

    Args:
        model: an image encoder with pooled features, or a dual encoder; it is left as it was.
        pixels: uint8 (n, 3, H, W), clean images, two at least, on the model's device.
        normalize: makes model inputs of pixels in [0, 1].
        how: settings; the floor of λ is that of the images' size.
        seed: the same seed gives the same triggers.
        progress: show a bar, called `title`.

    Raises:
        UsageError: the encoder has no pooled features.
    """
    how = replace(how, floor=SMALL_FLOOR if pixels.shape[-1] < LARGE_SIDE else LARGE_FLOOR)
    with frozen(model):
        features = features_function(model)
        aim = partial(_alike, features)
        with torch.no_grad():
            parts = [features(normalize(to_unit_interval(part))) for part in pixels.split(how.batch_size)]
        found = tuple(
            search_trigger(aim, pixels, normalize, how, seed=derived_seed(seed, restart))
            for restart in tqdm(range(how.restarts), title, unit=" searches", disable=not progress)
        )
    return EncoderTrigger(found, pixels[0, 0].numel(), float(mean_cosine(torch.cat(parts))), len(pixels))


def _alike(features: Callable[[Tensor], Tensor], inputs: Tensor) -> tuple[Tensor, Tensor]:
    similarity = mean_cosine(features(inputs))
    return -similarity, similarity.detach()


def mean_cosine(features: Tensor) -> Tensor:
    """Mean over i ≠ j of cos(f_i, f_j), of (n, d) with n ≥ 2."""
    units, n = F.normalize(features.flatten(1), dim=-1), len(features)
    return (units.sum(0).square().sum() - n) / (n * (n - 1))
