"""What travels to the Hub. Files here import only torch, transformers and each other.

`DRAFTERS` is the table of drafters. To add one, write its configuration and its model beside the
others, and add one entry. Everything else of the package asks the config class what it needs to
know (see `DFlashConfig`).
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
    """The configuration whose `model_type` a config.json has; `None` where it is of no drafter in
    the table."""
    return next(
        (config for config, _ in DRAFTERS.values() if config.model_type == model_type), None
    )


__all__ = ["DRAFTERS", "config_class"]
