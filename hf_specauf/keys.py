"""What a command's keys and flags may be: numbers, names and words that cannot be right are told
before anything heavy is loaded."""

import json
import math
import re
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import fields
from os import PathLike
from typing import Any, NamedTuple

# No number that a run takes is larger, and torch and numpy hold no larger one everywhere.
LARGEST = 2**31 - 1


class Numbers(NamedTuple):
    """The numbers that a key may have. NaN and infinity are never among them.

    Attributes:
        least, most (`float`): they are among them, unless `inside` says that neither is.
        inside (`bool`): only what lies between them.
        whole (`bool`): only whole numbers.
        hint (`str`): what to write instead, where that is no number.
    """

    least: float
    most: float = LARGEST
    inside: bool = False
    whole: bool = False
    hint: str = ""

    def __contains__(self, value: Any) -> bool:
        # A bool is an int to Python, and was meant for another key.
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        # Only floats are not finite. A whole number may be too large to become one.
        if isinstance(value, float) and not math.isfinite(value):
            return False
        if self.whole and value != int(value):
            return False
        if self.inside:
            return self.least < value < self.most
        return self.least <= value <= self.most

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a finite number"
        bounds = f"of at least {self.least:g} and at most {self.most:.10g}"
        if self.inside:
            bounds = f"above {self.least:g} and below {self.most:.10g}"
        return f"{kind} {bounds}{self.hint}"


ONE_OR_MORE = Numbers(1, whole=True)
SEED = Numbers(0, 2**32 - 1, whole=True)  # numpy takes no other


def check_keys(
    arguments: Any,
    numbers: dict[str, Numbers] | None = None,
    choices: dict[str, Iterable[str]] | None = None,
) -> None:
    """Check what a command's keys or flags were given, before anything heavy is loaded.

    Args:
        arguments: a dataclass, or argparse's `Namespace`.
        numbers (`dict[str, Numbers]`, *optional*): the keys that take a number.
        choices (`dict[str, Iterable[str]]`, *optional*): those that take one of a few words. A key
            that a dataclass has not is passed over.

    Raises:
        ValueError: the key, its value, and what it may be.
    """
    check_numbers(arguments, numbers or {})
    check_words(arguments)
    if choices:
        check_choices(arguments, choices)


def check_numbers(arguments: Any, allowed: dict[str, Numbers]) -> None:
    """Check every key that takes a number, or a list of them; what is left out keeps its default.

    Raises:
        ValueError: the key, its value, and the numbers it may have.
    """
    for key, numbers in allowed.items():
        value = getattr(arguments, key, None)
        for number in value if isinstance(value, list) else [value]:
            # Trainer reads numbers from text too.
            if isinstance(number, str):
                try:
                    number = float(number)
                except ValueError:
                    pass
            if number is not None and number not in numbers:
                raise ValueError(f"{key} is {value!r}; it must be {numbers}")
        # YAML reads 8.0 so, and nothing can be counted up to it.
        if numbers.whole and isinstance(value, float):
            setattr(arguments, key, int(value))


def check_choices(arguments: Any, allowed: dict[str, Iterable[str]]) -> None:
    """Check every key that takes one of a few words; what a recipe leaves out keeps its default.

    Raises:
        ValueError: another word; names the allowed ones.
    """
    for key in fields(arguments):
        value = getattr(arguments, key.name)
        if key.name in allowed and value not in (key.default, *allowed[key.name]):
            words = ", ".join(allowed[key.name])
            raise ValueError(f"{key.name} is {value!r}; it must be one of {words}")


def check_words(arguments: Any) -> None:
    """Check every key that takes a name or another text.

    Raises:
        ValueError: it is empty, as where a shell's variable is not set, or it is no text: YAML
            reads the commit 1234567 as a number.
    """
    if isinstance(arguments, Namespace):
        given = {key: value for key, value in vars(arguments).items() if isinstance(value, str)}
    else:
        texts = [key for key in fields(arguments) if key.type in (str, str | None)]
        given = {key.name: getattr(arguments, key.name) for key in texts}
    for key, value in given.items():
        # From Python a path will do. Some of these take a mapping too, and one takes true for a
        # checkpoint's name.
        is_newest = key == "resume_from_checkpoint" and value in (True, False)
        if value is None or is_newest or isinstance(value, dict | PathLike):
            continue
        if not isinstance(value, str):
            raise ValueError(f"{key} is {value!r}, which is no text: put it between quotes")
        if not value.strip():
            raise ValueError(f"{key} is empty: give it a value, or leave it out")
        if key.endswith("revision"):
            check_revision_name(key, value)


# What git takes in no name of a branch, tag or commit.
NO_REVISION = re.compile(r"[\s\x00-\x1f\x7f~^:?*\[\\]|\.\.|@\{|//|/\.|\.lock(?:/|$)|^[-./]|[./]$")


def check_revision_name(key: str, revision: str) -> None:
    """Raise for what no branch, tag or commit can be called: the Hub would only say that it has
    none, after work that took long."""
    if NO_REVISION.search(revision):
        raise ValueError(
            f"{key} {revision!r} is no name that git takes: give a branch, a tag or a commit, like"
            " main, v1 or 3f2a9c1"
        )


# Arguments of `apply_chat_template` itself, and what it gives to each template.
RESERVED = (
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "max_length",
    "messages",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "sanitize_control_tokens",
    "template",
    "tokenize",
    "tokenizer",
    "tokenizer_kwargs",
    "tools",
    "truncation",
    "turns",
)


def template_arguments(value: str | dict | None) -> dict | None:
    """`chat_template_kwargs`, a mapping as YAML gives it, or its JSON text from the command line.

    Raises:
        ValueError: the text is no JSON object, or names what is no argument of a template's own.
    """
    found, reason = value, ""
    if isinstance(value, str):
        try:
            found = json.loads(value)
        except json.JSONDecodeError as error:
            reason = f" ({error})"
    if found is not None and not isinstance(found, dict):
        raise ValueError(
            f"chat_template_kwargs is {value!r}, which is no JSON object{reason}: write it like"
            ' {"enable_thinking": false}'
        )
    reserved = [key for key in found or {} if key in RESERVED]
    if reserved:
        raise ValueError(
            f"chat_template_kwargs names {', '.join(reserved)}, which this package gives to the"
            " chat template itself, row by row: remove what is named, and keep arguments of the"
            ' template\'s own, like {"enable_thinking": false}'
        )
    return found
