"""The folder that is published: weights, config, code, records, plots and the card.

A drafter's folder is only read. What goes to the Hub is put together in another one and checked
there.
"""

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..layouts.adapters import BASE_FILE, AdapterBase, finish_adapter
from ..layouts.folders import read_json
from ..layouts.load import layout_of, load_drafter
from ..records import write_record
from ..target import load_target
from .card import render
from .naming import name_base, name_target
from .options import PublishOptions
from .reload import check_reload, check_same
from .stranger import outputs_of
from .traces import copy_records, find_secrets

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
PLOTS = ("alpha.png", "tau.png")
# What Trainer keeps beside the drafter in a checkpoint, as pickles. We never publish it.
TRAINER_STATE = re.compile(r"(optimizer|scheduler|rng_state.*|training_args|scaler)\.(pt|pth|bin)")


def stage(
    drafter: str | Path, into: Path, repo: str, options: PublishOptions, revision: str = "main"
) -> None:
    """Make the folder that is published, and check it.

    Args:
        drafter (`str` or `Path`): what `train` left, or a checkpoint of it. Only read.
        into (`Path`): an empty folder.
        repo (`str`): `OWNER/NAME`, for the card.
        options (`PublishOptions`): what is published of it, and how target and base are named.
        revision (`str`, *optional*, defaults to `main`): for the card's usage lines.

    Raises:
        ValueError: whatever must not be published, and what mends it.
    """
    drafter = Path(drafter)
    check_folder(drafter, options.allow_unmeasured)
    # as a user would load it: an adapter comes merged on its base
    model = load_drafter(drafter, target=options.target_model, key="drafter")
    # the evaluations were recorded under this name, which may be a local folder's
    own = model.config.target_model_name_or_path
    name_target(model.config, options)
    # Trainer's switch in a checkpoint's config says nothing about the drafter
    vars(model.config).pop("use_cache", None)
    adapter, base = find_adapter(drafter), None
    if adapter is not None:
        base = name_base(AdapterBase.read(adapter), model.config, options)
    elif options.small or options.base or options.base_revision:
        raise ValueError(
            f"{drafter} holds no adapter: --small, --base and --base_revision are for LoRA"
            " drafters, leave them out"
        )
    model.save_pretrained(into)
    copy_records(drafter, into, model.config, own, base)
    for name in PLOTS:
        if (drafter / name).is_file():
            shutil.copyfile(drafter / name, into / name)
    # The card is rendered before the small form is made, because that may lack the config.json
    # from which it is rendered. It is saved afterwards, because `finish_adapter` removes the
    # README.md that PEFT writes.
    small = asdict(base) if options.small else None
    card = render(into, repo, revision, options.licence, small)
    if options.small:
        make_small(model, adapter, base, into, options.target_model)
    card.save(into / "README.md")
    secrets = find_secrets(into)
    if secrets:
        raise ValueError(
            f"what would be published names this machine or its user ({'; '.join(secrets)}): not"
            f" published. Take that out of the file of that name in {drafter}, and push again"
        )
    # the small form was loaded and compared as it was made
    if not options.small:
        check_reload(model, into)


def check_folder(drafter: Path, allow_unmeasured: bool) -> None:
    """Raise unless a folder may be published: a drafter, measured, without pickles."""
    if not any((drafter / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ValueError(
            f"{drafter} is no drafter's folder: it holds no config.json. Name the folder that train"
            " left"
        )
    config = read_json(drafter / "config.json")
    if config:
        layout_of(drafter, config, f"--drafter: {drafter}")
    pickles = []
    for path in drafter.iterdir():
        if path.suffix in PICKLES and not TRAINER_STATE.fullmatch(path.name):
            pickles.append(path.name)
    if pickles:
        raise ValueError(
            f"{drafter} holds {', '.join(sorted(pickles))}: loading a pickle runs code, so none is"
            " published or used. Save the drafter with save_pretrained (safetensors) and remove"
            " the file."
        )
    if not allow_unmeasured and not any(drafter.glob("eval*.json")):
        raise ValueError(
            f"{drafter} holds no eval.json: measure it with `python -m hf_specauf.evaluate ..."
            f" --out {drafter}`, or publish it as unmeasured with --allow_unmeasured"
        )


def find_adapter(drafter: Path) -> Path | None:
    """Where a drafter's folder holds an adapter of ours: in `adapter/`, as `train` leaves it beside
    the merged drafter, or in the root, as a checkpoint does."""
    for folder in (drafter / "adapter", drafter):
        if (folder / BASE_FILE).is_file():
            return folder
    return None


@torch.no_grad()
def make_small(
    drafter: PreTrainedModel,
    adapter: Path,
    base: AdapterBase,
    into: Path,
    target_model: PreTrainedModel | None,
) -> None:
    """Turn a staged folder into the small form: the adapter instead of the weights. Then load it as
    users will, and compare.

    An adapter on a drafter takes the root, where PEFT and `load_drafter` look. An adapter on
    borrowed layers stays in `adapter/`, and config.json says so. In the root, `AutoModel` would
    attach it to whatever it names.

    Args:
        drafter (`PreTrainedModel`): the merged drafter, to compare with.
        adapter, into (`Path`): the adapter's folder, and the one that is published.
        base (`AdapterBase`): what the adapter lies on, by its Hub id.
        target_model (`PreTrainedModel`, *optional*): the target, where it is loaded already.
    """
    for path in [*into.glob("*.safetensors"), *into.glob("*.index.json")]:
        path.unlink()
    if base.borrowed_layers is None:
        place = into
        # config and code are the base's, and come with it when it is loaded by its name
        for path in [into / "config.json", *into.glob("*.py")]:
            path.unlink()
    else:
        place = into / "adapter"
        place.mkdir()
        config = json.loads((into / "config.json").read_text())
        write_record(into / "config.json", config | {"borrowed_layers": base.borrowed_layers})
        if target_model is None:
            target_model, _ = load_target(base.name_or_path, base.revision, key="--target")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(adapter / name, place / name)
    finish_adapter(place, base, drafter.config)
    rebuilt = load_drafter(into, target=target_model, dtype=drafter.dtype)
    check_same(drafter, outputs_of(rebuilt), "rebuilt from the small form")
