"""Train a drafter for any Hugging Face causal LM with Accept-Until-Fail, and make that LM's
`generate()` faster.

The data flows one way. A recipe (`recipe`) names a target (`target`) and data, which become token
rows (`data`). Anchors in them become blocks, and an objective says which of their slots it supports
(`losses`). The drafter (`drafters`) fills the blocks from the target's hidden states, and the
Trainer trains it (`training`, `train`). `attach` puts it to work, and `evaluate` measures it
(`serving`). Cards and folders go to the Hub (`publishing`). Drafters come from there, or from other
projects (`layouts`).

Importing the package registers the drafters with transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModel

from .drafters import DRAFTERS
from .drafters.configuration_dflash import DFlashConfig
from .drafters.configuration_domino import DominoConfig
from .drafters.modeling_dflash import DFlashDraftModel
from .drafters.modeling_domino import DominoDraftModel

__version__ = "0.2.0.dev0"

for _config, _model in DRAFTERS.values():
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
    # save_pretrained then copies the modelling files, so that the folder loads where this package
    # is absent
    _config.register_for_auto_class()
    _model.register_for_auto_class("AutoModel")

# Loaded when they are first asked for: they import the Trainer, datasets and the like.
_LAZY = {
    "AUFConfig": "training.config",
    "AUFTrainer": "training.trainer",
    "add_adapter": "layouts.adapters",
    "attach": "serving.decoding",
    "from_target": "layouts.load",
    "generate": "serving.decoding",
    "load_drafter": "layouts.load",
    "slot_weights": "losses.objectives",
}


def __getattr__(name: str):
    from importlib import import_module

    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["DFlashConfig", "DFlashDraftModel", "DominoConfig", "DominoDraftModel", *_LAZY]
