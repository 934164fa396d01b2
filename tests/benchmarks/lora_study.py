"""LoRA against full training: a drafter adapted to a fine-tuned target, and drafters on the target's own layers.

    python tests/benchmarks/lora_study.py [--quick] [--json PATH] [--seeds 0 1 2] [--steps 160]

The quickstart target (Python source) is fine-tuned on prose: the language reference that ships as `pydoc_data`. Then,
on the prose and at equal steps: the old drafter as it is, adapted by LoRA (r = 4, 16, 64), fine-tuned in full, trained
from scratch; and on the target's last layers: LoRA with them frozen, or full training that starts from them. Each run
is a process of its own; of the first seed's, peak memory and seconds are noted. Full training uses the quickstart's
Muon; LoRA is trained both by Muon and by AdamW. Runs that are already in --out are kept, so an interrupted study goes
on.
"""

import argparse
import json
import random
import shlex
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from pydoc_data.topics import topics

import torch
import yaml
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

from hf_specauf import DFlashConfig, DFlashDraftModel, load_drafter
from hf_specauf.demo.rows import heldout_prompts, heldout_rows, training_rows
from hf_specauf.demo.target import TargetSettings, quickstart_target
from hf_specauf.evaluation.compare import compare
from hf_specauf.quickstart import recipes_folder, train_drafter
from hf_specauf.records import environment, write_record
from hf_specauf.training.optimizer import MuonWithAdamW

RECIPE = recipes_folder() / "quickstart/dflash_auf.yaml"
ADAMW = {"use_peft": True, "muon_learning_rate": None, "learning_rate": 3e-3}
MUON = {"use_peft": True, "muon_learning_rate": 2e-2, "learning_rate": 1e-3}
# notes the peak memory of a command: a child's own count begins with what its parent held when it was started
PEAK = """
import resource, subprocess, sys
status = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""


def variants(base: Path, last_layers: list[int]) -> dict[str, dict]:
    """What each run changes in the recipe; `None` removes a key."""
    old = {"drafter": str(base)}
    borrowed = {"init_from_target_layers": last_layers, "num_draft_layers": None}
    ranks = {r: {"lora_r": r, "lora_alpha": 2 * r} for r in (4, 16, 64)}
    return {
        **{f"LoRA r={r}": old | ADAMW | rank for r, rank in ranks.items()},
        **{f"LoRA r={r}, Muon": old | MUON | rank for r, rank in ranks.items()},
        "full fine-tune": old,
        "from scratch": {},
        "borrowed, LoRA r=16": borrowed | ADAMW | ranks[16],
        "borrowed, LoRA r=16, Muon": borrowed | MUON | ranks[16],
        "borrowed, full": borrowed,
    }


def fine_tuned_target(source: Path, out: Path, steps: int) -> Path:
    """The quickstart target after some steps on prose, with its own `train.jsonl` and `heldout.jsonl`."""
    folder = out / f"target-{steps}"
    if (folder / "heldout.jsonl").is_file():
        return folder
    texts = [text for _, text in sorted(topics.items()) if len(text) > 500]
    random.Random(0).shuffle(texts)
    parts = {"heldout": texts[: len(texts) // 6], "train": texts[len(texts) // 6 :]}
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids = [i for text in parts["train"] for i in tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]]
    rows = [ids[i : i + 256] for i in range(0, len(ids) - 256, 256)]
    set_seed(0)
    model = AutoModelForCausalLM.from_pretrained(source)
    trainer = Trainer(
        model=model, optimizers=(MuonWithAdamW(model, 1e-2, 1e-3), None),
        args=TrainingArguments(
            output_dir=str(out / "target-training"), max_steps=steps, per_device_train_batch_size=8, use_cpu=True,
            lr_scheduler_type="cosine", warmup_steps=0.05, save_strategy="no", report_to="none", logging_steps=50,
        ),
        train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
    )  # fmt: skip
    trainer.train()
    trainer.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name in ("train", "heldout"):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in parts[name])
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


def run(target: Path, rows: Path, folder: Path, changes: dict, steps: int, seed: int) -> dict:
    """Train one drafter in its own process -> seconds, peak memory, trained parameters, adapter bytes. A run of the
    same recipe is kept.

    Raises:
        SystemExit: training failed, or the folder holds a run of another recipe.
    """
    recipe = yaml.safe_load(RECIPE.read_text()) | {
        "target": str(target), "dataset_name": str(rows), "output_dir": str(folder), "seed": seed,
        "eval_dataset_name": str(heldout_rows(target)), "max_steps": steps, "eval_strategy": "no",
        "save_strategy": "no", "eval_prompts": 0, "eval_rows": 8, "disable_tqdm": True,
    } | changes  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path, record = folder / "recipe.yaml", folder / "run.json"
    text = yaml.safe_dump({key: value for key, value in recipe.items() if value is not None})
    if record.is_file():
        if path.read_text() == text:
            return json.loads(record.read_text())
        raise SystemExit(f"{folder} holds a run of another recipe: give another --out, or remove that folder")
    path.write_text(text)
    start = time.perf_counter()
    with (folder / "train.log").open("w") as log:
        words = [sys.executable, "-c", PEAK, sys.executable, "-m", "hf_specauf.train", "--config", str(path)]
        status = subprocess.call(words, stdout=log, stderr=subprocess.STDOUT)
    if status:
        raise SystemExit(f"{folder}: training failed, see train.log")
    peak = int((folder / "train.log").read_text().splitlines()[-1])
    provenance = json.loads((folder / "provenance.json").read_text())
    adapter = folder / "adapter/adapter_model.safetensors"
    weights = adapter if adapter.is_file() else folder / "model.safetensors"
    found = {
        "seconds": time.perf_counter() - start, "peak_bytes": peak * 1024,
        "trained_parameters": provenance["trainable_parameters"], "published_bytes": weights.stat().st_size,
    }  # fmt: skip
    write_record(record, found)
    return found


def decode(target: Path, drafter: Path, prompts: int) -> dict:
    """tau and losslessness of a drafter on held-out prompts."""
    model = AutoModelForCausalLM.from_pretrained(target).eval()
    found = compare(model, load_drafter(drafter), heldout_prompts(target, prompts, 96), 96, pad_token_id=1)
    return {
        "tau": found["acceptance"]["tau"], "speedup": found["speedup"],
        "lossless": found["lossless"]["different"] == 0,
    }  # fmt: skip


def shares_at_8b() -> dict[int, float]:
    """LoRA's share of a Qwen3-8B drafter's parameters (five layers), counted without allocating them."""
    shares = {}
    for rank in (4, 16, 64):
        with torch.device("meta"):
            drafter = DFlashDraftModel(DFlashConfig())
            whole = sum(p.numel() for p in drafter.parameters())
            peft = get_peft_model(drafter, LoraConfig(r=rank, target_modules="all-linear"))
        shares[rank] = sum(p.numel() for p in peft.parameters() if p.requires_grad) / whole
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three runs of 10 steps, one seed: about two minutes")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--target_steps", type=int, default=150, help="steps of the target on prose")
    parser.add_argument("--rows", type=int, default=960, help="rows that the fine-tuned target writes")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("out/lora_study"))
    args = parser.parse_args()
    names, base_steps = None, []
    if args.quick:
        args.seeds, args.steps, args.target_steps, args.rows, args.prompts = [0], 10, 10, 48, 2
        args.out = Path("out/lora_study_quick")
        names = ("LoRA r=16, Muon", "full fine-tune", "borrowed, LoRA r=16")
        base_steps = ["--max_steps", "20"]
    source = quickstart_target(TargetSettings(steps=400))
    base = args.out / "base"
    train_drafter(source, RECIPE, base, *base_steps)
    target = fine_tuned_target(source, args.out, args.target_steps)
    rows = training_rows(target, args.rows)
    layers = TargetSettings().num_hidden_layers
    chosen = variants(base, [layers - 2, layers - 1])
    at_home, old = decode(source, base, args.prompts), decode(target, base, args.prompts)
    runs: dict[str, list[dict]] = {name: [] for name in chosen if names is None or name in names}
    for seed in args.seeds:
        for name in runs:
            folder = args.out / f"{name.replace(', ', '_').replace(' ', '_')}-{args.steps}-seed{seed}"
            print(f"== {name}, seed {seed}", flush=True)
            found = run(target, rows, folder, chosen[name], args.steps, seed)
            kept = folder / f"decoded-{args.prompts}.json"
            if not kept.is_file():
                write_record(kept, decode(target, folder, args.prompts))
            if seed != args.seeds[0]:  # time and memory are the first seed's: several studies may share the others
                found = {key: value for key, value in found.items() if key not in ("seconds", "peak_bytes")}
            runs[name].append(found | json.loads(kept.read_text()) | {"seed": seed})

    table = Table(
        title=f"{args.steps} steps, seeds {args.seeds}, {args.prompts} held-out prompts of prose x 96 tokens"
    )
    for column in ("drafter", "tau per seed", "mean", "share of full gain", "trained", "published", "seconds", "peak"):
        table.add_column(column, justify="left" if column == "drafter" else "right")
    table.add_row("old one, on its own target", f"{at_home['tau']:.3f}", "", "", "", "", "", "")
    table.add_row("old one, as it is", f"{old['tau']:.3f}", "", "", "", "", "", "")
    mean = {name: statistics.mean(one["tau"] for one in found) for name, found in runs.items()}
    gain = mean["full fine-tune"] - old["tau"]

    def of_gain(name: str) -> str:
        return f"{(mean[name] - old['tau']) / gain:.0%}" if gain > 0 else "no gain to share"

    for name, found in runs.items():
        table.add_row(
            name, " ".join(f"{one['tau']:.3f}" for one in found), f"{mean[name]:.3f}",
            of_gain(name), f"{found[0]['trained_parameters'] / 1e3:.0f} k",
            f"{found[0]['published_bytes'] / 1e6:.2f} MB", f"{found[0]['seconds']:.0f}",
            f"{found[0]['peak_bytes'] / 1e6:.0f} MB",
        )  # fmt: skip
    Console(width=140).print(table)
    shares = shares_at_8b()
    print("LoRA's share of a Qwen3-8B drafter: " + ", ".join(f"r={r} {share:.2%}" for r, share in shares.items()))
    best = "LoRA r=16, Muon"
    share = runs[best][0]["published_bytes"] / runs["full fine-tune"][0]["published_bytes"]
    headline = (
        f"{best} reaches {of_gain(best)} of the full fine-tune's gain in tau "
        f"({old['tau']:.2f} to {mean['full fine-tune']:.2f}) with {share:.0%} of its bytes"
    )
    if args.json:
        record = {"command": shlex.join(["python", *sys.argv]), "date": str(date.today()), "headline": headline}
        record |= {"environment": environment(), "at_home": at_home, "old": old, "runs": runs, "shares_at_8b": shares}
        write_record(args.json, record)
    print(headline)


if __name__ == "__main__":
    main()
