"""What a model was loaded from: a name, and a commit."""

import re
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

from huggingface_hub import try_to_load_from_cache
from torch import nn


class Origin(NamedTuple):
    """What a model was loaded from.

    Attributes:
        name_or_path (`str`): Hub id or folder.
        revision (`str`, *optional*): commit on the Hub.
        loadable (`bool`): whether AutoModel loads it by that name.
    """

    name_or_path: str
    revision: str | None
    loadable: bool = True


# transformers forgets the commit it loaded, and a model in another layout has no name that
# AutoModel could load. The references are weak, so that a model can be freed.
_ORIGINS: WeakKeyDictionary[nn.Module, Origin] = WeakKeyDictionary()


def note_origin(model: nn.Module, origin: Origin) -> None:
    """Remember, as long as the model lives, what it was loaded from."""
    _ORIGINS[model] = origin


def origin_of(model: nn.Module) -> Origin | None:
    """What a model was loaded from, where this package loaded it."""
    return _ORIGINS.get(model)


def cached_commit(name_or_path: str, revision: str | None = None) -> str | None:
    """The commit a branch or tag named when it was loaded (z-lab#152); `None` for a folder."""
    if Path(name_or_path).exists():
        return None
    # The cache keeps each file under its commit.
    cached = try_to_load_from_cache(name_or_path, "config.json", revision=revision)
    found = re.search(r"snapshots/([0-9a-f]{40})/", str(cached))
    return found[1] if found else None
