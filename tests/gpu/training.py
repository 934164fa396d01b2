"""Drafters for a real target, trained beside each other on one card, then decoded; what came of them as one JSON file.

    python tests/gpu/training.py --target FOLDER --data FILE.jsonl --prompts NAME=FILE.jsonl [NAME=FILE.jsonl ...]
        --work FOLDER --json FILE [--runs decay auf own] [--steps 300] [--rows 1500] [--device cuda]

Every run is the project's own commands, each a process of its own with a log in --work. `decay` and `auf` learn from
the data as it is; `own` learns, by AUF, from answers that the target gives to the same questions. The card is shared,
so seconds here say what fits into a quarter of an hour, and not how fast a run alone is. A speed-up is a ratio within
one process, which decodes plainly and with the drafter in turn.
"""

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml
from conditions import ROOT, conditions, default_device

from hf_specauf.records import public, write_record

# what a run is trained by, and whether on the target's own answers
RUNS = {"decay": ("decay", False), "auf": ("auf", False), "own": ("auf", True)}
# greedy decoding is served by a drafter that learnt from cool answers
TEMPERATURE = 0.5


class Failed(Exception):
    """A command ended badly, or not in time."""


@dataclass(frozen=True)
class Phase:
    """A part of the whole that has to be over by a moment, on `time.monotonic`'s clock."""

    work: Path
    ends: float

    def command(self, log: str, module: str, *words: object) -> float:
        """Run `python -m module words` with its output in `log` -> seconds.

        Raises:
            Failed: with the last line that it printed.
        """
        path = self.work / f"{log}.log"
        start = time.monotonic()
        left = max(self.ends - start, 1.0)
        with open(path, "w") as stream:
            try:
                done = subprocess.run(
                    [sys.executable, "-m", module, *map(str, words)],
                    cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, timeout=left,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                raise Failed(f"{log}: not over after {left:.0f} seconds") from None
        if done.returncode != 0:
            lines = path.read_text(errors="replace").strip().splitlines()
            raise Failed(f"{log}: {lines[-1] if lines else f'exit {done.returncode}'}"[:500])
        return time.monotonic() - start


def regenerate(phase: Phase, args: argparse.Namespace) -> dict:
    """Let the target answer the data's questions -> how, or why it did not."""
    row = {"rows": args.rows, "max_new_tokens": args.answer_tokens, "temperature": TEMPERATURE}
    try:
        row["seconds"] = phase.command(
            "regenerate", "hf_specauf.regenerate", "--target", args.target, "--dataset_name", args.data,
            "--out", args.work / "own.jsonl", "--max_rows", args.rows, "--max_new_tokens", args.answer_tokens,
            "--temperature", TEMPERATURE, "--device", args.device,
        )  # fmt: skip
    except Failed as error:
        row["failed"] = str(error)
    return row


def train(name: str, phase: Phase, args: argparse.Namespace, regeneration: dict) -> dict:
    """Train one run's drafter -> what is known of its training."""
    objective, own_answers = RUNS[name]
    data, row = args.data, {"objective": objective, "answers": "the data's"}
    if own_answers:
        data = args.work / "own.jsonl"
        row |= {"answers": "the target's", "regeneration": regeneration}
        if "failed" in regeneration:
            return row | {"failed": regeneration["failed"]}
    try:
        row["seconds_of_command"] = phase.command(
            f"train-{name}", "hf_specauf.train", "--config", args.recipe, "--target", args.target,
            "--dataset_name", data, "--objective", objective, "--max_steps", args.steps,
            "--output_dir", args.work / name, "--use_cpu", args.device == "cpu",
        )  # fmt: skip
    except Failed as error:
        return row | {"failed": str(error)}
    provenance = json.loads((args.work / name / "provenance.json").read_text())
    kept = ("steps", "rows", "trainable_parameters", "seconds", "history")
    row |= {key: provenance[key] for key in kept}
    row["on_policy"] = provenance["on_policy"]
    return row


def decode(name: str, phase: Phase, args: argparse.Namespace) -> dict:
    """One drafter on every prompt set -> figures by the set's name."""
    found = {}
    for title, path in args.prompts:
        log = f"evaluate-{name}-{title}"
        try:
            phase.command(
                log, "hf_specauf.evaluate", "--target", args.target, "--drafter", args.work / name,
                "--prompts", path, "--count", args.count, "--max_new_tokens", args.new_tokens,
                "--device", args.device, "--out", args.work / log,
            )  # fmt: skip
        except Failed as error:
            found[title] = {"failed": str(error)}
            continue
        record = json.loads((args.work / log / "eval.json").read_text())
        kept = ("plain_tokens_per_second", "tokens_per_second", "speedup", "lossless", "repetition")
        found[title] = {
            "tau": record["acceptance"]["tau"],
            "alpha": record["acceptance"]["alpha"],
            **{key: record[key] for key in kept},
            "prompts": len(record["prompts"]),
            "conditions": public(record["conditions"]),  # without local paths
        }
    return found


def headline(runs: dict[str, dict]) -> str:
    """tau of every run on every prompt set."""
    words = []
    for name, row in runs.items():
        sets = row.get("decoding", {})
        said = [f"{title} {found['tau']:.3f}" for title, found in sets.items() if found.get("tau") is not None]
        words.append(f"{name}: {', '.join(said) or 'nothing'}")
    return "tau at T=0: " + "; ".join(words)


def prompt_set(word: str) -> tuple[str, Path]:
    title, _, path = word.partition("=")
    if not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"{word}: write NAME=FILE, and there is no file {path!r}")
    return title, Path(path)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True, help="the target's folder")
    parser.add_argument("--data", type=Path, required=True, help="conversations to train on")
    parser.add_argument("--prompts", type=prompt_set, nargs="+", required=True, help="NAME=FILE.jsonl, to decode")
    parser.add_argument("--work", type=Path, required=True, help="folder for drafters and logs")
    parser.add_argument("--json", type=Path, required=True, help="the record")
    parser.add_argument("--recipe", type=Path, default=Path(__file__).with_name("smollm2.yaml"))
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--side_by_side", type=int, default=len(RUNS), help="runs at a time")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of each run")
    parser.add_argument("--rows", type=int, default=1500, help="questions that the target answers, for `own`")
    parser.add_argument("--answer_tokens", type=int, default=384, help="most tokens of such an answer")
    parser.add_argument("--count", type=int, default=16, help="prompts of each set")
    parser.add_argument("--new_tokens", type=int, default=128, help="tokens decoded for each")
    # together with the target's unpacking under ten minutes
    parser.add_argument("--answering_seconds", type=float, default=120)
    parser.add_argument("--training_seconds", type=float, default=240)
    parser.add_argument("--decoding_seconds", type=float, default=130)
    parser.add_argument("--device", default=default_device(), help="cuda or cpu")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    recipe = yaml.safe_load(args.recipe.read_text())
    record = conditions(args.device) | {"headline": "", "seed": recipe["seed"]}
    record |= {"side_by_side": min(args.side_by_side, len(args.runs)), "steps": args.steps, "recipe": recipe}
    regeneration = {}
    # Before the trainings, and not beside them: on a GPU, continuous batching takes most of the memory that is free.
    if any(RUNS[name][1] for name in args.runs):
        regeneration = regenerate(Phase(args.work, time.monotonic() + args.answering_seconds), args)
    training = Phase(args.work, time.monotonic() + args.training_seconds)
    with ThreadPoolExecutor(args.side_by_side) as threads:
        rows = threads.map(lambda name: train(name, training, args, regeneration), args.runs)
        record["runs"] = dict(zip(args.runs, rows))
        # before decoding, so that a stop in the middle of it leaves what training gave
        write_record(args.json, record)
        trained = [name for name, row in record["runs"].items() if "failed" not in row]
        decoding = Phase(args.work, time.monotonic() + args.decoding_seconds)
        for name, found in zip(trained, threads.map(lambda name: decode(name, decoding, args), trained)):
            record["runs"][name]["decoding"] = found
    record["headline"] = headline(record["runs"])
    write_record(args.json, record)
    print(record["headline"])
    for name, row in record["runs"].items():
        if "failed" in row:
            print(f"{name} failed: {row['failed']}")
    return record


if __name__ == "__main__":
    main()
