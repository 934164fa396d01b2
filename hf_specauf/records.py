"""Records of a run as JSON files, from which reports and cards are rendered."""

import json
import math
import os
import platform
import re
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryFile

import torch
from accelerate import PartialState

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

# an owner and a name, as the Hub allows them
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# Keys that name places, people, tokens or ways of showing, and change nothing in the drafter
NOT_PUBLIC = re.compile(
    r"output_dir|run_name|report_to|resume_from_checkpoint|hub_.*|push_to_hub|project|trackio_.*|"
    r"disable_tqdm|.*_logging_dir|save_total_limit|logging_.*|log_level.*|local_rank|_n_gpu|"
    r"deepspeed_plugin|.*_token|target_states_cache|target_states_cache_gb|"
    # transformers still mirrors this old name of `activation_checkpointing*`
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
    shown = []
    # the sources of a mixture are written so
    for part in value.split(" + "):
        is_local = part.startswith(("/", "~", "./", "../")) or os.path.exists(part)
        shown.append(Path(part).name if is_local else part)
    return " + ".join(shown)


def environment() -> dict:
    """Versions and hardware of a run, without host, user or path names."""
    hardware = f"CPU, {os.cpu_count()} cores"
    if torch.cuda.is_available():
        hardware = torch.cuda.get_device_name()
    return {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "hardware": hardware,
        "processes": PartialState().num_processes,
    }


def _standard(value):
    """A value as standard JSON has it. JSON knows no NaN: what was not measured is null."""
    if isinstance(value, dict):
        return {key: _standard(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_standard(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def check_can_write(key: str, path: str | Path, *, is_file: bool = False) -> None:
    """Raise where nothing can be written to a path, before the work whose result would be lost.
    Nothing is left there.

    Args:
        key (`str`): what errors call the path.
        is_file (`bool`, *optional*): a file is written there, and otherwise a folder of files.

    Raises:
        ValueError: what is in the way, and the key.
    """
    path = Path(path)
    if is_file and path.is_dir():
        raise ValueError(f"{key} {path} is a folder: name a file in it")
    if not is_file and path.exists() and not path.is_dir():
        raise ValueError(f"{key} {path} is a file: name a folder")
    folder = path.parent if is_file else path
    # What is missing is made later, in the nearest folder that is there.
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(
            f"{key} {path} lies under {folder}, which is a file: name a place in a folder"
        )
    try:
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{key} {path} cannot be written, because {folder} takes no file ({error}): name"
            " another place, or free that one"
        ) from error


def check_no_model_is_lost(key: str, folder: str | Path, source: str | Path | None = None) -> None:
    """Raise where a drafter that is written into a folder would overwrite a model: a target, or the
    very drafter that it is made from.

    Args:
        key (`str`): what errors call the folder.
        source (`str` or `Path`, *optional*): Hub id or folder of what it is made from.

    Raises:
        ValueError: what is there, and the key.
    """
    folder = Path(folder)
    if source is not None and Path(source).is_dir():
        read = Path(source).resolve()
        # Beside a drafter, its checkpoints and its adapter are written anew too.
        if read.is_relative_to(folder.resolve()):
            raise ValueError(
                f"{key} {folder} holds what it is made from ({source}), which would be overwritten:"
                " name another folder"
            )
    config = folder / "config.json"
    if not config.is_file():
        return
    kind = str(read_record(config).get("model_type"))
    if not kind.startswith("specauf_"):
        raise ValueError(
            f"{key} {folder} holds a model of type {kind}, which would be overwritten: name another"
            " folder"
        )


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


def named_file(path: str | Path, name: str, made_by: str) -> Path:
    """The file that a command was given, or the file of that name in the folder that it was given.

    Raises:
        ValueError: there is none; says what makes it.
    """
    path = Path(path)
    if path.is_dir():
        path = path / name
    if not path.is_file():
        raise ValueError(f"{path} is not there: {made_by} writes it. Give that file, or its folder")
    return path


def read_record(path: str | Path) -> dict:
    """The object in a JSON file.

    Raises:
        ValueError: it was cut off, or holds something else; names the file.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    # not JSON, or not even text
    except ValueError as error:
        raise ValueError(
            f"{path} is no whole JSON file, cut off perhaps ({error}): write it again with the"
            " command that made it, or move it away"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(
            f"{path} holds a JSON {type(found).__name__} and not an object: write it again with the"
            " command that made it, or move it away"
        )
    return found


def write_record(path: str | Path, record: dict) -> None:
    """Write a JSON file whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_standard(record), indent=2, default=str, allow_nan=False) + "\n"
    write_whole(path, text)
