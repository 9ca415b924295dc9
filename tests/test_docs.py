"""What README and docs say is what the files behind them say."""

import io
import json
import re
import shlex
import sys
from contextlib import redirect_stdout
from pathlib import Path
from statistics import mean
from typing import ClassVar

import pytest

from hf_tsc import cli
from hf_tsc.baselines.registry import BASELINES
from hf_tsc.benchmark.acceptance import of_last_runs
from hf_tsc.benchmark.lines import read_lines
from hf_tsc.benchmark.plan import Plan
from hf_tsc.benchmark.results import tables
from hf_tsc.benchmark.twins import beside_twins
from hf_tsc.demo import DEMO_MODELS
from hf_tsc.report import PurificationReport
from hf_tsc.triggers import TRIGGERS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
sys.path.insert(0, str(ROOT / "recipes"))
demo_docs = pytest.importorskip("demo_docs")
baseline_docs = pytest.importorskip("baseline_docs")
evidence = pytest.importorskip("evidence")
symmetry_docs = pytest.importorskip("symmetry_docs")
benchmark_performance = pytest.importorskip("benchmark_performance")
two_processes = pytest.importorskip("two_processes")


def records():
    return [json.loads((ROOT / "docs/demo" / f"seed-{seed}.json").read_text()) for seed in demo_docs.SEEDS]


def test_the_table_in_the_readme_is_that_of_the_files():
    assert demo_docs.table(records()) == (ROOT / "docs/demo/table.md").read_text(encoding="utf-8")
    assert demo_docs.with_table(README, demo_docs.table(records())) == README
    assert "%" not in demo_docs.table(records())


def test_the_demo_reaches_what_it_promises():
    """Of the committed runs: backdoored before, not after, at a small loss of accuracy."""
    for record in records():
        assert [run["model"] for run in record["models"]] == list(DEMO_MODELS)
        for run in record["models"]:
            assert run["before"]["attack_success_rate"] >= 0.95
            assert run["tsc"]["attack_success_rate"] <= 0.05
            assert run["tsc"]["accuracy"] >= run["before"]["accuracy"] - 0.05
            assert run["tsc"]["n"] >= 350


def test_links_and_pictures_are_there():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    local = [link for link in links if not link.startswith("http")]
    assert len(local) >= 4
    assert [link for link in local if not (ROOT / link).exists()] == []


def test_commands_of_the_readme_have_these_options():
    """Every `hf-tsc COMMAND ... --option` of the README names a command and options that are there."""
    lines = [line for line in README.replace("\\\n", " ").splitlines() if line.startswith("hf-tsc ")]
    assert len(lines) >= 3
    for line in lines:
        _, command, *words = shlex.split(line, comments=True)
        options = {word for word in words if word.startswith("--")}
        with pytest.raises(SystemExit), redirect_stdout(io.StringIO()) as shown:
            cli.COMMANDS[command](["--help"])
        assert options <= set(re.findall(r"--\w+", shown.getvalue())), line


CARDS = sorted((ROOT / "model_cards").glob("demo-*.json"))


@pytest.mark.parametrize("file", CARDS, ids=lambda file: file.stem)
def test_the_cards_are_those_of_their_reports(file):
    card = PurificationReport.from_file(file).card()
    assert str(card) == file.with_suffix(".md").read_text(encoding="utf-8")


def test_each_model_of_the_demo_has_a_card():
    assert [file.stem for file in CARDS] == sorted(f"demo-{name}" for name in DEMO_MODELS)


def test_the_tables_of_the_symmetry_page_are_those_of_the_files():
    page = (ROOT / "docs/symmetry.md").read_text(encoding="utf-8")
    assert page.count("|---") > 3
    assert symmetry_docs.with_tables(page) == page


def test_the_table_of_the_baselines_is_that_of_the_code():
    page = (ROOT / "docs/baselines.md").read_text(encoding="utf-8")
    assert baseline_docs.with_table(page) == page
    assert all(f"| `{name}` |" in page for name in BASELINES)


def test_measured_times_are_within_their_targets():
    """Of the committed runs."""
    speed = json.loads((ROOT / "docs/derive_speed.json").read_text())["rows"]
    matching = json.loads((ROOT / "docs/matching.json").read_text())["rows"]
    cost = [row for row in json.loads((ROOT / "docs/cost.json").read_text())["rows"] if "target" in row]
    assert len(speed) == 6
    assert len(matching) == 2
    assert {row["family"] for row in cost if row["variant"] == "curve step"} == {"resnet64", "vit"}
    assert all(row["met"] for row in (*speed, *matching, *cost))


def test_the_table_of_attacks_is_what_the_triggers_do():
    page = (ROOT / "docs/attacks.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| `")][
        1:
    ]
    assert {row[0].strip("`") for row in rows if "--" not in row[0]} == set(TRIGGERS)
    for first, _, _, rate, label, covers in rows:
        how = TRIGGERS[re.search(r"`(\w+)`", first)[1]].poisoning
        assert rate == f"{100 * how.rate:g} %"
        assert covers == (f"{100 * how.rate * how.covers:g} %" if how.covers else "")
        assert (label == "**kept**") == how.clean_label
    pictures = re.findall(r"!\[.*\]\((.*)\)", page)
    assert pictures
    assert all((ROOT / "docs" / picture).stat().st_size < 320_000 for picture in pictures)


def test_the_page_on_performance_is_that_of_its_file():
    record = json.loads((ROOT / "docs/performance.json").read_text())
    assert benchmark_performance.page(record) == (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    assert {row["processes"] for row in record["steps"]} == {1, 2}
    assert {row["variant"] for row in record["memory"]} == set(benchmark_performance.MEMORY)


def test_two_processes_agreed_with_one_on_real_images():
    rows = json.loads((ROOT / "docs/two_processes.json").read_text())
    assert two_processes.table(rows) in (ROOT / "docs/processes.md").read_text(encoding="utf-8")
    for key, apart in (("accuracy", 0.015), ("attack_success_rate", 0.03)):
        one, two = ([row["after"][key] for row in rows if row["variant"] == name] for name in ("1 x 64", "2 x 32"))
        assert len(one) == len(two) == 3
        assert abs(mean(one) - mean(two)) <= apart


def test_killed_purifications_came_out_the_same():
    """Of the committed runs: both families, in one process and in two, and many kills."""
    rows = [row for run in json.loads((ROOT / "docs/kill_resume.json").read_text()) for row in run["rows"]]
    assert {(row["family"], row["processes"]) for row in rows} == {(f, n) for f in ("resnet", "vit") for n in (1, 2)}
    for row in rows:
        assert row["kills"] == sum(len(run["kills"]) for run in row["runs"]) >= 10
        assert all(run["same"] for run in row["runs"])


def figures_of(text):
    """Every `ACC / ASR`, and every `ACC / ASR (re-tuned ASR)`."""
    found = re.findall(r"(\d+\.\d) / (\d+\.\d)(?: \((?:re-tuned )?(\d+\.\d)\))?", " ".join(text.split()))
    return [tuple(filter(None, figure)) for figure in found]


def percent(measures, *names):
    return tuple(f"{100 * measures[name]:.1f}" for name in names or ("accuracy", "attack_success_rate"))


def measured_figures(lines):
    """Those of suspects, and of all points."""
    measured = set()
    for line in lines:
        measured |= {percent(line["before"][name]) for name in ("select", "report")}
        for point in (point for path in line["paths"] for point in path["points"]):
            for images in (point[name] for name in ("select", "report") if name in point):
                measured.add(percent(images))
                if "retuned" in point:
                    measured.add((*percent(images), *percent(point["retuned"], "attack_success_rate")))
    return measured


@pytest.mark.parametrize(
    ("results", "page"),
    [
        ("recipes/cifar10/results.jsonl", "docs/results/tables.md"),
        ("recipes/encoders/results.jsonl", "docs/results/encoders/tables.md"),
        ("recipes/benchmark/results.jsonl", "docs/benchmark/tables.md"),
    ],
)
def test_tables_are_those_of_the_lines(results, page):
    assert (ROOT / page).read_text(encoding="utf-8") == tables(read_lines(ROOT / results))


@pytest.mark.parametrize(
    ("results", "plan"),
    [
        ("recipes/cifar10/results.jsonl", "recipes/cifar10/plan.yaml"),
        ("recipes/encoders/results.jsonl", "recipes/encoders/plan.yaml"),
        ("recipes/benchmark/why.jsonl", "recipes/benchmark/why.yaml"),
    ],
)
def test_lines_are_of_cells_of_the_plan(results, plan):
    cells = {cell.id for cell in Plan.read(ROOT / plan).cells}
    assert {line["id"] for line in read_lines(ROOT / results)} <= cells


ENCODERS = "\n## Encoders and CLIP\n"


class TestResults:
    """docs/results.md and its tables, of the lines that the benchmark wrote."""

    LINES = read_lines(ROOT / "recipes/cifar10/results.jsonl")

    def test_figures_of_the_text_are_measured(self):
        text, _ = (ROOT / "docs/results.md").read_text(encoding="utf-8").split(ENCODERS)
        found = figures_of(text)
        assert len(found) > 20
        assert [figure for figure in found if figure not in measured_figures(self.LINES)] == []


class TestEncoders:
    """The part of docs/results.md on encoders and CLIP, of the lines that the benchmark wrote and of the commands."""

    LINES = read_lines(ROOT / "recipes/encoders/results.jsonl")
    COMMANDS = json.loads((ROOT / "docs/results/encoders/commands.json").read_text(encoding="utf-8"))
    BEFORE: ClassVar = {(line["model"], line["attack"]): line["before"]["report"] for line in LINES}
    missed = pytest.mark.xfail(reason="59.5 and 59.9 %: docs/results.md tells it", strict=True)

    @pytest.mark.parametrize("model", [pytest.param("resnet", marks=missed), "vit", "clip"])
    def test_suspects_are_as_accurate_as_the_recipe_asks_for(self, model):
        untrained = self.BEFORE["vit_untrained", "clean"]["accuracy"]
        lowest = {"resnet": 0.6, "vit": max(0.48, untrained + 0.1), "clip": 0.5}[model]
        assert all(measured["accuracy"] >= lowest for (name, _), measured in self.BEFORE.items() if name == model)

    def test_backdoors_are_what_the_recipe_asks_for(self):
        backdoored = [measured for (_, attack), measured in self.BEFORE.items() if attack != "clean"]
        assert len(backdoored) == 3
        assert all(measured["attack_success_rate"] >= 0.9 for measured in backdoored)

    def test_figures_of_the_text_are_measured(self):
        _, text = (ROOT / "docs/results.md").read_text(encoding="utf-8").split(ENCODERS)
        measured = measured_figures(self.LINES)
        measured |= {percent(told[when]) for told in self.COMMANDS.values() for when in ("before", "after")}
        found = figures_of(text)
        assert len(found) > 20
        assert [figure for figure in found if figure not in measured] == []


class TestBenchmark:
    """docs/benchmark.md and its tables, of the lines of the small benchmark."""

    LINES = read_lines(ROOT / "recipes/benchmark/results.jsonl")
    WHY = read_lines(ROOT / "recipes/benchmark/why.jsonl")
    TABLES = (ROOT / "docs/benchmark/tables.md").read_text(encoding="utf-8")
    PAGE = (ROOT / "docs/benchmark.md").read_text(encoding="utf-8").replace("**", "")

    def test_small_has_been_run_whole(self):
        cells = {cell.id for cell in Plan.read(ROOT / "recipes/benchmark/small.yaml").cells}
        assert cells <= {line["id"] for line in self.LINES}

    def test_means_of_the_page(self):
        rows = [[cell.strip() for cell in row.split("|")] for row in self.TABLES.splitlines() if "| 4 of 4 |" in row]
        figures = [[row[2], row[7], row[8], f"{row[12]} ({row[13]})"] for row in rows]  # ACC, ASR, re-tuned (twin's)
        for method in ("fine-tuning", "WiSE-FT", "FT-SAM", "FST", "ANP", "TSC", "ridge"):
            resnet, vit = (figure[1:] for figure in figures if figure[0] == method)
            assert f"| {' | '.join([method, *resnet, *vit])} |" in self.PAGE

    def test_rates_of_the_page(self):
        """Every `ASR → re-tuned ASR (its clean twin's)` in the tables by attack is that of a point."""
        lines = beside_twins(of_last_runs(self.LINES))
        points = [
            point for line in lines for path in line["paths"] for point in path["points"] if "retuned_twin" in point
        ]
        names = ("report", "retuned", "retuned_twin")
        measured = {tuple(f"{100 * point[name]['attack_success_rate']:.1f}" for name in names) for point in points}
        start = self.PAGE.index("| ResNet | SIG |")
        tables_by_attack = self.PAGE[start : self.PAGE.index("\n- ", start)]
        found = re.findall(r"(\d+\.\d) → (\d+\.\d) \((\d+\.\d)\)", tables_by_attack)
        assert len(found) == 48
        assert [rates for rates in found if rates not in measured] == []

    def test_figures_after_the_purification(self):
        start, end = (self.PAGE.index(head) for head in ("### An attacker who knows TSC", "### The same again"))
        found = figures_of(self.PAGE[start:end])
        assert len(found) == 39
        assert [figure for figure in found if figure not in measured_figures(self.LINES + self.WHY)] == []

    def test_sample_is_the_same_again(self):
        first = {line["id"]: line for line in self.LINES}
        sample = read_lines(ROOT / "recipes/benchmark/sample.jsonl")
        assert len(sample) == 5
        assert all({**line, "seconds": first[line["id"]]["seconds"]} == first[line["id"]] for line in sample)

    def test_hours_of_the_small_one(self):
        cells = {cell.id for cell in Plan.read(ROOT / "recipes/benchmark/small.yaml").cells}
        seconds = sum(line["seconds"]["all"] for line in self.LINES if line["id"] in cells)
        assert f"`seconds` of its lines add up to {seconds / 3600:.1f} hours" in self.PAGE


def test_table_of_evidence():
    """docs/results/evidence.md, and the counts of docs/evidence.md."""
    lines = read_lines(ROOT / "docs/results/evidence.jsonl")
    assert evidence.table(lines) == (ROOT / "docs/results/evidence.md").read_text(encoding="utf-8")
    page = (ROOT / "docs/evidence.md").read_text(encoding="utf-8")
    kinds = {
        "BadNets, plain and of an attacker who knows TSC": ("badnets",),
        "SIG, WaNet, adaptive blend": ("sig", "wanet", "adaptive_blend"),
        "clean twins": (evidence.CLEAN,),
    }
    assert len(lines) == sum(line["attack"] in attacks for attacks in kinds.values() for line in lines)
    for name, attacks in kinds.items():
        flagged = [line for line in lines if line["attack"] in attacks and line["flagged"] is not None]
        right = sum(line["flagged"] == line["target_label"] for line in flagged)
        counts = [sum(line["attack"] in attacks for line in lines), len(flagged), right if flagged else ""]
        assert f"| {' | '.join([name, *map(str, counts)])} |".replace("|  |", "| |") in page
