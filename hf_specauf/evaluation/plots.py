"""The pictures of an evaluation: PNG files for people, and SVG for a page, which takes the page's
own colours. Each says on its own what it shows."""

import io
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

from .table import PAIR

# On a page text and axes take the colour of its text. This one stands for it, and is no other.
STANDS_FOR_TEXT = "#010203"
BARS, LINE = "#3b82c4", "#d9822b"
SIZE = (6, 3.6)  # inches
FEW_PASSES = 30  # that reached a slot, below which their share of accepted tokens says little
ALPHA_TITLE = f"Accepted, once slot k is reached (hollow: < {FEW_PASSES} passes)"
# Of the text in a picture, which is shown at this size in a page too.
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "specauf", "font.size": 10}


@contextmanager
def figure_with_axes(title: str, xlabel: str, ylabel: str):
    """A figure to draw on. It is closed afterwards, because matplotlib keeps those that are not."""
    import matplotlib

    # a machine without a screen
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=SIZE, layout="constrained")
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    try:
        yield figure, axes
    finally:
        plt.close(figure)


def draw_acceptance(acceptance: dict, axes, **style) -> None:
    """A line through alpha_k of the slots that many passes reached, and hollow marks for the rest:
    one text that repeats itself can make such a share 1."""
    alpha, histogram = acceptance["alpha"], acceptance["histogram"]
    sure, unsure = [], []
    for k, share in enumerate(alpha, start=1):
        # A pass that accepted k - 1 tokens or more came as far as slot k.
        reached = sum(histogram[k - 1 :])
        if share is not None:
            (sure if reached >= FEW_PASSES else unsure).append((k, share))
    (line,) = axes.plot([k for k, _ in sure], [a for _, a in sure], marker="o", **style)
    for k, share in unsure:
        axes.plot(k, share, "o", color=line.get_color(), markerfacecolor="none", alpha=0.5)
    axes.set_ylim(0, 1)
    axes.set_xlim(0.5, max(len(alpha), 1) + 0.5)
    axes.xaxis.get_major_locator().set_params(integer=True)


def plot_alpha(results: dict[str, dict], path: Path) -> None:
    """alpha_k over the slots, a line for each named acceptance (as of `Acceptance.to_dict`)."""
    with figure_with_axes(ALPHA_TITLE, "slot k", "conditional acceptance α_k") as (figure, axes):
        for name, acceptance in results.items():
            draw_acceptance(acceptance, axes, label=name)
        axes.legend()
        figure.savefig(path, dpi=130)


def plot_curves(
    curves: dict[str, list[tuple[float, float]]],
    path: Path,
    *,
    xlabel: str,
    ylabel: str,
    title: str,
) -> None:
    """A line through the (x, y) points of each named curve."""
    with figure_with_axes(title, xlabel, ylabel) as (figure, axes):
        for name, points in curves.items():
            axes.plot(*zip(*points), marker="o", label=name)
        axes.legend()
        figure.savefig(path, dpi=130)


# ---- of one evaluation


def draw_alpha(record: dict, axes) -> None:
    """alpha_k, over the slots that were reached."""
    draw_acceptance(record["acceptance"], axes, color=BARS)


def draw_histogram(record: dict, axes) -> None:
    """The share of passes by accepted tokens, with its number where there is room."""
    histogram = record["acceptance"]["histogram"]
    passes = max(sum(histogram), 1)
    shares = [100 * count / passes for count in histogram]
    bars = axes.bar(range(len(histogram)), shares, color=BARS)
    axes.bar_label(bars, [f"{share:.0f}" if share >= 1 else "" for share in shares], padding=2)
    axes.margins(y=0.12)
    axes.xaxis.get_major_locator().set_params(integer=True)


def draw_positions(record: dict, axes) -> None:
    """tau by position in the answer and by tokens read."""
    ends, highest = set(), 1.0
    for key, says, colour in (
        ("by_position", "tokens of the answer before the pass", BARS),
        ("by_context", "all tokens before it, prompt included", LINE),
    ):
        stretches = record["tau"][key]
        ends |= {one["upto"] for one in stretches}
        highest = max([highest, *(one["tau"] for one in stretches)])
        axes.plot(
            [one["upto"] for one in stretches],
            [one["tau"] for one in stretches],
            marker="o",
            label=says,
            color=colour,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(ends), [str(end) for end in sorted(ends)])
    axes.minorticks_off()
    # Room above the highest point for the legend, which must hide no point.
    axes.set_ylim(1, 1 + 1.4 * max(highest - 1, 0.1))
    axes.legend(loc="upper left")


def draw_speed(record: dict, axes) -> None:
    """tokens/s of each way, as a bar, with the interval of its ratio to plain decoding's."""
    ways = [way for name, way in record["ways"].items() if name != PAIR]
    plain = record["plain_tokens_per_second"]
    rates = [way["tokens_per_second"] for way in ways]
    bars = axes.barh([way["says"] for way in ways], rates, color=BARS)
    most = max(rates)
    for bar, way, rate in zip(bars, ways, rates):
        end, label = rate, f"{rate:.1f}"
        interval = way["speedup_interval"]
        if interval is not None and way is not ways[0]:
            low, high = (plain * one for one in interval)
            y = bar.get_y() + bar.get_height() / 2
            axes.plot([low, high], [y, y], color=LINE, marker="|", linewidth=2)
            end, label = max(rate, high), f"{rate:.1f} ({way['speedup']:.2f}x)"
        most = max(most, end)
        y = bar.get_y() + bar.get_height() / 2
        axes.annotate(label, (end, y), xytext=(5, 0), textcoords="offset points", va="center")
    axes.set_xlim(0, 1.3 * most)
    axes.invert_yaxis()


# file's name -> (title, x, y, what draws it)
PICTURES: dict[str, tuple[str, str, str, Callable]] = {
    "speed": (
        "Speed of each way; orange: 95 % of its ratio to plain",
        "tokens/s, batch size 1",
        "",
        draw_speed,
    ),
    "alpha": (
        ALPHA_TITLE,
        "slot k of a block",
        "conditional acceptance α_k",
        draw_alpha,
    ),
    "histogram": (
        "How many drafted tokens a pass accepts",
        "accepted tokens",
        "% of passes",
        draw_histogram,
    ),
    "tau_by_position": (
        "tau along the text",
        "up to so many tokens",
        "tokens a pass (1 is no help)",
        draw_positions,
    ),
}


def save_pictures(record: dict, out: Path) -> list[Path]:
    """All pictures of an evaluation as PNG files -> their paths."""
    paths = []
    for name, (title, xlabel, ylabel, draw) in PICTURES.items():
        with figure_with_axes(title, xlabel, ylabel) as (figure, axes):
            draw(record, axes)
            paths.append(out / f"{name}.png")
            figure.savefig(paths[-1], dpi=130)
    return paths


def svg(name: str, record: dict) -> str:
    """A picture as an element of a page, transparent and in the colour of the page's text."""
    import matplotlib

    title, xlabel, ylabel, draw = PICTURES[name]
    colours = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"),
        STANDS_FOR_TEXT,
    )
    with matplotlib.rc_context(STYLE | colours):
        with figure_with_axes(title, xlabel, ylabel) as (figure, axes):
            draw(record, axes)
            # What lies behind it is the page's, in a legend too.
            axes.patch.set_visible(False)
            if axes.get_legend() is not None:
                axes.get_legend().get_frame().set_visible(False)
            file = io.StringIO()
            metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    text = file.getvalue()
    # without the head of a file of its own
    return text[text.index("<svg") :].replace(STANDS_FOR_TEXT, "currentColor")
