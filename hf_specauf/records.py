"""Records of a run as JSON files, from which reports and cards are rendered; and how commands end
on errors."""

import json
import math
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from datasets.exceptions import DatasetsError
from httpx2 import HTTPError
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

PACKAGES = (
    "hf-specauf",
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "datasets",
    "huggingface-hub",
)

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# Keys that name places, people, tokens or ways of showing, and change nothing in the drafter; and
# the old names that transformers still mirrors (`gradient_checkpointing*` is
# `activation_checkpointing*`)
NOT_PUBLIC = re.compile(
    r"output_dir|run_name|report_to|resume_from_checkpoint|hub_.*|push_to_hub|project|trackio_.*|disable_tqdm|"
    r".*_logging_dir|save_total_limit|logging_.*|log_level.*|local_rank|_n_gpu|deepspeed_plugin|.*_token|"
    r"gradient_checkpointing.*"
)


def public(value):
    """A record without the keys of `NOT_PUBLIC`, and without local paths: a path becomes its last
    part."""
    if isinstance(value, dict):
        return {key: public(part) for key, part in value.items() if not NOT_PUBLIC.fullmatch(key)}
    if isinstance(value, list):
        return [public(part) for part in value]
    if not isinstance(value, str):
        return value
    parts = value.split(" + ")  # the sources of a mixture
    local = [part.startswith(("/", "~", "./", "../")) or os.path.exists(part) for part in parts]
    return " + ".join(Path(part).name if is_local else part for part, is_local in zip(parts, local))


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


def part_of(path: Path) -> Path:
    """A file's name while this process writes it. Several processes may write the same file."""
    return path.with_name(f"{path.name}.{os.getpid()}.part")


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = part_of(path)
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        # On the disk before it is renamed: a file must not be there and empty after a power cut.
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def write_record(path: str | Path, record: dict) -> None:
    """Write a JSON file whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_standard(record), indent=2, default=str, allow_nan=False) + "\n"
    write_whole(path, text)


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """What a user can mend ends a command in one line; anything else keeps its traceback.

    Raises:
        SystemExit: with that line.
    """
    try:
        yield
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise SystemExit(f"error: {unreachable(error)}") from error
    except HfHubHTTPError as error:
        raise SystemExit(f"error: {hub_words(error)}") from error
    except DatasetsError as error:  # says which file only in its text, and why only in its cause
        causes = [str(cause) for cause in (error, error.__cause__) if cause is not None]
        raise SystemExit(
            "error: the dataset cannot be read: " + " ".join(": ".join(causes).split())
        ) from error
    except (ValueError, TypeError, OSError, FloatingPointError, yaml.YAMLError, HTTPError) as error:
        words = unreachable(error) if isinstance(error, HTTPError) else " ".join(str(error).split())
        raise SystemExit(f"error: {words}") from error


def unreachable(error: Exception) -> str:
    """No network, in one line."""
    return (
        f"the Hub at {constants.ENDPOINT} cannot be reached, and nothing was changed"
        f" ({' '.join(str(error).split())})"
    )


def hub_words(error: HfHubHTTPError) -> str:
    """A refusal of the Hub in one line: what it means and what mends it."""
    status = error.response.status_code if error.response is not None else None
    said = error.server_message or ""
    if isinstance(error, GatedRepoError):
        words = (
            "access to this repository is restricted: ask for it on its page, then log in with `hf"
            " auth login`"
        )
    elif isinstance(error, RevisionNotFoundError):
        words = "the repository has no such branch, tag or commit: check --revision"
    elif isinstance(error, RepositoryNotFoundError):
        words = (
            "there is no such repository, or it is private and your token may not see it: check its"
            " name, log in"
        )
    elif isinstance(error, EntryNotFoundError):
        words = "the repository lacks a file that a drafter needs"
    elif status == 401:
        words = "the Hub does not accept the token: log in with `hf auth login`, or set HF_TOKEN"
    elif status == 403:
        words = (
            "the token may not do this: use one with write access to that owner, or propose it with"
            " --create-pr"
        )
    else:
        words = (
            "the Hub refused; what was made locally is kept, and the same command can be tried"
            " again"
        )
    url = "" if error.response is None else str(error.response.url).split("?")[0]
    return " ".join(f"{words} ({status}: {said} {url})".split())
