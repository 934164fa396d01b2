"""Training killed without warning: whatever is called a checkpoint is one, and going on gives the same drafter."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import BASE, final, same, start, warm_python
from transformers import AutoModel, TrainerState
from transformers.trainer_utils import get_last_checkpoint

from hf_specauf.regenerate import main as regenerate
from hf_specauf.train import main

pytestmark = pytest.mark.internals

STEPS, EVERY = 60, 5
COMPLETE = {
    "config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
    "saved_at",
}  # fmt: skip


def check_checkpoints(out: Path) -> int:
    """Every folder with a checkpoint's name loads -> the newest one's step (0 without)."""
    for folder in out.glob("checkpoint-*"):
        assert COMPLETE <= set(os.listdir(folder))
        AutoModel.from_pretrained(folder)
        torch.load(folder / "optimizer.pt")
        state = TrainerState.load_from_json(folder / "trainer_state.json")
        assert folder.name == f"checkpoint-{state.global_step}"
    newest = get_last_checkpoint(out) if out.is_dir() else None
    return int(newest.rsplit("-", 1)[1]) if newest else 0


# Moments to kill at: given the output folder, and the checkpoints that were there when the steps were enough.
MOMENTS = {
    "after any step": lambda out, known: True,
    "as a save begins": lambda out, known: (out / ".saving").exists(),
    "in the middle of a save": lambda out, known: any((out / ".saving").glob("checkpoint-*/model.safetensors")),
    "as a checkpoint gets its name": lambda out, known: set(out.glob("checkpoint-*")) - known,
}


def run_until_killed(command, out: Path, moment, rng) -> tuple[int, bool]:
    """Start or go on, kill -9 -> (steps finished, whether a save was under way); (STEPS, ...) when done."""
    keys = dict(max_steps=STEPS, save_steps=EVERY, save_total_limit=2, resume_from_checkpoint="true", output_dir=out)
    before = check_checkpoints(out)
    process = start("hf_specauf.train", *command(**keys))
    wanted = before + rng.randrange(1, STEPS // 5)
    while process.poll() is None and before + process.printed().count("{'loss'") < wanted:
        time.sleep(0.005)
    known = set(out.glob("checkpoint-*"))
    while not moment(out, known) and process.poll() is None:
        time.sleep(0.0002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if process.returncode == 0:
        return STEPS, False
    assert process.returncode == -signal.SIGKILL, process.printed()
    return before + process.printed().count("{'loss'"), (out / ".saving").exists()


@pytest.mark.own
def test_killed_at_random_steps_and_inside_saves_ends_in_the_same_drafter(command, tmp_path):
    out, rng, killed, inside = tmp_path / "out", random.Random(0), [], 0
    for moment in list(MOMENTS) * 5:
        steps, was_saving = run_until_killed(command, out, MOMENTS[moment], rng)
        if steps == STEPS:
            break
        killed.append(moment)
        inside += was_saving
        kept = check_checkpoints(out)
        assert steps - kept <= EVERY, moment
    assert set(killed) == set(MOMENTS) and inside >= 2
    if not (out / "provenance.json").exists():
        main(command(max_steps=STEPS, save_steps=EVERY, output_dir=out, resume_from_checkpoint="true"))
    assert not (out / ".saving").exists()
    main(command(max_steps=STEPS, save_steps=EVERY, output_dir=tmp_path / "whole"))
    assert same(final(out), final(tmp_path / "whole"))


def test_two_processes_of_accelerate_launch_train_resume_and_leave_a_drafter(command, tmp_path):
    def words(out: Path, **keys) -> list[str]:
        keys |= dict(output_dir=out, max_steps=4, save_steps=2, per_device_train_batch_size=1)
        return ["-m", "hf_specauf.train", *command(**keys)]

    def launch(out: Path, **keys):
        code, printed = warm_python().run_ranks(2, *words(out, **keys))
        assert code == 0, printed

    launcher = ("accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2")
    process = start(*launcher, *words(tmp_path / "whole"))
    printed, _ = process.communicate(timeout=400)
    assert process.returncode == 0, printed
    record = (tmp_path / "whole" / "provenance.json").read_text()
    assert '"processes": 2' in record
    launch(tmp_path / "part", learning_rate=0)  # another run's checkpoints are replaced, not mixed
    (tmp_path / "part" / "provenance.json").unlink()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(os.listdir(checkpoint))
    launch(tmp_path / "part", resume_from_checkpoint=checkpoint)
    whole, resumed = final(tmp_path / "whole"), final(tmp_path / "part")
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-5, atol=1e-6)
    main(command(output_dir=tmp_path / "one", max_steps=4, save_steps=2, per_device_train_batch_size=2))
    for name, value in final(tmp_path / "one").items():  # and one process with the double batch
        torch.testing.assert_close(whole[name], value, rtol=0, atol=4e-4)  # AdamW makes rounding visible


@pytest.mark.parametrize("leftover", ["checkpoint-3", "checkpoint-3.old"])
def test_what_a_killed_save_left_is_cleared_and_never_resumed_from(command, tmp_path, leftover, capsys):
    out = tmp_path / "out"
    (out / ".saving" / leftover).mkdir(parents=True)
    (out / ".saving" / leftover / "model.safetensors").write_bytes(b"half a file")
    main(command(resume_from_checkpoint="true"))
    assert "training starts afresh" in capsys.readouterr().out
    assert not (out / ".saving").exists() and check_checkpoints(out) == BASE["max_steps"]


@pytest.mark.own
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_to_regenerate_finishes_the_chunk_and_the_same_command_goes_on(files, tmp_path, number):
    def words(out: str) -> list[str]:
        keys = dict(target=files / "target", dataset_name=files / "chat.jsonl", out=tmp_path / out, device="cpu")
        keys |= dict(max_new_tokens=24, temperature=0, rows_per_chunk=2, continuous_batching="false")
        return [word for key, value in keys.items() for word in (f"--{key}", str(value))]

    process, parts = start("hf_specauf.regenerate", *words("own.jsonl")), tmp_path / "own.parts"
    deadline = time.monotonic() + 300
    while process.poll() is None and not list(parts.glob("chunk-*.jsonl")):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 1 and "Traceback" not in printed, printed
    assert "finishing this chunk" in printed and "The same command goes on." in printed
    assert 0 < len(list(parts.glob("chunk-*.jsonl"))) < 15 and not list(parts.glob("*.part"))
    regenerate(words("own.jsonl"))
    regenerate(words("whole.jsonl"))
    assert (tmp_path / "own.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
