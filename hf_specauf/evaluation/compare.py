"""Plain and assisted decoding of the same prompts, compared: token by token, by tau, and by the
clock."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack

import torch
from rich.progress import track

from ..identity import innermost, unwrapped
from .differences import first_difference
from .rows import prompt_row
from .summary import totals, ways_beside
from .ways import Decoded, attached_ways, config_of, decoding_config, timed


def compare(
    target,
    drafter,
    prompts: list[torch.Tensor],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    pad_token_id: int = 0,
    draft_length: int | str | None = None,
    lookup: int | str | bool = False,
    seed: int = 0,
    show_progress: bool = True,
) -> dict:
    """Decode every prompt plainly and with the drafter, in turn, and compare.

    With `lookup` in two more ways: by transformers' own prompt lookup (`prompt_lookup`), and by
    drafter and lookup together (`drafter_and_lookup`), with the draft length of each pass decided
    by what pays unless one is given. tau stays that of the drafter alone.

    Args:
        target, drafter: as for `attach`.
        prompts (`list[torch.LongTensor]` of shape `(1, S)`).
        max_new_tokens (`int`): tokens generated for each.
        temperature (`float`, *optional*, defaults to 0): 0 is greedy, and outputs must be equal;
            above 0 they are samples, and equality is not asked for.
        draft_length, lookup: as for `attach`, and by default whole blocks and no lookup.

    Returns:
        dict with `acceptance` (tau, alpha, ...), rates, `speedup`, `lossless` (counts of identical,
        near_tie and different outputs), `repetition` and a list of `prompts`.
    """
    target, model, greedy = unwrapped(target), innermost(target), temperature == 0
    config = decoding_config(model, max_new_tokens, pad_token_id, temperature)

    with ExitStack() as stack, torch.no_grad():
        calls, attachment, both = attached_ways(stack, target, drafter, draft_length, lookup)

        def decode(prompt: torch.Tensor, way: str) -> Decoded:
            return timed(target, prompt, calls[way], config_of(way, config), seed)

        for way in calls:
            decode(prompts[0], way)  # the first calls of a process are slow
        attachment.generations.clear()
        both.generations.clear()
        rows = {way: [] for way in calls if way != "plain"}
        shown = track(prompts, "decoding", disable=not show_progress, transient=True)
        for prompt, decoded in decoded_in_turn(shown, list(calls), decode):
            plain = decoded.pop("plain")
            for way, other in decoded.items():
                difference = first_difference(model, plain.output, other.output) if greedy else None
                # only the decoding with the drafter has rounds
                rounds = attachment.generations[-1] if way == "drafter" else []
                rows[way].append(prompt_row(prompt, plain, other, rounds, difference))
        acceptance = attachment.acceptance()
    results = {"acceptance": acceptance.to_dict()} | totals(rows.pop("drafter"), greedy)
    return results | ways_beside(rows, greedy, both.rounds)


def decoded_in_turn(
    prompts: Iterable[torch.Tensor], ways: list[str], decode: Callable
) -> Iterator[tuple[torch.Tensor, dict[str, Decoded]]]:
    """Each prompt, and what every way made of it. Each way goes first in turn, so that a machine
    that slows down favours none."""
    for turn, prompt in enumerate(prompts):
        first = turn % len(ways)
        yield prompt, {way: decode(prompt, way) for way in ways[first:] + ways[:first]}
