"""A purification in miniature of every architecture that reads pixel values: it runs, and gives back the same kind."""

import pytest
import torch
from torch.utils.data import Dataset
from transformers import ViTImageProcessorPil

from hf_tsc.architectures import VARIANTS
from hf_tsc.derive import example_inputs
from hf_tsc.errors import UsageError
from hf_tsc.objectives import logits_of
from hf_tsc.tsc_config import TSCConfig
from hf_tsc.tsc_trainer import TSCTrainer

SAMPLE = ("levit", "swin", "bit(preact)", "regnet(y)", "convnextv2", "beit(relpos)", "mobilevit")
OTHER_INPUTS = {"imagegpt", "siglip2(img-cls)"}  # tokens and patches: not what this objective feeds
CLASSIFIERS = [
    pytest.param(name, marks=() if name in SAMPLE else pytest.mark.slow)
    for name, variant in VARIANTS.items()
    if variant.build.__module__.endswith("classifiers") and name not in OTHER_INPUTS
]


class Images(Dataset):
    def __init__(self, shape: torch.Size, count: int):
        self.pixels = torch.randint(256, (count, *shape), generator=torch.Generator().manual_seed(0)).to(torch.uint8)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict:
        return {"pixels": self.pixels[index], "labels": index % 10}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_purify(name, tmp_path):
    torch.manual_seed(0)
    model = VARIANTS[name].build().eval()
    shape = example_inputs(model)["pixel_values"].shape[1:]
    config = TSCConfig(
        str(tmp_path),
        curve_steps=1,
        per_device_train_batch_size=4,
        sweep_points=3,
        statistics_batch_size=4,
        learning_rate=1e-3,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = TSCTrainer(
        model,
        config,
        train_dataset=Images(shape, 8),
        eval_dataset=Images(shape, 4),
        processing_class=ViTImageProcessorPil(do_resize=False),
    )
    trainer.train()
    purified = trainer.purified_model()
    assert len(trainer.curves) == 2 * config.rounds
    assert type(purified) is type(model)
    assert not all(torch.equal(p, purified.get_parameter(n)) for n, p in model.named_parameters())
    images = example_inputs(model)["pixel_values"]
    with torch.no_grad():
        again = logits_of(purified, images)
        assert torch.isfinite(again).all()
        fresh = type(model)(model.config).eval()
        fresh.load_state_dict(purified.state_dict())
        assert torch.allclose(logits_of(fresh, images), again, atol=1e-5)


@pytest.mark.parametrize("name", sorted(OTHER_INPUTS))
def test_other_inputs_are_refused(name, tmp_path):
    model = VARIANTS[name].build()
    images = Images(torch.Size([3, 8, 8]), 4)
    with pytest.raises(UsageError, match="expected a classifier that reads pixel_values alone"):
        TSCTrainer(
            model,
            TSCConfig(str(tmp_path), use_cpu=True, report_to="none"),
            train_dataset=images,
            eval_dataset=images,
            processing_class=ViTImageProcessorPil(do_resize=False),
        )
