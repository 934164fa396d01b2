"""Two evaluations beside each other: of two drafters on the same prompts, and of one drafter on
another target than its own."""

import argparse
import shlex
from pathlib import Path

from ..cli import under_new_spelling
from ..identity import Identity
from ..records import named_file, read_record, write_record
from ..serving.acceptance import number
from .intervals import difference_of_ratios, figure, ratio_of_ratios
from .record import differing_conditions
from .rows import tokens_and_passes

# What a comparison says of the clock, and what tau is.
SPEED = ("new_tokens", "assisted_seconds")
# A drafter that keeps this share of its accepted tokens on another target has little to win.
ENOUGH = 0.95


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


def adapting(args) -> str:
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


# ---- two evaluations of the same prompts


def paired(first: dict, second: dict) -> list[tuple[dict, dict]]:
    """The rows of two evaluations, by prompt.

    Raises:
        ValueError: they have no prompt in common.
    """
    rows, others = first["prompts"], second["prompts"]
    if all("prompt" in row for row in rows + others):
        by_key = {row["prompt"]: row for row in others}
        pairs = [(row, by_key[row["prompt"]]) for row in rows if row["prompt"] in by_key]
    else:
        # Older files name no prompts. The same lengths in the same order are the same prompts.
        lengths = [[row["prompt_tokens"] for row in of] for of in (rows, others)]
        pairs = list(zip(rows, others)) if lengths[0] == lengths[1] else []
    if not pairs:
        raise ValueError(
            "the two evaluations have no prompt in common, so that their difference may be the"
            " prompts': give both commands the same --prompts and --count"
        )
    return pairs


def compare_records(first: dict, second: dict) -> dict:
    """The second evaluation less the first, paired by prompt.

    Returns:
        dict with the common `prompts`, `tau` of both, `tau_difference` and `speed_ratio` (second
        over first) with intervals, and the conditions that are `different`.
    """
    pairs = paired(first, second)
    taus, speeds = [], []
    for one, other in pairs:
        taus.append([*tokens_and_passes(other), *tokens_and_passes(one)])
        speeds.append([row[key] for row in (other, one) for key in SPEED])
    sums = [sum(column) for column in zip(*taus)]
    return {
        "prompts": len(pairs),
        "of_prompts": [len(first["prompts"]), len(second["prompts"])],
        "tau": [sums[2] / sums[3] if sums[3] else None, sums[0] / sums[1] if sums[1] else None],
        "tau_difference": figure(taus, difference_of_ratios).to_dict(),
        "speed_ratio": figure(speeds, ratio_of_ratios).to_dict(),
        "different": different(first, second),
    }


def different(first: dict, second: dict) -> list[str]:
    """What differs between two evaluations beside their drafters, in words."""
    found = differing_conditions(second, first)
    for key in ("hardware", "dtype"):
        there, here = (record["conditions"].get(key) for record in (first, second))
        if there != here:
            found.append(f"{key} {there} there, {here} here")
    if not Identity.read(first).is_same_model(Identity.read(second)):
        names = [record["target"]["name_or_path"] for record in (first, second)]
        found.append(f"the target is {names[0]} there, {names[1]} here")
    return found


def comparison_words(found: dict, names: list[str]) -> list[str]:
    """A comparison of two records in words, the verdict first.

    Args:
        found (`dict`): from [`compare_records`].
        names (`list[str]`): of the two.
    """
    tau, speed = found["tau_difference"], found["speed_ratio"]
    words = [f"{names[1]} beside {names[0]}, on the same {found['prompts']} prompts:"]
    taus = " and ".join(number(one) for one in reversed(found["tau"]))
    words.append(f"tau {taus}, {sure(tau, 0, '+.2f', 'higher', 'lower')}")
    rate = sure(speed, 1, ".2f", "faster", "slower")
    words.append(f"tokens/s of the drafter alone, second over first: {rate}")
    if found["different"]:
        words.append(
            "Beside the drafters this differs, and may be what makes the difference:"
            f" {'; '.join(found['different'])}."
        )
    return words


def sure(figure: dict, nothing: float, form: str, more: str, less: str) -> str:
    """A difference with its interval, and whether it is one."""
    if figure["value"] is None:
        return "not measured."
    said = f"{figure['value']:{form}}"
    if figure["interval"] is None:
        return f"{said}; one prompt says nothing of others."
    low, high = figure["interval"]
    verdict = "no clear difference"
    if low > nothing:
        verdict = f"clearly {more}"
    elif high < nothing:
        verdict = f"clearly {less}"
    return f"{said} (95 %: {low:{form}} to {high:{form}}): {verdict}."


def compare_files(argv: list[str]) -> None:
    """`specauf evaluate --compare a.json b.json`: two evaluations of the same prompts."""
    parser = argparse.ArgumentParser(
        prog="specauf evaluate", description="Compare two evaluations of the same prompts."
    )
    add = parser.add_argument
    add(
        "--compare",
        nargs=2,
        required=True,
        metavar="EVAL.json",
        help="two files of evaluate, or their folders",
    )
    add("--out", default="eval", help="folder for comparison.json (default eval)")
    args = parser.parse_args(under_new_spelling(argv))
    files = [named_file(path, "eval.json", "specauf evaluate") for path in args.compare]
    found = compare_records(*map(read_record, files))
    found["files"] = args.compare
    for line in comparison_words(found, args.compare):
        print(line)
    path = Path(args.out) / "comparison.json"
    write_record(path, found)
    print(f"written: {path}")
