"""Packed documents do not see each other: not in the target, not in the drafter, not in the loss."""

import pytest
import torch
from conftest import BOS, EOS, GATED, MASK, PAD, make_drafter, make_target
from datasets import Dataset, concatenate_datasets
from transformers import AutoConfig, AutoModelForCausalLM

from hf_specauf.data.rows import RowCollator, pack
from hf_specauf.losses.blocks import row_inputs
from hf_specauf.target import FrozenTarget
from hf_specauf.training.diagnostics import COUNTERS, named
from hf_specauf.training.preflight import check_packing
from hf_specauf.training.trainer import AUFConfig, AUFTrainer

SIZES = [9, 14, 6, 11, 8, 20, 7]


@pytest.fixture(scope="module")
def rows() -> Dataset:
    """Token rows of several sizes, supervised from the fourth token on."""
    draw = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, MASK, (size,), generator=draw).tolist() for size in SIZES]
    rows = Dataset.from_dict({"input_ids": ids, "supervised": [[0] * 3 + [1] * (size - 3) for size in SIZES]})
    return rows.add_column("length", SIZES).add_column("row", list(range(len(SIZES))))


@pytest.fixture(scope="module")
def packed(rows) -> Dataset:
    found, lengths = pack(rows.select_columns(["input_ids", "supervised"]), 32)
    assert len(found) < len(rows) and max(max(ids) for ids in found["document_ids"]) > 0
    return found.add_column("length", lengths).add_column("row", list(range(len(found))))


def gradients(target, rows: Dataset, tmp_path, tokenizer, objective: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss numerator and its gradients over every possible anchor of all rows, in float64."""
    drafter = make_drafter(target, dtype=torch.float64)
    args = AUFConfig(
        output_dir=str(tmp_path), use_cpu=True, anchors_per_row=64, objective=objective,
        per_device_train_batch_size=len(rows), report_to="none", gamma=2.0 if objective == "decay" else None,
    )  # fmt: skip
    trainer = AUFTrainer(drafter, target, args, rows, processing_class=tokenizer)
    inputs = RowCollator(PAD, MASK)(list(rows))
    numerator, counters = trainer._counters(trainer.model, inputs, 0, every_prediction=True)
    numerator.backward()
    counted = counters.sum(0)
    assert named(counted)["valid"] > 50
    kept = [i for i in range(len(counted)) if i != COUNTERS.index("slots")]  # which grows with the number of rows
    found = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
    return numerator.item(), found | {"counters": counted[kept]}


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gemma3_text", "gpt2", "mixtral"])
@pytest.mark.parametrize("objective", ["auf", "decay"])
def test_packed_rows_give_the_gradient_of_the_same_blocks_unpacked(
    architecture, objective, rows, packed, tmp_path, tokenizer
):
    target = make_target(architecture)
    loss, apart = gradients(target, rows, tmp_path, tokenizer, objective)
    packed_loss, together = gradients(target, packed, tmp_path, tokenizer, objective)
    assert packed_loss == pytest.approx(loss, rel=1e-10)
    for name, gradient in apart.items():
        torch.testing.assert_close(together[name], gradient, rtol=1e-8, atol=1e-10, msg=name)


def test_one_wrong_mask_would_show(rows, packed, tmp_path, tokenizer, monkeypatch):
    """The comparison above fails where the target sees a whole row."""
    target = make_target("qwen3")
    loss, _ = gradients(target, rows, tmp_path, tokenizer, "decay")
    leaks = "hf_specauf.training.forward.row_inputs"
    monkeypatch.setattr(leaks, lambda documents: {"attention_mask": (documents >= 0).long()})
    leaky, _ = gradients(target, packed, tmp_path, tokenizer, "decay")
    assert leaky != pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gemma3_text", "gpt2", "mixtral"])
def test_the_targets_taps_of_packed_documents_are_those_of_the_documents_apart(architecture, packed):
    target = make_target(architecture)
    frozen = FrozenTarget(target, make_drafter(target).config)
    ids, documents = (torch.tensor([packed[0][key]]) for key in ("input_ids", "document_ids"))
    check_packing(frozen, ids, documents)
    together = frozen.context(ids, **row_inputs(documents))
    apart = [frozen.context(ids[:, documents[0] == number]) for number in range(documents.max() + 1)]
    torch.testing.assert_close(together, torch.cat(apart, dim=1), rtol=1e-10, atol=1e-10)


def test_a_target_that_lets_packed_documents_see_each_other_is_refused(rows, packed, tmp_path, tokenizer):
    """gpt-oss in transformers 5.23 makes its masks without the positions."""
    target = make_target("gpt_oss", dtype=torch.float32)
    alone = rows.select([0]).add_column("document_ids", [[0] * len(rows[0]["input_ids"])])  # as the longest lie first
    alone = alone.select_columns(packed.column_names)
    args = AUFConfig(output_dir=str(tmp_path), use_cpu=True, eval_prompts=0, report_to="none")
    with pytest.raises(ValueError, match="packing: true does not work with GptOssForCausalLM.*packing: false"):
        AUFTrainer(
            make_drafter(target), target, args, concatenate_datasets([alone, packed]), processing_class=tokenizer
        )


RECURRENT = {
    "jamba": dict(
        GATED, num_experts=2, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, mamba_d_state=8,
        use_mamba_kernels=False,
    ),
    "falcon_h1": dict(GATED, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8),
}  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [("jamba", torch.float32), ("jamba", torch.bfloat16), ("falcon_h1", torch.float32)],
)
def test_a_recurrent_target_whose_documents_soon_forget_each_other_is_refused(architecture, dtype, packed):
    special = dict(pad_token_id=PAD, eos_token_id=EOS, bos_token_id=BOS)
    target = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **RECURRENT[architecture], **special))
    for parameter in target.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(4.0)  # text that is not one token for ever
    frozen = FrozenTarget(target.to(dtype).eval(), make_drafter(target).config)
    ids, documents = (torch.tensor([packed[0][key]]) for key in ("input_ids", "document_ids"))
    with pytest.raises(ValueError, match="so they see each other.*packing: false"):
        check_packing(frozen, ids, documents)


def test_documents_kept_apart_in_a_batch_of_one_row_alone_are_refused_where_training_runs_two(
    packed, tmp_path, tokenizer
):
    """FlashAttention's rule: it takes a fresh start of positions for a boundary in one row, and not in two
    [transformers#33268]."""
    target = make_target("qwen3", dtype=torch.float32)
    backbone = target.base_model
    plain = backbone.forward

    def like_flash_attention(input_ids, position_ids=None, **kwargs):
        if len(input_ids) > 1:
            position_ids = None
        return plain(input_ids=input_ids, position_ids=position_ids, **kwargs)

    backbone.forward = like_flash_attention

    def build(rows_at_once: int) -> AUFTrainer:
        args = AUFConfig(
            output_dir=str(tmp_path), use_cpu=True, eval_prompts=0, report_to="none",
            per_device_train_batch_size=rows_at_once,
        )  # fmt: skip
        return AUFTrainer(make_drafter(target), target, args, packed, processing_class=tokenizer)

    build(1)
    with pytest.raises(ValueError, match="and 2 rows at once.*per_device_train_batch_size: 1 .*packing: false"):
        build(4)
    backbone.forward = plain
    build(4)


def test_prompts_of_an_evaluation_are_spread_over_all_held_out_rows(rows, tmp_path, tokenizer):
    """The sources of a mixture stand one after the other."""
    target = make_target("qwen3", dtype=torch.float32)
    args = AUFConfig(output_dir=str(tmp_path), use_cpu=True, eval_prompts=3, report_to="none")
    trainer = AUFTrainer(make_drafter(target), target, args, rows, rows, processing_class=tokenizer)
    assert [prompt[0].tolist() for prompt in trainer.eval_prompts()] == [rows[i]["input_ids"][:3] for i in (0, 3, 6)]
    assert len(trainer.eval_prompts(rows.select([0, 1]))) == 2


def test_rows_of_one_document_keep_the_plain_attention_mask():
    documents = torch.tensor([[0, 0, 0, -1], [0, 0, 0, 0]])
    assert row_inputs(documents)["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    packed = torch.tensor([[0, 0, 1, -1], [0, 0, 0, 0]])
    assert row_inputs(packed)["position_ids"].tolist() == [[0, 1, 0, 0], [0, 1, 2, 3]]
