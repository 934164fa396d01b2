"""LoRA drafters: an adapter on a released drafter, or on layers borrowed from the target itself.

No released tool trains LoRA on block drafters. *Adapt*: the base is a drafter, the adapter is
megabytes. *Borrow*: the base is a choice of the target's own layers, frozen; LoRA, `fc` and the
norms are trained. Either way an adapter's folder says in `base.json` what it was trained on, down
to a fingerprint of the weights, and anything else is refused.
"""

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoModel, PreTrainedModel

from ..drafters.configuration_dflash import DFlashConfig
from ..identity import Identity, Origin, innermost, origin_of, weights_fingerprint
from ..records import HUB_ID, write_record
from ..target import decoder_layers

BASE_FILE = "base.json"
# What a drafter's config says of how its target is prompted and stopped
PROMPT_KEYS = ("chat_template_kwargs", "bos_token_id", "eos_token_id", "pad_token_id")


def fetch(
    name_or_path: str | Path, revision: str | None = None, key: str = "name_or_path"
) -> tuple[Path, str | None]:
    """A drafter's folder and, from the Hub, its commit; errors name the `key` that asked. No
    pickles, no code.

    Raises:
        OSError: there is no such folder, and no Hub id can be read in it.
    """
    if Path(name_or_path).is_dir():
        if revision is not None:
            raise ValueError(
                f"{key}: {name_or_path} is a folder, which has no revision {revision!r}: leave"
                " it out"
            )
        return Path(name_or_path), None
    if not HUB_ID.fullmatch(str(name_or_path)):
        raise OSError(f"{key}: {str(name_or_path)!r} is neither a folder nor a Hub id (OWNER/NAME)")
    folder = Path(
        snapshot_download(
            str(name_or_path), revision=revision, allow_patterns=["*.json", "*.safetensors"]
        )
    )
    return folder, folder.name


def absolute(name_or_path: str | Path) -> str:
    """A folder by its absolute path, as from elsewhere `out/base` is taken for a Hub id; other
    names as they are."""
    return os.path.abspath(name_or_path) if os.path.isdir(name_or_path) else str(name_or_path)


@dataclass
class AdapterBase:
    """What an adapter was trained on."""

    name_or_path: str  # of the drafter, or of the target whose layers are borrowed
    revision: str | None  # commit
    fingerprint: str  # of the base's weights
    borrowed_layers: list[int] | None = None  # target layers; `None` for an adapter on a drafter
    loadable: bool = (
        True  # whether AutoModel loads `name_or_path` as the base: not so for other layouts
    )
    # of an adapter, its own target, which need not be its base's: an identity under `target`, and
    # `PROMPT_KEYS`
    trained_for: dict | None = None

    @classmethod
    def of_drafter(cls, drafter: PreTrainedModel) -> "AdapterBase":
        """A drafter under the name, and if `load_drafter` loaded it at the commit, that it was
        loaded by."""
        name = absolute(drafter.config._name_or_path)
        origin = origin_of(drafter) or Origin(name, None, loadable=bool(name))
        return cls(**origin._asdict(), fingerprint=weights_fingerprint(drafter.state_dict()))

    @classmethod
    def of_layers(cls, target: PreTrainedModel, layer_ids: list[int]) -> "AdapterBase":
        """Layers of a target, with its commit if `load_target` loaded it."""
        target = innermost(target)
        name, origin = absolute(target.config._name_or_path), origin_of(target)
        found = weights_fingerprint(borrowed_tensors(target, layer_ids))
        return cls(name, origin and origin.revision, found, list(layer_ids))

    def write(self, folder: str | Path) -> None:
        """Write `base.json` into an adapter's folder."""
        write_record(Path(folder, BASE_FILE), asdict(self))

    @classmethod
    def read(cls, folder: str | Path) -> "AdapterBase":
        """Read an adapter's `base.json`.

        Raises:
            ValueError: there is none, so nothing says what the adapter belongs to.
        """
        path = Path(folder, BASE_FILE)
        if not path.is_file():
            raise ValueError(
                f"{folder} holds an adapter without {BASE_FILE}, so its base cannot be checked: it"
                " was not made by this package. Load it on its base with"
                " peft.PeftModel.from_pretrained, and save the merged drafter."
            )
        return cls(**json.loads(path.read_text()))


def borrowed_tensors(target: PreTrainedModel, layer_ids: list[int]) -> dict[str, torch.Tensor]:
    """The target's weights of some layers under the names they would have in a drafter:
    `layers.{i}. ...`.

    Raises:
        ValueError: there are no such layers, or they hold codes instead of weights.
    """
    layers = decoder_layers(target)
    wrong = [i for i in layer_ids if not 0 <= i < len(layers)]
    if wrong or not layer_ids:
        raise ValueError(
            f"init_from_target_layers is {layer_ids}: give layers of the target, each in"
            f" 0..{len(layers) - 1}"
        )
    found = {
        f"layers.{slot}.{name}": tensor
        for slot, index in enumerate(layer_ids)
        for name, tensor in layers[index].state_dict().items()
    }
    codes = [
        f"{name} is {tensor.dtype}"
        for name, tensor in found.items()
        if not tensor.is_floating_point()
    ]
    if codes or getattr(target, "is_quantized", False):
        raise ValueError(
            f"the layers of this target are quantised ({(codes or ['is_quantized'])[0]}): their"
            " codes mean nothing without their scales, so they cannot be borrowed. Load the target"
            " without quantisation (leave out target_quantization), or leave out"
            " init_from_target_layers."
        )
    return found


def borrow(
    target: PreTrainedModel, config: DFlashConfig, layer_ids: list[int], *, frozen: bool
) -> PreTrainedModel:
    """A drafter whose layers start as the target's own.

    Args:
        target (`PreTrainedModel`): whose layers are copied; unchanged.
        config (`DFlashConfig`): with as many layers as `layer_ids`.
        layer_ids (`list[int]`): target layers, in the drafter's order.
        frozen (`bool`): the layers will stay as they are (LoRA), so each tensor must fit: per-head
            q/k norms, gated SiLU, no biases, as in Qwen3. Otherwise it is an initialisation, and
            what does not fit starts afresh.

    Raises:
        ValueError: the layers do not fit, or nothing of them does.
    """
    target = innermost(target)
    drafter = AutoModel.from_config(config, dtype=torch.float32)
    theirs = borrowed_tensors(target, layer_ids)
    ours = {
        name: tensor for name, tensor in drafter.state_dict().items() if name.startswith("layers.")
    }
    same = [name for name in ours if name in theirs and theirs[name].shape == ours[name].shape]
    gated = getattr(target.config.get_text_config(decoder=True), "hidden_act", None) == "silu"
    exact = gated and len(same) == len(ours) == len(theirs)
    kind = type(decoder_layers(target)[0]).__name__
    if frozen and not exact:
        odd = (
            sorted(set(ours) ^ set(theirs))
            or sorted(set(ours) - set(same))
            or ["another activation than SiLU"]
        )
        raise ValueError(
            f"{kind} does not fit a drafter's layer"
            f" ({', '.join(odd[:4])}{', ...' if len(odd) > 4 else ''}): frozen borrowing needs"
            " per-head q/k norms, a gated SiLU MLP and no biases, as Qwen3 has. Leave out"
            " use_peft: the layers are then an initialisation for full training."
        )
    if not exact:  # a norm alone among other norms means something else (Gemma stores weight - 1)
        same = [name for name in same if name.endswith("_proj.weight")]
    if not same:
        raise ValueError(
            f"nothing of {kind} fits a drafter's layer: remove init_from_target_layers"
        )
    new = sorted({name.split(".", 2)[2] for name in set(ours) - set(same)})
    if new:
        print(
            f"init_from_target_layers {layer_ids}: copied {len(same)} tensors of {kind}; new in"
            f" each layer: {new}"
        )
    drafter.load_state_dict({name: theirs[name].float() for name in same}, strict=False)
    return drafter


def finish_adapter(folder: str | Path, base: AdapterBase, config: DFlashConfig) -> None:
    """Make what PEFT saved into a folder that says what it belongs to, and attaches to nothing
    else.

    An adapter whose recorded base is the target would attach itself to the *target* when loaded by
    `AutoModel`.

    Args:
        folder (`str` or `Path`): where PEFT saved the adapter.
        base (`AdapterBase`): what it was trained on.
        config (`DFlashConfig`): of the drafter that base and adapter make; names the target it was
            trained for.
    """
    folder = Path(folder)
    adapter = PeftConfig.from_pretrained(str(folder))
    adapter.base_model_name_or_path = (
        base.name_or_path if base.borrowed_layers is None and base.loadable else None
    )
    adapter.revision = base.revision if adapter.base_model_name_or_path else None
    adapter.inference_mode = True
    adapter.save_pretrained(str(folder))
    prompts = {key: getattr(config, key) for key in PROMPT_KEYS}
    replace(base, trained_for={"target": Identity.of_target_of(config).record()} | prompts).write(
        folder
    )
    if base.borrowed_layers is not None:  # there is no drafter elsewhere that has the shape
        shape = json.loads(config.to_json_string()) | {"borrowed_layers": base.borrowed_layers}
        write_record(folder / "config.json", shape)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's boilerplate


def plain_state(drafter: PreTrainedModel | PeftModel) -> dict[str, torch.Tensor]:
    """A drafter's own weights, whatever adapters are on it."""
    if not isinstance(drafter, PeftModel):
        return drafter.state_dict()
    state = drafter.get_base_model().state_dict()
    return {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): tensor
        for name, tensor in state.items()
        if "lora_" not in name and ".modules_to_save." not in name
    }


def _check_beside(
    drafter: PeftModel,
    folder: Path,
    base: AdapterBase,
    folder_or_repo: str | Path,
    adapter_name: str,
) -> None:
    """Raise unless an adapter can be added to those already on a drafter, and each act alone when
    it is active."""
    if adapter_name in drafter.peft_config:
        raise ValueError(
            f"adapter_name is {adapter_name!r}, and so is that of an adapter already on this"
            " drafter, over which PEFT would write: give another name"
        )
    instead = "Merge one of them (load_drafter loads an adapter merged), or use two drafters."
    config, trained_for = innermost(drafter).config, base.trained_for or {}
    ours, theirs = Identity.read(trained_for), Identity.of_target_of(config)
    differing = ours.differences(theirs)
    if (
        ours.fingerprint and ours.fingerprint == theirs.fingerprint
    ):  # the same weights, whatever they are called
        differing = {
            key: pair for key, pair in differing.items() if key not in ("name_or_path", "revision")
        }
    for key in PROMPT_KEYS:
        if key in trained_for and trained_for[key] != getattr(config, key):
            differing[key] = trained_for[key], getattr(config, key)
    if differing:
        key, (value, other) = next(iter(differing.items()))
        raise ValueError(
            f"the adapter in {folder_or_repo} was trained for another target or another prompt than"
            f" those already on this drafter ({key} {value!r}, theirs is {other!r}), and a"
            f" drafter's config names one. {instead}"
        )

    def modules(names) -> tuple[set[str], set[str]]:  # in full, by LoRA
        lora = {name for name in names if ".lora_" in name}
        return {name.rpartition(".")[0] for name in {*names} - lora}, {
            name.split(".lora_")[0] for name in lora
        }

    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        full, lora = modules(file.keys())
    for other in drafter.peft_config:
        state = get_peft_model_state_dict(drafter, adapter_name=other, save_embedding_layers=False)
        their_full, their_lora = modules(state)
        if both := sorted((full & their_lora) | (lora & their_full)):
            names = ", ".join(name.removeprefix("base_model.model.") for name in both)
            raise ValueError(
                f"of the adapter in {folder_or_repo} and {other!r}, one adapts {names} in full and"
                f" the other by LoRA, and PEFT would drop or mix their weights. {instead}"
            )


def add_adapter(
    drafter: PreTrainedModel | PeftModel,
    folder_or_repo: str | Path,
    adapter_name: str = "default",
    revision: str | None = None,
) -> PeftModel:
    """Put an adapter on the drafter it was trained on; several on one base are switched by
    `set_adapter(name)` between `generate` calls, and left out inside `with
    drafter.disable_adapter():`. The target is never touched.

    Args:
        drafter (`PreTrainedModel` or `PeftModel`): the base, or the base with other adapters for
            the same target already on it. Its config then names their target.
        folder_or_repo (`str` or `Path`): of the adapter, or its Hub id.
        adapter_name (`str`, *optional*, defaults to `default`): one that no adapter on the drafter
            has.
        revision (`str`, *optional*): branch, tag or commit on the Hub.

    Raises:
        ValueError: the drafter is not the one the adapter was trained on, or the adapter cannot lie
            beside those already on it.
    """
    folder, _ = fetch(folder_or_repo, revision, "folder_or_repo")
    base = AdapterBase.read(folder)
    if base.borrowed_layers is not None:
        raise ValueError(
            f"{folder_or_repo} is an adapter on layers of a target: use from_target(target,"
            f" {str(folder_or_repo)!r})"
        )
    if weights_fingerprint(plain_state(drafter)) != base.fingerprint:
        at = f" at {base.revision}" if base.revision else ""
        raise ValueError(
            f"the adapter in {folder_or_repo} was trained on {base.name_or_path}{at}, and this"
            " drafter has other weights: its drafts would be worthless. Load that base, at that"
            " revision."
        )
    if isinstance(drafter, PeftModel):
        _check_beside(drafter, folder, base, folder_or_repo, adapter_name)
        drafter.load_adapter(str(folder), adapter_name)
        drafter.set_adapter(adapter_name)
    else:
        drafter = PeftModel.from_pretrained(drafter, str(folder), adapter_name=adapter_name).eval()
    if base.trained_for is not None:
        config = innermost(drafter).config
        Identity.read(base.trained_for).write_into(config)
        for key in PROMPT_KEYS:
            setattr(config, key, base.trained_for.get(key))
    return drafter
