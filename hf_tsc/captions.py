"""Texts for dual encoders: captions of a data set's images, or prompts made of class names; tokenised once."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from datasets import List, Value
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from hf_tsc.data import ImageData
from hf_tsc.errors import UsageError
from hf_tsc.objectives import Captions

TEMPLATES = ("a photo of a {}.",)
# Columns of text that hold captions also where there are class names, to make prompts of.
CAPTION_COLUMNS = {"caption", "captions", "text", "texts", "sentence", "sentences", "prompt", "alt_text"}


class CaptionTable:
    """Distinct texts, numbered in the order in which they come."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def add(self, texts: Iterable[str]) -> list[int]:
        """The numbers of texts, new ones added."""
        return [self._numbers.setdefault(text, len(self._numbers)) for text in texts]

    def tokenise(self, tokenizer: Any, model: PreTrainedModel, length: int) -> Captions:
        """Tokens of all texts, cut and filled up to `length`; of what the tokenizer gives only what the model takes.

        SigLIP gets no mask: it has seen none, and reads its texts' embeddings off their last token, a pad or not.
        """
        names = set(inspect.signature(model.forward).parameters)
        names -= {"attention_mask"} if hasattr(model, "logit_bias") else set()
        texts = list(self._numbers)
        whole = tokenizer(texts, truncation=False, padding=False)["input_ids"]
        options: dict[str, Any] = {"padding": "max_length", "truncation": True, "max_length": length}
        found = tokenizer(texts, return_tensors="pt", **options)
        tokens = {name: found[name] for name in tokenizer.model_input_names if name in names}
        return Captions(tuple(texts), tokens, truncated=sum(len(ids) > length for ids in whole))


class CaptionedImages(Dataset):
    """The items of a `PixelDataset` (or of one like it), each with the numbers of its captions."""

    def __init__(self, images: Any, numbers: Sequence[Sequence[int]]):
        if len(images) != len(numbers):
            raise ValueError(f"{len(images)} images, but captions of {len(numbers)}")
        self.images, self.pipeline = images, images.pipeline
        self.numbers = [torch.tensor(list(one), dtype=torch.int64) for one in numbers]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> dict[str, Any]:
        return {**self.images[position], "captions": self.numbers[position]}


def find_caption_column(data: ImageData) -> str | None:
    """The column of captions, strings or lists of strings: the one that was named, or the only one; None if none is.

    Where there are class names, an unnamed one must be called as captions are: it could hold names of files.

    Raises:
        UsageError: a named column is missing or of another type, or several columns fit.
    """
    fitting = [name for name, feature in data.rows.features.items() if _is_text(feature)]
    named = data.caption_column
    if named is not None and named not in fitting:
        raise UsageError(f"Got --caption_column_name {named}, expected one of the columns of text {fitting}.")
    if named is None and data.class_names is not None:
        fitting = [name for name in fitting if name.casefold() in CAPTION_COLUMNS]
    if named is None and len(fitting) > 1:
        raise UsageError(f"The columns {fitting} are all text; choose one with --caption_column_name.")
    return named or (fitting[0] if fitting else None)


def captions_of(data: ImageData, column: str) -> list[list[str]]:
    """The captions of every row.

    Raises:
        UsageError: a row has none.
    """
    rows = [[value] if isinstance(value, str) else list(value or []) for value in data.rows[column][:]]
    if empty := [number for number, texts in enumerate(rows) if not any(text.strip() for text in texts if text)]:
        raise UsageError(
            f"Column {column!r} of {data.name} has {len(empty)} row(s) without a caption, the first at index "
            f"{empty[0]}; remove them."
        )
    return [[text for text in texts if text and text.strip()] for texts in rows]


def prompts(class_name: str, templates: Sequence[str] = TEMPLATES) -> list[str]:
    """The templates filled with a class name, `_` read as a blank.

    Raises:
        UsageError: a template without `{}`.
    """
    if wrong := [template for template in templates if template.count("{}") != 1]:
        raise UsageError(f"--prompt_template {wrong[0]!r}: expected one {{}} where the class name goes")
    return [template.replace("{}", class_name.replace("_", " ")) for template in templates]


def _is_text(feature: Any) -> bool:
    if isinstance(feature, List):
        feature = feature.feature
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")
