"""Rows that are kept as they are measured, so that an evaluation that was stopped goes on; and who
of several processes measures which prompt.

    OUT/rows/3f2a9c01d2e4/settings.json    what the rows depend on
    OUT/rows/3f2a9c01d2e4/0.jsonl          the rows that process 0 has measured, one a line

The folder's name is a hash of the settings. So rows of other settings lie in another folder, and
neither run takes the other's for its own. When `eval.json` is written, which holds all rows, the
folder is removed.
"""

import hashlib
import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object

from ..identity import weights_fingerprint
from ..records import environment, write_record
from ..training.waiting import wait_for_everyone
from .ways import Way

# Rows that other versions kept are measured anew: raised when what a row holds changes.
FORM_OF_ROWS = 2
ALONE = (
    "accelerate launch has started one process, and several were asked for. On CPUs it starts them"
    " with --multi_gpu: accelerate launch --multi_gpu --num_processes N -m hf_specauf.evaluate ..."
)


def is_first_process() -> bool:
    """Whether this process writes and prints."""
    return PartialState().is_main_process


def join_processes(args) -> None:
    """Find the other processes that `accelerate launch` has started, and this one's device."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        if launched_alone():
            print(ALONE)
        return
    state = PartialState(cpu=args.device == "cpu")
    if args.device == "cuda":
        args.device = str(state.device)
    if not state.is_main_process:
        # what is said of prompts and models is said once
        sys.stdout = open(os.devnull, "w")


def launched_alone() -> bool:
    """Whether `accelerate launch` was asked for several processes, and has started this one alone.
    On CPUs it does, without a word: then it has only set where the others would meet."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    return launched and "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ


class Rows:
    """The rows of one evaluation, in memory alone: every process measures all prompts."""

    def __init__(self):
        self.found: dict[str, dict] = {}

    def mine(self, keys: list[str]) -> list[int]:
        """The places of the prompts that this process has yet to measure."""
        return [place for place, key in enumerate(keys) if key not in self.found]

    def add(self, row: dict) -> None:
        """Take in the row of a prompt."""
        self.found[row["prompt"]] = row

    def all(self, keys: list[str]) -> list[dict]:
        """The rows of all prompts, in their order."""
        return [self.found[key] for key in keys]


class KeptRows(Rows):
    """Rows on disk, and prompts dealt to all processes that `accelerate launch` has started.

    Args:
        out (`Path`): the folder of the evaluation.
        settings (`dict`): all that a row depends on beside its prompt.
    """

    def __init__(self, out: Path, settings: dict):
        super().__init__()
        # through JSON, because that is what will be read back
        settings = json.loads(json.dumps(settings, default=str))
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        self.folder = out / "rows" / digest
        self.others = []
        if self.folder.parent.is_dir():
            folders = self.folder.parent.iterdir()
            self.others = sorted(path.name for path in folders if path.name != digest)
        # Processes of an earlier run may have been more or fewer.
        for path in sorted(self.folder.glob("*.jsonl")):
            for row in whole_rows(path):
                self.add_found(row)
        self.resumed = len(self.found)
        state = PartialState()
        self.rank, self.processes = state.process_index, state.num_processes
        # All have read before anyone writes: else two would count different rows as kept.
        wait_for_everyone()
        self.settings = settings
        self.path = self.folder / f"{self.rank}.jsonl"

    def note(self) -> str:
        """What was found in the folder, for people; empty if nothing was."""
        if self.resumed:
            return f"going on: {self.resumed} prompts are measured already (in {self.folder})"
        if self.others:
            return (
                f"starting anew: the rows in {self.folder.parent} are of other settings. They stay"
                f" there ({', '.join(self.others)})"
            )
        return ""

    def mine(self, keys: list[str]) -> list[int]:
        """As of [`Rows`]. The missing prompts are dealt one by one to the processes."""
        return super().mine(keys)[self.rank :: self.processes]

    def add_found(self, row: dict) -> None:
        """Take in a row that lies on disk."""
        super().add(row)

    def add(self, row: dict) -> None:
        """Take in the row of a prompt. It is on the disk when this returns."""
        super().add(row)
        # Only now, because a run that fails before its first row leaves no folder.
        if not self.path.exists():
            write_record(self.folder / "settings.json", self.settings)
        with open(self.path, "a", encoding="utf-8") as file:
            # A line that a crash has cut off must not take this one with it.
            file.write("\n" + json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def all(self, keys: list[str]) -> list[dict]:
        """As of [`Rows`], with those of all processes. All of them call it."""
        # A collective gives up after a while, and another process may have the longest answers.
        wait_for_everyone()
        if self.processes > 1:
            for row in gather_object(list(self.found.values())):
                self.add_found(row)
        return super().all(keys)

    def remove(self) -> None:
        """Forget the rows on disk, because `eval.json` holds them."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.folder.parent.is_dir() and not any(self.folder.parent.iterdir()):
            self.folder.parent.rmdir()


def open_rows(out: Path, ways: dict[str, Way], models: dict, **settings) -> KeptRows:
    """The rows that an earlier run of the same settings has kept, and room for more.

    Args:
        ways (`dict[str, Way]`): the ways to decode.
        models (`dict`): what drafts, by name.
        settings: what else a row depends on.
    """
    found = environment()
    weights = {name: weights_fingerprint(model.state_dict()) for name, model in models.items()}
    settings |= {
        "form": FORM_OF_ROWS,
        "ways": {name: asdict(way) for name, way in ways.items()},
        "weights": weights,
        "environment": found["packages"] | {"hardware": found["hardware"]},
    }
    rows = KeptRows(out, settings)
    if is_first_process() and rows.note():
        print(rows.note())
    return rows


def whole_rows(path: Path) -> list[dict]:
    """The rows of a file, without a last one that was cut off."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "prompt" in row:
            rows.append(row)
    return rows
