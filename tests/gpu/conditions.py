"""The conditions that every JSON file of a GPU run states: command, date, commit, versions and the card."""

import os
import shlex
import subprocess
import sys
from datetime import date
from pathlib import Path

import torch

from hf_specauf.records import environment

ROOT = Path(__file__).parents[2]


def commit() -> str:
    """The commit that is checked out, with `+changes` where files differ from it, or `unknown`."""
    words = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty=+changes", "--exclude=*"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        # A checkout on a GPU machine may come without `.git`. setup.sh reads this from the bundle.
        return os.environ.get("SPECAUF_COMMIT", "unknown")


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def conditions(device: str) -> dict:
    """What stands at the head of a record, as in the other files of `tests/benchmarks/results/`."""
    found = {
        "command": shlex.join(["python", *sys.argv]),
        "date": str(date.today()),
        "commit": commit(),
        "environment": environment(),
    }
    if device == "cpu":
        # `environment` names the card wherever there is one, and this run did not use it
        found["environment"]["hardware"] = f"CPU, {os.cpu_count()} cores"
        return found
    card = torch.cuda.get_device_properties(0)
    found["environment"]["card"] = {
        "name": card.name,
        "memory": card.total_memory,
        "compute_capability": f"{card.major}.{card.minor}",
        "cuda": torch.version.cuda,
    }
    return found
