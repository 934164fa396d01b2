"""Seconds and memory of training steps, with random weights of real shapes, through AUFTrainer itself.

    python tests/gpu/shapes.py [JOB ...] [--json PATH] [--device cuda] [--seconds 200]

A job is one entry of `JOBS`, or `heads`: head and loss alone at Qwen3-8B's width. Compare only numbers of one run: the
`ratio` of a job is to the job that it is `compared_with`, in this run. Random weights cost what trained ones cost,
except that the first slot is nearly always wrong, so that AUF has about the least to do. Each row holds the active
ratio it had.
"""

import argparse
import gc
import math
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from conditions import ROOT, conditions, default_device
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    TrainerCallback,
)

from hf_specauf import AUFConfig, AUFTrainer
from hf_specauf.evaluation.compare import compare
from hf_specauf.records import write_record
from hf_specauf.target import drafter_config

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
from training_step import measure_head

SEED = 0
TARGETS = {
    "qwen3-8b": Qwen3Config(
        hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, vocab_size=151936, max_position_embeddings=40960, tie_word_embeddings=False,
    ),
    "smollm2-135m": LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        head_dim=64, vocab_size=49152, max_position_embeddings=8192, tie_word_embeddings=True,
    ),
    "tiny": Qwen3Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=96, tie_word_embeddings=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One training that is timed. Its shapes are a recipe's.

    Attributes:
        accumulation (`int`): micro-batches of a step; two suffice, because each costs the same.
        repeating (`bool`): text of eight tokens over and over, which a drafter learns soonest.
        decode (`bool`): also measure what a round of decoding costs, in plain tokens' time.
        compared_with (`str`, *optional*): the job whose seconds and memory this one's are divided by.
    """

    target: str
    target_layer_ids: tuple[int, ...]
    num_draft_layers: int
    length: int
    anchors_per_row: int
    batch: int = 1
    accumulation: int = 1
    block_size: int = 16
    head_rows_per_chunk: int = 1024
    objective: str = "auf"
    attention: str = "sdpa"
    activation_checkpointing: bool = False
    repeating: bool = False
    decode: bool = False
    compared_with: str | None = None


# recipes/qwen3-8b/dflash_auf_1gpu.yaml, with 2 micro-batches a step instead of 32
QWEN = dict(
    target="qwen3-8b", target_layer_ids=(1, 9, 17, 25, 33), num_draft_layers=5, length=3072, anchors_per_row=512,
    accumulation=2,
)  # fmt: skip
# smollm2.yaml
SMOL = dict(
    target="smollm2-135m", target_layer_ids=(1, 7, 14, 20, 27), num_draft_layers=4, length=2048, anchors_per_row=256,
    batch=8, head_rows_per_chunk=4096,
)  # fmt: skip
TINY = dict(target="tiny", target_layer_ids=(1, 2), num_draft_layers=1, length=64, anchors_per_row=4, block_size=4)
JOBS = {
    "smollm2": Job(**SMOL),
    "smollm2_repeating": Job(**SMOL, repeating=True, decode=True, compared_with="smollm2"),
    "qwen3": Job(**QWEN, activation_checkpointing=True, decode=True),
    "qwen3_decay": Job(**QWEN, activation_checkpointing=True, objective="decay", compared_with="qwen3"),
    "qwen3_flex": Job(**QWEN, activation_checkpointing=True, attention="flex_attention", compared_with="qwen3"),
    "qwen3_no_checkpointing": Job(**QWEN, compared_with="qwen3"),
    "tiny": Job(**TINY, decode=True),
    "tiny_checkpointing": Job(**TINY, activation_checkpointing=True, repeating=True, compared_with="tiny"),
}
# What is worth most comes first, because the time may end before the list does.
DEFAULT = ("smollm2", "smollm2_repeating", "heads", "qwen3", "qwen3_decay", "qwen3_no_checkpointing", "qwen3_flex")
# head and loss alone: ways of training_step.py and slots whose logits are held at once
HEADS = [("plain", 1024), ("chunked", 1024), ("progressive", 256), ("progressive", 1024), ("progressive", 4096)]
ACTIVE_RATIOS = (0.08, 0.16, 0.4)


class Clock(TrainerCallback):
    """Seconds and peak memory of every step. The device has finished before the clock is read."""

    def __init__(self, device: str):
        self.on_cuda = device == "cuda"
        self.seconds: list[float] = []
        self.peaks: list[int | None] = []

    def _now(self) -> float:
        if self.on_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs):
        if self.on_cuda:
            torch.cuda.reset_peak_memory_stats()
        self.start = self._now()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(self._now() - self.start)
        self.peaks.append(torch.cuda.max_memory_allocated() if self.on_cuda else None)


def placeholder_tokenizer() -> PreTrainedTokenizerFast:
    """The trainer asks for a tokenizer. The rows here are token ids already."""
    core = Tokenizer(models.WordLevel({"<eos>": 0, "<pad>": 1}, unk_token="<eos>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")


@lru_cache(maxsize=1)  # jobs of one target stand together, and the next target takes its place
def random_target(name: str, device: str):
    """A frozen bf16 target of these shapes, made where it will stay. A CPU gets fp32, which is faster there."""
    torch.manual_seed(SEED)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        return AutoModelForCausalLM.from_config(TARGETS[name], dtype=dtype, attn_implementation="sdpa").eval()


def random_rows(job: Job, vocabulary: int) -> Dataset:
    """Token rows for one step; the first 16 tokens of each are the prompt."""
    generator = torch.Generator().manual_seed(SEED)
    count = job.batch * job.accumulation
    # ids 0 and 1 are special, and the last one is the mask token
    if job.repeating:
        words = torch.randint(3, 50, (count, 8), generator=generator)
        ids = words.repeat(1, job.length // 8)
    else:
        ids = torch.randint(3, vocabulary - 1, (count, job.length), generator=generator)
    flags = [0] * 16 + [1] * (job.length - 16)
    return Dataset.from_dict({"input_ids": ids.tolist(), "supervised": [flags] * count})


def measure(job: Job, device: str, steps: int) -> dict:
    """Train a fresh drafter: one step to warm up, `steps` that count, one that logs."""
    target = random_target(job.target, device)
    vocabulary = target.config.vocab_size
    config = drafter_config(
        target, num_hidden_layers=job.num_draft_layers, block_size=job.block_size, mask_token_id=vocabulary - 1,
        target_layer_ids=list(job.target_layer_ids),
    )  # fmt: skip
    torch.manual_seed(SEED)
    drafter = AutoModel.from_config(config, dtype=torch.float32)
    drafter.set_attn_implementation(job.attention)
    clock = Clock(device)
    with tempfile.TemporaryDirectory() as folder:
        args = AUFConfig(
            output_dir=folder, use_cpu=device == "cpu", seed=SEED, objective=job.objective, learning_rate=6e-4,
            per_device_train_batch_size=job.batch, gradient_accumulation_steps=job.accumulation,
            anchors_per_row=job.anchors_per_row, max_length=job.length, head_rows_per_chunk=job.head_rows_per_chunk,
            activation_checkpointing=job.activation_checkpointing, max_steps=steps + 2, logging_steps=steps + 2,
            eval_prompts=0, save_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        trainer = AUFTrainer(
            model=drafter, target_model=target, args=args, train_dataset=random_rows(job, vocabulary),
            processing_class=placeholder_tokenizer(), callbacks=[clock],
        )  # fmt: skip
        trainer.train()
    log = [entry for entry in trainer.state.log_history if "active_ratio" in entry][-1]
    # The first step also tries the largest micro-batch, and compiles. The last one logs, and so predicts every slot.
    counted = clock.seconds[1:-1]
    found = {
        "seconds": counted,
        "seconds_a_micro_batch": statistics.median(counted) / job.accumulation,
        "first_seconds": clock.seconds[0],
        "logging_seconds": clock.seconds[-1],
        "active_ratio": log["active_ratio"],
        "loss": log["loss"],
    }
    if device == "cuda":
        found["peak_memory"] = max(clock.peaks[1:-1])
        found["trial_memory"] = clock.peaks[0]
        found["weights_memory"] = sum(p.numel() * p.element_size() for p in target.parameters())
    if job.decode:
        found["decoding"] = decoding_cost(target, trainer.model, device)
    return found


def decoding_cost(target, drafter, device: str, prompts: int = 2, new_tokens: int = 48) -> dict:
    """What a round of drafting and verifying costs, in the time of a plainly decoded token: tau must exceed it."""
    drafter = drafter.to(target.dtype).eval()
    drafter.set_attn_implementation("sdpa")
    generator = torch.Generator().manual_seed(SEED)
    longest = min(300, target.config.max_position_embeddings // 2)
    high = min(1000, target.config.vocab_size - 1)
    given = [torch.randint(3, high, (1, longest), generator=generator).to(device) for _ in range(prompts)]
    found = compare(target, drafter, given, new_tokens, show_progress=False)
    tau = found["acceptance"]["tau"]
    return {
        "tau": tau,
        "plain_tokens_per_second": found["plain_tokens_per_second"],
        "tokens_per_second": found["tokens_per_second"],
        "round_in_plain_tokens": tau / found["speedup"],
        "lossless": found["lossless"],
    }


def against(row: dict, other: dict) -> dict:
    """Seconds and memory of one job over those of another in this run."""
    ratios = {"seconds": row["seconds_a_micro_batch"] / other["seconds_a_micro_batch"]}
    if "peak_memory" in row and "peak_memory" in other:
        # without the target, which is the same for both
        ours, theirs = (part["peak_memory"] - part["weights_memory"] for part in (row, other))
        ratios["memory_without_target"] = ours / theirs
        ratios["memory"] = row["peak_memory"] / other["peak_memory"]
    return ratios


def measure_heads(device: str, blocks: int, hidden: int, vocabulary: int, repeats: int) -> list[dict]:
    """Head and loss alone for every active ratio and way, each against `plain` at the same ratio."""
    dtype = "bfloat16" if device == "cuda" else "float32"
    rows = []
    for active in ACTIVE_RATIOS:
        plain = None
        for way, chunk in HEADS:
            found = measure_head(way, hidden, vocabulary, blocks, 16, active, dtype, device, chunk, repeats)
            row = {"way": way, "rows_per_chunk": chunk, "active": active, "blocks": blocks, "hidden": hidden, **found}
            seconds = statistics.median(found["seconds"])
            if way == "plain":
                plain = {"seconds": seconds, "memory": found["memory"], "loss": found["loss"]}
            row["times_faster"] = plain["seconds"] / seconds
            row["memory_share"] = found["memory"] / max(plain["memory"], 1)
            if way == "progressive":  # the same slots count, so it is the same loss
                row["same_loss"] = math.isclose(found["loss"], plain["loss"], rel_tol=0.02)
            rows.append(row)
    return rows


def headline(jobs: dict[str, dict]) -> str:
    """Each job in a few words."""
    words = []
    for name, row in jobs.items():
        if "failed" in row:
            words.append(f"{name} failed")
        elif name == "heads":
            best = max(r["times_faster"] for r in row["rows"] if r["way"] == "progressive")
            words.append(f"progressive head up to {best:.2f} times as fast as plain")
        else:
            said = f"{name} {row['seconds_a_micro_batch']:.3f} s a micro-batch"
            if "peak_memory" in row:
                said += f", {row['peak_memory'] / 1e9:.1f} GB"
            if "ratio" in row:
                said += f" ({row['ratio']['seconds']:.2f} times the seconds of {row['compared_with']})"
            words.append(said)
    return "; ".join(words)


def attempt(name: str, args: argparse.Namespace) -> dict:
    """One job's row, or why there is none: a job that fails, by memory for instance, must not cost the others."""
    start = time.perf_counter()
    try:
        if name == "heads":
            sizes = args.head_blocks, args.head_hidden, args.head_vocabulary
            row = {"rows": measure_heads(args.device, *sizes, repeats=args.steps)}
        else:
            row = vars(JOBS[name]) | measure(JOBS[name], args.device, args.steps)
    except Exception as error:
        row = {"failed": f"{type(error).__name__}: {error}"[:500]}
    # outside `except`, because the error's traceback holds the tensors of the job
    gc.collect()
    if args.device == "cuda":
        torch.cuda.empty_cache()
    return row | {"seconds_in_all": time.perf_counter() - start}


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", help=f"of {', '.join([*JOBS, 'heads'])}; by default all but the tiny ones")
    parser.add_argument("--json", type=Path, help="write the results here, after every job")
    parser.add_argument("--device", default=default_device(), help="cuda or cpu")
    parser.add_argument("--steps", type=int, default=3, help="steps that count, of each job")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no job after so many")
    parser.add_argument("--head_blocks", type=int, default=512, help="N of heads")
    parser.add_argument("--head_hidden", type=int, default=4096, help="H of heads")
    parser.add_argument("--head_vocabulary", type=int, default=151_936, help="V of heads")
    args = parser.parse_args(argv)
    unknown = set(args.jobs) - {*JOBS, "heads"}  # argparse's own `choices` refuse an empty list
    if unknown:
        parser.error(f"there is no job {', '.join(sorted(unknown))}: choose of {', '.join([*JOBS, 'heads'])}")
    begin = time.perf_counter()
    record = conditions(args.device) | {"seed": SEED, "headline": "", "jobs": {}, "left_out": []}
    for name in args.jobs or DEFAULT:
        if time.perf_counter() - begin > args.seconds:
            record["left_out"].append(name)
            continue
        row = attempt(name, args)
        other = record["jobs"].get(row.get("compared_with"), {})
        if "seconds" in row and "seconds" in other:
            row["ratio"] = against(row, other)
        record["jobs"][name] = row
        record["headline"] = headline(record["jobs"])
        # after every job, so that a run that is stopped leaves what it had
        if args.json is not None:
            write_record(args.json, record)
    print(record["headline"])
    return record


if __name__ == "__main__":
    main()
