"""`python -m hf_specauf.train` end to end: a saved target and a file of rows become a drafter folder."""

import json
import re
import signal
import time

import pytest
import torch
import yaml
from conftest import BASE, final, make_target, same, start
from datasets import Dataset
from test_trainer import recurrent_target
from transformers import AutoModel
from transformers.trainer_utils import get_last_checkpoint

from hf_specauf import DFlashDraftModel
from hf_specauf.train import main


def strict(text: str):
    """JSON as the standard has it: NaN and Infinity are errors."""

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture(scope="module")
def deep(tmp_path_factory, tokenizer):
    """The folder of a target with so many layers that the usual taps fit."""
    ids = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None)
    folder = tmp_path_factory.mktemp("deep") / "target"
    for part in (make_target(dtype=torch.float32, vocab_size=len(tokenizer), num_hidden_layers=8, **ids), tokenizer):
        part.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "data, first_row",
    [("text", "⟦To be read by a tiny tokenizer:"), ("chat", "<|user|>Question 0?<|end|><|assistant|>⟦To be read")],
)
def test_command_leaves_a_drafter_and_its_provenance(command, deep, data, first_row, tmp_path, capsys):
    undecided = {key: value for key, value in BASE.items() if key != "target_layer_ids"}
    keys = dict(base=undecided, target=deep, block_size=8, objective="auf_decay", save_steps=2)
    main(command(data, hub_token="hf_PLANTED", **keys))
    printed = capsys.readouterr().out
    assert "mask_token_id: 2 (derived from the target)" in printed
    assert "target_layer_ids: [1, 2, 3, 4, 5] (derived from the target)" in printed
    assert "8 layers; drafter: 1 layers, block size 8" in printed and "objective: auf_decay, gamma 4" in printed
    assert first_row in printed and "drafter saved to" in printed

    out = tmp_path / "out"
    drafter = AutoModel.from_pretrained(out)
    assert isinstance(drafter, DFlashDraftModel)
    assert drafter.dtype == torch.float32  # the target's
    assert drafter.config.target_model_name_or_path.endswith("target")

    record = strict((out / "provenance.json").read_text())
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    resolved = dict(mask_token_id=2, target_layer_ids=[1, 2, 3, 4, 5], gamma=4.0, seed=7, block_size=8)
    assert resolved.items() <= record["recipe"].items()
    assert record["environment"]["packages"]["transformers"].startswith("5.")
    assert record["environment"]["packages"]["hf-specauf"] and record["environment"]["processes"] == 1
    assert (record["steps"], record["rows"]) == (3, 27)
    assert record["target"]["dtype"] == "float32"
    assert record["trainable_parameters"] == sum(p.numel() for p in drafter.parameters())
    assert [entry["step"] for entry in record["history"]] == [1, 2, 3, 3]
    assert record["history"][-1]["eval_tau"] >= 1 and record["history"][0]["loss"] > 0
    assert not [key for key in record["recipe"] if key.endswith("_token")]
    written = {path.name: path.read_text() for path in out.rglob("*.json")}
    assert {"config.json", "provenance.json", "trainer_state.json"} <= set(written)
    assert not [name for name, text in written.items() if "hf_PLANTED" in text]


def test_rows_that_are_held_out_are_not_trained_on(command, files, tmp_path, capsys):
    held_out = dict(eval_dataset_name=files / "text.jsonl", eval_rows=4)
    main(command("text", max_steps=1, eval_prompts=0, **held_out))
    assert "dropped 4 of 30 rows: it is a held-out row too (4, first: row 0)" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/provenance.json").read_text())["rows"] == 26


def rows_in_every_format(count: int = 24) -> dict[str, list[dict]]:
    """The same conversations in every format, and their answers as text."""
    fox = "the quick brown fox".split()
    pairs = [(f"What is {i}?", f"It is {' '.join(fox[: 1 + i % 4])} {i}") for i in range(count)]
    return {
        "messages": [
            {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in pairs
        ],
        "sharegpt": [
            {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in pairs
        ],
        "alpaca": [{"instruction": q, "input": "", "output": a} for q, a in pairs],
        "prompt_completion": [{"prompt": q, "completion": a} for q, a in pairs],
        "text": [{"text": a} for _, a in pairs],
    }


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize("form", ["messages", "sharegpt", "alpaca", "prompt_completion", "text"])
def test_every_format_as_a_file_becomes_a_drafter(command, tmp_path, capsys, form, ending):
    path, rows = tmp_path / f"rows.{ending}", rows_in_every_format()[form]
    if ending == "parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(command(dataset_name=path))
    printed = capsys.readouterr().out
    kind = {"sharegpt": "conversations"}.get(form, form)
    assert f"22 rows of {kind} -> 22 token rows" in printed and "⟦It is the" in printed
    assert form == "text" or "<|user|>What is 0?<|end|><|assistant|>⟦It is the 0<|end|>⟧" in printed
    assert "the target's own first choice on" in printed
    assert strict((tmp_path / "out" / "provenance.json").read_text())["rows"] == 22


@pytest.mark.parametrize("streaming", ["true", "false"])
def test_a_weighted_mixture_of_formats_packed_and_streamed(command, tmp_path, capsys, streaming):
    every = rows_in_every_format()
    sources = []
    for form, weight in (("messages", 3), ("alpaca", 1), ("text", 1)):
        (tmp_path / f"{form}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in every[form]))
        sources.append({"name": str(tmp_path / f"{form}.jsonl"), "weight": weight})
    words = command(dataset_streaming=streaming, packing="true", max_train_rows=20, max_length=96, eval_rows=5)
    at = words.index("--dataset_name")
    words[at : at + 2] = ["--dataset_mixture", *map(json.dumps, sources)]
    main(words)
    printed = capsys.readouterr().out
    assert f"mixture: 12 rows of {sources[0]['name']}, 4 rows of {sources[1]['name']}, 4 rows of" in printed
    # Two formats hold the same conversations, so that what is held out of one may be in the other.
    assert (
        re.search("20 rows of messages, alpaca, text -> (19|20) token rows", printed) and "packed them into" in printed
    )
    record = strict((tmp_path / "out" / "provenance.json").read_text())
    assert record["rows"] < 20 and record["recipe"]["dataset_name"] is None
    assert [source["weight"] for source in record["recipe"]["dataset_mixture"]] == [3, 1, 1]
    evaluation = strict((tmp_path / "out" / "eval.json").read_text())
    assert evaluation["conditions"]["prompts"] == " + ".join(source["name"] for source in sources)


def test_same_seed_same_weights_and_bfloat16_on_request(command, tmp_path):
    for name, dtype in (("a", "float32"), ("b", "bfloat16")):
        main(command(output_dir=tmp_path / name, save_dtype=dtype))
    assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == "bfloat16"
    stored = AutoModel.from_pretrained(tmp_path / "b", dtype="auto")
    assert stored.dtype == torch.bfloat16
    rounded = {name: value.bfloat16() for name, value in final(tmp_path / "a").items()}
    assert same(stored.state_dict(), rounded)
    # what is trained stays fp32
    checkpoint = get_last_checkpoint(tmp_path / "b")
    assert same(AutoModel.from_pretrained(checkpoint, dtype="auto").state_dict(), final(tmp_path / "a"))


@pytest.mark.parametrize("which", ["the last evaluation", "decoding", "the plot"])
def test_whatever_measurement_fails_the_drafter_and_its_record_are_saved_first(
    command, tmp_path, monkeypatch, capsys, which
):
    def fail(*args, **kwargs):
        raise ValueError(f"{which} failed")

    places = {
        "the last evaluation": "trainer.AUFTrainer.evaluate", "decoding": "evaluation.compare",
        "the plot": "evaluation.plot_alpha",
    }  # fmt: skip
    monkeypatch.setattr(f"hf_specauf.training.{places[which]}", fail)
    with pytest.raises(SystemExit, match=f"{which} failed"):
        main(command())
    out = tmp_path / "out"
    assert f"a measurement failed; the trained drafter and provenance.json are in {out}" in capsys.readouterr().out
    record = strict((out / "provenance.json").read_text())
    assert record["steps"] == 3
    assert any("eval_tau" in entry for entry in record["history"]) == (which != "the last evaluation")
    monkeypatch.undo()
    main(command(output_dir=tmp_path / "whole"))
    assert same(final(out), final(tmp_path / "whole"))


@pytest.mark.parametrize("packing", ["true", "false"])
def test_rows_longer_than_the_targets_positions_are_cut_and_trained_on(command, tokenizer, tmp_path, capsys, packing):
    ids = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None)
    # positions that are learned: past the last one there is nothing
    for part in (make_target("gpt2", dtype=torch.float32, vocab_size=len(tokenizer), **ids), tokenizer):
        part.save_pretrained(tmp_path / "target")
    said = [" ".join(f"sheep {i + k}" for k in range(5 if i < 20 else 90)) for i in range(24)]
    # the last one is held out, and its question has no room
    turns = [(("user", "Count"), ("assistant", text)) for text in said[:-1]]
    turns.append((("user", said[-1]), ("assistant", "done")))
    rows = [{"messages": [{"role": role, "content": text} for role, text in pair]} for pair in turns]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = dict(target=tmp_path / "target", max_length=3072, eval_rows=2, packing=packing)
    main(command(dataset_name=tmp_path / "rows.jsonl", **keys))
    printed = capsys.readouterr().out
    assert "cut 2 rows at the target's 256 positions, below max_length" in printed
    assert strict((tmp_path / "out" / "eval.json").read_text())["prompts"]
    with pytest.raises(SystemExit, match="eval_new_tokens is 256, and the target has 256 positions"):
        main(command(target=tmp_path / "target", eval_new_tokens=256))


ASKED_FIRST = [
    (
        dict(report_to="wandb"),
        "report_to names wandb, which is not installed: `pip install wandb`",
    ),
    (dict(report_to="nonsense"), "report_to names 'nonsense', and Trainer reports to none but"),
    (dict(optim="galore_adamw", optim_target_modules="attn"), "optim is galore_adamw, which cannot be made here"),
    (dict(lr_scheduler_kwargs='{"nonsense":1}'), "lr_scheduler_kwargs: {'nonsense': 1}"),
    (
        dict(lr_scheduler_type="cosine_with_min_lr"),
        "lr_scheduler_type is cosine_with_min_lr, which cannot be made",
    ),
    (dict(lr_scheduler_type="warmup_stable_decay"), "lr_scheduler_type is warmup_stable_decay, which cannot be made"),
    (dict(adam_beta2=1.0), "adam_beta2 is 1.0; it must be a finite number of at least 0 and at most 0.999999"),
    (dict(eval_rows=0, eval_strategy="steps"), "eval_strategy is steps, and there are no held-out rows"),
    (dict(gamma=3), "objective 'auf' has no decay and would ignore it"),
    (
        dict(metric_for_best_model="accuracy", eval_strategy="steps"),
        "metric_for_best_model is 'accuracy', which no evaluation gives",
    ),
    (dict(output_dir="text.jsonl"), "output_dir text.jsonl is a file: name a folder"),
    (dict(output_dir="text.jsonl/out"), "lies under text.jsonl, which is a file"),
    (dict(output_dir="/proc/out"), "output_dir /proc/out cannot be written, because /proc takes no file"),
    (dict(push_to_hub="true", hub_model_id="a/b/c"), "hub_model_id is 'a/b/c', which no repository can be called"),
    (dict(hub_model_id="a/b/c"), "hub_model_id is 'a/b/c', which no repository can be called"),
    (dict(target_states_cache="text.jsonl"), "target_states_cache text.jsonl is a file: name a folder"),
    (dict(block_size=200), "block_size is 200, and no row of max_length 96 holds such a block"),
    (dict(block_size=100000, max_length=3072), "block_size is 100000, and no row of max_length 3072"),
    (dict(fsdp="full_shard"), "fsdp shards the drafter over processes, and there is one"),
    # what asked for a module or a device that is not here had a traceback
    (
        dict(target_attn_implementation="flash_attention_2"),
        "cannot be loaded as asked, because something is not installed",
    ),
    (dict(target_device_map="cuda:9"), "target_device_map is 'cuda:9', and torch"),
    (dict(deepspeed="/nope.json"), "deepspeed is given, and DeepSpeed is not installed"),
]


@pytest.mark.parametrize("keys, said", ASKED_FIRST, ids=[" ".join(keys) for keys, _ in ASKED_FIRST])
def test_what_a_run_would_end_on_later_is_asked_before_the_data_is_tokenized(
    command, files, monkeypatch, capsys, keys, said
):
    monkeypatch.chdir(files)
    with pytest.raises(SystemExit) as stop:
        main(command(**keys))
    assert stop.value.code.startswith("error: ") and said in stop.value.code
    assert "token rows" not in capsys.readouterr().out


def test_arguments_that_the_chat_template_never_reads_are_named_once(command, capsys):
    main(command("chat", max_steps=1, eval_prompts=0, chat_template_kwargs='{"enable_thinkin":false}'))
    said = "the chat template never reads enable_thinkin of chat_template_kwargs, so that changes nothing"
    assert capsys.readouterr().out.count(said) == 1


def test_what_would_fail_after_hours_of_tokenizing_is_told_before(command, tokenizer, tmp_path, capsys):
    recurrent_target("jamba", len(tokenizer)).save_pretrained(tmp_path / "recurrent")
    tokenizer.save_pretrained(tmp_path / "recurrent")
    with pytest.raises(SystemExit, match="on top of its recurrent state .* Set eval_prompts: 0"):
        main(command(target=tmp_path / "recurrent"))
    with pytest.raises(SystemExit, match="lora_target_modules names 'nowhere'"):
        main(command(use_peft="true", init_from_target_layers="2", lora_target_modules="nowhere"))
    assert "token rows" not in capsys.readouterr().out


def test_drafters_of_all_objectives_and_no_other_seed_start_alike(command, tmp_path):
    runs = {"auf": dict(objective="auf"), "decay": dict(objective="decay", gamma=2), "other": dict(seed=8)}
    for name, keys in runs.items():
        main(command(output_dir=tmp_path / name, learning_rate=0, max_steps=1, **keys))
    first = {name: final(tmp_path / name) for name in runs}
    assert same(first["auf"], first["decay"])
    assert not same(first["auf"], first["other"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_interrupted_command_resumes_to_a_finished_run(command, tmp_path, capsys, number):
    out, whole = tmp_path / "out", tmp_path / "whole"
    keys = dict(max_steps=120, save_steps=10, save_total_limit=1, logging_steps=10)
    process = start("hf_specauf.train", *command(**keys))
    deadline = time.monotonic() + 300
    while process.poll() is None and not list(out.glob("checkpoint-*/trainer_state.json")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=300)
    # `specauf train && specauf evaluate` must not go on
    assert process.returncode == 1, printed
    assert "Traceback" not in printed
    stopped = int(get_last_checkpoint(out).rsplit("-", 1)[1])
    assert f"stopped at step {stopped} of 120; resume with --resume_from_checkpoint true" in printed
    assert 0 < stopped < 120 and not (out / "provenance.json").exists()

    main(command(**keys, resume_from_checkpoint="true"))
    assert capsys.readouterr().out.count("{'loss'") == 12 - stopped // 10  # it did not start afresh
    record = strict((out / "provenance.json").read_text())
    assert record["steps"] == 120
    main(command(**keys, output_dir=whole))
    assert same(final(out), final(whole))


def test_accelerate_launch_runs_a_recipe(command, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(BASE | dict(target_layer_ids=[0, 2], use_cpu=True)))
    launcher = ("accelerate.commands.accelerate_cli", "launch", "--num_processes", "1", "--cpu")
    process = start(*launcher, "-m", "hf_specauf.train", "--config", str(recipe), *command(base={}))
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    assert strict((tmp_path / "out" / "provenance.json").read_text())["steps"] == 3


@pytest.mark.parametrize(
    "overrides, message",
    [
        (dict(dataset_name="nowhere/rows.jsonl"), "'nowhere/rows.jsonl' looks like a local file, but there is none"),
        (dict(target_layer_ids="0 3"), "leaves the allowed range 0..2 of a target with 4 layers"),
        (dict(data="short"), "rows are too short: only 0 of 27 hold a whole block of 4"),
        (dict(resume_from_checkpoint="out/checkpoint-9"), "there is no folder 'out/checkpoint-9'"),
        (dict(gamma=7), "objective 'auf' has no decay and would ignore it"),
        (dict(objectve="auf"), "--objectve"),
        (dict(target="nowhere"), "target: 'nowhere' cannot be loaded"),
        (dict(data="broken"), "broken.jsonl: line 2 is not whole JSON, cut off perhaps"),
        (dict(dataset_streaming="true"), "dataset_streaming: true needs max_train_rows"),
        (dict(dataset_mixture='{"name":"a","wieght":2}'), "give the training text as dataset_name"),
        (dict(target_quantization="bnb-3bit"), "'bnb-3bit'; it must be one of bnb-4bit, bnb-8bit"),
        (dict(data="single"), "has 1 rows, too few to hold one out"),
        (dict(config="broken.yaml"), "while parsing"),
        (dict(config=""), "--config needs the path of a recipe"),
        (dict(config="nowhere.yaml"), "nowhere.yaml"),
        (dict(chat_template_kwargs="{enable_thinking:false}"), "chat_template_kwargs is '{enable_thinking:false}'"),
        (dict(eval_rows=-1), "eval_rows is -1"),
    ],
)
def test_errors_are_one_line_without_a_traceback(command, files, monkeypatch, overrides, message):
    monkeypatch.chdir(files)
    with pytest.raises(SystemExit) as stop:
        main(command(**overrides))
    assert stop.value.code.startswith("error: ") and "\n" not in stop.value.code
    assert message in stop.value.code


def test_a_handful_of_rows_and_no_held_out_ones(command, files, tmp_path):
    for rows, keys in ((9, {}), (27, dict(eval_rows=0))):
        text = (files / "text.jsonl").read_text().splitlines(keepends=True)[:rows]
        (tmp_path / "few.jsonl").write_text("".join(text))
        out = tmp_path / str(rows)
        main(command(dataset_name=tmp_path / "few.jsonl", output_dir=out, resume_from_checkpoint="true", **keys))
        record = strict((out / "provenance.json").read_text())
        assert record["rows"] == (27 if keys else 8)
        assert any("eval_tau" in entry for entry in record["history"]) == (not keys)


def test_error_of_the_command_itself_shows_no_traceback(command):
    process = start("hf_specauf.train", *command(dataset_name="nowhere/rows.jsonl"))
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "Traceback" not in printed
    assert printed.splitlines()[-1].startswith("error: dataset_name 'nowhere/rows.jsonl' looks like a local file")
