"""A purification with each objective: encoders with SimCLR or feature distillation, CLIP with captions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import ResNetModel, ViTModel

from hf_tsc.architectures import VARIANTS
from hf_tsc.derive import example_inputs
from hf_tsc.errors import UsageError
from hf_tsc.images import ImagePipeline
from hf_tsc.objectives import (
    Captions,
    EmbeddingDistillation,
    FeatureDistillation,
    ImageText,
    Objective,
    ProjectionHead,
    SimCLR,
    features_of,
)
from hf_tsc.towers import parameters_by_tower
from hf_tsc.tsc_config import IN_PLACE, TSCConfig
from hf_tsc.tsc_trainer import TSCTrainer

STEPS = 3
PIPELINE = ImagePipeline(tiny.processor())


class Captioned(Dataset):
    """Digits, each with its class for a caption."""

    def __init__(self, first: int, last: int):
        self.images = tiny.digits(first, last)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> dict[str, Any]:
        item = self.images[position]
        return {"pixels": item["pixels"], "captions": torch.tensor([item["labels"]])}


def encoder(family: str) -> nn.Module:
    torch.manual_seed(0)
    kind = {"resnet": ResNetModel, "vit": ViTModel}[family]
    return kind(tiny.model(family).config).eval()


def captions() -> Captions:
    tokens = torch.tensor([[18, 1 + number, 19] for number in range(tiny.LABELS)])
    return Captions(tuple(map(str, range(tiny.LABELS))), {"input_ids": tokens})


def case(name: str) -> tuple[Any, Objective]:
    """Model and objective."""
    if name == "clip":
        return tiny.model("clip"), ImageText(PIPELINE, captions())
    if name == "features clip":
        model = tiny.model("clip").eval()
        options = {"augmentation": "crop", "mixup_alpha": 1.0, "feature_weight": 2.0, "feature_states": "last"}
        return model, EmbeddingDistillation(PIPELINE, captions(), model, **options)
    kind, family = name.split()
    model = encoder(family)
    if kind == "features":
        return model, FeatureDistillation(PIPELINE, model, augmentation="crop", mixup_alpha=1.0)
    size = features_of(model, torch.zeros(1, 3, tiny.IMAGE, tiny.IMAGE)).shape[1]
    return model, SimCLR(PIPELINE, head=ProjectionHead(size))


def trainer(folder, name: str, **changes) -> TSCTrainer:
    model, objective = case(name)
    options = {"curve_steps": STEPS, "stages": 2, "sweep_points": 3, "per_device_train_batch_size": 8, "seed": 1}
    options |= {"save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    if name == "features clip":
        options |= {"objective": "distillation", "move_spaces": IN_PLACE, "feature_weight": 2.0}
    data = Captioned if name.endswith("clip") else lambda *rows: tiny.digits(*rows, labelled=False)
    return TSCTrainer(
        model,
        TSCConfig(output_dir=str(folder), **{**options, **changes}),
        train_dataset=data(0, 16),
        eval_dataset=data(16, 32),
        processing_class=tiny.processor(),
        objective=objective,
    )


def inputs(name: str) -> dict[str, Tensor]:
    pixels = torch.randn(3, 3, tiny.IMAGE, tiny.IMAGE, generator=torch.Generator().manual_seed(2))
    return {"pixel_values": pixels, **(captions().inputs(torch.tensor([4, 2, 7])) if name.endswith("clip") else {})}


CASES = ("simclr resnet", "simclr vit", "features resnet", "features vit", "clip", "features clip")


@pytest.mark.parametrize("name", CASES)
class TestPurification:
    def test_the_bend_is_trained_and_the_copies_keep_the_function(self, tmp_path, name):
        made = trainer(tmp_path, name)
        suspect = made.suspect
        made.train()
        assert made._moved > 0.2
        (first, second) = made.curves
        assert first.sweep[0].score == pytest.approx(first.sweep[-1].score)  # the ends are the same function
        assert first.sweep[0].loss == pytest.approx(first.sweep[-1].loss, rel=1e-4, abs=1e-6)
        if made.objective.head is None:  # the head has gone on learning
            assert second.sweep[0].loss == pytest.approx(first.sweep[0].loss, rel=1e-4, abs=1e-6)
        purified = made.purified_model()
        assert purified.state_dict().keys() == suspect.state_dict().keys()  # no head
        with torch.no_grad():
            before, after = (list(model(**inputs(name)).to_tuple()) for model in (suspect, purified))
        assert not torch.allclose(before[0], after[0], atol=1e-4)

    def test_resume_is_bit_exact(self, tmp_path, name):
        """Head and all; on the boundary of the curves."""
        whole = trainer(tmp_path / "whole", name)
        whole.train()
        half = trainer(tmp_path / "half", name, save_strategy="steps", save_steps=STEPS)
        half.train()
        resumed = trainer(tmp_path / "resumed", name)
        resumed.train(resume_from_checkpoint=str(tmp_path / "half" / f"checkpoint-{STEPS}"))
        ours, theirs = resumed.model.state_dict(), whole.model.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_head_is_trained_along(tmp_path):
    made = trainer(tmp_path, "simclr resnet")
    before = [p.detach().clone() for p in made.objective.head.parameters()]
    made.train()
    assert all(not torch.equal(a, b) for a, b in zip(before, made.objective.head.parameters(), strict=True))


def embeddings(model: nn.Module) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        output = model.eval()(**inputs("clip"))
    return output.image_embeds, output.text_embeds


class TestTowers:
    def test_a_tower_that_is_not_trained_stays_bit_by_bit(self, tmp_path):
        made = trainer(tmp_path, "clip", move_towers=["image"], train_towers=["image"])
        suspect = {name: tensor.clone() for name, tensor in made.suspect.state_dict().items()}
        made.train()
        purified = made.purified_model()
        changed = {name for name, tensor in purified.state_dict().items() if not torch.equal(tensor, suspect[name])}
        assert {name.split(".")[0] for name in changed} == {"vision_model", "visual_projection", "logit_scale"}
        (images, texts), (old_images, old_texts) = embeddings(purified), embeddings(made.suspect)
        assert torch.equal(texts, old_texts)
        assert not torch.allclose(images, old_images, atol=1e-4)

    def test_a_tower_that_does_not_move_can_be_trained(self, tmp_path):
        made, laid = trainer(tmp_path, "clip", move_towers=["text"], stages=1), []
        made.on_curve_end = lambda result: laid.extend(copy.deepcopy([made.curve.start, made.curve.end]))
        made.train()
        start, end = laid
        moved = {name.split(".")[0] for name in start if not torch.equal(start[name], end[name])}
        assert moved == {"text_model", "text_projection"}
        purified = dict(made.purified_model().named_parameters())
        assert not torch.equal(purified["visual_projection.weight"], made.suspect.visual_projection.weight)

    def test_with_no_tower_moved_both_ends_are_the_suspect(self, tmp_path):
        made = trainer(tmp_path, "clip", move_towers=[], stages=1)
        made.train()
        assert made._moved == 0

    def test_resume_is_bit_exact(self, tmp_path):
        options = {"move_towers": ["image"], "train_towers": ["image"]}
        whole = trainer(tmp_path / "whole", "clip", **options)
        whole.train()
        trainer(tmp_path / "half", "clip", save_strategy="steps", save_steps=STEPS, **options).train()
        resumed = trainer(tmp_path / "resumed", "clip", **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "half" / f"checkpoint-{STEPS}"))
        ours, theirs = resumed.model.state_dict(), whole.model.state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    def test_a_model_without_two_towers_is_refused(self, tmp_path):
        with pytest.raises(UsageError, match="ResNetModel has no image tower: leave move_towers and train_towers out"):
            trainer(tmp_path, "simclr resnet", move_towers=["image"], train_towers=["image"])

    @pytest.mark.parametrize(
        ("towers", "message"),
        [
            ({"move_towers": ["sound"]}, "move_towers names sound: expected some of image, text"),
            ({"train_towers": []}, "at least one tower must be trained"),
            ({"train_towers": ["image"]}, "one that moves must be"),
        ],
    )
    def test_wrong_input(self, tmp_path, towers, message):
        with pytest.raises(UsageError, match=message):
            TSCConfig(output_dir=str(tmp_path), use_cpu=True, **towers)

    @pytest.mark.parametrize("name", ["clip", "siglip", "altclip", "chinese_clip", "align", "blip"])
    def test_towers_are_found_by_what_depends_on_them(self, name):
        model = VARIANTS[name].build().eval()
        towers = parameters_by_tower(model, example_inputs(model))
        assert not towers["image"] & towers["text"]
        assert {n for n in towers["image"] if n.startswith(("text_model", "text_projection"))} == set()
        assert {n for n in towers["text"] if n.startswith(("vision_model", "visual_projection"))} == set()
        left = (
            {n for n, _ in model.named_parameters() if "pooler" not in n and "crossattention" not in n}
            - towers["image"]
            - towers["text"]
        )
        assert left <= {"logit_scale", "logit_bias", "temperature"}
