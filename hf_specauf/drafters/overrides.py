"""What is changed on a target while a drafter is attached, and taken back afterwards.

Travels to the Hub with Domino drafters: imports only torch, transformers and its siblings.

Two methods of one target object are overridden, by a class of its own. Its own class is not
changed, nothing that is saved, and not the user's generation config.
"""

import copyreg
import threading
import warnings
from collections.abc import Callable
from functools import partial

import torch

from .draft_length import DraftLength
from .drafts import AUTO, check_draft_length
from .lookup import LookupChoice, check_lookup
from .loop import Decoding
from .target_parts import check_state, decoder_layers, positions_move
from .transformers_internals import (
    OVERRIDDEN,
    GenerationMode,
    cache_of,
    check_cache,
    check_cache_implementation,
    check_methods,
    cut_to,
)

# ---- what cannot be drafted for


def check_generation(target, generation_mode, generation_config) -> None:
    """Raise where a `generate` call asks for something that no drafter can help with.

    Args:
        target (`PreTrainedModel`): the target.
        generation_mode (`GenerationMode`): what transformers made of the config.
        generation_config (`GenerationConfig`): of the call.

    Raises:
        ValueError: what it is, and what to change.
    """
    if generation_mode != GenerationMode.ASSISTED_GENERATION:
        raise ValueError(
            f"generation mode {generation_mode.value!r} cannot be drafted for, and transformers"
            " would silently ignore the drafter: set num_beams=1, or leave assistant_model out"
        )
    if generation_config.num_return_sequences > 1:
        raise ValueError(
            "a drafter serves one sequence a call: set num_return_sequences to 1 and call generate"
            " once for each, or leave assistant_model out"
        )
    if generation_config.output_hidden_states:
        raise ValueError(
            "output_hidden_states=True and a block drafter cannot go together: the target keeps"
            " only the tapped layers. Run one more forward pass on the finished text for its"
            " hidden states."
        )
    if generation_config.output_attentions:
        raise ValueError(
            "output_attentions=True and a block drafter cannot go together: attentions of drafted"
            " tokens that were rejected would be among them. Run one more forward pass on the"
            " finished text for its attentions."
        )
    if generation_config.assistant_ensemble_weight is not None:
        raise ValueError(
            "assistant_ensemble_weight mixes the drafter into the target's output, and a block"
            " drafter leaves it the target's own: leave assistant_ensemble_weight out"
        )
    if generation_config.use_cache is False:
        raise ValueError(
            "a drafter needs the target's cache: leave use_cache out, or set use_cache=True"
        )
    check_cache_implementation(generation_config.cache_implementation)
    watermark = type(generation_config.watermarking_config).__name__
    if generation_config.guidance_scale not in (None, 1) or watermark.startswith("SynthID"):
        raise ValueError(KEEPS_A_STATE)


def warn_of_moving_positions(target, max_length: int) -> None:
    """Warn where a target's positions depend on how far a pass reaches: drafted tokens then move
    those of the text before them.

    Args:
        target (`PreTrainedModel`): the target.
        max_length (`int`): of the text.
    """
    if not positions_move(target):
        return
    config = target.config.get_text_config(decoder=True)
    rope = config.rope_parameters
    trained = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    if max_length > trained:
        warnings.warn(
            f"this text may grow beyond {trained} tokens, where {type(target).__name__}'s positions"
            f" change with the length of a pass (rope_type {rope['rope_type']!r}): from there on"
            " output may leave plain decoding's. Set max_length to that, or leave assistant_model"
            " out.",
            stacklevel=2,
        )


# How the names of a target's inputs begin that hold images, videos or audio.
NO_TEXT = ("pixel_values", "input_features", "input_values", "audio_values")


def check_inputs(target, input_ids: torch.Tensor, model_kwargs: dict) -> None:
    """Raise where a drafter cannot read the inputs of a `generate` call.

    Args:
        target (`PreTrainedModel`): the target.
        input_ids (`torch.LongTensor` of shape `(B, S)`): the prompt.
        model_kwargs (`dict`): of the target's first pass.

    Raises:
        ValueError: which input it is, and what to change.
    """
    if input_ids.shape[0] > 1:
        raise ValueError(
            f"the batch has {input_ids.shape[0]} rows; transformers' assisted generation takes one."
            " Call generate row by row, or leave assistant_model out (drafting gains little in"
            " batches)."
        )
    if input_ids.shape[1] == 0:
        raise ValueError(
            "a block drafter needs token ids: pass input_ids (inputs_embeds alone are not enough)"
        )
    embeds = model_kwargs.get("inputs_embeds")
    if embeds is not None and embeds.shape[1] != input_ids.shape[1]:
        raise ValueError(
            f"inputs_embeds are {embeds.shape[1]} tokens long and input_ids {input_ids.shape[1]}: a"
            " block drafter needs the id of each, so pass ids of all of them, or no inputs_embeds"
        )
    check_cache(cache_of(model_kwargs), target._is_stateful)
    # transformers has encoded images and videos by now, where the target lets it.
    media = [*(model_kwargs.get("mm_encoder_outputs") or {})]
    media += [name for name in model_kwargs if name.startswith(NO_TEXT)]
    if media:
        warnings.warn(
            f"this prompt is more than text ({', '.join(media)}), and the drafter learned from text"
            " alone: it may accept little. Output stays the target's own. Leave assistant_model out"
            " where that is slower.",
            stacklevel=2,
        )


# Processors that keep a state of every token they saw, by name: the user may bring one.
STATEFUL = ("UnbatchedClassifierFreeGuidanceLogitsProcessor", "SynthIDTextWatermarkLogitsProcessor")
KEEPS_A_STATE = (
    "guidance_scale and SynthID watermarks keep a state of every token they saw, drafted and"
    " rejected ones too: the output would be silently wrong. Leave them out, or assistant_model."
)


def check_processors(logits_processor) -> None:
    """Raise where a logits processor of the call would also count rejected tokens.

    Raises:
        ValueError: which ones, and what to change.
    """
    if any(type(one).__name__ in STATEFUL for one in logits_processor):
        raise ValueError(KEEPS_A_STATE)


def check_shape(target, config) -> None:
    """Raise unless a drafter fits a target's shape.

    A target's vocabulary may have grown or shrunk since: a DFlash drafter drafts with the target's
    own embedding and head, so that all it needs of the vocabulary is its mask token.

    Args:
        target (`PreTrainedModel`): the target, no wrapper.
        config (`DFlashConfig`): of the drafter.

    Raises:
        ValueError: what does not fit, and what to do.
    """
    text = target.config.get_text_config(decoder=True)
    # The embedding's rows: a config may name fewer than a target was padded to.
    rows = target.get_input_embeddings().weight.shape[0]
    found = {"hidden_size": text.hidden_size, "num_target_layers": text.num_hidden_layers}
    # Code that older folders bring along does not say whether it has rows of its own.
    owns_vocabulary = getattr(config, "owns_vocabulary", True)
    if owns_vocabulary:
        found["vocab_size"] = rows
    wrong = {}
    for key, value in found.items():
        trained = getattr(config, key)
        if trained != value:
            wrong[key] = f"{key} {trained} (target: {value})"
    name = config.target_model_name_or_path or "an unnamed target"
    if list(wrong) == ["vocab_size"]:
        raise ValueError(
            f"this {type(config).__name__.removesuffix('Config')} drafter does not fit this"
            f" target's vocabulary: its config says {wrong['vocab_size']}, and it has a row of its"
            f" own for each token. It was trained for {name}. Where only unused rows were added"
            f" since, target.resize_token_embeddings({config.vocab_size}) takes them away again."
            " Else train a drafter for this target; a DFlash drafter has no such rows and serves"
            " both."
        )
    if wrong:
        raise ValueError(
            "this drafter does not belong to this target: its config says"
            f" {', '.join(wrong.values())}. It was trained for {name}; load that target or another"
            " drafter."
        )
    if config.mask_token_id >= rows:
        raise ValueError(
            f"the drafter's mask_token_id is {config.mask_token_id}, and this target's embedding"
            f" was cut to {rows} rows: the drafter would have no mask token. Give it its"
            f" {config.vocab_size} rows back (target.resize_token_embeddings), with row"
            f" {config.mask_token_id} of {name}."
        )


# ---- the overrides

ATTACHING = threading.Lock()
"""Held while a target gets its class of drafting, or its own back."""


class DraftingOverrides:
    """Decode with a drafter on one target object, until `undo()`.

    `generate` finds its decoding method on the target's class. So while a drafter is attached the
    target is of a class of its own, which differs from its own in two methods:

        `_validate_generation_mode`  refuses what would go wrong silently
        `_assisted_decoding`         decodes by our loop

    Calls with `drafter` as `assistant_model` go there. All other calls go on as before. One target
    may have several drafters.

    Args:
        target (`PreTrainedModel`): the target, no wrapper.
        drafter (`PreTrainedModel` or `PeftModel`): the very object given as `assistant_model`.
        make_drafts (`Callable`): (target, generation_config, logits_processor=...) ->
            [`BlockDrafts`] of one call.

    Raises:
        RuntimeError: this version of transformers has no such methods, or other arguments.
        ValueError: the target has no list of decoder layers, or keeps a state that cannot be
            brought back to the accepted tokens.
    """

    def __init__(self, target, drafter, make_drafts: Callable):
        check_methods(type(target), OVERRIDDEN)
        decoder_layers(target)
        check_state(target)
        self.target = target
        self.drafter = drafter
        self.make_drafts = make_drafts
        # The list lies on the class, because copies of this file (the package's, a Hub folder's)
        # share nothing else. Each of its entries brings its own loop.
        with ATTACHING:
            if not hasattr(type(target), "_attached_drafters"):
                target.__class__ = drafting_class(type(target))
            self.attached = type(target)._attached_drafters
            self.attached.append(self)

    def undo(self) -> None:
        """Give the target its own `generate` back. Calling it twice is harmless."""
        with ATTACHING:
            if self not in self.attached:
                # Undone before. Whatever is on the target by now belongs to somebody else.
                return
            self.attached.remove(self)
            # Somebody else may have given the target a further class since (FSDP does). Ours then
            # stays below it, and without drafters it does nothing.
            if not self.attached and "_attached_drafters" in vars(type(self.target)):
                self.target.__class__ = type(self.target).__base__

    def validate(self, generation_mode, generation_config) -> None:
        """Raise where a call cannot be drafted for."""
        check_generation(self.target, generation_mode, generation_config)

    def decode(
        self,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        synced_gpus=False,
        streamer=None,
        # Named so that the target's passes do not get them. A block drafter needs neither.
        assistant_tokenizer=None,
        tokenizer=None,
        **model_kwargs,
    ):
        """What `_assisted_decoding` does, by our loop."""
        check_inputs(self.target, input_ids, model_kwargs)
        warn_of_moving_positions(self.target, generation_config.max_length)
        check_processors(logits_processor)
        drafts = self.make_drafts(self.target, generation_config, logits_processor=logits_processor)
        cut_to(model_kwargs, generation_config, input_ids, drafts.drafter)
        return Decoding(
            self.target,
            drafts,
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            synced_gpus=synced_gpus,
            streamer=streamer,
            model_kwargs=model_kwargs,
        ).run()


def drafting_class(own: type) -> type:
    """A target's class, with drafting. transformers takes it for the target's own, by its name."""

    class Drafting(own):
        """The target's own class, and what is asked of it otherwise while a drafter is attached."""

        _attached_drafters: list[DraftingOverrides] = []

        def _validate_generation_mode(
            self, generation_mode, generation_config, generation_mode_kwargs
        ):
            given = dict(generation_mode_kwargs)
            mine = overrides_for(self, given.get("assistant_model"))
            if mine is not None:
                mine.validate(generation_mode, generation_config)
                # Without it, because transformers asks an assistant for the target's vocabulary,
                # and this target's may have been resized since the drafter was trained.
                del given["assistant_model"]
                # As plain decoding, because its assisted decoding refuses targets with a state.
                # All else that it would ask there was asked.
                generation_mode = GenerationMode.GREEDY_SEARCH
            # Not by `super`, because another thread may give the target its own class back.
            own._validate_generation_mode(self, generation_mode, generation_config, given)

        def _assisted_decoding(self, *args, inputs_tensor=None, assistant_model=None, **kwargs):
            mine = overrides_for(self, assistant_model)
            if mine is not None:
                return mine.decode(*args, **kwargs)
            return own._assisted_decoding(
                self, *args, inputs_tensor=inputs_tensor, assistant_model=assistant_model, **kwargs
            )

        def __reduce_ex__(self, protocol):
            # A copy of the target, or a pickled one, is a plain target. pickle lets the function
            # that an object has by itself (`copyreg.__newobj__`) make no other class than its own.
            _, _, *state = super().__reduce_ex__(protocol)
            return copyreg._reconstructor, (own, object, None), *state

    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(Drafting, name, getattr(own, name))
    return Drafting


def overrides_for(target, assistant_model) -> DraftingOverrides | None:
    """Whoever attached this drafter last; `None` for any other assistant."""
    for one in reversed(getattr(type(target), "_attached_drafters", ())):
        if one.drafter is assistant_model:
            return one
    return None


def generate_with_drafter(target, drafter, *args, draft_length=AUTO, lookup=AUTO, **kwargs):
    """`target.generate(*args, **kwargs)` with `drafter` as its assistant; nothing is left on the
    target.

    Args:
        target (`PreTrainedModel`): the target, no wrapper.
        drafter (`PreTrainedModel`): the drafter, no wrapper.
        draft_length (`int` or `str`, *optional*): `"auto"` decides before each pass how much to
            draft, by what passes cost here. What it learns is kept on the drafter for the next
            call. A number: at most so many tokens; `None`: all K - 1.
        lookup (`int`, `str` or `bool`): `"auto"` also drafts what followed an earlier occurrence of
            the text's last tokens; a number of tokens; `False`: never.

    Returns:
        What `target.generate` returns: the target's own output.

    Raises:
        ValueError: the drafter was trained for a model of another shape, or `draft_length` or
            `lookup` is none of those named.
    """
    check_shape(target, drafter.config)
    longest = drafter.config.block_size - 1
    given = {}
    if draft_length == AUTO:
        given["draft_length"] = vars(drafter).setdefault("_length", DraftLength(longest))
    elif draft_length is not None:
        check_draft_length(draft_length, longest)
        given["max_draft_tokens"] = draft_length
    if lookup is True or lookup == AUTO:
        given["lookup"] = vars(drafter).setdefault("_lookup", LookupChoice(longest))
    elif lookup is not False:
        given["lookup"] = LookupChoice(longest, check_lookup(lookup))
    make_drafts = partial(drafter.eval().get_drafts, **given)
    overrides = DraftingOverrides(target, drafter, make_drafts)
    try:
        return target.generate(*args, **kwargs, assistant_model=drafter)
    finally:
        overrides.undo()
