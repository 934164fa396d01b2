"""What the rows of all prompts say together: the figures of `eval.json`."""

from ..drafters.draft_length import Round
from ..serving.acceptance import summarize
from .differences import count_verdicts, largest_gaps
from .intervals import Figure, figure, ratio, ratio_of_ratios
from .rows import accepted_by_source, beside_plain, passes_from_text, tau_of, tokens_and_passes
from .ways import Way

SAMPLED = "sampled: not comparable token by token"
FIRST_BIN = 16  # tokens; each bin after it is twice as long


def totals(rows: list[dict], greedy: bool) -> dict:
    """A way beside plain decoding, of all prompts together, and the rows of each.

    Args:
        rows (`list[dict]`): from `rows.prompt_row` or `rows.beside_plain`.
        greedy (`bool`): outputs must be equal.
    """
    # Rates are tokens over seconds of all prompts, not means of each prompt's rate.
    plain_tokens = sum(row["plain_new_tokens"] for row in rows)
    plain_rate = plain_tokens / sum(row["plain_seconds"] for row in rows)
    new_tokens = sum(row["new_tokens"] for row in rows)
    assisted_rate = new_tokens / sum(row["assisted_seconds"] for row in rows)
    # An output that is too short to repeat itself says nothing, and would hide those that do.
    repeated = [row["repetition"] for row in rows if row["repetition"] is not None]
    return {
        "plain_tokens_per_second": plain_rate,
        "tokens_per_second": assisted_rate,
        "speedup": assisted_rate / plain_rate,
        "lossless": count_verdicts(rows) if greedy else SAMPLED,
        "repetition": sum(repeated) / len(repeated) if repeated else None,
        "prompts": rows,
    }


def results(measured: list[dict], ways: dict[str, Way], block_size: int, greedy: bool) -> dict:
    """What `compare` returns.

    Args:
        measured (`list[dict]`): rows from `rows.measured_row`.
        ways (`dict[str, Way]`): the ways they were measured in.
        block_size (`int`): K of the drafter.
        greedy (`bool`): outputs must be equal.
    """
    rows = [beside_plain(row, "drafter") | row for row in measured]
    found = {"acceptance": summarize(own_passes(rows), block_size).to_dict()}
    found |= totals(rows, greedy)
    found["tau"] = taus(rows)
    read = [row["read_at_once"] for row in rows if "read_at_once" in row]
    if read:
        found["read_at_once"] = reading(read)
    found["ways"] = {name: of_way(rows, name, way, greedy) for name, way in ways.items()}
    # at the end, because they are long
    found["prompts"] = found.pop("prompts")
    return found


def passes_of(rows: list[dict], way: str) -> list[Round]:
    """The passes of all prompts in a way."""
    return [r for row in rows for r in passes_from_text(row["ways"][way]["passes"])]


def own_passes(rows: list[dict]) -> list[Round]:
    """The passes of the drafter alone."""
    return [r for r in passes_of(rows, "drafter") if not r.looked_up]


def reading(read: list[dict]) -> dict:
    """What `differences.read_at_once` found, of all prompts together."""
    return {
        "outputs": len(read),
        "outputs_otherwise": sum(one["otherwise"] > 0 for one in read),
        "tokens": sum(one["tokens"] for one in read),
        "tokens_otherwise": sum(one["otherwise"] for one in read),
        "below_best": max(one["below_best"] for one in read),
    }


# ---- tau


def taus(rows: list[dict]) -> dict:
    """tau of the drafter: over all passes, as a mean over prompts, by where a pass begins, and as
    the same text gives it where it is read and not written."""
    counts = [tokens_and_passes(row) for row in rows]
    by_prompt = [[row["tau"], 1.0] for row in rows if row["tau"] is not None]
    found = {
        "by_passes": figure(counts, ratio).to_dict(),
        "by_prompts": figure(by_prompt, ratio).to_dict(),
        "by_context": tau_by_place(rows, from_prompt=True),
        "by_position": tau_by_place(rows, from_prompt=False),
    }
    replayed = [row["teacher_forced"] for row in rows if "teacher_forced" in row]
    if replayed:
        passes = [r for text in replayed for r in passes_from_text(text)]
        found["teacher_forced"] = {"tau": tau_of(passes), "passes": len(passes)}
    return found


def tau_by_place(rows: list[dict], from_prompt: bool) -> list[dict]:
    """tau of the passes that begin in each stretch of a text.

    Args:
        from_prompt (`bool`): count the place from the prompt's begin, which gives the tokens that
            the target has read; else from the answer's.

    Returns:
        of each stretch `upto`, its last place, with `tau`, `passes` and `prompts`.
    """
    bins: dict[int, list[tuple[Round, int]]] = {}
    for number, row in enumerate(rows):
        # The first token comes from the prefill. The first pass begins behind it.
        place = 1 + (row["prompt_tokens"] if from_prompt else 0)
        for r in passes_from_text(row["ways"]["drafter"]["passes"]):
            bins.setdefault(end_of_bin(place), []).append((r, number))
            place += r.emitted
    found = []
    for end, passes in sorted(bins.items()):
        tau = tau_of([r for r, _ in passes])
        prompts = len({number for _, number in passes})
        found.append({"upto": end, "tau": tau, "passes": len(passes), "prompts": prompts})
    return found


def end_of_bin(place: int) -> int:
    """The last place of the stretch that a place (1, 2, ...) lies in: 16, 32, 64, ..."""
    return max(FIRST_BIN, 1 << (place - 1).bit_length())


# ---- ways


def of_way(rows: list[dict], name: str, way: Way, greedy: bool) -> dict:
    """What is said of one way."""
    beside = [beside_plain(row, name) for row in rows]
    whole = totals(beside, greedy)
    ratio_to_plain = speedup(beside)
    passes = passes_of(rows, name)
    found = {
        "says": way.says,
        "tokens_per_second": whole["tokens_per_second"],
        "speedup": whole["speedup"],
        "speedup_interval": ratio_to_plain.interval,
        "speedup_of_another_set": ratio_to_plain.another_set,
        "lossless": whole["lossless"],
        "largest_gaps": largest_gaps(beside) if greedy else None,
        # a way of transformers alone tells of no passes
        "tokens_per_pass": tau_of(passes),
        "time_of_a_pass": time_of_a_pass([row["ways"][name] for row in rows]),
    }
    if way.ours:
        found["accepted"] = accepted_by_source(passes)
    return found


def speedup(beside: list[dict]) -> Figure:
    """How much faster a way is than plain decoding, from its rows; paired, because both decode each
    prompt in the same minute."""
    keys = ("new_tokens", "assisted_seconds", "plain_new_tokens", "plain_seconds")
    return figure([[row[key] for key in keys] for row in beside], ratio_of_ratios)


def time_of_a_pass(rows: list[dict]) -> dict | None:
    """Mean seconds of a pass after the prefill, by who took them; `None` where that was not
    timed."""
    times = [row["time"] for row in rows]
    passes = sum(time["passes"] for time in times if time is not None)
    if None in times or not passes:
        return None
    whole = sum(row["seconds"] - row["time"]["prefill"] for row in rows) / passes
    found = {who: sum(time[who] for time in times) / passes for who in ("target", "drafter")}
    return found | {"rest": whole - sum(found.values()), "passes": passes}
