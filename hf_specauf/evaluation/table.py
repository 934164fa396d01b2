"""A comparison as a table for people, and its verdict in words."""

from rich.console import Console
from rich.table import Table

from ..serving.acceptance import TAU_DEFINITION, number
from .ways import LOOKUP_WAYS


def show(results: dict, console: Console) -> None:
    """A table of one comparison, and the verdict in words."""
    acceptance = results["acceptance"]
    others = [results[way] for way in LOOKUP_WAYS if way in results]
    names = ("prompt lookup", "drafter and lookup")[: len(others)]
    table = Table("", "plain", "with drafter", *names)
    table.add_row(
        "tokens/s",
        f"{results['plain_tokens_per_second']:.1f}",
        f"{results['tokens_per_second']:.1f}",
        *(f"{other['tokens_per_second']:.1f}" for other in others),
    )
    table.add_row(
        "speed-up",
        "1.00x",
        f"{results['speedup']:.2f}x",
        *(f"{other['speedup']:.2f}x" for other in others),
    )
    table.add_row("tau", "1.00", number(acceptance["tau"]))
    table.add_row("alpha_1, 2, 3", "", "  ".join(map(number, acceptance["alpha"][:3])))
    console.print(table)
    faster = "faster" if results["speedup"] > 1 else "SLOWER than plain decoding"
    console.print(f"{faster}: {results['speedup']:.2f}x. {TAU_DEFINITION}.")
    repeated = number(results["repetition"], ".0%")
    console.print(f"outputs: {results['lossless']}; repeated 4-grams: {repeated}")
