"""Anchors -> Blocks: what the drafter is given to fill, and what it may see.

Shape letters, used everywhere in this package:
    B rows in a batch      S tokens in a row       N anchors (blocks) in a row
    K block size (slots, anchor included)          L taps (target layers read)
    H hidden size          V vocabulary

Slot k = 0 holds the anchor, slots 1..K-1 a mask token; slot k stands at position anchor + k and
predicts that position's token. The leak rules: a block sees context of its own document *strictly
before* its anchor, all of
itself, and nothing else (SpecForge#470, #473).
"""

from dataclasses import dataclass

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

SMALLEST_GROUP = 128  # slots; smaller products are all overhead
EVALUATION_STEP = -1  # anchors of evaluation are those of one fixed "step"


@dataclass
class Blocks:
    """N blocks in each of B rows."""

    anchors: torch.Tensor  # (B, N) long, index into the row
    noise_ids: torch.Tensor  # (B, N * K) long, anchor and mask tokens
    previous_ids: (
        torch.Tensor
    )  # (B, N, K-1) long, the token before each label: what a causal head is told
    labels: (
        torch.Tensor
    )  # (B, N, K-1) long, token at anchor + k; K labels where slot k predicts the one after
    valid: torch.Tensor  # (B, N, K-1) bool, contiguous from slot 1
    position_ids: (
        torch.Tensor
    )  # (B, S + N * K) long, true positions in the document: context, then slots
    attention_mask: (
        tuple[torch.Tensor, ...] | BlockMask
    )  # groups of blocks: (B, 1, G * K, C_g + G * K) bool each


def _mix(x: torch.Tensor) -> torch.Tensor:
    # one round of an integer hash (wrapping int64 arithmetic, the same on every device)
    x = (x ^ (x >> 30)) * -4658895280553007687
    x = (x ^ (x >> 27)) * -7723592293110705685
    return x ^ (x >> 31)


def document_positions(document_ids: torch.Tensor) -> torch.Tensor:
    """Position of each token in its own document, from ids that change where a document ends. (B,
    S) -> (B, S)"""
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def row_inputs(document_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the target needs beside token ids so that packed documents do not see each other, nor
    anything padding: positions that start afresh in each (transformers' masks take that for a
    boundary), or, where every row is one document, an attention mask. (B, S), -1 on padding -> one
    (B, S) tensor by its name"""
    if not bool((document_ids > 0).any()):
        return {"attention_mask": (document_ids >= 0).long()}
    return {"position_ids": document_positions(document_ids)}


def anchor_candidates(supervised: torch.Tensor, document_ids: torch.Tensor) -> torch.Tensor:
    """Positions that may be anchors: supervised, with a supervised token of the same document right
    after (a label)
    and at least one token of it before (context; decoding always has some). (B, S) bool -> (B, S)
    bool"""
    after = torch.zeros_like(supervised)
    after[:, :-1] = supervised[:, 1:] & (document_ids[:, 1:] == document_ids[:, :-1])
    return supervised & after & (document_positions(document_ids) > 0) & (document_ids >= 0)


def sample_anchors(
    supervised: torch.Tensor,
    document_ids: torch.Tensor,
    anchors_per_row: int,
    row_ids: torch.Tensor,
    seed: int,
    step: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw up to N anchors a row, uniformly without replacement.

    The draw is a function of (seed, step, row, position) alone, so it does not depend on how rows
    are split into micro-batches and ranks, on the device, or on a restart.

    Args:
        supervised (`torch.BoolTensor` of shape `(B, S)`).
        document_ids (`torch.LongTensor` of shape `(B, S)`): -1 on padding.
        anchors_per_row (`int`): N.
        row_ids (`torch.LongTensor` of shape `(B,)`): a row's number in its dataset.
        seed, step (`int`): of the run; `EVALUATION_STEP` for evaluation.

    Returns:
        anchors (B, N) ascending, and real (B, N) bool; a row with fewer candidates is padded with
        anchors that are not real.
    """
    position = torch.arange(supervised.shape[1], device=supervised.device)
    start = torch.tensor([seed, step], device=supervised.device)
    key = _mix(_mix(start[0] + 7919) + start[1])
    key = _mix(_mix(key + row_ids.to(supervised.device)[:, None]) + position)  # (B, S)
    candidates = anchor_candidates(supervised, document_ids)
    # a candidate's key is positive, so that it wins over every other position
    key = torch.where(candidates, (key & (2**62 - 1)) + 1, 0)
    count = min(anchors_per_row, supervised.shape[1])
    top, anchors = key.topk(count, dim=1)
    anchors = (
        torch.where(top > 0, anchors, supervised.shape[1]).sort(dim=1).values
    )  # padding goes last
    real = anchors < supervised.shape[1]
    if count < anchors_per_row:  # rows shorter than N
        pad = (0, anchors_per_row - count)
        anchors, real = torch.nn.functional.pad(anchors, pad), torch.nn.functional.pad(real, pad)
    return torch.where(real, anchors, 0), real


def make_blocks(
    input_ids: torch.Tensor,
    supervised: torch.Tensor,
    document_ids: torch.Tensor,
    anchors: torch.Tensor,
    real: torch.Tensor,
    block_size: int,
    mask_token_id: int,
    flex: bool = False,
    predictions: int | None = None,
) -> Blocks:
    """Blocks at given anchors; a block ends where supervision, its document or the row ends.

    Args:
        input_ids, supervised, document_ids (`torch.Tensor` of shape `(B, S)`): document id -1 on
        padding.
        anchors, real (`torch.Tensor` of shape `(B, N)`): blocks that are not real see only
            themselves and have no valid slot, so that their gradient is zero and finite.
        block_size (`int`): K.
        mask_token_id (`int`).
        flex (`bool`, *optional*): make FlexAttention's sparse mask instead of dense ones.
        predictions (`int`, *optional*): P, labels of a block, the tokens after its anchor; K - 1 by
            default, K for a Domino drafter with `shift_label`.
    """
    rows, length = input_ids.shape
    count = anchors.shape[1]
    device = input_ids.device
    tokens = (
        block_size if predictions is None else predictions + 1
    )  # of a block, the anchor's among them
    slots = anchors[:, :, None] + torch.arange(
        tokens, device=device
    )  # (B, N, tokens), index into the row
    inside = slots < length
    index = slots.clamp(max=length - 1).reshape(rows, -1)
    anchor_document = document_ids.gather(1, anchors)  # (B, N)

    def take(values: torch.Tensor) -> torch.Tensor:  # (B, S) -> (B, N, tokens)
        return values.gather(1, index).view(rows, count, tokens)

    usable = (
        inside
        & take(supervised)
        & (take(document_ids) == anchor_document[:, :, None])
        & real[:, :, None]
    )
    valid = usable[:, :, 1:].long().cumprod(-1).bool()
    noise_ids = torch.full((rows, count, block_size), mask_token_id, device=device)
    noise_ids[:, :, 0] = input_ids.gather(1, anchors)

    positions = document_positions(document_ids)
    slot_positions = positions.gather(1, anchors)[:, :, None] + torch.arange(
        block_size, device=device
    )
    position_ids = torch.cat([positions, slot_positions.flatten(1)], dim=1)

    block_ids = take(input_ids)
    return Blocks(
        anchors=anchors,
        noise_ids=noise_ids.flatten(1),
        previous_ids=block_ids[:, :, :-1],
        labels=block_ids[:, :, 1:],
        valid=valid,
        position_ids=position_ids,
        attention_mask=(flex_mask if flex else group_masks)(
            anchors, anchor_document, real, document_ids, block_size
        ),
    )


def group_masks(
    anchors: torch.Tensor,
    anchor_document: torch.Tensor,
    real: torch.Tensor,
    document_ids: torch.Tensor,
    block_size: int,
) -> tuple[torch.Tensor, ...]:
    """The attention rule as one mask for each group of G neighbouring blocks, no larger than the
    group can see: the context before its last anchor, and its own slots. One mask of all slots
    would be mostly other blocks.

    Args:
        anchors, anchor_document, real (`torch.Tensor` of shape `(B, N)`): anchors ascending.
        document_ids (`torch.LongTensor` of shape `(B, S)`).
        block_size (`int`): K.

    Returns:
        Masks of shape (B, 1, G * K, C_g + G * K), bool: keys are context 0..C_g-1, then the group's
        slots.
    """
    rows, count = anchors.shape
    device = anchors.device
    per_group = max(1, max(SMALLEST_GROUP, document_ids.shape[1] // 4) // block_size)
    ends = [
        int(end) for end in torch.where(real, anchors, 0).amax(0).tolist()
    ]  # one wait for the device
    masks = []
    for start in range(0, count, per_group):
        group = slice(start, min(start + per_group, count))
        size = group.stop - group.start
        context = torch.arange(max(ends[group]), device=device)  # nobody in the group sees further
        sees = (
            (context < anchors[:, group, None])
            & (document_ids[:, None, : len(context)] == anchor_document[:, group, None])
            & real[:, group, None]
        )  # (B, G, C_g)
        own = torch.eye(size, dtype=torch.bool, device=device).repeat_interleave(
            block_size, dim=1
        )  # (G, G * K)
        mask = torch.cat([sees, own.expand(rows, -1, -1)], dim=2)
        masks.append(mask.repeat_interleave(block_size, dim=1)[:, None])
    return tuple(masks)


def flex_mask(
    anchors: torch.Tensor,
    anchor_document: torch.Tensor,
    real: torch.Tensor,
    document_ids: torch.Tensor,
    block_size: int,
) -> BlockMask:
    """The attention rule for FlexAttention over all slots: keys are S context positions, then N * K
    slots."""
    (rows, count), length = anchors.shape, document_ids.shape[1]
    ends = torch.where(real, anchors, 0)  # a block that is not real sees no context

    def sees(row, head, slot, key):
        """Whether a slot sees a key: earlier context of its document, or its own block."""
        block = slot // block_size
        position = key.clamp(max=length - 1)
        context = (key < ends[row, block]) & (
            document_ids[row, position] == anchor_document[row, block]
        )
        return context | ((key >= length) & ((key - length) // block_size == block))

    slots = count * block_size
    compiled = anchors.device.type != "cpu"  # otherwise the dense mask is made on the way
    return create_block_mask(
        sees, rows, None, slots, length + slots, anchors.device, _compile=compiled
    )
