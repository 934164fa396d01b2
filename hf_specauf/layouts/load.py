"""A plain drafter from anywhere: our folders, adapters on them, and folders of z-lab and
SpecForge."""

import json
from functools import reduce
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModel, PreTrainedModel

from ..drafters import DRAFTERS, config_class
from ..drafters.configuration_dflash import DFlashConfig
from ..identity import Identity, Origin, note_origin, target_fingerprint, weights_fingerprint
from .adapters import AdapterBase, absolute, add_adapter, borrow, borrowed_tensors, fetch

# What other trainers write into config.json that says nothing about the computation
IGNORED = {
    "architectures", "auto_map", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache",
    "_name_or_path", "initializer_range", "attention_dropout", "max_window_layers", "tie_word_embeddings",
    "sliding_window", "num_draft_layers", "id2label", "label2id", "torchscript", "pretraining_tp",
}  # fmt: skip
# and what does, with the only value under which our drafter computes the same
MUST_BE = {
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False,
    "rope_scaling": None, "is_causal": False,
}  # fmt: skip
MUST_BE_NESTED = {
    "causal": False, "is_causal": False, "attention_mode": "gqa", "projector_type": "dflash", "shift_label": False,
}  # fmt: skip
RENAMED = {"encoder.fc.weight": "fc.weight", "encoder.output_norm_enc.weight": "hidden_norm.weight"}


def torch_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """A dtype by its name in torch; `auto` as it is."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) and dtype != "auto" else dtype
    if dtype != "auto" and not isinstance(found, torch.dtype):
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
        name_or_path (`str` or `Path`): a drafter of this package, whole, as an adapter or on
            borrowed layers; or a DFlash folder of z-lab or SpecForge, recognised by its layout and
            converted in memory.
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
    path = folder / "config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    loadable = False  # by AutoModel
    if config.get("borrowed_layers"):
        drafter = from_target(target, name_or_path, revision, dtype=dtype)
    elif (folder / "adapter_config.json").is_file():
        base = AdapterBase.read(folder)
        drafter = load_drafter(
            base.name_or_path, base.revision, target=target, key="the adapter's base"
        )
        stored = drafter.dtype if dtype == "auto" else dtype
        drafter = add_adapter(drafter.float(), folder).merge_and_unload().to(stored)
    elif str(config.get("model_type")).startswith("specauf_"):
        loadable = True
        drafter, found = AutoModel.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        other_shape = {name for name, *_ in found["mismatched_keys"]}
        if odd := sorted(other_shape.union(found["missing_keys"], found["unexpected_keys"])):
            raise ValueError(
                f"{key}: the weights in {name_or_path} are not those its config asks for:"
                f" {named(odd)} missing, unknown or of another shape would be random or left out."
                " Save the drafter again with save_pretrained."
            )
    elif config:
        drafter = _foreign(folder, config, dtype)
    else:
        raise ValueError(f"{key}: {name_or_path} is no drafter's folder: it holds no config.json")
    note_origin(drafter, Origin(absolute(name_or_path), commit, loadable))
    # PEFT reads the config of what is named here
    drafter.config._name_or_path = drafter.name_or_path = str(name_or_path) if loadable else ""
    return drafter.eval()


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
    dtype = torch_dtype(dtype)
    folder, commit = fetch(folder_or_repo, revision, "folder_or_repo")
    adapter = folder if (folder / "adapter_config.json").is_file() else folder / "adapter"
    base = AdapterBase.read(adapter)
    if base.borrowed_layers is None:
        raise ValueError(
            f"{folder_or_repo} borrows no layers of a target: use"
            f" load_drafter({str(folder_or_repo)!r})"
        )
    _check_lender(target, base, folder_or_repo)
    given = json.loads((adapter / "config.json").read_text()) | {"borrowed_layers": None}
    config = config_class(given["model_type"]).from_dict(given)
    drafter = borrow(target, config, base.borrowed_layers, frozen=True)
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        saved = set(file.keys())
    redrawn = [
        name
        for name, tensor in (
            drafter.state_dict().items()
        )  # norms start as ones, everything else at random
        if not name.startswith("layers.")
        and tensor.dim() > 1
        and f"base_model.model.{name}" not in saved
    ]
    if redrawn:
        raise ValueError(
            f"weights of {folder_or_repo} are neither borrowed nor in the adapter"
            f" ({', '.join(redrawn)}) and would be random: train it again with their modules among"
            " lora_modules_to_save (modules_to_save)"
        )
    drafter = PeftModel.from_pretrained(drafter, str(adapter)).merge_and_unload()
    note_origin(drafter, Origin(absolute(folder_or_repo), commit, loadable=False))
    if dtype == "auto":
        dtype = torch.bfloat16 if target.dtype == torch.float16 else target.dtype
    return drafter.to(dtype).eval()


def _check_lender(target: PreTrainedModel, base: AdapterBase, folder_or_repo: str | Path) -> None:
    """Raise unless the target has the layers that were borrowed, and the weights around them."""
    if weights_fingerprint(borrowed_tensors(target, base.borrowed_layers)) != base.fingerprint:
        at = f" at {base.revision}" if base.revision else ""
        raise ValueError(
            f"{folder_or_repo} borrows layers {base.borrowed_layers} of {base.name_or_path}{at},"
            " and this target's layers are other weights: load that target, at that revision"
        )
    trained, found = Identity.read(base.trained_for), target_fingerprint(target)
    if trained.fingerprint and found and trained.fingerprint != found:
        raise ValueError(
            f"this target's layers {base.borrowed_layers} are those {folder_or_repo} borrows, but"
            f" other weights of it differ from {trained.name_or_path}, whose hidden states the"
            " drafter was trained on: load that target, at that revision"
        )


def named(odd: list[str]) -> str:
    """The first five of some names."""
    return ", ".join(odd[:5]) + (", ..." if len(odd) > 5 else "")


def _foreign(folder: Path, config: dict, dtype: str | torch.dtype) -> PreTrainedModel:
    """A DFlash or Domino folder of z-lab or SpecForge: same tensors, another config."""
    drafter = AutoModel.from_config(foreign_config(config, folder), dtype=torch.float32)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no .safetensors file: pickled weights are not loaded")
    given = {}
    for file in files:
        for name, tensor in load_file(file).items():
            name = RENAMED.get(name, name)
            if name in given:
                raise ValueError(
                    f"{folder} holds {name} twice (the second time in {file.name}), maybe under an"
                    " older name: nothing says which one is meant. Remove the other"
                )
            given[name] = tensor
    ours = drafter.state_dict()
    odd = sorted(set(ours) ^ set(given)) or sorted(
        n for n in ours if ours[n].shape != given[n].shape
    )
    if odd:
        raise ValueError(
            f"{folder} is not a plain DFlash drafter: {len(odd)} tensors are unknown, missing or of"
            f" another shape than its config says ({named(odd)}). Leaving them out would change"
            " what it drafts."
        )
    if dtype == "auto":
        stored = reduce(torch.promote_types, (tensor.dtype for tensor in given.values()))
        dtype = torch.float32 if stored == torch.float16 else stored  # fp16 drafters accept nothing
    drafter.to(dtype).load_state_dict(given)
    return drafter


def foreign_config(config: dict, folder: str | Path = "config.json") -> DFlashConfig:
    """Our config (Domino's where its head is named) from one of z-lab or SpecForge, with nothing
    taken for granted.

    Raises:
        ValueError: a key is missing, contradicts itself, or asks for a computation that a DFlash
            drafter has not.
    """
    nested, head = (config.get(f"{name}_config") or {} for name in ("dflash", "domino"))
    kind, _ = DRAFTERS.get(nested.get("projector_type"), DRAFTERS["dflash"])
    # only drafters with a key for the alignment of labels have a choice of it
    found = {} if "shift_label" in kind.own_keys else {"shift_label": False}
    keys = set(kind.required_keys) - {"rope_parameters", *found}
    must_be_nested = MUST_BE_NESTED | {"projector_type": kind.kind}
    for name in sorted(keys):
        values = [part[name] for part in (config, nested, head) if part.get(name) is not None]
        if not values:
            raise ValueError(
                f"{folder} says nothing about {name}, which decides what a DFlash drafter computes"
                " and is never guessed: it is not a DFlash drafter of z-lab or SpecForge, or its"
                " config.json was cut"
            )
        if other := [value for value in values if value != values[0]]:
            raise ValueError(
                f"{folder} gives {name} twice, as {values[0]!r} and {other[0]!r}: correct"
                " config.json"
            )
        found[name] = values[0]
    rope = config.get("rope_parameters") or {"rope_type": "default"}
    thetas = [part["rope_theta"] for part in (config, rope) if part.get("rope_theta") is not None]
    if not thetas:
        raise ValueError(f"{folder} says nothing about rope_theta, which is never guessed")
    if thetas[0] != thetas[-1]:
        raise ValueError(
            f"{folder} gives rope_theta twice, as {thetas[0]!r} and {thetas[-1]!r}: correct"
            " config.json"
        )
    special = {key: config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    layers = config.get("layer_types")
    known = keys | IGNORED | set(special) | {"dflash_config", "domino_config"}
    known |= {"rope_parameters", "rope_theta", "layer_types"}
    places = (("", config, known, MUST_BE), ("dflash_config.", nested, keys, must_be_nested),
              ("domino_config.", head, keys, must_be_nested))  # fmt: skip
    odd = [
        place + key
        for place, part, read, must_be in places
        for key, value in sorted(part.items())
        if key not in read and (key not in must_be or value not in (None, must_be[key]))
    ]
    if odd:
        raise ValueError(
            f"{folder} asks for what a DFlash drafter of this package does not compute, or nobody"
            f" here knows: {', '.join(odd)}. Converted without it, the drafter would silently"
            " accept little."
        )
    return kind(
        **found, rope_parameters=rope | {"rope_theta": thetas[0]}, layer_types=layers, **special
    )
