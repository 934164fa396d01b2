"""How much the training answers are the target's own words, by its probabilities and by what the
settings beside them say. It is the cheapest forecast of what a drafter can reach."""

import json
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..drafters.target_parts import device_of
from ..identity import Identity, tokenizer_hashes
from ..losses.blocks import row_inputs
from ..target import FrozenTarget


@torch.no_grad()
def on_policy_score(
    target: FrozenTarget,
    rows: Dataset,
    count: int = 32,
    most: int | None = None,
    positions_per_chunk: int = 512,
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
        most (`int`, *optional*): supervised tokens taken of each row, the first of them; all by
            default.
        positions_per_chunk (`int`, *optional*, defaults to 512): positions whose logits are held at
            a time. Each chunk is a pass of the target.
    """
    # Rows that only fill up a step have the number -1.
    numbers = np.flatnonzero(np.array(rows["row"]) >= 0)
    numbers = numbers[np.unique(np.linspace(0, len(numbers) - 1, count).astype(int))]
    names = ("agreement", "log_probability", "agreement_if_own", "log_probability_if_own")
    sums = dict.fromkeys(names, 0.0)
    tokens = 0
    device = device_of(target.embedding)
    for number in numbers.tolist():
        row = rows[number]
        ids = torch.tensor([row["input_ids"]], device=device)  # (1, S)
        documents = torch.tensor([row.get("document_ids", [0] * ids.shape[1])], device=device)
        supervised = torch.tensor(row["supervised"], device=device).bool()  # (S,)
        # The first token of a document has no context that could predict it.
        supervised[0] = False
        supervised[1:] &= documents[0, 1:] == documents[0, :-1]
        for at in supervised.nonzero().flatten()[:most].split(positions_per_chunk):
            if not len(at):
                continue
            # The token at a position is predicted by the one before it. What stands behind the last
            # of them is not seen, and would only take time.
            end = int(at[-1])
            inputs = row_inputs(documents[:, :end])
            logits = target.own_logits(ids[:, :end], at - 1, **inputs)  # (N, V)
            log_p = logits.float().log_softmax(-1)
            p = log_p.exp()
            labels = ids[0, at].to(log_p.device)  # (N,)
            sums["agreement"] += (log_p.argmax(-1) == labels).sum().item()
            sums["log_probability"] += log_p.gather(1, labels[:, None]).sum().item()
            sums["agreement_if_own"] += p.amax(-1).sum().item()
            sums["log_probability_if_own"] += (p * log_p).sum().item()
            tokens += len(at)
    means = {name: value / max(tokens, 1) for name, value in sums.items()}
    return {"rows": len(numbers), "tokens": tokens} | means


def settings_beside(name: str) -> dict | None:
    """What `regenerate` wrote beside a source; `None` where it did not write the source."""
    # The rows may have been packed since.
    path = Path(name.removesuffix(".gz")).with_suffix(".settings.json")
    if not path.is_file():
        return None
    return json.loads(path.read_text())


def written_by(target: str, fingerprint: str | None, name: str) -> bool:
    """Whether the settings beside a source say that this target wrote it: by its weights where they
    are known, else by its name."""
    writer = Identity.read(settings_beside(name))
    return writer.is_same_model(Identity(name_or_path=target, fingerprint=fingerprint))


def check_settings(
    name: str, rows: Dataset, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: dict | None
) -> None:
    """Raise where `regenerate` wrote a source for another tokenizer or, if it is of conversations,
    with other arguments of the chat template (thinking on or off). A drafter would learn what its
    target does not write.

    Raises:
        ValueError: what differs, and the key that mends it.
    """
    settings = settings_beside(name)
    if settings is None:
        return
    writer = Identity.read(settings)
    own = tokenizer_hashes(tokenizer)["tokenizer_hash"]
    if "input_ids" in rows.column_names and writer.tokenizer_hash not in (None, own):
        raise ValueError(
            f"{name} holds tokens of {writer.name_or_path}, whose tokenizer is not this target's:"
            " regenerate it with --target and this target (its messages are prompts for that)"
        )
    theirs = settings.get("chat_template_kwargs")
    if "messages" in rows.column_names and (theirs or {}) != (chat_template_kwargs or {}):
        raise ValueError(
            f"{name} was written with chat_template_kwargs: {json.dumps(theirs)}, and this recipe"
            f" has {json.dumps(chat_template_kwargs)}: the drafter would serve another mode than it"
            " learns. Give the recipe what the answers were written with, or regenerate them"
        )
