"""The target's hidden states kept on disk: the same losses, and whatever ends a run, no half row."""

import json
import os
import resource
import signal
import threading
import time
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from conftest import MASK, final, make_domino, make_drafter, make_target, warm_python
from datasets import Dataset

from hf_specauf import AUFConfig, AUFTrainer
from hf_specauf.data.rows import pack, row_key
from hf_specauf.target_states.filling import alone_in, fill, states_of
from hf_specauf.target_states.store import ShardWriter, StateStore
from hf_specauf.target_states.wanted import check_room, rows_of
from hf_specauf.train import main
from hf_specauf.training.memory import try_largest_batch

SIZES = [42, 11, 24, 13, 36, 10, 18, 29]
BASE = dict(
    use_cpu=True, anchors_per_row=6, max_steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=4,
    learning_rate=1e-3, logging_steps=1, save_strategy="no", eval_strategy="steps", eval_steps=2, eval_prompts=1,
    eval_new_tokens=8, disable_tqdm=True, report_to="none",
)  # fmt: skip


def token_rows(sizes: list[int], seed: int = 3) -> Dataset:
    """Rows of several sizes, supervised from the fourth token on."""
    draw = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, MASK, (size,), generator=draw).tolist() for size in sizes]
    rows = Dataset.from_dict({"input_ids": ids, "supervised": [[0] * 3 + [1] * (size - 3) for size in sizes]})
    return rows.add_column("length", sizes).add_column("row", list(range(len(sizes))))


@pytest.fixture(scope="module")
def rows() -> Dataset:
    return token_rows(SIZES)


@pytest.fixture(scope="module")
def target():
    return make_target(dtype=torch.float32)


@pytest.fixture
def build(target, rows, tokenizer, tmp_path):
    """Builds a trainer; keyword arguments override the trainer's, then `BASE`'s."""

    def build(cached: bool = True, **overrides) -> AUFTrainer:
        given = dict(target_model=target, train_dataset=rows, eval_dataset=token_rows([20, 33], seed=4))
        given |= {key: overrides.pop(key) for key in given if key in overrides}
        model = overrides.pop("model", None)
        if model is None:
            model = make_drafter(given["target_model"], taps=overrides.pop("taps", (0, 2)))
        if cached:
            overrides = dict(target_states_cache=str(tmp_path / "states")) | overrides
        args = AUFConfig(**dict(output_dir=str(tmp_path / "out")) | BASE | overrides)
        return AUFTrainer(model=model, args=args, processing_class=tokenizer, **given)

    return build


@contextmanager
def passes_of(target):
    """Counts the rows of each of the target's passes meanwhile."""
    seen: list[int] = []
    hook = target.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    yield seen
    hook.remove()


def history(trainer: AUFTrainer) -> list[dict]:
    """What training logged, without the seconds."""
    trainer.train()
    words = ("runtime", "per_second", "flos")
    return [
        {key: value for key, value in entry.items() if not any(word in key for word in words)}
        for entry in trainer.state.log_history
    ]


def packed(rows: Dataset) -> Dataset:
    found, lengths = pack(rows.select_columns(["input_ids", "supervised"]), 48)
    assert any(max(ids) > 0 for ids in found["document_ids"])
    return found.add_column("length", lengths).add_column("row", list(range(len(found))))


def parts(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("*/settings.json"))


# ---- the same training


@pytest.mark.parametrize("case", ["dflash", "packed", "domino"])
def test_losses_and_weights_are_the_same_to_the_last_digit_in_fp32(case, build, target, rows, capsys):
    more = {}
    if case == "packed":
        more["train_dataset"] = packed(rows)
    if case == "domino":  # whose first backward pass needs the supports of all micro-batches
        more |= dict(model=make_domino(target), objective="b_auf")
    without = build(cached=False, **deepcopy(more))
    expected = history(without)
    assert len([entry for entry in expected if "loss" in entry]) == 2
    assert len([entry for entry in expected if "eval_loss" in entry]) == 1
    kept = build(**deepcopy(more))
    assert history(kept) == expected
    for name, value in without.model.state_dict().items():
        assert torch.equal(kept.model.state_dict()[name], value), name
    printed = capsys.readouterr().out
    assert "numbers (taps x hidden size) x 4 bytes = " in printed and "0.0 kB of it are there" in printed


def test_another_run_on_the_same_rows_never_runs_the_target(build, target, rows):
    build().kept_states.fill(rows, token_rows([20, 33], seed=4))
    shuffled = rows.shuffle(seed=1).select(range(6))  # other numbers, another order
    keys = dict(per_device_train_batch_size=3, gradient_accumulation_steps=1)
    trainer = build(train_dataset=shuffled, eval_prompts=0, **keys)
    with passes_of(target) as seen:
        trainer.train()
        try_largest_batch(trainer, trainer.model)
    assert seen == [1]  # two tokens, which tell the states' dtype
    assert len(trainer.state.log_history) > 3


def test_batches_of_several_rows_give_the_same_loss_but_for_rounding(build):
    keys = dict(per_device_train_batch_size=4, gradient_accumulation_steps=1)
    for entry, plain in zip(history(build(**keys)), history(build(cached=False, **keys))):
        for name in entry.keys() & {"loss", "grad_norm", "eval_loss"}:
            assert entry[name] == pytest.approx(plain[name], rel=1e-5)


def test_rows_given_to_an_evaluation_are_kept_then(build, target):
    trainer = build(eval_dataset=None, eval_strategy="no")
    others = token_rows([15, 22, 31], seed=9)
    metrics = trainer.evaluate(others)
    assert metrics["eval_loss"] == pytest.approx(build(cached=False).evaluate(others)["eval_loss"], rel=1e-6)
    with passes_of(target) as seen:
        trainer.kept_states.fill(others)
    assert seen == []


def test_states_stored_in_bf16_are_half_the_size_and_leave_bf16_training_as_it_is(
    build, target, rows, capsys, tmp_path
):
    expected = history(build(cached=False, bf16=True))
    assert history(build(bf16=True, target_states_cache_dtype="bfloat16")) == expected
    assert "rounds" not in capsys.readouterr().out
    build(target_states_cache_dtype="bfloat16", target_states_cache=str(tmp_path / "fp32")).kept_states.fill(rows)
    assert "rounds this target's float32 states, so that the loss differs" in capsys.readouterr().out
    (part,) = parts(tmp_path / "fp32")
    (states,) = part.glob("*.states")
    assert states.stat().st_size == sum(SIZES) * 2 * 32 * 2


# ---- what is kept for whom


def test_one_folder_serves_several_targets_taps_and_dtypes_and_mixes_none(build, target, rows, tmp_path, capsys):
    tuned = deepcopy(target)
    tuned.base_model.embed_tokens.weight.data[-1, -1] += 1e-3  # a weight that no fingerprint looks at
    cases = [dict(), dict(taps=(1, 2)), dict(target_model=tuned), dict(target_states_cache_dtype="bfloat16")]
    for number, case in enumerate(cases, start=1):
        trainer = build(**case)
        trainer.kept_states.fill(rows)
        assert len(parts(tmp_path / "states")) == number
        store = trainer.kept_states._store
        for row in rows_of([rows]):
            expected = states_of(trainer.target, row, torch.device("cpu"))
            assert torch.equal(store.read(row.key), expected.to(store.dtype))
    assert "of other targets, taps or dtypes it holds: " in capsys.readouterr().out
    moved = tmp_path / "moved"
    target.save_pretrained(moved)
    again = build(target_model=type(target).from_pretrained(moved))  # the same weights by another name
    with passes_of(again.target.model) as seen:
        again.kept_states.fill(rows)
    assert seen == [1] and len(parts(tmp_path / "states")) == len(cases)


def test_a_row_is_found_by_its_tokens_and_its_documents():
    assert row_key([5, 6, 7]) == row_key(torch.tensor([5, 6, 7]).numpy(), [0, 0, 0])
    others = [row_key([5, 6, 7]), row_key([5, 6]), row_key([5, 7, 6]), row_key([5, 6, 7], [0, 1, 1])]
    others += [row_key([5, 6, 7], [0, 0, 1]), row_key([5, 6, 7], [0, 1, 2])]
    assert len(set(others)) == len(others)


# ---- whatever ends it


def content(number: int, tokens: int = 40) -> torch.Tensor:
    """(tokens, 64) numbers that no other row has."""
    return torch.arange(tokens * 64, dtype=torch.float32).view(tokens, 64) + number / 1024


def check_whole(folder: Path) -> set[str]:
    """Every row that counts is what was written -> their keys."""
    store = StateStore(folder, 64, torch.float32)
    for key, place in store._places.items():
        assert torch.equal(store.read(key), content(int(key), place.tokens))
    return {*store._places}


# Adds rows 0 to 299 that are not there yet, and makes each count at once. A row takes a third of a megabyte.
WRITE = """
import sys
from pathlib import Path
import torch
from hf_specauf.target_states import store as store_module

store_module.BETWEEN_COMMITS = 0.0
store = store_module.StateStore(Path(sys.argv[1]), 64, torch.float32)
with store_module.ShardWriter(store) as writer:
    for number in range(300):
        if str(number) not in store:
            tokens = 1000 + number
            states = torch.arange(tokens * 64, dtype=torch.float32).view(tokens, 64) + number / 1024
            writer.add(str(number), states)
"""


def test_kill_9_while_rows_are_written_loses_none_that_was_whole_and_leaves_no_half_row(tmp_path):
    known: set[str] = set()
    process = warm_python().start("-c", WRITE, tmp_path)
    while process.poll() is None and len(known) < 20:
        known |= {*StateStore(tmp_path, 64, torch.float32)._places}
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL, process.printed()
    found = check_whole(tmp_path)
    assert known <= found and len(found) < 300
    store = StateStore(tmp_path, 64, torch.float32)
    with ShardWriter(store) as writer:  # of a later run, which writes files of its own
        for number in range(300):
            if str(number) not in store:
                writer.add(str(number), content(number, 1000 + number))
    assert check_whole(tmp_path) == {str(number) for number in range(300)}


def test_a_file_cut_anywhere_holds_whole_rows_or_fewer(tmp_path):
    store = StateStore(tmp_path, 64, torch.float32)
    with ShardWriter(store) as writer:
        for number in range(3):
            writer.add(str(number), content(number))
    for name, step in (("000001.index", 1), ("000001.states", 999)):
        path = tmp_path / name
        whole = path.read_bytes()
        counts = []
        for size in range(0, len(whole), step):
            path.write_bytes(whole[:size])
            counts.append(len(check_whole(tmp_path)))
        assert counts == sorted(counts) and set(counts) == {0, 1, 2}
        path.write_bytes(whole)
    assert check_whole(tmp_path) == {"0", "1", "2"}


def test_ctrl_c_finishes_the_row_and_the_same_command_goes_on(build, target, rows, tmp_path, capsys):
    trainer, passes = build(), []

    def interrupt(*_):
        passes.append(1)
        if len(passes) == 4:  # the first one is of two tokens
            os.kill(os.getpid(), signal.SIGINT)

    hook = target.base_model.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt, match=f"states of {len(SIZES) + 2 - 3} rows are left"):
        trainer.train()
    hook.remove()
    assert "finishing this row" in capsys.readouterr().out
    again = build()
    with passes_of(target) as seen:
        again.kept_states.fill(rows, trainer.eval_dataset)
    assert len(seen) == 1 + len(SIZES) + 2 - 3


@contextmanager
def files_of_at_most(size: int):
    """The system refuses to write more into any file of this process, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_says_what_is_left_and_keeps_what_is_whole(build, target, rows, tmp_path):
    per_token = 2 * 32 * 4
    room = (42 + 36 + 29) * per_token + 100
    with files_of_at_most(room), pytest.raises(OSError, match="Those of 3 rows are whole and stay. 5 rows are left"):
        build().kept_states.fill(rows)
    (part,) = parts(tmp_path / "states")
    (states,) = part.glob("*.states")
    assert states.stat().st_size == room - 100
    again = build()
    with passes_of(target) as seen:
        again.kept_states.fill(rows)
    assert len(seen) == 1 + 5


def test_a_run_waits_for_another_one_that_fills_the_folder(build, target, rows, tmp_path, capsys):
    trainer = build()
    trainer.kept_states.fill(rows.select([0]))
    (part,) = parts(tmp_path / "states")
    with alone_in(part, wanted=True):
        thread = threading.Thread(target=trainer.kept_states.fill, args=(rows,))
        thread.start()
        printed = ""
        while "waiting until it is done" not in printed:
            assert thread.is_alive()
            printed += capsys.readouterr().out
            time.sleep(0.01)
        fill(trainer.target, trainer.kept_states._store, rows_of([rows])[1:], trainer.args)
    with passes_of(target) as seen:
        thread.join(30)
    assert not thread.is_alive() and seen == []


# ---- what is refused


def test_folders_that_are_something_else_are_refused_by_name(build, rows, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    for name, words in (("file", "is a file"), ("other", "no folder of target states .it holds thesis.tex")):
        with pytest.raises(ValueError, match=f"target_states_cache .*{name}.*{words}"):
            build(target_states_cache=str(tmp_path / name)).kept_states.fill(rows)
    build().kept_states.fill(rows)
    (part,) = parts(tmp_path / "states")
    with pytest.raises(ValueError, match=f"holds the states of one target: give {tmp_path / 'states'}"):
        build(target_states_cache=str(part)).kept_states.fill(rows)
    settings = json.loads((part / "settings.json").read_text())
    (part / "settings.json").write_text(json.dumps(settings | {"taps": [1, 2]}))
    with pytest.raises(ValueError, match=r"does not belong to the states beside it \(taps differ\)"):
        build().kept_states.fill(rows)
    mark = tmp_path / "states" / "target_states.json"
    mark.write_text(json.dumps({"format": 2}))
    with pytest.raises(ValueError, match="of format 2, and this version of hf_specauf reads format 1"):
        build().kept_states.fill(rows)


def test_states_that_were_changed_on_the_disk_are_refused(build, rows, tmp_path):
    build().kept_states.fill(rows)
    (path,) = (tmp_path / "states").glob("*/*.states")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # of the shortest row
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} is damaged.*Remove it and .*index"):
        build().train()
    path.unlink()
    path.with_suffix(".index").unlink()
    build().train()


def test_more_than_was_asked_for_is_refused_before_anything_is_computed(build, target, rows):
    trainer = build(target_states_cache_gb=1e-5)
    with (
        passes_of(target) as seen,
        pytest.raises(ValueError, match=r"take 46.8 kB, and target_states_cache_gb allows 1e-05: set .*_gb: 1"),
    ):
        trainer.kept_states.fill(rows)
    assert seen == [1]


def test_more_than_the_disk_has_room_for_is_refused(rows, tmp_path):
    store, wanted = StateStore(tmp_path, 10**15, torch.float32), rows_of([rows])
    with pytest.raises(ValueError, match=f"the disk of {tmp_path.parent} has .* GB left: make room"):
        check_room(wanted, wanted, store, most_gb=1e12)
    check_room(wanted, [], store, most_gb=1e12)  # all is there already


def test_keys_that_would_do_nothing_are_refused(tmp_path):
    for key, value in (("target_states_cache_gb", 9), ("target_states_cache_dtype", "bfloat16")):
        with pytest.raises(ValueError, match=f"{key} is {value}, and would be ignored without target_states_cache"):
            AUFConfig(output_dir=str(tmp_path), use_cpu=True, **{key: value})
    with pytest.raises(ValueError, match="target_states_cache_dtype is 'fp8'; it must be one of auto, bfloat16"):
        AUFConfig(output_dir=str(tmp_path), use_cpu=True, target_states_cache="x", target_states_cache_dtype="fp8")


# ---- the command


def test_a_recipe_trains_on_kept_states_and_still_measures_by_decoding(command, tmp_path, capsys):
    main(command(target_states_cache=tmp_path / "states"))
    assert "(taps x hidden size)" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert "target_states_cache" not in record["recipe"]  # a place on this machine
    assert (tmp_path / "out" / "eval.json").is_file()


def test_two_processes_share_the_rows_and_then_read_all_also_with_a_sharded_target(command, tmp_path):
    keys = dict(target_states_cache=tmp_path / "states", per_device_train_batch_size=1, eval_prompts=0)
    words = command(**keys, output_dir=tmp_path / "two", shard_target="true")
    code, printed = warm_python().run_ranks(2, "-m", "hf_specauf.train", *words)
    assert code == 0, printed
    (part,) = parts(tmp_path / "states")
    assert len(list(part.glob("*.states"))) == 2
    main(command(**keys | dict(per_device_train_batch_size=2), output_dir=tmp_path / "one"))
    assert len(list(part.glob("*.states"))) == 2  # nothing was missing
    two, one = final(tmp_path / "two"), final(tmp_path / "one")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=4e-4)
