"""Two processes train as a single one does: one curve by DDP or sharded by `fully_shard`, and losses over pairs.

The two processes (gloo, CPU) are started once and run all cases; each takes its half of every batch. The first curve
is laid before the first step, the second one in the middle, both in place; sharded, every process writes its shards.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from hf_tsc.curve import CurveModel
from hf_tsc.images import ImagePipeline
from hf_tsc.objectives import Captions, ImageText, ProjectionHead, SimCLR

RANKS = 2
BATCH = 8
POSITIONS = (0.3, 0.8, 0.5, 0.9, 0.2)  # t of each step
NEW_CURVE = (0, 3)  # before these steps
FAMILIES = ("vit", "resnet")
LAYERS: dict[str, Callable[[nn.Module], list[nn.Module]]] = {
    "vit": lambda model: list(model.vit.layers),
    "resnet": lambda model: [layer for stage in model.resnet.encoder.stages for layer in stage.layers],
}
WRAPPERS = ("ddp", "fsdp")
PAIRWISE = ("simclr", "softmax", "sigmoid")
TOLERANCE = 1e-9  # float64; what the halves of a batch add up to is rounded in another order


def data() -> tuple[Tensor, Tensor]:
    """Pixels (8, 3, 8, 8) and labels (8,)."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(BATCH, 3, tiny.IMAGE, tiny.IMAGE, generator=generator, dtype=torch.float64)
    return pixels, torch.randint(tiny.LABELS, (BATCH,), generator=generator)


def ends(family: str, step: int) -> list[dict[str, Tensor]]:
    """Start and end of the curve that is laid before `step`."""
    return [dict(tiny.random_model(family, seed=10 * step + i).named_parameters()) for i in (1, 2)]


def train(family: str, model: nn.Module, curve: CurveModel, share: slice) -> dict[str, Any]:
    """Steps on a share of the batch; the losses, and the bend before the last curve and at the end."""
    pixels, labels = data()
    optimizer = torch.optim.SGD(curve.bend.values(), lr=0.05, momentum=0.9)
    losses, bends = [], []
    for step, t in enumerate(POSITIONS):
        if step in NEW_CURVE:
            bends.append(whole(curve.bend))
            curve.set_ends(*(like(curve.start, values) for values in ends(family, step)))
            optimizer.state.clear()
        curve.t = t
        loss = F.cross_entropy(model(pixel_values=pixels[share]).logits, labels[share])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"losses": torch.tensor(losses, dtype=torch.float64), "bends": [*bends[1:], whole(curve.bend)]}


def like(tensors: dict[str, Tensor], values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The values, sharded as the tensors are."""
    return {
        name: distribute_tensor(value.detach(), tensor.device_mesh, tensor.placements)
        if isinstance(tensor := tensors[name], DTensor)
        else value.detach()
        for name, value in values.items()
    }


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies, gathered where sharded."""
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for name, t in tensors.items()}


def new_curve(family: str, *, training: bool = False) -> CurveModel:
    """Without `training`, BatchNorm uses its running statistics: then a batch may be split."""
    return CurveModel(tiny.random_model(family, seed=0)).train(training)


def ddp(family: str, share: slice, *, training: bool = False) -> dict[str, Any]:
    curve = new_curve(family, training=training)
    return train(family, DistributedDataParallel(curve), curve, share)


def fsdp(family: str, share: slice) -> dict[str, Any]:
    """Every layer and the root are sharded."""
    curve = new_curve(family)
    mesh = init_device_mesh("cpu", (RANKS,))
    for module in (*LAYERS[family](curve.model), curve):
        fully_shard(module, mesh=mesh)
    assert all(isinstance(t, DTensor) for which in (curve.start, curve.bend, curve.end) for t in which.values())
    return train(family, curve, curve, share)


class Encoder(nn.Module):
    """A ViT without its classifier, pooled by its class token, and a projection head."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = tiny.random_model("vit").vit
        self.head = ProjectionHead(tiny.HEADS * tiny.HEAD_DIM).double()

    def forward(self, pixel_values: Tensor) -> Any:
        return SimpleNamespace(image_embeds=self.vit(pixel_values=pixel_values).last_hidden_state[:, 0])


class Doubles(ImagePipeline):
    def normalize(self, pixels: Tensor) -> Tensor:
        return super().normalize(pixels.double())


def pairwise(name: str, share: slice, wrap: Callable[[nn.Module], nn.Module]) -> dict[str, Any]:
    """Loss and gradients of an objective that compares the items of a batch with each other."""
    generator = torch.Generator().manual_seed(1)
    pipeline = Doubles(tiny.processor())
    batch = {"pixels": torch.randint(256, (BATCH, 3, tiny.IMAGE, tiny.IMAGE), generator=generator, dtype=torch.uint8)}
    objective: Any
    if name == "simclr":
        model: nn.Module = Encoder()
        objective = SimCLR(pipeline, head=model.head, augmentation="none")
    else:
        model = tiny.random_model("clip")
        tokens = torch.randint(17, (BATCH, 6), generator=generator)
        tokens[:, -1] = 19
        objective = ImageText(pipeline, Captions(("",) * BATCH, {"input_ids": tokens}), sigmoid=name == "sigmoid")
        batch["captions"] = torch.tensor([0, 1, 2, 3, 4, 2, 0, 0])[:, None]  # some equal, also across the halves
    wrapped = wrap(model)  # a name of its own: DDP must live until the gradients have met
    loss = objective.loss(wrapped, {key: value[share] for key, value in batch.items()}, seed=0)
    loss.backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "gradients": gradients}


def work(rank: int, folder: str) -> None:
    """One process: all cases, written to the folder."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    half = BATCH // RANKS
    share = slice(rank * half, (rank + 1) * half)
    found: dict[Any, Any] = {}
    for family in FAMILIES:
        found["ddp", family] = ddp(family, share)
        found["fsdp", family] = fsdp(family, share)
    found["ddp", "training"] = ddp("resnet", share, training=True)
    for name in PAIRWISE:
        found["ddp", name] = pairwise(name, share, DistributedDataParallel)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each process found."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, float]:
    assert a.keys() == b.keys()
    return {name: (a[name] - b[name]).abs().max().item() for name in a}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
class TestTwoProcessesAreOne:
    def test_losses(self, results, wrapper, family):
        curve = new_curve(family)
        expected = train(family, curve, curve, slice(None))["losses"]
        found = torch.stack([result[wrapper, family]["losses"] for result in results]).mean(0)
        assert (expected[0] - expected[3]).abs() > 1e-3, "the second curve is another one"
        assert torch.allclose(found, expected, rtol=0, atol=TOLERANCE), found - expected

    def test_bend(self, results, wrapper, family):
        curve = new_curve(family)
        expected = train(family, curve, curve, slice(None))["bends"]
        for result in results:
            for ours, theirs in zip(result[wrapper, family]["bends"], expected, strict=True):
                far = {name: d for name, d in difference(ours, theirs).items() if d > TOLERANCE}
                assert not far


@pytest.mark.parametrize("name", PAIRWISE)
def test_items_are_compared_across_processes(results, name):
    """Value and gradients are those of the whole batch: images meet the captions, or views, of the other process."""
    expected = pairwise(name, slice(None), lambda model: model)
    halves = [pairwise(name, half, lambda model: model) for half in (slice(0, BATCH // 2), slice(BATCH // 2, None))]
    assert (sum(half["loss"] for half in halves) / RANKS - expected["loss"]).abs() > 1e-2, "the halves alone differ"
    for result in results:
        found = result["ddp", name]
        assert found["loss"].item() == pytest.approx(expected["loss"].item(), abs=TOLERANCE)
        assert found["gradients"].keys() == expected["gradients"].keys()
        far = {key: d for key, d in difference(found["gradients"], expected["gradients"]).items() if d > TOLERANCE}
        assert not far


def test_processes_agree_on_the_bend_with_batch_norm_in_training(results):
    """Each normalises with its own half, so the step is not that of one process; the gradient is still shared."""
    one, other = (result["ddp", "training"] for result in results)
    assert torch.isfinite(one["losses"]).all()
    assert (one["losses"] - other["losses"]).abs().min() > 1e-3
    for ours, theirs in zip(one["bends"], other["bends"], strict=True):
        assert max(difference(ours, theirs).values()) == 0
