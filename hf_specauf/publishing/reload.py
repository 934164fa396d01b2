"""The check that a folder about to be published gives back the drafter that was put into it."""

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from . import stranger
from .stranger import outputs_of


def is_close(found: torch.Tensor, expected: torch.Tensor, bound: float) -> bool:
    """Whether two tensors have one dtype and differ by at most `bound` times the expected norm."""
    if found.dtype != expected.dtype:
        return False
    return bool((found - expected).norm() <= bound * expected.norm())


def check_same(drafter: PreTrainedModel, found: dict[str, torch.Tensor], how: str) -> None:
    """Raise unless `found` are the drafter's own [`outputs_of`], up to rounding.

    Args:
        how (`str`): how the other drafter was made, for the error.
    """
    expected = outputs_of(drafter)
    # What was merged on another device may differ in the last bit of each weight. bf16 keeps so few
    # bits that such differences add up over the layers; in fp32 they stay tiny.
    bound = 0.02 if drafter.dtype == torch.bfloat16 else 1e-4
    same = found.keys() == expected.keys() and all(
        is_close(found[name], expected[name], bound) for name in expected
    )
    if not same:
        raise ValueError(
            f"{how}, the folder's drafter gives other outputs than here: its files do not belong"
            " together. Save it again with save_pretrained."
        )


def check_reload(drafter: PreTrainedModel, folder: Path) -> None:
    """Load the folder in a clean process, by its own code, and compare outputs.

    Raises:
        ValueError: it does not load, or its outputs differ.
    """
    with TemporaryDirectory() as scratch:
        inputs = Path(scratch, "in.safetensors")
        outputs = Path(scratch, "out.safetensors")
        # The other process reads its inputs, because its torch need not draw the same numbers.
        save_file(drafter.config.probe(), inputs)
        # Nothing may come from the Hub, nor from code that an earlier folder left in the cache.
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": scratch}
        # -I: the process sees neither the working folder nor PYTHONPATH, as on another machine
        command = [sys.executable, "-I", stranger.__file__]
        command += [str(folder.absolute()), str(inputs), str(outputs)]
        done = subprocess.run(command, env=environment, cwd=scratch, capture_output=True, text=True)
        if done.returncode:
            # the last line of a traceback says what went wrong
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise ValueError(
                "the folder does not load in a clean process with trust_remote_code=True:"
                f" {lines[-1]}. Save the drafter again with save_pretrained; code of your own in it"
                " may import transformers and torch alone"
            )
        check_same(drafter, load_file(outputs), "loaded in a clean process")
