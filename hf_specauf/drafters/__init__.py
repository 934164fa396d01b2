"""What travels to the Hub. Files here import only torch, transformers and each other.

`save_pretrained` copies the files that a drafter needs into its folder: its configuration, its
model, and what they import of their siblings.

`DRAFTERS` is the table of drafters. To add one, write its configuration and its model beside the
others, and add one entry. Everything else of the package asks the config class what it needs to
know. `DFlashConfig` lists the questions, in order.
"""

from .configuration_dflash import DFlashConfig
from .configuration_domino import DominoConfig
from .modeling_dflash import DFlashDraftModel
from .modeling_domino import DominoDraftModel

# what a recipe calls it -> (configuration, model)
DRAFTERS: dict[str, tuple[type[DFlashConfig], type[DFlashDraftModel]]] = {
    "dflash": (DFlashConfig, DFlashDraftModel),
    "domino": (DominoConfig, DominoDraftModel),
}


def config_class(model_type: str | None) -> type[DFlashConfig] | None:
    """The configuration class of a config.json with this `model_type`; `None` for any other."""
    for config, _ in DRAFTERS.values():
        if config.model_type == model_type:
            return config
    return None


__all__ = ["DRAFTERS", "config_class"]
