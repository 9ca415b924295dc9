"""The configuration: presets, checks, and the command line's view of it."""

import math
from dataclasses import fields

import pytest
import tiny
from transformers import HfArgumentParser

from hf_tsc.errors import UsageError
from hf_tsc.tsc_config import PRESETS, SCHEDULES, TSCConfig, family_defaults


def config(tmp_path, **changes) -> TSCConfig:
    return TSCConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, **changes)


class TestPresets:
    def test_paper(self, tmp_path):
        """Every number of the paper's supervised column, and what the Trainer would do otherwise."""
        made = TSCConfig.preset("paper", output_dir=str(tmp_path), report_to="none", use_cpu=True)
        assert (made.rounds, made.stages, made.curve_epochs) == (3, 2, 200)
        assert (made.curve1_t, made.curve2_t) == (0.4, 0.4)
        assert (made.curve1_window, made.curve2_window) == ([0, 1], [0, 1])
        assert (made.optim, made.optim_args) == ("sgd", "momentum=0.9")
        assert (made.learning_rate, made.weight_decay) == (0.02, 5e-4)
        assert (made.lr_scheduler_type, made.warmup_steps) == ("cosine", 0)
        assert made.per_device_train_batch_size == 256
        assert made.max_grad_norm == 0
        assert made.matching == "l2"
        assert (made.objective, made.mixup_alpha, made.augmentation) == ("cross_entropy", 0, "crop_flip")

    @pytest.mark.parametrize(
        "preset", [*PRESETS.values(), *(family_defaults(tiny.model(f)) for f in ("resnet", "vit"))]
    )
    def test_every_key_is_a_field(self, preset, tmp_path):
        assert preset.keys() <= {field.name for field in fields(TSCConfig)}
        made = config(tmp_path, **preset)
        assert all(getattr(made, name) == value for name, value in preset.items())

    def test_overrides(self, tmp_path):
        made = TSCConfig.preset("paper", output_dir=str(tmp_path), report_to="none", use_cpu=True, rounds=1)
        assert (made.rounds, made.learning_rate) == (1, 0.02)

    def test_the_default_preset_changes_nothing(self):
        assert PRESETS["default"] == {}

    def test_unknown(self):
        with pytest.raises(UsageError, match="preset='papre': expected one of default, paper"):
            TSCConfig.preset("papre")

    @pytest.mark.parametrize("family", ["resnet", "vit"])
    def test_for_model(self, family, tmp_path):
        made = TSCConfig.for_model(
            tiny.model(family), output_dir=str(tmp_path), report_to="none", use_cpu=True, rounds=7
        )
        assert made.rounds == 7
        defaults = family_defaults(tiny.model(family))
        assert all(getattr(made, name) == value for name, value in defaults.items())

    @pytest.mark.parametrize(
        ("family", "changes", "relative"),
        [
            ("resnet", {"learning_rate": 0.1}, True),
            ("resnet", {"relative_rate": False}, False),
            ("resnet", {"optim": "adamw_torch", "optim_args": None}, False),
            ("vit", {}, False),
            ("vit", {"optim": "sgd", "relative_rate": True}, True),
        ],
    )
    def test_relative_rate(self, family, changes, relative, tmp_path):
        fixed = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True}
        assert TSCConfig.for_model(tiny.model(family), **fixed, **changes).relative_rate == relative

    @pytest.mark.parametrize("family", ["resnet", "vit"])
    @pytest.mark.parametrize(
        "changes", [{"objective": "cross_entropy"}, {"move_spaces": ["residual"]}, {"feature_weight": 0.0}]
    )
    def test_hidden_states_are_followed_only_where_there_are_some(self, family, changes, tmp_path):
        """And where they are not, a transformer takes what suits the answers alone."""
        fixed = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True}
        model = tiny.model(family)
        assert TSCConfig.for_model(model, **fixed).feature_weight > 0
        made = TSCConfig.for_model(model, **fixed, **changes)
        assert made.feature_weight == 0
        plain = {**family_defaults(model, following=False), **changes}
        assert all(getattr(made, name) == value for name, value in plain.items())

    def test_features_are_repeated_at_a_higher_rate_than_answers(self, tmp_path):
        """Of transformers whose hidden states are followed."""
        fixed = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True}
        objectives = ("distillation", "simclr")

        def rate(family, **changes):
            return TSCConfig.for_model(tiny.model(family), **fixed, **changes).learning_rate

        assert rate("vit", objectives=objectives) == 2 * rate("vit")
        assert rate("vit", objectives=objectives, feature_weight=0.0) == rate("vit", feature_weight=0.0)
        assert rate("resnet", objectives=objectives) == rate("resnet")


class TestChecks:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"curve1_t": 0.0}, "curve1_t=0.0: t must lie strictly between 0 and 1, the ends are backdoored"),
            ({"curve2_t": 1.0}, "curve2_t=1.0: t must lie strictly between 0 and 1"),
            ({"curve1_t": float("nan")}, "curve1_t=nan"),
            ({"curve1_window": [0.6, 0.4]}, r"curve1_window=\[0.6, 0.4\]: expected two numbers with 0 <= low <= high"),
            ({"curve2_window": [0.0, 1.1]}, "curve2_window"),
            ({"curve2_window": [0.5]}, "curve2_window"),
            ({"matching": "cosine"}, "matching='cosine': expected one of l2, correlation"),
            ({"objective": "clip"}, "objective='clip': expected one of distillation, cross_entropy"),
            ({"augmentation": "flip"}, "augmentation='flip': expected one of none, crop, crop_flip"),
            ({"lr_scheduler_type": "polynomial"}, "lr_scheduler_type='polynomial': expected one of cosine, linear"),
            ({"move_spaces": ["hidden", "head"]}, "move_spaces names head: expected some of residual, hidden, heads"),
            ({"feature_weight": -1.0}, r"feature_weight=-1.0: expected 0 \(none\) or a positive number"),
            ({"feature_weight": float("nan")}, "feature_weight=nan"),
            ({"feature_states": "first"}, "feature_states='first': expected one of all, last"),
            ({"batch_norm_images": "dirty"}, "batch_norm_images='dirty': expected one of training, clean"),
            ({"relative_rate": True, "optim": "adamw_torch"}, "relative_rate with optim=.*: only SGD's steps"),
            ({"stages": 3}, r"stages=3: expected 1 \(first curve only\) or 2 \(both\)"),
            ({"rounds": 0}, "rounds=0, .*: that makes no optimisation step"),
            ({"curve_epochs": 0.0}, "curve_epochs=0.0, curve_steps=-1: that makes no optimisation step"),
            ({"sweep_points": 2}, "sweep_points=2: at least 3 are needed, two of them the ends"),
            ({"statistics_memory_gb": 0.0}, "statistics_memory_gb=0.0: expected a positive number"),
            ({"statistics_memory_gb": float("nan")}, "statistics_memory_gb=nan: expected a positive number"),
            ({"max_steps": 5}, "max_steps=5, .*: how long a curve is trained, curve_steps and curve_epochs say"),
            ({"num_train_epochs": 5.0}, "num_train_epochs=5.0: how long a curve is trained, curve_steps and"),
            ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1: no objective smooths labels"),
            ({"torch_compile": True}, "torch_compile: a curve stands at another t in each step"),
            ({"torch_compile_backend": "eager"}, "torch_compile: a curve stands at another t in each step"),
            ({"push_to_hub": True}, "push_to_hub: the Trainer would publish half-purified weights"),
            ({"load_best_model_at_end": True}, "load_best_model_at_end: there is no best step across curves"),
        ],
    )
    def test_what_cannot_be_is_refused(self, tmp_path, changes, message):
        with pytest.raises(UsageError, match=message):
            config(tmp_path, **changes)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"objective": "cross_entropy"}, "feature_weight=5.0 with objective=cross_entropy, .* distillation alone"),
            ({"move_spaces": ["residual"]}, "feature_weight=5.0 .* leave residual out of move_spaces"),
        ],
    )
    def test_hidden_states_are_not_followed_where_they_cannot(self, tmp_path, changes, message):
        """That shows when the defaults of the model are there: on their own, arguments need not fit together."""
        fixed = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "feature_weight": 5.0}
        assert TSCConfig.for_model(tiny.model("vit"), **fixed).feature_weight == 5.0
        TSCConfig(**fixed, **changes)
        with pytest.raises(UsageError, match=message):
            TSCConfig.for_model(tiny.model("vit"), **fixed, **changes)

    def test_what_can_be_is_not(self, tmp_path):
        config(
            tmp_path,
            curve1_window=[0.5, 0.5],
            curve_epochs=0.0,
            curve_steps=1,
            stages=1,
            sweep_points=3,
            move_spaces=[],
        )


@pytest.mark.parametrize(
    ("name", "values"),
    [("cosine", (1, 0.5, 0)), ("linear", (1, 0.5, 0)), ("constant", (1, 1, 1))],
)
def test_schedules_at_begin_middle_and_end(name, values):
    assert [SCHEDULES[name](progress) for progress in (0, 0.5, 1)] == pytest.approx(values)
    assert SCHEDULES["cosine"](0.25) == pytest.approx((1 + math.sqrt(0.5)) / 2)


def test_the_command_line_sees_every_field(tmp_path):
    line = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--report_to", "none", "--curve1_window", "0.4", "0.6"]
    line += ["--move_spaces", "hidden", "qk", "--max_accuracy_drop", "2.5", "--matching", "correlation"]
    (made,) = HfArgumentParser(TSCConfig).parse_args_into_dataclasses(line)
    assert made.curve1_window == [0.4, 0.6]
    assert made.move_spaces == ["hidden", "qk"]
    assert made.max_accuracy_drop == 2.5
    assert made.matching == "correlation"
    own = {field.name for field in fields(TSCConfig)}
    helps = {action.dest: action.help for action in HfArgumentParser(TSCConfig)._actions}
    assert own - helps.keys() == set()


def test_every_own_field_is_documented():
    own = [name for name in TSCConfig.__annotations__ if name not in TSCConfig.__mro__[1].__dataclass_fields__]
    assert len(own) > 15
    assert [name for name in own if name not in TSCConfig.__doc__] == []


def test_round_trip_through_a_dictionary(tmp_path):
    made = config(tmp_path, rounds=4, curve1_window=[0.2, 0.8]).to_dict()
    assert (made["rounds"], made["curve1_window"]) == (4, [0.2, 0.8])
