"""What greedy decoding with a drafter would accept, found by reading a text instead of writing it.

Greedy output does not depend on the drafter. So the target writes it once, in batches, and any
number of drafters is measured on it: one pass of the target over the text gives all hidden states,
the drafter fills a block at every position in a few calls, and a walk visits the positions that
decoding would have visited. In exact arithmetic the rounds are those of `generate`, for a small
part of its time. Rounding may move a round where two tokens are nearly tied.

    frozen = FrozenTarget(target, drafter.config)
    rounds = replay(frozen, drafter, output, prompt_tokens=prompt.shape[1], max_new_tokens=128)
    print(summarize(rounds, drafter.config.block_size).tau)

It measures acceptance alone. How fast decoding is only decoding tells (`compare`), and so does how
sampling accepts, because a sampled text depends on the drafts.
"""

from functools import partial

import torch

from ..drafters.configuration_dflash import DFlashConfig
from ..drafters.draft_length import Round
from ..identity import innermost
from ..losses.blocks import Blocks, make_blocks
from ..losses.branches import branch_losses
from ..losses.objectives import LossSpec
from ..target import FrozenTarget
from .acceptance import accepted_prefix

# Blocks that the drafter fills at once: as many as training draws from a row.
BLOCKS_AT_ONCE = 512


def replay(
    target: FrozenTarget,
    drafter,
    output: torch.Tensor,
    *,
    prompt_tokens: int,
    max_new_tokens: int,
    draft_length: int | None = None,
) -> list[Round]:
    """The verification passes in which greedy decoding with a drafter would have written a text.

    Args:
        target (`FrozenTarget`): of the drafter's config.
        drafter (`PreTrainedModel` or `PeftModel`): a block drafter. It is put in eval mode.
        output (`torch.LongTensor` of shape `(1, S)`): a prompt and what the target wrote after it
            greedily, up to and including its end token or up to the length limit.
        prompt_tokens (`int`): of the prompt.
        max_new_tokens (`int`): the length limit that the text was written under. Decoding drafts
            nothing past it.
        draft_length (`int`, *optional*): as of [`attach`]; K - 1 by default.

    Raises:
        ValueError: the text is longer than the limit, or has no prompt.
    """
    new_tokens = output.shape[1] - prompt_tokens
    if not (0 < prompt_tokens and 0 <= new_tokens <= max_new_tokens):
        raise ValueError(
            f"the text has {output.shape[1]} tokens, prompt_tokens is {prompt_tokens} and"
            f" max_new_tokens {max_new_tokens}: give the prompt and the whole greedy output"
        )
    config = innermost(drafter).config
    most = config.block_size - 1
    if draft_length is not None:
        most = min(most, draft_length)
    accepted = accepted_at(target, drafter, output, first=prompt_tokens)
    return walk(accepted, max_new_tokens, most)


@torch.no_grad()
def accepted_at(target: FrozenTarget, drafter, output: torch.Tensor, *, first: int) -> list[int]:
    """How many drafted tokens a pass would accept, were its anchor at each position of a text.

    Args:
        output (`torch.LongTensor` of shape `(1, S)`): the text.
        first (`int`): the first position of interest.

    Returns:
        S - 1 - `first` numbers, for the positions `first` .. S - 2.
    """
    if first >= output.shape[1] - 1:
        # Nothing follows the first position: the target ended its answer at once.
        return []
    innermost(drafter).eval()
    config = innermost(drafter).config
    context = target.context(output)  # (1, S, L * H)
    # of the loss that looks at no slot after the first wrong one
    spec = LossSpec.of("auf", config.block_size)
    accepted = []
    positions = torch.arange(first, output.shape[1] - 1, device=output.device)
    for anchors in positions.split(BLOCKS_AT_ONCE):
        anchors = anchors[None]  # (1, N)
        blocks = blocks_in(output, anchors, config)
        previous = None
        if config.reads_previous_tokens:
            # The text's own tokens. A pass accepts slot k only if all drafted tokens before it were
            # these, so that a causal head has read them too.
            previous = target.noise_embeds(blocks.previous_ids)  # (1, N, P, H)
        found = drafter(
            noise_embeds=target.noise_embeds(blocks.noise_ids),
            context_hidden_states=context,
            attention_mask=blocks.attention_mask,
            position_ids=blocks.position_ids,
            prev_embeds=previous,
            reduce=partial(
                branch_losses, head=target.head, labels=blocks.labels, valid=blocks.valid, spec=spec
            ),
        )
        final, _ = found.reduced
        # a drafter with `shift_label` predicts one token more than decoding drafts
        drafted = slice(config.block_size - 1)
        right = accepted_prefix(final.correct[:, :, drafted], blocks.valid[:, :, drafted])  # (1, N)
        accepted += right[0].tolist()
    return accepted


def blocks_in(output: torch.Tensor, anchors: torch.Tensor, config: DFlashConfig) -> Blocks:
    """A drafter's blocks at some anchors (1, N) of one text (1, S), all of whose tokens may be
    predicted."""
    return make_blocks(
        output,
        torch.ones_like(output, dtype=torch.bool),
        torch.zeros_like(output),
        anchors,
        torch.ones_like(anchors, dtype=torch.bool),
        config.block_size,
        config.mask_token_id,
        predictions=config.predictions,
    )


def walk(accepted: list[int], max_new_tokens: int, draft_length: int) -> list[Round]:
    """Hop from anchor to anchor as decoding does.

    Args:
        accepted (`list[int]`): of the text's new tokens but the last, from [`accepted_at`].
        max_new_tokens (`int`): the length limit.
        draft_length (`int`): most tokens drafted in a pass.
    """
    rounds = []
    at = 0  # The first anchor is the first new token, which the prefill pass gives.
    while at < len(accepted):
        left = len(accepted) - at  # tokens of the text after the anchor
        # The pass emits one token more than it accepts, and that one must fit too.
        drafted = max(min(draft_length, max_new_tokens - at - 2), 0)
        right = min(accepted[at], drafted)
        # Where an accepted token is the text's last one, there is no bonus after it.
        emitted = min(right + 1, left)
        rounds.append(Round(emitted, right, min(emitted, drafted), drafted))
        at += emitted
    return rounds
