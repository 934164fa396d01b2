"""Files and Hub datasets -> raw rows, of one source or of several by weight."""

import json
import os
from fractions import Fraction

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetNotFoundError, DatasetsError

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}


def load_rows(
    name: str,
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    stream_rows: int | None = None,
    keys: str = "dataset_",
) -> Dataset:
    """Rows of a local file (`.jsonl`, `.json`, `.parquet`, `.csv`, `.txt`) or of a dataset on the
    Hub.

    Args:
        stream_rows (`int`, *optional*): read only the first so many rows, without downloading the
            rest.
        keys (`str`, *optional*, defaults to `"dataset_"`): what the caller's keys begin with, to
            name them in errors.

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
        # What `datasets` raises names no file, and seldom a line.
        said = " ".join(str(error.__cause__ or error).split()).rstrip(".")
        if reader is not None and not os.path.getsize(name):
            said = "it is empty"
        elif name.endswith(".jsonl"):
            said = bad_line(name) or said
        raise ValueError(f"{name}: {said}. Mend that and start the same command again") from error


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
            f" {os.path.abspath(name)}"
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
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"), object_pairs_hook=_once)
                # Python reads half of a surrogate pair, and only writing it fails.
                json.dumps(row, ensure_ascii=False).encode("utf-8")
            except UnicodeDecodeError as error:
                return f"line {number} is not UTF-8 ({error.reason} at byte {error.start})"
            except UnicodeEncodeError as error:
                return f"line {number} holds half a character, {error.object[error.start]!r}"
            except json.JSONDecodeError as error:
                return (
                    f"line {number} is not whole JSON, cut off perhaps ({error.msg} at column"
                    f" {error.colno})"
                )
            except ValueError as error:
                return f"line {number} {error}"
            if not isinstance(row, dict):
                return f"line {number} is a {type(row).__name__}, not an object"
    return None


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
