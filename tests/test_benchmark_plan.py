"""Plans: which cells a file makes, what their ids depend on, and one clear error for every wrong file."""

import copy
import itertools
from pathlib import Path

import pytest
import yaml

from hf_tsc.benchmark.lines import read_lines
from hf_tsc.benchmark.methods import check_settings
from hf_tsc.benchmark.plan import EVERY_TENTH, METHODS, Plan
from hf_tsc.errors import UsageError

GROUP = {
    "group": "rates",
    "models": ["resnet"],
    "attacks": ["badnets"],
    "seeds": [0],
    "budget": 50,
    "method": "fine_tuning",
    "settings": {"steps": 3, "learning_rate": 0.1},
}
CONTENT = {
    "rows": {"suspect": [0, 100], "clean": [100, 200], "select": [0, 50], "report": [50, 90]},
    "models": {
        "resnet": {
            "config": {"model_type": "resnet", "depths": [1, 1]},
            "image_size": 8,
            "suspect": {"num_train_epochs": 1},
            "retuning": {"images": 50, "learning_rate": 0.01},
        },
        "vit": {"config": {"model_type": "vit"}, "image_size": 8},
    },
    "attacks": {
        "badnets": {"trigger": {"name": "badnets"}, "target_label": 0, "poison_rate": 0.1},
        "clean": {"trigger": {"name": "badnets"}, "target_label": 0, "poison_rate": 0},
    },
    "cells": [GROUP],
}
MODEL, ATTACK, CELLS = ("models", "resnet"), ("attacks", "badnets"), ("cells", 0)
LEFT_OUT = object()


def changed(*changes):
    """The plan with some values replaced or left out; each change is a path of keys and a value."""
    content = copy.deepcopy(CONTENT)
    for path, value in changes:
        place = content
        for key in path[:-1]:
            place = place[key]
        if value is LEFT_OUT:
            del place[path[-1]]
        else:
            place[path[-1]] = copy.deepcopy(value)  # which later changes may change
    return content


def plan(*changes) -> Plan:
    return Plan.from_dict(changed(*changes))


def groups(*changes) -> Plan:
    """A plan of several groups, each with some keys changed."""
    return plan((("cells",), [{**GROUP, **change} for change in changes]))


def cell(*changes):
    (only,) = plan(*changes).cells
    return only


class TestCells:
    def test_are_the_product(self):
        names = {"models": ["resnet", "vit"], "attacks": ["clean", "badnets"], "seeds": [4, 2]}
        grid = {"learning_rate": [0.3, 0.2, 0.1], "objective": ["distillation", "cross_entropy"]}
        cells = groups({**names, "grid": grid}).cells
        found = [
            (c.suspect.model, c.suspect.attack, c.seed, c.settings["learning_rate"], c.settings["objective"])
            for c in cells
        ]
        assert found == list(itertools.product(*names.values(), *grid.values()))
        assert {c.settings["steps"] for c in cells} == {3}
        assert len({c.id for c in cells}) == len(cells) == 48

    def test_say_what_the_file_says(self):
        only = cell((CELLS, {**GROUP, "points": [0, 1], "report": [0.5], "retune": [1], "held_out": 0.5}))
        assert (only.group, only.method, only.budget, only.held_out) == ("rates", "fine_tuning", 50, 0.5)
        assert (only.points, only.report, only.retune) == ((0.0, 1.0), (0.5,), (1.0,))
        assert only.rows == {"suspect": (0, 100), "clean": (100, 200), "select": (0, 50), "report": (50, 90)}
        assert only.settings == GROUP["settings"]
        assert only.retuning == {"images": 50, "learning_rate": 0.01}
        assert (only.reactivate, only.twin, only.suspects) == ((), None, [only.suspect])
        suspect = only.suspect
        assert (suspect.model, suspect.attack, suspect.seed, suspect.rows) == ("resnet", "badnets", 0, (0, 100))
        assert (suspect.config, suspect.image_size) == (CONTENT["models"]["resnet"]["config"], 8)
        assert suspect.arguments == {"num_train_epochs": 1}
        assert (suspect.trigger, suspect.target_label, suspect.poison_rate) == ({"name": "badnets"}, 0, 0.1)

    def test_defaults(self):
        (only,) = groups({"models": ["vit"]}).cells
        assert (only.points, only.report, only.retune, only.held_out) == (EVERY_TENTH, (), (), 0.2)
        assert EVERY_TENTH == (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)
        assert (only.retuning, only.suspect.arguments) == ({}, {})

    def test_reactivated_beside_the_clean_twin(self):
        few = {"images": 30, "poisoned": 20}
        made = plan((CELLS, {**GROUP, "retune": [0.5, 1], "reactivate": [1]}), ((*MODEL, "reactivation"), few))
        (only,) = made.cells
        assert (only.reactivate, only.reactivation) == ((1.0,), few)
        assert only.twin == cell(((*CELLS, "attacks"), ["clean"])).suspect
        assert made.suspects == only.suspects == [only.suspect, only.twin]

    def test_clean_twins_are_retuned_with_the_triggers_of_other_attacks(self):
        """Whose suspects they do not need."""
        group = {**GROUP, "attacks": ["badnets", "clean"], "retune": [1], "retune_with": ["badnets"]}
        poisoned, twin = plan((CELLS, group)).cells
        assert [other.attack for other in twin.retune_with] == ["badnets"]
        assert poisoned.retune_with == ()
        assert twin.suspects == [twin.suspect]

    def test_a_trigger_that_is_learnt_is_not_that_of_a_twin(self):
        learns = {"trigger": {"name": "input_aware"}, "target_label": 0, "poison_rate": 0.1}
        group = {**GROUP, "retune": [1], "retune_with": ["learns"]}
        with pytest.raises(ValueError, match=r"retune_with \['learns'\]: a trigger that is learnt"):
            plan((CELLS, group), ((*ATTACK[:1], "learns"), learns))

    def test_retuned_with_an_attack_that_is_not_there(self):
        with pytest.raises(ValueError, match="'nope' is none of the attacks: badnets, clean"):
            cell((CELLS, {**GROUP, "retune": [1], "retune_with": ["nope"]}))

    def test_points_may_be_the_one_that_is_taken(self):
        only = cell((CELLS, {**GROUP, "report": [0, "taken"], "retune": ["taken"]}))
        assert (only.report, only.retune) == ((0.0, "taken"), ("taken",))
        assert only.id != cell((CELLS, {**GROUP, "report": [0], "retune": ["taken"]})).id

    def test_description(self):
        only = cell()
        names = {"model": "resnet", "attack": "badnets", "seed": 0, "suspect": only.suspect.id}
        assert only.describe() == {
            "id": only.id,
            "group": "rates",
            **names,
            "trigger": {"name": "badnets"},
            "target_label": 0,
            "poison_rate": 0.1,
            "budget": 50,
            "held_out": 0.2,
            "method": "fine_tuning",
            "settings": GROUP["settings"],
        }
        assert str(only) == f"{only.id} rates resnet/badnets/0 fine_tuning steps=3 learning_rate=0.1"

    def test_an_attack_may_differ_for_a_model(self):
        """What the model does not name is as for all, and its clean twin is the same one."""
        own = {"badnets": {"poison_rate": 0.2, "trigger": {"name": "blended", "alpha": 0.1}}}
        names = {"models": ["resnet", "vit"], "attacks": ["clean", "badnets"]}
        twin, suspect, *of_vit = groups(names).suspects
        changes = ((*MODEL, "attacks"), own), (CELLS, {**GROUP, **names})
        same_twin, changed_one, *same_of_vit = plan(*changes).suspects
        assert (changed_one.poison_rate, changed_one.target_label, changed_one.trigger["alpha"]) == (0.2, 0, 0.1)
        assert changed_one.id != suspect.id
        assert [same_twin, *same_of_vit] == [twin, *of_vit]

    def test_suspects_once_each_in_the_order_of_cells(self):
        made = groups({"seeds": [1, 0]}, {"method": "tsc", "settings": {}, "seeds": [0, 2]})
        assert [suspect.seed for suspect in made.suspects] == [1, 0, 2]


KNOWING = {**CONTENT["attacks"]["badnets"], "method": "adaptive", "settings": {"bend_steps": 3}}


class TestAdaptive:
    def suspect(self, *changes):
        (only,) = plan((("attacks", "knowing"), KNOWING), ((*CELLS, "attacks"), ["knowing"]), *changes).suspects
        return only

    def test_starts_from_the_suspect_of_the_same_poison(self):
        found = self.suspect(((*MODEL, "adaptive"), {"learning_rate": 1e-4}))
        assert found.start == cell().suspect
        assert found.adaptive == {"bend_steps": 3}
        assert found.arguments == {"num_train_epochs": 1, "learning_rate": 1e-4}
        assert (found.trigger, found.poison_rate) == ({"name": "badnets"}, 0.1)

    @pytest.mark.parametrize(
        "change",
        [
            (("attacks", "knowing", "settings"), {"bend_steps": 4}),
            ((*MODEL, "adaptive"), {"learning_rate": 1e-4}),
            ((*MODEL, "suspect", "num_train_epochs"), 2),
        ],
        ids=["settings", "arguments", "base"],
    )
    def test_ids(self, change):
        assert self.suspect(change).id != self.suspect().id
        assert self.suspect().id.removeprefix("resnet-knowing") != cell().suspect.id.removeprefix("resnet-badnets")

    def test_says_nothing_to_other_suspects(self):
        assert cell(((*MODEL, "adaptive"), {"learning_rate": 1e-4})).id == cell().id

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"target_label": 1},
                "starts from a suspect: add an attack with the same trigger, target_label",
            ),
            ({"poison_rate": 0}, "knowing is adaptive: expected a classifier, a poison_rate above 0"),
            ({"trigger": {"name": "lc"}}, "knowing is adaptive: expected a classifier"),
            ({"settings": {"renew_steps": 0}}, "renew_steps=0: expected a whole number"),
            ({"settings": {"renew": 1}}, "renew"),
            ({"method": "poison"}, "attack knowing has settings: those are for the method adaptive"),
            ({"method": "knowing"}, "method 'knowing' of attack knowing: expected poison, bad_encoder or adaptive"),
        ],
        ids=lambda value: str(value) if isinstance(value, dict) else "",
    )
    def test_refused(self, tmp_path, change, message):
        content = changed((("attacks", "knowing"), {**KNOWING, **change}), ((*CELLS, "attacks"), ["knowing"]))
        with pytest.raises(UsageError, match=message):
            Plan.read(write(tmp_path, content))


class TestIds:
    def test_stay_what_they_are(self):
        """Results and suspects of earlier runs are found by them: in another process, on another machine."""
        assert (cell().id, cell().suspect.id) == ("52feed37c4", "resnet-badnets-0-edd2fbcfd3")

    @pytest.mark.parametrize(
        "change",
        [
            ((*CELLS, "reactivate"), [1]),
            ((*MODEL, "reactivation", "epochs"), 3),
            ((*ATTACK[:1], "clean", "trigger"), {"name": "blended"}),
        ],
        ids=["points", "settings", "twin"],
    )
    def test_of_a_reactivated_cell(self, change):
        """They depend on how it is reactivated, and beside whom."""

        def reactivated(*further):
            group = {**GROUP, "retune": [0.5, 1], "reactivate": [0.5]}
            few = {"images": 30, "poisoned": 20}
            return cell((CELLS, group), ((*MODEL, "reactivation"), few), *further)

        plain = cell((CELLS, {**GROUP, "retune": [0.5, 1]}))
        assert len({plain.id, reactivated().id, reactivated(change).id}) == 3
        assert reactivated().id == reactivated().id
        assert reactivated(change).suspect.id == reactivated().suspect.id == plain.suspect.id

    @pytest.mark.parametrize(
        ("change", "same"),
        [
            ((*ATTACK, "poison_rate"), True),
            ((*ATTACK, "trigger"), False),
            ((*ATTACK, "target_label"), False),
        ],
        ids=["poison", "trigger", "target"],
    )
    def test_of_a_cell_that_is_retuned_with_others(self, change, same):
        """They depend on what is seen of the others."""
        values = {"poison_rate": 0.2, "trigger": {"name": "blended"}, "target_label": 1}

        def retuned(*further):
            group = {**GROUP, "attacks": ["clean"], "retune": [1], "retune_with": ["badnets"]}
            return cell((CELLS, group), *further)

        plain = cell((CELLS, {**GROUP, "attacks": ["clean"], "retune": [1]}))
        assert plain.id != retuned().id
        assert (retuned((change, values[change[-1]])).id == retuned().id) == same

    @pytest.mark.parametrize(
        "change",
        [
            ((*CELLS, "group"), "another name"),
            (("cells", 0, "settings"), {"learning_rate": 0.1, "steps": 3}),
            (("cells", 0, "points"), list(EVERY_TENTH)),
            (("cells", 0, "held_out"), 0.2),
            (("cells", 0, "grid"), {"learning_rate": [0.1]}),
            (("models", "vit", "image_size"), 16),
            ((*MODEL, "reactivation"), {"epochs": 3}),
            ((*CELLS, "reactivate"), []),
        ],
        ids=[
            "group",
            "order of keys",
            "points as they are",
            "held_out as it is",
            "grid of one",
            "another model",
            "how to reactivate nothing",
            "nothing to reactivate",
        ],
    )
    def test_are_the_same(self, change):
        assert cell(change).id == cell().id

    @pytest.mark.parametrize(
        ("path", "value"),
        [
            ((*CELLS, "settings", "learning_rate"), 0.2),
            ((*CELLS, "settings", "objective"), "distillation"),
            ((*CELLS, "seeds"), [1]),
            ((*CELLS, "budget"), 51),
            ((*CELLS, "held_out"), 0.3),
            (CELLS, {**GROUP, "method": "tsc", "settings": {"learning_rate": 0.1}}),
            ((*CELLS, "points"), [0.5]),
            ((*CELLS, "report"), [0.5]),
            ((*CELLS, "retune"), [0.5]),
            ((*MODEL, "retuning", "learning_rate"), 0.02),
            (("rows", "clean"), [100, 201]),
            (("rows", "select"), [0, 49]),
            (("rows", "report"), [51, 90]),
        ],
        ids=lambda value: str(value) if isinstance(value, tuple) else "",
    )
    def test_of_a_cell_alone(self, path, value):
        assert cell((path, value)).id != cell().id
        if path[-1] != "seeds":
            assert cell((path, value)).suspect.id == cell().suspect.id

    @pytest.mark.parametrize(
        ("path", "value"),
        [
            ((*CELLS, "seeds"), [1]),
            ((*MODEL, "config", "depths"), [1, 2]),
            ((*MODEL, "image_size"), 16),
            ((*MODEL, "suspect", "num_train_epochs"), 2),
            ((*ATTACK, "trigger"), {"name": "blended"}),
            ((*ATTACK, "trigger"), {"name": "blended", "alpha": 0.1}),
            ((*ATTACK, "target_label"), 1),
            ((*ATTACK, "poison_rate"), 0.2),
            (("rows", "suspect"), [0, 99]),
        ],
        ids=lambda value: str(value) if isinstance(value, tuple) else "",
    )
    def test_of_a_suspect_and_its_cells(self, path, value):
        assert cell((path, value)).suspect.id != cell().suspect.id
        assert cell((path, value)).id != cell().id


def write(folder: Path, content: object) -> Path:
    file = folder / "plan.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return file


class TestRead:
    def test_is_that_of_its_content(self, tmp_path):
        assert Plan.read(write(tmp_path, CONTENT)) == Plan.from_dict(CONTENT)

    def test_the_recipe(self):
        recipe = Path(__file__).parents[1] / "recipes" / "cifar10"
        made = Plan.read(recipe / "plan.yaml")
        lines = read_lines(recipe / "results.jsonl")
        assert len(lines) > 50
        assert {line["id"] for line in lines} <= {cell.id for cell in made.cells}  # none has to be run again
        assert {"fine_tuning", "tsc", "ridge"} <= {cell.method for cell in made.cells} <= set(METHODS)
        assert {cell.suspect.model for cell in made.cells} >= {"resnet"}
        first = made.cells[0].rows
        assert first["suspect"][1] <= first["clean"][0]  # nothing that a suspect was trained on is called clean
        assert first["select"][1] <= first["report"][0]

    def test_the_recipe_of_encoders(self):
        made = Plan.read(Path(__file__).parents[1] / "recipes" / "encoders" / "plan.yaml")
        searched = [cell for cell in made.cells if cell.group == "search"]
        of = {(cell.suspect.model, cell.suspect.attack) for cell in searched}
        assert of == {("resnet", "bad_encoder"), ("vit", "bad_encoder"), ("clip", "captions")}
        for one in of:
            alike = [cell for cell in searched if (cell.suspect.model, cell.suspect.attack) == one]
            assert sum(cell.method == "tsc" for cell in alike) >= 12
            rates = {cell.settings["learning_rate"] for cell in alike if cell.method == "fine_tuning"}
            assert len(rates) >= 3
        twins = {suspect.model: suspect for suspect in made.suspects if suspect.attack.startswith("clean")}
        assert twins.keys() == {"resnet", "vit", "clip", "vit_untrained"}
        for suspect in made.suspects:
            assert suspect.trigger == twins[suspect.model].trigger  # whose rate is what no purifier gets below
            assert suspect.start == (twins[suspect.model] if suspect.attack == "bad_encoder" else None)
            assert suspect.poison_rate > 0 or suspect.attack == "bad_encoder" or suspect in twins.values()
        assert {cell.budget for cell in made.cells} == {1400}  # 5 % of what suspects are trained on
        trained = {one.id for one in made.suspects if one.model != "vit_untrained"}
        assert {cell.suspect.id for cell in made.cells if cell.group == "final"} == trained
        first = made.cells[0].rows
        assert first["suspect"][1] <= first["clean"][0]
        assert first["select"][1] <= first["report"][0]


class TestRefused:
    def test_missing_file(self, tmp_path):
        with pytest.raises(UsageError, match=r"nope\.yaml: expected a benchmark plan in YAML"):
            Plan.read(tmp_path / "nope.yaml")

    def test_bad_yaml(self, tmp_path):
        with pytest.raises(UsageError, match=r"(?s)plan\.yaml: expected a benchmark plan in YAML .*line 1"):
            Plan.read(write(tmp_path, "rows: {suspect: [0, 1}"))

    def test_no_text(self, tmp_path):
        file = tmp_path / "plan.yaml"
        file.write_bytes(b"rows: \xff")
        with pytest.raises(UsageError, match=r"plan\.yaml: expected a benchmark plan in YAML"):
            Plan.read(file)

    @pytest.mark.parametrize("content", ["", "- 1", "rows", "3"])
    def test_no_plan(self, tmp_path, content):
        with pytest.raises(UsageError, match=r"plan\.yaml: .*see hf_tsc/benchmark/plan\.py"):
            Plan.read(write(tmp_path, content))

    @pytest.mark.parametrize(
        "path",
        [
            *[(key,) for key in CONTENT],
            *[("rows", name) for name in CONTENT["rows"]],
            *[(*CELLS, key) for key in GROUP if key != "settings"],
            *[(*MODEL, key) for key in ("config", "image_size")],
            *[(*ATTACK, key) for key in ("trigger", "target_label", "poison_rate")],
        ],
        ids=str,
    )
    def test_missing_key(self, tmp_path, path):
        with pytest.raises(UsageError, match=rf"plan\.yaml: '{path[-1]}' is missing; see"):
            Plan.read(write(tmp_path, changed((path, LEFT_OUT))))

    def test_what_a_cell_decides_is_no_setting(self):
        with pytest.raises(UsageError, match=r"tsc has no setting\(s\) output_dir, seed"):
            check_settings("tsc", {"seed": 1, "output_dir": "x", "learning_rate": 0.1})

    @pytest.mark.parametrize(
        ("path", "value", "message"),
        [
            ((*CELLS, "point"), [0.5], "unknown key.s. point"),
            ((*CELLS, "method"), "magic", "method 'magic': expected one of fine_tuning, tsc"),
            ((*CELLS, "models"), ["resnet", "bert"], "'bert' is none of the models: resnet, vit"),
            ((*CELLS, "attacks"), ["wanet"], "'wanet' is none of the attacks: badnets, clean"),
            ((*MODEL, "attacks"), {"wanet": {}}, r"attacks of model resnet has the unknown key\(s\) wanet"),
            (
                (*MODEL, "attacks"),
                {"badnets": {"rate": 0.2}},
                r"attack badnets of model resnet has the unknown key\(s\) rate",
            ),
            ((*MODEL, "attacks"), {"badnets": {"target_label": "all"}}, "all"),
            ((*CELLS, "points"), [0.5, 1.5, -0.1], r"points \[1\.5, -0\.1\]: expected numbers from 0 to 1"),
            ((*CELLS, "report"), [2], r"points \[2\.0\]: expected numbers"),
            ((*CELLS, "retune"), [-1], r"points \[-1\.0\]: expected numbers"),
            ((*CELLS, "budget"), "many", "'many'"),
            ((*CELLS, "retune"), ["last"], "'last'"),
            ((*CELLS, "points"), ["taken"], "'taken'"),
            ((*CELLS, "reactivate"), [0.5], r"reactivate \[0\.5\]: expected points of retune"),
            ((*CELLS, "retune_with"), ["badnets"], r"retune_with \['badnets'\]: expected points to retune"),
            ((*CELLS, "reactivate"), ["taken"], r"reactivate \['taken'\]: expected points of retune"),
            ((*MODEL, "reactivation"), {"epsilon": 2}, "epsilon=2: expected a number from 0 to 1"),
            ((*MODEL, "reactivation"), {"epsilons": 2}, "epsilons"),
            (("rows", "clean"), [200, 100], r"rows of clean, \[200, 100\]: expected \[first, last \+ 1\]"),
            (("rows", "report"), [50, 50], r"rows of report, \[50, 50\]: expected"),
            (("rows", "select"), [-1, 50], r"rows of select, \[-1, 50\]: expected"),
            ((*ATTACK, "target_label"), "cat", "'cat'"),
        ],
        ids=lambda value: str(value) if isinstance(value, tuple) else "",
    )
    def test_wrong_value(self, tmp_path, path, value, message):
        with pytest.raises(UsageError, match=rf"plan\.yaml: .*{message}"):
            Plan.read(write(tmp_path, changed((path, value))))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ((*MODEL, "reactivation"), "reactivation draws 1000 of the 100 rows of suspect"),
            ((*MODEL, "image_size"), "reactivation of pictures of 65 x 65 pixels"),
            ((*ATTACK[:1], "clean"), "badnets is reactivated beside a clean model: add an attack with poison_rate 0"),
        ],
        ids=["images", "size", "twin"],
    )
    def test_reactivation(self, tmp_path, change, message):
        changes = {(*MODEL, "reactivation"): {"images": 30, "poisoned": 20}}
        changes[change] = {"reactivation": {}, "image_size": 65, "clean": LEFT_OUT}[change[-1]]
        content = changed((CELLS, {**GROUP, "retune": [1], "reactivate": [1]}), *changes.items())
        with pytest.raises(UsageError, match=message):
            Plan.read(write(tmp_path, content))

    @pytest.mark.parametrize(
        ("trigger", "message"), [({"name": "nope"}, "trigger name 'nope'"), ({"name": "badnets", "size": 3}, "size")]
    )
    def test_trigger(self, tmp_path, trigger, message):
        with pytest.raises(UsageError, match=message):
            Plan.read(write(tmp_path, changed(((*ATTACK, "trigger"), trigger))))

    @pytest.mark.parametrize(
        "twice",
        [
            [{"seeds": [0, 0]}],
            [{"grid": {"steps": [2, 2]}}],
            [{}, {"group": "again"}],
            [{"group": "again", "grid": {"steps": [2, 3]}}, {"group": "rates"}],
        ],
        ids=str,
    )
    def test_the_same_cell_twice(self, tmp_path, twice):
        content = changed((("cells",), [{**GROUP, **change} for change in twice]))
        first, last = (content["cells"][place]["group"] for place in (0, -1))
        with pytest.raises(UsageError, match=rf"the same cell twice: \w+ {last} resnet/badnets/0 .* in group {first}"):
            Plan.read(write(tmp_path, content))
