"""A plain drafter from anywhere: a folder in any layout of `LAYOUTS`, an adapter merged on its
base, or layers of a target with what was trained beside them."""

import json
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import PreTrainedModel

from ..drafters import config_class
from ..identity import (
    Identity,
    Origin,
    innermost,
    note_origin,
    same_weights,
    target_fingerprint,
    weights_fingerprint,
)
from . import LAYOUTS, Layout
from .adapters import AdapterBase, add_adapter, borrow, borrowed_tensors
from .folders import absolute, fetch, read_json


def torch_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """A dtype by its name in torch; `auto` as it is.

    Raises:
        ValueError: torch has no dtype of that name.
    """
    if dtype == "auto":
        return dtype
    found = dtype
    if isinstance(dtype, str):
        found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(
            f"dtype is {dtype!r}; it must be auto (as stored), bfloat16, float32 or a torch.dtype"
        )
    return found


def load_drafter(
    name_or_path: str | Path,
    revision: str | None = None,
    *,
    target: PreTrainedModel | None = None,
    dtype: str | torch.dtype = "auto",
    key: str = "name_or_path",
) -> PreTrainedModel:
    """A plain drafter from a folder or a Hub id; adapters come merged on the base they pin.

    Args:
        name_or_path (`str` or `Path`): a drafter in any layout of `LAYOUTS`, an adapter, or a
            drafter on borrowed layers. Other layouts than ours are converted in memory.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        target (`PreTrainedModel`, *optional*): needed by drafters on borrowed layers.
        dtype (*optional*, defaults to `auto`): as stored.
        key (`str`, *optional*): what errors call `name_or_path`, where a command or a recipe gave
            it.

    Raises:
        ValueError: what the folder holds instead, or what of it is ambiguous or unknown.
    """
    dtype = torch_dtype(dtype)
    folder, commit = fetch(name_or_path, revision, key)
    config = read_json(folder / "config.json")
    loadable = False
    # An adapter on borrowed layers has both files. It can only be rebuilt from its target.
    if config.get("borrowed_layers"):
        drafter = from_target(target, name_or_path, revision, dtype=dtype)
    elif (folder / "adapter_config.json").is_file():
        drafter = merged_adapter(folder, target, dtype)
    else:
        layout = layout_of(folder, config, f"{key}: {name_or_path}")
        drafter = layout.read(folder, config, dtype)
        loadable = layout.loads_in_automodel
    note_origin(drafter, Origin(absolute(name_or_path), commit, loadable))
    # PEFT reads the config of what is named here, so it may only name what AutoModel loads.
    name = str(name_or_path) if loadable else ""
    drafter.name_or_path = name
    drafter.config._name_or_path = name
    return drafter.eval()


def layout_of(folder: Path, config: dict, name: str) -> Layout:
    """The first layout of the table that recognises a folder.

    Args:
        folder (`Path`): the drafter's folder.
        config (`dict`): the content of its `config.json`; empty where there is none.
        name (`str`): what errors call the folder.

    Raises:
        ValueError: none does.
    """
    for layout in LAYOUTS.values():
        if layout.recognises(folder, config):
            return layout
    if not config:
        raise ValueError(
            f"{name} is no drafter's folder: it holds no config.json. Name the folder that train"
            " left, or a drafter's Hub id"
        )
    read = ", ".join(f"{kind} ({layout.says})" for kind, layout in LAYOUTS.items())
    found = config.get("model_type")
    found = f"is that of a {found} (a target?)" if found else "names no model_type"
    raise ValueError(
        f"{name} says nothing about block_size, so it is not a DFlash drafter in any layout that is"
        f" read. Its config.json {found}, or was cut. These are read: {read}"
    )


def merged_adapter(
    folder: Path, target: PreTrainedModel | None, dtype: str | torch.dtype
) -> PreTrainedModel:
    """An adapter on the base that it pins, merged into a plain drafter."""
    base = AdapterBase.read(folder)
    drafter = load_drafter(
        base.name_or_path, base.revision, target=target, key="the adapter's base"
    )
    if dtype == "auto":
        dtype = drafter.dtype
    # merged in fp32, because the sum of bf16 weights and a small update would lose the update
    return add_adapter(drafter.float(), folder).merge_and_unload().to(dtype)


def from_target(
    target: PreTrainedModel | None,
    folder_or_repo: str | Path,
    revision: str | None = None,
    *,
    dtype: str | torch.dtype = "auto",
) -> PreTrainedModel:
    """Rebuild a drafter on borrowed layers: copy them from the target, merge the adapter -> a plain
    drafter.

    Args:
        target (`PreTrainedModel`): the one it was trained on; unchanged, and nothing is attached to
            it.
        folder_or_repo (`str` or `Path`): what was published with `--small`, a checkpoint, or
            `adapter/` of a run.
        dtype (*optional*, defaults to `auto`): the target's, but bfloat16 for fp16, in which
            drafters accept nothing.

    Raises:
        ValueError: the target's layers are not the ones that were borrowed, or the adapter lacks a
            weight.
    """
    if target is None:
        raise ValueError(
            f"{folder_or_repo} is a drafter on layers borrowed from its target: load the target and"
            f" call hf_specauf.from_target(target, {str(folder_or_repo)!r})"
        )
    target = innermost(target)
    dtype = torch_dtype(dtype)
    folder, commit = fetch(folder_or_repo, revision, "folder_or_repo")
    adapter = folder
    # The folder of a whole run holds the adapter in a folder of its own.
    if not (folder / "adapter_config.json").is_file():
        adapter = folder / "adapter"
    base = AdapterBase.read(adapter)
    if base.borrowed_layers is None:
        raise ValueError(
            f"{folder_or_repo} borrows no layers of a target: use"
            f" load_drafter({str(folder_or_repo)!r})"
        )
    check_lender(target, base, folder_or_repo)
    given = json.loads((adapter / "config.json").read_text()) | {"borrowed_layers": None}
    config = config_class(given["model_type"]).from_dict(given)
    # An adapter fits the layers it was trained on alone, so nothing may start afresh here.
    drafter = borrow(target, config, base.borrowed_layers, frozen=True)
    check_nothing_stays_random(drafter, adapter, folder_or_repo)
    drafter = PeftModel.from_pretrained(drafter, str(adapter)).merge_and_unload()
    note_origin(drafter, Origin(absolute(folder_or_repo), commit, loadable=False))
    if dtype == "auto":
        dtype = target.dtype
        # drafters accept nothing in fp16
        if dtype == torch.float16:
            dtype = torch.bfloat16
    return drafter.to(dtype).eval()


def check_lender(target: PreTrainedModel, base: AdapterBase, folder_or_repo: str | Path) -> None:
    """Raise unless the target has the layers that were borrowed, and the weights around them."""
    layers = base.borrowed_layers
    if weights_fingerprint(borrowed_tensors(target, layers)) != base.fingerprint:
        at = f" at {base.revision}" if base.revision else ""
        raise ValueError(
            f"{folder_or_repo} borrows layers {layers} of {base.name_or_path}{at}, and this"
            " target's layers are other weights: load that target, at that revision"
        )
    trained = Identity.read(base.trained_for)
    found = target_fingerprint(target)
    # A quantised target has no fingerprint, and neither has one that an old record names.
    if trained.fingerprint and found and not same_weights(trained.fingerprint, found):
        raise ValueError(
            f"this target's layers {layers} are those {folder_or_repo} borrows, but other weights"
            f" of it differ from {trained.name_or_path}, whose hidden states the drafter was"
            " trained on: load that target, at that revision"
        )


def check_nothing_stays_random(
    drafter: PreTrainedModel, adapter: Path, folder_or_repo: str | Path
) -> None:
    """Raise where a weight of a rebuilt drafter is neither borrowed nor in the adapter."""
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        saved = set(file.keys())
    random = []
    for name, tensor in drafter.state_dict().items():
        # the layers are borrowed, and norms, which have one dimension, start as ones
        starts_at_random = not name.startswith("layers.") and tensor.dim() > 1
        if starts_at_random and f"base_model.model.{name}" not in saved:
            random.append(name)
    if random:
        raise ValueError(
            f"weights of {folder_or_repo} are neither borrowed nor in the adapter"
            f" ({', '.join(random)}) and would be random: train it again with their modules among"
            " lora_modules_to_save (modules_to_save)"
        )
