"""Activation statistics against activations computed by hand, layer after layer."""

import pytest
import tiny
import torch
from modules import Network
from torch import nn

from hf_tsc.activations import TapStatistics, collect_statistics, matrix_bytes
from hf_tsc.axes import Atom
from hf_tsc.derive import derive_spec
from hf_tsc.errors import UsageError
from hf_tsc.permutation import Tap

IMAGES = 10
EXACT = {torch.float64: 1e-12, torch.float32: 1e-5}  # relative: the rounding of sums over some hundred positions


def by_hand_vit(model, pixels) -> dict[str, torch.Tensor]:
    """Activations at the taps of both layers, each (positions, n)."""
    found, vit = {}, model.vit
    x = vit.embeddings(pixels)
    for number, layer in enumerate(vit.layers):
        base = f"vit.layers.{number}"
        y = found[f"input of {base}.attention.q_proj"] = layer.layernorm_before(x)
        q = found[f"output of {base}.attention.q_proj"] = layer.attention.q_proj(y)
        k = found[f"output of {base}.attention.k_proj"] = layer.attention.k_proj(y)
        v = layer.attention.v_proj(y)
        mixed = []
        for head in range(tiny.HEADS):
            part = slice(head * tiny.HEAD_DIM, (head + 1) * tiny.HEAD_DIM)
            scores = q[:, :, part] @ k[:, :, part].transpose(1, 2) / tiny.HEAD_DIM**0.5
            mixed.append(scores.softmax(-1) @ v[:, :, part])
        z = found[f"input of {base}.attention.o_proj"] = torch.cat(mixed, -1)
        x = x + layer.attention.o_proj(z)
        y = found[f"input of {base}.mlp.fc1"] = layer.layernorm_after(x)
        y = found[f"input of {base}.mlp.fc2"] = nn.functional.gelu(layer.mlp.fc1(y))
        x = x + layer.mlp.fc2(y)
    found["input of classifier"] = vit.layernorm(x)[:, 0]
    return {name: y.reshape(-1, y.shape[-1]) for name, y in found.items()}


def by_hand_resnet(model, pixels) -> dict[str, torch.Tensor]:
    found = {}
    x = model.resnet.embedder(pixels)
    for s, stage in enumerate(model.resnet.encoder.stages):
        for b, block in enumerate(stage.layers):
            base = f"resnet.encoder.stages.{s}.layers.{b}"
            found[f"input of {base}.layer.0.convolution"] = x
            y = found[f"input of {base}.layer.1.convolution"] = block.layer[0](x)
            x = (block.layer[1](y) + block.shortcut(x)).relu()
    found["input of classifier.1"] = x.mean((2, 3))
    return {name: (y.movedim(1, -1) if y.ndim == 4 else y).reshape(-1, y.shape[1]) for name, y in found.items()}


BY_HAND = {"vit": by_hand_vit, "resnet": by_hand_resnet}
assert set(BY_HAND) == set(tiny.CLASSIFIERS)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


def collect(family, model, batches, points, **options):
    return collect_statistics(model, tiny.spec(family).taps, batches, points=points, **options)


class TestCollect:
    @pytest.mark.parametrize("dtype", EXACT)
    @pytest.mark.parametrize("family", tiny.CLASSIFIERS)
    def test_two_networks_equal_the_computation_by_hand(self, family, dtype):
        a, b = (tiny.random_model(family, seed=seed).to(dtype) for seed in (1, 2))
        batches = tiny.digit_batches(IMAGES, 4, dtype)
        found = collect(family, a, batches, [tiny.tensors(a), tiny.tensors(b)])
        with torch.no_grad():
            pixels = torch.cat([batch["pixel_values"] for batch in batches])
            expected_a, expected_b = (BY_HAND[family](model, pixels) for model in (a, b))
        taps = tiny.spec(family).taps
        assert len(expected_a) == len(taps) == len(found)
        for tap, one in zip(taps, found, strict=True):
            x, y = (readings[f"{tap.side} of {tap.module}"].double() for readings in (expected_a, expected_b))
            assert one.products.dtype == torch.float64
            assert close(one.products, x.T @ y, EXACT[dtype])
            assert close(one.sums, torch.stack([x.sum(0), y.sum(0)]), EXACT[dtype])
            assert close(one.squares, torch.stack([x.square().sum(0), y.square().sum(0)]), EXACT[dtype])
            assert one.count == x.shape[0]

    @pytest.mark.parametrize("family", tiny.CLASSIFIERS)
    def test_one_network_is_compared_with_itself(self, family):
        model = tiny.random_model(family)
        theta, batches = tiny.tensors(model), tiny.digit_batches(IMAGES, 4)
        once, twice = collect(family, model, batches, [theta]), collect(family, model, batches, [theta, theta])
        for one, two in zip(once, twice, strict=True):
            assert torch.equal(one.products, two.products)
            assert torch.equal(one.sums, two.sums)

    @pytest.mark.parametrize("dtype", EXACT)
    @pytest.mark.parametrize("family", tiny.CLASSIFIERS)
    def test_independent_of_the_batch_size(self, family, dtype):
        model = tiny.random_model(family).to(dtype)
        theta = [tiny.tensors(model)]
        whole = collect(family, model, tiny.digit_batches(IMAGES, IMAGES, dtype), theta)
        for size in (1, 3):
            parts = collect(family, model, tiny.digit_batches(IMAGES, size, dtype), theta)
            for one, other in zip(parts, whole, strict=True):
                assert one.count == other.count
                for name in ("products", "sums", "squares"):
                    assert close(getattr(one, name), getattr(other, name), EXACT[dtype])

    @pytest.mark.parametrize("networks", [1, 2])
    def test_one_pass_a_network(self, networks):
        model = tiny.random_model("vit")
        calls = []
        model.register_forward_pre_hook(lambda *_: calls.append(1))
        collect("vit", model, tiny.digit_batches(IMAGES, 4), networks * [tiny.tensors(model)])
        assert len(calls) == 3 * networks  # ceil(10 / 4)

    def test_the_models_own_weights_are_not_used_and_no_hook_stays(self):
        model, other = (tiny.random_model("vit", seed=seed) for seed in (1, 2))
        batches = tiny.digit_batches(4, 4)
        found = collect("vit", model, batches, [tiny.tensors(other)])
        expected = collect("vit", other, batches, [tiny.tensors(other)])
        assert all(torch.equal(a.products, b.products) for a, b in zip(found, expected, strict=True))
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    def test_hooks_go_when_the_model_fails(self):
        model = tiny.random_model("vit")
        with pytest.raises(AttributeError):
            collect("vit", model, [{"labels": torch.zeros(1)}], [tiny.tensors(model)])
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    def test_a_network_that_writes_into_what_was_read(self):
        def forward(net, x):
            y = net.a(x)
            z = net.b(y)
            y *= 100
            return net.o(y + z)

        net = Network(forward, a=nn.Linear(12, 6), b=nn.Linear(6, 6), o=nn.Linear(6, 3)).double()
        x = torch.randn(7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        (one,) = collect_statistics(
            net, [Tap("b", "input", -1, Atom("s", 6))], [{"pixel_values": x}], points=[tiny.tensors(net)]
        )
        theta = tiny.tensors(net)
        other = {name: 2 * tensor for name, tensor in theta.items()}
        taps = [Tap("b", "input", -1, Atom("s", 6))]
        (two,) = collect_statistics(net, taps, [{"pixel_values": x}], points=[theta, other])
        with torch.no_grad():
            assert close(one.products, net.a(x).T @ net.a(x), 1e-12)
            assert close(two.products, 2 * net.a(x).T @ net.a(x), 1e-12)

    def test_every_call_of_a_layer_counts(self):
        def forward(net, x):
            return net.o(net.b(net.b(net.a(x)).relu()).relu())

        net = Network(forward, a=nn.Linear(12, 6), b=nn.Linear(6, 6), o=nn.Linear(6, 3)).double()
        x = torch.randn(7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        taps = derive_spec(net, {"pixel_values": x}).taps
        assert [str(tap) for tap in taps] == ["input of b, axis -1: hidden", "input of o, axis -1: hidden"]
        one, _ = collect_statistics(net, taps, [{"pixel_values": x}], points=[tiny.tensors(net)])
        with torch.no_grad():
            first = net.a(x)
            second = net.b(first).relu()
        assert one.count == 14
        assert close(one.products, first.T @ first + second.T @ second, 1e-12)


class TestMaxPositions:
    def collect(self, **options):
        model = tiny.random_model("vit")
        return collect("vit", model, tiny.digit_batches(IMAGES, 4), [tiny.tensors(model)], **options)

    def test_reads_so_many_positions_of_every_image(self):
        taps = tiny.spec("vit").taps
        for tap, one in zip(taps, self.collect(max_positions=2), strict=True):
            assert one.count == IMAGES * (1 if tap.module == "classifier" else 2)  # the head reads one token

    def test_more_than_there_are_reads_all(self):
        for one, other in zip(self.collect(max_positions=5), self.collect(), strict=True):
            assert torch.equal(one.products, other.products)

    def test_a_function_of_the_seed(self):
        first, again, other = (self.collect(max_positions=2, seed=seed)[0].products for seed in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_the_same_positions_of_both_networks(self):
        model = tiny.random_model("vit")
        theta = tiny.tensors(model)
        for one in collect("vit", model, tiny.digit_batches(IMAGES, 4), [theta, theta], max_positions=2):
            assert close(one.products.diagonal(), one.squares[0], 1e-12)

    @pytest.mark.parametrize("family", tiny.CLASSIFIERS)
    @pytest.mark.parametrize("networks", [1, 2])
    def test_those_of_a_tap_do_not_depend_on_the_others(self, family, networks):
        model = tiny.random_model(family)
        taps, points = tiny.spec(family).taps, networks * [tiny.tensors(model)]
        batches = tiny.digit_batches(IMAGES, 4)
        together = collect_statistics(model, taps, batches, points=points, max_positions=2, seed=3)
        for tap, expected in zip(reversed(taps), reversed(together), strict=True):
            (alone,) = collect_statistics(model, [tap], batches, points=points, max_positions=2, seed=3)
            assert torch.equal(alone.products, expected.products)
            assert torch.equal(alone.sums, expected.sums)

    def test_other_positions_in_every_batch(self):
        model = tiny.random_model("vit")
        (batch,) = tiny.digit_batches(4, 4)
        theta, tap = tiny.tensors(model), tiny.spec("vit").taps[0]
        once, more = (
            collect_statistics(model, [tap], n * [batch], points=[theta], max_positions=1)[0] for n in (1, 5)
        )
        assert not close(more.products, 5 * once.products, 1e-3)


class TestMemoryLimit:
    def read(self, limit: int | None, **options) -> tuple[list[int], list[TapStatistics]]:
        """How many images the network was given at once, and the statistics of two networks."""
        a, b = (tiny.random_model("vit", seed=seed) for seed in (1, 2))
        seen: list[int] = []
        a.register_forward_pre_hook(lambda _, args, kwargs: seen.append(len(kwargs["pixel_values"])), with_kwargs=True)
        batches = tiny.digit_batches(IMAGES, 4)
        return seen, collect("vit", a, batches, [tiny.tensors(a), tiny.tensors(b)], memory_limit=limit, **options)

    @pytest.fixture
    def needed(self) -> tuple[int, int]:
        """Bytes of the matrices, and of one image's activations."""
        taps = tiny.spec("vit").taps
        _, found = self.read(None)
        matrices = sum(one.products.numel() * one.products.element_size() for one in found)
        assert matrices == matrix_bytes(taps)
        return matrices, sum(8 * tap.axis.size * one.count // IMAGES for tap, one in zip(taps, found, strict=True))

    @pytest.mark.parametrize(
        ("images", "expected"), [(1, [1] * 10), (3, [3, 1, 3, 1, 2]), (4, [4, 4, 2]), (100, [4, 4, 2])]
    )
    def test_two_networks_read_as_many_images_as_fit(self, needed, images, expected):
        matrices, image = needed
        seen, found = self.read(matrices + images * image + image // 2)
        assert seen == [1, *(count for count in expected for _ in "ab")]  # one image first, to measure
        for one, other in zip(found, self.read(None)[1], strict=True):
            assert one.count == other.count
            for name in ("products", "sums", "squares"):
                assert close(getattr(one, name), getattr(other, name), 1e-12)

    def test_fewer_positions_leave_room_for_more_images(self, needed):
        matrices, image = needed
        assert self.read(matrices + image)[0] == [1] * 21
        assert self.read(matrices + image, max_positions=2)[0] == [1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2]

    def test_one_network_holds_no_activations(self, needed):
        model = tiny.random_model("vit")
        theta, batches = [tiny.tensors(model)], tiny.digit_batches(IMAGES, 4)
        found = collect("vit", model, batches, theta, memory_limit=needed[0])
        for one, other in zip(found, collect("vit", model, batches, theta), strict=True):
            assert torch.equal(one.products, other.products)

    def test_what_cannot_fit_is_refused(self, needed):
        matrices, image = needed
        with pytest.raises(
            UsageError, match=r"the matrices of \d+ taps take .* GB, allowed are .* GB: allow more, or"
        ):
            self.read(matrices - 1)
        with pytest.raises(UsageError, match=r"activations of one image take .* GB left: .* \(max_positions\)"):
            self.read(matrices + image - 1)


class TestSimilarity:
    def statistics(self, *, shift: float = 0.0):
        a, b = torch.randn(2, 50, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + shift
        made = TapStatistics.zeros(5, torch.device("cpu"))
        made.add(a[:20], b[:20])
        made.add(a[20:], b[20:])
        return a, b, made

    @pytest.mark.parametrize("shift", [0.0, 3.0])
    def test_correlation_is_torchs(self, shift):
        a, b, made = self.statistics(shift=shift)
        expected = torch.corrcoef(torch.cat([a, b], 1).T)[:5, 5:]
        assert torch.allclose(5 * made.similarity("correlation"), expected, atol=1e-12, rtol=0)

    def test_l2_is_the_inner_product_over_the_energies(self):
        a, b, made = self.statistics()
        assert torch.allclose(made.similarity("l2"), a.T @ b / (a.norm() * b.norm()), atol=1e-14, rtol=0)

    def test_a_dead_unit_correlates_with_nothing(self):
        a, b, _ = self.statistics()
        a[:, 2], b[:, 3] = 0, 0.1  # dead; constant, and its variance rounds to something else than zero
        made = TapStatistics.zeros(5, torch.device("cpu"))
        made.add(a, b)
        found = made.similarity("correlation")
        assert found.isfinite().all()
        assert (found[2] == 0).all()
        assert (found[:, 3] == 0).all()
        alive = found[[0, 1, 3, 4]][:, [0, 1, 2, 4]]
        assert (alive != 0).all()

    def test_constant_units_of_two_networks_correlate_with_nothing(self):
        """In single precision, where what rounding leaves of their variance is no variance."""
        a, b = torch.randn(2, 4000, 4, generator=torch.Generator().manual_seed(0))
        a[:, 1], b[:, 2] = 3.3, 0.7
        made = TapStatistics.zeros(4, torch.device("cpu"))
        for one, other in zip(a.split(500), b.split(500), strict=True):
            made.add(one, other)
        found = 4 * made.similarity("correlation")
        assert (found[1] == 0).all()
        assert (found[:, 2] == 0).all()
        assert found.abs().max() <= 1

    def test_all_dead(self):
        made = TapStatistics.zeros(3, torch.device("cpu"))
        made.add(torch.zeros(4, 3), torch.zeros(4, 3))
        for method in ("l2", "correlation"):
            assert torch.equal(made.similarity(method), torch.zeros(3, 3, dtype=torch.float64))
