"""Both forms of a product of few rows, over all layers and the head of a target, one after the other.

    python tests/benchmarks/few_rows.py --target FOLDER --json FILE

For each number of rows: milliseconds of all products of one pass in torch's own form (x W^T) and in the turned one
((W x^T)^T), as medians of so many passes, and the median ratio with the middle half of the passes. A pass of one row
in torch's own form is what plain decoding does, and stands beside.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from hf_specauf.drafters.verification import FEW, FewRows
from hf_specauf.records import environment, write_record
from hf_specauf.target import load_target


def milliseconds(products: list[FewRows], inputs: dict[int, torch.Tensor], turned: bool) -> float:
    """A pass through all products, in one of the forms."""
    start = time.perf_counter()
    for product in products:
        product.product(inputs[product.linear.in_features], turned)
    return 1000 * (time.perf_counter() - start)


def measure(products: list[FewRows], rows: int, passes: int) -> dict:
    """Both forms of so many rows, and plain decoding's product of one, by turns."""
    dtype = products[0].linear.weight.dtype
    widths = {product.linear.in_features for product in products}
    inputs = {width: torch.randn(1, rows, width).to(dtype) for width in widths}
    one_row = {width: x[:, :1] for width, x in inputs.items()}
    turns = [(inputs, False), (inputs, True), (one_row, False)]
    found = np.array([[milliseconds(products, *turn) for turn in turns] for _ in range(passes + 1)])[1:]
    ratios = found[:, 0] / found[:, 1]
    own, turned, plain = np.median(found, axis=0).tolist()
    low, ratio, high = np.quantile(ratios, [0.25, 0.5, 0.75]).tolist()
    return {"own_ms": own, "turned_ms": turned, "one_row_ms": plain, "ratio": ratio, "middle_half": [low, high]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 3, 4, 5, 6, 8, 12, FEW])
    parser.add_argument("--passes", type=int, default=21, help="of each form")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    target, _ = load_target(args.target, dtype=args.dtype)
    products = [FewRows(module) for module in target.modules() if type(module) is torch.nn.Linear]
    table = Table("rows", "own, ms", "turned, ms", "own / turned", "middle half", "one row, ms")
    found = {}
    with torch.inference_mode():
        for rows in args.rows:
            found[rows] = row = measure(products, rows, args.passes)
            table.add_row(
                str(rows), f"{row['own_ms']:.1f}", f"{row['turned_ms']:.1f}", f"{row['ratio']:.2f}",
                "{:.2f} - {:.2f}".format(*row["middle_half"]), f"{row['one_row_ms']:.1f}",
            )  # fmt: skip
    Console().print(table)
    if args.json:
        settings = {key: str(value) for key, value in vars(args).items()}
        record = {"settings": settings, "environment": environment(), "threads": torch.get_num_threads()}
        write_record(args.json, record | {"rows": found})


if __name__ == "__main__":
    main()
