"""The command that renders a drafter's card and checks cards: `specauf card`.

specauf card render --drafter DIR --repo OWNER/NAME --revision v1
specauf card validate FILE ...
"""

import argparse
from pathlib import Path

from .cli import errors_in_one_line, parse_with_drafter, under_new_spelling
from .keys import check_keys
from .publishing.card import render
from .publishing.validate import validate
from .records import check_can_write, named_file


def command_parser() -> argparse.ArgumentParser:
    """The two commands and their flags."""
    parser = argparse.ArgumentParser(
        prog="specauf card", description="Render a drafter's card, or check cards."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("render", help="write the card of a drafter's folder")
    one.add_argument("--drafter", metavar="DIR", help="the folder that train and evaluate left")
    one.add_argument("--repo", required=True, help="OWNER/NAME it is or will be published as")
    one.add_argument(
        "--revision", default="main", help="tag or commit that the card's usage lines name"
    )
    one.add_argument(
        "--license",
        dest="licence",
        default="apache-2.0",
        help="of the drafter, by the Hub's name for it (default apache-2.0)",
    )
    one.add_argument("--out", help="file to write (default: README.md in the folder)")
    many = commands.add_parser("validate", help="check cards; exit code 1 if one is not good")
    said = "a card to check, or the folder that it lies in"
    many.add_argument("cards", metavar="FILE", type=Path, nargs="+", help=said)
    return parser


@errors_in_one_line()
def main(argv: list[str] | None = None) -> None:
    """Command line of `specauf card` and of `python -m hf_specauf.model_card`."""
    args = parse_with_drafter(command_parser(), under_new_spelling(argv))
    check_keys(args)
    if args.command == "render":
        drafter = Path(args.drafter)
        out = Path(args.out or drafter / "README.md")
        check_can_write("--out", out, is_file=True)
        render(drafter, args.repo, args.revision, args.licence).save(out)
        print(f"written: {out}")
        return
    any_bad = False
    for path in [named_file(card, "README.md", "specauf card render") for card in args.cards]:
        # contributed cards are named <owner>__<name>.md
        problems = validate(path, contributed="__" in path.name)
        any_bad = any_bad or bool(problems)
        print(f"{path}: {'good' if not problems else ''}")
        for problem in problems:
            print(f"  - {problem}")
    if any_bad:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
