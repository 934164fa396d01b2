"""A raw row of any recognised format -> the turns of a chat, its tools, or its text; and how the
target's chat template writes them."""

import json
import re
import warnings
from copy import copy
from functools import lru_cache

from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

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

# Columns in which conversations keep what their turns only point to.
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
TEXT_ALONE = "drafting is for text alone"

# Servers and templates differ in the name of a turn's thought.
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
# A thought that a template begins for the target at a prompt's end, and where thinking is off ends.
BEGUN_THOUGHT = re.compile(r"<think>(?P<over>\s*</think>)?\s*$")
# Arguments of chat templates that turn thinking off. Some templates then only leave out a line.
THINKING_KEYS = ("enable_thinking", "thinking")
WHOLE_THOUGHT = re.compile(r"<think>.*?</think>\s*", re.DOTALL)


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
        UnusableRow: there is no turn, one is not text alone, or one has a role that templates would
            pass over.
    """
    for column in MEDIA:
        if row.get(column):
            raise UnusableRow(f"its column {column!r} is filled: {TEXT_ALONE}")
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
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in (None, "text"):
            raise UnusableRow(f"a turn holds more than text ({str(kind)[:40]!r}): {TEXT_ALONE}")
        if kind is None or not isinstance(part.get("text"), str):
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


def split_thought(turn: dict) -> tuple[str, dict]:
    """The thought of a turn, under a key of its own or before `</think>`, and the turn without
    it."""
    turn = dict(turn)
    thought = ""
    for key in THOUGHT_KEYS:
        thought = turn.pop(key, "") or thought
    before, end, content = turn["content"].rpartition("</think>")
    if end:
        thought = before.split("<think>")[-1]
        turn["content"] = content.lstrip("\n")
    return thought.strip("\n"), turn


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


def warn_of_unseen_tools(tokenizer: PreTrainedTokenizerBase) -> None:
    """Warn where the chat template for rows with tools never mentions any."""
    if "tools" not in tokenizer.get_chat_template(tools=[]):
        warnings.warn(
            "rows have tools, and the target's chat template never mentions any tools: it answers"
            " and does not see the tools",
            stacklevel=2,
        )


# Words that no template writes of itself.
PROBE = [{"role": "user", "content": "Abracadabra"}, {"role": "assistant", "content": "Hocuspocus"}]


@lru_cache(maxsize=8)
def wants_parts(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Whether a chat template reads the content of a turn in parts alone. SmolVLM's, for instance,
    writes nothing of a content that is a plain string."""

    def shows(turns: list[dict]) -> bool:
        try:
            text = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)
        except Exception:  # a template raises what its author likes
            return False
        return all(turn["content"] in text for turn in PROBE)

    return not shows(PROBE) and shows(in_parts(PROBE))


def in_parts(turns: list[dict]) -> list[dict]:
    """Turns whose content is a list of one part, of type `text`."""
    return [turn | {"content": [{"type": "text", "text": turn["content"] or ""}]} for turn in turns]


def apply_template(
    tokenizer: PreTrainedTokenizerBase,
    turns: list[dict],
    tools: list[dict] | None = None,
    template: str | None = None,
    **kwargs,
):
    """`apply_chat_template`, with the contents of turns in the form that the template reads. All
    of this package renders by it: by `template`, or else by the one that serving takes."""
    template = template or tokenizer.get_chat_template(tools=tools)
    if wants_parts(tokenizer, template):
        turns = in_parts(turns)
    return tokenizer.apply_chat_template(turns, tools=tools, chat_template=template, **kwargs)


class ChatTemplate:
    """How a target's chat template writes conversations: in serving, and with trl's marks around
    what the assistant wrote.

    Args:
        kwargs (`dict`): of the chat template.
        with_tools (`bool`): whether the conversations have tools. A tokenizer may have a template
            of its own for these, and serving takes that one.

    Attributes:
        serving (`str`): the template that serving takes.
        marked (`str`, *optional*): the same with generation markers, where there are any.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, kwargs: dict, with_tools: bool):
        self.tokenizer = tokenizer
        self.kwargs = kwargs
        self.serving = tokenizer.get_chat_template(tools=[] if with_tools else None)
        # trl looks at the default template alone.
        single = copy(tokenizer)
        single.chat_template = self.serving
        try:
            known = get_training_chat_template(single)
        except ValueError:  # trl does not know it; the author may have put markers in
            known = None
        template = known or self.serving
        # Without markers transformers returns a mask of zeros and says nothing (marin#7237).
        self.marked = template if has_generation_markers(template) else None

    def render(
        self,
        turns: list[dict],
        tools: list[dict] | None,
        with_prompt: bool = False,
        template: str | None = None,
    ) -> str:
        """A conversation as serving writes it, or as another template does, with the generation
        prompt at its end or without."""
        return apply_template(
            self.tokenizer,
            turns,
            tools,
            template or self.serving,
            tokenize=False,
            add_generation_prompt=with_prompt,
            **self.kwargs,
        )

    def prompt(self, turns: list[dict], tools: list[dict] | None) -> str | None:
        """What serving gives to the target before the answer to these turns; `None` where serving
        never asks for one."""
        if not turns:  # templates refuse to render no turn at all
            return None
        try:
            return self.render(turns, tools, with_prompt=True)
        except Exception:
            # Many templates want a question.
            if not any(turn["role"] == "user" for turn in turns):
                return None
            raise

    def thinking_is_off(self, prompt: str) -> bool:
        """Whether the target writes no thought after this prompt."""
        begun = BEGUN_THOUGHT.search(prompt)
        if begun and begun["over"]:
            return True
        return any(self.kwargs.get(key) is False for key in THINKING_KEYS)

    def answer(self, turns: list[dict], tools: list[dict] | None, prompt: str) -> str:
        """The last turn as the target would have written it after a prompt.

        Raises:
            UnusableRow: the template writes that turn otherwise than its own prompt begins.
        """
        text = self.render(turns, tools)
        if text.startswith(prompt):
            return text[len(prompt) :]
        # Templates drop the thoughts of turns that are there already, and write an empty thought
        # into prompts alone.
        begun = BEGUN_THOUGHT.search(prompt)
        if begun is None or not text.startswith(prompt[: begun.start()]):
            raise UnusableRow(
                "the chat template begins an answer otherwise than its generation prompt, so the"
                " assistant's tokens cannot be told apart: set chat_template_kwargs to the mode of"
                " the answers (thinking on or off), or mend the template"
            )
        said = text[begun.start() :]
        written = WHOLE_THOUGHT.match(said)
        if written:
            said = said[written.end() :]
        if begun["over"]:
            return said
        thought, _ = split_thought(turns[-1])
        return f"{thought}\n</think>\n\n" + said.lstrip("\n")
