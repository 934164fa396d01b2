"""Drafters from anywhere as plain drafters: our folders, adapters on them, and DFlash folders of z-lab and SpecForge.

python -m hf_specauf.convert --drafter z-lab/Qwen3-8B-DFlash-b16 --out DIR
"""

import argparse
import json
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModel, PreTrainedModel

from .drafters.configuration_dflash import DFlashConfig
from .drafters.configuration_domino import DominoConfig
from .lora import AdapterBase, add_adapter, borrow, borrowed_tensors, fetch, fingerprint
from .records import errors_in_one_line

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


def is_plain(folder: Path) -> bool:
    """Whether a folder is a whole drafter in our layout, which `AutoModel.from_pretrained` loads."""
    if (folder / "adapter_config.json").is_file() or not (folder / "config.json").is_file():
        return False
    config = json.loads((folder / "config.json").read_text())
    return str(config.get("model_type")).startswith("specauf_") and not config.get("borrowed_layers")


def load_drafter(
    name_or_path: str | Path,
    revision: str | None = None,
    *,
    target: PreTrainedModel | None = None,
    dtype: str | torch.dtype = "auto",
    key: str = "--drafter",
) -> PreTrainedModel:
    """A plain drafter from a folder or a Hub id; adapters come merged on the base they pin.

    Args:
        name_or_path (`str` or `Path`): a drafter of this package, whole, as an adapter or on borrowed layers; or a
            DFlash folder of z-lab or SpecForge, recognised by its layout and converted in memory.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        target (`PreTrainedModel`, *optional*): needed by drafters on borrowed layers.
        dtype (*optional*, defaults to `auto`): as stored.

    Raises:
        ValueError: what the folder holds instead, or what of it is ambiguous or unknown.
    """
    folder, commit = fetch(name_or_path, revision, key)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    path = folder / "config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    loadable = is_plain(folder)
    if config.get("borrowed_layers"):
        drafter = from_target(target, name_or_path, revision, dtype=dtype)
    elif (folder / "adapter_config.json").is_file():
        base = AdapterBase.read(folder)
        drafter = load_drafter(base.name_or_path, base.revision, target=target, key="the adapter's base")
        stored = drafter.dtype if dtype == "auto" else dtype
        drafter = add_adapter(drafter.float(), folder).merge_and_unload().to(stored)
    elif loadable:
        drafter = AutoModel.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    elif config:
        drafter = _foreign(folder, config, dtype)
    else:
        raise ValueError(f"{key}: {name_or_path} is no drafter's folder: it holds no config.json")
    drafter.origin = dict(name_or_path=str(name_or_path), revision=commit, loadable=loadable)
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
    """Rebuild a drafter on borrowed layers: copy them from the target, merge the adapter -> a plain drafter.

    Args:
        target (`PreTrainedModel`): the one it was trained on; unchanged, and nothing is attached to it.
        folder_or_repo (`str` or `Path`): what was published with `--small`, a checkpoint, or `adapter/` of a run.
        dtype (*optional*, defaults to `auto`): the target's, but bfloat16 for fp16, in which drafters accept nothing.

    Raises:
        ValueError: the target's layers are not the ones that were borrowed, or the adapter lacks a weight.
    """
    if target is None:
        raise ValueError(
            f"{folder_or_repo} is a drafter on layers borrowed from its target: load the target and call "
            f"hf_specauf.from_target(target, {str(folder_or_repo)!r})"
        )
    folder, _ = fetch(folder_or_repo, revision)
    adapter = folder if (folder / "adapter_config.json").is_file() else folder / "adapter"
    base = AdapterBase.read(adapter)
    if base.borrowed_layers is None:
        raise ValueError(f"{folder_or_repo} borrows no layers of a target: use load_drafter({str(folder_or_repo)!r})")
    if fingerprint(borrowed_tensors(target, base.borrowed_layers)) != base.fingerprint:
        at = f" at {base.revision}" if base.revision else ""
        raise ValueError(
            f"{folder_or_repo} borrows layers {base.borrowed_layers} of {base.name_or_path}{at}, and this target's "
            "layers are other weights: load that target, at that revision"
        )
    given = json.loads((adapter / "config.json").read_text()) | {"borrowed_layers": None}
    config = (DominoConfig if given["model_type"] == DominoConfig.model_type else DFlashConfig).from_dict(given)
    drafter = borrow(target, config, base.borrowed_layers, frozen=True)
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        saved = set(file.keys())
    redrawn = [
        name
        for name, tensor in drafter.state_dict().items()  # norms start as ones, everything else at random
        if not name.startswith("layers.") and tensor.dim() > 1 and f"base_model.model.{name}" not in saved
    ]
    if redrawn:
        raise ValueError(
            f"weights of {folder_or_repo} are neither borrowed nor in the adapter ({', '.join(redrawn)}) and would be "
            "random: train it again with their modules among lora_modules_to_save (modules_to_save)"
        )
    drafter = PeftModel.from_pretrained(drafter, str(adapter)).merge_and_unload()
    if dtype == "auto":
        dtype = torch.bfloat16 if target.dtype == torch.float16 else target.dtype
    return drafter.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype).eval()


def _foreign(folder: Path, config: dict, dtype: str | torch.dtype) -> PreTrainedModel:
    """A DFlash or Domino folder of z-lab or SpecForge: same tensors, another config."""
    drafter = AutoModel.from_config(foreign_config(config, folder), dtype=torch.float32)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no .safetensors file: pickled weights are not loaded")
    given = {RENAMED.get(name, name): tensor for file in files for name, tensor in load_file(file).items()}
    ours = drafter.state_dict()
    odd = sorted(set(ours) ^ set(given)) or sorted(n for n in ours if ours[n].shape != given[n].shape)
    if odd:
        raise ValueError(
            f"{folder} is not a plain DFlash drafter: {len(odd)} tensors are unknown, missing or of another shape "
            f"than its config says ({', '.join(odd[:5])}{', ...' if len(odd) > 5 else ''}). Leaving them out "
            "would change what it drafts."
        )
    stored = given["norm.weight"].dtype
    if dtype == "auto":
        dtype = torch.float32 if stored == torch.float16 else stored  # fp16 drafters accept nothing
    drafter.to(dtype).load_state_dict(given)
    return drafter


def foreign_config(config: dict, folder: str | Path = "config.json") -> DFlashConfig:
    """Our config (Domino's where its head is named) from one of z-lab or SpecForge, with nothing taken for granted.

    Raises:
        ValueError: a key is missing, contradicts itself, or asks for a computation that a DFlash drafter has not.
    """
    nested = dict(config.get("dflash_config") or {})
    domino = nested.get("projector_type") == "domino"
    kind = DominoConfig if domino else DFlashConfig
    keys = set(kind.required_keys) - {"rope_parameters"} - (set() if domino else {"shift_label"})
    must_be_nested = MUST_BE_NESTED | ({"projector_type": "domino"} if domino else {})
    found = {} if domino else {"shift_label": False}
    for name in sorted(keys):
        values = [part[name] for part in (config, nested) if part.get(name) is not None]
        if not values:
            raise ValueError(
                f"{folder} says nothing about {name}, which decides what a DFlash drafter computes and is never "
                "guessed: it is not a DFlash drafter of z-lab or SpecForge, or its config.json was cut"
            )
        if any(value != values[0] for value in values):
            raise ValueError(f"{folder} gives {name} twice, as {values[0]!r} and {values[1]!r}: correct config.json")
        found[name] = values[0]
    rope = config.get("rope_parameters") or {"rope_type": "default", "rope_theta": config.get("rope_theta")}
    if rope.get("rope_theta") is None:
        raise ValueError(f"{folder} says nothing about rope_theta, which is never guessed")
    special = {key: config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    layers = config.get("layer_types")
    known = keys | IGNORED | set(special) | {"dflash_config", "rope_parameters", "rope_theta", "layer_types"}
    places = (("", config, known, MUST_BE), ("dflash_config.", nested, keys, must_be_nested))
    odd = [
        place + key
        for place, part, read, must_be in places
        for key, value in sorted(part.items())
        if key not in read and (key not in must_be or value not in (None, must_be[key]))
    ]
    if odd:
        raise ValueError(
            f"{folder} asks for what a DFlash drafter of this package does not compute, or nobody here knows: "
            f"{', '.join(odd)}. Converted without it, the drafter would silently accept little."
        )
    return kind(**found, rope_parameters=rope, layer_types=layers, **special)


@errors_in_one_line()
def main(argv: list[str] | None = None) -> None:
    """Command line of `python -m hf_specauf.convert`."""
    parser = argparse.ArgumentParser(
        prog="python -m hf_specauf.convert", description="Write a drafter of another layout, or an adapter merged on "
        "its base, as a plain drafter of this package: then evaluate it, push it, or adapt it.",
    )  # fmt: skip
    parser.add_argument("--drafter", required=True, help="Hub id or folder")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--target", help="Hub id of its target, noted in config.json")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args(argv)
    drafter = load_drafter(args.drafter, args.revision)
    if args.target is not None:
        drafter.config.target_model_name_or_path = args.target
    drafter.save_pretrained(args.out)
    print(f"written: {args.out} (block size {drafter.config.block_size}, taps {drafter.config.target_layer_ids}, "
          f"mask token {drafter.config.mask_token_id})")  # fmt: skip


if __name__ == "__main__":
    main()
