"""The command that trains a drafter: recipe -> objects -> train -> evaluate -> save.

`train` is the whole run. The functions below it stand in the order in which it calls them.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from .cli import errors_in_one_line
from .data.config import DataArguments
from .data.conversation import stop_at_both_ends
from .data.on_policy import check_settings, on_policy_score
from .data.rows import prepare_rows, show_row
from .data.sources import load_data
from .drafters.configuration_dflash import DFlashConfig
from .identity import Identity
from .identity.multimodal import auto_class
from .layouts.adapters import AdapterBase, borrow
from .layouts.load import load_drafter
from .recipe import DrafterArguments, TargetArguments, parse
from .records import NOT_PUBLIC, check_no_model_is_lost, environment, write_record
from .regenerate import on_policy_words
from .target import FrozenTarget, default_mask_token_id, drafter_config, load_target
from .training.checkpoints import resume_folder, save_final
from .training.config import AUFConfig
from .training.evaluation import evaluate_last_step, measure_decoding
from .training.preflight import ask_target, check_best_metric, check_start
from .training.trainer import AUFTrainer
from .training.waiting import first_process_first


def train(
    target_args: TargetArguments,
    draft: DrafterArguments,
    data: DataArguments,
    args: AUFConfig,
    *,
    compare_decoding: bool = True,
) -> AUFTrainer:
    """Run one recipe. The final drafter, `provenance.json`, `eval.json` and checkpoints lie under
    `args.output_dir`; of LoRA, the folder holds the merged drafter, and `adapter/` the adapter."""
    started = datetime.now(UTC)
    resume = resume_folder(args)
    check_no_model_is_lost("output_dir", args.output_dir, draft.drafter)
    # Before the target, because a target may take minutes to load.
    train_rows, heldout = load_data(data)
    set_seed(args.seed)
    target, tokenizer = load_target(
        target_args.target, target_args.target_revision, **target_args.loading()
    )
    identity = Identity.of(target, tokenizer, revision=target_args.target_revision)
    drafter, base = start_drafter(draft, target, tokenizer, identity, args.seed)
    frozen = ask_first(draft, base, target, tokenizer, drafter, args, heldout is not None)
    with first_process_first():  # it writes the cache of `datasets`, which the others read
        rows, heldout = token_rows(train_rows, heldout, tokenizer, frozen, drafter, data, args)
    drafter.set_attn_implementation(draft.draft_attn_implementation)
    trainer = AUFTrainer(
        model=drafter,
        target_model=frozen,
        args=args,
        train_dataset=rows,
        eval_dataset=heldout,
        processing_class=tokenizer,
        peft_config=draft.peft_config(),
        adapter_base=base if draft.use_peft else None,
    )
    print_setup(trainer, target_args, draft)
    tau_before = tau_at_start(trainer, draft)
    on_policy = score_answers(trainer, target_args, data)
    trainer.train(resume_from_checkpoint=resume)
    step, last_step = trainer.state.global_step, trainer.state.max_steps
    if step < last_step:
        print(f"stopped at step {step} of {last_step}; resume with --resume_from_checkpoint true")
        return trainer
    recipe = resolved_recipe(trainer, target_args, draft, data)

    def record() -> dict[str, Any]:
        return provenance(trainer, recipe, identity, base, started, tau_before, on_policy)

    # Before anything is measured, because no measurement that fails may cost the training.
    save_final(trainer, draft.save_dtype, record())
    with naming_what_is_saved(trainer):
        if heldout is not None and evaluate_last_step(trainer):
            write_provenance(trainer, record())
        if compare_decoding and heldout is not None and args.eval_prompts:
            measure_decoding(trainer, prompts=data.eval_dataset_name or data.source_names)
    if args.push_to_hub:
        trainer.push_to_hub()
    return trainer


# ---- before training


def start_drafter(
    draft: DrafterArguments,
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    identity: Identity,
    seed: int,
) -> tuple[PreTrainedModel, AdapterBase | None]:
    """The drafter to train, fp32, and what it starts from: a released drafter (`drafter`), the
    target's layers (`init_from_target_layers`), or `None` for random weights, which depend on the
    seed alone."""
    # First, because the drafter's config takes its end tokens from the target.
    stop_at_both_ends(target, tokenizer, draft.chat_template_kwargs)
    if draft.drafter is not None:
        return _released_drafter(draft, target, identity)
    layer_ids = draft.init_from_target_layers
    num_layers = draft.num_draft_layers or DFlashConfig.num_hidden_layers
    if layer_ids:
        if draft.num_draft_layers not in (None, len(layer_ids)):
            raise ValueError(
                f"num_draft_layers is {draft.num_draft_layers}, and init_from_target_layers names"
                f" {len(layer_ids)}: remove num_draft_layers"
            )
        num_layers = len(layer_ids)
    mask_token_id = draft.mask_token_id
    if mask_token_id is None:
        mask_token_id = default_mask_token_id(target, tokenizer)
    config = drafter_config(
        target,
        tokenizer,
        num_hidden_layers=num_layers,
        block_size=draft.block_size or DFlashConfig.block_size,
        mask_token_id=mask_token_id,
        target_layer_ids=draft.target_layer_ids,
        intermediate_size=draft.draft_intermediate_size,
        target_revision=identity.revision,
        chat_template_kwargs=draft.chat_template_kwargs,
        kind=draft.kind,
        own_keys=draft.own_keys,
    )
    # Once more, because loading a target may have drawn random numbers.
    set_seed(seed)
    if layer_ids:
        drafter = borrow(target, config, layer_ids, frozen=draft.use_peft)
        return drafter, AdapterBase.of_layers(target, layer_ids)
    return AutoModel.from_config(config, dtype=torch.float32), None


def _released_drafter(
    draft: DrafterArguments, target: PreTrainedModel, identity: Identity
) -> tuple[PreTrainedModel, AdapterBase]:
    drafter = load_drafter(
        draft.drafter, draft.drafter_revision, target=target, dtype=torch.float32, key="drafter"
    )
    config = drafter.config
    shape = recipe_shape(config) | {"draft_intermediate_size": config.intermediate_size}
    for key, theirs in shape.items():
        given = getattr(draft, key)
        if given not in (None, theirs):
            raise ValueError(
                f"{key} is {given}, and the drafter {draft.drafter} has {theirs}: it keeps its"
                f" shape, so remove {key}"
            )
    # From here on it serves this recipe's target, which need not be the one it was released for.
    identity.write_into(config)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, key, getattr(target.generation_config, key))
    if draft.chat_template_kwargs is not None:
        config.chat_template_kwargs = draft.chat_template_kwargs
    return drafter, AdapterBase.of_drafter(drafter)


def recipe_shape(config: DFlashConfig) -> dict[str, Any]:
    """A drafter's shape, by the recipe's keys for it."""
    return {
        "drafter_type": config.kind,
        "num_draft_layers": config.num_hidden_layers,
        "block_size": config.block_size,
        "mask_token_id": config.mask_token_id,
        "target_layer_ids": config.target_layer_ids,
        **{key: getattr(config, key) for key in config.own_keys},
    }


def ask_first(
    draft: DrafterArguments,
    base: AdapterBase | None,
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    drafter: PreTrainedModel,
    args: AUFConfig,
    measured: bool,
) -> FrozenTarget:
    """The placed target, once the arguments are checked and it is known whether evaluations can
    decode with it. The trainer would ask the same, but after hours of tokenizing."""
    adapter_base = base if draft.use_peft else None
    check_start(drafter, args, tokenizer, draft.peft_config(), adapter_base)
    check_best_metric(args, drafter.config.block_size)
    return ask_target(target, drafter, args, measured=measured)


def token_rows(
    train: list[Dataset],
    heldout: list[Dataset] | None,
    tokenizer: PreTrainedTokenizerBase,
    target: FrozenTarget,
    drafter: PreTrainedModel,
    data: DataArguments,
    args: AUFConfig,
) -> tuple[Dataset, Dataset | None]:
    """Raw rows of `load_data` -> (training, held-out) token rows for a drafter."""
    config = drafter.config
    for source, rows in zip(data.sources(), train):
        check_settings(source["name"], rows, tokenizer, config.chat_template_kwargs)
    # Held-out rows that were taken from the sources are checked with them.
    if data.eval_dataset_name is not None:
        check_settings(data.eval_dataset_name, heldout[0], tokenizer, config.chat_template_kwargs)
    options = {
        "max_length": args.max_length,
        "block_size": config.block_size,
        "mask_token_id": config.mask_token_id,
        "vocab_size": config.vocab_size,
        "chat_template_kwargs": config.chat_template_kwargs,
        "placeholders": target.placeholders,
        "positions": target.positions,
        "num_proc": data.dataset_num_proc,
    }
    verbose = args.process_index == 0
    rows = prepare_rows(
        train, tokenizer, packing=data.packing, heldout=heldout, verbose=verbose, **options
    )
    if heldout is None:
        return rows, None
    return rows, prepare_rows(heldout, tokenizer, verbose=False, **options)


def print_setup(trainer: AUFTrainer, target_args: TargetArguments, draft: DrafterArguments) -> None:
    """Print what was derived and from what, and one row as the drafter will see it."""
    if not trainer.is_world_process_zero():
        return
    config = trainer.drafter_config
    for key in ("mask_token_id", "target_layer_ids"):
        source = draft.drafter or "derived from the target"
        if getattr(draft, key) is not None:
            source = "recipe"
        print(f"{key}: {getattr(config, key)} ({source})")
    at = f" at {config.target_revision}" if config.target_revision else ""
    gamma = trainer.loss_spec.gamma
    decay = f", gamma {gamma:g}" if gamma else ""
    print(
        f"target: {target_args.target}{at}, {config.num_target_layers} layers;"
        f" drafter: {config.num_hidden_layers} layers, block size {config.block_size},"
        f" {trainer.get_num_trainable_parameters() / 1e6:.2f} M trained parameters;"
        f" objective: {trainer.args.objective}{decay}"
    )
    row = show_row(trainer.train_dataset[0], trainer.tokenizer)
    print(f"first row, supervised tokens between ⟦ and ⟧:\n{row}\n")


def tau_at_start(trainer: AUFTrainer, draft: DrafterArguments) -> float | None:
    """tau of the released drafter that training starts from; `None` where there is none, or nothing
    to decode. All processes call it, because the target may be sharded."""
    if draft.drafter is None or trainer.eval_dataset is None or not trainer.args.eval_prompts:
        return None
    tau = trainer.decoded_tau(trainer.eval_dataset)
    if trainer.is_world_process_zero():
        print(f"tau of {draft.drafter} as it is: {tau:.2f}")
    return tau


def score_answers(
    trainer: AUFTrainer, target_args: TargetArguments, data: DataArguments
) -> dict[str, Any]:
    """Score how much the answers are the target's own, and print it. All processes call it, because
    the target may be sharded."""
    score = on_policy_score(trainer.target, trainer.train_dataset)
    if trainer.is_world_process_zero():
        config = trainer.drafter_config
        words = on_policy_words(
            score, target_args, data, config.chat_template_kwargs, config.target_fingerprint
        )
        print(words + "\n")
    return score


# ---- after training


def resolved_recipe(
    trainer: AUFTrainer, target_args: TargetArguments, draft: DrafterArguments, data: DataArguments
) -> dict[str, Any]:
    """Every key that decides the drafter, with the value it had."""
    training = {
        key: value for key, value in trainer.args.to_dict().items() if not NOT_PUBLIC.fullmatch(key)
    }
    given = asdict(target_args) | asdict(draft) | asdict(data) | training
    derived = recipe_shape(trainer.drafter_config) | {"gamma": trainer.loss_spec.gamma}
    return given | derived


def provenance(
    trainer: AUFTrainer,
    recipe: dict[str, Any],
    identity: Identity,
    base: AdapterBase | None,
    started: datetime,
    tau_before: float | None,
    on_policy: dict[str, Any],
) -> dict[str, Any]:
    """What was run, on what, from what, and what came of it; cards are rendered from it."""
    target = trainer.target.model
    dtype = str(target.dtype).removeprefix("torch.")
    log = trainer.state.log_history
    return {
        "recipe": recipe,
        "target": identity.record() | {"dtype": dtype, "auto_class": auto_class(target)},
        "environment": environment(),
        "started": started.isoformat(timespec="seconds"),
        "seconds": round((datetime.now(UTC) - started).total_seconds(), 1),
        "steps": trainer.state.global_step,
        # Rows that only fill up the last step have the number -1.
        "rows": sum(row >= 0 for row in trainer.train_dataset["row"]),
        "trainable_parameters": trainer.get_num_trainable_parameters(),
        "base": None if base is None else asdict(base),
        "tau_before": tau_before,
        "history": [entry for entry in log if "loss" in entry or "eval_loss" in entry],
        "on_policy": on_policy,
    }


def write_provenance(trainer: AUFTrainer, record: dict[str, Any]) -> None:
    """`provenance.json`, from the first process."""
    if trainer.is_world_process_zero():
        write_record(Path(trainer.args.output_dir, "provenance.json"), record)


@contextmanager
def naming_what_is_saved(trainer: AUFTrainer) -> Iterator[None]:
    """Where a measurement fails, say what is not lost, and the command that measures again."""
    try:
        yield
    except Exception:
        out = trainer.args.output_dir
        print(
            f"a measurement failed; the trained drafter and provenance.json are in {out}. Measure"
            f" it with python -m hf_specauf.evaluate --drafter {out}"
        )
        raise


@errors_in_one_line()
def main(argv: list[str] | None = None) -> None:
    """Command line of `specauf train` and of `python -m hf_specauf.train`."""
    try:
        trainer = train(*parse(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt as stop:
        if not stop.args:  # a second Ctrl-C
            raise
        # It is no success: a script must not go on to evaluate.
        raise SystemExit(f"stopped: {stop}. The same command goes on.") from stop
    if trainer.args.world_size > 1 and trainer.args.device.type == "cpu":
        # torch deadlocks if gloo's thread lets go of the last collective as its group is destroyed.
        time.sleep(0.5)
    trainer.accelerator.end_training()
    if trainer.state.global_step < trainer.state.max_steps:
        # It is no success: a script must not go on to evaluate.
        raise SystemExit(1)


if __name__ == "__main__":
    main()
