"""The on-policy score: counted against the target's own logits, and calibrated on text the target wrote."""

import json
import re
import shlex

import pytest
import torch
from conftest import GATED, MASK, ROOT, make_drafter, make_target, random_prompts
from datasets import Dataset, concatenate_datasets
from transformers import AutoConfig, AutoModelForCausalLM
from trl import TrlParser

from hf_specauf import generate, regenerate, train
from hf_specauf.data.on_policy import on_policy_score
from hf_specauf.drafters.drafts import BlockDrafts
from hf_specauf.drafters.verification import Draft
from hf_specauf.losses.head_loss import head_loss
from hf_specauf.losses.objectives import OBJECTIVES, LossSpec
from hf_specauf.recipe import DataArguments, TargetArguments
from hf_specauf.regenerate import RegenerateArguments, on_policy_words
from hf_specauf.target import FrozenTarget


@pytest.fixture(scope="module")
def frozen():
    target = make_target(dtype=torch.float32)
    return FrozenTarget(target, make_drafter(target).config)


def rows_of(texts: torch.Tensor, prompt: int = 12) -> Dataset:
    supervised = [[0] * prompt + [1] * (texts.shape[1] - prompt)] * len(texts)
    return Dataset.from_dict({"input_ids": texts.tolist(), "supervised": supervised, "row": list(range(len(texts)))})


def written(frozen, **settings) -> torch.Tensor:
    torch.manual_seed(0)
    prompts = random_prompts(40)
    settings = dict(max_new_tokens=40, pad_token_id=1, suppress_tokens=[MASK]) | settings
    return frozen.model.generate(prompts, attention_mask=torch.ones_like(prompts), **settings)


@pytest.mark.parametrize("most", [None, 6])
def test_score_is_what_the_targets_logits_say(frozen, most):
    texts = random_prompts(3, 20)
    score = on_policy_score(frozen, rows_of(texts), most=most, positions_per_chunk=5)
    log_p = frozen.model(texts).logits.double().log_softmax(-1)[:, 11:-1][:, :most]
    labels = texts[:, 12:][:, :most]
    assert (score["rows"], score["tokens"]) == (3, labels.numel())
    expected = dict(
        agreement=(log_p.argmax(-1) == labels).double().mean(), agreement_if_own=log_p.exp().amax(-1).mean(),
        log_probability=log_p.gather(2, labels[:, :, None]).mean(),
        log_probability_if_own=(log_p.exp() * log_p).sum(-1).mean(),
    )  # fmt: skip
    for key, value in expected.items():
        assert score[key] == pytest.approx(value.item(), rel=1e-5), key


SCALED = {
    "granite": dict(GATED, logits_scaling=8.0),
    "cohere": dict(GATED, logit_scale=0.25),
    "gemma2": dict(GATED, query_pre_attn_scalar=8, sliding_window=16, final_logit_softcapping=5.0),
}


def scaled_target(architecture: str, dtype=torch.float32):
    """A target that does something to its logits after the head."""
    config = AutoConfig.for_model(architecture, **SCALED[architecture], pad_token_id=1, eos_token_id=0, bos_token_id=2)
    torch.manual_seed(0)
    target = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    for parameter in target.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(4.0)
    return target


@pytest.mark.parametrize("architecture", SCALED)
def test_score_is_by_the_logits_a_target_writes_by_and_not_by_its_heads(architecture):
    target = scaled_target(architecture)
    frozen, texts = FrozenTarget(target, make_drafter(target).config), random_prompts(3, 20)
    score = on_policy_score(frozen, rows_of(texts), positions_per_chunk=5)
    labels = texts[:, 12:, None]

    def expected(logits):
        return logits.double().log_softmax(-1)[:, 11:-1].gather(2, labels).mean().item()

    assert score["log_probability"] == pytest.approx(expected(target(texts).logits), rel=1e-5)
    raw = frozen.logits(target.base_model(texts).last_hidden_state)
    assert abs(expected(raw) - score["log_probability"]) > 1e-3


def test_a_target_that_takes_no_positions_is_scored_all_the_same(frozen, monkeypatch):
    forward, texts = frozen.model.forward, random_prompts(3, 20)
    expected = on_policy_score(frozen, rows_of(texts))
    monkeypatch.setattr(
        frozen.model, "forward", lambda input_ids, attention_mask, use_cache: forward(input_ids, attention_mask)
    )
    assert on_policy_score(frozen, rows_of(texts)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("architecture", SCALED)
def test_raw_logits_have_the_same_best_token_and_the_loss_is_that_of_what_drafts_are_drawn_from(
    architecture, monkeypatch
):
    target = scaled_target(architecture, torch.float64)
    drafter, texts = make_drafter(target, dtype=torch.float64), random_prompts(3, 20)
    frozen = FrozenTarget(target, drafter.config)
    raw = frozen.logits(target.base_model(texts).last_hidden_state)
    assert torch.equal(raw.argmax(-1), target(texts).logits.argmax(-1))

    drawn = []  # (hidden rows, tokens, logits) of each draft
    fill = BlockDrafts._fill

    def keep(self, input_ids, hidden, base):
        draft, logits = fill(self, input_ids, hidden, base)
        drawn.append((hidden, draft, logits))
        return Draft(draft, logits)

    monkeypatch.setattr(BlockDrafts, "_fill", keep)
    torch.manual_seed(0)
    generate(
        target, drafter, texts[:1], draft_length=None, lookup=False, do_sample=True, top_k=0, max_new_tokens=12
    )  # fmt: skip
    hidden, draft, logits = drawn[0]
    # Copied, because decoding runs in inference mode. (1, 1, P, H), (1, 1, P)
    hidden, labels = hidden[:, None].clone().requires_grad_(), draft[:, None].clone()
    loss = head_loss(
        hidden, frozen.head, labels, torch.ones_like(labels, dtype=torch.bool), LossSpec(OBJECTIVES["uniform"])
    )
    expected = torch.nn.functional.cross_entropy(logits[0].double(), draft[0], reduction="sum")
    assert loss.numerator.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.denominator.item() == draft.shape[1]


def test_text_the_target_sampled_scores_as_if_own_and_greedy_text_agrees_everywhere(frozen):
    sampled = on_policy_score(frozen, rows_of(written(frozen, do_sample=True, top_k=0)), count=40)
    assert sampled["tokens"] == 1600
    assert sampled["agreement"] == pytest.approx(sampled["agreement_if_own"], abs=0.05)
    assert sampled["log_probability"] == pytest.approx(sampled["log_probability_if_own"], abs=0.15)
    greedy = on_policy_score(frozen, rows_of(written(frozen, do_sample=False, suppress_tokens=None)))
    assert greedy["agreement"] > 0.999


def commands(words: str) -> list[RegenerateArguments]:
    """The printed commands, as a shell and the command itself read them."""
    lines = re.findall(r"^  python -m hf_specauf.regenerate (.*)$", words, re.M)
    return [TrlParser(RegenerateArguments).parse_args_and_config(shlex.split(line))[0] for line in lines]


def test_foreign_text_names_the_command_that_mends_it(frozen):
    target = TargetArguments("some/target", target_revision="abc", trust_remote_code=True, target_dtype="bfloat16")
    data = DataArguments(dataset_name="my chats.jsonl", dataset_config="en", dataset_split="train_sft")
    foreign = on_policy_score(frozen, rows_of(random_prompts(20, 40)))
    words = on_policy_words(foreign, target, data, {"enable_thinking": False})
    [found] = commands(words)
    expected = RegenerateArguments(
        "some/target", "my chats.jsonl", "answers.jsonl", "abc", "bfloat16", True, dataset_config="en",
        dataset_split="train_sft", chat_template_kwargs='{"enable_thinking": false}',
    )  # fmt: skip
    assert found == expected and words.endswith("and then dataset_name: answers.jsonl")
    assert "These are not the target's own words" in words


STUDY = json.loads((ROOT / "tests/benchmarks/results/regeneration_study.json").read_text())["on_policy"]


def test_a_high_score_alone_does_not_make_the_words_the_targets_own(tmp_path):
    """The study's files score above what the target's own would at temperature 1; regenerating them gave 30 %."""
    score = STUDY["the dataset's"]
    assert score["agreement"] > score["agreement_if_own"]
    target, data = TargetArguments("some/target"), DataArguments(dataset_name=str(tmp_path / "own.jsonl"))
    words = on_policy_words(score, target, data, fingerprint="abc")
    assert len(commands(words)) == 1 and "Nothing says that the target wrote these answers" in words
    for settings, own in (
        (dict(target="some/target"), True),  # quantised, or by a server
        (dict(target="some/target", target_fingerprint="def"), False),
        (dict(target="its/copy", target_fingerprint="abc"), True),
        (dict(target="other/target"), False),
    ):
        (tmp_path / "own.settings.json").write_text(json.dumps(settings))
        assert (commands(on_policy_words(score, target, data, fingerprint="abc")) == []) == own, settings
    both = DataArguments(dataset_mixture=[{"name": "a.jsonl"}, {"name": str(tmp_path / "own.jsonl")}])
    (tmp_path / "own.settings.json").write_text(json.dumps(dict(target="some/target")))
    assert [found.dataset_name for found in commands(on_policy_words(score, target, both))] == ["a.jsonl"]


def test_every_source_of_a_mixture_has_its_command(frozen):
    data = DataArguments(dataset_mixture=[{"name": "a.jsonl", "weight": 3}, {"name": "b/c", "revision": "abc"}])
    foreign = on_policy_score(frozen, rows_of(random_prompts(20, 40)))
    words = on_policy_words(foreign, TargetArguments("t"), data)
    assert [(found.dataset_name, found.dataset_revision, found.out) for found in commands(words)] == [
        ("a.jsonl", None, "answers-1.jsonl"), ("b/c", "abc", "answers-2.jsonl"),
    ]  # fmt: skip
    assert words.endswith("the same weights in dataset_mixture for answers-1.jsonl, answers-2.jsonl")


@pytest.mark.parametrize("where", ["dataset_name", "eval_dataset_name"])
def test_answers_of_another_thinking_mode_or_tokenizer_are_refused(files, command, tmp_path, where):
    own = tmp_path / "own.jsonl"
    keys = dict(
        target=files / "target", dataset_name=files / "chat.jsonl", out=own, max_new_tokens=24, device="cpu",
        temperature=0, continuous_batching="false", chat_template_kwargs='{"enable_thinking": false}',
    )  # fmt: skip
    regenerate.main([word for key, value in keys.items() for word in (f"--{key}", str(value))])
    modes = 'own.jsonl was written with chat_template_kwargs: {"enable_thinking": false}, and this recipe has null'
    with pytest.raises(SystemExit, match=modes):
        train.main(command(**{where: own}))
    same = [*command(**{where: own}, max_steps=1), "--chat_template_kwargs", '{"enable_thinking": false}']
    train.main(same)
    settings = own.with_suffix(".settings.json")
    settings.write_text(settings.read_text().replace('"tokenizer_hash": "', '"tokenizer_hash": "0'))
    with pytest.raises(SystemExit, match="own.jsonl holds tokens of .*target, whose tokenizer is not this target's"):
        train.main(same)


def test_packed_rows_score_as_their_documents(frozen):
    texts = random_prompts(4, 16)
    apart = on_policy_score(frozen, rows_of(texts, prompt=4))
    packed = Dataset.from_dict(
        {
            "input_ids": texts.view(2, 32).tolist(), "supervised": [([0] * 4 + [1] * 12) * 2] * 2, "row": [0, 1],
            "document_ids": [[0] * 16 + [1] * 16] * 2,
        }
    )  # fmt: skip
    together = on_policy_score(frozen, packed)
    assert together["tokens"] == apart["tokens"] == 48
    assert together["log_probability"] == pytest.approx(apart["log_probability"], rel=1e-5)


def test_rows_that_fill_up_a_step_are_not_judged(frozen):
    rows = rows_of(random_prompts(4, 20))
    rows = rows.remove_columns("row").add_column("row", [0, 1, 2, -1])
    assert on_policy_score(frozen, rows)["rows"] == 3


def test_rows_without_a_supervised_token_say_nothing(frozen):
    texts = random_prompts(2, 20)
    rows = concatenate_datasets([rows_of(texts[:1]), rows_of(texts[1:], prompt=20)])
    score = on_policy_score(frozen, rows)
    assert score["tokens"] == 8 and score["agreement"] == on_policy_score(frozen, rows_of(texts[:1]))["agreement"]
