"""The target's own answers: exact tokens, turn by turn, through kills, processes and a server, never mixed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_target
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.import_utils import is_serve_available

from hf_specauf import train
from hf_specauf.answers import generate_continuously, generate_in_batches, until_end
from hf_specauf.regenerate import main
from hf_specauf.sources import load_rows

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
    return [json.loads(line) for line in path.read_text().splitlines()]


def by_hand(target, tokenizer, questions: list[str]) -> tuple[list[dict], list[int]]:
    """A conversation answered one question at a time by plain greedy `generate`: turns, and the ids of the whole."""
    turns, ids = [], []
    for question in questions:
        turns.append({"role": "user", "content": question})
        prompt = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        out = target.generate(**prompt, max_new_tokens=NEW, do_sample=False)[0].tolist()
        answer = out[prompt["input_ids"].shape[1] :]
        turns.append({"role": "assistant", "content": tokenizer.decode(answer, skip_special_tokens=True)})
        ids = out
    return turns, ids


@pytest.fixture(scope="module")
def pair(files):
    return AutoModelForCausalLM.from_pretrained(files / "target"), AutoTokenizer.from_pretrained(files / "target")


@pytest.mark.parametrize("continuous", [True, False])
def test_answers_are_the_targets_own_tokens_turn_by_turn(words, pair, tmp_path, capsys, continuous):
    target, tokenizer = pair
    main(words(continuous_batching=continuous))
    rows = written(tmp_path / "own.jsonl")
    assert [row["source_row"] for row in rows] == list(range(10))
    for i, row in enumerate(rows):
        questions = [f"Question {i}?"] + [f"And {i + 1}?"] * (i % 3 == 2)
        turns, ids = by_hand(target, tokenizer, questions)
        assert row["messages"] == turns
        assert row["input_ids"] == ids
        assert row["supervised"][-NEW:] == [1] * NEW and sum(row["supervised"]) % NEW == 0
        assert row["truncated"] is True
    settings = json.loads((tmp_path / "own.settings.json").read_text())
    assert (
        settings["engine"] == ("continuous batching" if continuous else "plain batches")
        and settings["temperature"] == 0
    )
    assert settings["counts"] == {"answered": 10, "truncated": 10, "tokens": sum(sum(r["supervised"]) for r in rows)}
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


def test_an_answer_ends_with_its_end_token():
    assert until_end([5, 6, 7, 8], {7, 9}) == [5, 6, 7] and until_end([5, 6], {7}) == [5, 6]


def start(arguments: list[str], **environment) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "hf_specauf.regenerate", *arguments], cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_killed_twice_and_resumed_is_byte_for_byte_an_uninterrupted_run(words, files, tmp_path):
    data = files / "many.jsonl"
    data.write_text(
        "".join(json.dumps({"messages": [{"role": "user", "content": f"{i}?"}]}) + "\n" for i in range(36))
    )
    keys = dict(dataset_name=data, temperature=1, rows_per_chunk=2, continuous_batching="true")
    parts = tmp_path / "own.parts"
    for killed in (2, 7):
        process = start(words(**keys))
        deadline = time.monotonic() + 240
        while process.poll() is None and len(list(parts.glob("chunk-*.jsonl"))) < killed:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL and not (tmp_path / "own.jsonl").exists()
        assert killed <= len(list(parts.glob("chunk-*.jsonl"))) < 18
    main(words(**keys))
    main(words(**keys, out=tmp_path / "whole.jsonl"))
    assert (tmp_path / "own.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert [row["source_row"] for row in written(tmp_path / "own.jsonl")] == list(range(36))


def test_two_processes_share_the_rows_and_write_the_file_of_one(words, tmp_path):
    ranks = [start(words(), RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    printed = [process.communicate(timeout=300)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], printed
    main(words(out=tmp_path / "whole.jsonl"))
    assert (tmp_path / "own.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sum("rows answered," in text for text in printed) == 1  # the last one put it together


def test_killed_while_putting_together_is_finished_by_the_same_command(words, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    main(words())  # its half, 2 of 4 chunks
    assert len(list((tmp_path / "own.parts").glob("chunk-*"))) == 2 and not (tmp_path / "own.jsonl").exists()
    monkeypatch.setenv("WORLD_SIZE", "1")
    main(words(out=tmp_path / "whole.jsonl"))
    for chunk in (1, 3):
        rows = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)[chunk * 3 : chunk * 3 + 3]
        (tmp_path / "own.parts" / f"chunk-{chunk:06d}.jsonl").write_text("".join(rows))
    (tmp_path / "own.parts").rename(tmp_path / "own.joining")
    (tmp_path / "own.jsonl.123.part").write_text("half a ro")
    main(words())
    assert (tmp_path / "own.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not (tmp_path / "own.joining").exists()


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


def test_a_file_that_is_there_already_is_not_overwritten(words, tmp_path):
    (tmp_path / "own.jsonl").write_text("mine\n")
    with pytest.raises(SystemExit, match="own.jsonl is there already and was not written by this command"):
        main(words())
    assert (tmp_path / "own.jsonl").read_text() == "mine\n"


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


def test_plain_text_is_continued_after_its_first_tokens(words, files, pair, tmp_path):
    target, tokenizer = pair
    main(words(dataset_name=files / "text.jsonl", prompt_tokens=5, max_rows=4))
    texts = [row["text"] for row in load_rows(str(files / "text.jsonl"))]
    for row, text in zip(written(tmp_path / "own.jsonl"), texts):
        prompt = tokenizer(text, return_tensors="pt")["input_ids"][:, :5]
        out = target.generate(prompt, max_new_tokens=NEW, do_sample=False)[0].tolist()
        assert (row["input_ids"], row["supervised"]) == (out, [0] * 5 + [1] * NEW)


def test_a_drafter_trains_on_the_answers(words, command, tmp_path, capsys):
    main(words(max_new_tokens=24))
    train.main(command(dataset_name=tmp_path / "own.jsonl"))
    printed = capsys.readouterr().out
    assert "10 rows of tokens" not in printed  # one is held out
    assert "9 rows of tokens -> 9 token rows" in printed and "the target's own first choice on 100%" in printed


@pytest.mark.parametrize(
    "overrides, message",
    [
        (dict(out="answers.json"), "out is 'answers.json'; it must end in .jsonl"),
        (dict(temperature=-1), "temperature -1"),
        (dict(temperature=0, top_k=5), "would ignore top_p and top_k"),
        (dict(rows_per_chunk=0), "rows_per_chunk is 0"),
        (dict(dataset_name="nowhere.jsonl"), "'nowhere.jsonl' looks like a local file"),
        (dict(target="nowhere"), "--target: 'nowhere' cannot be loaded"),
        (dict(chat_template_kwargs="[1]"), "chat_template_kwargs is '[1]', which is no JSON object"),
        (dict(temprature=1), "--temprature"),
    ],
)
def test_errors_are_one_line(words, overrides, message):
    with pytest.raises(SystemExit) as stop:
        main(words(**overrides))
    assert stop.value.code.startswith("error: ") and "\n" not in stop.value.code and message in stop.value.code


# ---- a server of the target


@contextmanager
def server(pair, failures: list[int]):
    """An OpenAI-compatible chat server over loopback: greedy answers of the real target; yields its URL and the
    requests it got. `failures` are statuses it answers with first."""
    target, tokenizer = pair
    seen, lock = [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                seen.append((self.path, self.headers["Authorization"], body))
                status = failures.pop(0) if failures else 200
                if status == 200:
                    prompt = tokenizer.apply_chat_template(
                        body["messages"], add_generation_prompt=True, return_dict=True, return_tensors="pt"
                    )
                    out = target.generate(**prompt, max_new_tokens=body["max_tokens"], do_sample=False)
                    text = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
                    message = {"role": "assistant", "content": text}
                    reply = {"choices": [{"index": 0, "finish_reason": "length", "message": message}]}
                    reply |= {
                        "id": "1",
                        "created": 0,
                        "model": body["model"],
                        "object": "chat.completion",
                        "usage": {},
                    }
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


def test_a_servers_answers_are_those_of_the_target_itself(words, pair, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_PLANTED")
    monkeypatch.setattr("hf_specauf.answers.PATIENCE", 0.01)
    main(words())
    with server(pair, failures=[503, 500]) as (url, seen):
        main(words(endpoint=url, target="tiny", out=tmp_path / "served.jsonl", chat_template_kwargs='{"a": 1}'))
    own, served = written(tmp_path / "own.jsonl"), written(tmp_path / "served.jsonl")
    assert [row["messages"] for row in served] == [row["messages"] for row in own]
    assert [set(row) for row in served] == [{"source_row", "truncated", "messages"}] * 10
    assert len(seen) == 10 + 3 + 2  # three second questions, two retries
    for path, authorization, body in seen:
        assert (path, authorization) == ("/v1/chat/completions", None)
        wanted = dict(model="tiny", max_tokens=NEW, temperature=0, top_p=1, chat_template_kwargs={"a": 1})
        assert wanted.items() <= body.items()


def test_a_refused_question_is_skipped_and_a_dead_server_stops_with_all_kept(words, pair, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_specauf.answers.PATIENCE", 0.01)
    keys = dict(target="tiny", max_rows=6, concurrency=1)
    with server(pair, failures=[400]) as (url, _):
        main(words(endpoint=url, **keys))
    assert [row["source_row"] for row in written(tmp_path / "own.skipped.jsonl")] == [0]
    keys |= dict(out=tmp_path / "dead.jsonl", endpoint=url)
    with pytest.raises(SystemExit, match="error: the endpoint http://127.0.0.1.*failed 5 times.*is kept"):
        main(words(**keys))
    assert (tmp_path / "dead.parts" / "settings.json").is_file()


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
    own, served = written(tmp_path / "own.jsonl"), written(tmp_path / "served.jsonl")
    assert [row["messages"] for row in served] == [row["messages"] for row in own]
