"""A drafter beside a target: what cannot serve is refused, and what may be slow is a warning."""

import warnings
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..drafters.configuration_dflash import DFlashConfig
from ..drafters.overrides import shape_differences
from .record import Identity
from .wrappers import innermost


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
