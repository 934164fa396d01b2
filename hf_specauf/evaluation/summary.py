"""What all prompts say together."""

from ..drafters.draft_length import Round
from .differences import count_verdicts
from .rows import accepted_by_source


def totals(rows: list[dict], greedy: bool) -> dict:
    """What `compare` returns of all prompts together, and the rows of each."""
    # Rates are tokens over seconds of all prompts, not means of each prompt's rate.
    plain_tokens = sum(row["plain_new_tokens"] for row in rows)
    plain_rate = plain_tokens / sum(row["plain_seconds"] for row in rows)
    new_tokens = sum(row["new_tokens"] for row in rows)
    assisted_rate = new_tokens / sum(row["assisted_seconds"] for row in rows)
    lossless = "sampled: not comparable token by token"
    if greedy:
        lossless = count_verdicts(rows)
    # An output that is too short to repeat itself says nothing, and would hide those that do.
    repeated = [row["repetition"] for row in rows if row["repetition"] is not None]
    return {
        "plain_tokens_per_second": plain_rate,
        "tokens_per_second": assisted_rate,
        "speedup": assisted_rate / plain_rate,
        "lossless": lossless,
        "repetition": sum(repeated) / len(repeated) if repeated else None,
        "prompts": rows,
    }


def ways_beside(rows: dict[str, list[dict]], greedy: bool, rounds: list[Round]) -> dict[str, dict]:
    """What `compare` returns of the ways beside the drafter, by name. `rounds`: of drafter and
    lookup together."""
    found = {}
    for way, of_way in rows.items():
        whole = totals(of_way, greedy)
        found[way] = {key: whole[key] for key in ("tokens_per_second", "speedup", "lossless")}
    if "drafter_and_lookup" in found:
        found["drafter_and_lookup"]["accepted"] = accepted_by_source(rounds)
    return found
