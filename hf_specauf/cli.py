"""The command line: `specauf COMMAND`, how flags are spelt, and how commands end on errors.

Every command module takes these three from here. This one loads a command's module only when that
command is called, because most of them import the Trainer, datasets or matplotlib.
"""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module

# ---- the commands


@dataclass(frozen=True)
class Command:
    """One command.

    Args:
        module (`str`): the module of the package whose `main` it calls.
        says (`str`): what it does, in one line.
        words (`tuple[str, ...]`, *optional*): words that come before the user's own.
        note (`str`, *optional*): printed before its `--help`.
    """

    module: str
    says: str
    words: tuple[str, ...] = ()
    note: str = ""


COMMANDS = {
    "demo": Command("demo.show", "a real chat model answers with and without a drafter"),
    "quickstart": Command("quickstart", "train and measure a small target and two drafters"),
    "train": Command(
        "train",
        "train a drafter from a recipe",
        note=(
            "specauf train runs in this process. On several GPUs, launch it:\n"
            "  accelerate launch -m hf_specauf.train --config recipe.yaml\n"
        ),
    ),
    "regenerate": Command("regenerate", "let the target answer a dataset's prompts"),
    "evaluate": Command("evaluate", "compare plain decoding with a drafter's"),
    "doctor": Command("doctor.command", "find what makes a drafter slow, before or after training"),
    "check": Command("hub", "do everything that push does but the upload", ("check",)),
    "push": Command("hub", "publish a drafter on the Hub", ("push",)),
    "pull": Command("hub", "fetch a drafter from the Hub", ("pull",)),
    "convert": Command("convert", "write a drafter of another layout in ours, or merge an adapter"),
    "card": Command("model_card", "render a drafter's card, or check cards"),
}


def overview() -> str:
    """What `specauf --help` prints."""
    lines = ["usage: specauf COMMAND [flags]", ""]
    for name, command in COMMANDS.items():
        lines.append(f"  {name:<12}{command.says}")
    return "\n".join([*lines, "", "specauf COMMAND --help explains the command's flags."])


def main(argv: list[str] | None = None) -> None:
    """Command line of `specauf`.

    Raises:
        SystemExit: there is no such command, or the command ended on an error.
    """
    if argv is None:
        argv = sys.argv[1:]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return
    name, *words = argv
    if name not in COMMANDS:
        meant = "specauf --help lists the commands"
        near = get_close_matches(name, COMMANDS, n=1)
        if near:
            meant = f"did you mean {near[0]}?"
        raise SystemExit(f"error: there is no command {name!r}: {meant}")
    command = COMMANDS[name]
    if command.note and {"-h", "--help"} & {*words}:
        print(command.note)
    import_module(f".{command.module}", __package__).main([*command.words, *words])


# ---- how flags are spelt


def under_new_spelling(argv: list[str] | None, renamed: dict[str, str] | None = None) -> list[str]:
    """The words of a command line, with every flag as it is spelt now. Prints a line for each that
    is not.

    Flags had dashes inside in 0.1.0, where some commands had underscores.

    Args:
        argv (`list[str]`, *optional*): the words; the process's own by default.
        renamed (`dict[str, str]`, *optional*): flags that have another name now.
    """
    if argv is None:
        argv = sys.argv[1:]
    if renamed is None:
        renamed = {}
    found = []
    for word in argv:
        # `--flag=value` too; a value keeps its dashes
        flag, equals, value = word.partition("=")
        new = flag
        if flag.startswith("--"):
            new = "--" + flag[2:].replace("-", "_")
        new = renamed.get(new, new)
        if new != flag:
            print(f"{flag} is spelt {new} now")
        found.append(new + equals + value)
    return found


class OneSpelling:
    """Mixed into trl's parser of dataclasses, which lists and takes each flag with dashes too.

    Attributes:
        renamed (`dict[str, str]`): flags that have another name now.
    """

    renamed: dict[str, str] = {}

    def add_argument(self, *names: str, **options):
        kept = [name for name in names if "-" not in name.lstrip("-")]
        return super().add_argument(*kept, **options)

    def parse_args_and_config(self, args: list[str] | None = None, **options):
        return super().parse_args_and_config(under_new_spelling(args, self.renamed), **options)


def parse_with_drafter(parser: ArgumentParser, words: list[str]) -> Namespace:
    """The parsed words of a command whose `--drafter DIR` was a bare `DIR` in 0.1.0."""
    args, rest = parser.parse_known_args(words)
    if "drafter" in args and args.drafter is None:
        # One word that is no flag's is the folder.
        if len(rest) == 1 and not rest[0].startswith("-"):
            args.drafter = rest.pop()
            print(f"{args.drafter} is spelt --drafter {args.drafter} now")
        else:
            parser.error("give the drafter's folder: --drafter DIR")
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


# ---- how commands end on errors


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """What a user can mend ends a command in one line; anything else keeps its traceback.

    Raises:
        SystemExit: with that line.
    """
    try:
        yield
    except Exception as error:
        words = words_for(error)
        if words is None:
            raise
        raise SystemExit(f"error: {words}") from error


def words_for(error: Exception) -> str | None:
    """One line for an error that a user can mend; `None` for any other."""
    # Only now, because an import of datasets takes a second.
    import yaml
    from datasets.exceptions import DatasetsError
    from httpx2 import HTTPError
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )
    from safetensors import SafetensorError

    # The Hub's errors come first, because most of them are OSErrors or HTTPErrors too.
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        return unreachable(error)
    if isinstance(error, HfHubHTTPError):
        return hub_words(error)
    if isinstance(error, DatasetsError):
        # says which file only in its text, and why only in its cause
        causes = [str(cause) for cause in (error, error.__cause__) if cause is not None]
        return "the dataset cannot be read: " + " ".join(": ".join(causes).split())
    if isinstance(error, HTTPError):
        return unreachable(error)
    if isinstance(error, SafetensorError):
        return (
            f"a file of weights (*.safetensors) is cut off or damaged ({error}): fetch it again, or"
            " save it again with save_pretrained"
        )
    # An optional package that is not installed can be. A module of ours must not be missing.
    ours = isinstance(error, ImportError) and (error.name or "").startswith(__package__)
    mendable = ValueError | TypeError | OSError | FloatingPointError | ImportError | yaml.YAMLError
    if ours:
        return None
    if isinstance(error, mendable):
        return " ".join(str(error).split())
    return None


def unreachable(error: Exception) -> str:
    """No network, in one line."""
    from huggingface_hub import constants

    said = " ".join(str(error).split())
    return (
        f"the Hub at {constants.ENDPOINT} cannot be reached ({said}): try again when it can, or"
        " give the path of what was downloaded before"
    )


def said_by_hub(error: Exception) -> str:
    """The Hub's own words for a refusal (an `HfHubHTTPError`), or of an error on the way to it."""
    response = getattr(error, "response", None)
    if response is None:
        return " ".join(str(error).split())
    # what follows the question mark may be a signature
    url = str(response.url).split("?")[0]
    return " ".join(f"{response.status_code}: {error.server_message or ''} {url}".split())


def hub_words(error: Exception) -> str:
    """A refusal of the Hub (an `HfHubHTTPError`) in one line: what it means and what mends it."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    status = None
    if error.response is not None:
        status = error.response.status_code
    if isinstance(error, GatedRepoError):
        words = (
            "access to this repository is restricted: ask for it on its page, then log in with `hf"
            " auth login`"
        )
    elif isinstance(error, RevisionNotFoundError):
        words = "the repository has no such branch, tag or commit: check the revision"
    elif isinstance(error, RepositoryNotFoundError):
        words = (
            "there is no such repository, or it is private and your token may not see it: check its"
            " name, log in"
        )
    elif isinstance(error, EntryNotFoundError):
        words = "the repository lacks a file that a drafter needs"
    elif status == 401:
        words = "the Hub does not accept the token: log in with `hf auth login`, or set HF_TOKEN"
    elif status == 403:
        words = (
            "the token may not do this: use one with write access to that owner, or propose it with"
            " --create_pr"
        )
    else:
        words = (
            "the Hub refused; what was made locally is kept, and the same command can be tried"
            " again"
        )
    return f"{words} ({said_by_hub(error)})"


if __name__ == "__main__":
    main()
