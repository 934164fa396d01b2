"""The target's own answers: exact tokens, turn by turn, through kills, processes and a server, never mixed."""

import copy
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx2
import pytest
import torch
from conftest import CHAT_TEMPLATE, byte_level_tokenizer, make_target, warm_python
from rich.progress import Progress
from test_tokens import CHATML, GOLDEN, model_tokenizer
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.import_utils import is_serve_available
from warm_python import Process

from hf_specauf import evaluate, train
from hf_specauf.data.answers import TargetWriter, generate_continuously, generate_in_batches, until_end
from hf_specauf.data.conversation import Conversation, Sampling, chat_end
from hf_specauf.data.rows import show_row
from hf_specauf.data.server import ServerWriter
from hf_specauf.data.sources import load_rows
from hf_specauf.data.tokens import RowEncoder
from hf_specauf.regenerate import main

pytestmark = pytest.mark.internals

NEW = 6


@pytest.fixture(scope="module")
def prompts(files):
    """Ten conversations of one or two questions, whose own answers must not be seen again."""
    rows = []
    for i in range(10):
        turns = [("user", f"Question {i}?"), ("assistant", "NEVER SEEN"), ("user", f"And {i + 1}?")]
        turns = turns[: 1 + i % 3]
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    path = files / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def words(files, prompts, tmp_path):
    def words(**overrides) -> list[str]:
        keys = dict(
            target=files / "target", dataset_name=prompts, out=tmp_path / "own.jsonl", device="cpu",
            max_new_tokens=NEW, temperature=0, rows_per_chunk=3, continuous_batching="false",
        )  # fmt: skip
        return [word for key, value in (keys | overrides).items() for word in (f"--{key}", str(value))]

    return words


def written(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def conversations(path) -> list[list[dict]]:
    return [row["messages"] for row in written(path) if "messages" in row]


def save_rows(path, rows: list[dict]):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def by_hand(target, tokenizer, questions: list[str]) -> tuple[list[dict], list[list[int]]]:
    """A conversation answered one question at a time by plain greedy `generate`: turns, and the ids at each answer."""
    turns, ids = [], []
    for question in questions:
        turns.append({"role": "user", "content": question})
        prompt = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        out = target.generate(**prompt, max_new_tokens=NEW, do_sample=False)[0].tolist()
        answer = out[prompt["input_ids"].shape[1] :]
        said = {"role": "assistant", "content": tokenizer.decode(answer, skip_special_tokens=True)}
        turns.append(said | {"truncated": True})
        ids.append(out)
    return turns, ids


@pytest.fixture(scope="module")
def pair(files):
    return AutoModelForCausalLM.from_pretrained(files / "target"), AutoTokenizer.from_pretrained(files / "target")


@pytest.mark.parametrize("continuous", [True, False])
def test_answers_are_the_targets_own_tokens_turn_by_turn(words, pair, tmp_path, capsys, continuous):
    target, tokenizer = pair
    main(words(continuous_batching=continuous))
    rows = written(tmp_path / "own.jsonl")
    answers = 0
    for i in range(10):
        questions = [f"Question {i}?"] + [f"And {i + 1}?"] * (i % 3 == 2)
        turns, ids = by_hand(target, tokenizer, questions)
        own = [row for row in rows if row["source_row"] == i]
        assert own[-1]["messages"] == turns and all(row["truncated"] for row in own)
        # what random weights write is seldom tokenized again as it was written: then each answer has its own row
        assert [row["input_ids"] for row in own] == (ids if len(own) == len(ids) else ids[-1:])
        assert all(row["supervised"][-NEW:] == [1] * NEW for row in own)
        assert sum(sum(row["supervised"]) for row in own) == NEW * len(ids)
        answers += len(ids)
    assert answers == 13
    settings = json.loads((tmp_path / "own.settings.json").read_text())
    assert (
        settings["engine"] == ("continuous batching" if continuous else "plain batches")
        and settings["temperature"] == 0
    )
    assert settings["counts"] == {"answered": 10, "truncated": 10, "tokens": NEW * answers}
    assert "10 rows answered, 10 cut at max_new_tokens" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own.jsonl", "own.settings.json"]


def test_continuous_batching_and_plain_batches_write_the_same_greedy_answers(pair):
    target, _ = pair
    prompts = [list(range(20, 20 + size)) for size in (3, 9, 5, 14)]
    config = target.generation_config.__class__(max_new_tokens=NEW, do_sample=False, pad_token_id=1)
    answers = [generate(target, prompts, config, 0) for generate in (generate_continuously, generate_in_batches)]
    assert answers[0] == answers[1] and [len(ids) for ids in answers[0]] == [NEW] * 4
    sdpa = target.config._attn_implementation
    assert sdpa == "sdpa"  # given back


@pytest.mark.parametrize("generate", [generate_continuously, generate_in_batches])
def test_samples_depend_on_the_seed_alone(pair, generate):
    target, _ = pair
    prompts = [list(range(20, 20 + size)) for size in (3, 9, 5, 14)]
    config = target.generation_config.__class__(max_new_tokens=NEW, do_sample=True, top_k=0, pad_token_id=1)
    first = generate(target, prompts, config, 5)
    torch.manual_seed(99)
    assert generate(target, prompts, config, 5) == first
    assert generate(target, prompts, config, 6) != first


def test_a_target_that_cannot_batch_continuously_is_answered_in_plain_batches_and_said(
    words, files, tokenizer, capsys
):
    """Recurrent states have no pages."""
    ids = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None)
    config = AutoConfig.for_model("mamba", vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, **ids)
    config.max_position_embeddings = 256
    AutoModelForCausalLM.from_config(config).save_pretrained(files / "mamba")
    tokenizer.save_pretrained(files / "mamba")
    main(words(target=files / "mamba", continuous_batching="true"))
    printed = capsys.readouterr().out
    assert "continuous batching cannot run this target here" in printed and "10 rows answered" in printed


@pytest.mark.parametrize("continuous", [True, False])
def test_a_targets_own_generation_defaults_do_not_change_what_it_writes(words, pair, tmp_path, continuous):
    target, tokenizer = copy.deepcopy(pair[0]), pair[1]
    target.generation_config.update(repetition_penalty=50.0, min_p=0.9, do_sample=True)
    target.save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    main(words(continuous_batching=continuous, max_rows=3))
    main(words(continuous_batching=continuous, max_rows=3, target=tmp_path / "target", out=tmp_path / "same.jsonl"))
    assert (tmp_path / "own.jsonl").read_bytes() == (tmp_path / "same.jsonl").read_bytes()


def test_a_target_keeps_its_own_generation_defaults(pair):
    target, tokenizer = pair
    own, before = target.generation_config, target.generation_config.to_dict()
    write = TargetWriter(
        target, tokenizer, Sampling(NEW, temperature=1.0), chat_template_kwargs=None, prompt_tokens=5,
        continuous_batching=False,
    )  # fmt: skip
    conversation = Conversation(0, {"messages": [FOX]})
    assert conversation.next_question() and len(write([conversation], seed=0)[0].ids) == NEW
    assert target.generation_config is own and own.to_dict() == before


# ---- templates


def taught(folder, tokenizer, lessons: list[tuple], ends: list[str]) -> Path:
    """A tiny target trained until it greedily gives each answer to its conversation: (turns, tools, answer)."""
    ids = dict(eos_token_id=tokenizer.convert_tokens_to_ids(ends), pad_token_id=tokenizer.pad_token_id)
    shape = dict(vocab_size=len(tokenizer), num_hidden_layers=2, max_position_embeddings=1024)
    target = make_target(dtype=torch.float32, bos_token_id=None, **shape, **ids)
    optimizer, worst = torch.optim.AdamW(target.parameters(), lr=1e-2), 1.0
    while worst > 0.02:
        worst = 0.0
        for turns, tools, answer in lessons:
            prompt = tokenizer.apply_chat_template(turns, tools=tools, add_generation_prompt=True, return_dict=True)
            words = tokenizer(answer, add_special_tokens=False)["input_ids"]
            logits = target(torch.tensor([prompt["input_ids"] + words])).logits[0, len(prompt["input_ids"]) - 1 : -1]
            loss = cross_entropy(logits, torch.tensor(words))
            loss.backward()
            worst = max(worst, loss.item())
        optimizer.step()
        optimizer.zero_grad()
    target.generation_config.eos_token_id = ids["eos_token_id"]
    target.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def turn(role: str, content: str, **more) -> dict:
    return {"role": role, "content": content} | more


FOX, SHEEP = turn("user", "What does the fox do?"), turn("user", "And the sheep?")
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "fox"}}}
TOOLS = [{"type": "function", "function": {"name": "look", "description": "Look.", "parameters": {
    "type": "object", "properties": {"at": {"type": "string", "description": "What at."}}}}}]  # fmt: skip
# special tokens, the key of thoughts, an answer with thoughts, an answer that calls a tool
THINKING = {
    "gptoss.jinja": (
        [*GOLDEN["gpt-oss"][1], "<|call|>"], "thinking",
        "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>{}<|return|>",
        '<|channel|>analysis<|message|>Look.<|end|><|start|>assistant to=functions.look<|channel|>commentary json'
        '<|message|>{"at": "fox"}<|call|>',
    ),
    "qwen3.jinja": (
        GOLDEN["qwen3, thinking on"][1], "reasoning_content", "<think>\n{}\n</think>\n\n{}<|im_end|>",
        '<think>\nLook.\n</think>\n\n<tool_call>\n{"name": "look", "arguments": {"at": "fox"}}\n</tool_call>'
        "<|im_end|>",
    ),
}  # fmt: skip


@pytest.mark.parametrize("template", THINKING)
def test_thoughts_are_told_from_answers_and_no_answer_is_lost_where_the_template_drops_them(template, words, tmp_path):
    special, key, form, _ = THINKING[template]
    tokenizer = model_tokenizer(template, special)
    said = [turn("assistant", "It jumps.", **{key: "Foxes."}), turn("assistant", "They sleep.", **{key: "Sheep."})]
    answers = [form.format("Foxes.", "It jumps."), form.format("Sheep.", "They sleep.")]
    lessons = [([FOX], None, answers[0]), ([FOX, said[0], SHEEP], None, answers[1])]
    target = taught(tmp_path / "target", tokenizer, lessons, special[1:2])
    data = save_rows(tmp_path / "data.jsonl", [{"messages": [FOX, turn("assistant", "?"), SHEEP]}] * 2)
    main(words(target=target, dataset_name=data, max_new_tokens=60))
    rows = written(tmp_path / "own.jsonl")
    assert [row["source_row"] for row in rows] == [0, 0, 1, 1]
    assert [row.get("messages") for row in rows] == [None, [FOX, said[0], SHEEP, said[1]]] * 2
    for row, (turns, _, answer) in zip(rows, lessons * 2):
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert row["input_ids"][: len(prompt)] == prompt
        assert row["supervised"] == [0] * len(prompt) + [1] * (len(row["input_ids"]) - len(prompt))
        assert tokenizer.decode(row["input_ids"][len(prompt) :]) == answer
        assert row["truncated"] is False
    counts = json.loads((tmp_path / "own.settings.json").read_text())["counts"]
    assert counts == {"answered": 2, "tokens": sum(sum(row["supervised"]) for row in rows)}


@pytest.mark.parametrize("template", THINKING)
def test_thoughts_and_calls_are_told_from_answers_where_a_tokenizer_has_several_templates(template):
    special, key, form, call = THINKING[template]
    tokenizer = model_tokenizer(template, special)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": tokenizer.chat_template}
    keys = dict(chat_template_kwargs=None, prompt_tokens=9, continuous_batching=False)
    shape = dict(vocab_size=len(tokenizer), max_position_embeddings=1024)  # Qwen3's prompt with tools is long
    target = make_target(**shape, eos_token_id=tokenizer.convert_tokens_to_ids(special[1]))
    writer = TargetWriter(target, tokenizer, Sampling(NEW, temperature=0), **keys)
    for tools, said in ((None, form.format("Foxes.", "It jumps.")), (TOOLS, call)):
        conversation = Conversation(0, {"messages": [FOX], "tools": tools})
        assert conversation.next_question()
        ids = tokenizer(said, add_special_tokens=False)["input_ids"]
        answer = writer._answer(conversation, writer._prompt(conversation), ids).turn
        assert (answer[key], answer["content"]) == (("Look.", "") if tools else ("Foxes.", "It jumps."))
        assert answer.get("tool_calls") == ([CALL] if tools else None)


def test_answers_that_the_template_keeps_stand_in_one_row(words, tmp_path):
    tokenizer = byte_level_tokenizer(CHAT_TEMPLATE)
    said = [turn("assistant", "It jumps."), turn("assistant", "They sleep.")]
    lessons = [([FOX], None, "It jumps.<|end|>"), ([FOX, said[0], SHEEP], None, "They sleep.<|end|>")]
    target = taught(tmp_path / "target", tokenizer, lessons, ["<|end|>"])
    data = save_rows(tmp_path / "data.jsonl", [{"messages": [FOX, turn("assistant", "?"), SHEEP]}])
    main(words(target=target, dataset_name=data, max_new_tokens=60))
    [row] = written(tmp_path / "own.jsonl")
    assert row["messages"] == [FOX, said[0], SHEEP, said[1]]
    assert show_row(row, tokenizer) == (
        "<|user|>What does the fox do?<|end|><|assistant|>⟦It jumps.<|end|>⟧<|user|>And the sheep?<|end|>"
        "<|assistant|>⟦They sleep.<|end|>⟧"
    )


@pytest.fixture
def talkative(tmp_path) -> Path:
    """A target whose chat ends a turn with <|end|>. Its own end is another token, and it goes on to ask itself."""
    tokenizer = byte_level_tokenizer(CHAT_TEMPLATE)
    said = "It jumps.<|end|><|user|>And the sheep?<|end|><|assistant|>It sleeps.<|end|>"
    return taught(tmp_path / "target", tokenizer, [([FOX], None, said)], ["<|eos|>"])


def test_an_answer_ends_where_the_chat_does_though_the_targets_own_end_is_another(talkative, words, tmp_path, capsys):
    data = save_rows(tmp_path / "data.jsonl", [{"messages": [FOX]}])
    main(words(target=talkative, dataset_name=data, max_new_tokens=60))
    [row] = written(tmp_path / "own.jsonl")
    assert row["messages"] == [FOX, turn("assistant", "It jumps.")] and row["truncated"] is False
    said = "ends an answer with '<|end|>', and the target's generation_config.eos_token_id names '<|eos|>'"
    assert capsys.readouterr().out.count(said) == 1
    assert json.loads((tmp_path / "own.settings.json").read_text())["stops_at"] == [0, 6]


def test_training_and_evaluation_stop_where_the_chat_ends(talkative, command, tmp_path, capsys):
    said = "ends an answer with '<|end|>', and the target's generation_config.eos_token_id names '<|eos|>'"
    asked = [turn("user", f"What does fox {i} do?") for i in range(20)]
    rows = [{"messages": [question, turn("assistant", "It jumps.")]} for question in asked]
    data = save_rows(tmp_path / "data.jsonl", rows)
    keys = dict(target=talkative, dataset_name=data, target_layer_ids="0", eval_new_tokens=40)
    train.main(command(**keys))
    evaluate.main(
        ["--target", str(talkative), "--drafter", str(tmp_path / "out"), "--prompts", str(data), "--device", "cpu"]
        + ["--out", str(tmp_path / "eval"), "--count", "1"]
    )
    assert capsys.readouterr().out.count(said) == 2
    answer = len(AutoTokenizer.from_pretrained(talkative)("It jumps.<|end|>")["input_ids"])
    for folder in ("out", "eval"):
        measured = json.loads((tmp_path / folder / "eval.json").read_text())["prompts"]
        assert [row["new_tokens"] for row in measured] == [answer] * len(measured)


ENDS = {"qwen3, thinking on": "<|im_end|>", "llama-3.1": "<|eot_id|>", "gemma-3": "<end_of_turn>", "mistral": "</s>",
        "gpt-oss": "<|return|>", "chatml": "<|im_end|>"}  # fmt: skip


@pytest.mark.own
@pytest.mark.parametrize("case", ENDS)
def test_the_end_of_a_chat_is_the_token_behind_its_last_answer(case):
    template, special, kwargs, _, _ = GOLDEN[case]
    tokenizer = model_tokenizer(template, special)
    assert tokenizer.convert_ids_to_tokens(chat_end(tokenizer, kwargs)) == ENDS[case]


@pytest.mark.own
@pytest.mark.parametrize("template", [None, "{{ raise_exception('no') }}", "{{ messages[0].content }}", CHATML[:-5]])
def test_a_template_that_ends_no_answer_changes_no_end(template):
    tokenizer = byte_level_tokenizer(template)
    assert chat_end(tokenizer, None) is None


@pytest.mark.parametrize("template", THINKING)
def test_a_tool_call_is_recognised_and_ends_the_conversation(template, words, tmp_path):
    special, key, _, calling = THINKING[template]
    end = calling[calling.rindex("<") :]
    tokenizer = model_tokenizer(template, special)
    target = taught(tmp_path / "target", tokenizer, [([FOX], TOOLS, calling)], [end])
    data = save_rows(tmp_path / "data.jsonl", [{"messages": [FOX, turn("assistant", "?"), SHEEP], "tools": TOOLS}])
    main(words(target=target, dataset_name=data, max_new_tokens=90))
    [row] = written(tmp_path / "own.jsonl")
    assert row["messages"] == [FOX, turn("assistant", "", tool_calls=[CALL], **{key: "Look."})]
    assert row["tools"] == TOOLS and row["truncated"] is False


def test_json_that_looks_like_a_call_is_an_answer_where_no_tool_was_given(words, tmp_path):
    said = '{"name": "fox", "parameters": {"does": "jump"}}'
    tokenizer = model_tokenizer(*GOLDEN["llama-3.1"][:2])
    target = taught(tmp_path / "target", tokenizer, [([FOX], None, said + "<|eot_id|>")], ["<|eot_id|>"])
    main(
        words(target=target, dataset_name=save_rows(tmp_path / "data.jsonl", [{"messages": [FOX]}]), max_new_tokens=60)
    )
    [row] = written(tmp_path / "own.jsonl")
    assert row["messages"] == [FOX, turn("assistant", said)] and row["truncated"] is False


@pytest.mark.parametrize("continuous", [True, False])
def test_the_mask_token_is_never_written(words, tmp_path, continuous):
    """Training would end at it."""
    tokenizer = byte_level_tokenizer(CHAT_TEMPLATE)
    target = taught(tmp_path / "target", tokenizer, [([FOX], None, "It <|mask|> jumps.<|end|>")], ["<|end|>"])
    data = save_rows(tmp_path / "data.jsonl", [{"messages": [FOX]}])
    main(words(target=target, dataset_name=data, max_new_tokens=20, continuous_batching=continuous))
    [row] = written(tmp_path / "own.jsonl")
    assert tokenizer.mask_token_id not in row["input_ids"] and row["messages"][1]["content"].startswith("It ")


# ---- ends


@pytest.mark.own
def test_an_answer_ends_with_its_end_token():
    assert until_end([5, 6, 7, 8], {7, 9}) == [5, 6, 7] and until_end([5, 6], {7}) == [5, 6]


def start(arguments: list[str], **environment: str) -> Process:
    return warm_python().start("-m", "hf_specauf.regenerate", *arguments, **environment)


def test_killed_twice_and_resumed_is_byte_for_byte_an_uninterrupted_run(words, files, tmp_path):
    data = files / "many.jsonl"
    data.write_text(
        "".join(json.dumps({"messages": [{"role": "user", "content": f"{i}?"}]}) + "\n" for i in range(12))
    )
    keys = dict(dataset_name=data, temperature=1, rows_per_chunk=2, continuous_batching="true")
    parts = tmp_path / "own.parts"
    for killed in (1, 3):
        process = start(words(**keys))
        deadline = time.monotonic() + 240
        while process.poll() is None and len(list(parts.glob("chunk-*.jsonl"))) < killed:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL and not (tmp_path / "own.jsonl").exists()
        assert killed <= len(list(parts.glob("chunk-*.jsonl"))) < 6
    main(words(**keys))
    main(words(**keys, out=tmp_path / "whole.jsonl"))
    assert (tmp_path / "own.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert [row["source_row"] for row in written(tmp_path / "own.jsonl")] == list(range(12))


@pytest.mark.own
def test_the_prompts_of_a_file_that_is_cut_off_are_answered_where_that_is_asked_for(words, tmp_path, capsys):
    path = tmp_path / "cut.json"
    path.write_text(json.dumps([{"messages": [FOX]}, {"messages": [SHEEP]}, {"messages": [FOX]}])[:-30])
    with pytest.raises(SystemExit, match="cut.json: .*--dataset_salvage true"):
        main(words(dataset_name=path))
    main(words(dataset_name=path, dataset_salvage="true"))
    assert [row["messages"][0] for row in written(tmp_path / "own.jsonl")] == [FOX, SHEEP]
    assert "cut.json is not whole: read 2 rows, and left out 1" in capsys.readouterr().out
    # settings of before this key was there
    settings = json.loads((tmp_path / "own.settings.json").read_text())
    del settings["dataset_salvage"]
    (tmp_path / "own.settings.json").write_text(json.dumps(settings))
    main(words(dataset_name=path, dataset_salvage="true"))
    assert "own.jsonl is finished" in capsys.readouterr().out


@pytest.mark.own
def test_texts_with_other_line_ends_are_put_together(words, files, tmp_path):
    odd = ["a\u2028b", "a\u2029b", "a\u0085b", "a\x0bb\x0cb", "a\r\nb"]
    data = save_rows(files / "line_ends.jsonl", [{"messages": [turn("user", text)]} for text in odd])
    main(words(dataset_name=data))
    assert [row["messages"][0]["content"] for row in written(tmp_path / "own.jsonl")] == odd
    assert [row["messages"][0]["content"] for row in load_rows(str(tmp_path / "own.jsonl"))] == odd


def test_two_processes_share_the_rows_and_write_the_file_of_one(words, tmp_path):
    ranks = [start(words(), RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    printed = [process.communicate(timeout=300)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], printed
    main(words(out=tmp_path / "whole.jsonl"))
    assert (tmp_path / "own.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sum("rows answered," in text for text in printed) == 1  # the last one put it together


@pytest.mark.own
def test_srun_shares_the_rows_and_a_batch_script_does_all(words, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "0")
    main(words(out=tmp_path / "whole.jsonl"))
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    for rank, chunks in ((1, ["chunk-000001.jsonl", "chunk-000003.jsonl"]), (0, [])):
        monkeypatch.setenv("SLURM_PROCID", str(rank))
        main(words())
        assert sorted(path.name for path in tmp_path.glob("own.parts/chunk-*")) == chunks
    assert (tmp_path / "own.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.own
def test_answers_are_counted_while_a_chunk_is_written(words, monkeypatch):
    seen, update = [], Progress.update

    def watched(self, task, **keys):
        seen.append(keys.get("description"))
        update(self, task, **keys)

    monkeypatch.setattr(Progress, "update", watched)
    main(words(rows_per_chunk=4, rows_per_batch=2, max_rows=4))
    said = [text for text in seen if text]
    assert said[:2] == [f"rows answered ({done} of 4 answers of this chunk)" for done in (2, 4)]


@pytest.mark.own
@pytest.mark.parametrize("left", [["chunk-000003.jsonl"], ["chunk-000003.jsonl", "settings.json"]])
def test_killed_while_tidying_up_is_finished(words, tmp_path, left, capsys):
    main(words())
    whole = (tmp_path / "own.jsonl").read_bytes()
    (tmp_path / "own.joining").mkdir()
    (tmp_path / "own.joining" / left[0]).write_text("")
    if "settings.json" in left:
        (tmp_path / "own.joining/settings.json").write_text((tmp_path / "own.settings.json").read_text())
    (tmp_path / "own.jsonl.123.part").write_text("half a ro")
    (tmp_path / "own.skipped.jsonl.123.part").write_text("")
    main(words())
    assert "own.jsonl is finished" in capsys.readouterr().out
    assert (tmp_path / "own.jsonl").read_bytes() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own.jsonl", "own.settings.json"]


@pytest.mark.own
def test_killed_while_putting_together_is_finished_by_the_same_command(words, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    main(words())  # its half, 2 of 4 chunks
    assert len(list((tmp_path / "own.parts").glob("chunk-*"))) == 2 and not (tmp_path / "own.jsonl").exists()
    monkeypatch.setenv("WORLD_SIZE", "1")
    main(words(out=tmp_path / "whole.jsonl"))
    for chunk in (1, 3):
        rows = [row for row in written(tmp_path / "whole.jsonl") if row["source_row"] // 3 == chunk]
        save_rows(tmp_path / "own.parts" / f"chunk-{chunk:06d}.jsonl", rows)
    (tmp_path / "own.parts").rename(tmp_path / "own.joining")
    (tmp_path / "own.jsonl.123.part").write_text("half a ro")
    (tmp_path / "own.jsonl").write_bytes((tmp_path / "whole.jsonl").read_bytes())  # in place, its settings not yet
    main(words())
    assert (tmp_path / "own.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    names = ["own.jsonl", "own.settings.json", "whole.jsonl", "whole.settings.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.mark.own
def test_answers_of_other_settings_are_not_mixed(words, files, prompts, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    main(words())
    half = sorted(path.name for path in (tmp_path / "own.parts").iterdir())
    for change, message in (
        (dict(temperature=0.5), "temperature was 0.0 and is 0.5"),
        (dict(seed=1), "seed was 0 and is 1"),
        (dict(max_new_tokens=7), "max_new_tokens was 6 and is 7"),
        (dict(dataset_name=files / "chat.jsonl"), "rows_hash was"),
        (dict(chat_template_kwargs='{"a": 1}'), "chat_template_kwargs was None and is {'a': 1}"),
    ):
        with pytest.raises(SystemExit, match=f"error: .*own.parts.*{message}.*give another --out"):
            main(words(**change))
    assert sorted(path.name for path in (tmp_path / "own.parts").iterdir()) == half
    monkeypatch.setenv("WORLD_SIZE", "1")
    main(words())
    done = (tmp_path / "own.jsonl").read_bytes()
    with pytest.raises(SystemExit, match="own.settings.json belongs to answers of other settings"):
        main(words(seed=1))
    main(words())
    assert "is finished" in capsys.readouterr().out and (tmp_path / "own.jsonl").read_bytes() == done


@pytest.mark.own
def test_answers_of_another_layer_are_not_mixed(words, pair, tmp_path, monkeypatch):
    """Same name, same head: only the weights tell."""
    target, tokenizer = copy.deepcopy(pair[0]), pair[1]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for _ in range(2):
        target.save_pretrained(tmp_path / "target")
        tokenizer.save_pretrained(tmp_path / "target")
        with torch.no_grad():
            target.base_model.layers[3].mlp.down_proj.weight.neg_()
        if not (tmp_path / "own.parts").exists():
            main(words(target=tmp_path / "target"))
    with pytest.raises(SystemExit, match="target_fingerprint was '.*' and is '"):
        main(words(target=tmp_path / "target"))


@pytest.mark.own
def test_a_file_that_is_there_already_is_not_overwritten(words, tmp_path):
    (tmp_path / "own.jsonl").write_text("mine\n")
    with pytest.raises(SystemExit, match="own.jsonl is there already and was not written by this command"):
        main(words())
    assert (tmp_path / "own.jsonl").read_text() == "mine\n"


@pytest.mark.own
def test_rows_without_an_answer_are_listed_apart_and_none_is_lost(words, files, tmp_path, capsys):
    ask = {"role": "user", "content": "Question?"}
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    rows = [
        [ask],
        [],
        [{"role": "system", "content": "Be brief."}],
        [ask | {"content": "long " * 300}],
        [ask, call, {"role": "tool", "content": "4"}, {"role": "assistant", "content": "Four."}, ask],
    ]
    path = files / "odd.jsonl"
    path.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in rows))
    main(words(dataset_name=path))
    answered = {row["source_row"]: row for row in written(tmp_path / "own.jsonl")}
    skipped = {row["source_row"]: row["skipped"] for row in written(tmp_path / "own.skipped.jsonl")}
    assert set(answered) == {0, 4} and [turn["role"] for turn in answered[4]["messages"]] == ["user", "assistant"]
    assert skipped == {
        1: "it has no turns",
        2: "it asks nothing",
        3: "its prompt leaves no room for max_new_tokens in the target's 256 positions",
    }
    assert "3 without an answer, see *.skipped.jsonl" in capsys.readouterr().out


def test_a_question_with_a_token_that_the_target_does_not_have_is_skipped_and_the_others_are_padded_with_one_it_has(
    pair,
):
    target, tokenizer = pair
    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"pad_token": "[PAD]"})  # a row for it was never added to the target
    sampling = Sampling(NEW, temperature=0, top_p=1, top_k=0)
    keys = dict(chat_template_kwargs=None, prompt_tokens=9, continuous_batching=False)
    texts = ["the fox", "the [PAD] fox", "the quick brown fox jumps"]
    rows = [Conversation(i, {"text": text}) for i, text in enumerate(texts)]
    first, odd, last = TargetWriter(target, own, sampling, **keys)(rows, seed=0)
    assert odd.skipped == f"a token of its prompt is none of the target's {len(tokenizer)}"
    usual = TargetWriter(target, tokenizer, sampling, **keys)([rows[0], rows[2]], seed=0)
    assert [first.ids, last.ids] == [answer.ids for answer in usual]


def test_plain_text_is_continued_after_its_first_tokens(words, files, pair, tmp_path):
    target, tokenizer = pair
    main(words(dataset_name=files / "text.jsonl", prompt_tokens=5, max_rows=4))
    texts = [row["text"] for row in load_rows(str(files / "text.jsonl"))]
    for row, text in zip(written(tmp_path / "own.jsonl"), texts):
        prompt = tokenizer(text, return_tensors="pt")["input_ids"][:, :5]
        out = target.generate(prompt, max_new_tokens=NEW, do_sample=False)[0].tolist()
        assert (row["input_ids"], row["supervised"]) == (out, [0] * 5 + [1] * NEW)


@pytest.mark.own
def test_answers_are_prompts_for_another_target(words, tmp_path):
    """Where `messages` stand beside tokens, the tokens are not in the way; rows of tokens alone are named."""
    main(words())
    main(words(dataset_name=tmp_path / "own.jsonl", out=tmp_path / "again.jsonl"))
    first, again = (conversations(tmp_path / f"{name}.jsonl") for name in ("own", "again"))
    assert first == again and len(first) == 10
    alone = [row for row in written(tmp_path / "own.jsonl") if "messages" not in row]
    skipped = written(tmp_path / "again.skipped.jsonl") if alone else []
    assert [row["skipped"] for row in skipped] == ["it has tokens and no text"] * len(alone)


@pytest.mark.own
def test_mistyped_rows_are_named_and_the_others_answered(words, files, tmp_path):
    rows = [[FOX], json.dumps([FOX]), "no JSON", [turn("user", ["a"])], [turn("critic", "a")], 5]
    main(words(dataset_name=save_rows(files / "mistyped.jsonl", [{"messages": turns} for turns in rows])))
    answered = written(tmp_path / "own.jsonl")
    assert [row["source_row"] for row in answered] == [0, 1] and answered[0]["messages"] == answered[1]["messages"]
    assert {row["source_row"]: row["skipped"] for row in written(tmp_path / "own.skipped.jsonl")} == {
        2: "its messages are not JSON", 3: "a turn holds more than text", 4: "a turn has the role 'critic'",
        5: "its messages are not a list of turns",
    }  # fmt: skip
    data = save_rows(files / "numbers.jsonl", [{"text": 5}])
    with pytest.raises(SystemExit, match=r"not one of 1 rows was answered \(first: its text is not text\)"):
        main(words(dataset_name=data, out=tmp_path / "numbers.jsonl"))


def test_a_drafter_trains_on_the_answers(words, command, tmp_path, capsys):
    main(words(max_new_tokens=24))
    train.main(command(dataset_name=tmp_path / "own.jsonl"))
    printed = capsys.readouterr().out
    lines = len(written(tmp_path / "own.jsonl")) - 1  # one is held out
    assert f"{lines} rows of tokens -> {lines} token rows" in printed
    # all but where it wanted the mask token, which no answer may hold
    assert re.findall("the target's own first choice on ([0-9]+)%", printed) == ["99"]


@pytest.mark.own
@pytest.mark.parametrize(
    "overrides, message",
    [
        (dict(out="answers.json"), "out is 'answers.json'; it must end in .jsonl"),
        (dict(temperature=-1), "temperature is -1"),
        (dict(temperature=0, top_k=5), "would ignore top_p and top_k"),
        (dict(rows_per_chunk=0), "rows_per_chunk is 0"),
        (dict(dataset_name="nowhere.jsonl"), "'nowhere.jsonl' looks like a local file"),
        (dict(target="nowhere"), "--target: 'nowhere' cannot be loaded"),
        (dict(chat_template_kwargs="[1]"), "chat_template_kwargs is '[1]', which is no JSON object"),
        (dict(max_rows=-3), "max_rows is -3"),
        (dict(max_new_tokens=256), "max_new_tokens is 256, and the target has 256 positions, the prompt's among them"),
        (dict(temprature=1), "--temprature"),
        (dict(endpoint="not a url"), "endpoint is 'not a url', which is no address; it must be one like http://"),
        (dict(endpoint="localhost:8000/v1"), "endpoint is 'localhost:8000/v1', which is no address"),
        (dict(endpoint="http://"), "endpoint is 'http://', which is no address"),
        (dict(endpoint="http://localhost:8O00/v1"), "endpoint is 'http://localhost:8O00/v1', which is no address"),
        (dict(endpoint="http://localhost:99999/v1"), "endpoint is 'http://localhost:99999/v1', which is no address"),
        (dict(endpoint="http://local host/v1"), "endpoint is 'http://local host/v1', which is no address"),
    ],
)
def test_errors_are_one_line(words, monkeypatch, overrides, message):
    monkeypatch.setattr("hf_specauf.data.server.PATIENCE", 0)
    with pytest.raises(SystemExit) as stop:
        main(words(**overrides))
    assert stop.value.code.startswith("error: ") and "\n" not in stop.value.code and message in stop.value.code


# ---- a server of the target


@contextmanager
def server(pair, failures: list[int], reasons: str | list[str] = "length", refuses: tuple[str, ...] = (), **more):
    """An OpenAI-compatible chat server over loopback: greedy answers of the real target; yields its URL and the
    requests it got. `failures` are statuses it answers with first, `reasons` why its answers end (one, or one each),
    `refuses` the keys that it does not know, `more` belongs to its messages."""
    target, tokenizer = pair
    seen, lock = [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                seen.append((self.path, self.headers["Authorization"], body))
                status = failures.pop(0) if failures else 200
                status = 400 if body.keys() & {*refuses} else status
                if status == 200:
                    prompt = tokenizer.apply_chat_template(
                        body["messages"], add_generation_prompt=True, return_dict=True, return_tensors="pt"
                    )
                    ends = body.get("stop_token_ids")
                    out = target.generate(
                        **prompt, max_new_tokens=body["max_tokens"], do_sample=False, eos_token_id=ends
                    )
                    text = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
                    message = {"role": "assistant", "content": text} | more
                    reason = reasons if isinstance(reasons, str) else reasons.pop(0)
                    reply = {"choices": [{"index": 0, "finish_reason": reason, "message": message}]}
                    reply |= {
                        "id": "1",
                        "created": 0,
                        "model": body["model"],
                        "object": "chat.completion",
                        "usage": {},
                    }
                elif status == 0:
                    status, reply = 200, {"detail": "hello"}
                else:
                    reply = {"error": {"message": "not now"}}
            data = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{served.server_port}/v1", seen
    finally:
        served.shutdown()
        served.server_close()


@pytest.mark.own
def test_a_servers_answers_are_those_of_the_target_itself(words, pair, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_PLANTED")
    monkeypatch.setattr("hf_specauf.data.server.PATIENCE", 0.01)
    main(words())
    with server(pair, failures=[503, 500]) as (url, seen):
        main(words(endpoint=url, target="tiny", out=tmp_path / "served.jsonl", chat_template_kwargs='{"a": 1}'))
    del seen[:3]  # two retries, and a trial
    own, served = conversations(tmp_path / "own.jsonl"), written(tmp_path / "served.jsonl")
    assert [row["messages"] for row in served] == own
    assert [set(row) for row in served] == [{"source_row", "truncated", "messages"}] * 10
    assert len(seen) == 10 + 3  # three second questions
    for path, authorization, body in seen:
        assert (path, authorization) == ("/v1/chat/completions", None)
        wanted = dict(model="tiny", max_tokens=NEW, temperature=0, top_p=1, chat_template_kwargs={"a": 1})
        assert wanted.items() <= body.items()


def last_words(path, tokenizer) -> list[str]:
    """The end of each answer that is learned of a file's first row, after the row as training reads it."""
    rows = load_rows(str(path))
    encoder = RowEncoder(tokenizer, rows.column_names, 1000, None)
    found = encoder({column: [value] for column, value in rows[0].items()}, [0])
    [ids], [mask] = found["input_ids"], found["supervised"]
    shown = show_row({"input_ids": ids, "supervised": mask}, tokenizer, most=1000)
    return [span.split("⟧")[0][-7:] for span in shown.split("⟦")[1:]]


@pytest.mark.own
@pytest.mark.parametrize("reason", ["length", "content_filter", "abort"])
def test_an_answer_that_a_server_cut_teaches_no_end(words, pair, tmp_path, reason):
    data = save_rows(tmp_path / "data.jsonl", [{"messages": [FOX, turn("assistant", "?"), SHEEP]}])
    keys = dict(target="tiny", dataset_name=data, concurrency=1)
    for reasons, ends in (
        (["stop"] * 2, [True, True]),
        ([reason, "stop"], [False, True]),
        ([reason] * 2, [False] * 2),
    ):
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        with server(pair, [], reasons=["stop", *reasons]) as (url, _):  # the first of the trial
            main(words(endpoint=url, out=out, **keys))
        assert [end == "<|end|>" for end in last_words(out, pair[1])] == ends
        counts = json.loads(out.with_suffix(".settings.json").read_text())["counts"]
        assert counts.get("truncated", 0) == (False in ends)


def served_by(target: Path):
    return AutoModelForCausalLM.from_pretrained(target), AutoTokenizer.from_pretrained(target)


def test_a_server_is_told_where_the_chat_ends_though_the_targets_own_end_is_another(
    talkative, words, tmp_path, capsys
):
    data = save_rows(tmp_path / "data.jsonl", [{"messages": [FOX]}])
    keys = dict(target=talkative, dataset_name=data, max_new_tokens=60)
    with server(served_by(talkative), [], reasons="stop") as (url, _):
        main(words(endpoint=url, **keys))
    [row] = written(tmp_path / "own.jsonl")
    assert row["messages"] == [FOX, turn("assistant", "It jumps.")]
    said = "ends an answer with '<|end|>', and the target's generation_config.eos_token_id names '<|eos|>'"
    assert capsys.readouterr().out.count(said) == 1
    told = dict(stop_token_ids=[6], stop=["<|end|>"])
    assert json.loads((tmp_path / "own.settings.json").read_text())["stops_at"] == told


@pytest.mark.own
@pytest.mark.parametrize("refuses", [["stop_token_ids"], ["stop_token_ids", "stop"]], ids=["one", "both"])
def test_a_server_that_cannot_be_told_where_the_chat_ends_is_said(talkative, words, tmp_path, refuses, capsys):
    data = save_rows(tmp_path / "data.jsonl", [{"messages": [FOX]}])
    with server(served_by(talkative), [], refuses=tuple(refuses)) as (url, seen):
        main(words(endpoint=url, target=talkative, dataset_name=data))
    assert ("refuses stop_token_ids and stop: answers go on past" in capsys.readouterr().out) == (len(refuses) == 2)
    assert seen[-1][2].keys().isdisjoint(refuses) and NEUTRAL.items() <= seen[-1][2].items()


@pytest.mark.own
def test_a_servers_name_for_a_target_tells_no_end_and_that_is_said(words, pair, capsys):
    with server(pair, []) as (url, seen):
        main(words(endpoint=url, target="tiny", max_rows=1))
    assert "'tiny' is no folder or Hub id that can be read here" in capsys.readouterr().out
    assert all(body.keys().isdisjoint(["stop_token_ids", "stop"]) for _, _, body in seen)


@pytest.mark.own
def test_an_address_that_names_the_questions_and_a_key_with_a_line_feed_are_understood(words, pair, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret\n")
    with server(pair, []) as (url, seen):
        main(words(endpoint=f"{url}/chat/completions", target="tiny", max_rows=1))
    assert {asked[:2] for asked in seen} == {("/v1/chat/completions", "Bearer secret")}


NEUTRAL = dict(top_k=-1, min_p=0, repetition_penalty=1, presence_penalty=0, frequency_penalty=0)


@pytest.mark.own
@pytest.mark.parametrize("temperature", [0, 0.7])
def test_a_servers_own_sampling_defaults_decide_nothing(words, pair, tmp_path, temperature):
    keys = dict(target="tiny", max_rows=3, temperature=temperature)
    with server(pair, []) as (url, seen):
        main(words(endpoint=url, **keys))
        assert all(NEUTRAL.items() <= body.items() for _, _, body in seen)
        if temperature:
            seen.clear()
            main(words(endpoint=url, top_k=7, out=tmp_path / "seven.jsonl", **keys))
            assert all((NEUTRAL | {"top_k": 7}).items() <= body.items() for _, _, body in seen)
    assert json.loads((tmp_path / "own.settings.json").read_text())["neutral_sampling"] == [*NEUTRAL]


@pytest.mark.own
def test_keys_that_a_server_refuses_are_said_once_and_noted(words, pair, tmp_path, capsys):
    refuses = ("top_k", "min_p", "repetition_penalty")
    with server(pair, [], refuses=refuses) as (url, seen):
        main(words(endpoint=url, target="tiny"))
        asked = [body for _, _, body in seen if body["max_tokens"] == NEW]
    printed = capsys.readouterr().out
    assert printed.count("refuses top_k, min_p, repetition_penalty: its own defaults decide these") == 1
    assert "10 rows answered" in printed and len(asked) == 13
    assert all(body.keys().isdisjoint(refuses) and body["presence_penalty"] == 0 for body in asked)
    settings = json.loads((tmp_path / "own.settings.json").read_text())
    assert settings["neutral_sampling"] == ["presence_penalty", "frequency_penalty"]


@pytest.mark.own
def test_answers_of_servers_that_sample_otherwise_are_not_mixed(words, pair, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hf_specauf.data.server.PATIENCE", 0.01)
    keys = dict(target="tiny", concurrency=1, rows_per_chunk=3)
    with server(pair, [200] * 6 + [401]) as (url, _):
        with pytest.raises(SystemExit, match="refuses every question"):
            main(words(endpoint=url, **keys))
    # another server at the same address would be noticed, here the address is another too
    settings = tmp_path / "own.parts/settings.json"
    with server(pair, [], refuses=("min_p",)) as (url, _):
        noted = json.loads(settings.read_text()) | {"endpoint": url}
        settings.write_text(json.dumps(noted))
        with pytest.raises(SystemExit, match="neutral_sampling was .*'min_p'.* and is .*give another --out"):
            main(words(endpoint=url, **keys))
        # 0.1.0 noted nothing and sent nothing: its answers go on as they were begun
        del noted["neutral_sampling"]
        settings.write_text(json.dumps(noted))
        capsys.readouterr()
        main(words(endpoint=url, **keys))
    assert "left to the endpoint's own defaults, and go on so" in capsys.readouterr().out
    assert len({row["source_row"] for row in written(tmp_path / "own.jsonl")}) == 10


@pytest.mark.own
def test_a_refused_question_is_skipped_and_a_dead_server_stops_with_all_kept(words, pair, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_specauf.data.server.PATIENCE", 0.01)
    keys = dict(target="tiny", max_rows=6, concurrency=1)
    with server(pair, failures=[200, 400]) as (url, _):
        main(words(endpoint=url, **keys))
    assert [row["source_row"] for row in written(tmp_path / "own.skipped.jsonl")] == [0]
    keys |= dict(out=tmp_path / "dead.jsonl", endpoint=url)
    with pytest.raises(SystemExit, match="error: the endpoint http://127.0.0.1.*failed 5 times.*is kept"):
        main(words(**keys))
    assert (tmp_path / "dead.parts" / "settings.json").is_file()


@pytest.mark.own
@pytest.mark.parametrize(
    "failure, message",
    [
        (401, "refuses every question .401: .*check its address, the model's name .--target. and OPENAI_API_KEY"),
        (404, "refuses every question .404: "),
        (0, "answered without choices.*hello.*it must speak OpenAI's chat completions"),
    ],
)
def test_a_server_that_cannot_help_is_asked_once(words, pair, tmp_path, monkeypatch, failure, message):
    monkeypatch.setattr("hf_specauf.data.server.PATIENCE", 100)
    with server(pair, failures=[failure] * 9) as (url, seen):
        with pytest.raises(SystemExit, match=f"error: the endpoint http://127.0.0.1.*{message}.*is kept"):
            main(words(endpoint=url, target="tiny", max_rows=1, concurrency=1))
    assert len(seen) == 1


@pytest.mark.own
def test_no_pause_follows_the_last_try(words, pair, monkeypatch):
    pauses = []
    monkeypatch.setattr("hf_specauf.data.server.time.sleep", pauses.append)
    with server(pair, failures=[503] * 9) as (url, _):
        with pytest.raises(SystemExit, match="failed 5 times"):
            main(words(endpoint=url, target="tiny", max_rows=1))
    assert [pause for pause in pauses if pause >= 2] == [2, 4, 8, 16]


@pytest.mark.own
def test_a_server_that_refuses_everything_is_no_success(words, pair, tmp_path):
    keys = dict(target="tiny", max_rows=4, concurrency=1)
    with server(pair, failures=[400] * 6) as (url, seen):
        for _ in range(2):
            with pytest.raises(
                SystemExit, match="not one of 4 rows was answered .first: the endpoint refused it .400:"
            ):
                main(words(endpoint=url, **keys))
            assert sorted(path.name for path in tmp_path.iterdir()) == ["own.parts"]
        assert len(seen) == 6  # four questions, and a trial with neutral keys and without


@pytest.mark.own
@pytest.mark.parametrize("rows", [[{"text": "the fox"}], [{"messages": [FOX]}, {"text": "the fox"}]])
def test_a_server_is_not_asked_to_continue_plain_text(words, pair, tmp_path, rows):
    data, last = save_rows(tmp_path / "data.jsonl", rows), len(rows) - 1
    with server(pair, []) as (url, seen):
        with pytest.raises(SystemExit, match=f"error: row {last} is plain text, .*: leave out --endpoint, or such"):
            main(words(endpoint=url, target="tiny", dataset_name=data))
    assert not seen and [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


@pytest.mark.own
@pytest.mark.parametrize("row", [{"question": "why?"}, {"input_ids": [5, 6], "supervised": [0, 1]}])
def test_rows_that_ask_nothing_are_told_before_the_target_is_loaded(words, tmp_path, row):
    data = save_rows(tmp_path / "data.jsonl", [row])
    with pytest.raises(SystemExit, match="error: the dataset's columns are .*Rename the column that holds"):
        main(words(target="no/target", dataset_name=data))


@pytest.mark.own
@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_a_servers_thoughts_are_found_by_every_template(words, pair, tmp_path, name):
    with server(pair, [], **{name: "Foxes."}) as (url, _):
        main(words(endpoint=url, target="tiny", max_rows=1))
    [row] = written(tmp_path / "own.jsonl")
    assert row["messages"][-1] | {"content": "", "truncated": True} == turn(
        "assistant", "", reasoning_content="Foxes.", thinking="Foxes.", truncated=True
    )
    for template, shown in (("gptoss.jinja", "analysis<|message|>Foxes.<|end|>"), ("qwen3.jinja", "<think>\nFoxes.")):
        tokenizer = model_tokenizer(template, THINKING[template][0])
        assert shown in tokenizer.apply_chat_template(row["messages"], tokenize=False)


@pytest.mark.skipif(not is_serve_available(), reason="pip install 'transformers[serving]'")
def test_transformers_serve_answers_as_the_target_itself(words, tokenizer, tmp_path):
    # of Qwen3 targets `serve` parses ChatML whatever their template is, so the target is a Llama
    folder, ids = tmp_path / "llama", dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    make_target("llama", dtype=torch.float32, vocab_size=len(tokenizer), **ids).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    port = 20_000 + os.getpid() % 20_000
    log = open(tmp_path / "serve.log", "w")
    process = subprocess.Popen(
        [Path(sys.executable).with_name("transformers"), "serve", folder, "--device", "cpu"]
        + ["--port", str(port)], stdout=log, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 240
        while True:
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "serve.log").read_text()
            try:
                main(words(
                    endpoint=f"http://localhost:{port}/v1", target=folder, out=tmp_path / "served.jsonl",
                    temperature=0,
                ))  # fmt: skip
                break
            except SystemExit:
                time.sleep(1)
    finally:
        process.terminate()
        process.wait()
        log.close()
    main(words(target=folder))
    assert conversations(tmp_path / "served.jsonl") == conversations(tmp_path / "own.jsonl")


def test_a_host_that_nobody_knows_is_asked_once(monkeypatch):
    writer = ServerWriter(
        "http://no-such-host.invalid/v1", "m", Sampling(8, 0.7), chat_template_kwargs=None, concurrency=1
    )
    asked = []

    def post(url, json):
        asked.append(url)
        raise httpx2.ConnectError("[Errno -2] Name or service not known")

    monkeypatch.setattr(writer.client, "post", post)
    with pytest.raises(OSError, match="is at a host that nobody knows .*: check its address"):
        writer.learn()
    assert len(asked) == 1
