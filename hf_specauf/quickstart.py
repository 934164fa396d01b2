"""The embedded default: Spec-AUF's claim on real text, on two CPU cores, with no Hub access.

`python -m hf_specauf.quickstart` trains a small real target (Qwen3 architecture) on the source of
Python's standard library and keeps it in the user's cache; trains a decay-only and an AUF drafter
from two recipes that differ in `objective` alone; evaluates both on held-out files; and writes
`report.json`, two plots and the drafter folders.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import sys
import sysconfig
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from datasets import Dataset
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from .cli import errors_in_one_line
from .data.sources import load_rows
from .identity import Identity
from .recipe import parse
from .records import write_record
from .regenerate import write_whole
from .serving.acceptance import TAU_DEFINITION
from .serving.compare import compare, evaluation_record, plot_alpha
from .train import train
from .training.callbacks import InterruptCallback
from .training.optimizer import MuonWithAdamW

EOS, PAD, MASK = "<|endoftext|>", "<|pad|>", "<|mask|>"
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings",
                   "pydoc_data", "_bundled", "__pycache__"}  # fmt: skip


@dataclass
class TargetSettings:
    """Everything that decides the quickstart target; its hash names the cache folder."""

    seed: int = 0
    vocab_size: int = (
        512  # short tokens: next ones are easier to guess, for target and drafter alike
    )
    hidden_size: int = 192
    num_hidden_layers: int = 12  # deep and thin: a two-layer drafter is in a fair proportion
    intermediate_size: int = 512
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 32
    row_tokens: int = 256
    rows_per_step: int = 8
    steps: int = 400
    learning_rate: float = 2e-2  # Muon's, for the matrices
    adam_learning_rate: float = 3e-3  # for embedding and norms
    python: str = f"{sys.version_info.major}.{sys.version_info.minor}"


def cache_folder() -> Path:
    """`$HF_SPECAUF_CACHE`, else `hf_specauf/` under the user's cache directory."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("HF_SPECAUF_CACHE") or Path(root) / "hf_specauf")


def standard_library() -> tuple[list[str], list[str]]:
    """Source files of the running Python's standard library, split by file name into (training,
    held-out) texts."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train, heldout = [], []
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    for path in sorted(paths):
        parts = path.relative_to(root).parts
        text = path.read_text(encoding="utf-8", errors="replace")
        if len(text) < 500:
            continue
        # by a hash of the name, so that the split does not move when a Python release adds a file
        bucket = int(hashlib.sha256("/".join(parts).encode()).hexdigest(), 16) % 16
        (heldout if bucket == 0 else train).append(text)
    if sum(map(len, train)) < 2_000_000:
        raise SystemExit(
            f"{root} holds too little Python source to train on. Install the standard library's .py"
            " files (on Debian: the package libpython3-stdlib), or train on your own text with"
            " `python -m hf_specauf.train`."
        )
    return train, heldout


def train_tokenizer(texts: list[str], vocab_size: int):
    """A byte-level BPE tokenizer with its own mask token (never pad or eos)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD, MASK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, mask_token=MASK
    )


def target_config(settings: TargetSettings, tokenizer) -> Qwen3Config:
    """The quickstart target's shape."""
    return Qwen3Config(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=settings.num_attention_heads,
        num_key_value_heads=settings.num_key_value_heads,
        head_dim=settings.head_dim,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )


def quickstart_target(settings: TargetSettings) -> Path:
    """Folder with the trained target, its tokenizer and `heldout.jsonl` / `train.jsonl`; trained on
    the first call.

    Interrupted training goes on from its last checkpoint; the folder appears under its name only
    when complete.
    """
    digest = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode()).hexdigest()[:12]
    folder = cache_folder() / f"quickstart-{digest}"
    if folder.is_dir():
        print(f"target: cached at {folder}")
        return folder
    train, heldout = standard_library()
    print(
        f"target: training on {len(train)} files of Python {settings.python}'s standard library"
        " (cached afterwards)"
    )
    set_seed(settings.seed)
    tokenizer = train_tokenizer(train, settings.vocab_size)
    documents = tokenizer(train, add_special_tokens=False)["input_ids"]
    random.Random(settings.seed).shuffle(documents)
    ids = [token for document in documents for token in document + [tokenizer.eos_token_id]]
    size = settings.row_tokens
    rows = [ids[i : i + size] for i in range(0, len(ids) - size, size)]
    work = folder.with_name(folder.name + ".training")
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.rows_per_step,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        use_cpu=True,
        bf16=torch.cpu._is_avx512_bf16_supported(),  # twice as fast where the processor has it
        seed=settings.seed,
        save_steps=100,
        save_total_limit=1,
        logging_steps=50,
        report_to="none",
    )
    model = Qwen3ForCausalLM(target_config(settings, tokenizer))
    trainer = Trainer(
        model=model,
        optimizers=(
            MuonWithAdamW(model, settings.learning_rate, settings.adam_learning_rate),
            None,
        ),
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
        callbacks=[InterruptCallback()],
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(work)) if work.is_dir() else None)
    if trainer.state.global_step < settings.steps:
        raise SystemExit("the target is not finished; the same command goes on from here")
    done = folder.with_name(folder.name + ".saving")
    shutil.rmtree(done, ignore_errors=True)
    trainer.model.to(torch.float32).save_pretrained(done)
    tokenizer.save_pretrained(done)
    for name, texts in (("train", train), ("heldout", heldout)):
        (done / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in texts)
        )
    done.rename(folder)
    shutil.rmtree(work, ignore_errors=True)
    return folder


def cut(texts: list[str], tokenizer, count: int, tokens: int) -> list[list[int]]:
    """`count` pieces of `tokens` ids, at even distances over all texts, past the files' headers."""
    files = tokenizer(texts, add_special_tokens=False)["input_ids"]
    pieces = [
        ids[i : i + tokens] for ids in files for i in range(tokens, len(ids) - tokens, tokens)
    ]
    if len(pieces) < count:
        raise ValueError(
            f"the files give {len(pieces)} prompts of {tokens} tokens, and {count} were asked for"
        )
    return [pieces[i * len(pieces) // count] for i in range(count)]


PROMPT_TOKENS, ROW_TOKENS = 64, 256


def training_rows(folder: Path, count: int = 1920) -> Path:
    """Token rows for drafters: the target's own continuations of real text, once, kept beside the
    target.

    A drafter serves what its target writes, so it learns from what its target writes: the prompt is
    real text, the supervised rest is sampled from the target at temperature 0.5.
    """
    path = folder / "train_rows.jsonl"
    write_record(
        path.with_suffix(".settings.json"), {"target": Identity(str(folder)).record()}
    )  # says whose words they are
    if path.is_file():
        return path
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    target = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompts = torch.tensor(cut(read_texts(folder / "train.jsonl"), tokenizer, count, PROMPT_TOKENS))
    # rows of one length: the end of text may be written, and text goes on after it, as in the
    # target's training
    settings = dict(
        do_sample=True, temperature=0.5, top_k=0, max_new_tokens=ROW_TOKENS - PROMPT_TOKENS
    )
    settings |= dict(
        eos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=[tokenizer.mask_token_id],
    )
    settings |= dict(cache_implementation="static")  # a growing cache is copied at every step
    rows = []
    with torch.no_grad():
        for batch in track(prompts.split(192), f"the target writes {count} rows"):
            rows += target.generate(
                batch, attention_mask=torch.ones_like(batch), **settings
            ).tolist()
    return save_rows(path, rows)


def heldout_rows(folder: Path, count: int = 64) -> Path:
    """Token rows of held-out files as they are: what accuracy and loss are measured on."""
    path = folder / "heldout_rows.jsonl"
    if not path.is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        save_rows(path, cut(read_texts(folder / "heldout.jsonl"), tokenizer, count, ROW_TOKENS))
    return path


def read_texts(path: Path) -> list[str]:
    """The `text` column of a .jsonl file."""
    return list(load_rows(str(path))["text"])


def save_rows(path: Path, rows: list[list[int]]) -> Path:
    """Write token rows, everything after the prompt supervised; whole or not at all."""
    supervised = [0] * PROMPT_TOKENS + [1] * (ROW_TOKENS - PROMPT_TOKENS)
    lines = [json.dumps({"input_ids": ids, "supervised": supervised}) + "\n" for ids in rows]
    write_whole(path, "".join(lines))
    return path


def recipes_folder() -> Path:
    """`recipes/` inside an installed package, or beside it in a checkout."""
    here = Path(__file__).parent
    return here / "recipes" if (here / "recipes").is_dir() else here.parent / "recipes"


def heldout_prompts(target: Path, count: int, tokens: int) -> list[torch.Tensor]:
    """`count` prompts (1, tokens) from the held-out files."""
    texts = read_texts(target / "heldout.jsonl")
    return [
        torch.tensor([ids])
        for ids in cut(texts, AutoTokenizer.from_pretrained(target), count, tokens)
    ]


def train_drafter(target: Path, recipe: Path, out: Path, *overrides: str) -> dict:
    """Train one drafter of the quickstart target into `out`, going on where an interrupted run
    stopped; a finished one is kept. Returns its provenance."""
    record = out / "provenance.json"
    argv = [
        "--config",
        str(recipe),
        "--target",
        str(target),
        "--output_dir",
        str(out),
    ]
    argv += [
        "--dataset_name",
        str(training_rows(target)),
        "--eval_dataset_name",
        str(heldout_rows(target)),
    ]
    argv += ["--resume_from_checkpoint", "true", *overrides]
    arguments = parse(argv)
    if record.is_file():
        provenance = json.loads(record.read_text())
        wanted = {key: value for part in arguments[:3] for key, value in asdict(part).items()}
        wanted |= {
            key: getattr(arguments[3], key)
            for key in ("objective", "normalisation", "max_steps", "seed")
        }
        # a record older than a key was made with that key's default
        made = {f.name: f.default for part in arguments for f in fields(part)} | provenance[
            "recipe"
        ]
        if all(made[k] == v for k, v in wanted.items() if v is not None):
            print(f"{out}: already trained")
            return provenance
        raise SystemExit(
            f"{out} holds a drafter of another recipe: give another --out, or remove that folder"
        )
    trainer = train(
        *arguments, compare_decoding=False
    )  # both drafters are compared at the end, on more prompts
    if trainer.state.global_step < trainer.state.max_steps:
        raise SystemExit("stopped early; the same command goes on from here")
    return json.loads(record.read_text())


def last(history: list[dict], key: str) -> float:
    """The newest logged value of a metric."""
    return [entry[key] for entry in history if key in entry][-1]


def plot_tau(curves: dict[str, list[dict]], path: Path) -> None:
    """Decoded tau on held-out prompts over training steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name, history in curves.items():
        points = [(entry["step"], entry["eval_tau"]) for entry in history if "eval_tau" in entry]
        axes.plot(*zip(*points), marker="o", label=name)
    axes.set(
        xlabel="training step",
        ylabel="tau (bonus included)",
        title="Decoded tau on held-out prompts",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def evaluate_drafter(
    target_folder: Path, folder: Path, provenance: dict, prompts: int, new_tokens: int
) -> dict:
    """Compare plain and assisted decoding of one drafter on held-out prompts; writes `eval.json`
    beside it."""
    target = AutoModelForCausalLM.from_pretrained(target_folder).eval()
    drafter = AutoModel.from_pretrained(folder)
    results = compare(
        target, drafter, heldout_prompts(target_folder, prompts, 96), new_tokens, pad_token_id=1
    )
    record = evaluation_record(
        results, target, prompts="held-out files of Python's standard library", temperature=0.0,
        max_new_tokens=new_tokens, prompt_tokens=96,
    )  # fmt: skip
    write_record(folder / "eval.json", record)
    plot_alpha(
        {provenance["recipe"]["objective"]: results["acceptance"]["alpha"]}, folder / "alpha.png"
    )
    recipe = provenance["recipe"]
    return {
        "objective": recipe["objective"],
        "normalisation": recipe["normalisation"],
        "seed": recipe["seed"],
        "tau": results["acceptance"]["tau"],
        "alpha": results["acceptance"]["alpha"],
        "common_accuracy": last(provenance["history"], "eval_common_accuracy"),
        "active_ratio": last(provenance["history"], "eval_active_ratio"),
        "tokens_per_second": results["tokens_per_second"],
        "plain_tokens_per_second": results["plain_tokens_per_second"],
        "speedup": results["speedup"],
        "lossless": results["lossless"]["different"] == 0,
        "outputs": results["lossless"],
        "repetition": results["repetition"],
        "prompts": prompts,
        "path": str(folder),
    }


@errors_in_one_line()
def main(argv: list[str] | None = None, settings: TargetSettings | None = None) -> None:
    """Command line of `python -m hf_specauf.quickstart`."""
    parser = argparse.ArgumentParser(
        prog="python -m hf_specauf.quickstart", description=__doc__.split("\n\n")[1]
    )
    parser.add_argument(
        "--out", default="out/quickstart", help="folder for report, plots and drafters"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of both drafters (default 0)")
    parser.add_argument(
        "--steps", type=int, help="training steps of each drafter (default: the recipes')"
    )
    parser.add_argument(
        "--prompts", type=int, default=20, help="held-out prompts of the final comparison"
    )
    parser.add_argument(
        "--new_tokens", type=int, default=96, help="tokens generated for each prompt"
    )
    args = parser.parse_args(argv)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    target = quickstart_target(settings or TargetSettings())
    overrides = ["--seed", str(args.seed)] + (
        ["--max_steps", str(args.steps)] if args.steps else []
    )
    rows, histories = [], {}
    for objective in ("decay", "auf"):
        recipe = recipes_folder() / "quickstart" / f"dflash_{objective}.yaml"
        print(f"\n== drafter: {objective} ({recipe})")
        record = train_drafter(target, recipe, out / objective, *overrides)
        histories[objective] = record["history"]
        rows.append(
            evaluate_drafter(target, out / objective, record, args.prompts, args.new_tokens)
        )
    report = {
        "plain_tokens_per_second": sum(row["plain_tokens_per_second"] for row in rows) / len(rows),
        "tau_definition": TAU_DEFINITION,
        "drafters": rows,
        "recipes": {
            row["objective"]: json.loads((Path(row["path"]) / "provenance.json").read_text())[
                "recipe"
            ]
            for row in rows
        },
    }
    write_record(out / "report.json", report)
    plot_alpha({row["objective"]: row["alpha"] for row in rows}, out / "alpha.png")
    plot_tau(histories, out / "tau.png")
    table = Table(
        title=f"{args.prompts} held-out prompts, {args.new_tokens} new tokens each, greedy"
    )
    for column in ("drafter", "tau", "token accuracy", "tokens/s", "plain", "speed-up", "lossless"):
        table.add_column(column, justify="left" if column == "drafter" else "right")
    for row in rows:
        table.add_row(
            row["objective"], f"{row['tau']:.3f}", f"{row['common_accuracy']:.3f}", f"{row['tokens_per_second']:.0f}",
            f"{row['plain_tokens_per_second']:.0f}", f"{row['speedup']:.2f}x", "yes" if row["lossless"] else "NO",
        )  # fmt: skip
    console = Console()
    console.print(table)
    console.print(
        f"{TAU_DEFINITION}.\nwritten: {out / 'report.json'}, alpha.png, tau.png and the drafter"
        " folders beside it"
    )


if __name__ == "__main__":
    main()
