"""Starts of a fresh drafter, compared at equal steps: the loss and the teacher-forced tau on held-out rows.

    python tests/benchmarks/starts_study.py --json FILE --config RECIPE [any key of the recipe]

Each start is a run of the recipe, with the same rows, anchors and seed, and the same random weights but for what the
start changes. The rows must be token rows, as `regenerate` writes them.

    as it is        random weights, norms of 1
    norm            the drafter's last norm begins as the target's, which the target's head expects
    taps            the columns of `fc` begin such that no tap drowns the others: each is divided by the root mean
                    square of its tap
    norm and taps   both
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from hf_specauf import train as training
from hf_specauf.data.sources import load_rows
from hf_specauf.recipe import parse
from hf_specauf.records import environment, write_record

STARTS = {"as it is": (), "norm": ("norm",), "taps": ("taps",), "norm and taps": ("norm", "taps")}
ROWS = 16  # on which the taps' scales are measured
KEPT = ("loss", "teacher_forced_tau", "common_accuracy")


@torch.no_grad()
def begin_norm(drafter, target, rows: list[list[int]]) -> None:
    """Give the drafter's last norm the weight of the target's."""
    drafter.norm.weight.copy_(target.base_model.norm.weight)


@torch.no_grad()
def begin_taps(drafter, target, rows: list[list[int]]) -> None:
    """Divide the columns of `fc` by the scale of their tap, and keep the weight's norm as it was."""
    config = drafter.config
    found: dict[int, list[float]] = {tap: [] for tap in config.target_layer_ids}
    for ids in rows:
        states = target(torch.tensor([ids], device=target.device), output_hidden_states=True).hidden_states
        for tap, scales in found.items():
            # The first token is not like the others: its activations may be hundreds of times theirs.
            scales += states[tap + 1][0, 1:].float().pow(2).mean(-1).sqrt().tolist()
    weight = drafter.fc.weight
    before = weight.norm()
    for i, scales in enumerate(found.values()):
        weight[:, i * config.hidden_size : (i + 1) * config.hidden_size] /= statistics.median(scales)
    weight *= before / weight.norm()


BEGIN = {"norm": begin_norm, "taps": begin_taps}


def run(start: str, words: list[str]) -> list[dict]:
    """Train from a start -> the figures of each evaluation."""
    as_it_is = training.start_drafter

    def changed(draft, target, *args):
        drafter, base = as_it_is(draft, target, *args)
        rows = load_rows(arguments[2].dataset_name)["input_ids"][:ROWS]
        for part in STARTS[start]:
            BEGIN[part](drafter, target, rows)
        return drafter, base

    with tempfile.TemporaryDirectory() as out:
        arguments = parse([*words, "--logging_first_step", "true", "--output_dir", out])
        training.start_drafter = changed
        try:
            trainer = training.train(*arguments, compare_decoding=False)
        finally:
            training.start_drafter = as_it_is
    history = trainer.state.log_history
    first = next(entry["loss"] for entry in history if "loss" in entry)
    points = [
        {"step": entry["step"]} | {key: entry[f"eval_{key}"] for key in KEPT}
        for entry in history
        if "eval_loss" in entry
    ]
    return [{"step": 0, "loss": first}, *points]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    args, words = parser.parse_known_args()
    found = {}
    for start in args.starts:
        print(f"\n== {start}", flush=True)
        found[start] = run(start, words)
        if args.json:
            write_record(args.json, {"words": words, "environment": environment(), "starts": found})
    table = Table("start", "first loss", *(f"step {point['step']}" for point in found[args.starts[0]][1:]))
    for start, (first, *points) in found.items():
        table.add_row(
            start, f"{first['loss']:.1f}", *(f"{p['loss']:.3f}, tau {p['teacher_forced_tau']:.3f}" for p in points)
        )
    Console().print(table)


if __name__ == "__main__":
    main()
