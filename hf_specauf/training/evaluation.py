"""Real decoding of held-out prompts: tau while a drafter is trained, and the comparison with plain
decoding when it is done."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from rich.console import Console
from transformers import AutoModel

from ..data.rows import prompt_length
from ..drafters.draft_length import Round
from ..evaluation.compare import compare
from ..evaluation.plots import plot_alpha
from ..evaluation.record import evaluation_record
from ..evaluation.table import show
from ..evaluation.ways import decoding_config
from ..records import write_record
from ..serving.acceptance import summarize
from ..serving.decoding import attach
from .config import AUFConfig
from .waiting import wait_for_everyone


def first_set(rows: Dataset | dict[str, Dataset]) -> Dataset:
    """The rows, or the first of several sets."""
    return next(iter(rows.values())) if isinstance(rows, dict) else rows


def evenly_spread(rows: Dataset, most: int) -> Dataset:
    """So many rows, or all, from the first to the last: the sources of a mixture stand in order."""
    count = min(most, len(rows))
    return rows.select(np.linspace(0, len(rows) - 1, count).astype(int))


def prompts_of(
    rows: Dataset, device: torch.device, room: int | None = None
) -> Iterator[torch.Tensor]:
    """The prompt (1, S) of each row.

    Args:
        room (`int`, *optional*): its most tokens. Of a longer one the last are taken, because what
            comes next depends on them most.
    """
    for row in rows:
        ids = row["input_ids"][: prompt_length(row["supervised"])]
        if room is not None:
            ids = ids[-room:]
        yield torch.tensor([ids], device=device)


def decode(
    target, drafter, prompts: list[torch.Tensor], new_tokens: int, pad_token_id: int
) -> list[Round]:
    """Decode prompts (1, S) greedily with a drafter -> the verification passes of all. The drafter
    is left in the mode it was in."""
    config = decoding_config(target, new_tokens, pad_token_id)
    was_training = drafter.training
    try:
        attachment = attach(target, drafter, draft_length=None, lookup=False)
        with attachment, torch.no_grad():
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


# ---- when training is done


def evaluate_last_step(trainer) -> bool:
    """Evaluate the finished drafter -> whether that was needed. Trainer has done it already where
    `eval_steps` divides the last step."""
    state = trainer.state
    if state.global_step in [entry["step"] for entry in state.log_history if "eval_loss" in entry]:
        return False
    trainer.evaluate()
    return True


def measure_decoding(trainer, prompts: str) -> None:
    """Compare plain and assisted decoding of the saved drafter on held-out prompts -> `eval.json`
    and `alpha.png`. All processes call it.

    Args:
        trainer (`AUFTrainer`): its drafter is saved.
        prompts (`str`): where the held-out rows come from, as the record names it.
    """
    args, out = trainer.args, Path(trainer.args.output_dir)
    target = trainer.target.model
    # Read back from the folder, so that what is measured is what others will load.
    drafter = AutoModel.from_pretrained(out, dtype="auto").to(args.device)
    results = compare(
        target,
        drafter,
        trainer.eval_prompts(),
        args.eval_new_tokens,
        pad_token_id=trainer.data_collator.pad_token_id,
        show_progress=trainer.is_world_process_zero() and not args.disable_tqdm,
    )
    if trainer.is_world_process_zero():
        record = evaluation_record(
            results,
            target,
            prompts=prompts,
            temperature=0.0,
            max_new_tokens=args.eval_new_tokens,
            chat_template_kwargs=drafter.config.chat_template_kwargs,
        )
        write_record(out / "eval.json", record)
        plot_alpha({args.objective: results["acceptance"]}, out / "alpha.png")
        show(record, Console())
    wait_for_everyone()
