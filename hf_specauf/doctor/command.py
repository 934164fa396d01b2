"""The command that examines a recipe before it is trained, or a drafter before it is published:
`specauf doctor`."""

import json
import sys
from argparse import ArgumentParser, Namespace
from contextlib import redirect_stdout

import torch
from rich.console import Console
from rich.markup import escape

from ..cli import errors_in_one_line, under_new_spelling
from ..keys import check_keys
from ..recipe import TargetArguments
from ..target import check_device
from . import pair, run, serving, shape, words
from .findings import FAIL, PASS, SKIP, WARN, Check, Finding, examine
from .pair import Pair
from .patient import QUESTIONS
from .run import Run

# Of a drafter and its target, in the order in which they are asked.
LOADED = ("target", "drafter")
OF_PAIR = {
    "versions": Check(serving.versions),
    "folder": Check(pair.folder),
    "dtype": Check(pair.dtype, ("folder",)),
    "target": Check(pair.target),
    "target's weights": Check(pair.head, ("target",)),
    "adapter base": Check(pair.adapter_base, ("folder", "target")),
    "drafter": Check(pair.drafter, ("folder", "dtype", "target")),
    "pair": Check(pair.pair_of, LOADED),
    "vocabulary": Check(pair.vocabulary, LOADED),
    "record": Check(pair.record_of_training, LOADED),
    "chat template": Check(words.chat_template, LOADED),
    "thinking": Check(words.thinking, LOADED),
    "end tokens": Check(words.end_of_answers, LOADED),
    "serving prompt": Check(words.serving_prompt, LOADED),
    "mask token": Check(shape.mask_token, LOADED),
    "taps": Check(shape.taps, LOADED),
    "taps and head": Check(serving.taps_and_head, LOADED),
    "RoPE and window": Check(shape.rope_and_window, LOADED),
    "label alignment": Check(shape.label_alignment, LOADED),
    "context leak": Check(shape.context_leak, LOADED),
    "acceptance": Check(serving.acceptance, LOADED),
    "training against serving": Check(serving.training_against_serving, LOADED),
    "lossless": Check(serving.lossless, LOADED),
    "clean process": Check(serving.clean_process, ("folder", "drafter")),
}
# Of a recipe.
STARTED = ("target", "drafter", "decoding")
WITH_ROWS = (*STARTED, "supervision")
OF_RUN = {
    "versions": Check(serving.versions),
    "recipe": Check(run.recipe),
    "data": Check(run.data, ("recipe",)),
    "target": Check(pair.target, ("recipe",)),
    "target's weights": Check(pair.head, ("target",)),
    "drafter": Check(run.drafter, ("target",)),
    "template's arguments": Check(words.template_arguments, ("drafter",)),
    "decoding": Check(run.decoding, ("drafter",)),
    "end tokens": Check(words.end_of_answers, ("drafter",)),
    "taps and head": Check(serving.taps_and_head, STARTED),
    "supervision": Check(run.supervision, (*STARTED, "data")),
    "serving prompt": Check(run.prompts_of_training, WITH_ROWS),
    "on-policy": Check(run.on_policy, WITH_ROWS),
    "context leak": Check(run.context_leak, WITH_ROWS),
    "label alignment": Check(run.label_alignment, STARTED),
    "training against serving": Check(serving.training_against_serving, STARTED),
    "lossless": Check(serving.lossless, STARTED),
    "first step": Check(run.first_step, WITH_ROWS),
}
ROWS = 256  # of each source, that are looked at
# How well a new drafter drafts is not asked. So a recipe needs fewer texts than a drafter.
COUNT_OF_RECIPE = 3
COLOURS = {PASS: "green", WARN: "yellow", FAIL: "bold red", SKIP: "dim"}


def show(finding: Finding, console: Console) -> None:
    """Print one line, and below it what mends it."""
    colour = COLOURS[finding.verdict]
    console.print(
        f"[{colour}]{finding.verdict}[/]  [bold]{finding.check}[/]: {escape(finding.says)}",
        highlight=False,
        soft_wrap=True,
    )
    if finding.mend:
        console.print(f"      mend: {escape(finding.mend)}", highlight=False, soft_wrap=True)


def counts(findings: list[Finding]) -> str:
    """How many of each verdict, in words."""
    numbers = {verdict: 0 for verdict in COLOURS}
    for finding in findings:
        numbers[finding.verdict] += 1
    return ", ".join(f"{number} {verdict}" for verdict, number in numbers.items() if number)


def arguments() -> ArgumentParser:
    """The command's flags. In front of a recipe, flags that are not among them are its keys."""
    parser = ArgumentParser(
        prog="specauf doctor",
        description="Find what makes a drafter slow. Either a finished drafter and its target"
        " (--drafter, --target), or a recipe before it is trained (--config, and any of its keys)."
        " The exit status is 1 where a line says FAIL.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", help="a recipe of specauf train; its other flags may follow")
    add("--drafter", help="Hub id or folder of a drafter")
    add("--drafter_revision", help="branch, tag or commit of the drafter")
    add("--target", help="Hub id or folder of the target")
    add("--target_revision", help="branch, tag or commit of the target")
    add("--dtype", help="of the target: auto (as stored), float32 or bfloat16 (default: auto; on"
        " CPUs float32, in which most are faster, and nothing is a near-tie)")  # fmt: skip
    add("--device", help="cuda or cpu (default: cuda where there is one)")
    add("--prompts", help="a benchmark, data set or file that the target continues (default: a few"
        " built-in questions)")  # fmt: skip
    add("--count", type=int, help=f"prompts that it continues (default {len(QUESTIONS)}, and"
        f" {COUNT_OF_RECIPE} with --config)")  # fmt: skip
    add("--max_new_tokens", type=int, default=40, help="tokens after each (default 40)")
    add("--rows", type=int, help="of a recipe: rows of each source that are looked at (default"
        f" {ROWS})")  # fmt: skip
    add("--json", action="store_true", help="print the lines as JSON")
    return parser


def patient_of(argv: list[str]) -> tuple[Pair | Run, dict[str, Check], Namespace]:
    """What a command line asks about, by which checks."""
    argv = under_new_spelling(argv)
    parser = arguments()
    args, rest = parser.parse_known_args(argv)
    check_keys(args)
    for key, least in (("count", 1), ("max_new_tokens", 4), ("rows", 1)):
        given = getattr(args, key)
        if given is not None and given < least:
            parser.error(f"--{key} is {given}: give at least {least}")
    count = args.count or (len(QUESTIONS) if args.config is None else COUNT_OF_RECIPE)
    if args.prompts is None and count > len(QUESTIONS):
        parser.error(f"--count is {count}, and {len(QUESTIONS)} questions are built in: give more"
                     " with --prompts")  # fmt: skip
    asked = {"prompts": args.prompts, "count": count, "max_new_tokens": args.max_new_tokens}
    if args.config is not None:
        for flag, key in (("device", "use_cpu"), ("dtype", "target_dtype")):
            if getattr(args, flag) is not None:
                parser.error(f"--{flag} is not for a recipe, which has a key of its own: {key}")
        # The recipe's parser reads its own flags again, --target and --drafter among them.
        own = ("--prompts", "--count", "--max_new_tokens", "--rows")
        return Run(without(argv, own, ("--json",)), args.rows or ROWS, **asked), OF_RUN, args
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.drafter is None or args.target is None:
        parser.error("give --drafter and --target, or a recipe with --config")
    if args.rows is not None:
        parser.error("--rows is for a recipe, and there is no --config: leave it out")
    return pair_of(args, asked), OF_PAIR, args


def pair_of(args: Namespace, asked: dict) -> Pair:
    """The drafter and the target that a command line names."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    dtype = args.dtype or ("float32" if device == "cpu" else "auto")
    loading = TargetArguments(args.target, target_dtype=dtype).loading()
    return Pair(
        args.drafter, args.drafter_revision, args.target, args.target_revision, loading,
        device=device, **asked,
    )  # fmt: skip


def without(argv: list[str], flags: tuple[str, ...], switches: tuple[str, ...]) -> list[str]:
    """A command line without some flags and their values, and without some switches."""
    kept, skip = [], False
    for word in argv:
        if skip:
            skip = False
            continue
        name, equals, _ = word.partition("=")
        if name in flags:
            skip = not equals
        elif name not in switches:
            kept.append(word)
    return kept


@errors_in_one_line()
def main(argv: list[str] | None = None) -> None:
    """Command line of `specauf doctor`.

    Raises:
        SystemExit: 1 where a line says FAIL.
    """
    patient, checks, args = patient_of(sys.argv[1:] if argv is None else argv)
    console = Console(file=sys.stdout)
    aside = Console(stderr=True)
    findings = []
    # What the checked parts print is not the doctor's word.
    with redirect_stdout(sys.stderr), aside.status("examining") as status:
        names = [*list(checks)[1:], "done"]
        for finding, following in zip(examine(patient, checks), names):
            findings.append(finding)
            status.update(following)
            if not args.json:
                show(finding, console)
    if args.json:
        print(json.dumps([finding.record() for finding in findings], indent=2))
    else:
        console.print(counts(findings))
    if any(finding.verdict == FAIL for finding in findings):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
