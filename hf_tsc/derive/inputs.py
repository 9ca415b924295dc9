"""Example inputs for a model, from its configuration alone."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

DEFAULT_IMAGE_SIZE = 64  # for configurations that name none (convolutional networks take any)
TEXT_LENGTH = 8


def example_inputs(model: PreTrainedModel, *, batch_size: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs a model accepts.

    Returns:
        `pixel_values` (batch_size, channels, height, width), and for dual encoders `input_ids`
        (batch_size, TEXT_LENGTH), each row ending in the end-of-text token.
    """
    generator = torch.Generator().manual_seed(seed)
    vision = getattr(model.config, "vision_config", model.config)
    height, width = image_size(vision)
    channels = getattr(vision, "num_channels", 3)
    inputs = {"pixel_values": torch.randn(batch_size, channels, height, width, generator=generator)}
    text = getattr(model.config, "text_config", None)
    if text is not None:
        ids = torch.randint(3, text.vocab_size - 1, (batch_size, TEXT_LENGTH), generator=generator)
        end = text.eos_token_id
        ids[:, -1] = end if end is not None and 2 < end < text.vocab_size else text.vocab_size - 1
        inputs["input_ids"] = ids
    return inputs


def image_size(config: PretrainedConfig) -> tuple[int, int]:
    """(height, width) of the images a vision configuration is made for."""
    size = getattr(config, "image_size", DEFAULT_IMAGE_SIZE)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return int(height), int(width)
