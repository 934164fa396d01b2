"""Short hashes by which weights, a vocabulary and a chat template are recognised."""

import hashlib
import json

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .wrappers import innermost


def embedding_rows(target: PreTrainedModel) -> int:
    """Rows of the target's input embedding, at least its tokenizer's length."""
    return target.get_input_embeddings().weight.shape[0]


def target_fingerprint(target: PreTrainedModel) -> str | None:
    """Short SHA-256 of the first weights of every parameter.

    The weights tell a fine-tune or another commit from the model that a drafter was trained for
    (z-lab#152). `None` where they cannot be read: quantised, offloaded or sharded.
    """
    digest = hashlib.sha256()
    for name, parameter in innermost(target).named_parameters():
        if parameter.is_meta or not parameter.is_floating_point() or isinstance(parameter, DTensor):
            return None
        digest.update(name.encode())
        # Training changes every parameter nearly everywhere, so a few weights of each will do.
        digest.update(_bf16_bytes(parameter.detach().flatten()[:8]))
    return digest.hexdigest()[:16]


def weights_fingerprint(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of some named weights, whole. An adapter is tied to it.

    Other than in a target's fingerprint every weight counts, because an adapter must lie on exactly
    the weights that it was trained on.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        digest.update(name.encode())
        digest.update(_bf16_bytes(tensor.detach()))
    return digest.hexdigest()


def _bf16_bytes(tensor: torch.Tensor) -> np.ndarray:
    # As bf16, so that the dtype that a model is loaded in does not matter. numpy knows no bf16.
    return tensor.to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy()


def tokenizer_hashes(tokenizer: PreTrainedTokenizerBase) -> dict[str, str | None]:
    """Short SHA-256 of the vocabulary and of the chat template, by which a pair is recognised."""

    def short(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    template = tokenizer.chat_template
    template_hash = None
    if template is not None:
        # A tokenizer may have several templates by name, so this need not be text.
        template_hash = short(json.dumps(template))
    vocabulary = sorted(tokenizer.get_vocab().items())
    return {
        "tokenizer_hash": short(json.dumps(vocabulary)),
        "chat_template_hash": template_hash,
    }
