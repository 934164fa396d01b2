"""What the progressive head saves: time and memory of head and loss, and of a whole training step.

    python tests/benchmarks/training_step.py [--quick] [--json PATH] [--device cuda] [--hidden 512] [--blocks 64]

Three ways on the same hidden rows, labels and frozen head, each in a process of its own: `plain` computes the logits
of all valid slots at once and calls cross_entropy for AUF's support; `progressive` walks the blocks and stops at each
first failure, and its loss and gradient must agree with `plain`'s; `chunked` counts all valid slots, a chunk at a time
(what full-support objectives use), and its loss must agree with cross_entropy's of all of them. First head and loss
alone, then whole steps of one training row, for every dtype and active ratio; then whole steps as one size grows.
Memory is the peak (resident size on CPU, allocated on CUDA) minus what was there before.
"""

import argparse
import json
import math
import shlex
import statistics
import subprocess
import sys
import threading
import time
from datetime import date
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import Qwen3Config, Qwen3ForCausalLM, set_seed

from hf_specauf.drafters.modeling_dflash import DFlashDraftModel
from hf_specauf.losses.blocks import make_blocks, sample_anchors
from hf_specauf.losses.head_loss import head_loss
from hf_specauf.losses.objectives import OBJECTIVES, LossSpec, first_failure_support
from hf_specauf.records import environment, write_record
from hf_specauf.target import FrozenTarget, drafter_config

WAYS = ("plain", "chunked", "progressive")


def chance_for(active: float, slots: int) -> float:
    """Chance that a slot is right for which a share `active` of `slots` is supported, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(50):
        p = (low + high) / 2
        low, high = (p, high) if sum(p**k for k in range(slots)) / slots < active else (low, p)
    return p


def labels_for(logits_of, rows: torch.Tensor, active: float, vocabulary: int) -> torch.Tensor:
    """Labels for which the drafter is right in a random prefix of each block: (N, K-1, H) -> (N, K-1)."""
    blocks, slots, _ = rows.shape
    chance = chance_for(active, slots)
    right = torch.rand(blocks, slots, device=rows.device) < chance
    best = torch.cat([logits_of(chunk).argmax(-1) for chunk in rows.flatten(0, 1).split(64)]).view(blocks, slots)
    return torch.where(right, best, (best + 1) % vocabulary)


class PeakMemory:
    """Peak minus start, in bytes, between entering and leaving."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"

    def __enter__(self):
        self.process, self.running, self.peak = psutil.Process(), True, 0
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
        else:
            self.start = self.process.memory_info().rss
            self.thread = threading.Thread(target=self._watch, daemon=True)
            self.thread.start()
        return self

    def _watch(self):
        while self.running:
            self.peak = max(self.peak, self.process.memory_info().rss)
            time.sleep(0.001)

    def __exit__(self, *exception):
        if self.cuda:
            torch.cuda.synchronize()
            self.bytes = torch.cuda.max_memory_allocated() - self.start
            return
        self.running = False
        self.thread.join()
        self.bytes = max(self.peak - self.start, 0)


def loss_of(way: str, rows, head, labels, valid, chunk: int):
    """Mean loss over AUF's support by one of the three ways; rows (N, K-1, H)."""
    if way == "plain":
        # one product, not N small ones
        logits = head(rows.flatten(0, 1).to(head.weight.dtype)).view(*labels.shape, -1)
        support = first_failure_support(logits.detach().argmax(-1) == labels, valid)
        losses = cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
        return (losses * support).sum() / support.sum()
    objective = OBJECTIVES["auf" if way == "progressive" else "uniform"]
    spec = LossSpec(objective, rows_per_chunk=chunk)
    found = head_loss(rows[None], head, labels[None], valid[None], spec)
    return found.numerator / found.denominator


def time_of(function, device: torch.device, repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls, after one that is not counted."""
    seconds = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def measure_head(way, hidden, vocabulary, blocks, block_size, active, dtype, device, chunk, repeats) -> dict:
    """Head and loss alone, forward and backward."""
    device, dtype = torch.device(device), getattr(torch, dtype)
    torch.manual_seed(0)
    head = nn.Linear(hidden, vocabulary, bias=False, device=device, dtype=dtype).requires_grad_(False)
    rows = torch.randn(blocks, block_size - 1, hidden, device=device, dtype=dtype)
    labels = labels_for(head, rows, active, vocabulary)
    valid = torch.ones_like(labels, dtype=torch.bool)
    rows.requires_grad_(True)
    losses = []

    def step():
        rows.grad = None
        loss = loss_of(way, rows, head, labels, valid, chunk)
        loss.backward()
        losses.append(loss.item())

    warm = head(rows[:1, :1].detach())  # the first product makes the library's own buffers
    del warm
    with PeakMemory(device) as memory:
        step()
    seconds = time_of(step, device, repeats)
    norm = rows.grad.float().norm().item()
    if way == "chunked":
        with torch.no_grad():
            pairs = zip(rows.flatten(0, 1).split(chunk), labels.flatten().split(chunk))
            every = torch.cat([cross_entropy(head(part).float(), label, reduction="none") for part, label in pairs])
        assert math.isclose(losses[-1], every.mean().item(), rel_tol=1e-4 if dtype == torch.float32 else 0.02)
    return {"seconds": seconds, "memory": memory.bytes, "loss": losses[-1], "gradient_norm": norm}


def measure_step(way, hidden, vocabulary, blocks, block_size, active, dtype, device, chunk, repeats, **shape) -> dict:
    """A whole training step on one row: target, drafter, head and loss, backward, optimizer; and each stage alone."""
    device, dtype = torch.device(device), getattr(torch, dtype)
    set_seed(0)
    length, layers = shape["length"], shape["target_layers"]
    heads = hidden // shape["head_dim"]
    config = Qwen3Config(
        hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=max(heads // 4, 1), head_dim=shape["head_dim"], vocab_size=vocabulary,
        tie_word_embeddings=True, max_position_embeddings=max(4096, length),
    )  # fmt: skip
    with torch.device(device):
        target = Qwen3ForCausalLM(config).to(dtype).eval()
    taps = sorted({min(max(1, round(1 + i * (layers - 4) / 4)), layers - 2) for i in range(5)})
    drafter = DFlashDraftModel(
        drafter_config(
            target, num_hidden_layers=shape["draft_layers"], block_size=block_size, mask_token_id=0,
            target_layer_ids=taps,
        )
    ).to(device)  # fmt: skip
    drafter.set_attn_implementation(shape["attention"])
    frozen = FrozenTarget(target, drafter.config)
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=1e-5)
    ids = torch.randint(1, vocabulary, (1, length), device=device)
    flags, documents = torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids)
    anchors, real = sample_anchors(flags, documents, blocks, torch.tensor([0]), 0, 0)
    flex = shape["attention"] == "flex_attention"
    made = make_blocks(ids, flags, documents, anchors, real, block_size, 0, flex=flex)
    stages: dict[str, list[float]] = {}

    def stage(name, function):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        stages.setdefault(name, []).append(time.perf_counter() - start)
        return result

    labels = None

    def step():
        nonlocal labels
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            context = stage("target", lambda: frozen.context(ids))
            noise = frozen.noise_embeds(made.noise_ids)
            output = stage(
                "drafter forward",
                lambda: drafter(noise, context, made.attention_mask, made.position_ids).last_hidden_state,
            )
            rows = output.view(blocks, block_size, -1)[:, 1:]
            if labels is None:  # as right as a drafter of that active ratio would be
                with torch.no_grad():
                    labels = labels_for(frozen.logits, rows.detach(), active, vocabulary)
            leaf = rows.detach().requires_grad_()

            def head():
                loss = loss_of(way, leaf, frozen.head, labels, torch.ones_like(labels, dtype=torch.bool), chunk)
                loss.backward()

            stage("head and loss", head)
        stage("drafter backward", lambda: rows.backward(leaf.grad))
        stage("optimizer", optimizer.step)
        optimizer.zero_grad()

    step()
    stages.clear()
    with PeakMemory(device) as memory:
        seconds = time_of(step, device, repeats)
    median = {name: statistics.median(values) for name, values in stages.items()}
    return {"seconds": seconds, "memory": memory.bytes, "stages": median}


def in_own_process(what: str, **keys) -> dict:
    """One measurement in a fresh process."""
    words = [sys.executable, __file__, "--one", json.dumps({"what": what, **keys})]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {"failed": lines[-1] if lines else f"exit {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def compare_ways(what: str, base: dict, dtypes: list[str], actives: list[float], console: Console) -> list[dict]:
    """Time and memory of `head` or `step` for every dtype, active ratio and way."""
    title = {"head": "head and loss", "step": "whole step"}[what]
    table = Table(title=f"{title}: V = {base['vocabulary']}, H = {base['hidden']}, {base['blocks']} blocks of "
                        f"{base['block_size']} slots")  # fmt: skip
    for column in ("dtype", "active", "way", "seconds (min median max)", "times faster", "memory MB"):
        table.add_column(column, justify="right")
    rows = []
    for dtype in dtypes:
        for active in actives:
            reference = None
            for way in WAYS:
                found = in_own_process(what, way=way, **base | dict(dtype=dtype, active=active))
                row = {"blocks": base["blocks"], "dtype": dtype, "active": active, "way": way, **found}
                rows.append(row)
                if "failed" in found:
                    table.add_row(dtype, f"{active:.0%}", way, found["failed"], "", "")
                    continue
                median = statistics.median(found["seconds"])
                if way == "plain":
                    reference = found
                if reference is not None:
                    row["times_faster"] = statistics.median(reference["seconds"]) / median
                    row["memory_share"] = found["memory"] / max(reference["memory"], 1)
                    if (what, way) == ("head", "progressive"):  # the same rows count
                        assert math.isclose(
                            found["loss"], reference["loss"], rel_tol=1e-4 if dtype == "float32" else 0.02
                        )
                        assert math.isclose(found["gradient_norm"], reference["gradient_norm"], rel_tol=0.02)
                spread = f"{min(found['seconds']):.3f} {median:.3f} {max(found['seconds']):.3f}"
                table.add_row(
                    dtype, f"{active:.0%}", way, spread, f"{row.get('times_faster', float('nan')):.2f}",
                    f"{found['memory'] / 1e6:.0f}",
                )  # fmt: skip
    console.print(table)
    return rows


def growth(base: dict, grid: dict[str, list[int]], console: Console) -> list[dict]:
    """Seconds of a whole step, plain and progressive, as one size grows and the others stay; with the stages."""
    letters = {"blocks": "N", "block_size": "K", "length": "S", "vocabulary": "V"}
    table = Table(title=f"whole step, {base['dtype']}, {base['active']:.0%} active; base {base}")
    for column in ("", "plain s", "progressive s", "times faster", "progressive: share of each stage"):
        table.add_column(column)
    rows = []
    for key, values in grid.items():
        for value in values:
            pair = {}
            for way in ("plain", "progressive"):
                pair[way] = in_own_process("step", way=way, **base | {key: value})
            rows.append({"grows": letters[key], "value": value, **pair})
            failed = [part["failed"] for part in pair.values() if "failed" in part]
            if failed:
                table.add_row(f"{letters[key]} = {value}", *failed)
                continue
            plain, ours = (statistics.median(pair[way]["seconds"]) for way in ("plain", "progressive"))
            total = sum(pair["progressive"]["stages"].values())
            shares = ", ".join(f"{k} {v / total:.0%}" for k, v in pair["progressive"]["stages"].items())
            table.add_row(f"{letters[key]} = {value}", f"{plain:.2f}", f"{ours:.2f}", f"{plain / ours:.2f}", shares)
    console.print(table)
    return rows


def plot(rows: list[dict], path: Path) -> None:
    """Seconds of a step against each size, both ways."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["grows"] for row in rows))
    figure, every = plt.subplots(1, len(names), figsize=(3.2 * len(names), 3), layout="constrained", squeeze=False)
    for axes, name in zip(every[0], names):
        for way in ("plain", "progressive"):
            points = [(r["value"] / (1000 if name == "V" else 1), statistics.median(r[way]["seconds"])) for r in rows
                      if r["grows"] == name and "failed" not in r[way]]  # fmt: skip
            axes.plot(*zip(*points), marker="o", label=way)
        axes.set(xlabel="V, thousands" if name == "V" else name, ylabel="seconds a step", ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes: about a minute")
    parser.add_argument("--json", type=Path, help="write the results here, and the plot beside them")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--hidden", type=int, default=512, help="H")
    parser.add_argument("--blocks", type=int, nargs="+", default=[64], help="N; whole steps are timed at the first")
    parser.add_argument("--head_only", action="store_true", help="no whole steps")
    parser.add_argument("--vocabulary", type=int, default=151_936, help="V")
    parser.add_argument("--length", type=int, default=256, help="S of the whole step")
    parser.add_argument("--target_layers", type=int, default=4)
    parser.add_argument("--head_dim", type=int, default=64)
    parser.add_argument("--attention", default="sdpa", help="sdpa or flex_attention (CUDA), of the drafter")
    parser.add_argument("--chunk", type=int, default=128, help="head_rows_per_chunk")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--active", type=float, nargs="+", default=[0.1, 0.16, 0.25, 0.4])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        keys = json.loads(args.one)
        function = {"head": measure_head, "step": measure_step}[keys.pop("what")]
        print(json.dumps(function(**keys)))
        return
    console = Console(width=150)
    base = {
        "hidden": args.hidden, "vocabulary": args.vocabulary, "blocks": args.blocks[0], "block_size": 16,
        "device": args.device, "chunk": args.chunk, "repeats": args.repeats,
    }  # fmt: skip
    step = base | {
        "length": args.length, "target_layers": args.target_layers, "draft_layers": 2, "head_dim": args.head_dim,
        "attention": args.attention, "dtype": args.dtypes[0], "active": 0.16,
    }  # fmt: skip
    grid = {
        "blocks": [args.blocks[0] // 4, args.blocks[0] // 2, args.blocks[0], args.blocks[0] * 2],
        "block_size": [4, 8, 16],
        "length": [args.length, args.length * 2, args.length * 4],
        "vocabulary": [args.vocabulary // 8, args.vocabulary // 4, args.vocabulary // 2, args.vocabulary],
    }
    if args.quick:
        small = {"vocabulary": 32_000, "hidden": 128, "blocks": 32, "repeats": 2}
        base, step, args.active, args.blocks = base | small, step | small, [0.16], [32]
        grid = {"blocks": [16, 32]}
    heads = [
        row for blocks in args.blocks
        for row in compare_ways("head", base | {"blocks": blocks}, args.dtypes, args.active, console)
    ]  # fmt: skip
    steps, grown = [], []
    if not args.head_only:
        steps = compare_ways("step", step, args.dtypes, args.active, console)
        grown = growth(step, grid, console)
    wanted = min(args.active, key=lambda a: abs(a - 0.16))
    parts = []
    for row in heads:
        if row["way"] == "progressive" and row["active"] == wanted and "times_faster" in row:
            share = f"{row['memory_share']:.1%} of its memory"
            parts.append(f"{row['dtype']}, N = {row['blocks']}, {row['times_faster']:.2f} times faster, {share}")
    headline = f"head and loss at {wanted:.0%} active, against plain: " + "; ".join(parts)
    if args.json:
        record = {
            "command": shlex.join(["python", *sys.argv]),
            "date": str(date.today()),
            "environment": environment(),
        }
        write_record(args.json, record | {"headline": headline, "head": heads, "steps": steps, "growth": grown})
        if grown:
            plot(grown, args.json.with_suffix(".png"))
    print(headline)


if __name__ == "__main__":
    main()
