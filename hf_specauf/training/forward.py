"""One micro-batch: token rows become blocks, the target lends its states, the drafter fills the
blocks, and the head's loss is formed."""

from functools import partial
from typing import NamedTuple

import torch

from ..drafters.configuration_dflash import DFlashConfig
from ..losses.blocks import Blocks, make_blocks, row_inputs, sample_anchors
from ..losses.branches import branch_losses
from ..losses.head_loss import HeadLoss
from ..losses.objectives import LossSpec
from ..target import FrozenTarget
from ..target_states.kept import KeptStates
from .config import AUFConfig


class BatchLosses(NamedTuple):
    """What a drafter's forward over one micro-batch gives."""

    valid: torch.Tensor  # (B, N, P) bool
    final: HeadLoss  # on the logits that decoding uses
    base: HeadLoss | None  # of the base branch, where the objective has one


class BlockForward:
    """Runs a drafter over the blocks of a micro-batch.

    Args:
        target (`FrozenTarget`): lends hidden states, embeddings and head.
        config (`DFlashConfig`): the drafter's.
        args (`AUFConfig`): its seed decides which anchors are drawn.
        kept (`KeptStates`, *optional*): where hidden states are read instead.
    """

    def __init__(
        self,
        target: FrozenTarget,
        config: DFlashConfig,
        args: AUFConfig,
        kept: KeptStates | None = None,
    ):
        self.target, self.config, self.kept = target, config, kept
        self.seed = args.seed if args.data_seed is None else args.data_seed

    def __call__(
        self,
        model,
        inputs: dict[str, torch.Tensor],
        step: int,
        anchors_per_row: int,
        spec: LossSpec,
        *,
        every_prediction: bool = False,
    ) -> BatchLosses:
        """Draw anchors, fill their blocks, and take the loss.

        Args:
            model (`nn.Module`): the drafter, as the trainer has wrapped it.
            inputs (`dict`): a batch of `RowCollator`.
            step (`int`): of the run, or `EVALUATION_STEP`; each step draws other anchors.
            anchors_per_row (`int`): N.
            spec (`LossSpec`): of the loss.
            every_prediction (`bool`, *optional*): also predict valid slots that are not supported.
        """
        blocks = self._draw_blocks(inputs, step, anchors_per_row)
        context = self._context(inputs)
        previous = None
        if self.config.reads_previous_tokens:
            previous = self.target.noise_embeds(blocks.previous_ids)  # (B, N, P, H)
        # The drafter calls this inside its forward, because its own head may be sharded.
        reduce = partial(
            branch_losses,
            head=self.target.head,
            labels=blocks.labels,
            valid=blocks.valid,
            spec=spec,
            every_prediction=every_prediction,
        )
        output = model(
            noise_embeds=self.target.noise_embeds(blocks.noise_ids),  # (B, N * K, H)
            context_hidden_states=context,
            attention_mask=blocks.attention_mask,
            position_ids=blocks.position_ids,
            prev_embeds=previous,
            reduce=reduce,
        )
        final, base = output.reduced
        return BatchLosses(blocks.valid, final, base)

    def _context(self, inputs: dict) -> torch.Tensor:  # (B, S, L * H)
        if self.kept is not None:
            return self.kept.context(inputs["row_keys"], inputs["input_ids"])
        return self.target.context(inputs["input_ids"], **row_inputs(inputs["document_ids"]))

    def _draw_blocks(self, inputs: dict, step: int, anchors_per_row: int) -> Blocks:
        """The blocks that this step has in these rows."""
        supervised, documents = inputs["supervised"], inputs["document_ids"]
        anchors, real = sample_anchors(
            supervised, documents, anchors_per_row, inputs["row_ids"], self.seed, step
        )
        # rows with fewer candidates than N cost no more than they have
        most = max(int(real.sum(1).max()), 1)
        return make_blocks(
            inputs["input_ids"],
            supervised,
            documents,
            anchors[:, :most],
            real[:, :most],
            self.config.block_size,
            self.config.mask_token_id,
            flex=self.config._attn_implementation == "flex_attention",
            predictions=self.config.predictions,
        )
