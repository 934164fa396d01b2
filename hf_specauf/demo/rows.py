"""Token rows and prompts for the quickstart's drafters, cut from the target's own texts."""

import json
from pathlib import Path

import torch
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, set_seed

from ..data.sources import load_rows
from ..identity import Identity
from ..records import write_record, write_whole

PROMPT_TOKENS, ROW_TOKENS = 64, 192
ROWS_PER_BATCH = 200  # generated at once


def cut(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, count: int, tokens: int
) -> list[list[int]]:
    """`count` pieces of `tokens` ids, at even distances over all texts.

    Raises:
        ValueError: the texts give fewer.
    """
    pieces = []
    for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        # not the first piece of a file: headers are much alike
        for start in range(tokens, len(ids) - tokens, tokens):
            pieces.append(ids[start : start + tokens])
    if len(pieces) < count:
        raise ValueError(
            f"the files give {len(pieces)} prompts of {tokens} tokens, and {count} were asked for:"
            " ask for fewer, or for shorter ones"
        )
    return [pieces[i * len(pieces) // count] for i in range(count)]


def read_texts(path: Path) -> list[str]:
    """The `text` column of a .jsonl file."""
    return list(load_rows(str(path))["text"])


def save_rows(path: Path, rows: list[list[int]]) -> Path:
    """Write token rows, everything after the prompt supervised; whole or not at all."""
    supervised = [0] * PROMPT_TOKENS + [1] * (ROW_TOKENS - PROMPT_TOKENS)
    lines = [json.dumps({"input_ids": ids, "supervised": supervised}) + "\n" for ids in rows]
    write_whole(path, "".join(lines))
    return path


def training_rows(folder: Path, count: int = 600) -> Path:
    """Token rows for drafters: the target's own continuations of real text, once, kept beside the
    target.

    A drafter serves what its target writes, so it learns from what its target writes: the prompt is
    real text, the supervised rest is sampled from the target at temperature 0.5.

    `regenerate` writes such rows for any target. Here all prompts have one length and no row ends
    early, so large batches fit a static cache. That keeps the quickstart within its time on CPUs.
    """
    path = folder / "train_rows.jsonl"
    # As `regenerate` does, say whose words these are. Each call says it anew, because the target is
    # known by its folder, and a cache may be moved.
    settings = {"target": Identity(str(folder)).record()}
    write_record(path.with_suffix(".settings.json"), settings)
    if path.is_file():
        return path
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    target = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompts = torch.tensor(cut(read_texts(folder / "train.jsonl"), tokenizer, count, PROMPT_TOKENS))
    rows = []
    for batch in track(prompts.split(ROWS_PER_BATCH), f"the target writes {count} rows"):
        rows += target.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            do_sample=True,
            temperature=0.5,
            top_k=0,
            max_new_tokens=ROW_TOKENS - PROMPT_TOKENS,
            # The end of text may be written, and text goes on after it, as in the target's own
            # training rows.
            eos_token_id=None,
            pad_token_id=tokenizer.pad_token_id,
            # no drafter could train on a row with the mask token in it
            suppress_tokens=[tokenizer.mask_token_id],
            # a growing cache is copied at every step
            cache_implementation="static",
        ).tolist()
    return save_rows(path, rows)


def heldout_rows(folder: Path, count: int = 64) -> Path:
    """Token rows of held-out files as they are: what accuracy and loss are measured on."""
    path = folder / "heldout_rows.jsonl"
    if not path.is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        save_rows(path, cut(read_texts(folder / "heldout.jsonl"), tokenizer, count, ROW_TOKENS))
    return path


def heldout_prompts(folder: Path, count: int, tokens: int) -> list[torch.Tensor]:
    """`count` prompts (1, tokens) from the held-out files."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pieces = cut(read_texts(folder / "heldout.jsonl"), tokenizer, count, tokens)
    return [torch.tensor([ids]) for ids in pieces]
