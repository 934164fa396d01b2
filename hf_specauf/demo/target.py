"""The quickstart's target: a small Qwen3 trained on the source of Python's standard library.

That text is on every machine that runs Python, so nothing is downloaded.
"""

import hashlib
import json
import os
import random
import shutil
import sys
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from ..training.callbacks import InterruptCallback
from ..training.optimizer import MuonWithAdamW

EOS, PAD, MASK = "<|endoftext|>", "<|pad|>", "<|mask|>"
# Installed packages differ from machine to machine. Tests, tables and applications are not like the
# rest.
SKIPPED_FOLDERS = {
    "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo",
    "encodings", "pydoc_data", "_bundled", "__pycache__",
}  # fmt: skip
FEWEST_CHARACTERS = 500  # of a file; shorter ones are left out
LEAST_TEXT = 2_000_000  # characters of all files; with fewer, most of the library is missing


@dataclass
class TargetSettings:
    """Everything that decides the quickstart target; its hash names the cache folder."""

    seed: int = 0
    # short tokens: the next one is easier to guess, for target and drafter alike
    vocab_size: int = 512
    hidden_size: int = 192
    # deep and thin: a two-layer drafter is in a fair proportion
    num_hidden_layers: int = 12
    intermediate_size: int = 512
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 32
    row_tokens: int = 256
    rows_per_step: int = 8
    steps: int = 160
    learning_rate: float = 2e-2  # Muon's, for the matrices
    adam_learning_rate: float = 3e-3  # for embedding and norms
    # another version has another standard library
    python: str = f"{sys.version_info.major}.{sys.version_info.minor}"

    def folder(self) -> Path:
        """Where the target of these settings is cached."""
        words = json.dumps(asdict(self), sort_keys=True)
        digest = hashlib.sha256(words.encode()).hexdigest()[:12]
        return cache_folder() / f"quickstart-{digest}"


def cache_folder() -> Path:
    """`$HF_SPECAUF_CACHE`, else `hf_specauf/` under the user's cache directory."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("HF_SPECAUF_CACHE") or Path(root) / "hf_specauf")


def standard_library() -> tuple[list[str], list[str]]:
    """Source files of the running Python's standard library, split by file name into (training,
    held-out) texts.

    Raises:
        SystemExit: this Python came without its source.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = []
    for folder, subfolders, names in os.walk(root):
        # `os.walk` goes on into what this list holds afterwards
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    train, heldout = [], []
    for path in sorted(paths):
        text = path.read_text(encoding="utf-8", errors="replace")
        if len(text) < FEWEST_CHARACTERS:
            continue
        # by a hash of the name, so that the split does not move when a Python release adds a file
        name = path.relative_to(root).as_posix()
        bucket = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 16
        if bucket == 0:
            heldout.append(text)
        else:
            train.append(text)
    if sum(map(len, train)) < LEAST_TEXT:
        raise SystemExit(
            f"{root} holds too little Python source to train on. Install the standard library's .py"
            " files (on Debian: the package libpython3-stdlib), or train on your own text with"
            " `python -m hf_specauf.train`."
        )
    return train, heldout


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
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


def target_config(settings: TargetSettings, tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
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


def packed_rows(
    texts: list[str], tokenizer: PreTrainedTokenizerFast, settings: TargetSettings
) -> list[list[int]]:
    """Rows of `row_tokens` ids: all texts one after another, in random order, cut at even
    lengths."""
    documents = tokenizer(texts, add_special_tokens=False)["input_ids"]
    random.Random(settings.seed).shuffle(documents)
    ids = []
    for document in documents:
        ids += document
        ids.append(tokenizer.eos_token_id)
    size = settings.row_tokens
    return [ids[i : i + size] for i in range(0, len(ids) - size, size)]


def train_target(
    settings: TargetSettings,
    tokenizer: PreTrainedTokenizerFast,
    rows: list[list[int]],
    work: Path,
) -> Qwen3ForCausalLM:
    """The target, trained from random weights. It goes on from the newest checkpoint in `work`.

    Raises:
        SystemExit: it was interrupted.
    """
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.rows_per_step,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        use_cpu=True,
        # twice as fast where the processor has it
        bf16=torch.cpu._is_avx512_bf16_supported(),
        seed=settings.seed,
        save_steps=40,
        save_total_limit=1,
        logging_steps=50,
        report_to="none",
    )
    model = Qwen3ForCausalLM(target_config(settings, tokenizer))
    optimizer = MuonWithAdamW(model, settings.learning_rate, settings.adam_learning_rate)
    trainer = Trainer(
        model=model,
        # `None`: the schedule that the arguments name
        optimizers=(optimizer, None),
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
        callbacks=[InterruptCallback()],
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(work)) if work.is_dir() else None)
    if trainer.state.global_step < settings.steps:
        raise SystemExit("the target is not finished; the same command goes on from here")
    return trainer.model.to(torch.float32)


def quickstart_target(settings: TargetSettings) -> Path:
    """Folder with the trained target, its tokenizer and `heldout.jsonl` / `train.jsonl`; trained on
    the first call.

    Interrupted training goes on from its last checkpoint; the folder appears under its name only
    when complete.
    """
    folder = settings.folder()
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
    rows = packed_rows(train, tokenizer, settings)
    work = folder.with_name(folder.name + ".training")
    model = train_target(settings, tokenizer, rows, work)
    done = folder.with_name(folder.name + ".saving")
    # an earlier call may have been killed while it saved
    shutil.rmtree(done, ignore_errors=True)
    model.save_pretrained(done)
    tokenizer.save_pretrained(done)
    for name, texts in (("train", train), ("heldout", heldout)):
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (done / f"{name}.jsonl").write_text("".join(lines))
    done.rename(folder)
    shutil.rmtree(work, ignore_errors=True)
    return folder
