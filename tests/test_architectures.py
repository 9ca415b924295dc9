"""Every architecture: what is derived keeps the function, misses no axis, and is as much as is known to be possible.

`expected_spaces.csv` holds for each variant the permutation groups of a census made with another tracer (`groups`),
how many of them were `weak` there (dead, or without effect at the tiny model's size), and how many are `fixed` here
because they reach an output; `expected` is what is left. `beyond` counts spaces of the weak ones that are derived all
the same: they keep the function, too.
"""

import csv
import json
import re
from pathlib import Path

import pytest
import torch

from hf_tsc import cli
from hf_tsc.architectures import VARIANTS
from hf_tsc.architectures.table import Row, as_markdown, cells, frozen_share, read_table, row_of
from hf_tsc.axes import Frozen, index
from hf_tsc.derive import derive_spec, example_inputs, verify
from hf_tsc.derive.verify import CASTING_TOLERANCE, TOLERANCE, Probe, tolerance
from hf_tsc.permutation import apply, roll

HERE = Path(__file__).parent
LINES = (HERE / "expected_spaces.csv").read_text(encoding="utf-8").splitlines()
EXPECTED = {row["variant"]: row for row in csv.DictReader(LINES)}
ROWS = {row.variant: row for row in read_table()[0]}
CASTING = {"aimv2_vision_model", "mlcd", "align", "videoprism", "aimv2"}

# Axes that may be left behind without a change of the output, and why.
KEY_BIAS = r"(k_proj|key|key_convolution|projection_key)\.bias@0$"  # the same for all keys: softmax takes it away
WITHOUT_EFFECT = {
    "cvt": {
        r"projection_key\.convolution_projection\.normalization\.(bias|running_mean)@0$": "ends up in the key's bias",
        r"stages\.2.*projection_query\.convolution_projection\.": "the last block is read at its class token, "
        "whose query does not pass the convolution",
    },
    "swiftformer": {r"attn\.w_g@0$": "softmax over an axis of size 1"},
    "poolformer": {r"before_norm\.bias@0$": "a constant, which is subtracted from its own average"},
    "x_clip": {r"layers\.0\.message_attn\.[kq]_proj\.": "the first layer's messages are the same for all frames"},
}


@pytest.fixture(scope="module", params=VARIANTS)
def derived(request):
    torch.manual_seed(0)
    model = VARIANTS[request.param].build().eval()
    inputs = example_inputs(model)
    return request.param, model, inputs, derive_spec(model, inputs)


class TestEveryVariant:
    def test_keeps_the_function_of_all_outputs(self, derived):
        name, model, inputs, spec = derived
        found = verify(model, spec, inputs)
        assert found.error < (CASTING_TOLERANCE if name in CASTING else TOLERANCE)
        assert found.control > 100 * found.error
        assert spec.casts == (name in CASTING)

    def test_has_the_spaces_that_are_known(self, derived):
        name, _, _, spec = derived
        row = EXPECTED[name]
        groups, weak, fixed, expected, beyond = (
            int(row[k]) for k in ("groups", "weak", "fixed", "expected", "beyond")
        )
        assert expected == groups - weak - fixed
        assert 0 <= beyond <= weak
        assert (fixed > 0) == ("fixed: " in row["why"])
        assert (beyond > 0) == ("beyond: " in row["why"])
        assert len(spec.spaces) == expected + beyond
        assert spec.unknown_ops == ()

    def test_is_what_the_table_says(self, derived):
        name, model, inputs, spec = derived
        row = row_of(name, model, spec, verify(model, spec, inputs))
        assert cells(row)[:-1] == cells(ROWS[name])[:-1]  # all but the error

    def test_every_axis_moves_or_says_why_not(self, derived):
        _, model, _, spec = derived
        floating = {name for name, p in model.named_parameters() if p.is_floating_point()}
        assert floating <= spec.axes.keys()
        for name in floating:
            assert [axis.size for axis in spec.axes[name]] == list(model.get_parameter(name).shape)
            assert all(axis.reason for axis in spec.axes[name] if isinstance(axis, Frozen))

    def test_every_space_has_a_tap(self, derived):
        _, model, _, spec = derived
        tapped = " ".join(f" {tap.axis} " for tap in spec.taps)
        for space in spec.spaces:
            assert re.search(rf"(?<![\w.]){re.escape(space)}(?![\w.])", tapped), space
        assert all(tap.module in dict(model.named_modules()) for tap in spec.taps)

    def test_an_axis_left_behind_changes_the_output(self, derived):
        """All axes of all tensors, one by one: none is in a space by mistake, none could be missing unseen."""
        name, model, inputs, spec = derived
        probe, permutation = Probe(model, inputs), roll(spec)
        moved = apply(probe.params, spec, permutation)
        seen = 10 * CASTING_TOLERANCE if spec.casts else 1e-12
        exceptions = WITHOUT_EFFECT.get(name, {})
        unseen, used = [], set()
        for tensor, dim in spec.moved():
            back = index(spec.axes[tensor][dim], permutation).argsort()
            if probe.error({**moved, tensor: moved[tensor].index_select(dim, back)}) <= seen:
                member = f"{tensor}@{dim}"
                reasons = [pattern for pattern in exceptions if re.search(pattern, member)]
                used.update(reasons)
                if not reasons and not re.search(KEY_BIAS, member):
                    unseen.append(member)
        assert unseen == []
        assert used == exceptions.keys()
        assert tolerance(spec) < seen or not spec.casts


def test_all_types_of_the_mappings_are_there():
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS,
    )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES as DUAL_ENCODERS,
    )

    names = [name for value in (*CLASSIFIERS.values(), *DUAL_ENCODERS.values()) for name in names_of(value)]
    missing = set(names) - {row.architecture for row in ROWS.values()}
    assert missing == {
        "DinatForImageClassification",  # needs natten
        "ShieldGemma2ForImageClassification",  # a language model; its vision tower is in the table
        "TimmWrapperForImageClassification",  # needs timm; test_timm.py
    }


def names_of(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value


class TestTable:
    def test_names_every_variant_once(self):
        assert list(ROWS) == list(VARIANTS)
        assert ROWS.keys() == EXPECTED.keys()

    def test_its_errors_are_in_bounds(self):
        for row in ROWS.values():
            assert row.error < (CASTING_TOLERANCE if row.casts else TOLERANCE)

    def test_page(self):
        page = (HERE.parent / "docs/architectures.md").read_text(encoding="utf-8")
        assert page == as_markdown(*read_table())

    def test_list_on_the_command_line(self, capsys):
        assert cli.main(["spec", "--list"]) == 0
        printed = capsys.readouterr().out
        for row in ROWS.values():
            assert re.search(rf"^{re.escape(row.variant)} +{row.architecture} +{row.count} ", printed, re.MULTILINE)

    def test_list_as_json(self, capsys):
        assert cli.main(["spec", "--list", "--json"]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert [row["variant"] for row in printed["rows"]] == list(VARIANTS)

    def test_neither_model_nor_list(self, capsys):
        assert cli.main(["spec"]) == 2
        assert "--list" in capsys.readouterr().err


def test_frozen_share():
    """ViT with a pooler: what makes its outputs, the residual stream, is in most tensors, but not alone in them."""
    model = VARIANTS["vit+pool"].build()
    spec = derive_spec(model, example_inputs(model))
    moved = {name for name, axes in spec.axes.items() if any(not isinstance(a, Frozen) for a in axes)}
    still = sum(p.numel() for name, p in model.named_parameters() if name not in moved)
    assert frozen_share(spec, model) == pytest.approx(still / model.num_parameters())
    assert isinstance(ROWS["vit"], Row)
