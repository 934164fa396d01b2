"""The pass over all rows before the first step: each row alone, the longest first."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from ..losses.blocks import row_inputs
from ..target import FrozenTarget
from ..training.callbacks import Interruption
from ..training.config import AUFConfig
from .store import ShardWriter, StateStore
from .wanted import Row, bytes_of, in_words


@contextmanager
def alone_in(folder: Path, wanted: bool) -> Iterator[None]:
    """Wait until no other run fills a folder, and keep others waiting. The system takes the lock
    from a process that dies."""
    if not wanted:
        yield
        return
    lock = FileLock(folder / "filling.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        print(f"another run is filling {folder}: waiting until it is done", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def fill(target: FrozenTarget, store: StateStore, missing: list[Row], args: AUFConfig) -> None:
    """Compute and keep this process's share of the missing rows.

    Args:
        missing (`list[Row]`): the same list for all processes.

    Raises:
        OSError: the disk is full. Rows that are whole stay.
        KeyboardInterrupt: Ctrl-C or SIGTERM came. Rows that are whole stay.
    """
    # Every world-th row: neighbours in the list are of like length.
    share = missing[args.process_index :: args.world_size]
    try:
        if share:
            _compute(target, store, share, args)
        if args.shard_target and len(share) < len(missing[:: args.world_size]):
            # All processes run a sharded target equally often. This one has a row less.
            states_of(target, missing[0], args.device)
    except OSError as error:
        store.refresh()
        left = [row for row in share if row.key not in store]
        raise OSError(
            f"the target's states cannot be written to {store.folder} ({error}). Those of"
            f" {len(share) - len(left)} rows are whole and stay. {len(left)} rows are left, which"
            f" take {in_words(bytes_of(left, store))}: make room, or move the folder to a larger"
            " disk, and start again, which goes on there"
        ) from error


def _compute(target: FrozenTarget, store: StateStore, share: list[Row], args: AUFConfig) -> None:
    """Run the target over each row of this process, with a progress bar, and write its states."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    quiet = args.disable_tqdm or args.process_index > 0
    with (
        Interruption("this row") as told,
        Progress(*columns, disable=quiet) as progress,
        ShardWriter(store) as writer,
        ThreadPoolExecutor(1) as pool,
    ):
        total = sum(row.tokens for row in share)
        bar = progress.add_task("target states", total=total, rate="")
        start, writing = progress.get_time(), None
        for done, row in enumerate(share, start=1):
            states = states_of(target, row, args.device).to(store.dtype)
            # One row is written while the next one is computed.
            if writing is not None:
                writing.result()
            writing = pool.submit(writer.add, row.key, states.cpu())
            progress.advance(bar, row.tokens)
            seconds = progress.get_time() - start
            tokens = progress.tasks[bar].completed / seconds
            progress.update(bar, rate=f"{done:,} of {len(share):,} rows, {tokens:,.0f} tokens/s")
            if told.noted and done < len(share):
                raise KeyboardInterrupt(f"the target's states of {len(share) - done} rows are left")
        writing.result()


def states_of(target: FrozenTarget, row: Row, device: torch.device) -> torch.Tensor:
    """The target's states of one row, alone and without padding. (S, L * H)"""
    found = row.rows[row.number]
    ids = torch.tensor([found["input_ids"]], device=device)  # (1, S)
    documents = torch.zeros_like(ids)
    if "document_ids" in found:
        documents = torch.tensor([found["document_ids"]], device=device)
    return target.context(ids, **row_inputs(documents))[0]
