"""Search the suspects of a benchmark, and their clean twins, for triggers: would it have told them apart?

    python recipes/evidence.py --cache_dir suspects --dataset_name uoft-cs/cifar10 --image_column_name img \\
        --dataset_split "train[28000:]"

writes a JSON line a model to docs/results/evidence.jsonl, and the table beside it. Models that have their line are not
searched again. The images have to be clean, and such as the suspects have not seen; the search does not read the
records of the suspects, which only say afterwards whether it was right. One model takes about as long as its training:
run several at once, with an `--output` each and one thread (OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import json
import sys
import time
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from hf_tsc.benchmark.lines import open_lines, read_lines
from hf_tsc.cli_arguments import parse
from hf_tsc.data import ImageData
from hf_tsc.errors import UsageError
from hf_tsc.evidence.gather import flat_evidence
from hf_tsc.evidence.settings import EvidenceSettings
from hf_tsc.folders import RECORD
from hf_tsc.hub import load_image_processor, load_model, resolve_model
from hf_tsc.images import ImagePipeline, pixel_dataset
from hf_tsc.job import DataArguments
from hf_tsc.report import environment
from hf_tsc.tasks import task_of
from hf_tsc.triggers import NEXT

OUTPUT = Path(__file__).resolve().parent.parent / "docs" / "results" / "evidence.jsonl"
CLEAN = "clean twin"
HEAD = [
    "| model | attack | models | smallest mask, share of the picture | index | index above 2 | of these, the target |",
    "|---|---|---:|---|---|---:|---:|",
]


def line_id(folder: Path, settings: EvidenceSettings) -> str:
    """Of a model and the settings of the search."""
    return "-".join([folder.name, *(str(value) for value in asdict(settings).values())])


def search(folder: Path, data: ImageData, settings: EvidenceSettings) -> dict[str, Any]:
    """The line of one model."""
    started, source = time.monotonic(), resolve_model(str(folder), local=True)
    kind = task_of(source)
    model, _ = load_model(source, auto_class=kind.auto_class)
    images = pixel_dataset(data, np.arange(len(data.rows)), ImagePipeline(load_image_processor(source)))
    found = flat_evidence(model, None, images, kind=kind, settings=settings)
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    trigger, target = record["trigger"], record["target_label"]
    return {
        "id": line_id(folder, settings),
        "model": type(model).__name__,
        "attack": CLEAN if trigger is None else trigger["name"] + (", all-to-all" if target == NEXT else ""),
        "target_label": target,
        "seed": record["seed"],
        "settings": asdict(settings),
        **{key.removeprefix("suspect_"): value for key, value in found.items()},
        "dataset": {key: value for key, value in data.describe().items() if key in ("name", "fingerprint", "split")},
        "seconds": round(time.monotonic() - started, 1),
        "environment": environment(torch.device("cpu")),
    }


def table(lines: Iterable[dict[str, Any]]) -> str:
    """A row for each architecture and attack, clean twins last, as markdown."""
    groups: dict[tuple[str, bool, str], list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["model"], line["attack"] == CLEAN, line["attack"]), []).append(line)
    rows = []
    for (model, _, attack), group in sorted(groups.items()):
        shares = [share for line in group if (share := _share(line)) is not None]
        indices = [line["index"] for line in group if line.get("index") is not None]
        flagged = [line for line in group if line.get("flagged") is not None]
        right = sum(line["flagged"] == line["target_label"] for line in flagged)
        cells = [model, attack, str(len(group)), _spread(shares, 100, " %"), _spread(indices, 1, "")]
        told = [f"{len(flagged)} of {len(indices)}" if indices else "", str(right) if attack != CLEAN else ""]
        rows.append(f"| {' | '.join([*cells, *told])} |")
    return "\n".join([*HEAD, *rows]) + "\n"


def _share(line: dict[str, Any]) -> float | None:
    if line["kind"] == "encoder":
        return line["share"]
    return None if line["norm"] is None else line["norm"] / line["pixels"]


def _spread(values: list[float], factor: float, unit: str) -> str:
    """Mean (range)."""
    scaled = [factor * value for value in values]
    return f"{mean(scaled):.2f}{unit} ({min(scaled):.2f} to {max(scaled):.2f})" if scaled else "none found"


def main(argv: list[str] | None = None) -> None:
    """Search what has no line yet, and write the table."""
    types: Any = (DataArguments, EvidenceSettings)
    parser = HfArgumentParser(types, description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--cache_dir", type=Path, required=True, help="folder of suspects, as of `hf-tsc benchmark`")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="file of JSON lines; the table goes to its .md")
    parser.add_argument("--only", nargs="*", default=[], help="only folders whose names contain all of these words")
    data_args, settings, args = parse(parser, sys.argv[1:] if argv is None else argv)
    folders = sorted(record.parent for record in args.cache_dir.glob(f"*/{RECORD}"))
    chosen = [folder for folder in folders if all(word in folder.name for word in args.only)]
    if not chosen:
        raise UsageError(f"{args.cache_dir}: expected folders with a {RECORD} and {args.only} in their names")
    data = data_args.open()
    with open_lines(args.output) as lines:
        done = {line["id"] for line in read_lines(args.output)}
        missing = [folder for folder in chosen if line_id(folder, settings) not in done]
        for folder in tqdm(missing, unit=" models"):
            lines.add(search(folder, data, settings))
    args.output.with_suffix(".md").write_text(table(read_lines(args.output)), encoding="utf-8")


if __name__ == "__main__":
    main()
