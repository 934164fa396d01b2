"""Cards: rendered from records alone, and validated, the contributed ones among them."""

import json
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, make_drafter, make_target
from huggingface_hub import ModelCard

from hf_specauf.model_card import main
from hf_specauf.publishing.card import render
from hf_specauf.publishing.card_data import with_data
from hf_specauf.publishing.card_evaluation import slow_cases, tau_by_length
from hf_specauf.publishing.card_training import adaptation, changed_recipe
from hf_specauf.publishing.validate import validate
from hf_specauf.records import public
from hf_specauf.training.config import AUFConfig

CARDS = sorted((ROOT / "model_cards").glob("*__*.md"))


@pytest.fixture
def folder(tmp_path):
    """A drafter nobody has measured and whose training is not recorded."""
    make_drafter(make_target()).save_pretrained(tmp_path / "drafter")
    config = json.loads((tmp_path / "drafter" / "config.json").read_text())
    config |= {"target_model_name_or_path": "some/target", "chat_template_kwargs": {"enable_thinking": False}}
    (tmp_path / "drafter" / "config.json").write_text(json.dumps(config))
    return tmp_path / "drafter"


def evaluation(tau=2.5, speedup=1.5, **conditions) -> dict:
    measured_under = dict(
        prompts="openai/gsm8k", temperature=0.0, max_new_tokens=64, batch_size=1, hardware="CPU, 2 cores",
        dtype="float32",
    )  # fmt: skip
    prompts = [
        dict(prompt_tokens=n, tau=t, plain_seconds=1.0, assisted_seconds=s)
        for n, t, s in ((30, 3.0, 0.5), (100, 2.0, 0.8), (120, 1.0, 1.25))
    ]
    return {
        "conditions": measured_under | conditions,
        "acceptance": {"tau": tau},
        "speedup": speedup,
        "plain_tokens_per_second": 80.0,
        "tokens_per_second": 120.0,
        "lossless": {"identical": 2, "near_tie": 1, "different": 0},
        "repetition": 0.25,
        "prompts": prompts,
    }


def test_what_is_missing_is_said_and_never_made_up(folder):
    card = render(folder, "alice/drafter")
    assert "**not measured**" in card.text and "Not measured." in card.text and "not recorded" in card.text
    assert "yaml" not in card.text and "alpha.png" not in card.text and "None" not in card.text
    assert card.data.eval_results is None and card.data.base_model == "some/target"
    assert '`{"enable_thinking": false}`' in card.text
    card.save(folder / "README.md")
    problems = validate(folder / "README.md")
    assert len(problems) == 2 and all("measure it with" in problem for problem in problems)


def test_every_evaluation_of_the_folder_is_in_the_card_and_its_index(folder):
    (folder / "eval.json").write_text(json.dumps(evaluation()))
    (folder / "eval_mine.json").write_text(json.dumps(evaluation(1.25, 0.9, prompts="my prompts")))
    card = render(folder, "alice/drafter", "v2")
    assert (
        "**tau 2.50**, 1.50x the speed of plain `generate` (openai/gsm8k, temperature 0.0, 64 new tokens" in card.text
    )
    assert "1 of 3 prompts; the worst ran at 0.80x, the best at 2.00x" in card.text
    assert "up to 32 tokens 3.00, up to 128 tokens 1.50" in card.text
    assert (
        "2 of 3 identical, 1 near-ties of rounding, 0 different" in card.text
        and "| repeated 4-grams in the output | 25% |" in card.text
    )
    card.save(folder / "alice__drafter.md")
    assert validate(folder / "alice__drafter.md", contributed=True) == []
    results = ModelCard.load(folder / "alice__drafter.md").data.eval_results
    assert [(r.dataset_name, r.metric_type, r.metric_value) for r in results] == [
        ("openai/gsm8k", "tau", 2.5), ("openai/gsm8k", "speedup", 1.5),
        ("my prompts", "tau", 1.25), ("my prompts", "speedup", 0.9),
    ]  # fmt: skip
    assert results[2].metric_args["max_new_tokens"] == 64


@pytest.mark.parametrize(
    "changes, faster",
    [({}, True), (dict(speedup=0.9), False), (dict(different=1), False), (None, False)],
    ids=["faster", "slower", "other output", "not measured"],
)
def test_only_what_was_seen_to_be_the_same_and_faster_is_called_so(folder, changes, faster):
    if changes is not None:
        record = evaluation(speedup=changes.get("speedup", 1.5))
        record["lossless"]["different"] = changes.get("different", 0)
        (folder / "eval.json").write_text(json.dumps(record))
    card = render(folder, "alice/drafter").text
    assert ("the same output, faster" in card) == faster
    assert (", 1 different |" in card) == bool(changes and "different" in changes)


def test_what_was_measured_beside_stands_beside_and_the_usual_way_decides_what_is_faster(folder):
    (folder / "eval.json").write_text(json.dumps(evaluation(speedup=0.8)))
    card = render(folder, "alice/drafter").text
    assert "other ways" not in card and "the same output, faster" not in card
    ways = {"drafter_and_lookup": dict(speedup=1.29), "prompt_lookup": dict(speedup=1.06)}
    for different, older in ((0, True), (1, True), (0, False), (1, False)):
        lossless = {"identical": 2, "near_tie": 0, "different": different}
        found = {way: of_way | {"lossless": lossless} for way, of_way in ways.items()}
        record = evaluation(speedup=0.8) | (found if older else {"ways": found})  # 0.1.0 knew no `ways`
        (folder / "eval.json").write_text(json.dumps(record))
        card = render(folder, "alice/drafter").text
        assert (
            "in the same run | drafter and lookup, where each pays 1.29x; transformers' prompt lookup alone 1.06x |"
            in card
        )
        assert "**, 0.80x the speed of plain" in card
        assert ("the same output, faster" in card) == (different == 0)


@pytest.mark.parametrize(
    "change, problem",
    [
        (("base_model: some/target", "base_model: /home/me/target"), "base_model is '/home/me/target'"),
        (("license: apache-2.0\n", ""), "license is missing"),
        (("- speculative-decoding\n", ""), "tags must hold speculative-decoding"),
        (("value: 2.5", "value: high"), "tau is 'high': it must be a number"),
        (("value: 2.5", "value: 0.5"), "tau is 0.5: it must be a number of at least 1"),
        (("type: tau", "type: accuracy"), "no tau in the model index"),
        (("max_new_tokens: 64", "nothing: 64"), "its conditions lack max_new_tokens"),
        (("tau = tokens", "tau: tokens"), "the definition of tau is missing"),
        (('revision="v2"', 'revision="main"'), "must pin a commit or tag"),
        (("license: apache-2.0", "license: [apache"), "the YAML header cannot be read"),
    ],
)
def test_bad_cards_are_named_with_what_is_wrong(folder, change, problem, capsys):
    (folder / "eval.json").write_text(json.dumps(evaluation()))
    text = str(render(folder, "alice/drafter", "v2"))
    assert change[0] in text
    path = folder / "alice__drafter.md"
    path.write_text(text.replace(*change))
    assert any(problem in found for found in validate(path, contributed=True))
    with pytest.raises(SystemExit) as stop:
        main(["validate", str(path)])
    assert stop.value.code == 1 and problem in capsys.readouterr().out
    path.write_text(text)
    main(["validate", str(path)])
    path.rename(folder / "README.md")
    main(["validate", str(folder)])
    (folder / "README.md").rename(folder / "drafter.md")
    with pytest.raises(SystemExit, match=f"{folder / 'README.md'} is not there: specauf card render writes it"):
        main(["validate", str(folder)])
    assert validate(folder / "drafter.md", contributed=True) == [
        "the file is called drafter.md: it must be <owner>__<name>.md"
    ]


def test_a_folder_that_is_no_drafter_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(ValueError, match="is not a drafter's folder.*Name the folder that train left"):
        render(tmp_path, "a/b")


def test_both_variants_of_lora_are_named():
    base = dict(name_or_path="a/b", revision=None, borrowed_layers=None)
    recipe = dict(use_peft=True, use_rslora=True, lora_r=4, lora_alpha=8)
    for dora, words in ((False, "LoRA with rsLoRA, r 4"), (True, "LoRA with rsLoRA and DoRA, r 4")):
        assert words in adaptation(dict(base=base, recipe=recipe | dict(use_dora=dora), history=[]))


def test_small_parts():
    assert tau_by_length([dict(prompt_tokens=20, tau=2.0)]) == ""
    assert slow_cases([dict(prompt_tokens=20, tau=2.0)]) == "not measured"
    recipe = {"num_draft_layers": 2, "block_size": 16, "objective": "decay", "output_dir": "x", "report_to": ["wandb"]}
    assert changed_recipe(public(recipe)) == "num_draft_layers: 2\nblock_size: 16\nobjective: decay"
    own = changed_recipe(recipe | {"drafter_type": "domino", "emb_dim": 8, "shift_label": False}).splitlines()
    assert {"drafter_type: domino", "emb_dim: 8", "shift_label: false"} <= set(own)


# ---- what a card tells a stranger


def training(recipe: dict, **record) -> dict:
    """A record of a training with a recipe."""
    recipe = dict(objective="auf", normalisation="pooled", seed=0) | recipe
    environment = {"hardware": "CPU, 2 cores", "packages": {}}
    return dict(recipe=recipe, rows=27, steps=3, seconds=60, environment=environment) | record


def recipe_of(text: str) -> str:
    return text.split("```yaml\n")[1].split("```")[0]


@pytest.mark.parametrize(
    "given",
    [
        {},
        dict(eval_strategy="steps", eval_steps=5, per_device_train_batch_size=3),
        dict(load_best_model_at_end=True, eval_strategy="steps", eval_steps=500, torch_compile=True),
        dict(activation_checkpointing=True, accelerator_config=dict(even_batches=False), label_names=["x"]),
        dict(dataloader_num_workers=2, per_device_eval_batch_size=3, max_steps=9),
    ],
    ids=lambda given: "+".join(given) or "nothing",
)
def test_a_recipe_on_a_card_holds_what_was_set_and_nothing_else(given, tmp_path):
    resolved = AUFConfig(output_dir=str(tmp_path), use_cpu=True, **given).to_dict()
    assert yaml.safe_load(changed_recipe(public(resolved))) == given | dict(use_cpu=True)


def test_data_that_nobody_else_has_is_said_to_be_so(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "own.jsonl"
    own.write_text("")
    settings = {"target": {"name_or_path": "some/target"}, "dataset_name": "org/prompts"}
    (tmp_path / "own.settings.json").write_text(json.dumps(settings))
    (tmp_path / "folder_of_rows").mkdir()
    mixture = [
        dict(name=str(own), weight=1.0, config=None, split="train", revision=None),
        dict(name="org/data", weight=2.0, config=None, split="train", revision="v1"),
        dict(name="folder_of_rows", weight=1.0, config=None, split="train", revision=None),
    ]
    recipe = dict(dataset_mixture=mixture, eval_dataset_name="data/heldout.jsonl", deepspeed="/etc/ds.json")
    (folder / "provenance.json").write_text(json.dumps(training(recipe)))
    card = render(folder, "alice/drafter")
    assert card.data.datasets == ["org/data"]
    assert (
        "| data | own.jsonl, a local file that is not published (answers of some/target to the prompts of"
        " org/prompts, by `specauf regenerate`); org/data; folder_of_rows, a local file that is not published"
        " (27 rows) |"
    ) in card.text
    lines = recipe_of(card.text).splitlines()
    for name in ("- name: own.jsonl", "- name: folder_of_rows", "eval_dataset_name: data/heldout.jsonl"):
        assert f"{name}  # a local file that is not published: put your own here" in lines
    assert "deepspeed: ds.json  # a local file that is not published: put your own here" in lines
    found = yaml.safe_load("\n".join(lines))["dataset_mixture"]
    assert found == [
        {"name": "own.jsonl"},
        {"name": "org/data", "weight": 2.0, "revision": "v1"},
        {"name": "folder_of_rows"},
    ]
    # a public record says it too, on a machine that has none of the files
    record = with_data(training(recipe))
    monkeypatch.chdir(folder)
    (folder / "provenance.json").write_text(json.dumps(public(record)))
    assert render(folder, "alice/drafter").text == card.text


def test_prompts_that_nobody_else_has_are_said_to_be_so_and_never_linked(folder):
    (folder / "eval.json").write_text(json.dumps(evaluation(prompts="data/mine.jsonl")))
    card = render(folder, "alice/drafter")
    assert "(data/mine.jsonl, a local file that is not published, temperature 0.0" in card.text
    result = card.data.eval_results[0]
    assert (result.dataset_type, result.dataset_name) == (
        "custom",
        "data/mine.jsonl, a local file that is not published",
    )


@pytest.mark.parametrize("form", ["plain", "adapter", "borrowed"])
def test_only_a_repository_that_holds_an_adapter_alone_is_listed_as_one(folder, form):
    small = None
    if form != "plain":
        layers = [1] if form == "borrowed" else None
        small = dict(name_or_path="some/base", revision="v1", borrowed_layers=layers)
    header = str(render(folder, "alice/drafter", small=small)).split("---")[1]
    assert ("base_model_relation: adapter" in header) == (form != "plain")


@pytest.mark.parametrize("objective, is_ours", [("auf", True), ("b_auf", True), ("decay", False), (None, False)])
def test_only_what_was_trained_until_it_failed_is_called_spec_auf(folder, objective, is_ours):
    if objective is not None:
        (folder / "provenance.json").write_text(json.dumps(training(dict(objective=objective))))
    card = render(folder, "alice/drafter")
    assert ("spec-auf" in card.data.tags) == ("arxiv:2607.01893" in card.data.tags) == is_ours
    assert ("Spec-AUF, arXiv" in card.text) == is_ours


def test_a_licence_is_what_its_owner_says(folder, capsys):
    main(["render", "--drafter", str(folder), "--repo", "a/b", "--license", "llama3.1"])
    assert ModelCard.load(folder / "README.md").data.license == "llama3.1"


def test_parameters_that_were_trained_are_called_so(folder):
    assert "parameters not recorded, " in render(folder, "a/b").text
    (folder / "provenance.json").write_text(json.dumps(training({}, trainable_parameters=11_408)))
    assert ", 0.0114 M trained parameters, " in render(folder, "a/b").text


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.name)
def test_contributed_cards_are_good(path: Path):
    assert validate(path, contributed=True) == []
