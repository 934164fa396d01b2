"""Several real processes over gloo: one loss, one gradient, whatever the split; checkpoints that load anywhere."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import make_domino, make_drafter, make_target, random_prompts
from safetensors.torch import load_file
from transformers import AutoModel

ROOT = Path(__file__).parents[1]
WORKER = Path(__file__).with_name("distributed_worker.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """target/, drafter/, domino/ and rows.jsonl: 13 rows, so that the last batches are uneven, one without a block."""
    folder = tmp_path_factory.mktemp("pair")
    target = make_target(dtype=torch.float32, vocab_size=len(tokenizer), bos_token_id=None)
    target.save_pretrained(folder / "target")
    tokenizer.save_pretrained(folder / "target")
    make_drafter(target).save_pretrained(folder / "drafter")
    make_domino(target).save_pretrained(folder / "domino")
    texts = target.generate(
        random_prompts(13, 8), max_new_tokens=34, do_sample=False, suppress_tokens=[2, 95]
    ).tolist()
    rows = []
    for i, text in enumerate(texts):
        length = 42 - 3 * i % 30
        rows.append({"input_ids": text[:length], "supervised": ([0] * 8 + [1] * 34)[:length]})
    rows[4] = {"input_ids": texts[4], "supervised": [1, 1] + [0] * 40}  # no context before its only label
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def launch(folder: Path, out: Path, processes: int, rows_each: int, accumulation: int = 1, **keys) -> dict:
    """Run the worker for real -> its logs.json."""
    keys |= dict(per_device_train_batch_size=rows_each, gradient_accumulation_steps=accumulation)
    words = [str(WORKER), str(folder), str(out), *(f"{key}={json.dumps(value)}" for key, value in keys.items())]
    many = processes > 1 or "deepspeed" in keys
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] * many
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "GLOO_SOCKET_IFNAME": "lo"}
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
    done = subprocess.run(
        [sys.executable, *launcher, *words], env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    record = json.loads((out / "logs.json").read_text())
    assert record["processes"] == processes
    return record


def weights(out: Path) -> dict[str, torch.Tensor]:
    (checkpoint,) = out.glob("checkpoint-4")
    files = [checkpoint / name for name in ("model.safetensors", "adapter_model.safetensors")]
    return load_file(next(path for path in files if path.exists()))


@pytest.mark.parametrize("clip", [0.0, 0.5], ids=["unclipped", "clipped"])
def test_one_loss_and_gradient_for_ddp_fsdp2_accumulation_and_one_batch(folder, tmp_path, clip):
    runs = {
        "one process, 4 rows": dict(processes=1, rows_each=4),
        "one process, 2 x 2 rows": dict(processes=1, rows_each=2, accumulation=2),
        "two DDP processes, 2 rows": dict(processes=2, rows_each=2),
        "two DDP processes, 2 x 1 row": dict(processes=2, rows_each=1, accumulation=2),
        "two FSDP2 processes, 2 rows": dict(processes=2, rows_each=2, sharded=True),
        "two FSDP2 processes, 2 x 1 row": dict(processes=2, rows_each=1, accumulation=2, sharded=True),
        "two DDP processes, sharded target": dict(processes=2, rows_each=2, shard_target=True),
        "two FSDP2 processes, sharded target": dict(processes=2, rows_each=2, sharded=True, shard_target=True),
    }
    if clip:
        runs = {name: keys for name, keys in runs.items() if "2 x" not in name}
    reference = None
    for number, (name, keys) in enumerate(runs.items()):
        out = tmp_path / str(number)
        record = launch(folder, out, max_grad_norm=clip, **keys)
        assert record["drafter"] == (["DTensor"] if keys.get("sharded") else ["Parameter"]), name
        assert ("DTensor" in record["target"]) == keys.get("shard_target", False), name
        logs = [entry for entry in record["logs"] if "loss" in entry]
        (evaluated,) = [entry for entry in record["logs"] if "eval_loss" in entry]
        found = {key: [log[key] for log in logs] for key in ("loss", "grad_norm", "active_ratio", "common_accuracy")}
        found |= {key: evaluated[key] for key in ("eval_loss", "eval_tau", "eval_common_accuracy")}
        state = weights(out)
        if reference is None:
            reference = found, state
            assert len(logs) == 4 and min(found["grad_norm"]) > 0.5  # so that clipping clips
            continue
        assert found == {key: pytest.approx(value, rel=1e-4) for key, value in reference[0].items()}, name
        assert state.keys() == reference[1].keys()
        for key, value in state.items():
            torch.testing.assert_close(value, reference[1][key], rtol=1e-4, atol=2e-6)
        AutoModel.from_pretrained(out / "checkpoint-4")


@pytest.mark.parametrize("clip", [0.0, 0.05], ids=["unclipped", "clipped"])
def test_lora_gives_the_same_loss_gradient_and_adapter_in_two_processes(folder, tmp_path, clip):
    runs = {
        "one process, 4 rows": dict(processes=1, rows_each=4),
        "two DDP processes, 2 rows": dict(processes=2, rows_each=2),
        "two DDP processes, 2 x 1 row": dict(processes=2, rows_each=1, accumulation=2),
        "two FSDP2 processes, 2 rows": dict(processes=2, rows_each=2, sharded=True),
        "two FSDP2 processes, 2 x 1 row": dict(processes=2, rows_each=1, accumulation=2, sharded=True),
    }
    reference = None
    for number, (name, keys) in enumerate(runs.items()):
        record = launch(folder, tmp_path / str(number), lora=True, max_grad_norm=clip, **keys)
        # the frozen base is sharded, the adapter on it whole everywhere
        assert record["drafter"] == (["DTensor", "Parameter"] if keys.get("sharded") else ["Parameter"]), name
        found = [(log["loss"], log["grad_norm"]) for log in record["logs"] if "loss" in log]
        state = weights(tmp_path / str(number))
        assert len(found) == 4 and state and all("lora_" in key for key in state)
        if reference is None:
            reference = found, state
            assert min(norm for _, norm in found) > 0.1  # so that clipping clips
            continue
        assert found == [pytest.approx(pair, rel=1e-4) for pair in reference[0]], name
        for key, value in state.items():
            torch.testing.assert_close(value, reference[1][key], rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs `pip install deepspeed`")
def test_deepspeed_zero2_gives_the_loss_gradient_and_weights_of_plain_training(folder, tmp_path):
    """One process: on CPU accelerate runs each DeepSpeed process as if it were alone."""
    zero2 = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto",
             "gradient_accumulation_steps": 1, "zero_allow_untested_optimizer": True}  # fmt: skip
    found = []
    for number, keys in enumerate(({}, dict(use_cpu=False, deepspeed=zero2))):
        record = launch(folder, tmp_path / str(number), 1, 2, max_grad_norm=0.5, **keys)
        found.append([(log["loss"], log["grad_norm"]) for log in record["logs"] if "loss" in log])
    assert len(found[0]) == 4 and found[0] == [pytest.approx(pair, rel=1e-5) for pair in found[1]]
    for name, value in weights(tmp_path / "0").items():
        torch.testing.assert_close(weights(tmp_path / "1")[name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("objective", ["b_auf", "f_auf"])
def test_dominos_two_denominators_are_exact_and_its_head_may_be_sharded(folder, tmp_path, objective):
    runs = {
        "one process, 4 rows": dict(processes=1, rows_each=4),
        "one process, 2 x 2 rows": dict(processes=1, rows_each=2, accumulation=2),
        "two DDP processes, 2 rows": dict(processes=2, rows_each=2),
        "two DDP processes, 2 x 1 row": dict(processes=2, rows_each=1, accumulation=2),
        "two FSDP2 processes, 2 rows": dict(processes=2, rows_each=2, sharded=True),
        "two FSDP2 processes, 2 x 1 row": dict(processes=2, rows_each=1, accumulation=2, sharded=True),
    }
    if objective == "b_auf":
        runs = {name: keys for name, keys in runs.items() if "1 row" not in name}
    reference = None
    for number, (name, keys) in enumerate(runs.items()):
        out = tmp_path / str(number)
        record = launch(folder, out, max_grad_norm=0.5, drafter="domino", objective=objective, **keys)
        assert record["drafter"] == (["DTensor"] if keys.get("sharded") else ["Parameter"]), name
        logs = [entry for entry in record["logs"] if "loss" in entry]
        assert [log["lambda"] for log in logs] == [1.0, 0.75, 0.5, 0.25]  # a head without gradient in the first step
        found = {key: [log[key] for log in logs] for key in ("loss", "grad_norm", "active_ratio", "base_active_ratio")}
        (evaluated,) = [entry for entry in record["logs"] if "eval_loss" in entry]
        found |= {key: evaluated[key] for key in ("eval_loss", "eval_tau", "eval_common_accuracy")}
        state = weights(out)
        if reference is None:
            reference = found, state
            continue
        assert found == {key: pytest.approx(value, rel=1e-4) for key, value in reference[0].items()}, name
        for key, value in state.items():
            torch.testing.assert_close(value, reference[1][key], rtol=1e-4, atol=2e-6)
        AutoModel.from_pretrained(out / "checkpoint-4")
