"""Cards of drafters, rendered from what training and evaluation wrote. Nobody types a figure.

The text stands in `templates/model_card.md`. This file, `card_evaluation.py` and `card_training.py`
turn the records of a folder into the words that the template asks for. The command is in
`hf_specauf/model_card.py`.
"""

import json
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from ..drafters import config_class
from ..drafters.configuration_dflash import DFlashConfig
from ..drafters.transformers_internals import TESTED
from ..records import public, read_record
from .card_data import on_hub, training_names, with_data
from .card_evaluation import eval_results, measured_words
from .card_training import NOT_RECORDED, is_until_fail, training_words
from .options import check_licence, check_repo_name

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"


def read(folder: Path, name: str) -> dict | None:
    """A JSON record of a drafter's folder without local traces, or `None`."""
    path = folder / name
    if not path.is_file():
        return None
    # before the paths go, by which a local file is known
    return public(with_data(read_record(path)))


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
            " type. Name the folder that train left; one of z-lab or SpecForge is converted first"
            " (specauf convert)"
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


def target_words(config: dict, provenance: dict) -> dict:
    """What the template says of the target, from a drafter's config.json and provenance.json."""
    # Records are older than the key, or somebody else's.
    noted = provenance.get("target")
    auto_class = noted.get("auto_class") if isinstance(noted, dict) else None
    words = {
        "target": config["target_model_name_or_path"] or "unnamed target",
        "auto_class": auto_class or "AutoModelForCausalLM",
        "target_revision": NOT_RECORDED,
        # goes into the usage lines, behind the target's name
        "pinned_target": "",
        "chat_template_kwargs": "",
    }
    if config.get("target_revision"):
        words["target_revision"] = config["target_revision"]
        words["pinned_target"] = f', revision="{config["target_revision"]}"'
    if config.get("chat_template_kwargs"):
        words["chat_template_kwargs"] = json.dumps(config["chat_template_kwargs"])
    return words


def linked_datasets(provenance: dict) -> list[str]:
    """The training sets that the Hub can link. A local file is none."""
    return [name for name in training_names(provenance.get("recipe", {})) if on_hub(name)]


def record_words(folder: Path, provenance: dict, records: list[dict]) -> dict:
    """What the template says of training and evaluations.

    Raises:
        ValueError: a record lacks what its command writes.
    """
    try:
        return measured_words(records) | training_words(provenance)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"an eval*.json or the provenance.json of {folder} is not what evaluate and train write"
            f" ({type(error).__name__}: {error}): write it again, or move it away"
        ) from error


def card_tags(kind: type[DFlashConfig], provenance: dict) -> list[str]:
    """The Hub's tags of a drafter: its kind, how it was trained, and the papers of both."""
    recipe = provenance.get("recipe", {})
    tags = ["speculative-decoding", *kind.card_tags, "custom_code", "arxiv:2602.06036"]
    # a drafter of another objective, or of somebody else's training, is none of Spec-AUF's
    if is_until_fail(recipe.get("objective")):
        tags += ["spec-auf", "arxiv:2607.01893"]
    if recipe.get("use_peft"):
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
        ValueError: the folder is not a drafter's, or holds an adapter alone; `repo` is no name of a
            repository; or a record is not whole.
    """
    folder = Path(folder)
    check_repo_name(repo)
    check_licence(licence)
    config = read_config(folder)
    provenance = read(folder, "provenance.json") or {}
    records = [read(folder, path.name) for path in sorted(folder.glob("eval*.json"))]
    base = small or provenance.get("base") or {}
    form = published_form(config, small)
    kind = config_class(config["model_type"])
    words = target_words(config, provenance) | record_words(folder, provenance, records)
    header = ModelCardData(
        base_model=base["name_or_path"] if form == "adapter" else words["target"],
        # The Hub has no relation for drafters, and lists what says "adapter" among the target's
        # LoRA weights. Only a repository that holds such weights is one.
        base_model_relation=None if form == "plain" else "adapter",
        library_name="transformers",
        license=licence,
        tags=card_tags(kind, provenance),
        # `None` leaves a key out of the header
        datasets=linked_datasets(provenance) or None,
        model_name=repo.split("/")[-1],
        eval_results=eval_results(records) or None,
    )
    return ModelCard.from_template(
        header,
        template_path=str(TEMPLATE),
        repo=repo,
        revision=revision,
        form=form,
        base=base.get("name_or_path"),
        base_revision=base.get("revision"),
        config=config,
        kind=kind,
        card_rows=kind.card_rows(config),
        oldest=TESTED[0],
        newest=TESTED[1],
        alpha_plot=(folder / "alpha.png").is_file(),
        **words,
    )
