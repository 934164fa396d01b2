"""Token rows: which raw rows become one, how short ones share one, and how several become a
batch."""

from collections import Counter
from itertools import groupby

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase
from trl import pack_dataset

from .sources import row_format
from .tokens import RowEncoder

FEWEST_FULL_BLOCKS = 0.1  # share of rows that must hold a whole supervised block
MOST_UNUSABLE = 0.5  # share of a source's rows that the template may refuse


def encode_rows(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    chat_template_kwargs: dict | None = None,
    num_proc: int | None = None,
) -> Dataset:
    """Token rows of one source, unusable ones among them: the columns of [`RowEncoder`].

    Raises:
        ValueError: no row; unknown columns; conversations for a target without a chat template.
    """
    if not len(dataset):
        raise ValueError(
            "the dataset has no rows: check dataset_name, dataset_split and max_train_rows"
        )
    encoder = RowEncoder(tokenizer, dataset.column_names, max_length, chat_template_kwargs)
    return dataset.map(
        encoder, batched=True, with_indices=True, remove_columns=dataset.column_names, num_proc=num_proc,
        desc=f"Reading {encoder.kind} rows",
    )  # fmt: skip


def longest_run(supervised: list[int]) -> int:
    """Longest run of supervised tokens in a row."""
    edges = np.diff(np.concatenate([[0], supervised, [0]]))
    return int(np.max(np.flatnonzero(edges < 0) - np.flatnonzero(edges > 0), initial=0))


def prepare_rows(
    datasets: Dataset | list[Dataset],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    block_size: int,
    mask_token_id: int,
    chat_template_kwargs: dict | None = None,
    num_proc: int | None = None,
    packing: bool = False,
    verbose: bool = True,
) -> Dataset:
    """Token rows ready for training: `input_ids`, `supervised`, `length`, `row` (a number anchors
    are drawn from), and `document_ids` where rows are packed.

    Text is cut into rows of `max_length` tokens, every token supervised; conversations are rendered
    by the target's own template, only what the assistant wrote supervised, and cut at `max_length`.
    Rows of no use (no assistant turn, refused by the template, a prompt as long as the row, fewer
    than two supervised tokens in a row) are left out and counted by reason, with the first row of
    each.

    Args:
        datasets (`Dataset` or `list[Dataset]`): one source or several, each in a format of its own.
        num_proc (`int`, *optional*): processes that tokenize; the result is cached by `datasets`
            either way.
        packing (`bool`, *optional*, defaults to `False`): put several short rows into one of up to
            `max_length`.
        verbose (`bool`, *optional*, defaults to `True`): print what was recognised and left out.

    Raises:
        ValueError: unknown columns; no supervised token anywhere; the template refuses most rows of
            a source; hardly a row with a whole block; the mask token occurs in the data.
    """
    datasets = datasets if isinstance(datasets, list) else [datasets]
    options = dict(
        max_length=max_length, chat_template_kwargs=chat_template_kwargs, num_proc=num_proc
    )
    encoded = [encode_rows(dataset, tokenizer, **options) for dataset in datasets]
    rows = concatenate_datasets(encoded)
    found = measure_rows(rows, mask_token_id, num_proc)
    found["dataset"] = np.repeat(np.arange(len(encoded)), [len(part) for part in encoded])
    refuse_unusable(
        found, [len(dataset) for dataset in datasets], max_length, block_size, mask_token_id
    )
    keep = np.flatnonzero(found["usable"])
    if verbose:
        kinds = Counter(row_format(dataset.column_names) for dataset in datasets)
        print(f"{sum(map(len, datasets))} rows of {', '.join(kinds)} -> {len(keep)} token rows")
        if len(keep) < len(rows):
            print(f"dropped {len(rows) - len(keep)} of {len(rows)} rows: {reasons_in_words(found)}")
        if found["cut"][keep].any():
            print(f"cut {found['cut'][keep].sum()} rows at max_length, {max_length} tokens")
    rows = rows.select(keep).select_columns(["input_ids", "supervised"])
    lengths = found["tokens"][keep]
    if packing:
        rows, lengths = pack(rows, max_length)
        if verbose:
            print(f"packed them into {len(rows)} rows of up to {max_length} tokens")
    rows = rows.add_column("length", [int(tokens) for tokens in lengths])
    return rows.add_column("row", list(range(len(rows))))


def measure_rows(rows: Dataset, mask_token_id: int, num_proc: int | None) -> dict[str, np.ndarray]:
    """What decides about token rows, an array of each: whether they are `usable`, the `reason`
    where not, whether they were `refused` as raw rows, `tokens`, longest supervised `run`,
    `has_mask`, the encoder's `source` and `cut`."""

    def measure(batch: dict) -> dict:
        """Of a batch of token rows."""
        return {
            "run": [longest_run(flags) for flags in batch["supervised"]],
            "tokens": [len(ids) for ids in batch["input_ids"]],
            "has_mask": [mask_token_id in ids for ids in batch["input_ids"]],
        }

    found = rows.map(
        measure,
        batched=True,
        remove_columns=["input_ids", "supervised"],
        num_proc=num_proc,
        desc="Checking rows",
    ).with_format("numpy")[:]
    found["refused"] = found["reason"] != ""
    found["usable"] = (found["run"] >= 2) & (found["tokens"] >= 3)  # context, anchor, label
    found["reason"] = found["reason"].astype(object)
    found["reason"][~found["usable"] & ~found["refused"]] = (
        "fewer than 2 supervised tokens in a row"
    )
    return found


def refuse_unusable(
    found: dict, sizes: list[int], max_length: int, block_size: int, mask_token_id: int
) -> None:
    """Raise where training on these rows would teach nothing, or the wrong thing.

    Args:
        found (`dict`): from `measure_rows`, and the `dataset` that each row comes from.
        sizes (`list[int]`): raw rows of each dataset.

    Raises:
        ValueError: see `prepare_rows`.
    """
    if found["has_mask"].any():
        raise ValueError(
            f"{row_name(found, found['has_mask'].argmax())} contains the mask token (id"
            f" {mask_token_id}): a real token would look like a slot to fill. Choose another"
            " mask_token_id, or remove the token from the data."
        )
    if not found["run"].any():
        raise ValueError(
            f"not one token of {sum(sizes)} rows is supervised: the drafter would learn nothing"
            f" ({reasons_in_words(found)}). For conversations, check that there are assistant turns"
            " and that the target's chat template marks them."
        )
    for number, size in enumerate(sizes):
        own = np.flatnonzero(found["dataset"] == number)
        if found["refused"][own].sum() > MOST_UNUSABLE * size:
            raise ValueError(
                f"{found['refused'][own].sum()} of {size} rows cannot be used"
                f" ({reasons_in_words(found, own)}): this is not the data the target's template is"
                " for. Mend rows or template, or choose another dataset."
            )
    full, rows = int((found["run"] >= block_size).sum()), len(found["run"])
    if not found["usable"].any() or full < FEWEST_FULL_BLOCKS * rows:
        raise ValueError(
            f"rows are too short: only {full} of {rows} hold a whole block of {block_size}"
            f" supervised tokens ({reasons_in_words(found) or 'none was left out'}). Lower"
            f" block_size, raise max_length (now {max_length}), or use longer answers."
        )


def row_name(found: dict, index: int) -> str:
    """`row 7`, and of which source where there are several."""
    return f"row {found['source'][index]}" + f" of source {found['dataset'][index] + 1}" * bool(
        found["dataset"][-1]
    )


def reasons_in_words(found: dict, rows: np.ndarray | None = None, most: int = 5) -> str:
    """`it has no assistant turn (3, first: row 7), ...`, the most frequent first; of some rows or
    of all."""
    rows = np.arange(len(found["reason"])) if rows is None else rows
    reasons = found["reason"][rows]
    counts = Counter(reason for reason in reasons if reason).most_common(most + 1)
    words = [
        f"{reason} ({n}, first: {row_name(found, rows[reasons == reason][0])})"
        for reason, n in counts[:most]
    ]
    return ", ".join(words + ["and other reasons"] * (len(counts) > most))


def pack(rows: Dataset, max_length: int) -> tuple[Dataset, list[int]]:
    """Rows of several documents each, whole and best fit first, with `document_ids` 0, 1, ... ->
    rows, lengths."""
    packed = pack_dataset(rows, max_length, "bfd")
    lengths = packed["seq_lengths"][:]
    documents = [np.repeat(np.arange(len(sizes)), sizes).tolist() for sizes in lengths]
    return packed.remove_columns("seq_lengths").add_column("document_ids", documents), [
        sum(s) for s in lengths
    ]


def show_row(row: dict, tokenizer: PreTrainedTokenizerBase, most: int = 160) -> str:
    """`most` tokens of a row decoded, up to half of them before the first supervised one;
    supervised spans between ⟦ and ⟧."""
    first = row["supervised"].index(1) if 1 in row["supervised"] else 0
    start, text = max(first - most // 2, 0), ""
    stop = start + most
    pairs = list(zip(row["input_ids"], map(bool, row["supervised"])))[start:stop]
    for supervised, span in groupby(pairs, key=lambda pair: pair[1]):
        words = tokenizer.decode([token for token, _ in span])
        text += f"⟦{words}⟧" if supervised else words
    return "…" * (start > 0) + text + "…" * (stop < len(row["input_ids"]))


def prompt_length(supervised: list[int]) -> int:
    """Where a row's prompt ends for decoding: before the first supervised token, or at half of a
    plain text row."""
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
                f"rows {found} contain the mask token (id {self.mask_token_id}): choose another"
                " mask_token_id"
            )
        row_ids = torch.tensor([row["row"] for row in rows])
        return {
            "input_ids": input_ids,
            "supervised": supervised,
            "document_ids": document_ids,
            "row_ids": row_ids,
        }


def fill_up(rows: Dataset, multiple: int) -> Dataset:
    """Append rows that hold no block (`row` -1) up to a multiple of the rows of one optimizer step.

    All ranks then get equally many batches without any row being dealt twice, as accelerate would
    do to even out the last ones; rows without a block add nothing to the loss.
    """
    missing = -len(rows) % multiple
    if not missing:
        return rows
    first = rows[0]
    empty = {"input_ids": first["input_ids"][:2], "supervised": [0, 0], "length": 2, "row": -1}
    if "document_ids" in rows.column_names:
        empty["document_ids"] = [0, 0]
    return concatenate_datasets(
        [rows, Dataset.from_list([empty] * missing, features=rows.features)]
    )
