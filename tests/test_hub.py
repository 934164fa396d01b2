"""The Hub both ways, offline: a real client in its own processes against a server on this machine."""

import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import BASE, make_domino, make_drafter, make_target, random_prompts, warm_python
from httpx2 import ReadTimeout
from huggingface_hub import constants
from huggingface_hub.errors import RepositoryNotFoundError
from loopback_hub import LoopbackHub
from safetensors.torch import load_file, save_file
from test_convert import z_lab
from transformers import AutoModelForCausalLM

from hf_specauf import load_drafter
from hf_specauf.model_card import main as card_command
from hf_specauf.publishing.card import render
from hf_specauf.publishing.hub import HalfPublished, check, push
from hf_specauf.publishing.options import PublishOptions
from hf_specauf.publishing.reload import check_reload, check_same
from hf_specauf.publishing.staging import stage
from hf_specauf.publishing.stranger import outputs_of
from hf_specauf.publishing.traces import find_secrets
from hf_specauf.publishing.validate import validate
from hf_specauf.records import public
from hf_specauf.target import load_target
from hf_specauf.train import main as train

pytestmark = pytest.mark.internals

PUBLISHED = {
    ".gitattributes", "README.md", "alpha.png", "config.json", "configuration_dflash.py",
    "draft_length.py", "drafts.py", "eval.json", "lookup.py", "model.safetensors", "modeling_dflash.py",
    "provenance.json", "target_parts.py", "transformers_internals.py", "verification.py",
}  # fmt: skip
DOMINO_PUBLISHED = PUBLISHED | {
    "configuration_domino.py", "loop.py", "modeling_domino.py", "overrides.py", "custom_generate/generate.py"
}  # fmt: skip
CUSTOM_GENERATE = """
import json, sys, torch
sys.modules["hf_specauf"] = None
from transformers import AutoModel, AutoModelForCausalLM
target = AutoModelForCausalLM.from_pretrained("alice/target", dtype=torch.float64)
drafter = AutoModel.from_pretrained(
    "alice/domino", revision="v1", dtype=torch.float64, trust_remote_code=True
)
prompt, passes = torch.tensor({prompt}), []
keys = dict(max_new_tokens=24, do_sample=False)
plain = target.generate(prompt, **keys)[0].tolist()
target.register_forward_hook(lambda *_: passes.append(1))
more = dict(assistant_model=drafter, custom_generate="alice/domino", trust_remote_code=True)
more |= dict(draft_length=None, lookup=False)
assisted = [target.generate(prompt, **keys, **more, **at)[0].tolist() for at in (dict(revision="v1"), dict())]
try:
    target.generate(prompt, **keys, assistant_model=drafter, speculation_type="dflash")
except ValueError as error:
    refused = str(error)
print(json.dumps([type(drafter).__module__, plain, *assisted, len(passes), refused]))
"""
PUSH_TARGET = """
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoModelForCausalLM.from_pretrained({folder!r}).push_to_hub("alice/target")
AutoTokenizer.from_pretrained({folder!r}).push_to_hub("alice/target")
"""
UPLOAD = """
from huggingface_hub import HfApi
HfApi().create_repo({repo!r}, exist_ok=True)
HfApi().upload_folder(repo_id={repo!r}, folder_path={folder!r})
"""
GENERATE = """
import json, sys, torch
with_package = {with_package}
if with_package:
    import hf_specauf
else:
    sys.modules["hf_specauf"] = None
from transformers import AutoModel, AutoModelForCausalLM
target = AutoModelForCausalLM.from_pretrained("alice/target", dtype=torch.float64)
more = {{}} if with_package or not {trusted} else {{"trust_remote_code": True}}
drafter = AutoModel.from_pretrained({repo!r}, revision={revision!r}, dtype=torch.float64, **more)
prompt = torch.tensor({prompt})
keys = dict(max_new_tokens=24, do_sample=False)
plain = target.generate(prompt, **keys)[0].tolist()
if with_package:
    with hf_specauf.attach(target, drafter) as attachment:
        assisted = target.generate(prompt, assistant_model=drafter, **keys)[0].tolist()
    assert attachment.acceptance().passes > 0
else:
    assisted = target.generate(prompt, assistant_model=drafter, speculation_type="dflash", **keys)[0].tolist()
print(json.dumps([type(drafter).__module__, plain, assisted]))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with LoopbackHub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture(scope="module")
def run(hub, tmp_path_factory):
    """Runs python in a process of its own, as a user of the Hub -> (exit code, printed)."""

    def run(*words: str, user: str | None = "alice", home: str = "home", **environment) -> tuple[int, str]:
        return hub.run(*words, home=tmp_path_factory.getbasetemp() / home, user=user, **environment)

    return run


# A command whose pushes are not reloaded in a clean process, which other tests judge: a second instead of six.
WITHOUT_RELOAD = """
import runpy, sys, time
from hf_specauf.publishing.hub import stage
sys.modules[stage.__module__].check_reload = lambda model, folder: None
time.sleep = lambda seconds: None  # the client's pauses between two tries
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
PUSH_QUICKLY = ("-c", WITHOUT_RELOAD, "hf_specauf.hub", "push")


@pytest.fixture(scope="module")
def trained(files, hub, run, tmp_path_factory):
    """A drafter trained by the command with a token in its recipe, and its target on the Hub."""
    out = tmp_path_factory.mktemp("trained") / "out"
    keys = dict(target=files / "target", dataset_name=files / "text.jsonl", output_dir=out) | BASE
    keys |= dict(hub_token="hf_" + "PLANTED" * 6, hub_model_id="alice/elsewhere", eval_prompts=3)
    train([word for key, value in keys.items() for word in (f"--{key}", *str(value).split())])
    code, printed = run("-c", PUSH_TARGET.format(folder=str(files / "target")))
    assert code == 0, printed
    return out


@pytest.fixture(scope="module")
def published(trained, hub, run):
    """Pushed once -> its commit."""
    words = ["--drafter", str(trained), "--repo", "alice/drafter", "--target", "alice/target", "--tag", "v1"]
    code, printed = run("-m", "hf_specauf.hub", "push", *words)
    assert code == 0, printed
    assert "published: http://127.0.0.1" in printed
    repository = hub.repository("alice/drafter")
    commit = repository.resolve("v1")
    assert commit == repository.resolve("main")
    return SimpleNamespace(repository=repository, commit=commit, words=words)


@pytest.fixture
def online(hub, trained, monkeypatch, tmp_path_factory):
    """This process's client talks to the Hub of the tests, as a reader."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub-cache")))


@pytest.fixture
def warm_reload(monkeypatch):
    """The clean process of a reload starts at once."""
    monkeypatch.setattr(sys, "executable", warm_python().executable)


@pytest.fixture
def without_reload(monkeypatch):
    """As `WITHOUT_RELOAD`, in this process."""
    monkeypatch.setattr(sys.modules[stage.__module__], "check_reload", lambda model, folder: None)


def contents(repository, revision="main") -> dict[str, bytes]:
    files = repository.files(repository.resolve(revision))
    return {path: (repository.folder / "blobs" / entry["sha256"]).read_bytes() for path, entry in files.items()}


def test_published_folder_holds_what_a_stranger_needs_and_no_trace_of_its_maker(published, trained, files):
    found = contents(published.repository)
    assert set(found) == PUBLISHED
    config = json.loads(found["config.json"])
    assert config["target_model_name_or_path"] == "alice/target"
    assert re.fullmatch("[0-9a-f]{40}", config["target_revision"])
    assert config["tokenizer_hash"] and config["chat_template_hash"]
    for name, content in found.items():
        for secret in (b"PLANTED", str(trained).encode(), str(files).encode(), str(Path.home()).encode() + b"/"):
            assert secret not in content, name
    record = json.loads(found["provenance.json"])
    assert record["recipe"]["dataset_name"] == "text.jsonl" and "output_dir" not in record["recipe"]
    assert record["target"]["name_or_path"] == record["recipe"]["target"] == "alice/target"


@pytest.mark.own
def test_card_says_what_eval_json_says(published, tmp_path):
    found = contents(published.repository)
    record, text = json.loads(found["eval.json"]), found["README.md"].decode()
    (tmp_path / "alice__drafter.md").write_text(text)
    assert validate(tmp_path / "alice__drafter.md", contributed=True) == []
    assert (
        f"**tau {record['acceptance']['tau']:.2f}**" in text and f"| tau | {record['acceptance']['tau']:.2f} |" in text
    )
    assert f"{record['speedup']:.2f}x" in text and record["tau_definition"] in text
    assert "value: " + str(round(record["acceptance"]["tau"], 4)) in text
    assert 'from_pretrained("alice/drafter", revision="v1"' in text and "![alpha_k" in text
    assert "base_model: alice/target" in text and "objective: auf" not in text.split("```yaml")[1]  # a default
    assert "num_draft_layers: 1" in text and "hub_token" not in text


@pytest.mark.own
def test_the_same_folder_again_makes_no_commit(published, run):
    before = len(published.repository.history("main"))
    code, printed = run(*PUSH_QUICKLY, *published.words)
    assert code == 0, printed
    assert len(published.repository.history("main")) == before


@pytest.mark.own
def test_a_tag_is_never_left_on_another_drafter_than_its_card_describes(published, trained, run, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(trained, changed)
    record = json.loads((changed / "eval.json").read_text())
    (changed / "eval.json").write_text(json.dumps(record | {"repetition": 0.5}))
    words = ["--repo", "alice/drafter", "--target", "alice/target", "--drafter", str(changed), "--tag"]
    code, printed = run(*PUSH_QUICKLY, *words, "v1")
    assert code == 1 and "error: the tag v1 of alice/drafter exists and holds another" in printed.splitlines()[-1]
    assert published.repository.resolve("main") == published.commit


def test_three_ways_to_load_generate_the_targets_own_text(published, run, tmp_path):
    prompt = random_prompts(1, 9).tolist()
    code, printed = run("-m", "hf_specauf.hub", "pull", "--repo", "alice/drafter", "--into", str(tmp_path / "local"))
    assert code == 0, printed
    assert not [path for path in (tmp_path / "local").rglob("*") if path.suffix in (".bin", ".pt", ".pth")]
    ways = {
        "package": dict(with_package=True, trusted=False, repo="alice/drafter", revision="v1"),
        "remote code": dict(with_package=False, trusted=True, repo="alice/drafter", revision=published.commit),
        "local folder": dict(with_package=False, trusted=True, repo=str(tmp_path / "local"), revision=None),
    }
    outputs = {}
    for name, keys in ways.items():
        code, printed = run("-c", GENERATE.format(prompt=prompt, **keys), user=None)
        assert code == 0, printed
        module, plain, assisted = json.loads(next(line for line in printed.splitlines() if line.startswith("[")))
        assert module.startswith("hf_specauf." if name == "package" else "transformers_modules.")
        assert plain == assisted and len(plain) > 9
        outputs[name] = assisted
    assert len({tuple(output) for output in outputs.values()}) == 1
    refused = dict(with_package=False, trusted=False, repo="alice/drafter", revision="v1")
    code, printed = run("-c", GENERATE.format(prompt=prompt, **refused), user=None)
    assert code != 0 and "trust_remote_code" in printed


@pytest.mark.own
def test_private_repository_is_refused_without_a_token(published, trained, run, hub, tmp_path):
    words = ["--drafter", str(trained), "--repo", "alice/secret", "--target", "alice/target", "--private"]
    code, printed = run(*PUSH_QUICKLY, *words)
    assert code == 0, printed
    assert hub.repository("alice/secret").read("settings")["private"]
    pull = ["-m", "hf_specauf.hub", "pull", "--repo", "alice/secret", "--into"]
    for user in (None, "bob"):
        code, printed = run(*pull, str(tmp_path / str(user)), user=user, home="home-errors")
        assert code == 1 and "error: there is no such repository, or it is private" in printed
    assert run(*pull, str(tmp_path / "alice"))[0] == 0


@pytest.mark.own
def test_connection_cut_in_an_upload_leaves_nothing_half_and_the_next_try_all(trained, run, hub):
    words = ["--drafter", str(trained), "--repo", "alice/cut", "--target", "alice/target"]
    hub.cut_uploads = 100
    try:
        code, printed = run(*PUSH_QUICKLY, *words)
    finally:
        hub.cut_uploads = 0
    assert code == 1 and printed.splitlines()[-1].startswith("error: the upload broke off")
    assert set(contents(hub.repository("alice/cut"))) == {".gitattributes"}
    hub.cut_uploads = 1  # the client tries again by itself
    code, printed = run(*PUSH_QUICKLY, *words)
    assert code == 0, printed
    assert hub.cut_uploads == 0
    assert set(contents(hub.repository("alice/cut"))) == PUBLISHED
    assert len(hub.repository("alice/cut").history("main")) == 2


@pytest.mark.own
def test_pull_request_and_a_contributed_card_merged(published, trained, run, hub):
    words = ["--drafter", str(trained), "--repo", "alice/drafter", "--target", "alice/target", "--create_pr"]
    before = contents(published.repository)
    code, printed = run(*PUSH_QUICKLY, *words, user="bob")
    assert code == 0, printed
    assert "/discussions/1" in printed and contents(published.repository) == before
    contribute = (
        "from huggingface_hub import HfApi, ModelCard\n"
        "card = ModelCard.load('alice/drafter')\n"
        "card.text += '\\nContributed: measured on another machine too.\\n'\n"
        "print(card.push_to_hub('alice/drafter', create_pr=True))\n"
    )
    code, printed = run("-c", contribute, user="bob")
    assert code == 0, printed
    merge = "from huggingface_hub import HfApi; HfApi().merge_pull_request('alice/drafter', 2)"
    assert run("-c", merge, user="bob")[0] != 0
    code, printed = run("-c", merge)
    assert code == 0, printed
    after = contents(published.repository)
    assert b"Contributed: measured on another machine too." in after["README.md"]
    assert {name for name in after if after[name] != before[name]} == {"README.md"}


@pytest.fixture
def refuse(hub):
    """Lets the Hub answer requests with 404."""

    def refuse(part: str) -> None:
        hub.refuse = part

    yield refuse
    hub.refuse = None


@pytest.mark.own
def test_an_upload_whose_tag_is_refused_is_said_to_be_published(trained, run, hub, refuse):
    words = ["--drafter", str(trained), "--repo", "alice/half", "--target", "alice/target", "--tag", "v1"]
    refuse("/tag/")
    code, printed = run(*PUSH_QUICKLY, *words)
    commit = hub.repository("alice/half").resolve("main")
    last = printed.splitlines()[-1]
    assert code == 1 and last.startswith(
        f"error: published: {hub.endpoint}/alice/half/commit/{commit}. Only the tag v1"
    )
    assert "404: no such page" in last and "the Hub refused" not in last
    command = f"hf repos tag create alice/half v1 --revision {commit}"
    assert last.endswith(f"The one command that is left: {command}")
    refuse(None)
    code, printed = run("-c", "import sys; from huggingface_hub.cli.hf import main; main()", *command.split()[1:])
    assert code == 0, printed
    assert hub.repository("alice/half").resolve("v1") == commit


@pytest.mark.own
def test_a_pull_request_whose_tag_is_refused_is_said_to_be_made(published, trained, run, hub):
    words = ["--drafter", str(trained), "--repo", "alice/drafter", "--target", "alice/target", "--allow_unmeasured"]
    code, printed = run(*PUSH_QUICKLY, *words, "--create_pr", "--tag", "v7", user="bob")
    last = printed.splitlines()[-1]
    assert code == 1 and re.match(
        r"error: the pull request is made: http.*/alice/drafter/discussions/\d+\. Only", last
    )
    assert "403: You don't have the rights" in last and "for the owner of alice/drafter: hf repos tag create" in last


@pytest.mark.own
@pytest.mark.parametrize("part", ["/preupload/", "/commit/", "/branch/"])
def test_a_repository_that_was_made_for_a_refused_upload_is_named(trained, run, hub, refuse, part):
    repo = f"alice/made-{part.strip('/')}"
    words = ["--drafter", str(trained), "--repo", repo, "--target", "alice/target", "--revision", "trial"]
    refuse(part)
    for made in (True, False):
        code, printed = run(*PUSH_QUICKLY, *words)
        last = printed.splitlines()[-1]
        assert code == 1 and last.startswith("error: the Hub refused") and "404: no such page" in last
        assert (f"The repository {repo} was made before that, and no drafter is in it." in last) == made
    refuse(None)
    code, printed = run(*PUSH_QUICKLY, *words)
    assert code == 0, printed
    assert set(contents(hub.repository(repo), "trial")) == PUBLISHED


@pytest.mark.own
def test_a_connection_that_is_lost_in_the_commit_is_not_called_a_failure(trained, online, monkeypatch, without_reload):
    def lost(*_, **__):
        raise ReadTimeout("timed out")

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lost)
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: None)
    with pytest.raises(
        HalfPublished, match="timed out.*Whether alice/lost has the commit is not known.*the same comm"
    ):
        push(trained, "alice/lost", target="alice/target")


@pytest.mark.own
def test_a_private_push_never_lands_in_a_public_repository(published, trained, run):
    words = ["--drafter", str(trained), "--repo", "alice/drafter", "--target", "alice/target", "--private"]
    before = len(published.repository.history("main"))
    code, printed = run(*PUSH_QUICKLY, *words)
    assert code == 1 and "error: --private: alice/drafter exists and is public" in printed.splitlines()[-1]
    assert "leave out --private" in printed and len(published.repository.history("main")) == before


@pytest.mark.own
def test_a_tag_never_has_the_name_of_a_branch(trained, online, run, hub):
    for tag, revision in (("main", None), ("main", "trial"), ("v1", "v1")):
        with pytest.raises(ValueError, match=f"--tag {tag} is the branch's name"):
            push(trained, "alice/branch", tag=tag, revision=revision)
    words = ["--drafter", str(trained), "--repo", "alice/branch", "--target", "alice/target"]
    assert run(*PUSH_QUICKLY, *words, "--revision", "next")[0] == 0
    code, printed = run(*PUSH_QUICKLY, *words, "--tag", "next")
    assert code == 1 and "error: --tag next is the name of a branch of alice/branch" in printed.splitlines()[-1]


@pytest.mark.own
def test_what_is_no_drafter_is_not_fetched_to_find_that_out(trained, run, hub, tmp_path):
    hub.requests.clear()
    code, printed = run("-m", "hf_specauf.hub", "pull", "--repo", "alice/target", "--into", str(tmp_path / "into"))
    assert code == 1 and "Nothing was fetched." in printed.splitlines()[-1] and not (tmp_path / "into").exists()
    assert not [asked for asked in hub.requests if "safetensors" in asked]


@pytest.mark.own
def test_a_base_revision_without_a_base_is_not_ignored(folder, online):
    with pytest.raises(ValueError, match="holds no adapter: --small, --base and --base_revision"):
        check(folder, base_revision="v1")


@pytest.mark.own
@pytest.mark.parametrize("tag", ["v 1", "-v1", "v1/", "v1..2/x y", "a:b"])
def test_a_tag_that_git_does_not_take_is_refused_before_anything_is_made(trained, online, tag):
    with pytest.raises(ValueError, match="is no name that git takes: give one like v1"):
        push(trained, "alice/tagged", tag=tag)


@pytest.mark.own
@pytest.mark.parametrize(
    "words, keys, message",
    [
        (["push", "--repo", "alice/new"], dict(HF_TOKEN="hf_wrong"), "the Hub does not accept the token"),
        (["push", "--repo", "bob/new"], {}, "the token may not do this"),
        (["pull", "--repo", "alice/nothing"], {}, "there is no such repository"),
        (["pull", "--repo", "alice/drafter", "--revision", "v9"], {}, "no such branch, tag or commit"),
        (["pull", "--repo", "alice/gated"], dict(user="bob"), "access to this repository is restricted"),
        (["pull", "--repo", "alice/target"], {}, "is no drafter of this package: its model_type is 'qwen3'"),
        (["pull", "--repo", "alice/drafter"], dict(HF_ENDPOINT="http://127.0.0.1:9"), "cannot be reached"),
    ],
    ids=["401", "403", "404", "revision", "gated", "wrong model", "no network"],
)
def test_errors_of_the_client_are_one_line_and_keep_the_folder(
    published, trained, run, hub, tmp_path, words, keys, message
):
    if "alice/gated" in words:
        code, printed = run("-c", "from huggingface_hub import HfApi; HfApi().create_repo('alice/gated')")
        hub.repository("alice/gated")._write("settings", {"private": False, "gated": "manual"})
    command, *rest = words
    drafter = ["--drafter", str(trained), "--target", "alice/target"]
    rest += drafter if command == "push" else ["--into", str(tmp_path / "into")]
    before = {path.name: path.stat().st_mtime_ns for path in trained.iterdir()}
    code, printed = run("-c", WITHOUT_RELOAD, "hf_specauf.hub", command, *rest, home="home-errors", **keys)
    assert code == 1 and "Traceback" not in printed
    assert printed.splitlines()[-1].startswith("error: ") and message in printed.splitlines()[-1]
    assert {path.name: path.stat().st_mtime_ns for path in trained.iterdir()} == before


def test_recipe_pushes_checkpoints_and_the_finished_drafter(files, run, hub, trained):
    keys = dict(target="alice/target", dataset_name=files / "text.jsonl") | BASE
    keys |= dict(output_dir=files / "pushed", push_to_hub="true", hub_model_id="alice/auto", hub_strategy="every_save")
    keys |= dict(save_steps=2, max_steps=3, eval_prompts=2)
    words = [word for key, value in keys.items() for word in (f"--{key}", *str(value).split())]
    code, printed = run("-c", WITHOUT_RELOAD, "hf_specauf.train", *words)
    assert code == 0, printed
    history = hub.repository("alice/auto").history("main")
    messages = [commit["message"] for commit in history]
    assert messages[0] == "Upload drafter" and "Training in progress, step 2" in messages
    for commit in history[:-1]:
        assert set(commit["files"]) <= PUBLISHED and {"model.safetensors", "README.md"} <= set(commit["files"])
    assert set(history[0]["files"]) == PUBLISHED
    assert b"**not measured**" in contents(hub.repository("alice/auto"), history[-2]["oid"])["README.md"]
    config = json.loads(contents(hub.repository("alice/auto"))["config.json"])
    assert config["target_revision"] == hub.repository("alice/target").resolve("main")


@pytest.mark.own
def test_a_checkpoint_that_cannot_be_published_is_kept_and_training_goes_on(files, run, hub, trained):
    keys = dict(target=files / "target", dataset_name=files / "text.jsonl") | BASE
    keys |= dict(output_dir=files / "unpushed", push_to_hub="true", hub_model_id="alice/local", save_steps=1)
    words = [word for key, value in keys.items() for word in (f"--{key}", *str(value).split())]
    code, printed = run("-m", "hf_specauf.train", *words)
    refused = [line for line in printed.splitlines() if "checkpoint-1 was not published: the drafter's target" in line]
    assert len(refused) == 1 and "--target OWNER/NAME" in refused[0]
    last = printed.splitlines()[-1]
    assert code == 1 and last.startswith("error: the drafter's target is the local path")
    out = files / "unpushed"
    assert f"The drafter is trained and lies in {out}; the one command that is left: specauf push" in last
    assert last.endswith(f"specauf push --drafter {out} --repo alice/local")
    assert {"checkpoint-1", "checkpoint-2", "checkpoint-3", "eval.json"} <= set(os.listdir(files / "unpushed"))


def test_domino_drafter_and_an_adapter_on_it_are_published_and_used_without_the_package(
    files, run, hub, trained, lora
):
    out = files / "domino"
    target = AutoModelForCausalLM.from_pretrained(files / "target", dtype=torch.float64)
    prompts = random_prompts(6, 9)
    texts = target.generate(prompts, max_new_tokens=30, do_sample=False, eos_token_id=None, suppress_tokens=[2])
    rows = [json.dumps({"input_ids": text, "supervised": [0] * 9 + [1] * 30}) + "\n" for text in texts.tolist()]
    (files / "written.jsonl").write_text("".join(rows))
    keys = dict(target=files / "target", dataset_name=files / "written.jsonl", output_dir=out)
    keys |= BASE | dict(
        drafter_type="domino", objective="b_auf", gru_hidden_dim=12, emb_dim=8, eval_prompts=2, eval_rows=2
    )
    keys |= dict(max_steps=150, learning_rate=5e-3, anchors_per_row=16, per_device_train_batch_size=4)
    keys |= dict(logging_steps=50)
    train([word for key, value in keys.items() for word in (f"--{key}", *str(value).split())])
    words = ["--drafter", str(out), "--repo", "alice/domino", "--target", "alice/target", "--tag", "v1"]
    code, printed = run("-m", "hf_specauf.hub", "push", *words)
    assert code == 0, printed
    found = contents(hub.repository("alice/domino"))
    assert set(found) == DOMINO_PUBLISHED
    card = found["README.md"].decode()
    assert 'custom_generate="alice/domino",\n    revision="v1"' in card and "speculation_type" not in card
    assert "arxiv:2605.29707" in card and "B-AUF (Accept-Until-Fail)" in card and "drafter_type: domino" in card
    assert "| causal head | state 12, rank 8, 1 uncorrected, shift_label True |" in card
    run_snippets(run, card, 2)
    code, printed = run("-c", CUSTOM_GENERATE.format(prompt=prompts[:1].tolist()), user=None)
    assert code == 0, printed
    module, plain, *assisted, passes, refused = json.loads(
        next(line for line in printed.splitlines() if line.startswith("["))
    )
    assert module.startswith("transformers_modules.")
    assert plain == assisted[0] == assisted[1] and len(plain) > 9
    assert "custom_generate=" in refused
    assert passes < 2 * (len(plain) - 9)  # drafts were accepted
    adapted = lora("adapted-domino", drafter=out, objective="b_auf")
    words = ["--drafter", str(adapted), "--repo", "alice/adapted-domino", "--target", "alice/target", "--small"]
    code, printed = run("-m", "hf_specauf.hub", "push", *words, "--base", "alice/domino", "--base_revision", "v1")
    assert code == 0, printed
    found = contents(hub.repository("alice/adapted-domino"))
    assert "adapter_model.safetensors" in found and "model.safetensors" not in found
    run_snippets(run, found["README.md"].decode(), 2)


# ---- LoRA drafters

LOAD = """
import json, sys, torch
from transformers import AutoModel, AutoModelForCausalLM
target = AutoModelForCausalLM.from_pretrained("alice/target", dtype=torch.float64)
{load}
prompt = torch.tensor({prompt})
keys = dict(max_new_tokens=24, do_sample=False)
plain = target.generate(prompt, **keys)[0].tolist()
assisted = target.generate(prompt, assistant_model=drafter, speculation_type="dflash", **keys)[0].tolist()
print(json.dumps([drafter.fc.weight.sum().item(), plain, assisted]))
"""
PACKAGE = "from hf_specauf import from_target, load_drafter\ndrafter = "
STRANGER = """
sys.modules["hf_specauf"] = None
from peft import PeftModel
base = AutoModel.from_pretrained("alice/drafter", revision="v1", trust_remote_code=True, dtype=torch.float64)
drafter = PeftModel.from_pretrained(base, "alice/adapted").merge_and_unload()
"""


SMALL = ["--base", "alice/drafter", "--base_revision", "v1", "--small"]
SWITCH = """
import json, torch
from transformers import AutoModelForCausalLM
from hf_specauf import add_adapter, load_drafter
target = AutoModelForCausalLM.from_pretrained("alice/target", dtype=torch.float64)
drafter = load_drafter("alice/drafter", "v1", dtype="float64")
drafter = add_adapter(drafter, "alice/adapted", "one", revision="main")
drafter = add_adapter(drafter, "alice/adapted-more", "two")
prompt, noise, context = torch.tensor({prompt}), torch.ones(1, 4, 32).double(), torch.ones(1, 9, 64).double()
keys = dict(max_new_tokens=24, do_sample=False)
plain = target.generate(prompt, **keys)[0].tolist()
outputs, drafts = [], []
for name in ("one", "two", "one", "two"):
    drafter.set_adapter(name)
    more = dict(assistant_model=drafter, speculation_type="dflash")
    outputs.append(target.generate(prompt, **keys, **more)[0].tolist())
    with torch.no_grad():
        drafts.append(drafter(noise, context).last_hidden_state.flatten().tolist())
print(json.dumps([plain, outputs, drafts]))
"""


@pytest.fixture(scope="module")
def lora(files, trained, tmp_path_factory):
    """Trains a LoRA drafter of the target -> its folder."""

    def lora(name: str, **keys) -> Path:
        out = tmp_path_factory.mktemp(name) / "out"
        fixed = dict(target=files / "target", dataset_name=files / "text.jsonl", output_dir=out)
        keys = fixed | BASE | dict(use_peft="true", lora_r=4, learning_rate=0.05) | keys
        keys = {key: value for key, value in keys.items() if value is not None}
        train([word for key, value in keys.items() for word in (f"--{key}", *str(value).split())])
        return out

    return lora


def loads(run, load: str) -> float:
    """Load a drafter in a process of its own and generate with it -> a sum over its weights."""
    code, printed = run("-c", LOAD.format(load=load, prompt=random_prompts(1, 9).tolist()), user=None)
    assert code == 0, printed
    number, plain, assisted = json.loads(next(line for line in printed.splitlines() if line.startswith("[")))
    assert plain == assisted and len(plain) > 9
    return number


def run_snippets(run, card: str, expected: int) -> None:
    """Run a card's usage lines as they are printed, with the package and without it, as a stranger."""
    snippets = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(snippets) == expected
    for snippet, before in zip(snippets, ("", "import sys\nsys.modules['hf_specauf'] = None\n")):
        after = "\nplain = target.generate(**inputs, max_new_tokens=128)\nprint('same', output.equal(plain))"
        code, printed = run("-c", before + snippet + after, user=None)
        assert code == 0 and "same True" in printed, printed


def test_usage_lines_of_a_whole_drafter_run_as_printed(published, run):
    run_snippets(run, contents(published.repository, "v1")["README.md"].decode(), 2)


def test_adapter_is_published_alone_or_merged_and_pins_its_base(published, trained, lora, run, hub, tmp_path):
    out = lora("adapted", drafter=trained)
    push = ["-m", "hf_specauf.hub", "push", "--drafter", str(out), "--target", "alice/target", "--repo"]
    code, printed = run(*push, "alice/adapted", "--small")
    assert code == 1 and "was adapted from the local path" in printed and "--base OWNER/NAME" in printed
    for repo, small in (("alice/adapted", SMALL), ("alice/adapted-merged", SMALL[:-1])):
        code, printed = run(*push, repo, *small)
        assert code == 0, printed
    found = contents(hub.repository("alice/adapted"))
    assert set(found) == {
        ".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors", "alpha.png", "base.json",
        "eval.json", "provenance.json",
    }  # fmt: skip
    assert set(contents(hub.repository("alice/adapted-merged"))) == PUBLISHED
    config = json.loads(found["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("alice/drafter", published.commit)
    base = json.loads(found["base.json"])
    target = hub.repository("alice/target").resolve("main")
    known = {"name_or_path": "alice/target", "revision": target}
    assert known.items() <= base["trained_for"]["target"].items() and base["trained_for"]["target"]["fingerprint"]
    card = found["README.md"].decode()
    run_snippets(run, card, 2)
    assert "base_model: alice/drafter" in card and 'load_drafter("alice/adapted", revision="main")' in card
    assert f"| adapted from | `alice/drafter` at {published.commit}; LoRA, r 4, alpha 32; tau on the same" in card
    assert re.search(r"held-out prompts \d\.\d\d before, \d\.\d\d after", card)
    assert "drafter: alice/drafter" in card and str(trained) not in card
    sums = [
        loads(run, PACKAGE + "load_drafter('alice/adapted').double()"),
        loads(run, PACKAGE + "load_drafter('alice/adapted-merged').double()"),
        loads(run, STRANGER),
    ]
    assert sums == pytest.approx([sums[0]] * 3, rel=1e-5)
    code, printed = run("-m", "hf_specauf.hub", "pull", "--repo", "alice/adapted", "--into", str(tmp_path / "pulled"))
    assert code == 0, printed
    with pytest.raises(SystemExit, match="holds an adapter alone.*README.md"):
        card_command(["render", str(tmp_path / "pulled"), "--repo", "alice/adapted"])
    # and another one on the same base, switched with the first between calls
    out = lora("adapted-more", drafter=trained, seed=8)
    push[push.index("--drafter") + 1] = str(out)
    code, printed = run(*push, "alice/adapted-more", *SMALL)
    assert code == 0, printed
    code, printed = run("-c", SWITCH.format(prompt=random_prompts(1, 9).tolist()), user=None)
    assert code == 0, printed
    plain, outputs, drafts = json.loads(next(line for line in printed.splitlines() if line.startswith("[")))
    assert outputs == [plain] * 4 and len(plain) > 9
    assert drafts[0] == drafts[2] and drafts[1] == drafts[3] and drafts[0] != drafts[1]


@pytest.mark.own
def test_an_adapter_on_a_z_lab_drafter_is_published_small_once_that_is_converted(
    published, trained, lora, run, hub, tmp_path
):
    folder, drafter = tmp_path / "z-lab", load_drafter(trained)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(z_lab(drafter)))
    for scale in (2, 1):  # another drafter, then the right one
        state = {name: tensor * scale for name, tensor in drafter.state_dict().items()}
        save_file(state, folder / "model.safetensors")
        code, printed = run("-c", UPLOAD.format(repo="alice/z-lab", folder=str(folder)))
        assert code == 0, printed
    right, other, *_ = (commit["oid"] for commit in hub.repository("alice/z-lab").history("main"))
    out = lora("adapted-z-lab", drafter=folder)
    push = ["-m", "hf_specauf.hub", "push", "--target", "alice/target", "--drafter"]
    small = [*push, str(out), "--repo", "alice/adapted-z-lab", "--small", "--base"]
    code, printed = run(*small, "alice/z-lab")
    assert code == 1 and "the base alice/z-lab is in another layout" in printed and "hf_specauf.convert" in printed
    code, printed = run(*small, "alice/z-lab", "--base_revision", other)
    assert code == 1 and f"alice/z-lab at {other} has other weights than the drafter this was adapted from" in printed
    convert = ["--drafter", "alice/z-lab", "--drafter_revision", right, "--target", "alice/target"]
    for words in (
        ["-m", "hf_specauf.convert", *convert, "--out", str(tmp_path / "ours")],
        [*PUSH_QUICKLY, *push[3:], str(tmp_path / "ours"), "--repo", "alice/converted", "--allow_unmeasured"],
        [*small, "alice/converted"],
    ):
        code, printed = run(*words)
        assert code == 0, printed
    config = json.loads(contents(hub.repository("alice/adapted-z-lab"))["adapter_config.json"])
    assert config["base_model_name_or_path"] == "alice/converted"
    found = loads(run, PACKAGE + "load_drafter('alice/adapted-z-lab').double()")
    assert found == pytest.approx(load_drafter(out).double().fc.weight.sum().item(), rel=1e-5)


def test_a_drafter_trained_further_in_full_names_what_it_started_from(published, lora, online, tmp_path):
    keys = dict(drafter="alice/drafter", drafter_revision="v1", use_peft=None, lora_r=None)
    out = lora("warm", **keys)
    text = render(out, "alice/warm").text
    assert f"| adapted from | `alice/drafter` at {published.commit}; trained in full; tau on the same held-out" in text
    assert "lora" not in render(out, "alice/warm").data.tags


@pytest.mark.own
def test_borrowed_drafter_is_published_small_and_rebuilt_from_the_target_alone(published, lora, run, hub, tmp_path):
    out = lora("borrowed", init_from_target_layers="1 3", num_draft_layers=None)
    push = ["-m", "hf_specauf.hub", "push", "--drafter", str(out), "--target", "alice/target", "--repo"]
    code, printed = run(*push, "alice/borrowed", "--small")
    assert code == 0, printed
    found = contents(hub.repository("alice/borrowed"))
    assert {name for name in found if "safetensors" in name} == {"adapter/adapter_model.safetensors"}
    assert "adapter_config.json" not in found  # in the root it would attach to the target
    assert json.loads(found["adapter/base.json"])["name_or_path"] == "alice/target"
    card = found["README.md"].decode()
    run_snippets(run, card, 1)
    assert 'from_target(target, "alice/borrowed", revision="main")' in card and "trust_remote_code" not in card
    rebuilt = loads(run, PACKAGE + "from_target(target, 'alice/borrowed').double()")
    code, printed = run("-m", "hf_specauf.hub", "pull", "--repo", "alice/borrowed", "--into", str(tmp_path))
    assert code == 0, printed
    assert "layers [1, 3] of the target" in render(tmp_path, "alice/borrowed").text
    assert 'from_target(target, "alice/borrowed"' in render(tmp_path, "alice/borrowed").text
    code, printed = run(*push, "alice/borrowed-merged")
    assert code == 0, printed
    merged = loads(run, PACKAGE + "load_drafter('alice/borrowed-merged').double()")
    assert rebuilt == pytest.approx(merged, rel=1e-6)
    for way in (
        "import hf_specauf\nmore = {}",
        "sys.modules['hf_specauf'] = None\nmore = {'trust_remote_code': True}",
    ):
        load = f"{way}\ndrafter = AutoModel.from_pretrained('alice/borrowed', **more)"
        code, printed = run("-c", LOAD.format(load=load, prompt=[[5]]), user=None)
        assert code == 1 and "hf_specauf.from_target(target, folder_or_repo)" in printed


# ---- what is never published


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of the trained drafter whose config names a target on the Hub."""
    for path in trained.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    rename_target(tmp_path, "alice/target")
    return tmp_path


def test_check_names_what_would_be_published_and_changes_nothing(folder, online, warm_reload):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(check(folder)) == PUBLISHED - {".gitattributes"}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def rename_target(folder, name) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"target_model_name_or_path": name}))


@pytest.mark.own
def test_a_target_that_the_hub_does_not_have_is_refused(folder, online):
    for path in ("../target", "./target", "target"):
        rename_target(folder, path)
        with pytest.raises(ValueError, match="target is the local path.*--target OWNER/NAME"):
            check(folder)
    rename_target(folder, "models/ft")  # a folder on another machine
    with pytest.raises(RepositoryNotFoundError):
        check(folder)


@pytest.mark.own
def test_a_repository_that_holds_a_drafter_is_no_target(published, folder, online):
    said = "--target: 'alice/drafter' holds a drafter for the target 'alice/target', .* give that target"
    with pytest.raises(ValueError, match=said):
        load_target("alice/drafter", key="--target")
    with pytest.raises(ValueError, match=said):
        check(folder, target="alice/drafter")


def test_no_network_ends_the_check_in_one_line(folder, run):
    words = ["-m", "hf_specauf.hub", "check", str(folder)]
    code, printed = run(*words, home="home-errors", HF_ENDPOINT="http://127.0.0.1:9")
    assert code == 1 and "Traceback" not in printed
    assert "cannot be reached" in printed.splitlines()[-1]


@pytest.mark.own
def test_what_was_measured_on_another_target_is_not_published(folder, online, without_reload):
    record = json.loads((folder / "eval.json").read_text())
    other = record | {"target": record["target"] | {"fingerprint": "0" * 16, "name_or_path": "a/fine-tune"}}
    (folder / "eval_other.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="eval_other.json was measured on a/fine-tune, and the drafter's target is"):
        check(folder)
    del other["target"]["fingerprint"]
    (folder / "eval_other.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="eval_other.json was measured on a/fine-tune"):
        check(folder)
    other["target"]["name_or_path"] = "alice/target"
    (folder / "eval_other.json").write_text(json.dumps(other))
    assert "eval_other.json" in check(folder)


@pytest.mark.own
def test_a_card_rendered_by_itself_names_no_folder_of_its_maker(trained, files, tmp_path):
    card_command(["render", str(trained), "--repo", "alice/drafter", "--out", str(tmp_path / "card.md")])
    text = (tmp_path / "card.md").read_text()
    assert str(files) not in text and "dataset_name: text.jsonl" in text and "target: target" in text


@pytest.mark.own
def test_a_drafter_trained_anew_is_not_published_with_what_the_one_before_reached(files, trained, tmp_path):
    (tmp_path / "adapter").mkdir()
    for name in ("eval.json", "eval_mine.json", "alpha.png", "adapter/base.json"):
        (tmp_path / name).write_text("{}")
    keys = dict(target=files / "target", dataset_name=files / "text.jsonl", output_dir=tmp_path)
    keys |= BASE | dict(eval_prompts=0, max_steps=1)
    train([word for key, value in keys.items() for word in (f"--{key}", *str(value).split())])
    assert {path.name for path in tmp_path.iterdir()} >= {"config.json", "model.safetensors", "provenance.json"}
    assert not [*tmp_path.glob("eval*.json"), *tmp_path.glob("alpha.png"), *tmp_path.glob("adapter")]


@pytest.mark.own
def test_rounding_of_bf16_is_the_same_drafter_and_other_weights_are_not(tmp_path):
    drafter = make_drafter(make_target(dtype=torch.float32), layers=5, dtype=torch.bfloat16)
    elsewhere, other = (make_drafter(make_target(dtype=torch.float32), layers=5, dtype=torch.bfloat16) for _ in "ab")
    generator = torch.Generator().manual_seed(0)
    for weight in elsewhere.parameters():  # one in ten rounded the other way
        last_bit = torch.rand(weight.shape, generator=generator) < 0.1
        weight.data = (weight.data.view(torch.int16) + last_bit.short()).view(torch.bfloat16)
    check_same(drafter, outputs_of(elsewhere), "made elsewhere")
    with pytest.raises(ValueError, match="gives other outputs"):
        check_same(drafter.float(), outputs_of(elsewhere.float()), "made elsewhere")
    drafter.bfloat16()
    other.fc.weight.data += 0.1 * other.fc.weight.data.std()
    with pytest.raises(ValueError, match="gives other outputs"):
        check_same(drafter, outputs_of(other), "another")


@pytest.mark.own
def test_local_target_missing_evaluation_and_pickles_are_refused(folder, trained, online, without_reload):
    with pytest.raises(ValueError, match="target is the local path.*--target OWNER/NAME"):
        check(trained)
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds pytorch_model.bin: loading a pickle runs code"):
        check(folder)
    (folder / "pytorch_model.bin").unlink()
    (folder / "eval.json").unlink()
    with pytest.raises(ValueError, match="holds no eval.json.*--allow_unmeasured"):
        check(folder)
    assert "eval.json" not in check(folder, allow_unmeasured=True)
    with pytest.raises(ValueError, match="is no drafter's folder"):
        check(folder / "nowhere")


@pytest.mark.own
def test_folder_whose_reload_gives_other_outputs_is_refused(folder, tmp_path, request):
    drafter = make_drafter(make_target(dtype=torch.float32))
    drafter.save_pretrained(tmp_path / "good")
    check_reload(drafter, tmp_path / "good")  # by an interpreter that starts cold
    request.getfixturevalue("warm_reload")
    weights = load_file(tmp_path / "good" / "model.safetensors")
    weights["fc.weight"] += 0.1
    save_file(weights, tmp_path / "good" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="gives other outputs than here"):
        check_reload(drafter, tmp_path / "good")
    (tmp_path / "good" / "modeling_dflash.py").write_text("import a_package_nobody_has\n")
    with pytest.raises(
        ValueError, match="does not load in a clean process.*a_package_nobody_has.*Save the drafter again"
    ):
        check_reload(drafter, tmp_path / "good")


@pytest.mark.own
def test_a_causal_head_that_reloads_otherwise_is_refused(tmp_path, warm_reload):
    drafter = make_domino(make_target(dtype=torch.float32))
    drafter.save_pretrained(tmp_path)
    check_reload(drafter, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["prefix_gru.weight_hh_l0"] += 0.1
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="gives other outputs than here"):
        check_reload(drafter, tmp_path)


@pytest.mark.own
def test_secrets_in_text_are_found_and_refused(folder, online, tmp_path, monkeypatch):
    monkeypatch.setattr("getpass.getuser", lambda: "grace")
    (tmp_path / "into").mkdir()
    record = json.loads((folder / "eval.json").read_text())
    record["conditions"]["prompts"] = "the prompts that grace keeps"
    (folder / "eval.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="README.md: user name; eval.json: user name"):
        stage(folder, tmp_path / "into", "alice/x", PublishOptions())
    (tmp_path / "into" / "eval.json").write_text("token hf_" + "a1B2" * 9)
    assert "eval.json: something that looks like a token" in find_secrets(tmp_path / "into")


@pytest.mark.own
def test_paths_and_tokens_leave_a_record():
    record = {"data": "/home/grace/rows.jsonl", "hub_token": "x", "output_dir": "out", "nested": [{"p": "../a/b.txt"}]}
    record |= {"id": "Qwen/Qwen3-8B", "mixed": "org/data + /mnt/x.jsonl + a/b", "hub_model_id": "me/x", "why": "a + b"}
    assert public(record) == {
        "data": "rows.jsonl", "nested": [{"p": "b.txt"}], "id": "Qwen/Qwen3-8B", "mixed": "org/data + x.jsonl + a/b",
        "why": "a + b",
    }  # fmt: skip
