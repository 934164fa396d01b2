"""`tests/gpu/` on the CPU, tiny: every script runs to its end and writes what its README promises."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, make_target, warm_python

FOLDER = ROOT / "tests" / "gpu"
sys.path.insert(0, str(FOLDER))

import bundle  # noqa: E402
import dequantize  # noqa: E402
import shapes  # noqa: E402
import training  # noqa: E402

SCRIPTS = sorted(FOLDER.glob("*.sh"))
HEAD = {"command", "date", "commit", "environment", "headline"}


@pytest.fixture(scope="module")
def machine(files, tmp_path_factory):
    """What the GPU machine would hold after the first call: the variables of setup.sh, over a folder with a target,
    data, prompts, and nothing left to install."""
    folder = tmp_path_factory.mktemp("machine")
    keep = folder / "keep"
    (keep / "first").mkdir(parents=True)
    (keep / "target").symlink_to(files / "target")
    shutil.copy(files / "chat.jsonl", keep / "share.jsonl")
    for name in ("humaneval", "mtbench"):
        shutil.copy(files / "chat.jsonl", keep / "first" / f"{name}.jsonl")
    recipe = {
        "num_draft_layers": 1, "block_size": 4, "target_layer_ids": [0, 2], "max_length": 96, "eval_rows": 3,
        "anchors_per_row": 4, "per_device_train_batch_size": 2, "logging_steps": 1, "eval_prompts": 1,
        "eval_new_tokens": 8, "disable_tqdm": True, "report_to": "none", "seed": 0,
    }  # fmt: skip
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    variables = {
        "PYTHON": str(warm_python().executable), "KEEP": str(keep), "BUNDLE": str(folder / "nothing"),
        "CUDA_VISIBLE_DEVICES": "", "HF_DATASETS_CACHE": str(folder / "cache"), "SPECAUF_COMMIT": "none",
    }  # fmt: skip
    return folder, os.environ | variables


def run(script: str, out: Path, environment: dict, **variables: str) -> dict[str, dict]:
    """One script of the GPU machine -> the JSON files that it wrote, by name."""
    done = subprocess.run(
        ["bash", str(FOLDER / script), str(out)], env=environment | variables, cwd=out.parent, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return {path.name: json.loads(path.read_text()) for path in out.glob("*.json")}


def check_head(record: dict) -> None:
    assert HEAD <= set(record)
    assert {"torch", "transformers"} <= set(record["environment"]["packages"])
    assert record["environment"]["hardware"].startswith("CPU, ")
    assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?|none", record["commit"])


def test_the_first_call_writes_what_tests_and_shapes_gave(machine):
    folder, environment = machine
    out = folder / "first"
    found = run("check.sh", out, environment, SELECT="muon_step and cpu", JOBS="tiny tiny_checkpointing")
    assert set(found) == {"gpu_tests.json", "gpu_shapes.json"}
    tests, timed = found["gpu_tests.json"], found["gpu_shapes.json"]
    check_head(tests)
    assert (tests["passed"], tests["failed"], tests["exit_code"]) == (1, 0, 0)
    assert tests["tests"][0]["test"].endswith("test_a_muon_step_is_the_cpus[cpu]")
    check_head(timed)
    assert timed["seed"] == 0 and timed["left_out"] == []
    plain, checkpointed = timed["jobs"]["tiny"], timed["jobs"]["tiny_checkpointing"]
    for row in (plain, checkpointed):
        assert len(row["seconds"]) == 3 and all(seconds > 0 for seconds in row["seconds"])
        assert {"seconds_a_micro_batch", "first_seconds", "logging_seconds", "active_ratio", "loss"} <= set(row)
    assert checkpointed["ratio"]["seconds"] > 0
    assert {"tau", "round_in_plain_tokens", "lossless"} <= set(plain["decoding"])


def test_the_second_call_trains_on_the_targets_own_answers_and_decodes(machine):
    folder, environment = machine
    out = folder / "second"
    words = f"--recipe {folder / 'tiny.yaml'} --runs own --count 2 --new_tokens 8 --answer_tokens 16"
    words += f" --prompts HumanEval={folder / 'keep' / 'first' / 'humaneval.jsonl'}"  # one set is enough
    found = run("train.sh", out, environment, STEPS="2", ROWS="24", TRAINING=words)
    record = found["gpu_training.json"]
    check_head(record)
    assert (record["seed"], record["steps"], record["side_by_side"]) == (0, 2, 1)
    row = record["runs"]["own"]
    assert "failed" not in row, row
    assert (row["objective"], row["answers"], row["steps"]) == ("auf", "the target's", 2)
    assert row["regeneration"]["seconds"] > 0 and row["trainable_parameters"] > 0 and row["history"]
    figures = row["decoding"]["HumanEval"]
    assert "failed" not in figures, figures
    assert figures["tau"] >= 1.0 and figures["speedup"] > 0 and figures["prompts"] == 2
    assert figures["conditions"]["prompts"] == "humaneval.jsonl"
    # what comes back beside it: no data, and the drafter in parts
    assert sorted(path.name for path in out.iterdir()) == ["drafter.tar.part.aa", "gpu_training.json", "logs.tar.gz"]
    inside = subprocess.run(["tar", "tzf", out / "logs.tar.gz"], capture_output=True, text=True, check=True).stdout
    assert "provenance.json" in inside and "train-own.log" in inside
    assert "own.jsonl" not in inside and "safetensors" not in inside


def test_a_command_that_fails_says_why(tmp_path):
    phase = training.Phase(tmp_path, time.monotonic() + 60)
    with pytest.raises(training.Failed, match="reads: .*No such file.*nowhere.json"):
        phase.command("reads", "json.tool", tmp_path / "nowhere.json")
    assert "nowhere.json" in (tmp_path / "reads.log").read_text()


def test_a_run_that_is_not_over_in_time_is_noted(machine):
    folder, _ = machine
    data = folder / "keep" / "share.jsonl"
    words = {"target": folder / "keep" / "target", "data": data, "prompts": f"MT-Bench={data}", "runs": "auf"}
    words |= {"work": folder / "late", "json": folder / "late.json", "device": "cpu", "training_seconds": 0}
    record = training.main([word for key, value in words.items() for word in (f"--{key}", str(value))])
    assert record["runs"]["auf"]["failed"] == "train-auf: not over after 1 seconds"
    assert json.loads((folder / "late.json").read_text())["headline"] == "tau at T=0: auf: nothing"


def test_a_shape_that_fails_is_noted_and_one_past_the_time_is_left_out(tmp_path, monkeypatch):
    too_deep = shapes.Job(**shapes.TINY | {"target_layer_ids": (1, 4)})
    monkeypatch.setitem(shapes.JOBS, "tiny", too_deep)
    record = shapes.main(["tiny", "--device", "cpu", "--json", str(tmp_path / "found.json")])
    assert "ValueError" in record["jobs"]["tiny"]["failed"] and record["headline"] == "tiny failed"
    assert json.loads((tmp_path / "found.json").read_text())["jobs"].keys() == {"tiny"}
    # without names, the jobs that a GPU machine runs
    assert shapes.main(["--device", "cpu", "--seconds", "-1"])["left_out"] == list(shapes.DEFAULT)
    assert {*shapes.DEFAULT} == {*shapes.JOBS, "heads"} - {"tiny", "tiny_checkpointing"}
    with pytest.raises(SystemExit):
        shapes.main(["tinny"])


def test_heads_are_compared_with_the_plain_one_at_the_same_ratio():
    sizes = ["--head_blocks", "4", "--head_hidden", "16", "--head_vocabulary", "200", "--steps", "1"]
    rows = shapes.main(["heads", "--device", "cpu", *sizes])["jobs"]["heads"]["rows"]
    assert len(rows) == len(shapes.HEADS) * len(shapes.ACTIVE_RATIOS)
    assert all(row["times_faster"] == 1.0 for row in rows if row["way"] == "plain")
    assert all(row["same_loss"] for row in rows if row["way"] == "progressive")


# ---- what the bundle is made of


def test_a_json_array_that_is_cut_off_gives_its_whole_conversations():
    def row(*turns: str) -> dict:
        return {"id": "x", "conversations": [{"from": turn, "value": f"says {turn}", "model": "y"} for turn in turns]}

    whole = json.dumps([row("human", "gpt", "human", "gpt"), row("gpt", "human"), row("human"), row("human", "gpt")])
    found = list(bundle.conversations(whole))
    assert [len(part["conversations"]) for part in found] == [4, 2]
    assert found[1] == {"conversations": [{"from": turn, "value": f"says {turn}"} for turn in ("human", "gpt")]}
    assert list(bundle.conversations(whole[:-20])) == found[:1]


def test_prompt_sets_become_messages_and_a_file_two_parts(tmp_path):
    asked = list(bundle.questions([{"prompt": "def f():"}, {"turns": ["Why?", "And then?"]}]))
    assert asked[0]["messages"][0]["content"] == "Complete this Python function.\n```python\ndef f():```"
    assert asked[1] == {"messages": [{"role": "user", "content": "Why?"}]}
    package, parts = tmp_path / "package", [tmp_path / "first", tmp_path / "second"]
    package.write_bytes(bytes(range(10)))
    for limit, sizes in ((4, [6, 4]), (20, [0, 10])):
        bundle.split(package, *parts, limit)
        assert [part.stat().st_size for part in parts] == sizes
        assert b"".join(part.read_bytes() for part in parts) == package.read_bytes()


def test_the_bundle_is_ignored_by_git():
    done = subprocess.run(["git", "-C", str(ROOT), "check-ignore", ".gpu/first/share.jsonl.gz"], capture_output=True)
    assert done.returncode in (0, 128), "git would commit the bundle"  # 128: no repository


def test_an_unpacked_llama_computes_what_it_did():
    model = make_target("llama", dtype=torch.bfloat16)
    model.config.quantization_config = {"quant_method": "gguf"}  # what a packed one says
    plain = dequantize.unpacked(model)
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, model(ids).logits)
    assert not hasattr(plain.config, "quantization_config")
    assert plain.generation_config.pad_token_id == model.generation_config.pad_token_id


# ---- the scripts name what there is


@pytest.mark.parametrize("script", SCRIPTS, ids=[path.name for path in SCRIPTS])
def test_a_shell_script_parses_and_names_only_files_that_exist(script):
    subprocess.run(["bash", "-n", script], check=True)
    named = re.findall(r"tests/gpu/[\w.]+", script.read_text())
    assert named or script.name == "setup.sh"
    for name in named:
        assert (ROOT / name).is_file(), f"{script.name} names {name}"


def test_the_readme_names_only_files_that_exist():
    text = (FOLDER / "README.md").read_text()
    named = set(re.findall(r"\b\w+\.(?:py|sh|yaml)\b", text))
    written = {path.name for path in FOLDER.iterdir() if path.suffix in (".py", ".sh", ".yaml")}
    assert named <= written | {"training_step.py"} and written <= named | {"conditions.py"}


def test_the_recipe_holds_no_key_that_training_gives():
    recipe = yaml.safe_load((FOLDER / "smollm2.yaml").read_text())
    assert not {"target", "dataset_name", "objective", "max_steps", "output_dir", "use_cpu"} & set(recipe)
