"""Processes that wait for one another, however long that takes.

A collective of torch gives up after `ddp_timeout`, and takes all processes with it. Half a million
rows may take longer to tokenize (axolotl#2684), and so may an upload to a slow Hub
(alignment-handbook#59). So these processes look into torch's store, which is no collective. Where
one of them has died, their launcher ends those that wait.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

import torch.distributed as dist
from accelerate import PartialState

LONGEST_PAUSE = 1.0  # seconds between two looks
# All processes come to the same meetings in the same order, so a number tells them apart.
_meetings = count()


def _store() -> dist.Store:
    # torch has no public name for the store that all its processes share
    return dist.distributed_c10d._get_default_store()


def _appears(key: str, seconds: float = math.inf) -> bool:
    """Whether somebody sets a key within so many seconds.

    Looking again and again lets Ctrl-C through. The store's own `wait` does not.
    """
    deadline, pause = time.monotonic() + seconds, 0.01
    while not _store().check([key]):
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
    return True


def _is_alone() -> bool:
    return PartialState().num_processes == 1 or not dist.is_initialized()


def everyone_comes(seconds: float = math.inf) -> bool:
    """Wait for all processes; whether they came within so many seconds, each to this same call."""
    if _is_alone():
        return True
    meeting = f"hf_specauf/{next(_meetings)}"
    if _store().add(meeting, 1) == PartialState().num_processes:
        _store().set(f"{meeting}/all", "")
    return _appears(f"{meeting}/all", seconds)


def wait_for_everyone() -> None:
    """Go on when all processes are here."""
    if _is_alone():
        return
    everyone_comes()
    # The process that keeps the store must not end before all have looked, which takes a moment.
    PartialState().wait_for_everyone()


@contextmanager
def first_process_first() -> Iterator[None]:
    """The first process of each machine goes first, and the others find what it left in the cache.
    All leave together, so that nobody comes too early to the next collective."""
    if _is_alone():
        yield
        return
    state = PartialState()
    # the rank of this machine's first process
    first = state.process_index - state.local_process_index
    done = f"hf_specauf/{next(_meetings)}/{first}"
    if not state.is_local_main_process:
        _appears(done)
    try:
        yield
    finally:
        if state.is_local_main_process:
            _store().set(done, "")
    wait_for_everyone()
