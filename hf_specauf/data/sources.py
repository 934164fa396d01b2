"""Files and Hub datasets -> raw rows of a recognised format, one source or several by weight."""

import json
import os
from fractions import Fraction

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetNotFoundError, DatasetsError

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}

# Row formats, the first that fits wins, and the columns that must be filled.
FORMATS = {
    "tokens": ("input_ids",),
    "messages": ("messages",),
    "conversations": ("conversations",),  # ShareGPT
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}


def row_format(columns: list[str]) -> str:
    """A key of `FORMATS`, from column names.

    Raises:
        ValueError: none fits.
    """
    for name, needed in FORMATS.items():
        if set(needed) <= set(columns):
            return name
    raise ValueError(
        f"the dataset's columns are {columns}: none of `messages`, `conversations` (ShareGPT),"
        " `instruction` and `output` (Alpaca), `prompt` and `completion`, or `text` is there."
        " Rename the column that holds the conversation or the text."
    )


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
    if reader is not None and not os.path.isfile(name):
        raise FileNotFoundError(
            f"dataset_name {name!r} looks like a local file, but there is none at"
            f" {os.path.abspath(name)}"
        )
    arguments = dict(path=name, name=config, split=split, revision=revision)
    if reader is not None:
        given = dict(config=config, split=None if split == "train" else split, revision=revision)
        if ignored := [
            f"{keys}{key} {value!r}" for key, value in given.items() if value is not None
        ]:
            raise ValueError(
                f"{name} is a file, and {', '.join(ignored)} is for datasets on the Hub: it would"
                " be ignored, so remove it"
            )
        arguments = dict(path=reader, data_files=name, split="train")
    try:
        if stream_rows is None:
            return load_dataset(**arguments)
        stream = load_dataset(**arguments, streaming=True)
        return Dataset.from_list(
            list(stream.take(stream_rows)), on_mixed_types="use_json"
        )  # as without streaming
    except DatasetNotFoundError as error:
        raise OSError(
            f"dataset_name: {name!r} is not on the Hub, or you may not see it (gated and private"
            f" ones need access and `hf auth login`). {error}"
        ) from error
    except (DatasetsError, ValueError, StopIteration) as error:  # names no file, and seldom a line
        said = " ".join(str(error.__cause__ or error).split()).rstrip(".")
        if reader is not None and not os.path.getsize(name):
            said = "it is empty"
        elif name.endswith(".jsonl"):
            said = bad_line(name) or said
        raise ValueError(f"{name}: {said}. Mend that and start the same command again") from error


def bad_line(path: str) -> str | None:
    """What is wrong with the first line of a `.jsonl` file that cannot be read, or `None`."""

    def once(pairs: list[tuple]) -> dict:
        if len(row := dict(pairs)) < len(pairs):
            raise ValueError(f"has a key twice, among {[key for key, _ in pairs]}")
        return row

    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"), object_pairs_hook=once)
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


def take_shares(
    sources: list[Dataset], weights: list[float], most: int | None = None
) -> list[Dataset]:
    """The first rows of each source so that rows stand in the ratio of the weights; no row is taken
    twice, so the source that runs out first bounds the mixture.

    Args:
        most (`int`, *optional*): at most so many rows together.
    """
    exact = [Fraction(str(weight)) for weight in weights]  # 0.7 as written
    shares = [weight / sum(exact) for weight in exact]
    total = min(len(source) / share for source, share in zip(sources, shares))
    total = int(total if most is None else min(total, most))
    counts = [int(share * total) for share in shares]
    for i in sorted(range(len(shares)), key=lambda i: counts[i] - shares[i] * total)[
        : total - sum(counts)
    ]:
        counts[i] += 1  # the largest remainders
    return [source.select(range(count)) for source, count in zip(sources, counts)]


# ShareGPT's names; trl renders no others either
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "bing": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
}
ROLES |= {"function_call": "assistant", "observation": "tool"}


class UnusableRow(ValueError):
    """A row that holds nothing to train on; its text is the reason, the same for all rows of a
    kind."""


def without_nulls(value):
    """Arrow fills the keys that other rows have with nulls, and templates ask which keys are there.
    Not for what was JSON text: there a null is meant."""
    if isinstance(value, dict):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def _parsed(value, what: str):
    """A value that may be written as JSON text."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise UnusableRow(f"{what} not JSON") from error


def row_text(row: dict, column: str) -> str:
    """A column that must hold text.

    Raises:
        UnusableRow: it holds something else.
    """
    if not isinstance(row[column], str):
        raise UnusableRow(f"its {column} is not text")
    return row[column]


def chat_messages(row: dict) -> list[dict]:
    """The turns of a row in any conversational format, with the roles chat templates know. System
    and tool turns are kept; a `system` column becomes the first turn; content in parts is joined
    where all of it is text; turns may be JSON text.

    Raises:
        UnusableRow: there is no turn, one is not text, or one has a role that templates would pass
            over.
    """
    kind = row_format([column for column, value in row.items() if value is not None])
    if kind == "alpaca":
        asked = [row_text(row, column) for column in ("instruction", "input") if row.get(column)]
        turns = [
            {"role": "user", "content": "\n\n".join(asked)},
            {"role": "assistant", "content": row["output"]},
        ]
    elif kind == "prompt_completion":
        turns = []
        for role, part in (("user", row["prompt"]), ("assistant", row["completion"])):
            turns += (
                without_nulls(part) if isinstance(part, list) else [{"role": role, "content": part}]
            )
    else:
        turns = _parsed(without_nulls(row[kind]), f"its {kind} are")
    if not isinstance(turns, list):
        raise UnusableRow(f"its {kind} are not a list of turns")
    turns = [_turn(turn) for turn in turns]
    if not turns:
        raise UnusableRow("it has no turns")
    if row.get("system") and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": row_text(row, "system")}, *turns]
    return turns


def _turn(turn: dict) -> dict:
    if not isinstance(turn, dict):
        raise UnusableRow("a turn is not a mapping")
    turn = {key: value for key, value in turn.items() if value is not None}
    said = turn.pop("role", None) or turn.pop("from", None)
    content = turn.pop("content", turn.pop("value", None))
    if said == "function_call":
        turn, content = {"tool_calls": [_parsed(content, "a function_call is")]}, ""
    if said is None or (content is None and "tool_calls" not in turn):
        raise UnusableRow("a turn lacks its role or content")
    role = ROLES.get(said, said) if isinstance(said, str) else said
    if role not in (
        "system",
        "developer",
        "user",
        "assistant",
        "tool",
    ):  # templates pass over others silently
        raise UnusableRow(f"a turn has the role {str(said)[:40]!r}")
    if isinstance(content, list):
        texts = [
            part.get("text")
            for part in content
            if isinstance(part, dict) and part.get("type") == "text"
        ]
        whole = len(texts) == len(content) and all(isinstance(text, str) for text in texts)
        content = "".join(texts) if whole else content
    if not isinstance(content, str | None):
        raise UnusableRow("a turn holds more than text")
    turn = {"role": role, "content": content or ""} | turn
    if "tool_calls" in turn:
        if not isinstance(turn["tool_calls"], list):
            raise UnusableRow("a turn's tool_calls are not a list")
        turn["tool_calls"] = [_tool_call(call) for call in turn["tool_calls"]]
    return turn


def _tool_call(call: dict) -> dict:
    function = call.get("function", call) if isinstance(call, dict) else call
    if not (isinstance(function, dict) and function.get("name")):
        raise UnusableRow("a tool call names no function")
    # OpenAI writes arguments as JSON text; templates want the object
    function = function | {
        "arguments": _parsed(function.get("arguments") or {}, "a tool call's arguments are")
    }
    return call | {"function": function} if "function" in call else function


def row_tools(row: dict) -> list[dict] | None:
    """The `tools` of a row, a list or its JSON text; `None` where there are none.

    Raises:
        UnusableRow: the text is not JSON.
    """
    tools = without_nulls(row.get("tools"))
    blank = isinstance(tools, str) and not tools.strip()
    return None if blank else _parsed(tools, "its tools are") or None
