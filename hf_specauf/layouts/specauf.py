"""This package's own layout: what `save_pretrained` writes and `AutoModel` loads."""

from pathlib import Path

import torch
from transformers import AutoModel, PreTrainedModel

from .folders import named


def recognises(folder: Path, config: dict) -> bool:
    """Whether the folder is ours: our model types all begin alike."""
    return str(config.get("model_type")).startswith("specauf_")


def read(folder: Path, config: dict, dtype: str | torch.dtype) -> PreTrainedModel:
    """The drafter in a folder of ours.

    Raises:
        ValueError: the tensors are not those that the config asks for.
    """
    # With a plain call, transformers would draw missing tensors at random, and only log that.
    drafter, found = AutoModel.from_pretrained(
        folder,
        dtype=dtype,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    other_shape = {name for name, *_ in found["mismatched_keys"]}
    odd = sorted(other_shape.union(found["missing_keys"], found["unexpected_keys"]))
    if odd:
        raise ValueError(
            f"the weights in {folder} are not those its config asks for: {named(odd)} missing,"
            " unknown or of another shape would be random or left out. Save the drafter again with"
            " save_pretrained."
        )
    return drafter


def write(drafter: PreTrainedModel, folder: Path) -> None:
    """Write the drafter, with the code that loads it where this package is absent."""
    drafter.save_pretrained(folder)
