"""The table of architectures: what is derived for each variant's tiny model, and how exactly it keeps the function.

    python -m hf_tsc.architectures.table docs/architectures.md

measures every variant, and writes the table beside this module (where `hf-tsc spec --list` reads it) and as a page.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm

from hf_tsc.architectures.variants import VARIANTS, Variant
from hf_tsc.derive import derive_spec, example_inputs, verify
from hf_tsc.derive.verify import Verification
from hf_tsc.permutation import KINDS, PermutationSpec

TABLE = Path(__file__).with_name("table.json")


@dataclass(frozen=True)
class Row:
    """One variant.

    Attributes:
        variant: its name.
        architecture: the class of the model.
        spaces: how many spaces of each kind its spec has.
        frozen_share: share of the parameters of the tiny model that no permutation moves.
        error: relative change of the outputs when all spaces move at once, in float64.
        control: the same with one axis left behind.
        casts: the network casts to float32 inside, so that `error` is that of float32.
        unknown_ops: operators without a rule.
    """

    variant: str
    architecture: str
    spaces: dict[str, int]
    frozen_share: float
    error: float
    control: float | None
    casts: bool
    unknown_ops: tuple[str, ...]

    @property
    def count(self) -> int:
        """How many spaces there are."""
        return sum(self.spaces.values())


def measure(variant: Variant, *, seed: int = 0) -> Row:
    """Derive and verify the spec of a variant's tiny model.

    Raises:
        PurificationError: its graph cannot be exported, or its spec does not verify.
    """
    torch.manual_seed(seed)
    model = variant.build().eval()
    inputs = example_inputs(model)
    spec = derive_spec(model, inputs)
    return row_of(variant.name, model, spec, verify(model, spec, inputs))


def row_of(name: str, model: torch.nn.Module, spec: PermutationSpec, found: Verification) -> Row:
    """What the table says of a model."""
    kinds = Counter(space.kind for space in spec.spaces.values())
    return Row(
        variant=name,
        architecture=type(model).__name__,
        spaces={kind: kinds[kind] for kind in KINDS if kinds[kind]},
        frozen_share=round(frozen_share(spec, model), 4),
        error=float(f"{found.error:.1e}"),
        control=None if found.control is None else float(f"{found.control:.1e}"),
        casts=spec.casts,
        unknown_ops=spec.unknown_ops,
    )


def frozen_share(spec: PermutationSpec, model: torch.nn.Module) -> float:
    """Share of a model's parameters in tensors that no space acts on."""
    moved = {name for name, _ in spec.moved()}
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return sum(size for name, size in sizes.items() if name not in moved) / sum(sizes.values())


def write_table(rows: Sequence[Row], file: Path = TABLE) -> None:
    """Write rows, and with which versions they were measured, as JSON."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    content = {"versions": versions, "rows": [asdict(row) for row in rows]}
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_table(file: Path = TABLE) -> tuple[list[Row], dict[str, str]]:
    """The rows that come with the package, and the versions they were measured with."""
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    rows = [Row(**{**row, "unknown_ops": tuple(row["unknown_ops"])}) for row in content["rows"]]
    return rows, content["versions"]


def cells(row: Row) -> tuple[str, ...]:
    """A row as text: variant, class, number of spaces, their kinds, frozen share, error."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in row.spaces.items())
    error = f"{row.error:.0e}{' (casts to float32)' if row.casts else ''}"
    return row.variant, row.architecture, str(row.count), kinds, f"{100 * row.frozen_share:.0f} %", error


HEADER = ("variant", "class", "spaces", "of these", "frozen", "error")


def as_text(rows: Iterable[Row]) -> str:
    """The table for a terminal."""
    lines = [HEADER, *map(cells, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def as_markdown(rows: Iterable[Row], versions: dict[str, str]) -> str:
    """The table as a page of documentation."""
    body = "\n".join(f"| {' | '.join(cells(row))} |" for row in rows)
    return PAGE.format(header=" | ".join(HEADER), rule=" | ".join("---" for _ in HEADER), body=body, **versions)


PAGE = """# Architectures

Every image classifier and every dual encoder for zero-shot classification in transformers {transformers} that runs
without further packages, and some backbones, each with the configuration switches that change its symmetry. A model
that is not here is not refused: its spec is derived in the same way, and used only if it is seen to keep the function
of that very model.

For every row a tiny model is made from a configuration, its permutation spec is derived from its graph, and all
weights and statistics are drawn at random in float64. `spaces` are the sets of interchangeable units, `frozen` is the
share of the tiny model's parameters that no permutation moves, and `error` is the relative change of the outputs when
all spaces move at once. Outputs (logits; image and text embeddings; the last hidden state of a headless encoder) stay
fixed.

Not supported: `dinat` (needs the package natten); of `shieldgemma2` only the vision tower.

| {header} |
| {rule} |
{body}

Made by `python -m hf_tsc.architectures.table docs/architectures.md` (`make architectures`) with torch {torch} and
transformers {transformers}; `hf-tsc spec --list` prints the table. A test compares every row with what is derived.
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="markdown file to write")
    page = parser.parse_args(argv).page
    rows = [measure(variant) for variant in tqdm(VARIANTS.values(), desc="architectures")]
    write_table(rows)
    page.write_text(as_markdown(*read_table()), encoding="utf-8")


if __name__ == "__main__":
    main()
