"""The embedded default: Spec-AUF's claim on real text, on two CPU cores, with no Hub access.

`python -m hf_specauf.quickstart` trains a small real target (Qwen3 architecture) on the source of
Python's standard library and keeps it in the user's cache; trains a decay-only and an AUF drafter
from two recipes that differ in `objective` alone; evaluates both on held-out files; and writes
`report.json`, two plots and the drafter folders.
"""

import argparse
import json
from dataclasses import asdict, fields
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import AutoModel, AutoModelForCausalLM

from .cli import errors_in_one_line
from .demo.rows import heldout_prompts, heldout_rows, training_rows
from .demo.target import TargetSettings, quickstart_target
from .evaluation.compare import compare
from .evaluation.plots import plot_alpha, plot_curves
from .evaluation.record import evaluation_record
from .keys import ONE_OR_MORE, SEED, Numbers, check_keys
from .recipe import parse
from .records import check_can_write, write_record
from .serving.acceptance import TAU_DEFINITION
from .train import train

# what DFlash was published with, and what replaces it
OBJECTIVES = ("decay", "auf")
# flags that take a number
NUMBERS = {
    "seed": SEED,
    "steps": ONE_OR_MORE,
    "prompts": ONE_OR_MORE,
    # the first token comes from the prefill, so one token says nothing of a drafter
    "new_tokens": Numbers(2, whole=True),
}
HELDOUT_PROMPT_TOKENS = 96  # of a held-out prompt
# Greedily so small a target soon repeats itself, and what repeats is easy to draft. Sampled at this
# temperature hardly one of its 4-grams is a repeat.
TEMPERATURE = 0.7
CHECKED_PROMPTS = 4  # answered greedily, because only greedy outputs can be compared


def recipes_folder() -> Path:
    """`recipes/` inside an installed package, or beside it in a checkout."""
    here = Path(__file__).parent
    return here / "recipes" if (here / "recipes").is_dir() else here.parent / "recipes"


# ---- the drafters


def train_drafter(target: Path, recipe: Path, out: Path, *overrides: str) -> dict:
    """Train one drafter of the quickstart target into `out`, going on where an interrupted run
    stopped; a finished one is kept. Returns its provenance.

    Raises:
        SystemExit: `out` holds a drafter of another recipe, or training was interrupted.
    """
    keys = {
        "config": recipe,
        "target": target,
        "output_dir": out,
        "dataset_name": training_rows(target),
        "eval_dataset_name": heldout_rows(target),
        "resume_from_checkpoint": "true",
    }
    words = []
    for key, value in keys.items():
        words += [f"--{key}", str(value)]
    arguments = parse([*words, *overrides])
    record = out / "provenance.json"
    if record.is_file():
        provenance = json.loads(record.read_text())
        if not is_of_recipe(provenance, arguments):
            raise SystemExit(
                f"{out} holds a drafter of another recipe: give another --out, or remove that"
                " folder"
            )
        print(f"{out}: already trained")
        return provenance
    # both drafters are compared at the end, on more prompts
    trainer = train(*arguments, compare_decoding=False)
    if trainer.state.global_step < trainer.state.max_steps:
        raise SystemExit("stopped early; the same command goes on from here")
    return json.loads(record.read_text())


def is_of_recipe(provenance: dict, arguments: tuple) -> bool:
    """Whether a finished drafter is what a recipe's arguments (target, drafter, data, training)
    would make."""
    *parts, training = arguments
    wanted = {}
    for part in parts:
        wanted |= asdict(part)
    # of the Trainer's many arguments, those that the quickstart and the studies change
    for key in ("objective", "normalisation", "max_steps", "seed"):
        wanted[key] = getattr(training, key)
    made = provenance["recipe"]
    # a record older than a key was made with that key's default
    defaults = {field.name: field.default for part in arguments for field in fields(part)}
    made = defaults | made
    # `None` leaves a key to be derived, and the record holds what was derived
    return all(made[key] == value for key, value in wanted.items() if value is not None)


# ---- what came of it


def last(history: list[dict], key: str) -> float:
    """The newest logged value of a metric."""
    return [entry[key] for entry in history if key in entry][-1]


def evaluate_drafter(
    target_folder: Path,
    folder: Path,
    provenance: dict,
    prompts: int,
    new_tokens: int,
    temperature: float = TEMPERATURE,
) -> dict:
    """Compare plain and assisted decoding of one drafter on held-out prompts, and on a few of them
    greedily; writes `eval.json` beside it. Returns its row of the report."""
    target = AutoModelForCausalLM.from_pretrained(target_folder).eval()
    # from its folder, so that what is measured is what was saved
    drafter = AutoModel.from_pretrained(folder)
    given = heldout_prompts(target_folder, prompts, HELDOUT_PROMPT_TOKENS)
    pad = target.config.pad_token_id
    results = compare(target, drafter, given, new_tokens, temperature=temperature, pad_token_id=pad)
    greedy = compare(target, drafter, given[:CHECKED_PROMPTS], new_tokens, pad_token_id=pad)
    record = evaluation_record(
        results,
        target,
        prompts="held-out files of Python's standard library",
        temperature=temperature,
        max_new_tokens=new_tokens,
        prompt_tokens=HELDOUT_PROMPT_TOKENS,
    )
    write_record(folder / "eval.json", record)
    recipe, history = provenance["recipe"], provenance["history"]
    acceptance = results["acceptance"]
    plot_alpha({recipe["objective"]: acceptance}, folder / "alpha.png")
    return {
        "objective": recipe["objective"],
        "normalisation": recipe["normalisation"],
        "seed": recipe["seed"],
        "tau": acceptance["tau"],
        "alpha": acceptance["alpha"],
        "histogram": acceptance["histogram"],
        "common_accuracy": last(history, "eval_common_accuracy"),
        "active_ratio": last(history, "eval_active_ratio"),
        "tokens_per_second": results["tokens_per_second"],
        "plain_tokens_per_second": results["plain_tokens_per_second"],
        "speedup": results["speedup"],
        "temperature": temperature,
        "repetition": results["repetition"],
        "prompts": prompts,
        "lossless": greedy["lossless"]["different"] == 0,
        "greedy_outputs": greedy["lossless"],
        "path": str(folder),
    }


def plot_tau(histories: dict[str, list[dict]], path: Path) -> None:
    """tau on held-out files over training steps."""
    curves = {}
    for name, history in histories.items():
        curves[name] = [
            (entry["step"], entry["eval_teacher_forced_tau"])
            for entry in history
            if "eval_teacher_forced_tau" in entry
        ]
    plot_curves(
        curves,
        path,
        xlabel="training step",
        ylabel="tau (bonus included)",
        title="tau on held-out files, read instead of written",
    )


def write_report(out: Path, rows: list[dict], provenances: dict[str, dict]) -> None:
    """Write `report.json` and the two plots.

    Args:
        rows (`list[dict]`): of each drafter, from [`evaluate_drafter`].
        provenances (`dict[str, dict]`): of each drafter, by its objective.
    """
    plain = [row["plain_tokens_per_second"] for row in rows]
    report = {
        # measured once beside each drafter
        "plain_tokens_per_second": sum(plain) / len(plain),
        "tau_definition": TAU_DEFINITION,
        "drafters": rows,
        "recipes": {name: record["recipe"] for name, record in provenances.items()},
    }
    write_record(out / "report.json", report)
    plot_alpha({row["objective"]: row for row in rows}, out / "alpha.png")
    plot_tau({name: record["history"] for name, record in provenances.items()}, out / "tau.png")


def show_report(rows: list[dict], title: str, console: Console) -> None:
    """Print a table with a line for each drafter."""
    table = Table(title=title)
    table.add_column("drafter")
    columns = ("tau", "token accuracy", "tokens/s", "plain", "speed-up", "repeated", "identical")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        checked = sum(row["greedy_outputs"].values())
        table.add_row(
            row["objective"],
            f"{row['tau']:.3f}",
            f"{row['common_accuracy']:.3f}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['plain_tokens_per_second']:.0f}",
            f"{row['speedup']:.2f}x",
            "-" if row["repetition"] is None else f"{row['repetition']:.0%}",
            "{identical} of {checked}".format(**row["greedy_outputs"], checked=checked),
        )
    console.print(table)


# ---- the command


def command_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="specauf quickstart", description=__doc__.split("\n\n")[1]
    )
    add = parser.add_argument
    add("--out", default="out/quickstart", help="folder for report, plots and drafters")
    add("--seed", type=int, default=0, help="seed of both drafters (default 0)")
    add("--steps", type=int, help="training steps of each drafter (default: the recipes')")
    add("--prompts", type=int, default=24, help="held-out prompts of the final comparison")
    add("--new_tokens", type=int, default=32, help="tokens generated for each prompt")
    return parser


@errors_in_one_line()
def main(argv: list[str] | None = None, settings: TargetSettings | None = None) -> None:
    """Command line of `python -m hf_specauf.quickstart`.

    Args:
        settings (`TargetSettings`, *optional*): another target than the quickstart's, for tests.
    """
    args = command_parser().parse_args(argv)
    # Before anything is trained: a wrong number of prompts would be noticed only at the end.
    check_keys(args, NUMBERS)
    out = Path(args.out)
    check_can_write("--out", out)
    out.mkdir(parents=True, exist_ok=True)
    target = quickstart_target(settings or TargetSettings())
    overrides = ["--seed", str(args.seed)]
    if args.steps is not None:
        overrides += ["--max_steps", str(args.steps)]
    rows, provenances = [], {}
    for objective in OBJECTIVES:
        recipe = recipes_folder() / "quickstart" / f"dflash_{objective}.yaml"
        print(f"\n== drafter: {objective} ({recipe})")
        record = train_drafter(target, recipe, out / objective, *overrides)
        provenances[objective] = record
        rows.append(
            evaluate_drafter(target, out / objective, record, args.prompts, args.new_tokens)
        )
    write_report(out, rows, provenances)
    console = Console()
    title = (
        f"{args.prompts} held-out prompts, {args.new_tokens} new tokens each, temperature"
        f" {TEMPERATURE}"
    )
    show_report(rows, title, console)
    console.print(
        f"{TAU_DEFINITION}.\nrepeated: of the 4-grams that plain decoding wrote. identical: greedy"
        f" outputs of {CHECKED_PROMPTS} prompts, compared with plain decoding's.\nwritten:"
        f" {out / 'report.json'}, alpha.png, tau.png and the drafter folders beside it",
        markup=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
