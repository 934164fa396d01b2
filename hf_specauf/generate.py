"""`attach(target, drafter)`: plain `target.generate(**inputs, assistant_model=drafter)` with a block drafter."""

from collections.abc import Callable
from contextlib import suppress
from types import MethodType

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import GenerationMode

from .acceptance import Acceptance, summarize
from .drafters.generation_block import BlockCandidateGenerator, Round
from .target import check_pair, innermost


class Attachment:
    """A drafter at work on a target; undone by `detach()` or by leaving a `with` block.

    Attributes:
        generations (`list[list[Round]]`): the verification passes of each `generate` call so far.
    """

    def __init__(self, target, drafter, max_draft_tokens=None, skip_round=None):
        self.target, self.drafter = innermost(target), drafter
        self.max_draft_tokens, self.skip_round = max_draft_tokens, skip_round
        self.generations: list[list[Round]] = []
        # Instance overrides of two internals of transformers' generate; the user's generation config, which is saved
        # with the target, stays untouched.
        self.target._get_candidate_generator = MethodType(self._get_candidate_generator, self.target)
        self.target._validate_generation_mode = MethodType(self._validate_generation_mode, self.target)

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *exception) -> None:
        self.detach()

    def detach(self) -> None:
        """Give the target its own `generate` back. Calling it twice is harmless."""
        for name in ("_get_candidate_generator", "_validate_generation_mode"):
            with suppress(AttributeError):
                delattr(self.target, name)

    @property
    def rounds(self) -> list[Round]:
        """All verification passes so far."""
        return [r for generation in self.generations for r in generation]

    def acceptance(self) -> Acceptance:
        """tau, alpha_k and histogram over all `generate` calls so far."""
        return summarize(self.rounds, self.drafter.config.block_size)

    def _is_ours(self, assistant) -> bool:
        return assistant is self.drafter

    def _validate_generation_mode(self, target, generation_mode, generation_config, generation_mode_kwargs):
        if self._is_ours(generation_mode_kwargs.get("assistant_model")):
            if generation_mode != GenerationMode.ASSISTED_GENERATION:
                raise ValueError(
                    f"generation mode {generation_mode.value!r} cannot be drafted for, and transformers would "
                    "silently ignore the drafter: set num_beams=1, or leave assistant_model out"
                )
            if target._is_stateful:
                raise ValueError(
                    f"{type(target).__name__} keeps a recurrent state that cannot be rolled back to the accepted "
                    "tokens; its output would be silently wrong. Generate without assistant_model."
                )
            if generation_config.output_hidden_states:
                raise ValueError(
                    "output_hidden_states=True and a block drafter cannot go together: the target keeps only the "
                    "tapped layers. Run one more forward pass on the finished text for its hidden states."
                )
        type(target)._validate_generation_mode(target, generation_mode, generation_config, generation_mode_kwargs)

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
        if not self._is_ours(assistant_model):
            return type(target)._get_candidate_generator(
                target, generation_config, input_ids, inputs_tensor, logits_processor, model_kwargs,
                assistant_model=assistant_model, **kwargs,
            )  # fmt: skip
        if input_ids.shape[0] > 1:
            raise ValueError(
                f"the batch has {input_ids.shape[0]} rows; transformers' assisted generation takes one. Call generate "
                "row by row, or leave assistant_model out (drafting gains little in batches)."
            )
        if input_ids.shape[1] == 0:
            raise ValueError("a block drafter needs token ids: pass input_ids (inputs_embeds alone are not enough)")
        if model_kwargs["past_key_values"].get_seq_length() > 0:
            raise ValueError(
                "past_key_values already holds tokens. transformers would feed the whole prompt again and the output "
                "would be silently wrong: pass the full conversation as input_ids and no past_key_values."
            )
        if (positions := model_kwargs.get("position_ids")) is not None and positions.dim() != 2:
            raise ValueError(
                f"{type(target).__name__} uses {positions.dim()}-D position ids, which a block drafter cannot follow"
            )
        self.generations.append([])
        base = innermost(assistant_model)
        return base.get_candidate_generator(
            target,
            generation_config,
            logits_processor=logits_processor,
            max_draft_tokens=self.max_draft_tokens,
            skip_round=self.skip_round,
            rounds=self.generations[-1],
        )


def attach(
    target: PreTrainedModel | PeftModel,
    drafter: PreTrainedModel | PeftModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_draft_tokens: int | None = None,
    skip_round: Callable[[list[Round]], bool] | None = None,
) -> Attachment:
    """Make plain `target.generate(**inputs, assistant_model=drafter)` work, and record what every pass accepts.

    Output is the target's own: greedy decoding gives the same tokens, sampling the same distribution.

    Args:
        target (`PreTrainedModel` or `PeftModel`): the target; only this object is affected, nothing is saved with it.
        drafter (`PreTrainedModel` or `PeftModel`): a block drafter trained for it, on any device, fp32 or bf16.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): checked against the one of training.
        max_draft_tokens (`int`, *optional*): verify at most this many drafted tokens a pass (default K - 1). Helps
            where wide passes of the target are dear.
        skip_round (`Callable[[list[Round]], bool]`, *optional*): told the rounds so far before each draft; true
            leaves the round to the target alone.

    Returns:
        [`Attachment`]: statistics, `detach()`; also a context manager.

    Raises:
        ValueError: the drafter does not fit the target (layers, hidden size, vocabulary, words), or is fp16. Another
            target's id or commit, or another chat template, is a warning.
    """
    base = innermost(drafter)
    if not hasattr(base, "get_candidate_generator"):
        raise TypeError(
            f"{type(base).__name__} is not a block drafter; load one with AutoModel.from_pretrained (a z-lab folder "
            "without our model_type loads as a plain Qwen3Model with random embeddings)"
        )
    if base.dtype == torch.float16:
        raise ValueError(
            "fp16 drafters accept nothing (vllm#55250): load the drafter with dtype=torch.bfloat16 or float32"
        )
    if max_draft_tokens is not None and not 1 <= max_draft_tokens < base.config.block_size:
        raise ValueError(
            f"max_draft_tokens is {max_draft_tokens}; it must be in 1..{base.config.block_size - 1} (K - 1)"
        )
    check_pair(target, base.config, tokenizer)
    base.eval()
    return Attachment(target, drafter, max_draft_tokens, skip_round)


__all__ = ["Attachment", "BlockCandidateGenerator", "attach"]
