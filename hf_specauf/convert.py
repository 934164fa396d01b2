"""The command that writes a drafter of any layout, or an adapter merged on its base, as a plain
drafter of ours.

python -m hf_specauf.convert --drafter z-lab/Qwen3-8B-DFlash-b16 --out DIR
"""

import argparse
from pathlib import Path

from .layouts.load import load_drafter
from .records import errors_in_one_line


@errors_in_one_line()
def main(argv: list[str] | None = None) -> None:
    """Command line of `python -m hf_specauf.convert`."""
    parser = argparse.ArgumentParser(
        prog="python -m hf_specauf.convert", description="Write a drafter of another layout, or an adapter merged on "
        "its base, as a plain drafter of this package: then evaluate it, push it, or adapt it.",
    )  # fmt: skip
    parser.add_argument("--drafter", required=True, help="Hub id or folder")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--target", help="Hub id of its target, noted in config.json")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args(argv)
    drafter = load_drafter(args.drafter, args.revision, key="--drafter")
    if args.target is not None:
        drafter.config.target_model_name_or_path = args.target
    drafter.save_pretrained(args.out)
    print(f"written: {args.out} (block size {drafter.config.block_size}, taps {drafter.config.target_layer_ids}, "
          f"mask token {drafter.config.mask_token_id})")  # fmt: skip


if __name__ == "__main__":
    main()
