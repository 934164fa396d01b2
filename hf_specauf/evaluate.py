"""`python -m hf_specauf.evaluate`: plain against assisted decoding in one run -> eval.json, a plot,
a verdict."""

import json
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase
from trl import TrlParser

from .data.conversation import Conversation, prompt_ids
from .data.messages import row_format
from .data.rows import prompt_length
from .data.sources import load_rows
from .identity import Identity
from .layouts.adapters import fetch
from .layouts.load import load_drafter, torch_dtype
from .recipe import TargetArguments
from .records import errors_in_one_line, write_record
from .serving.acceptance import number
from .serving.compare import compare, evaluation_record, plot_alpha, show
from .target import load_target


def encode_prompts(
    rows, tokenizer: PreTrainedTokenizerBase, count: int, longest: int, template_kwargs: dict | None
):
    """The first `count` rows as prompts (1, S): conversations up to the first answer, text up to
    `longest` tokens. Rows that give none are counted and printed with the reason."""
    row_format(rows.column_names)  # refuses columns that nobody knows
    prompts, skipped = [], {}
    for i, row in enumerate(rows.select(range(min(count, len(rows))))):
        conversation = Conversation(i, row)
        if row.get("input_ids") and row.get("supervised"):
            ids = row["input_ids"][: prompt_length(row["supervised"])]
        elif tokenizer.chat_template is None and isinstance(row.get("prompt"), str):
            ids = tokenizer(row["prompt"])["input_ids"]
        elif conversation.next_question():
            ids = prompt_ids(conversation, tokenizer, template_kwargs, longest)
        else:
            ids = conversation.skipped
        if isinstance(ids, list) and ids:
            prompts.append(torch.tensor([ids]))
        else:
            skipped.setdefault(ids or "it asks nothing", []).append(i)
    words = ", ".join(
        f"{reason} ({len(found)}, first: row {found[0]})" for reason, found in skipped.items()
    )
    if not prompts:
        raise ValueError(
            f"not one row of {min(count, len(rows))} gives a prompt: {words or 'there are no rows'}"
        )
    if skipped:
        print(f"{len(prompts)} prompts; other rows give none: {words}")
    return prompts


ENOUGH = 0.95  # a drafter that keeps this share of its accepted tokens on another target has little to win


def transfer_verdict(record: dict, config, reference: dict | None, command: str) -> str:
    """Whether a drafter is worth adapting to a target that it was not trained for; empty for its
    own target.

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
    theirs, ours = (
        part["conditions"] | {"number of prompts": len(part["prompts"])}
        for part in (reference, record)
    )
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
    return (
        f"{said} Adapting it has little to win."
        if kept >= ENOUGH
        else f"{said} Adapting is worth a try: {command}"
    )


@dataclass
class EvaluateArguments:
    """Arguments of `python -m hf_specauf.evaluate`."""

    target: str = field(metadata={"help": "Hub id or folder of the target."})
    drafter: str = field(metadata={"help": "Hub id or folder of the drafter."})
    prompts: str = field(
        metadata={
            "help": (
                "Hub dataset, or .jsonl/.parquet/.txt file with messages, conversations or text."
            )
        }
    )
    prompts_config: str | None = field(
        default=None, metadata={"help": "Configuration of a Hub dataset."}
    )
    prompts_split: str = field(default="train", metadata={"help": "Split of a Hub dataset."})
    prompts_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a Hub dataset."}
    )
    target_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the target."}
    )
    target_quantization: str | None = field(
        default=None,
        metadata={
            "help": "bnb-4bit or bnb-8bit, for a drafter that was trained with the target so."
        },
    )
    drafter_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the drafter."}
    )
    count: int = field(default=24, metadata={"help": "Prompts to decode."})
    prompt_tokens: int = field(default=128, metadata={"help": "Prompt length for plain text rows."})
    max_new_tokens: int = field(
        default=128, metadata={"help": "Tokens to generate for each prompt."}
    )
    max_draft_tokens: int | None = field(
        default=None, metadata={"help": "Cap on drafted tokens a pass."}
    )
    temperature: float = field(
        default=0.0, metadata={"help": "0 is greedy and checks equality; 1 samples."}
    )
    dtype: str = field(
        default="auto", metadata={"help": "auto, float32 or bfloat16, for both models."}
    )
    device: str = field(
        default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "cuda or cpu."}
    )
    out: str = field(default="eval", metadata={"help": "Folder for eval.json and alpha.png."})


def adapting(args: EvaluateArguments) -> str:
    """The command that adapts the drafter to the target, by LoRA."""
    keys = {
        "drafter": args.drafter, "drafter_revision": args.drafter_revision,
        "target": args.target, "target_revision": args.target_revision,
        "dataset_name": "YOUR_DATA", "use_peft": "true", "learning_rate": 2e-3, "output_dir": "adapted",
    }  # fmt: skip
    words = [
        word
        for key, value in keys.items()
        if value is not None
        for word in (f"--{key}", str(value))
    ]
    return shlex.join(["accelerate", "launch", "-m", "hf_specauf.train", *words])


@errors_in_one_line()
def main(argv: list[str] | None = None) -> None:
    """Command line of `python -m hf_specauf.evaluate`."""
    (args,) = TrlParser(
        EvaluateArguments, prog="python -m hf_specauf.evaluate"
    ).parse_args_and_config(argv)
    dtype = torch_dtype(args.dtype)
    loading = TargetArguments(
        args.target, target_dtype=args.dtype, target_quantization=args.target_quantization,
        target_device_map=args.device if args.target_quantization else None,
    ).loading()  # fmt: skip
    target, tokenizer = load_target(args.target, args.target_revision, key="--target", **loading)
    target = (
        target if args.target_quantization else target.to(args.device)
    )  # quantised ones are not to be moved
    folder, commit = fetch(args.drafter, args.drafter_revision, "--drafter")
    drafter = load_drafter(folder, target=target, dtype=dtype, key="--drafter").to(args.device)
    out, config = Path(args.out), drafter.config
    identity = Identity.of(
        target, tokenizer, name_or_path=args.target, revision=args.target_revision
    )
    is_own = config.target_model_name_or_path is None or identity.is_same_model(
        Identity.of_target_of(config)
    )
    if out.resolve() == folder.resolve() and not is_own:
        raise ValueError(
            f"--out {out} is the drafter's own folder, whose eval.json is what it reaches on its"
            f" own target {config.target_model_name_or_path}, and {args.target} is another one:"
            " give another --out"
        )
    path = folder / "eval.json"
    reference = json.loads(path.read_text()) if path.is_file() else None
    rows = load_rows(
        args.prompts,
        args.prompts_config,
        args.prompts_split,
        args.prompts_revision,
        keys="prompts_",
    )
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
    record["drafter"] = {
        "name_or_path": args.drafter,
        "revision": commit,
        "dtype": str(drafter.dtype),
    }
    write_record(out / "eval.json", record)
    plot_alpha({Path(args.drafter).name: results["acceptance"]["alpha"]}, out / "alpha.png")
    console = Console()
    show(results, console)
    if verdict := transfer_verdict(record, config, reference, adapting(args)):
        console.print(verdict, markup=False, soft_wrap=True)  # the command stays one line
    console.print(f"written: {out / 'eval.json'}, {out / 'alpha.png'}")


if __name__ == "__main__":
    main(sys.argv[1:])
