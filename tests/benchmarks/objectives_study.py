"""Objectives at equal budget on the quickstart target: tau with its spread over seeds, accuracy, active ratio.

    python tests/benchmarks/objectives_study.py [--quick] [--json PATH] [--seeds 0 1 2] [--steps 240]

Every run has the same first weights, rows and anchors for a seed; only the objective differs. Runs that are already
in --out are kept, so an interrupted study goes on. The quickstart target is trained first where it is not cached.
"""

import argparse
import json
import shlex
import statistics
import sys
from datetime import date
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hf_specauf.demo.target import TargetSettings, quickstart_target
from hf_specauf.quickstart import evaluate_drafter, recipes_folder, train_drafter
from hf_specauf.records import environment

VARIANTS = {
    "uniform": ["--objective", "uniform"],
    "decay": ["--objective", "decay"],
    "auf": ["--objective", "auf"],
    "auf_decay": ["--objective", "auf_decay"],
    "auf, per block": ["--objective", "auf", "--normalisation", "per_block"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="decay and AUF, one seed, 20 steps: about a minute")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--block_size", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("out/objectives_study"))
    args = parser.parse_args()
    variants, seeds, steps, prompts, out = VARIANTS, args.seeds, args.steps, args.prompts, args.out
    if args.quick:
        variants = {name: VARIANTS[name] for name in ("decay", "auf")}
        seeds, steps, prompts, out = [0], 20, 4, Path("out/objectives_study_quick")
    target = quickstart_target(TargetSettings(steps=400))
    rows: dict[str, list[dict]] = {name: [] for name in variants}
    for seed in seeds:
        for name, overrides in variants.items():
            folder = out / f"{name.replace(', ', '_').replace(' ', '_')}-k{args.block_size}-{steps}-seed{seed}"
            settings = [
                *("--seed", str(seed), "--max_steps", str(steps), "--block_size", str(args.block_size)),
                *("--eval_strategy", "no", "--save_strategy", "no", "--eval_prompts", "0"),
            ]
            print(f"\n== {name}, seed {seed}", flush=True)
            record = train_drafter(
                target, recipes_folder() / "quickstart/dflash_auf.yaml", folder, *overrides, *settings
            )
            kept = folder / f"row-{prompts}.json"
            if not kept.is_file():
                kept.write_text(json.dumps(evaluate_drafter(target, folder, record, prompts, 96, temperature=0.0)))
            row = json.loads(kept.read_text())
            rows[name].append({key: row[key] for key in row if key != "path"} | {"seconds": record["seconds"]})

    table = Table(title=f"K = {args.block_size}, {steps} steps, seeds {seeds}, {prompts} held-out prompts x 96 tokens")
    for column in ("objective", "tau per seed", "mean", "spread", "accuracy", "active ratio", "speed-up", "lossless"):
        table.add_column(column, justify="left" if column == "objective" else "right")
    for name, runs in rows.items():
        tau = [run["tau"] for run in runs]
        table.add_row(
            name,
            " ".join(f"{value:.3f}" for value in tau),
            f"{statistics.mean(tau):.3f}",
            f"{max(tau) - min(tau):.3f}",
            *(
                f"{statistics.mean(run[key] for run in runs):.3f}"
                for key in ("common_accuracy", "active_ratio", "speedup")
            ),
            "yes" if all(run["lossless"] for run in runs) else "NO",
        )
    Console(width=130).print(table)
    auf, decay = (statistics.mean(run["tau"] for run in rows[name]) for name in ("auf", "decay"))
    gain = auf / decay - 1
    headline = f"AUF over decay: tau {auf:.3f} against {decay:.3f}, {gain:+.1%} (the paper: +8.75 % on Qwen3-8B)"
    if args.json:
        command = shlex.join(["python", *sys.argv])
        record = {"command": command, "date": str(date.today()), "environment": environment(), "headline": headline}
        record |= {"steps": steps, "block_size": args.block_size, "seeds": seeds, "gain": gain, "runs": rows}
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    print(headline)


if __name__ == "__main__":
    main()
