"""The command that compares plain decoding with a drafter's, in one run -> eval.json, a plot, a
verdict: `specauf evaluate`."""

import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import TrlParser

from .cli import OneSpelling, errors_in_one_line
from .data.conversation import stop_at_both_ends
from .identity import Identity
from .keys import ONE_OR_MORE, Numbers, check_keys
from .layouts.folders import fetch
from .layouts.load import load_drafter, torch_dtype
from .recipe import CHOICES, TargetArguments
from .records import check_can_write, read_record, write_record
from .serving.acceptance import number
from .serving.benchmarks import (
    BENCHMARKS,
    DEFAULT_COUNT,
    PromptSet,
    encode_prompts,
    load_prompts,
)
from .serving.compare import compare, evaluation_record, plot_alpha, show
from .serving.decoding import AUTO
from .target import check_device, check_revision, load_target, room_for_prompt

# A drafter that keeps this share of its accepted tokens on another target has little to win.
ENOUGH = 0.95
# Flags that take a number.
NUMBERS = {
    "count": ONE_OR_MORE,
    "prompt_tokens": ONE_OR_MORE,
    # the first token comes from the prefill, so one token says nothing of a drafter
    "max_new_tokens": Numbers(2, whole=True),
    "temperature": Numbers(0, hint="; 0 is greedy"),
}


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
    # by the weights where both are known, so a copy under another name is the drafter's own target
    if Identity.read(record).is_same_model(meant):
        return ""
    own = config.target_model_name_or_path
    adapt = f"where tau is clearly higher, adapt it: {command}"
    again = f"Evaluate it on {own or 'its own target'} with the same prompts and settings: {adapt}"
    if reference is None or own is None or not Identity.read(reference).is_same_model(meant):
        known = f"was trained for {own}" if own else "does not say which target it was trained for"
        return f"This drafter {known}, and what it reaches there is not known. {again}"
    here, there = (part["acceptance"]["tau"] for part in (record, reference))
    said = (
        f"This drafter was trained for {own} and reached tau {number(there)} there "
        f"({reference['conditions']['prompts']}). Here it reaches {number(here)}"
    )
    other = differing_conditions(record, reference)
    if other:
        return f"{said}, but tau depends on what differed ({'; '.join(other)}). {again}"
    if here is None or there is None:
        return f"{said}. {again}"
    # Of tau, 1 is the target's own token. A drafter that had nothing accepted there has lost none.
    kept = (here - 1) / (there - 1) if there > 1 else 1.0
    said += f", so {kept:.0%} of the accepted tokens are kept."
    if kept >= ENOUGH:
        return f"{said} Adapting it has little to win."
    return f"{said} Adapting is worth a try: {command}"


def differing_conditions(record: dict, reference: dict) -> list[str]:
    """The conditions of two evaluations that tau depends on and that differ, in words."""
    here, there = record["conditions"], reference["conditions"]
    here = here | {"number of prompts": len(record["prompts"])}
    there = there | {"number of prompts": len(reference["prompts"])}
    # a figure from another machine is comparable: these two change the clock, and tau hardly
    keys = sorted({*here, *there} - {"hardware", "dtype"})
    return [
        f"{key} {there.get(key)} there, {here.get(key)} here"
        for key in keys
        if here.get(key) != there.get(key)
    ]


@dataclass
class EvaluateArguments:
    """Arguments of `specauf evaluate`."""

    target: str = field(metadata={"help": "Hub id or folder of the target."})
    drafter: str = field(metadata={"help": "Hub id or folder of the drafter."})
    prompts: str = field(
        metadata={
            "help": f"A benchmark ({', '.join(BENCHMARKS)}), a Hub dataset, or a .jsonl, .parquet"
            " or .txt file, with messages, conversations or text."
        }
    )
    prompts_config: str | None = field(
        default=None, metadata={"help": "Configuration of a Hub dataset."}
    )
    prompts_split: str = field(default="train", metadata={"help": "Split of a Hub dataset."})
    prompts_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a Hub dataset."}
    )
    prompts_salvage: bool = field(
        default=False,
        metadata={"help": "Read what is whole of a .json or .jsonl file that is not."},
    )
    prompts_column: str | None = field(
        default=None,
        metadata={"help": "Column that holds the question, in a dataset or file of other columns."},
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
    count: int | None = field(
        default=None,
        metadata={
            "help": f"Prompts to decode (default {DEFAULT_COUNT}; of a benchmark, as in the paper)."
        },
    )
    prompt_tokens: int = field(default=128, metadata={"help": "Prompt length for plain text rows."})
    max_new_tokens: int = field(
        default=128, metadata={"help": "Tokens to generate for each prompt."}
    )
    draft_length: str | None = field(
        default=None,
        metadata={
            "help": "Drafted tokens that a pass verifies: a number (default K - 1), or auto, which"
            " decides by what passes cost and drafts bring."
        },
    )
    lookup: str = field(
        default=AUTO,
        metadata={
            "help": "auto, or a number of tokens: also decode by transformers' prompt lookup, and"
            " by the drafter with such drafts beside its own and lengths that pay; off: neither."
        },
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

    def __post_init__(self):
        check_keys(self, NUMBERS, CHOICES | {"dtype": CHOICES["target_dtype"]})
        if self.draft_length not in (None, AUTO):
            if not self.draft_length.isdecimal() or int(self.draft_length) < 1:
                raise ValueError(
                    f"--draft_length is {self.draft_length!r}; it must be auto, or a number from 1"
                    " to K - 1"
                )
            self.draft_length = int(self.draft_length)
        if self.lookup not in ("off", AUTO):
            if not self.lookup.isdecimal() or int(self.lookup) < 1:
                raise ValueError(
                    f"--lookup is {self.lookup!r}; it must be auto, off, or a number of tokens from"
                    " 1 on"
                )
            self.lookup = int(self.lookup)
        check_device(self.device)
        check_revision("--target", self.target, self.target_revision)
        check_can_write("--out", self.out)


class EvaluateParser(OneSpelling, TrlParser):
    """The parser of `specauf evaluate`; `--config FILE` may hold the flags."""

    renamed = {"--max_draft_tokens": "--draft_length"}


def adapting(args: EvaluateArguments) -> str:
    """The command that adapts the drafter to the target, by LoRA."""
    keys = {
        # as the user named it, so that the command works where this one did
        "drafter": args.drafter,
        "drafter_revision": args.drafter_revision,
        "target": args.target,
        "target_revision": args.target_revision,
        "dataset_name": "YOUR_DATA",
        "use_peft": "true",
        # LoRA learns at a higher rate than a whole drafter
        "learning_rate": 2e-3,
        "output_dir": "adapted",
    }
    words = ["accelerate", "launch", "-m", "hf_specauf.train"]
    for key, value in keys.items():
        if value is not None:
            words += [f"--{key}", str(value)]
    return shlex.join(words)


def load_models(
    args: EvaluateArguments, folder: Path
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, PreTrainedModel]:
    """The target, its tokenizer, and the drafter in `folder`, where they will decode."""
    dtype = torch_dtype(args.dtype)
    quantized = args.target_quantization is not None
    loading = TargetArguments(
        args.target,
        target_dtype=args.dtype,
        target_quantization=args.target_quantization,
        # a quantised model cannot be moved, so it is loaded where it will decode
        target_device_map=args.device if quantized else None,
    ).loading()
    target, tokenizer = load_target(args.target, args.target_revision, key="--target", **loading)
    if not quantized:
        target = target.to(args.device)
    drafter = load_drafter(folder, target=target, dtype=dtype, key="--drafter").to(args.device)
    return target, tokenizer, drafter


def refuse_to_overwrite(out: Path, folder: Path, target: Identity, config) -> None:
    """Raise where a measurement on another target would replace the drafter's own `eval.json`."""
    own = config.target_model_name_or_path
    if own is None or target.is_same_model(Identity.of_target_of(config)):
        return
    if out.resolve() == folder.resolve():
        raise ValueError(
            f"--out {out} is the drafter's own folder, whose eval.json is what it reaches on its"
            f" own target {own}, and {target.name_or_path} is another one: give another --out"
        )


def measure(
    args: EvaluateArguments,
    source: PromptSet,
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    drafter: PreTrainedModel,
) -> dict:
    """Decode the prompts plainly and with the drafter -> the record of both, with its
    conditions."""
    count = source.count if args.count is None else args.count
    template_kwargs = drafter.config.chat_template_kwargs
    room = room_for_prompt(target, args.max_new_tokens)
    prompts = encode_prompts(
        source.rows, tokenizer, count, args.prompt_tokens, template_kwargs, source.wording, room
    )
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = tokenizer.eos_token_id
    results = compare(
        target,
        drafter,
        [prompt.to(args.device) for prompt in prompts],
        args.max_new_tokens,
        temperature=args.temperature,
        pad_token_id=pad,
        draft_length=args.draft_length,
        lookup=False if args.lookup == "off" else args.lookup,
    )
    return evaluation_record(
        results,
        target,
        temperature=args.temperature,
        max_new_tokens=args.max_new_tokens,
        draft_length=args.draft_length,
        lookup=args.lookup,
        chat_template_kwargs=template_kwargs,
        target_quantization=args.target_quantization,
        # of chats, the question is the prompt, whatever its length
        prompt_tokens=args.prompt_tokens if source.is_text else None,
        **source.conditions,
    )


def evaluate(args: EvaluateArguments) -> tuple[dict, str]:
    """Measure a drafter; write `eval.json` and `alpha.png`.

    Returns:
        the record in `eval.json`, and the verdict of `transfer_verdict`.
    """
    # Before the models, because they may take minutes to load.
    source = load_prompts(
        args.prompts,
        args.prompts_config,
        args.prompts_split,
        args.prompts_revision,
        args.prompts_column,
        args.prompts_salvage,
    )
    folder, commit = fetch(args.drafter, args.drafter_revision, "--drafter")
    target, tokenizer, drafter = load_models(args, folder)
    stop_at_both_ends(target, tokenizer, drafter.config.chat_template_kwargs)
    out = Path(args.out)
    identity = Identity.of(
        target, tokenizer, name_or_path=args.target, revision=args.target_revision
    )
    refuse_to_overwrite(out, folder, identity, drafter.config)
    # read before it is written, because --out may be the drafter's own folder
    path = folder / "eval.json"
    reference = read_record(path) if path.is_file() else None
    record = measure(args, source, target, tokenizer, drafter)
    record["target"] |= identity.record()
    # by the name the user gave, where the drafter was loaded from a folder of the cache
    record["drafter"] = {
        "name_or_path": args.drafter,
        "revision": commit,
        "dtype": str(drafter.dtype),
    }
    write_record(out / "eval.json", record)
    plot_alpha({Path(args.drafter).name: record["acceptance"]["alpha"]}, out / "alpha.png")
    return record, transfer_verdict(record, drafter.config, reference, adapting(args))


@errors_in_one_line()
def main(argv: list[str] | None = None) -> None:
    """Command line of `specauf evaluate` and of `python -m hf_specauf.evaluate`."""
    parser = EvaluateParser(
        EvaluateArguments,
        prog="specauf evaluate",
        description="Decode prompts plainly and with a drafter, and compare: tau, tokens a second,"
        " and whether the outputs are equal.",
    )
    (args,) = parser.parse_args_and_config(argv)
    record, verdict = evaluate(args)
    console = Console()
    show(record, console)
    if verdict:
        # soft_wrap, because the command in it must stay one line to be copied
        console.print(verdict, markup=False, soft_wrap=True)
    out = Path(args.out)
    console.print(f"written: {out / 'eval.json'}, {out / 'alpha.png'}")


if __name__ == "__main__":
    main(sys.argv[1:])
