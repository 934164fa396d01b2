"""The command `specauf regenerate`: the target answers a dataset's prompts -> a .jsonl file to
train a drafter on.

Rows are answered in chunks, each written whole or not at all, so the same command goes on after any
kind of end. A chunk's random numbers depend on the seed and its number alone. Several processes
(`torchrun`, `accelerate launch`, Slurm's `srun`) share the chunks; whoever finishes last puts the
file together.
"""

import hashlib
import json
import shlex
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from datasets import Dataset
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers.trainer_utils import set_seed
from trl import TrlParser

from .cli import OneSpelling, errors_in_one_line
from .data.answers import ROWS_PER_BATCH, TargetWriter
from .data.chunks import ChunkFiles, check_out, chunk_seed, number_of_process
from .data.conversation import Sampling, Writer, answer_rows, end_for_a_server, stop_at_both_ends
from .data.messages import row_format
from .data.on_policy import written_by
from .data.server import ServerWriter, check_endpoint, refuse_plain_text
from .data.sources import load_rows, rows_hash
from .identity import Identity
from .keys import ONE_OR_MORE, SEED, Numbers, check_keys, template_arguments
from .recipe import CHOICES, DataArguments, TargetArguments
from .target import check_device, check_target, load_target
from .training.callbacks import Interruption

# Flags that take a number.
NUMBERS = {
    "max_rows": Numbers(1, whole=True, hint=", or left out"),
    "max_new_tokens": ONE_OR_MORE,
    "prompt_tokens": ONE_OR_MORE,
    "temperature": Numbers(0, 100, hint="; 0 is greedy"),
    "top_p": Numbers(0, 1, hint="; 1 is off"),
    "top_k": Numbers(0, whole=True, hint="; 0 is off"),
    "seed": SEED,
    "rows_per_batch": ONE_OR_MORE,
    "rows_per_chunk": ONE_OR_MORE,
    "concurrency": ONE_OR_MORE,
}


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
    dataset_salvage: bool = field(
        default=False,
        metadata={"help": "Read what is whole of a .json or .jsonl file that is not."},
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
    rows_per_batch: int = field(
        default=ROWS_PER_BATCH,
        metadata={"help": "Rows of a plain batch; on CPUs more are faster, while they fit."},
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
        check_keys(self, NUMBERS, CHOICES)
        self.chat_template_kwargs = template_arguments(self.chat_template_kwargs)
        check_out(self.out)
        if self.top_p == 0:
            raise ValueError("top_p is 0, which leaves no token: temperature: 0 is greedy")
        if self.temperature == 0 and (self.top_p < 1 or self.top_k):
            raise ValueError(
                "temperature: 0 is greedy and would ignore top_p and top_k: remove them"
            )
        if self.endpoint is not None:
            check_endpoint(self.endpoint)
            return
        # Before the rows are read, which may take long. A server has both on its own machine.
        check_device(self.device)
        check_target("target", self.target, self.target_revision)


def regenerate(args: RegenerateArguments) -> dict | None:
    """Answer a dataset's prompts; goes on where an earlier call with the same settings stopped.

    Several processes (`RANK` and `WORLD_SIZE` in the environment, or Slurm's) share the work.

    Returns:
        counts of `answered`, `skipped` and `truncated` rows and of `tokens` written; `None` where
        another process is still at work.

    Raises:
        ValueError: `out` holds answers of other settings; no row was answered.
        KeyboardInterrupt: Ctrl-C or another signal, after the chunk under way.
    """
    rank = number_of_process("RANK", "SLURM_PROCID", 0)
    world = number_of_process("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", 1)
    rows = load_rows(
        args.dataset_name,
        args.dataset_config,
        args.dataset_split,
        args.dataset_revision,
        salvage=args.dataset_salvage,
    )
    if args.max_rows is not None:
        rows = rows.select(range(min(args.max_rows, len(rows))))
    # Token ids of another target ask nothing.
    row_format([column for column in rows.column_names if column != "input_ids"])
    if args.endpoint is not None:
        refuse_plain_text(rows)
    # The target is loaded before anything is compared, because its weights are compared too.
    write, found = writer(args)
    settings = asdict(args) | found | {"rows": len(rows), "rows_hash": rows_hash(rows)}
    files = ChunkFiles(Path(args.out), settings)
    files.refuse_other_settings()
    if files.finished.is_file():
        files.clean_up()
        print(f"{files.out} is finished")
        return json.loads(files.finished.read_text())["counts"]
    if files.joining.is_dir():  # killed while putting together
        return files.put_together() if rank == 0 else None
    files.begin()
    # Every world-th chunk: all processes are then done at about the same time.
    answer_chunks(files, files.chunks[rank::world], rows, write, args, quiet=rank > 0)
    if not files.claim():
        return None
    return files.put_together()


def writer(args: RegenerateArguments) -> tuple[Writer, dict]:
    """What writes the answers, and what of it belongs to the settings."""
    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_p, args.top_k)
    if args.endpoint is not None:
        files = args.target, args.target_revision, args.trust_remote_code
        write = ServerWriter(
            args.endpoint,
            args.target,
            sampling,
            chat_template_kwargs=args.chat_template_kwargs,
            concurrency=args.concurrency,
            end=end_for_a_server(*files, args.chat_template_kwargs),
        )
        return write, {"engine": write.engine, "target": Identity(args.target).record()}
    set_seed(args.seed)
    device = args.device
    if device == "cuda":
        # srun may show each task one GPU alone, which then is number 0.
        local_rank = number_of_process("LOCAL_RANK", "SLURM_LOCALID", 0)
        device = f"cuda:{local_rank % max(torch.cuda.device_count(), 1)}"
    target, tokenizer = load_target(
        args.target,
        args.target_revision,
        key="--target",
        dtype=args.target_dtype,
        trust_remote_code=args.trust_remote_code,
        device_map=device,  # loaded in place, because quantised targets cannot be moved
    )
    ends = stop_at_both_ends(target, tokenizer, args.chat_template_kwargs)
    write = TargetWriter(
        target,
        tokenizer,
        sampling,
        chat_template_kwargs=args.chat_template_kwargs,
        prompt_tokens=args.prompt_tokens,
        continuous_batching=args.continuous_batching,
        rows_per_batch=args.rows_per_batch,
    )
    identity = Identity.of(target, tokenizer, name_or_path=args.target)
    found = {"engine": write.engine, "target": identity.record(), "target_dtype": str(target.dtype)}
    if ends is not None:
        found["stops_at"] = ends
    if identity.fingerprint is None:
        # A quantised target has no fingerprint. Some rows of its head tell it, which may be codes.
        head = target.get_output_embeddings().weight[:8].detach().dequantize().float()
        head = head.cpu().numpy().tobytes()
        found["head_hash"] = hashlib.sha256(head).hexdigest()[:16]
    return write, found


def answer_chunks(
    files: ChunkFiles,
    chunks: range,
    rows: Dataset,
    write: Writer,
    args: RegenerateArguments,
    quiet: bool,
) -> None:
    """Answer those of some chunks that are not there yet, with a progress bar.

    Raises:
        KeyboardInterrupt: Ctrl-C or another signal came. The chunk under way was finished.
    """
    size = args.rows_per_chunk
    missing = [number for number in chunks if not files.chunk(number).is_file()]
    if missing and isinstance(write, ServerWriter):
        # 0.1.0 began without a note, and left all of sampling's keys to the server.
        if files.any_chunk() and not files.noted("neutral_sampling"):
            write.leave_to_server()
        else:
            files.note(write.learn())
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Interruption("this chunk") as told, Progress(*columns, disable=quiet) as progress:
        bar = progress.add_task("rows answered", total=len(chunks) * size, rate="")
        # What an earlier call answered. The rate is of this call alone.
        progress.advance(bar, (len(chunks) - len(missing)) * size)
        start = progress.get_time()

        def answered(done: int, of: int) -> None:
            said = f"rows answered ({done} of {of} answers of this chunk)"
            progress.update(bar, description=said)

        write.answered = answered
        for done, number in enumerate(missing, start=1):
            first = number * size
            batch = rows.select(range(first, min(first + size, len(rows)))).to_list()
            files.write(number, answer_rows(batch, first, write, chunk_seed(args.seed, number)))
            rate = done * size / (progress.get_time() - start)
            progress.update(bar, advance=size, rate=f"{rate:.2f} rows/s")
            if told.noted and done < len(missing):
                raise KeyboardInterrupt(f"{len(missing) - done} chunks of this process are left")


class RegenerateParser(OneSpelling, TrlParser):
    """trl's parser, with each flag in its one spelling."""


@errors_in_one_line()
def main(argv: list[str] | None = None) -> None:
    """Command line of `specauf regenerate` and of `python -m hf_specauf.regenerate`."""
    parser = RegenerateParser(RegenerateArguments, prog="specauf regenerate")
    (args,) = parser.parse_args_and_config(argv)
    try:
        counts = regenerate(args)
    except KeyboardInterrupt as stop:
        # It is no success: a script must not go on to train.
        raise SystemExit(f"stopped: {stop}. The same command goes on.") from stop
    if counts is None:
        print("this process is done; the file is put together when the last one is")
        return
    words = [
        f"{counts.get('answered', 0)} rows answered",
        f"{counts.get('truncated', 0)} cut at max_new_tokens",
    ]
    if counts.get("skipped"):
        words.append(f"{counts['skipped']} without an answer, see *.skipped.jsonl")
    print(f"{args.out}: {', '.join(words)}. Train on it with dataset_name: {args.out}")


# Where the agreement is under this share of what the target's own words would have, the answers
# are clearly not its own.
CLEARLY_FOREIGN = 0.9


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
    is_foreign = score["agreement"] < CLEARLY_FOREIGN * score["agreement_if_own"]
    sources = data.sources()
    # A high score does not prove that the words are the target's own. An easy text scores as high
    # as own words at temperature 1, and still is not what the target would go on to write.
    wanted = [
        number
        for number, source in enumerate(sources)
        if not written_by(target.target, fingerprint, source["name"])
    ]
    if not wanted and not is_foreign:
        return text
    if not wanted:  # the settings say that all are its own, and the score says that they are not
        wanted = list(range(len(sources)))
    commands, outs = [], []
    for number in wanted:
        out = "answers.jsonl" if len(sources) == 1 else f"answers-{number + 1}.jsonl"
        outs.append(out)
        keys = {"dataset_salvage": data.dataset_salvage or None, "out": out}
        commands.append(command(target, sources[number], chat_template_kwargs, keys))
    whose = "Nothing says that the target wrote these answers"
    if is_foreign:
        whose = "These are not the target's own words"
    where = "dataset_name:"
    if len(sources) > 1:
        where = "the same weights in dataset_mixture for"
    listed = "\n  ".join(commands)
    return (
        f"{text}\n{whose}, and a drafter serves what its target writes. Answers written by the"
        f" target gain more than any loss:\n  {listed}\nand then {where} {', '.join(outs)}"
    )


def command(
    target: TargetArguments, source: dict, chat_template_kwargs: dict | None, more: dict
) -> str:
    """The command that lets the target answer one source of a recipe. What is the command's own
    default is left out."""
    keys = {
        "target": target.target,
        "target_revision": target.target_revision,
        "target_dtype": target.target_dtype,
        "trust_remote_code": target.trust_remote_code,
        "dataset_name": source["name"],
        "dataset_config": source["config"],
        "dataset_revision": source["revision"],
        "dataset_split": source["split"],
        "chat_template_kwargs": json.dumps(chat_template_kwargs) if chat_template_kwargs else None,
        **more,
    }
    defaults = {argument.name: argument.default for argument in fields(RegenerateArguments)}
    words = ["python", "-m", "hf_specauf.regenerate"]
    for key, value in keys.items():
        if value is not None and value != defaults[key]:
            words += [f"--{key}", str(value)]
    return shlex.join(words)


if __name__ == "__main__":
    main(sys.argv[1:])
