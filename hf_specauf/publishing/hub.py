"""Publish a drafter that explains itself, and fetch one. The commands are in
`hf_specauf/hub.py`."""

import hashlib
import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory

from httpx2 import HTTPError
from huggingface_hub import CommitInfo, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from ..cli import said_by_hub, words_for
from ..drafters.transformers_internals import TESTED
from ..layouts.adapters import BASE_FILE
from ..records import check_can_write, check_no_model_is_lost, read_record
from .options import PublishOptions, check_repo_name
from .staging import PICKLES, stage

# What an earlier version of a drafter may have left in its repository, in this form or the other
REPLACED = ["*.safetensors", "*.index.json", "*.py"]
REPLACED += ["eval*.json", "*config.json", "*base.json", "provenance.json"]
# what git allows in the name of a tag or branch, and a little less
TAG = re.compile(r"\w[\w.+-]*(/\w[\w.+-]*)*")


class HalfPublished(OSError):
    """A part of a push was done before the rest failed. Its text says what was done, what was not,
    and what is left to do."""


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
        ValueError: as [`stage`]; or the repository is public and `private` was asked for.
        HalfPublished: a part was done: a repository made, or all but the tag.
        OSError: the upload broke off.
        huggingface_hub.errors.HfHubHTTPError: the Hub refused, and nothing was made.
    """
    options = PublishOptions(**keys)
    check_repo_name(repo)
    if revision and not TAG.fullmatch(revision):
        raise ValueError(f"--revision {revision!r} is no name that git takes: give one like main")
    if tag:
        check_tag_name(tag, revision)
    api = HfApi(token=options.token)
    with TemporaryDirectory() as folder:
        # everything is checked before anything is made on the Hub
        stage(drafter, Path(folder), repo, options, revision=tag or revision or "main")
        is_new = check_repo(api, repo, private)
        if not create_pr:
            api.create_repo(repo, private=private, exist_ok=True)
        try:
            if revision and not create_pr:
                api.create_branch(repo, branch=revision, exist_ok=True)
            # after `create_repo`, because only a repository that is there can be asked for its tags
            if tag:
                check_tag(api, repo, tag, Path(folder))
            info = api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message,
                delete_patterns=REPLACED,
            )
        except (HTTPError, RuntimeError) as error:
            raise without_upload(error, repo, drafter, is_new and not create_pr) from error
    if tag:
        make_tag(api, repo, tag, info)
    return info


def check_tag_name(tag: str, branch: str | None) -> None:
    """Raise where the Hub would refuse a tag's name, after the upload, or where a branch has it."""
    if not TAG.fullmatch(tag):
        raise ValueError(f"--tag {tag!r} is no name that git takes: give one like v1")
    if tag in ("main", branch):
        raise ValueError(f"--tag {tag} is the branch's name: give another one like v1")


def check_repo(api: HfApi, repo: str, private: bool | None) -> bool:
    """Whether a repository must be made first.

    Raises:
        ValueError: it is there and public, and a private one was asked for. The Hub would publish.
    """
    try:
        found = api.model_info(repo)
    # it exists, and the client calls it a kind of "not found"
    except GatedRepoError:
        return False
    except RepositoryNotFoundError:
        return True
    if private and found.private is False:
        raise ValueError(
            f"--private: {repo} exists and is public, so the drafter would be public too. Make that"
            " private on its page, give another --repo, or leave out --private. Nothing was"
            " uploaded"
        )
    return False


def without_upload(error: Exception, repo: str, drafter: str | Path, is_new: bool) -> Exception:
    """What to raise for an error before or in the upload.

    Args:
        is_new (`bool`): the repository was made just before.
    """
    # the client tries several times, and then reports an upload that broke off so
    if isinstance(error, RuntimeError):
        said = f"the upload broke off ({error})"
    elif isinstance(error, HfHubHTTPError):
        if not is_new:
            return error
        said = words_for(error)
    else:
        return HalfPublished(
            f"the connection to the Hub was lost in the upload ({error}). Whether {repo} has the"
            f" commit is not known: look at its page. {drafter} is kept, and the same command goes"
            " on: it makes no second commit of the same files"
        )
    if not is_new:
        return OSError(
            f"{said}. {repo} is as it was before, {drafter} is kept, and the same command tries"
            " again"
        )
    return HalfPublished(
        f"{said}. The repository {repo} was made before that, and no drafter is in it. {drafter} is"
        " kept, and the same command goes on"
    )


def make_tag(api: HfApi, repo: str, tag: str, info: CommitInfo) -> None:
    """Tag a commit that was just made. A tag that exists names its very files, by `check_tag`.

    Raises:
        HalfPublished: the Hub refused, or could not be reached.
    """
    try:
        api.create_tag(repo, tag=tag, revision=info.oid, exist_ok=True)
    except HTTPError as error:
        done, who = f"published: {info.commit_url}", ""
        if info.pr_url:
            done, who = f"the pull request is made: {info.pr_url}", f", for the owner of {repo}"
        raise HalfPublished(
            f"{done}. Only the tag {tag}, which its card names, was not made"
            f" ({said_by_hub(error)}). The one command that is left{who}: hf repos tag create"
            f" {repo} {tag} --revision {info.oid}"
        ) from error


def check_tag(api: HfApi, repo: str, tag: str, folder: Path) -> None:
    """Raise if a tag exists and names other files than those of `folder`, whose card sends its
    readers to the tag; or if a branch has its name."""
    refs = api.list_repo_refs(repo)
    if tag in [known.name for known in refs.branches]:
        raise ValueError(
            f"--tag {tag} is the name of a branch of {repo}, and the card's readers would not know"
            " which of the two they get: give another one like v1. Nothing was uploaded"
        )
    if tag not in [known.name for known in refs.tags]:
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
        ValueError: the repository holds no drafter of this package, or `into` can be no folder.
            Nothing was fetched.
    """
    check_repo_name(repo)
    if not str(into):
        raise ValueError("--into is empty: name a folder to fetch the drafter into")
    check_can_write("--into", into)
    check_no_model_is_lost("--into", into)
    found = HfApi(token=token).model_info(repo, revision=revision)
    check_is_drafter(repo, found.sha, {file.rfilename for file in found.siblings or []}, token)
    pickles = [f"*{ending}" for ending in PICKLES]
    # at the commit that was checked
    folder = snapshot_download(
        repo, revision=found.sha, local_dir=into, token=token, ignore_patterns=pickles
    )
    return Path(folder)


def check_is_drafter(repo: str, commit: str, files: set[str], token: str | None) -> None:
    """Raise unless a repository holds a drafter of this package. A look at its config.json costs
    nothing, where its weights may be a whole target's."""
    # an adapter published alone has no config.json, but says what it was trained on
    if BASE_FILE in files:
        return
    kind = None
    if "config.json" in files:
        with TemporaryDirectory() as scratch:
            path = hf_hub_download(
                repo, "config.json", revision=commit, local_dir=scratch, token=token
            )
            kind = read_record(path).get("model_type")
    if not str(kind).startswith("specauf_"):
        raise ValueError(
            f"{repo} is no drafter of this package: its model_type is {kind!r}. Nothing was"
            " fetched. A drafter of z-lab or SpecForge is fetched by specauf convert --drafter"
            f" {repo}"
        )


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
