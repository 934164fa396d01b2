"""Every check that a trainer makes: of settings whose drafter would never have a token accepted,
and of what cannot be done or resumed. They only check.

`AUFConfig` checks its own keys when it is made, before there is a drafter. The others follow here,
in the order of a run: `check_start`, `check_best_metric` and `ask_target` before the data is
touched, `check_sharding` once Trainer is set up, `check_target` on real rows, `check_evaluation`
and `check_resumed_adapter` when somebody asks for that.
"""

from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftConfig
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import HubStrategy, IntervalStrategy

from ..drafters import DRAFTERS
from ..identity import embedding_rows
from ..layouts.adapters import AdapterBase
from ..losses.blocks import row_inputs
from ..losses.objectives import find_objective, objectives_for
from ..target import FrozenTarget
from ..target_states.settings import settings_of
from .config import AUFConfig
from .diagnostics import diagnostics, empty_counters
from .evaluation import decode, evenly_spread
from .optimizer import check_optimizer

# Keys of an adapter that a resumed run cannot change: its weights would not fit, or mean another
# thing.
RESUMED_LORA_KEYS = (
    "r",
    "lora_alpha",
    "target_modules",
    "modules_to_save",
    "use_rslora",
    "use_dora",
)


def check_start(
    drafter,
    args: AUFConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    peft_config: PeftConfig | None,
    adapter_base: AdapterBase | None,
) -> None:
    """Raise for what would train a drafter that silently accepts nothing, before anything heavy is
    done.

    Raises:
        ValueError: what was found, and the key or command that mends it.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process, and Trainer would fall back to"
            " nn.DataParallel, which breaks the exact loss. Start with `accelerate launch -m"
            " hf_specauf.train ...`, or set CUDA_VISIBLE_DEVICES=0."
        )
    if args.device.type == "mps":
        raise ValueError(
            "the device is mps, which has no float64, and the exact loss adds up its counters in"
            " it: set use_cpu: true"
        )
    check_drafter(drafter, args)
    check_optimizer(drafter, args)
    borrows = adapter_base is not None and adapter_base.borrowed_layers is not None
    pushes_checkpoints = args.push_to_hub and args.hub_strategy != HubStrategy.END
    if borrows and args.shard_target and pushes_checkpoints:
        raise ValueError(
            f"hub_strategy is {args.hub_strategy.value}, and a checkpoint with borrowed layers is"
            " published by reading the target's, which shard_target spreads over processes: set"
            " hub_strategy: end"
        )
    if args.fsdp and args.world_size == 1:
        raise ValueError(
            "fsdp shards the drafter over processes, and there is one: start with `accelerate"
            " launch --num_processes N -m hf_specauf.train ...`, or remove the key"
        )
    if args.shard_target and args.world_size == 1:
        raise ValueError(
            "shard_target: true spreads the target over processes, and there is one: remove the key"
        )
    if tokenizer is None:
        raise ValueError("processing_class is missing: give the target's tokenizer")
    if peft_config is not None:
        # PEFT asks for a whole last name in target_modules, and for any ending in modules_to_save
        check_adapter_names(drafter, "target_modules", peft_config.target_modules, whole=True)
        check_adapter_names(drafter, "modules_to_save", peft_config.modules_to_save, whole=False)


def check_drafter(drafter, args: AUFConfig) -> None:
    """Raise for a drafter that these arguments cannot train."""
    if drafter.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"the drafter's weights are {drafter.dtype}: small updates vanish in it, RMSNorms"
            " freeze (Model-Optimizer#2322). Load it with dtype=torch.float32; bf16: true trains"
            " under autocast."
        )
    config = drafter.config
    if config._attn_implementation == "flex_attention" and args.device.type == "cpu":
        raise ValueError(
            "draft_attn_implementation: flex_attention trains on CUDA only (torch has no backward"
            " of it on CPU): use sdpa"
        )
    if find_objective(args.objective).branches != config.branches:
        wanted = objectives_for(config.branches)
        raise ValueError(
            f"objective {args.objective!r} is not for a {config.model_type} drafter: its objective"
            f" is one of {', '.join(wanted)}. Change objective, or drafter ({', '.join(DRAFTERS)})"
            " in the recipe."
        )
    args.loss_spec(config.block_size)  # raises where gamma is missing, or would be ignored
    if config.block_size > args.max_length:
        raise ValueError(
            f"block_size is {config.block_size}, and no row of max_length {args.max_length} holds"
            " such a block: lower block_size, or raise max_length"
        )


def check_adapter_names(drafter, key: str, names, *, whole: bool) -> None:
    """Raise for a name that matches no module: PEFT leaves it out in silence as long as another
    name matches.

    Args:
        drafter (`PreTrainedModel`).
        key (`str`): of LoRA's configuration.
        names (`list[str]`, `set[str]` or `str`, *optional*): a string is a pattern, or all-linear,
            and is not checked.
        whole (`bool`): whether a name must be all of a module's last names, or only end it.

    Raises:
        ValueError: the key, the name and what there is.
    """
    if names is None or isinstance(names, str):
        return
    modules = [module for module, _ in drafter.named_modules() if module]
    for name in names:
        ending = f".{name}" if whole else name
        if any(module == name or module.endswith(ending) for module in modules):
            continue
        there_are = sorted({module.split(".")[-1] for module in modules})
        raise ValueError(
            f"lora_{key} names {name!r}, which no module of the drafter ends in: it would be left"
            f" out in silence. The names are {', '.join(there_are)}."
        )


def check_best_metric(args: AUFConfig, block_size: int, eval_dataset=None) -> None:
    """Raise for a `metric_for_best_model` that no evaluation gives: Trainer looks for it only after
    the first one, and all steps up to it would be lost.

    Args:
        eval_dataset (`Dataset` or a `dict` of several, *optional*).
    """
    wanted = args.metric_for_best_model
    if wanted is None or args.eval_strategy == IntervalStrategy.NO:
        return
    names = ["loss", *diagnostics(empty_counters(block_size) + 1)]
    if args.eval_prompts > 0:
        names.append("tau")
    sets = [""]
    if isinstance(eval_dataset, dict):
        sets = [f"{name}_" for name in eval_dataset]
    known = [f"eval_{name}{metric}" for name in sets for metric in names]
    if f"eval_{wanted.removeprefix('eval_')}" not in known:
        raise ValueError(
            f"metric_for_best_model is {wanted!r}, which no evaluation gives: it must be one of"
            f" {', '.join(known)}"
        )


def check_sharding(trainer) -> None:
    """Raise for what sharded training cannot do, whether the arguments, the launcher or the drafter
    shard.

    Args:
        trainer (`AUFTrainer`): after Trainer's own start, which sets up accelerate.
    """
    if trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2:
        raise ValueError(
            "fsdp_version is 1, whose flat weights cannot be saved as a drafter: use FSDP2 "
            "(recipes/accelerate/fsdp2.yaml)"
        )
    sharded = any(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
    sharded = sharded or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if trainer.args.muon_learning_rate is not None and sharded:
        raise ValueError(
            "muon_learning_rate needs whole matrices, and FSDP and DeepSpeed shard them: remove it"
        )


def check_target(trainer, rows: Dataset) -> None:
    """Raise unless the target, on real rows, lends what the drafter is trained on.

    Args:
        trainer (`AUFTrainer`): its target placed on its device.
        rows (`Dataset`): token rows, packed or not.
    """
    target, device = trainer.target, trainer.args.device
    target.check(torch.tensor([rows[0]["input_ids"][:64]], device=device))
    if "document_ids" not in rows.column_names:
        return
    # Rows of one document would tell nothing, so the fullest of some are taken. Two of them where a
    # micro-batch holds several: FlashAttention keeps documents apart only in a batch of one row
    # (transformers#33268).
    some = list(evenly_spread(rows, 200))
    fullest = sorted(some, key=lambda row: row["document_ids"][-1], reverse=True)
    at_once = min(trainer.args.per_device_train_batch_size, 2)
    batch = trainer.data_collator(fullest[:at_once])
    check_packing(target, batch["input_ids"].to(device), batch["document_ids"].to(device))


# Of the hidden states' size, what rounding may change; in low precision 0.05.
ROUNDING = {torch.float32: 0.005, torch.float64: 0.005}
BEGINNING = 3  # tokens of a document


def check_packing(
    target: FrozenTarget, input_ids: torch.Tensor, document_ids: torch.Tensor
) -> None:
    """Compare the taps of packed rows, run together, with those of their documents apart.

    Args:
        input_ids, document_ids (`torch.LongTensor` of shape `(B, S)`): document id -1 on
            padding.

    Raises:
        ValueError: this target lets packed documents see each other.
    """
    together = target.context(input_ids, **row_inputs(document_ids))
    differences, beginnings = [], []
    for ids, documents, states in zip(input_ids, document_ids, together):
        inside = documents >= 0
        sizes = documents[inside].unique_consecutive(return_counts=True)[1].tolist()
        parts = [target.context(part[None]) for part in ids[inside].split(sizes)]
        apart = torch.cat(parts, dim=1)[0].float()  # (S, L * H)
        distance = (states[inside].float() - apart).norm(dim=-1) / apart.norm(dim=-1)
        differences.append(distance.mean())
        # A leak changes every document but the first, and most of all where it begins: a recurrent
        # target (Falcon-H1, Jamba) soon forgets the one before. Not so the few tokens that
        # rounding sends to other experts, so we take the median.
        beginnings += [part[:BEGINNING] for part in distance.split(sizes)[1:]]
    if beginnings:
        differences.append(torch.cat(beginnings).median())
    difference = torch.stack(differences).max().item()
    # Written with `not`, so that NaN is refused too.
    if not difference < ROUNDING.get(together.dtype, 0.05):
        advice = "packing: false, or another target_attn_implementation"
        if len(input_ids) > 1:
            smaller = "per_device_train_batch_size: 1 (raising gradient_accumulation_steps)"
            advice = f"{smaller}, {advice}"
        raise ValueError(
            f"packing: true does not work with {type(target.model).__name__} and"
            f" {len(input_ids)} rows at once: its hidden states of packed documents differ from"
            f" those of the documents apart (by {difference:.0%}), so they see each other. Set"
            f" {advice}."
        )


def ask_target(target, drafter, args: AUFConfig, *, measured: bool) -> FrozenTarget:
    """Place a target, and ask whether it can be decoded with.

    Args:
        target (`PreTrainedModel`, `PeftModel` or `FrozenTarget`): one that was asked before is not
            asked again.
        drafter, args, measured: as for [`check_decoding`].
    """
    if not measured and args.eval_strategy != IntervalStrategy.NO:
        raise ValueError(
            f"eval_strategy is {args.eval_strategy.value}, and there are no held-out rows: give"
            " some (eval_rows, eval_dataset_name), or eval_strategy: no"
        )
    if not isinstance(target, FrozenTarget):
        target = FrozenTarget(target, drafter.config)
    if args.target_states_cache is not None and target.states_settings is None:
        # Sharded weights would be out of sight.
        target.states_settings = settings_of(target)
    target.place(args.device, shard=args.shard_target)
    if not target.was_asked:
        target.was_asked = True
        check_decoding(target, drafter, args, measured=measured)
    return target


# A few passes show what the first evaluation would meet.
TRIAL_NEW_TOKENS, TRIAL_PROMPT = 8, 16


def check_decoding(target: FrozenTarget, drafter, args: AUFConfig, *, measured: bool) -> None:
    """Raise where evaluations will decode with a drafter and this target cannot be decoded so: all
    that is done up to the first evaluation would be lost, hours of tokenizing first (SpecForge#560,
    #533). Where none will decode, only say it.

    Args:
        target (`FrozenTarget`): placed. All ranks call it.
        drafter (`PreTrainedModel`): whole on each rank. It is left where it was.
        measured (`bool`): whether there are held-out rows.
    """
    will_decode = measured and args.eval_prompts > 0
    positions = target.positions
    if will_decode and positions is not None and args.eval_new_tokens >= positions:
        raise ValueError(
            f"eval_new_tokens is {args.eval_new_tokens}, and the target has {positions} positions,"
            " its prompt's among them: lower it, or leave decoding out by eval_prompts: 0"
        )
    reason = None
    # Of targets with a recurrent state some cannot be, so whoever trains for one is told.
    if will_decode or getattr(target.model, "_is_stateful", False):
        reason = _why_decoding_fails(target, drafter, args.device)
    if reason is None:
        return
    found = f"{type(target.model).__name__} cannot be decoded with a drafter here: {reason}"
    if will_decode:
        raise ValueError(
            f"{found}. The first evaluation would fail, after all steps up to it. Set eval_prompts:"
            " 0 to train a drafter all the same, unmeasured, for an engine that can serve it"
        )
    if args.process_index == 0:
        print(f"{found}. It is trained all the same, and cannot be measured here.")


def _why_decoding_fails(target: FrozenTarget, drafter, device: torch.device) -> str | None:
    """What a few tokens of real decoding raise, in words; `None` where they work."""
    # There are no rows yet. Special tokens lie at a vocabulary's ends, so these are words.
    rows = embedding_rows(target.model)
    prompt = torch.arange(TRIAL_PROMPT, device=device)[None] + rows // 4
    was_on = drafter.device
    try:
        decode(target.model, drafter.to(device), [prompt], TRIAL_NEW_TOKENS, pad_token_id=0)
    except torch.OutOfMemoryError:  # says nothing about the target
        raise
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")
    finally:
        drafter.to(was_on)
    return None


def check_evaluation(trainer) -> None:
    """Raise where accelerate's FSDP2 has not sharded the drafter yet, which it does together with
    an optimizer.

    Args:
        trainer (`AUFTrainer`): asked to evaluate.
    """
    if trainer.is_fsdp_enabled and trainer.optimizer is None:
        raise ValueError(
            "evaluate before train and accelerate's FSDP2 cannot go together: it shards a"
            " drafter when training starts. Set eval_on_start: true, which evaluates before the"
            " first step."
        )


def check_resumed_adapter(folder: str, own: PeftConfig, base: AdapterBase) -> None:
    """Raise unless a checkpoint holds this run's adapter: on the same weights, with the same LoRA
    keys.

    Args:
        folder (`str`): the checkpoint.
        own (`PeftConfig`), base (`AdapterBase`): of this run.
    """
    if not Path(folder, "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds a drafter trained in full, and this run trains an adapter: set"
            " use_peft: false"
        )
    theirs = AdapterBase.read(folder)
    if theirs.fingerprint != base.fingerprint:
        raise ValueError(
            f"{folder} adapts {theirs.name_or_path}, and this run starts from other weights"
            f" ({base.name_or_path}): resume with the drafter, target and layers of that run"
        )
    saved = PeftConfig.from_pretrained(folder)
    for key in RESUMED_LORA_KEYS:
        # a kind of adapter other than LoRA has not all of these keys
        was, given = in_order(getattr(saved, key, None)), in_order(getattr(own, key, None))
        if was != given:
            raise ValueError(
                f"{folder} was trained with {key} {was}, and this run has {given}: resume with the"
                " LoRA keys of that run, or start afresh in another output_dir"
            )


def in_order(value):
    """Sets and lists sorted, so that two of them compare; anything else as it is."""
    return sorted(value) if isinstance(value, set | list) else value
