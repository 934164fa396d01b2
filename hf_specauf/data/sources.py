"""Files and Hub datasets -> raw rows, of one source or of several by weight."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import datasets
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetNotFoundError, DatasetsError

from ..records import part_of

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
# What may stand between two rows of a JSON array. Arrays may follow each other too.
BETWEEN_ROWS = re.compile(r"[\s,\[\]]*")


def load_rows(
    name: str,
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    stream_rows: int | None = None,
    keys: str = "dataset_",
    salvage: bool = False,
) -> Dataset:
    """Rows of a local file (`.jsonl`, `.json`, `.parquet`, `.csv`, `.txt`) or of a dataset on the
    Hub.

    Args:
        stream_rows (`int`, *optional*): read only the first so many rows, without downloading the
            rest.
        keys (`str`, *optional*, defaults to `"dataset_"`): what the caller's keys begin with, to
            name them in errors.
        salvage (`bool`, *optional*, defaults to `False`): read what is whole of a `.json` or
            `.jsonl` file that is not, and say what was left out.

    Raises:
        FileNotFoundError: the name looks like a file and there is none.
        ValueError: it cannot be read; names the file and, of `.jsonl`, the line. A file was given a
            config, a split or a revision.
        OSError: the Hub has no such dataset, or it needs a login.
    """
    reader = READERS.get(os.path.splitext(name)[1])
    if reader is None:
        arguments = dict(path=name, name=config, split=split, revision=revision)
    else:
        check_file(name, config, split, revision, keys)
        arguments = dict(path=reader, data_files=name, split="train")
    try:
        if stream_rows is None:
            return load_dataset(**arguments)
        stream = load_dataset(**arguments, streaming=True)
        # `use_json` reads columns of several types as `load_dataset` does without streaming.
        return Dataset.from_list(list(stream.take(stream_rows)), on_mixed_types="use_json")
    except DatasetNotFoundError as error:
        raise OSError(
            f"{name_key(keys)}: {name!r} is not on the Hub, or you may not see it (gated and"
            f" private ones need access and `hf auth login`). {error}"
        ) from error
    except (DatasetsError, ValueError, StopIteration) as error:
        copy = salvaged(name) if salvage and reader == "json" else None
        if copy is not None:
            return load_rows(copy, stream_rows=stream_rows)
        way_out = "Mend that and start the same command again"
        if reader == "json" and not salvage:
            key = "prompts_salvage" if keys == "prompts_" else "dataset_salvage"
            way_out += f", or read only the rows that are whole: --{key} true"
        raise ValueError(f"{name}: {_why_unreadable(name, error)}. {way_out}") from error


def _why_unreadable(name: str, error: Exception) -> str:
    """What `datasets` raised, in short. It names no file, and seldom a line."""
    said = " ".join(str(error.__cause__ or error).split()).rstrip(".")
    if os.path.isfile(name) and not os.path.getsize(name):
        return "it is empty"
    if name.endswith(".jsonl"):
        return bad_line(name) or said
    return said


def name_key(keys: str) -> str:
    """The key that names a source, of those that begin with `keys`."""
    # of `evaluate`, whose key for the name has no `_name`
    return "--prompts" if keys == "prompts_" else f"{keys}name"


def check_file(name: str, config: str | None, split: str, revision: str | None, keys: str) -> None:
    """Raise where a local file is missing, or was given what only a dataset on the Hub has.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: names each key that would be ignored.
    """
    if not os.path.isfile(name):
        raise FileNotFoundError(
            f"{name_key(keys)} {name!r} looks like a local file, but there is none at"
            f" {os.path.abspath(name)}: give the path of one, or a dataset's Hub id (OWNER/NAME)"
        )
    given = []
    if config is not None:
        given.append(f"{keys}config {config!r}")
    if split not in ("train", None):
        given.append(f"{keys}split {split!r}")
    if revision is not None:
        given.append(f"{keys}revision {revision!r}")
    if given:
        raise ValueError(
            f"{name} is a file, and {', '.join(given)} is for datasets on the Hub: it would be"
            " ignored, so remove it"
        )


def _once(pairs: list[tuple]) -> dict:
    """A JSON object whose keys occur once. Python would keep the last of two without a word."""
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"has a key twice, among {[key for key, _ in pairs]}")
    return row


def bad_line(path: str) -> str | None:
    """What is wrong with the first line of a `.jsonl` file that cannot be read, or `None`."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            fault = row_fault(line) if line.strip() else None
            if fault is not None:
                return f"line {number} {fault}"
    return None


def row_fault(line: bytes) -> str | None:
    """Why a row, written as JSON, cannot be read, or `None`."""
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=_once)
        # Python reads half of a surrogate pair, and only writing it fails.
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        return f"is not UTF-8 ({error.reason} at byte {error.start})"
    except UnicodeEncodeError as error:
        return f"holds half a character, {error.object[error.start]!r}"
    except json.JSONDecodeError as error:
        return f"is not whole JSON, cut off perhaps ({error.msg} at column {error.colno})"
    except ValueError as error:
        return str(error)
    if not isinstance(row, dict):
        return f"is a {type(row).__name__}, not an object"
    return None


# ---- files that are not whole


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
    rows, faults, first = 0, 0, ""
    with open(part, "wb") as file:
        for line, fault in rows_and_faults(path):
            if fault is None:
                rows += 1
                file.write(line + b"\n")
                digest.update(line + b"\n")
            else:
                faults += 1
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
    print(f"{path} is not whole: read {rows} rows, and left out {faults} (first: {first})")
    return str(copy)


def rows_and_faults(path: str) -> Iterator[tuple[bytes, str | None]]:
    """The rows of a `.json` or `.jsonl` file as JSON of one line, each with `None` or why it cannot
    be read."""
    with open(path, "rb") as file:
        lines = (line.strip() for line in file)
        first = next((line for line in lines if line), b"")
    # A `.json` file may hold lines too. Those of an array are not rows.
    if first.startswith(b"[") or (path.endswith(".json") and row_fault(first)):
        yield from _rows_of_array(path)
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.strip()
            if line:
                fault = row_fault(line)
                yield line, fault and f"line {number} {fault}"


def _rows_of_array(path: str) -> Iterator[tuple[bytes, str | None]]:
    """The rows of a JSON array, as far as it is whole. Where the rows go on behind one that is not
    cannot be told: a brace may belong to its text."""
    content = Path(path).read_bytes()
    said = ""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        text = content[: error.start].decode("utf-8-sig")
        said = f"it is not UTF-8 ({error.reason} at byte {error.start})"
    decoder = json.JSONDecoder()
    number, start = 0, BETWEEN_ROWS.match(text).end()
    while start < len(text):
        try:
            row, end = decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            # Where the text ends because it is no text any more, that is the reason.
            said = said or f"it is not whole JSON ({error.msg}, character {error.pos})"
            break
        number += 1
        fault = row_fault(text[start:end].encode())
        yield json.dumps(row).encode(), fault and f"row {number} {fault}"
        start = BETWEEN_ROWS.match(text, end).end()
    if text.lstrip().startswith("[") and not text.rstrip().endswith("]"):
        said = said or "its end is missing"
    if said:
        left = 1 - len(text[:start].encode()) / len(content)
        yield b"", f"behind row {number} {said}, and {left:.1%} of the file was not read"


# trl's `get_dataset` takes shares of several datasets by another rule: it rounds each share by
# itself, has no revisions and no bound on the rows, and joins rows of all formats in one dataset.
def take_shares(
    sources: list[Dataset], weights: list[float], most: int | None = None
) -> list[Dataset]:
    """The first rows of each source, so many that they stand in the ratio of the weights. No row is
    taken twice, so the source that runs out first bounds the mixture.

    Args:
        most (`int`, *optional*): at most so many rows together.
    """
    # 0.7 as it is written. The float is a little less than 7/10.
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    total = min(len(source) / share for source, share in zip(sources, shares))
    if most is not None:
        total = min(total, most)
    total = int(total)
    counts = [int(share * total) for share in shares]
    # Rounding down leaves some rows over. They go to the sources with the largest remainders.
    remainders = [share * total - count for share, count in zip(shares, counts)]
    by_remainder = sorted(range(len(sources)), key=lambda i: remainders[i], reverse=True)
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return [source.select(range(count)) for source, count in zip(sources, counts)]


def rows_hash(rows: Dataset) -> str:
    """Short SHA-256 of all rows."""
    # A name would not do: files are edited, and branches on the Hub move.
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, default=str).encode())
    return digest.hexdigest()[:16]
