"""The command that writes a drafter of any layout, or an adapter merged on its base, in another
layout: `specauf convert`.

specauf convert --drafter z-lab/Qwen3-8B-DFlash-b16 --out DIR
"""

import argparse
from pathlib import Path

from .cli import errors_in_one_line, under_new_spelling
from .keys import check_keys
from .layouts import LAYOUTS, Layout
from .layouts.load import load_drafter
from .records import check_can_write, check_no_model_is_lost
from .target import check_target


def writable(name: str) -> Layout:
    """A layout of the table that can be written.

    Raises:
        ValueError: there is no such layout, or nothing writes it.
    """
    names = [kind for kind, layout in LAYOUTS.items() if layout.write is not None]
    if name not in names:
        found = "is only read" if name in LAYOUTS else "is no layout that this package knows"
        raise ValueError(f"--to {name}: it {found}. What can be written: {', '.join(names)}")
    return LAYOUTS[name]


def command_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    read = ", ".join(LAYOUTS)
    parser = argparse.ArgumentParser(
        prog="specauf convert",
        description="Write a drafter of another layout, or an adapter merged on its base, as a"
        " plain drafter of this package: then evaluate it, push it, or adapt it.",
    )
    add = parser.add_argument
    add("--drafter", required=True, help=f"Hub id or folder, in one of the layouts {read}")
    add("--drafter_revision", help="the drafter's branch, tag or commit on the Hub")
    add("--target", help="Hub id of its target, noted in config.json")
    add("--to", default="specauf", help="layout to write (default specauf, this package's own)")
    add("--out", required=True, help="folder to write")
    return parser


@errors_in_one_line()
def main(argv: list[str] | None = None) -> None:
    """Command line of `specauf convert` and of `python -m hf_specauf.convert`."""
    words = under_new_spelling(argv, {"--revision": "--drafter_revision"})
    args = command_parser().parse_args(words)
    check_keys(args)
    layout = writable(args.to)
    out = Path(args.out)
    if args.target is not None:
        check_target("--target", args.target)
    # of a file in its place, `save_pretrained` would write nothing, and only log it
    check_can_write("--out", out)
    check_no_model_is_lost("--out", out, args.drafter)
    drafter = load_drafter(args.drafter, args.drafter_revision, key="--drafter")
    config = drafter.config
    # other layouts do not name their target, and push needs it
    if args.target is not None:
        config.target_model_name_or_path = args.target
    layout.write(drafter, out)
    print(
        f"written: {out} (block size {config.block_size}, taps {config.target_layer_ids}, mask"
        f" token {config.mask_token_id})"
    )


if __name__ == "__main__":
    main()
