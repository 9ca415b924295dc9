"""TSCConfig: everything a purification can be asked for, on top of `TrainingArguments`."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import TrainingArguments

from hf_tsc.activations import MATCHING_METHODS
from hf_tsc.batch_norm import IMAGES as BATCH_NORM_IMAGES
from hf_tsc.batch_norm import batch_norm_buffers
from hf_tsc.errors import UsageError
from hf_tsc.images import AUGMENTATIONS
from hf_tsc.permutation import KINDS
from hf_tsc.towers import TOWERS

SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}
CLASSIFYING = ("distillation", "cross_entropy")  # the default first
PAIRWISE = ("simclr", "image_text")  # these compare the items of a batch with each other
OBJECTIVES = (*CLASSIFYING, *PAIRWISE)
TEACHER_VIEWS = ("same", "clean")
TEACHER_ERRORS = ("keep", "drop", "correct")
FEATURE_STATES = ("all", "last")

# Published hyper-parameters for supervised models (hf.co/papers/2506.07467), and every Trainer default that differs.
PAPER_PRESET: dict[str, Any] = {
    "rounds": 3,
    "stages": 2,
    "curve_epochs": 200.0,
    "curve1_t": 0.4,
    "curve2_t": 0.4,
    "curve1_window": [0.0, 1.0],
    "curve2_window": [0.0, 1.0],
    "matching": "l2",
    "objective": "cross_entropy",
    "mixup_alpha": 0.0,
    "augmentation": "crop_flip",
    "optim": "sgd",
    "optim_args": "momentum=0.9",
    "learning_rate": 0.02,
    "weight_decay": 5e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0,
    "per_device_train_batch_size": 256,
    "max_grad_norm": 0.0,
}
PRESETS: dict[str, dict[str, Any]] = {"default": {}, "paper": PAPER_PRESET}

# Defaults by family, on top of those of TSCConfig: with BatchNorm layers (ResNet, ...), and without (transformers).
# Searched on CIFAR-10; see docs/results.md.
COMMON_DEFAULTS: dict[str, Any] = {
    "stages": 1,
    "mixup_alpha": 1.0,
}
IN_PLACE = [kind for kind in KINDS if kind != "residual"]  # what may move so that hidden states stay
BATCH_NORM_DEFAULTS: dict[str, Any] = {
    **COMMON_DEFAULTS,
    "move_spaces": IN_PLACE,
    "curve1_window": [0.7, 0.9],
    "curve1_t": 0.7,
    "curve_epochs": 70.0,
    "optim": "sgd",
    "optim_args": "momentum=0.9",
    "learning_rate": 0.7,
    "relative_rate": True,
}
TRANSFORMER_DEFAULTS: dict[str, Any] = {
    **COMMON_DEFAULTS,
    "curve1_window": [0.6, 0.8],
    "curve1_t": 0.6,
    "curve_epochs": 140.0,
    "per_device_train_batch_size": 32,
    "optim": "adamw_torch",
    "optim_args": None,
    "learning_rate": 4e-3,
}
# What changes in them where the suspect's hidden states are followed, which is so unless something else asked for
# forbids it.
BATCH_NORM_FOLLOWING: dict[str, Any] = {"feature_weight": 20.0}
TRANSFORMER_FOLLOWING: dict[str, Any] = {
    "move_spaces": IN_PLACE,
    "feature_weight": 2.0,
    "feature_states": "last",
    "learning_rate": 0.012,
}
# Features and embeddings say more than answers do: repeated at the rate for answers they take a backdoor along.
TRANSFORMER_FEATURES: dict[str, Any] = {"learning_rate": 0.024}


# What goes with an objective, on top of the family's defaults.
OBJECTIVE_DEFAULTS: dict[str, dict[str, Any]] = {
    "simclr": {"augmentation": "simclr", "temperature": 0.5, "mixup_alpha": 0.0, "dataloader_drop_last": True},
    "image_text": {"mixup_alpha": 0.0, "dataloader_drop_last": True},
}


DEPENDING_ON_THE_MODEL = {"objective"}.union(
    BATCH_NORM_DEFAULTS,
    TRANSFORMER_DEFAULTS,
    BATCH_NORM_FOLLOWING,
    TRANSFORMER_FOLLOWING,
    *OBJECTIVE_DEFAULTS.values(),
) - {"dataloader_drop_last"}

# Arguments of TSCConfig that do not change the result, or that name places on this machine.
NOT_REPORTED = (
    "output_dir", "logging_dir", "run_name", "hub_token", "push_to_hub_token", "resume_from_checkpoint", "max_steps",
    "num_train_epochs", "dataloader_pin_memory",
)  # fmt: skip

# Beginnings of those that change nothing but what is shown and kept on the way.
WITHOUT_EFFECT = ("logging_", "save_", "hub_", "report_to", "disable_tqdm", "use_cpu")


@dataclass
class TSCConfig(TrainingArguments):
    r"""
    Arguments of [`TSCTrainer`]: those of [`~transformers.TrainingArguments`] and the following.

    > Parameters that control the course

    rounds (`int`): how often the two curves are run.
    stages (`int`): 2 runs both curves of a round, 1 stops after the first.
    curve_epochs (`float`): passes over the clean images a curve.
    curve_steps (`int`): optimisation steps a curve; overrides `curve_epochs` when positive.
    curve1_t, curve2_t (`float`): t*, the point taken on the first curve (between the model and its un-aligned copy)
        and on the second (0: a copy of the backdoored model, 1: the first curve's point), both in (0, 1).
    curve1_window, curve2_window (`list[float]`): t is drawn from U(low, high) while training.
    max_accuracy_drop (`float`, *optional*): choose t* instead: the point farthest from the backdoored ends whose clean
        accuracy on the held-out images lies at most this many percentage points below the suspect's.
    sweep_points (`int`): points of each curve, ends included, measured on the held-out images.

    > Parameters that control the matching

    matching (`str`): `l2` (the paper) or `correlation`.
    move_spaces (`list[str]`): kinds of spaces that may move.
    move_towers (`list[str]`): of an image-text dual encoder, the towers whose spaces may move: `image`, `text`. A
        tower that moves must be trained.
    train_towers (`list[str]`): those whose weights are trained; the others stay as they are, bit by bit.
    max_positions (`int`, *optional*): read at most so many positions (pixels, tokens) of each image.
    statistics_batch_size (`int`): images a forward pass when statistics are collected; those of BatchNorm depend on
        it.
    statistics_memory_gb (`float`, *optional*): hold at most so many gigabytes of statistics for the matching at once,
        and read the images in several passes where they take more; None for no limit. Between two networks half of it
        is for the matrices, and the rest for activations.

    > Parameters that control the steps, beside those of `TrainingArguments`

    relative_rate (`bool`): for SGD, the rate of layers before a BatchNorm grows with the squared norm of their units'
        weights, and `learning_rate` is that of the networks which the default was searched on (see
        `hf_tsc.relative_rate`). A factor for all of these weights changes nothing that the network does, and a step of
        the same rate would move it less.

    > Parameters that control the loss

    objective (`str`): of classifiers `cross_entropy` (labels) or `distillation` (the suspect's own answers on clean
        images); of encoders `distillation` (its features) or `simclr`; of dual encoders `distillation` (its embeddings
        of images and of texts) or `image_text` (pairs).
    temperature (`float`): of the distillation from a classifier, and of SimCLR.
    teacher_view (`str`): what the suspect answers to when a classifier is distilled from it: `same`, the augmented and
        mixed picture; `clean`, the picture as it is in the data set.
    teacher_errors (`str`): what becomes of a distilled classifier's answers that are not the label: `keep` learns them
        like others, `drop` leaves these items out, `correct` learns the label.
    feature_weight (`float`): of the distance between hidden states and the suspect's, beside that of answers or
        features, in a distillation; 0 for none. Hidden states move with the residual stream, which has to stay.
    feature_states (`str`): which hidden states: `all` that stay in place along the curve, or the `last` of them.
    mixup_alpha (`float`): mixup with λ ~ Beta(alpha, alpha); 0 for none.
    batch_norm_images (`str`): images that the BatchNorm statistics of a point are computed of: `training`, augmented
        and mixed as its weights have seen them, or `clean`, as they are in the data set.
    sync_batch_norm (`bool`): in several processes, BatchNorm layers normalise a training batch with the mean and the
        variance of all processes' images; otherwise each process with those of its own, so that what counts is
        `per_device_train_batch_size`.
    channels_last (`bool`): convolutions in channels-last memory format, which most accelerators prefer.
    augmentation (`str`): `none`, `crop`, `crop_flip` or `affine` (see `hf_tsc.images.Augmentation`).
    """

    rounds: int = field(default=1, metadata={"help": "How often the two curves are run."})
    stages: int = field(default=2, metadata={"help": "2 runs both curves of a round, 1 stops after the first."})
    curve_epochs: float = field(default=100.0, metadata={"help": "Passes over the clean images a curve."})
    curve_steps: int = field(default=-1, metadata={"help": "Steps a curve; overrides curve_epochs when positive."})
    curve1_t: float = field(default=0.5, metadata={"help": "The point taken on the first curve of a round."})
    curve2_t: float = field(default=0.4, metadata={"help": "The point taken on the second curve of a round."})
    curve1_window: list[float] = field(
        default_factory=lambda: [0.0, 1.0], metadata={"help": "t is drawn from U(low, high) on the first curve."}
    )
    curve2_window: list[float] = field(
        default_factory=lambda: [0.0, 1.0], metadata={"help": "t is drawn from U(low, high) on the second curve."}
    )
    max_accuracy_drop: float | None = field(
        default=None,
        metadata={"help": "Choose t on each curve so that the held-out accuracy drops at most so many points."},
    )
    sweep_points: int = field(default=11, metadata={"help": "Points of each curve that are measured afterwards."})
    matching: str = field(default="l2", metadata={"help": "Similarity of units.", "choices": MATCHING_METHODS})
    move_spaces: list[str] = field(
        default_factory=lambda: list(KINDS), metadata={"help": "Kinds of spaces that may move.", "choices": KINDS}
    )
    move_towers: list[str] = field(
        default_factory=lambda: list(TOWERS),
        metadata={"help": "Towers of a dual encoder whose spaces may move.", "choices": list(TOWERS)},
    )
    train_towers: list[str] = field(
        default_factory=lambda: list(TOWERS),
        metadata={"help": "Towers of a dual encoder that are trained.", "choices": list(TOWERS)},
    )
    max_positions: int | None = field(
        default=None, metadata={"help": "Read at most so many positions of each image for the matching."}
    )
    statistics_batch_size: int = field(
        default=128, metadata={"help": "Images a forward pass for matching and BatchNorm statistics."}
    )
    statistics_memory_gb: float | None = field(
        default=8.0, metadata={"help": "Gigabytes of statistics for the matching at once; more take several passes."}
    )
    objective: str = field(default="cross_entropy", metadata={"help": "Training loss.", "choices": OBJECTIVES})
    temperature: float = field(default=2.0, metadata={"help": "Temperature of the distillation."})
    teacher_view: str = field(
        default="same", metadata={"help": "Pictures that a distilled suspect answers to.", "choices": TEACHER_VIEWS}
    )
    teacher_errors: str = field(
        default="keep",
        metadata={
            "help": "What to do with a distilled suspect's answers that are not the label.",
            "choices": TEACHER_ERRORS,
        },
    )
    feature_weight: float = field(
        default=0.0, metadata={"help": "Of a distilled suspect's hidden states in the loss; 0 for none."}
    )
    feature_states: str = field(
        default="all",
        metadata={"help": "Which hidden states: all that stay in place, or the last.", "choices": FEATURE_STATES},
    )
    mixup_alpha: float = field(default=0.0, metadata={"help": "Mixup with Beta(alpha, alpha); 0 for none."})
    augmentation: str = field(
        default="crop", metadata={"help": "Random changes of the training images.", "choices": AUGMENTATIONS}
    )

    batch_norm_images: str = field(
        default="training",
        metadata={"help": "Images that BatchNorm statistics are computed of.", "choices": BATCH_NORM_IMAGES},
    )
    sync_batch_norm: bool = field(
        default=False, metadata={"help": "BatchNorm along the curve over the images of all processes, not of each."}
    )
    channels_last: bool = field(
        default=False, metadata={"help": "Keep convolution weights and activations in channels-last memory format."}
    )

    # TrainingArguments whose defaults do not suit a purification
    optim: str = field(default="sgd", metadata={"help": "The optimizer of the bend."})
    optim_args: str | None = field(default="momentum=0.9", metadata={"help": "Options of the optimizer."})
    learning_rate: float = field(default=0.1, metadata={"help": "Rate on the bend; acts at a quarter at most."})
    relative_rate: bool = field(
        default=False, metadata={"help": "SGD's rate before a BatchNorm in proportion to the weights' squared norm."}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of each curve."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Gradient clipping; 0 for none."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Images a step and device."})
    logging_steps: float = field(default=0.05, metadata={"help": "Log every so many steps, or share of all steps."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "A loss that is not finite must be seen."})
    save_steps: float = field(default=0.1, metadata={"help": "Checkpoint every so many steps, or share of all steps."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept."})
    disable_tqdm: bool | None = field(default=False, metadata={"help": "Show no progress bar."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Items are pixels, not columns."})
    ddp_broadcast_buffers: bool | None = field(default=False, metadata={"help": "Statistics are recomputed anyway."})
    hub_strategy: str = field(default="end", metadata={"help": "Never publish half-purified weights."})

    def __post_init__(self) -> None:
        self._check()
        super().__post_init__()

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> TSCConfig:
        """The configuration of a preset (`default` or `paper`) with some fields changed."""
        if name not in PRESETS:
            raise UsageError(f"preset={name!r}: expected one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})

    @classmethod
    def for_model(cls, model: nn.Module, *, objectives: Collection[str] = CLASSIFYING, **overrides: Any) -> TSCConfig:
        """The defaults for a model's family and the objective, with some fields changed.

        Args:
            model: the suspect.
            objectives: those that fit it, the default first.
            overrides: fields and their values.
        """
        family = family_defaults(model, classifier="cross_entropy" in objectives)
        objective = overrides.get("objective", next(iter(objectives)))
        chosen = {"objective": objective, **OBJECTIVE_DEFAULTS.get(objective, {}), **overrides}
        if overrides.get("optim", "sgd") != "sgd":
            chosen = {"relative_rate": False, **chosen}
        following = {**family, **chosen}
        if not (_has_hidden_states(following) and following["feature_weight"]):
            following = {**family_defaults(model, following=False), **chosen}
        config = cls(**following)
        config.check_following()
        return config

    def segment_steps(self, images: int) -> int:
        """Optimisation steps a curve, over so many clean images."""
        if self.curve_steps > 0:
            return self.curve_steps
        batches = images / (self.train_batch_size * self.world_size * self.gradient_accumulation_steps)
        epoch = math.floor(batches) if self.dataloader_drop_last else math.ceil(batches)
        return max(1, round(self.curve_epochs * epoch))

    @property
    def statistics_bytes(self) -> int | None:
        """`statistics_memory_gb` in bytes."""
        return None if self.statistics_memory_gb is None else round(1e9 * self.statistics_memory_gb)

    def check_following(self) -> None:
        """Raises UsageError where hidden states shall be followed and cannot.

        Apart from the other checks: arguments that are still to be completed for a model need not fit together.
        """
        if self.feature_weight and not _has_hidden_states(vars(self)):
            raise UsageError(
                f"feature_weight={self.feature_weight} with objective={self.objective}, "
                f"move_spaces={self.move_spaces}: hidden states are followed in a distillation alone, and only where "
                "the residual stream stays in place; give feature_weight=0, or leave residual out of move_spaces"
            )

    def _check(self) -> None:
        for name in ("curve1_t", "curve2_t"):
            if not 0 < getattr(self, name) < 1:
                raise UsageError(
                    f"{name}={getattr(self, name)}: t must lie strictly between 0 and 1, the ends are backdoored"
                )
        for name in ("curve1_window", "curve2_window"):
            window = getattr(self, name)
            if len(window) != 2 or not 0 <= window[0] <= window[1] <= 1:
                raise UsageError(f"{name}={window}: expected two numbers with 0 <= low <= high <= 1")
        choices = {
            "matching": MATCHING_METHODS,
            "objective": OBJECTIVES,
            "augmentation": AUGMENTATIONS,
            "teacher_view": TEACHER_VIEWS,
            "teacher_errors": TEACHER_ERRORS,
            "feature_states": FEATURE_STATES,
            "lr_scheduler_type": tuple(SCHEDULES),
            "batch_norm_images": BATCH_NORM_IMAGES,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(allowed)}")
        if unknown := set(self.move_spaces) - set(KINDS):
            raise UsageError(f"move_spaces names {', '.join(sorted(unknown))}: expected some of {', '.join(KINDS)}")
        for name in ("move_towers", "train_towers"):
            if unknown := set(getattr(self, name)) - set(TOWERS):
                raise UsageError(f"{name} names {', '.join(sorted(unknown))}: expected some of {', '.join(TOWERS)}")
        if not self.train_towers or set(self.move_towers) - set(self.train_towers):
            raise UsageError(
                f"move_towers={self.move_towers}, train_towers={self.train_towers}: at least one tower must be "
                "trained, and one that moves must be, as nothing else holds its curve together"
            )
        if self.relative_rate and self.optim != "sgd":
            raise UsageError(
                f"relative_rate with optim={self.optim}: only SGD's steps turn large weights less; leave it out"
            )
        if not (math.isfinite(self.feature_weight) and self.feature_weight >= 0):
            raise UsageError(f"feature_weight={self.feature_weight}: expected 0 (none) or a positive number")
        if self.statistics_memory_gb is not None and not self.statistics_memory_gb > 0:
            raise UsageError(f"statistics_memory_gb={self.statistics_memory_gb}: expected a positive number")
        if self.stages not in (1, 2):
            raise UsageError(f"stages={self.stages}: expected 1 (first curve only) or 2 (both)")
        if self.rounds < 1 or self.curve_steps == 0 or (self.curve_steps < 0 and not self.curve_epochs > 0):
            raise UsageError(
                f"rounds={self.rounds}, curve_epochs={self.curve_epochs}, curve_steps={self.curve_steps}: that makes "
                "no optimisation step; give at least one round and a positive number of epochs or steps a curve"
            )
        if self.max_steps > 0 or self.num_train_epochs != TrainingArguments.num_train_epochs:
            raise UsageError(
                f"max_steps={self.max_steps}, num_train_epochs={self.num_train_epochs}: how long a curve is trained, "
                "curve_steps and curve_epochs say"
            )
        if self.label_smoothing_factor:
            raise UsageError(f"label_smoothing_factor={self.label_smoothing_factor}: no objective smooths labels")
        if self.sweep_points < 3:
            raise UsageError(f"sweep_points={self.sweep_points}: at least 3 are needed, two of them the ends")
        if self.sync_batch_norm and (self.activation_checkpointing or self.gradient_checkpointing):
            raise UsageError(
                "sync_batch_norm does not go with activation_checkpointing: what is computed anew in the backward "
                "pass would be normalised with the images of one process; give one of the two"
            )
        if self.torch_compile or self.torch_compile_backend or self.torch_compile_mode:
            raise UsageError(
                "torch_compile: a curve stands at another t in each step, and would be compiled anew for each of them "
                "(docs/performance.md); leave it out"
            )
        if self.push_to_hub:
            raise UsageError(
                "push_to_hub: the Trainer would publish half-purified weights; push at the end, with "
                "`hf-tsc purify --push_to_hub`, `push_folder` or `TSCTrainer.push_to_hub()`"
            )
        if self.load_best_model_at_end:
            raise UsageError("load_best_model_at_end: there is no best step across curves; use max_accuracy_drop")


def _has_hidden_states(values: Mapping[str, Any]) -> bool:
    """Whether there are hidden states to follow: the suspect teaches, and they do not move along the curve."""
    return values["objective"] == "distillation" and "residual" not in values.get("move_spaces", KINDS)


def family_defaults(model: nn.Module, *, following: bool = True, classifier: bool = True) -> dict[str, Any]:
    """What differs from the defaults of `TSCConfig` for networks with BatchNorm layers, or for those without.

    Args:
        model: of the family.
        following: its hidden states are followed.
        classifier: it is one, and no encoder or dual encoder.
    """
    if batch_norm_buffers(model):
        return {**BATCH_NORM_DEFAULTS, **(BATCH_NORM_FOLLOWING if following else {})}
    followed = {**TRANSFORMER_FOLLOWING, **({} if classifier else TRANSFORMER_FEATURES)}
    return {**TRANSFORMER_DEFAULTS, **(followed if following else {})}


def reported_arguments(config: TSCConfig) -> dict[str, Any]:
    """The arguments that differ from a plain TSCConfig, and those that a reader will look for."""
    values, defaults = config.to_dict(), TSCConfig(use_cpu=config.use_cpu).to_dict()
    always = set(TSCConfig.__annotations__) | {"seed", "weight_decay"}
    return {
        key: value
        for key, value in values.items()
        if key not in NOT_REPORTED and (key in always or value != defaults.get(key))
    }
