"""AUFTrainer on tiny real pairs: the loss is exact however a step is computed, and nothing fails silently."""

import copy
import math
import os
import re
import signal
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import EOS, MASK, PAD, ROOT, attach, make_drafter, make_target, overfit, random_prompts
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, TrainerCallback, TrainerState

from hf_specauf import DFlashDraftModel
from hf_specauf.data.rows import RowCollator, pad_token_id
from hf_specauf.layouts.adapters import AdapterBase
from hf_specauf.losses.blocks import EVALUATION_STEP, make_blocks, sample_anchors
from hf_specauf.losses.objectives import LossSpec
from hf_specauf.target import drafter_config
from hf_specauf.train import resume_folder
from hf_specauf.training.callbacks import Interruption, signals
from hf_specauf.training.diagnostics import count_rows, teacher_forced_tau
from hf_specauf.training.forward import BatchLosses
from hf_specauf.training.trainer import AUFConfig, AUFTrainer

pytestmark = pytest.mark.internals

PROMPT, LENGTHS = 8, (42, 11, 24, 13, 36, 10, 18)
BASE = dict(
    use_cpu=True, anchors_per_row=6, max_steps=3, per_device_train_batch_size=8, learning_rate=1e-3,
    lr_scheduler_type="constant", logging_steps=1, save_strategy="no", eval_prompts=3, eval_new_tokens=12,
    disable_tqdm=True,
)  # fmt: skip
SGD = dict(optim="sgd", learning_rate=0.05, max_grad_norm=0.0)
DIAGNOSTICS = ("active_ratio", "active_ratio_all_slots", "support_accuracy", "common_accuracy", "teacher_forced_tau")


def written_by(target, count: int, seed: int = 0) -> torch.Tensor:
    """(count, 42) prompts and what the target wrote after them, never the mask token."""
    return target.generate(
        random_prompts(count, PROMPT, seed), max_new_tokens=34, do_sample=False, suppress_tokens=[MASK]
    )


def token_rows(texts: list[list[int]], prompt: int = PROMPT) -> Dataset:
    supervised = [[0] * prompt + [1] * (len(text) - prompt) for text in texts]
    return Dataset.from_dict({"input_ids": texts, "supervised": supervised})


@pytest.fixture(scope="module")
def pair(tokenizer):
    """A float64 target, 12 rows of uneven length it wrote, and a half-trained drafter: supports of 1 to K-1 slots."""
    target = make_target()
    texts = written_by(target, 12)
    drafter = overfit(make_drafter(target, dtype=torch.float64), target, texts, PROMPT, steps=25)
    rows = token_rows([text[: LENGTHS[i % len(LENGTHS)]] for i, text in enumerate(texts.tolist())])
    return SimpleNamespace(target=target, drafter=drafter, rows=rows, tokenizer=tokenizer)


@pytest.fixture
def build(pair, tmp_path):
    """Builds a trainer of a copy of the pair's drafter; keyword arguments override the trainer's, then `BASE`'s."""

    def build(cls=AUFTrainer, **overrides) -> AUFTrainer:
        given = dict(
            model=pair.drafter, target_model=pair.target, train_dataset=pair.rows, eval_dataset=pair.rows,
            processing_class=pair.tokenizer, peft_config=None, callbacks=None, adapter_base=None,
        )  # fmt: skip
        given |= {key: overrides.pop(key) for key in given if key in overrides}
        given["model"] = deepcopy(given["model"])
        gpus = overrides.pop("n_gpu", None)
        args = AUFConfig(**dict(output_dir=str(tmp_path / "out")) | BASE | overrides)
        if gpus is not None:
            args._n_gpu = gpus
        return cls(args=args, **given)

    return build


def train(trainer: AUFTrainer, **kwargs) -> list[dict]:
    """Train -> the log of each step."""
    trainer.train(**kwargs)
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def weights(trainer: AUFTrainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def assert_same(a: dict, b: dict, rtol: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=rtol * 1e-3)


class BeforeStep(TrainerCallback):
    """Does something to the model just before one step."""

    def __init__(self, step: int, action):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step - 1:
            self.action(model)


# ---- the exact pooled loss


def by_hand(trainer, drafter, rows, step: int):
    """Loss with its graph, and diagnostics, written out: all logits of all slots, then a loop over slots."""
    args, target, config = trainer.args, trainer.target.model, drafter.config
    batch = trainer.data_collator(list(rows))
    spans = batch["supervised"], batch["document_ids"]
    anchors, real = sample_anchors(*spans, args.anchors_per_row, batch["row_ids"], args.seed, step)
    blocks = make_blocks(batch["input_ids"], *spans, anchors, real, config.block_size, config.mask_token_id)
    with torch.no_grad():
        states = target(
            input_ids=batch["input_ids"], attention_mask=(spans[1] >= 0).long(), output_hidden_states=True
        ).hidden_states
        noise = target.get_input_embeddings()(blocks.noise_ids)
    context = torch.cat([states[i + 1] for i in config.target_layer_ids], dim=-1)
    hidden = drafter(noise, context, blocks.attention_mask, blocks.position_ids).last_hidden_state
    log_p = target.lm_head(hidden).log_softmax(-1).view(*anchors.shape, config.block_size, -1)[:, :, 1:]

    until_fail = args.objective.startswith("auf")
    terms, verdicts, count = [], [], dict.fromkeys(("supported", "supported_correct", "valid", "correct"), 0)
    for b, n in real.nonzero().tolist():
        block, alive = [], True
        verdicts.append([])
        for k in range(config.block_size - 1):
            if not blocks.valid[b, n, k]:
                break
            label = blocks.labels[b, n, k]
            right = bool(log_p[b, n, k].argmax() == label)
            count["valid"] += 1
            count["correct"] += right
            if alive or not until_fail:
                weight = math.exp(-k / trainer.loss_spec.gamma) if args.objective.endswith("decay") else 1.0
                block.append((weight, -log_p[b, n, k, label]))
                count["supported"] += 1
                count["supported_correct"] += right
            alive = alive and right
            verdicts[-1].append(right)
        terms.append((b, block))
    values = [(b, sum(w * loss for w, loss in block), sum(w for w, _ in block)) for b, block in terms]
    if args.normalisation == "per_block":
        values = [(b, loss / weight, 1.0) for b, loss, weight in values]
    loss = sum(v for _, v, _ in values) / sum(w for _, _, w in values)
    diagnostics = {
        "active_ratio": count["supported"] / count["valid"],
        "active_ratio_all_slots": count["supported"] / blocks.valid.numel(),
        "support_accuracy": count["supported_correct"] / count["supported"],
        "common_accuracy": count["correct"] / count["valid"],
        "teacher_forced_tau": tau_by_hand(verdicts, config.block_size),
    }
    per_row = [
        sum(v for b, v, _ in values if b == row) / sum(w for b, _, w in values if b == row)
        for row in range(len(batch["input_ids"]))
    ]
    return loss, diagnostics, torch.stack(per_row).mean()


def tau_by_hand(verdicts: list[list[bool]], block_size: int) -> float:
    """1 + alpha_1 + alpha_1 alpha_2 + ..., of blocks whose valid slots are right or wrong."""
    tau, alive = 1.0, 1.0
    for k in range(block_size - 1):
        tested = [block[k] for block in verdicts if len(block) > k and all(block[:k])]
        if not tested:
            break
        alive *= sum(tested) / len(tested)
        tau += alive
    return tau


OBJECTIVES = [
    ("auf", None, "pooled"),
    ("auf", None, "per_block"),
    ("decay", 2.0, "pooled"),
    ("decay", 2.0, "per_block"),
    ("auf_decay", 2.0, "pooled"),
    ("uniform", None, "pooled"),
]


@pytest.mark.own_parameters
@pytest.mark.parametrize("objective, gamma, normalisation", OBJECTIVES)
def test_one_step_equals_a_computation_of_all_logits_by_hand(build, pair, objective, gamma, normalisation):
    trainer = build(
        objective=objective, gamma=gamma, normalisation=normalisation, max_steps=1,
        per_device_train_batch_size=3, gradient_accumulation_steps=4, **SGD,
    )  # fmt: skip
    drafter = deepcopy(pair.drafter)
    loss, diagnostics, mean_of_rows = by_hand(trainer, drafter, trainer.train_dataset, step=0)
    loss.backward()
    (log,) = train(trainer)
    # otherwise a biased mean over micro-batches would pass
    if normalisation == "pooled":
        assert abs(loss.item() / mean_of_rows.item() - 1) > 1e-3
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-6)
    gradients = {name: p.grad for name, p in drafter.named_parameters()}
    norm = torch.stack([g.norm() for g in gradients.values()]).norm().item()
    assert log["grad_norm"] == pytest.approx(norm, rel=1e-6)
    for name, before in pair.drafter.named_parameters():
        step = (before - trainer.model.get_parameter(name)) / SGD["learning_rate"]
        torch.testing.assert_close(step, gradients[name], rtol=1e-6, atol=1e-9)
    assert {key: log[key] for key in DIAGNOSTICS} == pytest.approx(diagnostics)


WAYS = {
    "4 x 2 rows": dict(per_device_train_batch_size=2, gradient_accumulation_steps=4),
    "2 x 4 rows": dict(per_device_train_batch_size=4, gradient_accumulation_steps=2),
    "8 x 1 row": dict(per_device_train_batch_size=1, gradient_accumulation_steps=8),
    "one slot's logits at a time": dict(head_rows_per_chunk=1),
    "gradient checkpointing": dict(activation_checkpointing=True),
}


@pytest.mark.own_parameters
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5], ids=["unclipped", "clipped"])
@pytest.mark.parametrize(
    "objective, gamma, normalisation, ways",
    [(*OBJECTIVES[0], list(WAYS)), (*OBJECTIVES[1], ["4 x 2 rows"]), (*OBJECTIVES[2], ["4 x 2 rows", "8 x 1 row"])],
)
def test_losses_gradients_and_weights_do_not_depend_on_how_a_step_is_computed(
    build, objective, gamma, normalisation, ways, max_grad_norm
):
    # 12 rows: every second step is a short one of 4 rows
    common = SGD | dict(
        objective=objective, gamma=gamma, normalisation=normalisation, max_grad_norm=max_grad_norm, max_steps=4
    )
    whole = build(**common)
    expected = train(whole)
    assert len({entry["active_ratio"] for entry in expected}) == (4 if objective == "auf" else 1)
    assert all(entry["grad_norm"] > 0.5 for entry in expected)  # so that clipping clips
    for way in ways:
        split = build(**common | WAYS[way])
        for ours, theirs in zip(train(split), expected, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6), way  # Trainer sums losses in fp32
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-9), way
            assert {k: ours[k] for k in DIAGNOSTICS} == pytest.approx({k: theirs[k] for k in DIAGNOSTICS}), way
        assert_same(weights(split), weights(whole), rtol=1e-9)


@pytest.mark.parametrize("keys", [dict(logging_steps=2), dict(logging_strategy="no")], ids=["steps", "no"])
def test_accuracy_over_all_slots_costs_nothing_between_logs(build, pair, keys):
    trainer = build(max_steps=4, **keys)
    predicted = []

    def note(head, args, output):
        if not torch.is_grad_enabled():
            predicted.append(trainer.state.global_step + 1)

    handle = pair.target.lm_head.register_forward_hook(note)
    logs = train(trainer)
    handle.remove()
    assert sorted(set(predicted)) == [log["step"] for log in logs] == ([2, 4] if "logging_steps" in keys else [])
    assert all(0 < log["common_accuracy"] < 1 for log in logs)


def test_gradient_checkpointing_recomputes_the_layers(build):
    calls = []
    for on in (False, True):
        trainer = build(activation_checkpointing=on, max_steps=1)
        trainer.model.layers[0].mlp.register_forward_pre_hook(lambda *_, on=on: calls.append(on))
        trainer.train()
    assert calls == [False, True, True]


def test_each_step_draws_new_anchors_and_the_seed_decides_which(build):
    still = dict(learning_rate=0.0, per_device_train_batch_size=12)  # the same rows and weights at every step
    losses = [log["loss"] for seed in (1, 2, 1) for log in train(build(seed=seed, **still))]
    assert len(set(losses)) == 6 and losses[:3] == losses[6:]
    # of two seeds anchors and the order of rows follow data_seed, also 0
    assert [log["loss"] for log in train(build(seed=1, data_seed=0, **still))] == pytest.approx(
        [log["loss"] for log in train(build(seed=2, data_seed=0, **still))]
    )


class DividedByTrainer(AUFTrainer):
    """What Trainer does by default: divide each micro-batch by the number of micro-batches."""

    loss_is_scaled_for_ga = None


def test_trainers_own_division_would_shrink_gradients(build):
    split = dict(per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=1) | SGD
    ours, theirs = build(**split), build(cls=DividedByTrainer, **split)
    assert ours.loss_is_scaled_for_ga is True
    assert ours.model_accepts_loss_kwargs is False
    (right,), (wrong,) = train(ours), train(theirs)
    assert wrong["grad_norm"] == pytest.approx(right["grad_norm"] / 4)


def test_rows_without_a_block_neither_bias_nor_break_a_step(build, pair):
    good = [pair.rows[i]["input_ids"] for i in range(4)]
    some, empty = token_rows(good), dict(input_ids=[5, 6, 7, 8], supervised=[1, 1, 0, 0])  # no context before it
    padded = Dataset.from_list(list(some) + [empty] * 4)
    alone = build(train_dataset=some, per_device_train_batch_size=4, **SGD)
    mixed = build(train_dataset=padded, per_device_train_batch_size=1, gradient_accumulation_steps=8, **SGD)
    for ours, expected in zip(train(mixed), train(alone), strict=True):
        assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-9)
    assert_same(weights(mixed), weights(alone), rtol=1e-9)
    nothing = build(train_dataset=padded, per_device_train_batch_size=1, max_steps=8, **SGD)
    logs = train(nothing)
    assert sum(log["loss"] == log["grad_norm"] == 0.0 for log in logs) == 4
    assert all(math.isfinite(log["loss"]) for log in logs)


def poison(parameter_name: str):
    def action(model):
        model.get_parameter(parameter_name).data.view(-1)[0] = math.nan

    return action


@pytest.mark.parametrize("where", ["drafter", "target"])
def test_nan_stops_training_before_the_optimizer_steps(build, pair, where, tmp_path):
    target = deepcopy(pair.target)
    spoil = poison("fc.weight") if where == "drafter" else lambda model: poison("lm_head.weight")(target)
    trainer = build(
        model=make_drafter(pair.target), target_model=target, save_strategy="steps", save_steps=1, max_steps=5,
        callbacks=[BeforeStep(3, spoil)],
    )  # fmt: skip
    with pytest.raises(FloatingPointError, match=r"of step 3 is not a finite number.*--resume_from_checkpoint"):
        trainer.train()
    assert sorted(os.listdir(tmp_path / "out")) == ["checkpoint-1", "checkpoint-2"]
    last = dict(AutoModel.from_pretrained(tmp_path / "out" / "checkpoint-2").named_parameters())
    for name, parameter in trainer.model.named_parameters():
        changed = (parameter != last[name]).sum().item()
        assert changed == (where == "drafter" and name == "fc.weight")
        assert torch.isfinite(last[name]).all()


# ---- evaluation


@pytest.mark.parametrize("objective, gamma", [("auf", None), ("decay", 2.0)])
def test_evaluation_equals_a_computation_by_hand_for_every_batch_size(build, pair, objective, gamma):
    rows = pair.rows.select(range(7))
    results = []
    for size in (1, 3, 7):
        trainer = build(objective=objective, gamma=gamma, eval_dataset=rows, per_device_eval_batch_size=size)
        results.append(trainer.evaluate())
        assert trainer.evaluate()["eval_loss"] == results[-1]["eval_loss"]  # fixed anchors
    loss, diagnostics, _ = by_hand(trainer, pair.drafter, trainer.eval_dataset, EVALUATION_STEP)
    with attach(pair.target, pair.drafter) as attachment:
        for row in rows.select(np.linspace(0, len(rows) - 1, BASE["eval_prompts"]).astype(int)):
            prompt = torch.tensor([row["input_ids"][: row["supervised"].index(1)]])
            pair.target.generate(
                prompt, max_new_tokens=BASE["eval_new_tokens"], do_sample=False, assistant_model=pair.drafter
            )
    expected = {f"eval_{key}": value for key, value in diagnostics.items()}
    expected |= {"eval_loss": loss.item(), "eval_tau": attachment.acceptance().tau}
    assert expected["eval_tau"] > 1
    for metrics in results:
        assert {key: metrics[key] for key in expected} == pytest.approx(expected, rel=1e-6)


def counted(correct: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Summed counters of blocks (N, K - 1) with so many valid slots each."""
    valid = (torch.arange(correct.shape[1]) < lengths[:, None])[None]
    correct = correct[None] & valid
    nothing = torch.zeros(1)
    return count_rows(
        SimpleNamespace(numerators=nothing, denominators=nothing),
        BatchLosses(valid, SimpleNamespace(weights=valid.float(), correct=correct), None),
        LossSpec.of("uniform", correct.shape[2] + 1, None), block_size=correct.shape[2] + 1,
        anchors_per_row=correct.shape[1], every_prediction=True,
    ).sum(0)  # fmt: skip


def test_teacher_forced_tau_does_not_depend_on_how_short_the_answers_are():
    """The same drafter, right on 4 of 5 slots, on long answers and on answers of 1 to K - 1 tokens [verl-SpeCo#62]."""
    draw, K = torch.Generator().manual_seed(0), 8
    correct = torch.rand(40_000, K - 1, generator=draw) < 0.8
    full = torch.full((len(correct),), K - 1)
    short = torch.randint(1, K, (len(correct),), generator=draw)
    expected = 1 + sum(0.8**k for k in range(1, K))
    on_full, on_short = (teacher_forced_tau(counted(correct, lengths)) for lengths in (full, short))
    # where no answer ends inside a block, it is the mean of correct prefixes
    assert on_full == pytest.approx(1 + correct.long().cumprod(1).sum(1).double().mean().item(), rel=1e-12)
    assert on_full == pytest.approx(expected, rel=0.01) and on_short == pytest.approx(expected, rel=0.02)
    # what was reported before: an end counted as an error
    assert 1 + (correct & (torch.arange(K - 1) < short[:, None])).long().cumprod(1).sum(1).double().mean() < 3.3
    # all right, as far as anybody can see: the longest answer says how far
    ones = torch.ones(4, K - 1, dtype=torch.bool)
    assert teacher_forced_tau(counted(ones, torch.tensor([1, 1, 3, 2]))) == 4
    assert math.isnan(teacher_forced_tau(counted(ones, torch.zeros(4, dtype=torch.long))))


def test_evaluation_does_not_change_training(build):
    plain, evaluated = build(), build(eval_strategy="steps", eval_steps=1, eval_on_start=True)
    for a, b in zip(train(plain), train(evaluated), strict=True):
        assert (a["loss"], a["grad_norm"]) == (b["loss"], b["grad_norm"])
    assert_same(weights(plain), weights(evaluated))
    assert sum("eval_tau" in entry for entry in evaluated.state.log_history) == 4


def test_best_model_is_chosen_by_decoded_tau(build, pair, tmp_path):
    # the first step of a warm-up has learning rate 0, those after it ruin the drafter
    trainer = build(
        metric_for_best_model="eval_tau", load_best_model_at_end=True, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, learning_rate=30.0, lr_scheduler_type="constant_with_warmup",
        warmup_steps=2, optim="sgd",
    )  # fmt: skip
    trainer.train()
    taus = [entry["eval_tau"] for entry in trainer.state.log_history if "eval_tau" in entry]
    assert taus[0] > max(taus[1:])
    assert trainer.state.best_metric == taus[0]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "out" / "checkpoint-1")
    assert_same(weights(trainer), pair.drafter.state_dict())


@pytest.mark.own
def test_auf_starts_on_first_slots_grows_its_support_and_raises_tau(build, pair):
    rows = token_rows(written_by(pair.target, 8, seed=1).tolist())
    trainer = build(
        model=make_drafter(pair.target), train_dataset=rows, eval_dataset=rows, max_steps=100, learning_rate=5e-3,
        anchors_per_row=16, eval_on_start=True, eval_prompts=8, eval_new_tokens=34,
    )  # fmt: skip
    logs = train(trainer)
    start = next(entry for entry in trainer.state.log_history if "eval_tau" in entry)
    first, last = logs[0], logs[-1]
    slots = 3  # K - 1
    assert first["active_ratio"] < 1.2 / slots
    assert last["active_ratio"] > 2 * first["active_ratio"]
    assert all(0 < log["active_ratio"] <= 1 for log in logs)
    assert start["eval_tau"] < 1.2
    assert trainer.evaluate()["eval_tau"] > 1.5


# ---- targets that cannot be decoded with


def recurrent_target(architecture: str, vocab_size: int = 96):
    """A tiny target with a recurrent state. Jamba's cannot be put back, and Qwen3-Next's can."""
    own = dict(mamba_d_state=8, mamba_dt_rank=4, attn_layer_period=2, attn_layer_offset=1)
    if architecture == "qwen3_next":
        own = dict(
            head_dim=8, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8,
            linear_value_head_dim=8, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        )  # fmt: skip
    config = AutoConfig.for_model(
        architecture, vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
        max_position_embeddings=256, eos_token_id=EOS, pad_token_id=PAD, bos_token_id=None, **own,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def test_a_hybrid_target_is_trained_for_and_measured(build):
    target = recurrent_target("qwen3_next")
    trainer = build(model=make_drafter(target), target_model=target, eval_strategy="steps", eval_steps=3)
    assert len(train(trainer)) == 3
    assert trainer.state.log_history[-2]["eval_tau"] >= 1


@pytest.mark.parametrize("where", ["recurrent", "any other reason"])
def test_a_target_nobody_can_draft_for_is_told_at_the_start_and_trained_unmeasured(build, pair, where, capsys):
    target, reason = recurrent_target("jamba"), "JambaForCausalLM cannot be .* reads several tokens on top of its"
    if where != "recurrent":
        target, reason = deepcopy(pair.target), "Qwen3ForCausalLM cannot be .* NotImplementedError: no such cache"

        def generate(*args, **kwargs):
            raise NotImplementedError("no such cache.")

        target.generate = generate
    drafter = make_drafter(target)
    with pytest.raises(ValueError, match=f"{reason}.*Set eval_prompts: 0 to train a drafter all the same"):
        build(model=drafter, target_model=target)
    trainer = build(model=drafter, target_model=target, eval_prompts=0, eval_strategy="steps", eval_steps=3)
    assert ("It is trained all the same" in capsys.readouterr().out) == (where == "recurrent")
    assert len(train(trainer)) == 3 and "eval_loss" in trainer.state.log_history[-2]
    build(model=drafter, target_model=target, eval_dataset=None).train()


def test_a_target_nobody_can_draft_for_is_told_before_the_data_is_touched(build, capsys):
    target = recurrent_target("jamba")
    raw = Dataset.from_dict({"text": ["the quick brown fox jumps over the lazy dog"] * 8})
    with pytest.raises(ValueError, match="on top of its recurrent state"):
        build(model=make_drafter(target), target_model=target, train_dataset=raw, eval_dataset=raw)
    assert "token rows" not in capsys.readouterr().out


def test_a_target_given_by_hand_stops_where_its_chat_ends_too(build, pair, capsys):
    target, end = deepcopy(pair.target), pair.tokenizer.convert_tokens_to_ids("<|end|>")
    target.generation_config.eos_token_id = EOS
    for _ in range(2):
        trainer = build(target_model=target)
        assert target.generation_config.eos_token_id == trainer.model.config.eos_token_id == [EOS, end]
    said = "ends an answer with '<|end|>', and the target's generation_config.eos_token_id names '<|eos|>'"
    assert capsys.readouterr().out.count(said) == 1


def test_an_evaluation_that_fails_in_the_middle_costs_no_step(build, tmp_path, capsys):
    """Trainer evaluates before it saves, so a failure would cost all steps since the last checkpoint."""
    keys = dict(max_steps=8, save_strategy="no", eval_strategy="steps", eval_steps=3)
    trainer = build(**keys)

    def fail(rows):
        raise RuntimeError("no more room for the cache")

    trainer.decoded_tau = fail
    with pytest.raises(RuntimeError, match="no more room"):
        trainer.train()
    assert "step 3 is saved" in capsys.readouterr().out and os.listdir(tmp_path / "out") == ["checkpoint-3"]
    logs = train(build(**keys | dict(eval_prompts=0)), resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert logs == train(build(**keys | dict(eval_prompts=0)))


# ---- checkpoints


def test_checkpoint_holds_the_drafter_alone_in_fp32(build, pair, tmp_path):
    drafter = make_drafter(pair.target)
    trainer = build(model=drafter, save_strategy="steps", save_steps=3)
    trainer.train()
    folder = tmp_path / "out" / "checkpoint-3"
    stored = load_file(folder / "model.safetensors")
    assert_same(stored, weights(trainer))
    assert sum(v.numel() for v in stored.values()) == sum(p.numel() for p in drafter.parameters())
    loaded = AutoModel.from_pretrained(folder)
    assert loaded.dtype == torch.float32
    assert_same(loaded.state_dict(), stored)
    assert "use_cache" not in (folder / "config.json").read_text()


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=4, target_modules="all-linear")], ids=["full", "lora"])
def test_resume_continues_bit_for_bit(build, pair, tmp_path, peft_config):
    # 4 steps an epoch: the checkpoint lies in the middle of one
    common = dict(
        per_device_train_batch_size=1, gradient_accumulation_steps=3, max_steps=6, save_strategy="steps", save_steps=3,
        lr_scheduler_type="linear", peft_config=peft_config,
    )  # fmt: skip
    whole = build(model=make_drafter(pair.target), **common)
    expected = train(whole)
    # an adapter's checkpoint does not hold its base
    fresh = make_drafter(pair.target, seed=0 if peft_config else 1)
    resumed = build(model=fresh, output_dir=str(tmp_path / "again"), seed=42, **common)
    logs = train(resumed, resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert logs == expected
    assert resumed.state.global_step == 6
    assert_same(weights(resumed), weights(whole))


def test_an_adapter_resumes_only_with_its_own_keys(build, tmp_path):
    keys = dict(save_strategy="steps", save_steps=1, max_steps=2)
    build(output_dir=str(tmp_path / "full"), **keys).train()
    build(peft_config=LoraConfig(r=4, target_modules="all-linear"), **keys).train()
    for folder, rank, advice in (
        ("full", 4, "holds a drafter trained in full, and this run trains an adapter: set use_peft: false"),
        ("out", 8, "was trained with r 4, and this run has 8: resume with the LoRA keys of that run"),
    ):
        trainer = build(peft_config=LoraConfig(r=rank, target_modules="all-linear"), **keys)
        with pytest.raises(ValueError, match=advice):
            trainer.train(resume_from_checkpoint=str(tmp_path / folder / "checkpoint-1"))


def test_checkpoints_on_borrowed_layers_are_not_published_while_the_target_is_sharded(build):
    borrowed = AdapterBase("some/target", None, "", [1])
    with pytest.raises(ValueError, match="hub_strategy is every_save.*set hub_strategy: end"):
        build(adapter_base=borrowed, shard_target=True, push_to_hub=True)


def test_lora_trains_the_adapter_alone_and_loads_with_peft(build, pair, tmp_path):
    base = make_drafter(pair.target)
    trainer = build(
        model=base, peft_config=LoraConfig(r=4, target_modules="all-linear"), learning_rate=1e-2,
        save_strategy="steps", save_steps=3, eval_strategy="steps", eval_steps=3,
    )  # fmt: skip
    before = weights(trainer)
    logs = train(trainer)
    assert logs[-1]["loss"] < logs[0]["loss"]
    after = weights(trainer)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("lora_" in name for name in changed)
    (evaluation,) = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluation["eval_tau"] >= 1 and math.isfinite(evaluation["eval_loss"])
    folder = tmp_path / "out" / "checkpoint-3"
    assert all("lora_" in name for name in load_file(folder / "adapter_model.safetensors"))
    assert not (folder / "model.safetensors").exists()
    assert_same(PeftModel.from_pretrained(base, folder).state_dict(), after)


SIGNALS = pytest.mark.parametrize("number", signals().values(), ids=list(signals()))


@SIGNALS
@pytest.mark.parametrize("times", [1, 3])
def test_a_signal_finishes_the_step_saves_and_gives_the_handlers_back(build, tmp_path, number, times):
    def mine(signum, frame):
        raise AssertionError("training let a signal through")

    if number == signal.SIGINT and times > 1:
        pytest.skip("a second Ctrl-C stops at once")
    before = {one: signal.signal(one, mine) for one in signals().values()}
    try:
        trainer = build(
            max_steps=8, enable_jit_checkpoint=True,
            callbacks=[BeforeStep(3, lambda model: [os.kill(os.getpid(), number) for _ in range(times)])],
        )  # fmt: skip
        trainer.train()
        assert {signal.getsignal(one) for one in before} == {mine}
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    assert trainer.state.global_step == 3
    assert os.listdir(tmp_path / "out") == ["checkpoint-3"]
    saved = AutoModel.from_pretrained(tmp_path / "out" / "checkpoint-3", dtype="auto")
    assert_same(saved.state_dict(), weights(trainer))


@SIGNALS
def test_second_ctrl_c_stops_at_once(build, number):
    def twice(model):
        for one in (number, signal.SIGINT):
            os.kill(os.getpid(), one)

    # Where nohup started the tests, SIGHUP would be nobody's.
    previous = signal.getsignal(signal.SIGINT), signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with pytest.raises(KeyboardInterrupt):
            build(callbacks=[BeforeStep(3, twice)]).train()
    finally:
        signal.signal(signal.SIGINT, previous[0])
        signal.signal(signal.SIGHUP, previous[1])


def test_a_run_goes_on_without_its_terminal_where_nohup_asks_for_that_and_ends_in_order_where_not():
    def mine(signum, frame):
        raise AssertionError("the signal was let through")

    previous, stdout = signal.signal(signal.SIGHUP, signal.SIG_IGN), os.dup(1)
    try:
        with Interruption("this step") as told:  # under nohup
            os.kill(os.getpid(), signal.SIGHUP)
        assert not told.noted and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.signal(signal.SIGHUP, mine)
        terminal, its_end = os.openpty()
        os.dup2(its_end, 1)
        with Interruption("this step") as told:
            os.close(its_end)
            os.close(terminal)
            with pytest.raises(OSError):
                os.write(1, b"nobody reads this")
            os.kill(os.getpid(), signal.SIGHUP)
            assert told.noted and os.write(1, b"and this hurts nobody")
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
        signal.signal(signal.SIGHUP, previous)


def test_signals_are_given_back_and_sums_start_clean_after_an_error(build, pair):
    previous = [signal.getsignal(one) for one in signals().values()]
    common = dict(per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=2) | SGD
    expected = train(build(**common))
    spoilt = BeforeStep(1, poison("fc.weight"))
    trainer = build(callbacks=[spoilt], **common)
    with pytest.raises(FloatingPointError):
        trainer.train()
    assert [signal.getsignal(one) for one in signals().values()] == previous
    trainer.model.load_state_dict(pair.drafter.state_dict())
    trainer.remove_callback(spoilt)
    assert [log["loss"] for log in train(trainer)] == [log["loss"] for log in expected]


def test_raw_rows_and_several_sets_are_evaluated(build, pair, tokenizer):
    # a column of that name does not make them token rows
    texts = Dataset.from_dict({"text": ["a quick brown fox jumps over the lazy dog"] * 3, "row": [7, 8, 9]})
    target = make_target(vocab_size=len(tokenizer), bos_token_id=None)
    config = drafter_config(target, num_hidden_layers=1, block_size=4, mask_token_id=2, target_layer_ids=[0, 2])
    trainer = build(
        model=DFlashDraftModel(config), target_model=target, train_dataset=texts,
        eval_dataset={"one": texts, "two": texts.select([0])}, eval_prompts=1,
    )  # fmt: skip
    several = trainer.evaluate()
    assert {"eval_one_loss", "eval_one_tau", "eval_two_loss", "eval_two_tau"} <= set(several)
    alone = trainer.evaluate(texts.select([0]))
    assert alone["eval_loss"] == several["eval_two_loss"] != several["eval_one_loss"]


def test_checkpoints_are_complete_without_secrets_and_the_oldest_go(build, tmp_path):
    trainer = build(
        max_steps=5, save_strategy="steps", save_steps=1, save_total_limit=2, eval_strategy="steps", eval_steps=1,
        metric_for_best_model="eval_loss", hub_token="hf_PLANTED", learning_rate=3.0, optim="sgd",
        lr_scheduler_type="constant_with_warmup", warmup_steps=2,
    )  # fmt: skip
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[0] < min(losses[1:])  # the first is the best, and stays
    assert sorted(os.listdir(tmp_path / "out")) == ["checkpoint-1", "checkpoint-5"]
    for folder in (tmp_path / "out").iterdir():
        assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"} <= set(os.listdir(folder))
        assert not [path for path in folder.iterdir() if b"hf_PLANTED" in path.read_bytes()]
        state = TrainerState.load_from_json(folder / "trainer_state.json")
        assert state.best_model_checkpoint == str(tmp_path / "out" / "checkpoint-1")


def test_the_best_checkpoint_stays_whatever_way_output_dir_is_written(build, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = build(
        output_dir="./out", max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=2,
        eval_strategy="steps", eval_steps=1, metric_for_best_model="eval_loss", learning_rate=3.0, optim="sgd",
        lr_scheduler_type="constant_with_warmup", warmup_steps=2,
    )  # fmt: skip
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[0] < min(losses[1:])
    assert sorted(os.listdir(tmp_path / "out")) == ["checkpoint-1", "checkpoint-4"]


def test_checkpoints_of_an_earlier_run_go_first_and_are_not_resumed_from(build, tmp_path):
    build(max_steps=4, save_strategy="steps", save_steps=2).train()
    seen = []

    class Look(TrainerCallback):
        def on_save(self, args, *others, **kwargs):
            args.resume_from_checkpoint = True
            seen.append((sorted(os.listdir(tmp_path / "out")), Path(resume_folder(args)).name))

    build(max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=2, callbacks=[Look()]).train()
    assert seen == [
        (["checkpoint-1", "checkpoint-4"], "checkpoint-1"),
        (["checkpoint-1", "checkpoint-2"], "checkpoint-2"),
        (["checkpoint-2", "checkpoint-3"], "checkpoint-3"),
    ]


LATE = dict(lr_scheduler_type="constant_with_warmup", max_steps=2, save_strategy="no")


@pytest.mark.parametrize(
    "keys, said",
    [
        (dict(learning_rate=0.0, max_steps=1), "learning_rate is 0: the drafter stays as it is."),
        (
            dict(learning_rate=0.0, muon_learning_rate=0.02, max_steps=1),
            "learning_rate is 0: all of the drafter but the matrices, which Muon trains, stays as it is.",
        ),
        (dict(warmup_steps=4, **LATE), "the warm-up takes 4 steps and the run has 2: it ends at 25% of the learning"),
        (dict(warmup_steps=1.0, num_train_epochs=1.0, **LATE | dict(max_steps=-1)), "the run has 1: it ends at 0%"),
        (dict(warmup_steps=1, **LATE), ""),
    ],
)
def test_a_learning_rate_that_trains_nothing_or_is_never_reached_is_said_as_training_begins(
    build, pair, capsys, keys, said
):
    trainer = build(eval_prompts=0, train_dataset=pair.rows.select(range(4)), eval_dataset=None, **keys)
    capsys.readouterr()
    trainer.train()
    printed = capsys.readouterr().out
    assert said in printed.splitlines()[0]
    assert bool(said) == ("learning_rate is 0" in printed or "the warm-up takes" in printed)


def test_rows_that_were_prepared_for_more_positions_than_the_target_has_are_refused(build, pair):
    texts = random_prompts(3, 300).tolist()
    rows = token_rows([texts[0][:200], texts[1], texts[2][:100]])
    prepared = rows.add_column("length", [200, 300, 100]).add_column("row", [0, 1, 2])
    refused = "row 1 holds a document of 300 tokens, and the target has 256 positions: give prepare_rows positions=256"
    keys = dict(max_length=400, eval_dataset=None, eval_prompts=0)
    for given in (prepared, prepared.remove_columns("length")):
        with pytest.raises(ValueError, match=refused):
            build(train_dataset=given, **keys)
    trainer = build(train_dataset=prepared.remove_columns("length").rename_column("row", "document"), **keys)
    assert trainer.train_dataset["length"][:3] == [200, 256, 100]
    documents = [[0] * 200, [0] * 150 + [1] * 150, [0] * 100]
    packed = prepared.add_column("document_ids", documents)
    assert build(train_dataset=packed, per_device_train_batch_size=1, **keys).train_dataset["length"][1] == 300


def test_training_leaves_the_target_untouched(build, pair, tmp_path):
    target = deepcopy(pair.target)
    for parameter in target.parameters():
        parameter.requires_grad_(True)
    trainer = build(target_model=target, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1)
    trainer.train()
    trained = {id(p) for p in trainer.model.parameters()}
    trained |= {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    for name, parameter in target.named_parameters():
        assert torch.equal(parameter, pair.target.get_parameter(name))
        assert not parameter.requires_grad and parameter.grad is None and id(parameter) not in trained
    assert not target.training
    expected = set(pair.drafter.state_dict())
    for step in (1, 2, 3):
        assert set(load_file(tmp_path / "out" / f"checkpoint-{step}" / "model.safetensors")) == expected


# ---- precision and refusals


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bf16_autocast_trains_fp32_weights(build, dtype):
    target = make_target(dtype=dtype)
    drafter = make_drafter(target)
    trainer = build(model=drafter, target_model=target, bf16=True, eval_strategy="steps", eval_steps=3)
    losses = [log["loss"] for log in train(trainer)]
    exact = [log["loss"] for log in train(build(model=drafter, target_model=target))]
    assert losses == pytest.approx(exact, rel=0.03) and losses != exact
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert not torch.equal(trainer.model.fc.weight, drafter.fc.weight)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (dict(fp16=True), "use bf16: true"),
        (dict(objective="aufff"), "objective is 'aufff'; it must be one of uniform, decay, auf, auf_decay"),
        (dict(normalisation="mean"), "normalisation is 'mean'; it must be one of pooled, per_block"),
        (dict(gamma=7.0), "objective 'auf' has no decay and would ignore it"),
        (dict(objective="decay"), "needs gamma.*block_size is 4"),
        (dict(objective="auf_decay", gamma=0.0), "needs gamma > 0"),
        (dict(remove_unused_columns=True), "remove_unused_columns: True does not apply"),
        (dict(label_smoothing_factor=0.1), "label_smoothing_factor: 0.1 does not apply.*remove the key"),
        (dict(auto_find_batch_size=True), "auto_find_batch_size: True does not apply"),
        (dict(bf16_full_eval=True), "bf16_full_eval: True does not apply"),
        (dict(fp16_full_eval=True), "fp16_full_eval: True does not apply"),
        (dict(eval_do_concat_batches=False), "eval_do_concat_batches: False does not apply"),
        (dict(include_num_input_tokens_seen=True), "include_num_input_tokens_seen: all does not apply"),
        (dict(muon_learning_rate=0.02, optim="sgd"), "optim is sgd, and muon_learning_rate brings.*ignore it"),
        (dict(muon_learning_rate=0.02, adam_beta2=0.95), "adam_beta2 is 0.95, and muon_learning_rate brings"),
        (dict(eval_new_tokens=1), "eval_new_tokens is 1.*eval_prompts: 0"),
        (
            dict(metric_for_best_model="eval_tua", eval_strategy="epoch"),
            "is 'eval_tua', which no.*eval_loss, .*eval_tau",
        ),
        (dict(metric_for_best_model="tau", eval_strategy="epoch", eval_prompts=0), "is 'tau', which no evaluation"),
        (dict(shard_target=True), "shard_target: true spreads the target over processes, and there is one"),
        (dict(processing_class=None), "processing_class is missing"),
        (dict(n_gpu=2), "2 GPUs are visible.*accelerate launch -m hf_specauf.train"),
    ],
)
def test_arguments_that_would_mislead_are_refused(build, overrides, message):
    with pytest.raises(ValueError, match=message):
        build(**overrides)


@pytest.mark.parametrize(
    "names, message",
    [
        (dict(target_modules=["q_proj", "qproj"]), "lora_target_modules names 'qproj'.*silence.*q_proj"),
        (dict(target_modules=["proj"]), "lora_target_modules names 'proj'"),  # PEFT wants all of a name here
        (dict(target_modules="all-linear", modules_to_save=["fc", "nrom"]), "lora_modules_to_save names 'nrom'"),
    ],
)
def test_adapter_names_that_match_nothing_are_refused(build, pair, names, message):
    with pytest.raises(ValueError, match=message):
        build(model=make_drafter(pair.target), peft_config=LoraConfig(r=2, **names))
    found = dict(target_modules=["self_attn.q_proj", "fc"], modules_to_save=["hidden_norm", "norm"])
    trainer = build(model=make_drafter(pair.target), peft_config=LoraConfig(r=2, **found))
    trained = {name.split("base_model.model.")[1] for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert {name.split(".")[-4] for name in trained if "lora_A" in name} == {"q_proj", "fc"}
    assert {"hidden_norm", "norm"} <= {name.split(".")[0] for name in trained}


@pytest.mark.parametrize(
    "drafter, message",
    [
        (lambda target: make_drafter(target, dtype=torch.bfloat16), r"torch.bfloat16.*Model-Optimizer#2322"),
        (lambda target: make_drafter(target, dtype=torch.float16), r"torch.float16.*Model-Optimizer#2322"),
        (lambda target: make_drafter(make_target(hidden_size=16)), r"hidden_size 16 \(target: 32\)"),
        (lambda target: make_drafter(make_target(num_hidden_layers=5)), r"num_target_layers 5 \(target: 4\)"),
    ],
)
def test_drafters_that_cannot_serve_the_target_are_refused(build, pair, drafter, message):
    with pytest.raises(ValueError, match=message):
        build(model=drafter(pair.target))


def test_a_device_without_float64_is_refused(pair, tmp_path):
    args = AUFConfig(output_dir=str(tmp_path), **BASE)
    vars(args)["_setup_devices"] = torch.device("mps")  # what Trainer finds there
    with pytest.raises(ValueError, match="mps, which has no float64.*set use_cpu: true"):
        AUFTrainer(pair.drafter, pair.target, args, train_dataset=pair.rows, processing_class=pair.tokenizer)


def test_flex_attention_is_refused_where_it_cannot_train(build, pair):
    drafter = make_drafter(pair.target)
    drafter.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="flex_attention trains on CUDA only.*use sdpa"):
        build(model=drafter)


@pytest.mark.own
def test_largest_micro_batch_is_tried_and_the_anchors_that_fit_are_named(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    words = [str(tmp_path / "tokenizer"), str(tmp_path / "out"), "1", "125", "20000"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/memory_worker.py"), *words], capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT), "MALLOC_ARENA_MAX": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    printed = dict(line.split(" ", 1) for line in done.stdout.splitlines()[-3:])
    assert "not even one anchor fits" in printed["1"] and "activation_checkpointing: true" in printed["1"]
    told = re.search(r"2 rows of 200 tokens with 64 anchors each: anchors_per_row: (\d+) would fit", printed["125"])
    assert told and int(told[1]) in (32, 16, 8, 4)
    assert printed["20000"] == "fits"


@pytest.mark.own
def test_compiled_drafter_gives_the_same_loss_and_weights(build):
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = build(torch_compile=True, torch_compile_backend="aot_eager", max_steps=2, **SGD)
    logs = train(compiled)  # before another trainer resets what accelerate knows of compilation
    plain = build(max_steps=2, **SGD)
    for ours, theirs in zip(logs, train(plain), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert_same(weights(compiled), weights(plain), rtol=1e-6)


def test_mask_token_in_most_of_the_data_is_refused(build, pair):
    text = pair.rows[0]["input_ids"]
    masked = text[:20] + [MASK] + text[20:]
    for rows in ("train_dataset", "eval_dataset"):
        with pytest.raises(ValueError, match=f"2 of 3 rows contain the mask token \\(id {MASK}, first: row 1\\)"):
            build(**{rows: token_rows([text, masked, masked])})
    spoilt = token_rows([text, masked])
    collate = RowCollator(PAD, MASK)
    rows = [dict(row, row=10 + i) for i, row in enumerate(spoilt)]
    assert collate(rows[:1])["row_ids"].tolist() == [10]
    with pytest.raises(ValueError, match=rf"rows \[11\] contain the mask token \(id {MASK}\)"):
        collate(rows)


def test_padding_is_a_token_that_the_target_has(tokenizer):
    own = copy.deepcopy(tokenizer)
    size = len(own)
    own.add_special_tokens({"pad_token": "[PAD]"})  # as in many fine-tunes of targets that have no row for it
    assert own.pad_token_id == size and pad_token_id(own, size) == own.eos_token_id
    assert pad_token_id(own, size + 1) == size


def test_padding_may_be_any_token_even_the_mask():
    batch = RowCollator(MASK, MASK)([dict(input_ids=[4] * n, supervised=[1] * n, row=n) for n in (3, 5)])
    assert batch["input_ids"][0].tolist() == [4, 4, 4, MASK, MASK]
    assert batch["document_ids"].tolist() == [[0, 0, 0, -1, -1], [0] * 5]
    assert batch["supervised"].sum(1).tolist() == [3, 5]
    assert EOS not in batch["input_ids"]
