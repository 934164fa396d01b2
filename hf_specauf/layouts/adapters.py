"""LoRA drafters: an adapter on a released drafter, or on layers borrowed from the target itself.

No released tool trains LoRA on block drafters. *Adapt*: the base is a drafter, the adapter is
megabytes. *Borrow*: the base is a choice of the target's own layers, frozen; LoRA, `fc` and the
norms are trained. Either way an adapter's folder says in `base.json` what it was trained on, down
to a fingerprint of the weights, and anything else is refused.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from accelerate.utils.modeling import get_state_dict_offloaded_model, has_offloaded_params
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from torch import nn
from transformers import AutoModel, PreTrainedModel

from ..drafters.configuration_dflash import DFlashConfig
from ..identity import Identity, Origin, innermost, origin_of, unwrapped, weights_fingerprint
from ..identity.wrappers import ADAPTED, plain_name, plain_parameters
from ..records import write_record
from ..target import decoder_layers
from .folders import absolute, fetch, named

BASE_FILE = "base.json"
# What a drafter's config says of how its target is prompted and stopped
PROMPT_KEYS = ("chat_template_kwargs", "bos_token_id", "eos_token_id", "pad_token_id")


@dataclass
class AdapterBase:
    """What an adapter was trained on."""

    name_or_path: str  # of the drafter, or of the target whose layers are borrowed
    revision: str | None  # commit
    fingerprint: str  # of the base's weights
    borrowed_layers: list[int] | None = None  # target layers; `None` for an adapter on a drafter
    # whether AutoModel loads `name_or_path` as the base: it does not for other layouts than ours
    loadable: bool = True
    # The adapter's own target, which need not be its base's: an identity under `target`, and
    # `PROMPT_KEYS`.
    trained_for: dict | None = None

    @classmethod
    def of_drafter(cls, drafter: PreTrainedModel) -> "AdapterBase":
        """A drafter under the name it was loaded by, and if `load_drafter` loaded it, its
        commit."""
        name = absolute(drafter.config._name_or_path)
        origin = origin_of(drafter) or Origin(name, None, loadable=bool(name))
        return cls(**origin._asdict(), fingerprint=weights_fingerprint(drafter.state_dict()))

    @classmethod
    def of_layers(cls, target: PreTrainedModel, layer_ids: list[int]) -> "AdapterBase":
        """Layers of a target, with its commit if `load_target` loaded it."""
        target = innermost(target)
        origin = origin_of(target)
        return cls(
            absolute(target.config._name_or_path),
            origin.revision if origin else None,
            weights_fingerprint(borrowed_tensors(target, layer_ids)),
            list(layer_ids),
        )

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
    found = {}
    for slot, index in enumerate(layer_ids):
        for name, tensor in layer_tensors(layers[index]).items():
            found[f"layers.{slot}.{name}"] = tensor
    codes = [f"{name} is {t.dtype}" for name, t in found.items() if not t.is_floating_point()]
    # fp8 codes are floating point numbers too, and only transformers' mark tells them from weights
    if getattr(target, "is_quantized", False):
        codes.append("is_quantized")
    if codes:
        raise ValueError(
            f"the layers of this target are quantised ({codes[0]}): their codes mean nothing"
            " without their scales, so they cannot be borrowed. Load the target without"
            " quantisation (leave out target_quantization), or leave out init_from_target_layers."
        )
    return found


def layer_tensors(layer: nn.Module) -> dict[str, torch.Tensor]:
    """A target layer's weights by their plain names, with what a LoRA on the target does to it."""
    if any(isinstance(module, ADAPTED) for module in layer.modules()):
        return dict(plain_parameters(layer))
    if any(has_offloaded_params(module) for module in layer.modules()):
        # accelerate reads them from where they lie
        return get_state_dict_offloaded_model(layer)
    # With buffers, in which some kinds of quantisation keep their codes.
    return {plain_name(name): tensor for name, tensor in layer.state_dict().items()}


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
    state = drafter.state_dict()
    ours = {name: tensor for name, tensor in state.items() if name.startswith("layers.")}
    same = [name for name in ours if name in theirs and theirs[name].shape == ours[name].shape]
    # The activation is no tensor: shapes alone would take a GELU model's layers for Qwen3's.
    gated = getattr(target.config.get_text_config(decoder=True), "hidden_act", None) == "silu"
    exact = gated and len(same) == len(ours) == len(theirs)
    kind = type(decoder_layers(target)[0]).__name__
    if frozen and not exact:
        unfit = set(ours) ^ set(theirs)
        if not unfit:
            unfit = set(ours) - set(same)
        words = named(sorted(unfit)) if unfit else "another activation than SiLU"
        raise ValueError(
            f"{kind} does not fit a drafter's layer ({words}): frozen borrowing needs"
            " per-head q/k norms, a gated SiLU MLP and no biases, as Qwen3 has. Leave out"
            " use_peft: the layers are then an initialisation for full training."
        )
    if not exact:
        # a norm alone among other norms means something else (Gemma stores weight - 1)
        same = [name for name in same if name.endswith("_proj.weight")]
    if not same:
        raise ValueError(
            f"nothing of {kind} fits a drafter's layer: remove init_from_target_layers"
        )
    # without `layers.{i}.`, so that each is named once
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
    # Both are what AutoModel and PEFT load as the base, unasked.
    if base.borrowed_layers is None and base.loadable:
        adapter.base_model_name_or_path = base.name_or_path
        adapter.revision = base.revision
    else:
        adapter.base_model_name_or_path = None
        adapter.revision = None
    adapter.inference_mode = True
    adapter.save_pretrained(str(folder))
    trained_for = {"target": Identity.of_target_of(config).record()}
    for key in PROMPT_KEYS:
        trained_for[key] = getattr(config, key)
    replace(base, trained_for=trained_for).write(folder)
    # No drafter elsewhere has the shape of one on borrowed layers.
    if base.borrowed_layers is not None:
        shape = json.loads(config.to_json_string()) | {"borrowed_layers": base.borrowed_layers}
        write_record(folder / "config.json", shape)
    # PEFT's boilerplate
    (folder / "README.md").unlink(missing_ok=True)


def plain_state(drafter: PreTrainedModel | PeftModel) -> dict[str, torch.Tensor]:
    """A drafter's own weights, whatever adapters are on it."""
    if not isinstance(drafter, PeftModel):
        return drafter.state_dict()
    found = {}
    for name, tensor in drafter.get_base_model().state_dict().items():
        # PEFT wraps what it adapts, and keeps its own weights beside
        if "lora_" in name or ".modules_to_save." in name:
            continue
        plain = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        found[plain] = tensor
    return found


def check_beside(
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
    differing = differing_targets(base.trained_for or {}, innermost(drafter).config)
    if differing:
        key, (value, other) = next(iter(differing.items()))
        raise ValueError(
            f"the adapter in {folder_or_repo} was trained for another target or another prompt than"
            f" those already on this drafter ({key} {value!r}, theirs is {other!r}), and a"
            f" drafter's config names one. {instead}"
        )
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        in_full, by_lora = adapted_modules(file.keys())
    for other in drafter.peft_config:
        state = get_peft_model_state_dict(drafter, adapter_name=other, save_embedding_layers=False)
        their_full, their_lora = adapted_modules(state)
        both = sorted((in_full & their_lora) | (by_lora & their_full))
        if both:
            names = ", ".join(name.removeprefix("base_model.model.") for name in both)
            raise ValueError(
                f"of the adapter in {folder_or_repo} and {other!r}, one adapts {names} in full and"
                f" the other by LoRA, and PEFT would drop or mix their weights. {instead}"
            )


def differing_targets(trained_for: dict, config: DFlashConfig) -> dict[str, tuple]:
    """What differs between the target and prompt an adapter was trained for and those that a
    drafter's config names, as (the adapter's, the drafter's) by key."""
    ours = Identity.read(trained_for)
    theirs = Identity.of_target_of(config)
    found = ours.differences(theirs)
    # the same weights, whatever they are called
    if ours.fingerprint and theirs.fingerprint and "fingerprint" not in found:
        found.pop("name_or_path", None)
        found.pop("revision", None)
    for key in PROMPT_KEYS:
        if key in trained_for and trained_for[key] != getattr(config, key):
            found[key] = trained_for[key], getattr(config, key)
    return found


def adapted_modules(names: Iterable[str]) -> tuple[set[str], set[str]]:
    """The modules that an adapter's tensors adapt in full, and those it adapts by LoRA."""
    in_full, by_lora = set(), set()
    for name in names:
        module, lora, _ = name.partition(".lora_")
        if lora:
            by_lora.add(module)
        else:
            in_full.add(name.rpartition(".")[0])
    return in_full, by_lora


def add_adapter(
    drafter: PreTrainedModel | PeftModel,
    folder_or_repo: str | Path,
    adapter_name: str = "default",
    revision: str | None = None,
) -> PeftModel:
    """Put an adapter on the drafter it was trained on.

    Several on one base are switched by `set_adapter(name)` between `generate` calls, and left out
    inside `with drafter.disable_adapter():`. The target is never touched.

    Args:
        drafter (`PreTrainedModel` or `PeftModel`): the base, or the base with other adapters for
            the same target already on it. Its config then names that target.
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
    # by the weights and not by the name, because a base may move, and a branch goes on
    drafter = unwrapped(drafter)
    if weights_fingerprint(plain_state(drafter)) != base.fingerprint:
        at = f" at {base.revision}" if base.revision else ""
        raise ValueError(
            f"the adapter in {folder_or_repo} was trained on {base.name_or_path}{at}, and this"
            " drafter has other weights: its drafts would be worthless. Load that base, at that"
            " revision."
        )
    if isinstance(drafter, PeftModel):
        check_beside(drafter, folder, base, folder_or_repo, adapter_name)
        drafter.load_adapter(str(folder), adapter_name)
        # PEFT loads a second adapter without using it
        drafter.set_adapter(adapter_name)
    else:
        drafter = PeftModel.from_pretrained(drafter, str(folder), adapter_name=adapter_name).eval()
    # the base's config names the base's target, and the adapter may be for a fine-tune of that
    if base.trained_for is not None:
        config = innermost(drafter).config
        Identity.read(base.trained_for).write_into(config)
        for key in PROMPT_KEYS:
            setattr(config, key, base.trained_for.get(key))
    return drafter
