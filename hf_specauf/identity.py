"""Which model is this, and what differs? One answer, kept the same way in every record.

A name is not enough: a branch moves, a folder has no commit, a fine-tune keeps its parent's name
(z-lab#152). So an identity also holds a fingerprint of the weights, hashes of the tokenizer and of
its chat template, and the widths.
"""

import hashlib
import json
import re
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .drafters.configuration_dflash import DFlashConfig
from .drafters.overrides import shape_differences

# A drafter's config.json keeps its target's identity under these keys, beside `vocab_size` and the
# like, because engines and older versions of this package read them there.
CONFIG_KEYS = {
    "target_model_name_or_path": "name_or_path",
    "target_revision": "revision",
    "target_fingerprint": "fingerprint",
    "tokenizer_hash": "tokenizer_hash",
    "chat_template_hash": "chat_template_hash",
    "hidden_size": "hidden_size",
    "num_target_layers": "num_layers",
    "vocab_size": "vocab_size",
}
# Those of them that a drafter's own weights depend on.
SHAPE_KEYS = ("hidden_size", "num_target_layers", "vocab_size")


@dataclass(frozen=True)
class Identity:
    """Which target this is. A field is `None` where it is not known.

    Attributes:
        name_or_path (`str`, *optional*): Hub id or folder.
        revision (`str`, *optional*): commit on the Hub.
        fingerprint (`str`, *optional*): of the weights, see [`target_fingerprint`].
        tokenizer_hash, chat_template_hash (`str`, *optional*): see [`tokenizer_hashes`].
        hidden_size, num_layers, vocab_size (`int`, *optional*): H, decoder layers, rows of the
            input embedding.
    """

    name_or_path: str | None = None
    revision: str | None = None
    fingerprint: str | None = None
    tokenizer_hash: str | None = None
    chat_template_hash: str | None = None
    hidden_size: int | None = None
    num_layers: int | None = None
    vocab_size: int | None = None

    @classmethod
    def of(
        cls,
        target: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        name_or_path: str | None = None,
        revision: str | None = None,
    ) -> "Identity":
        """Of a loaded target.

        Args:
            target (`PreTrainedModel` or `PeftModel`): the target.
            tokenizer (`PreTrainedTokenizerBase`, *optional*): its tokenizer.
            name_or_path (`str`, *optional*): what it was asked for by; by default what it says
                itself.
            revision (`str`, *optional*): what it was asked for by; where the commit is known, that
                is taken.
        """
        target = innermost(target)
        text = target.config.get_text_config(decoder=True)
        origin = origin_of(target)
        if origin is not None and origin.revision is not None:
            revision = origin.revision
        hashes = {}
        if tokenizer is not None:
            hashes = tokenizer_hashes(tokenizer)
        return cls(
            name_or_path=name_or_path or target.config._name_or_path or None,
            revision=revision,
            fingerprint=target_fingerprint(target),
            **hashes,
            hidden_size=text.hidden_size,
            num_layers=text.num_hidden_layers,
            vocab_size=embedding_rows(target),
        )

    @classmethod
    def of_target_of(cls, config: DFlashConfig) -> "Identity":
        """Of the target that a drafter was trained for, from the drafter's config."""
        return cls(**{own: getattr(config, key) for key, own in CONFIG_KEYS.items()})

    @classmethod
    def read(cls, record: dict[str, Any] | None) -> "Identity":
        """From any record that this package wrote: the `target` of today's records, and the older
        forms (flat keys in `settings.json` and in `base.json`'s `trained_for`)."""
        record = record or {}
        target = record.get("target")
        if isinstance(target, dict):
            record = target
        elif isinstance(target, str):
            # settings.json up to 0.1.0, whose `target_revision` may be a branch
            record = record | {
                "name_or_path": target,
                "revision": record.get("target_commit"),
                "fingerprint": record.get("target_fingerprint"),
            }
        found = {}
        for key, own in CONFIG_KEYS.items():
            # Our own name first, because settings.json has the exact commit under it.
            if own in record:
                found[own] = record[own]
            elif key in record:
                found[own] = record[key]
        return cls(**found)

    def config_keys(self) -> dict[str, Any]:
        """The same as keys of a drafter's config."""
        return {key: getattr(self, own) for key, own in CONFIG_KEYS.items()}

    def record(self) -> dict[str, Any]:
        """What every record keeps under `target`."""
        return asdict(self)

    def write_into(self, config: DFlashConfig) -> None:
        """Make a drafter's config say that it is for this target. Its shape stays as it is."""
        for key, value in self.config_keys().items():
            if key not in SHAPE_KEYS:
                setattr(config, key, value)

    def differences(self, other: "Identity") -> dict[str, tuple[Any, Any]]:
        """Fields that both know and that differ -> (ours, theirs)."""
        found = {}
        for field in fields(self):
            ours, theirs = getattr(self, field.name), getattr(other, field.name)
            if ours is not None and theirs is not None and ours != theirs:
                found[field.name] = (ours, theirs)
        return found

    def is_same_model(self, other: "Identity", *names: str | None) -> bool:
        """Whether both are one model: by the weights where both are known, else by the name, or one
        of `names` by which the other may go too."""
        if self.fingerprint and other.fingerprint:
            return self.fingerprint == other.fingerprint
        return self.name_or_path in (other.name_or_path, *names)


# ---- what is read off a model


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


def innermost(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def embedding_rows(target: PreTrainedModel) -> int:
    """Rows of the target's input embedding, at least its tokenizer's length."""
    return target.get_input_embeddings().weight.shape[0]


def target_fingerprint(target: PreTrainedModel) -> str | None:
    """Short SHA-256 of the first weights of every parameter.

    The weights tell a fine-tune or another commit from the model that a drafter was trained for
    (z-lab#152). `None` where they cannot be read: quantised, offloaded or sharded.
    """
    digest = hashlib.sha256()
    for name, parameter in innermost(target).named_parameters():
        if parameter.is_meta or not parameter.is_floating_point() or isinstance(parameter, DTensor):
            return None
        digest.update(name.encode())
        # Training changes every parameter nearly everywhere, so a few weights of each will do.
        digest.update(_bf16_bytes(parameter.detach().flatten()[:8]))
    return digest.hexdigest()[:16]


def weights_fingerprint(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of some named weights, whole. An adapter is tied to it.

    Other than in a target's fingerprint every weight counts, because an adapter must lie on exactly
    the weights that it was trained on.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        digest.update(name.encode())
        digest.update(_bf16_bytes(tensor.detach()))
    return digest.hexdigest()


def _bf16_bytes(tensor: torch.Tensor) -> np.ndarray:
    # As bf16, so that the dtype that a model is loaded in does not matter. numpy knows no bf16.
    return tensor.to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy()


def tokenizer_hashes(tokenizer: PreTrainedTokenizerBase) -> dict[str, str | None]:
    """Short SHA-256 of the vocabulary and of the chat template, by which a pair is recognised."""

    def short(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    template = tokenizer.chat_template
    template_hash = None
    if template is not None:
        # A tokenizer may have several templates by name, so this need not be text.
        template_hash = short(json.dumps(template))
    vocabulary = sorted(tokenizer.get_vocab().items())
    return {
        "tokenizer_hash": short(json.dumps(vocabulary)),
        "chat_template_hash": template_hash,
    }


def cached_commit(name_or_path: str, revision: str | None = None) -> str | None:
    """The commit a branch or tag named when it was loaded (z-lab#152); `None` for a folder."""
    if Path(name_or_path).exists():
        return None
    # The cache keeps each file under its commit.
    cached = try_to_load_from_cache(name_or_path, "config.json", revision=revision)
    found = re.search(r"snapshots/([0-9a-f]{40})/", str(cached))
    return found[1] if found else None


# ---- a drafter beside a target


def check_pair(
    target: PreTrainedModel, config: DFlashConfig, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Raise unless the drafter can serve the target: layers, hidden size, vocabulary and, if a
    tokenizer is given, its words agree. Warn if the model, its commit or the chat template is not
    the one of training.

    Raises:
        ValueError: what differs, and what to do.
    """
    target = innermost(target)
    wrong = shape_differences(target, config)
    if wrong:
        raise ValueError(
            f"this drafter does not belong to this target: its config says {', '.join(wrong)}. It"
            f" was trained for {config.target_model_name_or_path or 'an unnamed target'}; load that"
            " target or another drafter."
        )
    if target.config.is_encoder_decoder or target.get_output_embeddings() is None:
        raise ValueError(
            f"{type(target).__name__} is not a decoder-only language model with a head; drafters"
            " need one"
        )
    found, meant = Identity.of(target, tokenizer), Identity.of_target_of(config)
    _warn_of_another_target(found, meant)
    if tokenizer is None:
        return
    if meant.tokenizer_hash not in (None, found.tokenizer_hash):
        raise ValueError(
            f"the tokenizer's vocabulary (hash {found.tokenizer_hash}) is not the one this drafter"
            f" was trained with ({meant.tokenizer_hash}): load the tokenizer of"
            f" {meant.name_or_path}"
        )
    if meant.chat_template_hash not in (None, found.chat_template_hash):
        warn("the tokenizer's chat template is not the one it was trained with")


def _warn_of_another_target(found: Identity, meant: Identity) -> None:
    own = meant.name_or_path or "an unnamed target"
    # The weights decide, where both are known.
    if found.fingerprint and meant.fingerprint:
        if found.fingerprint != meant.fingerprint:
            at = f" at {meant.revision}" if meant.revision else ""
            warn(
                f"it was trained for {own}{at}, and the target {found.name_or_path or 'given'} has"
                " other weights"
            )
        return
    # Else names and commits on the Hub. A folder's name says nothing.
    for name in (found.name_or_path, meant.name_or_path):
        if name is None or Path(name).exists():
            return
    if found.name_or_path != meant.name_or_path:
        warn(f"it was trained for {own}, and the target is {found.name_or_path}")
    elif "revision" in found.differences(meant):
        warn(f"it was trained for {own} at {meant.revision}, and the target is at {found.revision}")


def warn(what: str) -> None:
    """Say that a drafter may be slow; its output stays the target's own."""
    warnings.warn(
        f"this drafter may accept little: {what}. Output stays right; python -m hf_specauf.evaluate"
        " tells how much.",
        stacklevel=5,
    )
