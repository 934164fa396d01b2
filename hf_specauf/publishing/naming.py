"""The Hub ids and commits under which a published drafter names its target and its base.

Training may have used local folders. Nobody else can load those, so each of them gets the name of a
repository that holds the same model.
"""

import os
from dataclasses import replace

from huggingface_hub import HfApi
from transformers import AutoConfig

from ..drafters.configuration_dflash import DFlashConfig
from ..identity import Identity, origin_of, weights_fingerprint
from ..layouts.adapters import AdapterBase
from ..layouts.load import load_drafter
from ..records import HUB_ID
from ..target import check_target
from .options import PublishOptions


def is_local(name: str) -> bool:
    """Whether a name means a folder here, or cannot be a Hub id. A folder `a/b` looks like one."""
    return not HUB_ID.fullmatch(name) or os.path.exists(name)


def name_target(config: DFlashConfig, options: PublishOptions) -> None:
    """Put the target's Hub id and commit into the drafter's config, after a look at the Hub.

    Raises:
        ValueError: the drafter was trained on a local folder and no Hub id is given, or that
            repository is another model.
    """
    name = options.target or str(config.target_model_name_or_path)
    if is_local(name):
        raise ValueError(
            f"the drafter's target is the local path {name!r}: nobody else could load it. Publish"
            " the target, and give its Hub id with --target OWNER/NAME"
        )
    wanted = options.target_revision
    if wanted is None and options.target is None:
        wanted = config.target_revision
    check_target("--target", name, wanted, on_hub=True)
    commit = HfApi(token=options.token).model_info(name, revision=wanted).sha
    theirs = AutoConfig.from_pretrained(name, revision=commit, token=options.token)
    # a multimodal target keeps the shape of its language model in a config within
    theirs = theirs.get_text_config(decoder=True)
    found = Identity(hidden_size=theirs.hidden_size, num_layers=theirs.num_hidden_layers)
    differing = found.differences(Identity.of_target_of(config))
    if differing:
        words = ", ".join(
            f"{key} {value} (trained for {trained})" for key, (value, trained) in differing.items()
        )
        raise ValueError(
            f"--target {name} is not the model this drafter was trained for: {words}. Give the Hub"
            " id of that one with --target and, if need be, --target_revision"
        )
    config.target_model_name_or_path = name
    if options.target is None and wanted is None:
        # Nobody asked for a commit. The newest one need not be that of training, so we claim none.
        config.target_revision = None
    else:
        config.target_revision = commit


def name_base(base: AdapterBase, config: DFlashConfig, options: PublishOptions) -> AdapterBase:
    """What a LoRA drafter was trained on, under its Hub id and commit.

    Args:
        base (`AdapterBase`): as training recorded it.
        config (`DFlashConfig`): of the drafter, which names its target by now.

    Raises:
        ValueError: it is a local folder and no Hub id is given, or that repository holds another
            drafter, or one that an adapter cannot name as its base.
    """
    if base.borrowed_layers is not None:
        target, commit = config.target_model_name_or_path, config.target_revision
        return replace(base, name_or_path=target, revision=commit)
    if options.base is not None:
        name, wanted = options.base, options.base_revision
    elif is_local(base.name_or_path):
        raise ValueError(
            f"this drafter was adapted from the local path {base.name_or_path!r}: nobody else could"
            " tell what that is. Publish that drafter, and give its Hub id with --base OWNER/NAME"
        )
    else:
        name, wanted = base.name_or_path, base.revision
    info = HfApi(token=options.token).model_info(name, revision=wanted)
    commit = info.sha
    if options.small:
        files = {file.rfilename for file in info.siblings or []}
        say_where_base_stops(name, commit, files)
    found = replace(base, name_or_path=name, revision=commit)
    # An adapter lies on exactly the weights it was trained on. Training compared the commit that it
    # loaded. Nobody has compared another one yet.
    if options.base is not None or commit != base.revision:
        drafter = load_drafter(name, commit, key="--base")
        if weights_fingerprint(drafter.state_dict()) != base.fingerprint:
            raise ValueError(
                f"the base {name} at {commit} has other weights than the drafter this was adapted"
                " from: give the right one with --base and --base_revision"
            )
        found = replace(found, loadable=origin_of(drafter).loadable)
    if options.small and not found.loadable:
        raise ValueError(
            f"the base {name} is in another layout, in which AutoModel does not load it as a"
            " drafter: publish it converted (python -m hf_specauf.convert) and give that as"
            " --base, or leave out --small"
        )
    return found


def say_where_base_stops(name: str, commit: str, files: set[str]) -> None:
    """Print a line where a base's own code was published by hf_specauf 0.1.0. An adapter alone runs
    by that code."""
    if "modeling_dflash.py" in files and "transformers_internals.py" not in files:
        print(
            f"the base {name} at {commit} was published by hf_specauf 0.1.0, whose code stops at"
            " transformers 5.23: who loads the adapter without hf_specauf needs that version. Push"
            " the base again and name its new commit with --base_revision, or leave out --small."
        )
