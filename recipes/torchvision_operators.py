"""Makes `import torchvision` work beside a torch that its binary was not built for.

    import torchvision_operators                                                            # before transformers
    PYTHONPATH=recipes python -m pytest -p torchvision_operators tests/test_timm.py

Where torchvision imports, as it does from a pair of wheels that belong together, or is not installed, nothing is
changed. Where it says "operator torchvision::nms does not exist", the operators that it describes are declared,
without an implementation: enough for every model that does not call them, which are all of timm's.
"""

from __future__ import annotations

import sys
from contextlib import suppress

import torch

OPERATORS = ("nms", "qnms")
try:
    with suppress(ModuleNotFoundError):
        import torchvision
except RuntimeError:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")  # kept, for its operators go when it goes
    for operator in OPERATORS:
        library.define(f"{operator}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    import torchvision  # noqa: F401
