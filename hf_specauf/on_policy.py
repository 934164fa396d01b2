"""How much the training answers are the target's own words: the cheapest forecast of what a drafter can reach."""

import numpy as np
import torch
from datasets import Dataset

from .blocks import row_inputs
from .recipe import DataArguments
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


def on_policy_words(score: dict, target: str, data: DataArguments) -> str:
    """The score in words and, where the answers are clearly not the target's, the command that mends it."""
    text = (
        f"answers, on {score['tokens']} tokens: the target's own first choice on {score['agreement']:.0%} (had it "
        f"sampled them: {score['agreement_if_own']:.0%}), mean log-probability {score['log_probability']:.2f} (had it "
        f"sampled them: {score['log_probability_if_own']:.2f})"
    )
    if score["agreement"] >= CLEARLY_FOREIGN * score["agreement_if_own"]:
        return text
    source = data.sources()[0]
    extra = "".join(f" --dataset_{key} {source[key]}" for key in ("config", "revision") if source[key])
    extra += "" if source["split"] == "train" else f" --dataset_split {source['split']}"
    return text + (
        "\nThese are not the target's own words, and a drafter serves what its target writes. Answers written by the "
        f"target gain more than any loss:\n  python -m hf_specauf.regenerate --target {target} --dataset_name "
        f"{source['name']}{extra} --out answers.jsonl\nand then dataset_name: answers.jsonl"
    )
