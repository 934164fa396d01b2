"""Cards of drafters, rendered from what training and evaluation wrote. Nobody types a figure.

The text stands in `templates/model_card.md`. This file, `card_evaluation.py` and `card_training.py`
turn the records of a folder into the words that the template asks for. The command is in
`hf_specauf/model_card.py`.
"""

import json
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from ..drafters import config_class
from ..drafters.transformers_internals import TESTED
from ..records import HUB_ID, public
from .card_evaluation import eval_results, measured_words
from .card_training import NOT_RECORDED, sources, training_words

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"


def read(folder: Path, name: str) -> dict | None:
    """A JSON record of a drafter's folder without local traces, or `None`."""
    path = folder / name
    return public(json.loads(path.read_text())) if path.is_file() else None


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
