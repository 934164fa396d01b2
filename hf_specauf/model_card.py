"""The commands that render a drafter's card and check cards.

python -m hf_specauf.model_card render DIR --repo OWNER/NAME [--revision TAG_OR_COMMIT] [--out FILE]
python -m hf_specauf.model_card validate FILE ...
"""

import argparse
from pathlib import Path

from .publishing.card import render
from .publishing.validate import validate
from .records import errors_in_one_line


@errors_in_one_line()
def main(argv: list[str] | None = None) -> None:
    """Command line of `python -m hf_specauf.model_card`."""
    parser = argparse.ArgumentParser(
        prog="python -m hf_specauf.model_card", description=__doc__.split("\n\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("render", help="write the card of a drafter's folder")
    one.add_argument("drafter", type=Path, help="the folder that train and evaluate left")
    one.add_argument("--repo", required=True, help="OWNER/NAME it is or will be published as")
    one.add_argument("--revision", default="main", help="tag or commit for the usage lines")
    one.add_argument("--out", type=Path, help="file to write (default: README.md in the folder)")
    many = commands.add_parser("validate", help="check cards; exit code 1 if one is not good")
    many.add_argument("cards", type=Path, nargs="+")
    args = parser.parse_args(argv)
    if args.command == "render":
        out = args.out or args.drafter / "README.md"
        render(args.drafter, args.repo, args.revision).save(out)
        print(f"written: {out}")
        return
    problems = {path: validate(path, contributed="__" in path.name) for path in args.cards}
    for path, found in problems.items():
        print(f"{path}: {'good' if not found else ''}")
        for problem in found:
            print(f"  - {problem}")
    if any(problems.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
