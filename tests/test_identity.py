"""Which model is this, and what differs: one answer, the same in every record, and older records still read."""

import gc
import json
import warnings
from copy import deepcopy

import pytest
import torch
from conftest import BASE, attach, make_drafter, make_target
from peft import TrainableTokensConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hf_specauf import add_adapter, load_drafter
from hf_specauf.data.on_policy import written_by
from hf_specauf.evaluate import main as evaluate
from hf_specauf.identity import (
    CONFIG_KEYS,
    Identity,
    Origin,
    note_origin,
    origin_of,
    origins,
    same_weights,
    target_fingerprint,
)
from hf_specauf.regenerate import main as regenerate
from hf_specauf.target import load_target
from hf_specauf.train import main as train

WHOLE = Identity("own/model", "a" * 40, "f" * 16, "t" * 16, "c" * 16, 32, 4, 96)


def test_every_record_of_a_run_holds_the_targets_identity_in_the_same_form(command, files, tmp_path):
    out, own = tmp_path / "out", tmp_path / "own.jsonl"
    lora = dict(use_peft="true", init_from_target_layers="2", num_draft_layers=1)
    train(command(output_dir=out, **lora))
    common = ["--target", str(files / "target"), "--max_new_tokens", "4", "--device", "cpu"]
    regenerate([*common, "--dataset_name", str(files / "chat.jsonl"), "--out", str(own), "--max_rows", "2"])
    words = [
        "--drafter",
        str(out),
        "--prompts",
        str(files / "chat.jsonl"),
        "--count",
        "2",
        "--out",
        str(tmp_path / "e"),
    ]
    evaluate([*common, *words])
    target, tokenizer = load_target(str(files / "target"))
    expected = Identity.of(target, tokenizer)
    assert None not in set(expected.record().values()) - {expected.revision} and expected.revision is None
    for path in (out / "provenance.json", tmp_path / "e/eval.json", own.with_suffix(".settings.json")):
        record = json.loads(path.read_text())
        assert expected.record().items() <= record["target"].items(), path.name
        assert Identity.read(record) == expected, path.name
    base = json.loads((out / "adapter/base.json").read_text())
    assert Identity.read(base["trained_for"]) == expected
    config = json.loads((out / "config.json").read_text())
    assert {key: config[key] for key in CONFIG_KEYS} == expected.config_keys()


def test_a_drafters_config_gives_its_targets_identity_back():
    config = make_drafter(make_target()).config
    before = Identity.of_target_of(config)
    assert (before.hidden_size, before.num_layers, before.vocab_size) == (32, 4, 96) and before.fingerprint
    WHOLE.write_into(config)
    assert Identity.of_target_of(config) == WHOLE  # the shape is the same
    Identity(hidden_size=7).write_into(config)
    assert Identity.of_target_of(config) == Identity(hidden_size=32, num_layers=4, vocab_size=96)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (dict(target=WHOLE.record() | {"dtype": "float32"}), WHOLE),
        (WHOLE.config_keys(), WHOLE),
        # up to 0.1.0: settings.json, eval.json, base.json's trained_for
        (
            dict(target="own/model", target_revision="main", target_commit="a" * 40, target_fingerprint="f" * 16,
                 tokenizer_hash="t" * 16, chat_template_hash=None, engine="plain batches"),
            Identity("own/model", "a" * 40, "f" * 16, "t" * 16),
        ),
        (dict(target="folder", target_commit=None, target_fingerprint=None), Identity("folder")),
        (
            dict(target={"name_or_path": "own/model", "fingerprint": "f" * 16, "dtype": "float32", "revision": None}),
            Identity("own/model", None, "f" * 16),
        ),
        (
            dict(target_model_name_or_path="own/model", target_revision="a" * 40, target_fingerprint="f" * 16,
                 tokenizer_hash="t" * 16, chat_template_hash="c" * 16, chat_template_kwargs=None, eos_token_id=0),
            Identity("own/model", "a" * 40, "f" * 16, "t" * 16, "c" * 16),
        ),
        (None, Identity()),
        ({}, Identity()),
    ],
    ids=["today", "config", "settings", "settings of a folder", "eval", "trained_for", "none", "empty"],
)  # fmt: skip
def test_records_of_every_version_are_read(record, expected):
    assert Identity.read(record) == expected


def test_weights_decide_where_both_are_known_and_names_otherwise():
    copy = Identity("its/copy", fingerprint="f" * 16)
    tuned = Identity("own/model", fingerprint="0" * 16)
    unknown = Identity("own/model")
    assert WHOLE.is_same_model(copy) and not WHOLE.is_same_model(tuned)
    assert WHOLE.is_same_model(unknown) and not unknown.is_same_model(copy)
    assert unknown.is_same_model(copy, "own/model")  # another name it goes by
    assert WHOLE.differences(tuned) == {"fingerprint": ("f" * 16, "0" * 16)}
    assert WHOLE.differences(Identity()) == {}


def one_token(target):
    target.get_input_embeddings().weight.data[50] += 0.1


def one_expert(target):
    target.model.layers[1].mlp.experts.down_proj.data[3] += 0.1


def later_heads(target):
    target.model.layers[2].self_attn.q_proj.weight.data[16:] += 0.1


def one_channel(target):
    target.model.norm.weight.data[-1] += 0.1


@pytest.mark.parametrize("change", [one_token, one_expert, later_heads, one_channel])
def test_weights_that_do_not_begin_a_tensor_tell_a_target_too(change):
    target = make_target("mixtral", dtype=torch.float32)
    own = target_fingerprint(target)
    assert same_weights(own, target_fingerprint(deepcopy(target).to(torch.bfloat16)))
    change(target)
    assert not same_weights(own, target_fingerprint(target))


def test_an_adapter_of_one_token_makes_another_target_and_is_its_merged_model():
    target = make_target(dtype=torch.float32)
    adapted = get_peft_model(deepcopy(target), TrainableTokensConfig(token_indices=[50], task_type="CAUSAL_LM"))
    assert target_fingerprint(adapted) == target_fingerprint(target)
    adapted.get_input_embeddings().trainable_tokens_delta["default"].data += 0.1
    assert not same_weights(target_fingerprint(adapted), target_fingerprint(target))
    assert target_fingerprint(adapted) == target_fingerprint(adapted.merge_and_unload())


def test_a_fingerprint_of_0_1_0_is_compared_by_what_it_knows():
    target = make_target(dtype=torch.float32)
    own = target_fingerprint(target)
    older = own.split("-")[0]
    assert len(older) == 16 and same_weights(older, own) and same_weights(own, older)
    assert not same_weights("0" * 16, own)
    known, found = Identity("own/model", fingerprint=older), Identity("its/copy", fingerprint=own)
    assert known.is_same_model(found) and "fingerprint" not in known.differences(found)
    drafter = make_drafter(target)
    drafter.config.target_fingerprint = older
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(target, drafter).detach()
    drafter.config.target_fingerprint = "0" * 16
    with pytest.warns(UserWarning, match="other weights"):
        attach(target, drafter).detach()


def test_codes_in_a_tensor_class_of_their_own_have_no_fingerprint():
    class Codes(torch.Tensor):
        pass

    target = make_target()
    target.lm_head.weight = torch.nn.Parameter(target.lm_head.weight.data.as_subclass(Codes))
    assert target_fingerprint(target) is None


def test_what_a_model_was_loaded_from_is_remembered_as_long_as_it_lives(files):
    target, _ = load_target(str(files / "target"))
    assert origin_of(target) == Origin(str(files / "target"), None)
    assert Identity.of(target, revision="main").revision == "main"
    note_origin(target, Origin("own/model", "a" * 40))
    assert Identity.of(target, revision="main").revision == "a" * 40
    bare = AutoModelForCausalLM.from_pretrained(files / "target")
    assert origin_of(bare) is None

    kept = len(origins._ORIGINS)
    del target
    gc.collect()
    assert len(origins._ORIGINS) < kept


# ---- files that 0.1.0 wrote


def as_0_1_0(settings: dict) -> dict:
    """Today's settings.json in the form of 0.1.0."""
    target = settings.pop("target")
    flat = dict(target=target["name_or_path"], target_commit=target["revision"])
    flat |= dict(target_fingerprint=target["fingerprint"])
    return settings | flat | {key: target[key] for key in ("tokenizer_hash", "chat_template_hash")}


def test_answers_begun_by_0_1_0_are_the_same_job_and_other_weights_are_not(files, tmp_path, capsys):
    out = tmp_path / "own.jsonl"
    words = ["--target", str(files / "target"), "--dataset_name", str(files / "chat.jsonl"), "--out", str(out)]
    words += ["--max_rows", "2", "--max_new_tokens", "4", "--device", "cpu"]
    regenerate(words)
    path = tmp_path / "own.settings.json"
    older = as_0_1_0(json.loads(path.read_text()))
    path.write_text(json.dumps(older))
    capsys.readouterr()
    regenerate(words)
    assert "is finished" in capsys.readouterr().out
    assert written_by("elsewhere", older["target_fingerprint"], str(out))
    path.write_text(json.dumps(older | {"target_fingerprint": "0" * 16}))
    with pytest.raises(SystemExit, match="target_fingerprint was '0000.*' and is '"):
        regenerate(words)


def test_an_adapter_of_0_1_0_goes_on_its_base_and_names_its_own_target(command, files, tmp_path):
    train(command(output_dir=tmp_path / "base"))
    keys = {key: value for key, value in BASE.items() if key not in ("num_draft_layers", "block_size")}
    keys.pop("target_layer_ids")
    lora = dict(use_peft="true", drafter=tmp_path / "base", lora_r=2)
    train(command(base=keys, output_dir=tmp_path / "out", **lora))
    path = tmp_path / "out/adapter/base.json"
    record = json.loads(path.read_text())
    identity = Identity.read(record["trained_for"])
    flat = {key: getattr(identity, own) for key, own in CONFIG_KEYS.items() if "size" not in key and "num" not in key}
    record["trained_for"] = flat | {key: value for key, value in record["trained_for"].items() if key != "target"}
    path.write_text(json.dumps(record))
    drafter = add_adapter(load_drafter(tmp_path / "base"), tmp_path / "out/adapter")
    assert Identity.of_target_of(drafter.get_base_model().config) == identity
    target = AutoModelForCausalLM.from_pretrained(files / "target")
    with attach(target, drafter), torch.no_grad():
        prompt = torch.arange(3, 11)[None]
        keys = dict(max_new_tokens=8, do_sample=False)
        assert torch.equal(target.generate(prompt, assistant_model=drafter, **keys), target.generate(prompt, **keys))
