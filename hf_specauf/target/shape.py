"""The shape of a drafter, derived from its target."""

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..drafters import DRAFTERS
from ..drafters.configuration_dflash import DFlashConfig
from ..identity import Identity, embedding_rows, innermost
from ..identity.multimodal import check_is_no_placeholder, placeholder_tokens


def default_target_layer_ids(num_target_layers: int, taps: int = 5) -> list[int]:
    """Usual taps of a D-layer target: round(1 + i (D - 4) / (L - 1)), D // 2 for one (arXiv
    2602.06036's code).

    Raises:
        ValueError: the target is so shallow that the rule repeats a layer.
    """
    depth = num_target_layers
    if taps == 1:
        ids = [depth // 2]
    else:
        ids = [round(1 + i * (depth - 4) / (taps - 1)) for i in range(taps)]
    if ids != sorted(set(ids)):
        raise ValueError(
            f"a target with {depth} layers is too shallow for {taps} evenly spread taps ({ids}"
            f" repeats a layer): give target_layer_ids yourself, sorted, each in 0..{depth - 2}"
        )
    return ids


def positions_of(target: PreTrainedModel) -> int | None:
    """The most tokens of a text that a target has positions for; `None` where its config names no
    number (BLOOM). Where RoPE is scaled, it is the number after that."""
    text = innermost(target).config.get_text_config(decoder=True)
    return getattr(text, "max_position_embeddings", None)


def room_for_prompt(
    target: PreTrainedModel, new_tokens: int, key: str = "max_new_tokens"
) -> int | None:
    """The most tokens that a prompt may have, so that a target has positions for its answer too;
    `None` where any number will do.

    Args:
        new_tokens (`int`): the most tokens of the answer.
        key (`str`, *optional*): what errors call that number.

    Raises:
        ValueError: no prompt has room.
    """
    positions = positions_of(target)
    if positions is None:
        return None
    if new_tokens >= positions:
        raise ValueError(
            f"{key} is {new_tokens}, and the target has {positions} positions, the prompt's among"
            " them: lower it"
        )
    return positions - new_tokens


def default_mask_token_id(target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's mask token, else the first unused row of the target's embedding; never a
    resized row.

    Raises:
        ValueError: there is neither.
    """
    if tokenizer.mask_token_id is not None:
        return tokenizer.mask_token_id
    # The ids may have holes, so that the tokenizer's length may be an id in use.
    unused = max(tokenizer.get_vocab().values()) + 1
    # A config may name placeholders of images that the tokenizer does not know.
    while unused in placeholder_tokens(innermost(target).config):
        unused += 1
    if unused < embedding_rows(target):
        return unused
    raise ValueError(
        "the tokenizer has no mask token and its ids use every row of the embedding: give"
        " mask_token_id, a token that never occurs in your data (a reserved special token, for"
        " instance)"
    )


def drafter_config(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    num_hidden_layers: int,
    block_size: int,
    mask_token_id: int,
    target_layer_ids: list[int] | None = None,
    intermediate_size: int | None = None,
    target_revision: str | None = None,
    chat_template_kwargs: dict | None = None,
    kind: str = "dflash",
    own_keys: dict | None = None,
) -> DFlashConfig:
    """A drafter config with the target's own widths, heads, rope base and special ids.

    Args:
        target (`PreTrainedModel`): the target.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): its tokenizer, whose hashes are noted.
        num_hidden_layers, block_size, mask_token_id (`int`): as in [`DFlashConfig`].
        target_layer_ids (`list[int]`, *optional*): taps; by default `default_target_layer_ids`.
        intermediate_size (`int`, *optional*): defaults to the target's, or 4 H where it has none.
        kind (`str`, *optional*, defaults to `dflash`): a drafter of the table `DRAFTERS`.
        own_keys (`dict`, *optional*): values of that drafter's own keys, e.g. of Domino's causal
            head; by default the published ones.

    Raises:
        ValueError: the mask token stands for an image, a video or a sound.
    """
    target = innermost(target)
    check_is_no_placeholder(mask_token_id, target.config)
    identity = Identity.of(target, tokenizer, revision=target_revision)
    keys = identity.config_keys() | widths(target.config.get_text_config(decoder=True))
    if intermediate_size:
        keys["intermediate_size"] = intermediate_size
    if target_layer_ids is None:
        target_layer_ids = default_target_layer_ids(identity.num_layers)
    config, _ = DRAFTERS[kind]
    return config(
        **keys,
        num_hidden_layers=num_hidden_layers,
        block_size=block_size,
        mask_token_id=mask_token_id,
        target_layer_ids=target_layer_ids,
        chat_template_kwargs=chat_template_kwargs,
        bos_token_id=target.generation_config.bos_token_id,
        eos_token_id=target.generation_config.eos_token_id,
        pad_token_id=target.generation_config.pad_token_id,
        **(own_keys or {}),
    )


def widths(text: PreTrainedConfig) -> dict[str, Any]:
    """What a drafter's layers take from the config of the target's text model.

    Configs of other architectures lack some of these keys: GPT-2's has no `intermediate_size`,
    `head_dim` or rope.
    """
    heads = text.num_attention_heads
    rope = getattr(text, "rope_parameters", None) or {}
    # Gemma-3 has one set per layer type. A drafter's layers all attend to everything.
    rope = rope.get("full_attention", rope)
    theta = float(rope.get("rope_theta") or 10_000.0)
    return {
        "intermediate_size": getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(text, "num_key_value_heads", None) or heads,
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // heads,
        # By fan-in, because a fixed 0.02 starves attention in narrow drafters.
        "initializer_range": text.hidden_size**-0.5,
        "rms_norm_eps": getattr(text, "rms_norm_eps", None) or 1e-6,
        "max_position_embeddings": text.max_position_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    }
