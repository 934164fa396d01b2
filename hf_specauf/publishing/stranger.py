"""What a stranger's machine does with a published folder: it loads the folder by the folder's own
code, without this package.

`reload.py` imports `outputs_of`. It also runs this same file by its path, in a process where
`hf_specauf` cannot be imported: `python -I stranger.py FOLDER INPUTS OUTPUTS`. So this file must
import nothing of the package.
"""

import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel


def corrections(hidden, low_rank_rows, project):
    """What a causal head adds to logits, as a `reduce` of a drafter's forward. `None` of a drafter
    without such a head."""
    return None if project is None else project(low_rank_rows)


@torch.no_grad()
def outputs_of(drafter, given: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """What a drafter makes of its config's `probe`, or of given arguments of its forward.

    Returns:
        `hidden` and, of a drafter with a causal head, `correction`.
    """
    output = drafter.eval()(**given or drafter.config.probe(), reduce=corrections)
    found = {"hidden": output.last_hidden_state, "correction": output.reduced}
    return {name: tensor.contiguous() for name, tensor in found.items() if tensor is not None}


def main(folder: str, inputs: str, outputs: str) -> None:
    """Load the folder as a stranger would, and write what its drafter makes of the inputs."""
    sys.modules["hf_specauf"] = None  # any import of it fails from here on
    drafter = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype="auto")
    save_file(outputs_of(drafter, load_file(inputs)), outputs)


if __name__ == "__main__":
    main(*sys.argv[1:])
