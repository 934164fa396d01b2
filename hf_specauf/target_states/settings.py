"""What states depend on beside their row, and the folder that has states of several such kinds."""

import hashlib
import json
from pathlib import Path

import torch

from ..identity import Identity, weights_checksum
from ..records import read_record, write_record
from ..target import FrozenTarget

MARK = "target_states.json"  # tells our folder from any other
FORMAT = 1
# Keys of a target's config that name places, or say what a forward pass returns.
NOT_COMPUTED_WITH = (
    "_name_or_path",
    "architectures",
    "dtype",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "transformers_version",
    "use_cache",
)


def settings_of(target: FrozenTarget) -> dict:
    """What the states of this target's taps depend on. Call it before the target is sharded.

    The weights decide, and not what they are called: a folder may be moved, and a new commit may
    bring the same weights. Where some weights lie out of sight (offloaded), name and commit count.
    """
    model = target.model
    identity = Identity.of(model)
    checksum, complete = weights_checksum(model)
    config = model.config.get_text_config(decoder=True)
    computing = {k: v for k, v in config.to_dict().items() if k not in NOT_COMPUTED_WITH}
    settings = {
        "fingerprint": identity.fingerprint,
        "checksum": checksum,
        "config": _short_hash(computing),
        # Another way to compute attention rounds in another way.
        "attention": config._attn_implementation,
        "taps": list(target.target_layer_ids),
        "hidden_size": identity.hidden_size,
    }
    if not complete:
        settings |= {"name_or_path": identity.name_or_path, "revision": identity.revision}
    return settings


def open_folder(folder: Path, settings: dict, called: str) -> Path:
    """The part of a folder that has the states of these settings; both are made if need be.

    Args:
        folder (`Path`): of the key `target_states_cache`.
        settings (`dict`): of [`settings_of`], with the states' dtype.
        called (`str`): the target's name, for whoever looks into the folder.

    Raises:
        ValueError: the folder is something else.
    """
    _check_or_mark(folder)
    part = folder / _short_hash(settings)
    path = part / "settings.json"
    if not path.is_file():
        write_record(path, settings | {"called": called})
        return part
    found = read_record(path)
    found.pop("called", None)
    if found != settings:
        differing = [key for key in settings | found if settings.get(key) != found.get(key)]
        raise ValueError(
            f"{path} does not belong to the states beside it ({', '.join(differing)} differ): it"
            f" was changed or copied. Remove {part}, and its states are computed anew"
        )
    return part


def _check_or_mark(folder: Path) -> None:
    """Raise for a folder that is something else; mark one that is new or empty."""
    key = "target_states_cache"
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{key} is {folder}, which is a file: give a folder")
    mark = folder / MARK
    if not mark.is_file():
        if (folder / "settings.json").is_file() and (folder.parent / MARK).is_file():
            raise ValueError(
                f"{key} is {folder}, which holds the states of one target: give {folder.parent},"
                " which finds the right ones by itself"
            )
        # A disk of its own brings lost+found. Another run may be marking the folder, too.
        names = {path.name for path in folder.glob("*")} - {"lost+found"}
        strange = sorted(name for name in names if not name.startswith(MARK))
        if strange and not mark.is_file():
            some = ", ".join(strange[:3])
            raise ValueError(
                f"{key} is {folder}, which is no folder of target states (it holds {some}): give"
                " one that is new or empty"
            )
        about = "hidden states of targets, kept by hf_specauf; remove this folder when you like"
        write_record(mark, {"format": FORMAT, "about": about})
    found = read_record(mark).get("format")
    if found != FORMAT:
        raise ValueError(
            f"{key} is {folder}, whose states are of format {found!r}, and this version of"
            f" hf_specauf reads format {FORMAT}: give another folder"
        )


def others_in(part: Path) -> list[str]:
    """What else the folder of a part has, in words: it helps where a run finds nothing of its
    own."""
    found = []
    for path in sorted(part.parent.glob("*/settings.json")):
        if path.parent != part:
            theirs = read_record(path)
            taps, dtype = theirs.get("taps"), theirs.get("dtype")
            found.append(f"{theirs.get('called')} (taps {taps}, {dtype})")
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype without `torch.` before it."""
    return str(dtype).removeprefix("torch.")


def _short_hash(value: object) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
