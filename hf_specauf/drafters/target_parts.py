"""The target's embedding and head, as training and decoding use them alike.

Travels to the Hub: imports torch alone.

Letters: B rows, Q tokens, H hidden size, V vocabulary.
"""

import torch
from torch import nn


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
    norm = getattr(embedding, "embed_norm", None)
    if norm is None:
        return embedding(noise_ids)
    embedding.embed_norm = nn.Identity()
    try:
        return embedding(noise_ids)
    finally:
        embedding.embed_norm = norm


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
