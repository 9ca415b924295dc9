"""The specs of the most used architectures, as read line by line against the modelling source."""

import pytest
from golden_specs import FOLDER, GOLDEN, NOT_REVIEWED, REVIEWED, derived, head_and_body, signatures_of, text_of, write

from hf_tsc.axes import Atom, Frozen, Product
from hf_tsc.permutation import PermutationSpec, Space
from hf_tsc.signatures import spec_from_signatures


@pytest.fixture(params=GOLDEN)
def golden(request):
    """The text of a file, its model, and what is derived for it."""
    text = (FOLDER / f"{request.param}.txt").read_text(encoding="utf-8")
    return text, *derived(GOLDEN[request.param])


class TestGolden:
    def test_is_what_is_derived(self, golden):
        text, _, spec = golden
        assert text_of(spec) == head_and_body(text)[1]

    def test_makes_the_derived_spec(self, golden):
        text, model, spec = golden
        made = spec_from_signatures(model, signatures_of(text))
        assert made.axes == spec.axes
        assert made.spaces == spec.spaces
        # derived taps are inputs once each: v_proj reads what q_proj does; and none of depthwise convolutions
        assert set(spec.taps) <= set(made.taps)
        assert {tap.side for tap in set(made.taps) - set(spec.taps)} <= {"input"}

    def test_has_been_reviewed(self, golden):
        text, _, _ = golden
        assert REVIEWED.fullmatch(text.splitlines()[0])

    def test_there_are_a_dozen(self):
        assert {file.stem for file in FOLDER.iterdir()} == GOLDEN.keys()
        assert len(GOLDEN) >= 12


class TestWriter:
    def test_layers_that_are_alike_share_a_line(self):
        spaces = {f"block.{i}.hidden": Space(f"block.{i}.hidden", 3, "hidden") for i in range(2)}
        hidden = [(Atom(name, 3),) for name in spaces]
        axes = {
            "scale": (),
            "block.0.norm.weight": hidden[0],
            "block.0.norm.bias": hidden[0],
            "block.1.norm.weight": hidden[1],
            "block.1.norm.bias": hidden[1],
            "block.0.other.weight": hidden[0],
            "block.1.other.weight": hidden[0],
            "block.0.fixed": (Frozen(3, "model output"), Frozen(1, "size 1")),
            "block.1.fixed": (Frozen(3, "constant"), Frozen(1, "size 1")),
        }
        assert text_of(PermutationSpec(spaces, axes, ())).splitlines() == [
            "block.*.norm.*: block.*.hidden",
            "block.0.other.weight: block.0.hidden",
            "block.1.other.weight: block.0.hidden",
            "block.0.fixed: _3, _1  # model output",
            "block.1.fixed: _3, _1  # constant",
        ]

    def test_sizes_are_stated_where_they_are_open(self):
        spaces = {"heads": Space("heads", 2, "heads"), "vo": Space("vo", 3, "vo", "heads")}
        both = Product((Atom("heads", 2), Atom("vo", 3, "heads")))
        spec = PermutationSpec(spaces, {"a": (both, both), "b": (both,)}, ())
        assert text_of(spec) == "a: (heads:2 vo@heads), (heads vo@heads)\nb: (heads vo@heads)\n"

    def test_a_changed_spec_is_not_reviewed(self, tmp_path, capsys):
        file, read = tmp_path / "vit.txt", "# reviewed\n# a remark\n"
        body = text_of(derived("vit")[1])
        for before, after in {read + body: read, f"{read}{body}more": f"{NOT_REVIEWED}\n# a remark\n"}.items():
            file.write_text(before, encoding="utf-8")
            write({"vit": "vit"}, tmp_path)
            assert file.read_text(encoding="utf-8") == after + body
        assert capsys.readouterr().out == f"{file}: read it, then give it its first line\n"
