"""Models, image processors and tokenizers from checked folders."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoTokenizer,
    PreTrainedConfig,
)
from transformers import PreTrainedModel as Model
from transformers.utils import logging as transformers_logging

from hf_tsc.errors import UsageError
from hf_tsc.hub.folder import (
    CONFIG,
    PROCESSORS,
    TOKENIZER,
    VOCABULARIES,
    check_keys,
    items,
    read_object,
    some,
    weight_names,
)
from hf_tsc.hub.source import Source

LARGEST_SIDE = 4096  # pixels
LEAST_CROP = 0.1
_SIDES = {
    "size",
    "crop_size",
    "pad_size",
    "height",
    "width",
    "shortest_edge",
    "longest_edge",
    "max_height",
    "max_width",
}
_FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load_model(source: Source, *, auto_class: Any, dtype: torch.dtype = torch.float32) -> tuple[Model, torch.dtype]:
    """Load a checked folder, in eval mode, if every tensor of model and files corresponds and is finite.

    Nothing but the folder is read; that is also why `transformers` never asks the Hub to convert the weights.

    Args:
        source: what `resolve_model` returned.
        auto_class: `AutoModelForImageClassification`, `AutoModel`, ...
        dtype: of the loaded floating-point tensors.

    Returns:
        The model, and the dtype in which most floating-point tensors of the files are stored.

    Raises:
        UsageError: no model of `auto_class`; keys missing, unexpected or of another shape; NaN or infinity.
    """
    stored = _stored(source.path)
    with quiet(), offline():
        config = read_config(source, auto_class)
        with bounded(stored.tensors, stored.elements), making_a_model(source, config):
            model, info = auto_class.from_pretrained(
                source.path,
                config=config,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                # Overrides what the configuration asks for, at any depth: it could name a kernel on the Hub.
                attn_implementation=attention(config, auto_class),
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported in `info` instead of raised, and refused below
            )
    wrong = "; ".join(f"{kind}: {some(keys)}" for kind, keys in info.items() if keys)
    if wrong:
        raise UsageError(f"The weights of {source.path} do not fit its config.json ({wrong}): give a complete model.")
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UsageError(f"`{name}` of {source.path} holds NaN or infinity: this model cannot be purified.")
    model.config.name_or_path = source.repo_id or ""  # not the local path: it would reach model cards
    return model, stored.dtype


def read_config(source: Source, auto_class: Any) -> PreTrainedConfig:
    """The configuration, if it is one of a model that `auto_class` can load.

    Raises:
        UsageError: it is not.
    """
    kind = "image classifier" if auto_class is AutoModelForImageClassification else auto_class.__name__
    file = source.path / CONFIG
    problem = f"{file} has model type {read_object(file).get('model_type')!r}: expected an {kind} that transformers"
    problem += " defines"
    try:
        config = AutoConfig.from_pretrained(source.path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # fields of a wrong type raise anything
        raise UsageError(f"{problem}. {' '.join(str(error).split())[:200]}") from error
    if type(config) not in auto_class._model_mapping:
        raise UsageError(f"{problem}.")
    return config


def attention(config: PreTrainedConfig, auto_class: Any) -> str:
    """The attention implementation that all classes of a configuration have."""
    classes = auto_class._model_mapping[type(config)]
    classes = classes if isinstance(classes, tuple | list) else (classes,)
    return "sdpa" if all(cls._supports_sdpa for cls in classes) else "eager"


@contextmanager
def making_a_model(source: Source, config: PreTrainedConfig) -> Iterator[None]:
    """Say what is wrong with a configuration that makes no model."""
    try:
        yield
    except ImportError as error:
        needed = f"{config.model_type} models need a package that is not installed"
        raise UsageError(f"{source.path}: {needed}: {' '.join(str(error).split())[:200]}") from error
    except _TooLargeError as error:
        raise UsageError(f"{source.path / CONFIG} does not fit the weights: {error}; correct it.") from error
    except Exception as error:  # a constructor that is given a field out of range raises anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UsageError(f"{source.path / CONFIG} makes no model: {reason}; correct the field.") from error


class _TooLargeError(Exception):
    """A model has far more weights than are stored."""


@contextmanager
def bounded(tensors: int, elements: int) -> Iterator[None]:
    """Stop the making of a model (on the meta device, where it costs nothing) that outgrows its stored weights.

    Args:
        tensors, elements: how many are stored. A model may have four times as many, and some more: parameters are
            registered twice where weights are loaded, and shared ones are stored once.
    """
    made = [0, 0]

    def count(module: nn.Module, name: str, parameter: Any) -> None:
        if parameter is not None:
            made[0] += 1
            made[1] += parameter.numel()
        if made[0] > 4 * tensors + 1000 or made[1] > 4 * elements + 10**6:
            raise _TooLargeError(
                f"it describes more than {made[0]} tensors and {made[1]} weights, and {tensors} and {elements} are "
                "stored"
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


@dataclass(frozen=True)
class _Stored:
    """What the headers of the weights say.

    Attributes:
        dtype: the most common one among the floating-point tensors.
        tensors, elements: how many.
    """

    dtype: torch.dtype
    tensors: int
    elements: int


def _stored(path: Path) -> _Stored:
    count, elements = Counter[str](), 0
    for name in weight_names(path):
        try:
            with safe_open(path / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    header = file.get_slice(key)
                    count[header.get_dtype()] += 1
                    elements += math.prod(header.get_shape())
        except SafetensorError as error:
            raise UsageError(f"{path / name} is not a safetensors file ({error}): get it again.") from error
    for dtype, _ in count.most_common():
        if dtype in _FLOAT_DTYPES:
            return _Stored(_FLOAT_DTYPES[dtype], count.total(), elements)
    raise UsageError(f"{path} stores {some(count) or 'nothing'}: expected one of {', '.join(_FLOAT_DTYPES)}.")


def load_image_processor(source: Source) -> Any:
    """The image processor that the folder declares.

    Raises:
        UsageError: the folder has none, or one that `transformers` does not define.
    """
    check_keys(source.path)
    files = [source.path / name for name in PROCESSORS if (source.path / name).is_file()]
    for key, value in (item for file in files for item in items(read_object(file))):
        _check_side(source, key, value)
    try:
        with quiet(), offline():
            processor = AutoImageProcessor.from_pretrained(source.path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # fields of a wrong type raise anything
        raise UsageError(
            f"{source.path} has no image processor that transformers knows: add a preprocessor_config.json."
        ) from error
    try:
        processor(Image.new("RGB", (56, 40)), return_tensors="pt")
    except Exception as error:  # as above, but only now
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"The image processor of {source.path} cannot process a picture ({reason}): correct its fields."
        ) from error
    return processor


def _check_side(source: Source, key: str, value: Any) -> None:
    """Refuse to resize pictures to what no memory holds. (Some processors resize to `size` / `crop_pct`.)"""
    for number in value if isinstance(value, list) else [value]:
        if not isinstance(number, int | float):
            continue
        if (key in _SIDES and not abs(number) <= LARGEST_SIDE) or (key == "crop_pct" and not number >= LEAST_CROP):
            raise UsageError(
                f"{source.path} has `{key}` {number} for its image processor: expected sides of at most "
                f"{LARGEST_SIDE} pixels, and at least {LEAST_CROP} for `crop_pct`; correct the field."
            )


def load_tokenizer(source: Source) -> Any:
    """The tokenizer that the folder declares.

    Raises:
        UsageError: the folder has none, or one that `transformers` does not define.
    """
    check_keys(source.path)
    wanted = f"add {VOCABULARIES[0]} and {TOKENIZER}"
    if not any((source.path / name).is_file() for name in VOCABULARIES):  # transformers would make an empty one
        raise UsageError(f"{source.path} has no tokenizer: {wanted}.")
    try:
        with quiet(), offline():
            return AutoTokenizer.from_pretrained(source.path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # as above; `tokenizers` raises plain ones
        raise UsageError(f"{source.path} has no tokenizer that transformers knows: {wanted}.") from error


@contextmanager
def offline() -> Iterator[None]:
    """Let nobody ask the Hub.

    A configuration can have `transformers` look for another repo, with the saved token, whatever it is told of local
    files.
    """
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def quiet() -> Iterator[None]:
    """Silence `transformers`: whatever matters about a load is raised by this module."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    if bars:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
