"""`evaluate`: plain against assisted decoding, what it measures and what it writes."""

import copy
import io
import json
import os
import shlex
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    CHAT_TEMPLATE,
    EOS,
    MASK,
    PAD,
    attach,
    make_domino,
    make_drafter,
    make_target,
    overfit,
    random_prompts,
    warm_python,
)
from rich.console import Console
from safetensors.torch import save_file
from test_convert import z_lab
from transformers import AutoModelForCausalLM, GenerationConfig, set_seed

from hf_specauf import load_drafter
from hf_specauf.data.sources import load_rows
from hf_specauf.drafters.modeling_dflash import DFlashDraftModel
from hf_specauf.evaluate import encode_prompts, main, transfer_verdict
from hf_specauf.evaluation.compare import compare
from hf_specauf.evaluation.differences import first_difference, near_tie_bound
from hf_specauf.evaluation.rows import prompt_row, repetition
from hf_specauf.evaluation.summary import totals
from hf_specauf.evaluation.table import show
from hf_specauf.evaluation.ways import Decoded
from hf_specauf.recipe import parse
from hf_specauf.serving.acceptance import TAU_DEFINITION
from hf_specauf.target import drafter_config

PROMPT, NEW, K = 12, 24, 4


@pytest.fixture(scope="module")
def pair():
    target = make_target()
    prompts = random_prompts(3, PROMPT)
    texts = target.generate(prompts[:2], do_sample=False, max_new_tokens=NEW, suppress_tokens=[MASK])
    drafter = overfit(make_drafter(target, block_size=K, dtype=torch.float64), target, texts, PROMPT, steps=60)
    return SimpleNamespace(target=target, drafter=drafter, prompts=list(prompts[:, None]))


def run(pair, new: int = NEW, **options) -> dict:
    return compare(pair.target, pair.drafter, pair.prompts, new, pad_token_id=PAD, show_progress=False, **options)


def strict_json(results: dict) -> dict:
    return json.loads(json.dumps(results, allow_nan=False))


# ---- compare


@pytest.mark.parametrize("cap", [None, 1])
def test_compare_measures_what_attach_records(pair, cap):
    results = strict_json(run(pair, draft_length=cap))
    with attach(pair.target, pair.drafter, draft_length=cap) as attachment:
        for prompt in pair.prompts:
            pair.target.generate(prompt, do_sample=False, max_new_tokens=NEW, assistant_model=pair.drafter)
    expected = attachment.acceptance()
    assert results["acceptance"] == strict_json(expected.to_dict())
    assert results["acceptance"]["tokens"] == 3 * (NEW - 1) and 1 < expected.tau <= (cap or K - 1) + 1
    assert results["lossless"] == {"identical": 3, "near_tie": 0, "different": 0}
    assert results["speedup"] == results["tokens_per_second"] / results["plain_tokens_per_second"] > 0
    for row, rounds in zip(results["prompts"], attachment.generations, strict=True):
        assert (row["prompt_tokens"], row["new_tokens"], row["difference"]) == (PROMPT, NEW, None)
        assert row["tau"] == pytest.approx((NEW - 1) / len(rounds))
    assert results["repetition"] == pytest.approx(sum(row["repetition"] for row in results["prompts"]) / 3)
    assert not hasattr(type(pair.target), "_attached_drafters")


def test_with_lookup_two_more_ways_are_measured_and_tau_stays_the_drafters_own(pair):
    alone = run(pair)
    # A length that is given is not decided by measured times, so both sources draft on any machine.
    results = strict_json(run(pair, 64, draft_length=K - 1, lookup="auto"))
    assert list(alone["ways"]) == ["plain", "drafter"]
    assert results["acceptance"] == strict_json(run(pair, 64))["acceptance"]
    for way in ("prompt_lookup", "drafter_and_lookup"):
        found = results["ways"][way]
        assert found["lossless"] == {"identical": 3, "near_tie": 0, "different": 0}
        assert found["speedup"] == found["tokens_per_second"] / results["plain_tokens_per_second"]
    accepted = results["ways"]["drafter_and_lookup"]["accepted"]
    assert all(0 < accepted[source]["accepted"] <= accepted[source]["drafted"] for source in ("drafter", "lookup"))
    console = Console(width=120, file=io.StringIO())
    show(results, console)
    assert "drafter and lookup" in console.file.getvalue()
    assert not hasattr(type(pair.target), "_attached_drafters")


@pytest.mark.parametrize(("new", "tau", "alpha"), [(1, None, [None] * 3), (2, 1.0, [None] * 3)])
def test_what_no_pass_reached_is_null_and_the_json_is_valid(pair, new, tau, alpha):
    results = strict_json(run(pair, new))
    assert (results["acceptance"]["tau"], results["acceptance"]["alpha"]) == (tau, alpha)
    assert [row["tau"] for row in results["prompts"]] == [tau] * 3


def test_compare_stops_at_the_targets_own_end_of_sequence(pair):
    free = pair.target.generate(pair.prompts[0], do_sample=False, max_new_tokens=NEW)[0, PROMPT:].tolist()
    end = free[5]
    pair.target.generation_config.eos_token_id = [end, EOS]
    try:
        results = run(pair)
    finally:
        pair.target.generation_config.eos_token_id = None
    assert results["prompts"][0]["new_tokens"] == free.index(end) + 1 < NEW
    assert results["lossless"]["identical"] == 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_targets_own_sampling_defaults_do_not_reach_a_measurement(pair, temperature):
    expected = untimed(strict_json(run(pair, temperature=temperature)))
    own = pair.target.generation_config
    shipped = dict(repetition_penalty=1.7, top_p=0.4, top_k=3, temperature=0.5, no_repeat_ngram_size=2, do_sample=True)
    pair.target.generation_config = GenerationConfig(**own.to_dict() | shipped)
    try:
        assert untimed(strict_json(run(pair, temperature=temperature))) == expected
    finally:
        pair.target.generation_config = own


def test_sampled_outputs_are_measured_but_not_compared(pair):
    results = strict_json(run(pair, temperature=1.0))
    assert results["lossless"] == "sampled: not comparable token by token"
    assert all(row["difference"] is None for row in results["prompts"])
    assert results["acceptance"]["tokens"] == 3 * (NEW - 1)
    greedy = run(pair)
    assert results["acceptance"]["histogram"] != greedy["acceptance"]["histogram"]
    assert untimed(results) == untimed(strict_json(run(pair, temperature=1.0)))  # one seed, one outcome


def untimed(results):
    """Results without what a clock says."""
    if isinstance(results, list):
        return [untimed(part) for part in results]
    if not isinstance(results, dict):
        return results
    timed = (
        "per_second",
        "seconds",
        "time",
        "time_of_a_pass",
        "speedup",
        "speedup_interval",
        "speedup_of_another_set",
    )
    return {key: untimed(value) for key, value in results.items() if not key.endswith(timed)}


# ---- differences and repetition


@pytest.mark.parametrize(("gap", "tie"), [(0.0, True), (5e-4, True), (2e-3, False)])
def test_a_first_difference_is_a_near_tie_only_below_the_bound(gap, tie):
    target = make_target()
    plain = random_prompts(1, 20)
    assisted = plain.clone()
    assisted[0, 13], assisted[0, 17] = 3, 3
    with torch.no_grad():
        logits = target(plain[:, :13]).logits[0, -1]
        best, runner_up = logits.topk(2).indices.tolist()
        # the runner-up's logit becomes the best one's less the gap
        target.lm_head.weight[runner_up] = target.lm_head.weight[best] * (1 - gap / logits[best])
        # what stands behind the first difference is not the target's text either
        behind = target(assisted[:, :-1]).logits[0, 12:]
        below = behind.amax(-1) - behind.gather(1, assisted[0, 13:, None])[:, 0]
    assert below[0] > 0 and below.argmax() > 0
    assert first_difference(target, plain, plain.clone()) is None
    assert first_difference(target, plain, assisted) == {
        "position": 13,
        "top2_gap": pytest.approx(gap, abs=1e-5),
        "below_best": pytest.approx(below.max().item(), abs=1e-5),
        "near_tie": tie,
    }
    found = first_difference(target, plain, assisted[:, :14])
    assert found["below_best"] == pytest.approx(below[0].item(), abs=1e-5)


@pytest.mark.parametrize(("longer", "expected"), [("neither", None), ("plain", 15), ("assisted", 15)])
def test_an_output_that_ends_early_differs_where_it_ends(longer, expected):
    target, ids = make_target(), random_prompts(1, 20)
    plain, assisted = (ids if longer in (name, "neither") else ids[:, :15] for name in ("plain", "assisted"))
    found = first_difference(target, plain, assisted)
    assert (found and found["position"]) == expected
    assert not found or (found["below_best"] is None) == (longer == "plain")


def test_the_bound_of_a_near_tie_is_fixed_in_fp32_and_a_few_roundings_in_bf16():
    logits = torch.tensor([3.0, -10.0, 9.0])
    assert near_tie_bound(torch.float32, logits) == near_tie_bound(torch.float64, logits) == 1e-3
    assert near_tie_bound(torch.bfloat16, logits) == pytest.approx(4 * 2**-7 * 10)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (range(40), 0.0),
        ([5] * 40, 36 / 37),
        ([5, 6, 7] * 20, 1 - 3 / 57),
        ([1, 2, 3, 4, 9, 1, 2, 3, 4], 1 / 6),
        ([1, 1, 1, 1], 0.0),
    ],
)
def test_repetition_is_the_share_of_four_grams_seen_before(tokens, expected):
    assert repetition(list(tokens)) == pytest.approx(expected)


def test_outputs_too_short_to_repeat_themselves_do_not_hide_one_that_does():
    def decoded(tokens: list[int]) -> dict:
        output = Decoded(torch.tensor([[7, *tokens]]), seconds=1.0)
        return prompt_row(torch.tensor([[7]]), output, output, [], None)

    rows = [decoded([5] * 40), decoded([5, 5]), decoded([])]
    assert [row["repetition"] for row in rows] == [pytest.approx(36 / 37), None, None]
    assert totals(rows, greedy=True)["repetition"] == pytest.approx(36 / 37)
    assert totals(rows[1:], greedy=True)["repetition"] is None


# ---- the command line


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    """A target with its tokenizer, a drafter, and prompts as text and as conversations, all on disk."""
    folder = tmp_path_factory.mktemp("evaluate")
    target = make_target(
        dtype=torch.float32, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    config = drafter_config(
        target, num_hidden_layers=1, block_size=K, mask_token_id=tokenizer.mask_token_id, target_layer_ids=[0, 2]
    )
    set_seed(0)
    domino = make_domino(target, K, gru_hidden_dim=6, emb_dim=4)
    for name, part in dict(target=target, drafter=DFlashDraftModel(config), domino=domino).items():
        part.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / "target")
    texts = [{"text": f"the quick brown fox jumps over {i} lazy dogs"} for i in range(3)]
    chats = [
        {"messages": [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": "really?"}]}
        for row in texts
    ]
    for name, rows in dict(text=texts, chat=chats).items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def arguments(folders, out, prompts="text.jsonl", drafter="drafter", **more) -> list[str]:
    given = dict(target=folders / "target", drafter=folders / drafter, prompts=folders / prompts, out=out)
    given |= dict(count=2, max_new_tokens=8, prompt_tokens=10) | more
    return [word for key, value in given.items() for word in (f"--{key}", str(value))]


def evaluate_in_a_process(folders, out, **more) -> tuple[int, str]:
    return warm_python().run("-m", "hf_specauf.evaluate", *arguments(folders, out, **more))


def check_written(folders, out, prompt_tokens: list[int]) -> dict:
    record = json.loads((out / "eval.json").read_text(), parse_constant=pytest.fail)
    assert (out / "alpha.png").read_bytes().startswith(b"\x89PNG")
    assert [row["prompt_tokens"] for row in record["prompts"]] == prompt_tokens
    assert [row["new_tokens"] for row in record["prompts"]] == [8, 8]
    assert record["lossless"]["different"] == 0
    assert record["acceptance"]["tokens"] == 14 and record["tau_definition"] == TAU_DEFINITION
    assert record["target"]["name_or_path"] == str(folders / "target")
    assert record["drafter"]["dtype"] == "torch.float32"
    assert record["conditions"]["max_new_tokens"] == 8 and record["environment"]
    return record


def test_the_command_line_writes_results_and_a_plot(folders, tmp_path):
    code, printed = evaluate_in_a_process(folders, tmp_path / "out")
    assert code == 0, printed
    record = check_written(folders, tmp_path / "out", [10, 10])
    assert f"{record['speedup']:.2f}x" in printed and "tau" in printed
    assert f"written: {tmp_path / 'out' / 'report.html'}, " in printed, "a path must be whole to be copied"
    assert (tmp_path / "out" / "report.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("drafter", ["drafter", "domino"])
def test_conversations_are_prompted_up_to_the_first_answer(folders, tokenizer, tmp_path, capsys, drafter):
    main(arguments(folders, tmp_path / "out", prompts="chat.jsonl", temperature=0.0, drafter=drafter))
    lengths = [
        len(tokenizer(f"<|user|>the quick brown fox jumps over {i} lazy dogs<|end|><|assistant|>")["input_ids"])
        for i in range(2)
    ]
    check_written(folders, tmp_path / "out", lengths)
    assert "written:" in capsys.readouterr().out


def test_rows_of_several_schemas_are_prompts_and_those_that_are_none_are_counted(tokenizer, tmp_path, capsys):
    user, answer = {"role": "user", "content": "fox?"}, {"role": "assistant", "content": "It jumps."}
    rows = [
        {"messages": [user, answer]}, {"text": "the fox"}, {"conversations": [{"from": "human", "value": "fox?"}]},
        {"text": None}, {"messages": [user], "tools": "[{"}, {"messages": [user | {"content": "refuse"}]},
        {"messages": [answer]}, {"input_ids": [5, 6, 7], "supervised": [0, 0, 1]},
    ]  # fmt: skip
    picky = copy.deepcopy(tokenizer)
    picky.chat_template = "{{ raise_exception('no') if messages[0]['content'] == 'refuse' }}" + CHAT_TEMPLATE
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = encode_prompts(load_rows(str(tmp_path / "rows.jsonl")), picky, 8, 2, None)
    chat = tokenizer("<|user|>fox?<|end|><|assistant|>")["input_ids"]
    expected = [chat, tokenizer("the fox")["input_ids"][:2], chat, [5, 6]]
    assert [prompt[0].tolist() for prompt in prompts] == expected
    assert (
        "4 prompts; other rows give none: its columns are empty (1, first: row 3), its tools are not JSON (1, first: "
        "row 4), the chat template failed: no (1, first: row 5), it asks nothing (1, first: row 6)"
    ) in capsys.readouterr().out


def test_a_prompt_that_leaves_no_room_for_its_answer_is_none_and_counted(tokenizer, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"text": "the fox"}\n{"text": "the quick brown fox"}\n')
    rows = load_rows(str(tmp_path / "rows.jsonl"))
    short, long = (prompt.shape[1] for prompt in encode_prompts(rows, tokenizer, 2, 99, None))
    [one] = encode_prompts(rows, tokenizer, 2, 99, None, room=long - 1)
    assert one.shape[1] == short < long
    assert (
        f"1 prompts; other rows give none: over {long - 1} tokens, all that max_new_tokens leaves"
        in capsys.readouterr().out
    )


def test_the_command_line_fails_in_one_clear_line(folders, tmp_path):
    code, printed = evaluate_in_a_process(folders, tmp_path / "out", prompts="nowhere.jsonl")
    assert code == 1 and "Traceback" not in printed
    last = printed.splitlines()[-1]
    assert last.startswith("error: ") and "there is none at" in last and str(folders / "nowhere.jsonl") in last
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "advice"),
    [
        (dict(drafter="target"), "target says nothing about block_size.*it is not a DFlash drafter"),
        (dict(drafter="empty"), "empty"),
        (dict(dtype="bf16"), "dtype is 'bf16'; it must be one of auto"),
        (dict(draft_length=K), r"must be in 1\.\.3"),
        (dict(prompts="columns.jsonl"), "none of `messages`, `conversations`"),
        (
            dict(prompts="nulls.jsonl"),
            "not one row of 2 gives a prompt: its columns are empty .1, first: row 0., its tools.*--prompts_column",
        ),
        (dict(max_new_tokens=256), "max_new_tokens is 256, and the target has 256 positions, the prompt's among them"),
        (dict(prompts_split="test"), "text.jsonl is a file, and prompts_split 'test' is for datasets on the Hub"),
    ],
    ids=["a target as drafter", "an empty folder", "dtype", "cap", "columns", "rows", "no room", "split of a file"],
)
def test_what_cannot_be_evaluated_is_one_line_of_advice(folders, tmp_path, more, advice):
    (folders / "empty").mkdir(exist_ok=True)
    (folders / "columns.jsonl").write_text('{"question": "why?"}\n')
    (folders / "nulls.jsonl").write_text(
        '{"text": null}\n{"messages": [{"role": "user", "content": "a"}], "tools": "[{"}\n'
    )
    with pytest.raises(SystemExit, match=advice) as error:
        main(arguments(folders, tmp_path / "out", **more))
    message = str(error.value)
    assert message.startswith("error: ") and "\n" not in message
    assert not (tmp_path / "out").exists()


# ---- measure first, then adapt


def test_a_drafter_on_another_target_is_told_whether_adapting_is_worth_it():
    config = make_drafter(make_target()).config
    config.target_model_name_or_path, config.target_fingerprint = "own/target", "aa"

    def measured(tau, name="a/fine-tune", weights=None, **conditions) -> dict:
        conditions = dict(prompts="p", max_new_tokens=8, hardware="one") | conditions
        target = {"name_or_path": name, "fingerprint": weights}
        return {"acceptance": {"tau": tau}, "conditions": conditions, "target": target, "prompts": [{}]}

    def said(here, there=None) -> str:
        return transfer_verdict(here, config, there, "adapt it so")

    assert said(measured(1.5, "own/target")) == said(measured(1.5, "/a/copy/of/it", "aa")) == ""
    assert said(measured(1.5, "own/target", "bb")) != ""  # another commit
    unknown = (
        "was trained for own/target, and what it reaches there is not known. Evaluate it on own/target with the same"
    )
    own = measured(3.0, "own/target", hardware="another")
    for reference in (None, measured(3.0, "third/target")):
        assert unknown in said(measured(1.5), reference) and said(measured(1.5), reference).endswith("adapt it so")
    found = said(measured(1.5), own)
    assert "reached tau 3.00 there (p). Here it reaches 1.50, so 25% of the accepted tokens are kept" in found
    assert found.endswith("Adapting is worth a try: adapt it so")
    found = said(measured(2.95), own)
    assert "98% of the accepted tokens" in found and found.endswith("Adapting it has little to win.")
    found = said(measured(2.95, max_new_tokens=64, prompts="q"), own)
    assert "differed (max_new_tokens 8 there, 64 here; prompts p there, q here)" in found
    assert "with the same prompts" in found and "little to win" not in found
    assert "2 here" in said(measured(2.95) | {"prompts": [{}, {}]}, own)
    config.target_model_name_or_path = config.target_fingerprint = None  # as of a z-lab folder
    assert "does not say which target it was trained for" in said(measured(1.5), own)


def test_measuring_on_another_target_leaves_what_the_drafter_reached_on_its_own(folders, tmp_path, capsys):
    own, fine_tune = tmp_path / "drafter", tmp_path / "fine-tune"
    shutil.copytree(folders / "drafter", own)
    shutil.copytree(folders / "target", fine_tune)
    config = json.loads((own / "config.json").read_text()) | {"target_model_name_or_path": "own/target"}
    (own / "config.json").write_text(json.dumps(config))
    main(arguments(folders, own, drafter=own))  # under another name, and the same weights
    assert "was trained for" not in capsys.readouterr().out
    before = (own / "eval.json").read_text()
    target = AutoModelForCausalLM.from_pretrained(fine_tune)
    target.model.norm.weight.data[0] += 1
    target.save_pretrained(fine_tune)
    with pytest.raises(SystemExit, match="is the drafter's own folder.*give another --out"):
        main(arguments(folders, own, drafter=own, target=fine_tune))
    assert (own / "eval.json").read_text() == before
    main(arguments(folders, tmp_path / "out", drafter=own, target=fine_tune))
    printed = " ".join(capsys.readouterr().out.split())
    assert "This drafter was trained for own/target and reached tau" in printed
    record = json.loads((tmp_path / "out/eval.json").read_text())
    assert record["target"]["fingerprint"] not in (None, json.loads(before)["target"]["fingerprint"])


def test_the_suggested_command_is_one_line_that_parses_and_names_the_drafter_as_it_was_given(
    folders, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(folders)
    folder, drafter = tmp_path / "z-lab [a copy]", load_drafter(folders / "drafter")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(z_lab(drafter)))
    save_file(drafter.state_dict(), folder / "model.safetensors")
    name = os.path.relpath(folder)
    words = arguments(folders, tmp_path / "out", target="target")
    words[words.index("--drafter") + 1] = name
    main(words)
    [said] = [line for line in capsys.readouterr().out.splitlines() if "accelerate launch" in line]
    assert "does not say which target it was trained for" in said
    command = shlex.split(said[said.index("accelerate launch") :])
    assert command[:4] == ["accelerate", "launch", "-m", "hf_specauf.train"]
    target, draft, data, args = parse([*command[4:], "--use_cpu", "true"])
    assert (draft.drafter, draft.use_peft, target.target) == (name, True, "target")
    assert (data.dataset_name, args.learning_rate, args.output_dir) == ("YOUR_DATA", 0.002, "adapted")
