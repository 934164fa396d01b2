"""Checks of what a drafter's config says: mask token, taps, alignment, RoPE.

Each is compared with the record of its training where there is one, and tried otherwise on texts of
the target: the drafter must be best as its config says.
"""

from functools import partial

from ..target import default_mask_token_id
from ..target.shape import widths
from .drafting import best_of, clearly_better, drafts_in, with_config
from .findings import FAIL, PASS, WARN, Line
from .pair import Pair


def unlike_record(pair: Pair, key: str, own) -> Line | None:
    """A failure where the record of the training has another value than config.json."""
    recorded = pair.recorded(key)
    if recorded in (None, own):
        return None
    return Line(
        FAIL,
        f"config.json says {own}, and it was trained with {recorded}",
        f"{key}: {recorded} in config.json",
    )


def mask_token(pair: Pair) -> Line:
    """The token of the slots to be filled."""
    own = pair.drafter.config.mask_token_id
    failed = unlike_record(pair, "mask_token_id", own)
    if failed is not None:
        return failed
    word = pair.tokenizer.convert_ids_to_tokens(own)
    others = {}
    derived = derived_mask_token(pair)
    if derived not in (None, own):
        others[str(derived)] = partial(with_config, pair, mask_token_id=derived)
    best, means = best_of(pair.accepted, others)
    if best is not None:
        return Line(
            FAIL,
            f"with {own} ({word!r}) it has {pair.accepted.mean():.2f} tokens accepted a pass, and"
            f" with {best}, the target's unused token, {means[best]:.2f}",
            f"mask_token_id: {best} in config.json",
        )
    in_text = sum(int((text.output == own).sum()) for text in pair.texts)
    if in_text:
        return Line(
            WARN,
            f"{own} ({word!r}) stands {in_text} times in texts of the target: a word looks like a"
            " blank",
            "train with another mask_token_id",
        )
    return Line(PASS, f"{own} ({word!r})")


def derived_mask_token(pair: Pair) -> int | None:
    """The mask token that training would choose for this target; `None` where there is none."""
    try:
        return default_mask_token_id(pair.target, pair.tokenizer)
    except ValueError:
        return None


def taps(pair: Pair) -> Line:
    """The target's layers that the drafter reads."""
    config = pair.drafter.config
    own = list(config.target_layer_ids)
    failed = unlike_record(pair, "target_layer_ids", own)
    if failed is not None:
        return failed
    others = {}
    for step in (-1, 1):
        moved = [layer + step for layer in own]
        if moved[0] >= 0 and moved[-1] <= config.num_target_layers - 2:
            others[str(moved)] = partial(with_config, pair, target_layer_ids=moved)
    best, means = best_of(pair.accepted, others)
    said = ", ".join(f"{mean:.2f} with {name}" for name, mean in means.items())
    found = f"{own}: {pair.accepted.mean():.2f} accepted a pass; {said}"
    if best is not None:
        return Line(FAIL, found, f"target_layer_ids: {best} in config.json")
    return Line(PASS, found)


def rope_and_window(pair: Pair) -> Line:
    """RoPE's base and the longest text, which a drafter takes from its target."""
    config = pair.drafter.config
    theirs = widths(pair.target.config.get_text_config(decoder=True))
    own, meant = config.rope_parameters["rope_theta"], theirs["rope_parameters"]["rope_theta"]
    if own != meant:
        rope = {"rope_type": "default", "rope_theta": meant}
        other = with_config(pair, rope_parameters=rope)
        found = (
            f"rope_theta is {own:g} ({pair.accepted.mean():.2f} accepted a pass), and the"
            f" target's is {meant:g} ({other.mean():.2f})"
        )
        # A drafter that began here took its target's. One that was released before may have its
        # own, and keeps it.
        began_here = pair.provenance and pair.recorded("drafter") is None
        if began_here or clearly_better(other, pair.accepted):
            return Line(FAIL, found, f"rope_theta: {meant:g} in config.json")
        return Line(WARN, found, "ask who trained it which rope_theta it had")
    longest = theirs["max_position_embeddings"]
    if config.max_position_embeddings != longest:
        return Line(
            WARN,
            f"max_position_embeddings is {config.max_position_embeddings}, and the target's is"
            f" {longest}",
            f"max_position_embeddings: {longest} in config.json",
        )
    return Line(PASS, f"rope_theta {own:g}, {longest} positions, as the target's")


def label_alignment(pair: Pair) -> Line:
    """Whether slot k holds the token that is k places behind the anchor."""
    drafts = pair.drafts
    own = drafts.right_at(0)
    others = {f"{shift:+d}": partial(drafts.right_at, shift) for shift in (-1, 1)}
    best, means = best_of(own, others)
    said = ", ".join(f"{means[name]:.0%} at {name}" for name in others)
    found = f"slots 1 and 2 hold their own token in {own.mean():.0%} of the places; {said}"
    if best is None:
        return Line(PASS, found)
    if pair.drafter.config.kind == "dflash":
        return Line(FAIL, found, "train it again: its labels were shifted by one")
    other = not pair.drafter.config.shift_label
    return Line(FAIL, found, f"shift_label: {str(other).lower()} in config.json, or train it again")


# A drafter that was trained with a leak drafts much less without it. Others gain a little where
# they see the anchor's own state, because the target has nearly chosen the next token there.
LOST_WITHOUT_LEAK, GAIN_OF_LEAK = 0.67, 0.15


def context_leak(pair: Pair) -> Line:
    """Whether the drafter was trained with context that decoding does not have: the state of the
    anchor itself, which holds the next token."""
    own = pair.drafts.right_at(0, slots=1)
    leaky = drafts_in(pair, seen_too_much=1).right_at(0, slots=1)
    found = (
        f"slot 1 is right in {own.mean():.0%} of the places, and in {leaky.mean():.0%} if a block"
        " sees its anchor's state, which decoding does not have"
    )
    lost = own.mean() < LOST_WITHOUT_LEAK * leaky.mean()
    if lost and leaky.mean() - own.mean() > GAIN_OF_LEAK and clearly_better(leaky, own):
        return Line(FAIL, found, "train it again with a mask that ends before the anchor")
    return Line(PASS, found)
