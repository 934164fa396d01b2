"""Which model is this, and what differs? One answer, kept the same way in every record.

A name is not enough: a branch moves, a folder has no commit, a fine-tune keeps its parent's name
(z-lab#152). So an identity also holds a fingerprint of the weights, hashes of the tokenizer and of
its chat template, and the widths.
"""

from .fingerprints import (
    embedding_rows,
    same_weights,
    target_fingerprint,
    tokenizer_hashes,
    weights_checksum,
    weights_fingerprint,
)
from .origins import Origin, cached_commit, note_origin, origin_of
from .pairs import check_pair, refuse_activated_lora, refuse_virtual_tokens, warn
from .record import CONFIG_KEYS, SHAPE_KEYS, Identity
from .wrappers import as_called, innermost, unwrapped

__all__ = [
    "CONFIG_KEYS",
    "SHAPE_KEYS",
    "Identity",
    "Origin",
    "as_called",
    "cached_commit",
    "check_pair",
    "embedding_rows",
    "innermost",
    "note_origin",
    "origin_of",
    "refuse_activated_lora",
    "refuse_virtual_tokens",
    "same_weights",
    "target_fingerprint",
    "tokenizer_hashes",
    "unwrapped",
    "warn",
    "weights_checksum",
    "weights_fingerprint",
]
