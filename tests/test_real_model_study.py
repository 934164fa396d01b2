"""The study on a real model, at toy size: a tiny target, the real training, measuring and report."""

import json
import re
import sys

import pytest
from conftest import ROOT, TEXT, warm_python

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))

import real_model_data as data
import real_model_report
import real_model_study as study

TINY = [
    "num_draft_layers=1", "target_layer_ids=0 2", "mask_token_id=2", "max_length=96", "anchors_per_row=4",
    "per_device_train_batch_size=2", "per_device_eval_batch_size=2", "eval_rows=3", "save_dtype=float32",
]  # fmt: skip


@pytest.fixture(scope="module")
def sources(files, tmp_path_factory):
    """Words that give the study a tiny target, a ShareGPT that is cut off in a string, and two prompt sets."""
    folder = tmp_path_factory.mktemp("sources")
    words, rows = TEXT.split(), []
    for i in range(120):
        turns = ["human", "gpt"] if i % 10 else ["gpt", "human"]
        text = " ".join(words[i % 9 :] + words[: i % 5])
        said = {"human": f"Question {i}?", "gpt": text}
        rows.append({"id": str(i), "conversations": [{"from": one, "value": said[one]} for one in turns]})
    (folder / "sharegpt.json").write_text(json.dumps(rows)[:-30])
    (folder / "humaneval.jsonl").write_text('{"prompt": "def f(x):"}\n{"prompt": "def g(x):"}\n')
    (folder / "mt_bench.jsonl").write_text('{"turns": ["Why?", "And then?"]}\n{"turns": ["Who?", "Really?"]}\n')
    found = ["--target", files / "target", "--sharegpt", folder / "sharegpt.json"]
    found += ["--humaneval", folder / "humaneval.jsonl", "--mt_bench", folder / "mt_bench.jsonl"]
    return [str(word) for word in found]


@pytest.fixture(scope="module")
def ran(sources, tmp_path_factory):
    """A leg of each kind, trained on either data, run to its JSON."""
    folder = tmp_path_factory.mktemp("study")
    patch = pytest.MonkeyPatch()
    patch.setattr(data, "HELD_OUT_QUESTIONS", 2)
    patch.setattr(data, "HELD_OUT_ROWS", 3)
    patch.setattr(study, "python", lambda *words, log: warm_python().run(*words)[0])
    words = ["--legs", "dflash-auf", "domino-b-auf-own", "--seeds", "0", "--steps", "2", "--rows", "24"]
    words += ["--new_tokens", "8", "--decoded", "1", "--answer_tokens", "16", "--dtype", "float32", "--bf16", "false"]
    words += ["--device", "cpu", "--work", str(folder / "work"), "--results", str(folder / "results")]
    words += [*sources, "--override", *TINY]
    study.main(words)
    yield folder, words
    patch.undo()


def test_a_leg_leaves_a_record_of_everything(ran):
    folder, _ = ran
    results = folder / "results"
    assert {path.name for path in results.iterdir()} == {
        "dflash-auf-seed0.json",
        "domino-b-auf-own-seed0.json",
        "tau.png",
    }
    record = json.loads((results / "dflash-auf-seed0.json").read_text())
    assert record["settings"]["objective"] == "auf" and record["settings"]["steps"] == 2
    assert "hf_specauf.train --config" in record["command"] and str(folder) not in json.dumps(record)
    training = record["training"]
    # two steps of two rows, of which each has four anchors or more
    assert training["rows"] == 24 and training["anchors_per_step"] == 8 and training["anchors"] == 16
    assert training["tokens"] > training["supervised_tokens"] > 0 and training["seconds"] > 0
    assert [point["step"] for point in record["curve"]] == [1, 2]
    assert all(point["teacher_forced_tau"] >= 1 and 0 <= point["common_accuracy"] <= 1 for point in record["curve"])
    for title, count in (("HumanEval", 2), ("MT-Bench", 2), ("ShareGPT", 2)):
        found = record["replayed"][title]
        assert len(found["prompts"]) == count and len(found["alpha"]) == 15
        assert found["tau"] == sum(tokens for tokens, _ in found["prompts"]) / sum(n for _, n in found["prompts"])
        # the target's own greedy text is what decoding writes, so that both count the same
        decoded = record["decoded"]["T=0"][title]
        assert [decoded["tokens"], decoded["passes"]] == found["prompts"][0]
        assert decoded["lossless"] == {"identical": 1, "near_tie": 0, "different": 0}
        assert record["decoded"]["T=1"][title]["tau"] >= 1
    assert record["check"]["equal"] == record["check"]["prompts"] == 3
    assert record["environment"]["machine"] and record["target"]["fingerprint"]


def test_own_answers_are_those_of_the_same_questions(ran):
    folder, _ = ran
    record = json.loads((folder / "results" / "domino-b-auf-own-seed0.json").read_text())
    assert record["settings"]["data"] == "own" and record["training"]["rows"] == 24
    asked, own = (folder / "work" / "data" / name for name in ("questions-27.jsonl", "own-24-float32.jsonl"))
    assert len(asked.read_text().splitlines()) == len(own.read_text().splitlines()) == 27
    settings = json.loads(own.with_suffix(".settings.json").read_text())
    assert settings["temperature"] == 0.5 and settings["max_new_tokens"] == 16
    # nothing that is asked at the end is trained on
    held_out = (folder / "work" / "data" / "heldout_questions.jsonl").read_text().splitlines()
    assert len(held_out) == 2 and not {*held_out} & {*asked.read_text().splitlines()}


def test_finished_legs_are_skipped_and_those_of_other_settings_refused(ran, capsys, monkeypatch):
    folder, words = ran
    monkeypatch.setattr(study, "run", None)  # nothing may be run any more
    study.main(words)
    printed = capsys.readouterr().out
    assert "dflash-auf-seed0: finished before" in printed
    with pytest.raises(SystemExit, match="holds a leg of other settings \\(steps 2 there, 5 here\\)"):
        study.main([*words, "--steps", "5"])
    # the report alone, beside the paper's figures
    study.main(["--report", "--results", str(folder / "results")])
    printed = capsys.readouterr().out
    [row] = [line for line in printed.splitlines() if line.startswith("| dflash-auf | 1 |")]
    assert "| 3.09 | 2.18 | 2.61 | 2.48 |" in row
    assert "on 6 of 6 prompts" in printed


def test_gains_are_paired_by_prompt(ran, tmp_path):
    """Three tokens a pass against two after every prompt: whatever prompts are drawn, the gain is a half."""
    folder, _ = ran
    auf = json.loads((folder / "results" / "dflash-auf-seed0.json").read_text())
    for name, factor in (("dflash-auf", 3), ("dflash-decay", 2)):
        record = json.loads(json.dumps(auf)) | {"leg": name}
        for i, found in enumerate(record["replayed"].values()):
            found["prompts"] = [[factor * passes, passes] for passes in (5 + i, 9 + i)]
            found["tau"] = float(factor)
        (tmp_path / f"{name}-seed0.json").write_text(json.dumps(record))
    printed = real_model_report.report(tmp_path)
    assert "| dflash-auf over dflash-decay | 1 | +50.0% (+50.0% to +50.0%) | +8.7% |" in printed
    assert re.search(r"\| dflash-auf \| 1 \| 3.000 \(3.000 - 3.000\)", printed)


def test_every_leg_names_an_objective_of_its_drafter():
    for name, leg in study.LEGS.items():
        assert leg.recipe.is_file() and leg.recipe.stem.startswith(name.split("-")[0])
        assert leg.objective.replace("_", "-") in name or leg.objective == "domino_decay"
