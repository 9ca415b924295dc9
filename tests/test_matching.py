"""Matching: optimal against brute force, and planted permutations recovered exactly."""

from itertools import permutations, product

import modules
import pytest
import tiny
import torch

from hf_tsc import assignment, matching
from hf_tsc.activations import MATCHING_METHODS, TapStatistics, collect_statistics
from hf_tsc.axes import Atom, Concat, Frozen, Product, index
from hf_tsc.batch_norm import recompute_statistics
from hf_tsc.derive import derive_spec
from hf_tsc.matching import match
from hf_tsc.permutation import KINDS, PermutationSpec, Space, Tap, apply, identity, invert

STREAM = Atom("stream", 4)
HEADS = Product((Atom("heads", 3), Atom("vo", 3, "heads")))
SPACES = {
    "stream": Space("stream", 4, "residual"),
    "heads": Space("heads", 3, "heads"),
    "vo": Space("vo", 3, "vo", "heads"),
}


def statistics(size: int, *, seed: int) -> TapStatistics:
    """Of two unrelated networks."""
    made = TapStatistics.zeros(size, torch.device("cpu"))
    made.add(*torch.randn(2, 40, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    return made


def score(spec: PermutationSpec, readings: list[TapStatistics], permutation, method: str = "l2") -> float:
    """What matching is to optimise: the similarity of every unit with the one put in its place, over all taps."""
    total = 0.0
    for tap, one in zip(spec.taps, readings, strict=True):
        total += one.similarity(method).gather(1, index(tap.axis, permutation)[:, None]).sum().item()
    return total


def everything(spec: PermutationSpec):
    """All permutations of a spec."""
    choices = []
    for name, space in spec.spaces.items():
        rows = [torch.tensor(p) for p in permutations(range(space.size))]
        if space.parent:
            rows = [torch.stack(block) for block in product(rows, repeat=spec.shape(name)[0])]
        choices.append(rows)
    for values in product(*choices):
        yield dict(zip(spec.spaces, values, strict=True))


class TestOptimal:
    @pytest.mark.parametrize(
        "axes", [[STREAM], [STREAM, STREAM], [Product((STREAM, Frozen(2)))], [Concat((STREAM, STREAM))]]
    )
    @pytest.mark.parametrize("method", MATCHING_METHODS)
    @pytest.mark.parametrize("maximize", [True, False])
    def test_one_space(self, axes, method, maximize):
        spec = PermutationSpec({"stream": SPACES["stream"]}, {}, tuple(Tap("m", "input", -1, axis) for axis in axes))
        for seed in range(5):
            readings = [statistics(axis.size, seed=100 * seed + k) for k, axis in enumerate(axes)]
            found = match(spec, readings, maximize=maximize, method=method)
            scores = [score(spec, readings, p, method) for p in everything(spec)]
            assert len(scores) == 24
            best = max(scores) if maximize else min(scores)
            assert score(spec, readings, found, method) == pytest.approx(best, abs=1e-12)

    @pytest.mark.parametrize(
        "axis", [HEADS, Product((Frozen(2), *HEADS.factors)), Product((HEADS.factors[0], Frozen(2), HEADS.factors[1]))]
    )
    @pytest.mark.parametrize("maximize", [True, False])
    def test_nested_heads(self, axis, maximize):
        spaces = {name: SPACES[name] for name in ("heads", "vo")}
        spec = PermutationSpec(spaces, {}, (Tap("m", "input", -1, axis),))
        readings = [statistics(axis.size, seed=7)]
        found = match(spec, readings, maximize=maximize)
        similarity = readings[0].similarity("l2")
        rows = torch.arange(axis.size)
        scores = [similarity[rows, index(axis, p)].sum().item() for p in everything(spec)]
        assert len(scores) == 6 * 6**3
        best = max(scores) if maximize else min(scores)
        assert score(spec, readings, found) == pytest.approx(best, abs=1e-12)
        assert len({tuple(row) for row in found["vo"].tolist()}) > 1  # every head has its own

    def test_two_inner_spaces_share_the_heads(self):
        qk = Product((Atom("heads", 2), Atom("qk", 3, "heads")))
        vo = Product((Atom("heads", 2), Atom("vo", 2, "heads")))
        spaces = {
            "heads": Space("heads", 2, "heads"),
            "qk": Space("qk", 3, "qk", "heads"),
            "vo": Space("vo", 2, "vo", "heads"),
        }
        spec = PermutationSpec(spaces, {}, tuple(Tap("m", "input", -1, axis) for axis in (qk, qk, vo)))
        for seed in range(5):
            readings = [statistics(axis.size, seed=10 * seed + k) for k, axis in enumerate((qk, qk, vo))]
            found = match(spec, readings, maximize=True)
            best = max(score(spec, readings, p) for p in everything(spec))
            assert score(spec, readings, found) == pytest.approx(best, abs=1e-12)

    @pytest.mark.parametrize("name", modules.NETWORKS)
    def test_ad_hoc_networks(self, name):
        """Statistics and matching fit every spec that can be derived; moving units apart never brings them closer."""
        module, inputs = modules.build(name)
        tiny.randomise(module.double())
        inputs = {"pixel_values": inputs["pixel_values"].double()}
        spec = derive_spec(module, inputs)
        readings = collect_statistics(module, spec.taps, [inputs], points=[tiny.tensors(module)])
        found = match(spec, readings, maximize=False)
        assert {name: tuple(p.shape) for name, p in found.items()} == {s: spec.shape(s) for s in spec.spaces}
        assert score(spec, readings, found) <= score(spec, readings, identity(spec))


IMAGES = 30


def read(family: str, *points) -> list[TapStatistics]:
    model = tiny.random_model(family)
    return collect_statistics(model, tiny.spec(family).taps, tiny.digit_batches(IMAGES, IMAGES), points=points)


def alive(family: str) -> dict[str, torch.Tensor]:
    """Random weights without dead units: what nobody can tell apart, nobody can match."""
    model = tiny.random_model(family)
    theta = tiny.tensors(model)
    for name, tensor in theta.items():
        if name.endswith("normalization.bias"):
            tensor.abs_()
    theta |= recompute_statistics(model, theta, tiny.digit_batches(IMAGES, IMAGES), dict(model.named_buffers()))
    assert all((one.squares > 0).all() for one in read(family, theta))
    return theta


class TestPlanted:
    @pytest.mark.parametrize("method", MATCHING_METHODS)
    @pytest.mark.parametrize("family", tiny.CLASSIFIERS)
    def test_aligning_with_a_permuted_copy_recovers_the_permutation(self, family, method):
        spec = tiny.spec(family)
        theta = alive(family)
        planted = tiny.random_permutation(spec, seed=4)
        inverse = invert(spec, planted)
        assert any(not torch.equal(planted[name], inverse[name]) for name in planted)
        copy = apply(theta, spec, planted)
        found = match(spec, read(family, copy, theta), maximize=True, method=method)
        assert {name: p.tolist() for name, p in found.items()} == {name: p.tolist() for name, p in planted.items()}
        aligned = apply(theta, spec, found)
        assert all(torch.equal(aligned[name], copy[name]) for name in theta)
        # and the other way round, theta is what the copy is moved to
        back = match(spec, read(family, theta, copy), maximize=True, method=method)
        assert all(torch.equal(back[name], inverse[name]) for name in spec.spaces)

    @pytest.mark.parametrize("family", tiny.CLASSIFIERS)
    def test_the_recovered_permutation_is_the_best_among_random_ones(self, family):
        spec = tiny.spec(family)
        theta = alive(family)
        planted = tiny.random_permutation(spec, seed=4)
        readings = read(family, apply(theta, spec, planted), theta)
        assert all(
            score(spec, readings, tiny.random_permutation(spec, seed=k)) < score(spec, readings, planted)
            for k in range(10, 20)
        )


class TestUnaligning:
    @pytest.mark.parametrize("method", MATCHING_METHODS)
    @pytest.mark.parametrize("family", tiny.CLASSIFIERS)
    def test_it_lowers_the_similarity_of_every_space(self, family, method):
        spec = tiny.spec(family)
        readings = read(family, tiny.tensors(tiny.random_model(family)))
        found, still = match(spec, readings, maximize=False, method=method), identity(spec)
        for name, space in spec.spaces.items():
            if space.parent is None:
                group = {child.name for child in (space, *spec.children(name))}
                moved = {**still, **{one: found[one] for one in group}}
                assert score(spec, readings, moved, method) < score(spec, readings, still, method)


class TestKinds:
    @pytest.mark.parametrize("kinds", [(), ("residual",), ("heads",), ("qk", "vo"), ("hidden", "heads"), KINDS])
    def test_only_these_move(self, kinds):
        spec = tiny.spec("vit")
        readings = read("vit", tiny.tensors(tiny.random_model("vit")))
        found, still = match(spec, readings, maximize=False, kinds=kinds), identity(spec)
        assert found.keys() == still.keys()
        for name, space in spec.spaces.items():
            assert torch.equal(found[name], still[name]) == (space.kind not in kinds)


class TestThreads:
    @pytest.mark.parametrize("maximize", [True, False])
    def test_the_result_does_not_depend_on_their_number(self, maximize, monkeypatch):
        monkeypatch.setattr(assignment, "LARGE", 1)
        spec = tiny.spec("vit")
        readings = read("vit", *(tiny.tensors(tiny.random_model("vit", seed=seed)) for seed in (1, 2)))
        one, *others = (match(spec, readings, maximize=maximize, workers=workers) for workers in (1, 2, 50, None))
        for other in others:
            assert all(torch.equal(one[name], other[name]) for name in one)

    def test_an_error_in_one_is_the_callers(self):
        readings = read("vit", tiny.tensors(tiny.random_model("vit")))
        readings[-1].products[0, 0] = torch.nan
        with pytest.raises(ValueError, match="matrix contains invalid numeric entries"):
            match(tiny.spec("vit"), readings, maximize=False, workers=2)

    @pytest.mark.parametrize(
        ("progress", "seconds", "shown"), [(True, 0.0, True), (True, 60.0, False), (False, 0.0, False)]
    )
    def test_a_bar_only_when_it_takes_long(self, progress, seconds, shown, monkeypatch, capsys):
        monkeypatch.setattr(matching, "SILENT_SECONDS", seconds)
        readings = read("vit", tiny.tensors(tiny.random_model("vit")))
        match(tiny.spec("vit"), readings, maximize=False, progress=progress)
        assert ("Matching" in capsys.readouterr().err) == shown
