"""Install the built wheel into an empty folder and use it from there: package data must be inside.

Usage: python tests/try_wheel.py DIST_FOLDER
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

CHECK = """
import importlib.resources as resources, pathlib, sys
import hf_tsc
from hf_tsc.cli import main
home = pathlib.Path(hf_tsc.__file__).parent
assert str(home).startswith(sys.argv[1]), home
assert (home / "py.typed").is_file()
assert (resources.files("hf_tsc") / "templates" / "model_card.md").read_text()
from transformers import ViTConfig, ViTForImageClassification
sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
config = ViTConfig(**sizes, image_size=16, patch_size=8)
ViTForImageClassification(config).save_pretrained("model")
sys.exit(main(["spec", "./model"]))
"""


def main() -> None:
    """Install, run, and fail with the subprocess."""
    (wheel,) = Path(sys.argv[1]).glob("*.whl")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder).resolve() / "site"
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*install, "--target", str(target), str(wheel)], check=True)
        environment = {**os.environ, "PYTHONPATH": str(target)}
        run = [sys.executable, "-c", CHECK, str(target)]
        subprocess.run(run, check=True, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    print(f"{wheel.name} works outside the repository")


if __name__ == "__main__":
    main()
