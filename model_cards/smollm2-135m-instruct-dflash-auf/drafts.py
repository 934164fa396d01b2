"""Drafts for `generate()`: what a block drafter proposes, and what each pass accepted of it.

Travels to the Hub: imports only torch, transformers and its siblings. It only reads the target.
The loop that asks for drafts and verifies them is `loop.py`.

transformers has a generator of drafts of the same kind (`DFlashTokenCandidateGenerator`, which
`speculation_type="dflash"` runs). Ours gives statistics, caps and skips, and serves causal heads.
A comment that begins with `Built-in:` says where the two differ, and why.

Letters: B rows (always 1 in decoding), K slots of a block, H hidden size, L taps, C committed
tokens, V vocabulary.
"""

import time
import weakref
from collections.abc import Callable

import torch

from .draft_length import DraftLength, Round
from .lookup import Continuation, Lookup, LookupChoice
from .target_parts import apply_head, device_of, embed_noise, pass_mode
from .transformers_internals import DynamicCache, Past
from .verification import Draft

# What transformers fills in for `num_assistant_tokens`, so that we cannot tell whether a user did.
UNSET_ASSISTANT_TOKENS = 20
AUTO = "auto"  # decided before each pass


def check_draft_length(draft_length: int | str, longest: int) -> None:
    """Raise unless a draft length is a number that a drafter can draft.

    Raises:
        ValueError: it is not in 1..`longest`, K - 1.
    """
    if type(draft_length) is not int or not 1 <= draft_length <= longest:
        raise ValueError(
            f'draft_length is {draft_length!r}; it must be in 1..{longest} (K - 1), or "{AUTO}"'
        )


def confidences(logits: torch.Tensor) -> list[float]:
    """The largest probability of each slot. (drafted, V) -> drafted floats

    A slot's whole distribution decides it, and not the token drawn there. So a sampled draft may be
    cut by it without changing the text's distribution. It is the drafter's own, before causal head
    and logits processors: what those make of a slot depends on the tokens drawn before.
    """
    logits = logits.float()
    return (logits.amax(-1) - logits.logsumexp(-1)).exp().tolist()


class Extended:
    """Rows (..., S) of a prompt that go on as a text grows, made longer in large steps, so that a
    pass only looks at a part of them.

    Args:
        start (`torch.Tensor` of shape `(..., S)`).
        more (`Callable`): (the last column `(..., 1)`, 1 .. n `(n,)`) -> the next n columns.
    """

    STEP = 256

    def __init__(self, start: torch.Tensor, more: Callable):
        self.rows = start
        self.more = more

    def upto(self, length: int) -> torch.Tensor:
        """The first columns, (..., length): a view, valid as long as the call."""
        missing = length - self.rows.shape[-1]
        if missing > 0:
            count = max(missing, self.STEP, self.rows.shape[-1])
            steps = torch.arange(1, count + 1, device=self.rows.device)
            added = self.more(self.rows[..., -1:], steps).to(self.rows.dtype)
            self.rows = torch.cat([self.rows, added.expand(*self.rows.shape[:-1], -1)], dim=-1)
        return self.rows[..., :length]


def counted(last: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """How positions go on. (..., 1), (n,) -> (..., n)"""
    return last + steps


def ones(last: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """How an attention mask goes on. (..., 1), (n,) -> (n,)"""
    return torch.ones_like(steps)


def padding(mask: torch.Tensor | None) -> torch.Tensor | None:
    """A mask that leaves something out; `None` for any other, which costs a pass time and says
    nothing: SDPA then copies keys and values for each group of heads."""
    if mask is not None and bool(mask.all()):
        return None
    return mask


class BlockDrafts:
    """Drafts a block with one drafter pass over the target's tapped hidden states (DFlash, arXiv
    2602.06036). A causal head then corrects it token by token (Domino, arXiv 2605.29707).

    One object serves one `generate` call. The loop calls `begin` after the prefill, and then for
    each pass of the target `propose`, and `learn` when it knows the verdict.

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
        lookup (`LookupChoice`, *optional*): take what followed an earlier occurrence of the text's
            last tokens for a draft, where that promises more.
        rounds (`list[Round]`, *optional*): where passes are recorded.
        run (`Callable`, *optional*): what is called in the drafter's place, e.g. its compiled form.
    """

    def __init__(
        self,
        drafter,
        target,
        generation_config,
        logits_processor=None,
        max_draft_tokens: int | None = None,
        skip_round: Callable[[list[Round]], bool] | None = None,
        draft_length: DraftLength | None = None,
        lookup: LookupChoice | None = None,
        rounds: list[Round] | None = None,
        run: Callable | None = None,
    ):
        config = drafter.config
        self.drafter = drafter
        self.run = drafter if run is None else run
        self.mode = pass_mode(self.run)
        self.device = drafter.device
        self.embedding = target.get_input_embeddings()
        self.head = target.get_output_embeddings()
        self.taps = config.target_layer_ids
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
        # A continuation costs no slots, so it may be longer than a block, unless the caller says.
        self.is_capped = len(caps) > 1
        self.skip_round = skip_round
        self.draft_length = draft_length
        self.lookup, self.index = lookup, Lookup()
        # What was looked up for the pass under way, and whether that is its draft.
        self.found: Continuation | None = None
        self.looked_up = False
        self.do_sample = generation_config.do_sample
        # Built-in: an empty list counts as processors, and costs a loop over the slots.
        self.logits_processor = logits_processor or None

        # An empty list of the caller's must be filled, not replaced.
        self.rounds = rounds if rounds is not None else []
        # Built-in: a `DFlashCache`, which tells a drafter who is calling. See `DominoDraftModel`.
        self.cache = DynamicCache(config=config)
        # The anchor, which each round writes, and the mask tokens after it.
        self.noise_ids = torch.full(
            (1, self.block_size), config.mask_token_id, device=device_of(self.embedding)
        )  # (1, K)
        # Of the text, from `begin` on: positions, and the mask where something is padded.
        self.positions = self.mask = None
        # Taps of committed tokens that the drafter has not read yet, each (1, C, L * H).
        self.pending: list[torch.Tensor] = []
        # What `draft_length` learns of the pass under way: when it began, how long its draft took
        # (`None` without one), and how sure the drafter was of each slot.
        self.pass_began = 0.0
        self.drafting_seconds = self.confidences = None

    def begin(
        self,
        taps: list[torch.Tensor],
        positions: torch.LongTensor | None,
        mask: torch.LongTensor | None,
        ids: torch.LongTensor,
        tokens: list[int],
        past: Past | None = None,
    ) -> None:
        """Take in the prompt, once the target has read it.

        Args:
            taps (`list[torch.Tensor]`): of each tapped layer, (1, S, H); of the tokens after `past`
                where there is one.
            positions (`torch.LongTensor` of shape `(1, S)` or `(axes, 1, S)`, *optional*): those
                that the target was given.
            mask (`torch.LongTensor` of shape `(1, S)`, *optional*): attention mask of the prompt;
                `None` where nothing is padded.
            ids (`torch.LongTensor` of shape `(1, S)`): the prompt.
            tokens (`list[int]`): the same and the token after it; empty where nothing is looked up.
            past (`Past`, *optional*): of the prompt's first tokens.
        """
        if past is not None:
            self.cache, self.pending = past.cache, past.pending
        if positions is not None and positions.dim() == 3:
            # M-RoPE (Qwen-VL): the count of tokens, and then a row for each axis of an image.
            positions = positions[0]
        if positions is None:
            # Built-in: it needs position ids. Targets without any (Bloom) are served here.
            seen = torch.ones_like(ids) if mask is None else mask
            positions = (seen.cumsum(-1) - 1).clamp(min=0)
        self.positions = Extended(positions.to(self.device), counted)
        if mask is not None:
            self.mask = Extended(mask.to(self.device), ones)
        self.index.extend(tokens)
        self.keep(taps)

    def past(self, ids: torch.LongTensor) -> Past:
        """What is known of a text (1, C), all of whose taps were kept."""
        return Past(weakref.ref(self.drafter), ids, self.cache, self.pending)

    def keep(self, taps: list[torch.Tensor]) -> None:
        """Keep the taps of committed tokens for the next draft: of each layer (1, C, H). Built-in:
        the drafter reads them at once. A skipped round here leaves them pending."""
        # Cat copies, so that a draft's rejected rows are not held.
        self.pending.append(torch.cat([one.to(self.device) for one in taps], dim=-1))

    def propose(self, ids: torch.LongTensor, room: int) -> Draft | None:
        """The draft that the next pass verifies; `None` where it should verify none.

        Args:
            ids (`torch.LongTensor` of shape `(1, S)`): all tokens; the last is the anchor.
            room (`int`): tokens that a draft may have at most.
        """
        draft = self._propose(ids, room)
        self.pass_began = time.perf_counter()
        return draft

    def _propose(self, ids, room: int) -> Draft | None:
        most = min(self.max_draft_tokens, room)
        self.drafting_seconds = self.confidences = self.found = None
        self.looked_up = False
        if most <= 0:
            return None
        if self.skip_round is not None and self.skip_round(self.rounds):
            return None
        tokens = self._look_up(most if self.is_capped else room, most)
        if tokens:
            self.looked_up = True
            return Draft(torch.tensor([tokens], device=ids.device))
        if self.draft_length is not None and not self.draft_length.wants_draft():
            return None
        began = time.perf_counter()
        block = self._run_drafter(ids)  # (1, K, H)
        hidden_states = block[:, self.first_slot : self.first_slot + most]  # (1, most, H)
        base = apply_head(self.head, hidden_states).to(ids.device)  # (1, most, V)
        drafted = most
        if self.draft_length is not None:
            self.confidences = confidences(base[0])
            drafted = min(self.draft_length.length(self.confidences), most)
        draft = None
        if drafted > 0:
            draft = self._fill(ids, hidden_states[:, :drafted], base[:, :drafted])
        self.drafting_seconds = time.perf_counter() - began
        return draft

    def _look_up(self, room: int, slots: int) -> list[int]:
        """The looked-up draft of this round, of at most `room` tokens; empty where the drafter's
        `slots` promise more."""
        if self.lookup is None:
            return []
        self.found = self.index.continuation(min(room, self.lookup.longest))
        if self.found is None:
            return []
        length = self.lookup.length(self.found, self.draft_length, slots)
        return self.found.tokens[:length]

    def _run_drafter(self, ids: torch.LongTensor) -> torch.Tensor:  # (1, K, H)
        """Read the pending context into the drafter's cache, and fill the block at the anchor."""
        context = self.pending[0]
        if len(self.pending) > 1:
            # Only after skipped rounds: after a long prompt a copy of the context is dear.
            context = torch.cat(self.pending, dim=1)  # (1, C, L * H)
        self.pending = []
        # The context's positions, and the block's, whose first is the anchor's.
        end = ids.shape[1] - 1 + self.block_size
        positions = self.positions.upto(end)[:, -self.block_size - context.shape[1] :]
        mask = None if self.mask is None else self.mask.upto(end)  # (1, S + K - 1)
        self.noise_ids[:, :1] = ids[:, -1:]
        noise_embeds = embed_noise(self.embedding, self.noise_ids).to(self.device)  # (1, K, H)
        with self.mode():
            output = self.run(
                noise_embeds=noise_embeds,
                context_hidden_states=context,
                attention_mask=mask,
                position_ids=positions,  # (1, C + K)
                cache=self.cache,
            )
        # The block's own keys and values never become context.
        # Built-in: crops them before its next draft.
        self.cache.crop(-self.block_size)
        return output.last_hidden_state

    def _fill(self, ids, hidden_states, base) -> Draft:
        """Draw the draft's tokens from the hidden rows that predict them.

        The logits that a sampled draft comes with are those after causal head and processors, in
        verification's fp32: what each token was really drawn from.

        Args:
            ids (`torch.LongTensor` of shape `(1, S)`): the text up to the anchor.
            hidden_states (`torch.Tensor` of shape `(1, drafted, H)`): the rows that predict.
            base (`torch.Tensor` of shape `(1, drafted, V)`): the head's logits of them.
        """
        if self.drafter.correct is not None or self.logits_processor is not None:
            return self._fill_slot_by_slot(ids, hidden_states, base)
        # Nothing looks at the tokens drafted before: all slots are drawn at once.
        # Built-in: it always returns logits. Greedy verification compares tokens and needs none.
        if not self.do_sample:
            return Draft(self._draw(base[0]).T)
        base = base.float()
        return Draft(self._draw(base[0]).T, base)  # (drafted, 1) -> (1, drafted)

    def _fill_slot_by_slot(self, ids, hidden_states, base) -> Draft:
        """As `_fill`, where a causal head or processors look at the tokens before each slot.

        Built-in: has no causal head.
        """
        correct, processor = self.drafter.correct, self.logits_processor
        state = None  # of the causal head
        token = ids[:, -1:]  # (1, 1), the anchor at first
        tokens, logits = [], []
        for j in range(base.shape[1]):
            scores = base[:, j]  # (1, V)
            if correct is not None:
                embed = embed_noise(self.embedding, token.to(self.noise_ids.device))  # (1, 1, H)
                embed = embed[:, 0].to(self.device)  # (1, H)
                scores, state = correct(scores, hidden_states[:, j], embed, state, j)
            if self.do_sample or processor is not None:
                scores = scores.float()
            if processor is not None:
                scores = processor(torch.cat([ids, *tokens], dim=1), scores)
            token = self._draw(scores)
            tokens.append(token)
            logits.append(scores)
        draft = torch.cat(tokens, dim=1)  # (1, drafted)
        if not self.do_sample:
            return Draft(draft)
        return Draft(draft, torch.stack(logits, dim=1))  # (1, drafted, V)

    def _draw(self, scores: torch.Tensor) -> torch.Tensor:
        """One token a row: drawn when sampling, else the best. (rows, V) -> (rows, 1)"""
        if self.do_sample:
            return torch.multinomial(scores.softmax(-1), 1)
        return scores.argmax(-1, keepdim=True)

    def learn(self, tokens: list[int], accepted: int, draft: Draft | None) -> None:
        """Record a pass. Called after each verification.

        Args:
            tokens (`list[int]`): those that were committed. Where the text ended within a draft
                they are no more than those accepted, and the last of them is a drafted one.
            accepted (`int`): drafted tokens that the target agreed with, A.
            draft (`Draft`, *optional*): what was verified.
        """
        emitted = len(tokens)
        drafted = 0 if draft is None else draft.length
        round = Round(
            emitted, min(accepted, emitted), min(emitted, drafted), drafted, self.looked_up
        )
        self.rounds.append(round)
        if self.lookup is not None:
            self.lookup.learn(round, self.found, tokens)
            self.index.extend(tokens)
        if self.draft_length is not None:
            self.draft_length.learn(
                round,
                pass_seconds=time.perf_counter() - self.pass_began,
                drafting_seconds=self.drafting_seconds,
                confidences=self.confidences,
            )


__all__ = ["BlockDrafts", "Extended", "counted", "ones", "padding"]
