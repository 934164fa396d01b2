"""How much the training answers are the target's own words: the cheapest forecast of what a drafter can reach."""

import json
import shlex
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .blocks import row_inputs
from .identity import Identity, tokenizer_hashes
from .recipe import DataArguments, TargetArguments
from .target import FrozenTarget

CLEARLY_FOREIGN = 0.9  # share of the agreement that the target's own words would have


@torch.no_grad()
def on_policy_score(target: FrozenTarget, rows: Dataset, count: int = 32, positions_per_chunk: int = 256) -> dict:
    """Top-1 agreement and mean log-probability (nats) of supervised tokens under the target, on a sample of rows.

    Beside each stands what it would be had the target sampled these tokens itself at temperature 1: the mean of its
    highest probabilities, and minus its mean entropy. Text written at lower temperatures scores higher.

    Args:
        target (`FrozenTarget`): every process must call this, where it is sharded.
        rows (`Dataset`): token rows from `prepare_rows`.
        count (`int`, *optional*, defaults to 32): rows taken, evenly spread.
    """
    numbers = np.flatnonzero(np.array(rows["row"]) >= 0)
    numbers = numbers[np.unique(np.linspace(0, len(numbers) - 1, count).astype(int))]
    sums, tokens, device = torch.zeros(4, dtype=torch.float64), 0, target.embedding.weight.device
    for number in numbers.tolist():
        row = rows[number]
        ids = torch.tensor([row["input_ids"]], device=device)
        documents = torch.tensor([row.get("document_ids", [0] * ids.shape[1])], device=device)
        hidden = target.backbone(input_ids=ids, use_cache=False, **row_inputs(documents)).last_hidden_state[0]
        judged = torch.tensor(row["supervised"], device=device).bool()
        judged[0] = False
        judged[1:] &= documents[0, 1:] == documents[0, :-1]
        for at in judged.nonzero().flatten().split(positions_per_chunk):
            log_p = target.logits(hidden[at.to(hidden.device) - 1]).float().log_softmax(-1)
            labels = ids[0, at].to(log_p.device)
            p = log_p.exp()
            found = (
                (log_p.argmax(-1) == labels).sum(), log_p.gather(1, labels[:, None]).sum(),
                p.amax(-1).sum(), (p * log_p).sum(),
            )  # fmt: skip
            sums += torch.stack([value.double().cpu() for value in found])
            tokens += len(at)
    means = (sums / max(tokens, 1)).tolist()
    names = ("agreement", "log_probability", "agreement_if_own", "log_probability_if_own")
    return {"rows": len(numbers), "tokens": tokens} | dict(zip(names, means))


def on_policy_words(
    score: dict,
    target: TargetArguments,
    data: DataArguments,
    chat_template_kwargs: dict | None = None,
    fingerprint: str | None = None,
) -> str:
    """The score in words and, where the answers are clearly not the target's or no settings say that they are, the
    command that mends it.

    Args:
        fingerprint (`str`, *optional*): of the target's weights, where it is known.
    """
    text = (
        f"answers, on {score['tokens']} tokens: the target's own first choice on {score['agreement']:.0%} (had it "
        f"sampled them: {score['agreement_if_own']:.0%}), mean log-probability {score['log_probability']:.2f} (had it "
        f"sampled them: {score['log_probability_if_own']:.2f})"
    )
    foreign = score["agreement"] < CLEARLY_FOREIGN * score["agreement_if_own"]
    sources = data.sources()
    # an easy text scores as high as own words at temperature 1, and still is not what the target would go on to write
    unknown = [not written_by(target.target_model_name_or_path, fingerprint, source["name"]) for source in sources]
    if not foreign and not any(unknown):
        return text
    commands = []
    names = ["answers.jsonl"] if len(sources) == 1 else [f"answers-{i + 1}.jsonl" for i in range(len(sources))]
    for source, name in zip(sources, names):
        keys = {
            "target": target.target_model_name_or_path, "target_revision": target.target_revision,
            "target_dtype": None if target.target_dtype == "auto" else target.target_dtype,
            "trust_remote_code": target.trust_remote_code or None, "dataset_name": source["name"],
            "dataset_config": source["config"], "dataset_revision": source["revision"],
            "dataset_split": None if source["split"] == "train" else source["split"],
            "chat_template_kwargs": json.dumps(chat_template_kwargs) if chat_template_kwargs else None, "out": name,
        }  # fmt: skip
        words = [word for key, value in keys.items() if value is not None for word in (f"--{key}", str(value))]
        commands.append(shlex.join(["python", "-m", "hf_specauf.regenerate", *words]))
    wanted = [i for i, other in enumerate(unknown) if other or not any(unknown)]
    where = "dataset_name:" if len(sources) == 1 else "the same weights in dataset_mixture for"
    whose = "These are not the target's own words" if foreign else "Nothing says that the target wrote these answers"
    return text + (
        f"\n{whose}, and a drafter serves what its target writes. Answers written by the target gain more than any "
        "loss:\n  "
        + "\n  ".join(commands[i] for i in wanted)
        + f"\nand then {where} {', '.join(names[i] for i in wanted)}"
    )


def written_by(target: str, fingerprint: str | None, name: str) -> bool:
    """Whether the settings beside a source say that this target wrote it: by its weights where they are known, else by
    its name."""
    path = Path(name).with_suffix(".settings.json")
    writer = Identity.read(json.loads(path.read_text()) if path.is_file() else None)
    return writer.is_same_model(Identity(name_or_path=target, fingerprint=fingerprint))


def check_settings(name: str, rows: Dataset, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: dict | None):
    """Raise where `regenerate` wrote a source for another tokenizer or, if it is of conversations, with other
    arguments of the chat template (thinking on or off): a drafter would learn what its target does not write.

    Raises:
        ValueError: what differs, and the key that mends it.
    """
    path = Path(name).with_suffix(".settings.json")
    if not path.is_file():
        return
    made = json.loads(path.read_text())
    writer, own = Identity.read(made), tokenizer_hashes(tokenizer)["tokenizer_hash"]
    if "input_ids" in rows.column_names and writer.tokenizer_hash not in (None, own):
        raise ValueError(
            f"{name} holds tokens of {writer.name_or_path}, whose tokenizer is not this target's: regenerate it with "
            "--target and this target (its messages are prompts for that)"
        )
    theirs = made.get("chat_template_kwargs")
    if "messages" in rows.column_names and (theirs or {}) != (chat_template_kwargs or {}):
        raise ValueError(
            f"{name} was written with chat_template_kwargs: {json.dumps(theirs)}, and this recipe has "
            f"{json.dumps(chat_template_kwargs)}: the drafter would serve another mode than it learns. Give the "
            "recipe what the answers were written with, or regenerate them"
        )
