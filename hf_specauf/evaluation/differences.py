"""Where two outputs of one prompt part, and whether that is rounding."""

import torch

# In fp32, a first difference is a tie of rounding if the target's two best logits are closer than
# this.
NEAR_TIE = 1e-3


def is_low_precision(dtype: torch.dtype) -> bool:
    """Whether a dtype rounds so much that two ways to compute one logit often differ."""
    return dtype not in (torch.float32, torch.float64)


def near_tie_bound(dtype: torch.dtype, logits: torch.Tensor) -> float:
    """Largest gap between the target's two best logits at which rounding alone can flip the choice
    (vllm#54928)."""
    if not is_low_precision(dtype):
        return NEAR_TIE
    # Low precision rounds relative to the logits' size; the factor leaves room for several of them.
    return 4 * torch.finfo(dtype).eps * logits.abs().max().item()


def first_difference(target, plain: torch.Tensor, assisted: torch.Tensor) -> dict | None:
    """`None` if two outputs (1, T) are equal, else where they part and what the target's logits are
    there.

    Returns:
        dict with the `position`, `top2_gap` (the best logit less the second), `below_best` (from
        there on, of the second output's tokens the furthest below the best logit of its place;
        `None` where it has ended) and `near_tie`.
    """
    if torch.equal(plain, assisted):
        return None
    shorter = min(plain.shape[1], assisted.shape[1])
    differs = (plain[0, :shorter] != assisted[0, :shorter]).nonzero()
    # Where one is the other's beginning, they part where it ends.
    at = differs[0].item() if len(differs) else shorter
    read = assisted[:, : max(at, assisted.shape[1] - 1)]
    with torch.no_grad():
        logits = target(input_ids=read, use_cache=False).logits[0, at - 1 :].float()
    best = logits[0].topk(2).values
    gap = (best[0] - best[1]).item()
    committed, below = assisted[0, at:], None
    if len(committed):
        chosen = logits.gather(1, committed[:, None])[:, 0]
        below = (logits.amax(-1) - chosen).max().item()
    near_tie = gap < near_tie_bound(target.dtype, logits[0])
    return {"position": at, "top2_gap": gap, "below_best": below, "near_tie": near_tie}


def count_verdicts(rows: list[dict]) -> dict[str, int]:
    """How many greedy outputs were identical, parted at a near-tie of rounding, or differed."""
    counts = {"identical": 0, "near_tie": 0, "different": 0}
    for row in rows:
        if row["difference"] is None:
            counts["identical"] += 1
        elif row["difference"]["near_tie"]:
            counts["near_tie"] += 1
        else:
            counts["different"] += 1
    return counts


def largest_gaps(rows: list[dict]) -> dict[str, float] | None:
    """Of the first differences the largest gap between the target's two best logits, and how far
    below its best a committed token was at most, from there on; `None` where nothing differs."""
    found = [row["difference"] for row in rows if row["difference"] is not None]
    if not found:
        return None
    below = [one["below_best"] for one in found if one["below_best"] is not None]
    return {
        "top2_gap": max(one["top2_gap"] for one in found),
        "below_best": max(below, default=None),
    }
