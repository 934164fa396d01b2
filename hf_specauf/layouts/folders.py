"""Where a drafter lies: a folder here, or a repository on the Hub."""

import os
from pathlib import Path

from huggingface_hub import snapshot_download

from ..records import HUB_ID, read_record


def fetch(
    name_or_path: str | Path, revision: str | None = None, key: str = "name_or_path"
) -> tuple[Path, str | None]:
    """A drafter's folder and, from the Hub, its commit. Neither pickles nor code are downloaded.

    Args:
        key (`str`, *optional*): what errors call `name_or_path`, where a command or recipe gave it.

    Raises:
        ValueError: a folder was given a revision.
        OSError: there is no such folder, and no Hub id can be read in it.
    """
    if Path(name_or_path).is_dir():
        if revision is not None:
            raise ValueError(
                f"{key}: {name_or_path} is a folder, which has no revision {revision!r}: leave"
                " it out"
            )
        return Path(name_or_path), None
    if Path(name_or_path).is_file():
        raise OSError(f"{key}: {name_or_path} is a file: give the folder that it lies in")
    if not HUB_ID.fullmatch(str(name_or_path)):
        raise OSError(
            f"{key}: {str(name_or_path)!r} is neither a folder nor a Hub id (OWNER/NAME): give one"
            " of them"
        )
    kept = ["*.json", "*.safetensors"]
    folder = Path(snapshot_download(str(name_or_path), revision=revision, allow_patterns=kept))
    # the cache names a snapshot's folder by its commit
    return folder, folder.name


def absolute(name_or_path: str | Path) -> str:
    """A folder by its absolute path; any other name as it is.

    Read from another working folder, the relative path `out/base` would look like a Hub id.
    """
    if os.path.isdir(name_or_path):
        return os.path.abspath(name_or_path)
    return str(name_or_path)


def read_json(path: Path) -> dict:
    """A JSON file's content; empty where there is no such file."""
    if not path.is_file():
        return {}
    return read_record(path)


def named(names: list[str]) -> str:
    """The first five of some names, for an error."""
    # a drafter of another shape differs in all its tensors, and a hundred names help nobody
    shown = names[:5]
    if len(names) > 5:
        shown.append("...")
    return ", ".join(shown)
