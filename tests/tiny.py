"""Tiny models from configurations and tiny data: what the tests of the core run on. No network, no weights.

Sizes differ wherever they can, so that an axis taken for another one does not fit.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from hf_tsc.derive import derive_spec, example_inputs
from hf_tsc.images import ImagePipeline, PixelDataset
from hf_tsc.permutation import Params, PermutationSpec

IMAGE = 8
LABELS = 10
LAYERS = 2
HEADS, HEAD_DIM = 3, 4
TRANSFORMER = {
    "hidden_size": HEADS * HEAD_DIM,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 10,
    "image_size": IMAGE,
    "patch_size": 4,
    "num_labels": LABELS,
}


def resnet(**changes) -> PreTrainedModel:
    config = {
        "embedding_size": 6,
        "hidden_sizes": [6, 8],
        "depths": [2, 1],
        "layer_type": "basic",
        "num_labels": LABELS,
    }
    return ResNetForImageClassification(ResNetConfig(**{**config, **changes}))


def clip() -> PreTrainedModel:
    text = {
        "vocab_size": 20,
        "hidden_size": 10,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 9,
    }
    text |= {"max_position_embeddings": 8, "bos_token_id": 18, "eos_token_id": 19, "pad_token_id": 19}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=TRANSFORMER, projection_dim=7))


FAMILIES = {
    "resnet": resnet,
    "resnet_wide_stem": lambda: resnet(embedding_size=5),
    "resnet_bottleneck": lambda: resnet(layer_type="bottleneck", hidden_sizes=[8, 12]),
    "resnet_downsample": lambda: resnet(downsample_in_first_stage=True),
    "vit": lambda: ViTForImageClassification(ViTConfig(**TRANSFORMER)),
    "vit_no_qkv_bias": lambda: ViTForImageClassification(ViTConfig(**TRANSFORMER, qkv_bias=False)),
    "deit": lambda: DeiTForImageClassification(DeiTConfig(**TRANSFORMER)),
    "deit_teacher": lambda: DeiTForImageClassificationWithTeacher(DeiTConfig(**TRANSFORMER)),
    "clip": clip,
}
CLASSIFIERS = ("resnet", "vit")  # one with BatchNorm, one with attention


def model(family: str, *, seed: int = 0) -> PreTrainedModel:
    """A model at its default initialisation, in eval mode."""
    torch.manual_seed(seed)
    return FAMILIES[family]().eval()


@cache
def spec(family: str) -> PermutationSpec:
    made = model(family)
    return derive_spec(made, example_inputs(made))


def tensors(module: nn.Module) -> Params:
    """All parameters and buffers by name, detached copies."""
    return {name: t.detach().clone() for name, t in (*module.named_parameters(), *module.named_buffers())}


def randomise(module: nn.Module, *, seed: int = 1) -> None:
    """Fill every floating tensor with random numbers, in place: no mistake hides behind a zero or a one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.is_floating_point():
                fan_in = tensor[0].numel() if tensor.ndim > 1 else 1
                values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) / fan_in**0.5
                tensor.copy_(values.abs() + 0.5 if name.endswith("running_var") else values)


def random_model(family: str, *, seed: int = 1) -> PreTrainedModel:
    """A model in float64 whose every floating tensor is random."""
    made = model(family).double()
    randomise(made, seed=seed)
    return made


def inputs(module: PreTrainedModel, *, batch_size: int = 3) -> dict[str, Tensor]:
    """Example inputs in the model's dtype."""
    made = example_inputs(module, batch_size=batch_size)
    return {name: x.to(module.dtype) if x.is_floating_point() else x for name, x in made.items()}


def random_permutation(spec: PermutationSpec, *, seed: int = 0) -> dict[str, Tensor]:
    """A random permutation of every space, another one in each block of a nested space; never the identity."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name in spec.spaces:
        *blocks, size = spec.shape(name)
        drawn = still = torch.arange(size).expand(*blocks, size)
        while torch.equal(drawn, still):
            drawn = torch.rand(*blocks, size, generator=generator).argsort(-1)
        result[name] = drawn
    return result


@cache
def processor() -> ViTImageProcessorPil:
    return ViTImageProcessorPil(do_resize=False)


@cache
def digits(start: int, stop: int, *, labelled: bool = True) -> PixelDataset:
    """Some of scikit-learn's 8 x 8 digits as pixels."""
    data = load_digits()
    pictures = [Image.fromarray((image * 15.9).astype(np.uint8)).convert("RGB") for image in data.images[start:stop]]
    dataset = Dataset.from_dict({"image": pictures, "label": data.target[start:stop].tolist()})
    label = {"label_column": "label"} if labelled else {}
    return PixelDataset(dataset, range(stop - start), ImagePipeline(processor()), image_column="image", **label)


def digit_batches(count: int, batch_size: int, dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    """Real digits as model inputs."""
    pixels = torch.stack([digits(0, count)[i]["pixels"] for i in range(count)])
    values = ImagePipeline(processor()).normalize(pixels.to(dtype) / 255)
    return [{"pixel_values": part} for part in values.split(batch_size)]
