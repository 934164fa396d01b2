"""How much the training answers are the target's own words: the cheapest forecast of what a drafter
can reach."""

import json
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..identity import Identity, tokenizer_hashes
from ..losses.blocks import row_inputs
from ..target import FrozenTarget


@torch.no_grad()
def on_policy_score(
    target: FrozenTarget, rows: Dataset, count: int = 32, positions_per_chunk: int = 256
) -> dict:
    """Top-1 agreement and mean log-probability (nats) of supervised tokens under the target, on a
    sample of rows.

    Beside each stands what it would be had the target sampled these tokens itself at temperature 1:
    the mean of its highest probabilities, and minus its mean entropy. Text written at lower
    temperatures scores higher.

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
        hidden = target.backbone(
            input_ids=ids, use_cache=False, **row_inputs(documents)
        ).last_hidden_state[0]
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


def written_by(target: str, fingerprint: str | None, name: str) -> bool:
    """Whether the settings beside a source say that this target wrote it: by its weights where they
    are known, else by its name."""
    path = Path(name).with_suffix(".settings.json")
    writer = Identity.read(json.loads(path.read_text()) if path.is_file() else None)
    return writer.is_same_model(Identity(name_or_path=target, fingerprint=fingerprint))


def check_settings(
    name: str, rows: Dataset, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: dict | None
):
    """Raise where `regenerate` wrote a source for another tokenizer or, if it is of conversations,
    with other
    arguments of the chat template (thinking on or off): a drafter would learn what its target does
    not write.

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
            f"{name} holds tokens of {writer.name_or_path}, whose tokenizer is not this target's:"
            " regenerate it with --target and this target (its messages are prompts for that)"
        )
    theirs = made.get("chat_template_kwargs")
    if "messages" in rows.column_names and (theirs or {}) != (chat_template_kwargs or {}):
        raise ValueError(
            f"{name} was written with chat_template_kwargs: {json.dumps(theirs)}, and this recipe"
            f" has {json.dumps(chat_template_kwargs)}: the drafter would serve another mode than it"
            " learns. Give the recipe what the answers were written with, or regenerate them"
        )
