"""Example inputs of the encoders that take other ones than images (and texts)."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from hf_tsc.derive.inputs import TEXT_LENGTH, image_size, images_and_texts, inputs_of, texts


@inputs_of("vit_mae")
def masked_images(model: PreTrainedModel, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Also `noise` (batch_size, patches), which decides what patches are dropped: the model would draw it anew."""
    height, width = image_size(model.config)
    patch = model.config.patch_size
    patch_height, patch_width = patch if isinstance(patch, list | tuple) else (patch, patch)
    patches = (height // patch_height) * (width // patch_width)
    noise = torch.rand(batch_size, patches, generator=generator)
    return images_and_texts(model, batch_size, generator) | {"noise": noise}


@inputs_of("vitpose_backbone")
def images_of_datasets(model: PreTrainedModel, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """For a mixture of experts also `dataset_index` (batch_size,): the expert of each image."""
    inputs = images_and_texts(model, batch_size, generator)
    if model.config.num_experts > 1:
        inputs["dataset_index"] = torch.randint(model.config.num_experts, (batch_size,), generator=generator)
    return inputs


@inputs_of("blip-2")
def images_and_queries(model: PreTrainedModel, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Texts for the Q-Former: `text_config` is that of the language model.

    Where the configuration names an image token, each text starts with as many of them as there are queries, and the
    model cuts them off again; it then needs a mask.
    """
    config = model.config
    ids = torch.randint(3, config.qformer_config.vocab_size, (batch_size, TEXT_LENGTH), generator=generator)
    if config.image_token_index is not None:
        ids = torch.cat([torch.full((batch_size, config.num_query_tokens), config.image_token_index), ids], dim=1)
    pixels = torch.randn(batch_size, 3, *image_size(config.vision_config), generator=generator)
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


@inputs_of("xclip")
def videos_and_texts(model: PreTrainedModel, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """`pixel_values` (batch_size, frames, channels, height, width), and texts."""
    vision = model.config.vision_config
    return {"pixel_values": _videos(vision, batch_size, generator)} | texts(model, batch_size, generator)


@inputs_of("videoprism", "videoprism_vision_model")
def named_videos_and_texts(model: PreTrainedModel, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The same, but the videos are `pixel_values_videos`; no texts for the vision half and the classifier."""
    vision = getattr(model.config, "vision_config", model.config)
    return {"pixel_values_videos": _videos(vision, batch_size, generator)} | texts(model, batch_size, generator)


def _videos(vision: PretrainedConfig, batch_size: int, generator: torch.Generator) -> Tensor:
    shape = (batch_size, vision.num_frames, vision.num_channels, *image_size(vision))
    return torch.randn(shape, generator=generator)
