"""The target's embedding, head and tapped layers, as training and decoding use them alike.

Travels to the Hub: imports torch alone.

Letters: B rows, C and Q tokens, H hidden size, V vocabulary.
"""

import threading

import torch
from torch import nn


def decoder_layers(target) -> nn.ModuleList:
    """The list of a target's decoder layers. `target` (`PreTrainedModel`): no wrapper.

    Raises:
        ValueError: it has none of the length that its config names.
    """
    depth = target.config.get_text_config(decoder=True).num_hidden_layers
    # Architectures give the list different names. Its length is what they have in common. Beside
    # the decoder a vision tower may have a list as long.
    for module in target.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ValueError(
        f"{type(target).__name__} has no list of {depth} decoder layers, as its config says, so"
        " its layers cannot be tapped: load it with AutoModelForCausalLM.from_pretrained, or take"
        " another target"
    )


class Taps:
    """Keeps what some decoder layers put out, by hooks that last as long as a `with` block, which
    is one pass: a user's own criterion may call the target between two.

    Only passes of the thread that made it are kept, so that several may decode with one target.
    transformers' own way (`output_hidden_states`) leaves hooks on every layer for good, which slow
    plain decoding down.

    Args:
        layers (`list[nn.Module]`): the tapped layers, in order.
    """

    def __init__(self, layers: list[nn.Module]):
        self.layers = layers
        self.kept: list[list[torch.Tensor]] = [[] for _ in layers]
        self.thread = threading.get_ident()
        self.handles = []

    def __enter__(self) -> "Taps":
        for layer, kept in zip(self.layers, self.kept):
            self.handles.append(layer.register_forward_hook(self._keep_in(kept)))
        return self

    def __exit__(self, *exception) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def _keep_in(self, kept: list[torch.Tensor]):
        def keep(module, args, output):
            if threading.get_ident() == self.thread:
                # Some architectures' layers return a tuple, whose first entry is the hidden states.
                kept.append(output[0] if isinstance(output, tuple) else output)

        return keep

    def take(self) -> list[torch.Tensor]:
        """Of each layer what it put out since the last call, (B, C, H) each.

        Raises:
            RuntimeError: the target left a tapped layer out.
        """
        taken = []
        for layer, kept in zip(self.layers, self.kept):
            if not kept:
                raise RuntimeError(
                    f"a tapped {type(layer).__name__} did not run in the target's pass, so there is"
                    " nothing to draft from: generate without assistant_model"
                )
            # several only where a long prompt is read in chunks
            taken.append(kept[0] if len(kept) == 1 else torch.cat(kept, dim=1))
            kept.clear()
        return taken


def device_of(module: nn.Module) -> torch.device:
    """The device on which a target's embedding or head runs.

    accelerate keeps an offloaded module's weights elsewhere, and leaves `meta` tensors in their
    place (huggingface/transformers#48409). Its hook brings them to this device for each run.
    """
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):
        device = getattr(one, "execution_device", None)
        if device is not None:
            # It may be a number.
            return torch.device(device)
    return module.weight.device


def embed_noise(embedding: nn.Module, noise_ids: torch.Tensor) -> torch.Tensor:
    """Embed noise ids with the target's embedding. (B, Q) -> (B, Q, H)

    A norm of the target's own inside its embedding module (`embed_norm`, Muse Glimmer) is left out,
    because transformers' generator leaves it out too.

    Args:
        embedding (`nn.Module`): `target.get_input_embeddings()`.
        noise_ids (`torch.LongTensor` of shape `(B, Q)`): anchors and mask tokens.
    """
    if getattr(embedding, "embed_norm", None) is None:
        return embedding(noise_ids)
    # Not by taking the norm away for a moment: another thread may be decoding with this target.
    return nn.Embedding.forward(embedding, noise_ids)


def apply_head(head: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """Apply the target's head in its own dtype and on its own device. (..., H) -> (..., V)"""
    weight = head.weight
    # Numbers of one byte are codes, whole or fp8.
    if weight.is_floating_point() and weight.element_size() > 1:
        # Under autocast accelerate hands out fp32 hidden states, whatever the target's dtype.
        dtype = weight.dtype
    else:
        # A quantised head casts by itself.
        dtype = hidden_states.dtype
    return head(hidden_states.to(device_of(head), dtype)).to(hidden_states.device)


def add_correction(logits: torch.Tensor, correction: torch.Tensor) -> torch.Tensor:
    """Domino's final logits (arXiv 2605.29707): base logits plus correction, both (..., V).

    They are added in the wider of their dtypes, and in fp32 at least.
    """
    wide = torch.promote_types(torch.promote_types(logits.dtype, correction.dtype), torch.float32)
    return logits.to(wide) + correction.to(wide)
