"""Checkpoints that also see images: the class that loads them, and what in them is no text.
Drafting is for their text alone."""

import json

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE, cached_file

# ---- loading


def load_language_model(
    name_or_path: str, revision: str | None = None, **kwargs
) -> PreTrainedModel:
    """`from_pretrained` of the Auto class that has the checkpoint: `AutoModelForCausalLM`, or where
    that has it not, as of Qwen-VL, Mistral-3 and SmolVLM, `AutoModelForImageTextToText`."""
    trust = kwargs.get("trust_remote_code", False)
    kind = AutoModelForCausalLM
    try:
        config = AutoConfig.from_pretrained(
            name_or_path, revision=revision, trust_remote_code=trust
        )
    except (OSError, ValueError):
        # That class knows more folders (an adapter's), and says better what is wrong with others.
        pass
    else:
        if sees_images(config):
            kind = AutoModelForImageTextToText
    return kind.from_pretrained(name_or_path, revision=revision, **kwargs)


def sees_images(config: PreTrainedConfig) -> bool:
    """Whether a checkpoint is `AutoModelForImageTextToText`'s alone."""
    kind = type(config)
    return kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and kind not in MODEL_FOR_CAUSAL_LM_MAPPING


def auto_class(target: PreTrainedModel) -> str:
    """The name of the Auto class that loads a target's checkpoint."""
    if sees_images(target.config):
        return "AutoModelForImageTextToText"
    return "AutoModelForCausalLM"


def load_tokenizer(
    name_or_path: str, revision: str | None = None, **kwargs
) -> PreTrainedTokenizerBase:
    """`from_pretrained` of `AutoTokenizer`, with the chat template of the processor where the
    tokenizer has none: older repositories keep it in a file that only processors read."""
    tokenizer = AutoTokenizer.from_pretrained(name_or_path, revision=revision, **kwargs)
    if tokenizer.chat_template is None:
        file = cached_file(
            name_or_path,
            LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE,
            revision=revision,
            # Most repositories are without it, and a network may be missing.
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if file is not None:
            with open(file, encoding="utf-8") as lines:
                tokenizer.chat_template = json.load(lines)["chat_template"]
    return tokenizer


# ---- placeholders

# A config names the tokens that stand for what is no text, under some of these.
PLACEHOLDER_KEYS = {
    f"{kind}_token_{suffix}": kind
    for kind in ("image", "video", "audio")
    for suffix in ("id", "index")
}


def placeholder_tokens(config: PreTrainedConfig) -> dict[int, str]:
    """The tokens that stand for an image, a video or audio in a target's input: id -> which.

    No text has them. So a drafter is taught none of them, and none may be its mask token.
    """
    found = {}
    for key, kind in PLACEHOLDER_KEYS.items():
        number = getattr(config, key, None)
        if number is not None:
            found[number] = kind
    return found


def check_is_no_placeholder(mask_token_id: int, config: PreTrainedConfig) -> None:
    """Raise where a drafter's mask token stands for an image in its target's input."""
    kind = placeholder_tokens(config).get(mask_token_id)
    if kind is not None:
        raise ValueError(
            f"mask_token_id {mask_token_id} is the target's placeholder of {kind}, so that a blank"
            " would look like one. Give mask_token_id another token that never occurs in your data"
        )


# ---- positions


def on_all_axes(position_ids: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """Positions of text, as the target of a config takes them. (B, S) -> (B, S), or (R, B, S) with
    M-RoPE: the count of tokens, and then the same on each axis of an image.

    Some targets (Qwen2.5-VL) take (B, S) for the axes alone. Without the count they would not tell
    packed documents apart.
    """
    rope = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    if "mrope_section" not in rope:
        return position_ids
    return position_ids.expand(1 + len(rope["mrope_section"]), -1, -1)
