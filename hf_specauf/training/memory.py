"""Run the largest possible micro-batch once before training, so that an out-of-memory error appears
at once and not hours later."""

from contextlib import nullcontext

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch.distributed.tensor import DTensor

from ..data.rows import row_key


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def try_largest_batch(trainer, model) -> None:
    """Run the largest micro-batch that can come, forward and backward.

    Where FSDP2 shards and memory runs out on some ranks alone, the others wait for them until
    `ddp_timeout`.

    Args:
        trainer (`AUFTrainer`): its data, target and arguments say how large that is.
        model (`nn.Module`): the drafter, as the trainer has wrapped it.

    Raises:
        ValueError: it does not fit; names the `anchors_per_row` that would.
    """
    args = trainer.args
    inputs = _longest_rows(trainer)
    rows, length = inputs["input_ids"].shape
    wanted = min(args.anchors_per_row, length)
    anchors = wanted
    devices = [args.device] if args.device.type == "cuda" else []
    # the trial must not change what is drawn in training (dropout in an adapter)
    with torch.random.fork_rng(devices=devices):
        while anchors and not _fits(trainer, model, inputs, anchors):
            anchors //= 2
    if anchors < wanted:
        advice = f"anchors_per_row: {anchors} would fit" if anchors else "not even one anchor fits"
        raise ValueError(
            f"memory runs out on the largest micro-batch, {rows} rows of {length} tokens with"
            f" {wanted} anchors each: {advice}. Or lower per_device_train_batch_size (raising"
            " gradient_accumulation_steps), max_length or head_rows_per_chunk, or set"
            " activation_checkpointing: true."
        )


def _longest_rows(trainer) -> dict[str, torch.Tensor]:
    """A micro-batch of the longest row there is, without `supervised`."""
    device, rows = trainer.args.device, trainer.args.per_device_train_batch_size
    longest = int(trainer.train_dataset.with_format("numpy")["length"][:].argmax())
    row = trainer.train_dataset[longest]
    ids = torch.tensor([row["input_ids"]], device=device)
    ids = ids.expand(rows, -1)  # (B, S)
    # A packed row may be longer than the target has positions, and its documents are not.
    positions = trainer.target.positions or ids.shape[1]
    document_ids = torch.arange(ids.shape[1], device=device).div(positions, rounding_mode="floor")
    document_ids = document_ids.repeat(rows, 1)
    if rows > 1:
        # rows of a batch differ in length, and with padding the target has a mask, which costs it
        # memory
        document_ids[0, -1] = -1
    row_ids = torch.zeros(rows, dtype=torch.long, device=device)
    keys = [row_key(row["input_ids"], row.get("document_ids"))] * rows
    return {
        "input_ids": ids,
        "document_ids": document_ids,
        "row_ids": row_ids,
        "row_keys": keys,
    }


def _fits(trainer, model, inputs: dict[str, torch.Tensor], anchors: int) -> bool:
    """Whether all ranks can run these rows with so many anchors each."""
    documents = inputs["document_ids"]
    length = documents.shape[1]
    # anchors at the end of a row see the most context
    near_end = torch.arange(length, device=documents.device)
    near_end = near_end >= length - anchors - trainer.block_size
    inputs = inputs | {"supervised": near_end & (documents >= 0)}
    failed = torch.tensor(0, device=trainer.args.device)
    try:
        _run(trainer, model, inputs, anchors)
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        failed += 1
    model.zero_grad()
    if trainer.accelerator.reduce(failed, "sum").item():  # on any rank
        clear_device_cache(garbage_collection=True)
        return False
    return True


def _run(trainer, model, inputs: dict[str, torch.Tensor], anchors: int) -> None:
    """Forward and backward, beside what the first step will allocate. On return all is free."""
    accelerator = trainer.accelerator
    moments = _adamw_moments(trainer, model)
    # Gradients need not be reduced. But without its reduction FSDP2 keeps the whole gradient where
    # zero_grad does not reach it.
    no_sync = nullcontext() if accelerator.is_fsdp2 else accelerator.no_sync(model)
    with no_sync, trainer.compute_loss_context_manager():
        spec = trainer.loss_spec.of_every_slot()
        losses = trainer.forward_blocks(model, inputs, 0, anchors, spec)
        loss = losses.final.numerator
        if losses.base is not None:
            loss = loss + losses.base.numerator
        accelerator.backward(loss)
    del moments  # until here they took their memory


def _adamw_moments(trainer, model) -> list[torch.Tensor]:
    """As much memory as AdamW's moments will take in the first step; a resumed run has them."""
    args = trainer.args
    adamw = args.muon_learning_rate is None and args.optim.startswith("adamw_torch")
    if trainer.state.global_step > 0 or not adamw:
        return []
    trained = [local(p) for p in model.parameters() if p.requires_grad]
    return [torch.empty(2, *p.shape, dtype=p.dtype, device=args.device) for p in trained]
