"""Token rows: raw rows become them, short ones share one, and several become a batch."""

import hashlib
from functools import partial
from itertools import groupby

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase
from trl import pack_dataset

from .findings import Findings, print_findings, refuse_unusable
from .messages import row_format
from .tokens import RowEncoder


def encode_rows(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    chat_template_kwargs: dict | None,
    num_proc: int | None,
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


def encode_sources(
    sources: list[Dataset],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    chat_template_kwargs: dict | None,
    num_proc: int | None,
    mask_token_id: int,
    vocab_size: int,
    placeholders: dict[int, str],
) -> tuple[Dataset, Findings]:
    """Token rows of all sources, one source after the other, and what was found in each.

    Text is cut into rows of `max_length` tokens, every token supervised. Conversations are rendered
    by the target's own template and cut at `max_length`; only what the assistant wrote is
    supervised. Before each answer stand the ids that serving gives to the target. A conversation
    becomes several rows where one cannot hold all answers so.

    Of no use are rows without an assistant turn, refused by the template, with a prompt as long as
    the row, with fewer than two supervised tokens in a row, and with the mask token, a placeholder
    or a token that the target does not have.
    """
    encoded = [
        encode_rows(source, tokenizer, max_length, chat_template_kwargs, num_proc)
        for source in sources
    ]
    rows = concatenate_datasets(encoded)
    sizes = [len(part) for part in encoded]
    found = Findings.of(
        rows,
        sizes,
        mask_token_id=mask_token_id,
        vocab_size=vocab_size,
        num_proc=num_proc,
        placeholders=placeholders,
    )
    return rows, found


def prepare_rows(
    datasets: Dataset | list[Dataset],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    block_size: int,
    mask_token_id: int,
    vocab_size: int,
    chat_template_kwargs: dict | None = None,
    placeholders: dict[int, str] | None = None,
    num_proc: int | None = None,
    packing: bool = False,
    heldout: list[Dataset] | None = None,
    verbose: bool = True,
) -> Dataset:
    """Token rows ready for training: `input_ids`, `supervised`, `length`, `row` (a number anchors
    are drawn from), and `document_ids` where rows are packed. Rows of no use are left out and
    counted by reason; [`encode_sources`] says which.

    Args:
        datasets (`Dataset` or `list[Dataset]`): one source or several, each in a format of its own.
        vocab_size (`int`): rows of the target's embedding.
        placeholders (`dict[int, str]`, *optional*): of a target that also sees images.
        num_proc (`int`, *optional*): processes that tokenize; `datasets` caches the result.
        packing (`bool`, *optional*): put several short rows into one of up to `max_length`.
        heldout (`list[Dataset]`, *optional*): raw rows whose token rows are not trained on.
        verbose (`bool`, *optional*, defaults to `True`): print what was recognised and left out.

    Raises:
        ValueError: unknown columns; no supervised token anywhere; most rows of a source are of no
            use, or held out; hardly a row with a whole block.
    """
    if isinstance(datasets, Dataset):
        datasets = [datasets]
    encode = partial(
        encode_sources,
        tokenizer=tokenizer,
        max_length=max_length,
        chat_template_kwargs=chat_template_kwargs,
        num_proc=num_proc,
        mask_token_id=mask_token_id,
        vocab_size=vocab_size,
        placeholders=placeholders or {},
    )
    rows, found = encode(datasets)
    if heldout is not None:
        # `datasets` keeps these token rows, so preparing them does not make them again.
        _, held_out = encode(heldout)
        found.leave_out(held_out.digest[held_out.keep])
    refuse_unusable(found, [len(one) for one in datasets], max_length, block_size, mask_token_id)
    if verbose:
        show_findings(found, datasets, max_length)
    keep = np.flatnonzero(found.keep)
    rows = rows.select(keep).select_columns(["input_ids", "supervised"])
    return finish(rows, found.tokens[keep].tolist(), max_length, packing=packing, verbose=verbose)


def show_findings(found: Findings, datasets: list[Dataset], max_length: int) -> None:
    """Print what was recognised and left out."""
    # Each format once, in the order of the sources.
    kinds = dict.fromkeys(row_format(dataset.column_names) for dataset in datasets)
    print_findings(found, sum(map(len, datasets)), ", ".join(kinds), max_length)


def finish(
    rows: Dataset, lengths: list[int], max_length: int, *, packing: bool, verbose: bool
) -> Dataset:
    """Pack token rows, if asked to, and give them their lengths and numbers."""
    if packing:
        rows, lengths = pack(rows, max_length)
        if verbose:
            print(f"packed them into {len(rows)} rows of up to {max_length} tokens")
    rows = rows.add_column("length", lengths)
    # Anchors are drawn by this number, so they do not depend on the batch that a row comes into.
    return rows.add_column("row", list(range(len(rows))))


def pack(rows: Dataset, max_length: int) -> tuple[Dataset, list[int]]:
    """Rows of several documents each, whole and best fit first, with `document_ids` 0, 1, ... ->
    rows, lengths."""
    # Best fit decreasing. No row is longer than `max_length`, so this cuts none.
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
    # A long prompt would fill all of it and show nothing that is learned.
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


def pad_token_id(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> int:
    """What rows are padded with. Any token that the target has will do, because padding is told by
    its document id or its mask. A tokenizer may have no pad token, or one of its own that the
    target's embedding has no row for."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None and token_id < vocab_size:
            return token_id
    return 0


def row_key(input_ids, document_ids=None) -> str:
    """What a row's hidden states depend on, as a hash: its tokens, and where its documents begin.

    Args:
        input_ids (`list[int]` or `np.ndarray` of shape `(S,)`).
        document_ids (the same, *optional*): by default the row is one document.
    """
    ids = np.asarray(input_ids, dtype="<i8")
    digest = hashlib.sha256(f"{len(ids)} tokens".encode())
    digest.update(ids.tobytes())
    if document_ids is not None:
        begins = np.flatnonzero(np.diff(np.asarray(document_ids))) + 1
        digest.update(begins.astype("<i8").tobytes())
    return digest.hexdigest()[:32]


class RowCollator:
    """Pads rows; the last gate before training for tokens that would break the masking.

    Args:
        pad_token_id, mask_token_id (`int`).
        keyed (`bool`, *optional*, defaults to `False`): also give each row's `row_key`, by which
            kept hidden states are found.
    """

    def __init__(self, pad_token_id: int, mask_token_id: int, keyed: bool = False):
        self.pad_token_id = pad_token_id
        self.mask_token_id = mask_token_id
        self.keyed = keyed

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
        batch = {
            "input_ids": input_ids,
            "supervised": supervised,
            "document_ids": document_ids,
            "row_ids": torch.tensor([row["row"] for row in rows]),  # (B,)
        }
        if self.keyed:
            batch["row_keys"] = [row_key(row["input_ids"], row.get("document_ids")) for row in rows]
        return batch


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
