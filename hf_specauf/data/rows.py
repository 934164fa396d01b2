"""Token rows: which raw rows become one, how short ones share one, and how several become a
batch."""

from collections import Counter
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase
from trl import pack_dataset

from .messages import row_format
from .tokens import RowEncoder

# Share of token rows that must hold a whole supervised block. With fewer, hardly an anchor would
# have all its labels.
FEWEST_FULL_BLOCKS = 0.1
# Share of a source's raw rows that the template may refuse. With more, it is the wrong data.
MOST_REFUSED = 0.5
REASONS_SHOWN = 5


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
        encoder,
        batched=True,
        with_indices=True,
        remove_columns=dataset.column_names,
        num_proc=num_proc,
        desc=f"Reading {encoder.kind} rows",
    )


def longest_run(supervised: list[int]) -> int:
    """Longest run of supervised tokens in a row."""
    # 1 where a run starts, -1 behind its end.
    edges = np.diff(np.concatenate([[0], supervised, [0]]))
    lengths = np.flatnonzero(edges < 0) - np.flatnonzero(edges > 0)
    return int(np.max(lengths, initial=0))


@dataclass(frozen=True)
class Findings:
    """What decides about token rows. Each array has an entry for every one of them.

    Attributes:
        dataset: number of the source it comes from, from 0.
        source: number of its raw row in that source.
        reason: why it is of no use; empty where it is of use.
        refused: whether the raw row was refused, so that it has no tokens at all.
        keep: whether it is trained on.
        cut: whether it was cut at `max_length`.
        has_mask: whether the mask token occurs in it.
        tokens: its length.
        run: its longest run of supervised tokens.
    """

    dataset: np.ndarray
    source: np.ndarray
    reason: np.ndarray
    refused: np.ndarray
    keep: np.ndarray
    cut: np.ndarray
    has_mask: np.ndarray
    tokens: np.ndarray
    run: np.ndarray

    @classmethod
    def of(
        cls, rows: Dataset, sizes: list[int], mask_token_id: int, num_proc: int | None
    ) -> "Findings":
        """Look at the encoded rows of all sources, one source after the other.

        Args:
            sizes (`list[int]`): encoded rows of each source.
        """

        def measure(batch: dict) -> dict:
            return {
                "run": [longest_run(flags) for flags in batch["supervised"]],
                "tokens": [len(ids) for ids in batch["input_ids"]],
                "has_mask": [mask_token_id in ids for ids in batch["input_ids"]],
            }

        measured = rows.map(
            measure,
            batched=True,
            remove_columns=["input_ids", "supervised"],
            num_proc=num_proc,
            desc="Checking rows",
        )
        columns = measured.with_format("numpy")[:]
        reason = columns.pop("reason").astype(object)
        refused = reason != ""
        # The smallest row that teaches anything: a token of context, an anchor and its label.
        keep = (columns["run"] >= 2) & (columns["tokens"] >= 3)
        reason[~keep & ~refused] = "fewer than 2 supervised tokens in a row"
        dataset = np.repeat(np.arange(len(sizes)), sizes)
        return cls(dataset=dataset, reason=reason, refused=refused, keep=keep, **columns)

    def name(self, index: int) -> str:
        """`row 7`, and of which source where there are several."""
        name = f"row {self.source[index]}"
        if self.dataset[-1] > 0:
            name += f" of source {self.dataset[index] + 1}"
        return name

    def reasons(self, number: int | None = None) -> str:
        """`it has no assistant turn (3, first: row 7), ...`, the most frequent first; of one source
        or of all."""
        rows = np.flatnonzero(self.reason != "")
        if number is not None:
            rows = rows[self.dataset[rows] == number]
        counts, first = Counter(self.reason[rows]), {}
        for index in rows:
            first.setdefault(self.reason[index], index)
        words = [
            f"{reason} ({times}, first: {self.name(first[reason])})"
            for reason, times in counts.most_common(REASONS_SHOWN)
        ]
        if len(counts) > REASONS_SHOWN:
            words.append("and other reasons")
        return ", ".join(words)


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

    Text is cut into rows of `max_length` tokens, every token supervised. Conversations are rendered
    by the target's own template and cut at `max_length`; only what the assistant wrote is
    supervised. Rows of no use (no assistant turn, refused by the template, a prompt as long as the
    row, fewer than two supervised tokens in a row) are left out and counted by reason, with the
    first row of each.

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
    if isinstance(datasets, Dataset):
        datasets = [datasets]
    encoded = [
        encode_rows(
            dataset,
            tokenizer,
            max_length=max_length,
            chat_template_kwargs=chat_template_kwargs,
            num_proc=num_proc,
        )
        for dataset in datasets
    ]
    rows = concatenate_datasets(encoded)
    found = Findings.of(rows, [len(part) for part in encoded], mask_token_id, num_proc)
    sizes = [len(dataset) for dataset in datasets]
    refuse_unusable(found, sizes, max_length, block_size, mask_token_id)
    if verbose:
        kinds = Counter(row_format(dataset.column_names) for dataset in datasets)
        print_findings(found, sum(sizes), ", ".join(kinds), max_length)
    keep = np.flatnonzero(found.keep)
    rows = rows.select(keep).select_columns(["input_ids", "supervised"])
    lengths = found.tokens[keep].tolist()
    if packing:
        rows, lengths = pack(rows, max_length)
        if verbose:
            print(f"packed them into {len(rows)} rows of up to {max_length} tokens")
    rows = rows.add_column("length", lengths)
    return rows.add_column("row", list(range(len(rows))))


def print_findings(found: Findings, raw_rows: int, kinds: str, max_length: int) -> None:
    """Say what was recognised, what was left out and why, and how much was cut."""
    total, kept = len(found.keep), found.keep.sum()
    print(f"{raw_rows} rows of {kinds} -> {kept} token rows")
    if kept < total:
        print(f"dropped {total - kept} of {total} rows: {found.reasons()}")
    cut = found.cut[found.keep].sum()
    if cut:
        print(f"cut {cut} rows at max_length, {max_length} tokens")


def refuse_unusable(
    found: Findings, sizes: list[int], max_length: int, block_size: int, mask_token_id: int
) -> None:
    """Raise where training on these rows would teach nothing, or the wrong thing.

    Args:
        sizes (`list[int]`): raw rows of each source.

    Raises:
        ValueError: see `prepare_rows`.
    """
    if found.has_mask.any():
        raise ValueError(
            f"{found.name(found.has_mask.argmax())} contains the mask token (id"
            f" {mask_token_id}): a real token would look like a slot to fill. Choose another"
            " mask_token_id, or remove the token from the data."
        )
    if not found.run.any():
        raise ValueError(
            f"not one token of {sum(sizes)} rows is supervised: the drafter would learn nothing"
            f" ({found.reasons()}). For conversations, check that there are assistant turns"
            " and that the target's chat template marks them."
        )
    # Source by source, because the many token rows of a long text would hide another's refusals.
    for number, size in enumerate(sizes):
        refused = found.refused[found.dataset == number].sum()
        if refused > MOST_REFUSED * size:
            raise ValueError(
                f"{refused} of {size} rows cannot be used ({found.reasons(number)}): this is not"
                " the data the target's template is for. Mend rows or template, or choose another"
                " dataset."
            )
    full, total = int((found.run >= block_size).sum()), len(found.run)
    if not found.keep.any() or full < FEWEST_FULL_BLOCKS * total:
        raise ValueError(
            f"rows are too short: only {full} of {total} hold a whole block of {block_size}"
            f" supervised tokens ({found.reasons() or 'none was left out'}). Lower"
            f" block_size, raise max_length (now {max_length}), or use longer answers."
        )


def pack(rows: Dataset, max_length: int) -> tuple[Dataset, list[int]]:
    """Rows of several documents each, whole and best fit first, with `document_ids` 0, 1, ... ->
    rows, lengths."""
    packed = pack_dataset(rows, max_length, "bfd")
    lengths, document_ids = [], []
    for sizes in packed["seq_lengths"]:
        lengths.append(sum(sizes))
        document_ids.append(np.repeat(np.arange(len(sizes)), sizes).tolist())
    packed = packed.remove_columns("seq_lengths").add_column("document_ids", document_ids)
    return packed, lengths


def show_row(row: dict, tokenizer: PreTrainedTokenizerBase, most: int = 160) -> str:
    """`most` tokens of a row decoded, up to half of them before the first supervised one;
    supervised spans between ⟦ and ⟧."""
    ids, supervised = row["input_ids"], [bool(flag) for flag in row["supervised"]]
    first = supervised.index(True) if True in supervised else 0
    start = max(first - most // 2, 0)
    stop = start + most
    text = "…" if start > 0 else ""
    # Spans are decoded whole, because one character may have several tokens.
    for is_supervised, span in groupby(range(start, min(stop, len(ids))), lambda i: supervised[i]):
        words = tokenizer.decode([ids[i] for i in span])
        text += f"⟦{words}⟧" if is_supervised else words
    if stop < len(ids):
        text += "…"
    return text


def prompt_length(supervised: list[int]) -> int:
    """Where a row's prompt ends for decoding: before the first supervised token, or at half of a
    plain text row."""
    if 1 not in supervised:
        return len(supervised)
    first = supervised.index(1)
    if first == 0:  # text, where every token is supervised
        return len(supervised) // 2
    return first


class RowCollator:
    """Pads rows; the last gate before training for tokens that would break the masking."""

    def __init__(self, pad_token_id: int, mask_token_id: int):
        self.pad_token_id = pad_token_id
        self.mask_token_id = mask_token_id

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        input_ids = torch.full((len(rows), length), self.pad_token_id)  # (B, S)
        supervised = torch.zeros(len(rows), length, dtype=torch.bool)  # (B, S)
        document_ids = torch.full((len(rows), length), -1)  # (B, S), -1 is padding
        for i, row in enumerate(rows):
            size = len(row["input_ids"])
            input_ids[i, :size] = torch.as_tensor(row["input_ids"])
            supervised[i, :size] = torch.as_tensor(row["supervised"], dtype=torch.bool)
            document_ids[i, :size] = torch.as_tensor(row.get("document_ids", 0))
        # The padding token may be the mask token. Padding is no token of a row.
        is_mask = (input_ids == self.mask_token_id) & (document_ids >= 0)
        if is_mask.any():
            found = [row["row"] for row in rows if self.mask_token_id in list(row["input_ids"])]
            raise ValueError(
                f"rows {found} contain the mask token (id {self.mask_token_id}): choose another"
                " mask_token_id"
            )
        return {
            "input_ids": input_ids,
            "supervised": supervised,
            "document_ids": document_ids,
            "row_ids": torch.tensor([row["row"] for row in rows]),  # (B,)
        }


def fill_up(rows: Dataset, multiple: int) -> Dataset:
    """Append rows that hold no block (`row` -1) up to a multiple of the rows of one optimizer step.

    All ranks then get equally many batches. Accelerate would deal some rows twice to even out the
    last ones. Rows without a block add nothing to the loss.
    """
    missing = -len(rows) % multiple
    if missing == 0:
        return rows
    first = rows[0]
    # Some tokens must be there, because the target reads the row all the same.
    empty = {"input_ids": first["input_ids"][:2], "supervised": [0, 0], "length": 2, "row": -1}
    if "document_ids" in rows.column_names:
        empty["document_ids"] = [0, 0]
    empty_rows = Dataset.from_list([empty] * missing, features=rows.features)
    return concatenate_datasets([rows, empty_rows])
