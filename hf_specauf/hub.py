"""The commands that publish a drafter and fetch one: `specauf check`, `push` and `pull`.

specauf check --drafter DIR
specauf push --drafter DIR --repo OWNER/NAME --tag v1
specauf pull --repo OWNER/NAME --into DIR --revision v1
"""

import argparse

from transformers.utils import logging as transformers_logging

from .cli import errors_in_one_line, parse_with_drafter, under_new_spelling
from .keys import check_keys
from .publishing.hub import check, pull, push, say_where_code_stops


def command_parser() -> argparse.ArgumentParser:
    """The three commands and their flags."""
    parser = argparse.ArgumentParser(
        prog="specauf", description="Publish a drafter on the Hub, or fetch one."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    checked = commands.add_parser("check", help="do everything that push does but the upload")
    pushed = commands.add_parser("push", help="publish a drafter")
    for command in (checked, pushed):
        add = command.add_argument
        add("--drafter", metavar="DIR", help="the folder that train and evaluate left")
        add("--target", help="the target's Hub id, where training used a local folder")
        add("--target_revision", help="the target's branch, tag or commit")
        add("--base", help="Hub id of the drafter it was adapted from, where that was a folder")
        add("--base_revision", help="the base's branch, tag or commit")
        add("--small", action="store_true", help="of a LoRA drafter, only the adapter: megabytes")
        add(
            "--license",
            dest="licence",
            default="apache-2.0",
            help="of the drafter, by the Hub's name for it, for the card (default apache-2.0)",
        )
        add("--allow_unmeasured", action="store_true", help="publish without eval.json")
    add = pushed.add_argument
    add("--repo", required=True, help="OWNER/NAME on the Hub")
    # not given is neither True nor False, because the Hub then decides as the owner has set it
    add("--private", action="store_true", default=None, help="make a new repository private")
    add("--revision", help="branch to publish on (default main)")
    add("--create_pr", action="store_true", help="propose it as a pull request")
    add("--tag", help="tag of the commit, e.g. v1")
    pulled = commands.add_parser("pull", help="fetch a drafter")
    pulled.add_argument("--repo", required=True, help="OWNER/NAME on the Hub")
    pulled.add_argument("--into", required=True, help="folder to fetch it into")
    pulled.add_argument("--revision", help="branch, tag or commit (default main)")
    return parser


@errors_in_one_line()
def main(argv: list[str] | None = None) -> None:
    """Command line of `specauf check`, `push` and `pull`, and of `python -m hf_specauf.hub`."""
    parsed = parse_with_drafter(command_parser(), under_new_spelling(argv))
    check_keys(parsed)
    args = vars(parsed)
    transformers_logging.set_verbosity_error()
    command = args.pop("command")
    if command == "check":
        say_where_code_stops(args["drafter"])
        print(f"ready to publish: {', '.join(check(**args))}")
    elif command == "pull":
        folder = pull(**args)
        say_where_code_stops(folder)
        print(f"pulled into {folder}")
    else:
        info = push(**args)
        print(f"published: {info.pr_url or info.commit_url}")


if __name__ == "__main__":
    main()
