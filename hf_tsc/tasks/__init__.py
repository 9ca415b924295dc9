"""What each kind of model is purified by and measured with, and which kind a model is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from transformers import AutoModelForZeroShotImageClassification, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_tsc.hub import Source
from hf_tsc.tasks.base import Measure, Options, Task, Work
from hf_tsc.tasks.classification import Classification
from hf_tsc.tasks.encoding import Encoding
from hf_tsc.tasks.image_text import ImageTextMatching

__all__ = [
    "Classification",
    "Encoding",
    "ImageTextMatching",
    "Measure",
    "Options",
    "Task",
    "Work",
    "is_classifier",
    "is_dual_encoder",
    "task_of",
]


def task_of(source: Source) -> type[Task]:
    """The task of a checked model, from its config.json: by the class that wrote it, else by its type.

    A class with a classifier is a classifier; a type that transformers knows for zero-shot image classification is a
    dual encoder; every other class is an encoder. Without a class it counts as a classifier.
    """
    config: dict[str, Any] = json.loads((source.path / "config.json").read_text(encoding="utf-8"))
    if is_classifier(config):
        return Classification
    if is_dual_encoder(_config_class(config)):
        return ImageTextMatching
    return Encoding if config.get("architectures") else Classification


def is_classifier(config: Mapping[str, Any]) -> bool:
    """Whether a class with a classifier wrote this config.json; timm's names its classes, not the class."""
    named = [str(name) for name in config.get("architectures") or []]
    return any("ForImageClassification" in name for name in named) or "num_classes" in config


def is_dual_encoder(config: PretrainedConfig | type[PretrainedConfig] | None) -> bool:
    """Whether transformers knows models of this configuration, or class of configurations, for zero-shot use."""
    config_class: Any = config if isinstance(config, type) else type(config)
    return config_class in AutoModelForZeroShotImageClassification._model_mapping


def _config_class(config: dict[str, Any]) -> type[PretrainedConfig] | None:
    try:
        return CONFIG_MAPPING[str(config.get("model_type"))]
    except KeyError:
        return None
