"""The quickstart at toy size, end to end: the real one is `make quickstart`."""

import json
import shutil
from functools import partial

import pytest

from hf_specauf import quickstart
from hf_specauf.demo import target as demo_target
from hf_specauf.demo.rows import heldout_prompts, heldout_rows, training_rows
from hf_specauf.demo.target import TargetSettings, quickstart_target, standard_library

TOY = TargetSettings(hidden_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=16, intermediate_size=64,
                     vocab_size=512, row_tokens=64, rows_per_step=2, steps=3)  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_SPECAUF_CACHE", str(tmp_path_factory.mktemp("cache")))
    # a small standard library: tokenizing all of it is half of the quickstart's set-up
    train, heldout = standard_library()
    patch.setattr(demo_target, "standard_library", lambda: (train[:24], heldout[:4]))
    # and a few rows: a drafter of two steps sees eight
    patch.setattr(quickstart, "training_rows", partial(training_rows, count=8))
    patch.setattr(quickstart, "heldout_rows", partial(heldout_rows, count=4))
    yield quickstart_target(TOY)
    patch.undo()


def test_standard_library_split_keeps_files_apart_and_leaves_tests_out():
    train, heldout = standard_library()
    assert len(train) > 200 and len(heldout) > 10
    assert not set(train) & set(heldout)
    assert standard_library() == (train, heldout)


def test_target_is_cached_and_found_again(cache):
    before = (cache / "model.safetensors").stat().st_mtime_ns
    assert quickstart_target(TOY) == cache
    assert (cache / "model.safetensors").stat().st_mtime_ns == before
    assert not list(cache.parent.glob("*.training")) and not list(cache.parent.glob("*.saving"))


def test_prompts_come_from_heldout_files_at_even_distances(cache):
    prompts = heldout_prompts(cache, 6, 32)
    assert [tuple(p.shape) for p in prompts] == [(1, 32)] * 6
    assert len({tuple(p[0].tolist()) for p in prompts}) == 6
    with pytest.raises(ValueError, match="were asked for"):
        heldout_prompts(cache, 10**6, 32)


def test_quickstart_writes_its_report_and_goes_on_after_a_loss(cache, tmp_path, capsys):
    arguments = ["--out", str(tmp_path / "qs"), "--steps", "2", "--prompts", "2", "--new_tokens", "12"]
    quickstart.main(arguments, TOY)
    report = json.loads((tmp_path / "qs" / "report.json").read_text())
    assert [row["objective"] for row in report["drafters"]] == ["decay", "auf"]
    for row in report["drafters"]:
        assert row["lossless"] and row["prompts"] == 2 and row["tau"] >= 1 and len(row["alpha"]) == 15
        # Sampled, because a small target's greedy text repeats itself. The greedy outputs are compared beside it.
        assert row["temperature"] > 0 and 0 <= row["repetition"] <= 1
        assert sum(row["greedy_outputs"].values()) == 2
        stored = json.loads((tmp_path / "qs" / row["objective"] / "eval.json").read_text())
        assert stored["acceptance"]["tau"] == row["tau"]
    shown = " ".join(capsys.readouterr().out.split())
    assert "2 of 2" in shown and "repeated: of the 4-grams" in shown
    same = {key: value for key, value in report["recipes"]["auf"].items() if value != report["recipes"]["decay"][key]}
    assert set(same) <= {"objective", "gamma", "output_dir", "resume_from_checkpoint"}
    assert (tmp_path / "qs" / "alpha.png").stat().st_size > 5000 and (
        tmp_path / "qs" / "tau.png"
    ).stat().st_size > 5000

    shutil.rmtree(tmp_path / "qs" / "auf")
    capsys.readouterr()
    quickstart.main(arguments, TOY)
    assert "decay: already trained" in capsys.readouterr().out
    again = json.loads((tmp_path / "qs" / "report.json").read_text())
    assert again["drafters"][1]["tau"] == report["drafters"][1]["tau"]  # deterministic for a seed

    with pytest.raises(SystemExit, match="another recipe"):
        quickstart.main([*arguments, "--seed", "1"], TOY)
