"""`accelerate launch -m hf_specauf.train --config recipe.yaml`: recipe -> objects -> train ->
evaluate -> save."""

import copy
import os
import shutil
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from math import ceil
from pathlib import Path

import torch
from datasets import Dataset
from rich.console import Console
from transformers import AutoModel, PreTrainedModel, set_seed

from .cli import errors_in_one_line
from .data.on_policy import check_settings, on_policy_score
from .data.rows import prepare_rows, show_row
from .data.sources import load_rows, take_shares
from .drafters.configuration_dflash import DFlashConfig
from .identity import Identity
from .layouts.adapters import AdapterBase, borrow, finish_adapter
from .layouts.load import load_drafter
from .recipe import DataArguments, DrafterArguments, TargetArguments, parse
from .records import NOT_PUBLIC, environment, write_record
from .regenerate import on_policy_words
from .serving.compare import compare, evaluation_record, plot_alpha, show
from .target import default_mask_token_id, drafter_config, load_target
from .training.checkpoints import checkpoints_by_age
from .training.config import AUFConfig
from .training.trainer import AUFTrainer


def load_data(data: DataArguments) -> tuple[list[Dataset], list[Dataset] | None]:
    """(training rows, held-out rows or `None`), raw, a dataset for each source."""
    sources = data.sources()
    weights = [source["weight"] for source in sources]
    shares = [weight / sum(weights) for weight in weights]
    own_heldout = data.eval_rows if data.eval_dataset_name is None else 0
    train, heldout = [], []
    for source, share in zip(sources, shares):
        needed = None
        if data.dataset_streaming:
            needed = ceil(share * data.max_train_rows) + ceil(share * own_heldout)
        keys = "dataset_" if data.dataset_mixture is None else "dataset_mixture's "
        rows = load_rows(
            source["name"],
            source["config"],
            source["split"],
            source["revision"],
            stream_rows=needed,
            keys=keys,
        )
        if own_heldout:
            if len(rows) < 2:
                raise ValueError(
                    f"{source['name']} has {len(rows)} rows, too few to hold one out: give more, or"
                    " eval_dataset_name"
                )
            # the last rows, at most a tenth
            size = min(ceil(share * own_heldout), max(len(rows) // 10, 1))
            heldout.append(rows.select(range(len(rows) - size, len(rows))))
            rows = rows.select(range(len(rows) - size))
        train.append(rows)
    whole, train = train, take_shares(train, weights, data.max_train_rows)
    for source, rows, taken in zip(sources, whole, train):
        if len(sources) > 1 and not len(taken):
            raise ValueError(
                f"dataset_mixture: of {source['name']} ({len(rows)} rows, weight"
                f" {source['weight']:g}) not one row would be taken: raise its weight or"
                " max_train_rows, or leave it out"
            )
    if len(sources) > 1:
        print(
            "mixture: "
            + ", ".join(f"{len(rows)} rows of {s['name']}" for rows, s in zip(train, sources))
        )
    if data.eval_dataset_name is not None:
        needed = data.eval_rows if data.dataset_streaming else None
        rows = load_rows(
            data.eval_dataset_name, data.eval_dataset_config, data.eval_dataset_split, data.eval_dataset_revision,
            stream_rows=needed, keys="eval_dataset_",
        )  # fmt: skip
        heldout = [rows.select(range(min(data.eval_rows, len(rows))))]
    return train, heldout or None


def token_rows(
    train: list[Dataset],
    heldout: list[Dataset] | None,
    tokenizer,
    config,
    data: DataArguments,
    args: AUFConfig,
) -> tuple[Dataset, Dataset | None]:
    """Raw rows of `load_data` -> (training, held-out) token rows for a drafter of this config."""
    named = [*zip([source["name"] for source in data.sources()], train)]
    for name, rows in named + (
        [(data.eval_dataset_name, heldout[0])] if data.eval_dataset_name else []
    ):
        check_settings(name, rows, tokenizer, config.chat_template_kwargs)
    options = dict(
        max_length=args.max_length, block_size=config.block_size, mask_token_id=config.mask_token_id,
        chat_template_kwargs=config.chat_template_kwargs, num_proc=data.dataset_num_proc,
    )  # fmt: skip
    rows = prepare_rows(
        train, tokenizer, packing=data.packing, verbose=args.process_index == 0, **options
    )
    return rows, heldout and prepare_rows(heldout, tokenizer, verbose=False, **options)


def resolved_recipe(trainer: AUFTrainer, *arguments) -> dict:
    """Every key that decides the drafter, with the value it had."""
    keys = {key: value for part in arguments for key, value in asdict(part).items()}
    keys |= {
        key: value for key, value in trainer.args.to_dict().items() if not NOT_PUBLIC.fullmatch(key)
    }
    config = trainer.drafter_config
    return keys | {
        "drafter_type": config.kind,
        "num_draft_layers": config.num_hidden_layers,
        "block_size": config.block_size,
        "mask_token_id": config.mask_token_id,
        "target_layer_ids": config.target_layer_ids,
        "gamma": trainer.loss_spec.gamma,
        **{key: getattr(config, key) for key in config.own_keys},
    }


def provenance(
    recipe: dict, trainer: AUFTrainer, identity: Identity, base: AdapterBase | None, started: datetime,
    tau_before: float | None,
) -> dict:  # fmt: skip
    """What was run, on what, from what, and what came of it; cards are rendered from it."""
    history = [
        entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry
    ]
    return {
        "recipe": recipe,
        "target": (
            identity.record() | {"dtype": str(trainer.target.model.dtype).removeprefix("torch.")}
        ),
        "environment": environment(),
        "started": started.isoformat(timespec="seconds"),
        "seconds": round((datetime.now(UTC) - started).total_seconds(), 1),
        "steps": trainer.state.global_step,
        "rows": sum(row >= 0 for row in trainer.train_dataset["row"]),
        "trainable_parameters": trainer.get_num_trainable_parameters(),
        "base": None if base is None else asdict(base),
        "tau_before": tau_before,
        "history": history,
    }


def resume_folder(args: AUFConfig) -> str | None:
    """The checkpoint that `resume_from_checkpoint` means: `true` is the newest of `output_dir`."""
    resume = args.resume_from_checkpoint
    if isinstance(resume, str) and resume.lower() in ("true", "false"):
        resume = resume.lower() == "true"
    if resume is True:
        resume = next(reversed(checkpoints_by_age(args.output_dir)), None)
        if resume is None:
            print(
                f"resume_from_checkpoint: there is no checkpoint in {args.output_dir} yet, so"
                " training starts afresh"
            )
    if isinstance(resume, str) and not os.path.isdir(resume):
        raise ValueError(
            f"resume_from_checkpoint: there is no folder {resume!r}; `true` takes the newest of"
            " output_dir"
        )
    return resume or None


def start_drafter(
    draft: DrafterArguments, target, tokenizer, identity: Identity, seed: int
) -> tuple[PreTrainedModel, AdapterBase | None]:
    """The drafter to train, fp32, and what it starts from: a released drafter
    (`drafter`), the target's layers (`init_from_target_layers`), or `None` for random
    weights, which depend on the seed alone."""
    if draft.drafter is not None:
        return _released_drafter(draft, target, identity)
    layer_ids, layers, mask = (
        draft.init_from_target_layers,
        draft.num_draft_layers,
        draft.mask_token_id,
    )
    if layer_ids and layers not in (len(layer_ids), None):
        raise ValueError(
            f"num_draft_layers is {layers}, and init_from_target_layers names {len(layer_ids)}:"
            " remove num_draft_layers"
        )
    config = drafter_config(
        target,
        tokenizer,
        num_hidden_layers=len(layer_ids) if layer_ids else layers or DFlashConfig.num_hidden_layers,
        block_size=draft.block_size or DFlashConfig.block_size,
        mask_token_id=default_mask_token_id(target, tokenizer) if mask is None else mask,
        target_layer_ids=draft.target_layer_ids,
        intermediate_size=draft.draft_intermediate_size,
        target_revision=identity.revision,
        chat_template_kwargs=draft.chat_template_kwargs,
        kind=draft.kind,
        own_keys=draft.own_keys,
    )
    set_seed(seed)
    if not layer_ids:
        return AutoModel.from_config(config, dtype=torch.float32), None
    return borrow(target, config, layer_ids, frozen=draft.use_peft), AdapterBase.of_layers(
        target, layer_ids
    )


def _released_drafter(
    draft: DrafterArguments, target, identity: Identity
) -> tuple[PreTrainedModel, AdapterBase]:
    name, key = draft.drafter, "drafter"
    drafter = load_drafter(
        name, draft.drafter_revision, target=target, dtype=torch.float32, key=key
    )
    config = drafter.config
    shape = {
        "drafter_type": config.kind, **{key: getattr(config, key) for key in config.own_keys},
        "num_draft_layers": config.num_hidden_layers, "block_size": config.block_size,
        "target_layer_ids": config.target_layer_ids, "mask_token_id": config.mask_token_id,
        "draft_intermediate_size": config.intermediate_size,
    }  # fmt: skip
    for key, theirs in shape.items():
        if getattr(draft, key) not in (None, theirs):
            raise ValueError(
                f"{key} is {getattr(draft, key)}, and the drafter {name} has {theirs}: it keeps its"
                f" shape, so remove {key}"
            )
    identity.write_into(config)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, key, getattr(target.generation_config, key))
    if draft.chat_template_kwargs is not None:
        config.chat_template_kwargs = draft.chat_template_kwargs
    return drafter, AdapterBase.of_drafter(drafter)


def announce(trainer: AUFTrainer, target_args: TargetArguments, draft: DrafterArguments) -> None:
    """Print what was derived, and one row as the drafter will see it."""
    config, objective, gamma = (
        trainer.drafter_config,
        trainer.args.objective,
        trainer.loss_spec.gamma,
    )
    own = draft.drafter is None
    origin = {"mask_token_id": draft.mask_token_id, "target_layer_ids": draft.target_layer_ids}
    for key, given in origin.items():
        source = (
            "recipe" if given is not None else "derived from the target" if own else draft.drafter
        )
        print(f"{key}: {getattr(config, key)} ({source})")
    revision = config.target_revision
    print(
        f"target: {target_args.target}{' at ' + revision if revision else ''},"
        f" {config.num_target_layers} layers; drafter: {config.num_hidden_layers} layers, block"
        f" size {config.block_size}, {trainer.get_num_trainable_parameters() / 1e6:.2f} M trained"
        f" parameters; objective: {objective}" + (f", gamma {gamma:g}" if gamma else "")
    )
    print(
        "first row, supervised tokens between ⟦ and"
        f" ⟧:\n{show_row(trainer.train_dataset[0], trainer.tokenizer)}\n"
    )


def look(
    trainer: AUFTrainer, target_args: TargetArguments, draft: DrafterArguments, data: DataArguments
) -> tuple[dict, float | None]:
    """Print, before training, what was derived and how much the answers are the target's own -> the
    on-policy score, and tau of the drafter that training starts from. All processes call it: the
    target may be sharded."""
    main, tau_before = trainer.is_world_process_zero(), None
    if main:
        announce(trainer, target_args, draft)
    if draft.drafter is not None and trainer.eval_dataset is not None and trainer.args.eval_prompts:
        tau_before = trainer.decoded_tau(trainer.eval_dataset)
        if main:
            print(f"tau of {draft.drafter} as it is: {tau_before:.2f}")
    score = on_policy_score(trainer.target, trainer.train_dataset)
    if main:
        config = trainer.drafter_config
        words = on_policy_words(
            score, target_args, data, config.chat_template_kwargs, config.target_fingerprint
        )
        print(words + "\n")
    return score, tau_before


def train(
    target_args: TargetArguments,
    draft: DrafterArguments,
    data: DataArguments,
    args: AUFConfig,
    *,
    compare_decoding: bool = True,
) -> AUFTrainer:
    """Run one recipe; the final drafter, `provenance.json`, `eval.json` and checkpoints lie under
    `args.output_dir`.

    A drafter in training is resumed with `resume_from_checkpoint: true` (the newest checkpoint) or
    a folder. A LoRA drafter's folder holds it merged, and the adapter alone in `adapter/`.
    """
    started = datetime.now(UTC)
    resume = resume_folder(args)
    train_rows, heldout = load_data(data)  # before the target, which may take minutes to load
    set_seed(args.seed)
    target, tokenizer = load_target(
        target_args.target, target_args.target_revision, **target_args.loading()
    )
    identity = Identity.of(target, tokenizer, revision=target_args.target_revision)
    drafter, base = start_drafter(draft, target, tokenizer, identity, args.seed)
    config = drafter.config
    with args.main_process_first(desc="tokenizing"):
        train_rows, heldout = token_rows(train_rows, heldout, tokenizer, config, data, args)
    drafter.set_attn_implementation(draft.draft_attn_implementation)
    trainer = AUFTrainer(
        model=drafter,
        target_model=target,
        args=args,
        train_dataset=train_rows,
        eval_dataset=heldout,
        processing_class=tokenizer,
        peft_config=draft.peft_config(),
        adapter_base=base if draft.use_peft else None,
    )
    score, tau_before = look(trainer, target_args, draft, data)
    trainer.train(resume_from_checkpoint=resume)
    if trainer.state.global_step < trainer.state.max_steps:
        print(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}; "
            "resume with --resume_from_checkpoint true"
        )
        return trainer
    evaluated = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    if heldout is not None and trainer.state.global_step not in evaluated:
        trainer.evaluate()
    recipe = resolved_recipe(trainer, target_args, draft, data)
    record = provenance(recipe, trainer, identity, base, started, tau_before) | {"on_policy": score}
    save_final(trainer, target, draft.save_dtype, record)
    if compare_decoding and heldout is not None and args.eval_prompts:
        measure(trainer, data)
    if args.push_to_hub:
        trainer.push_to_hub()
    return trainer


def measure(trainer: AUFTrainer, data: DataArguments) -> None:
    """Compare plain and assisted decoding of the saved drafter on held-out prompts -> `eval.json`
    and `alpha.png`."""
    args, out = trainer.args, Path(trainer.args.output_dir)
    drafter = AutoModel.from_pretrained(out, dtype="auto").to(args.device)
    prompts = trainer.eval_prompts()
    results = compare(
        trainer.target.model, drafter, prompts, args.eval_new_tokens, pad_token_id=trainer.data_collator.pad_token_id,
        show_progress=trainer.is_world_process_zero() and not args.disable_tqdm,
    )  # fmt: skip
    if trainer.is_world_process_zero():
        name = data.eval_dataset_name or str(data)
        record = evaluation_record(
            results, trainer.target.model, prompts=name, temperature=0.0, max_new_tokens=args.eval_new_tokens,
            chat_template_kwargs=drafter.config.chat_template_kwargs,
        )  # fmt: skip
        write_record(out / "eval.json", record)
        plot_alpha({args.objective: results["acceptance"]["alpha"]}, out / "alpha.png")
        show(results, Console())
    trainer.accelerator.wait_for_everyone()


def save_final(trainer: AUFTrainer, target, save_dtype: str, record: dict) -> None:
    """The trained drafter in the dtype it will serve in, and `provenance.json`, in the root of
    `output_dir`; of a LoRA drafter the adapter too, in `adapter/`. What an earlier run measured
    there is removed."""
    drafter, out = trainer.whole_drafter(), Path(trainer.args.output_dir)
    if trainer.is_world_process_zero():
        shutil.rmtree(out / "adapter", ignore_errors=True)
        for path in [*out.glob("eval*.json"), out / "alpha.png"]:
            path.unlink(missing_ok=True)
        dtype = target.dtype if save_dtype == "auto" else getattr(torch, save_dtype)
        if dtype == torch.float16:  # drafters accept nothing in it
            dtype = torch.bfloat16
        if trainer.adapter_base is not None:
            drafter.save_pretrained(out / "adapter")
            finish_adapter(out / "adapter", trainer.adapter_base, trainer.drafter_config)
            drafter = copy.deepcopy(drafter).merge_and_unload()
        vars(drafter.config).pop("use_cache", None)
        drafter.to(dtype).save_pretrained(out)
        write_record(out / "provenance.json", record)
        print(f"drafter saved to {out}")
    trainer.accelerator.wait_for_everyone()


@errors_in_one_line()
def main(argv: list[str] | None = None) -> None:
    """Command line of `python -m hf_specauf.train`."""
    trainer = train(*parse(sys.argv[1:] if argv is None else argv))
    if trainer.args.world_size > 1 and trainer.args.device.type == "cpu":
        time.sleep(
            0.5
        )  # torch deadlocks where gloo's thread lets go of the last collective as its group is destroyed
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
