"""hf-tsc: purify, evaluate, spec, train-suspect, demo and benchmark on the command line."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, PreTrainedModel, ViTImageProcessorPil

from hf_tsc import __version__
from hf_tsc.architectures.table import as_text, read_table
from hf_tsc.baselines.registry import BASELINES
from hf_tsc.benchmark.estimate import estimate_seconds
from hf_tsc.benchmark.images import BenchmarkImages
from hf_tsc.benchmark.lines import read_lines
from hf_tsc.benchmark.plan import Plan
from hf_tsc.benchmark.results import write_results
from hf_tsc.benchmark.runner import cells_to_run, check_only, check_processes, lines_of, run_plan
from hf_tsc.captions import find_caption_column
from hf_tsc.cli_arguments import (
    POISON_RATES,
    AttackArguments,
    BaselineArguments,
    BenchmarkArguments,
    DemoArguments,
    EvaluateArguments,
    EvidenceArguments,
    HowToPush,
    ModelArguments,
    PurifyArguments,
    PushArguments,
    SpecArguments,
    SuspectArguments,
    TablesArguments,
    TaskArguments,
    command_parser,
    given_options,
    method_of,
    parse,
)
from hf_tsc.data import ImageData
from hf_tsc.demo import run_demo
from hf_tsc.derive import example_inputs, image_size, verify
from hf_tsc.dry_run import dry_run
from hf_tsc.errors import HfTscError, PurificationError, SomeFailedError, UsageError
from hf_tsc.evaluation import Attack
from hf_tsc.evidence.rows import NO_VERDICT, comparison_rows, trigger_rows
from hf_tsc.folders import REPORT_FILE
from hf_tsc.hub import Source, check_push, load_image_processor, load_model, push_folder, resolve_model
from hf_tsc.hub.folder import some
from hf_tsc.hub.push import check_folder_to_push
from hf_tsc.images import ImagePipeline
from hf_tsc.job import DataArguments
from hf_tsc.launching import launch
from hf_tsc.many import Order, Outcome, folders_of, purify_many, read_models
from hf_tsc.processes import (
    check_world_size,
    is_main_process,
    leave_processes,
    let_main_process_tell,
    on_main_process,
    silent_but_in_main_process,
    speaks_of,
    together,
    working_device,
)
from hf_tsc.report import PurificationReport
from hf_tsc.spec_text import describe_spec
from hf_tsc.specs import spec_of
from hf_tsc.suspects import (
    RECORD,
    Adaptive,
    Surrogate,
    SuspectConfig,
    adapt_suspect,
    backdoor_encoder,
    train_dual_encoder,
    train_encoder,
    train_suspect,
)
from hf_tsc.tasks import Classification, Encoding, is_classifier, is_dual_encoder, task_of
from hf_tsc.tasks.classes import check_labels
from hf_tsc.tasks.evaluate import evaluate_source, search_source
from hf_tsc.triggers import TRIGGERS
from hf_tsc.tsc_config import TSCConfig

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 failure, 2 wrong input, 4 accuracy budget missed, 130 interrupted.

    3 says that some of several models failed.
    """
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
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # the Trainer's own, which DDP tells of
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # which nobody writes to
    failed = False
    try:
        with silent_but_in_main_process():
            code = command(arguments[1:]) or 0
    except (HfTscError, OSError) as error:  # an OSError names its file: a full disk, a folder that may not be written
        if speaks_of(error):
            print(f"hf-tsc: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        else:
            let_main_process_tell()
        failed, code = True, getattr(error, "exit_code", HfTscError.exit_code)
    except KeyboardInterrupt:
        print("hf-tsc: interrupted; what has a checkpoint goes on with --resume", file=sys.stderr)
        return INTERRUPTED
    leave_processes(failed=failed)
    return code


def _usage() -> str:
    lines = [f"  {name:17} {(function.__doc__ or '').splitlines()[0]}" for name, function in COMMANDS.items()]
    return "\n".join(
        ["usage: hf-tsc COMMAND [options]", "", *lines, "", "hf-tsc COMMAND --help shows the options of a command."]
    )


def purify_command(argv: Sequence[str]) -> int | None:
    """Purify models of images, write the results to folders, and push them to the Hub."""
    method = method_of(argv)
    own = (TSCConfig,) if method == "tsc" else (BaselineArguments, BASELINES[method].settings)
    measures = (AttackArguments, EvidenceArguments, TaskArguments)
    types: tuple[type, ...] = (ModelArguments, DataArguments, PurifyArguments, PushArguments, *measures, *own)
    parser = command_parser(
        "purify", types, positional="MODEL", several=True, help="repo ids on the Hub, or folders (./x)"
    )
    known = sorted({entry.name for one in own for entry in fields(one)})
    advice = "no option of this command" if method == "tsc" else f"{method} knows --{', --'.join(known)}"
    model_args, data_args, args, push_args, attack_args, evidence_args, task_args, config, *_, rest = parse(
        parser, argv, advice=advice
    )
    if method != "tsc" and (args.accelerate_config is not None or args.num_processes is not None):
        raise UsageError(f"method {method} trains in one process: leave out --accelerate_config and --num_processes")
    if args.accelerate_config is not None:
        return launch(args.accelerate_config, ["purify", *argv], processes=args.num_processes)
    if args.num_processes is not None:
        raise UsageError(f"--num_processes {args.num_processes} goes with --accelerate_config: name one")
    check_world_size()
    with together():
        given, push = given_options(parser, argv), push_args.options()
        overrides = {k: v for k, v in given.items() if k in known and k != "output_dir"}
        models = [*rest.model, *(read_models(Path(args.from_file)) if args.from_file else [])]
        if not models:
            raise UsageError("MODEL is missing: name repo ids or folders, or a file of them with --from_file")
        if "output_dir" not in given and not args.dry_run:
            raise UsageError("--output_dir is missing: name the folder for the purified model")
        several, output = len(models) > 1 or args.from_file is not None, Path(config.output_dir)
        if several and push is not None and "{name}" not in push.repo_id:
            raise UsageError(f"--push_to_hub {push.repo_id}: for several models expected {{name}} in it")
        order = Order(
            data_args.open(token=model_args.use_token),
            model_args.access(),
            overrides,
            args.preset,
            method,
            args.budget,
            args.held_out,
            task_args.options(),
            data_args.open(args.test_split, token=model_args.use_token) if args.test_split else None,
            attack_args.attack(),
            push,
            evidence_args.settings(),
        )
    if args.dry_run:
        return on_main_process(lambda: _print_dry_runs(models, order, as_json=args.json))
    if several:
        folders = folders_of(models, output, order)
        _print_outcomes(purify_many(folders, order), len(folders), as_json=args.json)
        return None
    if args.json:
        _print_json(models[0], output, order, resume=args.resume)
        return None

    def show(report: PurificationReport) -> None:
        print(report_table(report))
        if report.evidence is not None:
            print(f"\n{evidence_table(report.evidence)}")
        for note in report.notes:
            print(f"note: {note}")
        print(f"\nThe purified model, its card and {REPORT_FILE} are in {output}", flush=True)

    outcome = order.run(models[0], output, resume=args.resume, purified=show)
    if outcome.pushed:
        print(_where(outcome.pushed))
    return None


def _where(pushed: Mapping[str, Any]) -> str:
    replaced = f"; it no longer has {some(pushed['replaced'])}" if pushed["replaced"] else ""
    repo = f"{'private' if pushed['private'] else 'public'} repo {pushed['repo_id']}"
    return f"and on the Hub, in the {repo}{replaced}: {pushed['url']}"


def _print_json(model: str, output: Path, order: Order, *, resume: bool) -> None:
    """One line for one model, of a failure, too; what else is said on the way goes to stderr."""
    started, stdout = time.monotonic(), sys.stdout
    error: HfTscError | OSError | None = None
    with redirect_stdout(sys.stderr):
        try:
            outcome = order.run(model, output, resume=resume)
        except (HfTscError, OSError) as raised:
            error, outcome = raised, Outcome.of_error(model, output, raised)
    timed = replace(outcome, seconds=round(time.monotonic() - started, 1))
    print(json.dumps(timed.to_dict()), file=stdout, flush=True)
    if error is not None:
        raise error


def _print_dry_runs(models: Sequence[str], order: Order, *, as_json: bool) -> None:
    failed = []
    for model in models:
        try:
            found = dry_run(model, order)
        except Exception as error:  # as in `purify_many`
            if len(models) == 1:
                raise
            failed.append(model)
            print(f"{model}: {' '.join(str(error).split())}", file=sys.stderr)
            continue
        if as_json:
            print(json.dumps(found.to_dict()))
        else:
            print("\n".join(f"{name:13} {text}" for name, text in found.rows()), end="\n\n")
    if failed:
        raise SomeFailedError(f"{len(failed)} of {len(models)} models cannot be purified: {', '.join(failed)}")


def _print_outcomes(outcomes: Iterable[Outcome], models: int, *, as_json: bool) -> None:
    """Each as it comes: on stdout a line of JSON, or of words; and a summary on stderr."""
    found, stdout = [], sys.stdout
    with redirect_stdout(sys.stderr if as_json else stdout):
        for number, outcome in enumerate(outcomes, 1):
            found.append(outcome)
            said = outcome.error or outcome.output
            line = f"[{number}/{models}] {outcome.model}: {outcome.status}, {outcome.seconds:.0f} s: {said}"
            print(json.dumps(outcome.to_dict()) if as_json else line, file=stdout, flush=True)
            for note in () if as_json else outcome.notes:
                print(f"    note: {note}")
    count = Counter(outcome.status for outcome in found)
    if is_main_process():
        print(", ".join(f"{n} {status}" for status, n in sorted(count.items())), file=sys.stderr)
    if failed := [outcome.model for outcome in found if outcome.status == "failed"]:
        raise SomeFailedError(f"{len(failed)} of {len(found)} models failed: {', '.join(failed)}")


def push_command(argv: Sequence[str]) -> None:
    """Push a purified model's folder to the Hub."""
    parser = command_parser("push", (HowToPush,), positional="FOLDER", help="what hf-tsc purify wrote")
    parser.add_argument("repo_id", metavar="REPO", help="repo id, owner/name")
    args, rest = parse(parser, argv)
    options = args.options_for(rest.repo_id)
    folder = Path(rest.folder)
    check_folder_to_push(folder)
    check_push(options, None)
    print(f"{folder} is {_where(asdict(push_folder(folder, options))).removeprefix('and ')}")


def report_table(report: PurificationReport) -> str:
    """Before and after, as text."""
    rows = [("measure", "images", "before", "after"), *((m, str(n), b, a) for m, n, b, a in report.rows())]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(f"{m:<{widths[0]}}  {n:>{widths[1]}}  {b:>{widths[2]}}  {a:>{widths[3]}}" for m, n, b, a in rows)


def evidence_table(evidence: Mapping[str, Any]) -> str:
    """What was searched for before and after, and how far the two models are apart, as text."""
    rows = [("without a trigger", "before", "after"), *trigger_rows(evidence["before"], evidence["after"])]
    rows += [(name, "", text) for name, text in comparison_rows(dict(evidence))]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [f"{name:<{widths[0]}}  {b:>{widths[1]}}  {a:>{widths[2]}}" for name, b, a in rows]
    return "\n".join([*lines, NO_VERDICT])


def evaluate_command(argv: Sequence[str]) -> None:
    """Measure accuracy, and with a trigger the attack success rate, of a model."""
    types = (ModelArguments, DataArguments, AttackArguments, EvidenceArguments, TaskArguments, EvaluateArguments)
    parser = command_parser("evaluate", types, positional="MODEL", help="repo id on the Hub, or a folder (./x, /x)")
    model_args, data_args, attack_args, evidence_args, task_args, args, rest = parse(parser, argv)
    search, attack = evidence_args.settings(), attack_args.attack()
    source = model_args.resolve(rest.model)
    probe_data = data_args.open(args.probe_split, token=model_args.use_token) if args.probe_split else None
    data, result = data_args.open(token=model_args.use_token), dict[str, Any]()
    device = working_device(use_cpu=args.use_cpu)
    if search is None or data.label_column is not None or find_caption_column(data) is not None:
        known: dict[str, Any] = {"attack": attack, "probe_data": probe_data, "options": task_args.options()}
        result = evaluate_source(source, data, device=device, **known)
    shown = sys.stderr.isatty()
    found = None if search is None else search_source(source, data, search, device=device, progress=shown)
    if args.json:
        print(json.dumps(result | ({} if found is None else {"evidence": found})))
        return
    for name, value in result.items():
        print(f"{name:22} {100 * value:.1f} %" if isinstance(value, float) else f"{name:22} {value}")
    if found is not None:
        print("\n".join([*(f"{name:28} {text}" for name, text in trigger_rows(found)), NO_VERDICT]))


def spec_command(argv: Sequence[str]) -> None:
    """Show the permutation symmetries of a model."""
    types = (ModelArguments, SpecArguments)
    parser = command_parser("spec", types, positional="MODEL", optional=True, help="repo id, or a folder (./x, /x)")
    model_args, args, rest = parse(parser, argv)
    if args.list:
        return _list_architectures(as_json=args.json)
    if rest.model is None:
        raise UsageError("MODEL is missing: name a repo id or a folder, or give --list for the known architectures")
    source = model_args.resolve(rest.model)
    config = json.loads((source.path / "config.json").read_text(encoding="utf-8"))
    auto_class = AutoModelForImageClassification if is_classifier(config) else AutoModel
    model, _ = load_model(source, auto_class=auto_class)
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
    types = (DataArguments, AttackArguments, SuspectArguments, Adaptive, SuspectConfig)
    help_text = "config.json of the model; the folder of a clean encoder (bad_encoder) or of a suspect (adaptive)"
    parser = command_parser("train-suspect", types, positional="CONFIG", help=help_text)
    data_args, attack_args, args, adaptive, config, rest = parse(parser, argv)
    given = given_options(parser, argv)
    if "output_dir" not in given:
        raise UsageError("--output_dir is missing: name the folder for the suspect")
    attack = attack_args.attack(to_train=True) if args.poison_rate != 0 else None
    if attack is None and args.poison_rate != 0:
        raise UsageError(
            f"--trigger is missing: name one of {', '.join(TRIGGERS)}, or give --poison_rate 0 for a clean model"
        )
    if args.surrogate is not None and (attack is None or not attack.trigger.poisoning.surrogate):
        raise UsageError(f"--surrogate {args.surrogate} is for {_with_surrogate()}")
    if args.kind != "adaptive" and (unused := [f.name for f in fields(Adaptive) if f.name in given]):
        raise UsageError(f"--{unused[0]} is for --kind adaptive")
    if args.kind in ("encoder", "bad_encoder") and "augmentation" not in given:
        config.augmentation = "simclr"
    if args.kind == "bad_encoder":
        if args.poison_rate:
            raise UsageError(f"--poison_rate {args.poison_rate:g} with --kind bad_encoder: it poisons no images")
        _train_bad_encoder(Path(rest.config), data_args.open(), config, attack)
    elif args.kind == "adaptive":
        _train_adaptive(Path(rest.config), data_args.open(), config, attack, args.poison_rate, adaptive)
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
    how = {"surrogate": _load_surrogate(Path(args.surrogate), data)} if args.surrogate and kind == "classifier" else {}
    trainers[kind](model_config, processor, data, args=config, attack=attack, poison_rate=rate, **how)


def _load_surrogate(folder: Path, data: ImageData) -> Surrogate:
    source, model = _load_classifier(folder, data, f"--surrogate {folder}", "a clean image classifier")
    return Surrogate(model, ImagePipeline(load_image_processor(source)), folder.name)


def _load_classifier(folder: Path, data: ImageData, what: str, expected: str) -> tuple[Source, PreTrainedModel]:
    source = resolve_model(str(folder), local=True)
    if (kind := task_of(source)) is not Classification:
        raise UsageError(f"{what} holds an {kind.kind}: expected {expected}")
    model, _ = load_model(source, auto_class=AutoModelForImageClassification)
    check_labels(data, model)
    return source, model.eval()


def _with_surrogate() -> str:
    return ", ".join(name for name, trigger in TRIGGERS.items() if trigger.poisoning.surrogate)


def _train_bad_encoder(folder: Path, data: ImageData, config: SuspectConfig, attack: Attack | None) -> None:
    if attack is None:
        raise UsageError("--poison_rate 0 with --kind bad_encoder: the clean twin is the encoder that it starts from")
    source = resolve_model(str(folder), local=True)
    if (kind := task_of(source)) is not Encoding:
        raise UsageError(f"{folder} holds an {kind.kind}: expected a clean image encoder")
    clean, _ = load_model(source, auto_class=AutoModel)
    Encoding.check_model(clean, source)
    backdoor_encoder(clean, load_image_processor(source), data, args=config, attack=attack)


def _train_adaptive(
    folder: Path,
    data: ImageData,
    config: SuspectConfig,
    attack: Attack | None,
    poison_rate: float | None,
    settings: Adaptive,
) -> None:
    if attack is None:
        raise UsageError("--poison_rate 0 with --kind adaptive: there is no backdoor to keep; give a share above 0")
    source, base = _load_classifier(folder, data, str(folder), "a backdoored image classifier")
    how: dict[str, Any] = {"args": config, "attack": attack, "poison_rate": poison_rate, "settings": settings}
    adapt_suspect(base, load_image_processor(source), data, **how)


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
    (args,) = parse(command_parser("demo", (DemoArguments,)), argv)
    run_demo(Path(args.output_dir), seed=args.seed, names=args.models)


def benchmark_command(argv: Sequence[str]) -> None:
    """Run the cells of a benchmark plan that have no result yet."""
    types = (DataArguments, BenchmarkArguments)
    parser = command_parser("benchmark", types, positional="PLAN", help="a YAML file; see recipes/cifar10/plan.yaml")
    data_args, args, rest = parse(parser, argv)
    plan, images = Plan.read(Path(rest.plan)), BenchmarkImages(data_args, args.test_split)
    check_only(plan, args.only)
    results, cache = Path(args.results), Path(args.cache_dir)
    check_processes(args.processes)
    if args.dry_run:
        lines = lines_of(images, results)
        cells = cells_to_run(plan, lines, args.only)
        seconds = estimate_seconds(cells, lines, images, cache, use_cpu=args.use_cpu)
        for cell in cells:
            print(cell)
        whole = sum(seconds.values()) / args.processes
        print(
            f"{len(cells)} of {len(plan.cells)} cells to run: about {whole / 60:.0f} minutes on {args.processes} "
            f"process(es), {seconds['suspects'] / args.processes / 60:.0f} of them for suspects"
        )
        return
    how = {"processes": args.processes, "only": args.only, "use_cpu": args.use_cpu}
    progress = run_plan(plan, images, results=results, cache=cache, **how)
    print(f"{progress.finished} cells finished, in {results}")
    if progress.failed:
        raise PurificationError(f"{len(progress.failed)} cells failed: {', '.join(progress.failed)}; see above")


def benchmark_tables_command(argv: Sequence[str]) -> None:
    """Make tables and pictures of a benchmark's results."""
    parser = command_parser(
        "benchmark-tables", (TablesArguments,), positional="RESULTS", help="file of results, JSON lines"
    )
    args, rest = parse(parser, argv)
    file = Path(rest.results)
    lines = read_lines(file)
    if not lines:
        what = "has no results" if file.is_file() else "does not exist"
        raise UsageError(f"{file} {what}: expected the file that hf-tsc benchmark writes")
    write_results(lines, Path(args.output_dir))


COMMANDS: dict[str, Callable[[Sequence[str]], int | None]] = {
    "purify": purify_command,
    "push": push_command,
    "evaluate": evaluate_command,
    "spec": spec_command,
    "train-suspect": train_suspect_command,
    "demo": demo_command,
    "benchmark": benchmark_command,
    "benchmark-tables": benchmark_tables_command,
}

if __name__ == "__main__":
    sys.exit(main())
