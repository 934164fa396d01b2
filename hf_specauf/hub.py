"""The commands that publish a drafter and fetch one.

python -m hf_specauf.hub check DIR                          everything but the upload
python -m hf_specauf.hub push --drafter DIR --repo OWNER/NAME [--private] [--revision BRANCH]
[--create-pr] [--tag v1]
    [--small]                                               of a LoRA drafter, only the adapter
python -m hf_specauf.hub pull --repo OWNER/NAME --into DIR [--revision COMMIT]
"""

import argparse

from transformers.utils import logging as transformers_logging

from .publishing.hub import check, pull, push, say_where_code_stops
from .records import errors_in_one_line


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m hf_specauf.hub", description=__doc__.split("\n\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    checked = commands.add_parser("check", help="do everything but the upload")
    checked.add_argument("drafter", help="the folder that train and evaluate left")
    pushed = commands.add_parser("push", help="publish a drafter")
    pushed.add_argument("--drafter", required=True, help="the folder that train and evaluate left")
    pushed.add_argument("--repo", required=True, help="OWNER/NAME on the Hub")
    pushed.add_argument(
        "--private", action="store_true", default=None, help="make a new repository private"
    )
    pushed.add_argument("--revision", help="branch to publish on (default main)")
    pushed.add_argument("--create-pr", action="store_true", help="propose it as a pull request")
    pushed.add_argument("--tag", help="tag of the commit, e.g. v1")
    for command in (checked, pushed):
        command.add_argument(
            "--target", help="the target's Hub id, where training used a local folder"
        )
        command.add_argument("--target-revision", help="its branch, tag or commit")
        command.add_argument(
            "--base",
            help="Hub id of the drafter it was adapted from, where that was a local folder",
        )
        command.add_argument("--base-revision", help="its branch, tag or commit")
        command.add_argument(
            "--small", action="store_true", help="of a LoRA drafter, only the adapter: megabytes"
        )
        command.add_argument(
            "--allow-unmeasured", action="store_true", help="publish without eval.json"
        )
    pulled = commands.add_parser("pull", help="fetch a drafter")
    pulled.add_argument("--repo", required=True, help="OWNER/NAME on the Hub")
    pulled.add_argument("--into", required=True, help="folder to fetch it into")
    pulled.add_argument("--revision", help="branch, tag or commit (default main)")
    return parser.parse_args(argv)


@errors_in_one_line()
def main(argv: list[str] | None = None) -> None:
    """Command line of `python -m hf_specauf.hub`."""
    args = vars(parse(argv))
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
