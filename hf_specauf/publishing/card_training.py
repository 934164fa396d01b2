"""What a card says of the training, from provenance.json."""

from dataclasses import MISSING, Field, fields
from enum import Enum

import yaml

from ..losses.objectives import OBJECTIVES
from ..recipe import DataArguments, TargetArguments, drafter_arguments, under_new_names
from ..serving.acceptance import NOT_MEASURED, number
from ..training.config import AUFConfig

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


def changed_recipe(recipe: dict) -> str:
    """The keys of a resolved recipe that differ from their defaults, as YAML."""
    recipe = under_new_names(recipe)
    changed = {}
    for part in (TargetArguments, drafter_arguments(), DataArguments, AUFConfig):
        for field in fields(part):
            value = recipe.get(field.name)
            if differs_from_default(value, field):
                changed[field.name] = value
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


def sources(provenance: dict) -> list[str]:
    """The datasets a drafter was trained on."""
    recipe = provenance.get("recipe", {})
    if recipe.get("dataset_mixture"):
        return [source["name"] for source in recipe["dataset_mixture"]]
    return [recipe["dataset_name"]] if recipe.get("dataset_name") else []


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
        "objective": NOT_RECORDED,
        "parameters": NOT_RECORDED,
        "data": NOT_RECORDED,
        "training": NOT_RECORDED,
        "software": NOT_RECORDED,
        "recipe": "",
        "adapted": adaptation(provenance),
    }
    if objective:
        words["objective"] = f"{objective}, {recipe.get('normalisation')}"
    if provenance.get("trainable_parameters"):
        words["parameters"] = f"{provenance['trainable_parameters'] / 1e6:.1f} M"
    data = sources(provenance)
    if data:
        words["data"] = f"{', '.join(data)} ({provenance['rows']} rows)"
    if recipe:
        words["training"] = (
            f"{provenance['steps']} steps, {provenance['seconds'] / 60:.0f} minutes on"
            f" {environment.get('hardware')}, seed {recipe['seed']}"
        )
        words["recipe"] = changed_recipe(recipe)
    packages = environment.get("packages", {})
    shown = [name for name in ("hf-specauf", "torch", "transformers") if name in packages]
    if shown:
        words["software"] = ", ".join(f"{name} {packages[name]}" for name in shown)
    return words
