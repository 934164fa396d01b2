"""Training a Domino drafter: two branches, one exact loss however a step is computed, and a folder that serves."""

import json
import math
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import attach, make_domino, make_drafter, make_target, overfit
from peft import LoraConfig
from test_domino import ADAPTERS
from test_trainer import BASE as DFLASH_BASE
from test_trainer import LENGTHS, PROMPT, SGD, assert_same, token_rows, train, weights, written_by
from transformers import AutoModel

from hf_specauf import AUFConfig, AUFTrainer, DominoDraftModel
from hf_specauf.losses.blocks import EVALUATION_STEP, make_blocks, sample_anchors
from hf_specauf.losses.objectives import objectives_for
from hf_specauf.train import main

pytestmark = pytest.mark.internals

BASE = DFLASH_BASE | dict(objective="b_auf")


@pytest.fixture(scope="module")
def pair(tokenizer):
    """A float64 target, 12 rows of uneven length it wrote, and half-trained Domino drafters of both alignments."""
    target = make_target()
    texts = written_by(target, 12)
    drafters = {}
    for shift_label in (True, False):
        drafter = make_domino(target, dtype=torch.float64, shift_label=shift_label)
        drafters[shift_label] = overfit(drafter, target, texts, PROMPT, steps=20)
        drafter.embed_proj[2].weight.data.mul_(12)  # so that the two branches fail in different slots
    rows = token_rows([text[: LENGTHS[i % len(LENGTHS)]] for i, text in enumerate(texts.tolist())])
    return SimpleNamespace(target=target, drafters=drafters, rows=rows, tokenizer=tokenizer)


@pytest.fixture
def build(pair, tmp_path):
    def build(shift_label=True, model=None, peft_config=None, **overrides) -> AUFTrainer:
        args = AUFConfig(**dict(output_dir=str(tmp_path / "out")) | BASE | overrides)
        return AUFTrainer(
            model=deepcopy(model or pair.drafters[shift_label]), target_model=pair.target, args=args,
            train_dataset=pair.rows, eval_dataset=pair.rows, processing_class=pair.tokenizer, peft_config=peft_config,
        )  # fmt: skip

    return build


def by_hand(trainer, drafter, rows, step: int, of_base: float):
    """lambda * base + (1 - lambda) * final, written out from all logits of both branches."""
    args, target, config = trainer.args, trainer.target.model, drafter.config
    batch = trainer.data_collator(list(rows))
    ids, spans = batch["input_ids"], (batch["supervised"], batch["document_ids"])
    anchors, real = sample_anchors(*spans, args.anchors_per_row, batch["row_ids"], args.seed, step)
    count, predictions = config.block_size, config.block_size - (not config.shift_label)
    blocks = make_blocks(ids, *spans, anchors, real, count, config.mask_token_id, predictions=predictions)
    with torch.no_grad():
        states = target(input_ids=ids, attention_mask=(spans[1] >= 0).long(), output_hidden_states=True).hidden_states
        embedding = target.get_input_embeddings()
        noise = embedding(blocks.noise_ids)
    context = torch.cat([states[i + 1] for i in config.target_layer_ids], dim=-1)
    hidden = drafter(noise, context, blocks.attention_mask, blocks.position_ids).last_hidden_state
    hidden = hidden.view(*anchors.shape, count, -1)

    sums = {"base": [0.0, 0.0], "final": [0.0, 0.0]}
    kind, decays = args.objective.removesuffix("_decay"), args.objective.endswith("decay")
    for b, n in real.nonzero().tolist():
        a, state, alive = anchors[b, n].item(), None, {"base": True, "final": True}
        for j in range(predictions):
            if a + j + 1 >= ids.shape[1] or not spans[0][b, a + j + 1]:
                break
            out, state = drafter.prefix_gru(embedding(ids[b, a + j])[None, None], state)
            row = hidden[b, n, j if config.shift_label else j + 1]
            logits = {"base": target.lm_head(row)}
            logits["final"] = logits["base"]
            if j >= config.pure_draft_prefix_len:
                logits["final"] = logits["base"] + drafter.embed_proj(torch.cat([row, out[0, 0]]))
            supported = {
                "base": kind == "domino" or alive["base"],
                "final": {"domino": True, "b_auf": True, "s_auf": alive["base"], "f_auf": alive["final"]}[kind],
            }
            for branch, is_supported in supported.items():
                if is_supported:
                    weight = math.exp(-j / trainer.loss_spec.gamma) if decays else 1.0
                    sums[branch][0] += -weight * logits[branch].log_softmax(-1)[ids[b, a + j + 1]]
                    sums[branch][1] += weight
            for branch in alive:
                alive[branch] &= bool(logits[branch].argmax() == ids[b, a + j + 1])
    means = {branch: numerator / denominator for branch, (numerator, denominator) in sums.items()}
    return of_base * means["base"] + (1 - of_base) * means["final"], means, sums


@pytest.mark.own_parameters
@pytest.mark.parametrize("shift_label", [True, False], ids=["shifted", "unshifted"])
@pytest.mark.parametrize("objective", objectives_for(2))
def test_one_step_equals_a_computation_of_all_logits_by_hand(build, pair, objective, shift_label):
    gamma = 2.0 if objective.endswith("decay") else None
    # learning rate 0 in the first step of a linear warm-up, so that the second starts from known weights
    trainer = build(
        shift_label, objective=objective, gamma=gamma, max_steps=2, per_device_train_batch_size=3,
        gradient_accumulation_steps=4, **SGD | dict(lr_scheduler_type="constant_with_warmup", warmup_steps=1),
    )  # fmt: skip
    drafter = deepcopy(pair.drafters[shift_label])
    loss, means, sums = by_hand(trainer, drafter, trainer.train_dataset, step=1, of_base=0.5)
    loss.backward()
    logs = train(trainer)
    assert [log["lambda"] for log in logs] == [1.0, 0.5]
    _, only_base, _ = by_hand(trainer, drafter, trainer.train_dataset, step=0, of_base=1.0)
    assert logs[0]["loss"] == pytest.approx(only_base["base"].item(), rel=1e-6)
    assert logs[1]["loss"] == pytest.approx(loss.item(), rel=1e-6)
    ratio = sums["base"][1] / sums["final"][1]
    assert (ratio == 1) == objective.startswith(("domino", "s_auf"))  # else two denominators are at work
    gradients = {name: p.grad for name, p in drafter.named_parameters()}
    norm = torch.stack([g.norm() for g in gradients.values()]).norm().item()
    assert logs[1]["grad_norm"] == pytest.approx(norm, rel=1e-6)
    for name, before in pair.drafters[shift_label].named_parameters():
        step = (before - trainer.model.get_parameter(name)) / SGD["learning_rate"]
        torch.testing.assert_close(step, gradients[name], rtol=1e-6, atol=1e-9)
        assert gradients[name].abs().max() > 0, name


WAYS = {
    "4 x 2 rows": dict(per_device_train_batch_size=2, gradient_accumulation_steps=4),
    "8 x 1 row": dict(per_device_train_batch_size=1, gradient_accumulation_steps=8),
    "one slot's logits at a time": dict(head_rows_per_chunk=1),
    "gradient checkpointing": dict(activation_checkpointing=True),
}


@pytest.mark.own_parameters
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5], ids=["unclipped", "clipped"])
@pytest.mark.parametrize(
    "objective, normalisation",
    [(name, "pooled") for name in objectives_for(2)] + [("b_auf", "per_block"), ("s_auf", "per_block")],
)
def test_losses_gradients_and_weights_do_not_depend_on_how_a_step_is_computed(
    build, objective, normalisation, max_grad_norm
):
    common = SGD | dict(objective=objective, normalisation=normalisation, max_grad_norm=max_grad_norm, max_steps=4)
    common |= dict(gamma=2.0 if objective.endswith("decay") else None)
    whole = build(**common)
    expected = train(whole)
    assert all(entry["grad_norm"] > 0.5 for entry in expected)
    ways = WAYS if objective in ("b_auf", "f_auf") and not max_grad_norm else ["4 x 2 rows"]
    for way in ways:
        split = build(**common | WAYS[way])
        for ours, theirs in zip(train(split), expected, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6), way
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-9), way
            for key in ("active_ratio", "base_active_ratio", "common_accuracy", "teacher_forced_tau", "lambda"):
                assert ours[key] == pytest.approx(theirs[key]), way
        assert_same(weights(split), weights(whole), rtol=1e-9)


def test_at_lambda_1_the_causal_heads_gradient_is_exactly_zero_and_at_0_the_base_branch_adds_nothing(build, pair):
    trainer = build(max_steps=4, lambda_decay_ratio=0.5, per_device_train_batch_size=12, **SGD)
    logs = train(trainer)
    assert [log["lambda"] for log in logs] == [1.0, 0.5, 0.0, 0.0]
    one = build(max_steps=1, per_device_train_batch_size=12, **SGD)
    train(one)
    for name, before in pair.drafters[True].named_parameters():
        moved = (one.model.get_parameter(name) - before).abs().max() > 0
        assert moved != name.startswith(("prefix_gru", "embed_proj")), name
    still = build(max_steps=4, lambda_decay_ratio=0.5, per_device_train_batch_size=12, **SGD | dict(learning_rate=0.0))
    for step, log in enumerate(train(still)):
        _, means, _ = by_hand(still, pair.drafters[True], still.train_dataset, step, 0.0)
        if step != 1:
            assert log["loss"] == pytest.approx(means["base" if step == 0 else "final"].item(), rel=1e-6)


@pytest.mark.parametrize("objective", ["b_auf", "s_auf", "f_auf"])
def test_evaluation_is_of_the_final_branch_and_decodes_with_the_causal_head(build, pair, objective):
    results = [build(objective=objective, per_device_eval_batch_size=size).evaluate() for size in (1, 5, 12)]
    trainer = build(objective=objective)
    _, means, _ = by_hand(trainer, pair.drafters[True], trainer.eval_dataset, EVALUATION_STEP, 0.0)
    with attach(pair.target, pair.drafters[True]) as attachment:
        for row in pair.rows.select(np.linspace(0, len(pair.rows) - 1, BASE["eval_prompts"]).astype(int)):
            prompt = torch.tensor([row["input_ids"][: row["supervised"].index(1)]])
            pair.target.generate(
                prompt, max_new_tokens=BASE["eval_new_tokens"], do_sample=False, assistant_model=pair.drafters[True]
            )
    for metrics in results:
        assert metrics["eval_loss"] == pytest.approx(means["final"].item(), rel=1e-6)
        assert metrics["eval_tau"] == attachment.acceptance().tau > 1
        assert metrics["eval_teacher_forced_tau"] == pytest.approx(results[0]["eval_teacher_forced_tau"])


def test_training_raises_decoded_tau_and_resumes_bit_for_bit(build, pair, tmp_path):
    keys = dict(max_steps=60, learning_rate=5e-3, per_device_train_batch_size=6, save_strategy="steps", save_steps=30)
    whole = build(model=make_domino(pair.target), **keys)
    before = whole.evaluate()["eval_tau"]
    whole.train()
    assert whole.evaluate()["eval_tau"] > before + 0.3
    again = build(model=make_domino(pair.target), **keys)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-30"))
    assert_same(weights(again), weights(whole))
    assert (tmp_path / "out" / "checkpoint-60" / "custom_generate" / "generate.py").is_file()


def test_bf16_autocast_trains_over_fp32_weights_with_a_loss_near_fp32s(build, pair):
    drafter = pair.drafters[True]
    logs = [train(build(model=deepcopy(drafter).float(), bf16=bf16, objective="f_auf")) for bf16 in (False, True)]
    assert [log["loss"] for log in logs[1]] == pytest.approx([log["loss"] for log in logs[0]], rel=0.05)
    assert logs[0][0]["loss"] != logs[1][0]["loss"]


@pytest.mark.parametrize("way", ADAPTERS)
def test_an_adapter_with_the_head_by_lora_or_in_full_trains_all_it_should(build, pair, way):
    config = LoraConfig(r=2, **ADAPTERS[way])
    trainer = build(peft_config=config, max_steps=4, learning_rate=1e-2)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    train(trainer)
    for name, parameter in trainer.model.named_parameters():
        assert bool((parameter != before[name]).any()) == parameter.requires_grad, name
    split = build(peft_config=config, max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=4, **SGD)
    whole = build(peft_config=config, max_steps=2, **SGD)
    assert [log["loss"] for log in train(split)] == pytest.approx([log["loss"] for log in train(whole)], rel=1e-6)


@pytest.mark.parametrize(
    "model, keys, message",
    [
        (None, dict(objective="auf"), "'auf' is not for a specauf_domino drafter.*domino_decay, b_auf"),
        ("dflash", dict(objective="b_auf"), "not for a specauf_dflash drafter.*Change objective, or drafter"),
        (None, dict(objective="auf", lambda_decay_ratio=0.5), "has no base branch.*remove the key"),
        (None, dict(lambda_decay_ratio=1.5), r"must be (in \(0, 1\]|a finite number of at least 0 and at most 1)"),
        (None, dict(lambda_decay_ratio=0.0), r"must be (in \(0, 1\]|a finite number of at least 0 and at most 1)"),
        (None, dict(objective="f_auf", normalisation="per_block"), "Use normalisation: pooled"),
        (None, dict(objective="b_auf", gamma=2.0), "no decay and would ignore it"),
    ],
)  # fmt: skip
def test_objectives_and_keys_that_do_not_fit_are_refused(build, pair, model, keys, message):
    model = make_drafter(pair.target) if model == "dflash" else None
    with pytest.raises(ValueError, match=message):
        build(model=model, **keys)


def test_command_leaves_a_domino_drafter_that_serves(command, files, tmp_path, capsys):
    head = dict(gru_hidden_dim=8, emb_dim=4)
    main(command(drafter_type="domino", objective="b_auf_decay", gamma=2, **head, shift_label="false"))
    printed = capsys.readouterr().out
    assert "objective: b_auf_decay, gamma 2" in printed
    drafter = AutoModel.from_pretrained(tmp_path / "out")
    assert isinstance(drafter, DominoDraftModel)
    assert (drafter.config.gru_hidden_dim, drafter.config.emb_dim, drafter.config.shift_label) == (8, 4, False)
    record = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert record["recipe"]["drafter_type"] == "domino" and record["recipe"]["pure_draft_prefix_len"] == 1
    evaluation = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert evaluation["lossless"]["different"] == 0
    assert (tmp_path / "out" / "custom_generate" / "generate.py").is_file()
