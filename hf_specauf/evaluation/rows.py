"""What is noted of one prompt."""

import torch

from ..drafters.draft_length import Round
from .ways import Decoded


def prompt_row(
    prompt: torch.Tensor,
    plain: Decoded,
    assisted: Decoded,
    rounds: list[Round],
    difference: dict | None,
) -> dict:
    """What is noted of one prompt (1, S), decoded plainly and with the drafter."""
    length = prompt.shape[1]
    tau = None
    if rounds:
        tau = sum(r.emitted for r in rounds) / len(rounds)
    return {
        "prompt_tokens": length,
        "new_tokens": assisted.output.shape[1] - length,
        "plain_new_tokens": plain.output.shape[1] - length,
        "tau": tau,
        "plain_seconds": plain.seconds,
        "assisted_seconds": assisted.seconds,
        "difference": difference,
        "repetition": repetition(plain.output[0, length:].tolist()),
    }


def repetition(tokens: list[int], n: int = 4) -> float | None:
    """Share of n-grams that occurred before in the same output; high tau on a loop is no
    achievement (SwiftLM#88). `None` of an output that is too short to have one."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    if not grams:
        return None
    return 1 - len(set(grams)) / len(grams)


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
