"""Example inputs for a model, from its configuration alone."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from hf_tsc.errors import UsageError

DEFAULT_IMAGE_SIZE = 64  # for configurations that name none (convolutional networks take any)
TEXT_LENGTH = 8
PIXEL_TOKENS = 64  # of the models that read an image pixel after pixel: the first ones suffice

UNSUPPORTED = {
    "shieldgemma2": "it is a language model that reads images; give its vision tower alone (a SiglipVisionModel)",
}

Maker = Callable[[PreTrainedModel, int, torch.Generator], dict[str, Tensor]]
_MAKERS: dict[str, Maker] = {}


def inputs_of(*model_types: str) -> Callable[[Maker], Maker]:
    """Register a function that makes the inputs of model types which take other ones than images (and texts)."""

    def register(maker: Maker) -> Maker:
        _MAKERS.update(dict.fromkeys(model_types, maker))
        return maker

    return register


def example_inputs(model: PreTrainedModel, *, batch_size: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs a model accepts.

    Returns:
        For most models `pixel_values` (batch_size, channels, height, width), and for dual encoders `input_ids`
        (batch_size, TEXT_LENGTH), each row ending in the end-of-text token.

    Raises:
        UsageError: the model's type is one that is not supported.
    """
    if reason := UNSUPPORTED.get(model.config.model_type):
        raise UsageError(f"{type(model).__name__} is not supported: {reason}")
    generator = torch.Generator().manual_seed(seed)
    return _MAKERS.get(model.config.model_type, images_and_texts)(model, batch_size, generator)


def images_and_texts(model: PreTrainedModel, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """`pixel_values`, and `input_ids` where the model reads a text."""
    vision = getattr(model.config, "vision_config", model.config)
    height, width = image_size(vision)
    channels = getattr(vision, "num_channels", 3)
    inputs = {"pixel_values": torch.randn(batch_size, channels, height, width, generator=generator)}
    return inputs | texts(model, batch_size, generator)


@inputs_of("siglip2", "siglip2_vision_model")
def patches_and_texts(model: PreTrainedModel, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Square images cut into patches: `pixel_values` (batch_size, patches, pixels of a patch), and texts."""
    vision = getattr(model.config, "vision_config", model.config)
    side = math.isqrt(vision.num_patches)
    shape = (batch_size, side**2, vision.num_channels * vision.patch_size**2)
    inputs = {
        "pixel_values": torch.randn(shape, generator=generator),
        "pixel_attention_mask": torch.ones(shape[:2], dtype=torch.int64),
        "spatial_shapes": torch.full((batch_size, 2), side),
    }
    return inputs | texts(model, batch_size, generator)


@inputs_of("imagegpt")
def pixel_tokens(model: PreTrainedModel, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """`input_ids` (batch_size, tokens): each pixel the index of its colour."""
    shape = (batch_size, min(model.config.n_positions, PIXEL_TOKENS))
    return {"input_ids": torch.randint(model.config.vocab_size, shape, generator=generator)}


@inputs_of("timm_wrapper")
def images_of_timm(model: PreTrainedModel, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """`pixel_values` of the size that the wrapped timm model was built for.

    That is the one in its own `pretrained_cfg`, which may differ from the one in the configuration of transformers:
    the wrapper builds the model from the architecture's name. Arguments that the wrapper hands on come first.
    """
    arguments, built = model.config.model_args or {}, cast(Any, model.timm_model)
    channels, height, width = built.pretrained_cfg["input_size"]
    if "img_size" in arguments:
        height, width = _pair(arguments["img_size"])
    channels = arguments.get("in_chans", channels)
    return {"pixel_values": torch.randn(batch_size, channels, height, width, generator=generator)}


def texts(model: PreTrainedModel, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """`input_ids` of a dual encoder; nothing for its vision half, whose configuration has a text part all the same."""
    text = getattr(model.config, "text_config", None)
    if text is None or "input_ids" not in inspect.signature(model.forward).parameters:
        return {}
    return {"input_ids": token_ids(text, batch_size, generator)}


def token_ids(text: PretrainedConfig, batch_size: int, generator: torch.Generator) -> Tensor:
    """(batch_size, TEXT_LENGTH) random tokens, the last one the end of the text."""
    ids = torch.randint(3, text.vocab_size - 1, (batch_size, TEXT_LENGTH), generator=generator)
    end = text.eos_token_id
    ids[:, -1] = end if end is not None and 2 < end < text.vocab_size else text.vocab_size - 1
    return ids


def image_size(config: PretrainedConfig) -> tuple[int, int]:
    """(height, width) of the images a vision configuration is made for."""
    return _pair(getattr(config, "image_size", DEFAULT_IMAGE_SIZE))


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    """A size as (height, width), which may be given as one number."""
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return int(height), int(width)
