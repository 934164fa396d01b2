"""What `target_states_cache` saves: seconds of whole training steps with it and without, and what filling it costs.

    python tests/benchmarks/kept_states.py --target FOLDER --data ROWS.jsonl [--mask_token_id 16] [--json PATH]

Both ways train the same drafter on the same rows of `--length` tokens in one process, through AUFTrainer itself. Their
steps take turns, a few of each, so that both meet the same machine. Seconds are medians of whole optimizer steps,
after one that is not counted. What the run reads was written moments before, so it comes from memory, and not from the
disk as a larger cache would.
"""

import argparse
import shlex
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback, set_seed

from hf_specauf import AUFConfig, AUFTrainer, DFlashDraftModel
from hf_specauf.data.rows import prepare_rows
from hf_specauf.data.sources import load_rows
from hf_specauf.records import environment, write_record
from hf_specauf.target import drafter_config, load_target


class Seconds(TrainerCallback):
    """Seconds of each optimizer step."""

    def __init__(self):
        self.of_steps: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        synchronize()
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        synchronize()
        self.of_steps.append(time.perf_counter() - self.start)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def step_seconds(trainer: AUFTrainer) -> tuple[list[float], list[float]]:
    """Train -> seconds of the steps but the first, and all losses."""
    seconds = Seconds()
    trainer.add_callback(seconds)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return seconds.of_steps[1:], losses


def measure(args, target, tokenizer, rows, folder: Path) -> list[dict]:
    """Steps of both ways for each number of anchors."""
    config = drafter_config(
        target, num_hidden_layers=args.layers, block_size=args.block_size, mask_token_id=args.mask_token_id
    )

    def trainer(anchors: int, cache: Path | None) -> AUFTrainer:
        set_seed(0)
        keys = dict(
            output_dir=str(folder / "out"), per_device_train_batch_size=args.rows, max_steps=args.steps + 1,
            anchors_per_row=anchors, bf16=args.dtype == "bfloat16", use_cpu=not torch.cuda.is_available(),
            gamma=4.0 if args.block_size not in (8, 10, 16) else None, eval_prompts=0, logging_steps=1,
            save_strategy="no", disable_tqdm=True, report_to="none", target_states_cache=cache and str(cache),
            objective="auf",
        )  # fmt: skip
        return AUFTrainer(
            model=DFlashDraftModel(config), target_model=target, args=AUFConfig(**keys), train_dataset=rows,
            processing_class=tokenizer,
        )  # fmt: skip

    found = []
    for anchors in args.anchors:
        seconds = {"without": [], "with": []}
        losses = {}
        for _ in range(args.turns):
            for way, cache in (("without", None), ("with", folder / "states")):
                steps, losses[way] = step_seconds(trainer(anchors, cache))
                seconds[way] += steps
        without, kept = (statistics.median(seconds[way]) for way in ("without", "with"))
        found.append({"anchors": anchors, "seconds": seconds, "losses": losses, "times_faster": without / kept})
    return found


def measure_filling(args, target, tokenizer, rows, folder: Path) -> dict:
    """Seconds and bytes of the first filling, of all rows."""
    config = drafter_config(target, num_hidden_layers=1, block_size=args.block_size, mask_token_id=args.mask_token_id)
    keys = AUFConfig(
        output_dir=str(folder / "out"), use_cpu=not torch.cuda.is_available(), eval_prompts=0, report_to="none",
        disable_tqdm=True, target_states_cache=str(folder / "states"),
    )  # fmt: skip
    trainer = AUFTrainer(
        model=DFlashDraftModel(config), target_model=target, args=keys, train_dataset=rows, processing_class=tokenizer
    )
    start = time.perf_counter()
    trainer.kept_states.fill(rows)
    seconds = time.perf_counter() - start
    size = sum(path.stat().st_size for path in (folder / "states").rglob("*") if path.is_file())
    return {"rows": len(rows), "tokens": sum(rows["length"]), "seconds": seconds, "bytes": size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, help="folder or Hub id")
    parser.add_argument("--data", required=True, help="any rows that a recipe takes")
    parser.add_argument("--mask_token_id", type=int, required=True)
    parser.add_argument("--dtype", default="bfloat16", help="of the target; bfloat16 also trains under autocast")
    parser.add_argument("--rows", type=int, default=4, help="of a step")
    parser.add_argument("--length", type=int, default=320, help="S; only rows as long are taken")
    parser.add_argument("--anchors", type=int, nargs="+", default=[32, 190], help="N")
    parser.add_argument("--block_size", type=int, default=8, help="K")
    parser.add_argument("--layers", type=int, default=1, help="of the drafter")
    parser.add_argument("--steps", type=int, default=3, help="counted steps of a turn")
    parser.add_argument("--turns", type=int, default=2, help="of each way")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    target, tokenizer = load_target(args.target, dtype=args.dtype)
    raw = load_rows(args.data, None, "train", None)
    raw = raw.select(range(min(len(raw), 100 * args.rows)))
    rows = prepare_rows(
        raw, tokenizer, max_length=args.length, block_size=args.block_size, mask_token_id=args.mask_token_id,
        vocab_size=target.config.vocab_size,
    )  # fmt: skip
    rows = rows.filter(lambda row: row["length"] == args.length)
    rows = rows.select(range(args.rows * (args.steps + 1)))
    with tempfile.TemporaryDirectory() as folder:
        filling = measure_filling(args, target, tokenizer, rows, Path(folder))
        steps = measure(args, target, tokenizer, rows, Path(folder))
    table = Table(title=f"{args.dtype}, {args.rows} rows x {args.length} tokens, K = {args.block_size}")
    for column in ("anchors", "without: seconds (min median max)", "with", "times faster"):
        table.add_column(column, justify="right")
    for row in steps:
        cells = [
            " ".join(f"{f(values):.2f}" for f in (min, statistics.median, max)) for values in row["seconds"].values()
        ]
        table.add_row(str(row["anchors"]), *cells, f"{row['times_faster']:.2f}")
    Console(width=150).print(table)
    a_row = filling["seconds"] / filling["rows"]
    headline = "; ".join(f"{row['anchors']} anchors: {row['times_faster']:.2f} times as fast" for row in steps)
    headline += f"; filling {a_row:.2f} s and {filling['bytes'] / filling['rows'] / 1e6:.2f} MB a row"
    if args.json:
        record = {
            "command": shlex.join(["python", *sys.argv]), "date": str(date.today()), "environment": environment(),
            "headline": headline, "filling": filling, "steps": steps,
        }  # fmt: skip
        write_record(args.json, record)
    print(headline)


if __name__ == "__main__":
    main()
