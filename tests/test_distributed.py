"""Several real processes over gloo: one loss, one gradient, whatever the split; checkpoints that load anywhere."""

import json
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import BASE, make_domino, make_drafter, make_target, random_prompts, warm_python
from loopback_hub import Handler, LoopbackHub
from safetensors.torch import load_file
from transformers import AutoModel
from warm_python import WarmPython

pytestmark = pytest.mark.internals

WORKER = Path(__file__).with_name("distributed_worker.py")
# sharded by accelerate's plugin, as the recipe asks, instead of by transformers' loader; its optimizer has no one file
FSDP2 = dict(launched_with="fsdp2.yaml", save_only_model=False)


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
    """Run the worker in one real process, or several that torch joins -> its logs.json.

    `torchrun` itself is run by the test of `accelerate launch` in test_resume.py.
    """
    keys |= dict(per_device_train_batch_size=rows_each, gradient_accumulation_steps=accumulation)
    words = [str(WORKER), str(folder), str(out), *(f"{key}={json.dumps(value)}" for key, value in keys.items())]
    many = processes > 1 or "deepspeed" in keys or keys.get("launched_with") == "zero2.yaml"
    environment = {}
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
    if many:
        code, printed = warm_python().run_ranks(processes, *words, **environment)
    else:
        code, printed = warm_python().run(*words, **environment)
    assert code == 0, printed
    record = json.loads((out / "logs.json").read_text())
    assert record["processes"] == processes
    return record


def is_sharded(keys: dict) -> bool:
    return keys.get("sharded", False) or "launched_with" in keys


def weights(out: Path) -> dict[str, torch.Tensor]:
    (checkpoint,) = out.glob("checkpoint-4")
    files = [checkpoint / name for name in ("model.safetensors", "adapter_model.safetensors")]
    return load_file(next(path for path in files if path.exists()))


@pytest.mark.own_parameters
@pytest.mark.parametrize("clip", [0.0, 0.5], ids=["unclipped", "clipped"])
def test_one_loss_and_gradient_for_ddp_fsdp2_accumulation_and_one_batch(folder, tmp_path, clip):
    runs = {
        "one process, 4 rows": dict(processes=1, rows_each=4),
        "one process, 2 x 2 rows": dict(processes=1, rows_each=2, accumulation=2),
        "two DDP processes, 2 rows": dict(processes=2, rows_each=2, try_memory=True),
        "two DDP processes, 2 x 1 row": dict(processes=2, rows_each=1, accumulation=2),
        "two FSDP2 processes, 2 rows": dict(processes=2, rows_each=2, sharded=True),
        "two FSDP2 processes, 2 x 1 row": dict(processes=2, rows_each=1, accumulation=2, sharded=True),
        "two processes of fsdp2.yaml, 2 rows": dict(processes=2, rows_each=2, try_memory=True, **FSDP2),
        "two processes of fsdp2.yaml, 2 x 1 row": dict(processes=2, rows_each=1, accumulation=2, **FSDP2),
        "two DDP processes, sharded target": dict(processes=2, rows_each=2, shard_target=True),
        "two FSDP2 processes, sharded target": dict(processes=2, rows_each=2, sharded=True, shard_target=True),
    }
    if clip:  # accumulation and a sharded target change nothing in what is clipped
        runs = {name: keys for name, keys in runs.items() if "2 x" not in name and "sharded target" not in name}
    reference = None
    for number, (name, keys) in enumerate(runs.items()):
        out = tmp_path / str(number)
        record = launch(folder, out, max_grad_norm=clip, **keys)
        assert record["drafter"] == (["DTensor"] if is_sharded(keys) else ["Parameter"]), name
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
        config = AutoModel.from_pretrained(out / "checkpoint-4").config
        # FSDP's own class would not load where this package is absent
        assert config.auto_map["AutoModel"] == "modeling_dflash.DFlashDraftModel", name
        assert (out / "checkpoint-4" / "modeling_dflash.py").is_file()
        assert "use_cache" not in (out / "checkpoint-4" / "config.json").read_text()


@pytest.mark.own_parameters
@pytest.mark.parametrize("clip", [0.05, 0.0], ids=["clipped", "unclipped"])
def test_lora_gives_the_same_loss_gradient_and_adapter_in_two_processes(folder, tmp_path, clip):
    runs = {
        "one process, 4 rows": dict(processes=1, rows_each=4),
        "two DDP processes, 2 rows": dict(processes=2, rows_each=2),
        "two DDP processes, 2 x 1 row": dict(processes=2, rows_each=1, accumulation=2),
        "two FSDP2 processes, 2 rows": dict(processes=2, rows_each=2, sharded=True),
        "two FSDP2 processes, 2 x 1 row": dict(processes=2, rows_each=1, accumulation=2, sharded=True),
        "two processes of fsdp2.yaml, 2 rows": dict(processes=2, rows_each=2, **FSDP2),
    }
    if clip:
        runs = {name: keys for name, keys in runs.items() if "2 x" not in name}
    reference = None
    for number, (name, keys) in enumerate(runs.items()):
        record = launch(folder, tmp_path / str(number), lora=True, max_grad_norm=clip, **keys)
        # transformers shards the frozen base and leaves the adapter on it whole; accelerate shards both
        kinds = ["DTensor"] * is_sharded(keys) + ["Parameter"] * ("launched_with" not in keys)
        assert record["drafter"] == kinds, name
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


def test_lora_on_a_domino_drafter_is_the_same_in_two_processes(folder, tmp_path):
    found = []
    for number, keys in enumerate((dict(processes=1, rows_each=4), dict(processes=2, rows_each=2, sharded=True))):
        keys |= dict(lora=True, drafter="domino", objective="b_auf", max_grad_norm=0.05)
        logs = launch(folder, tmp_path / str(number), **keys)["logs"]
        state = weights(tmp_path / str(number))
        assert any("embed_proj" in name for name in state) and all("lora_" in name for name in state)
        found.append(([(log["loss"], log["grad_norm"]) for log in logs if "loss" in log], state))
    (one, state), (two, other) = found
    assert len(one) == 4 and two == [pytest.approx(pair, rel=1e-4) for pair in one]
    for name, value in state.items():
        torch.testing.assert_close(other[name], value, rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs `pip install deepspeed`")
def test_deepspeed_zero2_gives_the_loss_gradient_and_weights_of_plain_training(folder, tmp_path):
    """One process: on CPU accelerate runs each DeepSpeed process as if it were alone."""
    found = []
    for number, keys in enumerate(({}, dict(use_cpu=False, launched_with="zero2.yaml"))):
        record = launch(folder, tmp_path / str(number), 1, 2, max_grad_norm=0.5, bf16=False, **keys)
        found.append([(log["loss"], log["grad_norm"]) for log in record["logs"] if "loss" in log])
    assert len(found[0]) == 4 and found[0] == [pytest.approx(pair, rel=1e-5) for pair in found[1]]
    for name, value in weights(tmp_path / "0").items():
        torch.testing.assert_close(weights(tmp_path / "1")[name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs `pip install deepspeed`")
def test_deepspeed_is_stopped_before_it_steps_on_what_is_not_finite_and_has_no_zero3(folder, tmp_path):
    zero = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto",
            "gradient_accumulation_steps": 1, "zero_allow_untested_optimizer": True}  # fmt: skip
    with pytest.raises(AssertionError, match="(?s)steps of DeepSpeed: 1\n.*the loss of step 2 is not a finite"):
        launch(folder, tmp_path, 1, 2, use_cpu=False, deepspeed=zero, learning_rate=1e30, save_steps=1)
    zero["zero_optimization"]["stage"] = 3
    with pytest.raises(AssertionError, match="zero_stage is 3.*recipes/accelerate/fsdp2.yaml"):
        launch(folder, tmp_path, 1, 2, use_cpu=False, deepspeed=zero)
    zero["zero_optimization"]["stage"] = 2
    with pytest.raises(AssertionError, match="gradient_accumulation_steps is 2.*recipes/accelerate/fsdp2.yaml"):
        launch(folder, tmp_path, 1, 2, 2, use_cpu=False, deepspeed=zero)


@pytest.mark.parametrize("keys", [dict(sharded=True), FSDP2], ids=["transformers", "accelerate"])
def test_sharded_training_with_muon_is_refused(folder, tmp_path, keys):
    with pytest.raises(AssertionError, match="muon_learning_rate needs whole matrices"):
        launch(folder, tmp_path, 2, 2, muon_learning_rate=0.02, optim="adamw_torch_fused", **keys)


@pytest.mark.own
@pytest.mark.parametrize("objective", ["f_auf", "b_auf"])
def test_dominos_two_denominators_are_exact_and_its_head_may_be_sharded(folder, tmp_path, objective):
    runs = {
        "one process, 4 rows": dict(processes=1, rows_each=4),
        "one process, 2 x 2 rows": dict(processes=1, rows_each=2, accumulation=2),
        "two DDP processes, 2 rows": dict(processes=2, rows_each=2),
        "two DDP processes, 2 x 1 row": dict(processes=2, rows_each=1, accumulation=2),
        "two FSDP2 processes, 2 rows": dict(processes=2, rows_each=2, sharded=True),
        "two FSDP2 processes, 2 x 1 row": dict(processes=2, rows_each=1, accumulation=2, sharded=True),
        "two processes of fsdp2.yaml, 2 rows": dict(processes=2, rows_each=2, try_memory=True, **FSDP2),
    }
    if objective == "b_auf":
        runs = {name: keys for name, keys in runs.items() if "1 row" not in name}
    reference = None
    for number, (name, keys) in enumerate(runs.items()):
        out = tmp_path / str(number)
        record = launch(folder, out, max_grad_norm=0.5, drafter="domino", objective=objective, **keys)
        assert record["drafter"] == (["DTensor"] if is_sharded(keys) else ["Parameter"]), name
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


def test_fsdp2_of_accelerate_keeps_losses_and_gradients_in_fp32_under_bf16_and_resumes(folder, tmp_path):
    keys = dict(processes=2, rows_each=2, optim="adamw_torch", learning_rate=1e-3, save_steps=2, **FSDP2)
    whole = launch(folder, tmp_path / "whole", bf16=True, **keys)
    assert whole["dtypes"] == ["torch.bfloat16", "torch.float32", "None"]
    one = launch(folder, tmp_path / "one", 1, 4, optim="adamw_torch", learning_rate=1e-3, bf16=True)
    for ours, theirs in zip(whole["logs"][:4], one["logs"], strict=False):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=5e-3)
    resume = str(tmp_path / "whole" / "checkpoint-2")
    resumed = launch(folder, tmp_path / "resumed", bf16=True, resume=resume, **keys)
    assert [log["loss"] for log in resumed["logs"] if "loss" in log] == [log["loss"] for log in whole["logs"][:4]]
    ends = [weights(tmp_path / name) for name in ("whole", "resumed")]
    assert {value.dtype for value in ends[0].values()} == {torch.float32}
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.own_parameters
@pytest.mark.parametrize("keys", [dict(sharded=True), FSDP2], ids=["transformers", "accelerate"])
def test_an_evaluation_before_sharded_training_changes_nothing(folder, tmp_path, keys):
    first = dict(evaluate_first=True) if "sharded" in keys else dict(eval_on_start=True)
    keys = keys | dict(eval_prompts=0)  # decoding reads the whole state, which would put the shards back
    found = []
    for number, more in enumerate(({}, first)):
        record = launch(folder, tmp_path / str(number), 2, 2, **keys, **more)
        assert record["drafter"] == ["DTensor"]
        logs = [(log["loss"], log["grad_norm"]) for log in record["logs"] if "loss" in log]
        found.append((logs, weights(tmp_path / str(number))))
    (logs, state), (other_logs, other_state) = found
    assert len(logs) == 4 and other_logs == logs
    assert all(torch.equal(other_state[name], tensor) for name, tensor in state.items())


def test_evaluating_before_accelerate_has_sharded_is_refused_with_the_key_that_does_it(folder, tmp_path):
    with pytest.raises(AssertionError, match="Set eval_on_start: true"):
        launch(folder, tmp_path, 2, 2, evaluate_first=True, **FSDP2)


@pytest.mark.parametrize("keys", [dict(sharded=True), FSDP2], ids=["transformers", "accelerate"])
def test_a_target_that_cannot_be_decoded_is_told_before_a_drafter_is_sharded(folder, tmp_path, keys):
    with pytest.raises(AssertionError, match="Qwen3ForCausalLM cannot be decoded with a drafter here: TypeError"):
        launch(folder, tmp_path, 2, 2, undecodable=True, **keys)


@pytest.mark.parametrize(
    "name, keys",
    [("SIGINT", {}), ("SIGTERM", {}), ("SIGTERM", FSDP2)],
    ids=["Ctrl-C, ddp", "SIGTERM, ddp", "SIGTERM, fsdp2"],
)
def test_a_signal_to_one_of_two_processes_stops_both_after_the_same_step_with_a_checkpoint(
    folder, tmp_path, name, keys
):
    record = launch(folder, tmp_path, 2, 2, interrupt=name, max_steps=50, save_strategy="no", **keys)
    assert [log["step"] for log in record["logs"] if "loss" in log] == [1, 2]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    AutoModel.from_pretrained(tmp_path / "checkpoint-2")


# ---- waiting longer than a collective does


@pytest.mark.own
@pytest.mark.parametrize("rank", [0, 1])
def test_others_wait_while_one_tokenizes_longer_than_ddp_timeout(folder, tmp_path, rank):
    keys = dict(ddp_timeout=4, slow=[rank, 6], max_steps=1, eval_strategy="no")
    record = launch(folder, tmp_path, 2, 2, **keys)
    assert [log["step"] for log in record["logs"] if "loss" in log] == [1]


PUSH_TARGET = """
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoModelForCausalLM.from_pretrained({folder!r}).push_to_hub("alice/target")
AutoTokenizer.from_pretrained({folder!r}).push_to_hub("alice/target")
"""


# Trainer gives its ddp_timeout to torch only without use_cpu.
TRAIN_WITH_TIMEOUT = """
import runpy, sys
from datetime import timedelta
import torch
torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=6))
sys.argv = ["train", *sys.argv[1:]]
runpy.run_module("hf_specauf.train", run_name="__main__", alter_sys=True)
"""


@pytest.mark.own
def test_others_wait_while_one_uploads_to_a_hub_slower_than_ddp_timeout(files, tmp_path):
    slow = []

    def slowly(self):
        # as the Trainer starts, and in each upload
        if not slow or "/commit/" in self.path:
            slow.append(self.path)
            time.sleep(9)
        return Handler._handle(self)

    with LoopbackHub(tmp_path / "hub") as hub:
        python = WarmPython(sys.executable, hub.environment(tmp_path / "home", "alice"))
        code, printed = python.run("-c", PUSH_TARGET.format(folder=str(files / "target")))
        assert code == 0, printed
        hub.server.RequestHandlerClass.do_POST = slowly
        keys = dict(target="alice/target", dataset_name=files / "text.jsonl", output_dir=tmp_path / "out") | BASE
        keys |= dict(push_to_hub="true", hub_model_id="alice/slow", max_steps=1, eval_prompts=0)
        keys |= dict(hub_strategy="every_save", save_steps=1, eval_rows=0)
        words = [word for key, value in keys.items() for word in (f"--{key}", *str(value).split())]
        code, printed = python.run_ranks(2, "-c", TRAIN_WITH_TIMEOUT, *words)
        python.close()
        assert code == 0, printed
        messages = [commit["message"] for commit in hub.repository("alice/slow").history("main")]
    assert messages[:2] == ["Upload drafter", "Training in progress, step 1"] and len(slow) == 3
