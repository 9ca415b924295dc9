"""`hf-tsc purify` after `kill -9`: what comes out has the same bits. The recipe's own script, with few kills."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))
kill_resume = pytest.importorskip("kill_resume")


def killed(folder: Path, family: str, **asked) -> list[str]:
    """Purify and kill; what each kill has left."""
    row = kill_resume.campaign(folder, family, seed=1, **asked)
    kills = [kill for run in row["runs"] for kill in run["kills"]]
    assert len(kills) == asked["kills"]
    assert row["resumes"] > 0
    assert [run["same"] for run in row["runs"]] == [True] * len(row["runs"])
    return [kill["left"] for kill in kills]


def test_killed_twice(tmp_path):
    assert set(killed(tmp_path, "resnet", kills=2, steps=4)) != {"nothing"}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("family", kill_resume.FAMILIES)
def test_killed_often(tmp_path, family, processes):
    left = killed(tmp_path, family, kills=8, steps=20, processes=processes)
    assert sum(" of 40" in one for one in left) > 3


def test_other_weights_are_told(tmp_path):
    """The comparison itself."""
    purification = kill_resume.Purification(tmp_path, 1)
    purification.output.mkdir()
    (purification.output / "tsc_report.json").write_text('{"curves": []}')
    outcomes = []
    for weights in (b"one", b"one", b"other"):
        purification.weights.write_bytes(weights)
        outcomes.append(purification.outcome())
    assert outcomes[0] == outcomes[1] != outcomes[2]
