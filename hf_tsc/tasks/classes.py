"""The classes that a model's configuration names, against those of a data set."""

from __future__ import annotations

from transformers import PreTrainedModel

from hf_tsc.data import ImageData, check_classes


def class_names(model: PreTrainedModel) -> dict[int, str]:
    """Class number -> name, as the model's configuration has them."""
    return {int(number): str(name) for number, name in (model.config.id2label or {}).items()}


def check_labels(data: ImageData, model: PreTrainedModel) -> str | None:
    """See `check_classes`; unlabelled data fit any model."""
    labels = data.labels
    return None if labels is None else check_classes(data.class_names, int(labels.max()) + 1, class_names(model))
