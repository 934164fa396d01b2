"""An evaluation that can be trusted: intervals, ways to decode, kept rows, several processes, the page."""

import functools
import json
import os
import signal
import time
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import test_evaluate
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from conftest import PAD, ROOT, make_target, random_prompts, start, warm_python
from test_evaluate import NEW, PROMPT, K, arguments, strict_json, untimed

from hf_specauf.drafters.draft_length import Round
from hf_specauf.evaluate import main
from hf_specauf.evaluation.compare import compare
from hf_specauf.evaluation.differences import read_at_once
from hf_specauf.evaluation.intervals import figure, ratio, ratio_of_ratios
from hf_specauf.evaluation.kept import KeptRows, join_processes
from hf_specauf.evaluation.page import page
from hf_specauf.evaluation.plots import PICTURES, draw_acceptance, figure_with_axes
from hf_specauf.evaluation.record import evaluation_record
from hf_specauf.evaluation.rows import passes_as_text, passes_from_text, prompt_keys
from hf_specauf.evaluation.summary import tau_by_place
from hf_specauf.evaluation.table import verdict
from hf_specauf.evaluation.two_records import compare_records, comparison_words
from hf_specauf.evaluation.ways import ASSISTANT, GIVEN, WAYS, choose_ways, decoding_config, opened
from hf_specauf.serving.acceptance import summarize
from hf_specauf.target import FrozenTarget

MEASURED = ROOT / "tests/benchmarks/results/real_model_study"
pair, folders = test_evaluate.pair, test_evaluate.folders


# ---- intervals


def prompts_with(spread: float, count: int, random) -> np.ndarray:
    """Tokens and passes of prompts whose own tau differ by so much."""
    passes = random.integers(20, 60, count)
    return np.stack([passes * (3 + spread * random.standard_normal(count)), passes], axis=1)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_interval_of_another_set_holds_the_other_halfs_tau_where_that_of_tau_itself_is_too_narrow(seed):
    """On 72 prompts of three sets, as two drafters of SmolLM2 were measured on them."""
    record = json.loads((MEASURED / f"dflash-auf-k8-seed{seed}.json").read_text())
    prompts = [prompt for found in record["replayed"].values() for prompt in found["prompts"]]
    prompts, random = np.array(prompts, dtype=float), np.random.default_rng(0)
    half, held = len(prompts) // 2, {"interval": 0, "another_set": 0}
    for _ in range(100):
        order = random.permutation(len(prompts))
        found = figure(prompts[order[:half]], ratio)
        other = ratio(prompts[order[half:]].sum(0))
        for name in held:
            low, high = getattr(found, name)
            held[name] += low <= other <= high
    assert held["another_set"] >= 90
    # 83 are expected, because the other half is a draw too
    assert 65 <= held["interval"] < held["another_set"]


def test_the_interval_holds_the_true_tau_in_19_of_20_measurements():
    random = np.random.default_rng(2)
    held = 0
    for _ in range(100):
        low, high = figure(prompts_with(0.8, 30, random), ratio).interval
        held += low <= 3 <= high
    assert 88 <= held <= 99


def test_equal_prompts_leave_no_doubt_and_what_was_not_measured_has_no_interval():
    sure = figure([[6, 2]] * 5, ratio)
    assert (sure.value, sure.interval, sure.another_set) == (3, [3, 3], [3, 3])
    assert figure([[6, 2]], ratio).interval is None
    assert figure([[0, 0]] * 3, ratio).value is None and figure([], ratio).value is None
    # paired: both ways are slow on the same prompts, so their ratio is certain
    rows = [[10, seconds, 10, 2 * seconds] for seconds in (1, 5, 9)]
    assert figure(rows, ratio_of_ratios).interval == pytest.approx([2, 2])


# ---- rows


def test_passes_are_stored_in_one_line_that_gives_them_back():
    rounds = [Round(4, 3, 4, 15), Round(1, 0, 0, 0), Round(9, 8, 9, 20, looked_up=True)]
    assert passes_as_text(rounds) == "4/3/4/15 1/0/0/0 9/8/9/20L"
    assert passes_from_text(passes_as_text(rounds)) == rounds and passes_from_text("") == []


def test_tau_by_place_counts_each_pass_where_it_begins():
    def row(prompt_tokens: int, *emitted: int) -> dict:
        passes = passes_as_text([Round(count, count - 1, count, 20) for count in emitted])
        return {"prompt_tokens": prompt_tokens, "ways": {"drafter": {"passes": passes}}}

    # passes begin at tokens 1, 9, 17 and 20 of the answer, and at 1 and 3
    rows = [row(30, 8, 8, 3, 1), row(60, 2, 4)]
    assert tau_by_place(rows, from_prompt=False) == [
        {"upto": 16, "tau": 22 / 4, "passes": 4, "prompts": 2},
        {"upto": 32, "tau": 2, "passes": 2, "prompts": 1},
    ]
    # behind 31, 39, 47 and 50 tokens, and behind 61 and 63
    assert tau_by_place(rows, from_prompt=True) == [
        {"upto": 32, "tau": 8, "passes": 1, "prompts": 1},
        {"upto": 64, "tau": 18 / 5, "passes": 5, "prompts": 2},
    ]


def test_a_prompt_is_recognised_without_its_words_and_twice_where_it_occurs_twice():
    prompts = random_prompts(2)[:, None]
    keys = prompt_keys([prompts[0], prompts[1], prompts[0]])
    assert len(set(keys)) == 3 and keys[2].startswith(keys[0])
    assert prompt_keys([prompts[1]]) == [keys[1]]


# ---- ways to decode


@pytest.fixture(scope="module")
def record(pair):
    """An evaluation in every way, with an assistant and another drafter, in float64."""
    ways = choose_ways(WAYS, draft_length=K - 1, lookup=4, draft_lengths=[1], others=["other"])
    models = {ASSISTANT: make_target(seed=1, num_hidden_layers=1), "other": pair.drafter}
    results = compare(
        pair.target, pair.drafter, pair.prompts, NEW, pad_token_id=PAD, show_progress=False, ways=ways,
        models=models | {GIVEN: pair.drafter}, teacher_forced=True,
    )  # fmt: skip
    conditions = dict(prompts="made-up prompts", temperature=0.0, max_new_tokens=NEW)
    return strict_json(evaluation_record(results, pair.target, **conditions))


def test_every_way_gives_the_targets_own_output_and_is_timed_pass_by_pass(record):
    assert set(record["ways"]) == {*WAYS, "draft_1", "also:other"}
    for name, way in record["ways"].items():
        assert way["lossless"] == {"identical": 3, "near_tie": 0, "different": 0}, name
        assert way["largest_gaps"] is None and way["tokens_per_second"] > 0
        time = way["time_of_a_pass"]
        assert time["target"] > 0 and (time["drafter"] > 0) == (
            name not in ("plain", "prompt_lookup", "plain_in_a_pair")
        )
        for row in record["prompts"]:
            of_way = row["ways"][name]
            assert of_way["new_tokens"] == NEW
            # the target's hooks have seen the very passes that the loop tells of
            if WAYS.get(name, WAYS["drafter"]).ours:
                assert of_way["time"]["passes"] == len(passes_from_text(of_way["passes"]))
            else:
                assert of_way["passes"] == "" and of_way["time"]["passes"] <= NEW - 1
            spent = sum(of_way["time"][who] for who in ("prefill", "target", "drafter"))
            assert 0 < spent <= of_way["seconds"]
    plain = [row["ways"]["plain"]["time"]["passes"] for row in record["prompts"]]
    assert plain == [NEW - 1] * 3


def test_neither_the_clock_nor_what_was_read_before_changes_how_passes_run(pair, monkeypatch):
    """Passes of a model with a hook do not run in inference mode, and transformers leaves hooks where hidden states
    were asked for: evaluations ask, and would slow down what they measure next."""
    FrozenTarget(pair.target, pair.drafter.config).context(pair.prompts[0])
    assert any(module._forward_hooks for module in pair.target.modules())
    modes, forward = [], type(pair.target).forward

    @functools.wraps(forward)
    def noted(*args, **kwargs):
        modes.append(torch.is_inference_mode_enabled())
        return forward(*args, **kwargs)

    monkeypatch.setattr(type(pair.target), "forward", noted)
    config = decoding_config(pair.target, NEW, PAD)
    with opened(choose_ways(["drafter"]), pair.target, {GIVEN: pair.drafter}) as decoders:
        found = decoders["drafter"](pair.prompts[0], config, seed=0)
    assert modes[1:] and all(modes[1:])  # all but the prefill, which is transformers' own
    assert found.time.passes == len(modes) - 1
    assert "forward" not in vars(pair.target)
    assert not any(module._forward_hooks for module in pair.target.modules())
    # and whoever asks again is answered
    FrozenTarget(pair.target, pair.drafter.config).check(pair.prompts[0])


def test_other_lengths_and_drafters_are_what_they_say(record):
    passes = {
        name: [r for row in record["prompts"] for r in passes_from_text(row["ways"][name]["passes"])]
        for name in ("drafter", "draft_1", "also:other", "lookup_alone")
    }
    assert passes["also:other"] == passes["drafter"]  # the same weights
    assert {r.drafted for r in passes["draft_1"]} <= {0, 1} and max(r.drafted for r in passes["drafter"]) == K - 1
    assert not any(r.looked_up for r in passes["drafter"])
    assert all(r.looked_up for r in passes["lookup_alone"] if r.drafted)


def test_tau_is_recomputed_from_the_stored_passes_and_the_same_where_the_text_is_read(record):
    passes = [r for row in record["prompts"] for r in passes_from_text(row["ways"]["drafter"]["passes"])]
    assert record["acceptance"] == strict_json(summarize(passes, K).to_dict())
    tau = record["tau"]
    assert tau["by_passes"]["value"] == record["acceptance"]["tau"] == tau["teacher_forced"]["tau"] > 1
    low, high = tau["by_passes"]["interval"]
    assert low < tau["by_passes"]["value"] < high
    assert tau["by_prompts"]["value"] == pytest.approx(sum(row["tau"] for row in record["prompts"]) / 3)
    for key in ("by_context", "by_position"):
        assert sum(one["passes"] for one in tau[key]) == len(passes)
    assert [row["teacher_forced"] for row in record["prompts"]] == [
        row["ways"]["drafter"]["passes"] for row in record["prompts"]
    ]


@pytest.mark.parametrize(
    ("more", "advice"),
    [
        (dict(ways="sideways"), "no way sideways: choose from plain, drafter"),
        (dict(ways="assistant"), "needs a small model: --assistant"),
        (dict(ways="lookup_alone", lookup="off"), "leave out one of the two"),
        (dict(draft_lengths=K), r"must be in 1\.\.3"),
    ],
)
def test_ways_that_cannot_be_are_one_line_of_advice(folders, tmp_path, more, advice):
    with pytest.raises(SystemExit, match=advice) as error:
        main(arguments(folders, tmp_path / "out", **more))
    assert "\n" not in str(error.value)


# ---- rows on disk, and processes


@pytest.fixture(scope="module")
def many(folders):
    """Prompts for a run that is stopped in the middle."""
    lines = [json.dumps({"text": f"{i} sheep sleep while the quick brown fox jumps"}) for i in range(6)]
    (folders / "many.jsonl").write_text("\n".join(lines))
    return "many.jsonl"


def test_after_sigterm_the_same_command_goes_on_and_measures_nothing_twice(folders, many, tmp_path, capsys):
    out = tmp_path / "out"
    words = arguments(folders, out, prompts=many, count=6, max_new_tokens=40, lookup="off")
    process = warm_python().start("-m", "hf_specauf.evaluate", *words)
    while not list(out.glob("rows/*/0.jsonl")):
        assert process.poll() is None, process.printed()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait() != 0 and not (out / "eval.json").exists()
    [file] = out.glob("rows/*/0.jsonl")
    kept = {row["prompt"]: row for row in map(json.loads, filter(str.strip, file.read_text().splitlines()))}
    assert 0 < len(kept) < 6
    with open(file, "a") as broken:
        broken.write('{"prompt": "cut o')
    # Other settings begin anew, and leave the rows where they are.
    main(arguments(folders, out, prompts=many, count=2, max_new_tokens=8, lookup="off"))
    assert "starting anew: the rows in" in capsys.readouterr().out and file.is_file()
    main(words)
    assert f"going on: {len(kept)} prompts are measured already" in capsys.readouterr().out
    record = json.loads((out / "eval.json").read_text())
    assert len(record["prompts"]) == 6 and record["acceptance"]["tokens"] == 6 * 39
    for row in record["prompts"]:
        if row["prompt"] in kept:
            assert row["ways"] == kept[row["prompt"]]["ways"]  # to the last digit of its seconds
    assert not (out / "rows").exists()  # eval.json holds them


def test_ctrl_c_says_that_the_same_command_goes_on(folders, tmp_path, monkeypatch):
    def interrupted(self, row):
        raise KeyboardInterrupt

    monkeypatch.setattr(KeptRows, "add", interrupted)
    with pytest.raises(SystemExit, match="stopped: what was measured is kept. The same command goes on"):
        main(arguments(folders, tmp_path / "out", lookup="off"))


def test_two_processes_give_the_sums_of_one(folders, many, tmp_path):
    words = dict(prompts=many, count=5, max_new_tokens=12, lookup="off", device="cpu")
    launch = ("accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2")
    process = start(*launch, "-m", "hf_specauf.evaluate", *arguments(folders, tmp_path / "two", **words))
    assert process.wait() == 0, process.printed()
    printed = process.printed()
    assert printed.count("report.html") == 1, printed  # the first process alone prints
    main(arguments(folders, tmp_path / "one", **words))
    two, one = (json.loads((tmp_path / name / "eval.json").read_text()) for name in ("two", "one"))
    assert (two["environment"].pop("processes"), one["environment"].pop("processes")) == (2, 1)
    assert len(two["prompts"]) == 5 and untimed(two) == untimed(one)
    assert not (tmp_path / "two/rows").exists()


def test_one_process_where_several_were_asked_for_says_what_starts_them(monkeypatch, capsys):
    words = ["--cpu", "--num_processes", "2", "-m", "hf_specauf.evaluate"]
    launch, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    _, environment = prepare_simple_launcher_cmd_env(launch)
    for name in environment.keys() - os.environ.keys():
        monkeypatch.setenv(name, environment[name])
    join_processes(SimpleNamespace(device="cpu"))
    assert "with --multi_gpu: accelerate launch --multi_gpu" in capsys.readouterr().out
    monkeypatch.delenv("MASTER_PORT")  # as one process has it that was asked for alone
    join_processes(SimpleNamespace(device="cpu"))
    assert not capsys.readouterr().out


# ---- low precision


def test_in_bf16_plain_decoding_beside_a_copy_shows_what_rounding_does(folders, tmp_path, capsys):
    main(arguments(folders, tmp_path / "out", lookup="off", dtype="bfloat16"))
    record = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert sum(record["ways"]["plain_in_a_pair"]["lossless"].values()) == 2
    printed = " ".join(capsys.readouterr().out.split())
    assert "Plain decoding beside a copy of itself, in a batch of two" in printed
    read = record["read_at_once"]
    assert f"chooses otherwise in {read['outputs_otherwise']} of 2 ({read['tokens_otherwise']} of 16 tokens" in printed
    assert "plain, beside a copy" not in printed  # its speed is nobody's
    main(arguments(folders, tmp_path / "out", lookup="off", dtype="float32"))
    assert list(json.loads((tmp_path / "out" / "eval.json").read_text())["ways"]) == ["plain", "drafter"]


def test_what_is_read_in_one_pass_is_counted_where_the_target_chooses_otherwise():
    target, ids = make_target(), random_prompts(1, 20)
    plain = target.generate(ids[:, :8], do_sample=False, max_new_tokens=12)
    assert read_at_once(target, plain, 8) == dict(tokens=12, otherwise=0, below_best=0.0)
    plain[0, -1] = 3
    logits = target(plain).logits[0, -2]
    found = read_at_once(target, plain, 8)
    assert found["tokens"] == 12 and found["otherwise"] == 1
    assert found["below_best"] == pytest.approx((logits.max() - logits[3]).item(), abs=1e-5)


def test_a_prompt_beside_its_copy_is_read_in_a_batch_of_two_and_gives_one_output(pair):
    ways, widths = choose_ways(["plain_in_a_pair"]), []
    hook = pair.target.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    with opened(ways, pair.target, {GIVEN: pair.drafter}) as decoders:
        decoded = decoders["plain_in_a_pair"](pair.prompts[0], decoding_config(pair.target, 4, PAD), seed=0)
    hook.remove()
    assert set(widths) == {2} and decoded.output.shape == (1, PROMPT + 4)


# ---- the page


class Reader(HTMLParser):
    """What a browser would fetch or run, and whether every element is closed."""

    def __init__(self):
        super().__init__()
        self.tags, self.fetched, self.open = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href") and not value.startswith("#"):
                self.fetched.append(value)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in ("meta", "br"):
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_fetches_nothing_escapes_all_words_and_says_the_verdict_first(record):
    bad = '<script>alert("1")</script>&amp;'
    named = json.loads(json.dumps(record))
    named["drafter"] = {"name_or_path": bad}
    named["conditions"]["prompts"] = named["target"]["name_or_path"] = bad
    named["ways"]["drafter"]["says"] = named["ways"]["drafter_and_lookup"]["says"] = bad
    text = page(named)
    reader = Reader()
    reader.feed(text)
    assert reader.open == [] and reader.fetched == [] and "script" not in reader.tags
    assert reader.tags.count("svg") == len(PICTURES)
    assert "@import" not in text and "url(http" not in text and "prefers-color-scheme: dark" in text
    assert "&lt;script&gt;" in text
    ours = page(record)
    assert ours.index("Drafter and lookup: ") < ours.index("<table") and str(ours).count("currentColor") > 10


@pytest.mark.parametrize(
    ("interval", "said"),
    [
        ([1.1, 1.4], "1.20x as fast"),
        ([0.9, 1.4], "no clear difference"),
        ([0.7, 0.9], "SLOWER"),
        (None, "1.20x as fast"),
    ],
)
def test_the_verdict_says_faster_only_where_the_interval_does(record, interval, said):
    usual = record["ways"]["drafter_and_lookup"] | {"speedup": 1.2, "speedup_interval": interval}
    found = verdict(record | {"ways": record["ways"] | {"drafter_and_lookup": usual}})
    assert said in found[0] and ("SLOWER" in found[0]) == (said == "SLOWER")
    assert found[-1].startswith("Too few prompts (3)")
    assert "Too few" not in " ".join(verdict(record | {"prompts": record["prompts"] * 4}))


def test_what_no_pass_reached_still_makes_a_page(pair):
    results = compare(pair.target, pair.drafter, pair.prompts[:1], 1, pad_token_id=PAD, show_progress=False)
    record = evaluation_record(results, pair.target, prompts="p", temperature=0.0, max_new_tokens=1)
    assert "not measured" in page(strict_json(record))


# ---- two records


def test_two_evaluations_of_the_same_prompts_are_compared_prompt_by_prompt(folders, tmp_path, capsys):
    for out, more in (("a", {}), ("b", dict(draft_length=1))):
        main(arguments(folders, tmp_path / out, count=3, lookup="off", **more))
    names = [str(tmp_path / out / "eval.json") for out in "ab"]
    capsys.readouterr()
    # a file, and the folder of one
    main(["--compare", names[0], str(tmp_path / "b"), "--out", str(tmp_path / "c")])
    printed = capsys.readouterr().out
    assert "on the same 3 prompts" in printed and "draft_length None there, 1 here" in printed
    found = json.loads((tmp_path / "c" / "comparison.json").read_text())
    first, second = (json.loads(open(name).read()) for name in names)
    assert found["tau"] == [first["acceptance"]["tau"], second["acceptance"]["tau"]]
    same = compare_records(first, first)
    assert same["tau_difference"]["interval"] == [0, 0] and same["speed_ratio"]["interval"] == [1, 1]
    assert same["different"] == [] and "no clear difference" in comparison_words(same, ["a", "a"])[1]
    with pytest.raises(SystemExit, match=f"{tmp_path / 'eval.json'} is not there: specauf evaluate writes it"):
        main(["--compare", names[0], str(tmp_path)])


def older(record: dict, faster: float = 1.0, tau: float = 0.0) -> dict:
    """A record as 0.1.0 wrote it, with changed figures."""
    keys = ("prompt_tokens", "new_tokens", "tau", "assisted_seconds")
    rows = [{key: row[key] for key in keys} for row in record["prompts"]]
    rows = [row | {"tau": row["tau"] + tau, "assisted_seconds": row["assisted_seconds"] / faster} for row in rows]
    return {key: record[key] for key in ("conditions", "target")} | {"prompts": rows}


def test_older_records_are_paired_by_their_order_and_clear_differences_called_so(record):
    found = compare_records(older(record), older(record, faster=2.0, tau=0.5))
    assert found["speed_ratio"]["interval"] == pytest.approx([2, 2])
    words = " ".join(comparison_words(found, ["a", "b"]))
    assert "clearly higher" in words and "clearly faster" in words
    back = " ".join(comparison_words(compare_records(older(record, 2.0, 0.5), record), ["a", "b"]))
    assert "clearly lower" in back and "clearly slower" in back
    other = older(record)
    other["prompts"] = other["prompts"][:2]
    with pytest.raises(ValueError, match="no prompt in common.*same --prompts and --count"):
        compare_records(older(record), other)


def test_a_slot_that_few_passes_reached_is_in_no_line():
    # 100 passes reached slot 1, 40 slot 2, and 10 slot 3, of which one text that repeats itself made 1.0.
    acceptance = {"alpha": [0.4, 0.25, 1.0, None], "histogram": [60, 30, 0, 10]}
    with figure_with_axes("", "", "") as (_, axes):
        draw_acceptance(acceptance, axes, label="auf")
        line, mark = axes.get_lines()
        assert line.get_xydata().tolist() == [[1, 0.4], [2, 0.25]]
        assert mark.get_xydata().tolist() == [[3, 1.0]] and mark.get_markerfacecolor() == "none"
        assert axes.get_xlim() == (0.5, 4.5)
