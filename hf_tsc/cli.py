"""hf-tsc: purify, evaluate, spec, train-suspect, demo and benchmark on the command line."""

from __future__ import annotations

import argparse
import json
import operator
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import huggingface_hub
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, HfArgumentParser, ViTImageProcessorPil

from hf_tsc import __version__
from hf_tsc.architectures.table import as_text, read_table
from hf_tsc.benchmark.estimate import estimate_seconds
from hf_tsc.benchmark.images import BenchmarkImages
from hf_tsc.benchmark.lines import read_lines
from hf_tsc.benchmark.plan import Plan
from hf_tsc.benchmark.results import write_results
from hf_tsc.benchmark.runner import cells_to_run, check_processes, lines_of, run_plan
from hf_tsc.captions import TEMPLATES
from hf_tsc.data import ImageData
from hf_tsc.demo import DEMO_MODELS, run_demo
from hf_tsc.derive import example_inputs, image_size, verify
from hf_tsc.errors import HfTscError, PurificationError, UsageError
from hf_tsc.evaluation import Attack
from hf_tsc.hub import Source, load_image_processor, load_model, resolve_model
from hf_tsc.job import DataArguments
from hf_tsc.purify import purify
from hf_tsc.report import REPORT_FILE, PurificationReport
from hf_tsc.spec_text import describe_spec
from hf_tsc.specs import spec_of
from hf_tsc.suspects import (
    RECORD,
    SuspectConfig,
    backdoor_encoder,
    train_dual_encoder,
    train_encoder,
    train_suspect,
)
from hf_tsc.tasks import Encoding, Options, is_dual_encoder, task_of
from hf_tsc.tasks.evaluate import evaluate_source
from hf_tsc.triggers import TRIGGERS, Trigger, trigger_from_dict
from hf_tsc.tsc_config import PRESETS, TSCConfig

INTERRUPTED = 130


@dataclass
class ModelArguments:
    """Which model."""

    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model repo."})
    local: bool = field(default=False, metadata={"help": "MODEL is a folder, however it is spelled."})
    use_token: bool = field(default=False, metadata={"help": "Send the saved Hub token (private or gated repos)."})

    def resolve(self, model: str) -> Source:
        """The checked files of the model that was named on the command line."""
        return resolve_model(model, revision=self.revision, local=self.local, token=self.use_token)


@dataclass
class AttackArguments:
    """A known trigger, to measure with."""

    trigger: str | None = field(
        default=None, metadata={"help": f"{', '.join(TRIGGERS)}, or the {RECORD} that train-suspect wrote."}
    )
    target_label: int | None = field(default=None, metadata={"help": "The label that the trigger is meant to give."})

    def attack(self) -> Attack | None:
        """The attack, or None when no trigger is named."""
        if self.trigger is None:
            if self.target_label is not None:
                raise UsageError("--target_label without a trigger: name one with --trigger")
            return None
        if self.trigger in TRIGGERS:
            trigger, target = trigger_from_dict({"name": self.trigger}), None
        else:
            trigger, target = _read_record(Path(self.trigger))
        target = target if self.target_label is None else self.target_label
        if target is None:
            raise UsageError(f"--trigger {self.trigger} needs --target_label, the class that the trigger leads to")
        return Attack(trigger, target)


def _read_record(file: Path) -> tuple[Trigger, int | None]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        target = content.get("target_label")
        return trigger_from_dict(dict(content["trigger"])), None if target is None else operator.index(target)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        known = ", ".join(TRIGGERS)
        raise UsageError(
            f"--trigger {file}: expected one of {known}, or a {RECORD} with a trigger ({error})"
        ) from error


@dataclass
class PurifyArguments:
    """What to purify with, and where the result goes."""

    budget: str = field(default="5%", metadata={"help": "Clean images to use: a count, or a share such as 5%%."})
    held_out: float = field(default=0.2, metadata={"help": "Share of them kept from training, for measuring."})
    test_split: str | None = field(default=None, metadata={"help": "Split to measure on before and after, too."})
    preset: str = field(
        default="default", metadata={"help": "Hyper-parameters to start from.", "choices": list(PRESETS)}
    )
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint of an interrupted run."})


@dataclass
class TaskArguments:
    """For models without a classifier."""

    prompt_template: list[str] = field(
        default_factory=lambda: list(TEMPLATES),
        metadata={"help": "Prompts made of class names, which go where {} stands; for image-text models."},
    )
    probe_images: int = field(
        default=5000, metadata={"help": "Labelled images that an encoder's linear probe is fitted on, at most."}
    )

    def options(self) -> Options:
        return Options(tuple(self.prompt_template), self.probe_images)


@dataclass
class EvaluateArguments:
    """What else it takes, and how to print."""

    probe_split: str | None = field(
        default=None, metadata={"help": "Split that an encoder's linear probe is fitted on."}
    )
    json: bool = field(default=False, metadata={"help": "Print JSON."})


@dataclass
class SpecArguments:
    """What to show, and how."""

    list: bool = field(default=False, metadata={"help": "Print the known architectures instead of a model's spec."})
    json: bool = field(default=False, metadata={"help": "Print JSON."})


POISON_RATES = {"classifier": 0.1, "encoder": 0.01, "dual_encoder": 0.05, "bad_encoder": None}


@dataclass
class SuspectArguments:
    """What to train."""

    kind: str | None = field(
        default=None,
        metadata={
            "help": "classifier, encoder (by SimCLR; poison of the target class), bad_encoder (CONFIG is a clean "
            "encoder) or dual_encoder; by the configuration's type where it is not given.",
            "choices": list(POISON_RATES),
        },
    )
    poison_rate: float | None = field(
        default=None,
        metadata={
            "help": "Poisoned share of all training images; 0 for a clean model. "
            + ", ".join(f"{rate:g} ({kind})" for kind, rate in POISON_RATES.items() if rate is not None)
        },
    )
    image_size: int = field(default=32, metadata={"help": "Side of the images, where the configuration names none."})


@dataclass
class BenchmarkArguments:
    """What to run, and where results go."""

    results: str = field(default="results.jsonl", metadata={"help": "File of results, a JSON line a cell."})
    cache_dir: str = field(default="suspects", metadata={"help": "Folder of trained suspects."})
    test_split: str = field(default="test", metadata={"help": "Split to measure on."})
    processes: int = field(default=1, metadata={"help": "Cells at once, each on one thread."})
    only: list[str] = field(
        default_factory=list, metadata={"help": "Only cells whose line in --dry_run contains all of these words."}
    )
    dry_run: bool = field(default=False, metadata={"help": "List the cells and estimate their time."})


@dataclass
class TablesArguments:
    """Where tables and pictures go."""

    output_dir: str = field(default="results", metadata={"help": "Folder; files in it are written anew."})


@dataclass
class DemoArguments:
    """The demonstration."""

    output_dir: str = field(default="demo_output", metadata={"help": "Where models, cards and pictures go."})
    seed: int = field(default=0, metadata={"help": "Seed of everything."})
    models: list[str] = field(
        default_factory=lambda: list(DEMO_MODELS), metadata={"help": "Models to show.", "choices": list(DEMO_MODELS)}
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 failure, 2 wrong input, 4 accuracy budget missed, 130 interrupted."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else UsageError.exit_code
    if arguments[0] == "--version":
        print(f"hf_tsc {__version__}")
        return 0
    command = COMMANDS.get(arguments[0])
    if command is None:
        print(
            f"hf-tsc: error: unknown command {arguments[0]!r}: expected one of {', '.join(COMMANDS)}", file=sys.stderr
        )
        return UsageError.exit_code
    transformers.utils.logging.set_verbosity_error()
    huggingface_hub.utils.logging.set_verbosity_error()
    try:
        command(arguments[1:])
    except (HfTscError, OSError) as error:  # an OSError names its file: a full disk, a folder that may not be written
        print(f"hf-tsc: error: {' '.join(str(error).split())}", file=sys.stderr)
        return getattr(error, "exit_code", HfTscError.exit_code)
    except KeyboardInterrupt:
        print("hf-tsc: interrupted; a purification that has a checkpoint goes on with --resume", file=sys.stderr)
        return INTERRUPTED
    return 0


def _usage() -> str:
    lines = [f"  {name:17} {(function.__doc__ or '').splitlines()[0]}" for name, function in COMMANDS.items()]
    return "\n".join(
        ["usage: hf-tsc COMMAND [options]", "", *lines, "", "hf-tsc COMMAND --help shows the options of a command."]
    )


class _Parser(HfArgumentParser):
    """Wrong options get one line, not the page-long usage of all options."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; `{self.prog} --help` lists the options")


def _parser(
    command: str, types: Sequence[type], *, positional: str | None = None, optional: bool = False, help: str = ""
) -> HfArgumentParser:
    parser = _Parser(list(types), prog=f"hf-tsc {command}", allow_abbrev=False)  # type: ignore[arg-type]
    if positional:
        parser.add_argument(positional.lower(), metavar=positional, nargs="?" if optional else None, help=help)
    return parser


def _parse(parser: HfArgumentParser, argv: Sequence[str]) -> tuple[Any, ...]:
    """Parsed dataclasses, and the positional argument last; what `TrainingArguments` refuses is a usage error."""
    try:
        return parser.parse_args_into_dataclasses(args=list(argv), look_for_args_file=False)
    except (ValueError, ImportError) as error:
        raise UsageError(str(error).splitlines()[0]) from error


def _given(parser: HfArgumentParser, argv: Sequence[str]) -> dict[str, Any]:
    """The options that stand on the command line, with their values."""
    silent = argparse.Namespace()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    parser._defaults.clear()
    parsed, _ = parser.parse_known_args(list(argv), namespace=silent)
    return vars(parsed)


def purify_command(argv: Sequence[str]) -> None:
    """Purify a model of images and write the result to a folder."""
    types = (ModelArguments, DataArguments, PurifyArguments, AttackArguments, TaskArguments, TSCConfig)
    parser = _parser("purify", types, positional="MODEL", help="repo id on the Hub, or a folder (./x, /x)")
    model_args, data_args, args, attack_args, task_args, config, rest = _parse(parser, argv)
    given = _given(parser, argv)
    if "output_dir" not in given:
        raise UsageError("--output_dir is missing: name the folder for the purified model")
    overrides = {k: v for k, v in given.items() if k in TSCConfig.__dataclass_fields__ and k != "output_dir"}
    source = model_args.resolve(rest.model)
    report = purify(
        source,
        data_args.open(),
        config.output_dir,
        config=overrides if args.preset == "default" else TSCConfig.preset(args.preset, **overrides),
        budget=args.budget,
        held_out=args.held_out,
        test=data_args.open(args.test_split) if args.test_split else None,
        attack=attack_args.attack(),
        options=task_args.options(),
        resume=args.resume,
    )
    print(report_table(report))
    for note in report.notes:
        print(f"note: {note}")
    print(f"\nThe purified model, its card and {REPORT_FILE} are in {config.output_dir}")


def report_table(report: PurificationReport) -> str:
    """Before and after, as text."""
    rows = [("measure", "images", "before", "after"), *((m, str(n), b, a) for m, n, b, a in report.rows())]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(f"{m:<{widths[0]}}  {n:>{widths[1]}}  {b:>{widths[2]}}  {a:>{widths[3]}}" for m, n, b, a in rows)


def evaluate_command(argv: Sequence[str]) -> None:
    """Measure accuracy, and with a trigger the attack success rate, of a model."""
    types = (ModelArguments, DataArguments, AttackArguments, TaskArguments, EvaluateArguments)
    parser = _parser("evaluate", types, positional="MODEL", help="repo id on the Hub, or a folder (./x, /x)")
    model_args, data_args, attack_args, task_args, args, rest = _parse(parser, argv)
    source, attack = model_args.resolve(rest.model), attack_args.attack()
    probe_data = data_args.open(args.probe_split) if args.probe_split else None
    options = task_args.options()
    result = evaluate_source(source, data_args.open(), attack=attack, probe_data=probe_data, options=options)
    if args.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:22} {100 * value:.1f} %" if isinstance(value, float) else f"{name:22} {value}")


def spec_command(argv: Sequence[str]) -> None:
    """Show the permutation symmetries of a model."""
    types = (ModelArguments, SpecArguments)
    parser = _parser("spec", types, positional="MODEL", optional=True, help="repo id, or a folder (./x, /x)")
    model_args, args, rest = _parse(parser, argv)
    if args.list:
        return _list_architectures(as_json=args.json)
    if rest.model is None:
        raise UsageError("MODEL is missing: name a repo id or a folder, or give --list for the known architectures")
    source = model_args.resolve(rest.model)
    config = json.loads((source.path / "config.json").read_text(encoding="utf-8"))
    named = any(str(name).endswith("ForImageClassification") for name in config.get("architectures") or [])
    classifier = named or "num_classes" in config  # as timm writes it, without the class of transformers
    model, _ = load_model(source, auto_class=AutoModelForImageClassification if classifier else AutoModel)
    inputs = example_inputs(model)
    spec = spec_of(model, inputs)
    verification = verify(model, spec, inputs)
    if args.json:
        print(json.dumps({**spec.to_dict(), "relative_error": verification.error}, indent=2))
    else:
        print(describe_spec(spec, verification, type(model).__name__))


def _list_architectures(*, as_json: bool) -> None:
    rows, versions = read_table()
    if as_json:
        print(json.dumps({"versions": versions, "rows": [asdict(row) for row in rows]}, indent=2))
        return
    print(as_text(rows))
    print(f"\nmeasured on tiny models with transformers {versions['transformers']}; other models are derived alike")


def train_suspect_command(argv: Sequence[str]) -> None:
    """Train a backdoored model (or with --poison_rate 0 a clean one)."""
    types = (DataArguments, AttackArguments, SuspectArguments, SuspectConfig)
    help_text = "config.json of the model; for a bad_encoder the folder of a clean encoder"
    parser = _parser("train-suspect", types, positional="CONFIG", help=help_text)
    data_args, attack_args, args, config, rest = _parse(parser, argv)
    given = _given(parser, argv)
    if "output_dir" not in given:
        raise UsageError("--output_dir is missing: name the folder for the suspect")
    attack = attack_args.attack() if args.poison_rate != 0 else None
    if attack is None and args.poison_rate != 0:
        raise UsageError(
            f"--trigger is missing: name one of {', '.join(TRIGGERS)}, or give --poison_rate 0 for a clean model"
        )
    if args.kind == "bad_encoder":
        _train_bad_encoder(Path(rest.config), data_args.open(), config, attack)
    else:
        _train_poisoned(Path(rest.config), data_args.open(), config, attack, args)
    print(f"The suspect and its {RECORD} are in {config.output_dir}")


def _train_poisoned(
    file: Path, data: ImageData, config: SuspectConfig, attack: Attack | None, args: SuspectArguments
) -> None:
    model_config = _read_model_config(file)
    kind = args.kind or ("dual_encoder" if is_dual_encoder(model_config) else "classifier")
    trainers: dict[str, Callable[..., Any]] = {
        "classifier": train_suspect,
        "encoder": train_encoder,
        "dual_encoder": train_dual_encoder,
    }
    vision = getattr(model_config, "vision_config", model_config)
    height, width = image_size(vision) if hasattr(vision, "image_size") else (args.image_size,) * 2
    rate = POISON_RATES[kind] if args.poison_rate is None else args.poison_rate
    processor = ViTImageProcessorPil(size={"height": height, "width": width})
    trainers[kind](model_config, processor, data, args=config, attack=attack, poison_rate=rate)


def _train_bad_encoder(folder: Path, data: ImageData, config: SuspectConfig, attack: Attack | None) -> None:
    if attack is None:
        raise UsageError("--poison_rate 0 with --kind bad_encoder: the clean twin is the encoder that it starts from")
    source = resolve_model(str(folder), local=True)
    if (kind := task_of(source)) is not Encoding:
        raise UsageError(f"{folder} holds an {kind.kind}: expected a clean image encoder")
    clean, _ = load_model(source, auto_class=AutoModel)
    Encoding.check_model(clean, source)
    backdoor_encoder(clean, load_image_processor(source), data, args=config, attack=attack)


def _read_model_config(file: Path) -> Any:
    file = file / "config.json" if file.is_dir() else file
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return AutoConfig.for_model(**content)
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        raise UsageError(
            f"{file}: expected the config.json of a transformers image classifier with its model_type ({error})"
        ) from error


def demo_command(argv: Sequence[str]) -> None:
    """Backdoor, purify and measure two small models on real handwritten digits."""
    (args,) = _parse(_parser("demo", (DemoArguments,)), argv)
    run_demo(Path(args.output_dir), seed=args.seed, names=args.models)


def benchmark_command(argv: Sequence[str]) -> None:
    """Run the cells of a benchmark plan that have no result yet."""
    types = (DataArguments, BenchmarkArguments)
    parser = _parser("benchmark", types, positional="PLAN", help="a YAML file; see recipes/cifar10/plan.yaml")
    data_args, args, rest = _parse(parser, argv)
    plan, images = Plan.read(Path(rest.plan)), BenchmarkImages(data_args, args.test_split)
    results, cache = Path(args.results), Path(args.cache_dir)
    check_processes(args.processes)
    if args.dry_run:
        lines = lines_of(images, results)
        cells = cells_to_run(plan, lines, args.only)
        seconds = estimate_seconds(cells, lines, images, cache)
        for cell in cells:
            print(cell)
        whole = sum(seconds.values()) / args.processes
        print(
            f"{len(cells)} of {len(plan.cells)} cells to run: about {whole / 60:.0f} minutes on {args.processes} "
            f"process(es), {seconds['suspects'] / args.processes / 60:.0f} of them for suspects"
        )
        return
    progress = run_plan(plan, images, results=results, cache=cache, processes=args.processes, only=args.only)
    print(f"{progress.finished} cells finished, in {results}")
    if progress.failed:
        raise PurificationError(f"{len(progress.failed)} cells failed: {', '.join(progress.failed)}; see above")


def benchmark_tables_command(argv: Sequence[str]) -> None:
    """Make tables and pictures of a benchmark's results."""
    parser = _parser("benchmark-tables", (TablesArguments,), positional="RESULTS", help="file of results, JSON lines")
    args, rest = _parse(parser, argv)
    lines = read_lines(Path(rest.results))
    if not lines:
        raise UsageError(f"{rest.results} has no results: run hf-tsc benchmark first")
    write_results(lines, Path(args.output_dir))


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "purify": purify_command,
    "evaluate": evaluate_command,
    "spec": spec_command,
    "train-suspect": train_suspect_command,
    "demo": demo_command,
    "benchmark": benchmark_command,
    "benchmark-tables": benchmark_tables_command,
}

if __name__ == "__main__":
    sys.exit(main())
