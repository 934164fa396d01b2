"""What a card says of the evaluations, from their eval*.json."""

from huggingface_hub import EvalResult

from ..evaluation.record import way_of
from ..serving.acceptance import NOT_MEASURED, TAU_DEFINITION, number
from .card_data import on_hub, prompts_words


def tau_by_length(prompts: list[dict]) -> str:
    """tau of prompts grouped by length. Empty if all prompts fall into one group."""
    groups: dict[int, list[float]] = {}
    for row in prompts:
        if row["tau"] is not None:
            # the smallest power of two that is not below the length
            size = 1 << (row["prompt_tokens"] - 1).bit_length()
            groups.setdefault(size, []).append(row["tau"])
    if len(groups) < 2:
        return ""
    return ", ".join(
        f"up to {size} tokens {sum(taus) / len(taus):.2f}" for size, taus in sorted(groups.items())
    )


def slow_cases(prompts: list[dict]) -> str:
    """How many prompts the drafter made slower, and the worst of them."""
    ratios = []
    for row in prompts:
        if row.get("assisted_seconds"):
            ratios.append(row["plain_seconds"] / row["assisted_seconds"])
    if not ratios:
        return NOT_MEASURED
    slow = sum(ratio < 1 for ratio in ratios)
    return (
        f"{slow} of {len(ratios)} prompts; the worst ran at {min(ratios):.2f}x, the best at"
        f" {max(ratios):.2f}x"
    )


def different_outputs(record: dict) -> int:
    """Outputs that differ from plain decoding by more than rounding. Sampled outputs cannot be
    compared, so they count as none."""
    lossless = record["lossless"]
    return lossless["different"] if isinstance(lossless, dict) else 0


def evaluation_row(record: dict) -> dict:
    """One evaluation as the words of its table."""
    conditions = []
    for key, value in sorted(record["conditions"].items()):
        if value != {}:
            conditions.append(f"{key.replace('_', ' ')} {value}")
    # counts where outputs were compared, and a sentence where they were sampled
    lossless = record["lossless"]
    if isinstance(lossless, dict):
        lossless = (
            f"{lossless['identical']} of {sum(lossless.values())} identical,"
            f" {lossless['near_tie']} near-ties of rounding, {lossless['different']} different"
        )
    return {
        "name": prompts_words(str(record["conditions"]["prompts"])),
        "tau": number(record["acceptance"]["tau"]),
        "speedup": number(record["speedup"], ".2f", "x"),
        "plain": number(record["plain_tokens_per_second"], ".1f"),
        "assisted": number(record["tokens_per_second"], ".1f"),
        "lossless": lossless,
        "slow": slow_cases(record["prompts"]),
        "beside": beside(record),
        "by_length": tau_by_length(record["prompts"]),
        "repetition": number(record["repetition"], ".0%"),
        "conditions": ", ".join(conditions),
    }


def beside(record: dict) -> str | None:
    """The speed-ups of the ways that were measured beside whole blocks of the drafter; `None`
    where there were none."""
    ways = {
        "drafter and lookup, where each pays": "drafter_and_lookup",
        "transformers' prompt lookup alone": "prompt_lookup",
    }
    found = [
        f"{words} {number(way_of(record, way)['speedup'], '.2f', 'x')}"
        for words, way in ways.items()
        if way_of(record, way) is not None
    ]
    return "; ".join(found) or None


def eval_results(records: list[dict]) -> list[EvalResult]:
    """tau and speed-up of each evaluation for the Hub's model index, with their conditions."""
    found = []
    for record in records:
        conditions = record["conditions"]
        dataset = str(conditions["prompts"])
        # the Hub links a dataset of its own, and shows any other name as it is
        dataset_type = dataset if on_hub(dataset) else "custom"
        metrics = (
            ("tau", "tau (tokens committed per verification pass)", record["acceptance"]["tau"]),
            ("speedup", "speed-up over plain generate", record["speedup"]),
        )
        for metric, name, value in metrics:
            if value is None:
                continue
            result = EvalResult(
                task_type="text-generation",
                task_name="Speculative decoding",
                dataset_name=prompts_words(dataset),
                dataset_type=dataset_type,
                metric_type=metric,
                metric_name=name,
                metric_value=round(value, 4),
                metric_args=conditions,
            )
            found.append(result)
    return found


def measured_words(records: list[dict]) -> dict:
    """What the template says of the evaluations. The first one makes the headline."""
    words = {
        "tau": None,
        "speedup": None,
        "faster": False,
        "headline_conditions": "",
        "tau_definition": TAU_DEFINITION,
        "evaluations": [evaluation_row(record) for record in records],
    }
    if records:
        first = records[0]
        conditions = first["conditions"]
        words["tau"] = first["acceptance"]["tau"]
        words["speedup"] = first["speedup"]
        # "the same output, faster" is a claim, so both halves must have been seen, of the way in
        # which people decode
        usual = way_of(first, "drafter_and_lookup") or first
        different = different_outputs(first) + different_outputs(usual)
        words["faster"] = usual["speedup"] > 1 and not different
        words["headline_conditions"] = (
            f"{prompts_words(str(conditions.get('prompts')))}, temperature"
            f" {conditions.get('temperature')},"
            f" {conditions.get('max_new_tokens')} new tokens, {conditions.get('hardware')}"
        )
    return words
