"""A comparison in words: a verdict first, then a table of all ways."""

from rich.console import Console
from rich.table import Table

from ..serving.acceptance import TAU_DEFINITION, number
from .summary import SAMPLED

# The way that only shows what rounding does. Its speed says nothing.
PAIR = "plain_in_a_pair"
# With fewer prompts than these a bootstrap sees too little of how prompts differ.
FEW = 10
# The way that people decode in: what a verdict is about, where it was measured.
USUAL = ("drafter_and_lookup", "drafter")


def ends(interval: list[float] | None, unit: str = "", digits: int = 2) -> str:
    """The ends of an interval, in words; empty where there is none."""
    if interval is None:
        return ""
    low, high = interval
    return f"{low:.{digits}f}{unit} to {high:.{digits}f}{unit}"


def counts(lossless: dict | str) -> str:
    """How many outputs were those of plain decoding, in words."""
    if not isinstance(lossless, dict):
        return "sampled"
    words = [f"{lossless['identical']} of {sum(lossless.values())} identical"]
    if lossless["near_tie"]:
        words.append(f"{lossless['near_tie']} near-ties")
    if lossless["different"]:
        words.append(f"{lossless['different']} DIFFERENT")
    return ", ".join(words)


def verdict(record: dict) -> list[str]:
    """What an evaluation says, most important first, a sentence an entry."""
    name = next(name for name in USUAL if name in record["ways"])
    usual, tau = record["ways"][name], record["tau"]["by_passes"]
    speed = "as fast as plain decoding"
    low, high = usual["speedup_interval"] or [usual["speedup"]] * 2
    if high <= 1:
        speed = "the speed of plain decoding, which is SLOWER"
    elif low <= 1:
        speed = "the speed of plain decoding, which is no clear difference"
    words = [f"{usual['says'].capitalize()}: {usual['speedup']:.2f}x {speed}"]
    words[0] += within(usual["speedup_interval"], "x")
    said = f"tau {number(tau['value'])}"
    if tau["value"] is not None:
        said += f": a pass of the target commits {tau['value']:.2f} tokens{within(tau['interval'])}"
    words.append(said)
    if tau["another_set"] is not None:
        words.append(
            f"As many other prompts of this kind will give a tau of {ends(tau['another_set'])}, 19"
            " times of 20."
        )
    words.append(lossless_words(record, usual))
    prompts = len(record["prompts"])
    if prompts < FEW:
        words.append(f"Too few prompts ({prompts}) to trust these intervals: they come out narrow.")
    return words


def within(interval: list[float] | None, unit: str = "") -> str:
    """The end of a sentence about a figure: its interval."""
    if interval is None:
        return "."
    return f" (95 %: {ends(interval, unit)})."


def lossless_words(record: dict, way: dict) -> str:
    """Whether outputs are the target's own, in a sentence or a few."""
    lossless = way["lossless"]
    if not isinstance(lossless, dict):
        return f"Outputs were {SAMPLED}."
    said = f"Outputs: {counts(lossless)}."
    if lossless["different"]:
        said += " DIFFERENT outputs are a fault: please report them."
    if lossless["near_tie"]:
        said += f" {gap_words(way['largest_gaps'], record['conditions']['dtype'])}"
    pair = record["ways"].get(PAIR)
    if pair is not None:
        said += (
            " Plain decoding beside a copy of itself, in a batch of two and without any draft:"
            f" {counts(pair['lossless'])}."
        )
    read = record.get("read_at_once")
    if read is not None:
        said += (
            " Without any draft, too: where the target reads its plain outputs in one pass, it"
            f" chooses otherwise in {read['outputs_otherwise']} of {read['outputs']}"
            f" ({read['tokens_otherwise']} of {read['tokens']} tokens, at most"
            f" {read['below_best']:.3g} below its best). So much is rounding."
        )
    return said


def gap_words(gaps: dict, dtype: str) -> str:
    """How near the ties were."""
    said = (
        "Where they part, the target's two best logits differ by at most"
        f" {gaps['top2_gap']:.3g}, which {dtype} rounds away"
    )
    if gaps["below_best"] is not None:
        said += "; from there on no committed token lies more than"
        said += f" {gaps['below_best']:.3g} below the target's best"
    return said + "."


def time_words(time: dict | None) -> str:
    """Milliseconds of a pass: target, drafter and rest."""
    if time is None:
        return ""
    return " + ".join(f"{1000 * time[who]:.1f}" for who in ("target", "drafter", "rest"))


def table_rows(record: dict) -> list[list[str]]:
    """A row of each way, as words."""
    rows = []
    for name, way in record["ways"].items():
        if name == PAIR:
            continue
        rows.append(
            [
                way["says"],
                f"{way['tokens_per_second']:.1f}",
                f"{way['speedup']:.2f}x",
                "" if name == "plain" else ends(way["speedup_interval"], "x"),
                number(way["tokens_per_pass"]) if way["tokens_per_pass"] else "",
                time_words(way["time_of_a_pass"]),
                counts(way["lossless"]),
            ]
        )
    return rows


COLUMNS = (
    "way",
    "tokens/s",
    "over plain",
    "95 %",
    "tokens a pass",
    "ms a pass: target + drafter + rest",
    "outputs",
)


def details(record: dict) -> list[str]:
    """What else is said of a comparison, a line an entry."""
    acceptance, tau = record["acceptance"], record["tau"]
    mean = tau["by_prompts"]
    lines = [
        f"tau as a mean over prompts: {number(mean['value'])}{within(mean['interval'])}",
        f"alpha_1, 2, 3: {', '.join(map(number, acceptance['alpha'][:3]))}.",
        f"Repeated 4-grams in the output: {number(record['repetition'], '.0%')}.",
    ]
    forced = tau.get("teacher_forced")
    if forced is not None:
        lines.append(
            f"tau on plain decoding's own text, read and not written: {number(forced['tau'])}."
            " It is the same up to rounding, where the drafter is served as it was trained."
        )
    return lines


def show(record: dict, console: Console) -> None:
    """A table of one comparison, and the verdict in words.

    Args:
        record (`dict`): from `evaluation_record`.
    """
    for line in verdict(record):
        console.print(line, markup=False, highlight=False)
    table = Table(*COLUMNS)
    for row in table_rows(record):
        table.add_row(*row)
    console.print(table)
    for line in details(record):
        console.print(line, markup=False, highlight=False)
    console.print(f"{TAU_DEFINITION}.", markup=False, highlight=False)
