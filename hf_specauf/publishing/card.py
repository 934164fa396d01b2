"""Cards rendered from what training and evaluation wrote, nothing typed by hand; and the check of
contributed ones. The commands are in `hf_specauf/model_card.py`."""

import json
import re
from dataclasses import MISSING, fields
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
CONDITIONS = (
    "max_new_tokens",
    "temperature",
    "batch_size",
    "hardware",
    "dtype",
    "prompts",
)  # required beside a tau


def read(folder: Path, name: str) -> dict | None:
    """A JSON record of a drafter's folder without local traces, or `None`."""
    path = folder / name
    return public(json.loads(path.read_text())) if path.is_file() else None


def tau_by_length(prompts: list[dict]) -> str:
    """tau of prompts grouped by the power of two their length lies under; empty if they are all
    alike."""
    groups: dict[int, list[float]] = {}
    for row in prompts:
        if row["tau"] is not None:
            groups.setdefault(1 << (row["prompt_tokens"] - 1).bit_length(), []).append(row["tau"])
    if len(groups) < 2:
        return ""
    return ", ".join(
        f"up to {size} tokens {sum(taus) / len(taus):.2f}" for size, taus in sorted(groups.items())
    )


def slow_cases(prompts: list[dict]) -> str:
    """How many prompts the drafter made slower, and the worst of them."""
    ratios = [
        row["plain_seconds"] / row["assisted_seconds"]
        for row in prompts
        if row.get("assisted_seconds")
    ]
    if not ratios:
        return NOT_MEASURED
    slow = sum(ratio < 1 for ratio in ratios)
    return (
        f"{slow} of {len(ratios)} prompts; the worst ran at {min(ratios):.2f}x, the best at"
        f" {max(ratios):.2f}x"
    )


def evaluation_row(record: dict) -> dict:
    """The lines of one evaluation, as words."""
    conditions, results = record["conditions"], record
    shown = ", ".join(
        f"{key.replace('_', ' ')} {value}"
        for key, value in sorted(conditions.items())
        if value != {}
    )
    lossless, different = results["lossless"], 0
    if isinstance(lossless, dict):
        different = lossless["different"]
        total = sum(lossless.values())
        lossless = (
            f"{lossless['identical']} of {total} identical, {lossless['near_tie']} near-ties of"
            f" rounding, {different} different"
        )
    return {
        "name": conditions["prompts"], "tau": number(results["acceptance"]["tau"]),
        "speedup": number(results["speedup"], ".2f", "x"), "plain": number(results["plain_tokens_per_second"], ".1f"),
        "assisted": number(results["tokens_per_second"], ".1f"), "lossless": lossless, "different": different,
        "slow": slow_cases(results["prompts"]), "by_length": tau_by_length(results["prompts"]),
        "repetition": number(results["repetition"], ".0%"), "conditions": shown,
    }  # fmt: skip


def eval_results(records: list[dict]) -> list[EvalResult]:
    """tau and speed-up of each evaluation for the model index, with their conditions."""
    found = []
    for record in records:
        conditions = record["conditions"]
        values = {"tau": record["acceptance"]["tau"], "speedup": record["speedup"]}
        names = {
            "tau": "tau (tokens committed per verification pass)",
            "speedup": "speed-up over plain generate",
        }
        dataset = str(conditions["prompts"])
        for key, value in values.items():
            if value is not None:
                found.append(
                    EvalResult(
                        task_type="text-generation", task_name="Speculative decoding", dataset_name=dataset,
                        dataset_type=dataset if HUB_ID.fullmatch(dataset) else "custom", metric_type=key,
                        metric_name=names[key], metric_value=round(value, 4), metric_args=conditions,
                    )
                )  # fmt: skip
    return found


def changed_recipe(recipe: dict) -> str:
    """The keys of a resolved recipe that differ from their defaults, as YAML."""
    recipe = under_new_names(recipe)
    kept = {}
    for part in (TargetArguments, drafter_arguments(), DataArguments, AUFConfig):
        for field in fields(part):
            default = field.default if field.default_factory is MISSING else field.default_factory()
            value = recipe.get(field.name)
            plain = value is None or isinstance(value, str | int | float | bool | list | dict)
            shown = plain and value not in (None, {}, default)
            if shown and str(value) != str(getattr(default, "value", default)):
                kept[field.name] = value
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True).strip()


def adaptation(provenance: dict) -> str:
    """What a drafter started from, how it was trained and what it won; empty where it started at
    random."""
    base, recipe = provenance.get("base"), provenance.get("recipe", {})
    if not base:
        return ""
    how, commit = "trained in full", f" at {base['revision']}" if base["revision"] else ""
    if recipe.get("use_peft"):
        kinds = [
            name
            for name, key in (("rsLoRA", "use_rslora"), ("DoRA", "use_dora"))
            if recipe.get(key)
        ]
        how = (
            f"LoRA{' with ' if kinds else ''}{' and '.join(kinds)}, r {recipe['lora_r']}, alpha"
            f" {recipe['lora_alpha']}"
        )
        in_full = recipe.get("lora_modules_to_save")
        how += f", and {', '.join(in_full)} in full" if in_full else ""
    if base["borrowed_layers"] is not None:
        frozen = ", frozen" if recipe.get("use_peft") else ""
        return f"layers {base['borrowed_layers']} of the target{commit}{frozen}; {how}"
    after = [entry["eval_tau"] for entry in provenance["history"] if "eval_tau" in entry]
    before, after = number(provenance.get("tau_before")), number(after[-1] if after else None)
    return (
        f"`{base['name_or_path']}`{commit}; {how}; tau on the same held-out prompts {before}"
        f" before, {after} after"
    )


def sources(provenance: dict) -> list[str]:
    """The datasets a drafter was trained on."""
    recipe = provenance.get("recipe", {})
    mixed = [source["name"] for source in recipe.get("dataset_mixture") or []]
    return mixed or [name for name in [recipe.get("dataset_name")] if name]


def training_lines(provenance: dict) -> dict:
    """What a card says of the training, as words."""
    recipe, found = provenance.get("recipe", {}), provenance.get("environment", {})
    objective, size, data = (
        recipe.get("objective"),
        provenance.get("trainable_parameters"),
        sources(provenance),
    )
    method = OBJECTIVES[objective].title if objective in OBJECTIVES else objective
    steps = (
        f"{provenance['steps']} steps, {provenance['seconds'] / 60:.0f} minutes"
        if provenance
        else NOT_MEASURED
    )
    packages = found.get("packages", {})
    versions = [
        f"{key} {packages[key]}"
        for key in ("hf-specauf", "torch", "transformers")
        if key in packages
    ]
    return {
        "method": method or "an objective that was not recorded",
        "objective": f"{objective}, {recipe.get('normalisation')}" if objective else "not recorded",
        "parameters": f"{size / 1e6:.1f} M" if size else "not recorded",
        "data": f"{', '.join(data)} ({provenance['rows']} rows)" if data else "not recorded",
        "training": (
            f"{steps} on {found.get('hardware')}, seed {recipe['seed']}"
            if recipe
            else "not recorded"
        ),
        "software": ", ".join(versions) or "not recorded",
        "recipe": changed_recipe(recipe) if recipe else "",
        "adapted": adaptation(provenance),
    }


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
        small (`dict`, *optional*): where the adapter is published alone, the `base.json` that goes
            with it.

    Raises:
        ValueError: the folder is not a drafter's, or holds an adapter alone.
    """
    folder = Path(folder)
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
    provenance = read(folder, "provenance.json") or {}
    records = [read(folder, path.name) for path in sorted(folder.glob("eval*.json"))]
    rows = [evaluation_row(record) for record in records]
    first = records[0] if records else None
    conditions = {} if first is None else first["conditions"]
    target, commit = (
        config["target_model_name_or_path"] or "unnamed target",
        config.get("target_revision"),
    )
    kind = config_class(config["model_type"])
    base = small or provenance.get("base") or {}
    borrowed = config.get("borrowed_layers") or (small and small["borrowed_layers"])
    form = "borrowed" if borrowed else "adapter" if small else "plain"
    tags = [
        "speculative-decoding",
        *kind.card_tags,
        "spec-auf",
        "custom_code",
        "arxiv:2607.01893",
        "arxiv:2602.06036",
    ]
    card_data = ModelCardData(
        base_model=base["name_or_path"] if form == "adapter" else target, base_model_relation="adapter",
        library_name="transformers", license=licence,
        tags=tags + (["lora"] if provenance.get("recipe", {}).get("use_peft") else []),
        datasets=[name for name in sources(provenance) if HUB_ID.fullmatch(name)] or None,
        model_name=repo.split("/")[-1], eval_results=eval_results(records) or None,
    )  # fmt: skip
    return ModelCard.from_template(
        card_data, template_path=str(TEMPLATE), repo=repo, revision=revision, target=target,
        pinned_target=f', revision="{commit}"' if commit else "", target_revision=commit or "not recorded",
        tau=first and first["acceptance"]["tau"], speedup=first and first["speedup"],
        faster=first is not None and first["speedup"] > 1 and not rows[0]["different"],
        headline_conditions=f"{conditions.get('prompts')}, temperature {conditions.get('temperature')}, "
        f"{conditions.get('max_new_tokens')} new tokens, {conditions.get('hardware')}",
        chat_template_kwargs=json.dumps(config["chat_template_kwargs"]) if config.get("chat_template_kwargs") else "",
        tau_definition=TAU_DEFINITION, evaluations=rows,
        alpha_plot=(folder / "alpha.png").is_file(), layers=config["num_hidden_layers"],
        block_size=config["block_size"], taps=config["target_layer_ids"], mask_token_id=config["mask_token_id"],
        dtype=config.get("dtype"), form=form, base=base.get("name_or_path"), base_revision=base.get("revision"),
        native=kind.runs_in_native_generator, card_rows=kind.card_rows(config), card_method=kind.card_method,
        oldest=TESTED[0], newest=TESTED[1], **training_lines(provenance),
    )  # fmt: skip


def validate(path: str | Path, contributed: bool = False) -> list[str]:
    """What is missing or wrong in a card; empty for a good one.

    Args:
        path (`str` or `Path`): the card.
        contributed (`bool`, *optional*): also ask for the file name `<owner>__<name>.md` and a
            pinned revision.
    """
    path, problems = Path(path), []
    try:
        card = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=False)
        data = card.data
    except (ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        return [f"the YAML header cannot be read: {error}"]
    if not (data.base_model and HUB_ID.fullmatch(str(data.base_model))):
        problems.append(
            f"base_model is {data.base_model!r}: it must be the target's Hub id, OWNER/NAME"
        )
    problems += [
        f"{key} is missing from the header"
        for key in ("license", "library_name")
        if not data.get(key)
    ]
    if "speculative-decoding" not in (data.tags or []):
        problems.append("tags must hold speculative-decoding")
    results = data.eval_results or []
    for key, least in (("tau", 1.0), ("speedup", 0.0)):
        measured = [result for result in results if result.metric_type == key]
        if not measured:
            problems.append(
                f"no {key} in the model index: measure it with `python -m hf_specauf.evaluate`"
            )
        for result in measured:
            value = result.metric_value
            if not isinstance(value, int | float) or isinstance(value, bool) or not value >= least:
                problems.append(f"{key} is {value!r}: it must be a number of at least {least:g}")
            missing = [name for name in CONDITIONS if (result.metric_args or {}).get(name) is None]
            if missing:
                problems.append(
                    f"{key} on {result.dataset_name}: its conditions lack {', '.join(missing)}"
                )
    if "tau =" not in card.text:
        problems.append("the definition of tau is missing from the text")
    if contributed:
        if not re.fullmatch(r"[\w.-]+__[\w.-]+\.md", path.name):
            problems.append(f"the file is called {path.name}: it must be <owner>__<name>.md")
        revisions = set(re.findall(r'from_pretrained\(\s*"[^"]*", revision="([^"]*)"', card.text))
        if not revisions or revisions & {"main", ""}:
            problems.append("the usage lines must pin a commit or tag: render with --revision")
    return problems
