"""The options of the command line, as dataclasses, and the parser that reads them."""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser

from hf_tsc.baseline_run import METHODS, SHARED
from hf_tsc.baselines.settings import LIMITS
from hf_tsc.captions import TEMPLATES
from hf_tsc.demo import DEMO_MODELS
from hf_tsc.errors import UsageError
from hf_tsc.evaluation import Attack
from hf_tsc.evidence.settings import EvidenceSettings
from hf_tsc.folders import REPORT_FILE
from hf_tsc.hub import PushOptions, Source
from hf_tsc.launching import CONFIGS
from hf_tsc.many import Access
from hf_tsc.suspects import RECORD, SuspectConfig
from hf_tsc.tasks import Options
from hf_tsc.triggers import NEXT, TRIGGERS, TargetLabel, Trigger, read_trigger, trigger_from_dict
from hf_tsc.tsc_config import DEPENDING_ON_THE_MODEL, PRESETS, TSCConfig


@dataclass
class ModelArguments:
    """Which model."""

    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model repo."})
    local: bool = field(default=False, metadata={"help": "MODEL is a folder, however it is spelled."})
    use_token: bool = field(default=False, metadata={"help": "Send the saved Hub token (private or gated repos)."})

    def access(self) -> Access:
        """How models are got."""
        return Access(self.revision, self.local, self.use_token)

    def resolve(self, model: str) -> Source:
        """The checked files of the model that was named on the command line."""
        source = self.access().resolve(model)
        for note in source.notes:
            print(f"note: {note}", file=sys.stderr)
        return source


@dataclass
class AttackArguments:
    """A known trigger, to measure with."""

    trigger: str | None = field(
        default=None, metadata={"help": f"{', '.join(TRIGGERS)}, the {RECORD} of train-suspect, or a {REPORT_FILE}."}
    )
    target_label: str | None = field(
        default=None,
        metadata={
            "help": f"The label that the trigger is meant to give; {NEXT} for the one after an image's own, modulo "
            "the number of classes (all-to-all)."
        },
    )

    def attack(self, *, to_train: bool = False) -> Attack | None:
        """The attack, or None when no trigger is named; one whose trigger is learnt, only `to_train`."""
        if self.trigger is None:
            if self.target_label is not None:
                raise UsageError("--target_label without a trigger: name one with --trigger")
            return None
        if self.trigger in TRIGGERS:
            trigger, target = trigger_from_dict({"name": self.trigger}), None
            if trigger.poisoning.learnt and not to_train:
                raise UsageError(
                    f"--trigger {self.trigger} is learnt with its suspect: name that one's {RECORD} instead"
                )
        else:
            trigger, target = _read_record(Path(self.trigger), to_train=to_train)
        target = target if self.target_label is None else _label(self.target_label)
        if target is None:
            raise UsageError(f"--trigger {self.trigger} needs --target_label, the class that the trigger leads to")
        return Attack(trigger, target)


def _label(text: str) -> TargetLabel:
    if text == NEXT:
        return NEXT
    try:
        return int(text)
    except ValueError as error:
        raise UsageError(f"--target_label {text}: expected the number of a class, or {NEXT}") from error


def _read_record(file: Path, *, to_train: bool) -> tuple[Trigger, TargetLabel | None]:
    try:
        return read_trigger(file, to_train=to_train)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        known = ", ".join(TRIGGERS)
        raise UsageError(
            f"--trigger {file}: expected one of {known}, or a {RECORD} or {REPORT_FILE} with a trigger ({error})"
        ) from error


@dataclass
class PurifyArguments:
    """What to purify with, and where the result goes."""

    budget: str = field(
        default="5%", metadata={"help": "Clean images to use: a count, or a share of the data set such as 5%%."}
    )
    held_out: float = field(default=0.2, metadata={"help": "Share of them kept from training, for measuring."})
    test_split: str | None = field(default=None, metadata={"help": "Split to measure on before and after, too."})
    preset: str = field(
        default="default", metadata={"help": "Hyper-parameters to start from.", "choices": list(PRESETS)}
    )
    method: str = field(
        default="tsc",
        metadata={
            "help": "What to purify by; a method other than tsc has options of its own, see `--method NAME --help`.",
            "choices": list(METHODS),
        },
    )
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint of an interrupted run."})
    accelerate_config: str | None = field(
        default=None,
        metadata={"help": f"Start several processes: {', '.join(CONFIGS)}, or a YAML file of `accelerate config`."},
    )
    num_processes: int | None = field(
        default=None, metadata={"help": "How many; by default what the accelerate_config says."}
    )
    from_file: str | None = field(default=None, metadata={"help": "File with further models, one a line."})
    json: bool = field(default=False, metadata={"help": "Print a JSON line a model."})
    dry_run: bool = field(
        default=False, metadata={"help": "Say what would be pulled and done, and what it would take; no weights."}
    )


@dataclass
class BaselineArguments:
    """What all methods besides tsc share."""

    output_dir: str = field(default="", metadata={"help": "Folder for the purified model."})
    seed: int = field(default=SHARED["seed"], metadata={"help": "Seed of everything that is drawn."})
    use_cpu: bool = field(default=False, metadata={"help": "Work on the CPU, whatever there is."})


@dataclass
class HowToPush:
    """Back to the Hub."""

    push_public: bool = field(default=False, metadata={"help": "Make a new repo public."})
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request on a repo that exists."})
    push_onto_suspect: bool = field(default=False, metadata={"help": "Allow the suspect's own repo."})

    def options_for(self, repo_id: str) -> PushOptions:
        return PushOptions(repo_id, not self.push_public, self.create_pr, self.push_onto_suspect)


@dataclass
class PushArguments(HowToPush):
    """Back to the Hub, or not."""

    push_to: str | None = field(  # the Trainer has an argument push_to_hub, of another meaning
        default=None,
        metadata={
            "help": "Repo id to push the result to; {name} in it stands for the suspect's own name.",
            "aliases": ["--push_to_hub"],
        },
    )

    def options(self) -> PushOptions | None:
        """None when nothing is to be pushed."""
        if self.push_to is None:
            if self.push_public or self.create_pr or self.push_onto_suspect:
                raise UsageError("--push_public, --create_pr and --push_onto_suspect go with --push_to_hub")
            return None
        return self.options_for(self.push_to)


@dataclass
class TaskArguments:
    """For models without a classifier."""

    prompt_template: list[str] = field(
        default_factory=lambda: list(TEMPLATES),
        metadata={"help": "Prompts made of class names, which go where {} stands; for image-text models."},
    )
    probe_images: int = field(
        default=Options().probe_images,
        metadata={"help": "Labelled images that an encoder's linear probe is fitted on, at most."},
    )

    def options(self) -> Options:
        return Options(tuple(self.prompt_template), self.probe_images)


@dataclass
class EvidenceArguments:
    """What can be said without a trigger."""

    evidence: bool = field(
        default=False,
        metadata={
            "help": "Search for triggers without knowing one (purify: before and after, and compare the two models). "
            "Takes minutes to hours a model: up to classes x restarts x epochs x images forward and backward passes."
        },
    )
    evidence_images: int = field(
        default=EvidenceSettings().images, metadata={"help": "Clean images that triggers are searched on, at most."}
    )
    evidence_restarts: int = field(
        default=EvidenceSettings().restarts, metadata={"help": "Searches for each class, or for the encoder."}
    )
    evidence_epochs: int | None = field(
        default=None, metadata={"help": "Passes over the images in a search, at most; by default as published."}
    )
    evidence_seed: int = field(default=EvidenceSettings().seed, metadata={"help": "Seed of the searches."})

    def settings(self) -> EvidenceSettings | None:
        """None when no evidence is asked for."""
        settings = EvidenceSettings(
            self.evidence_images, self.evidence_restarts, self.evidence_epochs, self.evidence_seed
        )
        if not self.evidence and settings != EvidenceSettings():
            raise UsageError(
                "--evidence_images, --evidence_restarts, --evidence_epochs and --evidence_seed go with --evidence"
            )
        return settings if self.evidence else None


@dataclass
class EvaluateArguments:
    """What else it takes, and how to print."""

    probe_split: str | None = field(
        default=None, metadata={"help": "Split that an encoder's linear probe is fitted on."}
    )
    json: bool = field(default=False, metadata={"help": "Print JSON."})
    use_cpu: bool = field(default=False, metadata={"help": "Work on the CPU, whatever there is."})


@dataclass
class SpecArguments:
    """What to show, and how."""

    list: bool = field(default=False, metadata={"help": "Print the known architectures instead of a model's spec."})
    json: bool = field(default=False, metadata={"help": "Print JSON."})


# None: of the trigger's own attack
POISON_RATES = {"classifier": None, "encoder": 0.01, "dual_encoder": 0.05, "bad_encoder": None, "adaptive": None}


@dataclass
class SuspectArguments:
    """What to train."""

    kind: str | None = field(
        default=None,
        metadata={
            "help": "classifier, encoder (by SimCLR; poison of the target class), bad_encoder (CONFIG is a clean "
            "encoder), dual_encoder or adaptive (CONFIG is a backdoored classifier, which is tuned to withstand TSC); "
            "by the configuration's type where it is not given.",
            "choices": list(POISON_RATES),
        },
    )
    poison_rate: float | None = field(
        default=None,
        metadata={
            "help": "Poisoned share of all training images; 0 for a clean model. As published for the trigger "
            "(classifier), "
            + ", ".join(f"{rate:g} ({kind})" for kind, rate in POISON_RATES.items() if rate is not None)
        },
    )
    image_size: int = field(default=32, metadata={"help": "Side of the images, where the configuration names none."})
    surrogate: str | None = field(
        default=None, metadata={"help": "Folder of a clean classifier of the same classes, for the trigger lc."}
    )


@dataclass
class BenchmarkArguments:
    """What to run, and where results go."""

    results: str = field(default="results.jsonl", metadata={"help": "File of results, a JSON line a cell."})
    cache_dir: str = field(default="suspects", metadata={"help": "Folder of trained suspects."})
    test_split: str = field(default="test", metadata={"help": "Split to measure on."})
    processes: int = field(default=1, metadata={"help": "Cells at once: a thread each, or on the same accelerator."})
    only: list[str] = field(
        default_factory=list, metadata={"help": "Only cells whose line in --dry_run contains all of these words."}
    )
    use_cpu: bool = field(default=False, metadata={"help": "Work on the CPU, whatever there is."})
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


_TRAINER_FIELDS = [*fields(TSCConfig), *fields(SuspectConfig)]
_BY_MODEL = [f for f in fields(TSCConfig) if f.name in DEPENDING_ON_THE_MODEL]
# Of the Trainer, which would publish half-purified weights.
_HUB_FIELDS = [f for f in _TRAINER_FIELDS if f.name.startswith("hub_") or f.name == "push_to_hub"]


class _Parser(HfArgumentParser):
    """Wrong options get one line, not the page-long usage of all options; those of `PushArguments` stand alone."""

    @staticmethod
    def _parse_dataclass_field(parser: Any, field: Any) -> None:
        if field in _HUB_FIELDS:
            parser.set_defaults(**{field.name: field.default})
        elif (
            field.type in (bool, "bool") and field not in _TRAINER_FIELDS
        ):  # so that a flag takes no MODEL for its value
            names = [f"--{name}" for name in dict.fromkeys((field.name, field.name.replace("_", "-")))]
            parser.add_argument(*names, action="store_true", help=field.metadata["help"])
        else:
            shown = copy.copy(field)  # the settings of baselines also keep their limits there
            shown.metadata = {key: value for key, value in field.metadata.items() if key not in LIMITS}
            if field in _BY_MODEL:  # in place of the default of a bare TSCConfig, which the formatter would add
                shown.metadata["help"] += " (default: as suits the model)%(default).0s"
            HfArgumentParser._parse_dataclass_field(parser, shown)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; `{self.prog} --help` lists the options")


def command_parser(
    command: str,
    types: Sequence[type],
    *,
    positional: str | None = None,
    optional: bool = False,
    several: bool = False,
    help: str = "",
) -> HfArgumentParser:
    parser = _Parser(list(types), prog=f"hf-tsc {command}", allow_abbrev=False)  # type: ignore[arg-type]
    if positional:
        parser.add_argument(
            positional.lower(), metavar=positional, nargs="*" if several else "?" if optional else None, help=help
        )
    return parser


def parse(
    parser: HfArgumentParser, argv: Sequence[str], *, advice: str = "no option of this command"
) -> tuple[Any, ...]:
    """Parsed dataclasses, and the positional argument last; what `TrainingArguments` refuses is a usage error.

    `advice` is said of an option that is unknown.
    """
    try:
        *parsed, unused = parser.parse_args_into_dataclasses(
            args=list(argv), look_for_args_file=False, return_remaining_strings=True
        )
        if unused:
            unknown = unused[0].startswith("-")
            where = "not expected here; what is no option goes before all options, images go by --dataset_name"
            parser.error(f"{' '.join(unused)}: {advice if unknown else where}")
        return tuple(parsed)
    except (ValueError, ImportError) as error:
        raise UsageError(str(error).splitlines()[0]) from error


def method_of(argv: Sequence[str]) -> str:
    """The method that a command line names: its options depend on it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--method", default="tsc", nargs="?")
    found = parser.parse_known_args(list(argv))[0].method
    return found if found in METHODS else "tsc"


def given_options(parser: HfArgumentParser, argv: Sequence[str]) -> dict[str, Any]:
    """The options that stand on the command line, with their values."""
    silent = argparse.Namespace()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    parser._defaults.clear()
    parsed, _ = parser.parse_known_args(list(argv), namespace=silent)
    return vars(parsed)
