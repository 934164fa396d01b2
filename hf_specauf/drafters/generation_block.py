"""Our candidate generator for block drafters. Travels to the Hub: imports only torch and
transformers.

Compared with transformers' built-in one it records what every pass accepted, can cap or skip a
draft, runs without position ids, and adds as little as possible to the target's own pass.
"""

from collections.abc import Callable
from types import MethodType
from typing import NamedTuple

import torch
from torch import nn

from .transformers_internals import (
    OVERRIDDEN,
    CandidateGenerator,
    DynamicCache,
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

UNSET_ASSISTANT_TOKENS = 20  # what transformers fills in for `num_assistant_tokens`


class Round(NamedTuple):
    """One verification pass of the target (the prefill pass is not a round)."""

    emitted: int  # tokens committed, bonus included
    accepted: int  # drafted tokens accepted, A
    tested: int  # drafted slots whose verdict is known; slots beyond an end of sequence or length cut are not
    drafted: int  # drafted slots given to the target; 0 in a skipped round


def embed_noise(embedding: nn.Module, noise_ids: torch.Tensor) -> torch.Tensor:
    """Target embeddings of noise ids, the only place they are made: training and decoding cannot
    differ.

    A target's own norm inside its embedding module (`embed_norm`) is left out, as transformers'
    generator does.

    Args:
        embedding (`nn.Module`): `target.get_input_embeddings()`.
        noise_ids (`torch.LongTensor` of shape `(B, Q)`): anchors and mask tokens.
    """
    norm = getattr(embedding, "embed_norm", None)
    if norm is None:
        return embedding(noise_ids)
    embedding.embed_norm = nn.Identity()
    try:
        return embedding(noise_ids)
    finally:
        embedding.embed_norm = norm


def apply_head(head: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """The target's head in its own dtype and on its own device, in training and decoding alike.
    (..., H) -> (..., V)

    Under autocast accelerate hands out fp32 hidden states, whatever the target's dtype.
    """
    weight = head.weight
    dtype = weight.dtype if weight.is_floating_point() else hidden_states.dtype
    return head(hidden_states.to(weight.device, dtype)).to(hidden_states.device)


def add_correction(logits: torch.Tensor, correction: torch.Tensor) -> torch.Tensor:
    """Domino's final logits (arXiv 2605.29707), in training and decoding alike: base logits and
    correction (..., V) in the wider of their dtypes, fp32 at least."""
    wide = torch.promote_types(torch.promote_types(logits.dtype, correction.dtype), torch.float32)
    return logits.to(wide) + correction.to(wide)


class BlockCandidateGenerator(CandidateGenerator):
    """Draft a block with one drafter pass over the target's tapped hidden states (DFlash, arXiv
    2602.06036); a causal head then corrects it token by token, one step of a GRU and a low-rank
    product each (Domino, arXiv 2605.29707).

    Args:
        drafter (`PreTrainedModel`): the block drafter.
        target (`PreTrainedModel`): the target, lender of embedding and head.
        generation_config (`GenerationConfig`): of the running `generate` call.
        logits_processor (`LogitsProcessorList`, *optional*): applied to the draft's logits slot by
            slot, so that the draft is drawn from the very distribution verification divides by.
        max_draft_tokens (`int`, *optional*): verify at most this many drafted tokens a pass
            (default K - 1), or `num_assistant_tokens` of the call if that is less. The drafter
            still fills its whole block: it was trained to.
        skip_round (`Callable[[list[Round]], bool]`, *optional*): called before each draft with the
            rounds so far; true leaves this round to the target alone.
        rounds (`list[Round]`, *optional*): where passes are recorded.
    """

    requires_model_outputs = True

    def __init__(
        self,
        drafter,
        target,
        generation_config,
        logits_processor=None,
        max_draft_tokens: int | None = None,
        skip_round: Callable[[list[Round]], bool] | None = None,
        rounds: list[Round] | None = None,
    ):
        config = drafter.config
        self.drafter = drafter
        self.embedding, self.head = target.get_input_embeddings(), target.get_output_embeddings()
        self.taps = config.target_layer_ids
        # of all hidden states the target keeps just the taps
        self.model_kwargs_overrides = {"output_hidden_states": [i + 1 for i in self.taps]}
        self.block_size = config.block_size
        self.first_slot = (
            config.predicting_slots.start
        )  # the slot that predicts the token after the anchor
        asked = generation_config.num_assistant_tokens
        asked = self.block_size if asked in (None, UNSET_ASSISTANT_TOKENS) else asked
        self.max_draft_tokens = min(max_draft_tokens or self.block_size, asked, self.block_size - 1)
        self.skip_round = skip_round
        self.max_length = generation_config.max_length
        self.do_sample = generation_config.do_sample
        self.returns_logits = (
            self.do_sample or generation_config.assistant_ensemble_weight is not None
        )
        self.logits_processor = logits_processor if logits_processor else None
        self.rounds = rounds if rounds is not None else []
        self.cache = DynamicCache(config=config)
        self.device = drafter.device
        self.masks = torch.full(
            (1, self.block_size - 1), config.mask_token_id, device=self.embedding.weight.device
        )
        self.pending: list[
            torch.Tensor
        ] = []  # taps of committed tokens the drafter has not read yet
        self.draft: torch.Tensor | None = None  # (1, drafted), what the target is verifying
        self.length = 0  # of the sequence before the pass under way; 0 before the prefill

    def get_candidates(
        self,
        input_ids,
        model_kwargs=None,
        model_outputs=None,
        is_first_iteration=False,
        n_last_matches=0,
        **kwargs,
    ) -> tuple[torch.LongTensor, torch.Tensor | None]:
        """Return (input_ids followed by the draft, logits of the draft or `None`); one call a
        verification pass."""
        self.draft = None
        if is_first_iteration:  # the prefill pass comes first: there are no hidden states yet
            return input_ids, None
        hidden = model_outputs.hidden_states
        committed = int(n_last_matches) + 1 if self.length else input_ids.shape[1] - 1
        self.pending.append(
            torch.cat([hidden[i + 1][:, :committed].to(self.device) for i in self.taps], dim=-1)
        )
        self.length = input_ids.shape[1]
        drafted = min(self.max_draft_tokens, self.max_length - self.length - 1)
        if drafted <= 0 or (self.skip_round is not None and self.skip_round(self.rounds)):
            return input_ids, None
        hidden_states = self._run_drafter(input_ids, model_kwargs)[
            :, self.first_slot : self.first_slot + drafted
        ]
        self.draft, logits = self._fill(input_ids, hidden_states)
        return torch.cat([input_ids, self.draft], dim=1), logits if self.returns_logits else None

    def _run_drafter(
        self, input_ids: torch.Tensor, model_kwargs: dict
    ) -> torch.Tensor:  # (1, K, H)
        context = torch.cat(self.pending, dim=1) if len(self.pending) > 1 else self.pending[0]
        self.pending = []
        mask = model_kwargs.get(
            "attention_mask"
        )  # (1, S) with the anchor, or None where nothing is padded
        if (positions := model_kwargs.get("position_ids")) is None:
            seen = mask if mask is not None else torch.ones_like(input_ids)
            positions = (seen.cumsum(-1) - 1).clamp(min=0)
        anchor = positions[:, -1:]
        offsets = torch.arange(self.block_size, device=anchor.device)
        positions = torch.cat([positions[:, -context.shape[1] - 1 : -1], anchor + offsets], dim=1)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(1, self.block_size - 1)], dim=1).to(self.device)
        noise_ids = torch.cat([input_ids[:, -1:].to(self.masks.device), self.masks], dim=1)
        output = self.drafter(
            noise_embeds=embed_noise(self.embedding, noise_ids).to(self.device),
            context_hidden_states=context,
            attention_mask=mask,
            position_ids=positions.to(self.device),
            cache=self.cache,
        )
        self.cache.crop(-self.block_size)  # the block's own keys and values never become context
        return output.last_hidden_state

    def _fill(self, input_ids, hidden_states) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Draft (1, drafted) and, where they are asked for, its logits (1, drafted, V) from the
        hidden rows (1, drafted, H) that predict it: all slots at once, or, where a causal head or
        logits processors look at the tokens before, slot by slot, so that the logits are those each
        token was drawn from."""
        base = apply_head(self.head, hidden_states).to(input_ids.device)  # (1, drafted, V)
        correct, processor = self.drafter.correct, self.logits_processor
        wide = self.returns_logits or processor is not None  # verification's own dtype
        if correct is None and processor is None:
            base = base.float() if wide else base
            return self._draw(base[0]).T, base
        hidden_states, state = hidden_states.to(self.device), None
        sequence, tokens, logits = input_ids, [input_ids[:, -1:]], []
        for j in range(base.shape[1]):
            scores = base[:, j]
            if correct is not None:
                embed = embed_noise(self.embedding, tokens[-1].to(self.masks.device)).to(
                    self.device
                )
                scores, state = correct(scores, hidden_states[:, j], embed[:, 0], state, j)
            scores = scores.float() if wide else scores
            if processor is not None:
                scores = processor(sequence, scores)
            tokens.append(self._draw(scores))
            if processor is not None:
                sequence = torch.cat([sequence, tokens[-1]], dim=1)
            if self.returns_logits:
                logits.append(scores)
        return torch.cat(tokens[1:], dim=1), torch.stack(logits, dim=1) if logits else None

    def _draw(self, scores: torch.Tensor) -> torch.Tensor:  # (rows, V) -> (rows, 1)
        return (
            torch.multinomial(scores.softmax(-1), 1)
            if self.do_sample
            else scores.argmax(-1, keepdim=True)
        )

    def update_candidate_strategy(self, input_ids, scores, num_matches) -> None:
        """Record the pass: called once after each verification, cut already to end of sequence and
        length."""
        if not self.length:  # the prefill pass
            return
        emitted = input_ids.shape[1] - self.length
        drafted = 0 if self.draft is None else self.draft.shape[1]
        accepted = emitted - 1
        tested = min(emitted, drafted)
        # A pass cut by end of sequence or length ends in a drafted token that was itself accepted.
        if emitted <= drafted and bool(self.draft[0, emitted - 1] == input_ids[0, -1]):
            accepted = emitted
        self.rounds.append(Round(emitted, accepted, tested, drafted))


class StopWhereToldTo(StoppingCriteria):
    """A call's stopping criteria asked of every token, as plain decoding asks them; transformers'
    assisted loop asks once a pass, and would not see a stop string that ends inside an accepted
    draft. Cuts the sequence there, in place. (A streamer and `scores` have the rest of that pass by
    then.)"""

    def __init__(self, criteria: StoppingCriteriaList, rounds: Callable[[], list[Round]]):
        self.criteria, self.rounds, self.length = criteria, rounds, None

    def __call__(self, input_ids, scores, **kwargs) -> torch.Tensor:
        size = input_ids.shape[1]
        for length in range(size if self.length is None else min(self.length + 1, size), size + 1):
            done = self.criteria(input_ids[:, :length], scores, **kwargs)
            if bool(done.all()):
                break
        if cut := size - length:
            input_ids.resize_(input_ids.shape[0], length)
            if rounds := self.rounds():  # none of another assistant, such as prompt lookup
                emitted = rounds[-1].emitted - cut
                rounds[-1] = rounds[-1]._replace(emitted=emitted, accepted=emitted, tested=emitted)
        self.length = length
        return done


class DraftingOverrides:
    """Instance overrides of internals of transformers' `generate`, until `undo()`: with `drafter`
    as assistant, the target takes its candidates from `make_generator`, and what would go wrong
    silently is refused. The user's generation config, which is saved with the target, stays
    untouched. One target may have several drafters.

    Args:
        target (`PreTrainedModel`): the target, no wrapper.
        drafter (`PreTrainedModel` or `PeftModel`): the very object given as `assistant_model`.
        make_generator (`Callable`): (target, generation_config, logits_processor=...) -> candidate
            generator.
    """

    NAMES = ("_get_candidate_generator", "_validate_generation_mode", "_get_stopping_criteria")

    def __init__(self, target, drafter, make_generator: Callable):
        check_methods(type(target), OVERRIDDEN)
        self.target, self.drafter, self.make_generator = target, drafter, make_generator
        self.generator = None  # of the call under way
        self.all = vars(target).setdefault(
            "_drafting", []
        )  # of this target; the first one's methods serve them all
        if not self.all:
            vars(target).update(
                {name: MethodType(getattr(self, name), target) for name in self.NAMES}
            )
        self.all.append(self)

    def undo(self) -> None:
        """Give the target its own `generate` back. Calling it twice is harmless."""
        if self in self.all:
            self.all.remove(self)
        if not self.all:
            for name in (*self.NAMES, "_drafting"):
                vars(self.target).pop(name, None)

    def _of(self, assistant_model) -> "DraftingOverrides | None":
        return next((one for one in reversed(self.all) if one.drafter is assistant_model), None)

    def _validate_generation_mode(
        self, target, generation_mode, generation_config, generation_mode_kwargs
    ):
        self.generator = None
        if self._of(generation_mode_kwargs.get("assistant_model")) is not None:
            if generation_mode != GenerationMode.ASSISTED_GENERATION:
                raise ValueError(
                    f"generation mode {generation_mode.value!r} cannot be drafted for, and"
                    " transformers would silently ignore the drafter: set num_beams=1, or leave"
                    " assistant_model out"
                )
            if target._is_stateful:
                raise ValueError(
                    f"{type(target).__name__} keeps a recurrent state that cannot be rolled back to"
                    " the accepted tokens; its output would be silently wrong. Generate without"
                    " assistant_model."
                )
            if generation_config.output_hidden_states:
                raise ValueError(
                    "output_hidden_states=True and a block drafter cannot go together: the target"
                    " keeps only the tapped layers. Run one more forward pass on the finished text"
                    " for its hidden states."
                )
            if generation_config.use_cache is False:
                raise ValueError(
                    "a drafter needs the target's cache: leave use_cache out, or set use_cache=True"
                )
            check_cache_implementation(generation_config.cache_implementation)
            watermark = type(generation_config.watermarking_config).__name__
            if generation_config.guidance_scale not in (None, 1) or watermark.startswith("SynthID"):
                raise ValueError(
                    "guidance_scale and SynthID watermarks keep a state of every token they saw,"
                    " drafted and rejected ones too: the output would be silently wrong. Leave them"
                    " out, or assistant_model."
                )
        type(target)._validate_generation_mode(
            target, generation_mode, generation_config, generation_mode_kwargs
        )

    def _get_stopping_criteria(self, target, generation_config, stopping_criteria, *args, **kwargs):
        criteria = type(target)._get_stopping_criteria(
            target, generation_config, stopping_criteria, *args, **kwargs
        )
        known = (
            MaxLengthCriteria,
            EosTokenCriteria,
            MaxTimeCriteria,
        )  # which the assisted loop gets right
        if all(isinstance(one, known) for one in criteria):
            return criteria
        rounds = lambda: [] if self.generator is None else self.generator.rounds  # noqa: E731
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
                target, generation_config, input_ids, inputs_tensor, logits_processor, model_kwargs,
                assistant_model=assistant_model, **kwargs,
            )  # fmt: skip
        if input_ids.shape[0] > 1:
            raise ValueError(
                f"the batch has {input_ids.shape[0]} rows; transformers' assisted generation takes"
                " one. Call generate row by row, or leave assistant_model out (drafting gains"
                " little in batches)."
            )
        if input_ids.shape[1] == 0:
            raise ValueError(
                "a block drafter needs token ids: pass input_ids (inputs_embeds alone are not"
                " enough)"
            )
        target_cache = cache_of(model_kwargs)
        if target_cache.get_seq_length() > 0:
            raise ValueError(
                "the cache given already holds tokens. transformers would feed the whole prompt"
                " again and the output would be silently wrong: pass the full conversation as"
                " input_ids and no cache (past_key_values)."
            )
        check_cache(target_cache)
        if (positions := model_kwargs.get("position_ids")) is not None and positions.dim() != 2:
            raise ValueError(
                f"{type(target).__name__} uses {positions.dim()}-D position ids, which a block"
                " drafter cannot follow"
            )
        self.generator = mine.make_generator(
            target, generation_config, logits_processor=logits_processor
        )
        return self.generator


def shape_differences(target, config) -> list[str]:
    """What of a drafter's config does not fit a target's shape, in words; empty where all fits."""
    text = target.config.get_text_config(decoder=True)
    found = {
        "hidden_size": text.hidden_size,
        "vocab_size": target.get_input_embeddings().weight.shape[0],
        "num_target_layers": text.num_hidden_layers,
    }
    trained = {key: getattr(config, key) for key in found}
    return [
        f"{key} {trained[key]} (target: {value})"
        for key, value in found.items()
        if value != trained[key]
    ]


def generate_with_drafter(target, drafter, *args, **kwargs):
    """`target.generate(*args, **kwargs)` with `drafter` as its assistant; nothing is left on the
    target.

    Args:
        target (`PreTrainedModel`): the target, no wrapper.
        drafter (`PreTrainedModel`): the drafter, no wrapper.

    Returns:
        What `target.generate` returns: the target's own output.

    Raises:
        ValueError: the drafter was trained for another model.
    """
    if wrong := shape_differences(target, drafter.config):
        raise ValueError(
            f"this drafter does not belong to this target: its config says {', '.join(wrong)}. It"
            f" was trained for {drafter.config.target_model_name_or_path or 'an unnamed target'};"
            " load that target or another drafter."
        )
    overrides = DraftingOverrides(target, drafter, drafter.eval().get_candidate_generator)
    try:
        return target.generate(*args, **kwargs, assistant_model=drafter)
    finally:
        overrides.undo()
