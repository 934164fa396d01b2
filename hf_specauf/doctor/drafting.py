"""What a drafter would draft at every place of some texts, as its config says and otherwise.

Where a drafter drafts better with a tap one layer higher, with another mask token or at the next
slot, its config does not say what it was trained with. Nothing else shows that: output stays right,
and tau is merely low.

Letters: N places, D = K - 1 drafted slots, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ..drafters.modeling_domino import add_correction
from ..drafters.target_parts import apply_head
from ..serving.replay import blocks_in
from .patient import Patient

# Blocks whose logits are held at once.
BLOCKS_AT_ONCE = 64
# Places of a text are not independent, so that we ask for more than the usual two or three.
SURE = 4.0


@dataclass(frozen=True)
class Drafts:
    """Drafted tokens of every place.

    Attributes:
        drafted (`torch.LongTensor` of shape `(N, D)`): the likeliest token of each slot.
        text (`torch.LongTensor` of shape `(N, D + 3)`): of the texts, from the anchor to two tokens
            behind the block; -1 behind the end.
    """

    drafted: torch.Tensor
    text: torch.Tensor

    @property
    def accepted(self) -> np.ndarray:
        """Accepted tokens of each place, (N,)."""
        slots = self.drafted.shape[1]
        right = self.drafted == self.text[:, 1 : slots + 1]
        return right.long().cumprod(-1).sum(-1).double().numpy()

    def right_at(self, shift: int, slots: int = 2) -> np.ndarray:
        """Share of the first slots that hold the token so many places behind their own, (N,). Those
        further on guess, and guesses fit several places."""
        slots = min(slots, self.drafted.shape[1])
        meant = self.text[:, 1 + shift : 1 + shift + slots]
        return (self.drafted[:, :slots] == meant).double().mean(-1).numpy()


@torch.no_grad()
def drafts_in(patient: Patient, drafter=None, *, seen_too_much: int = 0) -> Drafts:
    """What a drafter drafts at every place of the patient's texts.

    Args:
        patient (`Patient`): its target and texts.
        drafter (`PreTrainedModel`, *optional*): another one than the patient's.
        seen_too_much (`int`): context positions that each block sees beyond what decoding has.
    """
    if drafter is None:
        drafter = patient.drafter
    drafted, seen, frozen = [], [], patient.frozen
    slots = drafter.config.block_size - 1
    for number, text in enumerate(patient.texts):
        output = text.output
        context = patient.context(number, drafter.config.target_layer_ids)
        places = torch.arange(text.first, output.shape[1] - 1, device=output.device)
        for anchors in places.split(BLOCKS_AT_ONCE):
            found = _fill(frozen, drafter, output, context, anchors[None], seen_too_much)
            drafted.append(found[0, :, :slots].cpu())
        behind = torch.full((1, slots + 3), -1, device=output.device)
        longer = torch.cat([output, behind], dim=1)[0]
        seen.append(longer.unfold(0, slots + 3, 1)[places].cpu())
    return Drafts(torch.cat(drafted), torch.cat(seen))


def _fill(frozen, drafter, output, context, anchors, seen_too_much: int) -> torch.Tensor:
    """The likeliest tokens of the blocks at some anchors (1, N) of a text (1, S) -> (1, N, P)."""
    config = drafter.config

    def likeliest(rows, low_rank_rows, project) -> torch.Tensor:
        """A `reduce` of the drafter's forward."""
        logits = apply_head(frozen.head, rows)  # (1, N, P, V)
        if project is not None:
            logits = add_correction(logits, project(low_rank_rows))
        return logits.argmax(-1)

    blocks = blocks_in(output, anchors, config)
    previous = None
    if config.reads_previous_tokens:
        # A pass accepts a slot only if all before it were the text's own tokens.
        previous = frozen.noise_embeds(blocks.previous_ids)
    return drafter(
        noise_embeds=frozen.noise_embeds(blocks.noise_ids),
        context_hidden_states=context,
        # A block sees the context before the anchor that its mask is made for.
        attention_mask=blocks_in(output, anchors + seen_too_much, config).attention_mask,
        position_ids=blocks.position_ids,
        prev_embeds=previous,
        reduce=likeliest,
    ).reduced


def with_config(patient: Patient, **changes) -> np.ndarray:
    """Accepted tokens of every place, had the drafter's config said something else, (N,).

    Args:
        patient (`Patient`): whose drafter stays as it is.
        changes: fields of its config.
    """
    drafter = patient.drafter
    said = drafter.config.to_dict() | changes
    # It repeats some of them.
    del said["dflash_config"]
    config = type(drafter.config).from_dict(said)
    config._attn_implementation = drafter.config._attn_implementation
    other = type(drafter)(config).to(drafter.device, drafter.dtype).eval()
    other.load_state_dict(drafter.state_dict())
    return drafts_in(patient, other).accepted


def clearly_better(other: np.ndarray, own: np.ndarray) -> bool:
    """Whether one of two paired samples has the higher mean, and not by chance."""
    gain = other - own
    error = gain.std() / np.sqrt(len(gain))
    return gain.mean() > 0.02 and gain.mean() > SURE * error


def best_of(
    own: np.ndarray, others: dict[str, Callable[[], np.ndarray]]
) -> tuple[str | None, dict[str, float]]:
    """The alternative that is clearly better than what a config says, and the mean of each.

    Args:
        own (`np.ndarray` of shape `(N,)`): accepted tokens as the config says.
        others (`dict`): the same, otherwise; made when asked for.

    Returns:
        The name of the best alternative; `None` where none is clearly better.
    """
    means, best = {}, None
    for name, made in others.items():
        found = made()
        means[name] = float(found.mean())
        if clearly_better(found, own) and (best is None or means[name] > means[best]):
            best = name
    return best, means
