"""The embedded default: Spec-AUF's claim on real text, on two CPU cores, with no Hub access.

`python -m hf_specauf.quickstart` trains a small real target (Qwen3 architecture) on the source of Python's standard
library and keeps it in the user's cache; trains a decay-only and an AUF drafter from two recipes that differ in
`objective` alone; evaluates both on held-out files; and writes `report.json`, two plots and the drafter folders.
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

EOS, PAD, MASK = "<|endoftext|>", "<|pad|>", "<|mask|>"
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings",
                   "pydoc_data", "_bundled", "__pycache__"}  # fmt: skip


@dataclass
class TargetSettings:
    """Everything that decides the quickstart target; its hash names the cache folder."""

    seed: int = 0
    vocab_size: int = 4096
    hidden_size: int = 192
    num_hidden_layers: int = 12  # deep and thin: a two-layer drafter is in a fair proportion
    intermediate_size: int = 512
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 32
    row_tokens: int = 256
    rows_per_step: int = 8
    steps: int = 1000
    learning_rate: float = 2e-3
    python: str = f"{sys.version_info.major}.{sys.version_info.minor}"


def cache_folder() -> Path:
    """`$HF_SPECAUF_CACHE`, else `hf_specauf/` under the user's cache directory."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("HF_SPECAUF_CACHE") or Path(root) / "hf_specauf")


def standard_library() -> tuple[list[str], list[str]]:
    """Source files of the running Python's standard library, split by file name into (training, held-out) texts."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train, heldout = [], []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if SKIPPED_FOLDERS.intersection(parts[:-1]):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if len(text) < 500:
            continue
        # by a hash of the name, so that the split does not move when a Python release adds a file
        bucket = int(hashlib.sha256("/".join(parts).encode()).hexdigest(), 16) % 16
        (heldout if bucket == 0 else train).append(text)
    if sum(map(len, train)) < 2_000_000:
        raise SystemExit(
            f"{root} holds too little Python source to train on. Install the standard library's .py files "
            "(on Debian: the package libpython3-stdlib), or train on your own text with `python -m hf_specauf.train`."
        )
    return train, heldout


def train_tokenizer(texts: list[str], vocab_size: int):
    """A byte-level BPE tokenizer with its own mask token (never pad or eos)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

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
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, mask_token=MASK)


def quickstart_target(settings: TargetSettings) -> Path:
    """Folder with the trained target, its tokenizer and `heldout.jsonl` / `train.jsonl`; trained on the first call.

    Interrupted training goes on from its last checkpoint; the folder appears under its name only when complete.
    """
    import torch
    from datasets import Dataset
    from transformers import Qwen3Config, Qwen3ForCausalLM, Trainer, TrainingArguments, set_seed
    from transformers.trainer_utils import get_last_checkpoint

    digest = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode()).hexdigest()[:12]
    folder = cache_folder() / f"quickstart-{digest}"
    if folder.is_dir():
        print(f"target: cached at {folder}")
        return folder
    train, heldout = standard_library()
    print(f"target: training on {len(train)} files of Python {settings.python}'s standard library (cached afterwards)")
    set_seed(settings.seed)
    tokenizer = train_tokenizer(train, settings.vocab_size)
    documents = tokenizer(train, add_special_tokens=False)["input_ids"]
    random.Random(settings.seed).shuffle(documents)
    ids = [token for document in documents for token in document + [tokenizer.eos_token_id]]
    size = settings.row_tokens
    rows = [ids[i : i + size] for i in range(0, len(ids) - size, size)]
    config = Qwen3Config(
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
    work = folder.with_name(folder.name + ".training")
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.rows_per_step,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=0.1,
        use_cpu=True,
        bf16=torch.cpu._is_avx512_bf16_supported(),  # twice as fast where the processor has it
        seed=settings.seed,
        save_steps=100,
        save_total_limit=1,
        logging_steps=50,
        report_to="none",
    )
    trainer = Trainer(
        model=Qwen3ForCausalLM(config),
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(work)) if work.is_dir() else None)
    done = folder.with_name(folder.name + ".saving")
    shutil.rmtree(done, ignore_errors=True)
    trainer.model.to(torch.float32).save_pretrained(done)
    tokenizer.save_pretrained(done)
    for name, texts in (("train", train), ("heldout", heldout)):
        (done / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    done.rename(folder)
    shutil.rmtree(work, ignore_errors=True)
    return folder
