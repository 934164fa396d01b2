"""Drafters from anywhere: `LAYOUTS`, the table of the layouts a drafter's folder may have, and
adapters on drafters or on borrowed layers."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from . import specauf, specforge, zlab


@dataclass(frozen=True)
class Layout:
    """One layout of a drafter's folder.

    Args:
        says (`str`): what it is, in a few words.
        recognises (`Callable`): whether a folder is in this layout, from the folder and its
            `config.json`.
        read (`Callable`): the drafter, from the folder, its `config.json` and a dtype, which may be
            `"auto"` (as stored).
        write (`Callable`, *optional*): writes a drafter into a folder; `None` where nothing does.
        loads_in_automodel (`bool`, *optional*, defaults to `False`): whether
            `AutoModel.from_pretrained` loads such a folder as the drafter it is.
    """

    says: str
    recognises: Callable[[Path, dict], bool]
    read: Callable[[Path, dict, str | torch.dtype], PreTrainedModel]
    write: Callable[[PreTrainedModel, Path], None] | None = None
    loads_in_automodel: bool = False


# In the order in which a folder is tried. SpecForge's folders have all that z-lab's have, and more.
LAYOUTS = {
    "specauf": Layout(
        "this package's own",
        specauf.recognises,
        specauf.read,
        specauf.write,
        loads_in_automodel=True,
    ),
    "specforge": Layout("SpecForge's, with a causal head", specforge.recognises, specforge.read),
    "zlab": Layout("z-lab's, plain DFlash", zlab.recognises, zlab.read),
}
