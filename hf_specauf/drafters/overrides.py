"""What is changed on a target while a drafter is attached, and taken back afterwards.

Travels to the Hub with Domino drafters: imports only torch, transformers and its siblings.

Three methods of one target object are overridden. No class is changed, nothing that is saved, and
not the user's generation config:

    `_validate_generation_mode`  refuses what would go wrong silently
    `_get_stopping_criteria`     also stops inside an accepted draft
    `_get_candidate_generator`   takes the drafts from our generator

Of a target whose first weights are offloaded, `parameters` is a fourth.
"""

import warnings
from collections.abc import Callable
from types import MethodType

import torch
from torch import nn

from .draft_length import Round
from .target_parts import device_of
from .transformers_internals import (
    OVERRIDDEN,
    EosTokenCriteria,
    GenerationMode,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    cache_of,
    check_cache,
    check_cache_implementation,
    check_methods,
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
    if target._is_stateful:
        raise ValueError(
            f"{type(target).__name__} keeps a recurrent state that cannot be rolled back to the"
            " accepted tokens; its output would be silently wrong. Generate without"
            " assistant_model."
        )
    if generation_config.output_hidden_states:
        raise ValueError(
            "output_hidden_states=True and a block drafter cannot go together: the target keeps"
            " only the tapped layers. Run one more forward pass on the finished text for its"
            " hidden states."
        )
    if generation_config.use_cache is False:
        raise ValueError(
            "a drafter needs the target's cache: leave use_cache out, or set use_cache=True"
        )
    check_cache_implementation(generation_config.cache_implementation)
    watermark = type(generation_config.watermarking_config).__name__
    if generation_config.guidance_scale not in (None, 1) or watermark.startswith("SynthID"):
        raise ValueError(
            "guidance_scale and SynthID watermarks keep a state of every token they saw, drafted"
            " and rejected ones too: the output would be silently wrong. Leave them out, or"
            " assistant_model."
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
    target_cache = cache_of(model_kwargs)
    if target_cache.get_seq_length() > 0:
        raise ValueError(
            "the cache given already holds tokens. transformers would feed the whole prompt again"
            " and the output would be silently wrong: pass the full conversation as input_ids and"
            " no cache (past_key_values)."
        )
    check_cache(target_cache)
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


# ---- stopping


class StopWhereToldTo(StoppingCriteria):
    """Ask a call's stopping criteria of every token, as plain decoding does, and cut there.

    transformers' assisted loop asks them once a pass. It would not see a stop string that ends
    inside an accepted draft. The sequence is cut in place, because the loop takes no other answer
    than whether to stop. A streamer and `scores` have the rest of that pass by then.

    Args:
        criteria (`StoppingCriteriaList`): of the call.
        rounds (`Callable[[], list[Round]]`): gives the rounds of the call so far.
    """

    def __init__(self, criteria: StoppingCriteriaList, rounds: Callable[[], list[Round]]):
        self.criteria = criteria
        self.rounds = rounds
        # Of the sequence when it was last asked.
        self.length: int | None = None

    def __call__(self, input_ids, scores, **kwargs) -> torch.Tensor:
        size = input_ids.shape[1]
        first = size
        if self.length is not None:
            first = min(self.length + 1, size)
        for length in range(first, size + 1):
            done = self.criteria(input_ids[:, :length], scores, **kwargs)
            if bool(done.all()):
                break
        cut = size - length
        if cut > 0:
            # Only one row has several new tokens at once, so its first ones stay where they are.
            input_ids.resize_(input_ids.shape[0], length)
            self._cut_last_round(cut)
        self.length = length
        return done

    def _cut_last_round(self, cut: int) -> None:
        rounds = self.rounds()
        if not rounds:
            # Another assistant drafts, such as prompt lookup.
            return
        # The pass now ends in a drafted token that was itself accepted.
        emitted = rounds[-1].emitted - cut
        rounds[-1] = rounds[-1]._replace(emitted=emitted, accepted=emitted, tested=emitted)


# What the assisted loop gets right by itself: it cuts a pass at the first two, and time is asked of
# once a pass in any case.
SERVED_BY_TRANSFORMERS = (MaxLengthCriteria, EosTokenCriteria, MaxTimeCriteria)


# ---- the overrides


class DraftingOverrides:
    """Override internals of `generate` on one target object, until `undo()`.

    Calls with `drafter` as `assistant_model` take their candidates from `make_generator`. All other
    calls go on as before. One target may have several drafters.

    Args:
        target (`PreTrainedModel`): the target, no wrapper.
        drafter (`PreTrainedModel` or `PeftModel`): the very object given as `assistant_model`.
        make_generator (`Callable`): (target, generation_config, logits_processor=...) -> candidate
            generator.

    Raises:
        RuntimeError: this version of transformers has no such methods, or other arguments.
    """

    NAMES = ("_get_candidate_generator", "_validate_generation_mode", "_get_stopping_criteria")

    def __init__(self, target, drafter, make_generator: Callable):
        check_methods(type(target), OVERRIDDEN)
        # Another copy of this file (the package's, a Hub folder's) reads the last two by name.
        self.target = target
        self.drafter = drafter
        self.make_generator = make_generator
        # Of the call under way.
        self.generator = None
        # The list lies on the target, because copies of this file share nothing else. The methods
        # of whoever came first serve all drafters.
        self.attached = vars(target).setdefault("_drafting", [])
        if not self.attached:
            for name in self.NAMES:
                vars(target)[name] = MethodType(getattr(self, name), target)
            if target.device.type == "meta":
                vars(target)["parameters"] = MethodType(self._parameters, target)
        self.attached.append(self)

    def undo(self) -> None:
        """Give the target its own `generate` back. Calling it twice is harmless."""
        if self not in self.attached:
            # Undone before. Whatever is on the target by now belongs to somebody else.
            return
        self.attached.remove(self)
        if not self.attached:
            for name in (*self.NAMES, "_drafting", "parameters"):
                vars(self.target).pop(name, None)

    def _of(self, assistant_model) -> "DraftingOverrides | None":
        """Whoever attached this drafter last; `None` for any other assistant."""
        for one in reversed(self.attached):
            if one.drafter is assistant_model:
                return one
        return None

    @staticmethod
    def _parameters(target, recurse: bool = True):
        """The target's parameters, after an empty one on the device where its inputs belong.

        transformers' assisted loop moves candidates to the device of the first parameter, which is
        `meta` where the embedding is offloaded.
        """
        device = device_of(target.get_input_embeddings())
        yield nn.Parameter(torch.empty(0, dtype=target.config.dtype, device=device), False)
        yield from type(target).parameters(target, recurse)

    # Each of the following has the name of what it overrides, and calls that by the target's class.

    def _validate_generation_mode(
        self, target, generation_mode, generation_config, generation_mode_kwargs
    ):
        self.generator = None
        if self._of(generation_mode_kwargs.get("assistant_model")) is not None:
            check_generation(target, generation_mode, generation_config)
            # Without it, because transformers asks an assistant for the target's vocabulary, and
            # this target's may have been resized since the drafter was trained.
            generation_mode_kwargs = dict(generation_mode_kwargs)
            del generation_mode_kwargs["assistant_model"]
        type(target)._validate_generation_mode(
            target, generation_mode, generation_config, generation_mode_kwargs
        )

    def _get_stopping_criteria(self, target, generation_config, stopping_criteria, *args, **kwargs):
        criteria = type(target)._get_stopping_criteria(
            target, generation_config, stopping_criteria, *args, **kwargs
        )
        if all(isinstance(one, SERVED_BY_TRANSFORMERS) for one in criteria):
            return criteria

        def rounds() -> list[Round]:
            # Asked late, because the generator is made after the criteria.
            return [] if self.generator is None else self.generator.rounds

        return StoppingCriteriaList([StopWhereToldTo(criteria, rounds)])

    def _get_candidate_generator(
        self,
        target,
        generation_config,
        input_ids,
        inputs_tensor,
        logits_processor,
        model_kwargs,
        assistant_model=None,
        **kwargs,
    ):
        mine = self._of(assistant_model)
        if mine is None:
            return type(target)._get_candidate_generator(
                target,
                generation_config,
                input_ids,
                inputs_tensor,
                logits_processor,
                model_kwargs,
                assistant_model=assistant_model,
                **kwargs,
            )
        check_inputs(target, input_ids, model_kwargs)
        self.generator = mine.make_generator(
            target, generation_config, logits_processor=logits_processor
        )
        return self.generator


def generate_with_drafter(target, drafter, *args, **kwargs):
    """`target.generate(*args, **kwargs)` with `drafter` as its assistant; nothing is left on the
    target.

    Args:
        target (`PreTrainedModel`): the target, no wrapper.
        drafter (`PreTrainedModel`): the drafter, no wrapper.

    Returns:
        What `target.generate` returns: the target's own output.

    Raises:
        ValueError: the drafter was trained for a model of another shape.
    """
    check_shape(target, drafter.config)
    overrides = DraftingOverrides(target, drafter, drafter.eval().get_candidate_generator)
    try:
        return target.generate(*args, **kwargs, assistant_model=drafter)
    finally:
        overrides.undo()
