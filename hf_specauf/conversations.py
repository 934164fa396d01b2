"""Datasets -> the target's chat template -> token ids and the supervised mask -> batches."""

import os
from itertools import groupby

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets, load_dataset
from transformers import PreTrainedTokenizerBase
from trl import maybe_convert_to_chatml
from trl.chat_template_utils import get_training_chat_template

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
FEWEST_FULL_BLOCKS = 0.1  # share of rows that must hold a whole supervised block


def load_rows(name: str, config: str | None = None, split: str = "train", revision: str | None = None) -> Dataset:
    """Rows of a local file (`.jsonl`, `.json`, `.parquet`, `.csv`, `.txt`) or of a dataset on the Hub.

    Raises:
        FileNotFoundError: the name looks like a file and there is none.
    """
    reader = READERS.get(os.path.splitext(name)[1])
    if reader is None:
        return load_dataset(name, config, split=split, revision=revision)
    if not os.path.isfile(name):
        raise FileNotFoundError(
            f"dataset_name {name!r} looks like a local file, but there is none at {os.path.abspath(name)}"
        )
    return load_dataset(reader, data_files=name, split="train")


def row_format(columns: list[str]) -> str:
    """`tokens`, `messages`, `conversations` or `text`, from the column names."""
    for column in ("input_ids", "messages", "conversations", "text"):
        if column in columns:
            return "tokens" if column == "input_ids" else column
    raise ValueError(
        f"the dataset's columns are {columns}: none of `messages`, `conversations` (ShareGPT) or `text` is there. "
        "Rename the column that holds the conversation or the text."
    )


# ShareGPT's names; trl renames the keys of a turn, not its roles
ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant", "bard": "assistant"}


def chat_messages(row: dict) -> list[dict]:
    """The turns of a `messages` or ShareGPT `conversations` row, with the roles chat templates know."""
    turns = maybe_convert_to_chatml(row)["messages"]
    return [turn | {"role": ROLES.get(turn["role"], turn["role"])} for turn in turns]


def _chat_ids(messages: list[dict], tokenizer: PreTrainedTokenizerBase, template: str | None, kwargs: dict):
    """Token ids of a conversation and which of them the assistant wrote, by the template's generation markers."""
    out = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **kwargs
    )
    return out["input_ids"], out["assistant_masks"]


def _chat_ids_by_prefix(messages: list[dict], tokenizer: PreTrainedTokenizerBase, kwargs: dict):
    """The same for templates without markers: the assistant wrote what each of its turns adds to the rendering."""

    def render(turns: list[dict], prompt: bool) -> str:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt, **kwargs)

    text, spans = render(messages, False), []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = render(messages[:i], True) if i else ""  # templates refuse an empty conversation
            through = render(messages[: i + 1], False)
            if not (text.startswith(through) and through.startswith(before)):
                raise ValueError(
                    "the chat template renders a conversation's beginning differently once it goes on, so the "
                    "assistant's tokens cannot be told apart: use a template with {% generation %} markers"
                )
            spans.append((len(before), len(through)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = [int(any(a <= start < b for a, b in spans)) for start, _ in encoded["offset_mapping"]]
    return encoded["input_ids"], mask


class RowEncoder:
    """Turns raw rows into token rows; a picklable callable for `Dataset.map(batched=True, with_indices=True)`."""

    def __init__(self, tokenizer, kind: str, max_length: int, chat_template_kwargs: dict | None):
        self.tokenizer, self.kind, self.max_length = tokenizer, kind, max_length
        self.kwargs = chat_template_kwargs or {}
        self.template, self.by_prefix = None, False
        if kind in ("messages", "conversations"):
            if tokenizer.chat_template is None:
                raise ValueError(
                    "the rows are conversations, but the target's tokenizer has no chat template: give `text` rows"
                )
            try:
                self.template = get_training_chat_template(tokenizer) or tokenizer.get_chat_template()
            except ValueError:  # trl knows no training version of it; markers may still be in it
                self.template = tokenizer.get_chat_template()
            # without markers transformers returns an all-zero mask, silently (marin#7237)
            self.by_prefix = "{% generation" not in self.template.replace("{%-", "{%")

    def __call__(self, batch: dict, indices: list[int]) -> dict:
        rows = {"input_ids": [], "supervised": []}
        for i in range(len(indices)):
            if self.kind == "text":
                ids = self.tokenizer(batch["text"][i])["input_ids"]
                if self.tokenizer.eos_token_id is not None and ids[-1:] != [self.tokenizer.eos_token_id]:
                    ids = ids + [self.tokenizer.eos_token_id]
                for start in range(0, len(ids), self.max_length):
                    rows["input_ids"].append(ids[start : start + self.max_length])
                    rows["supervised"].append([1] * len(rows["input_ids"][-1]))
                continue
            try:
                messages = chat_messages({self.kind: batch[self.kind][i]})
                if self.by_prefix:
                    ids, mask = _chat_ids_by_prefix(messages, self.tokenizer, self.kwargs)
                else:
                    ids, mask = _chat_ids(messages, self.tokenizer, self.template, self.kwargs)
            except Exception as error:
                raise ValueError(f"row {indices[i]}: the chat template failed: {error}") from error
            rows["input_ids"].append(list(ids)[: self.max_length])
            rows["supervised"].append(list(mask)[: self.max_length])
        return rows


def longest_run(supervised: list[int]) -> int:
    """Longest run of supervised tokens in a row."""
    edges = np.diff(np.concatenate([[0], supervised, [0]]))
    return int(np.max(np.flatnonzero(edges < 0) - np.flatnonzero(edges > 0), initial=0))


def prepare_rows(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    block_size: int,
    mask_token_id: int,
    chat_template_kwargs: dict | None = None,
    num_proc: int | None = None,
) -> Dataset:
    """Token rows ready for training: `input_ids`, `supervised`, `length`, `row` (a number anchors are drawn from).

    Text is cut into rows of `max_length` tokens, every token supervised; conversations are rendered by the target's
    own template, only the assistant's tokens supervised, and truncated. Rows with fewer than two supervised tokens in
    a row hold no block and are dropped, with a count.

    Raises:
        ValueError: unknown columns; no supervised token anywhere; hardly a row with a whole block; the mask token
            occurs in the data.
    """
    if not len(dataset):
        raise ValueError("the dataset has no rows: check dataset_name, dataset_split and max_train_rows")
    kind = row_format(dataset.column_names)
    if kind == "tokens" and "supervised" not in dataset.column_names:
        raise ValueError(
            "token rows need a `supervised` column beside `input_ids`: 1 where the target's words are, else 0"
        )
    if kind != "tokens":
        encoder = RowEncoder(tokenizer, kind, max_length, chat_template_kwargs)
        dataset = dataset.map(
            encoder, batched=True, with_indices=True, remove_columns=dataset.column_names, num_proc=num_proc,
            desc=f"Tokenizing {kind} rows",
        )  # fmt: skip
    else:
        dataset = dataset.select_columns(["input_ids", "supervised"])

    def measure(batch: dict) -> dict:
        return {
            "run": [longest_run(flags) for flags in batch["supervised"]],
            "tokens": [len(ids) for ids in batch["input_ids"]],
            "has_mask": [mask_token_id in ids for ids in batch["input_ids"]],
        }

    measures = dataset.map(
        measure, batched=True, remove_columns=dataset.column_names, num_proc=num_proc, desc="Checking rows"
    ).with_format("numpy")[:]
    if measures["has_mask"].any():
        raise ValueError(
            f"row {measures['has_mask'].argmax()} contains the mask token (id {mask_token_id}): a real token would "
            "look like a slot to fill. Choose another mask_token_id, or remove the token from the data."
        )
    full = int((measures["run"] >= block_size).sum())
    # context, anchor, label
    keep = np.flatnonzero((measures["run"] >= 2) & (measures["tokens"] >= 3))
    if not measures["run"].any():
        raise ValueError(
            f"not one token of {len(dataset)} rows is supervised: the drafter would learn nothing. For conversations, "
            "check that there are assistant turns and that the target's chat template marks them."
        )
    if not len(keep) or full < FEWEST_FULL_BLOCKS * len(dataset):
        raise ValueError(
            f"rows are too short: only {full} of {len(dataset)} hold a whole block of {block_size} "
            f"supervised tokens. Lower block_size, raise max_length (now {max_length}), or use longer answers."
        )
    if len(keep) < len(dataset):
        print(f"dropped {len(dataset) - len(keep)} of {len(dataset)} rows: fewer than 2 supervised tokens in a row")
        dataset = dataset.select(keep)
    dataset = dataset.add_column("length", [int(tokens) for tokens in measures["tokens"][keep]])
    return dataset.add_column("row", list(range(len(dataset))))


def show_row(row: dict, tokenizer: PreTrainedTokenizerBase, most: int = 160) -> str:
    """A row decoded, its first `most` tokens, supervised spans between ⟦ and ⟧."""
    pairs, text = list(zip(row["input_ids"], map(bool, row["supervised"])))[:most], ""
    for supervised, span in groupby(pairs, key=lambda pair: pair[1]):
        words = tokenizer.decode([token for token, _ in span])
        text += f"⟦{words}⟧" if supervised else words
    return text + ("…" if len(row["input_ids"]) > most else "")


def prompt_length(supervised: list[int]) -> int:
    """Where a row's prompt ends for decoding: before the first supervised token, or at half of a plain text row."""
    first = supervised.index(1) if 1 in supervised else len(supervised)
    return first if first > 0 else len(supervised) // 2


class RowCollator:
    """Pads rows; the last gate before training for tokens that would break the masking."""

    def __init__(self, pad_token_id: int, mask_token_id: int):
        self.pad_token_id, self.mask_token_id = pad_token_id, mask_token_id

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        input_ids = torch.full((len(rows), length), self.pad_token_id)
        supervised = torch.zeros(len(rows), length, dtype=torch.bool)
        document_ids = torch.full((len(rows), length), -1)
        for i, row in enumerate(rows):
            size = len(row["input_ids"])
            input_ids[i, :size] = torch.as_tensor(row["input_ids"])
            supervised[i, :size] = torch.as_tensor(row["supervised"], dtype=torch.bool)
            document_ids[i, :size] = torch.as_tensor(row.get("document_ids", 0))
        if bool(((input_ids == self.mask_token_id) & (document_ids >= 0)).any()):
            found = [row["row"] for row in rows if self.mask_token_id in list(row["input_ids"])]
            raise ValueError(
                f"rows {found} contain the mask token (id {self.mask_token_id}): choose another mask_token_id"
            )
        row_ids = torch.tensor([row["row"] for row in rows])
        return {"input_ids": input_ids, "supervised": supervised, "document_ids": document_ids, "row_ids": row_ids}


def fill_up(rows: Dataset, multiple: int) -> Dataset:
    """Append rows that hold no block (`row` -1) up to a multiple of the rows of one optimizer step.

    All ranks then get equally many batches without any row being dealt twice, as accelerate would do to even out the
    last ones; rows without a block add nothing to the loss.
    """
    missing = -len(rows) % multiple
    if not missing:
        return rows
    first = rows[0]
    empty = {"input_ids": first["input_ids"][:2], "supervised": [0, 0], "length": 2, "row": -1}
    if "document_ids" in rows.column_names:
        empty["document_ids"] = [0, 0]
    return concatenate_datasets([rows, Dataset.from_list([empty] * missing, features=rows.features)])
