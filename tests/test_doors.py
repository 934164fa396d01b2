"""The doors: an objective and a drafter that a contributor adds by one entry of a table each, used end to end."""

import json

import pytest
import torch
from conftest import attach, make_drafter, make_target, random_prompts
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hf_specauf.drafters import DRAFTERS
from hf_specauf.drafters.configuration_dflash import REQUIRED_KEYS, DFlashConfig
from hf_specauf.drafters.modeling_dflash import DFlashDraftModel
from hf_specauf.losses.objectives import OBJECTIVES, Objective
from hf_specauf.publishing.stranger import outputs_of
from hf_specauf.recipe import parse
from hf_specauf.train import main

pytestmark = pytest.mark.internals


class ToyConfig(DFlashConfig):
    """DFlash, whose output is scaled by a learned gate that starts at `gate`."""

    model_type = "specauf_toy"
    required_keys = (*REQUIRED_KEYS, "gate")
    kind = "toy"
    own_keys = {"gate": "where the gate starts (default 1)."}
    gate: float = 1.0


class ToyDraftModel(DFlashDraftModel):
    """The model of a [`ToyConfig`]."""

    config_class = ToyConfig

    def __init__(self, config: ToyConfig):
        super().__init__(config)
        self.norm = GatedNorm(config)


class GatedNorm(nn.RMSNorm):
    """The last norm, times the gate."""

    def __init__(self, config: ToyConfig):
        super().__init__(config.hidden_size, config.rms_norm_eps)
        self.gate = nn.Parameter(torch.tensor(float(config.gate)))

    def forward(self, hidden_states):
        return super().forward(hidden_states) * self.gate


@pytest.fixture
def toy(monkeypatch):
    """The toy drafter, added as the package adds its own."""
    monkeypatch.setitem(DRAFTERS, "toy", (ToyConfig, ToyDraftModel))
    AutoConfig.register(ToyConfig.model_type, ToyConfig, exist_ok=True)
    AutoModel.register(ToyConfig, ToyDraftModel, exist_ok=True)


def test_a_drafter_added_by_one_entry_is_trained_by_a_recipe_and_decodes(toy, command, files, tmp_path):
    main(command(drafter_type="toy", gate=0.5, max_steps=3, output_dir=tmp_path / "out"))
    recipe = json.loads((tmp_path / "out" / "provenance.json").read_text())["recipe"]
    assert recipe["drafter_type"] == "toy" and recipe["gate"] == 0.5
    drafter = AutoModel.from_pretrained(tmp_path / "out")
    assert type(drafter) is ToyDraftModel and drafter.config.gate == 0.5
    assert drafter.norm.gate.item() != 0.5  # it was trained
    target = AutoModelForCausalLM.from_pretrained(files / "target")
    prompt = random_prompts(1, 8)
    keys = dict(max_new_tokens=16, do_sample=False)
    plain = target.generate(prompt, **keys)
    with attach(target, drafter) as attachment:
        assert torch.equal(target.generate(prompt, assistant_model=drafter, **keys), plain)
    assert attachment.acceptance().passes > 0
    evaluated = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert evaluated["lossless"]["different"] == 0
    assert set(outputs_of(drafter)) == {"hidden"}  # what publishing compares


def test_its_own_key_is_refused_for_other_drafters_and_by_them(toy):
    words = ["--target", "a/b", "--dataset_name", "c/d", "--use_cpu", "true"]
    with pytest.raises(
        ValueError, match="gate: of a toy drafter; a dflash drafter has no such thing.*drafter_type: toy"
    ):
        parse([*words, "--gate", "2"])
    with pytest.raises(ValueError, match="emb_dim: of a domino drafter; a toy drafter has no such thing"):
        parse([*words, "--drafter_type", "toy", "--emb_dim", "2"])
    _, draft, _, _ = parse([*words, "--drafter_type", "toy", "--gate", "2"])
    assert draft.own_keys == {"gate": 2.0}


def first_two(right, log_p, support):
    """Weights of the first two slots alone, by how unsure the drafter is of the label."""
    slots = torch.arange(right.shape[-1], device=right.device)
    return torch.where(slots < 2, 1.5 - log_p.exp(), 0.0)


def test_an_objective_added_by_one_entry_is_trained_by_a_recipe(command, tmp_path, monkeypatch):
    entry = Objective("first two", "the first two slots, by how unsure the drafter is", factor=first_two)
    monkeypatch.setitem(OBJECTIVES, "first_two", entry)
    main(command(objective="first_two", block_size=4, max_steps=3, output_dir=tmp_path / "out"))
    record = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert record["recipe"]["objective"] == "first_two" and record["steps"] == 3
    steps = [entry for entry in record["history"] if "loss" in entry]
    # two of three slots are supported, but for blocks cut short
    assert all(0.6 < step["active_ratio"] <= 0.8 for step in steps)


def test_every_drafter_of_the_table_answers_all_that_the_package_asks():
    target = make_target()
    for kind, (config, model) in DRAFTERS.items():
        assert config.kind == kind and model.config_class is config and config.model_type.startswith("specauf_")
        assert set(config.own_keys) <= set(config.__annotations__) | set(DFlashConfig.__annotations__)
        assert config.branches in (1, 2) and "fc" in config.starts_at_random and config.card_tags
    config = make_drafter(target).config
    rows = torch.arange(config.block_size)[config.predicting_slots]
    assert rows.tolist() == [1, 2, 3] and len(rows) == config.predictions
