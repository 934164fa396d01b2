"""Muon for matrices and AdamW for the rest behave as one optimizer of Trainer."""

import pytest
import torch
from conftest import make_domino, make_drafter, make_target, random_prompts
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file

from hf_specauf.training.optimizer import MuonWithAdamW, _iterate, _iterate_on_grams, orthogonalize
from hf_specauf.training.trainer import AUFConfig, AUFTrainer


def test_matrices_go_to_muon_and_the_rest_to_adamw():
    drafter = make_drafter(make_target())
    drafter.fc.requires_grad_(False)
    optimizer = MuonWithAdamW(drafter, 0.02, 0.003)
    muon, adamw = ({id(p) for p in group["params"]} for group in optimizer.param_groups)
    names = {id(p): name for name, p in drafter.named_parameters()}
    assert all(names[i].endswith("proj.weight") for i in muon) and all("norm" in names[i] for i in adamw)
    assert muon | adamw == set(names) - {id(drafter.fc.weight)}
    drafter = make_domino(make_target())
    names = {id(p): name for name, p in drafter.named_parameters()}
    groups = MuonWithAdamW(drafter, 0.02, 0.003).param_groups
    muon, adamw = ({names[id(p)] for p in group["params"] if p.dim() == 2} for group in groups)
    assert "prefix_gru.weight_hh_l0" in muon and adamw == {"embed_proj.0.weight", "embed_proj.2.weight"}


def test_matrices_are_orthogonalised_in_their_own_dtype_and_batched():
    matrices = torch.randn(3, 48, 20, dtype=torch.float64)
    found = orthogonalize(matrices)
    values = torch.linalg.svdvals(found)
    assert found.dtype == torch.float64 and values.min() > 0.5 and values.max() < 1.3
    for one, alone in zip(found, matrices):  # not mixed up with its neighbours, nor turned
        torch.testing.assert_close(one, orthogonalize(alone.mT[None])[0].mT)
        u, _, v = torch.linalg.svd(alone, full_matrices=False)
        assert torch.cosine_similarity(one.flatten(), (u @ v).flatten(), dim=0) > 0.97


@pytest.mark.parametrize("dtype, near", [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=str)
@pytest.mark.parametrize("rank", [4, 16], ids="rank {}".format)
def test_iterating_on_gram_matrices_is_the_same_iteration(dtype, near, rank):
    """Also where most singular values are 0, and rounding leaves their squares a little below."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(2, *shape, generator=generator) for shape in ((16, rank), (rank, 64)))
    x = (left @ right).to(torch.float64)
    x = x / x.norm(dim=(1, 2), keepdim=True)
    exact = _iterate(x, 5)
    assert (_iterate_on_grams(x.to(dtype), 5) - exact).norm() < near * exact.norm()


@pytest.mark.parametrize("bf16, near", [(False, 0.02), (True, 1e-3)], ids=["fp32", "bf16"])
def test_a_step_is_torchs_muon_which_iterates_in_bf16_and_torchs_adamw(bf16, near):
    drafter, other = make_drafter(make_target()), make_drafter(make_target())
    ours = MuonWithAdamW(drafter, 0.02, 0.003, weight_decay=0.1, bf16=bf16)
    names = dict(other.named_parameters())
    theirs = [
        torch.optim.Muon([p for p in names.values() if p.dim() == 2], lr=0.02, weight_decay=0.1),
        torch.optim.AdamW([p for p in names.values() if p.dim() != 2], 0.003, betas=(0.9, 0.95), weight_decay=0.1),
    ]
    for step in range(3):
        torch.manual_seed(step)
        for name, parameter in drafter.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            names[name].grad = parameter.grad.clone()
        for optimizer in (ours, *theirs):
            optimizer.step()
    for name, parameter in drafter.named_parameters():
        torch.testing.assert_close(parameter, names[name], rtol=near if parameter.dim() == 2 else 1e-6, atol=near / 10)


def test_muon_multiplies_in_bf16_where_training_does(tokenizer, tmp_path):
    for bf16 in (False, True):
        assert build(tokenizer, tmp_path, "out", bf16=bf16).create_optimizer().bf16 is bf16


def build(tokenizer, tmp_path, folder: str, bf16: bool = False, **more) -> AUFTrainer:
    target = make_target(dtype=torch.float32)
    texts = target.generate(random_prompts(8), max_new_tokens=24, do_sample=False, suppress_tokens=[95]).tolist()
    rows = Dataset.from_dict({"input_ids": texts, "supervised": [[0] * 12 + [1] * 24] * 8})
    args = AUFConfig(
        output_dir=str(tmp_path / folder), use_cpu=True, max_steps=4, save_steps=2, per_device_train_batch_size=4,
        anchors_per_row=8, muon_learning_rate=0.02, learning_rate=0.003, lr_scheduler_type="linear",
        eval_prompts=0, disable_tqdm=True, bf16=bf16,
    )  # fmt: skip
    return AUFTrainer(make_drafter(target), target, args, train_dataset=rows, processing_class=tokenizer, **more)


def test_the_schedule_reaches_both_and_resuming_is_bit_for_bit(tokenizer, tmp_path):
    whole, resumed = (build(tokenizer, tmp_path, folder) for folder in ("whole", "resumed"))
    whole.train()
    rates = [group["lr"] for group in whole.optimizer.param_groups]
    assert rates == [0.0, 0.0]
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    ends = [load_file(tmp_path / folder / "checkpoint-4" / "model.safetensors") for folder in ("whole", "resumed")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("modules_to_save", [None, ["norm"]], ids=["matrices alone", "norms too"])
def test_an_adapter_is_trained_by_muon_with_or_without_anything_for_adamw(tokenizer, tmp_path, modules_to_save):
    adapter = LoraConfig(r=2, target_modules="all-linear", modules_to_save=modules_to_save)
    trainer = build(tokenizer, tmp_path, "out", peft_config=adapter)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert [len(group["params"]) > 0 for group in trainer.optimizer.param_groups] == [True, bool(modules_to_save)]
    for name, parameter in trainer.model.named_parameters():
        assert bool((parameter != before[name]).any()) == parameter.requires_grad, name
