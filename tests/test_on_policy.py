"""The on-policy score: counted against the target's own logits, and calibrated on text the target wrote."""

import pytest
import torch
from conftest import MASK, make_drafter, make_target, random_prompts
from datasets import Dataset

from hf_specauf.on_policy import on_policy_score, on_policy_words
from hf_specauf.recipe import DataArguments
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


def test_score_is_what_the_targets_logits_say(frozen):
    texts = random_prompts(3, 20)
    score = on_policy_score(frozen, rows_of(texts), positions_per_chunk=5)
    log_p = frozen.model(texts).logits.double().log_softmax(-1)[:, 11:-1]
    labels = texts[:, 12:]
    assert (score["rows"], score["tokens"]) == (3, 24)
    expected = dict(
        agreement=(log_p.argmax(-1) == labels).double().mean(), agreement_if_own=log_p.exp().amax(-1).mean(),
        log_probability=log_p.gather(2, labels[:, :, None]).mean(),
        log_probability_if_own=(log_p.exp() * log_p).sum(-1).mean(),
    )  # fmt: skip
    for key, value in expected.items():
        assert score[key] == pytest.approx(value.item(), rel=1e-5), key


def test_text_the_target_sampled_scores_as_if_own_and_greedy_text_agrees_everywhere(frozen):
    sampled = on_policy_score(frozen, rows_of(written(frozen, do_sample=True, top_k=0)), count=40)
    assert sampled["tokens"] == 1600
    assert sampled["agreement"] == pytest.approx(sampled["agreement_if_own"], abs=0.05)
    assert sampled["log_probability"] == pytest.approx(sampled["log_probability_if_own"], abs=0.15)
    greedy = on_policy_score(frozen, rows_of(written(frozen, do_sample=False, suppress_tokens=None)))
    assert greedy["agreement"] > 0.999


def test_foreign_text_names_the_command_that_mends_it(frozen):
    data = DataArguments(dataset_name="some/chats", dataset_config="en", dataset_split="train_sft")
    foreign = on_policy_score(frozen, rows_of(random_prompts(20, 40)))
    words = on_policy_words(foreign, "some/target", data)
    assert (
        "python -m hf_specauf.regenerate --target some/target --dataset_name some/chats --dataset_config en" in words
    )
    assert "--dataset_split train_sft --out answers.jsonl" in words
    own = on_policy_score(frozen, rows_of(written(frozen, do_sample=True, top_k=0)))
    assert "regenerate" not in on_policy_words(own, "some/target", data)


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
