"""tau by real decoding of a few held-out prompts."""

from collections.abc import Iterator

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset

from ..data.rows import prompt_length
from ..drafters.draft_length import Round
from ..serving.acceptance import summarize
from ..serving.compare import decoding_config
from ..serving.decoding import attach
from .config import AUFConfig


def first_set(rows: Dataset | dict[str, Dataset]) -> Dataset:
    """The rows, or the first of several sets."""
    return next(iter(rows.values())) if isinstance(rows, dict) else rows


def evenly_spread(rows: Dataset, most: int) -> Dataset:
    """So many rows, or all, from the first to the last: the sources of a mixture stand in order."""
    count = min(most, len(rows))
    return rows.select(np.linspace(0, len(rows) - 1, count).astype(int))


def prompts_of(rows: Dataset, device: torch.device) -> Iterator[torch.Tensor]:
    """The prompt (1, S) of each row."""
    for row in rows:
        ids = row["input_ids"][: prompt_length(row["supervised"])]
        yield torch.tensor([ids], device=device)


def decode(
    target, drafter, prompts: list[torch.Tensor], new_tokens: int, pad_token_id: int
) -> list[Round]:
    """Decode prompts (1, S) greedily with a drafter -> the verification passes of all. The drafter
    is left in the mode it was in."""
    config = decoding_config(target, new_tokens, pad_token_id)
    was_training = drafter.training
    try:
        with attach(target, drafter) as attachment, torch.no_grad():
            for prompt in prompts:
                target.generate(prompt, generation_config=config, assistant_model=drafter)
    finally:
        drafter.train(was_training)
    return attachment.rounds


def decoded_tau(
    target, drafter, prompts: list[torch.Tensor], args: AUFConfig, pad_token_id: int
) -> float:
    """tau over prompts (1, S), decoded greedily, dealt to the ranks.

    Args:
        target, drafter: as for `attach`. The drafter is whole on each rank, because the ranks
            decode unequal numbers of passes.
        args (`AUFConfig`): tokens for each prompt, and how the ranks share the work.
        pad_token_id (`int`): for `generate`.
    """
    # a sharded target runs on all ranks or on none, so all of them decode the same prompts
    if not args.shard_target:
        prompts = prompts[args.process_index :: args.world_size]
    rounds = decode(target, drafter, prompts, args.eval_new_tokens, pad_token_id)
    if not args.shard_target:
        rounds = gather_object(rounds)
    return summarize(rounds, drafter.config.block_size).tau
