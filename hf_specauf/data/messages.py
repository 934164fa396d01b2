"""A raw row of any recognised format -> the turns of a chat, its tools, or its text."""

import json

from transformers import PreTrainedTokenizerBase

# Row formats and the columns that must be filled. The first that fits wins.
FORMATS = {
    "tokens": ("input_ids",),
    "messages": ("messages",),
    "conversations": ("conversations",),  # ShareGPT
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}

# ShareGPT's names of roles -> those of chat templates. trl renders no others either.
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "bing": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}
# Templates pass over turns of any other role without a word.
TEMPLATE_ROLES = ("system", "developer", "user", "assistant", "tool")


class UnusableRow(ValueError):
    """A row that holds nothing to train on. Its text is the reason, in the same words for every
    row of its kind, because rows are counted by reason."""


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


def without_nulls(value):
    """A value without the keys that are null. Arrow gives every row the keys of all rows, filled
    with nulls, and templates ask which keys are there.

    Do not use it on what was JSON text: a null in there is meant.
    """
    if isinstance(value, dict):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [without_nulls(part) for part in value]
    return value


def _parsed(value, what: str):
    """A value that may be written as JSON text. `what` begins the reason if it is not JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
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
    """The turns of a row in any conversational format, with the roles that chat templates know.

    System and tool turns are kept. A `system` column becomes the first turn. Content in parts is
    joined where all of it is text. The turns may be written as JSON text.

    Raises:
        UnusableRow: there is no turn, one is not text, or one has a role that templates would pass
            over.
    """
    # By the columns that this row fills: a file of several formats has the columns of all.
    kind = row_format([column for column, value in row.items() if value is not None])
    if kind == "alpaca":
        turns = _alpaca_turns(row)
    elif kind == "prompt_completion":
        turns = _prompt_completion_turns(row)
    else:
        turns = _parsed(without_nulls(row[kind]), f"its {kind} are")
    if not isinstance(turns, list):
        raise UnusableRow(f"its {kind} are not a list of turns")
    turns = [_turn(turn) for turn in turns]
    if not turns:
        raise UnusableRow("it has no turns")
    if row.get("system") and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": row_text(row, "system")})
    return turns


def _alpaca_turns(row: dict) -> list[dict]:
    asked = [row_text(row, column) for column in ("instruction", "input") if row.get(column)]
    return [
        {"role": "user", "content": "\n\n".join(asked)},
        {"role": "assistant", "content": row["output"]},
    ]


def _prompt_completion_turns(row: dict) -> list[dict]:
    """Each of the two columns holds text, or turns of its own."""
    turns = []
    for role, column in (("user", "prompt"), ("assistant", "completion")):
        part = row[column]
        if isinstance(part, list):
            turns += without_nulls(part)
        else:
            turns.append({"role": role, "content": part})
    return turns


def _turn(turn: dict) -> dict:
    """One turn of any conversational format, with `role`, `content` (text) and its other keys."""
    if not isinstance(turn, dict):
        raise UnusableRow("a turn is not a mapping")
    turn = {key: value for key, value in turn.items() if value is not None}
    # ShareGPT says `from` and `value` instead.
    speaker = turn.pop("role", None) or turn.pop("from", None)
    content = turn.pop("content", turn.pop("value", None))
    if speaker == "function_call":
        # ShareGPT writes the call as the content. It takes the place of everything else.
        turn = {"tool_calls": [_parsed(content, "a function_call is")]}
        content = ""
    if speaker is None or (content is None and "tool_calls" not in turn):
        raise UnusableRow("a turn lacks its role or content")
    role = ROLES.get(speaker, speaker) if isinstance(speaker, str) else speaker
    if role not in TEMPLATE_ROLES:
        raise UnusableRow(f"a turn has the role {str(speaker)[:40]!r}")
    turn = {"role": role, "content": _turn_text(content)} | turn
    if "tool_calls" in turn:
        if not isinstance(turn["tool_calls"], list):
            raise UnusableRow("a turn's tool_calls are not a list")
        turn["tool_calls"] = [_tool_call(call) for call in turn["tool_calls"]]
    return turn


def _turn_text(content: str | list | None) -> str:
    """The text of a turn. OpenAI's content in parts is joined, provided that all parts are text."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UnusableRow("a turn holds more than text")
    texts = []
    for part in content:
        is_text = isinstance(part, dict) and part.get("type") == "text"
        if not (is_text and isinstance(part.get("text"), str)):
            raise UnusableRow("a turn holds more than text")
        texts.append(part["text"])
    return "".join(texts)


def _tool_call(call: dict) -> dict:
    """A tool call with its arguments as an object."""
    function = call.get("function", call) if isinstance(call, dict) else call
    if not (isinstance(function, dict) and function.get("name")):
        raise UnusableRow("a tool call names no function")
    # OpenAI writes arguments as JSON text, and templates want the object.
    arguments = _parsed(function.get("arguments") or {}, "a tool call's arguments are")
    function = function | {"arguments": arguments}
    if "function" in call:
        return call | {"function": function}
    return function


def row_tools(row: dict) -> list[dict] | None:
    """The `tools` of a row, a list or its JSON text; `None` where there are none.

    Raises:
        UnusableRow: the text is not JSON.
    """
    tools = without_nulls(row.get("tools"))
    if isinstance(tools, str) and not tools.strip():
        return None
    # Templates ask whether tools are given, and to some an empty list is given.
    return _parsed(tools, "its tools are") or None


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a plain text that goes on: with the one begin token that the tokenizer puts before
    texts, and without the end token that some put behind them (OpenRLHF#1069)."""
    ids = tokenizer(text)["input_ids"]
    own = tokenizer(text, add_special_tokens=False)["input_ids"]
    size = len(own)
    added = 0
    while added < len(ids) - size and ids[added : added + size] != own:
        added += 1
    begin = ids[:added]
    # The text may have been written with its begin token.
    if own[:added] == begin:
        return own
    return begin + own
