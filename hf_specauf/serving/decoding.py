"""Make a target's `generate()` faster with a block drafter.

    output = hf_specauf.generate(target, drafter, **inputs)      # in one call

    with hf_specauf.attach(target, drafter) as attachment:       # with statistics and caps
        output = target.generate(**inputs, assistant_model=drafter)
        print(attachment.acceptance().tau)

Both work at batch size 1. Both give the target's own output.
"""

from collections.abc import Callable

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..drafters.configuration_dflash import check_dtype
from ..drafters.draft_length import Costs, DraftLength, Round
from ..drafters.drafts import AUTO, BlockDrafts, check_draft_length
from ..drafters.lookup import LookupChoice, check_lookup
from ..drafters.overrides import DraftingOverrides
from ..identity import as_called, check_pair, innermost, refuse_virtual_tokens, unwrapped
from .acceptance import Acceptance, summarize
from .lookup_alone import NO_DRAFTER, NoDrafter


def generate(
    target: PreTrainedModel | PeftModel,
    drafter: PreTrainedModel | PeftModel | None,
    *args,
    draft_length: int | str | None = AUTO,
    lookup: int | str | bool = AUTO,
    **kwargs,
):
    """`target.generate(*args, **kwargs)`, faster, with a block drafter of any kind.

    The limits are those of [`attach`], batch size 1 first of all. The output is the target's own,
    and nothing is left on the target. Use [`attach`] for statistics, caps and skips, or to check
    the tokenizer.

    Args:
        target, drafter, draft_length, lookup: as for [`attach`].
        args, kwargs: as for `target.generate`.

    Returns:
        What `target.generate` returns.

    Raises:
        TypeError, ValueError: as [`attach`], or the call is one that [`attach`] cannot serve.
    """
    with attach(target, drafter, draft_length=draft_length, lookup=lookup) as attachment:
        # DDP and its like have no `generate` of their own.
        return unwrapped(target).generate(*args, **kwargs, assistant_model=attachment.drafter)


def attach(
    target: PreTrainedModel | PeftModel,
    drafter: PreTrainedModel | PeftModel | None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    draft_length: int | str | None = AUTO,
    costs: Costs | None = None,
    lookup: int | str | bool = AUTO,
    skip_round: Callable[[list[Round]], bool] | None = None,
) -> "Attachment":
    """Make `target.generate(**inputs, assistant_model=drafter)` work, and record what it accepts.

    Limits. **Batch size 1**, greedy or sampled. No beams, no filled cache but one that the last
    call with this drafter returned, no `inputs_embeds` without ids, no `output_hidden_states`;
    static caches from transformers 5.24 on. Such a call
    raises an error that says what to change.

    Output is the target's own: greedy decoding gives the same tokens, and sampling draws from the
    same distribution. In bf16 a near-tie of two logits may go the other way.

    Args:
        target (`PreTrainedModel` or `PeftModel`): the target, also inside `torch.compile`, DDP or
            another wrapper. Only this object is affected, and nothing that is saved with it.
        drafter (`PreTrainedModel` or `PeftModel`, *optional*): a block drafter trained for it, on
            any device, fp32 or bf16. One from `torch.compile` runs compiled. `None`: drafts are
            looked up alone. Give `assistant_model=attachment.drafter` then.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): checked against the one of training.
        draft_length (`int` or `str`, *optional*, defaults to `"auto"`): decided before each pass,
            by what passes cost here and what the drafter brings: nothing is drafted where that is
            faster. A number: at most so many drafted tokens a pass. `None`: all K - 1, whatever
            they cost; so tau is measured.
        costs (`Costs`, *optional*): for `"auto"`: `attachment.costs` of an earlier run. Frozen ones
            (`costs.frozen = True`) make its decisions those of no clock.
        lookup (`int`, `str` or `bool`, *optional*, defaults to `"auto"`): verify what followed an
            earlier occurrence of the text's last tokens, where that promises more than the drafter.
            A number: so many tokens of it. `False`: the drafter alone.
        skip_round (`Callable[[list[Round]], bool]`, *optional*): told the rounds so far before each
            draft; true leaves the round to the target alone.

    Returns:
        [`Attachment`]: statistics and `detach()`. It is a context manager, too.

    Raises:
        TypeError: `drafter` is no block drafter, or the target no model of transformers.
        ValueError: the drafter does not fit the target (layers, hidden size, vocabulary, words) or
            is fp16, the target has virtual tokens, `draft_length` is neither `"auto"` nor in
            1..K-1, `lookup` is none of those named, or there are costs without `"auto"`. Another
            target's id or commit, or another chat template, is a warning.
    """
    if drafter is None:
        _check_lookup_alone(target, draft_length, lookup)
        drafter = NO_DRAFTER
    else:
        _check(target, drafter, tokenizer)
    longest = inside(drafter).config.block_size - 1
    cap, policy = _lengths(draft_length, costs, longest)
    choice = None
    if lookup is not False:
        choice = LookupChoice(longest, check_lookup(lookup))
    return Attachment(target, drafter, cap, policy, choice, skip_round)


def _lengths(
    draft_length, costs: Costs | None, longest: int
) -> tuple[int | None, DraftLength | None]:
    """The most drafted tokens of a pass, `None` for all K - 1, and what decides on fewer."""
    if draft_length == AUTO:
        return None, DraftLength(longest, costs)
    if costs is not None:
        raise ValueError(f'costs are for draft_length="{AUTO}": give both, or leave out costs')
    if draft_length is not None:
        check_draft_length(draft_length, longest)
    return draft_length, None


class Attachment:
    """A drafter at work on a target; undone by `detach()` or by leaving a `with` block.

    Attributes:
        generations (`list[list[Round]]`): the verification passes of each `generate` call so far.
        on_drafts (`Callable[[BlockDrafts], None]`, *optional*): told what a call that begins takes
            its drafts from. An evaluation times it.
    """

    def __init__(
        self,
        target: PreTrainedModel | PeftModel,
        drafter: PreTrainedModel | PeftModel,
        max_draft_tokens: int | None = None,
        policy: DraftLength | None = None,
        lookup: LookupChoice | None = None,
        skip_round: Callable[[list[Round]], bool] | None = None,
    ):
        # A wrapper's `generate` calls the one of the model inside, so that one is overridden.
        self.target = innermost(target)
        # The wrapper stays: the drafter is recognised as the object given as `assistant_model`.
        self.drafter = drafter
        self.max_draft_tokens = max_draft_tokens
        # One for all calls, so that a second one starts with what the first has learned.
        self.policy = policy
        self.lookup = lookup
        self.skip_round = skip_round
        self.generations: list[list[Round]] = []
        self.on_drafts: Callable[[BlockDrafts], None] | None = None
        inside(drafter).eval()
        self._overrides = DraftingOverrides(self.target, drafter, self._drafts)

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *exception) -> None:
        self.detach()

    def detach(self) -> None:
        """Give the target its own `generate` back. Calling it twice is harmless."""
        self._overrides.undo()

    @property
    def rounds(self) -> list[Round]:
        """All verification passes so far."""
        return [r for generation in self.generations for r in generation]

    @property
    def costs(self) -> Costs | None:
        """What passes and drafting cost here, in seconds; `None` unless `draft_length="auto"`."""
        return None if self.policy is None else self.policy.costs

    def acceptance(self) -> Acceptance:
        """tau, alpha_k and histogram over all `generate` calls so far: the drafter's own, without
        the passes whose drafts were looked up."""
        own = [r for r in self.rounds if not r.looked_up]
        return summarize(own, inside(self.drafter).config.block_size)

    def _drafts(self, target, generation_config, logits_processor) -> BlockDrafts:
        """What a `generate` call that begins takes its drafts from."""
        rounds: list[Round] = []
        self.generations.append(rounds)
        drafts = inside(self.drafter).get_drafts(
            target,
            generation_config,
            logits_processor=logits_processor,
            max_draft_tokens=self.max_draft_tokens,
            skip_round=self.skip_round,
            draft_length=self.policy,
            lookup=self.lookup,
            rounds=rounds,
            run=None if isinstance(self.drafter, NoDrafter) else as_called(self.drafter),
        )
        if self.on_drafts is not None:
            self.on_drafts(drafts)
        return drafts


def inside(drafter) -> PreTrainedModel | NoDrafter:
    """A drafter without its wrapper, or what stands in its place."""
    return drafter if isinstance(drafter, NoDrafter) else innermost(drafter)


def _check_lookup_alone(target, draft_length, lookup) -> None:
    """Raise where there is no drafter, and drafts cannot be looked up alone."""
    refuse_virtual_tokens(target)
    if lookup is False:
        raise ValueError(
            'there is nothing to draft with: give a drafter, or leave out lookup=False ("auto")'
        )
    if draft_length not in (AUTO, None):
        raise ValueError(
            f"draft_length is {draft_length!r} and there is no drafter: lookup={draft_length!r}"
            " says how many tokens to look up"
        )


def _check(target, drafter, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Raise where a drafter cannot serve the target."""
    base = innermost(drafter)
    if not hasattr(base, "get_drafts"):
        raise TypeError(
            f"{type(base).__name__} is not a block drafter; load one with AutoModel.from_pretrained"
            " (a z-lab folder without our model_type loads as a plain Qwen3Model with random"
            " embeddings)"
        )
    check_dtype(base.dtype)
    check_pair(target, base.config, tokenizer)


__all__ = ["AUTO", "Attachment", "BlockDrafts", "attach", "generate"]
