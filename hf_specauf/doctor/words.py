"""Checks of how a conversation becomes tokens: chat template, thinking, end tokens, and whether
training reads before an answer what serving writes there."""

from ..data.conversation import chat_end, end_tokens, stop_at_both_ends, unread_arguments
from ..data.findings import supervised_spans
from ..data.messages import UnusableRow, apply_template, chat_messages, row_tools
from ..data.tokens import RowEncoder
from ..identity import tokenizer_hashes
from .findings import FAIL, PASS, SKIP, WARN, Line
from .pair import Pair
from .patient import Patient

# Two turns and a thought, which many templates write otherwise once a conversation goes on.
CONVERSATION = {
    "messages": [
        {"role": "user", "content": "What is 17 + 25?"},
        {"role": "assistant", "content": "<think>\n17 + 25 = 42.\n</think>\n\nIt is 42."},
        {"role": "user", "content": "And twice that?"},
        {"role": "assistant", "content": "<think>\n2 * 42 = 84.\n</think>\n\nIt is 84."},
    ]
}


def chat_template(pair: Pair) -> Line:
    """Whether questions are written as in training."""
    meant = pair.drafter.config.chat_template_hash
    found = tokenizer_hashes(pair.tokenizer)["chat_template_hash"]
    if pair.tokenizer.chat_template is None and meant is None:
        return Line(SKIP, "the tokenizer has none")
    if meant is None:
        return Line(WARN, f"{found}; which one it was trained with is not known")
    if found != meant:
        return Line(
            FAIL,
            f"the target's template is {found or 'gone'}, and it was trained with {meant}: the"
            " drafter reads another prompt than it learned from",
            "put the target's chat_template.jinja back, or train with this one",
        )
    return Line(PASS, f"{found}, as in training")


def thinking(pair: Pair) -> Line:
    """Whether the template's arguments are those of training."""
    own = pair.template_kwargs
    if pair.provenance:
        recorded = pair.recorded("chat_template_kwargs")
        if (recorded or {}) != (own or {}):
            return Line(
                FAIL,
                f"config.json says chat_template_kwargs: {own}, and it was trained with {recorded}",
                f"chat_template_kwargs: {recorded} in config.json",
            )
    return template_arguments(pair)


def template_arguments(patient: Patient) -> Line:
    """Whether the template knows the arguments that it is given."""
    own = patient.template_kwargs
    if not own:
        return Line(PASS, "the chat template is given no arguments")
    unread = unread_arguments(patient.tokenizer, own)
    if unread:
        return Line(
            WARN,
            f"the chat template never reads {', '.join(unread)}",
            "chat_template_kwargs in the recipe: remove what the template does not know",
        )
    return Line(PASS, f"chat_template_kwargs: {own}")


def end_of_answers(patient: Patient) -> Line:
    """Whether the target stops where its chat template ends an answer."""
    config, tokenizer = patient.target.generation_config, patient.tokenizer
    own = end_tokens(config)
    # From here on the target stops at both, as in training and in `evaluate`.
    patient.ends = stop_at_both_ends(patient.target, tokenizer, patient.template_kwargs) or own
    names = tokenizer.convert_ids_to_tokens(own)
    if patient.ends != own:
        end = tokenizer.convert_ids_to_tokens(patient.ends[-1])
        return Line(
            WARN,
            f"the template ends an answer with {end!r}, and generation_config.json names {names}:"
            " other programs run on into turns of the target's own invention",
            f"eos_token_id: {patient.ends} in the target's generation_config.json",
        )
    if not own:
        return Line(WARN, "the target has no end token", "eos_token_id in generation_config.json")
    end = chat_end(tokenizer, patient.template_kwargs)
    where = "" if end is None else ", where the template ends an answer"
    return Line(PASS, f"{', '.join(map(repr, names))}{where}")


def serving_prompt(patient: Patient, rows: list[dict] | None = None) -> Line:
    """Whether each answer of training follows the very ids that serving renders before it.

    Args:
        rows (`list[dict]`, *optional*): raw rows; a conversation of two turns by default.
    """
    if patient.tokenizer.chat_template is None:
        return Line(SKIP, "the tokenizer has no chat template")
    chats = [row for row in rows or [CONVERSATION] if "messages" in row or "conversations" in row]
    if not chats:
        return Line(SKIP, "the rows are no conversations")
    encoder = RowEncoder(patient.tokenizer, list(chats[0]), 10**9, patient.template_kwargs)
    answers, wrong = 0, []
    for number, row in enumerate(chats):
        try:
            parts = encoder.encode(row).parts
            served = served_before_answers(patient, row)
        except UnusableRow:  # training leaves it out too, and says so
            continue
        for ids, mask in parts:
            for start, _ in supervised_spans(mask):
                answers += 1
                if ids[:start] not in served:
                    wrong.append(number)
    if wrong:
        return Line(
            FAIL,
            f"{len(wrong)} of {answers} answers follow another prompt in training than in serving"
            f" (first: row {wrong[0]})",
            "report this chat template",
        )
    return Line(PASS, f"{answers} answers follow the ids that serving renders before them")


def served_before_answers(patient: Patient, row: dict) -> list[list[int]]:
    """What serving renders before each answer of a conversation, as ids."""
    turns, tools = chat_messages(row), row_tools(row)
    served = []
    for i, turn in enumerate(turns):
        # Nobody serves an answer to nothing, as many rows of ShareGPT begin. It is not learned.
        if turn["role"] != "assistant" or not turns[:i]:
            continue
        try:
            rendered = apply_template(
                patient.tokenizer,
                turns[:i],
                tools,
                add_generation_prompt=True,
                return_dict=True,
                **(patient.template_kwargs or {}),
            )
        except Exception:
            # Many templates want a question. Training leaves such an answer out, too.
            if any(turn["role"] == "user" for turn in turns[:i]):
                raise
            continue
        served.append(rendered["input_ids"])
    return served
