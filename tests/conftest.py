"""The environment of the tests: a loopback Hub, and Hugging Face libraries that know of nothing else."""

import os
import sys
import tempfile

import pytest
import torch
from loopback_hub import LoopbackHub

# The Hub's address is frozen when huggingface_hub is imported, so it must be known before.
assert "huggingface_hub" not in sys.modules, "conftest.py must run before anything imports huggingface_hub"
_HUB = LoopbackHub({})
_HOME = tempfile.TemporaryDirectory(prefix="hf_home_")
for _name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN_PATH"):
    os.environ.pop(_name, None)
os.environ |= {
    "HF_ENDPOINT": _HUB.endpoint,
    "HF_HOME": _HOME.name,
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "NO_PROXY": "127.0.0.1",
}
torch.set_num_threads(1)  # the models are tiny: threads only wait for each other, and for those of other workers


@pytest.fixture(scope="session")
def hub():
    """The Hub that the client of this process talks to; use a repo name of your own in each test."""
    return _HUB


def pytest_unconfigure():
    _HUB.close()
    _HOME.cleanup()
