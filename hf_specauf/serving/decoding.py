"""`attach(target, drafter)`: plain `target.generate(**inputs, assistant_model=drafter)` with a
block drafter; and `hf_specauf.generate(target, drafter, **inputs)`, the same in one call."""

from collections.abc import Callable

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..drafters.generation_block import BlockCandidateGenerator, DraftingOverrides, Round
from ..identity import check_pair, innermost
from .acceptance import Acceptance, summarize


class Attachment:
    """A drafter at work on a target; undone by `detach()` or by leaving a `with` block.

    Attributes:
        generations (`list[list[Round]]`): the verification passes of each `generate` call so far.
    """

    def __init__(self, target, drafter, max_draft_tokens=None, skip_round=None):
        self.target, self.drafter = innermost(target), drafter
        self.max_draft_tokens, self.skip_round = max_draft_tokens, skip_round
        self.generations: list[list[Round]] = []
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
        return summarize(self.rounds, self.drafter.config.block_size)

    def _candidate_generator(self, target, generation_config, logits_processor):
        self.generations.append([])
        return innermost(self.drafter).get_candidate_generator(
            target,
            generation_config,
            logits_processor=logits_processor,
            max_draft_tokens=self.max_draft_tokens,
            skip_round=self.skip_round,
            rounds=self.generations[-1],
        )


def _checked(target, drafter, tokenizer=None) -> PreTrainedModel:
    """The drafter without its wrapper, in eval mode, if it can serve the target."""
    base = innermost(drafter)
    if not hasattr(base, "get_candidate_generator"):
        raise TypeError(
            f"{type(base).__name__} is not a block drafter; load one with AutoModel.from_pretrained"
            " (a z-lab folder without our model_type loads as a plain Qwen3Model with random"
            " embeddings)"
        )
    if base.dtype == torch.float16:
        raise ValueError(
            "fp16 drafters accept nothing (vllm#55250): load the drafter with dtype=torch.bfloat16"
            " or float32"
        )
    if isinstance(target, PeftModel) and target.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"{target.active_peft_config.peft_type.value} puts virtual tokens before the prompt,"
            " which a drafter does not see: its drafts would be worthless, and transformers cuts"
            " them. Use a LoRA on the target, or merge."
        )
    check_pair(target, base.config, tokenizer)
    return base.eval()


def attach(
    target: PreTrainedModel | PeftModel,
    drafter: PreTrainedModel | PeftModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_draft_tokens: int | None = None,
    skip_round: Callable[[list[Round]], bool] | None = None,
) -> Attachment:
    """Make plain `target.generate(**inputs, assistant_model=drafter)` work, and record what every
    pass accepts.

    Output is the target's own: greedy decoding gives the same tokens, sampling the same
    distribution.

    Args:
        target (`PreTrainedModel` or `PeftModel`): the target; only this object is affected, nothing
            is saved with it.
        drafter (`PreTrainedModel` or `PeftModel`): a block drafter trained for it, on any device,
            fp32 or bf16.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): checked against the one of training.
        max_draft_tokens (`int`, *optional*): verify at most this many drafted tokens a pass
            (default K - 1). Helps where wide passes of the target are dear.
        skip_round (`Callable[[list[Round]], bool]`, *optional*): told the rounds so far before each
            draft; true leaves the round to the target alone.

    Returns:
        [`Attachment`]: statistics, `detach()`; also a context manager.

    Raises:
        ValueError: the drafter does not fit the target (layers, hidden size, vocabulary, words), or
            is fp16. Another target's id or commit, or another chat template, is a warning.
    """
    base = _checked(target, drafter, tokenizer)
    if max_draft_tokens is not None and not 1 <= max_draft_tokens < base.config.block_size:
        raise ValueError(
            f"max_draft_tokens is {max_draft_tokens}; it must be in 1..{base.config.block_size - 1}"
            " (K - 1)"
        )
    return Attachment(target, drafter, max_draft_tokens, skip_round)


def generate(
    target: PreTrainedModel | PeftModel, drafter: PreTrainedModel | PeftModel, *args, **kwargs
):
    """`target.generate(*args, **kwargs)` with a block drafter, DFlash or Domino: the target's own
    output, faster.

    Nothing is left on the target. [`attach`] also keeps statistics, and caps or skips drafts.

    Args:
        target, drafter: as for [`attach`].
        args, kwargs: as for `target.generate`.

    Raises:
        TypeError, ValueError: as [`attach`].
    """
    with attach(target, drafter):
        return target.generate(*args, **kwargs, assistant_model=drafter)


__all__ = ["Attachment", "BlockCandidateGenerator", "attach", "generate"]
