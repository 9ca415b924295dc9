"""Tables and pictures of results: which point stands for a method, and what a table says of it."""

import json

import pytest

from hf_tsc.baselines.registry import BASELINES
from hf_tsc.benchmark import results
from hf_tsc.benchmark.acceptance import of_last_suspects, of_last_training, suspect_table
from hf_tsc.benchmark.ahead import ahead_table
from hf_tsc.benchmark.means import judging, means_table
from hf_tsc.benchmark.pictures import _other_colour, plot_curves, plot_frontier, plot_means
from hf_tsc.benchmark.points import farthest_within, last_points, markdown, taken_points
from hf_tsc.benchmark.results import group_table, tables, write_results
from hf_tsc.benchmark.twins import beside_twins
from hf_tsc.cli import main
from hf_tsc.metrics import defense_effectiveness

BEFORE = {"accuracy": 0.8, "attack_success_rate": 1.0, "robust_accuracy": 0.0}


def measures(acc: float, asr: float) -> dict:
    return {"n": 100, "accuracy": acc, "n_triggered": 90, "attack_success_rate": asr, "robust_accuracy": 1 - asr}


def point(t: float, held_out: float, acc: float, asr: float, **more) -> dict:
    return {"t": t, "held_out": {"loss": 1.0, "score": held_out}, "select": measures(acc, asr), **more}


def line(method="tsc", *, seed=0, settings=None, points=None, taken=0.5, path="round 1, curve 1", **changes) -> dict:
    """A line of results; by default a curve whose points lose accuracy towards its middle."""
    curve = [point(0.0, 0.8, 0.8, 1.0), point(0.3, 0.78, 0.76, 0.3), point(0.5, 0.7, 0.68, 0.1)]
    curve += [point(0.6, 0.77, 0.75, 0.2), point(1.0, 0.8, 0.8, 1.0)]
    content = {
        "id": f"{method}{seed}{settings}",
        "group": "g",
        "model": "resnet",
        "attack": "badnets",
        "seed": seed,
        "suspect": f"resnet-badnets-{seed}-0",
        "trigger": {"name": "badnets"},
        "target_label": 0,
        "budget": 1400,
        "method": method,
        "settings": settings or {"learning_rate": 0.1},
        "before": {"held_out": {"loss": 1.0, "score": 0.8}, "select": BEFORE, "report": {**BEFORE, "accuracy": 0.79}},
        "paths": [{"path": path, "taken": taken, "points": points or curve}],
    }
    return {**content, **changes}


def tuned(**changes) -> dict:
    points = [point(0.0, 0.8, 0.8, 1.0), point(0.5, 0.77, 0.78, 0.4), point(1.0, 0.7, 0.7, 0.05)]
    return line("fine_tuning", points=points, taken=1.0, path="interpolation", **changes)


def rows_of(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()[2:]]


class TestPoints:
    def test_of_a_first_curve(self):
        """Within the budget of 4 points: 0.3 and 0.6; the latter is farther from both ends."""
        own, within = taken_points(line())
        assert (own.method, own.point["t"]) == ("TSC", 0.5)
        assert (within.method, within.point["t"]) == ("TSC within budget", 0.6)

    def test_of_a_second_curve(self):
        """Only its start is backdoored."""
        points = [
            point(0.0, 0.8, 0.8, 1.0),
            point(0.4, 0.78, 0.7, 0.5),
            point(0.9, 0.77, 0.7, 0.1),
            point(1, 0.8, 0.7, 0),
        ]
        assert farthest_within(line(points=points, path="round 1, curve 2"))["t"] == 0.9

    def test_of_fine_tuning(self):
        plain, interpolated = taken_points(tuned())
        assert (plain.method, plain.point["t"]) == ("fine-tuning", 1.0)
        assert (interpolated.method, interpolated.point["t"]) == ("interpolated", 0.5)

    def test_fine_tuning_itself_may_be_within(self):
        assert farthest_within(tuned(), max_drop=0.1)["t"] == 1.0

    def test_nothing_within_the_budget(self):
        assert farthest_within(line(), max_drop=-0.1) is None
        assert [taken.method for taken in taken_points(line(points=[point(0.5, 0.1, 0.1, 0.1)]))] == ["TSC"]

    def test_of_a_failure(self):
        assert taken_points(line(error="the loss is nan")) == []


class TestValues:
    def test_are_of_report_where_it_was_measured(self):
        reported = point(0.5, 0.7, 0.68, 0.1, report=measures(0.66, 0.2), retuned=measures(0.5, 0.9))
        own = taken_points(line(points=[reported]))[0]
        assert (own.value("ACC"), own.value("ASR"), own.value("RA")) == (0.66, 0.2, 0.8)
        assert (own.value("re-tuned ACC"), own.value("re-tuned ASR")) == (0.5, 0.9)
        expected = defense_effectiveness(acc_before=0.79, acc_after=0.66, asr_before=1.0, asr_after=0.2)
        assert own.value("DER") == expected

    def test_else_of_select(self):
        own = taken_points(line())[0]
        assert (own.value("ACC"), own.value("re-tuned ASR")) == (0.68, None)


class TestTables:
    def test_seeds_are_averaged(self):
        other = line(seed=1, points=[point(0.5, 0.7, 0.72, 0.3)])
        rows = rows_of(group_table([line(), other]))
        assert rows[0][:6] == ["badnets", "1400", "TSC", "", "0.5", "2"]
        assert rows[0][6:10] == ["80.0 ± 0.0", "100.0 ± 0.0", "70.0 ± 2.8", "20.0 ± 14.1"]  # before, after

    def test_what_is_within_budget_and_taken_has_no_second_row(self):
        """But where it is another point of one seed."""
        same = line(taken=0.6)
        assert [row[2] for row in rows_of(group_table([same]))] == ["TSC"]
        found = rows_of(group_table([same, line(seed=1)]))
        assert [(row[2], row[4], row[5]) for row in found] == [
            ("TSC", "0.5, 0.6", "2"),
            ("TSC within budget", "0.6", "2"),
        ]

    def test_settings_that_differ_are_named(self):
        lines = [line(settings={"learning_rate": rate, "move_spaces": ["hidden", "qk"]}) for rate in (0.1, 0.2)]
        lines[1]["settings"]["move_spaces"] = ["hidden"]
        found = {row[3] for row in rows_of(group_table(lines))}
        assert found == {"learning_rate 0.1, move_spaces hidden qk", "learning_rate 0.2, move_spaces hidden"}

    def test_of_suspects(self):
        """One of them trained twice: its lines are of different weights."""
        lines = [{**line(), "weights": "a"}, {**tuned(), "weights": "b"}, line(seed=1), {**tuned(), "seed": 1}]
        lines[3]["suspect"] = lines[2]["suspect"]
        assert rows_of(suspect_table(lines)) == [
            ["resnet", "badnets", "0", "79.0", "100.0", "2", "no clean twin"],
            ["resnet", "badnets", "1", "79.0", "100.0", "1", "no clean twin"],
        ]

    def test_numbers_of_a_suspect_are_told(self):
        lines = [
            line(
                suspect="s0", attack="wanet", trigger={"name": "wanet", "strength": 1, "covers": 0.5}, poison_rate=0.2
            ),
            line(suspect="s1", attack="bpp", trigger={"name": "bpp", "levels": 4}),  # of an earlier version
            line(suspect="s2", attack="clean", trigger={"name": "badnets", "size": 2}, poison_rate=0.0),
        ]
        numbers = [row[2] for row in rows_of(suspect_table(lines))]
        assert numbers == ["strength 1, covers 0.5, poisoned 20 %", "levels 4", ""]

    def test_numbers_are_set_to_the_right(self):
        assert markdown(["a", "b"], [["x", "1.0"], ["y", ""]]).splitlines()[1] == "| --- | ---: |"

    def test_reactivation_has_columns_where_something_was_reactivated(self):
        woken = {"plain": 0.1, "reactivated": 0.6, "twin_plain": 0.01, "twin": 0.05}
        lines = [line(seed=seed, points=[point(0.5, 0.7, 0.68, 0.1, reactivated=woken)]) for seed in (0, 1)]
        head = group_table([*lines, tuned()]).splitlines()[0]
        assert head.endswith(
            "| re-tuned ASR | reactivated ASR | untouched twin's ASR | untouched twin's reactivated ASR |"
        )
        rows = {row[2]: row[-3:] for row in rows_of(group_table([*lines, tuned()]))}
        assert rows["TSC"] == ["60.0 ± 0.0", "1.0 ± 0.0", "5.0 ± 0.0"]
        assert rows["fine-tuning"] == ["", "", ""]
        assert "reactivated" not in group_table([line(), tuned()])

    def test_failures_are_told(self):
        text = tables([line(), line(error="the loss is nan", id="bad", settings={"learning_rate": 9})])
        assert "- bad: the loss is nan" in text
        assert "## g: resnet" in text


def of_suspect(attack: str, *, acc=0.8, asr=1.0, seed=0, method="tsc", after=(0.7, 0.1), **changes) -> dict:
    """A line of one suspect, reported at t = 0.5 with an accuracy and an attack success rate."""
    before = {"accuracy": acc, "attack_success_rate": asr, "robust_accuracy": 0.0}
    points = [point(0.5, 0.7, 0.68, 0.1, report=measures(*after))]
    named = {"attack": attack, "suspect": f"resnet-{attack}-{seed}", "id": f"{method}{attack}{seed}"}
    measured = {"before": {"held_out": {"score": 0.8}, "select": before, "report": before}}
    return line(method, seed=seed, points=points, **named, **measured, **changes)


TWIN = of_suspect("clean", acc=0.81, asr=0.01)


class TestSuspects:
    @pytest.mark.parametrize(
        ("attack", "acc", "asr", "missed"),
        [
            ("wanet", 0.79, 0.9, ""),
            ("wanet", 0.83, 0.899, "ASR below 90.0"),
            ("wanet", 0.789, 1.0, "ACC 2.1 from the clean twin's"),
            ("wanet", 0.832, 1.0, "ACC 2.2 from the clean twin's"),
            ("wanet", 0.7, 0.5, "ASR below 90.0, ACC 11.0 from the clean twin's"),
            ("sig", 0.8, 0.6, ""),  # its images keep their label
            ("sig", 0.8, 0.599, "ASR below 60.0"),
            ("all_to_all", 0.8, 0.72, ""),
            ("all_to_all", 0.8, 0.719, "ASR below 72.0"),
            ("of_my_own", 0.8, 0.6, "ASR below 90.0"),
        ],
    )
    def test_what_they_miss(self, attack, acc, asr, missed):
        table = suspect_table([of_suspect(attack, acc=acc, asr=asr), TWIN])
        assert {row[1]: row[-1] for row in rows_of(table)} == {attack: missed, "clean": ""}

    def test_twin_of_the_same_seed_and_model(self):
        others = [of_suspect("clean", acc=0.5, seed=1), of_suspect("clean", acc=0.5, model="vit")]
        others[1]["suspect"] = "vit-clean-0"
        rows = rows_of(suspect_table([of_suspect("bpp"), *others, TWIN]))
        assert {row[-1] for row in rows} == {""}

    def test_replaced_ones(self):
        """An attack was given other settings; the models of other names are still there."""
        first, second = of_suspect("bpp", asr=0.5), of_suspect("bpp")
        first["suspect"] = "resnet-bpp-0-old"
        rows = rows_of(suspect_table([TWIN, first, second, of_suspect("sig")]))
        assert {(row[1], row[4]): row[-1] for row in rows} == {
            ("clean", "1.0"): "",
            ("bpp", "50.0"): "replaced, ASR below 90.0",
            ("bpp", "100.0"): "",
            ("sig", "100.0"): "",
        }
        assert of_last_suspects([first, second, TWIN]) == [second, TWIN]


JUDGED = [
    TWIN,
    of_suspect("badnets", after=(0.1, 0.9)),  # chosen on
    of_suspect("blended", after=(0.1, 0.9)),
    of_suspect("all_to_all", after=(0.1, 0.9)),  # with a trigger that was chosen on
    of_suspect("wanet", asr=0.5, after=(0.1, 0.9)),  # does not work
    of_suspect("bpp", after=(0.7, 0.1)),
    of_suspect("sig", after=(0.72, 0.3)),
    of_suspect("bpp", method="anp", after=(0.6, 0.5)),
]


class TestMeans:
    def test_count_attacks_that_judge(self):
        assert [line["id"] for line in judging(JUDGED)] == ["tscbpp0", "tscsig0", "anpbpp0"]

    def test_table(self):
        rows = {row[1]: row for row in rows_of(means_table(judging(JUDGED)))}
        assert rows["TSC"] == ["1400", "TSC", "", "2 of 2", "80.0", "100.0", "71.0", "20.0", "80.0", "85.5", "", ""]
        assert rows["ANP"][3:8] == ["1 of 2", "80.0", "100.0", "60.0", "50.0"]  # failed, or not run

    def test_spread_is_that_of_the_seeds_means(self):
        """Means of attacks: 71 of seed 0, 73 of seed 1."""
        twin = of_suspect("clean", acc=0.8, seed=1)
        more = [of_suspect("bpp", seed=1, after=(0.7, 0.2)), of_suspect("sig", seed=1, after=(0.76, 0.2))]
        row = {row[1]: row for row in rows_of(means_table(judging([*JUDGED, twin, *more])))}["TSC"]
        assert (row[3], row[6], row[7]) == ("4 of 4", "72.0 ± 1.4", "20.0 ± 0.0")

    def test_not_over_what_was_measured_of_some(self):
        lines = judging(JUDGED)
        lines[0]["paths"][0]["points"][0]["retuned"] = measures(0.5, 0.9)
        row = {row[1]: row for row in rows_of(means_table(lines))}
        assert row["TSC"][-1] == ""
        del lines[0]["paths"][0]["points"][0]["retuned"]

    def test_replaced_suspects_and_former_trainings_do_not_count(self):
        replaced = of_suspect("bpp", after=(0.1, 0.9), weights="a")
        replaced["suspect"] = "resnet-bpp-0-old"
        former = of_suspect("bpp", after=(0.1, 0.9), weights="b")
        assert judging([replaced, former, *JUDGED]) == judging(JUDGED)
        text = tables([replaced, former, *JUDGED])
        assert "| bpp | 1400 | TSC |  | 0.5 | 2 |" in text  # the former training is told, the replaced suspect is not

    def test_are_told_where_several_attacks_count(self):
        assert "### g: resnet, means over bpp, sig" in tables(JUDGED)
        assert "means over" not in tables(JUDGED[:6])

    def test_picture(self):
        (left,) = plot_means(judging(JUDGED), title="x").axes
        drawn = {one.get_label(): (list(one.get_xdata()), list(one.get_ydata())) for one in left.get_lines()}
        assert drawn["TSC over t"] == (pytest.approx([71]), pytest.approx([20]))
        assert drawn["ANP along its path"] == (pytest.approx([60]), pytest.approx([50]))

    def test_picture_is_of_the_points_that_all_have(self):
        lines = judging(JUDGED)[:2]
        more = [{**point(0.9, 0.7, 0.7, 0.2), "report": measures(0.75, 0.4)}]
        lines[0] = {**lines[0], "paths": [{**lines[0]["paths"][0], "points": last_points(lines[0]) + more}]}
        (left,) = plot_means(lines, title="x").axes
        assert list(left.get_lines()[0].get_xdata()) == pytest.approx([71])

    def test_picture_is_of_the_last_runs(self, tmp_path, monkeypatch):
        drawn = []

        def plot(lines, title):
            drawn.extend(lines)
            return plot_means(lines, title=title)

        monkeypatch.setattr(results, "plot_means", plot)
        write_results([of_suspect("bpp", after=(0.1, 0.9)), *JUDGED], tmp_path)
        assert drawn == judging(JUDGED)

    def test_command(self, tmp_path):
        (tmp_path / "r.jsonl").write_text("".join(json.dumps(one) + "\n" for one in JUDGED))
        assert main(["benchmark-tables", str(tmp_path / "r.jsonl"), "--output_dir", str(tmp_path / "out")]) == 0
        assert (tmp_path / "out" / "means-g-resnet-1400.png").is_file()


def retuned(asr: float, **named) -> dict:
    """The line of a suspect whose re-tuning attack gave this rate."""
    made = of_suspect(**named)
    made["paths"][0]["points"][0]["retuned"] = measures(0.7, asr)
    return made


BPP = {"trigger": {"name": "bpp"}, "target_label": 0}


class TestTwins:
    @staticmethod
    def twin(**changes) -> dict:
        made = of_suspect("clean", acc=0.81, asr=0.01, **changes)
        made["paths"][0]["points"][0]["retuned_with"] = {"bpp": {**BPP, **measures(0.7, 0.25)}}
        return made

    def row(self, lines: list[dict]) -> dict[str, str]:
        """Of BPP."""
        head, _, *_ = (table := group_table(beside_twins(lines))).splitlines()
        (row,) = (row for row in rows_of(table) if row[0] == "bpp")
        return dict(zip([name.strip() for name in head.strip("|").split("|")], row, strict=True))

    def test_stand_beside(self):
        row = self.row([retuned(0.5, attack="bpp", **BPP), of_suspect("sig"), self.twin()])
        assert (row["re-tuned ASR"], row["twin's re-tuned ASR"]) == ("50.0", "25.0")

    def test_in_means_of_attacks_that_have_it(self):
        lines = [retuned(0.5, attack="bpp", **BPP), retuned(0.4, attack="sig"), self.twin()]
        (row,) = rows_of(means_table(beside_twins(lines)[:1]))
        assert row[-2:] == ["50.0", "25.0"]
        (row,) = rows_of(means_table(beside_twins(lines)[:2]))
        assert row[-2:] == ["45.0", ""]

    @pytest.mark.parametrize(
        "change",
        [{"settings": {"learning_rate": 0.2}}, {"budget": 280}, {"seed": 1}, {"model": "vit"}, {"method": "anp"}],
    )
    def test_of_another_run_is_none(self, change):
        assert "twin's re-tuned ASR" not in self.row([retuned(0.5, attack="bpp", **BPP), self.twin(**change)])

    def test_where_something_failed_is_none(self):
        twin = {**self.twin(), "error": "the loss is nan"}
        del twin["paths"]
        assert "twin's re-tuned ASR" not in self.row([retuned(0.5, attack="bpp", **BPP), twin])
        failed = {**of_suspect("bpp", **BPP), "error": "the loss is nan"}
        assert beside_twins([failed, self.twin()])[0] == failed

    @pytest.mark.parametrize("change", [{"trigger": {"name": "bpp", "levels": 4}}, {"target_label": 1}])
    def test_of_another_trigger_is_none(self, change):
        """As of an attack that was given other settings since."""
        assert "twin's re-tuned ASR" not in self.row([{**retuned(0.5, attack="bpp", **BPP), **change}, self.twin()])

    def test_a_later_line_without_them_takes_nothing_away(self):
        later = of_suspect("clean", acc=0.81, asr=0.01)
        assert self.row([retuned(0.5, attack="bpp", **BPP), self.twin(), later])["twin's re-tuned ASR"] == "25.0"

    def test_of_runs_that_differ_in_where_they_are_measured_the_last_one_is_told(self):
        """As the twin is run again for the new trigger of an attack."""
        former, sig = {**self.twin(), "id": "former"}, of_suspect("sig", after=(0.78, 0.1))
        text = tables([retuned(0.5, attack="bpp", **BPP), sig, former, self.twin()])
        (row,) = (row for row in text.splitlines() if row.startswith("| clean | 1400 | TSC |  |"))
        assert row.split("|")[6].strip() == "1"  # seeds

    def test_lines_stay_as_they_are(self):
        line = retuned(0.5, attack="bpp", **BPP)
        beside_twins([line, self.twin()])
        assert "retuned_twin" not in last_points(line)[0]

    def test_at_the_points_that_are_taken(self):
        """Which may differ where the accuracy chooses them."""
        line = retuned(0.5, attack="bpp", **BPP)
        line["paths"][0]["points"] += [point(0.8, 0.7, 0.7, 0.3)]
        twin = self.twin()
        twin["paths"][0]["points"] += [point(0.6, 0.7, 0.7, 0.3)]
        twin["paths"][0]["taken"] = twin["paths"][0]["points"][0]["t"] = 0.4
        first, second = last_points(beside_twins([line, twin])[0])
        assert first["retuned_twin"]["attack_success_rate"] == 0.25
        assert "retuned_twin" not in second


class TestWhoIsAhead:
    def row(self, lines: list[dict]) -> list[str]:
        (row,) = rows_of(ahead_table(lines))
        return row

    def test_lowest_and_what_is_near_it_best_first(self):
        """0.12 is two points above the lowest, 0.121 is more."""
        rates = {"tsc": 0.12, "anp": 0.10, "fst": 0.121}
        lines = [of_suspect("bpp", method=name, after=(0.78, rate)) for name, rate in rates.items()]
        assert self.row(lines) == ["bpp", "1400", "ANP 10.0, TSC 12.0", "", ""]

    def test_costly_ones_are_not_ahead(self):
        """0.8 before: 4 points are lost exactly by TSC, and more by ANP."""
        lines = [of_suspect("bpp", after=(0.76, 0.3)), of_suspect("bpp", method="anp", after=(0.759, 0.0))]
        assert self.row(lines) == ["bpp", "1400", "TSC 30.0", "", "ANP 4.1"]

    def test_none_may_be_ahead(self):
        assert self.row([of_suspect("bpp", after=(0.7, 0.0))]) == ["bpp", "1400", "", "", "TSC 10.0"]

    def test_retuned_rate_by_itself(self):
        lines = [retuned(0.5, attack="bpp", after=(0.78, 0.1))]
        lines += [retuned(0.4, attack="bpp", method="anp", after=(0.78, 0.3))]
        lines += [of_suspect("bpp", method="fst", after=(0.78, 0.5))]  # not re-tuned
        assert self.row(lines)[2:4] == ["TSC 10.0", "ANP 40.0"]

    def test_means_over_seeds(self):
        lines = [of_suspect("bpp", seed=0, after=(0.78, 0.1)), of_suspect("bpp", seed=1, after=(0.72, 0.3))]
        assert self.row(lines) == ["bpp", "1400", "", "", "TSC 5.0"]
        lines[1] = of_suspect("bpp", seed=1, after=(0.74, 0.3))
        assert self.row(lines) == ["bpp", "1400", "TSC 20.0", "", ""]

    def test_settings_are_told_where_a_method_has_several(self):
        lines = [of_suspect("bpp", after=(0.78, 0.1)), of_suspect("bpp", after=(0.78, 0.2))]
        lines[1]["settings"] = {"learning_rate": 0.7}
        assert self.row(lines)[2] == "TSC (learning_rate 0.1) 10.0"

    def test_a_method_that_lacks_a_seed_is_not_compared(self):
        lines = [of_suspect("bpp", seed=seed, after=(0.78, 0.3)) for seed in (0, 1)]
        lines += [of_suspect("bpp", method="anp", after=(0.78, 0.1))]
        assert self.row(lines)[2] == "TSC 30.0"
        failed = {**of_suspect("bpp", method="anp", seed=1), "error": "the loss is nan"}
        assert self.row([*lines, failed])[2] == "TSC 30.0"

    def test_clean_twins_come_last_and_have_no_rates(self):
        twin = of_suspect("clean", acc=0.8, asr=0.01, after=(0.7, 0.01))
        rows = rows_of(ahead_table([twin, of_suspect("wanet", after=(0.78, 0.1))]))
        assert rows == [["wanet", "1400", "TSC 10.0", "", ""], ["clean", "1400", "", "", "TSC 10.0"]]

    def test_among_the_tables(self):
        """Of attacks that count, and the twin."""
        _, table = tables(JUDGED).split("### g: resnet, who is ahead\n\n")
        assert [row[0] for row in rows_of(table.strip())] == ["bpp", "sig", "clean"]


class TestPictures:
    def test_each_baseline_has_a_colour_of_its_own(self):
        others = [name for name in BASELINES if name != "fine_tuning"]
        assert len({_other_colour(name) for name in others}) == len(others)

    def test_curves(self):
        reached = point(0.5, 0.7, 0.68, 0.1, retuned=measures(0.5, 0.9))
        (axes,) = plot_curves(line(points=[point(0.0, 0.8, 0.8, 1.0), reached])).axes
        drawn = {one.get_label(): list(one.get_ydata()) for one in axes.get_lines()[:3]}
        assert drawn == {"clean accuracy": [80, 68], "ASR": [100, 10], "ASR after re-tuning": [90]}

    def test_frontier(self):
        reached = point(0.5, 0.7, 0.68, 0.1, retuned=measures(0.5, 0.9))
        left, right = plot_frontier([line(points=[reached]), tuned()], title="x").axes
        assert [list(one.get_xdata()) for one in left.get_lines()] == [[68], [68], [80, 78, 70], [70]]
        assert [list(one.get_ydata()) for one in right.get_lines()] == [[90], [90], []]

    def test_frontier_is_of_the_same_images_for_all(self):
        """Those of `report` where all points have them: a path is not thinned out."""
        known = point(0.5, 0.7, 0.68, 0.1, report=measures(0.66, 0.2))
        reported, partly = line(points=[known]), line(points=[known, point(0.6, 0.7, 0.7, 0.3)])
        for lines, expected in (([reported], [66]), ([partly], [68, 70]), ([reported, tuned()], [68])):
            (left,) = plot_frontier(lines, title="x").axes
            assert list(left.get_lines()[0].get_xdata()) == pytest.approx(expected)

    def test_frontier_joins_rates_of_fine_tuning(self):
        """From the lowest on, where nothing but the rate differs."""
        ends = {0.2: (0.6, 0.04), 0.05: (0.75, 0.5), 0.1: (0.7, 0.05)}
        settings = [{"learning_rate": rate, "steps": 9} for rate in ends]
        paths = [[point(1.0, 0.7, *end)] for end in ends.values()]
        both = zip(settings, paths, strict=True)
        lines = [line("fine_tuning", points=points, taken=1.0, settings=setting) for setting, points in both]
        (left,) = plot_frontier([*lines, tuned(), line()], title="x").axes
        (joined,) = (one for one in left.get_lines() if one.get_label() == "fine-tuning over learning rates")
        assert list(joined.get_xdata()) == pytest.approx([75, 70, 60])
        assert list(joined.get_ydata()) == pytest.approx([50, 5, 4])

    @pytest.mark.parametrize(("groups", "pale"), [(("final", "rates"), 2), (("final", "final_rates"), 0)])
    def test_what_is_not_final_is_pale(self, groups, pale):
        """A path and the dot on it."""
        (left,) = plot_frontier([line(group=group) for group in groups], title="x").axes
        assert sum(one.get_alpha() < 1 for one in left.get_lines()) == pale

    def test_last_training(self):
        """Other weights are another network."""
        old, new, more = (line(weights=weights) for weights in ("a", "b", "b"))
        assert of_last_training([old, new, more]) == [new, more]
        assert of_last_training([line()]) == [line()]


def test_command(tmp_path, capsys):
    reported = point(0.5, 0.7, 0.68, 0.1, report=measures(0.66, 0.2))
    lines = [line(points=[reported]), tuned(), line(error="the loss is nan", id="bad", settings={"steps": 9})]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    assert main(["benchmark-tables", str(tmp_path / "r.jsonl"), "--output_dir", str(tmp_path / "out")]) == 0
    names = {file.name for file in (tmp_path / "out").iterdir()}
    pictures = {"frontier-resnet-badnets-0.png", "search-resnet-badnets-0.png"}
    assert names == {"tables.md", f"curves-resnet-badnets-0-{lines[0]['id']}.png", *pictures}
    assert (tmp_path / "out" / "tables.md").read_text() == tables(lines)


def test_search_has_a_picture_of_its_own(tmp_path, monkeypatch):
    reported = line(points=[point(0.5, 0.7, 0.68, 0.1, report=measures(0.66, 0.2))])
    searched, failed = tuned(), line(error="the loss is nan", settings={"steps": 9})
    drawn = {}

    def plot(lines, title):
        drawn[title] = lines
        return plot_frontier(lines, title=title)

    monkeypatch.setattr(results, "plot_frontier", plot)
    write_results([reported, searched, failed], tmp_path)
    assert drawn == {"resnet, badnets, 0": [reported], "resnet, badnets, 0: the search": [searched]}
    drawn.clear()
    write_results([searched, line()], tmp_path)  # TSC not reported yet: all in one
    assert drawn == {"resnet, badnets, 0": [searched, line()]}


@pytest.mark.parametrize("content", ["", "not json\n"])
def test_no_results(tmp_path, capsys, content):
    (tmp_path / "r.jsonl").write_text(content)
    assert main(["benchmark-tables", str(tmp_path / "r.jsonl"), "--output_dir", str(tmp_path / "out")]) == 2
    assert "r.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
