"""Train a drafter for any Hugging Face causal LM with Accept-Until-Fail, and make that LM's `generate()` faster.

The data flows one way: a recipe (`recipe`) names a target (`target`) and a dataset (`conversations`); anchors become
blocks (`blocks`), the drafter (`drafters`) fills them from the target's hidden states, an objective (`objectives`)
says which slots count, and the Trainer (`trainer`, `train`) learns them. `generate.attach` puts the drafter to work,
`acceptance` and `evaluate` measure it. Importing the package registers the drafter with transformers' Auto classes.
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
    # save_pretrained then copies the modelling files, so that the folder loads where this package is absent
    _config.register_for_auto_class()
    _model.register_for_auto_class("AutoModel")

_LAZY = {
    "AUFConfig": "auf_config", "AUFTrainer": "trainer", "attach": "generate", "slot_weights": "objectives",
    "load_drafter": "convert", "from_target": "convert", "add_adapter": "lora",
}  # fmt: skip


def __getattr__(name: str):
    from importlib import import_module

    if name == "generate":  # the module, which can be called
        return import_module(".generate", __name__)
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["DFlashConfig", "DFlashDraftModel", "DominoConfig", "DominoDraftModel", "generate", *_LAZY]
