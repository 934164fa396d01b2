"""Every prompt decoded in every way, one after the other, and compared."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel

from ..drafters.draft_length import Round
from ..identity import innermost
from ..serving.acceptance import number
from ..serving.decoding import AUTO
from ..serving.replay import replay
from ..target import FrozenTarget
from .differences import first_difference, is_low_precision, read_at_once
from .kept import Rows
from .rows import measured_row, prompt_keys, tau_of
from .summary import own_passes, results
from .ways import GIVEN, Decoded, Way, decoding_config, opened, usual_ways


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
    ways: dict[str, Way] | None = None,
    models: dict | None = None,
    teacher_forced: bool = False,
    rows: Rows | None = None,
    seed: int = 0,
    show_progress: bool = True,
) -> dict:
    """Decode every prompt plainly and with the drafter, and in other ways, in turn; compare.

    Args:
        target, drafter: as for `attach`.
        prompts (`list[torch.LongTensor]` of shape `(1, S)`).
        max_new_tokens (`int`): tokens generated for each.
        temperature (`float`, *optional*): 0 is greedy, and outputs must be equal.
        draft_length, lookup: as for `attach`, and by default whole blocks and no lookup. With
            `lookup` the ways are `DEFAULT_WAYS`, else plain decoding and the drafter.
        ways, models (`dict`, *optional*): from `choose_ways`, instead; the other models they name.
        teacher_forced (`bool`, *optional*): also find the passes on plain decoding's output, read
            instead of written; greedy, and with whole blocks or a number for draft length.
        rows (`Rows`, *optional*): where rows are kept, some of them measured already.

    Returns:
        the figures of `eval.json`: see `summary.results`.
    """
    if ways is None:
        ways = usual_ways(draft_length, lookup)
    rows = Rows() if rows is None else rows
    model, greedy = innermost(target), temperature == 0
    config = decoding_config(model, max_new_tokens, pad_token_id, temperature)
    keys = prompt_keys(prompts)
    mine = rows.mine(keys)
    with opened(ways, target, (models or {}) | {GIVEN: drafter}) as decoders, torch.no_grad():
        teacher, length = None, ways["drafter"].draft_length
        if teacher_forced and greedy and length != AUTO:
            teacher = Teacher(model, drafter, max_new_tokens, length)

        def decode(place: int, way: str) -> Decoded:
            return decoders[way](prompts[place], config, seed)

        # the first calls of a process are slow
        for way in ways if mine else ():
            decode(mine[0], way)
        shown = with_tau(mine, rows, show_progress)
        for place, decoded in decoded_in_turn(shown, list(ways), decode):
            rows.add(row_of(keys[place], prompts[place], decoded, model, greedy, teacher))
    return results(rows.all(keys), ways, innermost(drafter).config.block_size, greedy)


def row_of(
    key: str,
    prompt: torch.Tensor,
    decoded: dict[str, Decoded],
    target: PreTrainedModel,
    greedy: bool,
    teacher: "Teacher | None",
) -> dict:
    """What is noted of one prompt (1, S), decoded in every way."""
    plain, differences, replayed = decoded["plain"].output, {}, None
    if greedy:
        differences = differences_from_plain(target, decoded)
    if teacher is not None:
        replayed = teacher.passes(plain, prompt.shape[1])
    row = measured_row(key, prompt, decoded, differences, replayed)
    if greedy and is_low_precision(target.dtype):
        row["read_at_once"] = read_at_once(target, plain, prompt.shape[1])
    return row


def differences_from_plain(target, decoded: dict[str, Decoded]) -> dict[str, dict | None]:
    """Where each way's output parts from plain decoding's."""
    plain = decoded["plain"].output
    return {way: first_difference(target, plain, one.output) for way, one in decoded.items()}


@dataclass
class Teacher:
    """What a drafter would have accepted of a text, found by reading it. See `serving.replay`.

    Args:
        target (`PreTrainedModel`): the target, no wrapper.
        drafter: the drafter.
        max_new_tokens (`int`): the limit that the text was written under.
        draft_length (`int`, *optional*): drafted tokens of a pass; K - 1 by default.
    """

    target: PreTrainedModel
    drafter: torch.nn.Module
    max_new_tokens: int
    draft_length: int | None

    def passes(self, output: torch.Tensor, prompt_tokens: int) -> list[Round]:
        """The passes in which a greedy output (1, S) would have been written."""
        return replay(
            FrozenTarget(self.target, innermost(self.drafter).config),
            self.drafter,
            output,
            prompt_tokens=prompt_tokens,
            max_new_tokens=self.max_new_tokens,
            draft_length=self.draft_length,
        )


def decoded_in_turn(
    prompts: Iterable, ways: list[str], decode: Callable
) -> Iterator[tuple[object, dict[str, Decoded]]]:
    """Each prompt, and what every way made of it. Each way goes first in turn, so that a machine
    that slows down favours none."""
    for turn, prompt in enumerate(prompts):
        first = turn % len(ways)
        made = {way: decode(prompt, way) for way in ways[first:] + ways[:first]}
        yield prompt, {way: made[way] for way in ways}


def with_tau(places: list[int], rows: Rows, show: bool) -> Iterator[int]:
    """The places one by one, and a bar with tau of what this process has measured so far."""
    columns = (
        TextColumn("decoding"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tau {task.fields[tau]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not show, transient=True) as progress:
        found = len(rows.found)
        task = progress.add_task("", total=found + len(places), completed=found, tau="")
        for place in places:
            yield place
            tau = number(tau_of(own_passes(list(rows.found.values()))))
            progress.update(task, advance=1, tau=tau)
