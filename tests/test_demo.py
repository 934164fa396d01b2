"""`specauf demo`: two answers side by side, what is said of them, and the recording."""

import copy
import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_drafter, overfit
from PIL import Image
from rich.console import Console
from rich.text import Text

from hf_specauf.demo.recording import Recording
from hf_specauf.demo.show import PROMPTS, Pair, main, summary
from hf_specauf.demo.smollm2 import HUB_ID, shipped_drafter
from hf_specauf.demo.stream import Answer, AnswerStreamer
from hf_specauf.drafters.draft_length import Round
from hf_specauf.layouts.load import load_drafter
from hf_specauf.publishing.validate import validate

NEW = 10


@pytest.fixture(scope="module")
def folders(tmp_path_factory, text_target, tokenizer):
    """The flags that name a target and a drafter that was trained on the target's answers to the demo's prompts."""
    folder = tmp_path_factory.mktemp("demo")
    text_target.save_pretrained(folder / "target")
    tokenizer.save_pretrained(folder / "target")
    config = dict(add_generation_prompt=True, return_tensors="pt", return_dict=True)
    messages = [{"role": "user", "content": PROMPTS[0]}]
    prompt = tokenizer.apply_chat_template(messages, **config)["input_ids"]
    text = text_target.generate(prompt, do_sample=False, max_new_tokens=NEW, eos_token_id=None)
    drafter = overfit(make_drafter(text_target), text_target, text, prompt.shape[1], steps=60)
    drafter.save_pretrained(folder / "drafter")
    return ["--target", str(folder / "target"), "--drafter", str(folder / "drafter"), "--dtype", "float32"]


def test_demo_shows_both_answers_and_says_what_they_are_in_words_and_in_a_gif(folders, tmp_path, capsys):
    main([*folders, "--new_tokens", str(NEW), "--record", str(tmp_path / "demo.gif")])
    shown = capsys.readouterr().out
    for prompt in PROMPTS:
        assert f"> {prompt[:30]}" in shown
    assert shown.count("identical") == len(PROMPTS)
    assert "DIFFERENT" not in shown and "near-tie" not in shown
    assert ("faster: " in shown) != ("SLOWER than plain decoding: " in shown)
    passes = [int(count) for count in re.findall(r"tokens/s, (\d+) passes", shown)]
    # Whether drafts pay is the clock's to say, so that there may be none. All of them count, looked-up ones too. The
    # first token comes from the prompt's pass.
    for count in passes[1::2]:
        assert f" {(NEW - 1) / (count - 1):.2f} " in shown
    with Image.open(tmp_path / "demo.gif") as image:
        assert image.n_frames > len(PROMPTS)


def test_chat_answers_what_is_typed_until_an_empty_line(folders, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n\nthree\n"))
    main([*folders, "--new_tokens", "4", "--chat"])
    assert capsys.readouterr().out.count("passes") == 2


def test_prompts_and_chats_that_leave_no_room_for_an_answer_are_told(folders, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="error: the prompt has .* tokens, and --new_tokens 250 leaves 6 of the"):
        main([*folders, "--new_tokens", "250"])
    with pytest.raises(SystemExit, match="error: --new_tokens is 256, and the target has 256 positions"):
        main([*folders, "--new_tokens", "256"])
    asked = ["one " * 40, "two " * 40, "three " * 90, "four"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([*asked, ""])))
    main([*folders, "--new_tokens", "8", "--chat"])
    shown = " ".join(capsys.readouterr().out.split())
    # The second question has no room behind the first one, the third has none at all.
    assert shown.count("what was said before is forgotten") == 2
    assert shown.count("No answer: the prompt has") == 1 and "Ask something shorter" in shown
    assert shown.count("passes") == 3


def test_accepted_tokens_are_marked_and_a_character_of_several_tokens_is_written_once(tokenizer):
    answer = Answer("drafted")
    streamer = AnswerStreamer(tokenizer, answer)
    euro = tokenizer("€", add_special_tokens=False)["input_ids"]
    letter = tokenizer("x", add_special_tokens=False)["input_ids"]
    assert len(euro) == 3
    streamer.put(torch.tensor([[5, 6, 7]]))
    streamer.put(torch.tensor(euro + letter))
    streamer.put(torch.tensor(letter))
    assert answer.pieces == [("€", True), ("x", False), ("x", False)]
    assert (answer.tokens, answer.passes) == (5, 2)


def row(plain: float, assisted: float, difference: dict | None) -> dict:
    return {
        "prompt_tokens": 7, "new_tokens": 10, "plain_new_tokens": 10, "tokens_per_pass": 1.5, "plain_seconds": plain,
        "assisted_seconds": assisted, "difference": difference, "repetition": 0.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("one", "words"),
    [
        (row(2.0, 1.0, None), ["faster: 2.00x", "identical"]),
        (row(1.0, 2.0, None), ["SLOWER than plain decoding: 0.50x", "identical"]),
        (row(2.0, 1.0, {"position": 9, "near_tie": True}), ["near-tie from token 3 on", "no identical answer"]),
        (row(2.0, 1.0, {"position": 9, "near_tie": False}), ["DIFFERENT from token 3 on", "are a fault"]),
    ],
)
def test_summary_never_calls_slower_faster_nor_another_answer_identical(one, words):
    console = Console(width=140, file=io.StringIO())
    console.print(summary([one], [Round(2, 1, 3, 3), Round(4, 3, 5, 5, True), Round(1, 0, 0, 0)], torch.bfloat16))
    shown = " ".join(console.file.getvalue().split())
    assert "Hardly a token was drafted and accepted" not in shown
    for word in [*words, "drafter 1 of 3 tokens in 1 passes, lookup 3 of 5 tokens in 1 passes, of 3 passes"]:
        assert word in shown
    if one["difference"] is not None:
        assert "identical" not in shown.replace("no identical answer", "").replace("answers are identical", "")
    if one["assisted_seconds"] > one["plain_seconds"]:
        assert "faster" not in shown


def test_summary_says_when_it_was_not_the_drafter_that_made_the_difference():
    console = Console(width=140, file=io.StringIO())
    console.print(summary([row(2.0, 1.0, None)], [Round(1, 0, 0, 0)] * 29 + [Round(2, 1, 3, 3)], torch.float32))
    shown = " ".join(console.file.getvalue().split())
    assert "faster: 2.00x" in shown and "Hardly a token was drafted and accepted" in shown


def test_one_green_word_among_many_white_ones_is_green_in_a_recording(tmp_path):
    recording = Recording(Console(width=80, file=io.StringIO()))
    recording.add(Text("\n".join(["white words, line after line"] * 30)).append(" green", "bold green"))
    recording.save(tmp_path / "demo.gif")
    with Image.open(tmp_path / "demo.gif") as image:
        colours = [colour for _, colour in image.convert("RGB").getcolors(256)]
    assert any(green > max(red, blue) + 40 for red, green, blue in colours)


def test_recording_keeps_the_pace_and_at_most_its_frames_a_second(tmp_path):
    recording = Recording(Console(width=20, file=io.StringIO()), frames_per_second=1)
    for word in ("one", "two", "three"):
        recording.add(word, force=word != "two")
    assert len(recording.frames) == 2
    recording.save(tmp_path / "r.gif")
    with Image.open(tmp_path / "r.gif") as image:
        assert image.n_frames == 2
        assert image.size[0] == 20 * 9 + 24


def test_what_cannot_be_loaded_is_named_by_its_flag(folders, tmp_path):
    target = folders[folders.index("--target") + 1]
    with pytest.raises(SystemExit, match="error: --drafter"):
        main(["--target", target, "--drafter", str(tmp_path)])
    with pytest.raises(SystemExit, match="error: --target: the folder .* has no config.json, so it holds no model"):
        main(["--target", str(tmp_path)])
    shutil.copytree(target, tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    with pytest.raises(SystemExit, match="error: --target: .* has no chat template, .*: give a chat model"):
        main(["--target", str(tmp_path / "base")])


def test_a_template_that_reads_parts_alone_is_given_parts(tokenizer):
    reads_parts = copy.deepcopy(tokenizer)
    reads_parts.chat_template = (
        "{% for m in messages %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endfor %}"
    )
    prompt = Pair(None, reads_parts, None, None).prompt([{"role": "user", "content": "Why is the sky blue?"}])
    assert tokenizer.decode(prompt[0]) == "Why is the sky blue?"


def test_a_chat_is_not_recorded_and_that_is_said(capsys):
    with pytest.raises(SystemExit):
        main(["--chat", "--record", "a.gif"])
    assert "--record keeps the demo's own prompts, and --chat asks yours" in capsys.readouterr().err


def test_without_a_drafter_the_demo_looks_drafts_up_alone(folders, capsys):
    target = folders[folders.index("--target") + 1]
    main(["--target", target, "--dtype", "float32", "--new_tokens", str(NEW)])
    said = " ".join(capsys.readouterr().out.split())
    assert "There is no drafter, so drafts are looked up in the text alone" in said and "identical" in said
    assert "drafter 0 of 0 tokens in 0 passes" in said
    for words in (["--target", target, "--no_lookup"], ["--no_drafter", "--no_lookup"]):
        with pytest.raises(SystemExit):
            main(words)
        assert "leaves nothing to draft with: give --drafter" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*folders, "--no_drafter"])
    assert "--drafter and --no_drafter: leave one of them out" in capsys.readouterr().err


def test_the_shipped_drafter_drafts_for_its_own_target_alone(folders, tmp_path, monkeypatch, capsys):
    # A copy made by hand, where SmolLM2 would be. The shipped drafter is not made for its size, which is told.
    shutil.copytree(folders[1], tmp_path / "smollm2-135m-instruct")
    monkeypatch.setenv("HF_SPECAUF_CACHE", str(tmp_path))
    with pytest.raises(SystemExit, match="hidden"):
        main(["--new_tokens", str(NEW)])
    assert f"drafter: {shipped_drafter()}" in capsys.readouterr().out
    main(["--no_drafter", "--dtype", "float32", "--new_tokens", str(NEW)])
    assert "There is no drafter" in capsys.readouterr().out


def test_the_shipped_drafter_loads_as_it_lies_there(tmp_path):
    folder = Path(shipped_drafter())
    drafter = load_drafter(str(folder))
    assert drafter.config.target_model_name_or_path == HUB_ID and drafter.dtype == torch.bfloat16
    assert validate(folder / "README.md") == []
    # Its code is this checkout's, all that a published folder has, so that it loads without the package too.
    drafter.save_pretrained(tmp_path)
    wanted = {code.name for code in tmp_path.glob("*.py")}
    assert wanted and wanted == {code.name for code in folder.glob("*.py")}
    for name in wanted:
        assert (folder / name).read_text() == (tmp_path / name).read_text()
    measured = json.loads((folder / "eval.json").read_text())
    assert measured["lossless"]["different"] == 0 and measured["target"]["dtype"] == "float32"
