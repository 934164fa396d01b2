"""How a target is loaded, with errors that name the key which asked for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..identity import Origin, cached_commit, note_origin
from ..identity.multimodal import load_language_model, load_tokenizer


def load(
    from_pretrained: Callable, key: str, name_or_path: str, revision: str | None = None, **kwargs
) -> Any:
    """What a `from_pretrained` gives.

    Raises:
        OSError: nothing loadable is there; names the `key` that asked for it.
        ValueError: loading it as asked needs what is not installed.
    """
    try:
        return from_pretrained(name_or_path, revision=revision, **kwargs)
    except OSError as error:
        at = f" at revision {revision}" if revision else ""
        raise OSError(
            f"{key}: {name_or_path!r}{at} cannot be loaded. It must be a folder with a config.json,"
            " or a Hub id that you can reach (gated and private ones need `hf auth login`)."
            f" {error}"
        ) from error
    except ImportError as error:
        raise ValueError(
            f"{key}: {name_or_path!r} cannot be loaded as asked, because something is not installed"
            f" ({error}). Install it, or leave out the key that asks for it"
            " (target_attn_implementation, target_quantization)"
        ) from error


def check_revision(key: str, name_or_path: str, revision: str | None) -> None:
    """Raise where a folder was given a revision, which transformers ignores without a word."""
    if revision and Path(name_or_path).is_dir():
        key = key.removeprefix("--")
        raise ValueError(
            f"{key}_revision is {revision!r}, and {key} {name_or_path!r} is a folder, which has no"
            f" revisions: remove {key}_revision, or give the Hub id"
        )


def check_device(device: str, key: str = "device") -> None:
    """Raise for a device that torch does not know, or that is not here.

    Args:
        key (`str`, *optional*, defaults to `"device"`): what errors call it.
    """
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or found.type == "meta":
        raise ValueError(f"{key} is {device!r}, which no model runs on: give cuda or cpu")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"{key} is {device!r}, and torch {torch.__version__} finds {torch.cuda.device_count()}"
            " GPUs here: give cpu, or install a torch that was built for your GPU"
        )


def load_target(
    name_or_path: str, revision: str | None = None, key: str = "target", **kwargs
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM in its stored dtype, unless told otherwise, and its tokenizer. Of a checkpoint
    that also sees images, all is loaded, and the text is used.

    Args:
        name_or_path (`str`): Hub id or folder.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        key (`str`, *optional*, defaults to `"target"`): what errors call `name_or_path`.
        kwargs: for the model's `from_pretrained`.

    Raises:
        OSError: nothing loadable is there.
        ValueError: a folder was given a revision.
    """
    check_revision(key, name_or_path, revision)
    trust = {"trust_remote_code": kwargs.get("trust_remote_code", False)}
    if Path(name_or_path).is_dir() and not Path(name_or_path, "config.json").is_file():
        raise OSError(
            f"{key}: the folder {name_or_path!r} has no config.json, so it holds no model: give the"
            " folder that save_pretrained wrote, or a Hub id"
        )
    tokenizer = load(load_tokenizer, key, name_or_path, revision, **trust)
    kwargs = {"dtype": "auto"} | kwargs
    model = load(load_language_model, key, name_or_path, revision, **kwargs)
    note_origin(model, Origin(name_or_path, cached_commit(name_or_path, revision)))
    return model.eval(), tokenizer
