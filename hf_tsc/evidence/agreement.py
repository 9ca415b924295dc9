"""How alike two models behave on clean images: the same class, or features that point the same way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from hf_tsc.evaluation import Reader, map_batches
from hf_tsc.images import PixelDataset
from hf_tsc.metrics import accuracy


def same_class(one: nn.Module, other: nn.Module, images: PixelDataset, *, reader: Reader, device: Any) -> float:
    """Share of images that two models, in eval mode on `device`, give the same class; see `Reader`."""
    first, second = (map_batches(reader(model, device), images, device=device) for model in (one, other))
    return accuracy(second, first)


def feature_cosine(
    one: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor], images: PixelDataset, *, device: Any
) -> float:
    """Mean cosine between the features (n, d) that two functions of model inputs give for the same image."""
    first, second = (map_batches(features, images, device=device) for features in (one, other))
    return float(F.cosine_similarity(first.double(), second.double()).mean())
