"""What is noted of one prompt: of each way tokens, seconds, passes, and where its output parts from
plain decoding's."""

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, replace

import torch

from ..drafters.draft_length import Round
from .ways import Decoded


def prompt_keys(prompts: Iterable[torch.Tensor]) -> list[str]:
    """A short hash of each prompt (1, S), by which its rows are found again; no words of it. A
    prompt that occurs twice has two keys."""
    seen, keys = Counter(), []
    for prompt in prompts:
        digest = hashlib.sha256(str(prompt[0].tolist()).encode()).hexdigest()[:16]
        seen[digest] += 1
        keys.append(digest if seen[digest] == 1 else f"{digest}-{seen[digest]}")
    return keys


def repetition(tokens: list[int], n: int = 4) -> float | None:
    """Share of n-grams that occurred before in the same output; high tau on a loop is no
    achievement (SwiftLM#88). `None` of an output that is too short to have one."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    if not grams:
        return None
    return 1 - len(set(grams)) / len(grams)


# ---- passes as text


def passes_as_text(rounds: Iterable[Round]) -> str:
    """Verification passes in one line of JSON: of each `emitted/accepted/tested/drafted`, with an L
    behind it where the draft was looked up."""
    words = []
    for r in rounds:
        words.append(f"{r.emitted}/{r.accepted}/{r.tested}/{r.drafted}{'L' if r.looked_up else ''}")
    return " ".join(words)


def passes_from_text(text: str) -> list[Round]:
    """What [`passes_as_text`] wrote."""
    rounds = []
    for word in text.split():
        numbers = [int(number) for number in word.removesuffix("L").split("/")]
        rounds.append(Round(*numbers, looked_up=word.endswith("L")))
    return rounds


def tau_of(rounds: list[Round]) -> float | None:
    """Tokens a pass; `None` without one."""
    return sum(r.emitted for r in rounds) / len(rounds) if rounds else None


def tokens_and_passes(row: dict) -> tuple[int, int]:
    """Tokens that the drafter's passes of a prompt committed, and how many passes there were. Rows
    of older versions hold no passes. There they follow from tau, of which they are the ratio."""
    if "ways" in row:
        rounds = passes_from_text(row["ways"]["drafter"]["passes"])
        return sum(r.emitted for r in rounds), len(rounds)
    if row["tau"] is None:
        return 0, 0
    # the first token comes from the prefill
    tokens = row["new_tokens"] - 1
    return tokens, round(tokens / row["tau"])


# ---- rows


def measured_row(
    key: str,
    prompt: torch.Tensor,
    decoded: dict[str, Decoded],
    differences: dict[str, dict | None],
    replayed: list[Round] | None = None,
) -> dict:
    """What is noted of one prompt (1, S).

    Args:
        key (`str`): from [`prompt_keys`].
        decoded (`dict[str, Decoded]`): by way.
        differences (`dict`): from plain decoding, by way.
        replayed (`list[Round]`, *optional*): the passes that plain decoding's output, read instead
            of written, says that the drafter would have made.
    """
    length, ways = prompt.shape[1], {}
    for way, one in decoded.items():
        new = one.output[0, length:].tolist()
        ways[way] = {
            "new_tokens": len(new),
            "seconds": one.seconds,
            "time": None if one.time is None else asdict(one.time),
            "passes": passes_as_text(one.rounds),
            "repetition": repetition(new),
            "difference": differences.get(way),
        }
    row = {"prompt": key, "prompt_tokens": length, "ways": ways}
    if replayed is not None:
        row["teacher_forced"] = passes_as_text(replayed)
    return row


def beside_plain(row: dict, way: str) -> dict:
    """A way of a measured row beside plain decoding: what the prompts of `eval.json` have held from
    the first version on."""
    plain, other = row["ways"]["plain"], row["ways"][way]
    own = [r for r in passes_from_text(other["passes"]) if not r.looked_up]
    return {
        "prompt_tokens": row["prompt_tokens"],
        "new_tokens": other["new_tokens"],
        "plain_new_tokens": plain["new_tokens"],
        "tau": tau_of(own),
        "plain_seconds": plain["seconds"],
        "assisted_seconds": other["seconds"],
        "difference": other["difference"],
        "repetition": plain["repetition"],
    }


def prompt_row(
    prompt: torch.Tensor,
    plain: Decoded,
    assisted: Decoded,
    rounds: list[Round],
    difference: dict | None,
) -> dict:
    """What is noted of one prompt (1, S), decoded plainly and in one other way."""
    both = {"plain": plain, "other": replace(assisted, rounds=rounds)}
    return beside_plain(measured_row("", prompt, both, {"other": difference}), "other")


def accepted_by_source(rounds: list[Round]) -> dict[str, dict[str, int]]:
    """Rounds, drafted and accepted tokens, by where the drafts came from."""
    found = {}
    for source, looked_up in (("drafter", False), ("lookup", True)):
        of_source = [r for r in rounds if r.drafted > 0 and r.looked_up == looked_up]
        found[source] = {
            "rounds": len(of_source),
            "drafted": sum(r.drafted for r in of_source),
            "accepted": sum(r.accepted for r in of_source),
        }
    return found
