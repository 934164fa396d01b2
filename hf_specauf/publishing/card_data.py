"""What a card says of the data: by which name a stranger finds it, or that nobody else has it."""

import os
from dataclasses import asdict, dataclass

from ..data.config import SOURCE_DEFAULTS
from ..data.files import reader_of
from ..data.on_policy import settings_beside
from ..identity import Identity
from ..records import HUB_ID, public

NOT_PUBLISHED = "a local file that is not published"


@dataclass(frozen=True)
class NamedData:
    """A set of rows that a recipe names.

    Args:
        name (`str`): as a card shows it: a Hub id, or the last part of a path.
        is_published (`bool`): whether a stranger finds it by that name.
        made_by (`str`, *optional*): of a local file, what wrote it, as far as it is known.
    """

    name: str
    is_published: bool
    made_by: str = ""

    @property
    def words(self) -> str:
        """It in the words of a sentence."""
        if self.is_published:
            return self.name
        made_by = f" ({self.made_by})" if self.made_by else ""
        return f"{self.name}, {NOT_PUBLISHED}{made_by}"


def is_local_data(name: str) -> bool:
    """Whether a name of rows means a file or folder of one machine. `data/rows.jsonl` looks like a
    Hub id, and is none."""
    if reader_of(name) is not None or name.startswith(("/", "~", ".")):
        return True
    return os.path.exists(name)


def on_hub(name: str) -> bool:
    """Whether the Hub can link a name of rows."""
    return bool(HUB_ID.fullmatch(name)) and not is_local_data(name)


def writer_of(name: str) -> str:
    """What wrote a local file, if the settings of `specauf regenerate` lie beside it."""
    settings = settings_beside(name) if os.path.isfile(name) else None
    if settings is None:
        return ""
    target = public(Identity.read(settings).name_or_path)
    prompts = settings.get("dataset_name")
    if not target or not prompts:
        return "written by `specauf regenerate`"
    shown = NamedData(public(prompts), not is_local_data(prompts)).words
    return f"answers of {target} to the prompts of {shown}, by `specauf regenerate`"


def training_names(recipe: dict) -> list[str]:
    """The names of the training rows of a recipe."""
    if recipe.get("dataset_mixture"):
        return [source["name"] for source in recipe["dataset_mixture"]]
    return [recipe["dataset_name"]] if recipe.get("dataset_name") else []


def with_data(provenance: dict) -> dict:
    """A record of training that says of its data what a card needs. Only the machine that trained
    can tell it, and a public record has its answer."""
    recipe = provenance.get("recipe")
    if not recipe or "data" in provenance:
        return provenance
    names = training_names(recipe)
    if recipe.get("eval_dataset_name"):
        names.append(recipe["eval_dataset_name"])
    found = [
        NamedData(public(name), not is_local_data(name), writer_of(name))
        for name in dict.fromkeys(names)
    ]
    return provenance | {"data": [asdict(data) for data in found]}


def named_data(provenance: dict) -> dict[str, NamedData]:
    """All data of a record of training, by the name that a card shows."""
    found = [NamedData(**entry) for entry in with_data(provenance).get("data", [])]
    return {data.name: data for data in found}


def data_words(provenance: dict) -> str:
    """The training rows in the words of a sentence."""
    known = named_data(provenance)
    return "; ".join(known[name].words for name in training_names(provenance["recipe"]))


def prompts_words(name: str) -> str:
    """The prompts of an evaluation, which may be of several sources."""
    parts = [NamedData(part, not is_local_data(part)).words for part in name.split(" + ")]
    return " + ".join(parts)


def given_source(source: dict) -> dict:
    """An entry of `dataset_mixture` without what it would have anyway."""
    return {
        key: value
        for key, value in source.items()
        if key not in SOURCE_DEFAULTS or value != SOURCE_DEFAULTS[key]
    }


def with_remarks(recipe: str, provenance: dict) -> str:
    """A recipe's YAML with a remark behind each name that nobody else has."""
    mine = {data.name for data in named_data(provenance).values() if not data.is_published}
    lines = []
    for line in recipe.splitlines():
        key, _, value = line.partition(": ")
        key, value = key.strip(" -"), value.strip("'\"")
        is_data = key.endswith("name") and value in mine
        # a file of settings, and not the settings themselves
        is_settings = key in ("deepspeed", "fsdp_config") and value.endswith(".json")
        if is_data or is_settings:
            line += f"  # {NOT_PUBLISHED}: put your own here"
        lines.append(line)
    return "\n".join(lines)
