"""A comparison with the conditions it was found under: `eval.json`."""

from ..identity import Identity, innermost
from ..records import environment
from ..serving.acceptance import TAU_DEFINITION


def evaluation_record(results: dict, target, *, prompts: str, **conditions) -> dict:
    """What `compare` found, with the conditions it was found under: the content of `eval.json`.

    Args:
        results (`dict`): from `compare`.
        target (`PreTrainedModel`): what was decoded with.
        prompts (`str`): what the prompts are, a Hub dataset's id where they come from one.
        conditions: `temperature`, `max_new_tokens`, ...; those that are `None` are left out.
    """
    dtype = str(innermost(target).dtype).removeprefix("torch.")
    found = environment()
    noted = {"prompts": prompts, "batch_size": 1, "hardware": found["hardware"], "dtype": dtype}
    for key, value in conditions.items():
        if value is not None:
            noted[key] = value
    return {
        "tau_definition": TAU_DEFINITION,
        "target": Identity.of(target).record() | {"dtype": dtype},
        "conditions": noted,
        "environment": found,
        **results,
    }
