"""A conversation on its way to the target's own answers: which question is next, what was answered,
and the rows that come of it."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Protocol

from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .messages import (
    UnusableRow,
    apply_template,
    chat_messages,
    row_format,
    row_text,
    row_tools,
    text_ids,
    warn_of_unseen_tools,
)


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled, by the target here or by a server of it.

    Attributes:
        max_new_tokens (`int`): most tokens of an answer.
        temperature (`float`): 0 is greedy.
        top_p (`float`): nucleus sampling; 1 is off.
        top_k (`int`): sample among the k best tokens; 0 is off.
    """

    max_new_tokens: int
    temperature: float
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True)
class Answer:
    """What was answered to the last question of a conversation, or why there is no answer.

    Attributes:
        turn (`dict`, *optional*): the assistant's turn.
        truncated (`bool`): whether it was cut, at `max_new_tokens` for instance.
        prompt_ids, ids (`list[int]`, *optional*): the tokens of the prompt and of the answer. A
            server does not tell them.
        skipped (`str`, *optional*): why there is no answer.
    """

    turn: dict | None = None
    truncated: bool = False
    prompt_ids: list[int] | None = None
    ids: list[int] | None = None
    skipped: str | None = None


class Conversation:
    """One row on its way: the turns so far, the turns to come, and what the target answered.

    Attributes:
        history (`list[dict]`): the turns so far. The last one is the question to answer.
        tools (`list[dict]`, *optional*): what the target may call.
        text (`str`, *optional*): of a row of plain text. The target goes on with it.
        skipped (`str`, *optional*): why the row cannot be answered.
    """

    def __init__(self, source_row: int, row: dict):
        self.source_row = source_row
        self.history: list[dict] = []
        self.tools: list[dict] | None = None
        self.text: str | None = None
        self.skipped: str | None = None
        self.coming: list[dict] = []
        self.answers: list[Answer] = []
        try:
            self._read(row)
        except UnusableRow as error:
            self.skipped = str(error)

    def _read(self, row: dict) -> None:
        """Take the text, or the turns and tools, of a raw row.

        Raises:
            UnusableRow: there are none.
        """
        row = {key: value for key, value in row.items() if value is not None}
        # Tokens that another target wrote say nothing to this one. The messages beside them do.
        tokens = row.pop("input_ids", None)
        try:
            kind = row_format(list(row))
        except ValueError:
            reason = "it has tokens and no text" if tokens else "its columns are empty"
            raise UnusableRow(reason) from None
        if kind == "text":
            self.text = row_text(row, "text")
        else:
            self.coming = chat_messages(row)
            self.tools = row_tools(row)

    def next_question(self) -> bool:
        """Go on to the next question, so that it stands last in `history`.

        The answers in the row are passed over. A conversation ends at its first tool turn, because
        the tool answered another model.

        Returns:
            whether there is one.
        """
        if self.skipped is not None:
            return False
        if self.text is not None:
            return not self.answers
        while self.coming:
            turn = self.coming.pop(0)
            called_tool = bool(self.history) and "tool_calls" in self.history[-1]
            if turn["role"] == "tool" or called_tool:
                self.coming = []
                return False
            if turn["role"] == "assistant":
                continue
            self.history.append(turn)
            # Several turns in a row are one question. It ends where an answer follows.
            is_last = not self.coming or self.coming[0]["role"] == "assistant"
            if turn["role"] == "user" and is_last:
                return True
        return False

    def take(self, answer: Answer) -> None:
        """Keep an answer to the last question. Without an answer the conversation ends there."""
        if answer.skipped is not None:
            self.coming = []
            if not self.answers:  # earlier answers are worth keeping
                self.skipped = answer.skipped
            return
        self.answers.append(answer)
        if self.text is not None:
            return
        self.history.append(answer.turn)
        # An answer that was cut in its thoughts is empty. The next question would follow nothing.
        if not (answer.turn["content"] or answer.turn.get("tool_calls")):
            self.coming = []

    def finished(self) -> list[dict]:
        """The rows as they are written: `input_ids` with `supervised` exactly as the target wrote
        them, `messages` in the last.

        A template may write earlier turns differently, for instance without their thoughts. One row
        then cannot hold all answers as they were written, and there are several of one
        `source_row`.
        """
        if not self.answers:
            return [{"source_row": self.source_row, "skipped": self.skipped or "it asks nothing"}]
        rows = self._token_rows()
        if not rows:  # a server wrote the answers
            rows = [{"source_row": self.source_row, "truncated": self.answers[-1].truncated}]
        if self.text is None:
            rows[-1]["messages"] = self._answered_turns()
            if self.tools:
                rows[-1]["tools"] = self.tools
        return rows

    def _answered_turns(self) -> list[dict]:
        """The turns up to the last answer. Those that were cut say so, because training must not
        learn the end that a template puts behind each of them."""
        turns = []
        answers = iter(self.answers)
        for turn in self.history:
            if turn["role"] == "assistant" and next(answers).truncated:
                turn = turn | {"truncated": True}
            turns.append(turn)
        if turns[-1]["role"] != "assistant":  # a question that found no answer
            turns.pop()
        return turns

    def _token_rows(self) -> list[dict]:
        """The answers whose tokens are known, as few rows as hold them unchanged."""
        rows: list[dict] = []
        for answer in self.answers:
            if answer.ids is None:
                continue
            supervised: list[int] = []
            # Where the prompt begins with the row before, that row goes on.
            if rows and answer.prompt_ids[: len(rows[-1]["input_ids"])] == rows[-1]["input_ids"]:
                supervised = rows.pop()["supervised"]
            supervised = supervised + [0] * (len(answer.prompt_ids) - len(supervised))
            row = {
                "source_row": self.source_row,
                "truncated": answer.truncated,
                "input_ids": answer.prompt_ids + answer.ids,
                "supervised": supervised + [1] * len(answer.ids),
            }
            rows.append(row)
        return rows


def prompt_ids(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    kwargs: dict | None,
    text_tokens: int,
) -> list[int] | str:
    """The prompt of a conversation's next answer, or why there is none. Of plain text it is the
    first `text_tokens`."""
    if conversation.text is not None:
        return text_ids(tokenizer, conversation.text)[:text_tokens] or "its text is empty"
    try:
        if conversation.tools is not None:
            warn_of_unseen_tools(tokenizer)
        encoded = apply_template(
            tokenizer,
            conversation.history,
            conversation.tools,
            add_generation_prompt=True,
            return_dict=True,
            **(kwargs or {}),
        )
    except Exception as error:  # templates are programs of their authors, and raise what they like
        return f"the chat template failed: {' '.join(str(error).split())}"
    return encoded["input_ids"]


def chat_end(tokenizer: PreTrainedTokenizerBase, kwargs: dict | None) -> int | None:
    """The token by which the chat template ends an answer: the first special one behind the words.
    `None` where there is none."""
    said = "Abracadabra"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": said}]
    try:
        text = apply_template(tokenizer, turns, tokenize=False, **(kwargs or {}))
    except Exception:  # no template, or one that does not like these turns
        return None
    _, found, behind = text.rpartition(said)
    if not found:
        return None
    special = tokenizer.added_tokens_decoder
    for token in tokenizer(behind, add_special_tokens=False)["input_ids"]:
        if token in special and special[token].special:
            return token
    return None


def end_left_out(
    config: GenerationConfig, tokenizer: PreTrainedTokenizerBase, kwargs: dict | None
) -> int | None:
    """The token by which the chat template ends an answer, where a target's generation config does
    not name it. That is said in one line.

    Args:
        kwargs (`dict`, *optional*): arguments of the chat template.
    """
    ends = end_tokens(config)
    end = chat_end(tokenizer, kwargs)
    if end is None or end in ends:
        return None
    # Of several processes, the first says it.
    if os.environ.get("RANK", "0") == "0":
        names = ", ".join(repr(token) for token in tokenizer.convert_ids_to_tokens(ends))
        print(
            f"the chat template ends an answer with {tokenizer.convert_ids_to_tokens(end)!r}, and"
            f" the target's generation_config.eos_token_id names {names or 'no token'}: answers"
            " stop at each of them"
        )
    return end


def unread_arguments(tokenizer: PreTrainedTokenizerBase, kwargs: dict | None) -> list[str]:
    """The arguments that no chat template of a tokenizer reads: a name with a slip would be ignored
    without a word."""
    templates = tokenizer.chat_template or {}
    if isinstance(templates, str):
        templates = {"default": templates}
    text = " ".join(templates.values())
    if not text:
        return []
    return [name for name in kwargs or {} if not re.search(rf"\b{re.escape(name)}\b", text)]


def check_template_arguments(tokenizer: PreTrainedTokenizerBase, kwargs: dict | None) -> None:
    """Name the arguments of the chat template that it never reads."""
    unread = unread_arguments(tokenizer, kwargs)
    if unread and os.environ.get("RANK", "0") == "0":
        _say_once(
            f"the chat template never reads {', '.join(unread)} of chat_template_kwargs, so that"
            " changes nothing: check how it is spelt, or remove it"
        )


@lru_cache
def _say_once(words: str) -> None:
    """Print what several parts of a run would say."""
    print(words)


def end_tokens(config: GenerationConfig) -> list[int]:
    """The end tokens of a generation config."""
    own = config.eos_token_id
    if own is None:
        return []
    return own if isinstance(own, list) else [own]


def stop_at_both_ends(
    target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kwargs: dict | None
) -> list[int] | None:
    """Let a target stop where the chat template ends an answer, and where its own generation config
    says. Where these differ, it would else run on into turns of its own invention, and they would
    be trained on and measured (Qwen3#927).

    Args:
        kwargs (`dict`, *optional*): arguments of the chat template.

    Returns:
        all ends, where they differ.
    """
    check_template_arguments(tokenizer, kwargs)
    end = end_left_out(target.generation_config, tokenizer, kwargs)
    if end is None:
        return None
    ends = [*end_tokens(target.generation_config), end]
    target.generation_config.eos_token_id = ends
    return ends


def end_for_a_server(
    name: str, revision: str | None, trust_remote_code: bool, kwargs: dict | None
) -> tuple[int, str] | None:
    """The chat's end token that a server of a target must be told, as id and text; `None` where the
    target's generation config, which the server reads too, names it.

    Args:
        name (`str`): what the target goes by at the server. Its files are read where that is a
            folder or a Hub id, and else it is said that nothing was compared.
    """
    where = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **where)
        try:
            config = GenerationConfig.from_pretrained(name, revision=revision)
        except OSError:  # transformers and vLLM then take what the model's config says
            config = GenerationConfig.from_model_config(AutoConfig.from_pretrained(name, **where))
    except Exception:  # the server knows the name, and nobody else has to
        print(
            f"--target {name!r} is no folder or Hub id that can be read here: the end of its chat"
            " was not compared with the tokens that the server stops at. If answers go on into"
            " questions, give the server the target's Hub id as a name (vLLM:"
            " --served-model-name), and that as --target"
        )
        return None
    check_template_arguments(tokenizer, kwargs)
    end = end_left_out(config, tokenizer, kwargs)
    if end is None:
        return None
    return end, tokenizer.convert_ids_to_tokens(end)


def unwatched(done: int, of: int) -> None:
    """What is told how many answers are there, where nobody looks."""


class Writer(Protocol):
    """Writes an answer to the last question of each conversation, with a seed.

    Attributes:
        answered (`Callable[[int, int], None]`): told how many answers are there, and of how many,
            while a call lasts.
    """

    answered: Callable[[int, int], None]

    def __call__(self, conversations: list[Conversation], seed: int) -> list[Answer]: ...


def answer_rows(rows: list[dict], first: int, write: Writer, seed: int) -> list[dict]:
    """Let the target answer every question of some rows, turn by turn -> finished rows, in order.

    Args:
        first (`int`): the number of the first row in its dataset.
    """
    conversations = [Conversation(first + i, row) for i, row in enumerate(rows)]
    # All first questions are answered together, then all second ones, and so on.
    for turn in count():
        waiting = [conversation for conversation in conversations if conversation.next_question()]
        if not waiting:
            break
        for conversation, answer in zip(waiting, write(waiting, seed + turn)):
            conversation.take(answer)
    finished = []
    for conversation in conversations:
        finished += conversation.finished()
    return finished
