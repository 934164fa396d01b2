"""The frozen target: how it is loaded, the shape of a drafter that follows from it, and what it
lends to a drafter."""

from .frozen import FrozenTarget, decoder_layers
from .loading import check_device, check_target, load, load_target
from .shape import (
    default_mask_token_id,
    default_target_layer_ids,
    drafter_config,
    positions_of,
    room_for_prompt,
)

__all__ = [
    "FrozenTarget",
    "check_device",
    "check_target",
    "decoder_layers",
    "default_mask_token_id",
    "default_target_layer_ids",
    "drafter_config",
    "load",
    "load_target",
    "positions_of",
    "room_for_prompt",
]
