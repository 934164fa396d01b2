"""A finished drafter beside its target: how both are loaded, and whether they belong together."""

import warnings
from functools import cached_property

import numpy as np
import torch
from safetensors import safe_open

from ..identity import Identity, check_pair, embedding_rows
from ..layouts.adapters import AdapterBase
from ..layouts.folders import fetch, read_json
from ..layouts.load import load_drafter
from ..publishing.reload import check_same
from ..publishing.staging import find_adapter
from ..publishing.stranger import outputs_of
from .drafting import Drafts, drafts_in
from .findings import FAIL, PASS, SKIP, WARN, Line
from .patient import Patient


class Pair(Patient):
    """A drafter's folder or Hub id, and its target.

    Args:
        drafter (`str`): Hub id or folder.
        drafter_revision (`str`, *optional*): of the drafter.
        rest: as for [`Patient`].
    """

    def __init__(self, drafter: str, drafter_revision: str | None, *rest, **options):
        super().__init__(*rest, **options)
        self.drafter_name, self.drafter_revision = drafter, drafter_revision
        self.folder = None
        self.config: dict = {}  # config.json as it lies there
        self.provenance: dict = {}

    def recorded(self, key: str):
        """What the recipe of its training said; `None` where there is no record."""
        return self.provenance.get("recipe", {}).get(key)

    @cached_property
    def drafts(self) -> Drafts:
        """What it drafts at every place of the texts."""
        return drafts_in(self)

    @cached_property
    def accepted(self) -> np.ndarray:
        """Accepted tokens of every place, (N,)."""
        return self.drafts.accepted


def folder(pair: Pair) -> Line:
    """Where the drafter lies, and its records."""
    pair.folder, commit = fetch(pair.drafter_name, pair.drafter_revision, "--drafter")
    pair.config = read_json(pair.folder / "config.json")
    pair.provenance = read_json(pair.folder / "provenance.json")
    found = f"{pair.drafter_name}{f' at {commit}' if commit else ''}"
    if not pair.provenance:
        return Line(PASS, f"{found}, without a record of its training (provenance.json)")
    return Line(PASS, found)


def dtype(pair: Pair) -> Line:
    """The dtype of the drafter's weights, as they lie there."""
    found = set()
    for path in sorted(pair.folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {file.get_slice(name).get_dtype() for name in file.keys()}
    said = ", ".join(sorted(found)) or "no weights here"
    if "F16" in found or pair.config.get("dtype") == "float16":
        return Line(
            FAIL,
            f"fp16 ({said}): drafters accept nothing in it (vllm#55250)",
            "dtype: bfloat16 in config.json; then specauf convert --drafter THIS --out NEW writes"
            " the weights so",
        )
    return Line(PASS, said)


def adapter_base(pair: Pair) -> Line:
    """Of LoRA: whether the adapter lies on the weights it was trained on."""
    adapter = find_adapter(pair.folder)
    if adapter is None:
        return Line(SKIP, "it is no adapter")
    base = AdapterBase.read(adapter)
    merged = load_drafter(adapter, target=pair.target, key="the adapter")
    # A folder that training left holds the merged drafter beside its adapter.
    if adapter != pair.folder and pair.config:
        drafter = load_drafter(pair.folder, target=pair.target, key="--drafter")
        check_same(drafter, outputs_of(merged.to(drafter.dtype)), "merged from its adapter")
    return Line(PASS, f"lies on {base.name_or_path}, with the weights of its training")


def drafter(pair: Pair) -> Line:
    """Load the drafter."""
    loaded = load_drafter(
        pair.drafter_name, pair.drafter_revision, target=pair.target, key="--drafter"
    )
    pair.drafter = loaded.to(pair.device)
    config = loaded.config
    millions = sum(parameter.numel() for parameter in loaded.parameters()) / 1e6
    return Line(
        PASS,
        f"{config.kind}, {config.num_hidden_layers} layers, block size {config.block_size},"
        f" {millions:.1f} M parameters",
    )


def pair_of(pair: Pair) -> Line:
    """Whether this target is the one that the drafter was trained for."""
    with warnings.catch_warnings():
        # What it warns of are lines of their own here.
        warnings.simplefilter("ignore")
        check_pair(pair.target, pair.drafter.config)
    found = Identity.of(pair.target, pair.tokenizer)
    differences = found.differences(Identity.of_target_of(pair.drafter.config))
    meant = pair.drafter.config.target_model_name_or_path or "an unnamed target"
    if "fingerprint" in differences:
        return Line(
            FAIL,
            f"it was trained for {meant}, and {pair.target_name} has other weights",
            f"--target {meant}, or adapt it: docs/lora.md",
        )
    if found.fingerprint is None or pair.drafter.config.target_fingerprint is None:
        return Line(
            WARN, f"it was trained for {meant}; whether the weights are the same is not known"
        )
    return Line(PASS, f"trained for {meant}, whose weights these are")


def vocabulary(pair: Pair) -> Line:
    """Whether tokens are the same words as in training."""
    config = pair.drafter.config
    rows = embedding_rows(pair.target)
    trained = pair.provenance.get("target", {}).get("vocab_size") or config.vocab_size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # It raises where words have moved.
        check_pair(pair.target, config, pair.tokenizer)
    if rows != trained:
        return Line(
            FAIL,
            f"the target's embedding has {rows} rows, and had {trained} in training: the drafter"
            " has never drafted new tokens, and a resized row may be its mask token",
            f"--target {config.target_model_name_or_path}, or adapt it: docs/lora.md",
        )
    return Line(PASS, f"{rows} rows, and the tokenizer's words are those of training")


def record_of_training(pair: Pair) -> Line:
    """What training measured, beside what is in the folder."""
    if not pair.provenance:
        return Line(SKIP, "there is no provenance.json")
    different = []
    for key in ("block_size", "num_draft_layers", "drafter_type"):
        recorded = pair.recorded(key)
        config = pair.drafter.config
        own = {
            "block_size": config.block_size,
            "num_draft_layers": config.num_hidden_layers,
            "drafter_type": config.kind,
        }[key]
        if recorded not in (None, own):
            different.append(f"{key} is {own}, and was {recorded} in training")
    if different:
        return Line(FAIL, "; ".join(different), "put config.json back as training left it")
    steps = pair.provenance.get("steps")
    agreement = (pair.provenance.get("on_policy") or {}).get("agreement")
    said = f"{steps} steps"
    if agreement is not None:
        said += f", on answers that agree with the target in {agreement:.0%} of the tokens"
    return Line(PASS, said)


@torch.no_grad()
def head(patient: Patient) -> Line:
    """Whether the target's head, which the drafter borrows, is the trained one."""
    if patient.lacking:
        shown = ", ".join(patient.lacking[:3])
        return Line(
            FAIL,
            f"the checkpoint lacks {len(patient.lacking)} weights ({shown}), which are random now:"
            " a tied head that is not tied?",
            "tie_word_embeddings: true in the target's config.json, or fetch it again",
        )
    tied = patient.target.get_output_embeddings().weight
    tied = tied is patient.target.get_input_embeddings().weight
    return Line(PASS, f"complete, {'tied to' if tied else 'apart from'} the embedding")


def target(patient: Patient) -> Line:
    """Load the target."""
    patient.load_target()
    kind, dtype = type(patient.target).__name__, patient.target.dtype
    if dtype == torch.float16:
        return Line(
            WARN,
            f"{kind} in float16, whose hidden states may overflow in some layers",
            "--dtype bfloat16",
        )
    return Line(PASS, f"{kind}, {str(dtype).removeprefix('torch.')}")
