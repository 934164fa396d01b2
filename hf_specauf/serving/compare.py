"""Plain and assisted decoding of the same prompts, compared: token by token, by tau, and by the
clock."""

import copy
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from ..drafters.draft_length import Round
from ..identity import Identity, innermost, unwrapped
from ..records import environment
from .acceptance import TAU_DEFINITION, number
from .decoding import AUTO, Attachment, attach

# Tokens of transformers' own prompt lookup, which needs no drafter: what a drafter has to beat.
LOOKED_UP = 10
# what `compare` measures beside plain decoding and the drafter, where it is asked to look up
LOOKUP_WAYS = ("prompt_lookup", "drafter_and_lookup")
# In fp32, a first difference is a tie of rounding if the target's two best logits are closer than
# this.
NEAR_TIE = 1e-3


def near_tie_bound(dtype: torch.dtype, logits: torch.Tensor) -> float:
    """Largest gap between the target's two best logits at which rounding alone can flip the choice
    (vllm#54928)."""
    if dtype in (torch.float32, torch.float64):
        return NEAR_TIE
    # Low precision rounds relative to the logits' size; the factor leaves room for several of them.
    return 4 * torch.finfo(dtype).eps * logits.abs().max().item()


def first_difference(target, plain: torch.Tensor, assisted: torch.Tensor) -> dict | None:
    """`None` if two outputs (1, T) are equal, else where they part and the target's top-2 logit gap
    there."""
    if torch.equal(plain, assisted):
        return None
    shorter = min(plain.shape[1], assisted.shape[1])
    differs = (plain[0, :shorter] != assisted[0, :shorter]).nonzero()
    # Where one is the other's beginning, they part where it ends.
    at = differs[0].item() if len(differs) else shorter
    with torch.no_grad():
        logits = target(input_ids=plain[:, :at], use_cache=False).logits[0, -1].float()
    best = logits.topk(2).values
    gap = (best[0] - best[1]).item()
    return {"position": at, "top2_gap": gap, "near_tie": gap < near_tie_bound(target.dtype, logits)}


def repetition(tokens: list[int], n: int = 4) -> float | None:
    """Share of n-grams that occurred before in the same output; high tau on a loop is no
    achievement (SwiftLM#88). `None` of an output that is too short to have one."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    if not grams:
        return None
    return 1 - len(set(grams)) / len(grams)


def decoding_config(
    target: PreTrainedModel, max_new_tokens: int, pad_token_id: int | None, temperature: float = 0.0
) -> GenerationConfig:
    """Generation settings for measuring: transformers' defaults and the target's end-of-sequence
    tokens, past which nothing may be drafted.

    Sampling settings that the target ships with (a repetition penalty, top-p) are ignored.

    Args:
        temperature (`float`, *optional*, defaults to 0): 0 is greedy.
    """
    sampling = {"do_sample": False}
    if temperature > 0:
        # all tokens, where transformers' default keeps 50
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_token_id,
        eos_token_id=target.generation_config.eos_token_id,
        **sampling,
    )
    # `generate` fills a field that is None from the target's own config, so none may stay None.
    defaults = GenerationConfig._get_default_generation_params()
    # max_new_tokens stands in its place
    defaults.pop("max_length", None)
    config.update(**defaults, defaults_only=True)
    return config


@dataclass(frozen=True)
class Decoded:
    """One output of `generate`."""

    output: torch.Tensor  # (1, T), the prompt included
    seconds: float


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


def timed(
    target,
    prompt: torch.Tensor,
    assistant,
    config: GenerationConfig,
    seed: int,
    streamer: BaseStreamer | None = None,
) -> Decoded:
    """Generate after a prompt (1, S), plainly where `assistant` is `None`."""
    torch.manual_seed(seed)
    start = time.perf_counter()
    output = target.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        generation_config=config,
        assistant_model=assistant,
        streamer=streamer,
    )
    # the clock would else stop before the GPU does
    if output.is_cuda:
        torch.cuda.synchronize()
    return Decoded(output, time.perf_counter() - start)


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


def config_of(way: str, config: GenerationConfig) -> GenerationConfig:
    """What a way of `compare` decodes by."""
    if way != "prompt_lookup":
        return config
    config = copy.deepcopy(config)
    config.prompt_lookup_num_tokens = LOOKED_UP
    return config


def decoded_in_turn(
    prompts: Iterable[torch.Tensor], ways: list[str], decode: Callable
) -> Iterator[tuple[torch.Tensor, dict[str, Decoded]]]:
    """Each prompt, and what every way made of it. Each way goes first in turn, so that a machine
    that slows down favours none."""
    for turn, prompt in enumerate(prompts):
        first = turn % len(ways)
        yield prompt, {way: decode(prompt, way) for way in ways[first:] + ways[:first]}


def attached_ways(
    stack: ExitStack, target, drafter, draft_length, lookup
) -> tuple[dict, Attachment, Attachment]:
    """The ways that `compare` decodes in, each with the assistant of its calls, and the attachments
    of the drafter alone and with lookup (the same one where nothing is looked up)."""
    alone = attach(target, drafter, draft_length=draft_length, lookup=False)
    stack.enter_context(alone)
    calls = {"plain": None, "drafter": drafter}
    if lookup is False:
        return calls, alone, alone
    # Another object with the same weights, because an attachment knows its drafter by the object.
    twin = copy.copy(drafter)
    # tau is that of whole blocks, and people decode by what pays.
    length = AUTO if draft_length is None else draft_length
    both = stack.enter_context(attach(target, twin, draft_length=length, lookup=lookup))
    calls["prompt_lookup"] = None
    calls["drafter_and_lookup"] = twin
    return calls, alone, both


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


def count_verdicts(rows: list[dict]) -> dict[str, int]:
    """How many greedy outputs were identical, parted at a near-tie of rounding, or differed."""
    counts = {"identical": 0, "near_tie": 0, "different": 0}
    for row in rows:
        if row["difference"] is None:
            counts["identical"] += 1
        elif row["difference"]["near_tie"]:
            counts["near_tie"] += 1
        else:
            counts["different"] += 1
    return counts


def evaluation_record(results: dict, target, *, prompts: str, **conditions) -> dict:
    """What `compare` found, with the conditions it was found under: the content of `eval.json`.

    Args:
        results (`dict`): from `compare`.
        target (`PreTrainedModel`): what was decoded with.
        prompts (`str`): what the prompts are, a Hub dataset's id where they come from one.
        conditions: `temperature`, `max_new_tokens`, ...; those that are `None` are left out.
    """
    dtype = str(innermost(target).dtype).removeprefix("torch.")
    found = environment()
    noted = {"prompts": prompts, "batch_size": 1, "hardware": found["hardware"], "dtype": dtype}
    for key, value in conditions.items():
        if value is not None:
            noted[key] = value
    return {
        "tau_definition": TAU_DEFINITION,
        "target": Identity.of(target).record() | {"dtype": dtype},
        "conditions": noted,
        "environment": found,
        **results,
    }


def plot_alpha(results: dict[str, list[float | None]], path: Path) -> None:
    """alpha_k over the slots, a line for each named result."""
    curves = {}
    for name, alpha in results.items():
        curves[name] = [(k, a) for k, a in enumerate(alpha, start=1) if a is not None]
    plot_curves(
        curves,
        path,
        xlabel="slot k",
        ylabel="conditional acceptance α_k",
        ylim=(0, 1),
        title="Accepted, given that slot k was reached",
    )


def plot_curves(
    curves: dict[str, list[tuple[float, float]]],
    path: Path,
    *,
    xlabel: str,
    ylabel: str,
    title: str,
    ylim: tuple[float, float] | None = None,
) -> None:
    """A line through the (x, y) points of each named curve."""
    import matplotlib

    # a machine without a screen
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name, points in curves.items():
        axes.plot(*zip(*points), marker="o", label=name)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if ylim is not None:
        axes.set_ylim(ylim)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def show(results: dict, console: Console) -> None:
    """A table of one comparison, and the verdict in words."""
    acceptance = results["acceptance"]
    others = [results[way] for way in LOOKUP_WAYS if way in results]
    names = ("prompt lookup", "drafter and lookup")[: len(others)]
    table = Table("", "plain", "with drafter", *names)
    table.add_row(
        "tokens/s",
        f"{results['plain_tokens_per_second']:.1f}",
        f"{results['tokens_per_second']:.1f}",
        *(f"{other['tokens_per_second']:.1f}" for other in others),
    )
    table.add_row(
        "speed-up",
        "1.00x",
        f"{results['speedup']:.2f}x",
        *(f"{other['speedup']:.2f}x" for other in others),
    )
    table.add_row("tau", "1.00", number(acceptance["tau"]))
    table.add_row("alpha_1, 2, 3", "", "  ".join(map(number, acceptance["alpha"][:3])))
    console.print(table)
    faster = "faster" if results["speedup"] > 1 else "SLOWER than plain decoding"
    console.print(f"{faster}: {results['speedup']:.2f}x. {TAU_DEFINITION}.")
    repeated = number(results["repetition"], ".0%")
    console.print(f"outputs: {results['lossless']}; repeated 4-grams: {repeated}")
