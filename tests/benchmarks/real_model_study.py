"""The paper's comparison on a real chat model and the paper's data: SmolLM2-135M-Instruct, ShareGPT's answers as they
are, and the target's own; tau on HumanEval, MT-Bench and held-out ShareGPT questions.

    python tests/benchmarks/real_model_study.py [--legs NAME ...] [--seeds 0 1] [--work FOLDER] [--quick]
    python tests/benchmarks/real_model_study.py --report

Everything is fetched on the first call. A leg is one drafter: a run of `python -m hf_specauf.train` on a recipe of
recipes/smollm2-135m, then measured. It leaves one small JSON in --results, and a leg that has left one is skipped, so
the study may go on in parts and on several machines. An interrupted leg goes on from its last checkpoint in --work.

Legs of a seed have the same first weights, rows, anchors and steps, but for what their name says. tau at T = 0 is
replayed on what the target writes greedily (`hf_specauf.serving.replay`), on all prompts. Each leg checks that against
real decoding in fp32. tau at T = 1, tokens/s and whether outputs are equal come from real decoding of fewer prompts.
"""

import argparse
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch
from real_model_data import ANSWER_TOKENS, HELD_OUT_ROWS, TEMPERATURE, Bench
from real_model_report import report
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from hf_specauf.data.rows import RowCollator, pad_token_id, prepare_rows
from hf_specauf.data.sources import load_data
from hf_specauf.demo.smollm2 import HUB_ID
from hf_specauf.evaluation.compare import compare
from hf_specauf.evaluation.ways import decoding_config
from hf_specauf.identity import Identity
from hf_specauf.losses.blocks import anchor_candidates
from hf_specauf.quickstart import recipes_folder
from hf_specauf.recipe import parse
from hf_specauf.records import environment, read_record, write_record
from hf_specauf.serving.acceptance import summarize
from hf_specauf.serving.decoding import attach
from hf_specauf.serving.replay import replay
from hf_specauf.target import FrozenTarget

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results" / "real_model_study"
POINTS = 8  # such measurements of a run
# Less of a row than the recipes take, so that a step takes a second or two on two cores. --override changes it.
SMALL_STEPS = {"max_length": 320, "per_device_train_batch_size": 4, "anchors_per_row": 64}


@dataclass(frozen=True)
class Leg:
    """What sets one drafter apart.

    Attributes:
        objective (`str`): of the loss. Its name says whether it is a Domino drafter's, and whether it decays.
        block_size (`int`): K.
        data (`str`): whose answers, `sharegpt`'s or the target's `own`.
        longer (`int`): so many times the steps of the others.
    """

    objective: str
    block_size: int = 16
    data: str = "sharegpt"
    longer: int = 1

    @property
    def recipe(self) -> Path:
        is_domino = self.objective.startswith(("domino", "b_auf"))
        name = "domino_b_auf" if is_domino else "dflash_auf"
        return recipes_folder() / "smollm2-135m" / f"{name}.yaml"


LEGS = {
    # the paper's regime
    "dflash-uniform": Leg("uniform"),
    "dflash-decay": Leg("decay"),
    "dflash-auf": Leg("auf"),
    "dflash-auf-decay": Leg("auf_decay"),
    "domino-decay": Leg("domino_decay"),
    "domino-b-auf": Leg("b_auf"),
    "domino-b-auf-decay": Leg("b_auf_decay"),
    # answers that the target wrote
    "dflash-decay-own": Leg("decay", data="own"),
    "dflash-auf-own": Leg("auf", data="own"),
    "domino-b-auf-own": Leg("b_auf", data="own"),
    # shorter blocks
    "dflash-uniform-k8": Leg("uniform", block_size=8),
    "dflash-decay-k8": Leg("decay", block_size=8),
    "dflash-auf-k8": Leg("auf", block_size=8),
    "dflash-auf-decay-k8": Leg("auf_decay", block_size=8),
    "domino-decay-k8": Leg("domino_decay", block_size=8),
    "domino-b-auf-k8": Leg("b_auf", block_size=8),
    "domino-b-auf-decay-k8": Leg("b_auf_decay", block_size=8),
    "dflash-decay-own-k8": Leg("decay", block_size=8, data="own"),
    "dflash-auf-own-k8": Leg("auf", block_size=8, data="own"),
    "domino-b-auf-own-k8": Leg("b_auf", block_size=8, data="own"),
    # longer training
    "dflash-decay-long": Leg("decay", longer=3),
    "dflash-auf-long": Leg("auf", longer=3),
}


# ---- one leg: trained


def settings_of(name: str, seed: int, args: argparse.Namespace) -> dict:
    """What decides a leg's figures. A leg of other settings is not taken for this one."""
    leg = LEGS[name]
    settings = asdict(leg) | {"seed": seed, "steps": args.steps * leg.longer, "rows": args.rows}
    settings |= {"new_tokens": args.new_tokens, "prompts": args.prompts, "decoded": args.decoded}
    if leg.data == "own":
        settings |= {"temperature": TEMPERATURE, "answer_tokens": args.answer_tokens}
    return settings | {"overrides": args.override}


def training_words(leg: Leg, seed: int, bench: Bench) -> list[str]:
    """The words of `python -m hf_specauf.train` for a leg, but for its output_dir."""
    args = bench.args
    steps = args.steps * leg.longer
    every = max(steps // POINTS, 1)
    on_cpu = args.device == "cpu"
    keys = dict(
        config=leg.recipe, target=args.target, target_dtype=args.dtype, dataset_name=bench.training_file(leg.data),
        max_train_rows=args.rows, eval_rows=HELD_OUT_ROWS, objective=leg.objective,
        block_size=leg.block_size, seed=seed, max_steps=steps, eval_steps=every, save_steps=every, eval_prompts=0,
        use_cpu=on_cpu, bf16=args.bf16, disable_tqdm=True, report_to="none", resume_from_checkpoint=True,
        **SMALL_STEPS,
    )  # fmt: skip
    words = []
    for key, value in keys.items():
        words += [f"--{key}", str(value).lower() if isinstance(value, bool) else str(value)]
    for pair in args.override:
        key, _, value = pair.partition("=")
        words += [f"--{key}", *value.split()]
    return words


def python(*words: str, log: Path) -> int:
    """Run an interpreter in the checkout, with what it says added to a file -> its exit status."""
    with open(log, "a") as file:
        return subprocess.run([sys.executable, *words], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT).returncode


def starts_of(out: Path) -> Path:
    """The file that has a line for each time that training began or went on in a folder."""
    return out.with_name(f"{out.name}.starts")


def train(words: list[str], out: Path) -> dict:
    """Train a drafter in a process of its own, if that has not been done -> its provenance.

    Raises:
        SystemExit: training failed or was interrupted.
    """
    record = out / "provenance.json"
    if record.is_file():
        print(f"{out}: already trained")
        return read_record(record)
    out.mkdir(parents=True, exist_ok=True)
    # The provenance counts the seconds of the last start alone.
    with open(starts_of(out), "a") as file:
        file.write(f"{date.today()}\n")
    # Not on the screen, because training shows the first row, and people once typed it.
    log = out.with_name(f"{out.name}.log")
    print(f"training; it writes to {log}", flush=True)
    if python("-m", "hf_specauf.train", *words, log=log) != 0 or not record.is_file():
        raise SystemExit(
            f"training is not finished: see the end of {log}. The same command goes on from the last checkpoint"
        )
    return read_record(record)


def rows_of(words: list[str], bench: Bench) -> dict:
    """What a step draws from: rows, their tokens, and anchors. Of a row with fewer candidates than the recipe asks
    for, all of them are anchors."""
    _, draft, data, args = parse(words)
    raw, _ = load_data(data)
    rows = prepare_rows(
        raw, bench.tokenizer, max_length=args.max_length, block_size=draft.block_size,
        mask_token_id=draft.mask_token_id, vocab_size=len(bench.tokenizer), verbose=False,
    )  # fmt: skip
    collate = RowCollator(pad_token_id(bench.tokenizer, len(bench.tokenizer)), draft.mask_token_id)
    anchors = supervised = 0
    for row in rows:
        batch = collate([row])
        candidates = anchor_candidates(batch["supervised"], batch["document_ids"])
        anchors += min(int(candidates.sum()), args.anchors_per_row)
        supervised += int(batch["supervised"].sum())
    rows_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    return {
        "rows": len(rows), "tokens": sum(rows["length"]), "supervised_tokens": supervised,
        "anchors_per_step": rows_per_step * anchors / len(rows),
    }  # fmt: skip


def curve(history: list[dict], anchors_per_step: float) -> list[dict]:
    """The held-out figures of a run's evaluations, on anchors that are the same for all legs of a seed and K."""
    kept = ("teacher_forced_tau", "loss", "common_accuracy", "active_ratio", "support_accuracy")
    points = []
    for entry in history:
        if "eval_loss" in entry:
            point = {"step": entry["step"], "anchors": round(entry["step"] * anchors_per_step)}
            points.append(point | {key: entry.get(f"eval_{key}") for key in kept})
    return points


# ---- one leg: measured


def replayed(drafter: PreTrainedModel, bench: Bench) -> dict[str, dict]:
    """Greedy acceptance on every prompt of every set."""
    frozen, found = FrozenTarget(bench.target, drafter.config), {}
    for title, prompts in bench.prompts.items():
        generations = []
        for prompt, output in zip(prompts, bench.greedy(title)):
            generations.append(
                replay(frozen, drafter, output, prompt_tokens=prompt.shape[1], max_new_tokens=bench.args.new_tokens)
            )
        rounds = [one for generation in generations for one in generation]
        found[title] = summarize(rounds, drafter.config.block_size).to_dict()
        # by prompt, for intervals: [tokens committed, passes]
        found[title]["prompts"] = [[sum(r.emitted for r in rounds), len(rounds)] for rounds in generations]
    return found


def check_replay(folder: Path, bench: Bench) -> dict:
    """Replayed rounds against those of real decoding in fp32, on the first prompts of each set."""
    args = bench.args
    target = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.float32).to(args.device).eval()
    drafter = AutoModel.from_pretrained(folder, dtype=torch.float32).to(args.device)
    config = decoding_config(bench.target, args.new_tokens, pad_token_id(bench.tokenizer, len(bench.tokenizer)))
    frozen = FrozenTarget(target, drafter.config)
    found = {"prompts": 0, "equal": 0, "rounds": 0}
    for prompts in bench.prompts.values():
        for prompt in prompts[: args.check]:
            with attach(target, drafter, draft_length=None, lookup=False) as attachment:
                output = target.generate(prompt, generation_config=config, assistant_model=drafter)
            rounds = replay(frozen, drafter, output, prompt_tokens=prompt.shape[1], max_new_tokens=args.new_tokens)
            found["prompts"] += 1
            found["equal"] += rounds == attachment.rounds
            found["rounds"] += len(rounds)
    return found


def decoded(drafter: PreTrainedModel, bench: Bench) -> dict[str, dict]:
    """Real decoding of a few prompts of each set, plainly and with the drafter in turn, at T = 0 and T = 1."""
    args, found = bench.args, {}
    kept = ("plain_tokens_per_second", "tokens_per_second", "speedup", "lossless", "repetition")
    for temperature in (0.0, 1.0):
        of_sets = {}
        for title, prompts in bench.prompts.items():
            results = compare(
                bench.target, drafter, prompts[: args.decoded], args.new_tokens, temperature=temperature,
                pad_token_id=pad_token_id(bench.tokenizer, len(bench.tokenizer)), show_progress=False,
            )  # fmt: skip
            acceptance = {key: results["acceptance"][key] for key in ("tau", "alpha", "tokens", "passes")}
            of_sets[title] = acceptance | {key: results[key] for key in kept}
        found[f"T={temperature:g}"] = of_sets
    return found


def run(name: str, seed: int, bench: Bench) -> dict:
    """Train and measure one leg -> its record."""
    args, leg = bench.args, LEGS[name]
    words = training_words(leg, seed, bench)
    # A run of other keys has a folder of its own.
    digest = hashlib.sha256(command(words, args).encode()).hexdigest()[:8]
    out = args.work / "runs" / f"{name}-seed{seed}-{digest}"
    words += ["--output_dir", str(out)]
    provenance = train(words, out)
    rows = rows_of(words, bench)
    points = curve(provenance["history"], rows["anchors_per_step"])
    drafter = AutoModel.from_pretrained(out, dtype="auto").to(args.device)
    training = {"starts": len(starts_of(out).read_text().splitlines()), "anchors": points[-1]["anchors"], **rows}
    training |= {key: provenance[key] for key in ("seconds", "trainable_parameters", "on_policy")}
    return {
        "leg": name,
        "seed": seed,
        "settings": settings_of(name, seed, args),
        "command": command(words, args),
        "date": str(date.today()),
        "environment": environment() | {"machine": machine(args.device)},
        "target": Identity.of(bench.target, bench.tokenizer, name_or_path=HUB_ID).record() | {"dtype": args.dtype},
        "training": training,
        "curve": points,
        "replayed": replayed(drafter, bench),
        "check": check_replay(out, bench),
        "decoded": decoded(drafter, bench),
    }


def command(words: list[str], args: argparse.Namespace) -> str:
    """The training's command, without the names of folders that nobody else has."""
    shown = shlex.join(["python", "-m", "hf_specauf.train", *words])
    for path, known_as in ((args.work, "WORK"), (args.target, "SMOLLM2"), (ROOT, ".")):
        shown = shown.replace(str(path), known_as)
    return shown


def machine(device: str) -> str:
    """The processor's or the card's name."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    name = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # not Linux
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


# ---- the command


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--legs", nargs="+", choices=LEGS, default=list(LEGS), metavar="LEG", help=", ".join(LEGS))
    add("--seeds", type=int, nargs="+", default=[0, 1])
    add("--steps", type=int, default=600, help="optimizer steps of a leg")
    add("--rows", type=int, default=1536, help="conversations to train on")
    add("--work", type=Path, default=Path("out/real_model_study"), help="folder for data, drafters, checkpoints")
    add("--results", type=Path, default=RESULTS, help="folder for the legs' JSON files")
    add("--report", action="store_true", help="only make the tables and the plot of the JSON files in --results")
    add("--quick", action="store_true", help="decay and AUF, one seed, 20 steps, few prompts: some ten minutes")
    add("--new_tokens", type=int, default=96, help="tokens of each answer that is replayed or decoded")
    add("--prompts", type=int, default=164, help="prompts of each set at most, replayed")
    add("--decoded", type=int, default=12, help="prompts of each set that are really decoded")
    add("--check", type=int, default=1, help="prompts of each set on which replay is checked in fp32")
    add("--answer_tokens", type=int, default=ANSWER_TOKENS, help="most tokens of the target's own answers")
    add("--override", nargs="+", default=[], metavar="KEY=VALUE", help="further keys for the training")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", help="of the target; by default bfloat16 where the device has such arithmetic, else float32")
    add("--bf16", type=json.loads, help="autocast in training, true or false; by default likewise")
    for name in ("target", "sharegpt", "humaneval", "mt_bench"):
        add(f"--{name}", type=Path, help="a folder or file to use instead of fetching it")
    args = parser.parse_args(argv)
    # On a CPU without it a bf16 product of 64 rows took 3.6 times as long as in fp32.
    has_bf16 = args.device != "cpu" or torch.cpu._is_avx512_bf16_supported()
    args.dtype = args.dtype or ("bfloat16" if has_bf16 else "float32")
    if args.bf16 is None:
        args.bf16 = has_bf16
    # training runs in the checkout's root
    args.work = args.work.resolve()
    if args.quick:
        args.legs, args.seeds, args.steps, args.rows = ["dflash-decay", "dflash-auf"], [0], 20, 128
        args.prompts, args.decoded, args.new_tokens = 8, 2, 48
        args.work, args.results = args.work / "quick", args.work / "quick" / "results"
    return args


def finished(path: Path, settings: dict) -> bool:
    """Whether a leg has left its JSON.

    Raises:
        SystemExit: it has, with other settings.
    """
    if not path.is_file():
        return False
    there = read_record(path)["settings"]
    other = [key for key in settings if settings[key] != there.get(key)]
    if other:
        words = ", ".join(f"{key} {there.get(key)} there, {settings[key]} here" for key in other)
        raise SystemExit(f"{path} holds a leg of other settings ({words}): give another --results, or remove it")
    return True


def main(argv: list[str] | None = None) -> None:
    args = parsed(argv)
    bench = None
    for seed in args.seeds if not args.report else ():
        for name in args.legs:
            path = args.results / f"{name}-seed{seed}.json"
            if finished(path, settings_of(name, seed, args)):
                print(f"{path.stem}: finished before")
                continue
            bench = bench or Bench.set_up(args)
            print(f"\n== {name}, seed {seed}", flush=True)
            record = run(name, seed, bench)
            write_record(path, record)
            if record["check"]["equal"] < record["check"]["prompts"]:
                raise SystemExit(f"{path}: replayed rounds are not those of decoding ({record['check']})")
    print(report(args.results))


if __name__ == "__main__":
    main()
