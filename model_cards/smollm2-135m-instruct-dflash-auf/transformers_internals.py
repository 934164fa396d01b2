"""What drafters use of transformers that is no public API, and what differs between its versions:
all of it is here.

Travels to the Hub, where it runs on whatever version its reader has. The rest of the package, and
the other files of this folder, ask for no version.

| | 5.23 | 5.24 |
|---|---|---|
| name of a cache in model kwargs, forwards and outputs | `past_key_values` | `cache` |
| static caches in assisted decoding | refused | taken, where their layers can be cropped |
| quantised caches in assisted decoding | taken, and cropped wrongly | refused |
| FSDP2 modules before the optimizer is made | as the last forward left them | resharded |

The last row needs nothing here: the trainer does what 5.24 does.
"""

import copy
import inspect
import re
import warnings
import weakref
from dataclasses import dataclass
from functools import cache as once

import torch
from transformers import __version__ as VERSION

TESTED = ("5.23", "5.24")
"""Oldest and newest minor version on which this code was tested."""


def version_error(what: str) -> RuntimeError:
    """The one error for internals that are not as this code knows them.

    Args:
        what (`str`): what is missing or different.
    """
    oldest, newest = TESTED
    return RuntimeError(
        f"transformers {VERSION} is installed, and {what}, which block drafters need. This code was"
        f" tested with {oldest} to {newest}: `pip install 'transformers=={newest}.*'`, or update"
        " what this code came with (`pip install -U hf-specauf`, or a newer revision of the"
        " drafter's repository)."
    )


try:
    from transformers.cache_utils import (
        Cache,
        DFlashCache,
        DynamicCache,
        DynamicLayer,
        QuantizedCache,
        StaticLayer,
    )
    from transformers.generation import GenerationMode
    from transformers.generation.candidate_generator import (
        _prepare_attention_mask,
        _prepare_position_ids,
        _prepare_token_type_ids,
    )
    from transformers.generation.stopping_criteria import (
        EosTokenCriteria,
        MaxLengthCriteria,
        MaxTimeCriteria,
    )
    from transformers.generation.utils import ALL_CACHE_NAMES
    from transformers.modeling_layers import GradientCheckpointingLayer
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
    from transformers.models.qwen3.modeling_qwen3 import (
        Qwen3MLP,
        Qwen3RotaryEmbedding,
        eager_attention_forward,
        rotate_half,
    )

    # 5.23: "past_key_values". 5.24: "cache", and the older name only with a warning.
    CACHE: str = ALL_CACHE_NAMES[0]
    """The word this version has for a cache, in model kwargs and in a target's forward."""

    # 5.23: no static layer can be cropped. 5.24: all can, but windows that a text has outgrown.
    STATIC_CACHES_CROP: bool = StaticLayer.is_croppable
    """Whether this version's static caches can be cut back to the accepted tokens."""
except (ImportError, AttributeError) as error:
    # Older than 5.23, or so new that a name is gone. A bare "cannot import name" would not tell
    # which version to install.
    raise version_error(f"it is without something that is used here ({error})") from error

# What `overrides` replaces on a target and `loop` calls there, and the arguments of each.
OVERRIDDEN = {
    "_assisted_decoding": (
        "input_ids",
        "logits_processor",
        "stopping_criteria",
        "generation_config",
        "synced_gpus",
        "streamer",
        "assistant_model",
    ),
    "_validate_generation_mode": ("generation_mode", "generation_config", "generation_mode_kwargs"),
    "_prefill": ("input_ids", "generation_config", "model_kwargs"),
    "_update_model_kwargs_for_generation": ("outputs", "model_kwargs", "num_new_tokens"),
    "_has_unfinished_sequences": ("this_peer_finished", "synced_gpus", "device"),
    "_valid_auto_compile_criteria": ("model_kwargs", "generation_config"),
    "get_compiled_call": ("compile_config",),
}


@once
def warn_if_newer_than_tested() -> None:
    """Warn, once in a process, where transformers is newer than what this code was tested with."""
    oldest, newest = TESTED
    if _minor(VERSION) > _minor(newest):
        warnings.warn(
            f"transformers {VERSION} is newer than those this drafter's code was tested with"
            f" ({oldest} to {newest}). If something fails, `pip install 'transformers=={newest}.*'`"
            " mends it.",
            stacklevel=3,
        )


def _minor(version: str) -> tuple[int, ...]:
    """Major and minor number, of "6.0rc1" and "5.25.0.dev0" too."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def check_methods(owner: type, needed: dict[str, tuple[str, ...]]) -> None:
    """Raise unless a class of transformers still has the methods that we override, with the
    arguments that we read.

    Args:
        owner (`type`): a target's class, or `Trainer`.
        needed (`dict`): names of methods, and of each the arguments that are read.

    Raises:
        RuntimeError: names what is gone, and the versions that were tested.
    """
    for name, arguments in needed.items():
        method = getattr(owner, name, None)
        if method is None:
            raise version_error(f"{owner.__name__} has no method {name}")
        parameters = inspect.signature(method).parameters
        kinds = [parameter.kind for parameter in parameters.values()]
        if inspect.Parameter.VAR_KEYWORD in kinds:
            # A target of the user's own may override a method and pass on whatever it is given.
            continue
        missing = [argument for argument in arguments if argument not in parameters]
        if missing:
            raise version_error(f"{owner.__name__}.{name} takes no {' or '.join(missing)}")


def cache_of(model_kwargs: dict) -> Cache:
    """The target's cache among the arguments of its forward.

    Raises:
        RuntimeError: it has another name there than in the versions that were tested.
    """
    if CACHE not in model_kwargs:
        raise version_error(
            f"generate keeps its cache under none of the names known ({', '.join(ALL_CACHE_NAMES)})"
        )
    return model_kwargs[CACHE]


def longer_kwargs(model_kwargs: dict, length: int) -> dict:
    """The arguments of a target's forward for a text of `length` tokens, longer than they are."""
    longer = _prepare_attention_mask(dict(model_kwargs), length, False)
    longer = _prepare_position_ids(longer, length, False)
    longer = _prepare_token_type_ids(longer, length)
    # These it leaves as they are. Drafts are text, whose type is 0.
    for name in ("mm_token_type_ids", "moe_mm_token_type_ids"):
        types = longer.get(name)
        if types is not None:
            missing = length - types.shape[-1]
            zeros = types.new_zeros((*types.shape[:-1], missing))
            longer[name] = torch.cat([types, zeros], dim=-1)
    return longer


def decode_step_of(target, model_kwargs: dict, generation_config):
    """What runs a target's passes after the prefill: its compiled forward where transformers would
    compile plain decoding too (static caches on GPUs)."""
    if STATIC_CACHES_CROP and target._valid_auto_compile_criteria(model_kwargs, generation_config):
        return target.get_compiled_call(generation_config.compile_config)
    return target.__call__


def the_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The one cache that was given, under either name.

    5.23's built-in generator gives it as `past_key_values`, and 5.24's as `cache`.

    Raises:
        TypeError: both were given.
    """
    if cache is not None and past_key_values is not None:
        raise TypeError(
            "cache and past_key_values are two names for one argument: give one of them"
        )
    return past_key_values if cache is None else cache


@dataclass
class Past:
    """What a drafter knows of the text in a target's cache, on which it lies: a chat may give the
    cache back, and only its new turn is read.

    Attributes:
        drafter (`weakref.ref`): to the drafter.
        ids (`torch.LongTensor` of shape `(1, C)`): the tokens in the target's cache.
        cache (`DynamicCache`): the drafter's.
        pending (`list[torch.Tensor]`): taps of tokens that are not in it yet, each (1, C, L * H).
    """

    drafter: weakref.ref
    ids: torch.LongTensor
    cache: DynamicCache
    pending: list[torch.Tensor]

    def __reduce__(self):
        # Pickled, a cache is that of a text which nobody knows: a drafter is not sent along.
        return type(None), ()

    def __deepcopy__(self, memo) -> "Past":
        return Past(self.drafter, self.ids, *copy.deepcopy((self.cache, self.pending), memo))

    def cut(self, length: int) -> None:
        """Forget all tokens after the first `length`."""
        surplus = self.ids.shape[1] - length
        self.ids = self.ids[:, :length]
        while surplus > 0 and self.pending:
            last = self.pending.pop()
            if last.shape[1] > surplus:
                self.pending.append(last[:, :-surplus])
            surplus -= min(surplus, last.shape[1])
        self.cache.crop(-surplus)


def past_of(target_cache: Cache):
    """What a drafter knows of the text in a cache that one of its calls returned; else `None`."""
    return getattr(target_cache, "_drafters_past", None)


def take_past(target_cache: Cache):
    """The same, taken off: a call that fails in the middle leaves a cache which nobody knows."""
    return vars(target_cache).pop("_drafters_past", None)


def keep_past(target_cache: Cache, past) -> None:
    """Leave that on a cache which grows."""
    if not any(isinstance(layer, StaticLayer) for layer in target_cache.layers):
        target_cache._drafters_past = past


def cut_to(model_kwargs: dict, generation_config, input_ids: torch.LongTensor, drafter) -> None:
    """Cut a cache that holds tokens, and what the drafter knows of them, to what a prompt begins
    with. The prompt's last token is to be read anew in any case.

    Args:
        model_kwargs (`dict`): of the target's first pass. Nothing is done to an empty cache.
        generation_config (`GenerationConfig`): of the call.
        input_ids (`torch.LongTensor` of shape `(1, S)`): the whole text so far. One that is shorter
            than the cached text is a text of its own, from where the two part.
        drafter (`PreTrainedModel`): of this call, no wrapper.

    Raises:
        ValueError: no call with this drafter returned the cache, or it cannot be cut so far.
    """
    advice = (
        "pass the full conversation as input_ids and no cache (past_key_values), or one that the"
        " last call with this drafter returned"
    )
    target_cache, mask = cache_of(model_kwargs), model_kwargs.get("attention_mask")
    length, past = target_cache.get_seq_length(), past_of(target_cache)
    if length == 0:
        return
    # 5.24 drops a mask that says nothing, and notes how long it was.
    noted = getattr(generation_config, "_mask_length", None) or -1
    masked = noted if mask is None else mask.shape[-1]
    if masked not in (-1, input_ids.shape[1]):
        raise ValueError(
            f"input_ids are {input_ids.shape[1]} tokens and attention_mask {masked}: {advice}."
        )
    if past is None or past.drafter() is not drafter or past.ids.shape[1] != length:
        raise ValueError(
            "the cache given already holds tokens, and no call with this drafter left it so. It"
            f" drafts from what it read then: {advice}."
        )
    most = min(length, input_ids.shape[1] - 1)
    equal = (past.ids[:, :most] == input_ids[:, :most].to(past.ids.device))[0]
    common = most if bool(equal.all()) else int(equal.long().argmin())
    if common == length:
        return
    if common == 0 or any(type(layer) is not DynamicLayer for layer in target_cache.layers):
        raise ValueError(
            f"input_ids leave the text in the cache given at token {common} of {length}, and it"
            f" cannot go back so far (windows and states never can): {advice}."
        )
    target_cache.crop(common - length)
    past.cut(common)


def check_cache(target_cache: Cache, has_state: bool = False) -> None:
    """Raise unless a target's cache can be cut back to the accepted tokens after each pass.

    Args:
        target_cache (`Cache`): empty, or left by an earlier call.
        has_state (`bool`): whether a part of it is a recurrent state.

    Raises:
        ValueError: it cannot, and what to use instead.
    """
    advice = (
        "Leave cache_implementation out (a dynamic cache), or generate without assistant_model."
    )
    # 5.23 crops it, and wrongly. 5.24 refuses it only after the prefill pass.
    if isinstance(target_cache, QuantizedCache):
        raise ValueError(
            "a quantised cache cannot be cut back to the accepted tokens: the output would be"
            " silently wrong. " + advice
        )
    # 5.24 knows only after the prefill pass, too, and does not say what to use instead.
    for layer in target_cache.layers:
        if has_state and isinstance(layer, StaticLayer):
            raise ValueError(
                "a static cache and a target with a recurrent state cannot go together with a"
                f" drafter. {advice}"
            )
        if isinstance(layer, StaticLayer) and not layer.is_croppable:
            raise ValueError(
                "this static cache cannot be cut back to the accepted tokens, since its"
                " sliding-window layers overwrite what has left their window. A text no longer than"
                f" the window would fit. {advice}"
            )


def check_cache_implementation(name: str | None) -> None:
    """Raise where `cache_implementation` names static caches, and this version's cannot be cropped.

    5.23 refuses them too, but later and without a word on which version takes them.

    Raises:
        ValueError: names the version that can.
    """
    if name is None or STATIC_CACHES_CROP:
        return
    if "static" in name or "hybrid" in name or name == "sliding_window":
        raise ValueError(
            f"cache_implementation={name!r} and a drafter go together from transformers 5.24 on,"
            f" and {VERSION} is installed. Leave cache_implementation out (a dynamic cache), or"
            " update transformers."
        )


def drop_capture_hooks(model) -> None:
    """Take away the hooks that transformers leaves on a model for ever, once its hidden states were
    asked for. Every later pass calls them, and ours then run in no inference mode (`pass_mode`).
    Whoever asks again gets new ones.

    Args:
        model (`PreTrainedModel`): no wrapper.
    """
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__module__", None) == "transformers.utils.output_capturing":
                del module._forward_hooks[key]
        vars(module).pop("_output_capturing_hooks_installed", None)


# fmt: off
__all__ = [
    "ALL_ATTENTION_FUNCTIONS", "CACHE", "OVERRIDDEN", "STATIC_CACHES_CROP", "TESTED", "VERSION",
    "Cache", "DFlashCache", "DynamicCache", "EosTokenCriteria", "GenerationMode",
    "GradientCheckpointingLayer", "MaxLengthCriteria", "MaxTimeCriteria", "Past", "PreTrainedModel",
    "Qwen3MLP", "Qwen3RotaryEmbedding", "cache_of", "check_cache", "check_cache_implementation",
    "check_methods", "cut_to", "decode_step_of", "drop_capture_hooks", "eager_attention_forward",
    "keep_past", "longer_kwargs", "past_of", "rotate_half", "take_past", "the_cache",
    "version_error", "warn_if_newer_than_tested",
]
# fmt: on
