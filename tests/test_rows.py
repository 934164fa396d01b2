"""Raw rows -> token rows and the supervised mask, through a real tokenizer and its chat template."""

import copy
import json
import shutil

import datasets
import pytest
from conftest import CHAT_TEMPLATE, ROOT, TEXT, warm_python
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_specauf.data.config import DataArguments
from hf_specauf.data.findings import longest_run
from hf_specauf.data.rows import prepare_rows, prompt_length, show_row
from hf_specauf.data.sources import load_data, load_rows
from hf_specauf.data.tokens import RowEncoder

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

    def call(
        template=CHAT_TEMPLATE, max_length=128, block_size=4, mask_token_id=None, kwargs=None, several=None,
        packing=False, num_proc=None, heldout=None, positions=None, **columns,
    ):  # fmt: skip
        own = copy.deepcopy(tokenizer)
        own.chat_template = template
        return prepare_rows(
            several or Dataset.from_dict(columns),
            own,
            max_length=max_length,
            block_size=block_size,
            mask_token_id=tokenizer.mask_token_id if mask_token_id is None else mask_token_id,
            vocab_size=len(tokenizer),
            chat_template_kwargs=kwargs,
            packing=packing,
            num_proc=num_proc,
            heldout=heldout,
            positions=positions,
        )

    return call


def supervised_text(row: dict, tokenizer) -> str:
    return tokenizer.decode([t for t, s in zip(row["input_ids"], row["supervised"]) if s])


# ---- text


def test_documents_are_no_longer_than_the_targets_positions_and_packed_rows_may_be(prepare, capsys):
    conversation = [{"role": "user", "content": "Go"}, {"role": "assistant", "content": "one two three " * 9}]
    rows = prepare(messages=[conversation] * 3, positions=50, packing=True)
    assert rows["length"] == [100, 50] and rows[0]["document_ids"] == [0] * 50 + [1] * 50
    assert "cut 3 rows at the target's 50 positions, below max_length" in capsys.readouterr().out
    [*full, rest] = prepare(text=["one two three " * 90], max_length=999, positions=50)["length"]
    assert set(full) == {50} and 0 < rest <= 50


def test_rows_with_a_cut_answer_are_counted_and_named(prepare, capsys):
    whole = [{"role": "user", "content": "Go"}, {"role": "assistant", "content": "one two three four"}]
    cut = [whole[0], {"role": "assistant", "content": "one two three five"}]
    prepare(messages=[whole, cut], finish_reason=["stop", "MAX_TOKENS"])
    assert "1 rows say that an answer of theirs was cut, first: row 1" in capsys.readouterr().out
    prepare(text=["one two three four " * 20] * 2, truncated=[True, False])
    assert "1 rows say that an answer of theirs was cut, first: row 0" in capsys.readouterr().out


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


# ---- rows that are there twice


def test_rows_that_are_there_twice_are_counted_and_named_and_kept(prepare, capsys):
    texts = [f"the fox jumps over {i} dogs" for i in range(4)]
    rows = prepare(text=[*texts, texts[1], texts[2], texts[1]])
    assert len(rows) == 7
    assert "3 token rows are the same as another, first: row 4 as row 1: they" in capsys.readouterr().out
    prepare(text=texts)
    assert "the same as another" not in capsys.readouterr().out


def test_the_same_conversation_in_two_sources_and_formats_is_found(prepare, capsys):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    sharegpt = [{"from": names[role], "value": content} for role, content in TURNS]
    one = Dataset.from_dict({"id": [1, 2], "messages": [MESSAGES[:3], MESSAGES]})
    two = Dataset.from_dict({"conversations": [sharegpt], "id": ["x"]})
    prepare(several=[one, two])
    assert (
        "1 token rows are the same as another, first: row 0 of source 2 as row 1 of source 1"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("packing", [False, True])
def test_held_out_rows_are_left_out_of_training_and_counted(prepare, tokenizer, packing, capsys):
    texts = [f"the fox jumps over {i} dogs" for i in range(6)]
    heldout = Dataset.from_dict({"text": [texts[4], "the sheep sleep", texts[1]]})
    rows = prepare(text=[*texts, texts[1]], heldout=[heldout], packing=packing)
    text = " ".join(tokenizer.decode(ids) for ids in rows["input_ids"])
    assert [number for number in range(6) if f"over {number} dogs" in text] == [0, 2, 3, 5]
    said = capsys.readouterr().out
    assert "dropped 3 of 7 rows: it is a held-out row too (3, first: row 1)" in said
    assert "the same as another" not in said


def test_training_rows_that_are_nearly_all_held_out_are_refused(prepare):
    texts = [f"the fox jumps over {i} dogs" for i in range(4)]
    with pytest.raises(ValueError, match=r"3 of 4 training rows are held-out rows too \(first: row 0\).*eval_rows: 0"):
        prepare(text=texts, heldout=[Dataset.from_dict({"text": texts[:3]})])


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


def test_a_template_that_begins_answers_otherwise_than_its_prompt_is_refused(prepare):
    changed = UNMARKED.replace("add_generation_prompt %}<|assistant|>", "add_generation_prompt %}<|assistant|>think")
    with pytest.raises(ValueError, match="otherwise than its generation prompt.*chat_template_kwargs.*row 1"):
        prepare(changed, messages=[MESSAGES[:2], MESSAGES])


# An answer is written differently once another turn follows.
CHANGING = CHAT_TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'] if loop.last else 'gone' }}", 1)
SPLIT_ROWS = [
    "<|user|>What does the fox do?<|end|><|assistant|>⟦It jumps over the lazy dog.<|end|>⟧",
    "<|user|>What does the fox do?<|end|><|assistant|>gone<|end|><|user|>And the sheep?<|end|><|assistant|>"
    "⟦They sleep: 0123456789.<|end|>⟧",
]


def test_a_conversation_becomes_several_rows_where_one_cannot_hold_its_answers(prepare, tokenizer, capsys):
    rows = prepare(CHANGING, messages=[MESSAGES[1:3], MESSAGES[1:]])
    assert [show_row(row, tokenizer) for row in rows] == [SPLIT_ROWS[0], *SPLIT_ROWS]
    assert rows["row"] == [0, 1, 2]
    assert capsys.readouterr().out == (
        "2 rows of messages -> 3 token rows\n1 token rows are the same as another, first: row 1 as row 0: they are "
        "trained on as often as they are there\n1 conversations are several rows each, first: row 1: the chat "
        "template writes earlier turns differently once a conversation goes on\n"
    )


def test_rows_of_one_conversation_are_documents_of_their_own_when_packed(prepare):
    apart = prepare(CHANGING, messages=[MESSAGES[1:]], max_length=200)
    [packed] = prepare(CHANGING, messages=[MESSAGES[1:]], max_length=200, packing=True)
    assert sorted(apart["length"]) == sorted(packed["document_ids"].count(number) for number in (0, 1))


def test_most_rows_are_refused_by_their_number_and_not_by_that_of_their_token_rows(prepare):
    """Three conversations of which two are refused stay two of three, however many rows the third becomes."""
    template = "{{ raise_exception('no') if messages[0]['role'] == 'system' }}" + CHANGING
    with pytest.raises(ValueError, match="2 of 3 rows cannot be used"):
        prepare(template, messages=[MESSAGES, MESSAGES, MESSAGES[1:] * 4])


@pytest.mark.parametrize("numbers, trained", [([0, 1, 2, 3, 4, 4, 4], 4), ([0, 0, 0, 1, 2, 3, 4], 6), ([5, 5, 5], 2)])
def test_no_conversation_is_both_trained_on_and_held_out(numbers, trained, tmp_path):
    """`regenerate` writes several rows of one."""
    lines = [json.dumps({"source_row": number, "messages": MESSAGES}) for number in numbers]
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    [train], [heldout] = load_data(DataArguments(dataset_name=str(tmp_path / "own.jsonl"), eval_rows=1))
    assert [train["source_row"], heldout["source_row"]] == [numbers[:trained], numbers[trained:]]


def test_thoughts_are_left_out_and_counted_where_thinking_is_off(prepare, tokenizer, capsys):
    template = CHAT_TEMPLATE.replace("{{ m['content'] }}", "{{ (m['thinking'] or '') + m['content'] }}", 1)
    turns = [MESSAGES[1], MESSAGES[2] | {"thinking": "Foxes."}]
    thinking, plain = (
        prepare(template, messages=[turns] * 2, kwargs={}),
        prepare(template, messages=[turns[:1] + MESSAGES[2:3]]),
    )
    capsys.readouterr()
    off = prepare(template, messages=[MESSAGES[1:3], turns, turns], kwargs={"enable_thinking": False})
    assert (
        "left out the thoughts of 2 answers, first: row 1: with these chat_template_kwargs" in capsys.readouterr().out
    )
    assert "Foxes." in supervised_text(thinking[0], tokenizer)
    assert off["input_ids"] == list(plain["input_ids"]) * 3


def test_tools_that_a_template_never_mentions_are_named(prepare, capsys):
    tools = [{"name": "weather"}]
    assert len(prepare(messages=[MESSAGES] * 3, tools=[None, tools, tools])) == 3
    assert "the tools of 2 rows are not in their prompts, first: row 1: the chat" in capsys.readouterr().out


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, UNMARKED])
def test_chat_template_kwargs_reach_the_template(prepare, tokenizer, template):
    template = "{% if enable_thinking %}<|system|>think<|end|>{% endif %}" + template
    [plain] = prepare(template, messages=[MESSAGES[1:]])
    [thinking] = prepare(template, messages=[MESSAGES[1:]], kwargs={"enable_thinking": True})
    prefix = tokenizer("<|system|>think<|end|>")["input_ids"]
    assert thinking["input_ids"] == prefix + plain["input_ids"]
    assert thinking["supervised"] == [0] * len(prefix) + plain["supervised"]


NO_SYSTEM = "{{ raise_exception('no system turn') if messages[0]['role'] == 'system' }}" + CHAT_TEMPLATE


def test_rows_of_no_use_are_left_out_counted_by_reason_and_named(prepare, capsys):
    good, only_system = MESSAGES[1:], MESSAGES[:1]
    rows = prepare(NO_SYSTEM, messages=[good, good, MESSAGES, [], good, only_system, MESSAGES, None, good, good])
    assert rows["input_ids"] == prepare(messages=[good] * 5)["input_ids"]
    assert (
        "10 rows of messages -> 5 token rows\ndropped 5 of 10 rows: the chat template failed: no system turn (2, "
        "first: row 2), it has no turns (1, first: row 3), it has no assistant turn (1, first: row 5), its columns "
        "are empty (1, first: row 7)\n"
    ) in capsys.readouterr().out


def test_a_template_that_refuses_most_rows_stops_with_the_reasons(prepare):
    with pytest.raises(
        ValueError, match=r"3 of 4 rows cannot be used \(the chat template failed: no system turn \(3, "
    ):
        prepare(NO_SYSTEM, messages=[MESSAGES[1:], MESSAGES, MESSAGES, MESSAGES])


def test_a_source_of_a_mixture_whose_rows_are_refused_is_not_hidden_by_long_texts(prepare):
    sources = [Dataset.from_dict(columns) for columns in ({"text": [TEXT * 9]}, {"messages": [MESSAGES] * 3})]
    with pytest.raises(
        ValueError, match=r"3 of 3 rows cannot be used .*no system turn \(3, first: row 0 of source 2\)"
    ):
        prepare(NO_SYSTEM, several=sources, max_length=16)


def test_rows_of_several_schemas_are_read_each_in_its_own(prepare, capsys):
    sharegpt = [{"from": "human", "value": "What does the fox do?"}, {"from": "gpt", "value": "It jumps."}]
    messages = [{"role": "user", "content": "What does the fox do?"}, {"role": "assistant", "content": "It jumps."}]
    rows = prepare(messages=[messages, None, None], conversations=[None, sharegpt, None], text=[None, None, "the fox"])
    assert rows[0]["input_ids"] == rows[1]["input_ids"] and rows[2]["supervised"] == [1] * len(rows[2]["input_ids"])
    sources = {"messages": [messages]}, {"conversations": [sharegpt]}, {"text": ["the fox"]}
    several = [Dataset.from_dict(columns) for columns in sources]
    capsys.readouterr()
    several = prepare(several=several)
    assert several.remove_columns("row").to_list() == rows.remove_columns("row").to_list()
    assert "3 rows of messages, conversations, text -> 3 token rows" in capsys.readouterr().out


def test_a_row_of_a_mixture_is_named_with_its_source(prepare, capsys):
    own = {"input_ids": [list(range(10, 20))], "supervised": [[0] * 4 + [1] * 6]}
    sources = [Dataset.from_dict(columns) for columns in (own, {"messages": [MESSAGES, MESSAGES[:2]]})]
    assert len(prepare(several=sources)) == 2
    assert "dropped 1 of 3 rows: it has no assistant turn (1, first: row 1 of source 2)" in capsys.readouterr().out
    with pytest.raises(ValueError, match="1 of 1 rows contain the mask token .id 15, first: row 0 of source 2"):
        prepare(several=[sources[1], Dataset.from_dict(own)], mask_token_id=15)


def test_conversations_are_cut_at_max_length_and_counted(prepare, capsys):
    [whole], [cut] = prepare(messages=[MESSAGES]), prepare(messages=[MESSAGES], max_length=48)
    assert "cut 1 rows at max_length, 48 tokens" in capsys.readouterr().out
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


def test_a_row_with_the_mask_token_among_many_is_left_out_counted_and_named(prepare, capsys):
    text, masked = "the quick brown fox", "the <|mask|> fox"
    rows = prepare(text=[text, masked] + [text] * 98)
    assert rows["input_ids"] == prepare(text=[text] * 99)["input_ids"]
    assert "dropped 1 of 100 rows: the mask token (id 2) occurs in it (1, first: row 1)" in capsys.readouterr().out


def test_rows_with_tokens_that_the_target_does_not_have_are_left_out_and_most_of_them_are_another_tokenizers(
    prepare, tokenizer, capsys
):
    size = len(tokenizer)
    good, odd = list(range(10, 30)), [*range(10, 29), size]
    columns = dict(
        input_ids=[good, odd, [-1, *good]] + [good] * 97, supervised=[[1] * 20] * 2 + [[1] * 21] + [[1] * 20] * 97
    )
    assert prepare(**columns)["input_ids"] == [good] * 98
    said = f"dropped 2 of 100 rows: a token of it is none of the target's {size} (2, first: row 1)"
    assert said in capsys.readouterr().out
    with pytest.raises(ValueError, match=f"2 of 3 rows cannot be used .a token of it is none of the target's {size}"):
        prepare(input_ids=[good, odd, odd], supervised=[[1] * 20] * 3)


def test_only_the_count_is_printed_when_no_row_is_dropped(prepare, capsys):
    prepare(messages=[MESSAGES])
    assert capsys.readouterr().out == "1 rows of messages -> 1 token rows\n"


def test_token_rows_longer_than_max_length_are_cut(prepare):
    [row] = prepare(input_ids=[list(range(10, 40))], supervised=[[0] * 4 + [1] * 26], max_length=16)
    assert row["input_ids"] == list(range(10, 26)) and row["supervised"] == [0] * 4 + [1] * 12


# ---- packing


def test_packing_keeps_every_document_whole_and_numbers_them(prepare, tokenizer):
    batch = [MESSAGES, MESSAGES[:3], MESSAGES[1:], MESSAGES[1:3]] * 3
    apart, packed = prepare(messages=batch), prepare(messages=batch, packing=True, max_length=200)
    assert len(packed) < len(apart) and max(packed["length"]) <= 200
    assert packed["row"] == list(range(len(packed))) and packed["length"] == [len(ids) for ids in packed["input_ids"]]
    documents = []
    for row in packed:
        assert row["document_ids"] == sorted(row["document_ids"]) and row["document_ids"][0] == 0
        for number in range(row["document_ids"][-1] + 1):
            at = [i for i, document in enumerate(row["document_ids"]) if document == number]
            documents.append(([row["input_ids"][i] for i in at], [row["supervised"][i] for i in at]))
    assert sorted(documents) == sorted(zip(apart["input_ids"], apart["supervised"]))


# ---- processes and the cache


def test_two_processes_give_the_rows_of_one(prepare):
    batch = [MESSAGES, MESSAGES[:3], [], MESSAGES[1:]] * 5
    assert prepare(messages=batch, num_proc=2).to_list() == prepare(messages=batch).to_list()


def test_tokenized_rows_are_cached_until_the_template_its_arguments_or_a_version_change(
    prepare, tmp_path, monkeypatch
):
    """Renderings are counted where templates run, in the tokenizer's own class."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": MESSAGES}) + "\n")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    encoded = []
    whole = RowEncoder.__call__
    monkeypatch.setattr(RowEncoder, "__call__", lambda self, *args: encoded.append(self) or whole(self, *args))

    def run(**changes) -> int:
        before = len(encoded)
        rows = prepare(several=[load_rows(str(tmp_path / "rows.jsonl"))], **changes)
        assert len(rows) == 1
        return len(encoded) - before

    assert run() == 1
    assert run() == 0
    assert run(kwargs={"enable_thinking": False}) == 1
    assert run(template=UNMARKED) == 1
    assert run(max_length=64) == 1
    # an upgrade may change what is supervised
    monkeypatch.setattr("hf_specauf.data.findings.version", lambda name: f"{name} 99")
    assert run() == 1
    assert run() == 0


PREPARE = """
import sys
folder, package = sys.argv[1:]
sys.path.insert(0, package)
from transformers import AutoTokenizer
from hf_specauf.data.rows import prepare_rows
from hf_specauf.data.sources import load_rows
tokenizer = AutoTokenizer.from_pretrained(folder)
keys = dict(max_length=64, block_size=4, mask_token_id=tokenizer.mask_token_id, vocab_size=len(tokenizer))
[row] = prepare_rows(load_rows(f"{folder}/rows.jsonl"), tokenizer, verbose=False, **keys)
print(row["supervised"][:3])
"""


def test_rows_that_other_code_made_are_not_taken_from_the_cache(tokenizer, tmp_path):
    """An upgrade, as an editable installation sees it: the same version, and code that supervises other tokens."""
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "the quick brown fox"}) + "\n")
    upgraded = tmp_path / "upgraded"
    shutil.copytree(ROOT / "hf_specauf", upgraded / "hf_specauf")
    tokens = upgraded / "hf_specauf" / "data" / "tokens.py"
    code, line = tokens.read_text(), "            mask = [1] * len(ids)\n"
    assert code.count(line) == 1
    tokens.write_text(code.replace(line, "            mask = [0] + [1] * (len(ids) - 1)\n"))
    for package, supervised in ((ROOT, [1, 1, 1]), (upgraded, [0, 1, 1])):
        code, printed = warm_python().run("-c", PREPARE, tmp_path, package)
        assert code == 0 and str(supervised) in printed.splitlines(), printed


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
    "token rows without a mask": (
        dict(input_ids=[[10, 11, 12, 13]]),
        "token rows need a `supervised` column",
    ),
    "one supervised token": (
        dict(input_ids=[[10, 11, 12, 13]], supervised=[[0, 0, 1, 0]], block_size=2),
        "rows are too short",
    ),
    "mask token in most texts": (
        dict(text=["the fox", "the <|mask|> fox", "a <|mask|>"]),
        r"2 of 3 rows contain the mask token \(id 2, first: row 1\).*Choose another mask_token_id",
    ),
    "mask token in every answer": (
        dict(messages=[[{"role": "user", "content": "a"}, {"role": "assistant", "content": "<|mask|>"}]] * 2),
        "2 of 2 rows contain the mask token",
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


# ---- looking at rows


def test_show_row_marks_supervised_spans_and_says_where_it_stops(tokenizer):
    ids = tokenizer("the fox jumps")["input_ids"]
    row = {"input_ids": ids, "supervised": [1] + [0] * (len(ids) - 2) + [1]}
    words = [tokenizer.decode([i]) for i in ids]
    assert show_row(row, tokenizer) == f"⟦{words[0]}⟧{''.join(words[1:-1])}⟦{words[-1]}⟧"
    assert show_row(row, tokenizer, most=1) == f"⟦{words[0]}⟧…"


def test_show_row_begins_shortly_before_the_first_supervised_token(tokenizer):
    ids = list(range(20, 220)) * 2
    row = {"input_ids": ids, "supervised": [0] * 250 + [1] * (len(ids) - 250)}
    shown = f"…{tokenizer.decode(ids[170:250])}⟦{tokenizer.decode(ids[250:330])}⟧…"
    assert show_row(row, tokenizer) == shown


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
