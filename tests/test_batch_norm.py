"""Recomputed BatchNorm statistics against a computation by hand."""

import pytest
import tiny
import torch
from torch import nn

from hf_tsc.batch_norm import batch_norm_buffers, recompute_statistics


def setting(*, sizes: int = 4):
    model = tiny.random_model("resnet")
    params = {name: p.detach().clone() for name, p in tiny.random_model("resnet", seed=2).named_parameters()}
    return model, params, tiny.digit_batches(10, sizes), dict(model.named_buffers())


def test_names():
    names = batch_norm_buffers(tiny.model("resnet"))
    assert len(names) == 2 * 8
    assert names[0] == "resnet.embedder.embedder.normalization.running_mean"
    assert batch_norm_buffers(tiny.model("vit")) == []
    assert batch_norm_buffers(nn.BatchNorm2d(3, track_running_stats=False)) == []


def test_the_first_and_a_deeper_layer_by_hand():
    model, params, batches, buffers = setting()
    found = recompute_statistics(model, params, batches, buffers)
    weight = params["resnet.embedder.embedder.convolution.weight"]
    means, variances, inner, count = 0, 0, 0, 0
    for batch in batches:
        size = len(batch["pixel_values"])
        x = nn.functional.conv2d(batch["pixel_values"], weight, stride=2, padding=3)
        means, variances = means + size * x.mean((0, 2, 3)), variances + size * x.var((0, 2, 3), unbiased=True)
        count += size
        # the next layer sees this one normalised with its batch statistics
        scale, shift = (params[f"resnet.embedder.embedder.normalization.{name}"] for name in ("weight", "bias"))
        centred = (x - x.mean((0, 2, 3), keepdim=True)) / (
            x.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5
        ).sqrt()
        y = (centred * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)).relu()
        y = nn.functional.max_pool2d(y, 3, 2, 1)
        deeper = params["resnet.encoder.stages.0.layers.0.layer.0.convolution.weight"]
        inner = inner + size * nn.functional.conv2d(y, deeper, padding=1).mean((0, 2, 3))
    base = "resnet.embedder.embedder.normalization"
    assert count == 10
    assert torch.allclose(found[f"{base}.running_mean"], means / count, rtol=1e-12, atol=1e-12)
    assert torch.allclose(found[f"{base}.running_var"], variances / count, rtol=1e-12, atol=1e-12)
    deeper = found["resnet.encoder.stages.0.layers.0.layer.0.normalization.running_mean"]
    assert torch.allclose(deeper, inner / count, rtol=1e-10, atol=1e-10)


def test_the_order_of_the_batches_does_not_matter_their_size_does():
    model, params, batches, buffers = setting()
    found = recompute_statistics(model, params, batches, buffers)
    turned = recompute_statistics(model, params, batches[::-1], buffers)
    for name in batch_norm_buffers(model):
        assert torch.allclose(found[name], turned[name], rtol=1e-12, atol=1e-12)
    other = recompute_statistics(model, params, setting(sizes=10)[2], buffers)
    name = batch_norm_buffers(model)[1]
    assert not torch.allclose(found[name], other[name], rtol=1e-6)


def test_independent_of_the_statistics_before():
    model, params, batches, buffers = setting()
    other = {name: torch.full_like(tensor, 3) for name, tensor in buffers.items()}
    found, again = (recompute_statistics(model, params, batches, start) for start in (buffers, other))
    assert all(torch.equal(found[name], again[name]) for name in batch_norm_buffers(model))


@pytest.mark.parametrize("fails", [False, True])
def test_modes_momenta_and_tensors_stay(fails):
    model, params, batches, buffers = setting()
    model.train()
    model.resnet.encoder.eval()
    layers = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    layers[0].momentum, layers[1].momentum = 0.3, None
    modes = [module.training for module in model.modules()]
    before, given = tiny.tensors(model), {name: p.clone() for name, p in params.items()}
    if fails:
        with pytest.raises(AttributeError):
            recompute_statistics(model, params, [{"labels": torch.zeros(2)}], buffers)
    else:
        recompute_statistics(model, params, batches, buffers)
    assert [module.training for module in model.modules()] == modes
    assert [layer.momentum for layer in layers[:3]] == [0.3, None, 0.1]
    assert all(torch.equal(t, before[name]) for name, t in tiny.tensors(model).items())
    assert all(torch.equal(p, given[name]) for name, p in params.items())


def test_dtype_is_that_of_the_buffers():
    model, params, batches, _ = setting()
    model = model.float()
    buffers = dict(model.named_buffers())
    params = {name: p.float() for name, p in params.items()}
    batches = [{"pixel_values": batch["pixel_values"].float()} for batch in batches]
    found = recompute_statistics(model, params, batches, buffers)
    assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in buffers.items()}


def test_a_model_without_batch_norm_is_not_run():
    model = tiny.model("vit")
    buffers = {"some": torch.ones(2)}
    found = recompute_statistics(model, {}, iter([{"nonsense": torch.zeros(1)}]), buffers)
    assert found == buffers
    assert found is not buffers
