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

from ..drafters.candidates import BlockCandidateGenerator, Round
from ..drafters.configuration_dflash import check_dtype
from ..drafters.overrides import DraftingOverrides
from ..identity import as_called, check_pair, innermost, unwrapped
from .acceptance import Acceptance, summarize


def generate(
    target: PreTrainedModel | PeftModel, drafter: PreTrainedModel | PeftModel, *args, **kwargs
):
    """`target.generate(*args, **kwargs)`, faster, with a block drafter of any kind.

    The limits are those of [`attach`], batch size 1 first of all. The output is the target's own,
    and nothing is left on the target. Use [`attach`] for statistics, caps and skips, or to check
    the tokenizer.

    Args:
        target, drafter: as for [`attach`].
        args, kwargs: as for `target.generate`.

    Returns:
        What `target.generate` returns.

    Raises:
        TypeError, ValueError: as [`attach`], or the call is one that [`attach`] cannot serve.
    """
    with attach(target, drafter):
        # DDP and its like have no `generate` of their own.
        return unwrapped(target).generate(*args, **kwargs, assistant_model=drafter)


def attach(
    target: PreTrainedModel | PeftModel,
    drafter: PreTrainedModel | PeftModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_draft_tokens: int | None = None,
    skip_round: Callable[[list[Round]], bool] | None = None,
) -> "Attachment":
    """Make `target.generate(**inputs, assistant_model=drafter)` work, and record what it accepts.

    Limits. **Batch size 1**, greedy or sampled. No beams, no filled cache, no `inputs_embeds`
    without ids, no `output_hidden_states`; static caches from transformers 5.24 on. Such a call
    raises an error that says what to change.

    Output is the target's own: greedy decoding gives the same tokens, and sampling draws from the
    same distribution. In bf16 a near-tie of two logits may go the other way.

    Args:
        target (`PreTrainedModel` or `PeftModel`): the target, also inside `torch.compile`, DDP or
            another wrapper. Only this object is affected, and nothing that is saved with it.
        drafter (`PreTrainedModel` or `PeftModel`): a block drafter trained for it, on any device,
            fp32 or bf16. One from `torch.compile` runs compiled.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): checked against the one of training.
        max_draft_tokens (`int`, *optional*): verify at most this many drafted tokens a pass
            (default K - 1). Helps where wide passes of the target are dear.
        skip_round (`Callable[[list[Round]], bool]`, *optional*): told the rounds so far before each
            draft; true leaves the round to the target alone.

    Returns:
        [`Attachment`]: statistics and `detach()`. It is a context manager, too.

    Raises:
        TypeError: `drafter` is no block drafter, or the target no model of transformers.
        ValueError: the drafter does not fit the target (layers, hidden size, vocabulary, words) or
            is fp16, the target has virtual tokens, or `max_draft_tokens` is not in 1..K-1. Another
            target's id or commit, or another chat template, is a warning.
    """
    config = _check(target, drafter, tokenizer).config
    if max_draft_tokens is not None and not 1 <= max_draft_tokens < config.block_size:
        raise ValueError(
            f"max_draft_tokens is {max_draft_tokens}; it must be in 1..{config.block_size - 1}"
            " (K - 1)"
        )
    return Attachment(target, drafter, max_draft_tokens, skip_round)


class Attachment:
    """A drafter at work on a target; undone by `detach()` or by leaving a `with` block.

    Attributes:
        generations (`list[list[Round]]`): the verification passes of each `generate` call so far.
    """

    def __init__(
        self,
        target: PreTrainedModel | PeftModel,
        drafter: PreTrainedModel | PeftModel,
        max_draft_tokens: int | None = None,
        skip_round: Callable[[list[Round]], bool] | None = None,
    ):
        # A wrapper's `generate` calls the one of the model inside, so that one is overridden.
        self.target = innermost(target)
        # The wrapper stays: the drafter is recognised as the object given as `assistant_model`.
        self.drafter = drafter
        self.max_draft_tokens = max_draft_tokens
        self.skip_round = skip_round
        self.generations: list[list[Round]] = []
        innermost(drafter).eval()
        self._overrides = DraftingOverrides(self.target, drafter, self._candidate_generator)

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

    def acceptance(self) -> Acceptance:
        """tau, alpha_k and histogram over all `generate` calls so far."""
        return summarize(self.rounds, innermost(self.drafter).config.block_size)

    def _candidate_generator(
        self, target, generation_config, logits_processor
    ) -> BlockCandidateGenerator:
        """What a `generate` call that begins takes its drafts from.

        The drafter makes it, because one loaded from the Hub brings its own code.
        """
        rounds: list[Round] = []
        self.generations.append(rounds)
        drafter, called = innermost(self.drafter), as_called(self.drafter)
        options = {}
        # Code that older folders bring along knows of no such argument.
        if called is not drafter:
            options["run"] = called
        return drafter.get_candidate_generator(
            target,
            generation_config,
            logits_processor=logits_processor,
            max_draft_tokens=self.max_draft_tokens,
            skip_round=self.skip_round,
            rounds=rounds,
            **options,
        )


def _check(target, drafter, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedModel:
    """The drafter without its wrapper, or an error where it cannot serve the target."""
    base = innermost(drafter)
    if not hasattr(base, "get_candidate_generator"):
        raise TypeError(
            f"{type(base).__name__} is not a block drafter; load one with AutoModel.from_pretrained"
            " (a z-lab folder without our model_type loads as a plain Qwen3Model with random"
            " embeddings)"
        )
    check_dtype(base.dtype)
    check_pair(target, base.config, tokenizer)
    return base


__all__ = ["Attachment", "BlockCandidateGenerator", "attach", "generate"]
