"""The files that hold states: what is whole in them, and how rows are added and read."""

import os
import time
import zlib
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

# Seconds of work that a kill may cost. Each commit waits for the disk.
BETWEEN_COMMITS = 2.0


class Place(NamedTuple):
    """Where the states of a row lie.

    Attributes:
        shard (`str`): name of the pair of files.
        start (`int`): their first byte.
        tokens (`int`): S, of the row.
        checksum (`int`): CRC-32 of the bytes.
    """

    shard: str
    start: int
    tokens: int
    checksum: int


def index_line(key: str, place: Place) -> str:
    """A row's line in the index. It ends with its own checksum, so that half a line is no line."""
    line = f"{key} {place.start} {place.tokens} {place.checksum:08x}"
    return f"{line} {zlib.crc32(line.encode()):08x}\n"


def read_index(path: Path) -> dict[str, Place]:
    """The places of the rows in an index, up to the first line that is not whole."""
    found = {}
    for line in path.read_text(encoding="ascii", errors="replace").splitlines(keepends=True):
        words = line.split()
        if not line.endswith("\n") or len(words) != 5:
            break
        if f"{zlib.crc32(line.rpartition(' ')[0].encode()):08x}" != words[4]:
            break
        key, start, tokens, checksum, _ = words
        found[key] = Place(path.stem, int(start), int(tokens), int(checksum, 16))
    return found


class StateStore:
    """The states of many rows in one folder: pairs of files, `N.states` and `N.index`.

    `N.states` holds the numbers of one row after another, as they lie in memory. `N.index` has a
    line for each row. A row counts if its line is whole and its bytes are there.

    Args:
        folder (`Path`): one target, its taps and a dtype.
        width (`int`): L * H, numbers of a token.
        dtype (`torch.dtype`): of the numbers.
    """

    def __init__(self, folder: Path, width: int, dtype: torch.dtype):
        self.folder, self.width, self.dtype = folder, width, dtype
        self.bytes_per_token = width * dtype.itemsize
        self._places: dict[str, Place] = {}
        self._maps: dict[str, torch.Tensor] = {}  # the bytes of each shard
        self._checked: set[str] = set()  # keys whose checksum was compared
        self.refresh()

    def refresh(self) -> None:
        """Look again what is there: other processes add rows."""
        self._places, self._maps = {}, {}
        for path in sorted(self.folder.glob("*.index")):
            states = path.with_suffix(".states")
            size = states.stat().st_size if states.is_file() else 0
            for key, place in read_index(path).items():
                if place.start + place.tokens * self.bytes_per_token <= size:
                    self._places[key] = place

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def read(self, key: str) -> torch.Tensor:
        """The states of a row, (S, L * H), in memory that is the file's own.

        Raises:
            ValueError: they are not the bytes that were written.
        """
        place = self._places[key]
        end = place.start + place.tokens * self.bytes_per_token
        found = self._map(place.shard)[place.start : end]
        # Once for each row, because a checksum costs about as much as reading.
        if key not in self._checked:
            if zlib.crc32(found.numpy()) != place.checksum:
                path = self.folder / place.shard
                raise ValueError(
                    f"{path}.states is damaged: a row in it is not what was written. Remove it and"
                    f" {path}.index, and start again: the states of their rows are then computed"
                    " anew"
                )
            self._checked.add(key)
        return found.view(self.dtype).view(place.tokens, self.width)

    def _map(self, shard: str) -> torch.Tensor:
        if shard not in self._maps:
            # Copy on write: nobody writes, and torch warns of memory that cannot be written.
            bytes_ = np.memmap(self.folder / f"{shard}.states", np.uint8, mode="c")
            self._maps[shard] = torch.from_numpy(bytes_)
        return self._maps[shard]


class ShardWriter:
    """Adds rows, to a pair of files that no other process writes.

    A row's line is written only when its numbers are on the disk. So whatever ends this process, no
    half row counts, and a kill costs the rows of the last `BETWEEN_COMMITS` seconds.

    Args:
        store (`StateStore`): where.
    """

    def __init__(self, store: StateStore):
        self.store = store
        self._paths = _new_pair(store.folder)
        self._index, self._states = (os.open(path, os.O_WRONLY) for path in self._paths)
        self._written = 0  # bytes of states
        self._committed = (0, 0)  # bytes of states and of the index, of rows that count
        self._lines: list[str] = []  # of the other rows
        self._last_commit = time.monotonic()

    def add(self, key: str, states: torch.Tensor) -> None:
        """Add the states of a row, (S, L * H), on the CPU and in the store's dtype.

        Raises:
            OSError: the disk does not take them. Rows that count are left as they are.
        """
        content = states.contiguous().view(torch.uint8).flatten().numpy()
        place = Place("", self._written, len(states), zlib.crc32(content))
        try:
            _write(self._states, content)
        except OSError:
            os.ftruncate(self._states, self._written)  # a half row is of no use
            raise
        self._written += content.nbytes
        self._lines.append(index_line(key, place))
        if time.monotonic() - self._last_commit > BETWEEN_COMMITS:
            self.commit()

    def commit(self) -> None:
        """Make all rows count that were added."""
        lines, self._lines = "".join(self._lines).encode(), []
        try:
            os.fsync(self._states)
            _write(self._index, lines)
            os.fsync(self._index)
        except OSError:
            # The index first: no line may be there whose numbers are not.
            os.ftruncate(self._index, self._committed[1])
            os.ftruncate(self._states, self._committed[0])
            raise
        self._committed = (self._written, self._committed[1] + len(lines))
        self._last_commit = time.monotonic()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *exception) -> None:
        """Commit, also after Ctrl-C or on a full disk, and close."""
        try:
            if self._lines:
                self.commit()
        finally:
            os.close(self._states)
            os.close(self._index)
            if not self._committed[0]:  # no row came
                for path in self._paths:
                    path.unlink()


def _new_pair(folder: Path) -> tuple[Path, Path]:
    """Make `N.index` and `N.states` of the first number that nobody has."""
    for number in count(1):
        states = folder / f"{number:06d}.states"
        try:
            # The one that makes the file has the number, among all processes.
            states.touch(exist_ok=False)
        except FileExistsError:
            continue
        index = states.with_suffix(".index")
        index.touch()
        return index, states


def _write(file: int, content) -> None:
    """Write all of some bytes: the system may take a part at a time."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(file, rest) :]
