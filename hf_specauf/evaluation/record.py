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


def way_of(record: dict, name: str) -> dict | None:
    """What a record says of a way; `None` where that was not measured. Before 0.2 two ways beside
    the drafter stood among the record's own keys."""
    return record.get("ways", {}).get(name) or record.get(name)


def differing_conditions(record: dict, reference: dict) -> list[str]:
    """The conditions of two evaluations that tau depends on and that differ, in words."""
    here, there = record["conditions"], reference["conditions"]
    here = here | {"number of prompts": len(record["prompts"])}
    there = there | {"number of prompts": len(reference["prompts"])}
    # a figure from another machine is comparable: these two change the clock, and tau hardly
    keys = sorted({*here, *there} - {"hardware", "dtype"})
    return [
        f"{key} {there.get(key)} there, {here.get(key)} here"
        for key in keys
        if here.get(key) != there.get(key)
    ]
