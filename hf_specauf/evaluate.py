"""The command that compares plain decoding with a drafter's, in one run -> eval.json, a page,
pictures and a verdict: `specauf evaluate`."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import TrlParser

from .cli import OneSpelling, errors_in_one_line
from .data.conversation import stop_at_both_ends
from .evaluation.compare import compare
from .evaluation.differences import is_low_precision
from .evaluation.intervals import DRAWS
from .evaluation.kept import KeptRows, is_first_process, join_processes, open_rows
from .evaluation.page import page
from .evaluation.plots import save_pictures
from .evaluation.record import evaluation_record
from .evaluation.table import PAIR, show
from .evaluation.two_records import (
    adapting,
    compare_files,
    refuse_to_overwrite,
    transfer_verdict,
)
from .evaluation.ways import (
    ALWAYS,
    ASSISTANT,
    DEFAULT_WAYS,
    GIVEN,
    WAYS,
    Way,
    choose_ways,
    names_of,
)
from .identity import Identity
from .keys import ONE_OR_MORE, Numbers, check_keys
from .layouts.folders import fetch
from .layouts.load import load_drafter, torch_dtype
from .recipe import CHOICES, TargetArguments
from .records import check_can_write, read_record, write_record, write_whole
from .serving.benchmarks import (
    BENCHMARKS,
    DEFAULT_COUNT,
    PromptSet,
    encode_prompts,
    load_prompts,
)
from .serving.decoding import AUTO
from .target import check_device, check_target, load_target, room_for_prompt

SEED = 0  # of every sampled output
# Flags that take a number.
NUMBERS = {
    "count": ONE_OR_MORE,
    "draft_lengths": ONE_OR_MORE,
    "prompt_tokens": ONE_OR_MORE,
    # the first token comes from the prefill, so one token says nothing of a drafter
    "max_new_tokens": Numbers(2, whole=True),
    "temperature": Numbers(0, hint="; 0 is greedy"),
}


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
    ways: list[str] | None = field(
        default=None,
        metadata={
            "help": f"Ways to decode beside plain and drafter (default {' '.join(DEFAULT_WAYS)}):"
            f" {', '.join(WAYS)}."
        },
    )
    draft_lengths: list[int] | None = field(
        default=None, metadata={"help": "Fixed draft lengths, each of them one more way."}
    )
    also: list[str] | None = field(
        default=None, metadata={"help": "Other drafters, each one more way: Hub ids or folders."}
    )
    assistant: str | None = field(
        default=None,
        metadata={
            "help": "A small model of the target's vocabulary, which drafts in one more way."
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
    out: str = field(
        default="eval", metadata={"help": "Folder for eval.json, report.html and plots."}
    )

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
        self.choose_ways()
        check_device(self.device)
        check_target("--target", self.target, self.target_revision)
        if self.assistant is not None:
            check_target("--assistant", self.assistant)
        check_can_write("--out", self.out)

    def choose_ways(self) -> dict[str, Way]:
        """The ways to decode, by name.

        Raises:
            ValueError: there is no such way, or it lacks something.
        """
        names = self.ways
        if names is None:
            names = ALWAYS if self.lookup == "off" else DEFAULT_WAYS
        if self.lookup == "off" and {"drafter_and_lookup", "lookup_alone"} & {*names}:
            raise ValueError("--lookup off, and --ways that look up: leave out one of the two")
        if self.assistant is not None:
            names = [*names, ASSISTANT]
        elif ASSISTANT in names:
            raise ValueError(f"--ways {ASSISTANT} needs a small model: --assistant ID")
        return choose_ways(
            names,
            draft_length=self.draft_length,
            lookup=self.lookup,
            draft_lengths=self.draft_lengths or (),
            others=names_of(self.also or ()),
        )


class EvaluateParser(OneSpelling, TrlParser):
    """The parser of `specauf evaluate`; `--config FILE` may hold the flags."""

    renamed = {"--max_draft_tokens": "--draft_length"}


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


def load_others(args: EvaluateArguments, target: PreTrainedModel) -> dict[str, PreTrainedModel]:
    """The assistant and the other drafters, by the names that ways give them."""
    models = {}
    if args.assistant is not None:
        small, _ = load_target(args.assistant, None, key="--assistant", dtype=args.dtype)
        models[ASSISTANT] = small.to(args.device)
    also = args.also or []
    for name, drafter in zip(names_of(also), also):
        folder, _ = fetch(drafter, None, "--also")
        loaded = load_drafter(folder, target=target, dtype=torch_dtype(args.dtype), key="--also")
        models[name] = loaded.to(args.device)
    return models


def conditions_of(args: EvaluateArguments, source: PromptSet, drafter) -> dict:
    """What a measurement is made under, as `eval.json` says it."""
    return {
        "temperature": args.temperature,
        "max_new_tokens": args.max_new_tokens,
        "draft_length": args.draft_length,
        "lookup": args.lookup,
        "chat_template_kwargs": drafter.config.chat_template_kwargs,
        "target_quantization": args.target_quantization,
        # of chats, the question is the prompt, whatever its length
        "prompt_tokens": args.prompt_tokens if source.is_text else None,
        **source.conditions,
    }


def measure(
    args: EvaluateArguments,
    source: PromptSet,
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    drafter: PreTrainedModel,
    identity: Identity,
) -> tuple[dict, KeptRows]:
    """Decode the prompts in all ways -> the record, with its conditions, and the rows on disk,
    which it makes superfluous."""
    conditions = conditions_of(args, source, drafter)
    prompts = encode_prompts(
        source.rows,
        tokenizer,
        source.count if args.count is None else args.count,
        args.prompt_tokens,
        drafter.config.chat_template_kwargs,
        source.wording,
        room_for_prompt(target, args.max_new_tokens),
    )
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = tokenizer.eos_token_id
    ways = args.choose_ways()
    if args.temperature == 0 and is_low_precision(target.dtype):
        # Near-ties are to be expected. This way shows that they need no drafter.
        ways |= {PAIR: WAYS[PAIR]}
    models = load_others(args, target) | {GIVEN: drafter}
    rows = open_rows(
        Path(args.out),
        ways,
        models,
        target=identity.record() | {"dtype": target.dtype},
        conditions=conditions,
        seed=SEED,
        device=args.device.partition(":")[0],
    )
    results = compare(
        target,
        drafter,
        [prompt.to(args.device) for prompt in prompts],
        args.max_new_tokens,
        temperature=args.temperature,
        pad_token_id=pad,
        ways=ways,
        models=models,
        teacher_forced=True,
        rows=rows,
        seed=SEED,
        show_progress=is_first_process(),
    )
    return evaluation_record(results, target, **conditions), rows


def evaluate(args: EvaluateArguments) -> tuple[dict, str]:
    """Measure a drafter; write `eval.json`, `report.html` and the pictures. All processes call it,
    and the first one writes.

    Returns:
        the record in `eval.json`, and the verdict of `transfer_verdict`.
    """
    join_processes(args)
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
    for drafter in args.also or []:
        fetch(drafter, None, "--also")
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
    record, rows = measure(args, source, target, tokenizer, drafter, identity)
    record["target"] |= identity.record()
    # by the name the user gave, where the drafter was loaded from a folder of the cache
    record["drafter"] = {
        "name_or_path": args.drafter,
        "revision": commit,
        "dtype": str(drafter.dtype),
    }
    record["measuring"] = {"seed": SEED, "bootstrap_draws": DRAWS, "also": args.also}
    record["measuring"] |= {"assistant": args.assistant}
    if is_first_process():
        write_record(out / "eval.json", record)
        save_pictures(record, out)
        write_whole(out / "report.html", page(record))
        rows.remove()
    return record, transfer_verdict(record, drafter.config, reference, adapting(args))


@errors_in_one_line()
def main(argv: list[str] | None = None) -> None:
    """Command line of `specauf evaluate` and of `python -m hf_specauf.evaluate`."""
    argv = sys.argv[1:] if argv is None else argv
    if "--compare" in argv:
        compare_files(argv)
        return
    parser = EvaluateParser(
        EvaluateArguments,
        prog="specauf evaluate",
        description="Decode prompts plainly and with a drafter, and compare: tau, tokens a second,"
        " and whether the outputs are equal. --compare A/eval.json B/eval.json compares two such"
        " files of the same prompts.",
    )
    (args,) = parser.parse_args_and_config(argv)
    try:
        record, verdict = evaluate(args)
    except KeyboardInterrupt as stop:
        # It is no success: a script must not go on to publish.
        raise SystemExit("stopped: what was measured is kept. The same command goes on.") from stop
    if not is_first_process():
        return
    console = Console()
    show(record, console)
    if verdict:
        # Commands and paths are to be copied, so that no line of them may be broken.
        console.print(verdict, markup=False, soft_wrap=True)
    out = Path(args.out)
    written = f"written: {out / 'report.html'}, {out / 'eval.json'} and the plots beside them"
    console.print(written, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main(sys.argv[1:])
