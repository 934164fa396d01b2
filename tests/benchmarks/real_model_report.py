"""The tables and the plot of real_model_study.py, from the JSON files of its legs."""

from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a machine without a screen
import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import bootstrap

from hf_specauf.records import read_record

# arXiv 2607.01893, Qwen3-8B, K = 16, 5 draft layers, six epochs of ShareGPT: tau on HumanEval and MT-Bench, and the
# mean of six benchmarks at T = 0 and T = 1.
PAPER = {
    "dflash-decay": (2.86, 2.03, 2.40, 2.31),
    "dflash-auf": (3.09, 2.18, 2.61, 2.48),
    "dflash-auf-decay": (3.09, 2.19, 2.61, 2.48),
    "domino-decay": (3.10, 2.13, 2.56, 2.44),
    "domino-b-auf": (3.21, 2.23, 2.66, 2.53),
    "domino-b-auf-decay": (3.21, 2.26, 2.68, 2.52),
}
# What is compared with what: the leg, its baseline, and the paper's gain of the same pair.
PAIRS = [
    ("dflash-auf", "dflash-decay"), ("dflash-auf-decay", "dflash-decay"), ("dflash-decay", "dflash-uniform"),
    ("domino-b-auf", "domino-decay"), ("domino-b-auf-decay", "domino-decay"), ("domino-decay", "dflash-decay"),
    ("dflash-auf-own", "dflash-decay-own"), ("domino-b-auf-own", "dflash-auf-own"), ("dflash-auf-own", "dflash-auf"),
    ("dflash-decay-k8", "dflash-uniform-k8"), ("dflash-auf-k8", "dflash-decay-k8"),
    ("dflash-auf-decay-k8", "dflash-auf-k8"),
    ("domino-b-auf-k8", "domino-decay-k8"), ("domino-b-auf-decay-k8", "domino-b-auf-k8"),
    ("domino-decay-k8", "dflash-decay-k8"), ("domino-b-auf-k8", "dflash-auf-k8"),
    ("dflash-auf-own-k8", "dflash-decay-own-k8"), ("domino-b-auf-own-k8", "dflash-auf-own-k8"),
    ("dflash-decay-own-k8", "dflash-decay-k8"), ("dflash-auf-own-k8", "dflash-auf-k8"),
    ("dflash-auf-long", "dflash-decay-long"),
]  # fmt: skip
SETS = ("HumanEval", "MT-Bench", "ShareGPT")
RESAMPLES = 2000


def tau(tokens: np.ndarray, passes: np.ndarray, axis: int = -1) -> np.ndarray:
    return tokens.sum(axis=axis) / passes.sum(axis=axis)


def gain(tokens, passes, base_tokens, base_passes, axis: int = -1) -> np.ndarray:
    return tau(tokens, passes, axis) / tau(base_tokens, base_passes, axis) - 1


def interval(statistic, *columns: np.ndarray) -> tuple[float, float]:
    """The 95 % bootstrap interval over prompts. Passes after one prompt are much alike, so that whole prompts are
    drawn, and for two drafters the same ones."""
    found = bootstrap(
        columns, statistic, paired=True, vectorized=True, n_resamples=RESAMPLES, method="percentile",
        random_state=np.random.default_rng(0),
    )  # fmt: skip
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def by_prompt(records: list[dict], title: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and passes of each prompt of a set, over all seeds."""
    sums = sum(np.array(record["replayed"][title]["prompts"]) for record in records)
    return sums[:, 0], sums[:, 1]


def everything(records: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and passes of each prompt of all sets, over all seeds."""
    columns = [by_prompt(records, title) for title in SETS]
    return tuple(np.concatenate(parts) for parts in zip(*columns))


def mean(values) -> float:
    """Of those that were measured; NaN where none was."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else float("nan")


def read(folder: Path) -> dict[str, list[dict]]:
    """The finished legs by name, in the order of `PAPER` and then by name; of each its seeds."""
    found = defaultdict(list)
    for path in sorted(folder.glob("*-seed*.json")):
        record = read_record(path)
        found[record["leg"]].append(record)
    order = [*(name for name in PAPER if name in found), *sorted(set(found) - set(PAPER))]
    return {name: found[name] for name in order}


# ---- tables


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def tau_table(legs: dict[str, list[dict]]) -> str:
    """tau of every leg, ours beside theirs."""
    columns = ["leg", "seeds", *(f"{title}, T=0" for title in SETS), "mean", "lowest to highest seed", "T=1, mean"]
    columns += ["paper: HumanEval", "MT-Bench", "mean of six", "T=1"]
    rows = []
    for name, records in legs.items():
        row = [name, str(len(records))]
        for title in SETS:
            columns_of_set = by_prompt(records, title)
            low, high = interval(tau, *columns_of_set)
            row.append(f"{tau(*columns_of_set):.3f} ({low:.3f} - {high:.3f})")
        means = [mean(record["replayed"][title]["tau"] for title in SETS) for record in records]
        sampled = mean(record["decoded"]["T=1"][title]["tau"] for record in records for title in SETS)
        row += [f"**{mean(means):.3f}**", f"{min(means):.3f} - {max(means):.3f}", f"{sampled:.3f}"]
        theirs = PAPER.get(name)
        row += [f"{value:.2f}" for value in theirs] if theirs else ["-"] * 4
        rows.append(row)
    return table(columns, rows)


def gain_table(legs: dict[str, list[dict]]) -> str:
    """Gains in tau over all prompts of both legs, over the seeds that both have."""
    rows = []
    for name, base in PAIRS:
        shared = {r["seed"] for r in legs.get(name, [])} & {r["seed"] for r in legs.get(base, [])}
        if not shared:
            continue
        sides = [[record for record in legs[leg] if record["seed"] in shared] for leg in (name, base)]
        columns = [*everything(sides[0]), *everything(sides[1])]
        low, high = interval(gain, *columns)
        theirs = "-"
        if name in PAPER and base in PAPER:
            theirs = f"{PAPER[name][2] / PAPER[base][2] - 1:+.1%}"
        row = [f"{name} over {base}", str(len(shared)), f"{gain(*columns):+.1%} ({low:+.1%} to {high:+.1%})", theirs]
        rows.append(row)
    return table(["tau of", "seeds", "ours, with its 95 % interval over prompts", "paper, mean of six"], rows)


def minutes(records: list[dict]) -> str:
    """Of training. The seconds of one that was interrupted are those of its last part."""
    whole = [record["training"]["seconds"] / 60 for record in records if record["training"]["starts"] == 1]
    return f"{mean(whole):.0f}" if whole else "interrupted"


def training_table(legs: dict[str, list[dict]]) -> str:
    """What each leg saw, and the paper's diagnostics at its end."""
    columns = ["leg", "K", "anchors seen", "teacher-forced tau", "token accuracy", "active ratio", "minutes"]
    columns += ["alpha_1, 2, 3", "speed-up, T=0", "outputs"]
    rows = []
    for name, records in legs.items():
        last = [record["curve"][-1] for record in records]
        alpha = [[record["replayed"][title]["alpha"][:3] for title in SETS] for record in records]
        greedy = [record["decoded"]["T=0"][title] for record in records for title in SETS]
        outputs = {
            kind: sum(found["lossless"][kind] for found in greedy) for kind in ("identical", "near_tie", "different")
        }
        rows.append(
            [
                name, str(records[0]["settings"]["block_size"]), f"{mean(point['anchors'] for point in last):,.0f}",
                f"{mean(point['teacher_forced_tau'] for point in last):.3f}",
                f"{mean(point['common_accuracy'] for point in last):.3f}",
                f"{mean(point['active_ratio'] for point in last):.2f}",
                minutes(records),
                " ".join(f"{mean(part[k] for of in alpha for part in of if len(part) > k):.2f}" for k in range(3)),
                f"{mean(found['speedup'] for found in greedy):.2f}x",
                ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in outputs.items()),
            ]
        )  # fmt: skip
    return table(columns, rows)


# ---- the plot


def plot(legs: dict[str, list[dict]], path: Path) -> None:
    """Held-out teacher-forced tau over anchors seen, mean over seeds; a panel for each kind of comparison."""
    panels = {
        "DFlash, ShareGPT's answers": [n for n in legs if n.startswith("dflash") and n.removesuffix("-long") in PAPER],
        "Domino, ShareGPT's answers": [n for n in legs if n.startswith("domino") and not n.endswith("own")],
        "the target's own answers": [n for n in legs if n.endswith("own")],
        "K = 8": [n for n in legs if n.endswith("k8")],
    }
    panels["DFlash, ShareGPT's answers"] += [n for n in ("dflash-uniform",) if n in legs]
    panels = {title: names for title, names in panels.items() if names}
    figure, axes = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.8), layout="constrained", squeeze=False)
    for axis, (title, names) in zip(axes[0], panels.items()):
        for name in names:
            curves = [record["curve"] for record in legs[name]]
            shortest = min(map(len, curves))
            anchors = [mean(curve[i]["anchors"] for curve in curves) for i in range(shortest)]
            heights = [mean(curve[i]["teacher_forced_tau"] for curve in curves) for i in range(shortest)]
            axis.plot(anchors, heights, marker=".", label=f"{name} ({len(curves)})")
        axis.set(xlabel="anchors seen", ylabel="teacher-forced tau, held-out rows", title=title)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def conditions(legs: dict[str, list[dict]]) -> str:
    """What the legs were run on, and what they must share to be compared."""
    records = [record for of_leg in legs.values() for record in of_leg]
    lines = []
    for what, values in (
        ("machines", {record["environment"]["machine"] for record in records}),
        ("targets' fingerprints", {record["target"]["fingerprint"][:12] for record in records}),
        ("rows to train on", {str(record["training"]["rows"]) for record in records}),
    ):
        lines.append(f"- {what}: {'; '.join(sorted(values))}")
    checked = [record["check"] for record in records]
    equal, prompts = (sum(check[key] for check in checked) for key in ("equal", "prompts"))
    lines.append(f"- replayed rounds were those of real decoding in fp32 on {equal} of {prompts} prompts")
    return "\n".join(lines)


def report(folder: Path) -> str:
    """Everything in Markdown. Writes `tau.png` beside the JSON files.

    Raises:
        SystemExit: there is no finished leg.
    """
    legs = read(folder)
    if not legs:
        raise SystemExit(f"{folder} holds no finished leg: run the study without --report first")
    plot(legs, folder / "tau.png")
    parts = [tau_table(legs), gain_table(legs), training_table(legs), conditions(legs)]
    return "\n\n".join([*parts, f"plot: {folder / 'tau.png'}"])
