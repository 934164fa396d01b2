"""Cards of drafters, rendered from what training and evaluation wrote. Nobody types a figure.

The text stands in `templates/model_card.md`. This file turns the records of a folder into the words
that the template asks for. The command is in `hf_specauf/model_card.py`.
"""

import json
from dataclasses import MISSING, Field, fields
from enum import Enum
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..drafters import config_class
from ..drafters.transformers_internals import TESTED
from ..losses.objectives import OBJECTIVES
from ..recipe import DataArguments, TargetArguments, drafter_arguments, under_new_names
from ..records import HUB_ID, public
from ..serving.acceptance import NOT_MEASURED, TAU_DEFINITION, number
from ..training.config import AUFConfig

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
NOT_RECORDED = "not recorded"


def read(folder: Path, name: str) -> dict | None:
    """A JSON record of a drafter's folder without local traces, or `None`."""
    path = folder / name
    return public(json.loads(path.read_text())) if path.is_file() else None


# ---- what was measured


def tau_by_length(prompts: list[dict]) -> str:
    """tau of prompts grouped by length. Empty if all prompts fall into one group."""
    groups: dict[int, list[float]] = {}
    for row in prompts:
        if row["tau"] is not None:
            # the smallest power of two that is not below the length
            size = 1 << (row["prompt_tokens"] - 1).bit_length()
            groups.setdefault(size, []).append(row["tau"])
    if len(groups) < 2:
        return ""
    return ", ".join(
        f"up to {size} tokens {sum(taus) / len(taus):.2f}" for size, taus in sorted(groups.items())
    )


def slow_cases(prompts: list[dict]) -> str:
    """How many prompts the drafter made slower, and the worst of them."""
    ratios = []
    for row in prompts:
        if row.get("assisted_seconds"):
            ratios.append(row["plain_seconds"] / row["assisted_seconds"])
    if not ratios:
        return NOT_MEASURED
    slow = sum(ratio < 1 for ratio in ratios)
    return (
        f"{slow} of {len(ratios)} prompts; the worst ran at {min(ratios):.2f}x, the best at"
        f" {max(ratios):.2f}x"
    )


def different_outputs(record: dict) -> int:
    """Outputs that differ from plain decoding by more than rounding. Sampled outputs cannot be
    compared, so they count as none."""
    lossless = record["lossless"]
    return lossless["different"] if isinstance(lossless, dict) else 0


def evaluation_row(record: dict) -> dict:
    """One evaluation as the words of its table."""
    conditions = []
    for key, value in sorted(record["conditions"].items()):
        if value != {}:
            conditions.append(f"{key.replace('_', ' ')} {value}")
    # counts where outputs were compared, and a sentence where they were sampled
    lossless = record["lossless"]
    if isinstance(lossless, dict):
        lossless = (
            f"{lossless['identical']} of {sum(lossless.values())} identical,"
            f" {lossless['near_tie']} near-ties of rounding, {lossless['different']} different"
        )
    return {
        "name": record["conditions"]["prompts"],
        "tau": number(record["acceptance"]["tau"]),
        "speedup": number(record["speedup"], ".2f", "x"),
        "plain": number(record["plain_tokens_per_second"], ".1f"),
        "assisted": number(record["tokens_per_second"], ".1f"),
        "lossless": lossless,
        "slow": slow_cases(record["prompts"]),
        "by_length": tau_by_length(record["prompts"]),
        "repetition": number(record["repetition"], ".0%"),
        "conditions": ", ".join(conditions),
    }


def eval_results(records: list[dict]) -> list[EvalResult]:
    """tau and speed-up of each evaluation for the Hub's model index, with their conditions."""
    found = []
    for record in records:
        conditions = record["conditions"]
        dataset = str(conditions["prompts"])
        # the Hub links a dataset of its own, and shows any other name as it is
        dataset_type = dataset if HUB_ID.fullmatch(dataset) else "custom"
        metrics = (
            ("tau", "tau (tokens committed per verification pass)", record["acceptance"]["tau"]),
            ("speedup", "speed-up over plain generate", record["speedup"]),
        )
        for metric, name, value in metrics:
            if value is None:
                continue
            result = EvalResult(
                task_type="text-generation",
                task_name="Speculative decoding",
                dataset_name=dataset,
                dataset_type=dataset_type,
                metric_type=metric,
                metric_name=name,
                metric_value=round(value, 4),
                metric_args=conditions,
            )
            found.append(result)
    return found


def measured_words(records: list[dict]) -> dict:
    """What the template says of the evaluations. The first one makes the headline."""
    words = {
        "tau": None,
        "speedup": None,
        "faster": False,
        "headline_conditions": "",
        "tau_definition": TAU_DEFINITION,
        "evaluations": [evaluation_row(record) for record in records],
    }
    if records:
        first = records[0]
        conditions = first["conditions"]
        words["tau"] = first["acceptance"]["tau"]
        words["speedup"] = first["speedup"]
        # "the same output, faster" is a claim, so both halves must have been seen
        words["faster"] = first["speedup"] > 1 and not different_outputs(first)
        words["headline_conditions"] = (
            f"{conditions.get('prompts')}, temperature {conditions.get('temperature')},"
            f" {conditions.get('max_new_tokens')} new tokens, {conditions.get('hardware')}"
        )
    return words


# ---- how it was trained


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


# ---- the drafter itself, and how to load it


def read_config(folder: Path) -> dict:
    """The config.json of a drafter's folder.

    Raises:
        ValueError: the folder is not a drafter's, or holds an adapter alone.
    """
    config = read(folder, "config.json")
    if config is None and (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds an adapter alone, without what a card says of the drafter. Its card is"
            " the README.md that was published with it (python -m hf_specauf.hub pull); or render"
            " the folder that train left"
        )
    if config is None or not str(config.get("model_type", "")).startswith("specauf_"):
        raise ValueError(
            f"{folder} is not a drafter's folder: its config.json is missing or of another model"
            " type"
        )
    return config


def published_form(config: dict, small: dict | None) -> str:
    """How a reader loads the repository: as a `plain` drafter, as an `adapter` on another
    repository, or as layers `borrowed` from the target."""
    # only a folder that was published small has the key in its config.json
    if config.get("borrowed_layers"):
        return "borrowed"
    if not small:
        return "plain"
    return "borrowed" if small["borrowed_layers"] else "adapter"


def drafter_words(config: dict) -> dict:
    """What the template says of the drafter and its target."""
    kind = config_class(config["model_type"])
    commit = config.get("target_revision")
    template_kwargs = config.get("chat_template_kwargs")
    return {
        "target": config["target_model_name_or_path"] or "unnamed target",
        "pinned_target": f', revision="{commit}"' if commit else "",
        "target_revision": commit or NOT_RECORDED,
        "chat_template_kwargs": json.dumps(template_kwargs) if template_kwargs else "",
        "layers": config["num_hidden_layers"],
        "block_size": config["block_size"],
        "taps": config["target_layer_ids"],
        "mask_token_id": config["mask_token_id"],
        "dtype": config.get("dtype"),
        "native": kind.runs_in_native_generator,
        "card_rows": kind.card_rows(config),
        "card_method": kind.card_method,
        "oldest": TESTED[0],
        "newest": TESTED[1],
    }


def card_tags(config: dict, provenance: dict) -> list[str]:
    """The Hub's tags: drafter, method and the two papers, and LoRA where it was used."""
    kind = config_class(config["model_type"])
    tags = ["speculative-decoding", *kind.card_tags, "spec-auf", "custom_code"]
    tags += ["arxiv:2607.01893", "arxiv:2602.06036"]
    if provenance.get("recipe", {}).get("use_peft"):
        tags.append("lora")
    return tags


def render(
    folder: str | Path,
    repo: str,
    revision: str = "main",
    licence: str = "apache-2.0",
    small: dict | None = None,
) -> ModelCard:
    """The card of a drafter's folder, from its config.json, provenance.json and eval*.json.

    Args:
        folder (`str` or `Path`): what `train` and `evaluate` left.
        repo (`str`): `OWNER/NAME` it is or will be published as.
        revision (`str`, *optional*, defaults to `main`): tag or commit for the usage lines.
        licence (`str`, *optional*, defaults to `apache-2.0`): for the header.
        small (`dict`, *optional*): where the adapter is published alone, the `base.json` that goes
            with it.

    Raises:
        ValueError: the folder is not a drafter's, or holds an adapter alone.
    """
    folder = Path(folder)
    config = read_config(folder)
    provenance = read(folder, "provenance.json") or {}
    records = [read(folder, path.name) for path in sorted(folder.glob("eval*.json"))]
    base = small or provenance.get("base") or {}
    form = published_form(config, small)
    drafter = drafter_words(config)
    datasets = [name for name in sources(provenance) if HUB_ID.fullmatch(name)]
    header = ModelCardData(
        base_model=base["name_or_path"] if form == "adapter" else drafter["target"],
        base_model_relation="adapter",
        library_name="transformers",
        license=licence,
        tags=card_tags(config, provenance),
        # `None` leaves a key out of the header
        datasets=datasets or None,
        model_name=repo.split("/")[-1],
        eval_results=eval_results(records) or None,
    )
    words = drafter | measured_words(records) | training_words(provenance)
    return ModelCard.from_template(
        header,
        template_path=str(TEMPLATE),
        repo=repo,
        revision=revision,
        form=form,
        base=base.get("name_or_path"),
        base_revision=base.get("revision"),
        alpha_plot=(folder / "alpha.png").is_file(),
        **words,
    )
