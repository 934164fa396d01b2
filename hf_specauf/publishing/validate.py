"""The check of cards, contributed ones among them. The command is in `hf_specauf/model_card.py`."""

import re
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..records import HUB_ID

# without these, nobody can tell what a tau means
CONDITIONS = ("max_new_tokens", "temperature", "batch_size", "hardware", "dtype", "prompts")
# tau is 1 where nothing is accepted; a speed-up may be below 1
LEAST = {"tau": 1.0, "speedup": 0.0}


def validate(path: str | Path, contributed: bool = False) -> list[str]:
    """What is missing or wrong in a card; empty for a good one.

    Args:
        path (`str` or `Path`): the card.
        contributed (`bool`, *optional*): also ask for the file name `<owner>__<name>.md` and a
            pinned revision.
    """
    path = Path(path)
    try:
        card = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=False)
        header = card.data
    except (ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        return [f"the YAML header cannot be read: {error}"]
    problems = header_problems(header)
    for metric in LEAST:
        problems += metric_problems(metric, header.eval_results or [])
    if "tau =" not in card.text:
        problems.append("the definition of tau is missing from the text")
    if contributed:
        problems += contribution_problems(path.name, card.text)
    return problems


def header_problems(header: ModelCardData) -> list[str]:
    """What the Hub and its search need of a header."""
    problems = []
    if not HUB_ID.fullmatch(str(header.base_model or "")):
        problems.append(
            f"base_model is {header.base_model!r}: it must be the target's Hub id, OWNER/NAME"
        )
    for key in ("license", "library_name"):
        if not header.get(key):
            problems.append(f"{key} is missing from the header")
    if "speculative-decoding" not in (header.tags or []):
        problems.append("tags must hold speculative-decoding")
    return problems


def metric_problems(metric: str, results: list[EvalResult]) -> list[str]:
    """What is wrong with a metric in the model index: absent, no sensible number, or without its
    conditions."""
    problems = []
    measured = [result for result in results if result.metric_type == metric]
    if not measured:
        problems.append(
            f"no {metric} in the model index: measure it with `python -m hf_specauf.evaluate`"
        )
    for result in measured:
        value, least = result.metric_value, LEAST[metric]
        # YAML's `true` is an int for Python
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        # "not >=" instead of "<", so that NaN is wrong too
        if not is_number or not value >= least:
            problems.append(f"{metric} is {value!r}: it must be a number of at least {least:g}")
        conditions = result.metric_args or {}
        missing = [name for name in CONDITIONS if conditions.get(name) is None]
        if missing:
            problems.append(
                f"{metric} on {result.dataset_name}: its conditions lack {', '.join(missing)}"
            )
    return problems


def contribution_problems(file_name: str, text: str) -> list[str]:
    """What a card that is shared in `model_cards/` lacks: its owner's name, and usage lines whose
    code cannot change after it was read."""
    problems = []
    if not re.fullmatch(r"[\w.-]+__[\w.-]+\.md", file_name):
        problems.append(f"the file is called {file_name}: it must be <owner>__<name>.md")
    revisions = set(re.findall(r'from_pretrained\(\s*"[^"]*", revision="([^"]*)"', text))
    if not revisions or revisions & {"main", ""}:
        problems.append("the usage lines must pin a commit or tag: render with --revision")
    return problems
