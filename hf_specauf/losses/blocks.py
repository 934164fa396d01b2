"""Anchors -> Blocks: what the drafter is given to fill, and what it may see.

Shape letters, used everywhere in this package:
    B rows in a batch      S tokens in a row       N anchors (blocks) in a row
    K block size (slots, anchor included)          L taps (target layers read)
    H hidden size          V vocabulary            P predictions of a block (K - 1, or K)

Three words say what a loss is made of, also everywhere in this package:
    a *supervised* token stands in a row: the drafter may learn to predict it;
    a *valid* slot stands in a block: it and all slots before it have supervised tokens to predict;
    a *supported* slot is a valid one that the objective keeps.

Slot k = 0 holds the anchor, slots 1..K-1 a mask token. Slot k stands at position anchor + k and
predicts that position's token. The leak rule: a block sees the context of its own document
*strictly before* its anchor, all of itself, and nothing else (SpecForge#470, #473).
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.functional import pad

SMALLEST_GROUP = 128  # slots; smaller products are all overhead
EVALUATION_STEP = -1  # anchors of evaluation are those of one fixed "step"


@dataclass
class Blocks:
    """N blocks in each of B rows."""

    # (B, N) long: an anchor's index into its row
    anchors: torch.Tensor
    # (B, N * K) long: the anchor's token and mask tokens
    noise_ids: torch.Tensor
    # (B, N, P) long: the token before each label, which is what a causal head is told
    previous_ids: torch.Tensor
    # (B, N, P) long: the tokens after the anchor
    labels: torch.Tensor
    # (B, N, P) bool: contiguous from the first slot that predicts
    valid: torch.Tensor
    # (B, S + N * K) long: true positions in the document, of the context and then of the slots
    position_ids: torch.Tensor
    # a mask (B, 1, G * K, C_g + G * K) bool for each group of G blocks, or one sparse mask
    attention_mask: tuple[torch.Tensor, ...] | BlockMask


def _mix(x: torch.Tensor) -> torch.Tensor:
    # One round of an integer hash. int64 arithmetic wraps around the same way on every device,
    # which a random number generator does not promise.
    x = (x ^ (x >> 30)) * -4658895280553007687
    x = (x ^ (x >> 27)) * -7723592293110705685
    return x ^ (x >> 31)


def document_positions(document_ids: torch.Tensor) -> torch.Tensor:
    """Position of each token in its own document, from ids that change where a document ends.
    (B, S) -> (B, S)"""
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    # the running maximum of all starts so far is where the token's own document starts
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def row_inputs(document_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the target needs beside token ids, so that nobody sees padding or another document.

    Where every row is one document, that is an attention mask. For packed rows it is positions that
    start afresh in each document, because transformers' masks take a fresh start for a boundary.

    Args:
        document_ids (`torch.LongTensor` of shape `(B, S)`): -1 on padding.

    Returns:
        One tensor of shape `(B, S)` by its name.
    """
    packed = bool((document_ids > 0).any())
    if packed:
        positions = document_positions(document_ids)
        # Padding may be longer than any document, and the target has no positions for that.
        longest = positions.masked_fill(document_ids < 0, 0).max() + 1
        return {"position_ids": positions.where(document_ids >= 0, positions % longest)}
    return {"attention_mask": (document_ids >= 0).long()}


def anchor_candidates(supervised: torch.Tensor, document_ids: torch.Tensor) -> torch.Tensor:
    """Positions that may be anchors. (B, S) bool -> (B, S) bool

    The token itself is supervised. A supervised token of the same document follows, because a block
    needs a label. A token of the same document stands before, because decoding always has context.
    """
    followed = torch.zeros_like(supervised)
    followed[:, :-1] = supervised[:, 1:] & (document_ids[:, 1:] == document_ids[:, :-1])
    has_context = document_positions(document_ids) > 0
    return supervised & followed & has_context & (document_ids >= 0)


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
    length = supervised.shape[1]
    position = torch.arange(length, device=supervised.device)
    start = torch.tensor([seed, step], device=supervised.device)
    # a pseudo-random key for every token: the N largest keys of a row are its anchors
    key = _mix(_mix(start[0] + 7919) + start[1])
    key = _mix(_mix(key + row_ids.to(supervised.device)[:, None]) + position)  # (B, S)
    candidates = anchor_candidates(supervised, document_ids)
    # a candidate's key is positive, so that it wins over every other position
    key = torch.where(candidates, (key & (2**62 - 1)) + 1, 0)
    count = min(anchors_per_row, length)
    top, anchors = key.topk(count, dim=1)  # (B, N)
    # one past the row's end, so that sorting puts padding last
    anchors = torch.where(top > 0, anchors, length).sort(dim=1).values
    real = anchors < length
    # topk gives no more than S keys, and a row may be shorter than N
    missing = (0, anchors_per_row - count)
    anchors, real = pad(anchors, missing), pad(real, missing)
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
    if predictions is None:
        predictions = block_size - 1
    rule = AttentionRule(anchors, real, document_ids, block_size)
    length = input_ids.shape[1]
    # a block's tokens: its anchor's and its labels
    index = anchors[:, :, None] + torch.arange(predictions + 1, device=anchors.device)
    inside = index < length  # (B, N, P + 1)
    index = index.clamp(max=length - 1)

    def take(values: torch.Tensor) -> torch.Tensor:  # (B, S) -> (B, N, P + 1)
        return values.gather(1, index.flatten(1)).view_as(index)

    same_document = take(document_ids) == rule.anchor_documents[:, :, None]
    has_label = inside & take(supervised) & same_document & real[:, :, None]
    # a block ends at its first token that is no label, as the answer does there
    valid = has_label[:, :, 1:].long().cumprod(-1).bool()  # (B, N, P)

    block_ids = take(input_ids)  # (B, N, P + 1)
    noise_ids = torch.full((*anchors.shape, block_size), mask_token_id, device=anchors.device)
    noise_ids[:, :, 0] = block_ids[:, :, 0]
    return Blocks(
        anchors=anchors,
        noise_ids=noise_ids.flatten(1),
        previous_ids=block_ids[:, :, :-1],
        labels=block_ids[:, :, 1:],
        valid=valid,
        position_ids=_position_ids(anchors, document_ids, block_size),
        attention_mask=rule.flex_mask() if flex else rule.group_masks(),
    )


def _position_ids(
    anchors: torch.Tensor, document_ids: torch.Tensor, block_size: int
) -> torch.Tensor:
    """Positions in the document of all context and then of all slots, which count on from their
    anchor. (B, N) and (B, S) -> (B, S + N * K)"""
    context = document_positions(document_ids)
    of_anchors = context.gather(1, anchors)
    slots = of_anchors[:, :, None] + torch.arange(block_size, device=anchors.device)  # (B, N, K)
    return torch.cat([context, slots.flatten(1)], dim=1)


@dataclass(frozen=True)
class AttentionRule:
    """Who sees what: a block sees the context of its own document strictly before its anchor, all
    of itself, and nothing else.

    Attributes:
        anchors, real (`torch.Tensor` of shape `(B, N)`): anchors ascending. A block that is not
            real sees itself alone.
        document_ids (`torch.LongTensor` of shape `(B, S)`).
        block_size (`int`): K.
    """

    anchors: torch.Tensor
    real: torch.Tensor
    document_ids: torch.Tensor
    block_size: int

    @cached_property  # each group asks for it
    def anchor_documents(self) -> torch.Tensor:
        """The document each block lies in, (B, N)."""
        return self.document_ids.gather(1, self.anchors)

    def group_masks(self) -> tuple[torch.Tensor, ...]:
        """The rule as one mask for each group of G neighbouring blocks, no larger than the group
        can see: the context before its last anchor, and its own slots. One mask of all slots would
        be mostly other blocks.

        Returns:
            Masks of shape (B, 1, G * K, C_g + G * K), bool: keys are context 0..C_g-1, then the
            group's slots.
        """
        count, length = self.anchors.shape[1], self.document_ids.shape[1]
        per_group = max(1, max(SMALLEST_GROUP, length // 4) // self.block_size)
        # the sizes of all groups at once, because each wait for the device costs
        ends = torch.where(self.real, self.anchors, 0).amax(0).tolist()
        masks = []
        for start in range(0, count, per_group):
            stop = min(start + per_group, count)
            # anchors ascend in a row, so nobody in the group sees past the largest of its anchors
            masks.append(self._group_mask(slice(start, stop), max(ends[start:stop])))
        return tuple(masks)

    def _group_mask(self, group: slice, context_length: int) -> torch.Tensor:
        """The mask of G blocks over the first C_g context positions and their own slots."""
        rows, size = self.anchors.shape[0], group.stop - group.start
        device = self.anchors.device
        context = torch.arange(context_length, device=device)
        before = context < self.anchors[:, group, None]
        same_document = (
            self.document_ids[:, None, :context_length] == self.anchor_documents[:, group, None]
        )
        sees = before & same_document & self.real[:, group, None]  # (B, G, C_g)
        own = torch.eye(size, dtype=torch.bool, device=device)
        own = own.repeat_interleave(self.block_size, dim=1)  # (G, G * K)
        mask = torch.cat([sees, own.expand(rows, -1, -1)], dim=2)  # (B, G, C_g + G * K)
        # all slots of a block see the same
        return mask.repeat_interleave(self.block_size, dim=1)[:, None]

    def flex_mask(self) -> BlockMask:
        """The rule for FlexAttention over all slots: keys are S context positions, then N * K
        slots."""
        (rows, count), length = self.anchors.shape, self.document_ids.shape[1]
        block_size, document_ids = self.block_size, self.document_ids
        anchor_documents = self.anchor_documents
        # a block that is not real sees no context
        ends = torch.where(self.real, self.anchors, 0)

        def sees(row, head, slot, key):
            """Whether a slot sees a key: earlier context of its document, or its own block."""
            block = slot // block_size
            # FlexAttention evaluates the context's half for slots too, where it must not run over
            position = key.clamp(max=length - 1)
            same_document = document_ids[row, position] == anchor_documents[row, block]
            context = (key < ends[row, block]) & same_document
            own = (key >= length) & ((key - length) // block_size == block)
            return context | own

        slots = count * block_size
        # Uncompiled, create_block_mask makes the dense mask on the way. On CPUs, which cannot train
        # with FlexAttention, only tests come here.
        compiled = self.anchors.device.type != "cpu"
        return create_block_mask(
            sees, rows, None, slots, length + slots, self.anchors.device, _compile=compiled
        )
