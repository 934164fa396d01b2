"""A local file of rows: what reads it, what is wrong with it and where, and what is whole of it."""

import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import datasets
import pandas
from datasets import Features, Value
from pyarrow.parquet import ParquetFile

from ..records import part_of

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
# Readers of lines and of text, whose files may be packed by gzip (`rows.jsonl.gz`).
UNPACKED = ("json", "csv", "text")
# What may stand between two rows of a JSON array. Arrays may follow each other too.
BETWEEN_ROWS = re.compile(r"[\s,\[\]]*")
SECOND_ARRAY = re.compile(r"\]\s*,?\s*\[")
ANOTHER_ARRAY = "its array ends and another begins, and one file holds one array"
# A null in the place of the first row ends the whole process in pyarrow.
ROWS_OF_ARRAY = re.compile(rb"\s*\[\s*(?:\{|null\b)")
# Half of a surrogate pair, as JSON writes it. Two backslashes are a backslash and no such thing,
# and a whole pair is a character.
HALF = re.compile(
    rb"\\(?:\\|u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    rb"|(?P<half>u[dD][89a-fA-F][0-9a-fA-F]{2}))"
)
BOM = b"\xef\xbb\xbf"
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
# What unpacking raises where a file is cut off, or was never packed.
NOT_UNPACKED = (EOFError, zlib.error, gzip.BadGzipFile)


def reader_of(name: str) -> str | None:
    """What reads a local file of this name; `None` for the name of a dataset on the Hub."""
    reader = READERS.get(os.path.splitext(name.removesuffix(".gz"))[1])
    if name.endswith(".gz") and reader not in UNPACKED:
        return None
    return reader


class HiddenFault(ValueError):
    """A fault that `datasets` would pass over without a word."""


def opened(path: str) -> IO[bytes]:
    """A file, unpacked if need be."""
    if path.endswith(".gz"):
        return gzip.open(path)
    return open(path, "rb")


def numbered_lines(path: str) -> Iterator[tuple[int, bytes]]:
    """The lines of a file from 1 on, the first one without the mark that says UTF-8."""
    with opened(path) as file:
        for number, line in enumerate(file, start=1):
            yield number, line.removeprefix(BOM) if number == 1 else line


def holds_array_of_rows(path: str) -> bool:
    """Whether a JSON file is an array of objects."""
    with opened(path) as file:
        return ROWS_OF_ARRAY.match(file.read(4096).removeprefix(BOM)) is not None


def refuse_hidden_fault(path: str) -> None:
    """Raise for a row that `datasets` would read otherwise than it is written: it drops half a
    character, makes an empty row of a null, takes the last of two keys in an array or in a file of
    one line, and of one line with half a character makes several rows. A null in the first line
    would end the process without a word.

    Raises:
        HiddenFault: the row or line, and what is wrong with it.
    """
    if holds_array_of_rows(path):
        for _, fault in rows_and_faults(path):
            if fault:
                raise HiddenFault(fault)
        return
    lines, are_rows, twice = 0, False, None
    for number, line in numbered_lines(path):
        if not line.strip():
            continue
        lines += 1
        if lines == 1:
            are_rows, twice = first_line(line)
        fault = half_in_line(line)
        # In an object that spreads over lines, a null may be part of it.
        if are_rows and line.strip() == b"null":
            fault = content_fault(None, line)
        if fault:
            raise HiddenFault(f"line {number} {fault}")
    # Of more lines than one, pyarrow tells this itself.
    if lines == 1 and twice:
        raise HiddenFault(f"its only line {twice}")


def first_line(line: bytes) -> tuple[bool, str | None]:
    """Whether a line is whole JSON, so that each line of the file is a row, and whether it has a
    key twice, in words."""
    try:
        json.loads(line.decode("utf-8"), object_pairs_hook=_once)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return False, None
    except ValueError as error:
        return True, str(error)
    return True, None


def half_in_line(line: bytes) -> str | None:
    """What is wrong with a line that holds half a character, or `None`."""
    half = half_character(line)
    return half and f"holds half a character, {half}"


def files_in(folder: str) -> list[str]:
    """The files in a local folder that are read, in order."""
    paths = sorted(str(path) for path in Path(folder).rglob("*") if path.is_file())
    return [path for path in paths if reader_of(path) is not None]


def refuse_hidden_fault_in(folder: str) -> None:
    """Raise for such a row in a file of a local folder.

    Raises:
        HiddenFault: the file too.
    """
    for path in files_in(folder):
        if reader_of(path) == "json":
            try:
                refuse_hidden_fault(path)
            except HiddenFault as error:
                raise HiddenFault(f"{path}: {error}") from None


def csv_options(path: str) -> dict:
    """What reads the cells of a CSV file as the texts that they are. pandas takes `None`, `NA` and
    `null` for nothing, and 007 for the number 7."""
    columns = pandas.read_csv(path, nrows=0).columns
    features = Features({str(name): Value("string") for name in columns})
    # Only a cell without anything is nothing.
    return {"features": features, "keep_default_na": False, "na_values": [""]}


def half_character(written: bytes) -> str | None:
    """The first half of a surrogate pair in JSON text, as it is written there, or `None`."""
    for found in HALF.finditer(written):
        if found["half"]:
            return f"'{found[0].decode()}'"
    return None


def bad_line(path: str) -> str | None:
    """Which line of a text file is not UTF-8, or `None`."""
    for number, line in numbered_lines(path):
        fault = encoding_fault(line)
        if fault is not None:
            return f"line {number} {fault}"
    return None


def how_to_recode(name: str) -> str:
    """The command that writes a file anew as UTF-8."""
    with opened(name) as file:
        starts_as_utf_16 = file.read(2) in UTF_16
    packed = "gzip -dc" if name.endswith(".gz") else "cat"
    new = f"utf8-{os.path.basename(name).removesuffix('.gz')}"
    if starts_as_utf_16:
        return f"it is UTF-16, and `{packed} {name} | iconv -f UTF-16 -t UTF-8 > {new}` mends it"
    return (
        "if it was written on Windows or as Latin-1,"
        f" `{packed} {name} | iconv -f WINDOWS-1252 -t UTF-8 > {new}` mends it"
    )


def encoding_fault(line: bytes) -> str | None:
    """Why a line is not UTF-8, or `None`."""
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"is not UTF-8 ({error.reason} at its byte {error.start})"
    return None


def bad_cell(path: str) -> str | None:
    """Which row and column of a Parquet file is not UTF-8, or `None`."""
    first = 1
    for batch in ParquetFile(path).iter_batches(batch_size=1000):
        for column, cells in zip(batch.schema.names, batch.columns):
            for number, cell in enumerate(cells, start=first):
                try:
                    cell.as_py()
                except UnicodeDecodeError as error:
                    return (
                        f"row {number} is not UTF-8 in its column {column!r} ({error.reason} at"
                        f" byte {error.start})"
                    )
        first += len(batch)
    return None


def _once(pairs: list[tuple]) -> dict:
    """A JSON object whose keys occur once. Python would keep the last of two without a word."""
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"has a key twice, among {[key for key, _ in pairs]}")
    return row


def row_fault(line: bytes) -> str | None:
    """Why a row, written as JSON, cannot be read, or `None`."""
    fault = encoding_fault(line)
    if fault is not None:
        return fault
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        return f"is not whole JSON, cut off perhaps ({error.msg} at column {error.colno})"
    except ValueError as error:
        return str(error)
    return content_fault(row, line)


def content_fault(row, written: bytes) -> str | None:
    """What is wrong with a row that is whole JSON, or `None`."""
    if row is None:
        return "is null, not an object"
    if not isinstance(row, dict):
        return f"is a {type(row).__name__}, not an object"
    return half_in_line(written)


# ---- what is whole of a file that is not


def can_be_salvaged(path: str) -> bool:
    """Whether a `.json` or `.jsonl` file holds rows that are whole beside what is not."""
    found = set()
    try:
        for _, fault in rows_and_faults(path):
            found.add(fault is None)
            if len(found) == 2:
                return True
    except NOT_UNPACKED:
        pass
    return False


def salvaged(path: str) -> str | None:
    """Copy the rows that are whole of a `.json` or `.jsonl` file, and say what was left out.

    The copy lies in the cache of `datasets`, named by what it holds. So several processes, and the
    next run, find its tokens in the cache, and none takes what an older version found whole.

    Returns:
        the copy, a `.jsonl` file; `None` where all rows are whole, so that the fault is another.

    Raises:
        ValueError: not one row is whole.
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "salvaged"
    folder.mkdir(parents=True, exist_ok=True)
    part = part_of(folder / f"{Path(path).stem}.jsonl")
    digest = hashlib.sha256()
    rows = faults = lost = 0
    first = ""
    with open(part, "wb") as file:
        for line, fault in rows_and_faults(path):
            if fault is None:
                rows += 1
                file.write(line + b"\n")
                digest.update(line + b"\n")
            else:
                faults += 1
                # Between two arrays nothing is lost.
                if not fault.endswith(ANOTHER_ARRAY):
                    lost += 1
                    first = first or fault
    copy = folder / f"{Path(path).stem}-{digest.hexdigest()[:16]}.jsonl"
    # The same bytes may be there already. Their time must stay, because `datasets` looks at it.
    if rows and faults and not copy.is_file():
        part.replace(copy)
    part.unlink(missing_ok=True)
    if not faults:
        return None
    if not rows:
        raise ValueError(f"{path}: not one row of it is whole ({first}): give another file")
    left_out = f"left out {lost} (first: {first})" if lost else "left out none of several arrays"
    print(f"{path} is not whole: read {rows} rows, and {left_out}")
    return str(copy)


def rows_and_faults(path: str) -> Iterator[tuple[bytes, str | None]]:
    """The rows of a `.json` or `.jsonl` file as JSON of one line, each with `None` or why it cannot
    be read."""
    first = next((line.strip() for _, line in numbered_lines(path) if line.strip()), b"")
    is_json = path.removesuffix(".gz").endswith(".json")
    # A `.json` file may hold lines too. Those of an array are not rows.
    if first.startswith(b"[") or (is_json and row_fault(first)):
        yield from _rows_of_array(path)
        return
    for number, line in numbered_lines(path):
        line = line.strip()
        if line:
            fault = row_fault(line)
            yield line, fault and f"line {number} {fault}"


def _rows_of_array(path: str) -> Iterator[tuple[bytes, str | None]]:
    """The rows of a JSON array, as far as it is whole. Where the rows go on behind one that is not
    cannot be told: a brace may belong to its text."""
    with opened(path) as file:
        content = file.read()
    said = ""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        text = content[: error.start].decode("utf-8-sig")
        said = f"it is not UTF-8 ({error.reason} at byte {error.start})"
    strict, lenient = json.JSONDecoder(object_pairs_hook=_once), json.JSONDecoder()
    number, start = 0, BETWEEN_ROWS.match(text).end()
    while start < len(text):
        fault = None
        try:
            row, end = strict.raw_decode(text, start)
        except json.JSONDecodeError as error:
            # Where the text ends because it is no text any more, that is the reason.
            said = said or f"it is not whole JSON ({error.msg}, character {error.pos})"
            break
        except ValueError as error:
            fault = str(error)
            row, end = lenient.raw_decode(text, start)
        number += 1
        # No string of JSON holds a line break as it is, so these stand between its parts.
        written = text[start:end].replace("\n", " ").replace("\r", " ").encode()
        fault = fault or content_fault(row, written)
        yield written, fault and f"row {number} {fault}"
        start = BETWEEN_ROWS.match(text, end).end()
        if SECOND_ARRAY.search(text, end, start):
            yield b"", f"behind row {number} {ANOTHER_ARRAY}"
    if text.lstrip().startswith("[") and not text.rstrip().endswith("]"):
        said = said or "its end is missing"
    if said:
        left = len(content) - len(text[:start].encode())
        yield b"", f"behind row {number} {said}, and {left} of {len(content)} bytes were not read"
