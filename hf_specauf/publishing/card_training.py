"""What a card says of the training, from provenance.json."""

from dataclasses import MISSING, Field, fields
from enum import Enum

import yaml
from transformers.trainer_pt_utils import AcceleratorConfig

from ..losses.objectives import OBJECTIVES
from ..recipe import DataArguments, TargetArguments, drafter_arguments, under_new_names
from ..serving.acceptance import NOT_MEASURED, number
from ..training.config import AUFConfig
from .card_data import data_words, given_source, training_names, with_remarks

NOT_RECORDED = "not recorded"


def differs_from_default(value, field: Field) -> bool:
    """Whether a recipe's value is worth a line: plain, and not the default of its field."""
    if value in (None, {}) or not isinstance(value, str | int | float | bool | list | dict):
        return False
    default = field.default
    if field.default_factory is not MISSING:
        default = field.default_factory()
    # Trainer's arguments have enums as defaults, and a record holds their value
    if isinstance(default, Enum):
        default = default.value
    # a default may also be a number where the record holds its text, and the other way round
    return value != default and str(value) != str(default)


def filled_in(recipe: dict, on_gpu: bool) -> dict:
    """What a run puts in the place of keys that nobody set, so that its record holds them.

    The taps and the mask token are filled in too. But they are what the drafter is, and a recipe
    that names them still makes it when another version would choose others.
    """
    return {
        "drafter_type": "dflash",
        "per_device_eval_batch_size": recipe.get("per_device_train_batch_size"),
        "bf16": on_gpu,
        "activation_checkpointing": False,
        "dataloader_pin_memory": not recipe.get("use_cpu"),
        "label_names": [],
        "debug": [],
        "ddp_find_unused_parameters": False,
        "do_eval": recipe.get("eval_strategy") != "no",
        # of `load_best_model_at_end`
        "metric_for_best_model": "loss",
        "greater_is_better": not str(recipe.get("metric_for_best_model")).endswith("loss"),
        # of `torch_compile`
        "torch_compile_backend": "inductor",
    }


def given_keys(value: dict, filled: dict) -> dict:
    """A mapping without the keys that were filled in."""
    return {key: part for key, part in value.items() if key not in filled or part != filled[key]}


# What Trainer puts into two mappings of a recipe
FILLED_MAPPINGS = {
    "accelerator_config": AcceleratorConfig().to_dict(),
    "fsdp_config": {
        "min_num_params": 0,
        "xla": False,
        "xla_fsdp_v2": False,
        "xla_fsdp_grad_ckpt": False,
    },
}


def changed_recipe(recipe: dict, on_gpu: bool = False) -> str:
    """The keys of a resolved recipe that somebody set, as YAML: those that differ from their
    defaults and from what a run fills in."""
    recipe = under_new_names(recipe)
    filled = filled_in(recipe, on_gpu)
    changed = {}
    for part in (TargetArguments, drafter_arguments(), DataArguments, AUFConfig):
        for field in fields(part):
            name, value = field.name, recipe.get(field.name)
            # transformers still mirrors this old name of `activation_checkpointing*`
            if name.startswith("gradient_checkpointing"):
                continue
            if name in FILLED_MAPPINGS and isinstance(value, dict):
                value = given_keys(value, FILLED_MAPPINGS[name])
            if name == "dataset_mixture" and value:
                value = [given_source(source) for source in value]
            is_filled = name in filled and value == filled[name]
            if differs_from_default(value, field) and not is_filled:
                changed[name] = value
    return yaml.safe_dump(changed, sort_keys=False, allow_unicode=True).strip()


def lora_words(recipe: dict) -> str:
    """Which LoRA a recipe asked for."""
    kinds = []
    if recipe.get("use_rslora"):
        kinds.append("rsLoRA")
    if recipe.get("use_dora"):
        kinds.append("DoRA")
    words = "LoRA"
    if kinds:
        words += f" with {' and '.join(kinds)}"
    words += f", r {recipe['lora_r']}, alpha {recipe['lora_alpha']}"
    if recipe.get("lora_modules_to_save"):
        words += f", and {', '.join(recipe['lora_modules_to_save'])} in full"
    return words


def adaptation(provenance: dict) -> str:
    """What a drafter started from, how it was trained and what it won. Empty if it started at
    random."""
    base = provenance.get("base")
    if not base:
        return ""
    recipe = provenance.get("recipe", {})
    use_peft = recipe.get("use_peft")
    how = lora_words(recipe) if use_peft else "trained in full"
    commit = f" at {base['revision']}" if base["revision"] else ""
    if base["borrowed_layers"] is not None:
        frozen = ", frozen" if use_peft else ""
        return f"layers {base['borrowed_layers']} of the target{commit}{frozen}; {how}"
    taus = [entry["eval_tau"] for entry in provenance["history"] if "eval_tau" in entry]
    before = number(provenance.get("tau_before"))
    after = number(taus[-1]) if taus else NOT_MEASURED
    return (
        f"`{base['name_or_path']}`{commit}; {how}; tau on the same held-out prompts {before}"
        f" before, {after} after"
    )


def is_until_fail(objective: str | None) -> bool:
    """Whether an objective is one of Spec-AUF's."""
    entry = OBJECTIVES.get(objective)
    if entry is None:
        return False
    return entry.until_fail or (entry.base is not None and entry.base.until_fail)


def method_words(objective: str | None) -> str:
    """An objective in the words of a sentence."""
    if objective in OBJECTIVES:
        return OBJECTIVES[objective].title
    return objective or "an objective that was not recorded"


def training_words(provenance: dict) -> dict:
    """What the template says of the training. A figure that no record holds is "not recorded"."""
    recipe = provenance.get("recipe", {})
    environment = provenance.get("environment", {})
    objective = recipe.get("objective")
    words = {
        "method": method_words(objective),
        "until_fail": is_until_fail(objective),
        "objective": NOT_RECORDED,
        "parameters": f"parameters {NOT_RECORDED}",
        "data": NOT_RECORDED,
        "training": NOT_RECORDED,
        "software": NOT_RECORDED,
        "recipe": "",
        "adapted": adaptation(provenance),
    }
    if objective:
        words["objective"] = f"{objective}, {recipe.get('normalisation')}"
    if provenance.get("trainable_parameters"):
        # of a LoRA drafter, these are the adapter's alone
        words["parameters"] = f"{provenance['trainable_parameters'] / 1e6:.3g} M trained parameters"
    if training_names(recipe):
        words["data"] = f"{data_words(provenance)} ({provenance['rows']} rows)"
    if recipe:
        words["training"] = (
            f"{provenance['steps']} steps, {provenance['seconds'] / 60:.0f} minutes on"
            f" {environment.get('hardware')}, seed {recipe['seed']}"
        )
        on_gpu = not str(environment.get("hardware")).startswith("CPU")
        words["recipe"] = with_remarks(changed_recipe(recipe, on_gpu), provenance)
    packages = environment.get("packages", {})
    shown = [name for name in ("hf-specauf", "torch", "transformers") if name in packages]
    if shown:
        words["software"] = ", ".join(f"{name} {packages[name]}" for name in shown)
    return words
