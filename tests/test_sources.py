"""Files and Hub datasets -> raw rows: every ending, every format, bad files, mixtures, streaming."""

import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import warm_python
from datasets import Dataset
from datasets.exceptions import DatasetNotFoundError
from loopback_hub import LoopbackHub, Repository
from warm_python import WarmPython

from hf_specauf.data.files import rows_and_faults
from hf_specauf.data.messages import row_format
from hf_specauf.data.sources import load_data, load_rows, take_shares
from hf_specauf.recipe import DataArguments
from hf_specauf.serving.benchmarks import load_prompts


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        (["id", "text"], "text"),
        (["text", "messages"], "messages"),
        (["id", "conversations"], "conversations"),
        (["messages", "input_ids"], "tokens"),
        (["instruction", "input", "output"], "alpaca"),
        (["instruction", "text"], "text"),
        (["prompt", "completion", "text"], "prompt_completion"),
        (["prompt", "messages"], "messages"),
    ],
)
def test_row_format_prefers_tokens_then_conversations_then_text(columns, kind):
    assert row_format(columns) == kind


# ---- files


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
    with pytest.raises(
        FileNotFoundError, match=f"'rows.jsonl' looks like a local file.*{tmp_path}/rows.jsonl: give the path"
    ):
        load_rows("rows.jsonl")


GOOD = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
BAD = {
    "not UTF-8": (b'{"messages": "\xff\xfe"}', "line 3 is not UTF-8"),
    "cut off": (GOOD[:40].encode(), "line 3 is not whole JSON, cut off perhaps"),
    "no object": (b"[1, 2]", "line 3 is a list, not an object"),
    "half a character": (GOOD.replace('"a"', r'"\ud800"').encode(), r"line 3 holds half a character, '\\ud800'"),
    "a key twice": ((GOOD[:-1] + ", " + GOOD[1:]).encode(), "line 3 has a key twice, among .'messages', 'messages'"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_line_that_cannot_be_read_is_named_and_the_file_left_alone(case, tmp_path):
    line, message = BAD[case]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(f"{GOOD}\n{GOOD}\n".encode() + line + b"\n" + GOOD.encode() + b"\n")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"rows.jsonl: {message}.*Mend that and start the same command again"):
        load_rows(str(path))
    assert path.read_bytes() == before


BROKEN = {
    "cut.parquet": (b"PAR1" + bytes(20), "cut.parquet: Parquet magic bytes not found"),
    "odd.csv": (b"text\nthe \xff fox\n", "odd.csv: line 2 is not UTF-8 .invalid start byte at its byte 4"),
    "odd.txt": (b"the \xff fox\n", "odd.txt: line 1 is not UTF-8 .invalid start byte at its byte 4"),
    "cut.json": (
        b'[{"text": "a"}, {"te',
        "cut.json: behind row 1 it is not whole JSON .Unterminated string starting at",
    ),
    "empty.jsonl": (b"", "empty.jsonl: it is empty"),
    "empty.json": (b"", "empty.json: it is empty"),
    "empty.txt": (b"", "empty.txt: it is empty"),
    "blank.jsonl": (b"\n\n", "blank.jsonl: it holds no row"),
    "none.json": (b"[]", "none.json: it holds no row"),
    "cut.jsonl.gz": (
        gzip.compress(b'{"text": "a"}\n' * 99)[:-9],
        "cut.jsonl.gz: it is cut off, or is not packed by gzip",
    ),
    "plain.csv.gz": (
        b"text\na\n",
        "plain.csv.gz: .*not packed by gzip.*`gzip -dc .*plain.csv.gz > .*plain.csv` unpacks",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_cannot_be_read_is_named_whatever_its_ending(name, tmp_path):
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{message}.*start the same command again"):
        load_rows(str(tmp_path / name))


ACCENTED = [{"text": f"café {i}"} for i in range(3)]
WRITTEN = {
    "a.jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in ACCENTED),
    "a.json": json.dumps(ACCENTED, ensure_ascii=False),
    "a.csv": "text\n" + "\n".join(row["text"] for row in ACCENTED),
    "a.txt": "\n".join(row["text"] for row in ACCENTED),
}


@pytest.mark.skipif(shutil.which("iconv") is None, reason="the command that mends it is not here")
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
@pytest.mark.parametrize("name", WRITTEN)
def test_a_file_that_is_not_utf_8_is_named_with_the_place_and_a_command_that_mends_it(
    name, encoding, packed, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    content = WRITTEN[name].encode(encoding)
    if packed:
        name, content = f"{name}.gz", gzip.compress(content)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"{name}: (line \d|behind row \d it) is not UTF-8 .*at (its )?byte \d"
    ) as said:
        load_rows(name)
    [mend] = re.findall("`(.*?)`", str(said.value))
    subprocess.run(mend, shell=True, check=True)
    assert load_rows(f"utf8-{name.removesuffix('.gz')}").to_list() == ACCENTED


def test_a_parquet_file_whose_text_is_not_utf_8_is_named_with_row_and_column(tmp_path):
    offsets = pa.array([0, 1, 4], pa.int32()).buffers()[1]
    text = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"aa\xffb")])
    pa.parquet.write_table(pa.table({"id": [1, 2], "text": text}), tmp_path / "a.parquet")
    for stream_rows in (None, 2):
        with pytest.raises(ValueError, match="a.parquet: row 2 is not UTF-8 in its column 'text' .*at byte 1"):
            load_rows(str(tmp_path / "a.parquet"), stream_rows=stream_rows)


def test_files_packed_by_gzip_are_read_as_what_they_hold(tmp_path):
    for name, text in WRITTEN.items():
        with gzip.open(tmp_path / f"{name}.gz", "wt") as file:
            file.write(text)
        assert load_rows(str(tmp_path / f"{name}.gz")).to_list() == ACCENTED, name
        assert load_rows(str(tmp_path / f"{name}.gz"), stream_rows=2).to_list() == ACCENTED[:2], name


def test_the_mark_that_says_utf_8_is_no_text(tmp_path):
    for name, text in WRITTEN.items():
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert load_rows(str(tmp_path / name)).to_list() == ACCENTED, name


@pytest.mark.parametrize("name", ["rows.jsonl.zst", "rows.parquet.gz", "rows.tsv"])
def test_a_file_with_another_ending_is_not_looked_for_on_the_hub(name, tmp_path):
    (tmp_path / name).write_bytes(b"text")
    with pytest.raises(
        ValueError, match=f"dataset_name '.*{name}' is a file with an ending that is not read.*also with .gz"
    ):
        load_rows(str(tmp_path / name))


@pytest.mark.parametrize("name", ["/no/such/folder", "./rows", "a/b/c", "~/rows"])
def test_a_path_that_leads_nowhere_is_not_looked_for_on_the_hub(name):
    with pytest.raises(FileNotFoundError, match=f"dataset_name '{name}' looks like a local file or folder, but"):
        load_rows(name)


ONE_HALF = r'{"messages": [{"role": "user", "content": "a \ud83d b"}, {"role": "assistant", "content": "c"}]}'
HIDDEN = {  # file, content, what is said: `datasets` reads each of them otherwise than it is written
    "half in an array": ("a.json", f"[{GOOD}, {ONE_HALF}]", r"row 2 holds half a character, '\\ud83d'"),
    "half in one line": ("a.jsonl", ONE_HALF, r"line 1 holds half a character, '\\ud83d'"),
    "half in columns": ("a.json", r'{"text":' + "\n" + r'["a \udc00"]}', r"line 2 holds half a character, '\\udc00'"),
    "half in strings": ("a.json", r'["a", "b \uD83D"]', r"line 1 holds half a character, '\\uD83D'"),
    "half among types": (
        "a.jsonl",
        r'{"text": "\ud83d", "x": {"y": 1}}' + '\n{"text": "b", "x": 5}',
        "line 1 holds half",
    ),
    "a key twice": ("a.json", '[{"text": "a", "text": "b"}]', "row 1 has a key twice"),
}


@pytest.mark.parametrize("case", HIDDEN)
def test_a_row_that_would_be_read_otherwise_than_it_is_written_is_named(case, tmp_path):
    name, content, said = HIDDEN[case]
    (tmp_path / name).write_text(content)
    for stream_rows in (None, 1):
        with pytest.raises(ValueError, match=f"{name}: {said}"):
            load_rows(str(tmp_path / name), stream_rows=stream_rows)


NULLS = {
    # these two ended the whole process, so they are read in one of their own
    "first line": ("a.jsonl", 'null\n{"text": "a"}\n', "line 1 is null, not an object"),
    "first of an array": ("a.json", '[null, {"text": "a"}]', "row 1 is null, not an object"),
    "a later line": ("a.jsonl", '{"text": "a"}\n null \n{"text": "b"}\n', "line 2 is null, not an object"),
}


@pytest.mark.parametrize("case", NULLS)
def test_a_null_in_the_place_of_a_row_is_named_before_anything_reads_it(case, tmp_path):
    name, text, said = NULLS[case]
    (tmp_path / name).write_text(text)
    words = f"from hf_specauf.data.sources import load_rows; load_rows({str(tmp_path / name)!r})"
    code, printed = warm_python().run("-c", words)
    assert f"{said}. Mend that" in printed and code == 1


def test_a_null_within_an_object_that_spreads_over_lines_is_no_row(tmp_path):
    (tmp_path / "a.json").write_text('{\n "text": [\n  "a",\n  "b",\n  null\n ]\n}\n')
    assert load_rows(str(tmp_path / "a.json"))["text"][0] == ["a", "b", None]


def test_a_key_twice_in_the_only_line_of_a_file_is_named(tmp_path):
    turn = '{"role": "user", "content": "x", "content": "y"}'
    (tmp_path / "a.jsonl").write_text(f'{{"messages": [{turn}]}}\n')
    with pytest.raises(ValueError, match="a.jsonl: its only line has a key twice, among .*'content', 'content'"):
        load_rows(str(tmp_path / "a.jsonl"))


def test_the_files_of_a_local_folder_are_looked_at_too(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"text": "whole"}\n')
    monkeypatch.chdir(tmp_path)
    assert load_rows(".")["text"] == ["whole"]
    (tmp_path / "b.jsonl").write_text('{"text": "half \\ud83d x"}\n{"text": "ok"}\n')
    with pytest.raises(ValueError, match=r"b.jsonl: line 1 holds half a character, '\\ud83d'"):
        load_rows(str(tmp_path))


CELLS = "prompt,completion\nWhat is 1+1?,2\nWhich agent?,007\nWhich country?,NA\nTranslate nichts,None\nAnd now?,\n"


def test_the_cells_of_a_csv_file_are_the_texts_that_they_are(tmp_path):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "a.csv", tmp_path / "folder" / "train.csv"):
        path.write_text(CELLS)
    rows = load_rows(str(tmp_path / "a.csv"))
    assert rows["completion"] == ["2", "007", "NA", "None", None]
    assert load_rows(str(tmp_path / "a.csv"), stream_rows=3)["completion"] == ["2", "007", "NA"]
    assert load_rows(str(tmp_path / "folder"))["completion"] == ["2", "007", "NA", "None", None]


def test_two_whole_arrays_in_a_file_are_told_with_a_way_out_and_salvaged(tmp_path, capsys):
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"}, {"text": "b"}]\n[{"text": "c"}]')
    with pytest.raises(ValueError, match="behind row 2 its array ends and another begins.*`jq -c '.*' .*a.json"):
        load_rows(str(path))
    assert load_rows(str(path), salvage=True)["text"] == ["a", "b", "c"]
    assert "read 3 rows, and left out none of several arrays" in capsys.readouterr().out


def test_whole_characters_written_in_two_halves_and_backslashes_are_as_they_were(tmp_path):
    rows = [{"text": "\U0001f600"}, {"text": "\\ud83d"}, {"text": "\\\U0001f600"}]
    for name, text in (("a.json", json.dumps(rows)), ("a.jsonl", "\n".join(map(json.dumps, rows)))):
        assert "ud83d" in text
        (tmp_path / name).write_text(text)
        assert load_rows(str(tmp_path / name)).to_list() == rows


def test_rows_with_half_a_character_are_left_out_and_counted_where_that_is_asked_for(tmp_path, capsys):
    (tmp_path / "a.json").write_text(f"[{GOOD}, {ONE_HALF}, {GOOD}, {ONE_HALF}]")
    assert len(load_rows(str(tmp_path / "a.json"), salvage=True)) == 2
    assert "a.json is not whole: read 2 rows, and left out 2 (first: row 2 holds half" in capsys.readouterr().out


ROWS = [{"text": f"row {i}", "of": [{"a": "}, {"}]} for i in range(4)]
AS_JSON = [json.dumps(row) for row in ROWS]
CUT = {  # file, content, the rows that are whole, what is said of the first part that is not
    "in a string": ("a.json", "[" + ", ".join(AS_JSON)[:-20], ROWS[:3],
                    "behind row 3 it is not whole JSON .Unterminated string"),
    "between rows": ("a.json", "[" + ",".join(AS_JSON) + ", ", ROWS, "behind row 4 its end is missing"),
    "within a character": ("a.json", b'[{"text": "a"}, {"text": "\xe2\x82', [{"text": "a"}],
                           "behind row 1 it is not UTF-8 .unexpected end of data at byte 26"),
    "indented": ("a.json", json.dumps(ROWS, indent=2)[:-9], ROWS[:3], "behind row 3 it is not whole JSON"),
    "two arrays": ("a.json", f"[{AS_JSON[0]}]\n[{AS_JSON[1]}, {AS_JSON[2][:9]}", ROWS[:2], "behind row 2 it is not"),
    "lines": ("a.jsonl", "\n".join([AS_JSON[0], AS_JSON[1][:9], "", "[1]", AS_JSON[2]]), [ROWS[0], ROWS[2]],
              "2 .first: line 2 is not whole JSON, cut off perhaps"),
    "lines with half a character": ("a.jsonl", AS_JSON[0] + '\n{"text": "\\ud800"}\n', ROWS[:1], "line 2 holds half"),
    "lines in .json": ("a.json", "\n".join([AS_JSON[0], AS_JSON[1][:9]]), ROWS[:1], "line 2 is not whole JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", CUT)
def test_what_is_whole_of_a_file_is_read_where_that_is_asked_for_and_counted(case, tmp_path, capsys):
    name, content, whole, said = CUT[case]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = path.read_bytes()
    with pytest.raises(ValueError, match="or read only the rows that are whole: --dataset_salvage true"):
        load_rows(str(path))
    assert capsys.readouterr().out == ""
    assert load_rows(str(path), salvage=True).to_list() == whole
    assert re.search(f"{name} is not whole: read {len(whole)} rows, and left out .*{said}", capsys.readouterr().out)
    assert load_rows(str(path), salvage=True, stream_rows=1).to_list() == whole[:1]
    assert path.read_bytes() == before


ODD = {
    "half a character": (
        "a.json",
        "[" + AS_JSON[0] + r', {"text": "\ud800"}, ' + AS_JSON[1] + "]",
        "row 2 holds half",
    ),
    "a key twice": ("a.json", '[{"text": "a", "text": "b"}, ' + AS_JSON[0] + "]", "row 1 has a key twice"),
    "not UTF-8": ("a.jsonl", b'{"text": "\xff"}\n{"text": "a"}', "line 1 is not UTF-8"),
}


@pytest.mark.parametrize("case", ODD)
def test_a_row_that_is_odd_within_is_left_out_of_a_salvaged_file_and_named(case, tmp_path):
    name, content, said = ODD[case]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    faults = [fault for _, fault in rows_and_faults(str(tmp_path / name)) if fault]
    assert len(faults) == 1 and faults[0].startswith(said)


def test_a_whole_file_is_read_as_ever_where_salvage_is_asked_for(tmp_path, capsys):
    for name, content in (("a.json", json.dumps(ROWS)), ("a.jsonl", "\n".join(AS_JSON))):
        (tmp_path / name).write_text(content)
        assert load_rows(str(tmp_path / name), salvage=True).to_list() == ROWS
    assert capsys.readouterr().out == ""


def test_a_file_of_which_no_row_is_whole_is_refused_with_salvage_too(tmp_path):
    (tmp_path / "a.json").write_text('[{"text": "a')
    with pytest.raises(ValueError, match="a.json: not one row of it is whole .behind row 0 it is not whole JSON"):
        load_rows(str(tmp_path / "a.json"), salvage=True)


def test_training_and_evaluation_salvage_where_their_own_key_asks_for_it(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[" + ", ".join(AS_JSON)[:-20])
    data = dict(dataset_name=str(path), eval_rows=1)
    train, heldout = load_data(DataArguments(dataset_salvage=True, **data))
    assert (train[0].to_list(), heldout[0].to_list()) == (ROWS[:2], ROWS[2:3])
    data = dict(dataset_name=str(tmp_path / "whole.txt"), eval_dataset_name=str(path))
    (tmp_path / "whole.txt").write_text("the fox\n")
    assert load_data(DataArguments(dataset_salvage=True, **data))[1][0].to_list() == ROWS[:3]
    assert load_prompts(str(path), salvage=True).rows.to_list() == ROWS[:3]
    with pytest.raises(ValueError, match="or read only the rows that are whole: --prompts_salvage true"):
        load_prompts(str(path))


def test_salvaged_rows_are_found_in_the_cache_by_the_next_run(tmp_path):
    (tmp_path / "a.jsonl").write_text(f"{AS_JSON[0]}\n{AS_JSON[1][:9]}")
    files = [load_rows(str(tmp_path / "a.jsonl"), salvage=True).cache_files for _ in range(2)]
    assert files[0] and files[0] == files[1]


def test_rows_that_an_older_version_salvaged_are_not_taken_for_todays(tmp_path):
    broken = f"{AS_JSON[0]}\n{AS_JSON[1]}\n{AS_JSON[0][:9]}"
    (tmp_path / "upgraded.jsonl").write_text(broken)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "salvaged"
    folder.mkdir(parents=True, exist_ok=True)
    # It found one row of two, and named its copy by the file.
    name = hashlib.sha256(broken.encode()).hexdigest()[:16]
    (folder / f"upgraded-{name}.jsonl").write_text(f"{AS_JSON[0]}\n")
    assert len(load_rows(str(tmp_path / "upgraded.jsonl"), salvage=True)) == 2


@pytest.mark.parametrize("given", [dict(split="test"), dict(config="en"), dict(revision="abc")])
def test_keys_of_hub_datasets_are_refused_for_files_and_named(given, tmp_path):
    (tmp_path / "rows.txt").write_text("the fox\n")
    [(key, value)] = given.items()
    with pytest.raises(ValueError, match=f"rows.txt is a file, and eval_dataset_{key} '{value}' is for datasets on"):
        load_rows(str(tmp_path / "rows.txt"), keys="eval_dataset_", **given)


def test_streaming_reads_the_first_rows_of_each_ending(tmp_path):
    rows = [{"text": f"row {i}"} for i in range(10)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for ending in ("jsonl", "parquet"):
        assert load_rows(str(tmp_path / f"rows.{ending}"), stream_rows=4).to_list() == rows[:4]


def test_columns_of_several_types_are_read_streaming_or_not(tmp_path):
    """What is wrong with a row is said of that row."""
    rows = [{"text": "a"}, {"text": 5}, {"text": ["b"]}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for stream_rows in (None, 3):
        assert load_rows(str(tmp_path / "rows.jsonl"), stream_rows=stream_rows).to_list() == rows


def numbered(size: int) -> Dataset:
    return Dataset.from_dict({"text": [str(i) for i in range(size)]})


@pytest.mark.parametrize(
    ("sizes", "weights", "most", "taken"),
    [
        ([100, 100], [1, 1], None, [100, 100]),
        ([100, 100], [3, 1], None, [100, 33]),
        ([100, 10], [1, 1], None, [10, 10]),
        ([100, 100], [0.7, 0.3], 50, [35, 15]),
        ([100, 10], [1, 1], 1000, [10, 10]),
        ([100], [2.5], None, [100]),
        ([100], [1], 7, [7]),
        ([100, 100, 100], [1, 1, 1], 50, [17, 17, 16]),
        ([100, 10], [1, 0.1], None, [100, 10]),
        ([100, 100], [99, 1], 60, [59, 1]),
    ],
)
def test_shares_follow_the_weights_and_no_row_is_taken_twice(sizes, weights, most, taken):
    parts = take_shares([numbered(size) for size in sizes], weights, most)
    assert [part["text"][:] for part in parts] == [[str(i) for i in range(size)] for size in taken]


def test_a_source_of_a_mixture_that_gives_no_row_is_named(tmp_path):
    for name in "ab":
        numbered(40).to_parquet(tmp_path / f"{name}.parquet")
    mixture = [{"name": str(tmp_path / "a.parquet"), "weight": 99}, {"name": str(tmp_path / "b.parquet")}]
    data = DataArguments(dataset_mixture=mixture, eval_rows=0, max_train_rows=20)
    with pytest.raises(ValueError, match="b.parquet .40 rows, weight 1. not one row would be taken: raise"):
        load_data(data)


def test_a_dataset_on_the_hub_is_loaded_by_its_id_revision_and_split(tmp_path):
    with LoopbackHub(tmp_path / "hub") as hub:
        repository = Repository.create(tmp_path / "hub/alice/chats", private=True)
        commits = []
        for text in ("old", "new"):
            files = {f"{split}.jsonl": repository.store(f'{{"text": "{text} {split}"}}\n'.encode() * 2)
                     for split in ("train", "test")}  # fmt: skip
            commits.append(repository.commit("refs/heads/main", text, files, []))
        asked = [
            {},
            dict(split="test"),
            dict(revision=commits[0]),
            dict(stream_rows=1),
            dict(split="tset"),
            dict(config="en"),
        ]
        code = (
            "import json, sys\nfrom hf_specauf.data.sources import load_rows\n"
            "for keys in json.loads(sys.argv[1]):\n"
            "    try:\n        print(load_rows('alice/chats', **keys)['text'][:])\n"
            "    except ValueError as error:\n        print(error)\n"
        )
        code, printed = hub.run("-c", code, json.dumps(asked), home=tmp_path / "home", user="alice")
    assert code == 0, printed
    again = ". Mend that and start the same command again"
    assert printed.splitlines()[: len(asked)] == [
        "['new train', 'new train']", "['new test', 'new test']", "['old train', 'old train']", "['new train']",
        "alice/chats: Unknown split \"tset\". Should be one of ['train', 'test']" + again,
        "alice/chats: BuilderConfig 'en' not found. Available: ['default']" + again,
    ]  # fmt: skip


class ClosedHub(BaseHTTPRequestHandler):
    """Answers as the Hub does about datasets one may not see: 401, with its error codes."""

    def _refuse(self):
        gated = "someone/gated" in self.path
        self.send_response(403 if gated else 401)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("X-Error-Message", "Access to this dataset is restricted." if gated else "Not found.")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD = do_POST = _refuse

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def closed(tmp_path_factory):
    """Python on a machine whose Hub is closed to it."""
    served = ThreadingHTTPServer(("127.0.0.1", 0), ClosedHub)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    hub = dict(HF_ENDPOINT=f"http://127.0.0.1:{served.server_port}", HF_HUB_OFFLINE="0")
    hub |= dict(HF_HOME=str(tmp_path_factory.mktemp("home")), HF_HUB_DISABLE_TELEMETRY="1", NO_PROXY="127.0.0.1")
    python = WarmPython(environment=os.environ | hub)
    yield python
    python.close()
    served.shutdown()
    served.server_close()


@pytest.mark.parametrize("name", ["someone/gated", "someone/private"])
def test_a_dataset_that_needs_a_login_says_so_in_one_line(name, closed, tmp_path):
    words = ["--dataset_name", name, "--target", "t", "--output_dir", str(tmp_path / "out"), "--use_cpu", "true"]
    code, printed = closed.run("-m", "hf_specauf.train", *words)
    assert code == 1
    last = printed.strip().splitlines()[-1]
    assert last.startswith(f"error: dataset_name: '{name}' is not on the Hub, or you may not see it")
    assert "`hf auth login`" in last and "Traceback" not in printed


@pytest.mark.parametrize("name", ["nowhere.jsonl", "nobody/nothing"])
def test_a_source_that_is_not_there_is_named_by_the_key_that_was_given(name, monkeypatch):
    def not_found(*_, **__):
        raise DatasetNotFoundError("no such dataset")

    monkeypatch.setattr("hf_specauf.data.sources.load_dataset", not_found)
    for keys, key in (
        ("dataset_", "dataset_name"), ("eval_dataset_", "eval_dataset_name"), ("prompts_", "--prompts"),
        ("dataset_mixture's ", "dataset_mixture's name"),
    ):  # fmt: skip
        with pytest.raises(OSError, match=f"^{key}:? '{name}'"):
            load_rows(name, keys=keys)
