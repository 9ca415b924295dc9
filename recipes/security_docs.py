"""Writes docs/security.md: what a repo or the Hub can do, and how each of it ends, from the tables of the tests.

Usage: python recipes/security_docs.py
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import hostile  # noqa: E402
import hostile_datasets  # noqa: E402
import hub_faults  # noqa: E402
from hostile import Answer, Happens, Refused, Row  # noqa: E402
from hub_faults import Done, Fails  # noqa: E402

PAGE = ROOT / "docs" / "security.md"
HEAD = """# Security

A suspect model is treated as hostile: its repo, its files, its card. So is a dataset. The Hub and the way to it may
fail at any step. This page lists what was tried, and how each of it ends. It is written by
`recipes/security_docs.py` from the tables that the tests compare with (`tests/hostile.py`,
`tests/hostile_datasets.py`, `tests/hub_faults.py`); a test compares the page with them.

## What is promised

Each row ends in one error of one line, or in a safe result. In none of them

- is code of a repo run, or a pickle loaded, or a program started;
- is a file written outside the caches, the temporary and the output folder;
- is a token sent where none was asked for, or to another server than the Hub;
- is another server asked than the Hub (one row below is an exception, and says so);
- is a weight accepted that is not in the commit that was pinned, that does not fit, or that is not finite.

A push that fails leaves the old commit or the new one, whole. So does one that is killed (`kill -9`) before, during
or after the transfer. Pushing the folder again then works. The weights on the Hub always are those of the report
beside them.

The purified folder holds no code, no pickle and no optimizer state. Its `config.json` keeps no attention
implementation, no `custom_pipelines` and no names of other places. Its card takes nothing from the suspect's card but
the name of a license.

## What is not shown

- The tests run the real client against a Hub of ours on 127.0.0.1. **They cannot show that huggingface.co answers in
  the same way today.** Xet transfers are not covered: our Hub speaks LFS only.
- Writes, programs and connections are seen through Python's audit events. What compiled code does by itself is not
  seen there; files outside the cache are also compared before and after.
- A bug in `torch`, `transformers`, `safetensors`, `tokenizers`, `datasets` or `Pillow` that runs code when a file is
  parsed is not caught by any of this. Use a machine or a container without secrets for models that you fear.
- Loading a dataset is the work of `datasets` (its counting of downloads at another server is turned off). The size of
  archives and of tables in a dataset has no limit, and the YAML of a dataset's card can be such that reading it takes
  hours.
- That the clean images are clean cannot be checked. Take them from a source that the model's author does not control.

## Models

Left, what is done; then how it ends as a repo of the Hub, and what had been downloaded by then; then how it ends as a
local folder.
"""
DATASETS = """## Datasets

Each dataset is opened, and all its pictures are read.
"""
FAULTS = """## When the Hub fails

Each cell says how it ends when the fault happens once / when it happens from then on.

- *done*: at the first try. A commit whose answer was lost is looked up, and not sent again.
- *retry*: done, after the step or the whole was tried again.
- *error*: one line that says what is on the Hub now. After it, the same push succeeds once the fault is gone.
- `-`: it cannot happen there (the answer has no body).

A status 429 is waited for as long as `Retry-After` asks. Where more than five minutes are asked for, that is an error;
but at the list of files, preupload and LFS `huggingface_hub` itself waits, however long. It asks for a file's header
once more at once. A request without an answer ends after two minutes. A pull that finds a whole copy of the commit in
the cache uses it, after its files were compared with their checksums, and says so; here the cache is empty.
"""


def words(answer: Answer) -> str:
    """An answer as a reader's words."""
    if answer is None:
        return "does not apply"
    if isinstance(answer, Refused):
        return f"refused: “{_cell(answer.says)}”"
    if isinstance(answer, Happens):
        return f"**not prevented**: {answer.words}"
    return f"safe: {answer.words}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("_", "\\_") if "`" not in text else text


def model_table(rows: list[Row]) -> str:
    """The rows of one group of `hostile.MODELS`."""
    lines = ["| what is done | as a Hub repo | downloaded by then | as a local folder |", "|---|---|---|---|"]
    for row in rows:
        local = "the same" if row.local is not None and words(row.local) == words(row.hub) else words(row.local)
        after = row.hub.after if row.hub is not None and not isinstance(row.hub, Happens) else ""
        lines.append(f"| {row.name} | {words(row.hub)} | {after} | {local} |")
    return "\n".join(lines) + "\n"


def dataset_table(rows: list[Row]) -> str:
    lines = ["| what is done | as a Hub repo | as a local folder |", "|---|---|---|"]
    for row in rows:
        local = "the same" if row.local is not None and words(row.local) == words(row.hub) else words(row.local)
        lines.append(f"| {row.name} | {words(row.hub)} | {local} |")
    return "\n".join(lines) + "\n"


def fault_table(steps: dict[str, str]) -> str:
    """All kinds of faults at all steps of a pull or a push."""
    lines = ["| | " + " | ".join(steps) + " |", "|---|" + "---|" * len(steps)]
    for kind in hub_faults.KINDS:
        cells = [_fates(step, kind) for step in steps]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _fates(step: str, kind: str) -> str:
    return " / ".join(dict.fromkeys(_fate(step, kind, once=once) for once in (True, False)))


def _fate(step: str, kind: str, *, once: bool) -> str:
    fate = hub_faults.fate(step, kind, once=once)
    if isinstance(fate, Done):
        return "retry" if fate.again else "done"
    return "error" if isinstance(fate, Fails) else "-"


def page() -> str:
    """The whole of docs/security.md."""
    groups = [f"### {name}\n\n{model_table(rows)}" for name, rows in hostile.MODELS.items()]
    datasets = f"{DATASETS}\n{dataset_table(hostile_datasets.DATASETS)}"
    pull, push = (f"### {name}\n\n{fault_table(steps)}" for name, steps in FAULT_STEPS.items())
    return "\n".join([HEAD, *groups, datasets, FAULTS, pull, push])


FAULT_STEPS = {"Pull": hub_faults.PULL, "Push": hub_faults.PUSH}

if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
