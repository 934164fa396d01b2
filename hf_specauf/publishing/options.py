"""How a drafter is published, as one object."""

import re
from dataclasses import dataclass

from transformers import PreTrainedModel

from ..records import HUB_ID

# the form of the Hub's names for licences
LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]*")


def check_licence(licence: str) -> None:
    """Raise for what the Hub would refuse as a licence's name, after all has been checked."""
    if not LICENCE.fullmatch(licence):
        raise ValueError(
            f"--license {licence!r} is no name that the Hub has for a licence: give one like"
            " apache-2.0, mit, llama3.1 or other"
        )


def check_repo_name(repo: str) -> None:
    """Raise for a name that no repository of the Hub can have."""
    if not HUB_ID.fullmatch(repo):
        raise ValueError(f"repo is {repo!r}; it must be OWNER/NAME")


@dataclass(frozen=True)
class PublishOptions:
    """How a drafter is published. A misspelt key fails as soon as it is given.

    Attributes:
        target, target_revision (`str`, *optional*): the target's Hub id, where training used a
            local folder, and its branch, tag or commit.
        base, base_revision (`str`, *optional*): likewise of the drafter it was adapted from.
        small (`bool`, *optional*): of a LoRA drafter, publish the adapter alone instead of the
            merged drafter.
        licence (`str`, *optional*): of the drafter, as the card's header names it.
        allow_unmeasured (`bool`, *optional*): publish without `eval.json`; the card says "not
            measured".
        token (`str`, *optional*): of the Hub, instead of the one that is logged in.
        target_model (`PreTrainedModel`, *optional*): the target, where it is loaded already; needed
            only for borrowed layers.
    """

    target: str | None = None
    target_revision: str | None = None
    base: str | None = None
    base_revision: str | None = None
    small: bool = False
    licence: str = "apache-2.0"
    allow_unmeasured: bool = False
    token: str | None = None
    target_model: PreTrainedModel | None = None

    def __post_init__(self):
        check_licence(self.licence)
