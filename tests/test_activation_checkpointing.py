"""Activation checkpointing along the curve: the same losses and gradients, with layers computed twice."""

import pytest
import tiny
import torch
import torch.nn.functional as F
from test_tsc_trainer import same, trainer, weights
from torch import Tensor, nn
from transformers import MobileViTConfig, MobileViTForImageClassification

from hf_tsc.curve import CurveModel
from hf_tsc.errors import UsageError
from hf_tsc.objectives import ProjectionHead, WithHead
from hf_tsc.tsc_config import TSCConfig


def mobilevit() -> nn.Module:
    """With BatchNorm inside of the layers that are computed twice."""
    shape = {"hidden_sizes": [8, 12, 8], "neck_hidden_sizes": [4, 4, 6, 6, 8, 10, 12], "num_attention_heads": 2}
    small = {"image_size": 32, "num_labels": tiny.LABELS, "hidden_dropout_prob": 0.0, "classifier_dropout_prob": 0.0}
    made = MobileViTForImageClassification(MobileViTConfig(**shape, **small)).double()
    tiny.randomise(made)
    return made


MODELS = {
    "vit": (lambda seed: tiny.random_model("vit", seed=seed), tiny.IMAGE, "vit.layers.0"),
    "mobilevit": (lambda seed: mobilevit(), 32, "mobilevit.encoder.layer.2"),
}


def curve_of(name: str) -> CurveModel:
    build = MODELS[name][0]
    made = CurveModel(build(1)).train()
    ends = [{key: p + 0.01 * seed for key, p in made.point(0.0).items()} for seed in (1, 2)]
    made.set_ends(*ends)
    made.t = 0.3
    return made


def step(curve: CurveModel, name: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradient of the bend, of two accumulated batches."""
    size = MODELS[name][1]
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(2):
        pixels = torch.randn(4, 3, size, size, generator=generator, dtype=torch.float64)
        torch.manual_seed(0)  # of dropout
        loss = F.cross_entropy(curve(pixel_values=pixels).logits, torch.arange(4)) / 2
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses), {key: p.grad.clone() for key, p in curve.bend.items()}


def count(module: nn.Module) -> list[None]:
    """Grows with each call of the module."""
    calls: list[None] = []
    module.register_forward_hook(lambda *_: calls.append(None))
    return calls


def first_linear(module: nn.Module) -> nn.Module:
    return next(layer for layer in module.modules() if isinstance(layer, nn.Linear))


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients(name):
    plain, other = curve_of(name), curve_of(name)
    other.activation_checkpointing_enable()
    calls = [count(first_linear(made.model.get_submodule(MODELS[name][2]))) for made in (plain, other)]
    losses, gradients = step(plain, name)
    again, recomputed = step(other, name)
    assert len(calls[1]) == 2 * len(calls[0]) > 0, "the layer is computed twice"
    assert torch.equal(losses, again)
    assert sum(gradient.abs().max() > 1e-9 for gradient in gradients.values()) > 0.8 * len(gradients)
    for key, gradient in gradients.items():
        torch.testing.assert_close(recomputed[key], gradient, rtol=1e-12, atol=1e-12)


def test_options_go_through():
    made = curve_of("vit")
    made.activation_checkpointing_enable({"use_reentrant": False, "determinism_check": "none"}, every_n_layers=2)
    assert [layer.gradient_checkpointing for layer in made.model.vit.layers] == [True, False]
    step(made, "vit")


def test_a_tensor_that_a_layer_touches_twice():
    plain, other = curve_of("vit"), curve_of("vit")
    other.activation_checkpointing_enable()
    for made in (plain, other):
        made.model.vit.layers[0].mlp.fc1.register_forward_hook(lambda module, _, output: output + module.bias)
    for one, two in zip(step(plain, "vit")[1].values(), step(other, "vit")[1].values(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_dropout_and_a_whole_training(tmp_path):
    """Accumulated, with dropout, in the Trainer: bit by bit."""
    options = {"rounds": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    runs = []
    for name in ("plain", "again"):
        model = tiny.model("vit")
        for layer in model.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.1
        made = trainer(tmp_path / name, model=model, activation_checkpointing=name == "again", **options)
        calls = count(made.curve.model.vit.layers[0].mlp.fc1)
        made.train()
        runs.append((made, len(calls)))
    (plain, once), (again, twice) = runs
    assert twice == 2 * once > 0
    assert same(weights(plain), weights(again))


def test_a_head_beside_the_encoder():
    encoder = CurveModel(tiny.model("vit").vit)
    whole = WithHead(encoder, ProjectionHead(tiny.HEADS * tiny.HEAD_DIM))
    whole.activation_checkpointing_enable(activation_checkpointing_kwargs=None, every_n_layers=1, offload=False)
    assert encoder.model.is_activation_checkpointing


class TestRefused:
    def test_an_architecture_without_it(self, tmp_path):
        said = "activation_checkpointing: ResNetForImageClassification does not support it; leave it out"
        with pytest.raises(UsageError, match=said):
            trainer(tmp_path, "resnet", activation_checkpointing=True)

    def test_with_synced_batch_norm(self, tmp_path):
        with pytest.raises(UsageError, match="sync_batch_norm does not go with activation_checkpointing"):
            TSCConfig(output_dir=str(tmp_path), sync_batch_norm=True, activation_checkpointing=True)
