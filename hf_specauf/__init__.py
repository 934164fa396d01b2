"""Train a drafter for any Hugging Face causal LM with Accept-Until-Fail, and make that LM's `generate()` faster.

The data flows one way: a recipe (`recipe`) names a target (`target`) and a dataset (`conversations`); anchors become
blocks (`blocks`), the drafter (`drafters`) fills them from the target's hidden states, an objective (`objectives`)
says which slots count, and the Trainer (`trainer`, `train`) learns them. `generate.attach` puts the drafter to work,
`acceptance` and `evaluate` measure it. Importing the package registers the drafter with transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModel

from .drafters.configuration_dflash import DFlashConfig
from .drafters.modeling_dflash import DFlashDraftModel

__version__ = "0.1.0"

AutoConfig.register(DFlashConfig.model_type, DFlashConfig)
AutoModel.register(DFlashConfig, DFlashDraftModel)
# save_pretrained then copies the modelling files, so that the folder loads where this package is absent
DFlashConfig.register_for_auto_class()
DFlashDraftModel.register_for_auto_class("AutoModel")

_LAZY = {
    "AUFConfig": "trainer", "AUFTrainer": "trainer", "attach": "generate", "slot_weights": "objectives",
    "load_drafter": "convert", "from_target": "convert", "add_adapter": "lora",
}  # fmt: skip


def __getattr__(name: str):
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["DFlashConfig", "DFlashDraftModel", *_LAZY]
