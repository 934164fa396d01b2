"""Records of a run as JSON files, from which reports and cards are rendered; and how commands end on errors."""

import json
import math
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from datasets.exceptions import DatasetsError

PACKAGES = ("hf-specauf", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "huggingface-hub")


def environment() -> dict:
    """Versions and hardware of a run, without host, user or path names."""
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "hardware": torch.cuda.get_device_name() if cuda else f"CPU, {os.cpu_count()} cores",
        "processes": PartialState().num_processes,
    }


def _standard(value):
    # JSON knows no NaN: what was not measured is null
    if isinstance(value, dict):
        return {key: _standard(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_standard(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_record(path: str | Path, record: dict) -> None:
    """Write a JSON file whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(_standard(record), indent=2, default=str, allow_nan=False) + "\n")
    part.replace(path)


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """What a user can mend ends a command in one line; anything else keeps its traceback.

    Raises:
        SystemExit: with that line.
    """
    try:
        yield
    except DatasetsError as error:  # says which file only in its text, and why only in its cause
        causes = [str(cause) for cause in (error, error.__cause__) if cause is not None]
        raise SystemExit("error: the dataset cannot be read: " + " ".join(": ".join(causes).split())) from error
    except (ValueError, TypeError, OSError, FloatingPointError, yaml.YAMLError) as error:
        raise SystemExit("error: " + " ".join(str(error).split())) from error
