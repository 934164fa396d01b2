"""The rows whose states a run wants, and what they take: said and checked before anything is
computed."""

import math
import shutil
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset

from ..data.rows import row_key
from .settings import dtype_name
from .store import StateStore


class Row(NamedTuple):
    """A row whose states are wanted.

    Attributes:
        key (`str`): of `row_key`.
        tokens (`int`): S.
        rows (`Dataset`), number (`int`): where its ids are.
    """

    key: str
    tokens: int
    rows: Dataset
    number: int


def rows_of(sets: list[Dataset]) -> list[Row]:
    """The rows of some sets, each once, the longest first: if memory runs out, it does so at
    once."""
    found: dict[str, Row] = {}
    for rows in sets:
        columns = [name for name in ("input_ids", "document_ids") if name in rows.column_names]
        arrays = rows.select_columns(columns).with_format("numpy")
        for number, row in enumerate(arrays):
            key = row_key(**row)
            found[key] = Row(key, len(row["input_ids"]), rows, number)
    return sorted(found.values(), key=lambda row: -row.tokens)


def in_words(count: int) -> str:
    """A number of bytes, in the largest unit that has some."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 1e3:.1f} kB"


def bytes_of(rows: list[Row], store: StateStore) -> int:
    """What the states of some rows take."""
    return sum(row.tokens for row in rows) * store.bytes_per_token


def size_in_words(rows: list[Row], missing: list[Row], store: StateStore, folder: Path) -> str:
    """What is kept, and how much of it is there."""
    tokens = sum(row.tokens for row in rows)
    there = bytes_of(rows, store) - bytes_of(missing, store)
    return (
        f"target states: {len(rows):,} rows, {tokens:,} tokens x {store.width:,} numbers (taps x"
        f" hidden size) x {store.dtype.itemsize} bytes = {in_words(bytes_of(rows, store))}"
        f" ({dtype_name(store.dtype)}) in {folder}; {in_words(there)} of it are there,"
        f" {in_words(free_in(store.folder))} of its disk are free"
    )


def free_in(folder: Path) -> int:
    """Bytes that the disk of a folder has left for this user."""
    return shutil.disk_usage(folder).free


def check_room(rows: list[Row], missing: list[Row], store: StateStore, most_gb: float) -> None:
    """Raise where a run would keep more than it was allowed to, or than there is room for.

    Raises:
        ValueError: how much that is, and the keys that change it.
    """
    less = "fewer rows (max_train_rows), shorter ones (max_length) or fewer target_layer_ids"
    size = bytes_of(rows, store)
    if size > most_gb * 1e9:
        raise ValueError(
            f"the target's states of this run's rows take {in_words(size)}, and"
            f" target_states_cache_gb allows {most_gb:g}: set target_states_cache_gb:"
            f" {math.ceil(size / 1e9)}, or keep less ({less})"
        )
    needed, free = bytes_of(missing, store), free_in(store.folder)
    if needed > free:
        raise ValueError(
            f"the target's states that are missing take {in_words(needed)}, and the disk of"
            f" {store.folder.parent} has {in_words(free)} left: make room, set target_states_cache"
            f" to a folder on another disk, or keep less ({less})"
        )
