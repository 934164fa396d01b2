"""A drafter beside a target: what cannot serve is refused, and what may be slow is a warning."""

import warnings
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..drafters.configuration_dflash import DFlashConfig
from ..drafters.overrides import check_shape
from .fingerprints import same_weights, words_added_since
from .record import Identity
from .wrappers import innermost, wrappers_of_peft


def check_pair(
    target: PreTrainedModel | PeftModel,
    config: DFlashConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Raise unless the drafter can serve the target: layers, hidden size, a vocabulary of its own
    and, if a tokenizer is given, its words agree. Warn if the model, its commit, the size of its
    vocabulary or the chat template is not the one of training.

    Raises:
        TypeError: the target is no model of transformers.
        ValueError: what differs, and what to do.
    """
    refuse_virtual_tokens(target)
    target = innermost(target)
    check_shape(target, config)
    if target.config.is_encoder_decoder or target.get_output_embeddings() is None:
        raise ValueError(
            f"{type(target).__name__} is not a decoder-only language model with a head; drafters"
            " need one: load the target with AutoModelForCausalLM.from_pretrained"
        )
    found, meant = Identity.of(target, tokenizer), Identity.of_target_of(config)
    _warn_of_another_target(found, meant)
    if found.vocab_size != meant.vocab_size:
        warn(
            f"its target's embedding had {meant.vocab_size} rows in training, and this one's has"
            f" {found.vocab_size}: it has never drafted new tokens"
        )
    if tokenizer is not None:
        _check_words(tokenizer, found, meant, config.mask_token_id)


def refuse_virtual_tokens(target: PreTrainedModel | PeftModel) -> None:
    """Raise where PEFT puts tokens before the prompt that are no words."""
    for wrapper in wrappers_of_peft(target):
        for name in wrapper.active_adapters:
            adapter = wrapper.peft_config[name]
            if adapter.is_prompt_learning:
                raise ValueError(
                    f"{adapter.peft_type.value} puts virtual tokens before the prompt, which a"
                    " drafter does not see: it would learn from and draft for another text than"
                    " the target reads, and transformers cuts them. Use a LoRA on the target, or"
                    " the target without them (get_base_model())."
                )


def refuse_activated_lora(target: PreTrainedModel | PeftModel) -> None:
    """Raise where an adapter acts only from some tokens of a prompt on: PEFT finds these in a call
    of its wrapper, and a drafter is trained on the model inside, which would not act so. Decoding
    calls the wrapper."""
    for wrapper in wrappers_of_peft(target):
        for name in wrapper.active_adapters:
            if getattr(wrapper.peft_config[name], "alora_invocation_tokens", None):
                raise ValueError(
                    f"the target's adapter {name!r} is an activated LoRA (alora_invocation_tokens),"
                    " which training cannot switch on and off within a row: train on the target"
                    " without it (get_base_model()), or with a plain LoRA"
                )


def _check_words(
    tokenizer: PreTrainedTokenizerBase, found: Identity, meant: Identity, mask_token_id: int
) -> None:
    """Raise unless the tokenizer's words are those of training, or those and some more."""
    if meant.tokenizer_hash not in (None, found.tokenizer_hash):
        added = words_added_since(tokenizer, meant.tokenizer_hash)
        if added is None:
            raise ValueError(
                f"the tokenizer's vocabulary (hash {found.tokenizer_hash}) is not the one this"
                f" drafter was trained with ({meant.tokenizer_hash}), nor that one with a few"
                f" tokens added: load the tokenizer of {meant.name_or_path}. Where you know that"
                " the tokens it was trained with have kept their ids, leave tokenizer out."
            )
        if mask_token_id in added:
            warn(
                f"its mask token {mask_token_id} is now the word {added[mask_token_id]!r} of the"
                " tokenizer, so that a blank looks like that word"
            )
    if meant.chat_template_hash not in (None, found.chat_template_hash):
        warn("the tokenizer's chat template is not the one it was trained with")


def _warn_of_another_target(found: Identity, meant: Identity) -> None:
    own = meant.name_or_path or "an unnamed target"
    # The weights decide, where both are known.
    if found.fingerprint and meant.fingerprint:
        if not same_weights(found.fingerprint, meant.fingerprint):
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
