"""Plain and assisted decoding of the same prompts, compared: token by token, by tau, and by the
clock."""

import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import GenerationConfig, PreTrainedModel

from ..drafters.candidates import Round
from ..identity import Identity, innermost
from ..records import environment
from .acceptance import TAU_DEFINITION, number
from .decoding import attach

NEAR_TIE = 1e-3  # fp32: a first difference is a tie of rounding if the target's two best logits are closer than this


def near_tie_bound(dtype: torch.dtype, logits: torch.Tensor) -> float:
    """Largest gap between the target's two best logits at which rounding alone can flip the choice
    (vllm#54928)."""
    if dtype in (torch.float32, torch.float64):
        return NEAR_TIE
    return 4 * torch.finfo(dtype).eps * logits.abs().max().item()


def first_difference(target, plain: torch.Tensor, assisted: torch.Tensor) -> dict | None:
    """`None` if two outputs (1, T) are equal, else where they part and the target's top-2 logit gap
    there."""
    if torch.equal(plain, assisted):
        return None
    shorter = min(plain.shape[1], assisted.shape[1])
    differs = (plain[0, :shorter] != assisted[0, :shorter]).nonzero()
    at = differs[0].item() if len(differs) else shorter
    with torch.no_grad():
        logits = target(input_ids=plain[:, :at], use_cache=False).logits[0, -1].float()
    best = logits.topk(2).values
    gap = (best[0] - best[1]).item()
    return {"position": at, "top2_gap": gap, "near_tie": gap < near_tie_bound(target.dtype, logits)}


def repetition(tokens: list[int], n: int = 4) -> float:
    """Share of n-grams that occurred before in the same output; high tau on a loop is no
    achievement (SwiftLM#88)."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def decoding_config(
    target: PreTrainedModel, max_new_tokens: int, pad_token_id: int | None, temperature: float = 0.0
) -> GenerationConfig:
    """What a measurement is decoded with: every field transformers' default, so that none is the
    target's own (a repetition penalty or top-p shipped with it); only its end-of-sequence tokens,
    past which nothing may be drafted.

    Args:
        temperature (`float`, *optional*, defaults to 0): 0 is greedy.
    """
    sampled = (
        dict(do_sample=True, temperature=temperature, top_k=0)
        if temperature > 0
        else dict(do_sample=False)
    )
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, pad_token_id=pad_token_id, eos_token_id=target.generation_config.eos_token_id,
        **sampled,
    )  # fmt: skip
    defaults = GenerationConfig._get_default_generation_params()
    config.update(
        **{key: value for key, value in defaults.items() if key != "max_length"}, defaults_only=True
    )
    return config


def prompt_row(
    prompt: torch.Tensor, plain: tuple, assisted: tuple, rounds: list[Round], difference
) -> dict:
    """What is noted of one prompt (1, S) and its (output (1, T), seconds), plain and assisted."""
    return {
        "prompt_tokens": prompt.shape[1],
        "new_tokens": assisted[0].shape[1] - prompt.shape[1],
        "tau": sum(r.emitted for r in rounds) / len(rounds) if rounds else None,
        "plain_seconds": plain[1],
        "assisted_seconds": assisted[1],
        "difference": difference,
        "repetition": repetition(plain[0][0, prompt.shape[1] :].tolist()),
    }


def timed(
    target, prompt: torch.Tensor, assistant, config: GenerationConfig, seed: int
) -> tuple[torch.Tensor, float]:
    """Generate after a prompt (1, S), plainly where `assistant` is `None` -> output (1, T) and
    seconds."""
    torch.manual_seed(seed)
    start = time.perf_counter()
    output = target.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        generation_config=config,
        assistant_model=assistant,
    )
    if output.is_cuda:
        torch.cuda.synchronize()
    return output, time.perf_counter() - start


def compare(
    target,
    drafter,
    prompts: list[torch.Tensor],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    pad_token_id: int = 0,
    max_draft_tokens: int | None = None,
    seed: int = 0,
    show_progress: bool = True,
) -> dict:
    """Decode every prompt plainly and with the drafter, in turn, and compare.

    Args:
        target, drafter: as for `attach`.
        prompts (`list[torch.LongTensor]` of shape `(1, S)`).
        max_new_tokens (`int`): tokens generated for each.
        temperature (`float`, *optional*, defaults to 0): 0 is greedy, and outputs must be equal;
            above 0 they are samples, and equality is not asked for.

    Returns:
        dict with `acceptance` (tau, alpha, ...), `plain_tokens_per_second`, `tokens_per_second`,
        `speedup`, `lossless` (counts of identical, near_tie and different outputs), `repetition`
        and a list of `prompts`.
    """
    model = innermost(target)
    config = decoding_config(model, max_new_tokens, pad_token_id, temperature)
    kinds = [("plain", None), ("assisted", drafter)]
    tokens, rows, counts = (
        {"plain": 0, "assisted": 0},
        [],
        {"identical": 0, "near_tie": 0, "different": 0},
    )

    with attach(target, drafter, max_draft_tokens=max_draft_tokens) as attachment, torch.no_grad():
        for _, assistant in kinds:  # warm up, not counted
            timed(target, prompts[0], assistant, config, seed)
        attachment.generations.clear()
        for turn, prompt in enumerate(
            track(prompts, "decoding", disable=not show_progress, transient=True)
        ):
            order = kinds if turn % 2 else kinds[::-1]
            found = {
                kind: timed(target, prompt, assistant, config, seed) for kind, assistant in order
            }
            difference = (
                first_difference(model, found["plain"][0], found["assisted"][0])
                if temperature == 0
                else None
            )
            verdict = (
                "identical"
                if difference is None
                else "near_tie"
                if difference["near_tie"]
                else "different"
            )
            counts[verdict] += temperature == 0
            for kind, (output, _) in found.items():
                tokens[kind] += output.shape[1] - prompt.shape[1]
            rows.append(
                prompt_row(
                    prompt, **found, rounds=attachment.generations[-1], difference=difference
                )
            )
        acceptance = attachment.acceptance()
    rate = {kind: tokens[kind] / sum(row[f"{kind}_seconds"] for row in rows) for kind in tokens}
    return {
        "acceptance": acceptance.to_dict(),
        "plain_tokens_per_second": rate["plain"],
        "tokens_per_second": rate["assisted"],
        "speedup": rate["assisted"] / rate["plain"],
        "lossless": counts if temperature == 0 else "sampled: not comparable token by token",
        "repetition": sum(row["repetition"] for row in rows) / len(rows),
        "prompts": rows,
    }


def evaluation_record(results: dict, target, *, prompts: str, **conditions) -> dict:
    """What `compare` found, with the conditions it was found under: the content of `eval.json`.

    Args:
        results (`dict`): from `compare`.
        target (`PreTrainedModel`): what was decoded with.
        prompts (`str`): what the prompts are, a Hub dataset's id where they come from one.
        conditions: `temperature`, `max_new_tokens`, ...; those that are `None` are left out.
    """
    dtype, found = str(innermost(target).dtype).removeprefix("torch."), environment()
    given = {key: value for key, value in conditions.items() if value is not None}
    return {
        "tau_definition": TAU_DEFINITION,
        "target": Identity.of(target).record() | {"dtype": dtype},
        "conditions": (
            {"prompts": prompts, "batch_size": 1, "hardware": found["hardware"], "dtype": dtype}
            | given
        ),
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
    table = Table("", "plain", "with drafter")
    table.add_row(
        "tokens/s",
        f"{results['plain_tokens_per_second']:.1f}",
        f"{results['tokens_per_second']:.1f}",
    )
    table.add_row("tau", "1.00", number(acceptance["tau"]))
    table.add_row("alpha_1, 2, 3", "", "  ".join(map(number, acceptance["alpha"][:3])))
    console.print(table)
    faster = results["speedup"]
    console.print(
        f"{'faster' if faster > 1 else 'SLOWER than plain decoding'}: {faster:.2f}x."
        f" {TAU_DEFINITION}."
    )
    console.print(f"outputs: {results['lossless']}; repeated 4-grams: {results['repetition']:.0%}")
