"""Raw rows -> token rows and the supervised mask, through a real tokenizer and its chat template."""

import copy
import json

import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import CHAT_TEMPLATE, TEXT
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_specauf.conversations import load_rows, longest_run, prepare_rows, prompt_length, row_format, show_row

UNMARKED = CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
TURNS = [
    ("system", "Be brief."),
    ("user", "What does the fox do?"),
    ("assistant", "It jumps over the lazy dog."),
    ("user", "And the sheep?"),
    ("assistant", "They sleep: 0123456789."),
]
MESSAGES = [{"role": role, "content": content} for role, content in TURNS]
ANSWERS = "It jumps over the lazy dog.<|end|>They sleep: 0123456789.<|end|>"
MARKED_ROW = (
    "<|system|>Be brief.<|end|><|user|>What does the fox do?<|end|><|assistant|>⟦It jumps over the lazy dog.<|end|>⟧"
    "<|user|>And the sheep?<|end|><|assistant|>⟦They sleep: 0123456789.<|end|>⟧"
)


@pytest.fixture
def prepare(tokenizer):
    """prepare(messages=[...]) -> token rows; other keywords go to `prepare_rows`, `template` replaces the template."""

    def call(template=CHAT_TEMPLATE, max_length=128, block_size=4, mask_token_id=None, kwargs=None, **columns):
        own = copy.deepcopy(tokenizer)
        own.chat_template = template
        return prepare_rows(
            Dataset.from_dict(columns),
            own,
            max_length=max_length,
            block_size=block_size,
            mask_token_id=tokenizer.mask_token_id if mask_token_id is None else mask_token_id,
            chat_template_kwargs=kwargs,
        )

    return call


def supervised_text(row: dict, tokenizer) -> str:
    return tokenizer.decode([t for t, s in zip(row["input_ids"], row["supervised"]) if s])


# ---- text


def test_text_is_cut_into_rows_all_supervised_with_eos_at_the_end(prepare, tokenizer):
    rows = prepare(text=[TEXT, "the fox"], max_length=16)
    ids = tokenizer(TEXT)["input_ids"] + [tokenizer.eos_token_id]
    chunks = [ids[i : i + 16] for i in range(0, len(ids), 16)]
    assert len(chunks) > 2
    assert rows["input_ids"][:-1] == chunks
    assert rows["input_ids"][-1] == tokenizer("the fox")["input_ids"] + [tokenizer.eos_token_id]
    assert rows["supervised"] == [[1] * len(ids) for ids in rows["input_ids"]]
    assert rows["row"] == list(range(len(rows)))


def test_eos_that_text_already_ends_with_is_not_doubled(prepare, tokenizer):
    [ids] = prepare(text=["the quick brown fox<|eos|>"])["input_ids"]
    assert ids == tokenizer("the quick brown fox")["input_ids"] + [tokenizer.eos_token_id]


# ---- conversations


def test_only_the_assistants_text_and_end_token_are_supervised(prepare, tokenizer):
    [row] = prepare(messages=[MESSAGES])
    assert supervised_text(row, tokenizer) == ANSWERS
    assert row["input_ids"] == tokenizer.apply_chat_template(MESSAGES, return_dict=True)["input_ids"]
    assert show_row(row, tokenizer) == MARKED_ROW


def test_sharegpt_fields_give_the_same_rows_as_messages(prepare):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    sharegpt = [{"from": names[role], "value": content} for role, content in TURNS]
    assert prepare(conversations=[sharegpt]).to_list() == prepare(messages=[MESSAGES]).to_list()


def test_a_template_without_markers_gives_the_mask_of_the_one_with_them(prepare):
    """transformers itself returns an all-zero mask there, silently (marin#7237)."""
    batch = [MESSAGES, MESSAGES[:3], MESSAGES[1:]]
    assert prepare(UNMARKED, messages=batch).to_list() == prepare(messages=batch).to_list()


@pytest.mark.parametrize(
    "changed",
    [
        # thinking-style: an answer is written differently once another turn follows
        UNMARKED.replace("{{ m['content'] }}<|end|>", "{{ m['content'] if loop.last else 'gone' }}<|end|>", 1),
        # the generation prompt is not how the answer's turn begins
        UNMARKED.replace("add_generation_prompt %}<|assistant|>", "add_generation_prompt %}<|assistant|>think"),
    ],
)
def test_a_template_that_renders_beginnings_differently_is_refused(prepare, changed):
    assert changed != UNMARKED
    with pytest.raises(ValueError, match="row 1: .*renders a conversation's beginning differently.*generation"):
        prepare(changed, messages=[MESSAGES[:2], MESSAGES])


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, UNMARKED])
def test_chat_template_kwargs_reach_the_template(prepare, tokenizer, template):
    template = "{% if enable_thinking %}<|system|>think<|end|>{% endif %}" + template
    [plain] = prepare(template, messages=[MESSAGES[1:]])
    [thinking] = prepare(template, messages=[MESSAGES[1:]], kwargs={"enable_thinking": True})
    prefix = tokenizer("<|system|>think<|end|>")["input_ids"]
    assert thinking["input_ids"] == prefix + plain["input_ids"]
    assert thinking["supervised"] == [0] * len(prefix) + plain["supervised"]


def test_a_failing_template_names_the_row(prepare):
    template = "{{ raise_exception('no system turn') if messages[0]['role'] == 'system' }}" + CHAT_TEMPLATE
    with pytest.raises(ValueError, match="row 2: the chat template failed: no system turn"):
        prepare(template, messages=[MESSAGES[1:], MESSAGES[1:3], MESSAGES])


def test_conversations_are_truncated_to_max_length(prepare):
    [whole], [cut] = prepare(messages=[MESSAGES]), prepare(messages=[MESSAGES], max_length=48)
    assert len(whole["input_ids"]) > 48
    assert cut["input_ids"] == whole["input_ids"][:48] and cut["supervised"] == whole["supervised"][:48]


def test_token_rows_pass_through(prepare):
    ids, supervised = [list(range(10, 20)), list(range(30, 36))], [[0] * 4 + [1] * 6, [0] + [1] * 5]
    rows = prepare(input_ids=ids, supervised=supervised, text=["", ""])
    assert rows.column_names == ["input_ids", "supervised", "length", "row"]
    assert rows["length"] == [10, 6]
    assert rows["input_ids"] == ids and rows["supervised"] == supervised


# ---- rows left out and data refused


def test_rows_without_two_supervised_tokens_in_a_row_are_dropped_and_counted(prepare, capsys):
    whole, supervised = list(range(10, 18)), [0, 0] + [1] * 6
    alone = [0, 0, 1, 0, 0, 1, 0, 1]
    rows = prepare(
        input_ids=[whole, whole, whole[:2], whole, whole],
        supervised=[supervised, alone, [1, 1], [0] * 8, supervised],  # the third holds an anchor without context
    )
    assert rows["supervised"] == [supervised, supervised]
    assert rows["row"] == [0, 1]
    assert "dropped 3 of 5 rows: fewer than 2 supervised tokens" in capsys.readouterr().out


def test_nothing_is_printed_when_no_row_is_dropped(prepare, capsys):
    prepare(messages=[MESSAGES])
    assert "dropped" not in capsys.readouterr().out


REFUSED = {
    "no assistant turn": (
        dict(messages=[MESSAGES[:2], MESSAGES[1:2]]),
        "not one token of 2 rows is supervised.*assistant turns",
    ),
    "rows too short": (
        dict(text=["the fox", "dog"], block_size=16),
        "rows are too short: only 0 of 2.*16.*Lower block_size, raise max_length",
    ),
    "answers cut off": (
        dict(messages=[MESSAGES[1:3]], max_length=24, block_size=16),
        "only 0 of 1.*max_length .now 24.",
    ),
    "one supervised token": (
        dict(input_ids=[[10, 11, 12, 13]], supervised=[[0, 0, 1, 0]], block_size=2),
        "rows are too short",
    ),
    "mask token in text": (
        dict(text=["the fox", "the <|mask|> fox"]),
        r"row 1 contains the mask token \(id 2\).*Choose another mask_token_id",
    ),
    "mask token in an answer": (
        dict(messages=[MESSAGES, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<|mask|>"}]]),
        "row 1 contains the mask token",
    ),
    "no chat template": (
        dict(template=None, messages=[MESSAGES]),
        "tokenizer has no chat template: give `text` rows",
    ),
    "unknown columns": (
        dict(prompt=["a"], answer=["b"]),
        r"columns are \['prompt', 'answer'\]: none of `messages`.*Rename",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_data_that_would_train_nothing_is_refused_with_what_to_do(prepare, case):
    arguments, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        prepare(**arguments)


def test_a_tenth_of_the_rows_with_a_whole_block_is_enough(prepare):
    short, whole = ([10, 11, 12], [0, 1, 1]), (list(range(10, 20)), [0, 0] + [1] * 8)
    for rows, enough in (([short] * 9 + [whole], True), ([short] * 10 + [whole], False)):
        columns = dict(zip(("input_ids", "supervised"), map(list, zip(*rows))))
        if enough:
            assert len(prepare(**columns, block_size=8)) == len(rows)  # partial blocks are kept
        else:
            with pytest.raises(ValueError, match="only 1 of 11 hold a whole block of 8"):
                prepare(**columns, block_size=8)


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        (["id", "text"], "text"),
        (["text", "messages"], "messages"),
        (["id", "conversations"], "conversations"),
        (["messages", "input_ids"], "tokens"),
    ],
)
def test_row_format_prefers_tokens_then_conversations_then_text(columns, kind):
    assert row_format(columns) == kind


# ---- files and looking at rows


def test_local_files_are_read_by_their_ending(tmp_path):
    rows = [{"text": "the fox"}, {"text": "the lazy dog"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "rows.txt").write_text("the fox\nthe lazy dog\n")
    (tmp_path / "rows.csv").write_text("text\nthe fox\nthe lazy dog\n")
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for ending in ("jsonl", "txt", "csv", "parquet"):
        assert load_rows(str(tmp_path / f"rows.{ending}")).to_list() == rows, ending


def test_a_missing_file_is_named_with_its_full_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"'rows.jsonl' looks like a local file.*{tmp_path}/rows.jsonl"):
        load_rows("rows.jsonl")


def test_show_row_marks_supervised_spans_and_says_where_it_stops(tokenizer):
    ids = tokenizer("the fox jumps")["input_ids"]
    row = {"input_ids": ids, "supervised": [1] + [0] * (len(ids) - 2) + [1]}
    words = [tokenizer.decode([i]) for i in ids]
    assert show_row(row, tokenizer) == f"⟦{words[0]}⟧{''.join(words[1:-1])}⟦{words[-1]}⟧"
    assert show_row(row, tokenizer, most=1) == f"⟦{words[0]}⟧…"


def test_show_row_keeps_a_character_of_several_tokens_whole(tokenizer):
    ids = tokenizer("naïve")["input_ids"]
    assert "naïve" not in "".join(tokenizer.decode([i]) for i in ids)
    assert show_row({"input_ids": ids, "supervised": [1] * len(ids)}, tokenizer) == "⟦naïve⟧"


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 1), max_size=12))
def test_longest_run_of_supervised_tokens(supervised):
    assert longest_run(supervised) == max(map(len, "".join(map(str, supervised)).split("0")))


@pytest.mark.parametrize(
    ("supervised", "length"),
    [([0, 0, 0, 1, 1, 0, 1], 3), ([1] * 8, 4), ([0, 0, 0], 3), ([1], 0)],
)
def test_prompt_ends_before_the_first_answer_or_at_half_of_a_text(supervised, length):
    assert prompt_length(supervised) == length
