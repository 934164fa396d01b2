"""Traces of the machine and its user: records go to the Hub without them, and a last look at the
whole folder refuses what was missed."""

import getpass
import os
import re
import socket
from pathlib import Path

from huggingface_hub import get_token

from ..drafters.configuration_dflash import DFlashConfig
from ..identity import Identity
from ..layouts.adapters import AdapterBase
from ..recipe import under_new_names
from ..records import public, read_record, write_record
from .card_data import with_data

TEXT_FILES = (".json", ".md", ".py", ".txt", ".yaml", ".jinja")
# User and host names so general that they tell nothing, and that a card may hold as plain words
GENERAL = {"root", "user", "ubuntu", "runner", "admin", "localhost", "model", "target"}


def copy_records(
    drafter: Path, into: Path, config: DFlashConfig, own: str | None, base: AdapterBase | None
) -> None:
    """Copy what training and evaluation wrote, without local traces.

    Args:
        drafter, into (`Path`): the drafter's folder, and the one that is published.
        config (`DFlashConfig`): of the drafter, which names its target by the Hub id.
        own (`str`, *optional*): what the records call that target.
        base (`AdapterBase`, *optional*): what the drafter was adapted from, by its Hub id.

    Raises:
        ValueError: an evaluation is of another target.
    """
    provenance = drafter / "provenance.json"
    if provenance.is_file():
        record = with_data(read_record(provenance))
        write_record(into / provenance.name, public_record(record, config, base))
    meant = Identity.of_target_of(config)
    for path in sorted(drafter.glob("eval*.json")):
        record = read_record(path)
        measured = Identity.read(record)
        if not measured.is_same_model(meant, own):
            raise ValueError(
                f"{path} was measured on {measured.name_or_path}, and the drafter's target is"
                f" {own}: its tau would pass for tau on that. Move it away, and measure the"
                " drafter on its own target."
            )
        write_record(into / path.name, public_record(record, config, base))


def public_record(record: dict, config: DFlashConfig, base: AdapterBase | None) -> dict:
    """A record of training or evaluation without local traces, naming target and base by their Hub
    ids."""
    record = public(record)
    if isinstance(record.get("target"), dict):
        record["target"]["name_or_path"] = config.target_model_name_or_path
        record["target"]["revision"] = config.target_revision
    recipe = under_new_names(record.get("recipe", {}))
    if recipe:
        record["recipe"] = recipe
    if "target" in recipe:
        recipe["target"] = config.target_model_name_or_path
        recipe["target_revision"] = config.target_revision
    if base is None:
        return record
    if record.get("base"):
        record["base"]["name_or_path"] = base.name_or_path
        record["base"]["revision"] = base.revision
        record["base"]["loadable"] = base.loadable
    # layers borrowed from the target are no drafter that a recipe could start from
    if recipe and base.borrowed_layers is None:
        recipe["drafter"] = base.name_or_path
        recipe["drafter_revision"] = base.revision
    return record


def telling_words() -> dict[str, str]:
    """What names this machine or its user -> the word to look for."""
    words = {
        "home folder": str(Path.home()),
        "working folder": os.getcwd(),
        "token": get_token() or "",
        "user name": getpass.getuser(),
        "host name": socket.gethostname(),
    }
    # words of three letters or fewer would be found in any text
    return {what: word for what, word in words.items() if len(word) > 3 and word not in GENERAL}


def find_secrets(folder: Path) -> list[str]:
    """Tokens, local paths, user and host names in a folder's text files, as `file: what`."""
    words = telling_words()
    found = []
    for path in sorted(folder.rglob("*")):
        if path.suffix not in TEXT_FILES:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        for what, word in words.items():
            # as a word of its own: the user name "anna" is no secret in "annak"
            if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text):
                found.append(f"{path.name}: {what}")
        # any token of the Hub, for instance of somebody else
        if re.search(r"\bhf_[A-Za-z0-9]{30,}\b", text):
            found.append(f"{path.name}: something that looks like a token")
    return found
