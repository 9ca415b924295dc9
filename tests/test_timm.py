"""Models of timm through transformers' wrapper: derived like any other, without a word about timm in the library."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification
from transformers.utils import is_timm_available

from hf_tsc.derive import derive_spec, example_inputs, verify
from hf_tsc.permutation import apply, roll

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "recipes"))
timm_architectures = pytest.importorskip("timm_architectures")
RESULT = json.loads((ROOT / "docs/timm_architectures.json").read_text(encoding="utf-8"))

needs_timm = pytest.mark.skipif(not is_timm_available(), reason="timm is not installed: it is the extra `timm`")


def build(architecture: str, **model_args) -> TimmWrapperForImageClassification:
    torch.manual_seed(0)
    config = TimmWrapperConfig(architecture=architecture, model_args=model_args, num_labels=7)
    return TimmWrapperForImageClassification(config).eval()


SMALL = {"pretrained_cfg_overlay": {"input_size": [3, 64, 64]}}
CASES = {
    "vit_tiny_patch16_224": ({"depth": 2, "img_size": 64}, 1 + 2 * 4),
    "resnet10t": (
        SMALL,
        10,
    ),  # 3 of the stem and 4 stages, of which the first has that of the stem; 4 between convolutions
    "convnext_atto": ({**SMALL, "depths": [1, 1, 1, 1]}, 4 + 4),
}


@needs_timm
class TestWrappedModels:
    @pytest.mark.parametrize("architecture", CASES)
    def test_derives_and_verifies(self, architecture):
        model_args, spaces = CASES[architecture]
        model = build(architecture, **model_args)
        inputs = example_inputs(model)
        spec = derive_spec(model, inputs)
        verification = verify(model, spec, inputs)
        assert verification.error < 1e-10
        assert verification.control is not None
        assert verification.control > 1e-6
        assert len(spec.spaces) == spaces
        assert spec.unknown_ops == ()

    def test_a_permuted_model_survives_saving(self, tmp_path):
        """Its key bias is a buffer of zeros that is not saved: it is zero again, and so as permuted."""
        model = build("beit_base_patch16_224", depth=1, img_size=32, embed_dim=24, num_heads=3)
        inputs = example_inputs(model)
        spec = derive_spec(model, inputs)
        assert {space.kind for space in spec.spaces.values()} == {"residual", "heads", "vo", "hidden"}
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        moved = apply({name: tensor.detach().clone() for name, tensor in tensors.items()}, spec, roll(spec))
        with torch.no_grad():
            expected = model(**inputs).logits
            for name, tensor in tensors.items():
                tensor.copy_(moved[name])
            model.save_pretrained(tmp_path)
            again = TimmWrapperForImageClassification.from_pretrained(tmp_path).eval()
            torch.testing.assert_close(again(**inputs).logits, expected)

    @pytest.mark.parametrize(
        ("model_args", "shape"),
        [
            ({}, (3, 176, 176)),
            ({"in_chans": 1}, (1, 176, 176)),
            ({"pretrained_cfg_overlay": {"input_size": [3, 48, 64]}}, (3, 48, 64)),
        ],
    )
    def test_inputs_have_the_size_of_the_architecture(self, model_args, shape):
        assert example_inputs(build("resnet10t", **model_args))["pixel_values"].shape == (2, *shape)

    @pytest.mark.parametrize(("size", "shape"), [(64, (64, 64)), ([32, 64], (32, 64))])
    def test_inputs_have_the_size_that_the_configuration_asks_for(self, size, shape):
        model = build("vit_tiny_patch16_224", depth=1, img_size=size)
        assert example_inputs(model, batch_size=3)["pixel_values"].shape == (3, 3, *shape)


class TestTable:
    def test_it_is_that_of_the_measurements(self):
        written = (ROOT / "docs/timm_architectures.md").read_text(encoding="utf-8")
        assert timm_architectures.table(RESULT) == written
        assert {record["architecture"] for record in RESULT["architectures"]} == set(timm_architectures.ARCHITECTURES)

    def test_many_families_verify(self):
        verified = [record for record in RESULT["architectures"] if "failure" not in record]
        assert len({record["family"] for record in verified}) >= 25
        for record in verified:
            assert record["error"] < (1e-5 if record["casts"] else 1e-10)
            assert record["control"] >= timm_architectures.CONTRAST * record["error"]
            assert record["spaces"] > 0
