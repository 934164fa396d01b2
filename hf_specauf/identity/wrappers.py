"""The model inside whatever was put around it: by PEFT, torch.compile, accelerate or torch's
parallel wrappers."""

import copy
import re
from collections.abc import Iterator

import torch
from accelerate.utils import extract_model_from_parallel, is_compiled_module
from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

# Each is PEFT's, and no class of the two is the other's.
OF_PEFT = (PeftModel, PeftMixedModel)


def unwrapped(model: nn.Module) -> PreTrainedModel | PeftModel | PeftMixedModel:
    """What can generate: the transformers model, inside PEFT's wrapper if it has one, and no other.

    `torch.compile`, DDP, DataParallel, FSDP and DeepSpeed put something around a model that has no
    `generate` or config of its own, or hands out that of the model inside.
    """
    # A model whose layers alone are compiled is one of transformers still.
    while isinstance(model, nn.Module) and not isinstance(model, (PreTrainedModel, *OF_PEFT)):
        inner = extract_model_from_parallel(model, keep_torch_compile=False)
        if inner is model:
            break
        model = inner
    return model


def wrappers_of_peft(model: nn.Module) -> Iterator[PeftModel | PeftMixedModel]:
    """PEFT's wrappers around a model, from the outside in."""
    model = unwrapped(model)
    while isinstance(model, OF_PEFT):
        yield model
        model = unwrapped(_inside(model))


def innermost(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside any wrappers, or the model itself.

    Raises:
        TypeError: it is none, and none of the wrappers that are known is around one.
    """
    found = unwrapped(model)
    for wrapper in wrappers_of_peft(model):
        found = unwrapped(_inside(wrapper))
    if not isinstance(found, PreTrainedModel):
        raise TypeError(_no_model(found))
    return found


def _inside(wrapper: PeftModel | PeftMixedModel) -> nn.Module:
    if isinstance(wrapper, PeftMixedModel):
        return wrapper.base_model.model
    return wrapper.get_base_model()


def _no_model(found: object) -> str:
    """The words of an error about what is no model, with the way to one that is inside."""
    kind = type(found).__name__
    if isinstance(found, nn.Module):
        for name, module in found.named_modules():
            if isinstance(module, (PreTrainedModel, *OF_PEFT)):
                return (
                    f"{kind} is no model of transformers, and what it does around the"
                    f" {type(module).__name__} inside is not known here: give that one (.{name})"
                )
    return f"{kind} is no model of transformers: load one with AutoModelForCausalLM.from_pretrained"


def as_called(model: nn.Module) -> nn.Module:
    """What to call for a forward pass: the compiled form where a model was given compiled, else the
    model itself.

    Around a drafter DDP would talk to the other processes in each pass, and is left out.
    """
    inner = model
    while not isinstance(inner, PreTrainedModel):
        if is_compiled_module(inner):
            return inner
        if isinstance(inner, OF_PEFT):
            inner = _inside(inner)
            continue
        outer, inner = inner, extract_model_from_parallel(inner)
        if inner is outer:
            break
    return inner


# ---- weights, as they would be without wrappers

ADAPTED = (BaseTunerLayer, AuxiliaryTrainingWrapper)
# What torch.compile, FSDP and activation checkpointing put into the names of weights.
INSERTED = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def plain_name(name: str) -> str:
    """A weight's name as it is without wrappers inside the model."""
    return INSERTED.sub("", name)


def plain_parameters(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights that a model computes with, by their plain names: PEFT's active adapters are
    merged into copies, one layer at a time.

    So a model, that model with an adapter that does nothing, and one with an adapter merged are
    each the model that they compute. Nothing of the model is changed.
    """
    adapted: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in adapted)
        if isinstance(module, ADAPTED) and not inside:
            adapted[name] = module
    # Of weights that are tied, only the first is named.
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    done = set()
    for name, parameter in model.named_parameters():
        outer = next((outer for outer in adapted if name.startswith(f"{outer}.")), None)
        if outer is None:
            yield plain_name(name), parameter.detach()
        elif outer not in done:
            done.add(outer)
            try:
                plain = _merged(adapted[outer])
            except NotImplementedError:
                # An activated LoRA acts from a token on, so that no weights are those of the model.
                # It is told by its own.
                for inner, own in adapted[outer].named_parameters():
                    yield plain_name(f"{outer}.{inner}"), own.detach()
                continue
            base = dict(_base_of(adapted[outer]).named_parameters())
            for inner, merged in plain.named_parameters():
                # A head that is tied to the embedding has no name of its own, unless an adapter
                # makes it another one.
                tied = not names[id(base[inner])].startswith(f"{outer}.")
                if not tied or not torch.equal(merged, base[inner]):
                    yield plain_name(f"{outer}.{inner}"), merged.detach()


def _base_of(layer: nn.Module) -> nn.Module:
    if isinstance(layer, BaseTunerLayer):
        return layer.get_base_layer()
    return layer.original_module


@torch.no_grad()
def _merged(layer: nn.Module) -> nn.Module:
    """A copy of what an adapted layer computes, made as PEFT merges whole models."""
    layer = copy.deepcopy(layer)
    if layer.disable_adapters:
        if isinstance(layer, BaseTunerLayer) and layer.merged:
            layer.unmerge()
        return _base_of(layer)
    # Some kinds of adapters have a way of their own.
    if hasattr(layer, "unload_and_optionally_merge_module"):
        return layer.unload_and_optionally_merge_module(
            merge=True, safe_merge=False, adapter_names=None
        )
    # PEFT warns where everything is merged already.
    if not set(layer.active_adapters) <= set(layer.merged_adapters):
        layer.merge()
    return layer.get_base_layer()
