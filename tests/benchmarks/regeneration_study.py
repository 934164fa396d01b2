"""What answers by the target itself are worth: tau of drafters trained on a dataset's own text, and on the same rows
after `hf_specauf.regenerate`, on the quickstart target.

    python tests/benchmarks/regeneration_study.py [--quick] [--json PATH] [--seeds 0 1 2] [--steps 240]

First the command is killed twice while it answers 300 of the prompts, resumed, and compared with an uninterrupted run.
Both kinds of rows begin with the same 64 tokens of a file; then comes the file as it is, or what the target writes.
Steps, first weights and anchors are the same for a seed. Runs that are already in --out are kept, and a regeneration
that was interrupted goes on. The quickstart target is trained first where it is not cached.
"""

import argparse
import hashlib
import json
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from hf_specauf import regenerate, train
from hf_specauf.data.on_policy import on_policy_score
from hf_specauf.data.rows import prepare_rows
from hf_specauf.data.sources import load_rows
from hf_specauf.demo.rows import PROMPT_TOKENS, ROW_TOKENS, cut, heldout_prompts, heldout_rows, read_texts, save_rows
from hf_specauf.demo.target import TargetSettings, quickstart_target
from hf_specauf.evaluation.compare import compare
from hf_specauf.quickstart import recipes_folder
from hf_specauf.records import environment
from hf_specauf.target import FrozenTarget, drafter_config


def both_kinds(target: Path, out: Path, count: int, temperature: float) -> dict[str, Path]:
    """Token rows of real text, and the same prompts answered by the target."""
    tokenizer = AutoTokenizer.from_pretrained(target)
    pieces = cut(read_texts(target / "train.jsonl"), tokenizer, count, ROW_TOKENS)
    paths = {"the dataset's": out / f"text-{count}.jsonl", "the target's": out / f"own-{count}.jsonl"}
    if not paths["the dataset's"].is_file():
        save_rows(paths["the dataset's"], pieces)
    prompts = out / f"prompts-{count}.jsonl"
    prompts.write_text("".join(json.dumps({"text": tokenizer.decode(ids[:PROMPT_TOKENS])}) + "\n" for ids in pieces))
    regenerate.main(answering(target, prompts, paths["the target's"], temperature, rows_per_chunk=96))
    return paths


def answering(target: Path, prompts: Path, out: Path, temperature: float, **more) -> list[str]:
    """Arguments of `hf_specauf.regenerate`."""
    words = dict(
        target=target, dataset_name=prompts, out=out, temperature=temperature, device="cpu",
        prompt_tokens=PROMPT_TOKENS, max_new_tokens=ROW_TOKENS - PROMPT_TOKENS, continuous_batching="false",
    )  # fmt: skip
    return [word for key, value in (words | more).items() for word in (f"--{key}", str(value))]


def killed_and_resumed(target: Path, prompts: Path, folder: Path, count: int, temperature: float) -> dict:
    """Answer `count` prompts, and again with two SIGKILLs -> whether the files are equal byte by byte."""
    kept = folder / "regenerated.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    chunk = max(count // 8, 1)
    command = {
        name: [sys.executable, "-m", "hf_specauf.regenerate"]
        + answering(target, prompts, folder / f"{name}.jsonl", temperature, max_rows=count, rows_per_chunk=chunk)
        for name in ("whole", "killed")
    }
    for chunks in (1, 4):
        process = subprocess.Popen(command["killed"])
        while len(list(folder.glob("killed.parts/chunk-*.jsonl"))) < chunks:
            if process.poll() is not None:
                raise RuntimeError(f"regenerate ended by itself ({process.returncode}) before it was killed")
            time.sleep(0.02)
        process.kill()
        process.wait()
        print(f"killed with {len(list(folder.glob('killed.parts/chunk-*.jsonl')))} chunks of {chunk} rows written")
    for words in command.values():
        subprocess.run(words, check=True)
    whole, killed = (hashlib.sha256((folder / f"{name}.jsonl").read_bytes()).hexdigest() for name in command)
    found = {"prompts": count, "kills": 2, "identical": killed == whole, "sha256": whole}
    kept.write_text(json.dumps(found))
    return found


def score(target: Path, rows: Path) -> dict:
    """The on-policy score of a file of token rows."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(target), AutoTokenizer.from_pretrained(target)
    shape = dict(num_hidden_layers=1, block_size=16, mask_token_id=tokenizer.mask_token_id, target_layer_ids=[1])
    prepared = prepare_rows(
        load_rows(str(rows)),
        tokenizer,
        max_length=ROW_TOKENS,
        block_size=16,
        mask_token_id=tokenizer.mask_token_id,
        vocab_size=model.config.vocab_size,
    )
    return on_policy_score(FrozenTarget(model, drafter_config(model, **shape)), prepared)


def run(target: Path, rows: Path, folder: Path, seed: int, steps: int, prompts: int) -> dict:
    """Train one drafter and decode held-out prompts with it -> tau and conditions, kept in the folder."""
    kept = folder / f"row-{prompts}.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    words = dict(
        config=recipes_folder() / "quickstart/dflash_auf.yaml", target=target, dataset_name=rows,
        eval_dataset_name=heldout_rows(target), output_dir=folder, seed=seed, max_steps=steps, eval_strategy="no",
        save_strategy="no", eval_prompts=0, disable_tqdm="true",
    )  # fmt: skip
    train.main([word for key, value in words.items() for word in (f"--{key}", str(value))])
    model = AutoModelForCausalLM.from_pretrained(target).eval()
    drafter = AutoModel.from_pretrained(folder)
    found = compare(model, drafter, heldout_prompts(target, prompts, 96), 96, pad_token_id=1, show_progress=False)
    seconds = json.loads((folder / "provenance.json").read_text())["seconds"]
    row = {"seed": seed, "tau": found["acceptance"]["tau"], "speedup": found["speedup"], "seconds": seconds}
    row["lossless"] = found["lossless"]["different"] == 0
    kept.write_text(json.dumps(row))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, 20 steps, 96 rows: about five minutes")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--rows", type=int, default=960, help="prompts answered, and rows of each kind")
    parser.add_argument("--temperature", type=float, default=0.5, help="of the target's answers")
    parser.add_argument("--prompts", type=int, default=32, help="held-out prompts decoded")
    parser.add_argument("--out", type=Path, default=Path("out/regeneration_study"))
    args = parser.parse_args()
    seeds, steps, count, prompts, out = args.seeds, args.steps, args.rows, args.prompts, args.out
    if args.quick:
        seeds, steps, count, prompts, out = [0], 20, 96, 4, Path("out/regeneration_study_quick")
    out.mkdir(parents=True, exist_ok=True)
    target = quickstart_target(TargetSettings(steps=400))
    files = both_kinds(target, out, count, args.temperature)
    few = 24 if args.quick else min(300, count)
    resumed = killed_and_resumed(target, out / f"prompts-{count}.jsonl", out / f"killed-{few}", few, args.temperature)
    print(f"{few} prompts answered, killed twice: {'identical' if resumed['identical'] else 'NOT IDENTICAL'}")
    scores = {kind: score(target, path) for kind, path in files.items()}
    rows: dict[str, list[dict]] = {kind: [] for kind in files}
    for seed in seeds:
        for kind, path in files.items():
            print(f"\n== answers: {kind}, seed {seed}", flush=True)
            folder = out / f"{path.stem}-{steps}-seed{seed}"
            rows[kind].append(run(target, path, folder, seed, steps, prompts))

    table = Table(title=f"K = 16, {steps} steps, {count} rows, seeds {seeds}, {prompts} held-out prompts x 96 tokens")
    for column in ("answers", "agreement", "log-probability", "tau per seed", "mean", "lossless"):
        table.add_column(column, justify="left" if column == "answers" else "right")
    for kind, runs in rows.items():
        tau = [run["tau"] for run in runs]
        table.add_row(
            kind, f"{scores[kind]['agreement']:.2f}", f"{scores[kind]['log_probability']:.2f}",
            " ".join(f"{value:.3f}" for value in tau), f"{statistics.mean(tau):.3f}",
            "yes" if all(run["lossless"] for run in runs) else "NO",
        )  # fmt: skip
    Console(width=110).print(table)
    before, after = (statistics.mean(run["tau"] for run in runs) for runs in rows.values())
    gain = after / before - 1
    headline = f"answers by the target itself: tau {after:.3f} against {before:.3f}, {gain:+.1%}"
    if args.json:
        command = shlex.join(["python", *sys.argv])
        record = {"command": command, "date": str(date.today()), "environment": environment(), "headline": headline}
        record |= {"steps": steps, "rows": count, "seeds": seeds, "gain": gain, "on_policy": scores, "runs": rows}
        record |= {"regenerated": resumed}
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    print(headline)


if __name__ == "__main__":
    main()
