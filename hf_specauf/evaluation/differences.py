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
    logits = logits_of(target, assisted[:, : max(at, assisted.shape[1] - 1)], at)
    best = logits[0].topk(2).values
    gap = (best[0] - best[1]).item()
    committed, below = assisted[0, at:], None
    if len(committed):
        below = below_best(logits, committed).max().item()
    near_tie = gap < near_tie_bound(target.dtype, logits[0])
    return {"position": at, "top2_gap": gap, "below_best": below, "near_tie": near_tie}


@torch.no_grad()
def logits_of(target, text: torch.Tensor, first: int) -> torch.Tensor:
    """The target's logits for the tokens of a text (1, T) from one on, and for the one that would
    come next, from a single pass. -> (T + 1 - first, V) in fp32"""
    return target(input_ids=text, use_cache=False).logits[0, first - 1 :].float()


def below_best(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """How far each of some tokens (N,) lies below the best logit of its place. -> (N,)"""
    return logits.amax(-1) - logits.gather(1, tokens[:, None])[:, 0]


def read_at_once(target, plain: torch.Tensor, prompt_tokens: int) -> dict:
    """Where the target chooses otherwise, if it reads what it wrote plainly (1, T) in one pass, as
    it reads a draft. There is no draft here. So this is what rounding alone does.

    Returns:
        dict with the `tokens` that were written, how many of them are not its first choice now
        (`otherwise`), and how far the furthest lies `below_best`.
    """
    written = plain[0, prompt_tokens:]
    logits = logits_of(target, plain[:, :-1], prompt_tokens)
    otherwise = (logits.argmax(-1) != written).sum().item()
    below = below_best(logits, written).max().item()
    return {"tokens": len(written), "otherwise": otherwise, "below_best": below}


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
