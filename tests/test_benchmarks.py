"""Benchmarks by name and questions by column: which prompts they give, and what `eval.json` says of them."""

import json
from dataclasses import replace

import pytest
from conftest import make_drafter
from loopback_hub import LoopbackHub, Repository
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hf_specauf.evaluate import main
from hf_specauf.evaluation.record import differing_conditions
from hf_specauf.serving.benchmarks import BENCHMARKS, encode_prompts, load_prompts

# Two rows of each set, in its own columns. The first row's question is in `QUESTIONS`.
ROWS = {
    "gsm8k": [{"question": "How many apples?", "answer": "#### 4"}, {"question": "And pears?", "answer": "#### 2"}],
    "math500": [
        {"problem": "Find $x^{2}$.", "solution": "It is $3$.", "answer": "3", "subject": "Algebra", "level": 2},
        {"problem": "Find $y$.", "solution": "It is $4$.", "answer": "4", "subject": "Algebra", "level": 3},
    ],
    "humaneval": [
        {"task_id": f"HumanEval/{i}", "prompt": f"def f{i}(x):\n", "canonical_solution": "    return x\n", "test": "",
         "entry_point": f"f{i}"}
        for i in range(2)
    ],
    "mbpp": [
        {"task_id": i, "prompt": f"Write a function, {i}.", "code": "def f(): ...", "test_list": ["assert f()"]}
        for i in range(2)
    ],
    "mt_bench": [
        {"prompt": ["Compose a blog.", "Rewrite it."], "prompt_id": 81, "category": "writing", "reference": []},
        {"prompt": ["Draft a mail.", "Shorten it."], "prompt_id": 82, "category": "writing", "reference": []},
    ],
    "alpaca": [
        {"instruction": "Name the animal.", "input": "It barks.", "output": "A dog.", "text": "Below is ..."},
        {"instruction": "Greet me.", "input": "", "output": "Hello.", "text": "Below is ..."},
    ],
}  # fmt: skip
BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
SOLVE = "Write a solution to the following problem and make sure that it passes the tests:\n```python\n"
QUESTIONS = {
    "gsm8k": ["How many apples?" + BOXED, "And pears?" + BOXED],
    "math500": ["Find $x^{2}$." + BOXED, "Find $y$." + BOXED],
    "humaneval": [SOLVE + "def f0(x):\n\n```", SOLVE + "def f1(x):\n\n```"],
    "mbpp": ["Write a function, 0.", "Write a function, 1."],
    "mt_bench": ["Compose a blog.", "Draft a mail."],
    "alpaca": ["Name the animal.\n\nInput:\nIt barks.", "Greet me."],
}


def write_rows(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def local(monkeypatch, tmp_path):
    """Every benchmark with its dataset replaced by a file of two such rows."""
    for name, rows in ROWS.items():
        here = dict(dataset=write_rows(tmp_path / f"{name}.jsonl", rows), config=None, split="train")
        monkeypatch.setitem(BENCHMARKS, name, replace(BENCHMARKS[name], **here))


def encode(source, tokenizer, count=2) -> list[list[int]]:
    prompts = encode_prompts(source.rows, tokenizer, count, 3, None, source.wording)
    return [prompt[0].tolist() for prompt in prompts]


def test_the_table_has_the_papers_six_sets_with_its_numbers_of_prompts():
    counts = {name: benchmark.count for name, benchmark in BENCHMARKS.items()}
    assert counts == dict(gsm8k=200, math500=200, humaneval=164, mbpp=200, mt_bench=80, alpaca=200)


@pytest.mark.parametrize("name", list(ROWS))
def test_a_benchmarks_questions_are_asked_as_chats_whole_and_in_the_words_of_dflash(local, files, tokenizer, name):
    asked = [tokenizer(f"<|user|>{text}<|end|><|assistant|>")["input_ids"] for text in QUESTIONS[name]]
    assert encode(load_prompts(name), tokenizer) == asked
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)  # of a base model: no chat template
    assert encode(load_prompts(name), bare) == [tokenizer(text)["input_ids"] for text in QUESTIONS[name]]


def test_evaluate_takes_a_benchmark_by_name_and_writes_down_which_it_was(local, files, tmp_path, capsys):
    target = AutoModelForCausalLM.from_pretrained(files / "target")
    make_drafter(target).save_pretrained(tmp_path / "drafter")
    words = ["--target", files / "target", "--drafter", tmp_path / "drafter", "--max_new_tokens", 4, "--device", "cpu"]
    words = [str(word) for word in words]
    main([*words, "--prompts", "mt_bench", "--out", str(tmp_path / "out")])
    record = json.loads((tmp_path / "out/eval.json").read_text())
    conditions = record["conditions"]
    assert (conditions["benchmark"], conditions["prompts_split"]) == ("mt_bench", "train")
    assert conditions["prompts"] == BENCHMARKS["mt_bench"].dataset and len(record["prompts"]) == 2
    assert not {"prompt_tokens", "prompts_config", "prompts_revision"} & set(conditions)  # nothing to tell of a file
    # the same rows by their column, where a file is named
    file = str(tmp_path / "gsm8k.jsonl")
    main([*words, "--prompts", file, "--prompts_column", "question", "--count", "1", "--out", str(tmp_path / "out")])
    record = json.loads((tmp_path / "out/eval.json").read_text())
    assert (record["conditions"]["prompts"], record["conditions"]["prompts_column"]) == (file, "question")
    assert len(record["prompts"]) == 1 and "benchmark" not in record["conditions"]
    with pytest.raises(SystemExit, match=r"has no column query; it has question, answer: give one of these as"):
        main([*words, "--prompts", file, "--prompts_column", "query", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="Rename the column.* Or name the column that holds the question"):
        main([*words, "--prompts", file, "--out", str(tmp_path / "out")])


def test_a_benchmark_comes_before_a_folder_of_its_name_and_a_file_with_an_extension_is_a_file(
    local, files, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gsm8k").mkdir()
    assert load_prompts("gsm8k").conditions["benchmark"] == "gsm8k"
    assert "gsm8k is a benchmark, so the local gsm8k is not read. To read that, give it as ./gsm8k" in (
        capsys.readouterr().out
    )
    found = load_prompts("gsm8k.jsonl", column="answer")
    assert found.wording.columns == ("answer",) and "benchmark" not in found.conditions


@pytest.mark.parametrize("keys", [dict(config="main"), dict(split="test"), dict(column="answer")], ids=str)
def test_a_benchmark_has_its_own_config_split_and_column(keys):
    with pytest.raises(ValueError, match="gsm8k is a benchmark, which has its own.*--prompts openai/gsm8k"):
        load_prompts("gsm8k", **keys)


@pytest.mark.parametrize(
    "spelt, name",
    [("mtbench", "mt_bench"), ("mt_bench", "mt_bench"), ("MT-Bench", "mt_bench"), ("GSM8K", "gsm8k"),
     ("MATH-500", "math500"), ("human_eval", "humaneval")],
)  # fmt: skip
def test_a_benchmark_is_found_however_its_name_is_spelt(local, spelt, name):
    assert load_prompts(spelt).conditions["benchmark"] == name


def test_a_local_file_wins_over_another_spelling_of_a_benchmark(local, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "MBPP").mkdir()
    write_rows(tmp_path / "MBPP/rows.jsonl", [{"text": "mine"}])
    found = load_prompts("MBPP")
    assert found.rows["text"][:] == ["mine"] and "benchmark" not in found.conditions


def test_a_tau_on_bare_questions_is_not_compared_with_one_in_dflashs_words(local):
    now = {"conditions": load_prompts("gsm8k").conditions, "prompts": []}
    before = {
        "conditions": {key: value for key, value in now["conditions"].items() if key != "wording"},
        "prompts": [],
    }
    assert differing_conditions(now, before) == ["wording None there, as in DFlash's benchmark here"]


@pytest.mark.parametrize("near, name", [("gsm8", "gsm8k"), ("mt_benchs", "mt_bench"), ("math-50", "math500")])
def test_a_name_near_a_benchmarks_is_answered_with_it(near, name):
    with pytest.raises(OSError, match=f"Or did you mean the benchmark {name}?"):
        load_prompts(near)
    with pytest.raises(OSError) as error:
        load_prompts("somebody/else")
    assert "did you mean" not in str(error.value)


def test_rows_without_a_question_are_counted_with_the_reason(files, tokenizer, tmp_path, capsys):
    rows = [{"ask": "why?", "more": {"a": 1}}, {"ask": None, "more": None}, {"ask": "", "more": None}]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    assert len(encode(load_prompts(file, column="ask"), tokenizer, 9)) == 1
    assert "1 prompts; other rows give none: its ask is empty (2, first: row 1)" in capsys.readouterr().out
    with pytest.raises(ValueError, match="its more is not text .1, first: row 0., its more is empty"):
        encode(load_prompts(file, column="more"), tokenizer, 9)


def test_a_benchmark_from_the_hub_is_noted_with_the_commit_it_came_from(tmp_path):
    """And a set that holds one is answered with its name."""
    card = "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: test\n    path: main/test.jsonl\n---\n"
    with LoopbackHub(tmp_path / "hub") as hub:
        repository = Repository.create(tmp_path / "hub/openai/gsm8k", private=False)
        commits = []
        for word in ("old", "new"):
            rows = json.dumps({"question": f"{word}?", "answer": "4"}) + "\n"
            parts = {"README.md": card, "main/test.jsonl": rows}
            stored = {path: repository.store(text.encode()) for path, text in parts.items()}
            commits.append(repository.commit("refs/heads/main", word, stored, []))
        code = (
            "import sys\nfrom hf_specauf.serving.benchmarks import load_prompts\n"
            "for revision in (None, sys.argv[1]):\n"
            "    found = load_prompts('gsm8k', revision=revision)\n"
            "    print(found.rows['question'][:], found.conditions)\n"
            "found = load_prompts('openai/gsm8k', 'main', 'test', column='question')\n"
            "print(found.rows['question'][:])\n"
            "load_prompts('openai/gsm8k', 'main', 'test')\n"
        )
        _, printed = hub.run("-c", code, commits[0], home=tmp_path / "home", user="alice")
    newest, oldest, other, said, *errors = printed.splitlines()
    for line, word, commit in ((newest, "new", commits[1]), (oldest, "old", commits[0])):
        assert line.startswith(f"['{word}?']") and f"'prompts_revision': '{commit}'" in line
        assert "'prompts': 'openai/gsm8k', 'prompts_config': 'main', 'prompts_split': 'test'" in line
    assert other == "['new?']"
    assert said == "openai/gsm8k holds the benchmark gsm8k: --prompts gsm8k asks its questions"
    assert "none of `messages`" in errors[-1] and "--prompts_column COLUMN" in errors[-1]
