"""Ways to decode with one drafter, side by side: plain, prompt lookup and the native generator of transformers, and
this package's loop with its draft lengths and lookups.

    python tests/benchmarks/decoding.py --target FOLDER --drafter FOLDER --prompts humaneval=FILE mt_bench=FILE ...

Every prompt is decoded in every way, one after the other, and each way goes first in turn. So the ratios of one run
are fair on a machine whose speed changes. A ratio is of tokens/s over all prompts and repeats; its interval is over
bootstrap draws of the prompts. With --repeats the ratio of each repeat stands beside it: what the machine makes of the
same work. Without --target it makes the toy pair of the tests. Each set is written to --json once it is done.

z-lab's loop is in their package dflash, which asks for another transformers than ours. Its file runs on 5.23:
    pip download --no-deps dflash==0.1.0 && unzip dflash-0.1.0-py3-none-any.whl -d zlab
    python tests/benchmarks/decoding.py --zlab zlab --ways plain native ours z-lab      # with transformers 5.23
"""

import argparse
import json
import sys
import time
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from host_work import HostWork
from real_model_data import WORDINGS
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModel, Qwen3Config

from hf_specauf.data.conversation import stop_at_both_ends
from hf_specauf.data.rows import pad_token_id
from hf_specauf.data.sources import load_rows
from hf_specauf.drafters import verification
from hf_specauf.drafters.transformers_internals import drop_capture_hooks
from hf_specauf.evaluation.compare import decoded_in_turn
from hf_specauf.evaluation.differences import count_verdicts, first_difference
from hf_specauf.evaluation.intervals import figure, ratio, ratio_of_ratios
from hf_specauf.evaluation.rows import accepted_by_source, repetition
from hf_specauf.evaluation.ways import Stopwatch, decoding_config, timed
from hf_specauf.records import environment, write_record
from hf_specauf.serving.benchmarks import Wording, encode_prompts
from hf_specauf.serving.decoding import attach
from hf_specauf.target import load_target

FEW = verification.FEW
# what their config shares with ours
ZLAB_KEYS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "rms_norm_eps", "rope_parameters", "max_position_embeddings", "vocab_size",
)  # fmt: skip


@dataclass
class Way:
    """A way to decode.

    Attributes:
        attached (`dict`, *optional*): arguments of `attach`; `None` for ways of transformers alone.
        call (`dict`): settings of `generate`.
        drafter (`str`): "none", "given", "random", one of the same shape with random weights, or "z-lab", the given
            one as their class.
        one_form (`bool`): few rows are multiplied in torch's own form alone, as in all ways of others.
    """

    attached: dict | None = None
    call: dict = field(default_factory=dict)
    drafter: str = "none"
    one_form: bool = False


WHOLE = dict(draft_length=None, lookup=False)  # blocks, whatever they cost
WAYS = {
    "plain": Way(),
    "prompt lookup": Way(call=dict(prompt_lookup_num_tokens=10)),
    "native": Way(call=dict(speculation_type="dflash"), drafter="given"),
    "ours": Way(attached=WHOLE, drafter="given"),
    "ours, one form": Way(attached=WHOLE, drafter="given", one_form=True),
    "ours, drafts of 1": Way(attached=dict(draft_length=1, lookup=False), drafter="given"),
    "ours, drafts of 2": Way(attached=dict(draft_length=2, lookup=False), drafter="given"),
    "ours, auto": Way(attached=dict(lookup=False), drafter="given"),
    "ours, lookup": Way(attached=dict(draft_length=None), drafter="given"),
    "ours, auto and lookup": Way(attached={}, drafter="given"),
    "ours, auto and lookup, one form": Way(attached={}, drafter="given", one_form=True),
    "ours, lookup alone": Way(attached={}),
    "random drafter, auto": Way(attached=dict(lookup=False), drafter="random"),
    "random drafter, auto and lookup": Way(attached={}, drafter="random"),
    "z-lab": Way(drafter="z-lab"),
}


# (one way, what it must not fall behind)
PAIRS = [
    ("ours", "native"),
    ("ours", "z-lab"),
    ("ours", "ours, one form"),
    ("ours, one form", "native"),
    ("ours, one form", "z-lab"),
    ("ours, auto", "ours, drafts of 1"),
    ("ours, auto and lookup", "ours, auto"),
    ("ours, auto and lookup", "ours, lookup alone"),
    ("ours, auto and lookup", "prompt lookup"),
    ("ours, auto and lookup", "ours, auto and lookup, one form"),
    ("random drafter, auto and lookup", "ours, lookup alone"),
]


@dataclass
class Runner:
    """One way on one target, ready to be called."""

    way: Way
    target: torch.nn.Module
    drafter: torch.nn.Module | None

    def __call__(self, prompt: torch.Tensor, config) -> tuple[torch.Tensor, float, int]:
        """-> ids, seconds, passes of the target after the prefill"""
        config = deepcopy(config)
        config.update(**self.way.call)
        stopwatch = Stopwatch(self.target)
        # The native generator and z-lab's loop leave hooks on every layer, which would slow down the way after them.
        drop_capture_hooks(self.target)
        verification.FEW = 1 if self.way.one_form else FEW
        with stopwatch.running():
            if self.way.drafter == "z-lab":
                output, seconds = zlab_decode(self.target, prompt, self.drafter, config)
            else:
                decoded = timed(self.target, prompt, self.drafter, config, seed=0)
                output, seconds = decoded.output, decoded.seconds
        return output, seconds, stopwatch.read().passes


def zlab_drafter(given):
    """A drafter as the class of z-lab's package, with the same weights."""
    from dflash.model import DFlashDraftModel

    ours = given.config
    config = Qwen3Config(
        **{key: getattr(ours, key) for key in ZLAB_KEYS}, num_target_layers=ours.num_target_layers,
        dflash_config={key: getattr(ours, key) for key in ("block_size", "mask_token_id", "target_layer_ids")},
        attn_implementation="sdpa",
    )  # fmt: skip
    config.num_target_layers = ours.num_target_layers
    drafter = DFlashDraftModel(config)
    drafter.load_state_dict(given.state_dict())
    return drafter.to(given.device, given.dtype).eval()


def zlab_decode(target, prompt: torch.Tensor, drafter, config) -> tuple[torch.Tensor, float]:
    """Decode by z-lab's loop -> ids, seconds"""
    from dflash.model import dflash_generate

    ends = config.eos_token_id
    ends = ends if ends is None or isinstance(ends, list) else [ends]
    start = time.perf_counter()
    output = dflash_generate(drafter, target, prompt, config.max_new_tokens, ends)
    if output.is_cuda:
        torch.cuda.synchronize()
    return output, time.perf_counter() - start


def speed(rows: list[dict], way: str, base: str) -> dict:
    """tokens/s of a way over another's: over all rows with its interval over the prompts, and of each repeat."""
    columns = [[of[key] for of in (row[way], row[base]) for key in ("tokens", "seconds")] for row in rows]
    of_prompt: dict[int, list[float]] = {}
    of_repeat: dict[int, list[float]] = {}
    for row, column in zip(rows, columns):
        for sums, place in ((of_prompt, row["prompt"]), (of_repeat, row["repeat"])):
            sums[place] = [a + b for a, b in zip(sums.get(place, [0] * 4), column)]
    whole = figure(list(of_prompt.values()), ratio_of_ratios)
    repeats = [ratio(sums[:2]) / ratio(sums[2:]) for sums in np.array(list(of_repeat.values()))]
    return {"ratio": whole.value, "interval": whole.interval, "repeats": repeats}


def summary(rows: list[dict], ways: list[str], attachments: dict) -> dict:
    """Of each way what a set of prompts gave."""
    found = {}
    for way in ways:
        of_way = [row[way] for row in rows]
        seconds, passes = sum(one["seconds"] for one in of_way), sum(one["passes"] for one in of_way)
        tokens = sum(one["tokens"] for one in of_way)
        over_plain = speed(rows, way, "plain")
        found[way] = {
            "tokens_per_second": tokens / seconds,
            "over_plain": over_plain["ratio"],
            "interval": over_plain["interval"],
            "repeats": over_plain["repeats"],
            # the prefill's token and its time are in neither
            "tokens_per_pass": (tokens - len(rows)) / passes if passes else None,
            "ms_per_pass": 1000 * seconds / passes if passes else None,
            # samples are not compared
            "outputs": count_verdicts(of_way) if "difference" in of_way[0] else {},
        }
        if way in attachments:
            found[way]["by_source"] = accepted_by_source(attachments[way].rounds)
            costs = attachments[way].costs
            if costs is not None:
                found[way]["costs_ms"] = {
                    "passes": {d: 1000 * c for d, c in sorted(costs.passes.items())},
                    "drafting": None if costs.drafting is None else 1000 * costs.drafting,
                }
    pairs = {f"{a} / {b}": speed(rows, a, b) for a, b in PAIRS if a in ways and b in ways}
    return {"ways": found, "pairs": pairs}


def drafter_of(way: Way, given):
    """A drafter of its own for a way, because an attachment knows its drafter by the object."""
    if way.drafter == "none":
        return None
    if way.drafter == "given":
        return deepcopy(given)
    if way.drafter == "z-lab":
        return zlab_drafter(given)
    torch.manual_seed(0)
    return type(given)(given.config).to(given.device, given.dtype).eval()


def host_work(target, runner: Runner, prompt: torch.Tensor, config) -> dict:
    """Of a decoding in that way, for each pass of the target: operations that are no views and looks at a tensor,
    beside the passes of target and drafter."""
    # Of lookups alone the drafter is no module.
    modules = [one for one in (target, runner.drafter) if isinstance(one, torch.nn.Module)]
    work = HostWork(*modules)
    with work.leaving_out(), work.counting():
        passes = runner(prompt, config)[2]
    return {"operations": work.operations.total() / passes, "looks": work.looks / passes}


def measure(target, drafter, prompts: list[torch.Tensor], pad: int, title: str, args) -> dict:
    """Every prompt in every way, so many times -> `summary`, and the share of repeated 4-grams in plain text."""
    config = decoding_config(target, args.new_tokens, pad, args.temperature)
    with ExitStack() as stack, torch.no_grad():
        runners, attachments = {}, {}
        for name in args.ways:
            way = WAYS[name]
            own = drafter_of(way, drafter)
            if way.attached is not None:
                attachments[name] = stack.enter_context(attach(target, own, **way.attached))
                own = attachments[name].drafter
            runners[name] = Runner(way, target, own)
        for runner in runners.values():
            runner(prompts[0][:, -32:], decoding_config(target, 8, pad))
        work = {name: host_work(target, runner, prompts[0], config) for name, runner in runners.items()}
        for attachment in attachments.values():
            attachment.generations.clear()
        rows, repeated = [], []
        turns = [(repeat, place) for repeat in range(args.repeats) for place in range(len(prompts))]
        shown = track(turns, title, transient=True)

        def decode(turn: tuple[int, int], name: str):
            return runners[name](prompts[turn[1]], config)

        for (repeat, place), made in decoded_in_turn(shown, args.ways, decode):
            row, outputs, start = {"repeat": repeat, "prompt": place}, {}, prompts[place].shape[1]
            for name, (ids, seconds, passes) in made.items():
                outputs[name] = ids
                row[name] = {"tokens": ids.shape[1] - start, "seconds": seconds, "passes": passes}
            for name in args.ways:
                if not args.temperature:
                    row[name]["difference"] = first_difference(target, outputs["plain"], outputs[name])
            repeated.append(repetition(outputs["plain"][0, start:].tolist()) or 0.0)
            rows.append(row)
        found = summary(rows, args.ways, attachments)
        for name in args.ways:
            found["ways"][name]["host_work_per_pass"] = work[name]
        return found | {"repeated_4_grams": sum(repeated) / len(repeated)}


def toy():
    """The tests' toy pair: (target, drafter, prompts by title)."""
    from conftest import make_drafter, make_target, overfit, random_prompts

    target = make_target(dtype=torch.float32)
    prompts = random_prompts(8, 12)
    texts = target.generate(prompts[:4], do_sample=False, max_new_tokens=64)
    drafter = overfit(make_drafter(target, block_size=4), target, texts, 12, steps=150)
    return target, drafter.float(), {"toy": [prompt[None] for prompt in prompts]}


def show(title: str, found: dict, console: Console) -> None:
    title = f"{title}, {found['repeated_4_grams']:.0%} of 4-grams repeat"
    columns = ("way", "tokens/s", "over plain", "95 %", "tokens a pass", "ms a pass", "operations, looks a pass")
    table = Table(*columns, "outputs", title=title)
    for way, row in found["ways"].items():
        table.add_row(
            way, f"{row['tokens_per_second']:.1f}", f"{row['over_plain']:.2f}", ends(row["interval"]),
            f"{row['tokens_per_pass']:.2f}", f"{row['ms_per_pass']:.1f}",
            "{operations:.0f}, {looks:.1f}".format(**row["host_work_per_pass"]),
            ", ".join(f"{count} {name}" for name, count in row["outputs"].items() if count),
        )  # fmt: skip
    console.print(table)
    table = Table("one over the other", "ratio", "95 %", "each repeat")
    for pair, row in found["pairs"].items():
        repeats = ", ".join(f"{one:.2f}" for one in row["repeats"])
        table.add_row(pair, f"{row['ratio']:.2f}", ends(row["interval"]), repeats)
    console.print(table)


def ends(interval: list[float] | None) -> str:
    return "" if interval is None else "{:.2f} - {:.2f}".format(*interval)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--target", type=Path)
    add("--drafter", type=Path)
    add("--prompts", nargs="+", default=[], metavar="NAME=FILE")
    add("--count", type=int, default=12, help="prompts of each set")
    add("--new_tokens", type=int, default=96)
    add("--repeats", type=int, default=1, help="times that each set is decoded")
    add("--temperature", type=float, default=0.0, help="0 is greedy, and outputs are compared")
    add("--ways", nargs="+", choices=WAYS, default=[way for way in WAYS if way != "z-lab"])
    add("--zlab", type=Path, help="folder with z-lab's package dflash, for that way")
    add("--dtype", default="float32", help="of target and drafter")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--json", type=Path, help="file for the result")
    args = parser.parse_args(argv)
    if "plain" not in args.ways:
        parser.error("--ways needs plain: all ratios are over it")
    if "z-lab" in args.ways:
        if args.zlab is None:
            parser.error("the way z-lab needs --zlab, the folder with their package")
        sys.path.insert(0, str(args.zlab))
    if (args.target is None) != (args.drafter is None):
        parser.error("give --target and --drafter both, or neither for the toy")
    pad = 1
    if args.target is None:
        target, drafter, sets = toy()
    else:
        target, tokenizer = load_target(str(args.target), dtype=args.dtype)
        target = target.to(args.device)
        stop_at_both_ends(target, tokenizer, None)
        drafter = AutoModel.from_pretrained(args.drafter, dtype=target.dtype).to(args.device).eval()
        pad, sets = pad_token_id(tokenizer, len(tokenizer)), {}
        for pair in args.prompts:
            name, _, path = pair.partition("=")
            wording = WORDINGS.get(name) or Wording(("prompt",))
            found = encode_prompts(load_rows(path), tokenizer, args.count, 128, None, wording)
            sets[name] = [prompt.to(args.device) for prompt in found]
    record = {
        "settings": {key: str(value) for key, value in vars(args).items()},
        "environment": environment(),
        "threads": torch.get_num_threads(),
        "sets": {},
    }
    for title, prompts in sets.items():
        record["sets"][title] = measure(target, drafter, prompts, pad, title, args)
        show(title, record["sets"][title], Console())
        if args.json:
            write_record(args.json, record)
            print(json.dumps({"written": str(args.json)}))


if __name__ == "__main__":
    main()
