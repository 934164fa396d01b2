"""Every file of `recipes/`: against the published config of its target, run on a tiny target of the same kind, and as
the table of `recipes/README.md` describes it."""

import copy
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT
from peft import get_peft_model
from test_tokens import GOLDEN, model_tokenizer
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from trl import TrlParser

from hf_specauf import evaluate
from hf_specauf.drafters.modeling_dflash import DFlashDraftModel
from hf_specauf.layouts.adapters import borrow
from hf_specauf.recipe import parse
from hf_specauf.regenerate import RegenerateArguments
from hf_specauf.target import default_target_layer_ids, drafter_config
from hf_specauf.train import main

PUBLISHED = json.loads((ROOT / "tests" / "published_configs.json").read_text())
RECIPES = sorted(
    path for path in (ROOT / "recipes").glob("*/*.yaml") if path.parent.name not in ("accelerate", "quickstart")
)
# a tiny target of the same architecture; small experts and windows
TINY = {
    "qwen3": {},
    "llama": {},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
    "gemma3": {"sliding_window": 16, "query_pre_attn_scalar": 8},
    "qwen3_5": dict(
        linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"] * 4,
    ),
}  # fmt: skip
TEMPLATES = {
    "qwen3": GOLDEN["qwen3, thinking off"][:2],
    "llama": GOLDEN["llama-3.1"][:2],
    "gpt_oss": GOLDEN["gpt-oss"][:2],
    "gemma3": GOLDEN["gemma-3"][:2],
    "qwen3_5": ("qwen3_5_nothink.jinja", GOLDEN["qwen3, thinking off"][1]),
}
TABLE = (ROOT / "recipes/README.md").read_text()
each_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")


def parsed(path: Path):
    return parse(["--config", str(path), "--use_cpu", "true"])


@each_recipe
def test_recipe_fits_the_published_config_of_its_target(path):
    keys, (target_args, draft, data, args) = yaml.safe_load(path.read_text()), parsed(path)
    published = PUBLISHED[target_args.target]
    layers = draft.init_from_target_layers
    shape = dict(
        num_hidden_layers=len(layers) if layers else draft.num_draft_layers, block_size=draft.block_size,
        mask_token_id=draft.mask_token_id, target_layer_ids=draft.target_layer_ids,
    )  # fmt: skip
    if draft.drafter is not None:  # keeps its own
        shape = copy.copy(PUBLISHED[draft.drafter])
        assert shape.pop("note") and shape.pop("target") == target_args.target
    with torch.device("meta"):
        target = AutoModelForCausalLM.from_config(AutoConfig.for_model(published["model_type"], **published["config"]))
        shape |= dict(kind=draft.kind, own_keys=draft.own_keys, intermediate_size=draft.draft_intermediate_size)
        config = drafter_config(target, **shape)
        drafter = borrow(target, config, layers, frozen=True) if layers else AutoModel.from_config(config)
        millions = sum(parameter.numel() for parameter in drafter.parameters()) / 1e6
        adapted = get_peft_model(drafter, draft.peft_config()) if draft.use_peft else drafter
    text = published["config"].get("text_config", published["config"])
    assert (config.hidden_size, config.vocab_size) == (text["hidden_size"], text["vocab_size"])
    assert config.num_target_layers == text["num_hidden_layers"]
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": text["rope_theta"]}
    assert config.max_position_embeddings == text["max_position_embeddings"]
    assert config.target_layer_ids == default_target_layer_ids(text["num_hidden_layers"])
    if layers:  # the deepest ones
        assert layers == list(range(text["num_hidden_layers"] - len(layers), text["num_hidden_layers"]))
    # a row of the embedding that no text uses
    assert config.mask_token_id < config.vocab_size
    assert config.mask_token_id in (published["last_token_id"] + 1, *published.get("reserved", []))
    assert data.eval_rows and args.bf16 is True
    assert (path.stem if draft.use_peft else args.objective) in keys["output_dir"].replace("-", "_")
    # the table of recipes/README.md
    name = f"{path.parent.name}/{path.stem}"
    [row] = [line for line in TABLE.splitlines() if f"[{name}]({name}.yaml)" in line]
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad) / 1e6
    size = f"{trained:.0f} M of {millions:.0f} M" if draft.use_peft else f"{millions:.0f} M"
    assert f"| {size} |" in row and "measured:" not in row
    header = " ".join(path.read_text().split("\n\n")[0].replace("\n#", " ").split())
    memory, hours, tau = re.search(r"expected: (\d+) GB \| expected: (\d+) \| expected: ([\d.]+) \|", row).groups()
    hours += " hour on" if hours == "1" else " hours on"
    assert f"Expected: {memory} GB" in header and hours in header and f"{tau} at the end" in header
    # at least the weights, and gradients and what AdamW keeps of the trained ones
    bits = {"bnb-4bit": 4.5}.get(target_args.target_quantization, 4.5 if published["model_type"] == "gpt_oss" else 16)
    weights = sum(parameter.numel() for parameter in target.parameters())
    assert int(memory) > weights * bits / 8e9 + (millions * 4 + trained * 12) / 1e3
    assert name in header and f"{path.parent.name}/{path.name}" in header


def tiny_target(folder: Path, model_type: str, layers: int, hidden: int = 32):
    """A tiny target folder of an architecture, with the chat template of its family."""
    tokenizer = model_tokenizer(*TEMPLATES[model_type])
    shape = dict(
        hidden_size=hidden, num_attention_heads=4, num_key_value_heads=2, head_dim=hidden // 4,
        intermediate_size=2 * hidden, num_hidden_layers=layers, vocab_size=len(tokenizer),
        max_position_embeddings=512, **TINY[model_type],
    )  # fmt: skip
    ids = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None)
    if model_type in ("gemma3", "qwen3_5"):
        vision = {}  # Qwen3.5's text model is loaded alone
        if model_type == "gemma3":
            vision = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
            vision |= dict(image_size=28, patch_size=14)
        config = AutoConfig.for_model(model_type, text_config=shape | ids, vision_config=vision, **ids)
        target = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    else:
        config = AutoConfig.for_model(model_type, **shape, **ids)
        target = AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager")
    target.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@each_recipe
def test_recipe_trains_scaled_down_on_a_tiny_target_of_the_same_architecture(path, files, tmp_path):
    keys, (target_args, draft, *_) = yaml.safe_load(path.read_text()), parsed(path)
    model_type = PUBLISHED[target_args.target]["model_type"]
    hidden = 128 if target_args.target_quantization else 32  # what bitsandbytes packs
    tiny_target(tmp_path / "target", model_type, layers=8, hidden=hidden)
    small = copy.deepcopy(keys)
    small |= dict(
        target=str(tmp_path / "target"), dataset_name=str(files / "chat.jsonl"), max_length=256,
        mask_token_id=2, target_layer_ids=[1, 2, 4, 5, 6], anchors_per_row=16, output_dir=str(tmp_path / "out"),
        target_dtype="float32", save_dtype="float32", bf16=False, use_cpu=True, max_steps=2, eval_steps=2,
        save_steps=2, gradient_accumulation_steps=2, eval_rows=2, eval_prompts=1, eval_new_tokens=4, disable_tqdm=True,
    )  # fmt: skip
    if "init_from_target_layers" in keys:
        small["init_from_target_layers"] = [3, 6]
    if "drafter" in keys:  # keeps its mask token and taps
        target = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
        shape = dict(mask_token_id=small.pop("mask_token_id"), target_layer_ids=small.pop("target_layer_ids"))
        DFlashDraftModel(drafter_config(target, num_hidden_layers=5, block_size=16, **shape)).save_pretrained(
            tmp_path / "base"
        )
        small["drafter"] = str(tmp_path / "base")
    for key in ("target_device_map", "draft_intermediate_size"):  # for GPUs; for this target
        small.pop(key, None)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(small))
    main(["--config", str(recipe)])
    config = AutoModel.from_pretrained(tmp_path / "out").config
    assert config.chat_template_kwargs == draft.chat_template_kwargs and config.chat_template_hash
    layers = len(small.get("init_from_target_layers", [])) or draft.num_draft_layers or 5
    assert (config.block_size, config.num_hidden_layers) == (draft.block_size or 16, layers)
    assert (tmp_path / "out/adapter/adapter_model.safetensors").is_file() == ("use_peft" in keys)
    record = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert record["steps"] == 2 and record["on_policy"]["tokens"] > 0
    unscaled = ("objective", "learning_rate", "lr_scheduler_type", "activation_checkpointing", "packing")
    assert all(record["recipe"][key] == keys[key] for key in unscaled if key in keys)
    if target_args.target_quantization:
        assert record["recipe"]["target_quantization"] == target_args.target_quantization
        words = dict(target=tmp_path / "target", drafter=tmp_path / "out", prompts=files / "chat.jsonl", count=2)
        words |= dict(max_new_tokens=8, target_quantization=target_args.target_quantization, out=tmp_path / "eval")
        evaluate.main([word for key, value in words.items() for word in (f"--{key}", str(value))])
        found = json.loads((tmp_path / "eval/eval.json").read_text())
        assert found["conditions"]["target_quantization"] == "bnb-4bit" and found["acceptance"]["tau"] >= 1


def keys_of(name: str) -> dict:
    return yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())


def test_baselines_differ_from_auf_in_the_objective_alone():
    for pair in ("qwen3-8b/dflash_{}", "qwen3-8b/dflash_{}_1gpu", "smollm2-135m/dflash_{}"):
        auf, decay = (keys_of(pair.format(objective)) for objective in ("auf", "decay"))
        assert (auf.pop("objective"), decay.pop("objective")) == ("auf", "decay")
        assert auf.pop("output_dir") != decay.pop("output_dir") and auf == decay


def test_one_gpu_takes_as_many_rows_a_step_as_the_papers_eight():
    own = ("num_train_epochs", "output_dir", "eval_steps", "save_steps")
    for kind in ("dflash_auf", "dflash_decay", "domino_b_auf"):
        paper, one = keys_of(f"qwen3-8b/{kind}"), keys_of(f"qwen3-8b/{kind}_1gpu")
        paper["gradient_accumulation_steps"] *= 8
        assert all(paper.pop(key) != one.pop(key) for key in own) and paper == one
    for kind in ("lora_adapt", "lora_borrow"):
        path = ROOT / f"recipes/qwen3-8b/{kind}.yaml"
        [line] = re.findall(r"--config_file \S+ -m hf_specauf.train (.*)", path.read_text().replace("\\\n#", ""))
        one, eight = (
            parse([*words, "--use_cpu", "true"])[3] for words in (["--config", str(path)], shlex.split(line))
        )
        assert eight.gradient_accumulation_steps * 8 == one.gradient_accumulation_steps == 8


def test_every_recipe_is_in_the_table_and_the_table_names_no_other():
    table = set(re.findall(r"\]\(([\w.-]+/[\w.-]+\.yaml)\)", TABLE))
    files = {f"{path.parent.name}/{path.name}" for path in (ROOT / "recipes").glob("*/*.yaml")}
    assert table == {name for name in files if not name.startswith("accelerate/")}


def test_slurm_file_hands_accelerate_a_command_it_parses(tmp_path):
    """Run by bash, with stand-ins for the cluster's `srun` and `scontrol`, up to the launcher's own arguments."""
    script = ROOT / "recipes/slurm/train.sbatch"
    for name, body in (
        ("srun", 'echo "$SRUN_CPUS_PER_TASK $TORCH_ELASTIC_SHUTDOWN_TIMEOUT"; exec "$@"'),
        ("scontrol", "printf 'node1\\nnode2\\n'"),
        ("accelerate", 'printf "%s\\n" "$@"'),
    ):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = dict(JOB_NODELIST="node[1-2]", JOB_ID="77", NNODES="2", GPUS_ON_NODE="8", NODEID="1", CPUS_PER_TASK="64")
    done = subprocess.run(
        ["bash", str(script), "recipes/qwen3-8b/dflash_auf.yaml", "--objective", "decay"],
        env={f"SLURM_{key}": value for key, value in slurm.items()} | {"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [log] = re.findall(r"#SBATCH --output=(\S+)", script.read_text())
    assert "/" not in log  # Slurm makes no folder for it
    cpus, *words = done.stdout.splitlines()
    [notice] = re.findall(r"#SBATCH --signal=INT@(\d+)", script.read_text())
    assert cpus.split()[0] == "64" and 200 < int(cpus.split()[1]) < int(notice)
    assert words[0] == "launch"
    launch = launch_command_parser().parse_args(words[1:])
    assert (launch.num_machines, launch.num_processes, launch.machine_rank) == (2, 16, 1)
    assert (launch.main_process_ip, launch.training_script, launch.module) == ("node1", "hf_specauf.train", True)
    _, _, _, args = parse([*launch.training_script_args, "--use_cpu", "true"])
    assert args.objective == "decay" and args.resume_from_checkpoint == "true"


def test_launch_lines_in_recipes_parse():
    for path in RECIPES:
        header = path.read_text().split("\n\n")[0].replace("\\\n#", "")
        for line in re.findall(r"specauf regenerate (.*)", header):
            (args,) = TrlParser(RegenerateArguments).parse_args_and_config(shlex.split(line))
            keys = yaml.safe_load(path.read_text())
            assert (args.target, args.out) == (keys["target"], keys["dataset_name"])
            assert args.chat_template_kwargs == keys.get("chat_template_kwargs")
