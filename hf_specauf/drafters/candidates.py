"""Drafts for `generate()`: what a block drafter proposes, and what each pass accepted of it.

Travels to the Hub: imports only torch, transformers and its siblings. It only reads the target.
What is changed on a target while a drafter is attached stands in `overrides.py`.

transformers has a generator of the same kind (`DFlashTokenCandidateGenerator`, which
`speculation_type="dflash"` runs). Ours gives statistics, caps and skips, and serves causal heads.
A comment that begins with `Built-in:` says where the two differ, and why.

Letters: B rows (always 1 in decoding), K slots of a block, H hidden size, L taps, V vocabulary.
"""

import time
from collections.abc import Callable
from typing import Any

import torch

from .draft_length import DraftLength, Round
from .target_parts import apply_head, device_of, embed_noise
from .transformers_internals import CandidateGenerator, DynamicCache

# What transformers fills in for `num_assistant_tokens`, so that we cannot tell whether a user did.
UNSET_ASSISTANT_TOKENS = 20


def confidences(logits: torch.Tensor) -> list[float]:
    """The largest probability of each slot. (drafted, V) -> drafted floats

    A slot's whole distribution decides it, and not the token drawn there. So a sampled draft may be
    cut by it without changing the text's distribution. It is the drafter's own, before causal head
    and logits processors: what those make of a slot depends on the tokens drawn before.
    """
    logits = logits.float()
    return (logits.amax(-1) - logits.logsumexp(-1)).exp().tolist()


class BlockCandidateGenerator(CandidateGenerator):
    """Draft a block with one drafter pass over the target's tapped hidden states (DFlash, arXiv
    2602.06036). A causal head then corrects it token by token (Domino, arXiv 2605.29707).

    transformers' assisted loop calls `get_candidates`, lets the target verify the draft in one
    pass, and calls `update_candidate_strategy`. The first pass is the prefill, without a draft.

    Args:
        drafter (`PreTrainedModel`): the block drafter.
        target (`PreTrainedModel`): the target, which lends its embedding and head.
        generation_config (`GenerationConfig`): of the running `generate` call.
        logits_processor (`LogitsProcessorList`, *optional*): applied to the draft's logits slot by
            slot, so that the draft is drawn from the very distribution that verification divides
            by.
        max_draft_tokens (`int`, *optional*): verify at most this many drafted tokens a pass
            (default K - 1), or `num_assistant_tokens` of the call if that is less. The drafter
            still fills its whole block, because it was trained to.
        skip_round (`Callable[[list[Round]], bool]`, *optional*): called before each draft with the
            rounds so far; true leaves this round to the target alone.
        draft_length (`DraftLength`, *optional*): decides before each draft whether and how much of
            it to verify, within `max_draft_tokens`, and learns from each pass.
        rounds (`list[Round]`, *optional*): where passes are recorded.
        run (`Callable`, *optional*): what is called in the drafter's place, e.g. its compiled form.
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
        draft_length: DraftLength | None = None,
        rounds: list[Round] | None = None,
        run: Callable | None = None,
    ):
        config = drafter.config
        self.drafter = drafter
        self.run = drafter if run is None else run
        self.device = drafter.device
        self.embedding = target.get_input_embeddings()
        self.head = target.get_output_embeddings()
        self.taps = config.target_layer_ids
        # Of all its hidden states the target keeps only the taps; entry 0 is the embedding.
        self.model_kwargs_overrides = {"output_hidden_states": [i + 1 for i in self.taps]}
        self.block_size = config.block_size
        # The slot that predicts the token after the anchor.
        # Built-in: always slot 1. Domino's slots are shifted by one, and start at 0.
        self.first_slot = config.predicting_slots.start

        caps = [self.block_size - 1]
        if max_draft_tokens is not None:
            caps.append(max_draft_tokens)
        if generation_config.num_assistant_tokens not in (None, UNSET_ASSISTANT_TOKENS):
            caps.append(generation_config.num_assistant_tokens)
        self.max_draft_tokens = min(caps)
        self.skip_round = skip_round
        self.draft_length = draft_length
        self.max_length = generation_config.max_length
        self.do_sample = generation_config.do_sample
        # Built-in: it always returns logits. Greedy verification compares tokens and needs none.
        self.returns_logits = (
            self.do_sample or generation_config.assistant_ensemble_weight is not None
        )
        # Built-in: an empty list counts as processors, and costs a loop over the slots.
        self.logits_processor = logits_processor or None

        # An empty list of the caller's must be filled, not replaced.
        self.rounds = rounds if rounds is not None else []
        # Built-in: a `DFlashCache`, which tells a drafter who is calling. See `DominoDraftModel`.
        self.cache = DynamicCache(config=config)
        self.masks = torch.full(
            (1, self.block_size - 1), config.mask_token_id, device=device_of(self.embedding)
        )  # (1, K - 1)
        # Taps of committed tokens that the drafter has not read yet, each (1, C, L * H).
        self.pending: list[torch.Tensor] = []
        # What the target is verifying, (1, drafted).
        self.draft: torch.Tensor | None = None
        # Of the sequence before the pass under way; 0 before the prefill.
        self.length = 0
        # What `draft_length` learns of the pass under way: when it began, how long its draft took
        # (`None` without one), and how sure the drafter was of each slot.
        self.pass_began = 0.0
        self.drafting_seconds = self.confidences = None

    def get_candidates(
        self,
        input_ids,
        model_kwargs=None,
        model_outputs=None,
        is_first_iteration=False,
        n_last_matches=0,
        **kwargs,
    ) -> tuple[torch.LongTensor, torch.Tensor | None]:
        """The sequence followed by the draft, and the draft's logits; called before each pass.

        Args:
            input_ids (`torch.LongTensor` of shape `(1, S)`): all tokens; the last is the anchor.
            model_kwargs (`dict`): of the target's next pass.
            model_outputs (`ModelOutput`): of the target's last pass.
            is_first_iteration (`bool`): whether the prefill pass is still to come.
            n_last_matches (`int`): drafted tokens that the last pass accepted.

        Returns:
            Token ids of shape `(1, S + drafted)`, and logits of shape `(1, drafted, V)`, which are
            `None` where verification asks for none.
        """
        self.draft = None
        if is_first_iteration:
            # There are no hidden states before the prefill pass.
            return input_ids, None
        self._keep_taps(model_outputs.hidden_states, input_ids.shape[1], int(n_last_matches))
        draft, logits = self._propose(input_ids, model_kwargs)
        self.pass_began = time.perf_counter()
        if draft is None:
            return input_ids, None
        self.draft = draft
        return torch.cat([input_ids, draft], dim=1), logits  # (1, S + drafted)

    def _propose(self, input_ids, model_kwargs) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The draft of this round and its logits, as from `_fill`; `None` twice for no draft."""
        self.drafting_seconds = self.confidences = None
        # The pass emits one token more than it accepts, and that one must fit too.
        # Built-in: drafts past the length limit, and so past the end of a static cache.
        most = min(self.max_draft_tokens, self.max_length - self.length - 1)
        if most <= 0:
            return None, None
        if self.skip_round is not None and self.skip_round(self.rounds):
            return None, None
        if self.draft_length is not None and not self.draft_length.wants_draft():
            return None, None
        began = time.perf_counter()
        block = self._run_drafter(input_ids, model_kwargs)  # (1, K, H)
        hidden_states = block[:, self.first_slot : self.first_slot + most]  # (1, most, H)
        base = apply_head(self.head, hidden_states).to(input_ids.device)  # (1, most, V)
        drafted = most
        if self.draft_length is not None:
            self.confidences = confidences(base[0])
            drafted = min(self.draft_length.length(self.confidences), most)
        draft, logits = None, None
        if drafted > 0:
            draft, logits = self._fill(input_ids, hidden_states[:, :drafted], base[:, :drafted])
        self.drafting_seconds = time.perf_counter() - began
        return draft, logits

    def _keep_taps(self, hidden_states, length: int, matches: int) -> None:
        """Keep the taps of the tokens that the last pass committed, for the next draft.

        Built-in: the drafter reads them at once. A skipped round here leaves them pending.

        Args:
            hidden_states: the target's, of which the tapped ones are set.
            length (`int`): of the sequence, S.
            matches (`int`): drafted tokens that the last pass accepted.
        """
        if self.length == 0:
            # The prefill pass read the prompt. Its own token, the anchor, has no hidden state yet.
            committed = length - 1
        else:
            # The pass read its anchor and the draft. What it rejected is no context.
            committed = matches + 1
        taps = [hidden_states[i + 1][:, :committed].to(self.device) for i in self.taps]
        self.pending.append(torch.cat(taps, dim=-1))  # (1, committed, L * H)
        self.length = length

    def _run_drafter(
        self, input_ids: torch.Tensor, model_kwargs: dict[str, Any]
    ) -> torch.Tensor:  # (1, K, H)
        """Read the pending context into the drafter's cache, and fill the block at the anchor."""
        context = self.pending[0]
        if len(self.pending) > 1:
            # Only after skipped rounds: after a long prompt a copy of the context is dear.
            context = torch.cat(self.pending, dim=1)  # (1, C, L * H)
        self.pending = []
        # Covers the whole sequence, anchor included; `None` where nothing is padded.
        mask = model_kwargs.get("attention_mask")  # (1, S)
        positions = model_kwargs.get("position_ids")  # (1, S)
        if positions is not None and positions.dim() == 3:
            # M-RoPE (Qwen-VL): the count of tokens, and then a row for each axis of an image.
            positions = positions[0]
        if positions is None:
            # Built-in: it needs position ids. Targets without any (Bloom) are served here.
            seen = torch.ones_like(input_ids) if mask is None else mask
            positions = (seen.cumsum(-1) - 1).clamp(min=0)
        anchor = positions[:, -1:]  # (1, 1)
        offsets = torch.arange(self.block_size, device=anchor.device)
        positions = torch.cat(
            [positions[:, -context.shape[1] - 1 : -1], anchor + offsets], dim=1
        )  # (1, C + K)
        if mask is not None:
            # The anchor is in the mask already.
            mask = torch.cat([mask, mask.new_ones(1, self.block_size - 1)], dim=1)  # (1, S + K - 1)
            mask = mask.to(self.device)
        noise_ids = torch.cat(
            [input_ids[:, -1:].to(self.masks.device), self.masks], dim=1
        )  # (1, K)
        output = self.run(
            noise_embeds=embed_noise(self.embedding, noise_ids).to(self.device),  # (1, K, H)
            context_hidden_states=context,
            attention_mask=mask,
            position_ids=positions.to(self.device),
            cache=self.cache,
        )
        # The block's own keys and values never become context.
        # Built-in: crops them before its next draft.
        self.cache.crop(-self.block_size)
        return output.last_hidden_state

    def _fill(self, input_ids, hidden_states, base) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Draw the draft's tokens from the hidden rows that predict them.

        transformers then verifies (Leviathan et al., arXiv 2211.17192, algorithm 1). With q the
        drafter's probability of a drafted token and p the target's:

            p >= q: always accept the drafted token
            p <  q: accept it with probability p / q
            at the first rejection: draw a token from max(p - q, 0), normalised, and drop the rest
            without a rejection: draw the bonus token from p

        The text then follows p exactly, whatever the drafter says. This holds only if q is the
        distribution that the token was really drawn from. So the logits returned are those after
        the causal head and the logits processors, in verification's fp32. A greedy pass accepts
        drafted tokens while they are the target's own choice, and needs no logits.

        Args:
            input_ids (`torch.LongTensor` of shape `(1, S)`): the sequence up to the anchor.
            hidden_states (`torch.Tensor` of shape `(1, drafted, H)`): the rows that predict.
            base (`torch.Tensor` of shape `(1, drafted, V)`): the head's logits of them.

        Returns:
            The draft `(1, drafted)`, and its logits `(1, drafted, V)`; `None` where verification
            asks for none.
        """
        if self.drafter.correct is not None or self.logits_processor is not None:
            return self._fill_slot_by_slot(input_ids, hidden_states, base)
        # Nothing looks at the tokens drafted before: all slots are drawn at once.
        if not self.returns_logits:
            return self._draw(base[0]).T, None
        base = base.float()
        return self._draw(base[0]).T, base  # (drafted, 1) -> (1, drafted)

    def _fill_slot_by_slot(
        self, input_ids, hidden_states, base
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `_fill`, where a causal head or processors look at the tokens before each slot.

        Built-in: has no causal head.
        """
        correct, processor = self.drafter.correct, self.logits_processor
        hidden_states = hidden_states.to(self.device)
        state = None  # of the causal head
        token = input_ids[:, -1:]  # (1, 1), the anchor at first
        tokens, logits = [], []
        for j in range(base.shape[1]):
            scores = base[:, j]  # (1, V)
            if correct is not None:
                embed = embed_noise(self.embedding, token.to(self.masks.device))  # (1, 1, H)
                embed = embed[:, 0].to(self.device)  # (1, H)
                scores, state = correct(scores, hidden_states[:, j], embed, state, j)
            if self.returns_logits or processor is not None:
                scores = scores.float()
            if processor is not None:
                scores = processor(torch.cat([input_ids, *tokens], dim=1), scores)
            token = self._draw(scores)
            tokens.append(token)
            if self.returns_logits:
                logits.append(scores)
        draft = torch.cat(tokens, dim=1)  # (1, drafted)
        if not self.returns_logits:
            return draft, None
        return draft, torch.stack(logits, dim=1)  # (1, drafted, V)

    def _draw(self, scores: torch.Tensor) -> torch.Tensor:
        """One token a row: drawn when sampling, else the best. (rows, V) -> (rows, 1)"""
        if self.do_sample:
            return torch.multinomial(scores.softmax(-1), 1)
        return scores.argmax(-1, keepdim=True)

    def update_candidate_strategy(self, input_ids, scores, num_matches) -> None:
        """Record the pass. Called after each verification.

        Built-in: records nothing.

        Args:
            input_ids (`torch.LongTensor` of shape `(1, S)`): all tokens, cut already at an end of
                sequence or at the length limit.
            scores (`torch.Tensor`): not used.
            num_matches (`int`): not used, because it is wrong by one where the pass was cut.
        """
        if self.length == 0:
            # The prefill pass is no round.
            return
        emitted = input_ids.shape[1] - self.length
        drafted = 0 if self.draft is None else self.draft.shape[1]
        # The last token emitted is the target's own: the bonus, or in place of a rejected one.
        accepted = emitted - 1
        # A pass that was cut ends in a drafted token which was itself accepted.
        if emitted <= drafted and bool(self.draft[0, emitted - 1] == input_ids[0, -1]):
            accepted = emitted
        tested = min(emitted, drafted)
        self.rounds.append(Round(emitted, accepted, tested, drafted))
        if self.draft_length is not None:
            self.draft_length.learn(
                self.rounds[-1],
                pass_seconds=time.perf_counter() - self.pass_began,
                drafting_seconds=self.drafting_seconds,
                confidences=self.confidences,
            )
