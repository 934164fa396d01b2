"""What every flag of every command may be: numbers, names and words that cannot be right are refused before anything
is loaded. The flags are read from the commands themselves, so a new one is tested as soon as it is there."""

import argparse
import inspect
import math
import re
from dataclasses import fields

import pytest
from transformers import PreTrainedTokenizerBase

from hf_specauf import convert, evaluate, hub, model_card, quickstart, recipe, regenerate
from hf_specauf.data import config as data_config
from hf_specauf.data.config import DataArguments
from hf_specauf.demo import show
from hf_specauf.doctor.command import main as doctor
from hf_specauf.evaluate import EvaluateArguments
from hf_specauf.keys import RESERVED, Numbers, check_keys
from hf_specauf.recipe import CHOICES, TargetArguments, drafter_arguments
from hf_specauf.regenerate import RegenerateArguments
from hf_specauf.training import config as training_config
from hf_specauf.training.config import INAPPLICABLE, AUFConfig

# Everything but the key under test. Nothing of it is there, so loading any would fail in other words.
TRAINING = dict(output_dir="out", use_cpu=True)
ARGUMENTS = {
    TargetArguments: dict(target="no/target"),
    drafter_arguments(): dict(drafter_type="domino"),
    DataArguments: dict(dataset_name="no/data"),
    AUFConfig: TRAINING,
    RegenerateArguments: dict(target="no/target", dataset_name="no/data", out="own.jsonl", device="cpu"),
    EvaluateArguments: dict(target="no/target", drafter="no/drafter", prompts="no/prompts", device="cpu"),
}
NUMBERS = {
    "TargetArguments": {},
    "DrafterArguments": recipe.NUMBERS,
    "DataArguments": data_config.NUMBERS,
    "AUFConfig": training_config.NUMBERS,
    "RegenerateArguments": regenerate.NUMBERS,
    "EvaluateArguments": evaluate.NUMBERS,
}
# A parser of these dataclasses takes the None away.
NUMBER_TYPES = (int, float, int | None, float | None, list[int] | None, list[int])
TEXT_TYPES = (str, str | None)
SET_BY_LAUNCHERS = {"local_rank"}


def keys_of(cls, types) -> list[str]:
    return [key.name for key in fields(cls) if key.init and key.type in types and key.name not in SET_BY_LAUNCHERS]


def cases(types) -> list:
    return [pytest.param(cls, key, id=f"{cls.__name__}-{key}") for cls in ARGUMENTS for key in keys_of(cls, types)]


@pytest.mark.parametrize("cls", ARGUMENTS, ids=lambda cls: cls.__name__)
def test_every_key_that_takes_a_number_says_which(cls):
    keys = {key for key in keys_of(cls, NUMBER_TYPES) if key not in INAPPLICABLE}
    assert keys == set(NUMBERS[cls.__name__])


@pytest.mark.parametrize("cls, key", cases(NUMBER_TYPES))
def test_a_number_that_cannot_be_is_refused_with_its_key_and_what_it_may_be(cls, key):
    for value in (math.inf, -math.inf, math.nan, 10**30, -(10**30), "many", True):
        with pytest.raises(ValueError, match=f"{key}( is|:) .*(must be|remove the key)"):
            cls(**ARGUMENTS[cls] | {key: value})
    for value in (0, -1):
        try:
            cls(**ARGUMENTS[cls] | {key: value})
        except ValueError as error:
            assert key in str(error)
        else:
            # -1 is Trainer's word for a number of steps that is left out
            assert value in NUMBERS[cls.__name__].get(key, Numbers(0)) or (key, value) == ("max_steps", -1)


@pytest.mark.parametrize("cls, key", cases(TEXT_TYPES))
def test_an_empty_name_is_refused_and_one_that_yaml_reads_as_a_number(cls, key):
    numbers = (1234567, 12e34, *((True, False) if key != "resume_from_checkpoint" else ()))
    for value, said in (("", "is empty"), ("  ", "is empty"), *((number, "is no text") for number in numbers)):
        with pytest.raises(ValueError, match=f"{key} .*{said}"):
            cls(**ARGUMENTS[cls] | {key: value})


def test_a_path_will_do_for_a_name_and_a_list_will_not(tmp_path):
    assert AUFConfig(**TRAINING | dict(output_dir=tmp_path)).output_dir == str(tmp_path)
    with pytest.raises(ValueError, match=r"dataset_name is \['a.jsonl', 'b.jsonl'\], which is no text"):
        DataArguments(dataset_name=["a.jsonl", "b.jsonl"])


def test_whole_numbers_that_yaml_wrote_with_a_point_become_whole():
    data = DataArguments(dataset_name="no/data", eval_rows=8.0)
    assert data.eval_rows == 8 and isinstance(data.eval_rows, int)


WORDS = CHOICES | {
    "dtype": CHOICES["target_dtype"], "objective": ("auf", "decay"), "normalisation": ("pooled", "per_block"),
    "device": ("cuda", "cpu"),
}  # fmt: skip


@pytest.mark.parametrize("cls, key", [case for case in cases(TEXT_TYPES) if case.values[1] in WORDS])
def test_a_wrong_word_is_answered_with_the_right_ones(cls, key):
    for value in ("nonsense", "CPU!", "meta"):
        with pytest.raises(ValueError, match=f"{key}.*{value}") as said:
            cls(**ARGUMENTS[cls] | {key: value})
        assert all(word in str(said.value) for word in WORDS[key])


@pytest.mark.parametrize("cls, key", [case for case in cases(TEXT_TYPES) if case.values[1] == "chat_template_kwargs"])
def test_what_this_package_gives_to_a_chat_template_is_no_argument_for_it(cls, key):
    own = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
    assert own - {"self", "documents", "kwargs"} <= set(RESERVED)
    for name in RESERVED:
        with pytest.raises(ValueError, match=f"{key} names {name}, .*remove what is named"):
            cls(**ARGUMENTS[cls] | {key: {"enable_thinking": False, name: True}})


@pytest.mark.parametrize(
    "cls", [RegenerateArguments, EvaluateArguments, TargetArguments], ids=lambda cls: cls.__name__
)
def test_a_revision_of_a_folder_is_refused_before_anything_is_read(cls, tmp_path):
    with pytest.raises(ValueError, match="target_revision is 'v1', and target .* is a folder"):
        cls(**ARGUMENTS[cls] | dict(target=str(tmp_path), target_revision="v1"))


# Names that git takes in no branch, tag or commit, and some that it takes.
NO_NAMES = ("a b", "v1 ", "a..b", "a^", "v1~2", "a:b", "/a", "a/", "a//b", "a.lock", "-a", ".a", "a/.b", "a@{1}", "a.")
NAMES = ("main", "v1.0", "refs/pr/3", "feature/x-y_z", "3f2a9c1", "a@b", "v1+cpu", "#1")


def is_revision(case) -> bool:
    return case.values[1].endswith("revision")


@pytest.mark.parametrize("cls, key", [case for case in cases(TEXT_TYPES) if is_revision(case)])
def test_a_name_that_no_revision_can_have_is_refused_before_anything_is_read(cls, key):
    for value in NO_NAMES:
        with pytest.raises(ValueError, match=re.escape(f"{key} {value!r} is no name that git takes: give a branch")):
            cls(**ARGUMENTS[cls] | {key: value})
    for value in NAMES:
        check_keys(argparse.Namespace(**{key: value}))


@pytest.mark.parametrize("key", ["name", "config", "split", "revision"])
@pytest.mark.parametrize("value", ["", 1234567])
def test_the_names_of_a_mixture_are_checked_too(key, value):
    with pytest.raises(ValueError, match=f"dataset_mixture.*({key} of .* is {value!r}|has the entry)"):
        DataArguments(dataset_mixture=[{"name": "a/b"} | {key: value}])
    with pytest.raises(ValueError, match="dataset_mixture: a/b's revision 'a b' is no name that git takes"):
        DataArguments(dataset_mixture=[{"name": "a/b", "revision": "a b"}])


# ---- commands of argparse

PARSERS = {
    "quickstart": (quickstart.main, quickstart.command_parser(), []),
    "demo": (show.main, show.command_parser(), ["--drafter", "no/drafter"]),
    "convert": (convert.main, convert.command_parser(), ["--drafter", "no/drafter", "--out", "out"]),
}
REQUIRED = {
    "check": ["--drafter", "no/drafter"],
    "push": ["--drafter", "no/drafter", "--repo", "no/drafter"],
    "pull": ["--repo", "no/drafter", "--into", "into"],
    "render": ["--drafter", "no/drafter", "--repo", "no/drafter"],
}
for main, parser in ((hub.main, hub.command_parser()), (model_card.main, model_card.command_parser())):
    [commands] = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    PARSERS |= {
        name: (main, own, [name, *REQUIRED[name]]) for name, own in commands.choices.items() if name in REQUIRED
    }


def flags(types) -> list:
    found = []
    for name, (main, parser, words) in PARSERS.items():
        for action in parser._actions:
            # of the few words that a flag takes, argparse keeps watch itself
            if action.option_strings and action.nargs is None and action.type in types and not action.choices:
                found.append(pytest.param(main, words, action, id=f"{name}-{action.dest}"))
    return found


def refused(main, words: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        main(words)
    if isinstance(stop.value.code, str):
        return stop.value.code
    assert stop.value.code == 2  # argparse has printed it
    return capsys.readouterr().err


def test_there_are_all_commands():
    assert set(PARSERS) == {"quickstart", "demo", "convert", "check", "push", "pull", "render"}


@pytest.mark.parametrize("main, words, action", flags((int, float)))
def test_a_number_that_cannot_be_ends_a_command_before_it_begins(main, words, action, capsys):
    flag, numbers = action.option_strings[-1], (quickstart.NUMBERS | show.NUMBERS)[action.dest]
    for value in ("0", "-1", "inf", "nan", "many", "", str(10**30)):
        if value == "0" and 0 in numbers:
            continue
        said = refused(main, [*words, f"{flag}={value}"], capsys)
        assert action.dest in said and ("it must be" in said or "invalid int value" in said)


@pytest.mark.parametrize("main, words, action", flags((None, str)))
def test_an_empty_name_ends_a_command_before_it_begins(main, words, action, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value in ("", "  "):
        assert f"error: {action.dest} is empty" in refused(
            main, [*words, f"{action.option_strings[-1]}={value}"], capsys
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("licence", ["Apache 2.0", "MIT", "none!"])
@pytest.mark.parametrize("name", ["check", "push", "render"])
def test_a_licence_that_the_hub_would_refuse_is_refused_at_once(name, licence, capsys):
    main, _, words = PARSERS[name]
    said = refused(main, [*words, "--license", licence], capsys)
    assert f"--license {licence!r} is no name that the Hub has" in said and "apache-2.0" in said


@pytest.mark.parametrize("flag", ["--revision", "--tag"])
def test_a_branch_or_tag_that_git_does_not_take_is_refused_at_once(flag, capsys):
    main, _, words = PARSERS["push"]
    said = refused(main, [*words, flag, "a..b c"], capsys)
    assert f"{flag.removeprefix('--')} 'a..b c' is no name that git takes" in said


REVISIONS = [case for case in flags((None, str)) if case.values[2].dest.endswith("revision")]
DOCTOR = ["--drafter", "no/drafter", "--target", "no/target"]


@pytest.mark.parametrize("main, words, action", REVISIONS)
def test_a_revision_that_cannot_be_ends_a_command_before_it_begins(main, words, action, capsys):
    said = refused(main, [*words, action.option_strings[-1], "a b"], capsys)
    assert f"error: {action.dest} 'a b' is no name that git takes" in said


@pytest.mark.parametrize("key", ["drafter_revision", "target_revision"])
def test_the_doctor_refuses_what_no_revision_can_be_and_an_empty_name(key, capsys):
    for value, said in (("a b", f"{key} 'a b' is no name that git takes"), ("", f"{key} is empty")):
        assert said in refused(doctor, [*DOCTOR, f"--{key}={value}"], capsys)


def test_checking_passes_over_what_was_not_given():
    check_keys(argparse.Namespace(name=None, steps=None), {"steps": Numbers(1)})
