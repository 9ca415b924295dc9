"""Plain fine-tuning, and the line back to the suspect: closed forms of one step, of the middle and of the ends."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from suspects_and_digits import classifier, same
from tiny import digits, model, random_model, randomise, tensors
from torch import nn

from hf_tsc.baselines.base import Case
from hf_tsc.baselines.fine_tuning import FineTuning, fine_tune, interpolate
from hf_tsc.errors import PurificationError
from hf_tsc.functional import call_at
from hf_tsc.images import collate
from hf_tsc.objective_trainer import ObjectiveTrainer

IMAGES = 20
DATA = digits(0, IMAGES)
FAMILIES = ("resnet", "vit")


@pytest.fixture(scope="module", autouse=True)
def nothing_to_collect():
    """Every training collects garbage; most of its time here would go into looking at what was imported."""
    gc.freeze()
    yield
    gc.unfreeze()


def suspect_of(family: str):
    """The ViT has no dropout, so that its loss is a function of weights and images."""
    return classifier(family, **({"hidden_dropout_prob": 0.0} if family == "vit" else {})).eval()


def tune(suspect, *, seed=0, **settings):
    chosen = FineTuning(**{"steps": 2, "learning_rate": 0.05, "batch_size": 8, **settings})
    return fine_tune(suspect, DATA, chosen, seed=seed, use_cpu=True)


def all_at_once():
    return collate([DATA[i] for i in range(IMAGES)])


def gradients(suspect, loss_of) -> dict:
    """Of a loss of the logits of all images, by name."""
    trained = copy.deepcopy(suspect)
    batch = all_at_once()
    loss = loss_of(trained(pixel_values=DATA.pipeline.model_input(batch["pixels"])).logits, batch["labels"])
    loss.backward()
    return {name: parameter.grad for name, parameter in trained.named_parameters()}


@pytest.fixture(scope="module")
def plain():
    """A ViT, and what two plain steps make of it."""
    suspect = suspect_of("vit")
    return suspect, tensors(tune(suspect))


class TestFineTune:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_the_suspect_stays_as_it_is(self, family):
        suspect = suspect_of(family).requires_grad_(False)
        before = tensors(suspect)
        tuned = tune(suspect)
        assert same(tensors(suspect), before)
        assert not any(parameter.requires_grad for parameter in suspect.parameters())
        assert not suspect.training
        assert not tuned.training
        changed = [name for name, p in tuned.named_parameters() if not torch.equal(p, before[name])]
        assert len(changed) > 0.8 * len(list(tuned.named_parameters()))

    @pytest.mark.parametrize("family", FAMILIES)
    def test_rate_of_zero(self, family):
        suspect = suspect_of(family)
        tuned = tune(suspect, learning_rate=0.0)
        assert same(dict(tuned.named_parameters()), dict(suspect.named_parameters()))
        # BatchNorm still counts what it sees
        assert same(dict(tuned.named_buffers()), dict(suspect.named_buffers())) == (family == "vit")

    @pytest.mark.parametrize("schedule", ["cosine", "constant"])
    def test_one_step(self, schedule):
        """w - rate (gradient + decay w), neither clipped nor augmented, at the full rate."""
        suspect = suspect_of("vit")
        randomise(suspect)
        rate, decay = 0.3, 0.2
        found = tune(
            suspect,
            steps=1,
            batch_size=IMAGES,
            learning_rate=rate,
            weight_decay=decay,
            lr_scheduler_type=schedule,
            optim_args=None,
        )
        grads = gradients(suspect, F.cross_entropy)
        assert sum(grad.square().sum() for grad in grads.values()) > 1  # clipping, as Trainers do, would show
        weights = dict(suspect.named_parameters())
        for name, parameter in found.named_parameters():
            decayed = 0.0 if _is_spared(name) else decay
            expected = weights[name] - rate * (grads[name] + decayed * weights[name])
            assert torch.allclose(parameter, expected, atol=1e-5), name

    def test_last_step_of_a_schedule(self):
        """Cosine: of two steps the second has half the rate."""
        suspect = suspect_of("vit")
        options = {"batch_size": IMAGES, "optim_args": None, "learning_rate": 0.3}
        first = tune(suspect, steps=1, **options)
        both = tune(suspect, steps=2, **options)
        again = tune(first, steps=1, **{**options, "learning_rate": 0.15})
        for one, other in zip(both.parameters(), again.parameters(), strict=True):
            assert torch.allclose(one, other, atol=1e-5)

    def test_distillation_begins_with_nothing_to_learn(self):
        suspect = suspect_of("vit")
        before = tensors(suspect)

        def difference(**settings) -> float:
            tuned = tune(suspect, steps=1, learning_rate=0.3, **settings)
            return max((p - before[name]).abs().max().item() for name, p in tuned.named_parameters())

        assert difference(objective="distillation") < 1e-6
        assert difference(objective="cross_entropy") > 1e-2

    def test_the_teacher_is_the_suspect(self):
        """Were it the student, nothing but the decay would act."""
        suspect = suspect_of("vit")
        randomise(suspect)
        options = {"objective": "distillation", "lr_scheduler_type": "constant", "optim_args": None}
        tuned = tune(suspect, steps=2, learning_rate=0.3, weight_decay=0.5, **options)
        alone = (1 - 0.3 * 0.5) ** 2 * suspect.classifier.weight
        assert (tuned.classifier.weight - alone).abs().max() > 1e-3

    @pytest.mark.parametrize(
        "settings",
        [
            {"augmentation": "crop"},
            {"mixup_alpha": 1.0},
            {"optim": "adamw_torch", "optim_args": None},
            {"optim_args": None},
            {"batch_size": 5},
            {"lr_scheduler_type": "constant"},
            {"weight_decay": 0.1},
        ],
        ids=lambda settings: next(iter(settings)),
    )
    def test_every_setting_tells(self, plain, settings):
        suspect, tuned = plain
        assert not same(tensors(tune(suspect, **settings)), tuned)

    def test_the_temperature_tells(self):
        suspect = suspect_of("vit")
        options = {"objective": "distillation", "learning_rate": 1.0, "weight_decay": 0.2, "steps": 3}
        one, other = tune(suspect, temperature=1.0, **options), tune(suspect, temperature=4.0, **options)
        assert not same(tensors(one), tensors(other))

    def test_steps(self, monkeypatch):
        sizes = []

        def counted(trainer, module, inputs, *args, real=ObjectiveTrainer.training_step, **kwargs):
            sizes.append(len(inputs["labels"]))
            return real(trainer, module, inputs, *args, **kwargs)

        monkeypatch.setattr(ObjectiveTrainer, "training_step", counted)
        tune(suspect_of("vit"), steps=4)
        assert sizes == [8, 8, 4, 8]

    def test_is_a_function_of_the_seed(self):
        suspect = classifier("vit").eval()  # with dropout: any use of the global random state shows
        options = {"augmentation": "crop_flip", "mixup_alpha": 1.0}
        one = tensors(tune(suspect, seed=1, **options))
        torch.manual_seed(99)
        assert same(tensors(tune(suspect, seed=1, **options)), one)
        assert not same(tensors(tune(suspect, seed=2, **options)), one)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_diverged(self, family):
        with pytest.raises(PurificationError, match="lower learning_rate"):
            tune(suspect_of(family), steps=4, learning_rate=1e30)

    def test_unknown_objective(self):
        with pytest.raises(Exception, match="objective"):
            tune(suspect_of("vit"), objective="distilation")


def _is_spared(name: str) -> bool:
    """The Trainer lets neither biases nor LayerNorms decay."""
    return name.endswith("bias") or "norm" in name


def halves(family: str):
    """Two random models of one architecture, and batches of 12 and 8 digits, all in float64."""
    pixels = DATA.pipeline.normalize(all_at_once()["pixels"].double() / 255)
    batches = [{"pixel_values": part} for part in pixels.split([12, 8])]
    return random_model(family, seed=1), random_model(family, seed=2), batches


class TestInterpolate:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_ends(self, family):
        suspect, tuned, batches = halves(family)
        assert same(interpolate(suspect, tuned, 0.0, batches), tensors(suspect))
        assert same(interpolate(suspect, tuned, 1.0, batches), tensors(tuned))
        assert not same(tensors(suspect), tensors(tuned))

    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("alpha", [0.25, 0.5])
    def test_parameters_between(self, family, alpha):
        suspect, tuned, batches = halves(family)
        before = tensors(suspect), tensors(tuned)
        found = interpolate(suspect, tuned, alpha, iter(batches))
        assert found.keys() == before[0].keys()
        for name, parameter in suspect.named_parameters():
            expected = (1 - alpha) * parameter + alpha * before[1][name]
            assert torch.allclose(found[name], expected, rtol=1e-12, atol=1e-14), name
        assert same(tensors(suspect), before[0])
        assert same(tensors(tuned), before[1])
        assert not any(tensor.requires_grad for tensor in found.values())

    def test_statistics_by_hand(self):
        """Of each BatchNorm layer's input: mean and unbiased variance of a batch, averaged over images."""
        suspect, tuned, batches = halves("resnet")
        found = interpolate(suspect, tuned, 0.5, batches)
        middle = model("resnet").double()
        middle.load_state_dict(found)
        layers = {name: module for name, module in middle.named_modules() if isinstance(module, nn.BatchNorm2d)}
        seen = {name: [] for name in layers}
        for name, layer in layers.items():
            layer.register_forward_hook(lambda _, args, __, name=name: seen[name].append(args[0].detach()))
        middle.train()  # normalises by the batch, as when the statistics are taken
        for batch in batches:
            middle(**batch)
        assert len(layers) > 3
        for name, inputs in seen.items():
            by_channel = [x.transpose(0, 1).flatten(1) for x in inputs]  # (c, n h w)
            mean = sum(len(x) * flat.mean(1) for x, flat in zip(inputs, by_channel, strict=True)) / IMAGES
            var = sum(len(x) * flat.var(1) for x, flat in zip(inputs, by_channel, strict=True)) / IMAGES
            assert torch.allclose(found[f"{name}.running_mean"], mean, rtol=1e-9, atol=1e-12), name
            assert torch.allclose(found[f"{name}.running_var"], var, rtol=1e-9, atol=1e-12), name

    def test_images_of_the_statistics_between_two_models(self):
        """Those that the training shows, by default, drawn twice; or the clean ones, once."""
        case = Case(model("resnet"), None, DATA, None, 3)
        objective = case.objective_of(FineTuning(augmentation="crop", mixup_alpha=1.0))
        training, again, clean = (
            [batch["pixel_values"] for batch in case.statistics_batches(objective, images)]
            for images in ("training", "training", "clean")
        )
        assert len(training) == 2 * len(clean)
        assert all(torch.equal(one, other) for one, other in zip(training, again, strict=True))
        assert not torch.equal(training[0], training[len(clean)])
        assert torch.equal(clean[0], next(iter(case.clean_batches(objective)))["pixel_values"])

    def test_can_be_called(self):
        suspect, tuned, batches = halves("vit")
        found = call_at(suspect, interpolate(suspect, tuned, 0.5, batches), batches[0]).logits
        middle = model("vit").double()
        middle.load_state_dict(
            {name: (tensor + tensors(tuned)[name]) / 2 for name, tensor in tensors(suspect).items()}
        )
        assert torch.allclose(found, middle(**batches[0]).logits, rtol=1e-9, atol=1e-12)
