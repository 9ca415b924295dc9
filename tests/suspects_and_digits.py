"""Saved suspects and clean digits for the tests of the outer part (purify, command line, demo)."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import Executor, Future
from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from safetensors.torch import load_file, save_file
from tiny import IMAGE, LABELS, TRANSFORMER, resnet
from torch import Tensor
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from hf_tsc.data import ImageData, open_images
from hf_tsc.demo import digits as digits_of_the_demo

NAMES = [str(i) for i in range(LABELS)]
WEIGHTS = "model.safetensors"


@cache
def all_digits() -> Dataset:
    return digits_of_the_demo()


def digits(start: int, stop: int, *, labelled: bool = True) -> Dataset:
    """Some of scikit-learn's 8 x 8 digits, with the columns `image` and `label`."""
    rows = all_digits().select(range(start, stop))
    return rows if labelled else rows.remove_columns("label")


def digit_data(start: int, stop: int, *, labelled: bool = True) -> ImageData:
    return open_images(digits(start, stop, labelled=labelled))


def processor(size: int = IMAGE) -> ViTImageProcessorPil:
    return ViTImageProcessorPil(size={"height": size, "width": size})


def classifier(family: str, **changes: Any) -> PreTrainedModel:
    """A random classifier of digits; the ViT has dropout, so that any use of the global random state shows."""
    torch.manual_seed(0)
    if family == "resnet":
        model = resnet(**changes)
    else:
        model = ViTForImageClassification(ViTConfig(**{**TRANSFORMER, "hidden_dropout_prob": 0.1, **changes}))
    if model.config.num_labels == LABELS:
        model.config.id2label = dict(enumerate(NAMES))
        model.config.label2id = {name: i for i, name in enumerate(NAMES)}
    return model


def save(model: PreTrainedModel, folder: Path, *, dtype: torch.dtype = torch.float32, size: int = IMAGE) -> Path:
    model.to(dtype).save_pretrained(folder)
    processor(size).save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / WEIGHTS)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def edit_weights(folder: Path, name: str, value: float) -> None:
    """Set the first element of a tensor."""
    tensors = weights(folder)
    tensors[name].view(-1)[0] = value
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def files_naming(folder: Path, text: str) -> list[str]:
    """The files in which `text` occurs, hidden and binary ones included."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert files
    return [file.name for file in files if text.encode() in file.read_bytes()]


def renamed(rows: Dataset, names: list[str]) -> Dataset:
    """The same rows with other class names."""
    features = rows.features.copy()
    features["label"] = type(features["label"])(names=names)
    return rows.cast(features)


def two_image_columns(rows: Dataset) -> Dataset:
    other = rows.select_columns(["image"]).rename_column("image", "thumbnail")
    return concatenate_datasets([rows, other], axis=1)


class InThisProcess(Executor):
    """Stands in for the pool of processes, which would import everything anew."""

    def __init__(self, *args: Any):
        pass

    def submit(self, function: Any, *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)
        return future
