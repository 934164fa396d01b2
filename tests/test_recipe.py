"""Recipes: every shipped file parses, the command line wins, and nothing misspelt passes."""

import re
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils.constants import FSDP_STATE_DICT_TYPE
from conftest import warm_python

from hf_specauf.drafters import modeling_dflash
from hf_specauf.recipe import DrafterArguments, parse, under_new_names
from hf_specauf.target import load_target

ROOT = Path(__file__).parents[1]
LAUNCHES = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))
RECIPES = sorted(set((ROOT / "recipes").glob("*/*.yaml")) - set(LAUNCHES))
NAMED = dict(target="some/target", dataset_name="rows.jsonl", output_dir="out", use_cpu=True)


@pytest.fixture
def recipe(tmp_path):
    """Parses keys written as YAML text or given as a dict, then command-line words."""

    def recipe(keys: dict | str, *words: str):
        text = keys if isinstance(keys, str) else yaml.safe_dump(NAMED | keys)
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        target, draft, data, args = parse(["--config", str(path), *words])
        return vars(target) | vars(draft) | vars(data) | vars(args)

    return recipe


def words(keys: dict) -> list[str]:
    return [word for key, value in keys.items() for word in (f"--{key}", str(value))]


def test_there_are_recipes():
    assert {path.parent.name for path in RECIPES} >= {"quickstart"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_shipped_recipe_parses_and_every_key_takes_effect(recipe, path):
    text = path.read_text()
    keys = yaml.safe_load(text)
    # what `make quickstart` fills in; a machine without a GPU must say so
    given = {key: value for key, value in NAMED.items() if key not in keys}
    parsed = recipe(text, *words(given))
    for key, value in (keys | given).items():
        assert parsed[key] == value, key


def test_quickstart_recipes_differ_in_the_objective_alone():
    files = [ROOT / f"recipes/quickstart/dflash_{name}.yaml" for name in ("auf", "decay")]
    auf, decay = (yaml.safe_load(file.read_text()) for file in files)
    assert auf.pop("objective") == "auf" and decay.pop("objective") == "decay"
    assert auf == decay


@pytest.mark.parametrize(
    "key, in_yaml, on_command_line, wins",
    [
        ("objective", "decay", "uniform", "uniform"),
        ("learning_rate", "6e-4", "1e-3", 1e-3),  # YAML 1.1 reads 6e-4 as text
        ("block_size", 8, "10", 10),
        ("target_layer_ids", [1, 2], "3", [3]),
        ("bf16", False, "false", False),
        ("target", "in/yaml", "on/line", "on/line"),
    ],
)
def test_command_line_beats_yaml(recipe, key, in_yaml, on_command_line, wins):
    from_yaml = float(in_yaml) if key == "learning_rate" else in_yaml
    assert recipe({key: in_yaml})[key] == from_yaml
    assert recipe({key: in_yaml}, f"--{key}", on_command_line)[key] == wins


def test_a_recipe_of_0_1_0_is_read_and_the_new_keys_are_named(tmp_path, capsys):
    old = dict(target_model_name_or_path="some/target", dataset_name="rows.jsonl", output_dir="out", use_cpu=True)
    file = tmp_path / "old.yaml"
    file.write_text(yaml.safe_dump(old | {"drafter": "domino", "emb_dim": 8}))
    target, draft, _, _ = parse(["--config", str(file), "--objective", "b_auf"])
    assert (target.target, draft.drafter_type, draft.drafter, draft.emb_dim) == ("some/target", "domino", None, 8)
    said = capsys.readouterr().out
    assert "key target_model_name_or_path is called target now" in said
    assert "key drafter is called drafter_type now" in said
    file.write_text(yaml.safe_dump(old | {"drafter_name_or_path": "a/b"}))
    _, draft, _, _ = parse(["--config", str(file)])
    assert (draft.drafter_type, draft.drafter) == (None, "a/b")
    words = ["--target_model_name_or_path=t", "--drafter_name_or_path", "c/d", "--drafter_revision", "v1"]
    target, draft, _, _ = parse(["--config", str(file), *words])
    assert (target.target, draft.drafter, draft.drafter_revision) == ("t", "c/d", "v1")
    assert "--drafter_name_or_path is called --drafter now" in capsys.readouterr().out
    target, draft, _, _ = parse(["--config", str(file), "--target-model-name-or-path", "t", "--drafter", "dflash"])
    assert target.target == "t"
    now = {"drafter": "dflash", "drafter_type": "dflash"}  # of a record: adapted from a folder of that name
    assert under_new_names(now) == now
    assert draft.drafter_type == "dflash"


# the last two are keys of trl's ModelConfig, whose LoRA keys a recipe has
@pytest.mark.parametrize(
    "key", ["objectve", "blocksize", "target_layers", "warmup_ratio", "Objective", "load_in_4bit", "lora_task_type"]
)
def test_unknown_keys_fail_and_are_named(recipe, key):
    with pytest.raises(ValueError, match=f"--{key}"):
        recipe({key: "auf"})
    with pytest.raises(ValueError, match=f"--{key}"):
        recipe({}, f"--{key}", "auf")


@pytest.mark.parametrize(
    "keys, message",
    [
        (dict(objective="aufff"), "objective is 'aufff'; it must be one of uniform, decay, auf, auf_decay"),
        (dict(normalisation="mean"), "normalisation is 'mean'"),
        (dict(target_dtype="fp16"), "target_dtype is 'fp16'; it must be one of auto, bfloat16, float32"),
        (dict(target_dtype="float16"), "target_dtype is 'float16'"),
        (dict(save_dtype="float16"), "save_dtype is 'float16'; it must be one of auto, bfloat16, float32"),
        (dict(block_size=1), "block_size is 1"),
        (dict(num_draft_layers=0), "num_draft_layers is 0"),
        (dict(fp16=True), "use bf16: true"),
        (dict(drafter_type="eagle"), "drafter_type is 'eagle'; it must be one of dflash, domino"),
        (dict(emb_dim=64, shift_label=True), "emb_dim, shift_label: of a domino drafter.*Set drafter_type: domino"),
        (dict(lambda_decay_ratio=0.5), "has no base branch and would ignore it"),
        (
            dict(warmup_steps=0.1, lr_scheduler_type="constant"),
            "warmup_steps is 0.1, and lr_scheduler_type: constant would ignore it.*constant_with_warmup",
        ),
        (dict(trust_remote_code=True), "trust_remote_code: true needs target_revision"),
    ],
)
def test_values_that_are_not_allowed_fail_in_yaml_and_on_the_command_line(recipe, keys, message):
    with pytest.raises(ValueError, match=message):
        recipe(keys)
    with pytest.raises(ValueError, match=message):
        recipe({}, *words(keys))


@pytest.mark.parametrize(
    "key, wrong, right",
    [
        ("per_device_train_batch_size", [0, -1], 1),
        ("per_device_eval_batch_size", [0], 1),
        ("gradient_accumulation_steps", [0], 1),
        ("learning_rate", ["inf", "nan", -1], 0),
        ("muon_learning_rate", [-1, "inf", 0], 0.02),
        ("weight_decay", ["nan", -0.1], 0),
        ("adam_beta2", [1.5], 0.95),
        ("max_grad_norm", [-1], 0),
        ("warmup_steps", [-1, "nan"], 0.1),
        ("max_steps", [0, -5], -1),
        ("num_train_epochs", [0, -1, "inf"], 0.5),
        ("eval_steps", [0, -10], 0.1),
        ("save_steps", [0, "inf"], 5),
        ("logging_steps", [0], 1),
        ("save_total_limit", [0, -2], 1),
        ("eval_prompts", [-1], 0),
        ("eval_new_tokens", [-1], 2),
        ("max_length", [1, -8], 64),
        ("anchors_per_row", [0], 1),
        ("head_rows_per_chunk", [0], 1),
        ("seed", [-1, 2**32], 0),
        ("ddp_timeout", [0], 10),
        ("dataloader_num_workers", [-1], 0),
        ("mask_token_id", [-1], 0),
        ("block_size", [1, -4], 2),
        ("draft_intermediate_size", [0], 8),
    ],
)
def test_a_number_that_cannot_be_right_is_told_with_what_it_may_be(recipe, key, wrong, right):
    for value in wrong:
        given = float(value) if isinstance(value, str) else value
        for keys, line in (({key: given}, []), ({}, [f"--{key}={value}"])):
            with pytest.raises(ValueError, match=f"{key} is .*; it must be a .* number (of at least|above)"):
                recipe(keys, *line)
    assert recipe({}, f"--{key}={right}")[key] == right
    assert recipe({key: right})[key] == right


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("lora_r", 0, "lora_r is 0; it must be a whole number of at least 1"),
        ("lora_alpha", -1, "lora_alpha is -1; it must be a finite number above 0"),
        ("lora_dropout", 1.5, "lora_dropout is 1.5; it must be a finite number of at least 0 and at most 0.999999"),
    ],
)
def test_loras_numbers_too(recipe, key, value, message):
    with pytest.raises(ValueError, match=message):
        recipe(dict(use_peft=True, drafter="a/b") | {key: value})


def test_a_revision_beside_a_folder_is_refused_and_its_code_needs_none(recipe, tmp_path):
    for keys in (dict(target_revision="nope"), dict(target_revision="nope", trust_remote_code=True)):
        with pytest.raises(
            ValueError, match="target_revision is 'nope', and target .* is a folder.*: remove target_rev"
        ):
            recipe(dict(target=str(tmp_path)) | keys)
    assert recipe(dict(target=str(tmp_path), trust_remote_code=True))["trust_remote_code"]
    with pytest.raises(ValueError, match="target_revision is 'nope', and target .* is a folder"):  # the other commands
        load_target(str(tmp_path), "nope", key="--target")


def test_remote_code_is_allowed_with_a_revision(recipe):
    parsed = recipe(dict(trust_remote_code=True, target_revision="abc123"))
    assert (parsed["trust_remote_code"], parsed["target_revision"]) == (True, "abc123")


def test_chat_template_kwargs_may_be_a_mapping(recipe):
    text = yaml.safe_dump(NAMED) + "chat_template_kwargs: {enable_thinking: false}\n"
    assert recipe(text)["chat_template_kwargs"] == {"enable_thinking": False}


def test_required_keys_are_named(recipe, capsys):
    keys = {key: value for key, value in NAMED.items() if key != "target"}
    with pytest.raises(SystemExit):
        recipe(yaml.safe_dump(keys))
    assert "the following arguments are required: --target" in capsys.readouterr().err


def test_one_source_or_a_mixture_and_not_both(recipe):
    alone = {key: value for key, value in NAMED.items() if key != "dataset_name"}
    sources = "dataset_mixture: [{name: a.jsonl, weight: 3}, {name: b/c, split: train_sft, revision: abc}]\n"
    parsed = recipe(yaml.safe_dump(alone) + sources)["dataset_mixture"]
    assert parsed[0] == dict(name="a.jsonl", weight=3, config=None, split="train", revision=None)
    assert parsed[1] == dict(name="b/c", weight=1.0, config=None, split="train_sft", revision="abc")
    on_line = ["--dataset_mixture", '{"name": "a.jsonl", "weight": 3}', '{"name": "b/c"}']
    assert [source["weight"] for source in recipe(yaml.safe_dump(alone), *on_line)["dataset_mixture"]] == [3, 1.0]
    nothing = yaml.safe_dump(alone) + "dataset_mixture: []\n"
    for text in (yaml.safe_dump(alone), nothing, yaml.safe_dump(NAMED) + sources):
        with pytest.raises(
            ValueError, match="dataset_name .one source. or as dataset_mixture .several., and not both"
        ):
            recipe(text)


@pytest.mark.parametrize(
    "keys, message",
    [
        (dict(eval_dataset_name="held.jsonl", eval_rows=0), "eval_rows: 0 would ignore eval_dataset_name"),
        (dict(eval_dataset_split="test"), "eval_dataset_split belongs to eval_dataset_name, and would be ignored"),
        (dict(eval_dataset_revision="abc"), "eval_dataset_revision belongs to eval_dataset_name"),
        (dict(max_train_rows=-3), "max_train_rows is -3; it must be a whole number of at least 1 .*, or left out"),
        (dict(dataset_num_proc=0), "dataset_num_proc is 0"),
        (dict(dataset_streaming=True), "dataset_streaming: true needs max_train_rows"),
    ],
)
def test_data_keys_that_would_be_ignored_are_refused(recipe, keys, message):
    with pytest.raises(ValueError, match=message):
        recipe(keys)


@pytest.mark.parametrize(
    "keys, message",
    [
        ("dataset_mixture: [{weight: 1}]", "the entry {'weight': 1}: it must be a mapping with name"),
        ("dataset_mixture: [{name: a, wieght: 1}]", "the entry {'name': 'a', 'wieght': 1}"),
        ("dataset_mixture: [a.jsonl]", "the entry 'a.jsonl'"),
        ("dataset_mixture: [[a.jsonl]]", r"the entry \['a.jsonl'\]"),
        ("dataset_mixture: ['5']", "the entry '5'"),
        ("dataset_mixture: [{name: a, weight: 0}]", "the weight of a is 0; it must be a number above 0"),
        ("dataset_mixture: [{name: a, weight: '2'}]", "the weight of a is '2'; it must be a number above 0"),
        ("dataset_mixture: [{name: a}]\ndataset_split: test", "belong to dataset_name: with dataset_mixture"),
    ],
)
def test_a_mixture_says_which_entry_is_wrong(recipe, keys, message):
    alone = {key: value for key, value in NAMED.items() if key != "dataset_name"}
    with pytest.raises(ValueError, match=message):
        recipe(yaml.safe_dump(alone) + keys + "\n")


def test_lora_keys_become_pefts_own_configuration():
    assert DrafterArguments().peft_config() is None
    keys = dict(lora_r=8, lora_alpha=24, lora_dropout=0.1, use_rslora=True, use_dora=True)
    found = DrafterArguments(use_peft=True, drafter="a/b", lora_modules_to_save=["fc"], **keys).peft_config()
    expected = dict(r=8, lora_alpha=24, lora_dropout=0.1, use_rslora=True, use_dora=True, modules_to_save=["fc"])
    expected |= dict(target_modules="all-linear", bias="none", task_type=None)
    assert expected.items() <= found.to_dict().items()


def test_help_explains_the_objective():
    code, printed = warm_python().run("-m", "hf_specauf.train", "--help", COLUMNS="200")
    assert code == 0, printed
    assert "Accept-Until-Fail" in printed
    says = r"--objective OBJECTIVE\s+Which valid slots the loss supports. uniform: all valid slots; decay:"
    assert re.search(says, printed)


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda path: path.name)
def test_launch_settings_are_accelerates_and_name_our_layers(path):
    config = load_config_from_file(str(path))  # refuses unknown keys
    assert config.num_processes == 8 and str(path.relative_to(ROOT)) in path.read_text()
    sharding = config.fsdp_config
    if sharding:
        layer = getattr(modeling_dflash, sharding["fsdp_transformer_layer_cls_to_wrap"])
        assert layer.__name__ in modeling_dflash.DFlashDraftModel._no_split_modules
        assert sharding["fsdp_state_dict_type"] in FSDP_STATE_DICT_TYPE and sharding["fsdp_version"] == 2
