"""An identity, as records and a drafter's config keep it."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..drafters.configuration_dflash import DFlashConfig
from .fingerprints import embedding_rows, same_weights, target_fingerprint, tokenizer_hashes
from .origins import origin_of
from .wrappers import innermost

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
        """Make a drafter's config say that it is for this target. Its shape stays as it is, but for
        the vocabulary of a target that was resized, where the drafter has no part in that."""
        for key, value in self.config_keys().items():
            if key not in SHAPE_KEYS:
                setattr(config, key, value)
        if self.vocab_size is not None and not config.owns_vocabulary:
            config.vocab_size = self.vocab_size

    def differences(self, other: "Identity") -> dict[str, tuple[Any, Any]]:
        """Fields that both know and that differ -> (ours, theirs)."""
        found = {}
        for field in fields(self):
            ours, theirs = getattr(self, field.name), getattr(other, field.name)
            if ours is None or theirs is None:
                continue
            if field.name == "fingerprint":
                same = same_weights(ours, theirs)
            else:
                same = ours == theirs
            if not same:
                found[field.name] = (ours, theirs)
        return found

    def is_same_model(self, other: "Identity", *names: str | None) -> bool:
        """Whether both are one model: by the weights where both are known, else by the name, or one
        of `names` by which the other may go too."""
        if self.fingerprint and other.fingerprint:
            return same_weights(self.fingerprint, other.fingerprint)
        return self.name_or_path in (other.name_or_path, *names)
