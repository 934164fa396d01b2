"""SpecForge's layout: z-lab's, and for a drafter with a causal head the keys of that head.

A plain DFlash folder of SpecForge cannot be told from z-lab's, and `zlab` reads it. A drafter with
a head says so in `dflash_config.projector_type`. The head's keys lie beside it, or in a
`domino_config` of their own. Tensors are named as in our own folders.
"""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..drafters import DRAFTERS
from . import zlab


def recognises(folder: Path, config: dict) -> bool:
    """Whether the config names a head, or holds keys of one."""
    nested = config.get("dflash_config") or {}
    return "domino_config" in config or nested.get("projector_type") not in (None, "dflash")


def read(folder: Path, config: dict, dtype: str | torch.dtype) -> PreTrainedModel:
    """The drafter in such a folder."""
    nested = config.get("dflash_config") or {}
    # An unknown head is read as plain DFlash, whose reader then refuses its name.
    kind, _ = DRAFTERS.get(nested.get("projector_type"), DRAFTERS["dflash"])
    return zlab.read_tensors(folder, zlab.our_config(config, folder, kind), dtype)
