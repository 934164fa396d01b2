"""How a target is loaded, with errors that name the key which asked for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..identity import Identity, Origin, cached_commit, note_origin
from ..identity.multimodal import load_language_model, load_tokenizer
from ..records import read_record


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


def check_target(
    key: str, name_or_path: str, revision: str | None = None, *, on_hub: bool = False
) -> None:
    """Raise for a name that cannot be a target's, before anything large is read.

    Args:
        key (`str`): what errors call the name.
        on_hub (`bool`, *optional*, defaults to `False`): look at a repository's config too.

    Raises:
        OSError: it is a file, or neither a folder nor a Hub id.
        ValueError: the folder was given a revision, which transformers ignores without a word; or
            it holds a drafter.
    """
    is_folder = Path(name_or_path).is_dir()
    if is_folder and revision:
        key = key.removeprefix("--")
        raise ValueError(
            f"{key}_revision is {revision!r}, and {key} {name_or_path!r} is a folder, which has no"
            f" revisions: remove {key}_revision, or give the Hub id"
        )
    if Path(name_or_path).is_file():
        raise OSError(f"{key}: {name_or_path!r} is a file: give the folder that it lies in")
    if not is_folder:
        try:
            validate_repo_id(str(name_or_path))
        except HFValidationError as error:
            raise OSError(
                f"{key}: {str(name_or_path)!r} is neither a folder nor a Hub id (OWNER/NAME): give"
                " one of them"
            ) from error
    if is_folder or on_hub:
        refuse_drafter(key, name_or_path, revision)


def refuse_drafter(key: str, name_or_path: str, revision: str | None = None) -> None:
    """Raise where a folder or repository holds a drafter, or an adapter of one. It has no
    tokenizer, and an error about that would lead nowhere."""
    base = Path(name_or_path, "base.json")
    if base.is_file():  # beside an adapter, of our own making alone
        target = Identity.read(read_record(base).get("trained_for") or {}).name_or_path
    else:
        try:
            config, _ = PreTrainedConfig.get_config_dict(name_or_path, revision=revision)
        except (OSError, ValueError):  # what loads the target says better what is wrong
            return
        if not is_drafters(config):
            return
        target = config.get("target_model_name_or_path")
    whose, wanted = "", "the model that it drafts for"
    if target:
        whose, wanted = f" for the target {target!r}", "that target"
    raise ValueError(
        f"{key}: {str(name_or_path)!r} holds a drafter{whose}, which writes no text alone: give"
        f" {wanted}"
    )


def is_drafters(config: dict) -> bool:
    """Whether a `config.json` is a block drafter's, in any layout that is read."""
    ours = str(config.get("model_type")).startswith("specauf_")
    # Other models have a block_size too (BigBird).
    nested = {"dflash_config", "domino_config"} & config.keys()
    return ours or bool(nested) or {"block_size", "target_layer_ids"} <= config.keys()


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
        ValueError: a folder was given a revision; or a drafter is there.
    """
    check_target(key, name_or_path, revision, on_hub=True)
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
