"""What a drafter is measured on: a benchmark by its name, or any set or file -> prompts.

A benchmark is a set of questions of which a tau is published. Its entry in `BENCHMARKS` says where
the questions are and in which words they are asked, in the target's chat template. What a row looks
like:

    gsm8k      {"question": "Natalia sold clips to ...", "answer": "..."}
    math500    {"problem": "Convert the point $(0,3)$ ...", "solution": "...", "answer": "..."}
    humaneval  {"prompt": "def has_close_elements(...", "canonical_solution": "...", "test": "..."}
    mbpp       {"prompt": "Write a function to ...", "code": "...", "test_list": [...]}
    mt_bench   {"prompt": ["Compose a travel blog ...", "Rewrite it ..."], "category": "writing"}
    alpaca     {"instruction": "Classify ...", "input": "Cricket bat", "output": "..."}
"""

import os
import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..data.conversation import Conversation, prompt_ids
from ..data.messages import UnusableRow, row_format, text_ids
from ..data.rows import prompt_length
from ..data.sources import load_rows


@dataclass(frozen=True)
class Wording:
    """How a row's columns become a question.

    Args:
        columns (`tuple[str, ...]`): the columns that make up a question, one below the other; of a
            list of turns, the first one. Empty ones are left out.
        between (`str`, *optional*): what stands between two of them.
        around (`str`, *optional*): the question's words, with `{}` where the columns go.
    """

    columns: tuple[str, ...]
    between: str = "\n\n"
    around: str = "{}"

    def question(self, row: dict) -> str:
        """The question of a row.

        Raises:
            UnusableRow: there is none, or it is not text.
        """
        parts = []
        for column in self.columns:
            part = row[column]
            if isinstance(part, list) and part:
                part = part[0]
            if part is not None and not isinstance(part, str):
                raise UnusableRow(f"its {column} is not text")
            if part:
                parts.append(part)
        if not parts:
            raise UnusableRow(f"its {self.columns[0]} is empty")
        return self.around.format(self.between.join(parts))


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark's questions are, and how they are asked.

    Args:
        dataset (`str`): its id on the Hub.
        config (`str`, *optional*): its configuration there.
        split (`str`): its split.
        wording (`Wording`): how its rows become questions.
        count (`int`): how many of the first questions are asked.
    """

    dataset: str
    config: str | None
    split: str
    wording: Wording
    count: int


BOXED = "{}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
# The six sets of the paper (Accept-Until-Fail, its table of tau), with its numbers of prompts. Its
# own words are not published. These are the words of DFlash's benchmark (arXiv 2602.06036, z-lab),
# whose drafters and sets are the paper's.
BENCHMARKS = {
    "gsm8k": Benchmark("openai/gsm8k", "main", "test", Wording(("question",), around=BOXED), 200),
    "math500": Benchmark(
        "HuggingFaceH4/MATH-500", None, "test", Wording(("problem",), around=BOXED), 200
    ),
    "humaneval": Benchmark(
        "openai/openai_humaneval",
        None,
        "test",
        Wording(
            ("prompt",),
            around="Write a solution to the following problem and make sure that it passes the"
            " tests:\n```python\n{}\n```",
        ),
        164,
    ),
    # the configuration `full` calls the question `text`
    "mbpp": Benchmark(
        "google-research-datasets/mbpp", "sanitized", "test", Wording(("prompt",)), 200
    ),
    "mt_bench": Benchmark(
        "HuggingFaceH4/mt_bench_prompts", None, "train", Wording(("prompt",)), 80
    ),
    "alpaca": Benchmark(
        "tatsu-lab/alpaca",
        None,
        "train",
        Wording(("instruction", "input"), between="\n\nInput:\n"),
        200,
    ),
}


def benchmark_of(name: str) -> str | None:
    """The benchmark of `BENCHMARKS` that a name means; `None` where it means something else.

    `mtbench`, `MT-Bench` and `mt_bench` are one name. A local file or folder wins over a spelling
    that is not in the table.
    """
    if name in BENCHMARKS:
        return name
    if os.path.exists(name):
        return None
    plain = re.sub("[-_ ]", "", name.lower())
    for known in BENCHMARKS:
        if known.replace("_", "") == plain:
            return known
    return None


# Prompts that are decoded of any other set
DEFAULT_COUNT = 24


@dataclass(frozen=True)
class PromptSet:
    """Rows that hold prompts, and how to read them.

    Args:
        rows (`Dataset`): the raw rows.
        wording (`Wording`, *optional*): how a row becomes a question; `None` where each row is in
            a format of `data.sources`.
        count (`int`): how many of them are decoded where the user names no number.
        conditions (`dict`): what `eval.json` says of them.
    """

    rows: Dataset
    wording: Wording | None
    count: int
    conditions: dict

    @property
    def is_text(self) -> bool:
        """Whether the rows are plain text, which is continued and not answered."""
        return self.wording is None and row_format(self.rows.column_names) == "text"


def load_prompts(
    name: str,
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    column: str | None = None,
    salvage: bool = False,
) -> PromptSet:
    """The prompts of `--prompts`: a benchmark, a dataset on the Hub, or a file.

    Args:
        name (`str`): a key of `BENCHMARKS`, a Hub id, or a path. A benchmark wins over a local
            folder or file of exactly its name. `mtbench` and `MT-Bench` mean `mt_bench` too.
        config, split, revision (`str`, *optional*): of a dataset on the Hub. A benchmark has its
            own config and split.
        column (`str`, *optional*): the column that holds the question.
        salvage (`bool`, *optional*, defaults to `False`): read what is whole of a file that is not.

    Raises:
        ValueError: a benchmark was given another config, split or column; or the rows have no such
            column, or no format that is known.
        OSError: there is no such file or dataset.
    """
    meant = benchmark_of(name)
    if meant is not None:
        if config is not None or split != "train" or column is not None:
            source = BENCHMARKS[meant].dataset
            raise ValueError(
                f"--prompts {name} is a benchmark, which has its own config, split and column:"
                " remove --prompts_config, --prompts_split and --prompts_column, or name its"
                f" dataset: --prompts {source}"
            )
        return load_benchmark(meant, revision)
    for key, benchmark in BENCHMARKS.items():
        # one of them, MBPP, would else be continued as plain text, without a word
        if name == benchmark.dataset and column is None:
            print(f"{name} holds the benchmark {key}: --prompts {key} asks its questions")
    try:
        rows = load_rows(name, config, split, revision, keys="prompts_", salvage=salvage)
    except OSError as error:
        # Only now, because a set on the Hub may have a name near a benchmark's.
        near = get_close_matches(name.lower(), BENCHMARKS, n=1)
        if near:
            raise OSError(f"{error} Or did you mean the benchmark {near[0]}?") from error
        raise
    conditions = {"prompts": name, "prompts_column": column}
    if column is not None:
        check_columns(name, rows, (column,))
        return PromptSet(rows, Wording((column,)), DEFAULT_COUNT, conditions)
    try:
        row_format(rows.column_names)
    except ValueError as error:
        raise ValueError(
            f"{error} Or name the column that holds the question: --prompts_column COLUMN"
        ) from error
    return PromptSet(rows, None, DEFAULT_COUNT, conditions)


def load_benchmark(name: str, revision: str | None = None) -> PromptSet:
    """The prompts of a benchmark of the table, at a revision of its dataset or at the newest."""
    benchmark = BENCHMARKS[name]
    if os.path.exists(name):
        print(
            f"{name} is a benchmark, so the local {name} is not read. To read that, give it as"
            f" ./{name}, or a file with its extension"
        )
    rows = load_rows(
        benchmark.dataset, benchmark.config, benchmark.split, revision, keys="prompts_"
    )
    check_columns(benchmark.dataset, rows, benchmark.wording.columns)
    conditions = {
        "benchmark": name,
        "prompts": benchmark.dataset,
        "prompts_config": benchmark.config,
        "prompts_split": benchmark.split,
        "prompts_revision": commit_of(rows) or revision,
        # Questions were asked bare before. A tau of then must not pass for one of these.
        "wording": "as in DFlash's benchmark",
    }
    return PromptSet(rows, benchmark.wording, benchmark.count, conditions)


def check_columns(name: str, rows: Dataset, columns: tuple[str, ...]) -> None:
    """Raise where rows lack a column."""
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise ValueError(
            f"{name} has no column {', '.join(missing)}; it has {', '.join(rows.column_names)}:"
            " give one of these as --prompts_column"
        )


def commit_of(rows: Dataset) -> str | None:
    """The commit that rows came from; `None` where datasets does not tell it (of a local file)."""
    # datasets names the cache folder of a Hub dataset by the commit, and of a file by a longer hash
    for file in rows.cache_files:
        folder = Path(file["filename"]).parent.name
        if re.fullmatch("[0-9a-f]{40}", folder):
            return folder
    return None


def encode_prompts(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    longest: int,
    template_kwargs: dict | None,
    wording: Wording | None = None,
    room: int | None = None,
) -> list[torch.Tensor]:
    """The first `count` rows as prompts (1, S). Rows that give none are counted and printed with
    the reason.

    Args:
        rows (`Dataset`): in a format of `data.sources`, or with the columns of `wording`.
        tokenizer (`PreTrainedTokenizerBase`): the target's. Questions go through its chat template;
            where it has none, they are encoded as they are.
        longest (`int`): tokens of a row of plain text that are the prompt.
        template_kwargs (`dict`, *optional*): arguments of the chat template.
        wording (`Wording`, *optional*): how a row becomes a question.
        room (`int`, *optional*): the most tokens of a prompt, see `target.room_for_prompt`.

    Raises:
        ValueError: not one row gives a prompt.
    """
    prompts = []
    skipped: dict[str, list[int]] = {}
    # The first rows, not a random choice, so that two drafters are asked the same questions.
    for i, row in enumerate(rows.select(range(min(count, len(rows))))):
        ids = prompt_of_row(i, row, tokenizer, longest, template_kwargs, wording)
        if isinstance(ids, list) and room is not None and len(ids) > room:
            ids = f"over {room} tokens, all that max_new_tokens leaves of the target's positions"
        if isinstance(ids, list) and ids:
            prompts.append(torch.tensor([ids]))
        else:
            skipped.setdefault(ids or "it asks nothing", []).append(i)
    words = ", ".join(
        f"{reason} ({len(found)}, first: row {found[0]})" for reason, found in skipped.items()
    )
    if not prompts:
        raise ValueError(
            f"not one row of {min(count, len(rows))} gives a prompt:"
            f" {words or 'there are no rows'}. Name the column that holds the question"
            " (--prompts_column), or other prompts (--prompts)"
        )
    if skipped:
        print(f"{len(prompts)} prompts; other rows give none: {words}")
    return prompts


def prompt_of_row(
    number: int,
    row: dict,
    tokenizer: PreTrainedTokenizerBase,
    longest: int,
    template_kwargs: dict | None,
    wording: Wording | None,
) -> list[int] | str | None:
    """The ids of a row's prompt, or why it has none."""
    if wording is not None:
        try:
            asked = wording.question(row)
        except UnusableRow as error:
            return str(error)
        row = {"messages": [{"role": "user", "content": asked}], "prompt": asked}
    # token rows hold the prompt as it was answered
    if row.get("input_ids") and row.get("supervised"):
        return row["input_ids"][: prompt_length(row["supervised"])]
    if tokenizer.chat_template is None and isinstance(row.get("prompt"), str):
        return text_ids(tokenizer, row["prompt"])
    # as far as the first question, so that the target answers what the set's author asked
    conversation = Conversation(number, row)
    if not conversation.next_question():
        return conversation.skipped
    return prompt_ids(conversation, tokenizer, template_kwargs, longest)
