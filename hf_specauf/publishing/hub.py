"""Publish a drafter that explains itself, and fetch one. The commands are in
`hf_specauf/hub.py`."""

import getpass
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import CommitInfo, HfApi, get_token, snapshot_download
from huggingface_hub.hf_api import RepoFile
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PreTrainedModel

from ..drafters.transformers_internals import TESTED
from ..identity import Identity, origin_of, weights_fingerprint
from ..layouts.adapters import BASE_FILE, AdapterBase, finish_adapter
from ..layouts.load import load_drafter
from ..recipe import under_new_names
from ..records import HUB_ID, public, write_record
from ..target import load_target
from . import stranger
from .card import render
from .stranger import outputs_of

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
PLOTS = ("alpha.png", "tau.png")
# What an earlier version of a drafter may have left in its repository, in this form or the other
REPLACED = [
    "*.safetensors",
    "*.index.json",
    "*.py",
    "eval*.json",
    "*config.json",
    "*base.json",
    "provenance.json",
]


def last_version_of_code(folder: Path) -> str | None:
    """The newest minor version of transformers that a drafter folder's own code was tested with;
    `None` where it holds no code of ours."""
    if not any(folder.glob("modeling_*.py")):
        return None
    path = folder / "transformers_internals.py"
    if not path.is_file():  # published by hf_specauf 0.1.0
        return "5.23"
    found = re.search(r'^TESTED = \("[\d.]+", "([\d.]+)"\)', path.read_text(), re.MULTILINE)
    return found[1] if found else None


def say_where_code_stops(folder: str | Path) -> None:
    """Print a line where a drafter folder's own code is older than this package's."""
    last, newest = last_version_of_code(Path(folder)), TESTED[1]
    if last not in (None, newest):
        print(
            f"{folder}: its own code (*.py) stops at transformers {last}, and this package's goes"
            f" to {newest}. Who loads it without hf_specauf needs transformers {last}; pushing it"
            " again, with today's code, mends that."
        )


def find_secrets(folder: Path) -> list[str]:
    """Tokens, local paths, user and host names in a folder's text files, as `file: what`."""
    words = {"home folder": str(Path.home()), "working folder": os.getcwd(), "token": get_token()}
    # names so general that they are ordinary words are not telling
    general = {"root", "user", "ubuntu", "runner", "admin", "localhost", "model", "target"}
    words |= {"user name": getpass.getuser(), "host name": socket.gethostname()}
    found = []
    for path in sorted(folder.rglob("*")):
        if path.suffix not in (".json", ".md", ".py", ".txt", ".yaml", ".jinja"):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        for what, word in words.items():
            if (
                word
                and len(word) > 3
                and word not in general
                and re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text)
            ):
                found.append(f"{path.name}: {what}")
        if re.search(r"\bhf_[A-Za-z0-9]{30,}\b", text):
            found.append(f"{path.name}: something that looks like a token")
    return found


def name_target(config, target: str | None, target_revision: str | None, token: str | None) -> None:
    """Put the target's Hub id and commit into the drafter's config, after a look at the Hub.

    Raises:
        ValueError: the drafter was trained on a local folder and no Hub id is given, or that
            repository is another model.
    """
    name = target or str(config.target_model_name_or_path)
    if not HUB_ID.fullmatch(name) or os.path.exists(name):
        raise ValueError(
            f"the drafter's target is the local path {name!r}: nobody else could load it. Publish"
            " the target, and give its Hub id with --target OWNER/NAME"
        )
    wanted = target_revision or (None if target else config.target_revision)
    commit = HfApi(token=token).model_info(name, revision=wanted).sha
    theirs = AutoConfig.from_pretrained(name, revision=commit, token=token).get_text_config(
        decoder=True
    )
    found = Identity(hidden_size=theirs.hidden_size, num_layers=theirs.num_hidden_layers)
    wrong = found.differences(Identity.of_target_of(config))
    if wrong:
        words = ", ".join(
            f"{key} {value} (trained for {trained})" for key, (value, trained) in wrong.items()
        )
        raise ValueError(f"--target {name} is not the model this drafter was trained for: {words}")
    config.target_model_name_or_path = name
    config.target_revision = (
        commit if target or wanted else None
    )  # the newest commit need not be that of training


def public_base(
    base: AdapterBase,
    config,
    given: str | None,
    revision: str | None,
    small: bool,
    token: str | None,
) -> AdapterBase:
    """What a LoRA drafter was trained on, under its Hub id and commit.

    Raises:
        ValueError: it is a local folder and no Hub id is given, or that repository holds another
            drafter, or one that an adapter cannot name as its base.
    """
    if base.borrowed_layers is not None:
        return replace(
            base, name_or_path=config.target_model_name_or_path, revision=config.target_revision
        )
    if given is None and (
        not HUB_ID.fullmatch(base.name_or_path) or os.path.exists(base.name_or_path)
    ):
        raise ValueError(
            f"this drafter was adapted from the local path {base.name_or_path!r}: nobody else could"
            " tell what that is. Publish that drafter, and give its Hub id with --base OWNER/NAME"
        )
    name, wanted = (given, revision) if given else (base.name_or_path, base.revision)
    info = HfApi(token=token).model_info(name, revision=wanted)
    commit, files = info.sha, {file.rfilename for file in info.siblings or []}
    if small and "modeling_dflash.py" in files and "transformers_internals.py" not in files:
        print(
            f"the base {name} at {commit} was published by hf_specauf 0.1.0, whose code stops at"
            " transformers 5.23: who loads the adapter without hf_specauf needs that version. Push"
            " the base again and name its new commit with --base_revision, or leave out --small."
        )
    found = replace(base, name_or_path=name, revision=commit)
    if given is not None or commit != base.revision:  # nobody has compared it yet
        drafter = load_drafter(name, commit, key="--base")
        if weights_fingerprint(drafter.state_dict()) != base.fingerprint:
            raise ValueError(
                f"the base {name} at {commit} has other weights than the drafter this was adapted"
                " from: give the right one with --base and --base_revision"
            )
        found.loadable = origin_of(drafter).loadable
    if small and not found.loadable:
        raise ValueError(
            f"the base {name} is in another layout, in which AutoModel does not load it as a"
            " drafter: publish it converted (python -m hf_specauf.convert) and give that as"
            " --base, or leave out --small"
        )
    return found


def check_same(drafter: PreTrainedModel, found: dict[str, torch.Tensor], how: str) -> None:
    """Raise unless `found` are the drafter's own [`outputs_of`], up to rounding: what was merged on
    another device may differ in the last bit of each weight."""
    expected, bound = outputs_of(drafter), 0.02 if drafter.dtype == torch.bfloat16 else 1e-4
    same = found.keys() == expected.keys() and all(
        tensor.dtype == expected[name].dtype
        and (tensor - expected[name]).norm() <= bound * expected[name].norm()
        for name, tensor in found.items()
    )
    if not same:
        raise ValueError(
            f"{how}, the folder's drafter gives other outputs than here: its files do not belong"
            " together. Save it again with save_pretrained."
        )


def check_reload(drafter: PreTrainedModel, folder: Path) -> None:
    """Load the folder in a clean process, by its own code, and compare outputs.

    Raises:
        ValueError: it does not load, or its outputs differ.
    """
    with TemporaryDirectory() as scratch:
        inputs, outputs = Path(scratch, "in.safetensors"), Path(scratch, "out.safetensors")
        save_file(drafter.config.probe(), inputs)
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": scratch}
        words = [
            sys.executable,
            "-I",
            stranger.__file__,
            str(folder.absolute()),
            str(inputs),
            str(outputs),
        ]
        done = subprocess.run(words, env=environment, cwd=scratch, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ValueError(
                f"the folder does not load in a clean process with trust_remote_code=True: {last}"
            )
        check_same(drafter, load_file(outputs), "loaded in a clean process")


@torch.no_grad()
def make_small(
    drafter: PreTrainedModel, adapter: Path, base: AdapterBase, into: Path, target_model
) -> None:
    """Turn a staged folder into the small form: the adapter instead of the weights; and load that
    as users will.

    An adapter on a drafter takes the root, where PEFT and `load_drafter` look. One on borrowed
    layers stays in `adapter/`, and config.json says so: in the root, `AutoModel` would attach it to
    whatever it names.
    """
    for path in [*into.glob("*.safetensors"), *into.glob("*.index.json")]:
        path.unlink()
    place = into
    if base.borrowed_layers is None:
        for path in [
            into / "config.json",
            *into.glob("*.py"),
        ]:  # they are the base's, which is loaded by its name
            path.unlink()
    else:
        place = into / "adapter"
        place.mkdir()
        config = json.loads((into / "config.json").read_text())
        write_record(into / "config.json", config | {"borrowed_layers": base.borrowed_layers})
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(adapter / name, place / name)
    finish_adapter(place, base, drafter.config)
    if base.borrowed_layers is not None and target_model is None:
        target_model, _ = load_target(base.name_or_path, base.revision, key="--target")
    found = load_drafter(into, target=target_model, dtype=drafter.dtype)
    check_same(drafter, outputs_of(found), "rebuilt from the small form")


def check_folder(drafter: Path, allow_unmeasured: bool) -> None:
    """Raise unless a folder may be published: a drafter, measured, without pickles."""
    if not any((drafter / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ValueError(f"{drafter} is no drafter's folder: it holds no config.json")
    pickles = [
        path.name
        for path in drafter.iterdir()
        if path.suffix in PICKLES and not is_trainer_state(path.name)
    ]
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


def public_record(record: dict, config, base: AdapterBase | None) -> dict:
    """A record of training or evaluation without local traces, naming target and base by their Hub
    ids."""
    record = public(record)
    if isinstance(record.get("target"), dict):
        record["target"]["name_or_path"] = config.target_model_name_or_path
        record["target"]["revision"] = config.target_revision
    recipe = under_new_names(record.get("recipe", {}))
    if recipe:
        record["recipe"] = recipe
    if "target" in recipe:
        recipe["target"] = config.target_model_name_or_path
        recipe["target_revision"] = config.target_revision
    if base is not None and record.get("base"):
        record["base"] |= {
            "name_or_path": base.name_or_path,
            "revision": base.revision,
            "loadable": base.loadable,
        }
    if base is not None and base.borrowed_layers is None and recipe:
        recipe |= {"drafter": base.name_or_path, "drafter_revision": base.revision}
    return record


def stage_records(
    drafter: Path, into: Path, config, own: str | None, base: AdapterBase | None
) -> None:
    """Copy what training and evaluation wrote, without local traces.

    Args:
        own (`str`, *optional*): what the drafter's target is called in them.

    Raises:
        ValueError: an evaluation is of another target.
    """
    for path in [drafter / "provenance.json", *sorted(drafter.glob("eval*.json"))]:
        if path.is_file():
            record = json.loads(path.read_text())
            measured, meant = Identity.read(record), Identity.of_target_of(config)
            if path.name != "provenance.json" and not measured.is_same_model(meant, own):
                raise ValueError(
                    f"{path} was measured on {measured.name_or_path}, and the drafter's target is"
                    f" {own}: its tau would pass for tau on that. Move it away, and measure the"
                    " drafter on its own target."
                )
            write_record(into / path.name, public_record(record, config, base))


def stage(
    drafter: str | Path,
    into: Path,
    repo: str,
    *,
    revision: str = "main",
    target: str | None = None,
    target_revision: str | None = None,
    base: str | None = None,
    base_revision: str | None = None,
    small: bool = False,
    allow_unmeasured: bool = False,
    token: str | None = None,
    target_model: PreTrainedModel | None = None,
) -> None:
    """Make the folder that is published: weights, config, code, records without local traces, plots
    and the card.

    Args:
        drafter (`str` or `Path`): what `train` left, or a checkpoint of it. Only read.
        into (`Path`): an empty folder.
        repo (`str`): `OWNER/NAME`, for the card.
        revision (`str`, *optional*): for the card's usage lines.
        target, target_revision (`str`, *optional*): the target's Hub id where training used a local
        folder.
        base, base_revision (`str`, *optional*): likewise of the drafter it was adapted from.
        small (`bool`, *optional*): of a LoRA drafter, publish the adapter alone instead of the
            merged drafter.
        allow_unmeasured (`bool`, *optional*): publish without `eval.json`; the card says "not
            measured".
        target_model (`PreTrainedModel`, *optional*): the target, where it is loaded already; needed
            only for borrowed layers.

    Raises:
        ValueError: whatever must not be published, and what mends it.
    """
    drafter = Path(drafter)
    check_folder(drafter, allow_unmeasured)
    model = load_drafter(drafter, target=target_model, key="drafter")
    own = model.config.target_model_name_or_path
    name_target(model.config, target, target_revision, token)
    vars(model.config).pop("use_cache", None)
    adapter = next(
        (part for part in (drafter / "adapter", drafter) if (part / BASE_FILE).is_file()), None
    )
    if adapter is None and (small or base):
        raise ValueError(
            f"{drafter} holds no adapter: --small and --base are for LoRA drafters, leave them out"
        )
    base_record = None
    if adapter is not None:
        base_record = public_base(
            AdapterBase.read(adapter), model.config, base, base_revision, small, token
        )
    model.save_pretrained(into)
    stage_records(drafter, into, model.config, own, base_record)
    for name in PLOTS:
        if (drafter / name).is_file():
            shutil.copyfile(drafter / name, into / name)
    card = render(into, repo, revision, small=asdict(base_record) if small else None)
    if small:
        make_small(model, adapter, base_record, into, target_model)
    card.save(into / "README.md")
    if secrets := find_secrets(into):
        raise ValueError(
            f"what would be published names this machine or its user ({'; '.join(secrets)}): not"
            " published"
        )
    if not small:
        check_reload(model, into)


def is_trainer_state(name: str) -> bool:
    """Whether a file is Trainer's own, beside the drafter in a checkpoint; never published."""
    return (
        re.fullmatch(r"(optimizer|scheduler|rng_state.*|training_args|scaler)\.(pt|pth|bin)", name)
        is not None
    )


def check(drafter: str | Path, repo: str = "owner/name", **keys) -> list[str]:
    """Do everything but the upload -> the names of the files that would be published. Keys as for
    [`stage`]."""
    with TemporaryDirectory() as folder:
        stage(drafter, Path(folder), repo, **keys)
        return sorted(os.listdir(folder))


def check_tag(api: HfApi, repo: str, tag: str, folder: Path) -> None:
    """Raise if a tag exists and names other files than those of `folder`, whose card sends its
    readers to the tag."""
    if tag not in [known.name for known in api.list_repo_refs(repo).tags]:
        return
    tree = api.list_repo_tree(repo, recursive=True, revision=tag)
    there = {
        file.path: file.lfs.sha256 if file.lfs else file.blob_id
        for file in tree
        if isinstance(file, RepoFile)
    }
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        names = (
            hashlib.sha256(content).hexdigest(),
            hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(),
        )
        if path.is_file() and there.get(path.relative_to(folder).as_posix()) not in names:
            raise ValueError(
                f"the tag {tag} of {repo} exists and holds another {path.name}, and the card would"
                " send its readers there. Give another --tag, or delete that one; nothing was"
                " uploaded."
            )


def push(
    drafter: str | Path,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    token: str | None = None,
    commit_message: str = "Upload drafter",
    **keys,
) -> CommitInfo:
    """Publish a drafter as one commit: all of it or nothing. The same folder again makes no new
    commit.

    Args:
        drafter (`str` or `Path`): the folder that `train` and `evaluate` left; only read.
        repo (`str`): `OWNER/NAME`; created where it does not exist, unless `create_pr`.
        private (`bool`, *optional*): of a new repository.
        revision (`str`, *optional*): branch, created where it does not exist.
        create_pr (`bool`, *optional*): propose it as a pull request instead.
        tag (`str`, *optional*): also tag the commit, and name the tag in the card's usage lines.
        keys: as for [`stage`].

    Raises:
        ValueError: as [`stage`].
        huggingface_hub.errors.HfHubHTTPError: the Hub refused.
    """
    if not HUB_ID.fullmatch(repo):
        raise ValueError(f"repo is {repo!r}; it must be OWNER/NAME")
    api = HfApi(token=token)
    with TemporaryDirectory() as folder:
        stage(drafter, Path(folder), repo, revision=tag or revision or "main", token=token, **keys)
        if not create_pr:
            api.create_repo(repo, private=private, exist_ok=True)
        if revision and not create_pr:
            api.create_branch(repo, branch=revision, exist_ok=True)
        if tag:
            check_tag(api, repo, tag, Path(folder))
        try:
            info = api.upload_folder(
                repo_id=repo, folder_path=folder, revision=revision, create_pr=create_pr,
                commit_message=commit_message, delete_patterns=REPLACED,
            )  # fmt: skip
        except RuntimeError as error:  # how the client reports an upload that broke off for good
            raise OSError(
                f"the upload broke off ({error}). {repo} is as it was before, {drafter} is kept,"
                " and the same command tries again"
            ) from error
    if tag:
        api.create_tag(repo, tag=tag, revision=info.oid, exist_ok=True)
    return info


def pull(
    repo: str, into: str | Path, revision: str | None = None, token: str | None = None
) -> Path:
    """Fetch a drafter's folder, whole or small, never its pickles; it then loads from its path.

    Raises:
        ValueError: the repository holds no drafter of this package.
    """
    folder = snapshot_download(
        repo,
        revision=revision,
        local_dir=into,
        token=token,
        ignore_patterns=[f"*{ending}" for ending in PICKLES],
    )
    config = Path(folder, "config.json")
    kind = json.loads(config.read_text()).get("model_type") if config.is_file() else None
    if not str(kind).startswith("specauf_") and not Path(folder, BASE_FILE).is_file():
        raise ValueError(f"{repo} is no drafter of this package: its model_type is {kind!r}")
    return Path(folder)
