"""What the curve is trained for, and how a point of it is measured: one objective per kind of model."""

from hf_tsc.objectives.base import Forward, LossSettings, Objective
from hf_tsc.objectives.classification import (
    ImageClassification,
    Mixup,
    distillation_loss,
    logits_of,
    mixed_cross_entropy,
)
from hf_tsc.objectives.encoding import FeatureDistillation, ProjectionHead, SimCLR, WithHead, features_of, nt_xent
from hf_tsc.objectives.hidden_states import HiddenStates
from hf_tsc.objectives.image_text import Captions, EmbeddingDistillation, ImageText, sigmoid_loss, softmax_loss

__all__ = [
    "Captions",
    "EmbeddingDistillation",
    "FeatureDistillation",
    "Forward",
    "HiddenStates",
    "ImageClassification",
    "ImageText",
    "LossSettings",
    "Mixup",
    "Objective",
    "ProjectionHead",
    "SimCLR",
    "WithHead",
    "distillation_loss",
    "features_of",
    "logits_of",
    "mixed_cross_entropy",
    "nt_xent",
    "sigmoid_loss",
    "softmax_loss",
]
