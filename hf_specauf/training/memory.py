"""Run the largest possible micro-batch once before training, so that an out-of-memory error appears
at once and not hours later."""

from contextlib import nullcontext
from functools import partial

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch.distributed.tensor import DTensor


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
    longest = int(trainer.train_dataset.with_format("numpy")["length"][:].argmax())
    ids = trainer.train_dataset[longest]["input_ids"]
    length = len(ids)
    shape = (args.per_device_train_batch_size, length)
    document_ids = torch.zeros(shape, dtype=torch.long, device=args.device)
    if shape[0] > 1:
        document_ids[0, -1] = -1  # with padding the target has a mask, which costs it memory
    position = torch.arange(length, device=args.device)
    inputs = {
        "input_ids": torch.tensor([ids], device=args.device).expand(shape),
        "document_ids": document_ids,
        "row_ids": torch.zeros(shape[0], dtype=torch.long, device=args.device),
    }
    trained = [local(p) for p in model.parameters() if p.requires_grad]
    adamw = args.muon_learning_rate is None and args.optim.startswith("adamw_torch")
    # without its reduction FSDP2 keeps the whole gradient where zero_grad does not reach it
    no_sync = (
        nullcontext if trainer.accelerator.is_fsdp2 else partial(trainer.accelerator.no_sync, model)
    )
    moments, anchors, fits = [], min(args.anchors_per_row, length), 0
    wanted = anchors
    with torch.random.fork_rng(devices=[args.device] if args.device.type == "cuda" else []):
        while anchors and not fits:
            failed = torch.tensor(0, device=args.device)
            # anchors at the end of a row see the most
            inputs["supervised"] = (position >= length - anchors - trainer.block_size) & (
                document_ids == 0
            )
            try:
                if (
                    trainer.state.global_step == 0 and adamw
                ):  # its moments, which the first step will allocate
                    moments += [
                        torch.empty(2, *p.shape, dtype=p.dtype, device=args.device) for p in trained
                    ]
                with no_sync(), trainer.compute_loss_context_manager():
                    spec = trainer.loss_spec.of_every_slot()
                    _, found, base = trainer._run_blocks(model, inputs, 0, anchors, spec)
                    trainer.accelerator.backward(
                        found.numerator + (0 if base is None else base.numerator)
                    )
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                failed += 1
            found = base = None
            moments.clear()
            model.zero_grad()
            if trainer.accelerator.reduce(failed, "sum").item():  # on any rank
                clear_device_cache(garbage_collection=True)
                anchors //= 2
            else:
                fits = anchors
    if fits < wanted:
        advice = f"anchors_per_row: {fits} would fit" if fits else "not even one anchor fits"
        raise ValueError(
            f"memory runs out on the largest micro-batch, {shape[0]} rows of {length} tokens with"
            f" {wanted} anchors each: {advice}. Or lower per_device_train_batch_size (raising"
            " gradient_accumulation_steps), max_length or head_rows_per_chunk, or set"
            " activation_checkpointing: true."
        )
