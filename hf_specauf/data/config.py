"""DataArguments: a recipe's keys for the training text, checked before anything is read."""

import json
from dataclasses import dataclass, field
from typing import TypedDict

from ..keys import Numbers, check_keys, check_revision_name


class Source(TypedDict):
    """One source of training rows: an entry of `dataset_mixture`, with nothing left out."""

    name: str
    weight: float
    config: str | None
    split: str
    revision: str | None


# What an entry of `dataset_mixture` has where it says nothing else.
SOURCE_DEFAULTS = {"weight": 1.0, "config": None, "split": "train", "revision": None}

# The weight of a source.
WEIGHTS = Numbers(0, inside=True)
# Keys that take a number.
NUMBERS = {
    "dataset_num_proc": Numbers(1, 1024, whole=True, hint=", or left out"),
    "eval_rows": Numbers(0, whole=True, hint="; 0 holds no rows out"),
    "max_train_rows": Numbers(1, whole=True, hint=", or left out"),
}


@dataclass
class DataArguments:
    """The training text: Hub datasets or local files with `messages`, ShareGPT `conversations`,
    Alpaca's `instruction`, `input` and `output`, `prompt` and `completion`, `text`, or token
    rows."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub id, or a local .jsonl, .json, .csv, .txt (each also .gz) or .parquet file."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a Hub dataset."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of a Hub dataset."})
    dataset_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a Hub dataset."}
    )
    # The entries arrive as mappings from YAML and as JSON text from the command line.
    # `__post_init__` makes each of them a `Source`. argparse needs a type that it can parse.
    dataset_mixture: list[str] | None = field(
        default=None,
        metadata={
            "help": (
                "Several sources instead of dataset_name: a list of {name, weight, config, split,"
                " revision}. Rows stand in the ratio of the weights, none is taken twice."
            )
        },
    )
    dataset_streaming: bool = field(
        default=False,
        metadata={
            "help": (
                "Read only the first max_train_rows (and held-out) rows, without downloading the"
                " rest."
            )
        },
    )
    dataset_salvage: bool = field(
        default=False,
        metadata={
            "help": (
                "Read what is whole of .json and .jsonl files that are not, held-out rows among"
                " them, and count what is left out."
            )
        },
    )
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Processes that tokenize; one by default."}
    )
    packing: bool = field(
        default=False,
        metadata={
            "help": (
                "Put short rows together into rows of up to max_length tokens; they do not see each"
                " other."
            )
        },
    )
    eval_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Held-out rows; by default the last eval_rows of the training rows."},
    )
    eval_dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of the held-out dataset."}
    )
    eval_dataset_split: str = field(
        default="train", metadata={"help": "Split of the held-out rows."}
    )
    eval_dataset_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the held-out dataset."}
    )
    eval_rows: int = field(
        default=64, metadata={"help": "At most this many held-out rows; 0 for none."}
    )
    max_train_rows: int | None = field(
        default=None, metadata={"help": "Use only the first rows, for a trial run."}
    )

    def __post_init__(self):
        check_keys(self, NUMBERS)
        if self.dataset_streaming and not self.max_train_rows:
            raise ValueError("dataset_streaming: true needs max_train_rows, how many rows to read")
        self._check_sources()
        self._check_heldout()
        if self.dataset_mixture is not None:
            self.dataset_mixture = [mixture_source(entry) for entry in self.dataset_mixture]

    def _check_sources(self) -> None:
        # An empty mixture is none.
        if bool(self.dataset_name) == bool(self.dataset_mixture):
            raise ValueError(
                "give the training text as dataset_name (one source) or as dataset_mixture"
                " (several), and not both"
            )
        # The split has a default, so that "train" may not have been given.
        of_one_source = (self.dataset_config, self.dataset_split, self.dataset_revision)
        if self.dataset_mixture and of_one_source != (None, "train", None):
            raise ValueError(
                "dataset_config, dataset_split and dataset_revision belong to dataset_name:"
                " with dataset_mixture write config, split and revision into its entries"
            )

    def _check_heldout(self) -> None:
        if self.eval_dataset_name is not None:
            if not self.eval_rows:
                raise ValueError("eval_rows: 0 would ignore eval_dataset_name: remove one of them")
            return
        for key in ("eval_dataset_config", "eval_dataset_split", "eval_dataset_revision"):
            if getattr(self, key) not in (None, "train"):
                raise ValueError(
                    f"{key} belongs to eval_dataset_name, and would be ignored: give that too, or"
                    " remove it"
                )

    def sources(self) -> list[Source]:
        """The sources of the training rows: those of the mixture, or the only one."""
        if self.dataset_mixture:
            return self.dataset_mixture
        return [
            {
                "name": self.dataset_name,
                "weight": 1.0,
                "config": self.dataset_config,
                "split": self.dataset_split,
                "revision": self.dataset_revision,
            }
        ]

    @property
    def source_names(self) -> str:
        """The names of all sources of the training rows, as a record shows them."""
        return " + ".join(source["name"] for source in self.sources())


def mixture_source(entry: str | dict) -> Source:
    """One entry of `dataset_mixture`, a mapping or its JSON text, with its defaults.

    Raises:
        ValueError: it is no mapping, has no name, an unknown key, a weight that is not above 0, or
            what is no text where a text must be.
    """
    given = entry
    if isinstance(entry, str):
        try:
            given = json.loads(entry)
        except json.JSONDecodeError:
            given = None
    known = {"name", *SOURCE_DEFAULTS}
    if not isinstance(given, dict) or not given.get("name") or not given.keys() <= known:
        raise ValueError(
            f"dataset_mixture has the entry {entry!r}: it must be a mapping with name and, if need"
            f" be, {', '.join(SOURCE_DEFAULTS)}"
        )
    found = {"name": given["name"]} | SOURCE_DEFAULTS | given
    weight = found["weight"]
    if weight not in WEIGHTS:
        raise ValueError(
            f"dataset_mixture: the weight of {found['name']} is {weight!r}; it must be a number"
            " above 0"
        )
    for key in ("name", "config", "split", "revision"):
        text = found[key]
        may_be_left_out = key in ("config", "revision") and text is None
        if not may_be_left_out and not (isinstance(text, str) and text.strip()):
            raise ValueError(
                f"dataset_mixture: the {key} of {found['name']} is {text!r}; it must be a text: put"
                " it between quotes, or leave it out"
            )
    if found["revision"] is not None:
        check_revision_name(f"dataset_mixture: {found['name']}'s revision", found["revision"])
    return found
