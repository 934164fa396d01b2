"""`specauf`: one command, one spelling of each flag, and old spellings that are still read."""

import argparse
import json
import subprocess
import sys
import tomllib
from dataclasses import fields
from importlib import import_module

import pytest
import torch
from conftest import ROOT, make_drafter, make_target
from peft import LoraConfig, get_peft_model
from test_convert import z_lab

from hf_specauf import convert, evaluate, hub, load_drafter, model_card, quickstart, regenerate, train
from hf_specauf.cli import COMMANDS, main, parse_with_drafter, under_new_spelling
from hf_specauf.demo import show
from hf_specauf.doctor.command import main as doctor
from hf_specauf.evaluate import EvaluateArguments
from hf_specauf.layouts.adapters import AdapterBase, finish_adapter
from hf_specauf.regenerate import RegenerateArguments


@pytest.fixture(scope="module")
def drafter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "drafter"
    make_drafter(make_target()).save_pretrained(folder)
    return folder


def parsers(parser: argparse.ArgumentParser):
    """A parser and those of its commands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


# ---- the command


def test_the_package_installs_the_command():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = scripts["specauf"].partition(":")
    assert getattr(import_module(module), name) is main


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]], ids=str)
def test_help_lists_the_commands_with_a_line_each_and_says_how_to_go_on(words, capsys):
    main(words)
    printed = capsys.readouterr().out
    assert set(COMMANDS) == set(
        "train regenerate evaluate doctor check push pull convert card quickstart demo".split()
    )
    for name, command in COMMANDS.items():
        assert f"  {name:<12}{command.says}\n" in printed
    assert printed.strip().endswith("specauf COMMAND --help explains the command's flags.")
    assert all(len(line) <= 100 for line in printed.splitlines())


def test_help_loads_no_command():
    code = (
        "import sys; from hf_specauf.cli import main; main(['--help'])\n"
        "heavy = {'datasets', 'trl', 'matplotlib', 'peft'} & set(sys.modules)\n"
        "heavy |= {f'hf_specauf.{name}' for name in ('train', 'hub', 'evaluate')} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "word, said",
    [("evalaute", "did you mean evaluate"), ("trian", "did you mean train"), ("xyz", "specauf --help lists")],
)
def test_an_unknown_command_is_answered_with_the_nearest(word, said):
    with pytest.raises(SystemExit, match=f"error: there is no command '{word}': {said}"):
        main([word])


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "usage: " in printed
    assert ("accelerate launch -m hf_specauf.train" in printed) == (name == "train")


def test_commands_of_one_module_are_told_apart_and_end_on_errors_in_one_line(drafter, tmp_path, capsys):
    main(["convert", "--drafter", str(drafter), "--out", str(tmp_path / "out")])
    assert load_drafter(tmp_path / "out").config.block_size == 4
    with pytest.raises(SystemExit, match="error: .*holds no eval.json"):
        main(["check", "--drafter", str(drafter), "--target", "alice/target"])
    with pytest.raises(SystemExit, match="error: --drafter: 'no/such/thing' is neither a folder"):
        main(["convert", "--drafter", "no/such/thing", "--out", str(tmp_path / "out")])
    main(["card", "render", "--drafter", str(drafter), "--repo", "alice/drafter"])
    assert f"written: {drafter / 'README.md'}" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["card", "validate", str(drafter / "README.md")])
    assert stop.value.code == 1 and "  - " in capsys.readouterr().out


# ---- flags


@pytest.mark.parametrize("parser", [hub.command_parser(), model_card.command_parser()], ids=["hub", "card"])
def test_every_flag_has_underscores_and_is_explained(parser):
    for part in parsers(parser):
        for action in part._actions:
            assert action.help or isinstance(action, argparse._SubParsersAction), action
            assert not any("-" in flag.removeprefix("--") for flag in action.option_strings if flag != "-h")


def test_evaluate_lists_each_flag_once_and_reads_the_spelling_with_dashes(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    printed = capsys.readouterr().out
    assert "--prompts_column" in printed and "--prompts-column" not in printed and "-h, --help" in printed
    with pytest.raises(SystemExit, match="dtype is 'bf16'"):
        words = ["--target", "a/b", "--drafter", str(ROOT), "--prompts", "gsm8k", "--prompts-column=a-b"]
        main(["evaluate", *words, "--dtype", "bf16"])
    assert "--prompts-column is spelt --prompts_column now" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [EvaluateArguments, RegenerateArguments])
def test_every_key_is_explained(arguments):
    assert [field.name for field in fields(arguments) if not field.metadata.get("help")] == []


def test_old_spellings_are_read_and_each_is_named_once(capsys):
    words = ["push", "--target-revision", "a-b", "--base-revision=v1-0", "--create-pr", "--repo", "a/b-c", "--small"]
    assert under_new_spelling(words) == [
        "push", "--target_revision", "a-b", "--base_revision=v1-0", "--create_pr", "--repo", "a/b-c", "--small"
    ]  # fmt: skip
    assert capsys.readouterr().out.splitlines() == [
        "--target-revision is spelt --target_revision now",
        "--base-revision is spelt --base_revision now",
        "--create-pr is spelt --create_pr now",
    ]
    assert under_new_spelling(["--revision", "v1"], {"--revision": "--drafter_revision"})[0] == "--drafter_revision"


def test_a_bare_folder_is_still_the_drafter_wherever_it_stands(capsys):
    for words in (["check", "DIR", "--target", "a/b"], ["check", "--target", "a/b", "--small", "DIR"]):
        assert parse_with_drafter(hub.command_parser(), words).drafter == "DIR"
        assert capsys.readouterr().out == "DIR is spelt --drafter DIR now\n"
    args = parse_with_drafter(model_card.command_parser(), ["render", "DIR", "--repo", "a/b"])
    assert args.drafter == "DIR"
    parse_with_drafter(hub.command_parser(), ["check", "--drafter", "DIR"])
    assert "is spelt" not in capsys.readouterr().out.replace("DIR is spelt --drafter DIR now", "", 1)


@pytest.mark.parametrize(
    "words, said",
    [
        (["check"], "give the drafter's folder: --drafter DIR"),
        (["check", "--drafter", "DIR", "OTHER"], "unrecognized arguments: OTHER"),
        (["check", "ONE", "TWO"], "give the drafter's folder"),
        (["pull", "--repo", "a/b", "--into", "DIR", "--tag", "v1"], "unrecognized arguments: --tag v1"),
    ],
    ids=str,
)
def test_a_command_line_that_says_too_little_or_too_much_is_refused(words, said, capsys):
    with pytest.raises(SystemExit) as stop:
        hub.main(words)
    assert stop.value.code == 2 and said in capsys.readouterr().err


# ---- what newcomers type


def say(main_of_command, words: list, capsys) -> str:
    """The one line in which a command ends on an error."""
    with pytest.raises(SystemExit) as stop:
        main_of_command([str(word) for word in words])
    assert isinstance(stop.value.code, str) and stop.value.code.startswith("error: ") and "\n" not in stop.value.code
    return stop.value.code


@pytest.fixture
def fresh(tmp_path):
    """A drafter's folder, as the commands read it."""
    make_drafter(make_target()).save_pretrained(tmp_path / "drafter")
    return tmp_path / "drafter"


@pytest.mark.parametrize("text", ["{", "[1, 2]", "null", "\xff"])
@pytest.mark.parametrize("name", ["config.json", "eval.json", "provenance.json"])
def test_a_record_that_is_not_whole_is_named(fresh, capsys, name, text):
    (fresh / name).write_bytes(text.encode("latin-1"))
    said = say(model_card.main, ["render", "--drafter", fresh, "--repo", "a/b"], capsys)
    assert str(fresh / name) in said and "write it again with the command that made it, or move it away" in said
    if name == "config.json":
        assert str(fresh / name) in say(convert.main, ["--drafter", fresh, "--out", fresh / "out"], capsys)


@pytest.mark.parametrize("name", ["eval.json", "provenance.json"])
def test_a_record_of_another_kind_is_named(fresh, capsys, name):
    (fresh / name).write_text('{"recipe": {"objective": "auf"}}')
    said = say(model_card.main, ["render", "--drafter", fresh, "--repo", "a/b"], capsys)
    assert f"provenance.json of {fresh} is not what evaluate and train write (KeyError: " in said


@pytest.mark.parametrize("size", [0, 4, 2000])
def test_weights_that_are_cut_off_end_a_command_in_one_line(fresh, tmp_path, capsys, size):
    weights = fresh / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    said = say(convert.main, ["--drafter", fresh, "--out", tmp_path / "out"], capsys)
    assert "a file of weights (*.safetensors) is cut off or damaged" in said and "fetch it again" in said


def test_a_file_in_the_place_of_a_folder_is_refused_before_anything_is_written(fresh, tmp_path, capsys):
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    assert f"--out {file} is a file" in say(convert.main, ["--drafter", fresh, "--out", file], capsys)
    words = ["--target", "t", "--drafter", fresh, "--prompts", "p.txt", "--device", "cpu", "--out", file]
    assert f"--out {file} is a file" in say(evaluate.main, words, capsys)
    assert f"--into {file} is a file" in say(hub.main, ["pull", "--repo", "a/b", "--into", file], capsys)
    assert file.read_text() == "mine"


def test_a_place_that_nothing_can_be_written_to_is_told_before_the_work(fresh, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "own.jsonl").mkdir()
    under, nowhere = tmp_path / "notes.txt" / "x", "/proc/x"
    measured = ["--target", "t", "--drafter", fresh, "--prompts", "p.txt", "--device", "cpu"]
    answered = ["--target", "t", "--dataset_name", "p.txt", "--device", "cpu"]
    for main_of_command, words, ending in (
        (evaluate.main, [*measured, "--out"], ""),
        (convert.main, ["--drafter", fresh, "--out"], ""),
        (quickstart.main, ["--out"], ""),
        (model_card.main, ["render", "--drafter", fresh, "--repo", "a/b", "--out"], ".md"),
        (regenerate.main, [*answered, "--out"], ".jsonl"),
        (show.main, ["--record"], ".gif"),
    ):
        said = say(main_of_command, [*words, f"{under}{ending}"], capsys)
        assert f"{words[-1]} {under}{ending} lies under {tmp_path / 'notes.txt'}, which is a file" in said
        said = say(main_of_command, [*words, f"{nowhere}{ending}"], capsys)
        assert f"{words[-1]} {nowhere}{ending} cannot be written, because /proc takes no file" in said
    said = say(regenerate.main, [*answered, "--out", tmp_path / "own.jsonl"], capsys)
    assert f"--out {tmp_path / 'own.jsonl'} is a folder: name a file in it" in said
    assert "it must end in .gif" in say(show.main, ["--record", tmp_path / "a.txt"], capsys)
    assert sorted(path.name for path in tmp_path.iterdir() if path != fresh) == ["notes.txt", "own.jsonl"]


@pytest.mark.parametrize("repo", ["drafter", "a b/c", "a/b/c", "https://huggingface.co/a/b"])
def test_a_name_that_no_repository_can_have_is_said_to_be_one(fresh, tmp_path, capsys, repo):
    for main_of_command, words in (
        (hub.main, ["pull", "--into", tmp_path / "into"]),
        (hub.main, ["push", "--drafter", fresh]),
        (model_card.main, ["render", "--drafter", fresh]),
    ):
        assert f"repo is '{repo}'; it must be OWNER/NAME" in say(main_of_command, [*words, "--repo", repo], capsys)


@pytest.fixture(scope="module")
def drafters(tmp_path_factory):
    """Folders that hold a drafter: ours, one in z-lab's layout, an adapter, and each one's target in words."""
    folder, own = tmp_path_factory.mktemp("drafters"), make_drafter(make_target())
    own.config.target_model_name_or_path = "own/target"
    for name in ("ours", "adapter"):
        own.save_pretrained(folder / name)
    (folder / "zlab").mkdir()
    (folder / "zlab" / "config.json").write_text(json.dumps(z_lab(own)))
    base = AdapterBase.of_drafter(own)
    get_peft_model(own, LoraConfig(target_modules="all-linear")).save_pretrained(folder / "adapter")
    finish_adapter(folder / "adapter", base, own.config)
    named = "for the target 'own/target', which writes no text alone: give that target"
    unknown = "a drafter, which writes no text alone: give the model that it drafts for"
    return {folder / "ours": named, folder / "zlab": unknown, folder / "adapter": named}


def test_a_drafter_given_as_target_is_told_to_be_one_before_any_work(drafters, tmp_path, capsys):
    for folder, words in drafters.items():
        for main_of_command, more, key in (
            (train.main, ["--dataset_name", "p.txt", "--output_dir", tmp_path / "out"], "target"),
            (evaluate.main, ["--drafter", folder, "--prompts", "p.txt", "--device", "cpu"], "--target"),
            (regenerate.main, ["--dataset_name", "p.txt", "--out", tmp_path / "o.jsonl", "--device", "cpu"], "target"),
            (doctor, ["--drafter", folder], "target"),
            (show.main, [], "--target"),
            (convert.main, ["--drafter", folder, "--out", tmp_path / "out"], "--target"),
        ):
            said = say(main_of_command, ["--target", folder, *more], capsys)
            assert said.startswith(f"error: {key}: {str(folder)!r} holds a drafter") and words in said
        said = say(evaluate.main, ["--target", "a/b", *_measured(folder), "--assistant", folder], capsys)
        assert f"--assistant: {str(folder)!r} holds a drafter" in said
    assert not list(tmp_path.iterdir())


def _measured(drafter) -> list:
    return ["--drafter", drafter, "--prompts", "p.txt", "--device", "cpu"]


def test_a_name_that_is_neither_a_folder_nor_on_the_hub_is_told_before_any_work(fresh, tmp_path, capsys):
    for main_of_command, more in (
        (convert.main, ["--drafter", fresh, "--out", tmp_path / "out"]),
        (train.main, ["--dataset_name", "p.txt", "--output_dir", tmp_path / "out"]),
        (evaluate.main, _measured(fresh)),
        (regenerate.main, ["--dataset_name", "p.txt", "--out", tmp_path / "o.jsonl", "--device", "cpu"]),
        (doctor, ["--drafter", fresh]),
        (show.main, []),
    ):
        for name in ("no such", str(tmp_path / "nowhere"), "https://huggingface.co/a/b"):
            said = say(main_of_command, ["--target", name, *more], capsys)
            assert f"target: {name!r} is neither a folder nor a Hub id (OWNER/NAME): give one" in said
        said = say(main_of_command, ["--target", fresh / "config.json", *more], capsys)
        assert f"target: '{fresh / 'config.json'}' is a file: give the folder that it lies in" in said
    said = say(convert.main, ["--drafter", fresh / "config.json", "--out", tmp_path / "out"], capsys)
    assert f"--drafter: {fresh / 'config.json'} is a file: give the folder that it lies in" in said
    assert [path.name for path in tmp_path.iterdir()] == ["drafter"]


def test_a_target_given_as_drafter_or_as_rows_is_told_to_be_one(tmp_path, capsys):
    target = tmp_path / "target"
    make_target().save_pretrained(target)
    for main_of_command, words in (
        (convert.main, ["--out", tmp_path / "out"]),
        (hub.main, ["check", "--target", "a/b"]),
    ):
        said = say(main_of_command, [*words, "--drafter", target], capsys)
        assert f"--drafter: {target} says nothing about block_size" in said and "that of a qwen3 (a target?)" in said
    words = ["--target", target, "--drafter", target, "--device", "cpu", "--prompts", target]
    assert f"--prompts '{target}' is a folder that holds a model, and no rows" in say(evaluate.main, words, capsys)
    trained = ["--target", target, "--output_dir", tmp_path / "out", "--dataset_name", target]
    assert f"dataset_name '{target}' is a folder that holds a model, and no rows" in say(train.main, trained, capsys)


def test_no_model_is_overwritten_by_a_drafter(fresh, tmp_path, capsys):
    target = tmp_path / "target"
    make_target().save_pretrained(target)
    before = {path: path.read_bytes() for path in (*target.iterdir(), *fresh.iterdir())}
    trained = ["--target", "a/b", "--dataset_name", "p.txt", "--use_cpu", "true"]
    for main_of_command, words in (
        (train.main, [*trained, "--output_dir"]),
        (convert.main, ["--drafter", fresh, "--out"]),
        (hub.main, ["pull", "--repo", "a/b", "--into"]),
    ):
        said = say(main_of_command, [*words, target], capsys)
        assert f"{words[-1].removeprefix('--')} {target} holds a model of type qwen3, which would be over" in said
    for main_of_command, words, out in (
        (train.main, [*trained, "--drafter", fresh, "--output_dir"], fresh),
        (train.main, [*trained, "--drafter", fresh, "--output_dir"], tmp_path),
        (convert.main, ["--drafter", fresh, "--out"], fresh),
    ):
        said = say(main_of_command, [*words, out], capsys)
        assert f"{out} holds what it is made from ({fresh}), which would be overwritten: name another" in said
    assert before == {path: path.read_bytes() for path in (*target.iterdir(), *fresh.iterdir())}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said_not_to_be(capsys):
    words = ["--target", "no/target", "--drafter", "no/drafter", "--prompts", "gsm8k", "--device", "cuda"]
    assert "finds 0 GPUs here: give cpu" in say(evaluate.main, words, capsys)
