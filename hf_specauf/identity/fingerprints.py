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


# Weights at the beginning of a tensor that the first hash looks at, and weights spread over each
# matrix for the second.
FIRST, SPREAD = 8, 64


def target_fingerprint(target: PreTrainedModel) -> str | None:
    """Two short SHA-256 with a hyphen between them: of the first weights of every parameter, and of
    weights spread over the whole of it.

    The weights tell a fine-tune or another commit from the model that a drafter was trained for
    (z-lab#152). A wrapper is nobody: only what PEFT's active adapters do to the weights counts.
    `None` where they cannot be read: quantised, offloaded or sharded. Compare two of them by
    [`same_weights`], because those that 0.1.0 wrote are the first hash alone.

    Not all weights are read, because each `attach` asks. Nor would all of them tell more that
    matters: merging a LoRA on a GPU and on a CPU gives weights whose last bits differ, and the more
    weights are read, the likelier one of them rounds to another bf16 number.
    """
    target = innermost(target)
    if getattr(target, "is_quantized", False):
        return None
    for parameter in target.parameters():
        # A tensor of a class of its own is sharded (DTensor), or holds codes (torchao, quanto).
        is_plain = type(parameter.data) is torch.Tensor and parameter.is_floating_point()
        if parameter.is_meta or not is_plain:
            return None
    first, spread = hashlib.sha256(), hashlib.sha256()
    tokens = embedding_rows(target)
    for name, tensor in plain_parameters(target):
        flat = tensor.flatten()
        few, many = flat[:FIRST], flat[:: _stride(tensor, tokens)]
        # Together, because each copy from a GPU waits for all that runs there.
        data = _bf16_bytes(torch.cat([few, many])).tobytes()
        cut = len(data) * len(few) // (len(few) + len(many))
        for digest, part in ((first, data[:cut]), (spread, data[cut:])):
            digest.update(name.encode())
            digest.update(part)
    return f"{first.hexdigest()[:16]}-{spread.hexdigest()[:16]}"


def _stride(tensor: torch.Tensor, tokens: int) -> int:
    """How far apart the weights for the second hash lie in a flattened tensor.

    Norms and biases are read whole. Of what has a row for each token, every row is: new tokens may
    be all that was trained. Of any other matrix, such as each expert's, `SPREAD` weights are read
    in as many rows and columns.
    """
    if tensor.dim() < 2:
        return 1
    columns = tensor.shape[-1]
    if tensor.shape[0] == tokens:
        # One column further left in each row.
        return max(columns - 1, 1)
    matrix = tensor.shape[-2] * columns
    return max(matrix // SPREAD + int(0.618 * columns), 1)


def same_weights(one: str, other: str) -> bool:
    """Whether two fingerprints of targets, or one of them as 0.1.0 wrote it, are of the same
    weights. Only hashes that both have are compared."""
    return all(ours == theirs for ours, theirs in zip(one.split("-"), other.split("-")))


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
