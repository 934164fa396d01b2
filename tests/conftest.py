"""Tiny real models for the tests: built here from real architectures, trained here, never downloaded."""

import atexit
import gc
import json
import os
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path

os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="specauf-datasets-")  # read when `datasets` is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small are slower in threads

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed
from warm_python import Process, WarmPython

import hf_specauf  # noqa: F401  registers the drafter
from hf_specauf.drafters.modeling_dflash import DFlashDraftModel
from hf_specauf.drafters.modeling_domino import DominoDraftModel
from hf_specauf.losses.blocks import make_blocks, sample_anchors
from hf_specauf.serving import decoding
from hf_specauf.target import FrozenTarget, drafter_config

atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

ROOT = Path(__file__).parents[1]
BASE = dict(
    use_cpu="true", num_draft_layers=1, block_size=4, target_layer_ids="0 2", max_length=96, anchors_per_row=4,
    max_steps=3, per_device_train_batch_size=2, per_device_eval_batch_size=2, eval_rows=3, eval_prompts=1,
    eval_new_tokens=8, logging_steps=1, disable_tqdm="true", seed=7,
)  # fmt: skip
VOCAB, MASK, EOS, PAD, BOS = 96, 95, 0, 1, 2
SHAPE = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=4, vocab_size=VOCAB, max_position_embeddings=256)
GATED = dict(intermediate_size=64, num_key_value_heads=2, head_dim=8, **SHAPE)
MIXTURE = dict(num_local_experts=4, num_experts_per_tok=2, **GATED)
ARCHITECTURES = {
    "qwen3": GATED,
    "llama": {k: v for k, v in GATED.items()},
    "gemma3_text": dict(query_pre_attn_scalar=8, sliding_window=16, **GATED),
    "gpt2": dict(n_embd=32, n_head=4, n_layer=4, n_positions=256, vocab_size=VOCAB),
    "mixtral": MIXTURE,
    "gpt_oss": dict(sliding_window=16, **MIXTURE),
}
# Files of tests. Of two processes none waits long for the other at the end, where what is started last is short.
LONGEST = (
    "test_distributed", "test_hub", "test_generate", "test_regenerate", "test_trainer", "test_versions",
    "test_domino", "test_domino_training", "test_train", "test_lora", "test_gpu_scripts", "test_evaluate",
    "test_quickstart", "test_resume",
)  # fmt: skip
TEXT = """To be read by a tiny tokenizer: the quick brown fox jumps over the lazy dog, while 0123456789 sheep sleep.
def answer(question):
    return {"role": "assistant", "content": question.upper()}
"""
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marker
def pytest_collection_modifyitems(items):
    """Start the longest files first, and put the marker `own` on all but the first of a test's parameters, where
    `own_parameters` asks for it."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    seen = set()
    for item in items:
        if item.get_closest_marker("own_parameters"):
            test = item.path, item.originalname
            if test in seen:
                item.add_marker("own")
            seen.add(test)


def pytest_collection_finish():
    """Take what is imported out of the garbage collector's sight. Trainer collects in each training. To look through
    all of torch and transformers takes as long as a tiny training itself."""
    gc.collect()
    gc.freeze()


def make_target(architecture: str = "qwen3", dtype: torch.dtype = torch.float64, seed: int = 0, **overrides):
    """A tiny target with random weights spread enough that its greedy text is not one token for ever."""
    set_seed(seed)
    special = dict(eos_token_id=EOS, pad_token_id=PAD, bos_token_id=BOS)
    config = AutoConfig.for_model(architecture, **(ARCHITECTURES[architecture] | special | overrides))
    # grouped expert kernels know no float64
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(4.0)
    model.generation_config.eos_token_id = None  # texts of a known length, unless a test wants the end
    model.generation_config.pad_token_id = PAD
    return model.to(dtype).eval()


def make_drafter(target, block_size: int = 4, layers: int = 1, taps=(0, 2), seed: int = 0, dtype=torch.float32):
    """A drafter for it with random weights."""
    config = drafter_config(
        target, num_hidden_layers=layers, block_size=block_size, mask_token_id=MASK, target_layer_ids=list(taps)
    )
    set_seed(seed)
    return DFlashDraftModel(config).to(dtype).eval()


def make_domino(target, block_size: int = 4, layers: int = 1, taps=(0, 2), seed: int = 0, dtype=torch.float32, **head):
    """A Domino drafter for it with random weights; `head`: keys of its causal head."""
    config = drafter_config(
        target, num_hidden_layers=layers, block_size=block_size, mask_token_id=MASK, target_layer_ids=list(taps),
        kind="domino", own_keys=dict(gru_hidden_dim=12, emb_dim=8) | head,
    )  # fmt: skip
    set_seed(seed)
    return DominoDraftModel(config).to(dtype).eval()


def attach(target, drafter, **options) -> decoding.Attachment:
    """`hf_specauf.attach` that verifies whole blocks and looks nothing up, unless a test says otherwise: no clock then
    decides what a round is."""
    return decoding.attach(target, drafter, **(dict(draft_length=None, lookup=False) | options))


def random_prompts(count: int, length: int = 12, seed: int = 0) -> torch.Tensor:
    """(count, length) ids, no special token among them."""
    return torch.randint(3, MASK, (count, length), generator=torch.Generator().manual_seed(seed))


def overfit(drafter, target, texts: torch.Tensor, prompt_length: int, steps: int = 150, lr: float = 5e-3):
    """Train a drafter, in a plain loop over our own blocks, on texts (B, S) the target wrote after their prompts."""
    frozen = FrozenTarget(target, drafter.config)
    supervised = torch.zeros_like(texts, dtype=torch.bool)
    supervised[:, prompt_length:] = True
    documents = torch.zeros_like(texts)
    dtype = drafter.dtype
    drafter.float().train()
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=lr)
    context = frozen.context(texts).float()
    config, domino = drafter.config, isinstance(drafter, DominoDraftModel)
    for step in range(steps):
        anchors, real = sample_anchors(supervised, documents, 16, torch.arange(len(texts)), 0, step)
        blocks = make_blocks(
            texts, supervised, documents, anchors, real, config.block_size, config.mask_token_id,
            predictions=config.predictions,
        )  # fmt: skip
        given = frozen.noise_embeds(blocks.noise_ids).float(), context, blocks.attention_mask, blocks.position_ids
        correction = 0.0
        if domino:
            hidden, correction = drafter(
                *given, prev_embeds=frozen.noise_embeds(blocks.previous_ids),
                reduce=lambda hidden, rows, project: (hidden, project(rows)),
            ).reduced  # fmt: skip
            correction = correction[blocks.valid]
        else:
            hidden = drafter(*given).last_hidden_state.view(*anchors.shape, config.block_size, -1)[:, :, 1:]
        head = frozen.head.to(target.dtype)
        logits = head(hidden[blocks.valid].to(target.dtype)) + correction
        cross_entropy(logits, blocks.labels[blocks.valid]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return drafter.to(dtype).eval()


def byte_level_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 360 tokens with eos, pad and mask."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|eos|>", "<|pad|>", "<|mask|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([TEXT] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        mask_token="<|mask|>",
        chat_template=chat_template,
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer with a chat template that has generation markers."""
    return byte_level_tokenizer(CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def text_target(tokenizer):
    """A tiny fp32 qwen3 target over the tokenizer's vocabulary."""
    return make_target(
        dtype=torch.float32,
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def load_rows_file(path):
    """Token rows from a .jsonl file, without a cache folder."""
    return Dataset.from_list([json.loads(line) for line in path.read_text().splitlines()])


# ---- the command line of training


@pytest.fixture(scope="module")
def files(tmp_path_factory, tokenizer):
    """A folder with a target, `text.jsonl` and `chat.jsonl`."""
    folder = tmp_path_factory.mktemp("files")
    ids = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None)
    target = make_target(dtype=torch.float32, vocab_size=len(tokenizer), **ids)
    target.save_pretrained(folder / "target")
    tokenizer.save_pretrained(folder / "target")
    words = TEXT.split()
    texts = [" ".join(words[i % 9 :] + words[: i % 5]) for i in range(30)]
    chats = [
        [{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": text}]
        for i, text in enumerate(texts)
    ]
    for name, column, rows in (
        ("text", "text", texts),
        ("chat", "messages", chats),
        ("short", "text", [a + b for a in "abc" for b in "klmnopqrst"]),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({column: row}) + "\n" for row in rows))
    (folder / "single.jsonl").write_text('{"text": "only one row"}\n')
    (folder / "broken.jsonl").write_text('{"text": "a row"}\n{"text": "a trunc')
    (folder / "broken.yaml").write_text("objective: [auf\nseed: 1\n")
    return folder


@pytest.fixture
def command(files, tmp_path):
    """Words of a command line; keyword arguments override `base`."""

    def command(data="text", base=BASE, **overrides) -> list[str]:
        keys = dict(target=files / "target", dataset_name=files / f"{data}.jsonl")
        keys |= dict(output_dir=tmp_path / "out") | base | overrides
        return [word for key, value in keys.items() for word in (f"--{key}", *str(value).split())]

    return command


@cache
def warm_python(python: str = sys.executable) -> WarmPython:
    """The server of an interpreter's processes in this environment; one for all tests."""
    return WarmPython(python)


def start(*words: str) -> Process:
    """`python -m` some words, in a process of its own."""
    return warm_python().start("-m", *words)


def final(folder) -> dict[str, torch.Tensor]:
    return AutoModel.from_pretrained(folder, dtype=torch.float32).state_dict()


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
