"""The files of a dataset while it is answered: chunks that survive any kill, and the file that they
become. Processes share them by number, and a chunk's number alone decides its seed."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from glob import escape
from math import ceil
from pathlib import Path

from ..identity import Identity
from ..records import check_can_write, part_of, write_record, write_whole

# These settings decide speed, not words. (What answers is compared as `engine`.) The target is
# compared by its identity instead of its name, and rows by their hash.
NOT_COMPARED = (
    "device",
    "concurrency",
    "out",
    "continuous_batching",
    "rows_per_batch",
    "target",
    "dataset_salvage",
)
# What is compared of the target, by the names that it has in errors (0.1.0's keys), and the fields.
COMPARED_IDENTITY = {
    "target": "name_or_path",
    "target_commit": "revision",
    "target_fingerprint": "fingerprint",
    "tokenizer_hash": "tokenizer_hash",
    "chat_template_hash": "chat_template_hash",
}


@dataclass
class Tally:
    """What is counted while chunks are put together. Rows are counted by their numbers, because an
    answered row may take several lines.

    Attributes:
        answered, skipped, truncated (`set[int]`): numbers of rows.
        tokens (`int`): that the target wrote.
        first_reason (`str`, *optional*): why the first skipped row was skipped.
    """

    answered: set[int] = field(default_factory=set)
    skipped: set[int] = field(default_factory=set)
    truncated: set[int] = field(default_factory=set)
    tokens: int = 0
    first_reason: str | None = None

    def add(self, row: dict) -> None:
        """Count one line."""
        number = row["source_row"]
        if "skipped" in row:
            self.skipped.add(number)
            if self.first_reason is None:
                self.first_reason = row["skipped"]
            return
        self.answered.add(number)
        # `truncated` is about the last answer, and a turn's own mark about an earlier one.
        if row["truncated"] or any("truncated" in turn for turn in row.get("messages", [])):
            self.truncated.add(number)
        # A server does not tell its tokens.
        self.tokens += sum(row.get("supervised", []))

    def counts(self) -> dict:
        """The numbers that are not 0, and the tokens."""
        rows = {"answered": self.answered, "skipped": self.skipped, "truncated": self.truncated}
        counts = {kind: len(numbers) for kind, numbers in rows.items() if numbers}
        return counts | {"tokens": self.tokens}


def check_out(out: str) -> None:
    """Raise where the answers could not be written, before any is asked for.

    Raises:
        ValueError: what is in the way.
    """
    if not out.endswith(".jsonl"):
        raise ValueError(f"out is {out!r}; it must end in .jsonl, so that a recipe can read it")
    check_can_write("--out", out, is_file=True)


def settings_in(folder: Path) -> dict:
    """The settings of the chunks in a folder; none where there is no such folder yet."""
    path = folder / "settings.json"
    return json.loads(path.read_text()) if path.is_file() else {}


class ChunkFiles:
    """The files around `out`, say `own.jsonl`.

    1. `own.parts/` gets `settings.json` and a file of each chunk, by any number of processes.
    2. Once all chunks are there, the process that renames the folder to `own.joining/` puts them
       together.
    3. `own.jsonl` and `own.skipped.jsonl` (rows without an answer) appear whole, then
       `own.settings.json`. Where that one lies, `own.jsonl` is whole.

    Args:
        out (`Path`): the file to write.
        settings (`dict`): what the answers depend on, with `rows` and `rows_per_chunk`.
    """

    def __init__(self, out: Path, settings: dict):
        self.out = out
        self.settings = settings
        self.skipped = out.with_suffix(".skipped.jsonl")
        self.parts = out.with_suffix(".parts")
        self.joining = out.with_suffix(".joining")
        self.finished = out.with_suffix(".settings.json")
        self.chunks = range(ceil(settings["rows"] / settings["rows_per_chunk"]))

    def refuse_other_settings(self) -> None:
        """Raise where answers of other settings lie.

        Raises:
            ValueError: names each setting that differs, with both values.
        """
        self._refuse_other(self.finished)
        for folder in (self.parts, self.joining):
            self._refuse_other(folder / "settings.json")

    def _refuse_other(self, path: Path) -> None:
        if not path.is_file():
            return
        before = json.loads(path.read_text())
        pairs = {}
        for key, value in self.settings.items():
            if key not in NOT_COMPARED:
                pairs[key] = (before.get(key), value)
        was, now = Identity.read(before), Identity.read(self.settings)
        same = was.fingerprint and now.fingerprint and "fingerprint" not in was.differences(now)
        for key, field_name in COMPARED_IDENTITY.items():
            # Of 0.1.0 a fingerprint may be the same and shorter.
            if field_name != "fingerprint" or not same:
                pairs[key] = (getattr(was, field_name), getattr(now, field_name))
        differing = ", ".join(
            f"{key} was {old!r} and is {new!r}" for key, (old, new) in pairs.items() if old != new
        )
        if differing:
            raise ValueError(
                f"{path} belongs to answers of other settings ({differing}), and a file must not"
                " mix them: give another --out, or the settings it was begun with. What is there"
                " was left as it is."
            )

    def begin(self) -> None:
        """Make the folder of the chunks.

        Raises:
            ValueError: `out` is somebody else's file.
        """
        if self.out.is_file():
            raise ValueError(
                f"{self.out} is there already and was not written by this command: give another"
                " --out"
            )
        # Each call writes them. They are the same, or differ in what is not compared.
        write_record(self.parts / "settings.json", settings_in(self.parts) | self.settings)

    def note(self, found: dict) -> None:
        """Add what is known only now to the settings.

        Raises:
            ValueError: the chunks that are there were answered with something else.
        """
        self.settings |= found
        if self.any_chunk():
            self.refuse_other_settings()
        write_record(self.parts / "settings.json", self.settings)

    def noted(self, key: str) -> bool:
        """Whether the settings of the chunks know a key."""
        return key in settings_in(self.parts)

    def any_chunk(self) -> bool:
        """Whether a chunk is there, answered by whichever process."""
        return any(self.parts.glob("chunk-*.jsonl"))

    def chunk(self, number: int) -> Path:
        """The file of a chunk. It is there once the chunk is answered."""
        return self.parts / f"chunk-{number:06d}.jsonl"

    def write(self, number: int, rows: list[dict]) -> None:
        """Write a chunk, whole or not at all."""
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        write_whole(self.chunk(number), "".join(lines))

    def claim(self) -> bool:
        """Take the chunks over to put them together.

        Returns:
            whether this process has them: all are there, and no other process was faster.
        """
        if not all(self.chunk(number).is_file() for number in self.chunks):
            return False
        try:
            self.parts.rename(self.joining)
        except OSError:
            return False
        return True

    def put_together(self) -> dict:
        """Join all chunks into `out`. The settings come last.

        Returns:
            counts.

        Raises:
            ValueError: not one row was answered.
        """
        tally = self._join()
        rows = self.settings["rows"]
        if len(tally.answered) + len(tally.skipped) != rows:
            raise ValueError(
                f"{self.joining} holds {len(tally.answered)} answered and {len(tally.skipped)}"
                f" skipped of {rows} rows: another process is putting them together. Wait for it;"
                " where none is running any more, start the same command again"
            )
        if not tally.answered:
            # Give the chunks back, so that the same command finds them and asks for nothing again.
            self.joining.rename(self.parts)
            self.clean_up()
            raise ValueError(
                f"not one of {rows} rows was answered (first: {tally.first_reason}). Mend that,"
                f" remove {self.parts} and start again"
            )
        part_of(self.out).replace(self.out)
        if tally.skipped:
            part_of(self.skipped).replace(self.skipped)
        counts = tally.counts()
        settings = settings_in(self.joining) | self.settings
        write_record(self.finished, settings | {"counts": counts})
        self.clean_up()
        return counts

    def _join(self) -> Tally:
        """Write the lines of all chunks, in order, into parts of the answered and skipped rows."""
        tally = Tally()
        with (
            open(part_of(self.out), "w", encoding="utf-8") as answered,
            open(part_of(self.skipped), "w", encoding="utf-8") as skipped,
        ):
            for line in self._lines():
                row = json.loads(line)
                tally.add(row)
                if "skipped" in row:
                    skipped.write(line)
                else:
                    answered.write(line)
            # On the disk before anything is renamed: a file must not be there and empty after a
            # power cut.
            for file in (answered, skipped):
                file.flush()
                os.fsync(file.fileno())
        return tally

    def _lines(self) -> Iterator[str]:
        """The lines of all chunks, in order."""
        for path in sorted(self.joining.glob("chunk-*.jsonl")):
            with open(path, encoding="utf-8") as file:
                # A file is split at line feeds. `str.splitlines` would split texts at U+2028 too.
                yield from file

    def clean_up(self) -> None:
        """Remove what putting together leaves, now or when it was killed."""
        shutil.rmtree(self.joining, ignore_errors=True)
        for path in (self.out, self.skipped, self.finished):
            for part in path.parent.glob(f"{escape(path.name)}.*.part"):
                part.unlink(missing_ok=True)


def chunk_seed(seed: int, number: int) -> int:
    """A chunk's seed depends on its number alone, so that it is written alike by whichever process,
    in whichever order. A hash keeps neighbours apart, because turns count on from it."""
    digest = hashlib.sha256(f"{seed} {number}".encode()).digest()
    return int.from_bytes(digest[:4]) % 2**31


def number_of_process(torch_name: str, slurm_name: str, default: int) -> int:
    """A number of this process from the environment, by torch's name or Slurm's."""
    # `accelerate.PartialState` would not do instead. It reads none of srun's variables, and with
    # LOCAL_RANK set it starts torch.distributed, where all processes must come up together and the
    # end of one is the end of all. Ours share nothing but the folder of chunks, so each may be
    # killed and started again by itself.
    if "SLURM_STEP_NUM_TASKS" in os.environ:
        # srun started this process. A batch script has Slurm's other variables too, and is alone.
        default = int(os.environ.get(slurm_name, default))
    return int(os.environ.get(torch_name, default))
