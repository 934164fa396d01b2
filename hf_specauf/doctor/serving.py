"""Checks of a drafter at work: what is accepted, whether that is what training promised, and
whether the output is the target's own."""

import torch

from ..drafters.transformers_internals import TESTED, VERSION
from ..evaluation.differences import first_difference
from ..layouts.folders import read_json
from ..publishing.reload import check_reload
from ..serving.acceptance import summarize
from ..serving.replay import replay
from .findings import FAIL, PASS, SKIP, WARN, Line
from .pair import Pair
from .patient import Patient

# Of tau, what rounding may move between a text that is read and one that is written.
NEARLY, NEARLY_IN_LOW_PRECISION = 0.02, 0.08
NOTHING = 1.05  # a tau below says that nothing is accepted
# A drafter that keeps less of its accepted tokens than this meets other texts than it was measured
# on, or is broken.
KEPT = 0.25


def versions(patient: Patient) -> Line:
    """Whether this transformers was tested."""
    found = f"transformers {VERSION}, torch {torch.__version__}"
    minor = tuple(int(part) for part in VERSION.split(".")[:2])
    newest = tuple(int(part) for part in TESTED[-1].split("."))
    if minor > newest:
        return Line(
            WARN,
            f"{found}: newer than {TESTED[-1]}, the newest that was tested",
            f"pip install 'transformers=={TESTED[-1]}.*'",
        )
    return Line(PASS, found)


def taps_and_head(patient: Patient) -> Line:
    """Whether the target lends what it decodes by: the states of the tapped layers, and its own
    logits."""
    patient.frozen.check(patient.texts[0].output[:, :64])
    return Line(PASS, "states are those of the tapped layers, logits those of the lent head")


def lossless(patient: Patient) -> Line:
    """Whether output with drafts is the target's own."""
    near, different = 0, 0
    for text, output in zip(patient.texts, patient.decoded.outputs):
        found = first_difference(patient.target, text.output, output)
        if found is not None:
            near += found["near_tie"]
            different += not found["near_tie"]
    count = len(patient.texts)
    same = f"{count - near - different} of {count} outputs are the same"
    if different:
        return Line(FAIL, f"{same}, {different} differ by more than rounding", "report this target")
    if near:
        return Line(PASS, f"{same}, {near} part at a near-tie of rounding")
    return Line(PASS, same)


def training_against_serving(patient: Patient) -> Line:
    """Whether decoding accepts what the forward of training says it would, on the same texts."""
    read = []
    # What was written with drafts, because a near-tie may have led to another text.
    for text, output in zip(patient.texts, patient.decoded.outputs):
        read += replay(
            patient.frozen,
            patient.drafter,
            output,
            prompt_tokens=text.first,
            max_new_tokens=patient.max_new_tokens,
        )
    promised = summarize(read, patient.drafter.config.block_size).tau
    written = patient.decoded_tau
    found = f"tau {written:.3f} decoded, {promised:.3f} by the forward of training"
    exact = patient.target.dtype in (torch.float32, torch.float64)
    nearly = NEARLY if exact else NEARLY_IN_LOW_PRECISION
    # Written with `not`, so that NaN fails too.
    if not abs(written - promised) <= nearly * promised:
        return Line(FAIL, found, "report this pair")
    return Line(PASS, found)


def acceptance(pair: Pair) -> Line:
    """Whether anything is accepted, and as much as was measured before."""
    tau = pair.decoded_tau
    measured = read_json(pair.folder / "eval.json").get("acceptance", {}).get("tau")
    found = f"tau {tau:.2f} on {len(pair.texts)} prompts"
    if measured is not None:
        found += f", {measured:.2f} in its eval.json"
    if tau < NOTHING:
        return Line(WARN, f"{found}: hardly a token is accepted", "docs/troubleshooting.md")
    if measured is not None and tau - 1 < KEPT * (measured - 1):
        return Line(WARN, found, "--prompts with texts of the kind that it was measured on")
    return Line(PASS, found)


def clean_process(pair: Pair) -> Line:
    """Whether the folder loads by its own code where this package is absent."""
    model_type = str(pair.config.get("model_type"))
    if not model_type.startswith("specauf_") or not list(pair.folder.glob("modeling_*.py")):
        return Line(SKIP, "the folder holds no code of its own")
    drafter = pair.drafter
    check_reload(drafter.cpu(), pair.folder)
    drafter.to(pair.device)
    return Line(PASS, "loads without this package, with the same outputs")
