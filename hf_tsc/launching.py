"""Starting a command in several processes, by `accelerate launch` and one of the configurations that come along."""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from hf_tsc.errors import UsageError

CONFIGS = ("single_gpu", "multi_gpu", "multi_cpu", "fsdp2")
OPTIONS = ("accelerate_config", "num_processes")  # of the command that is started; its processes do not get them


def launch(config: str, argv: Sequence[str], *, processes: int | None = None) -> int:
    """Run `hf-tsc` in the processes of an accelerate configuration, and wait for them.

    Args:
        config: one of `CONFIGS`, or a YAML file as `accelerate config` writes it.
        argv: the arguments of `hf-tsc`; those in `OPTIONS` are left out.
        processes: how many; by default what the configuration says.

    Returns:
        The exit code of the process that failed first, 0 if none did.

    Raises:
        UsageError: there is no such configuration, or this is such a process already.
    """
    if "WORLD_SIZE" in os.environ:
        raise UsageError(
            f"--accelerate_config {config}: this is one of several processes already (WORLD_SIZE is set); leave the "
            "option away under `accelerate launch` and `torchrun`"
        )
    if processes is not None and processes < 1:
        raise UsageError(f"--num_processes {processes}: expected 1 or more")
    file = config_file(config)
    settings = _read(file)
    count = processes or settings.get("num_processes", 1)
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise UsageError(
            f"--accelerate_config {file} has num_processes: {count}, expected a whole number of 1 or more"
        )
    on_cpu = bool(settings.get("use_cpu"))
    threads = max(1, (os.cpu_count() or 1) // count) if on_cpu else 1
    options = [
        "--config_file",
        str(file),
        "--num_processes",
        str(count),
        "--num_cpu_threads_per_process",
        str(threads),
    ]
    # accelerate starts the processes of such a configuration, and does not tell them to stay off accelerators
    program = ["--module", "hf_tsc.cli", *_without_options(argv), *(["--use_cpu"] if on_cpu else [])]
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the processes tell what has failed
    try:
        launch_command(launch_command_parser().parse_args([*options, *program]))
    except ValueError as error:
        raise UsageError(f"--accelerate_config {file}: {' '.join(str(error).split())[:300]}") from error
    except ChildFailedError as error:
        return _exit_code(error.get_first_failure()[1].exitcode)
    except subprocess.CalledProcessError as error:
        return _exit_code(error.returncode)
    return 0


def config_file(config: str) -> Path:
    """The file of a configuration."""
    if config in CONFIGS:
        return Path(str(files("hf_tsc") / "accelerate_configs" / f"{config}.yaml"))
    if Path(config).is_file():
        return Path(config)
    raise UsageError(
        f"--accelerate_config {config}: expected one of {', '.join(CONFIGS)}, or a YAML file of accelerate"
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"--accelerate_config {file} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise UsageError(f"--accelerate_config {file}: expected a YAML file as `accelerate config` writes it")
    return settings


def _without_options(argv: Sequence[str]) -> list[str]:
    """The arguments without `OPTIONS` and their values."""
    names = {f"--{spelled}" for name in OPTIONS for spelled in (name, name.replace("_", "-"))}
    kept, skip = list[str](), False
    for argument in argv:
        if skip or argument.split("=")[0] in names:
            skip = not skip and "=" not in argument
            continue
        kept.append(argument)
    return kept


def _exit_code(code: int) -> int:
    """As a shell tells it: that of a process ended by a signal is negative."""
    return code if code >= 0 else 128 - code
