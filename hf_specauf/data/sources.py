"""The raw rows of a run: of one source or of several by weight, each a file or a Hub dataset, and
what is held out of them."""

import hashlib
import json
import os
from fractions import Fraction
from glob import escape, glob
from math import ceil

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetNotFoundError, DatasetsError

from .config import DataArguments, Source
from .files import (
    ANOTHER_ARRAY,
    NOT_UNPACKED,
    READERS,
    UNPACKED,
    HiddenFault,
    bad_cell,
    bad_line,
    can_be_salvaged,
    csv_options,
    files_in,
    how_to_recode,
    reader_of,
    refuse_hidden_fault,
    refuse_hidden_fault_in,
    rows_and_faults,
    salvaged,
)

# ---- one source


def load_rows(
    name: str,
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    stream_rows: int | None = None,
    keys: str = "dataset_",
    salvage: bool = False,
) -> Dataset:
    """Rows of a local file (`.jsonl`, `.json`, `.csv`, `.txt`, packed by gzip or not, or
    `.parquet`) or of a dataset on the Hub.

    Args:
        stream_rows (`int`, *optional*): read only the first so many rows, without downloading the
            rest.
        keys (`str`, *optional*, defaults to `"dataset_"`): what the caller's keys begin with, to
            name them in errors.
        salvage (`bool`, *optional*, defaults to `False`): read what is whole of a `.json` or
            `.jsonl` file that is not, and say what was left out.

    Raises:
        FileNotFoundError: the name looks like a file and there is none.
        ValueError: it cannot be read as it is written; names the file and the line or row. A file
            was given a config, a split or a revision, or has an ending that is not read.
        OSError: the Hub has no such dataset, or it needs a login.
    """
    reader = reader_of(name)
    if reader is None:
        check_hub_name(name, keys)
        # The folder `.` has no name of its own.
        path = os.path.abspath(name) if os.path.isdir(name) else name
        arguments = dict(path=path, name=config, split=split, revision=revision)
    else:
        check_file(name, config, split, revision, keys)
        arguments = dict(path=reader, data_files=name, split="train")
    if reader == "text":
        # A mark at the start of the file would be text of the first row.
        arguments["encoding"] = "utf-8-sig"
    try:
        return _read(arguments | _looked_at(name, reader), stream_rows)
    except DatasetNotFoundError as error:
        raise OSError(
            f"{name_key(keys)}: {name!r} is not on the Hub, or you may not see it (gated and"
            f" private ones need access and `hf auth login`). {error}"
        ) from error
    except (*NOT_UNPACKED, DatasetsError, ValueError, TypeError, StopIteration) as error:
        cause = error.__cause__ or error
        if salvage and reader == "json" and not isinstance(cause, NOT_UNPACKED):
            copy = salvaged(name)
            if copy is not None:
                return load_rows(copy, stream_rows=stream_rows)
        found = _why_unreadable(name, reader, cause)
        way_out = "Mend that and start the same command again"
        if ANOTHER_ARRAY in found:
            way_out = f"`jq -c '.[]' {name} > rows.jsonl` makes it rows that are read"
        if reader == "json" and not salvage and can_be_salvaged(name):
            key = "prompts_salvage" if keys == "prompts_" else "dataset_salvage"
            way_out += f", or read only the rows that are whole: --{key} true"
        raise ValueError(f"{name}: {found}. {way_out}") from error


def _looked_at(name: str, reader: str | None) -> dict:
    """How `datasets` must read a local file or folder, once no row in it would be misread.

    Raises:
        HiddenFault: one would be.
    """
    if reader == "json":
        refuse_hidden_fault(name)
    elif reader == "csv":
        return csv_options(name)
    elif reader is None and os.path.isdir(name):
        refuse_hidden_fault_in(name)
        files = files_in(name)
        if {reader_of(path) for path in files} == {"csv"}:
            return csv_options(files[0])
    return {}


def _read(arguments: dict, stream_rows: int | None) -> Dataset:
    if stream_rows is None:
        rows = load_dataset(**arguments)
        # What reads JSON and Parquet takes any bytes for text. Without this they would fail at the
        # first look at the row, where nobody knows the file any more.
        rows.data.validate(full=True)
        return rows
    stream = load_dataset(**arguments, streaming=True)
    # `use_json` reads columns of several types as `load_dataset` does without streaming.
    return Dataset.from_list(list(stream.take(stream_rows)), on_mixed_types="use_json")


def _why_unreadable(name: str, reader: str | None, error: BaseException) -> str:
    """What is wrong and where, in short. `datasets` names no file, and seldom a line."""
    said = " ".join(str(error).split()).rstrip(".")
    if reader is None:
        return said
    if not os.path.getsize(name):
        return "it is empty"
    if "corresponds to no data" in said:
        return "it holds no row"
    if isinstance(error, NOT_UNPACKED):
        unpacked = name.removesuffix(".gz")
        return (
            f"it is cut off, or is not packed by gzip ({said}). `gzip -dc {name} > {unpacked}`"
            " unpacks what is whole of it"
        )
    found = None
    if reader == "parquet":
        if "utf" in said.lower():
            found = bad_cell(name)
    elif reader == "json" and not isinstance(error, HiddenFault):
        found = next((fault for _, fault in rows_and_faults(name) if fault), None)
    elif reader in ("csv", "text"):
        found = bad_line(name)
    found = found or said
    if "not UTF-8" in found and reader != "parquet":
        found += f"; {how_to_recode(name)}"
    return found


def name_key(keys: str) -> str:
    """The key that names a source, of those that begin with `keys`."""
    # of `evaluate`, whose key for the name has no `_name`
    return "--prompts" if keys == "prompts_" else f"{keys}name"


def check_hub_name(name: str, keys: str) -> None:
    """Raise where what would be looked for on the Hub is meant to be on this machine.

    Raises:
        FileNotFoundError: it is a path, and nothing is there.
        ValueError: it is a file, and its ending is none of those that are read; or a model's
            folder.
    """
    if os.path.isfile(name):
        packed = ", ".join(ending for ending, reader in READERS.items() if reader in UNPACKED)
        raise ValueError(
            f"{name_key(keys)} {name!r} is a file with an ending that is not read. What is read:"
            f" {packed}, also with .gz behind it, and .parquet. Rename or unpack it"
        )
    if glob(os.path.join(escape(name), "*.safetensors")):
        raise ValueError(
            f"{name_key(keys)} {name!r} is a folder that holds a model, and no rows: give a file or"
            " folder of rows, or a dataset's Hub id"
        )
    is_path = name.startswith(("/", ".", "~")) or name.count("/") > 1
    if is_path and "://" not in name and not os.path.isdir(name):
        raise FileNotFoundError(
            f"{name_key(keys)} {name!r} looks like a local file or folder, but there is none at"
            f" {os.path.abspath(name)}: give the path of one, or a dataset's Hub id (OWNER/NAME)"
        )


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


def rows_hash(rows: Dataset) -> str:
    """Short SHA-256 of all rows."""
    # A name would not do: files are edited, and branches on the Hub move.
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, default=str).encode())
    return digest.hexdigest()[:16]


# ---- all sources of a run


def load_data(data: DataArguments) -> tuple[list[Dataset], list[Dataset] | None]:
    """(training rows, held-out rows or `None`), raw, a dataset for each source.

    Raises:
        ValueError: a source has too few rows to hold one out, or gives no row to the mixture.
    """
    sources = data.sources()
    weights = [source["weight"] for source in sources]
    whole, heldout = [], []
    for source, weight in zip(sources, weights):
        share = weight / sum(weights)
        # Held-out rows without a dataset of their own are taken from every source by its share.
        held_out = 0
        if data.eval_dataset_name is None:
            held_out = ceil(share * data.eval_rows)
        rows = _load_source(source, share, held_out, data)
        if held_out:
            # The last rows, because max_train_rows takes the first. At most a tenth, because
            # training needs most of a small source.
            size = min(held_out, max(len(rows) // 10, 1))
            first = _start_of_conversation(rows, len(rows) - size)
            heldout.append(rows.select(range(first, len(rows))))
            rows = rows.select(range(first))
        whole.append(rows)
    train = take_shares(whole, weights, data.max_train_rows)
    if len(sources) > 1:
        _check_mixture(sources, whole, train)
        counts = [f"{len(rows)} rows of {source['name']}" for rows, source in zip(train, sources)]
        print(f"mixture: {', '.join(counts)}")
    if data.eval_dataset_name is not None:
        heldout = [_load_heldout(data)]
    return train, heldout or None


def _start_of_conversation(rows: Dataset, first: int) -> int:
    """The first row of the conversation that a row belongs to. `regenerate` writes several rows of
    one conversation, and training on some of them would tell what the others hold."""
    if "source_row" not in rows.column_names:
        return first
    sources = rows["source_row"]
    start = first
    while start > 0 and sources[start - 1] == sources[first]:
        start -= 1
    # All rows may be of one conversation, and something must be left to train on.
    return start or first


def _load_source(source: Source, share: float, held_out: int, data: DataArguments) -> Dataset:
    """All rows of a source, or where they are streamed as many as its share asks for."""
    # A stream is read from its start. Its last rows are then held out.
    stream_rows = None
    if data.dataset_streaming:
        stream_rows = ceil(share * data.max_train_rows) + held_out
    # What errors call the source's keys.
    keys = "dataset_" if data.dataset_mixture is None else "dataset_mixture's "
    rows = load_rows(
        source["name"],
        source["config"],
        source["split"],
        source["revision"],
        stream_rows=stream_rows,
        keys=keys,
        salvage=data.dataset_salvage,
    )
    if held_out and len(rows) < 2:
        raise ValueError(
            f"{source['name']} has {len(rows)} rows, too few to hold one out: give more, or"
            " eval_dataset_name"
        )
    return rows


def _check_mixture(sources: list[Source], whole: list[Dataset], train: list[Dataset]) -> None:
    for source, rows, taken in zip(sources, whole, train):
        if not len(taken):
            raise ValueError(
                f"dataset_mixture: of {source['name']} ({len(rows)} rows, weight"
                f" {source['weight']:g}) not one row would be taken: raise its weight or"
                " max_train_rows, or leave it out"
            )


def _load_heldout(data: DataArguments) -> Dataset:
    """The first `eval_rows` rows of the held-out dataset."""
    rows = load_rows(
        data.eval_dataset_name,
        data.eval_dataset_config,
        data.eval_dataset_split,
        data.eval_dataset_revision,
        stream_rows=data.eval_rows if data.dataset_streaming else None,
        keys="eval_dataset_",
        salvage=data.dataset_salvage,
    )
    return rows.select(range(min(data.eval_rows, len(rows))))


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
