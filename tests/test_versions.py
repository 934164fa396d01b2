"""One package, one published folder, several versions of transformers.

`make test` runs this on the newest and on the oldest version, and names the other one's interpreter in
`SPECAUF_OTHER_PYTHON`: what is made here must work there, and both ways are tried so.
"""

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, attach, final, make_domino, make_drafter, make_target, overfit, random_prompts, warm_python
from loopback_hub import LoopbackHub
from transformers import AutoModel, AutoModelForCausalLM
from warm_python import WarmPython

import hf_specauf
from hf_specauf.drafters import transformers_internals
from hf_specauf.drafters.transformers_internals import CACHE, TESTED, VERSION
from hf_specauf.identity import target_fingerprint, tokenizer_hashes
from hf_specauf.regenerate import main as regenerate
from hf_specauf.train import main as train

pytestmark = pytest.mark.internals
OTHER = os.environ.get("SPECAUF_OTHER_PYTHON")
needs_other = pytest.mark.skipif(OTHER is None, reason="SPECAUF_OTHER_PYTHON names no interpreter; `make test` does")
CODE_OF_0_1_0 = Path(__file__).parent / "published_0.1.0"
KEYS = dict(max_new_tokens=24, do_sample=False)
# A stranger's process: the drafter's own code, this package out of reach.
STRANGER = """
import json, sys
sys.modules["hf_specauf"] = None
import torch, transformers
from transformers import AutoModel, AutoModelForCausalLM
target, drafter, prompt, keys = json.loads(sys.argv[1])
name = drafter
target = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float64)
drafter = AutoModel.from_pretrained(name, trust_remote_code=True, dtype=torch.float64)
passes = []
target.register_forward_hook(lambda *_: passes.append(1))
if hasattr(drafter, "generate_for"):
    keys |= dict(custom_generate=name, trust_remote_code=True)
    if hasattr(drafter, "get_drafts"):  # not in 0.1.0
        keys |= dict(draft_length=None, lookup=False)
else:
    keys |= dict(speculation_type="dflash")
tokens = target.generate(torch.tensor(prompt), assistant_model=drafter, **keys)[0].tolist()
found = dict(version=transformers.__version__, module=type(drafter).__module__, tokens=tokens, passes=len(passes))
print("FOUND", json.dumps(found))
"""
UPLOAD = """
import sys
from huggingface_hub import HfApi
HfApi().create_repo(sys.argv[1])
HfApi().upload_folder(repo_id=sys.argv[1], folder_path=sys.argv[2])
"""


def run(python: str, *words: str) -> tuple[int, str]:
    """Run an interpreter -> (exit code, printed)."""
    return warm_python(python).run(*words)


def stranger(python: str, pair, drafter: str, hub: LoopbackHub | None = None) -> dict:
    """What a process without this package makes of a drafter: of a folder, or of a repository of a Hub."""
    target = str(pair.folder / "target") if hub is None else "alice/target"
    words = ["-c", STRANGER, json.dumps([target, drafter, pair.prompt.tolist(), KEYS])]
    code, printed = run(python, *words) if hub is None else hub.run(*words, python=python, home=pair.folder / "reader")
    assert code == 0, printed
    return json.loads(next(line for line in printed.splitlines() if line.startswith("FOUND"))[6:])


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """target/, dflash/ and domino/, saved here; a prompt they help with, and what the target makes of it."""
    folder = tmp_path_factory.mktemp("versions")
    target = make_target()
    prompt = random_prompts(2)
    texts = target.generate(prompt, max_new_tokens=30, do_sample=False)
    target.save_pretrained(folder / "target")
    for name, make in (("dflash", make_drafter), ("domino", make_domino)):
        overfit(make(target), target, texts, prompt.shape[1], steps=60).save_pretrained(folder / name)
    plain = target.generate(prompt[:1], **KEYS)[0].tolist()
    return SimpleNamespace(folder=folder, target=target, prompt=prompt[:1], plain=plain)


@pytest.fixture(scope="module")
def hub(pair):
    """A Hub that has alice/target."""
    with LoopbackHub(pair.folder / "hub") as hub:
        upload(hub, "alice/target", pair.folder / "target")
        yield hub


def as_alice(hub: LoopbackHub, *words: str) -> str:
    """Run python as she does -> what it printed."""
    code, printed = hub.run(*words, home=hub.folder / "home", user="alice")
    assert code == 0, printed
    return printed


def upload(hub: LoopbackHub, repo: str, folder: Path) -> None:
    as_alice(hub, "-c", UPLOAD, repo, str(folder))


def with_code_of_0_1_0(pair, kind: str, into: Path) -> Path:
    """A folder as hf_specauf 0.1.0 published it: the same weights and config, its own code."""
    folder = shutil.copytree(pair.folder / kind, into)
    for path in folder.glob("*.py"):
        path.unlink()
    for path in CODE_OF_0_1_0.glob("*.py"):
        if kind == "domino" or "domino" not in path.name:
            shutil.copy(path, folder)
    return folder


# ---- what is made by one version works on the other


@needs_other
def test_the_other_interpreter_has_another_tested_version():
    code, printed = run(OTHER, "-c", "import transformers; print(transformers.__version__)")
    there, here = (".".join(version.strip().split(".")[:2]) for version in (printed.splitlines()[-1], VERSION))
    assert code == 0 and {there, here} == set(TESTED)


@needs_other
@pytest.mark.parametrize("kind", ["dflash", "domino"])
def test_a_folder_saved_here_generates_the_same_tokens_there_without_the_package(pair, kind):
    here, there = (stranger(python, pair, str(pair.folder / kind)) for python in (sys.executable, OTHER))
    assert here["version"] != there["version"]
    assert here["module"].startswith("transformers_modules.") and there["module"].startswith("transformers_modules.")
    assert there["tokens"] == here["tokens"] == pair.plain
    assert there["passes"] == here["passes"] < 24 - 6  # it drafts, and as well


@needs_other
@pytest.mark.parametrize("kind", ["dflash", "domino"])
def test_what_is_pushed_here_is_loaded_from_the_hub_there(pair, hub, kind, tmp_path):
    words = ["--drafter", str(pair.folder / kind), "--repo", f"alice/{kind}", "--allow_unmeasured"]
    as_alice(hub, "-m", "hf_specauf.hub", "push", *words, "--target", "alice/target")
    found = stranger(OTHER, pair, f"alice/{kind}", hub)
    assert found["tokens"] == pair.plain and found["passes"] < 24 - 6
    words = ["--repo", f"alice/{kind}", "--into", str(tmp_path / kind)]
    code, printed = hub.run("-m", "hf_specauf.hub", "pull", *words, python=OTHER, home=pair.folder / "reader")
    assert code == 0 and "its own code" not in printed, printed


@needs_other
def test_training_begun_there_goes_on_here(command, files, tmp_path):
    words = command(max_steps=4, save_steps=2, output_dir=tmp_path / "there")
    code, printed = run(OTHER, "-m", "hf_specauf.train", *words)
    assert code == 0, printed
    resume = tmp_path / "there" / "checkpoint-2"
    train(command(max_steps=4, save_steps=2, output_dir=tmp_path / "here", resume_from_checkpoint=resume))
    there, here = final(tmp_path / "there"), final(tmp_path / "here")
    assert there.keys() == here.keys()
    for name, tensor in there.items():
        torch.testing.assert_close(here[name], tensor, rtol=1e-5, atol=1e-7, msg=name)


@needs_other
@pytest.mark.parametrize("architecture", ["qwen3", "mixtral"])
def test_answers_regenerated_there_are_the_same_job_here(architecture, files, tokenizer, tmp_path, capsys):
    ids = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None)
    target = make_target(architecture, dtype=torch.float32, vocab_size=len(tokenizer), **ids)
    for part in (target, tokenizer):
        part.save_pretrained(tmp_path / "target")
    keys = dict(target=tmp_path / "target", dataset_name=files / "chat.jsonl", out=tmp_path / "own.jsonl", max_rows=3)
    keys |= dict(max_new_tokens=4, temperature=0, device="cpu")
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    code, printed = run(OTHER, "-m", "hf_specauf.regenerate", *words)
    assert code == 0, printed
    there = json.loads((tmp_path / "own.settings.json").read_text())
    regenerate(words)  # answers of other settings would be refused
    assert "own.jsonl is finished" in capsys.readouterr().out
    own = tmp_path / "here.jsonl"
    regenerate([str(own) if word == str(tmp_path / "own.jsonl") else word for word in words])
    here = json.loads((tmp_path / "here.settings.json").read_text())
    assert here | {"out": there["out"]} == there and here["target"]["fingerprint"]
    assert own.read_text() == (tmp_path / "own.jsonl").read_text()


# ---- which model is this: the same answer on every version


def in_order(model):
    """Give a model weights that follow from their place alone, so that no random generator is asked."""
    for index, parameter in enumerate(model.parameters()):
        values = torch.arange(parameter.numel(), dtype=torch.float64).add(7.0 * index).sin().mul(0.05)
        parameter.data = values.reshape(parameter.shape).to(parameter.dtype)
    return model


@pytest.mark.parametrize(
    ("architecture", "fingerprint"),
    [
        ("qwen3", "229e6ad9fa199f08"),
        ("gemma3_text", "14164e3eb16d4159"),
        ("gpt2", "1f1037d764fd17b2"),
        ("mixtral", "9044aec29a405a75"),
        ("gpt_oss", "de92735430941363"),
    ],
)
def test_a_targets_fingerprint_is_what_0_1_0_noted_on_every_version(architecture, fingerprint, tmp_path):
    """5.x fuses experts when it loads them, and renames parameters; drafters on the Hub hold these values."""
    target = in_order(make_target(architecture, dtype=torch.float32))
    assert target_fingerprint(target).split("-")[0] == fingerprint
    target.save_pretrained(tmp_path)
    assert target_fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path)) == target_fingerprint(target)


def test_a_tokenizers_hashes_are_what_0_1_0_noted_on_every_version(tokenizer):
    assert tokenizer_hashes(tokenizer) == {
        "tokenizer_hash": "5f6d69d64359b61c",
        "chat_template_hash": "125abb067110785d",
    }


# ---- folders published by 0.1.0


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("kind", ["dflash", "domino"])
def test_a_folder_of_0_1_0_works_with_this_package_whatever_its_own_code_says(pair, kind, trusted, tmp_path):
    folder = with_code_of_0_1_0(pair, kind, tmp_path / kind)
    drafter = AutoModel.from_pretrained(folder, dtype=torch.float64, trust_remote_code=trusted)
    assert type(drafter).__module__.startswith("hf_specauf.")
    with attach(pair.target, drafter) as attachment:
        output = pair.target.generate(pair.prompt, assistant_model=drafter, **KEYS)
    assert output[0].tolist() == pair.plain and attachment.acceptance().tau > 1.3
    assert hf_specauf.generate(pair.target, drafter, pair.prompt, **KEYS)[0].tolist() == pair.plain
    if kind == "dflash":
        native = pair.target.generate(pair.prompt, assistant_model=drafter, speculation_type="dflash", **KEYS)
        assert native[0].tolist() == pair.plain


def test_without_the_package_a_folder_of_0_1_0_stops_at_5_23_as_the_readme_says(pair, tmp_path):
    folder = with_code_of_0_1_0(pair, "dflash", tmp_path / "dflash")
    if CACHE == "past_key_values":
        assert stranger(sys.executable, pair, str(folder))["tokens"] == pair.plain
    else:
        given = json.dumps([str(pair.folder / "target"), str(folder), pair.prompt.tolist(), KEYS])
        code, printed = run(sys.executable, "-c", STRANGER, given)
        assert code != 0 and "unexpected keyword argument 'cache'" in printed
        readme = (ROOT / "README.md").read_text()
        assert "unexpected keyword argument 'cache'" in readme and "transformers==5.23.*" in readme


def test_hub_check_says_where_the_code_of_a_folder_stops_and_what_mends_it(pair, hub, tmp_path):
    folder = with_code_of_0_1_0(pair, "domino", tmp_path / "domino")
    words = ["--target", "alice/target", "--allow_unmeasured"]
    printed = as_alice(hub, "-m", "hf_specauf.hub", "check", str(folder), *words)
    assert f"its own code (*.py) stops at transformers 5.23, and this package's goes to {TESTED[1]}" in printed
    assert "pushing it again" in printed and "modeling_domino.py, overrides.py, target_parts.py" in printed
    assert "stops at" not in as_alice(hub, "-m", "hf_specauf.hub", "check", str(pair.folder / "domino"), *words)


ADAPT = """
import sys
from peft import LoraConfig, get_peft_model
from hf_specauf import load_drafter
from hf_specauf.layouts.adapters import AdapterBase, finish_adapter
drafter = load_drafter("alice/old")
base = AdapterBase.of_drafter(drafter)
get_peft_model(drafter, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(sys.argv[1])
finish_adapter(sys.argv[1], base, drafter.config)
"""


def test_an_adapter_alone_on_a_base_of_0_1_0_says_who_needs_which_version(pair, hub, tmp_path):
    upload(hub, "alice/old", with_code_of_0_1_0(pair, "dflash", tmp_path / "dflash"))
    as_alice(hub, "-c", ADAPT, str(tmp_path / "adapter"))
    words = ["check", str(tmp_path / "adapter"), "--target", "alice/target", "--allow_unmeasured", "--small"]
    printed = as_alice(hub, "-m", "hf_specauf.hub", *words)
    assert "the base alice/old at " in printed and "whose code stops at transformers 5.23" in printed
    assert "Push the base again and name its new commit with --base_revision" in printed


# ---- versions this code does not know


@pytest.mark.parametrize(
    ("version", "newer"),
    [("5.99.0", True), ("6.0rc1", True), ("5.25.0.dev0", True), (f"{TESTED[1]}.7", False), ("5.23.0", False)],
)
def test_a_newer_version_is_one_warning_that_names_the_tested_ones(pair, monkeypatch, version, newer):
    monkeypatch.setattr(transformers_internals, "VERSION", version)
    transformers_internals.warn_if_newer_than_tested.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            AutoModel.from_pretrained(pair.folder / "dflash")
    told = [str(one.message) for one in caught if "tested" in str(one.message)]
    assert len(told) == newer  # once in a process
    for message in told:
        assert f"transformers {version} is newer than" in message and f"({TESTED[0]} to {TESTED[1]})" in message
        assert f"pip install 'transformers=={TESTED[1]}.*'" in message and "\n" not in message


def test_a_version_without_what_is_imported_says_which_to_install():
    code, printed = run(
        sys.executable, "-c", "import transformers.cache_utils as c; del c.DFlashCache; import hf_specauf"
    )
    last = printed.splitlines()[-1]
    assert code != 0 and "DFlashCache" in last and f"pip install 'transformers=={TESTED[1]}.*'" in last


# ---- nothing that transformers is about to remove


def test_training_decoding_and_answers_use_nothing_deprecated(files, command, tmp_path):
    """In processes of their own, since transformers says each thing once in a process. The first one starts cold: what
    the imports themselves say is heard there."""
    out = tmp_path / "out"
    words = command(output_dir=out, activation_checkpointing="true", eval_strategy="steps", eval_steps=2)
    lora = dict(use_peft="true", init_from_target_layers="2", num_draft_layers=1)
    common = ["--target", str(files / "target"), "--max_new_tokens", "8", "--device", "cpu"]
    runs = {
        "train": words,
        "train with LoRA": command(output_dir=tmp_path / "lora", activation_checkpointing="true", **lora),
        "evaluate": [*common, "--drafter", str(out), "--prompts", str(files / "chat.jsonl"), "--count", "2",
                     "--out", str(tmp_path / "eval")],
        "regenerate": [*common, "--dataset_name", str(files / "chat.jsonl"), "--out", str(tmp_path / "own.jsonl"),
                       "--max_rows", "2"],
    }  # fmt: skip
    environment = os.environ | {"PYTHONWARNINGS": "default", "TRANSFORMERS_VERBOSITY": "info"}
    python = WarmPython(environment=environment)
    for name, given in runs.items():
        words = ["-m", f"hf_specauf.{name.split()[0]}", *given]
        if name == "train":
            done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)
            code, printed = done.returncode, done.stdout + done.stderr
        else:
            code, printed = python.run(*words)
        assert code == 0, printed
        ours = [line for line in printed.splitlines() if "deprecat" in line.lower() and "torch.jit" not in line]
        assert ours == [], name
    python.close()


def test_the_old_name_of_activation_checkpointing_still_works(command, tmp_path):
    with pytest.warns(FutureWarning, match="Use `activation_checkpointing` instead"):
        train(command(output_dir=tmp_path / "out", max_steps=1, gradient_checkpointing="true"))
    recipe = json.loads((tmp_path / "out" / "provenance.json").read_text())["recipe"]
    assert recipe["activation_checkpointing"] is True and "gradient_checkpointing" not in recipe
