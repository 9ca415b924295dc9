"""Evidence as rows of tables, from what a report holds of it."""

from __future__ import annotations

from typing import Any

Found = dict[str, Any]  # of one model
NONE = "none found"
UNSAID = "cannot be said"
NO_VERDICT = (
    "Evidence and no verdict: a model in which nothing stands out need not be clean, one in which something does need "
    "not be backdoored."
)


def trigger_rows(*models: Found) -> list[tuple[str, ...]]:
    """What was searched for in one model, or in several of a kind: a name, and a text for each."""
    columns = [_of_classes(one) if one["kind"] == "classes" else _of_encoder(one) for one in models]
    return [(name, *(column[name] for column in columns)) for name in columns[0]]


def _of_classes(found: Found) -> dict[str, str]:
    norm, median, index, chance = (found[key] for key in ("norm", "median", "index", "chance"))
    return {
        "smallest mask": NONE if norm is None else f"{norm:.1f} of {found['pixels']} pixels, class {found['easiest']}",
        "median of the classes": UNSAID if median is None else f"{median:.1f} pixels",
        "anomaly index": UNSAID if index is None else f"{index:.2f}",
        "as large an index by chance": UNSAID if chance is None else f"{100 * chance:.0f} %",
    }


def _of_encoder(found: Found) -> dict[str, str]:
    share, success = found["share"], found["success"]
    return {
        "smallest mask": NONE if share is None else f"{100 * share:.2f} % of the picture",
        "cosine between images with it": NONE if success is None else f"{success:.3f}",
        "cosine between clean images": f"{found['similarity']:.3f}",
    }


def comparison_rows(evidence: dict[str, Any]) -> list[tuple[str, str]]:
    """How far the purified model is from the suspect, of the evidence in a report."""
    agreement, rows = evidence["agreement"], list[tuple[str, str]]()
    if "top_1" in agreement:
        rows.append(("the suspect's answer given", f"{100 * agreement['top_1']:.1f} %"))
    if "cosine" in agreement:
        rows.append(("cosine to the suspect's features", f"{agreement['cosine']:.3f}"))
    rows.append(("loss barrier to the suspect", _barrier(evidence["barrier"])))
    if "aligned_barrier" in evidence:
        rows.append(("loss barrier, units re-aligned", _barrier(evidence["aligned_barrier"])))
    return rows


def _barrier(found: dict[str, Any]) -> str:
    if found["height"] is None:
        return f"the loss is not finite at t = {found['t']:g}"
    return f"{found['height']:.3f}" + (f" at t = {found['t']:g}" if found["height"] > 0 else "")
