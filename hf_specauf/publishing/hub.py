"""Publish a drafter that explains itself, and fetch one. The commands are in
`hf_specauf/hub.py`."""

import hashlib
import json
import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitInfo, HfApi, snapshot_download
from huggingface_hub.hf_api import RepoFile

from ..drafters.transformers_internals import TESTED
from ..layouts.adapters import BASE_FILE
from ..records import HUB_ID
from .options import PublishOptions
from .staging import PICKLES, stage

# What an earlier version of a drafter may have left in its repository, in this form or the other
REPLACED = ["*.safetensors", "*.index.json", "*.py"]
REPLACED += ["eval*.json", "*config.json", "*base.json", "provenance.json"]


def check(drafter: str | Path, repo: str = "owner/name", **keys) -> list[str]:
    """Do everything but the upload.

    Args:
        keys: fields of [`PublishOptions`].

    Returns:
        the names of the files that would be published.
    """
    options = PublishOptions(**keys)
    with TemporaryDirectory() as folder:
        stage(drafter, Path(folder), repo, options)
        return sorted(os.listdir(folder))


def push(
    drafter: str | Path,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    commit_message: str = "Upload drafter",
    **keys,
) -> CommitInfo:
    """Publish a drafter as one commit, whole or not at all. The same folder again makes none.

    Args:
        drafter (`str` or `Path`): the folder that `train` and `evaluate` left; only read.
        repo (`str`): `OWNER/NAME`; created where it does not exist, unless `create_pr`.
        private (`bool`, *optional*): of a new repository.
        revision (`str`, *optional*): branch, created where it does not exist.
        create_pr (`bool`, *optional*): propose it as a pull request instead.
        tag (`str`, *optional*): also tag the commit, and name the tag in the card's usage lines.
        keys: fields of [`PublishOptions`].

    Raises:
        ValueError: as [`stage`].
        OSError: the upload broke off.
        huggingface_hub.errors.HfHubHTTPError: the Hub refused.
    """
    options = PublishOptions(**keys)
    if not HUB_ID.fullmatch(repo):
        raise ValueError(f"repo is {repo!r}; it must be OWNER/NAME")
    api = HfApi(token=options.token)
    with TemporaryDirectory() as folder:
        # everything is checked before anything is made on the Hub
        stage(drafter, Path(folder), repo, options, revision=tag or revision or "main")
        if not create_pr:
            api.create_repo(repo, private=private, exist_ok=True)
        if revision and not create_pr:
            api.create_branch(repo, branch=revision, exist_ok=True)
        # after `create_repo`, because only a repository that is there can be asked for its tags
        if tag:
            check_tag(api, repo, tag, Path(folder))
        try:
            info = api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message,
                delete_patterns=REPLACED,
            )
        # the client tries several times, and then reports an upload that broke off so
        except RuntimeError as error:
            raise OSError(
                f"the upload broke off ({error}). {repo} is as it was before, {drafter} is kept,"
                " and the same command tries again"
            ) from error
    # a tag that exists names these very files, by `check_tag`
    if tag:
        api.create_tag(repo, tag=tag, revision=info.oid, exist_ok=True)
    return info


def check_tag(api: HfApi, repo: str, tag: str, folder: Path) -> None:
    """Raise if a tag exists and names other files than those of `folder`, whose card sends its
    readers to the tag."""
    if tag not in [known.name for known in api.list_repo_refs(repo).tags]:
        return
    hashes_there = {}
    for entry in api.list_repo_tree(repo, recursive=True, revision=tag):
        if isinstance(entry, RepoFile):
            hashes_there[entry.path] = entry.lfs.sha256 if entry.lfs else entry.blob_id
    for path in folder.rglob("*"):
        if not path.is_file():
            continue
        there = hashes_there.get(path.relative_to(folder).as_posix())
        if there not in hub_hashes(path.read_bytes()):
            raise ValueError(
                f"the tag {tag} of {repo} exists and holds another {path.name}, and the card would"
                " send its readers there. Give another --tag, or delete that one; nothing was"
                " uploaded."
            )


def hub_hashes(content: bytes) -> tuple[str, str]:
    """The two names that the Hub may give a file: the SHA-256 of LFS, or git's name of a blob. Its
    rules decide which files are LFS, so we try both."""
    blob = b"blob %d\0" % len(content) + content
    return hashlib.sha256(content).hexdigest(), hashlib.sha1(blob).hexdigest()


def pull(
    repo: str, into: str | Path, revision: str | None = None, token: str | None = None
) -> Path:
    """Fetch a drafter's folder, whole or small, never its pickles; it then loads from its path.

    Raises:
        ValueError: the repository holds no drafter of this package.
    """
    pickles = [f"*{ending}" for ending in PICKLES]
    folder = snapshot_download(
        repo, revision=revision, local_dir=into, token=token, ignore_patterns=pickles
    )
    config = Path(folder, "config.json")
    kind = json.loads(config.read_text()).get("model_type") if config.is_file() else None
    # an adapter published alone has no config.json, but says what it was trained on
    if not str(kind).startswith("specauf_") and not Path(folder, BASE_FILE).is_file():
        raise ValueError(f"{repo} is no drafter of this package: its model_type is {kind!r}")
    return Path(folder)


def last_version_of_code(folder: Path) -> str | None:
    """The newest minor version of transformers that a drafter folder's own code was tested with;
    `None` where it holds no code of ours."""
    if not any(folder.glob("modeling_*.py")):
        return None
    path = folder / "transformers_internals.py"
    # hf_specauf 0.1.0 published no such file
    if not path.is_file():
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
