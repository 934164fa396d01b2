"""Token rows: raw rows become them, useless data is refused, short ones share one, and several
become a batch."""

import hashlib
from functools import partial
from itertools import groupby

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase
from trl import pack_dataset

from .findings import HELD_OUT, Findings
from .messages import row_format
from .tokens import RowEncoder

# Share of token rows that must hold a whole supervised block. With fewer, hardly an anchor would
# have all its labels.
FEWEST_FULL_BLOCKS = 0.1
# Share of a source's raw rows that the template may refuse. With more, it is the wrong data.
MOST_REFUSED = 0.5
# Share of a source's token rows that may hold the mask token. With more, it is the wrong token.
MOST_MASKED = 0.5
# Share of the training rows that may be held out as well. With more, hardly any is left.
MOST_HELD_OUT = 0.5


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
    positions: int | None = None,
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
        positions (`int`, *optional*): the most tokens of a document, where the target has no more
            positions. Packed rows may be longer.
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
    # Past its positions a target fails or says what it never learned to say.
    most = min(max_length, positions or max_length)
    encode = partial(
        encode_sources,
        tokenizer=tokenizer,
        max_length=most,
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
    refuse_unusable(found, [len(one) for one in datasets], most, block_size, mask_token_id)
    if verbose:
        show_findings(found, datasets, most, max_length)
    keep = np.flatnonzero(found.keep)
    rows = rows.select(keep).select_columns(["input_ids", "supervised"])
    return finish(rows, found.tokens[keep].tolist(), max_length, packing=packing, verbose=verbose)


def refuse_unusable(
    found: Findings, sizes: list[int], max_length: int, block_size: int, mask_token_id: int
) -> None:
    """Raise where training on these rows would teach nothing, or the wrong thing.

    Args:
        sizes (`list[int]`): raw rows of each source.

    Raises:
        ValueError: see `prepare_rows`.
    """
    for number in range(len(sizes)):
        own = found.has_mask[found.dataset == number]
        if own.sum() > MOST_MASKED * len(own):
            masked = found.has_mask & (found.dataset == number)
            raise ValueError(
                f"{own.sum()} of {len(own)} rows contain the mask token (id {mask_token_id}, first:"
                f" {found.first(masked)}): a real token would look like a slot to fill. Choose"
                " another mask_token_id, or remove the token from the data."
            )
    if not found.run.any():
        raise ValueError(
            f"not one token of {sum(sizes)} rows is supervised: the drafter would learn nothing"
            f" ({found.reasons()}). For conversations, check that there are assistant turns"
            " and that the target's chat template marks them."
        )
    # Source by source, because the many token rows of a long text would hide another's refusals.
    for number, size in enumerate(sizes):
        used = found.source[(found.dataset == number) & ~found.refused]
        refused = size - len(np.unique(used))
        if refused > MOST_REFUSED * size:
            raise ValueError(
                f"{refused} of {size} rows cannot be used ({found.reasons(number)}): this is not"
                " the data the target's template is for. Mend rows or template, or choose another"
                " dataset."
            )
    held_out = int((found.reason == HELD_OUT).sum())
    if held_out > MOST_HELD_OUT * (held_out + found.keep.sum()):
        raise ValueError(
            f"{held_out} of {held_out + found.keep.sum()} training rows are held-out rows too"
            f" (first: {found.first(found.reason == HELD_OUT)}), and what is held out is not"
            " trained on: hold other rows out (eval_dataset_name, eval_dataset_split, eval_rows),"
            " or none (eval_rows: 0)"
        )
    full, total = int((found.run >= block_size).sum()), len(found.run)
    if not found.keep.any() or full < FEWEST_FULL_BLOCKS * total:
        raise ValueError(
            f"rows are too short: only {full} of {total} hold a whole block of {block_size}"
            f" supervised tokens ({found.reasons() or 'none was left out'}). Lower"
            f" block_size, raise max_length (now {max_length}), or use longer answers."
        )


def show_findings(found: Findings, datasets: list[Dataset], most: int, max_length: int) -> None:
    """Print what was recognised, what was left out and why, and how much was cut at `most`."""
    # Each format once, in the order of the sources.
    kinds = ", ".join(dict.fromkeys(row_format(dataset.column_names) for dataset in datasets))
    raw_rows = sum(map(len, datasets))
    total, kept = len(found.keep), found.keep.sum()
    print(f"{raw_rows} rows of {kinds} -> {kept} token rows")
    if kept < total:
        print(f"dropped {total - kept} of {total} rows: {found.reasons()}")
    doubled = found.doubled()
    if doubled:
        again, first = next(iter(doubled.items()))
        print(
            f"{len(doubled)} token rows are the same as another, first: {found.name(again)} as"
            f" {found.name(first)}: they are trained on as often as they are there"
        )
    cut = found.cut[found.keep].sum()
    if cut:
        at = f"max_length, {max_length} tokens"
        if most < max_length:
            at = f"the target's {most} positions, below max_length"
        print(f"cut {cut} rows at {at}")
    apart = found.apart.sum()
    if apart:
        print(
            f"{apart} conversations are several rows each, first: {found.first(found.apart)}: the"
            " chat template writes earlier turns differently once a conversation goes on"
        )
    thoughts = found.thoughts.sum()
    if thoughts:
        print(
            f"left out the thoughts of {thoughts} answers, first: {found.first(found.thoughts)}:"
            " with these chat_template_kwargs the target answers without (thinking is off)"
        )
    unseen = found.unseen_tools.sum()
    if unseen:
        print(
            f"the tools of {unseen} rows are not in their prompts, first:"
            f" {found.first(found.unseen_tools)}: the chat template never mentions any, so the"
            " target does not see them in serving either"
        )
    unended = found.unended.sum()
    if unended:
        print(
            f"{unended} rows say that an answer of theirs was cut, first:"
            f" {found.first(found.unended)}: no end of these is learned"
        )


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
