"""Golden tokens and masks: published chat templates on small tokenizers, every format of rows, rows of no use."""

import copy
import json
from datetime import datetime
from pathlib import Path

import pytest
import trl
from conftest import CHAT_TEMPLATE, byte_level_tokenizer
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from transformers import AddedToken

from hf_specauf.data.conversation import Conversation, prompt_ids
from hf_specauf.data.messages import UnusableRow
from hf_specauf.data.rows import show_row
from hf_specauf.data.tokens import RowEncoder
from hf_specauf.serving.benchmarks import Wording, encode_prompts

SHIPPED = Path(trl.__file__).parent / "chat_templates"
# In the form Mistral-7B-Instruct published: system text before the first question, roles must alternate.
MISTRAL = (
    "{%- set asked = messages[1:] if messages[0].role == 'system' else messages -%}{{ bos_token }}"
    "{%- for m in asked -%}"
    "{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('roles must alternate user and assistant') }}{%- endif -%}"
    "{%- if m.role == 'user' -%}{{ '[INST] ' }}"
    "{%- if loop.first and messages[0].role == 'system' -%}{{ messages[0].content + '\n\n' }}{%- endif -%}"
    "{{ m.content + ' [/INST]' }}{%- else -%}{{ ' ' + m.content + eos_token }}{%- endif -%}{%- endfor -%}"
)
CHATML = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
TURNS = [
    ("system", "Be brief."),
    ("user", "What does the fox do?"),
    ("assistant", "It jumps."),
    ("user", "And the sheep?"),
    ("assistant", "They sleep."),
]
MESSAGES = [{"role": role, "content": content} for role, content in TURNS]
THOUGHTFUL = copy.deepcopy(MESSAGES)
THOUGHTFUL[2]["reasoning_content"], THOUGHTFUL[4]["reasoning_content"] = "Foxes.", "Sheep."

QWEN3 = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat does the fox do?<|im_end|>\n"
    "<|im_start|>assistant\n{0}It jumps.<|im_end|>⟧\n<|im_start|>user\nAnd the sheep?<|im_end|>\n"
    "<|im_start|>assistant\n{1}They sleep.<|im_end|>⟧\n"
)
# Serving writes earlier turns without their thoughts, not even empty ones: each answer has a row of its own.
QWEN3_APART = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat does the fox do?<|im_end|>\n"
    "<|im_start|>assistant\n{0}It jumps.<|im_end|>⟧\n"
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat does the fox do?<|im_end|>\n"
    "<|im_start|>assistant\nIt jumps.<|im_end|>\n<|im_start|>user\nAnd the sheep?<|im_end|>\n"
    "<|im_start|>assistant\n{1}They sleep.<|im_end|>⟧\n"
)
# template, special tokens (bos and eos first), template arguments, messages, the rendering with supervised spans (of
# several rows, one after the other)
GOLDEN = {
    "qwen3, thinking off": (
        "qwen3.jinja", ["<|endoftext|>", "<|im_end|>", "<|im_start|>", "<think>", "</think>"],
        {"enable_thinking": False}, MESSAGES,
        QWEN3_APART.format("<think>\n\n</think>\n\n⟦", "<think>\n\n</think>\n\n⟦"),
    ),
    "qwen3, thinking on": (
        "qwen3.jinja", ["<|endoftext|>", "<|im_end|>", "<|im_start|>", "<think>", "</think>"],
        {"enable_thinking": True}, THOUGHTFUL,
        QWEN3_APART.format("⟦<think>\nFoxes.\n</think>\n\n", "⟦<think>\nSheep.\n</think>\n\n"),
    ),
    "llama-3.1": (
        "llama3_1.jinja", ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
        {}, MESSAGES,
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        "What does the fox do?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦It jumps.<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd the sheep?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦They sleep.<|eot_id|>⟧",
    ),
    "gemma-3": (
        "gemma3.jinja", ["<bos>", "<end_of_turn>", "<start_of_turn>"], {}, MESSAGES,
        "<bos><start_of_turn>user\nBe brief.\n\nWhat does the fox do?<end_of_turn>\n<start_of_turn>model\n"
        "⟦It jumps.<end_of_turn>⟧\n<start_of_turn>user\nAnd the sheep?<end_of_turn>\n<start_of_turn>model\n"
        "⟦They sleep.<end_of_turn>⟧\n",
    ),
    "mistral": (
        MISTRAL, ["<s>", "</s>", "[INST]", "[/INST]"], {}, MESSAGES,
        "<s>[INST] Be brief.\n\nWhat does the fox do? [/INST]⟦ It jumps.</s>⟧[INST] And the sheep? [/INST]"
        "⟦ They sleep.</s>⟧",
    ),
    "gpt-oss": (
        "gptoss.jinja", ["<|startoftext|>", "<|return|>", "<|start|>", "<|message|>", "<|channel|>", "<|end|>"],
        {"reasoning_effort": "low"}, [*MESSAGES[:4], MESSAGES[4] | {"thinking": "Sheep."}],
        "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: "
        "2024-06\nCurrent date: TODAY\n\nReasoning: low\n\n# Valid channels: analysis, commentary, final. Channel "
        "must be included for every message.<|end|><|start|>developer<|message|># Instructions\n\nBe brief.\n\n<|end|>"
        "<|start|>user<|message|>What does the fox do?<|end|><|start|>assistant⟦<|channel|>final<|message|>It jumps."
        "<|end|>⟧<|start|>user<|message|>And the sheep?<|end|><|start|>assistant⟦<|channel|>analysis<|message|>Sheep."
        "<|end|><|start|>assistant<|channel|>final<|message|>They sleep.<|return|>⟧",
    ),
    "smolvlm": (
        "smolvlm.jinja", ["<|im_start|>", "<end_of_utterance>"], {}, MESSAGES,
        "<|im_start|>System: Be brief.<end_of_utterance>\nUser: What does the fox do?<end_of_utterance>\nAssistant:"
        "⟦ It jumps.<end_of_utterance>⟧\nUser: And the sheep?<end_of_utterance>\nAssistant:"
        "⟦ They sleep.<end_of_utterance>⟧\n",
    ),
    "llava-next": (
        "llava_next.jinja", ["<s>", "</s>"], {}, MESSAGES,
        "<<SYS>>\nBe brief.\n<</SYS>>\n\n[INST] What does the fox do? [/INST]⟦ It jumps.</s>⟧ [INST] And the sheep?"
        " [/INST]⟦ They sleep.</s>⟧ ",
    ),
    "chatml": (
        CHATML, ["<|endoftext|>", "<|im_end|>", "<|im_start|>"], {}, MESSAGES,
        QWEN3.format("⟦", "⟦"),
    ),
}  # fmt: skip

READ_PARTS = ("smolvlm", "llava_next")  # of the content of a turn, and no plain text


def model_tokenizer(template: str, special: list[str]):
    """A small tokenizer with the special tokens of a model family, and its template."""
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.bos_token, tokenizer.eos_token = special[:2]
    tokenizer.chat_template = (SHIPPED / template).read_text() if template.endswith(".jinja") else template
    return tokenizer


def given(tokenizer, turns: list[dict]) -> list[dict]:
    """Turns in the form in which a user gives them to a tokenizer's template."""
    if tokenizer.chat_template not in [(SHIPPED / f"{name}.jinja").read_text() for name in READ_PARTS]:
        return turns
    return [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in turns]


def encoded_rows(tokenizer, row: dict, kwargs: dict | None = None, max_length: int = 1000) -> list[dict]:
    """The token rows of one raw row."""
    encoder = RowEncoder(tokenizer, list(row), max_length, kwargs)
    out = encoder({key: [value] for key, value in row.items()}, [0])
    return [dict(zip(out, values)) for values in zip(*out.values())]


def encoded(tokenizer, row: dict, kwargs: dict | None = None, max_length: int = 1000) -> dict:
    [row] = encoded_rows(tokenizer, row, kwargs, max_length)
    return row


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_tokens_and_supervised_spans(case):
    template, special, kwargs, messages, golden = GOLDEN[case]
    golden = golden.replace("TODAY", datetime.now().strftime("%Y-%m-%d"))
    tokenizer = model_tokenizer(template, special)
    rows = encoded_rows(tokenizer, {"messages": messages}, kwargs)
    assert {row["reason"] for row in rows} == {""}
    assert "".join(show_row(row, tokenizer, most=1000) for row in rows) == golden
    text = golden.replace("⟦", "").replace("⟧", "")
    ids = [token for row in rows for token in row["input_ids"]]
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert all(tokenizer.convert_tokens_to_ids(token) in ids for token in special[1:])


def test_an_answer_that_no_token_ends_is_supervised_to_its_end():
    tokenizer = model_tokenizer(CHATML.replace("<|im_end|>", ""), GOLDEN["chatml"][1])
    assert show_row(encoded(tokenizer, {"messages": MESSAGES[1:3]}), tokenizer).endswith("assistant\n⟦It jumps.\n⟧")


@pytest.mark.parametrize("case", GOLDEN)
def test_supervision_starts_where_serving_hands_over_to_the_target(case):
    """What the template itself writes at an answer's start is never supervised, what comes first after it is."""
    template, special, kwargs, messages, _ = GOLDEN[case]
    tokenizer = model_tokenizer(template, special)
    row = encoded(tokenizer, {"messages": messages[:3]}, kwargs)
    turns = given(tokenizer, messages[:2])
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True, **kwargs)
    size = len(prompt["input_ids"])
    assert row["input_ids"][:size] == prompt["input_ids"]
    assert row["supervised"][:size] == [0] * size and row["supervised"][size] == 1


def test_tools_calls_and_results_are_kept_and_only_the_assistant_is_supervised():
    tokenizer = model_tokenizer(*GOLDEN["qwen3, thinking off"][:2])
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    messages = [
        {"role": "user", "content": "Rome?", "tool_calls": None},  # as Arrow fills what other turns have
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "sunny", "tool_calls": None},
        {"role": "assistant", "content": "Sunny.", "tool_calls": None},
    ]
    shown = []
    for given in (tools, json.dumps(tools)):
        rows = encoded_rows(tokenizer, {"messages": messages, "tools": given}, {"enable_thinking": False})
        shown.append([show_row(row, tokenizer, most=2000) for row in rows])
    assert shown[0] == shown[1]
    call, said = shown[0]
    assert '<tools>\n{"type": "function", "function": {"name": "weather"' in call
    assert call.endswith(
        "<|im_start|>user\nRome?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        '⟦<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>⟧\n'
    )
    assert said.endswith(
        "<|im_start|>user\nRome?<|im_end|>\n<|im_start|>assistant\n"
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nsunny\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
        "<think>\n\n</think>\n\n⟦Sunny.<|im_end|>⟧\n"
    )


Q, A = {"role": "user", "content": "What does the fox do?"}, {"role": "assistant", "content": "It jumps."}
SAME = {
    "messages": {"messages": [Q, A]},
    "parts": {"messages": [Q, A | {"content": [{"type": "text", "text": "It "}, {"type": "text", "text": "jumps."}]}]},
    "sharegpt": {"conversations": [{"from": "human", "value": Q["content"]}, {"from": "gpt", "value": A["content"]}]},
    "alpaca": {"instruction": Q["content"], "input": "", "output": A["content"]},
    "prompt and completion": {"prompt": Q["content"], "completion": A["content"]},
    "prompt and completion as turns": {"prompt": [Q], "completion": [A]},
}


@pytest.mark.parametrize("case", SAME)
def test_every_conversational_format_gives_the_same_tokens(case):
    tokenizer = model_tokenizer(*GOLDEN["chatml"][:2])
    assert show_row(encoded(tokenizer, SAME[case]), tokenizer) == (
        "<|im_start|>user\nWhat does the fox do?<|im_end|>\n<|im_start|>assistant\n⟦It jumps.<|im_end|>⟧\n"
    )


def test_alpacas_input_and_a_system_column_are_kept():
    tokenizer = model_tokenizer(*GOLDEN["chatml"][:2])
    row = {"system": "Be brief.", "instruction": "Translate.", "input": "fox", "output": "Fuchs"}
    assert show_row(encoded(tokenizer, row), tokenizer) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nTranslate.\n\nfox<|im_end|>\n"
        "<|im_start|>assistant\n⟦Fuchs<|im_end|>⟧\n"
    )


def test_prompt_and_completion_of_a_target_without_a_template_are_joined_and_the_prompt_is_not_supervised():
    tokenizer = byte_level_tokenizer()
    row = encoded(tokenizer, {"prompt": "the quick", "completion": " brown fox"})
    assert show_row(row, tokenizer) == "the quick⟦ brown fox<|eos|>⟧"


def test_sharegpts_calls_and_observations_are_tool_calls_and_tool_turns():
    tokenizer = model_tokenizer(*GOLDEN["qwen3, thinking off"][:2])
    call = {"name": "weather", "arguments": {"city": "Rome"}}
    said = [("human", "Rome?"), ("function_call", json.dumps(call)), ("observation", "sunny"), ("gpt", "Sunny.")]
    messages = [
        {"role": "user", "content": "Rome?"}, {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "sunny"}, {"role": "assistant", "content": "Sunny."},
    ]  # fmt: skip
    off = {"enable_thinking": False}
    sharegpt = [{"from": role, "value": value} for role, value in said]
    rows = encoded_rows(tokenizer, {"conversations": sharegpt}, off)
    assert rows[0]["reason"] == "" and rows == encoded_rows(tokenizer, {"messages": messages}, off)
    assert '⟦<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}' in show_row(rows[0], tokenizer, 999)


def test_turns_may_be_json_text():
    tokenizer = model_tokenizer(*GOLDEN["chatml"][:2])
    assert encoded(tokenizer, {"messages": json.dumps(MESSAGES)}) == encoded(tokenizer, {"messages": MESSAGES})


@pytest.mark.parametrize("as_text, shown", [(True, '{"city": "Rome", "day": null}'), (False, '{"city": "Rome"}')])
def test_a_null_argument_is_kept_in_json_text_and_elsewhere_taken_for_arrows(as_text, shown):
    tokenizer = model_tokenizer(*GOLDEN["qwen3, thinking off"][:2])
    call = {"name": "weather", "arguments": {"city": "Rome", "day": None}}
    turns = [Q, {"role": "assistant", "content": None, "tool_calls": [call]}]
    row = {"messages": json.dumps(turns) if as_text else turns}
    assert f'"arguments": {shown}}}\n</tool_call>' in show_row(encoded(tokenizer, row), tokenizer, most=999)


def test_a_call_without_arguments_may_have_empty_text_for_them():
    tokenizer = model_tokenizer(*GOLDEN["qwen3, thinking off"][:2])
    call = {"function": {"name": "now", "arguments": ""}}
    row = {"messages": [Q, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    assert '"name": "now", "arguments": {}}' in show_row(encoded(tokenizer, row), tokenizer, most=999)


def test_nothing_that_a_template_writes_before_a_first_assistant_turn_is_supervised():
    """No prompt comes before it that would tell whose its tokens are."""
    tokenizer = model_tokenizer(*GOLDEN["chatml"][:2])
    tokenizer.chat_template = "{{ bos_token + '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}" + CHATML
    row = encoded(tokenizer, {"messages": MESSAGES[2:]})
    assert show_row(row, tokenizer, most=1000) == (
        "<|endoftext|><|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>assistant\nIt jumps.<|im_end|>\n"
        "<|im_start|>user\nAnd the sheep?<|im_end|>\n<|im_start|>assistant\n⟦They sleep.<|im_end|>⟧\n"
    )
    assert encoded(tokenizer, {"messages": [MESSAGES[2]]})["reason"] == "no token of it is supervised"


def shown_rows(tokenizer, row: dict, kwargs: dict) -> str:
    """All token rows of a raw row, one behind the other."""
    return "".join(show_row(part, tokenizer, most=1000) for part in encoded_rows(tokenizer, row, kwargs))


CUT = [{"truncated": True}, {"finish_reason": "length"}, {"metadata": {"finish_reason": "length"}}]


@pytest.mark.parametrize("mark", CUT)
@pytest.mark.parametrize("case", GOLDEN)
def test_an_answer_that_was_cut_teaches_no_end(case, mark):
    template, special, kwargs, messages, golden = GOLDEN[case]
    golden = golden.replace("TODAY", datetime.now().strftime("%Y-%m-%d"))
    start, end = golden.rsplit("They sleep.", 1)
    last = start + "They sleep.⟧" + end.replace("⟧", "")
    tokenizer = model_tokenizer(template, special)
    assert shown_rows(tokenizer, {"messages": messages} | mark, kwargs) == last
    # the row says it of its last answer, a turn of itself
    turns = copy.deepcopy(messages)
    turns[2] |= mark
    first, end = golden.split("⟧", 1)
    first, own = first.rsplit("It jumps.", 1)
    assert shown_rows(tokenizer, {"messages": turns}, kwargs) == f"{first}It jumps.⟧{own}{end}"


SAYS_CUT = [
    {"finish_reason": "LENGTH"}, {"finish_reason": "max_tokens"}, {"finish_reason": "content_filter"},
    {"finish_reason": "abort"}, {"stop_reason": "max_tokens"}, {"stop_reason": "length"}, {"done_reason": "length"},
    {"finish_reasons": ["length"]}, {"truncated": 1}, {"truncated": "true"}, {"is_truncated": True},
    {"metadata": '{"finish_reason": "length"}'}, {"meta_info": {"finish_reason": {"type": "length", "length": 8}}},
    {"choices": [{"finish_reason": "length"}]},
]  # fmt: skip
SAYS_WHOLE = [
    {"finish_reason": "STOP"}, {"stop_reason": "end_turn"}, {"done_reason": "stop"}, {"finish_reason": "eos_token"},
    # vLLM's stop_reason is the token or the text that it stopped at
    {"finish_reason": "stop", "stop_reason": "Human:"}, {"stop_reason": 151645}, {"stop_reason": None},
    {"truncated": 0, "is_truncated": "False"}, {"finish_reason": "", "metadata": "no JSON"},
    {"meta_info": {"finish_reason": {"type": "stop", "matched": 2}}}, {"finish_reasons": []},
]  # fmt: skip


@pytest.mark.parametrize("marks, ends", [(SAYS_CUT, False), (SAYS_WHOLE, True)], ids=["cut", "whole"])
def test_every_word_for_an_answer_that_was_cut_is_understood_and_no_other(marks, ends):
    tokenizer = model_tokenizer(*GOLDEN["chatml"][:2])
    for mark in marks:
        for row in ({"messages": [Q, A]} | mark, {"messages": [Q, A | mark]}):
            shown = show_row(encoded(tokenizer, row), tokenizer)
            assert ("<|im_end|>⟧" in shown) == ends, row


@pytest.mark.parametrize("case", ["qwen3, thinking on", "gpt-oss"])
def test_an_answer_that_was_cut_in_its_thoughts_teaches_no_end_of_them(case):
    template, special, kwargs, messages, _ = GOLDEN[case]
    thoughts = {"reasoning_content": "Sheep sle", "thinking": "Sheep sle"}
    turns = [messages[1], {"role": "assistant", "content": "", "truncated": True} | thoughts]
    tokenizer = model_tokenizer(template, special)
    shown = show_row(encoded(tokenizer, {"messages": turns}, kwargs), tokenizer, most=1000)
    assert "Sheep sle⟧" in shown and shown.count("⟦") == 1


def test_half_a_character_at_a_cut_is_not_learned():
    tokenizer = model_tokenizer(*GOLDEN["chatml"][:2])
    turns = [Q, A | {"content": "It jumps.\ufffd", "truncated": True}]
    assert "⟦It jumps.⟧\ufffd<|im_end|>" in show_row(encoded(tokenizer, {"messages": turns}), tokenizer)


def test_a_cut_row_of_every_format_teaches_no_end():
    tokenizer = model_tokenizer(*GOLDEN["chatml"][:2])
    for row in SAME.values():
        shown = show_row(encoded(tokenizer, row | {"truncated": True}), tokenizer)
        assert shown.endswith("⟦It jumps.⟧<|im_end|>\n")
    plain = byte_level_tokenizer()
    text = encoded(plain, {"text": "the quick", "truncated": True})
    assert show_row(text, plain) == "⟦the quick⟧<|eos|>"
    completion = encoded(plain, {"prompt": "the quick", "completion": " brown fox", "truncated": True})
    assert show_row(completion, plain) == "the quick⟦ brown fox⟧<|eos|>"
    ids = plain("the quick<|eos|>")["input_ids"]
    tokens = encoded(plain, {"input_ids": ids, "supervised": [0] + [1] * (len(ids) - 1), "truncated": True})
    assert tokens["supervised"] == [0] + [1] * (len(ids) - 2) + [0]


MISTYPED = {
    "its messages are not JSON": {"messages": "user: a"},
    "its messages are not a list of turns": {"messages": {"role": "user", "content": "a"}},
    "a turn is not a mapping": {"messages": [["user", "a"], A]},
    "a turn holds more than text": {"messages": [Q | {"content": ["a"]}, A]},
    "a turn holds more than text ": {"prompt": 5, "completion": "a"},
    "a turn's tool_calls are not a list": {"messages": [Q, A | {"tool_calls": "f(1)"}]},
    "a tool call names no function": {"messages": [Q, A | {"tool_calls": ["f(1)"]}]},
    "a turn has the role 'critic'": {"messages": [Q, A, {"role": "critic", "content": "Bad."}]},
    "a turn has the role '5'": {"messages": [Q | {"role": 5}, A]},
    "a function_call is not JSON": {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call",
                                                                                         "value": "f(1)"}]},
    "the chat template does not render tool calls": {"messages": [Q, A | {"tool_calls": [{"name": "f"}]}]},
    "its text is not text": {"text": 5},
    "its instruction is not text": {"instruction": ["a"], "output": "b"},
    "its system is not text": {"messages": [Q, A], "system": 5},
    "its input_ids and supervised differ in length": {"input_ids": [5, 6, 7], "supervised": [0, 1]},
}  # fmt: skip


@pytest.mark.parametrize("reason", MISTYPED)
def test_a_mistyped_row_is_named_and_nothing_of_it_vanishes_silently(reason):
    tokenizer = model_tokenizer(*GOLDEN["chatml"][:2])
    row = encoded(tokenizer, MISTYPED[reason])
    assert (row["reason"], row["input_ids"], row["supervised"]) == (reason.strip(), [], [])


UNUSABLE = {
    "it has no turns": {"messages": []},
    "it has no assistant turn": {"messages": [{"role": "system", "content": "Be brief."}]},
    "a turn lacks its role or content": {"messages": [{"role": "user"}, A]},
    "a turn holds more than text ('image'): drafting is for text alone": {
        "messages": [{"role": "user", "content": [{"type": "image"}]}, A]
    },
    "its column 'images' is filled: drafting is for text alone": {"messages": [Q, A], "images": ["a.jpg"]},
    "its columns are empty": {"messages": None},
    "its tools are not JSON": {"messages": [Q, A], "tools": "[{"},
    "a tool call's arguments are not JSON": {
        "messages": [Q, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]
    },
    "the chat template failed: roles must alternate user and assistant": {"messages": [Q, Q, A]},
    "its prompt alone fills the 12 tokens of a row": {"messages": [Q, A]},
}


@pytest.mark.parametrize("reason", UNUSABLE)
def test_a_row_of_no_use_says_why_and_gives_no_tokens(reason):
    tokenizer = model_tokenizer(*GOLDEN["mistral"][:2])
    row = encoded(tokenizer, UNUSABLE[reason], max_length=12 if "fills" in reason else 1000)
    assert (row["reason"], row["input_ids"], row["supervised"]) == (reason, [], [])


# ---- every answer stands after what serving gives to the target


def prompts(tokenizer, turns: list[dict], kwargs: dict) -> list[list[int]]:
    """What serving gives to the target before each answer."""
    turns = given(tokenizer, turns)
    return [
        tokenizer.apply_chat_template(turns[:i], add_generation_prompt=True, **kwargs)["input_ids"]
        for i, turn in enumerate(turns)
        if turn["role"] == "assistant"
    ]


def before_answers(rows: list[dict]) -> list[list[int]]:
    """The ids before each supervised span, of all rows of a conversation."""
    found = []
    for row in rows:
        mask = row["supervised"]
        starts = [i for i, flag in enumerate(mask) if flag and not (i and mask[i - 1])]
        found += [row["input_ids"][:start] for start in starts]
    return found


IN_CONTENT = copy.deepcopy(MESSAGES)
for turn, thought in ((2, "Foxes."), (4, "Sheep.")):
    IN_CONTENT[turn]["content"] = f"<think>\n{thought}\n</think>\n\n{MESSAGES[turn]['content']}"
FAMILIES = [
    "qwen3", "qwen3_5_think", "qwen3_5_nothink", "deepseek_r1_distill", "deepseekv3", "nemotron_3_nano", "glm4moe",
    "gemma4_v5", "gptoss", "cohere", "llama3_1", "qwen2_5_vl", "smolvlm",
]  # fmt: skip


@pytest.mark.parametrize("kwargs", [{}, {"enable_thinking": False}, {"enable_thinking": True}])
@pytest.mark.parametrize("family", FAMILIES)
def test_before_every_answer_stand_the_ids_that_serving_gives(family, kwargs):
    tokenizer = model_tokenizer(f"{family}.jinja", ["<|begin|>", "<|end_of_all|>", "<|im_start|>", "<|im_end|>"])
    thinking_is_off = kwargs.get("enable_thinking") is False
    for turns in (MESSAGES, THOUGHTFUL, IN_CONTENT):
        if family in ("deepseekv3", "qwen3_5_think") and turns is THOUGHTFUL:
            turns = [turn | {"thinking": "ignored"} for turn in turns]
        rows = encoded_rows(tokenizer, {"messages": turns}, kwargs, max_length=3000)
        lost = sum(row["thoughts"] for row in rows)
        is_closed = tokenizer.decode(before_answers(rows)[0]).rstrip().endswith("</think>")
        assert lost == (2 if turns is not MESSAGES and (thinking_is_off or is_closed) else 0)
        served = MESSAGES if lost else turns
        assert before_answers(rows) == prompts(tokenizer, served, kwargs)
        words = tokenizer.decode([t for row in rows for t, s in zip(row["input_ids"], row["supervised"]) if s])
        assert "It jumps." in words and "They sleep." in words


def test_thoughts_that_a_template_drops_are_learned_after_the_thought_it_begins():
    tokenizer = model_tokenizer("deepseek_r1_distill.jinja", ["<|begin|>", "<｜end▁of▁sentence｜>"])
    rows = encoded_rows(tokenizer, {"messages": THOUGHTFUL})
    shown = [show_row(row, tokenizer, most=1000) for row in rows]
    assert shown[0].endswith("<think>\n⟦Foxes.\n</think>\n\nIt jumps.<｜end▁of▁sentence｜>⟧")
    assert shown[1].endswith("<think>\n⟦Sheep.\n</think>\n\nThey sleep.<｜end▁of▁sentence｜>⟧")


def test_a_template_whose_beginnings_change_gives_a_row_for_each_answer():
    tokenizer = model_tokenizer(*GOLDEN["chatml"][:2])
    tokenizer.chat_template = CHATML.replace("m.content", "(m.content if loop.last or m.role == 'user' else 'gone')")
    rows = encoded_rows(tokenizer, {"messages": MESSAGES[1:]})
    assert [show_row(row, tokenizer, most=1000) for row in rows] == [
        "<|im_start|>user\nWhat does the fox do?<|im_end|>\n<|im_start|>assistant\n⟦It jumps.<|im_end|>⟧\n",
        "<|im_start|>user\nWhat does the fox do?<|im_end|>\n<|im_start|>assistant\ngone<|im_end|>\n"
        "<|im_start|>user\nAnd the sheep?<|im_end|>\n<|im_start|>assistant\n⟦They sleep.<|im_end|>⟧\n",
    ]
    assert [row["apart"] for row in rows] == [True, False]


def test_no_token_spans_the_place_where_serving_hands_over():
    tokenizer = model_tokenizer(*GOLDEN["chatml"][:2])
    begun = "('f' if m.role == 'assistant' else '') + m.content"
    tokenizer.chat_template = CHATML.replace("assistant\n'", "assistant\nf'").replace("m.content", begun)
    assert tokenizer("fo")["input_ids"] != tokenizer("f")["input_ids"] + tokenizer("o")["input_ids"]
    turns = [Q, A | {"content": "ox"}, Q, A | {"content": "or"}]
    rows = encoded_rows(tokenizer, {"messages": turns})
    assert before_answers(rows) == prompts(tokenizer, turns, {})
    assert show_row(rows[0], tokenizer).endswith("assistant\nf⟦ox<|im_end|>⟧\n")


def test_answers_whose_prompts_are_too_long_are_left_out_and_the_rows_before_are_kept():
    tokenizer = model_tokenizer(*GOLDEN["qwen3, thinking off"][:2])
    whole = encoded_rows(tokenizer, {"messages": MESSAGES})
    size = len(prompts(tokenizer, MESSAGES, {})[1])
    [row] = encoded_rows(tokenizer, {"messages": MESSAGES}, max_length=size)
    assert row["input_ids"] == whole[0]["input_ids"] and row["cut"] and row["apart"]


def test_a_first_answer_that_nobody_asked_for_is_not_supervised_with_markers_either():
    tokenizer = byte_level_tokenizer(CHAT_TEMPLATE)
    assert encoded(tokenizer, {"messages": [A]})["reason"] == "no token of it is supervised"


def test_a_template_whose_prompt_begins_otherwise_than_its_answers_makes_its_rows_unusable():
    tokenizer = model_tokenizer(*GOLDEN["chatml"][:2])
    tokenizer.chat_template = CHATML.replace("assistant\n'", "assistant\nWell, '")
    with pytest.raises(
        UnusableRow, match="begins an answer otherwise than its generation prompt.*chat_template_kwargs"
    ):
        RowEncoder(tokenizer, ["messages"], 1000, None).encode({"messages": MESSAGES})


# ---- begin and end tokens


def bos_tokenizer(after: str):
    """A tokenizer that puts its begin token before each text, and behind it what `after` says."""
    tokenizer = model_tokenizer(*GOLDEN["mistral"][:2])
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=f"<s> $A {after}".strip(), special_tokens=ids)
    return tokenizer


@pytest.mark.parametrize("after", ["", "</s>"])
@pytest.mark.parametrize("begin", ["", "<s>"])
def test_a_text_begins_once_and_ends_once(begin, after):
    tokenizer = bos_tokenizer(after)
    row = encoded(tokenizer, {"text": begin + "the fox"})
    assert show_row(row, tokenizer) == "⟦<s>the fox</s>⟧"
    tokenizer.chat_template = None
    row = encoded(tokenizer, {"prompt": begin + "the", "completion": " fox"})
    assert show_row(row, tokenizer) == "<s>the⟦ fox</s>⟧"


@pytest.mark.parametrize("after", ["", "</s>"])
@pytest.mark.parametrize("begin", ["", "<s>"])
def test_a_prompt_begins_once_and_does_not_end(begin, after):
    tokenizer = bos_tokenizer(after)
    expected = tokenizer("<s>the fox", add_special_tokens=False)["input_ids"]
    assert prompt_ids(Conversation(0, {"text": begin + "the fox"}), tokenizer, None, 99) == expected
    assert prompt_ids(Conversation(0, {"text": ""}), tokenizer, None, 99) == "its text is empty"
    tokenizer.chat_template = None
    rows = Dataset.from_list([{"prompt": begin + "the fox"}])
    [prompt] = encode_prompts(rows, tokenizer, 1, 99, None, Wording(("prompt",)))
    assert prompt[0].tolist() == expected


# ---- several chat templates


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def test_rows_with_tools_are_rendered_as_serving_renders_them():
    tokenizer = model_tokenizer(*GOLDEN["qwen3, thinking off"][:2])
    tokenizer.chat_template = {"default": CHATML, "tool_use": tokenizer.chat_template}
    row = encoded(tokenizer, {"messages": MESSAGES[:3], "tools": TOOLS})
    [prompt] = prompts(tokenizer, MESSAGES[:3], {"tools": TOOLS})
    assert "<tools>" in tokenizer.decode(prompt) and before_answers([row]) == [prompt]
    assert prompt_ids(asked(TOOLS), tokenizer, None, 99) == prompt
    # a row without tools goes through the default, and trl's marks are found for each template by itself
    plain = encoded(tokenizer, {"messages": MESSAGES[:3]})
    assert before_answers([plain]) == prompts(tokenizer, MESSAGES[:3], {}) and not plain["unseen_tools"]


def test_several_templates_without_a_default_serve_the_rows_with_tools():
    tokenizer = model_tokenizer(*GOLDEN["qwen3, thinking off"][:2])
    tokenizer.chat_template = {"tool_use": tokenizer.chat_template}
    assert encoded(tokenizer, {"messages": MESSAGES[:3], "tools": TOOLS})["reason"] == ""
    assert "none called default" in encoded(tokenizer, {"messages": MESSAGES[:3]})["reason"]


def asked(tools: list[dict]) -> Conversation:
    """A conversation with tools, at its first question."""
    conversation = Conversation(0, {"messages": MESSAGES[:3], "tools": tools})
    assert conversation.next_question()
    return conversation


def test_tools_that_a_template_never_mentions_are_named():
    tokenizer = model_tokenizer(*GOLDEN["chatml"][:2])
    row = encoded(tokenizer, {"messages": MESSAGES, "tools": TOOLS})
    assert row["unseen_tools"] and row["reason"] == ""
    with pytest.warns(UserWarning, match="never mentions any tools.*does not see the tools"):
        assert prompt_ids(asked(TOOLS), tokenizer, None, 99) == prompts(tokenizer, MESSAGES[:3], {})[0]
