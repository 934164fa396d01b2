"""`python -m hf_specauf.evaluate`: plain against assisted decoding in one run -> eval.json, a plot, a verdict."""

import json
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from trl import TrlParser

from .acceptance import TAU_DEFINITION
from .answers import Conversation, prompt_ids
from .conversations import prompt_length
from .convert import load_drafter, torch_dtype
from .drafters.generation_block import Round
from .generate import attach
from .identity import Identity, innermost
from .lora import fetch
from .model_card import number
from .recipe import TargetArguments
from .records import environment, errors_in_one_line, write_record
from .sources import load_rows, row_format
from .target import load_target

NEAR_TIE = 1e-3  # fp32: a first difference is a tie of rounding if the target's two best logits are closer than this


def near_tie_bound(dtype: torch.dtype, logits: torch.Tensor) -> float:
    """Largest gap between the target's two best logits at which rounding alone can flip the choice (vllm#54928)."""
    if dtype in (torch.float32, torch.float64):
        return NEAR_TIE
    return 4 * torch.finfo(dtype).eps * logits.abs().max().item()


def first_difference(target, plain: torch.Tensor, assisted: torch.Tensor) -> dict | None:
    """`None` if two outputs (1, T) are equal, else where they part and the target's top-2 logit gap there."""
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
    """Share of n-grams that occurred before in the same output; high tau on a loop is no achievement (SwiftLM#88)."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def decoding_config(
    target: PreTrainedModel, max_new_tokens: int, pad_token_id: int | None, temperature: float = 0.0
) -> GenerationConfig:
    """What a measurement is decoded with: every field transformers' default, so that none is the target's own (a
    repetition penalty or top-p shipped with it); only its end-of-sequence tokens, past which nothing may be drafted.

    Args:
        temperature (`float`, *optional*, defaults to 0): 0 is greedy.
    """
    sampled = dict(do_sample=True, temperature=temperature, top_k=0) if temperature > 0 else dict(do_sample=False)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, pad_token_id=pad_token_id, eos_token_id=target.generation_config.eos_token_id,
        **sampled,
    )  # fmt: skip
    defaults = GenerationConfig._get_default_generation_params()
    config.update(**{key: value for key, value in defaults.items() if key != "max_length"}, defaults_only=True)
    return config


def prompt_row(prompt: torch.Tensor, plain: tuple, assisted: tuple, rounds: list[Round], difference) -> dict:
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


def timed(target, prompt: torch.Tensor, assistant, config: GenerationConfig, seed: int) -> tuple[torch.Tensor, float]:
    """Generate after a prompt (1, S), plainly where `assistant` is `None` -> output (1, T) and seconds."""
    torch.manual_seed(seed)
    start = time.perf_counter()
    output = target.generate(
        prompt, attention_mask=torch.ones_like(prompt), generation_config=config, assistant_model=assistant
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
        temperature (`float`, *optional*, defaults to 0): 0 is greedy, and outputs must be equal; above 0 they are
            samples, and equality is not asked for.

    Returns:
        dict with `acceptance` (tau, alpha, ...), `plain_tokens_per_second`, `tokens_per_second`, `speedup`,
        `lossless` (counts of identical, near_tie and different outputs), `repetition` and a list of `prompts`.
    """
    model = innermost(target)
    config = decoding_config(model, max_new_tokens, pad_token_id, temperature)
    kinds = [("plain", None), ("assisted", drafter)]
    tokens, rows, counts = {"plain": 0, "assisted": 0}, [], {"identical": 0, "near_tie": 0, "different": 0}

    with attach(target, drafter, max_draft_tokens=max_draft_tokens) as attachment, torch.no_grad():
        for _, assistant in kinds:  # warm up, not counted
            timed(target, prompts[0], assistant, config, seed)
        attachment.generations.clear()
        for turn, prompt in enumerate(track(prompts, "decoding", disable=not show_progress, transient=True)):
            order = kinds if turn % 2 else kinds[::-1]
            found = {kind: timed(target, prompt, assistant, config, seed) for kind, assistant in order}
            difference = first_difference(model, found["plain"][0], found["assisted"][0]) if temperature == 0 else None
            verdict = "identical" if difference is None else "near_tie" if difference["near_tie"] else "different"
            counts[verdict] += temperature == 0
            for kind, (output, _) in found.items():
                tokens[kind] += output.shape[1] - prompt.shape[1]
            rows.append(prompt_row(prompt, **found, rounds=attachment.generations[-1], difference=difference))
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
        "conditions": {"prompts": prompts, "batch_size": 1, "hardware": found["hardware"], "dtype": dtype} | given,
        "environment": found,
        **results,
    }


def encode_prompts(rows, tokenizer: PreTrainedTokenizerBase, count: int, longest: int, template_kwargs: dict | None):
    """The first `count` rows as prompts (1, S): conversations up to the first answer, text up to `longest` tokens.
    Rows that give none are counted and printed with the reason."""
    row_format(rows.column_names)  # refuses columns that nobody knows
    prompts, skipped = [], {}
    for i, row in enumerate(rows.select(range(min(count, len(rows))))):
        conversation = Conversation(i, row)
        if row.get("input_ids") and row.get("supervised"):
            ids = row["input_ids"][: prompt_length(row["supervised"])]
        elif tokenizer.chat_template is None and isinstance(row.get("prompt"), str):
            ids = tokenizer(row["prompt"])["input_ids"]
        elif conversation.wants_answer():
            ids = prompt_ids(conversation, tokenizer, template_kwargs, longest)
        else:
            ids = conversation.skipped
        if isinstance(ids, list) and ids:
            prompts.append(torch.tensor([ids]))
        else:
            skipped.setdefault(ids or "it asks nothing", []).append(i)
    words = ", ".join(f"{reason} ({len(found)}, first: row {found[0]})" for reason, found in skipped.items())
    if not prompts:
        raise ValueError(f"not one row of {min(count, len(rows))} gives a prompt: {words or 'there are no rows'}")
    if skipped:
        print(f"{len(prompts)} prompts; other rows give none: {words}")
    return prompts


def plot_alpha(results: dict[str, list[float | None]], path: Path) -> None:
    """alpha_k over the slots, a line for each named result."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name, alpha in results.items():
        reached = [(k, a) for k, a in enumerate(alpha, start=1) if a is not None]
        axes.plot(*zip(*reached), marker="o", label=name)
    axes.set(
        xlabel="slot k",
        ylabel="conditional acceptance α_k",
        ylim=(0, 1),
        title="Accepted, given that slot k was reached",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def show(results: dict, console: Console) -> None:
    """A table of one comparison, and the verdict in words."""
    acceptance = results["acceptance"]
    table = Table("", "plain", "with drafter")
    table.add_row("tokens/s", f"{results['plain_tokens_per_second']:.1f}", f"{results['tokens_per_second']:.1f}")
    table.add_row("tau", "1.00", number(acceptance["tau"]))
    table.add_row("alpha_1, 2, 3", "", "  ".join(map(number, acceptance["alpha"][:3])))
    console.print(table)
    faster = results["speedup"]
    console.print(f"{'faster' if faster > 1 else 'SLOWER than plain decoding'}: {faster:.2f}x. {TAU_DEFINITION}.")
    console.print(f"outputs: {results['lossless']}; repeated 4-grams: {results['repetition']:.0%}")


ENOUGH = 0.95  # a drafter that keeps this share of its accepted tokens on another target has little to win


def transfer_verdict(record: dict, config, reference: dict | None, command: str) -> str:
    """Whether a drafter is worth adapting to a target that it was not trained for; empty for its own target.

    Args:
        record (`dict`): from `evaluation_record`, on that target.
        config (`DFlashConfig`): of the drafter.
        reference (`dict`, *optional*): the `eval.json` beside the drafter.
        command (`str`): that adapts it.
    """
    meant = Identity.of_target_of(config)
    if Identity.read(record).is_same_model(meant):
        return ""
    own, here = config.target_model_name_or_path, record["acceptance"]["tau"]
    adapt = f"where tau is clearly higher, adapt it: {command}"
    again = f"Evaluate it on {own or 'its own target'} with the same prompts and settings: {adapt}"
    if reference is None or own is None or not Identity.read(reference).is_same_model(meant):
        known = f"was trained for {own}" if own else "does not say which target it was trained for"
        return f"This drafter {known}, and what it reaches there is not known. {again}"
    there = reference["acceptance"]["tau"]
    theirs, ours = (part["conditions"] | {"number of prompts": len(part["prompts"])} for part in (reference, record))
    other = [
        f"{key} {theirs.get(key)} there, {ours.get(key)} here"
        for key in sorted({*theirs, *ours} - {"hardware", "dtype"})
        if theirs.get(key) != ours.get(key)
    ]
    said = (
        f"This drafter was trained for {own} and reached tau {number(there)} there "
        f"({reference['conditions']['prompts']}). Here it reaches {number(here)}"
    )
    if other:
        return f"{said}, but tau depends on what differed ({'; '.join(other)}). {again}"
    if here is None or there is None:
        return f"{said}. {again}"
    kept = (here - 1) / (there - 1) if there > 1 else 1.0
    said += f", so {kept:.0%} of the accepted tokens are kept."
    return f"{said} Adapting it has little to win." if kept >= ENOUGH else f"{said} Adapting is worth a try: {command}"


@dataclass
class EvaluateArguments:
    """Arguments of `python -m hf_specauf.evaluate`."""

    target: str = field(metadata={"help": "Hub id or folder of the target."})
    drafter: str = field(metadata={"help": "Hub id or folder of the drafter."})
    prompts: str = field(
        metadata={"help": "Hub dataset, or .jsonl/.parquet/.txt file with messages, conversations or text."}
    )
    prompts_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    prompts_split: str = field(default="train", metadata={"help": "Split of a Hub dataset."})
    prompts_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub dataset."})
    target_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the target."})
    target_quantization: str | None = field(
        default=None, metadata={"help": "bnb-4bit or bnb-8bit, for a drafter that was trained with the target so."}
    )
    drafter_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the drafter."})
    count: int = field(default=24, metadata={"help": "Prompts to decode."})
    prompt_tokens: int = field(default=128, metadata={"help": "Prompt length for plain text rows."})
    max_new_tokens: int = field(default=128, metadata={"help": "Tokens to generate for each prompt."})
    max_draft_tokens: int | None = field(default=None, metadata={"help": "Cap on drafted tokens a pass."})
    temperature: float = field(default=0.0, metadata={"help": "0 is greedy and checks equality; 1 samples."})
    dtype: str = field(default="auto", metadata={"help": "auto, float32 or bfloat16, for both models."})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "cuda or cpu."})
    out: str = field(default="eval", metadata={"help": "Folder for eval.json and alpha.png."})


def adapting(args: EvaluateArguments) -> str:
    """The command that adapts the drafter to the target, by LoRA."""
    keys = {
        "drafter_name_or_path": args.drafter, "drafter_revision": args.drafter_revision,
        "target_model_name_or_path": args.target, "target_revision": args.target_revision,
        "dataset_name": "YOUR_DATA", "use_peft": "true", "learning_rate": 2e-3, "output_dir": "adapted",
    }  # fmt: skip
    words = [word for key, value in keys.items() if value is not None for word in (f"--{key}", str(value))]
    return shlex.join(["accelerate", "launch", "-m", "hf_specauf.train", *words])


@errors_in_one_line()
def main(argv: list[str] | None = None) -> None:
    """Command line of `python -m hf_specauf.evaluate`."""
    (args,) = TrlParser(EvaluateArguments, prog="python -m hf_specauf.evaluate").parse_args_and_config(argv)
    dtype = torch_dtype(args.dtype)
    loading = TargetArguments(
        args.target, target_dtype=args.dtype, target_quantization=args.target_quantization,
        target_device_map=args.device if args.target_quantization else None,
    ).loading()  # fmt: skip
    target, tokenizer = load_target(args.target, args.target_revision, key="--target", **loading)
    target = target if args.target_quantization else target.to(args.device)  # quantised ones are not to be moved
    folder, commit = fetch(args.drafter, args.drafter_revision, "--drafter")
    drafter = load_drafter(folder, target=target, dtype=dtype, key="--drafter").to(args.device)
    out, config = Path(args.out), drafter.config
    identity = Identity.of(target, tokenizer, name_or_path=args.target, revision=args.target_revision)
    is_own = config.target_model_name_or_path is None or identity.is_same_model(Identity.of_target_of(config))
    if out.resolve() == folder.resolve() and not is_own:
        raise ValueError(
            f"--out {out} is the drafter's own folder, whose eval.json is what it reaches on its own target "
            f"{config.target_model_name_or_path}, and {args.target} is another one: give another --out"
        )
    path = folder / "eval.json"
    reference = json.loads(path.read_text()) if path.is_file() else None
    rows = load_rows(args.prompts, args.prompts_config, args.prompts_split, args.prompts_revision, keys="prompts_")
    template_kwargs = config.chat_template_kwargs
    prompts = encode_prompts(rows, tokenizer, args.count, args.prompt_tokens, template_kwargs)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    prompts = [prompt.to(args.device) for prompt in prompts]
    results = compare(
        target, drafter, prompts, args.max_new_tokens, temperature=args.temperature, pad_token_id=pad,
        max_draft_tokens=args.max_draft_tokens,
    )  # fmt: skip
    record = evaluation_record(
        results, target, prompts=args.prompts, temperature=args.temperature, max_new_tokens=args.max_new_tokens,
        max_draft_tokens=args.max_draft_tokens, chat_template_kwargs=template_kwargs,
        target_quantization=args.target_quantization,
        prompt_tokens=args.prompt_tokens if row_format(rows.column_names) == "text" else None,
    )  # fmt: skip
    record["target"] |= identity.record()
    record["drafter"] = {"name_or_path": args.drafter, "revision": commit, "dtype": str(drafter.dtype)}
    write_record(out / "eval.json", record)
    plot_alpha({Path(args.drafter).name: results["acceptance"]["alpha"]}, out / "alpha.png")
    console = Console()
    show(results, console)
    if verdict := transfer_verdict(record, config, reference, adapting(args)):
        console.print(verdict, markup=False, soft_wrap=True)  # the command stays one line
    console.print(f"written: {out / 'eval.json'}, {out / 'alpha.png'}")


if __name__ == "__main__":
    main(sys.argv[1:])
