"""z-lab's layout, which serving engines read too: DFlash's tensors under our names, and a
`config.json` like Qwen3's with DFlash's own keys in `dflash_config`.

The config is read key by key, and nothing in it is taken for granted. A key that was guessed or
passed over gives a drafter that loads, decodes, and silently accepts little.
"""

from functools import reduce
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModel, PreTrainedModel

from ..drafters.configuration_dflash import DFlashConfig
from .folders import named

# What other trainers write into config.json that says nothing about the computation
IGNORED = {
    "architectures", "auto_map", "model_type", "torch_dtype", "dtype", "transformers_version",
    "use_cache", "_name_or_path", "initializer_range", "attention_dropout", "max_window_layers",
    "tie_word_embeddings", "sliding_window", "num_draft_layers", "id2label", "label2id",
    "torchscript", "pretraining_tp",
}  # fmt: skip
# and what does, with the only value under which our drafter computes the same
MUST_BE = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "rope_scaling": None,
    "is_causal": False,
}
MUST_BE_NESTED = {
    "causal": False,
    "is_causal": False,
    "attention_mode": "gqa",
    "shift_label": False,
}
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# transformers' own DFlash drafter gives two tensors other names
RENAMED = {"encoder.fc.weight": "fc.weight", "encoder.output_norm_enc.weight": "hidden_norm.weight"}


def recognises(folder: Path, config: dict) -> bool:
    """Whether the config says anything that only a block drafter's says."""
    return "dflash_config" in config or "block_size" in config


def read(folder: Path, config: dict, dtype: str | torch.dtype) -> PreTrainedModel:
    """The plain DFlash drafter in such a folder."""
    return read_tensors(folder, our_config(config, folder), dtype)


def our_config(
    config: dict, folder: str | Path = "config.json", kind: type[DFlashConfig] = DFlashConfig
) -> DFlashConfig:
    """Our config from one in this layout.

    Args:
        config (`dict`): the content of `config.json`.
        folder (`str` or `Path`, *optional*): what errors call it.
        kind (`type`, *optional*): the config class of the drafter that it describes.

    Raises:
        ValueError: a key is missing, contradicts itself, or asks for a computation that a drafter
            of this kind has not.
    """
    nested = config.get("dflash_config") or {}
    head = config.get("domino_config") or {}
    # rope_theta has two places of its own, and is read below
    keys = set(kind.required_keys) - {"rope_parameters"}
    found = {}
    # Only drafters with a key for the alignment of labels have a choice of it.
    if "shift_label" not in kind.own_keys:
        keys -= {"shift_label"}
        found["shift_label"] = False
    for key in sorted(keys):
        found[key] = the_one_value(key, (config, nested, head), folder)
    rope = config.get("rope_parameters") or {"rope_type": "default"}
    rope = rope | {"rope_theta": the_one_value("rope_theta", (config, rope), folder)}
    refuse_unknown_keys(config, keys, kind, folder)
    special = {key: config.get(key) for key in SPECIAL_TOKENS}
    return kind(**found, rope_parameters=rope, layer_types=config.get("layer_types"), **special)


def the_one_value(key: str, parts: tuple[dict, ...], folder: str | Path):
    """The value of a key that may stand in any of several mappings.

    Raises:
        ValueError: it stands in none of them, or with two values.
    """
    values = [part[key] for part in parts if part.get(key) is not None]
    if not values:
        raise ValueError(
            f"{folder} says nothing about {key}, which decides what a DFlash drafter computes"
            " and is never guessed: it is not a DFlash drafter of z-lab or SpecForge, or its"
            f" config.json was cut. Where you know it, write {key} into config.json"
        )
    for value in values:
        if value != values[0]:
            raise ValueError(
                f"{folder} gives {key} twice, as {values[0]!r} and {value!r}: correct config.json"
            )
    return values[0]


def refuse_unknown_keys(
    config: dict, keys: set[str], kind: type[DFlashConfig], folder: str | Path
) -> None:
    """Raise where the config holds a key that we neither read nor may ignore."""
    read_here = keys | IGNORED | {*SPECIAL_TOKENS, "dflash_config", "domino_config"}
    read_here |= {"rope_parameters", "rope_theta", "layer_types"}
    must_be_nested = MUST_BE_NESTED | {"projector_type": kind.kind}
    odd = unread("", config, read_here, MUST_BE)
    for place in ("dflash_config", "domino_config"):
        odd += unread(f"{place}.", config.get(place) or {}, keys, must_be_nested)
    if odd:
        raise ValueError(
            f"{folder} asks for what a DFlash drafter of this package does not compute, or nobody"
            f" here knows: {', '.join(odd)}. Converted without it, the drafter would silently"
            " accept little. Serve it by the engine that it was made for; where you know that a"
            " key says nothing of what is computed, remove it from config.json."
        )


def unread(place: str, part: dict, keys: set[str], must_be: dict) -> list[str]:
    """Keys of a mapping, sorted, that are not among `keys` and have not the one value they must."""
    found = []
    for key, value in sorted(part.items()):
        as_computed = key in must_be and value in (None, must_be[key])
        if key not in keys and not as_computed:
            found.append(place + key)
    return found


def read_tensors(folder: Path, config: DFlashConfig, dtype: str | torch.dtype) -> PreTrainedModel:
    """A drafter of our config with a folder's tensors, every one of them and no other.

    Raises:
        ValueError: tensors are unknown, missing, given twice, of another shape, or pickled.
    """
    drafter = AutoModel.from_config(config, dtype=torch.float32)
    given = stored_tensors(folder)
    ours = drafter.state_dict()
    odd = sorted(set(ours) ^ set(given))
    if not odd:
        odd = sorted(name for name in ours if ours[name].shape != given[name].shape)
    if odd:
        raise ValueError(
            f"{folder} is not a plain DFlash drafter: {len(odd)} tensors are unknown, missing or of"
            f" another shape than its config says ({named(odd)}). Leaving them out would change"
            " what it drafts. Fetch the folder again, in case a file is missing; else serve it by"
            " the engine that it was made for."
        )
    if dtype == "auto":
        dtype = reduce(torch.promote_types, (tensor.dtype for tensor in given.values()))
        # drafters accept nothing in fp16
        if dtype == torch.float16:
            dtype = torch.float32
    drafter.to(dtype).load_state_dict(given)
    return drafter


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder's safetensors files, under our names."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{folder} holds no .safetensors file: pickled weights are not loaded, since that"
            " runs code. Where you trust them, save them once more by safetensors.torch.save_file"
        )
    found = {}
    for file in files:
        for name, tensor in load_file(file).items():
            name = RENAMED.get(name, name)
            if name in found:
                raise ValueError(
                    f"{folder} holds {name} twice (the second time in {file.name}), maybe under an"
                    " older name: nothing says which one is meant. Remove the other"
                )
            found[name] = tensor
    return found
