"""Domino against DFlash at equal budget on the quickstart target: tau at T = 0 and T = 1, drafting time, tokens/s.

    python tests/benchmarks/domino_study.py [--quick] [--json PATH] [--seeds 0 1 2] [--steps 240]

Every run of a seed sees the same rows and anchors for as many steps; the objective and the causal head differ. Runs
that are already in --out are kept, so an interrupted study goes on. The quickstart target is trained first where it is
not cached.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from datetime import date
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import AutoModel, AutoModelForCausalLM

from hf_specauf.demo.rows import heldout_prompts
from hf_specauf.demo.target import TargetSettings, quickstart_target
from hf_specauf.evaluation.compare import compare
from hf_specauf.quickstart import last, recipes_folder, train_drafter
from hf_specauf.records import environment

# the published head has a state of H / 4 and rank H / 16; H is 192 here, so that both are kept from being tiny
HEAD = ["--drafter_type", "domino", "--gru_hidden_dim", "96", "--emb_dim", "48"]
VARIANTS = {
    "DFlash decay": ["--objective", "decay"],
    "DFlash AUF": ["--objective", "auf"],
    "Domino decay": [*HEAD, "--objective", "domino_decay"],
    "Domino B-AUF": [*HEAD, "--objective", "b_auf"],
    "Domino S-AUF": [*HEAD, "--objective", "s_auf"],
    "Domino F-AUF": [*HEAD, "--objective", "f_auf"],
    "Domino B-AUF+decay": [*HEAD, "--objective", "b_auf_decay"],
}
PAPER = (
    "the paper, Qwen3-8B, mean of six: DFlash decay 2.40, AUF 2.61; Domino decay 2.56, B-AUF 2.66, S-AUF 2.63, "
    "F-AUF 2.63, B-AUF+decay 2.68"
)


def time_drafts(drafter) -> list[float]:
    """Seconds of every block that is drafted from here on."""
    make, seconds = drafter.get_drafts, []

    def make_timed(*args, **keys):
        drafts = make(*args, **keys)
        propose = drafts.propose

        def timed(*args):
            start = time.perf_counter()
            draft = propose(*args)
            if draft is not None:
                seconds.append(time.perf_counter() - start)
            return draft

        drafts.propose = timed
        return drafts

    drafter.get_drafts = make_timed
    return seconds


def measure(target_folder: Path, folder: Path, provenance: dict, prompts: int, new_tokens: int) -> dict:
    """One drafter on held-out prompts, greedy and sampled."""
    target, drafter = AutoModelForCausalLM.from_pretrained(target_folder).eval(), AutoModel.from_pretrained(folder)
    given = heldout_prompts(target_folder, prompts, 96)
    row = {"parameters": provenance["trainable_parameters"], "seconds": provenance["seconds"]}
    row |= {key: last(provenance["history"], f"eval_{key}") for key in ("common_accuracy", "teacher_forced_tau")}
    for temperature in (0.0, 1.0):
        seconds = time_drafts(drafter)
        results = compare(target, drafter, given, new_tokens, temperature=temperature, pad_token_id=1)
        del drafter.get_drafts
        row[f"T={temperature:g}"] = {
            "tau": results["acceptance"]["tau"], "alpha": results["acceptance"]["alpha"],
            "tokens_per_second": results["tokens_per_second"],
            "plain_tokens_per_second": results["plain_tokens_per_second"], "speedup": results["speedup"],
            "lossless": results["lossless"], "milliseconds_a_block": 1000 * statistics.median(seconds),
        }  # fmt: skip
    return row


def mean(runs: list[dict], temperature: str, key: str) -> float:
    return statistics.mean(run[temperature][key] for run in runs)


def table_of(rows: dict[str, list[dict]], title: str) -> Table:
    table = Table(title=title)
    columns = (
        "drafter, objective",
        "tau, T=0 per seed",
        "mean",
        "tau, T=1 mean",
        "accuracy",
        "ms a block",
        "tokens/s",
    )
    for column in (*columns, "speed-up", "lossless"):
        table.add_column(column, justify="left" if column == columns[0] else "right")
    for name, runs in rows.items():
        table.add_row(
            name,
            " ".join(f"{run['T=0']['tau']:.3f}" for run in runs),
            f"{mean(runs, 'T=0', 'tau'):.3f}",
            f"{mean(runs, 'T=1', 'tau'):.3f}",
            f"{statistics.mean(run['common_accuracy'] for run in runs):.3f}",
            f"{mean(runs, 'T=0', 'milliseconds_a_block'):.1f}",
            f"{mean(runs, 'T=0', 'tokens_per_second'):.0f}",
            f"{mean(runs, 'T=0', 'speedup'):.2f}",
            "yes" if all(run["T=0"]["lossless"]["different"] == 0 for run in runs) else "NO",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three variants, one seed, 20 steps: about two minutes")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("out/domino_study"))
    args = parser.parse_args()
    variants, seeds, steps, prompts, out, new_tokens = VARIANTS, args.seeds, args.steps, args.prompts, args.out, 96
    if args.quick:
        variants = {name: VARIANTS[name] for name in ("DFlash AUF", "Domino decay", "Domino B-AUF")}
        seeds, steps, prompts, out, new_tokens = [0], 20, 3, args.out.with_name(args.out.name + "_quick"), 32
    target = quickstart_target(TargetSettings(steps=400))
    rows: dict[str, list[dict]] = {name: [] for name in variants}
    for seed in seeds:
        for name, overrides in variants.items():
            folder = out / f"{name.lower().replace(' ', '_').replace('+', '_')}-{steps}-seed{seed}"
            settings = ["--seed", str(seed), "--max_steps", str(steps), "--eval_prompts", "0"]
            settings += ["--eval_strategy", "no", "--save_strategy", "no", "--disable_tqdm", "true"]
            print(f"\n== {name}, seed {seed}", flush=True)
            recipe = recipes_folder() / "quickstart/dflash_auf.yaml"
            record = train_drafter(target, recipe, folder, *overrides, *settings)
            kept = folder / f"row-{prompts}.json"
            if not kept.is_file():
                kept.write_text(json.dumps(measure(target, folder, record, prompts, new_tokens)))
            rows[name].append(json.loads(kept.read_text()))
    title = f"K = 16, {steps} steps, seeds {seeds}, {prompts} held-out prompts x {new_tokens} tokens"
    Console(width=140).print(table_of(rows, title))
    order = sorted(rows, key=lambda name: -mean(rows[name], "T=0", "tau"))
    headline = "tau at T=0: " + " > ".join(f"{name} {mean(rows[name], 'T=0', 'tau'):.3f}" for name in order)
    if args.json:
        record = {
            "command": shlex.join(["python", *sys.argv]),
            "date": str(date.today()),
            "environment": environment(),
        }
        record |= {"steps": steps, "seeds": seeds, "prompts": prompts, "headline": headline, "paper": PAPER}
        args.json.write_text(json.dumps(record | {"runs": rows}, indent=1) + "\n")
    print(f"{headline}\n({PAPER})")


if __name__ == "__main__":
    main()
