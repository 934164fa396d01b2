"""`python -m hf_specauf.regenerate`: the target answers a dataset's prompts -> a .jsonl file to
train a drafter on.

Rows are answered in chunks, each written whole or not at all, so the same command goes on after any
kind of end. A chunk's random numbers depend on the seed and its number alone. Several processes
(`torchrun`, `accelerate launch`, Slurm's `srun`) share the chunks; whoever finishes last puts the
file together.
"""

import hashlib
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from glob import escape
from pathlib import Path

import torch
from datasets import Dataset
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers.trainer_utils import set_seed
from trl import TrlParser

from .cli import errors_in_one_line
from .data.answers import Conversation, endpoint_writer, target_writer
from .data.on_policy import written_by
from .data.sources import load_rows
from .identity import Identity
from .recipe import DataArguments, TargetArguments, json_mapping
from .records import write_record
from .target import load_target

# These decide speed, not words; what answers is compared as `engine`. The target is compared by its
# identity.
NOT_COMPARED = ("device", "concurrency", "out", "continuous_batching", "target")
WRITER = {
    "target": "name_or_path", "target_commit": "revision", "target_fingerprint": "fingerprint",
    "tokenizer_hash": "tokenizer_hash", "chat_template_hash": "chat_template_hash",
}  # fmt: skip


@dataclass
class RegenerateArguments:
    """Arguments of `python -m hf_specauf.regenerate`."""

    target: str = field(
        metadata={
            "help": "Hub id or folder of the target; with endpoint, the name it goes by there."
        }
    )
    dataset_name: str = field(
        metadata={"help": "Hub id or local file with the prompts: any format of a recipe."}
    )
    out: str = field(metadata={"help": "The .jsonl file to write."})
    target_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the target."}
    )
    target_dtype: str = field(
        default="auto", metadata={"help": "auto (as stored), bfloat16 or float32."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the target repository's own code."}
    )
    device: str = field(
        default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "cuda or cpu."}
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a Hub dataset."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of a Hub dataset."})
    dataset_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a Hub dataset."}
    )
    max_rows: int | None = field(default=None, metadata={"help": "Answer only the first rows."})
    chat_template_kwargs: str | None = field(
        default=None, metadata={"help": 'As in the recipe, e.g. {"enable_thinking": false}.'}
    )
    max_new_tokens: int = field(default=1024, metadata={"help": "Most tokens of an answer."})
    prompt_tokens: int = field(
        default=64, metadata={"help": "Rows of plain text are continued after so many tokens."}
    )
    temperature: float = field(default=0.7, metadata={"help": "0 is greedy."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus sampling; 1 is off."})
    top_k: int = field(default=0, metadata={"help": "Sample among the k best tokens; 0 is off."})
    seed: int = field(default=0, metadata={"help": "Of sampling."})
    continuous_batching: bool = field(
        default=True,
        metadata={"help": "false: plain batches; on CPUs they are some three times as fast."},
    )
    rows_per_chunk: int = field(
        default=256, metadata={"help": "Rows answered together; a kill loses at most these."}
    )
    endpoint: str | None = field(
        default=None,
        metadata={
            "help": (
                "An OpenAI-compatible server of the target (vLLM, SGLang, TGI, transformers serve),"
                " e.g. http://localhost:8000/v1, instead of loading it here. Its key is read from"
                " OPENAI_API_KEY."
            )
        },
    )
    concurrency: int = field(default=32, metadata={"help": "Requests at a time to the endpoint."})

    def __post_init__(self):
        self.chat_template_kwargs = json_mapping("chat_template_kwargs", self.chat_template_kwargs)
        if not self.out.endswith(".jsonl"):
            raise ValueError(
                f"out is {self.out!r}; it must end in .jsonl, so that a recipe can read it"
            )
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(
                f"temperature {self.temperature}, top_p {self.top_p}, top_k {self.top_k}: they must"
                " be 0 or more, in (0, 1], and 0 or more"
            )
        if self.temperature == 0 and (self.top_p < 1 or self.top_k):
            raise ValueError(
                "temperature: 0 is greedy and would ignore top_p and top_k: remove them"
            )
        for key in ("max_new_tokens", "prompt_tokens", "rows_per_chunk", "concurrency"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}; it must be at least 1")
        if self.max_rows is not None and self.max_rows < 1:
            raise ValueError(f"max_rows is {self.max_rows}; it must be at least 1, or left out")


def answer_rows(
    rows: list[dict], first: int, write: Callable[[list[Conversation], int], list[dict]], seed: int
):
    """Let the target answer every question of some rows, turn by turn -> finished records, in
    order."""
    conversations = [Conversation(first + i, row) for i, row in enumerate(rows)]
    turn = 0
    while waiting := [
        conversation for conversation in conversations if conversation.wants_answer()
    ]:
        for conversation, answer in zip(waiting, write(waiting, seed + turn)):
            conversation.take(answer)
        turn += 1
    return [record for conversation in conversations for record in conversation.finished()]


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all, though several processes may write the same one."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def refuse_other_settings(path: Path, settings: dict) -> None:
    """Raise where answers of other settings lie.

    Raises:
        ValueError: names each setting that differs, with both values.
    """
    if not path.is_file():
        return
    before = json.loads(path.read_text())
    pairs = {key: (before.get(key), settings[key]) for key in settings if key not in NOT_COMPARED}
    was, now = Identity.read(before), Identity.read(settings)
    pairs |= {key: (getattr(was, own), getattr(now, own)) for key, own in WRITER.items()}
    words = [f"{key} was {old!r} and is {new!r}" for key, (old, new) in pairs.items() if old != new]
    if words:
        differing = ", ".join(words)
        raise ValueError(
            f"{path} belongs to answers of other settings ({differing}), and a file must not mix"
            " them: give another --out, or the settings it was begun with. What is there was left"
            " as it is."
        )


def put_together(out: Path, settings: dict) -> dict:
    """Join all chunks into `out`; rows without an answer go to `*.skipped.jsonl`. The settings come
    last: where they lie, `out` is whole.

    Returns:
        counts.

    Raises:
        ValueError: not one row was answered.
    """
    parts, joining = out.with_suffix(".parts"), out.with_suffix(".joining")
    paths = {"answered": out, "skipped": out.with_suffix(".skipped.jsonl")}
    # numbers of rows: an answered one may take several lines
    seen: dict[str, set[int]] = {"answered": set(), "skipped": set(), "truncated": set()}
    tokens, reason = 0, None
    with ExitStack() as stack:
        part = {
            kind: path.with_name(f"{path.name}.{os.getpid()}.part") for kind, path in paths.items()
        }
        files = {
            kind: stack.enter_context(open(path, "w", encoding="utf-8"))
            for kind, path in part.items()
        }
        for chunk in sorted(joining.glob("chunk-*.jsonl")):
            with open(
                chunk, encoding="utf-8"
            ) as lines:  # their text may hold what `str.splitlines` splits at
                for line in lines:
                    row = json.loads(line)
                    kind = "skipped" if "skipped" in row else "answered"
                    files[kind].write(line)
                    seen[kind].add(row["source_row"])
                    if row.get("truncated"):
                        seen["truncated"].add(row["source_row"])
                    tokens += sum(row.get("supervised", []))
                    reason = reason or row.get("skipped")
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    if len(seen["answered"]) + len(seen["skipped"]) != settings["rows"]:
        raise ValueError(
            f"{joining} holds {len(seen['answered'])} answered and {len(seen['skipped'])} skipped"
            f" of {settings['rows']} rows: another process is putting them together"
        )
    if not seen["answered"]:
        joining.rename(parts)
        clean_up(out)
        raise ValueError(
            f"not one of {settings['rows']} rows was answered (first: {reason}). Mend that, remove"
            f" {parts} and start again"
        )
    for kind in paths:
        if seen[kind]:
            part[kind].replace(paths[kind])
    counts = {kind: len(rows) for kind, rows in seen.items() if rows} | {"tokens": tokens}
    write_record(out.with_suffix(".settings.json"), settings | {"counts": counts})
    clean_up(out)
    return counts


def clean_up(out: Path) -> None:
    """Remove what putting together leaves, now or when it was killed."""
    shutil.rmtree(out.with_suffix(".joining"), ignore_errors=True)
    for path in (out, out.with_suffix(".skipped.jsonl")):
        for part in path.parent.glob(f"{escape(path.name)}.*.part"):
            part.unlink(missing_ok=True)


def process(key: str, slurm: str, default: int = 0) -> int:
    """A number of this process from the environment, by torch's name or Slurm's."""
    if (
        "SLURM_STEP_NUM_TASKS" in os.environ
    ):  # started by srun; a batch script has the other names too, and is alone
        default = os.environ.get(slurm, default)
    return int(os.environ.get(key, default))


def regenerate(args: RegenerateArguments) -> dict | None:
    """Answer a dataset's prompts; goes on where an earlier call with the same settings stopped.

    Several processes (`RANK` and `WORLD_SIZE` in the environment, or Slurm's) share the work.

    Returns:
        counts of `answered`, `skipped` and `truncated` rows and of `tokens` written; `None` where
        another process is still at work.

    Raises:
        ValueError: `out` holds answers of other settings; no row was answered.
    """
    rank, world = process("RANK", "SLURM_PROCID"), process("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", 1)
    out = Path(args.out)
    parts, joining, finished = (
        out.with_suffix(end) for end in (".parts", ".joining", ".settings.json")
    )
    rows = load_rows(
        args.dataset_name, args.dataset_config, args.dataset_split, args.dataset_revision
    )
    rows = rows if args.max_rows is None else rows.select(range(min(args.max_rows, len(rows))))
    write, found = writer(args)
    settings = asdict(args) | found | {"rows": len(rows), "rows_hash": rows_hash(rows)}
    for path in (finished, parts / "settings.json", joining / "settings.json"):
        refuse_other_settings(path, settings)
    if finished.is_file():
        clean_up(out)
        print(f"{out} is finished")
        return json.loads(finished.read_text())["counts"]
    if joining.is_dir():  # killed while putting together
        return put_together(out, settings) if rank == 0 else None
    if out.is_file():
        raise ValueError(
            f"{out} is there already and was not written by this command: give another --out"
        )
    parts.mkdir(parents=True, exist_ok=True)
    write_whole(parts / "settings.json", json.dumps(settings, indent=2) + "\n")
    size = args.rows_per_chunk
    chunks = range(-(-len(rows) // size))
    path = {chunk: parts / f"chunk-{chunk:06d}.jsonl" for chunk in chunks}
    mine = [chunk for chunk in chunks if chunk % world == rank]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
    )
    with Progress(*columns, TimeRemainingColumn(), disable=rank > 0) as progress:
        bar = progress.add_task("rows answered", total=len(mine) * size, rate="")
        todo = [chunk for chunk in mine if not path[chunk].is_file()]
        progress.advance(bar, (len(mine) - len(todo)) * size)
        start = progress.get_time()
        for done, chunk in enumerate(todo, start=1):
            seed = (
                int.from_bytes(hashlib.sha256(f"{args.seed} {chunk}".encode()).digest()[:4]) % 2**31
            )
            batch = rows.select(range(chunk * size, min((chunk + 1) * size, len(rows)))).to_list()
            records = answer_rows(batch, chunk * size, write, seed)
            write_whole(
                path[chunk],
                "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records),
            )
            rate = done * size / (progress.get_time() - start)
            progress.update(bar, advance=size, rate=f"{rate:.2f} rows/s")
    if not all(file.is_file() for file in path.values()):
        return None
    try:
        parts.rename(joining)  # one process wins
    except OSError:
        return None
    return put_together(out, settings)


def rows_hash(rows: Dataset) -> str:
    """Short SHA-256 of all rows."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, default=str).encode())
    return digest.hexdigest()[:16]


def writer(args: RegenerateArguments) -> tuple[Callable, dict]:
    """What answers (see `answers.py`), and what of it belongs to the settings."""
    if args.endpoint is not None:
        return endpoint_writer(args), {
            "engine": "endpoint",
            "target": Identity(args.target).record(),
        }
    set_seed(args.seed)
    local = process("LOCAL_RANK", "SLURM_LOCALID") % max(
        torch.cuda.device_count(), 1
    )  # srun may show a task one GPU
    target, tokenizer = load_target(
        args.target, args.target_revision, key="--target", dtype=args.target_dtype,
        trust_remote_code=args.trust_remote_code,
        device_map=f"cuda:{local}" if args.device == "cuda" else args.device,  # quantised ones are not to be moved
    )  # fmt: skip
    write, engine = target_writer(args, target, tokenizer)
    identity = Identity.of(target, tokenizer, name_or_path=args.target)
    found = {"engine": engine, "target": identity.record(), "target_dtype": str(target.dtype)}
    if identity.fingerprint is None:  # quantised
        head = target.get_output_embeddings().weight[:8].detach().float().cpu().numpy().tobytes()
        found["head_hash"] = hashlib.sha256(head).hexdigest()[:16]
    return write, found


@errors_in_one_line()
def main(argv: list[str] | None = None) -> None:
    """Command line of `python -m hf_specauf.regenerate`."""
    (args,) = TrlParser(
        RegenerateArguments, prog="python -m hf_specauf.regenerate"
    ).parse_args_and_config(argv)
    counts = regenerate(args)
    if counts is None:
        print("this process is done; the file is put together when the last one is")
        return
    words = [
        f"{counts.get('answered', 0)} rows answered",
        f"{counts.get('truncated', 0)} cut at max_new_tokens",
    ]
    words += (
        [f"{counts['skipped']} without an answer, see *.skipped.jsonl"]
        if counts.get("skipped")
        else []
    )
    print(f"{args.out}: {', '.join(words)}. Train on it with dataset_name: {args.out}")


if __name__ == "__main__":
    main(sys.argv[1:])


CLEARLY_FOREIGN = 0.9  # share of the agreement that the target's own words would have


def on_policy_words(
    score: dict,
    target: TargetArguments,
    data: DataArguments,
    chat_template_kwargs: dict | None = None,
    fingerprint: str | None = None,
) -> str:
    """The score in words and, where the answers are clearly not the target's or no settings say
    that they are, the command that mends it.

    Args:
        fingerprint (`str`, *optional*): of the target's weights, where it is known.
    """
    text = (
        f"answers, on {score['tokens']} tokens: the target's own first choice on"
        f" {score['agreement']:.0%} (had it sampled them: {score['agreement_if_own']:.0%}), mean"
        f" log-probability {score['log_probability']:.2f} (had it sampled them:"
        f" {score['log_probability_if_own']:.2f})"
    )
    foreign = score["agreement"] < CLEARLY_FOREIGN * score["agreement_if_own"]
    sources = data.sources()
    # an easy text scores as high as own words at temperature 1, and still is not what the target
    # would go on to write
    unknown = [not written_by(target.target, fingerprint, source["name"]) for source in sources]
    if not foreign and not any(unknown):
        return text
    commands = []
    names = (
        ["answers.jsonl"]
        if len(sources) == 1
        else [f"answers-{i + 1}.jsonl" for i in range(len(sources))]
    )
    for source, name in zip(sources, names):
        keys = {
            "target": target.target, "target_revision": target.target_revision,
            "target_dtype": None if target.target_dtype == "auto" else target.target_dtype,
            "trust_remote_code": target.trust_remote_code or None, "dataset_name": source["name"],
            "dataset_config": source["config"], "dataset_revision": source["revision"],
            "dataset_split": None if source["split"] == "train" else source["split"],
            "chat_template_kwargs": json.dumps(chat_template_kwargs) if chat_template_kwargs else None, "out": name,
        }  # fmt: skip
        words = [
            word
            for key, value in keys.items()
            if value is not None
            for word in (f"--{key}", str(value))
        ]
        commands.append(shlex.join(["python", "-m", "hf_specauf.regenerate", *words]))
    wanted = [i for i, other in enumerate(unknown) if other or not any(unknown)]
    where = "dataset_name:" if len(sources) == 1 else "the same weights in dataset_mixture for"
    whose = (
        "These are not the target's own words"
        if foreign
        else "Nothing says that the target wrote these answers"
    )
    return text + (
        f"\n{whose}, and a drafter serves what its target writes. Answers written by the target"
        " gain more than any loss:\n  "
        + "\n  ".join(commands[i] for i in wanted)
        + f"\nand then {where} {', '.join(names[i] for i in wanted)}"
    )
