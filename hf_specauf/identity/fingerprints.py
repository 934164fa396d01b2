"""Short hashes by which weights, a vocabulary and a chat template are recognised."""

import hashlib
import json

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .wrappers import innermost, plain_parameters


def embedding_rows(target: PreTrainedModel) -> int:
    """Rows of the target's input embedding, at least its tokenizer's length."""
    return innermost(target).get_input_embeddings().weight.shape[0]


def target_fingerprint(target: PreTrainedModel) -> str | None:
    """Short SHA-256 of the first weights of every parameter.

    The weights tell a fine-tune or another commit from the model that a drafter was trained for
    (z-lab#152). A wrapper is nobody: only what PEFT's active adapters do to the weights counts.
    `None` where they cannot be read: quantised, offloaded or sharded.
    """
    digest = hashlib.sha256()
    target = innermost(target)
    for parameter in target.parameters():
        if parameter.is_meta or not parameter.is_floating_point() or isinstance(parameter, DTensor):
            return None
    for name, tensor in plain_parameters(target):
        digest.update(name.encode())
        # Training changes every parameter nearly everywhere, so a few weights of each will do.
        digest.update(_bf16_bytes(tensor.flatten()[:8]))
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


def weights_checksum(target: PreTrainedModel) -> tuple[str, bool]:
    """Short SHA-256 of a sum over every weight and buffer as it lies in memory, and whether all of
    them could be read.

    A fingerprint looks at a few weights of each parameter, and at none of a quantised target. Here
    all count, because nothing would tell that kept states are those of another target.
    """
    digest, complete = hashlib.sha256(), True
    for name, tensor in innermost(target).state_dict().items():
        # Offloaded, sharded, or of a class that keeps its numbers to itself.
        if tensor.is_meta or type(tensor.data) is not torch.Tensor:
            complete = False
            continue
        content = tensor.reshape(-1).view(torch.uint8)
        if len(content) % 8 == 0:
            if content.storage_offset() % 8:
                content = content.clone()
            content = content.view(torch.int64)  # eight bytes at a time are summed much faster
        # A sum does not depend on the device or on threads, because these are whole numbers.
        digest.update(f"{name} {tensor.dtype} {content.sum().item()}".encode())
    return digest.hexdigest()[:16], complete


def _bf16_bytes(tensor: torch.Tensor) -> np.ndarray:
    # As bf16, so that the dtype that a model is loaded in does not matter. numpy knows no bf16.
    return tensor.to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy()


def tokenizer_hashes(tokenizer: PreTrainedTokenizerBase) -> dict[str, str | None]:
    """Short SHA-256 of the vocabulary and of the chat template, by which a pair is recognised."""
    template = tokenizer.chat_template
    template_hash = None
    if template is not None:
        # A tokenizer may have several templates by name, so this need not be text.
        template_hash = _short_hash(template)
    return {
        "tokenizer_hash": _short_hash(sorted(tokenizer.get_vocab().items())),
        "chat_template_hash": template_hash,
    }


# A whole vocabulary is hashed for each word that may have been added: a tenth of a second.
MOST_WORDS_ADDED = 100


def words_added_since(
    tokenizer: PreTrainedTokenizerBase, tokenizer_hash: str
) -> dict[int, str] | None:
    """The words, by their ids, that were added at the end of a vocabulary since it had a hash;
    `None` where it never had it, or more than `MOST_WORDS_ADDED` were added.

    A fine-tune that adds tokens keeps all others at their ids, and so serves the same drafter.
    """
    words = tokenizer.get_vocab()
    # Only those can have been added since, and whatever is added comes last.
    candidates = sorted(tokenizer.get_added_vocab().items(), key=lambda word: -word[1])
    added = {}
    for word, number in candidates[:MOST_WORDS_ADDED]:
        del words[word]
        added[number] = word
        if _short_hash(sorted(words.items())) == tokenizer_hash:
            return added
    return None


def _short_hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
