"""Trainings of suspects that are killed, and go on from their last checkpoint to the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from suspects_and_digits import digit_data, processor, read_json, same, weights
from tiny import TRANSFORMER
from transformers import AutoModel, CLIPConfig, ResNetConfig, ViTConfig, ViTImageProcessorPil

from hf_tsc.cli import main
from hf_tsc.errors import PurificationError, UsageError
from hf_tsc.evaluation import Attack
from hf_tsc.objective_trainer import ObjectiveTrainer
from hf_tsc.suspects import (
    RECORD,
    Adaptive,
    SuspectConfig,
    adapt_suspect,
    backdoor_encoder,
    train_dual_encoder,
    train_encoder,
    train_suspect,
)
from hf_tsc.triggers import BadNets, InputAware, Square

ATTACK = Attack(BadNets(), target_label=3)
STEPS, SAVED, KILLED_AT = 12, 5, 8  # 6 steps an epoch: all within epochs
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"}
VIT = {**TRANSFORMER, "hidden_dropout_prob": 0.2}
TOWER = {**TRANSFORMER, "attention_dropout": 0.2}
CLIP = {"projection_dim": 8, "vision_config": TOWER, "text_config": {**TOWER, "max_position_embeddings": 12}}


class Killed(BaseException):
    """As a signal: nothing on the way is to take it for an error and clean up."""


@pytest.fixture
def killed(monkeypatch):
    """Call something whose training dies before a step."""

    def call(train: Callable[[], Any], at: int = KILLED_AT) -> None:
        def step(self, *args, real=ObjectiveTrainer.training_step, **kwargs):
            if self.state.global_step == at:
                raise Killed
            return real(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(ObjectiveTrainer, "training_step", step)
            with pytest.raises(Killed):
                train()

    return call


def arguments(folder: Path, **changes: Any) -> SuspectConfig:
    quick = {"num_train_epochs": 2, "per_device_train_batch_size": 16, "save_steps": SAVED, "use_cpu": True}
    quick |= {"disable_tqdm": True, "logging_strategy": "no", "dataloader_drop_last": True}
    return SuspectConfig(output_dir=str(folder), **{**quick, **changes})


def vit(folder: Path, *, indices: Any = range(96), **changes: Any) -> None:
    args = arguments(folder, **{"augmentation": "crop_flip", **changes})
    how = {"args": args, "attack": ATTACK, "poison_rate": 0.1, "indices": np.array(indices)}
    train_suspect(ViTConfig(**VIT), processor(), digit_data(0, 97), **how)


def resnet(folder: Path, **changes: Any) -> None:
    args = arguments(folder, **{"augmentation": "crop", "trigger_last": True, **changes})
    how = {"args": args, "attack": ATTACK, "poison_rate": 0.1}
    train_suspect(ResNetConfig(**RESNET), processor(), digit_data(0, 96), **how)


def encoder(folder: Path, **changes: Any) -> Any:
    args = arguments(folder, **{"augmentation": "simclr", **changes})
    how = {"args": args, "attack": ATTACK, "poison_rate": 0.05}
    return train_encoder(ViTConfig(**VIT), processor(), digit_data(0, 96), **how)


def channels_last(folder: Path, **changes: Any) -> Any:
    args = arguments(folder, **{"augmentation": "simclr", "channels_last": True, **changes})
    return train_encoder(ResNetConfig(**RESNET), processor(), digit_data(0, 96), args=args, attack=None)


def bad_encoder(folder: Path, **changes: Any) -> None:
    clean = encoder(folder.with_name(folder.name + "-clean"), save_strategy="no", num_train_epochs=0.2)
    args = arguments(folder, **{"augmentation": "simclr", **changes})
    backdoor_encoder(clean, processor(), digit_data(0, 96), args=args, attack=Attack(Square(), target_label=3))


def clip(folder: Path, **changes: Any) -> None:
    args = arguments(folder, **{"augmentation": "crop", **changes})
    train_dual_encoder(CLIPConfig(**CLIP), processor(), digit_data(0, 96), args=args, attack=ATTACK)


@pytest.mark.parametrize("train", [vit, resnet, encoder, channels_last, clip])
class TestResumed:
    def test_gives_the_same_bits(self, tmp_path, killed, train):
        train(tmp_path / "whole", save_strategy="no")
        killed(lambda: train(tmp_path / "s"))
        work = tmp_path / "s.work"
        assert not (tmp_path / "s").exists()
        assert (work / f"checkpoint-{SAVED}").is_dir()
        train(tmp_path / "s", resume=True)
        assert same(weights(tmp_path / "s"), weights(tmp_path / "whole"))
        assert read_json(tmp_path / "s" / RECORD) == read_json(tmp_path / "whole" / RECORD)
        assert not work.exists()

    def test_takes_up_where_it_was(self, tmp_path, killed, train, monkeypatch):
        killed(lambda: train(tmp_path / "s"))
        seen = []

        def step(self, *args, real=ObjectiveTrainer.training_step, **kwargs):
            seen.append(self.state.global_step)
            return real(self, *args, **kwargs)

        monkeypatch.setattr(ObjectiveTrainer, "training_step", step)
        train(tmp_path / "s", resume=True)
        assert seen == list(range(SAVED, STEPS))


def test_channels_last_is_of_the_training_alone(tmp_path, monkeypatch):
    seen = []

    def step(self, model, *args, real=ObjectiveTrainer.training_step, **kwargs):
        kernels = [value for value in model.parameters() if value.ndim == 4 and value.shape[-1] > 1]
        seen.extend(value.is_contiguous(memory_format=torch.channels_last) for value in kernels)
        return real(self, model, *args, **kwargs)

    monkeypatch.setattr(ObjectiveTrainer, "training_step", step)
    trained = channels_last(tmp_path / "s", num_train_epochs=0.2)
    assert seen
    assert all(seen)
    kept = AutoModel.from_pretrained(tmp_path / "s")
    for model in (trained, kept):
        assert all(value.is_contiguous() for value in model.parameters())


def test_bad_encoder_gives_the_same_bits(tmp_path, killed):
    bad_encoder(tmp_path / "whole", save_strategy="no")
    killed(lambda: bad_encoder(tmp_path / "s"))
    (tmp_path / "s-clean" / RECORD).unlink()
    for file in (tmp_path / "s-clean").iterdir():
        file.unlink()
    bad_encoder(tmp_path / "s", resume=True)
    assert same(weights(tmp_path / "s"), weights(tmp_path / "whole"))


class TestWorkFolder:
    def test_a_killed_training_without_a_checkpoint_leaves_nothing(self, tmp_path, killed):
        killed(lambda: vit(tmp_path / "s"), at=2)
        assert not any(tmp_path.iterdir())

    def test_is_gone_on_in_only_when_that_is_asked_for(self, tmp_path, killed):
        killed(lambda: vit(tmp_path / "s"))
        with pytest.raises(UsageError, match=r"s\.work is left from an interrupted run: go on with --resume"):
            vit(tmp_path / "s")

    @pytest.mark.parametrize(
        ("changes", "what"),
        [
            ({"learning_rate": 1.0}, "arguments"),
            ({"seed": 1}, "weights, items, record, arguments"),
            ({"indices": range(1, 97)}, "items, record"),
        ],
        ids=["rate", "seed", "images"],
    )
    def test_of_another_training_is_refused(self, tmp_path, killed, changes, what):
        killed(lambda: vit(tmp_path / "s"))
        with pytest.raises(UsageError, match=f"is from a run with other {what}: give the same"):
            vit(tmp_path / "s", resume=True, **changes)

    def test_what_is_shown_and_kept_may_differ(self, tmp_path, killed):
        killed(lambda: vit(tmp_path / "s"))
        vit(tmp_path / "s", resume=True, save_steps=3, logging_strategy="steps", save_total_limit=1)
        assert (tmp_path / "s" / RECORD).is_file()

    def test_pictures_of_another_size_are_other_images(self, tmp_path, killed):
        """The weights of a ResNet do not tell."""

        def train(side: int, **changes: Any) -> None:
            how = {"args": arguments(tmp_path / "s", **changes), "attack": None}
            sized = ViTImageProcessorPil(size={"height": side, "width": side})
            train_suspect(ResNetConfig(**RESNET), sized, digit_data(0, 96), **how)

        killed(lambda: train(8))
        with pytest.raises(UsageError, match="is from a run with other items: give the same"):
            train(12, resume=True)

    @pytest.mark.parametrize("when", [{}, {"save_strategy": "epoch"}, {"max_steps": 10}], ids=str)
    def test_no_checkpoint_after_the_last_step(self, tmp_path, monkeypatch, when):
        """From which a training would go on beyond its end."""
        saved = []

        def save(self, *args, real=ObjectiveTrainer._save_checkpoint, **kwargs):
            saved.append(self.state.global_step)
            return real(self, *args, **kwargs)

        monkeypatch.setattr(ObjectiveTrainer, "_save_checkpoint", save)
        vit(tmp_path / "s", **when)
        assert (
            saved
            == {"epoch": [6], "steps": [5] if "max_steps" in when else [5, 10]}[when.get("save_strategy", "steps")]
        )

    def test_goes_when_the_loss_is_not_finite(self, tmp_path):
        with pytest.raises(PurificationError, match="the loss is"):
            vit(tmp_path / "s", learning_rate=1e30, logging_strategy="steps", logging_steps=1, save_steps=1)
        assert not any(tmp_path.iterdir())

    def test_resume_without_a_checkpoint_begins(self, tmp_path):
        vit(tmp_path / "s", resume=True)
        assert (tmp_path / "s" / RECORD).is_file()


@pytest.mark.parametrize("train", [vit, encoder])
def test_with_activation_checkpointing(tmp_path, train):
    train(tmp_path / "plain", save_strategy="no")
    train(tmp_path / "s", activation_checkpointing=True)
    assert (tmp_path / "s" / RECORD).is_file()


def test_parts_that_no_checkpoint_holds(tmp_path, killed):
    """Networks of a trigger that is learnt; copies that are un-aligned on the way: no checkpoints, nothing is left."""
    attack = Attack(InputAware(mask_epochs=1), target_label=3)
    config, data = ResNetConfig(**RESNET), digit_data(0, 96)
    killed(lambda: train_suspect(config, processor(), data, args=arguments(tmp_path / "s"), attack=attack))
    assert not any(tmp_path.iterdir())
    args = arguments(tmp_path / "base", save_strategy="no")
    base = train_suspect(config, processor(), data, args=args, attack=ATTACK, poison_rate=0.1)
    how: dict[str, Any] = {"attack": ATTACK, "poison_rate": 0.1, "settings": Adaptive(copy_images=32)}
    killed(lambda: adapt_suspect(base, processor(), data, args=arguments(tmp_path / "s"), **how))
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_command(tmp_path, killed, capsys):
    ViTConfig(**VIT).save_pretrained(tmp_path / "config")
    digit_data(0, 96).rows.save_to_disk(tmp_path / "data")
    line = [
        "train-suspect",
        str(tmp_path / "config"),
        "--dataset_name",
        str(tmp_path / "data"),
        "--trigger",
        "badnets",
    ]
    line += ["--target_label", "3", "--output_dir", str(tmp_path / "s"), "--num_train_epochs", "2", "--use_cpu"]
    line += ["--per_device_train_batch_size", "16", "--save_steps", "5", "--disable_tqdm", "True", "--image_size", "8"]
    killed(lambda: main(line))
    assert main(line) == 2
    assert "go on with --resume" in capsys.readouterr().err
    assert main([*line, "--resume"]) == 0
    assert (tmp_path / "s" / RECORD).is_file()
