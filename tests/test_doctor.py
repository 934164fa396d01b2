"""The doctor finds faults that were made in files on disk, names each, and raises no false alarm."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import BASE, attach, make_domino, make_drafter, make_target, overfit, warm_python
from safetensors.torch import load_file, save_file
from test_hybrids import FAMILIES
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from hf_specauf.convert import main as convert
from hf_specauf.doctor import command, drafting
from hf_specauf.doctor.findings import FAIL, PASS, SKIP, WARN, Check, Line, examine
from hf_specauf.doctor.patient import Text
from hf_specauf.losses.blocks import make_blocks
from hf_specauf.target import FrozenTarget
from hf_specauf.train import main as train

PROMPTS, PROMPT, NEW, K = 5, 12, 32, 4
SHAPE = dict(num_hidden_layers=6)
TAPS = (1, 3)


def examined(capsys, *words) -> dict[str, dict]:
    """The doctor's lines by their checks, and under "status" the command's exit status."""
    status = 0
    capsys.readouterr()  # what was printed before
    try:
        command.main([*map(str, words), "--json"])
    except SystemExit as end:
        status = end.code
    lines = json.loads(capsys.readouterr().out)
    assert status == int(any(line["verdict"] == FAIL for line in lines))
    return {line["check"]: line for line in lines}


@pytest.fixture(autouse=True)
def clean_processes_start_at_once(monkeypatch):
    monkeypatch.setattr(sys, "executable", warm_python().executable)


def failed(lines: dict[str, dict]) -> set[str]:
    return {name for name, line in lines.items() if line["verdict"] == FAIL}


def texts_of(target, tokenizer, count: int = PROMPTS) -> torch.Tensor:
    """What a target writes after some prompts, (count, 44)."""
    prompts = torch.randint(10, 300, (count, PROMPT), generator=torch.Generator().manual_seed(0))
    target.generation_config.pad_token_id = tokenizer.pad_token_id
    target.generation_config.eos_token_id = None
    return torch.cat([target.generate(one[None], do_sample=False, max_new_tokens=NEW) for one in prompts])


def write_rows(path: Path, texts: torch.Tensor) -> None:
    mask = [0] * PROMPT + [1] * NEW
    path.write_text("".join(json.dumps(dict(input_ids=ids, supervised=mask)) + "\n" for ids in texts.tolist()))


def save_target(target, tokenizer, folder: Path) -> None:
    target.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|end|>")
    target.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory, tokenizer) -> Path:
    """A folder with `target`, `drafter` as `specauf train` leaves it, and `rows.jsonl`."""
    folder = tmp_path_factory.mktemp("healthy")
    ids = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None)
    # Rows that no token has, as real targets have them: a mask token that is never a word.
    target = make_target(dtype=torch.float32, vocab_size=len(tokenizer) + 4, tie_word_embeddings=True, **ids, **SHAPE)
    write_rows(folder / "rows.jsonl", texts_of(target, tokenizer))
    save_target(target, tokenizer, folder / "target")
    keys = BASE | dict(
        target=folder / "target", dataset_name=folder / "rows.jsonl", output_dir=folder / "drafter", max_steps=160,
        target_layer_ids="1 3", eval_rows=0, eval_prompts=0, logging_steps=100, learning_rate=5e-3,
        objective="uniform", per_device_train_batch_size=5, anchors_per_row=16, save_strategy="no",
    )  # fmt: skip
    train([word for key, value in keys.items() for word in (f"--{key}", *str(value).split())])
    return folder


def asked(folder: Path, **other) -> list:
    """The command's words for a folder's pair."""
    keys = dict(target=folder / "target", drafter=folder / "drafter", prompts=folder / "rows.jsonl")
    keys |= dict(count=PROMPTS, max_new_tokens=NEW) | other
    return [word for key, value in keys.items() for word in (f"--{key}", value)]


@pytest.fixture
def copied(healthy, tmp_path) -> Path:
    """A copy to plant a fault in."""
    return Path(shutil.copytree(healthy, tmp_path / "copy"))


def without_code(drafter: Path) -> None:
    """Take the code out of a drafter's folder. A clean process would take seconds to load it, and what it finds is
    tested where its fault is planted."""
    for path in drafter.glob("*.py"):
        path.unlink()


def edit(path: Path, **changes) -> None:
    content = json.loads(path.read_text())
    if "dflash_config" in content:
        mirrored = content["dflash_config"]
        mirrored |= {key: value for key, value in changes.items() if key in mirrored}
    path.write_text(json.dumps(content | changes))


def test_a_healthy_pair_passes_every_check(healthy, capsys):
    lines = examined(capsys, *asked(healthy))
    odd = {name: line for name, line in lines.items() if line["verdict"] in (FAIL, WARN)}
    assert not odd
    assert [name for name, line in lines.items() if line["verdict"] == SKIP] == ["adapter base"]
    assert {*lines} == {*command.OF_PAIR}


def taps_moved(folder, tokenizer):
    edit(folder / "drafter" / "config.json", target_layer_ids=[2, 4])


def mask_token_changed(folder, tokenizer):
    edit(folder / "drafter" / "config.json", mask_token_id=20)


def thinking_flipped(folder, tokenizer):
    edit(folder / "drafter" / "config.json", chat_template_kwargs={"enable_thinking": False})


def rope_changed(folder, tokenizer):
    edit(folder / "drafter" / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 50.0})


def head_untied(folder, tokenizer):
    edit(folder / "target" / "config.json", tie_word_embeddings=False)


def another_target(folder, tokenizer):
    path = folder / "target" / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.2.mlp.down_proj.weight"] += 0.5
    save_file(weights, path, metadata={"format": "pt"})


def embedding_resized(folder, tokenizer):
    target = AutoModelForCausalLM.from_pretrained(folder / "target")
    target.resize_token_embeddings(len(tokenizer) + 20)
    target.save_pretrained(folder / "target")


def template_edited(folder, tokenizer):
    path = folder / "target" / "chat_template.jinja"
    path.write_text("Be brief. " + path.read_text())


def saved_in_fp16(folder, tokenizer):
    path = folder / "drafter" / "model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    edit(folder / "drafter" / "config.json", dtype="float16")


def test_what_is_said_to_mend_fp16_mends_it(copied, tokenizer, capsys):
    saved_in_fp16(copied, tokenizer)
    edit(copied / "drafter" / "config.json", dtype="bfloat16")
    convert(["--drafter", str(copied / "drafter"), "--out", str(copied / "new")])
    without_code(copied / "new")
    assert not failed(examined(capsys, *asked(copied, drafter=copied / "new")))


def code_changed(folder, tokenizer):
    path = folder / "drafter" / "modeling_dflash.py"
    code = path.read_text()
    assert "self.norm(hidden_states)" in code
    path.write_text(code.replace("self.norm(hidden_states)", "self.norm(-hidden_states)"))


PLANTED = {
    taps_moved: "taps",
    mask_token_changed: "mask token",
    thinking_flipped: "thinking",
    rope_changed: "RoPE and window",
    head_untied: "target's weights",
    another_target: "pair",
    embedding_resized: "vocabulary",
    template_edited: "chat template",
    saved_in_fp16: "dtype",
    code_changed: "clean process",
}


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_fault_is_found_and_named(copied, tokenizer, capsys, plant):
    plant(copied, tokenizer)
    name = PLANTED[plant]
    if name != "clean process":
        without_code(copied / "drafter")
    # files and records alone show it, so that the target need not write much
    lines = examined(capsys, *asked(copied, count=1, max_new_tokens=8))
    assert lines[name]["verdict"] == FAIL, lines[name]
    assert lines[name]["mend"] or name == "clean process"


@pytest.mark.parametrize("plant", [taps_moved, mask_token_changed, rope_changed])
def test_without_a_record_the_drafts_themselves_show_it(copied, tokenizer, capsys, plant):
    plant(copied, tokenizer)
    without_code(copied / "drafter")
    (copied / "drafter" / "provenance.json").unlink()
    assert PLANTED[plant] in failed(examined(capsys, *asked(copied)))


def another_architecture(architecture: str, tokenizer):
    ids = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None)
    vocabulary = dict(vocab_size=len(tokenizer) + 4)
    if architecture not in FAMILIES:
        return make_target(architecture, torch.float32, **vocabulary, **ids)
    set_seed(0)
    config = AutoConfig.for_model(architecture, **FAMILIES[architecture] | ids | vocabulary)
    return AutoModelForCausalLM.from_config(config).eval()


def trained_on(target, rows: torch.Tensor, labels: torch.Tensor, anchors: torch.Tensor, **fault):
    """A drafter that was trained on some labels (B, S) of some rows, in blocks that see too much of the context or not
    their anchor."""
    drafter = make_drafter(target, K, taps=(1, 2))
    config, frozen = drafter.config, FrozenTarget(target, drafter.config)
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    states = frozen.context(rows)

    def blocks_at(ids, where):
        ones = torch.ones_like(ids, dtype=torch.bool)
        real = torch.ones_like(where, dtype=torch.bool)
        return make_blocks(ids, ones, torch.zeros_like(ids), where, real, K, config.mask_token_id)

    for _ in range(fault["steps"]):
        some = torch.randint(0, len(rows), (8,), generator=generator)
        where = anchors[torch.randint(0, len(anchors), (8, 6), generator=generator)].sort(1).values
        blocks = blocks_at(rows[some], where)
        noise = blocks.noise_ids
        if fault.get("hides_anchor"):
            noise = torch.full_like(noise, config.mask_token_id)
        mask = blocks_at(rows[some], where + fault.get("seen_too_much", 0)).attention_mask
        hidden = drafter(frozen.noise_embeds(noise), states[some], mask, blocks.position_ids).last_hidden_state
        last = fault.get("last_slot", K - 1)
        logits = frozen.head(hidden.view(8, 6, K, -1)[:, :, 1 : last + 1])
        slots = where[:, :, None] + torch.arange(1, last + 1)
        loss = cross_entropy(logits.flatten(0, 2), labels[some].gather(1, slots.flatten(1)).flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return drafter


def saved_pair(folder: Path, target, tokenizer, drafter, texts: torch.Tensor | None = None) -> Path:
    write_rows(folder / "rows.jsonl", texts_of(target, tokenizer) if texts is None else texts)
    save_target(target, tokenizer, folder / "target")
    drafter.save_pretrained(folder / "drafter")
    without_code(folder / "drafter")
    return folder


@pytest.mark.parametrize("shift", [1, -1])
def test_labels_shifted_in_training_are_found(tmp_path, tokenizer, capsys, shift):
    target = another_architecture("llama", tokenizer)
    texts = texts_of(target, tokenizer)
    anchors = torch.arange(PROMPT, texts.shape[1] - K - 1)
    drafter = trained_on(target, texts, texts.roll(-shift, 1), anchors, steps=100)
    lines = examined(capsys, *asked(saved_pair(tmp_path, target, tokenizer, drafter, texts)))
    assert "label alignment" in failed(lines)


def test_a_drafter_that_needs_its_anchors_state_is_found(tmp_path, tokenizer, capsys):
    """It was trained with a mask that shows one token too much, and looks at nothing else of its anchor. Its rows are
    random tokens, because what a tiny target writes repeats itself, so that nobody has to look."""
    target = another_architecture("gpt2", tokenizer)
    rows = torch.randint(10, 300, (300, PROMPT + NEW), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        chosen = target(rows).logits.argmax(-1).roll(1, 1)  # at each place, by what stands before it
    anchors = torch.arange(4, PROMPT + NEW - K)
    drafter = trained_on(target, rows, chosen, anchors, steps=500, last_slot=1, seen_too_much=1, hides_anchor=True)
    lines = examined(capsys, *asked(saved_pair(tmp_path, target, tokenizer, drafter)))
    assert lines["context leak"]["verdict"] == FAIL, lines["context leak"]
    # and the same training without the leak raises no alarm
    drafter = trained_on(target, rows, chosen, anchors, steps=100, last_slot=1)
    drafter.save_pretrained(tmp_path / "drafter")
    without_code(tmp_path / "drafter")
    lines = examined(capsys, *asked(tmp_path))
    assert lines["context leak"]["verdict"] == PASS, lines["context leak"]


def test_dominos_alignment_of_another_kind_is_found(tmp_path, tokenizer, capsys):
    target = another_architecture("gpt2", tokenizer)
    target.transformer.wpe.weight.data.mul_(4)  # so that no text repeats itself, and each token has one place
    drafter = make_domino(target, K, shift_label=False)
    texts = texts_of(target, tokenizer)
    overfit(drafter, target, texts, PROMPT, steps=120)
    saved_pair(tmp_path, target, tokenizer, drafter, texts)
    assert not failed(examined(capsys, *asked(tmp_path)))
    edit(tmp_path / "drafter" / "config.json", shift_label=True)
    lines = examined(capsys, *asked(tmp_path))
    assert lines["label alignment"]["verdict"] == FAIL, lines["label alignment"]
    assert "shift_label: false" in lines["label alignment"]["mend"]


def test_an_adapter_on_another_base_is_found(healthy, copied, tokenizer, capsys):
    keys = BASE | dict(
        target=healthy / "target", drafter=copied / "drafter", dataset_name=healthy / "rows.jsonl", use_peft="true",
        output_dir=copied / "lora", eval_rows=0, eval_prompts=0, save_strategy="no",
    )  # fmt: skip
    for key in ("num_draft_layers", "block_size", "target_layer_ids"):
        del keys[key]
    train([word for key, value in keys.items() for word in (f"--{key}", *str(value).split())])
    without_code(copied / "lora")
    assert examined(capsys, *asked(copied, drafter=copied / "lora"))["adapter base"]["verdict"] == PASS
    path = copied / "drafter" / "model.safetensors"
    weights = load_file(path)
    save_file({name: tensor * 1.5 for name, tensor in weights.items()}, path, metadata={"format": "pt"})
    lines = examined(capsys, *asked(copied, drafter=copied / "lora"))
    assert failed(lines) == {"adapter base"}
    assert "other weights" in lines["adapter base"]["says"]


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2", "gpt_oss", "falcon_h1"])
def test_other_architectures_raise_no_false_alarm(tmp_path, tokenizer, capsys, architecture):
    target = another_architecture(architecture, tokenizer)
    texts = texts_of(target, tokenizer, count=3)
    drafter = overfit(make_drafter(target, K), target, texts, PROMPT, steps=60)
    lines = examined(capsys, *asked(saved_pair(tmp_path, target, tokenizer, drafter, texts), count=3))
    assert not failed(lines), {name: lines[name] for name in failed(lines)}
    warned = {name for name, line in lines.items() if line["verdict"] == WARN}
    # Nobody has noted a template's hash beside this drafter.
    assert warned <= {"chat template"}


def test_what_cannot_be_loaded_is_said_and_the_rest_left_out(copied, capsys):
    (copied / "target" / "model.safetensors").write_bytes(b"cut")
    lines = examined(capsys, *asked(copied))
    assert failed(lines) == {"target"}
    assert lines["taps"] == dict(check="taps", verdict=SKIP, says="needs: target, drafter", mend="")


# ---- recipes


def recipe_words(folder: Path, **other) -> list:
    keys = BASE | dict(
        target=folder / "target", dataset_name=folder / "rows.jsonl", target_layer_ids="1 3", output_dir="unused",
    ) | other  # fmt: skip
    words = [word for key, value in keys.items() for word in (f"--{key}", *str(value).split())]
    (folder / "recipe.yaml").write_text("objective: auf\n")
    return ["--config", folder / "recipe.yaml", *words, "--max_new_tokens", 16, "--count", 2]


@pytest.mark.parametrize("kind", ["dflash", "domino"])
def test_a_healthy_recipe_passes_every_check(copied, capsys, monkeypatch, kind):
    monkeypatch.chdir(copied)
    own = dict(drafter_type="domino", objective="b_auf", gru_hidden_dim=12, emb_dim=8) if kind == "domino" else {}
    lines = examined(capsys, *recipe_words(copied, **own))
    assert {*lines} == {*command.OF_RUN}
    assert not failed(lines), {name: lines[name] for name in failed(lines)}
    assert not Path("unused").exists(), "a checkup leaves nothing behind"


def test_recipes_faults_are_named(copied, capsys, monkeypatch):
    monkeypatch.chdir(copied)
    assert failed(examined(capsys, *recipe_words(copied, objektive="auf"))) == {"recipe"}
    rows = [json.loads(line)["input_ids"] for line in (copied / "rows.jsonl").read_text().splitlines()]
    word = rows[0][PROMPT + 1]
    lines = examined(capsys, *recipe_words(copied, mask_token_id=word, eval_rows=0))
    assert lines["supervision"]["verdict"] in (WARN, FAIL), lines["supervision"]
    foreign = copied / "foreign.jsonl"
    words = (json.dumps({"text": f"sheep {i} sleep, 0123456789 foxes jump"}) + "\n" for i in range(9))
    foreign.write_text("".join(words))
    lines = examined(capsys, *recipe_words(copied, dataset_name=foreign, eval_rows=2))
    assert lines["on-policy"]["verdict"] == WARN
    assert "regenerate" in lines["on-policy"]["mend"]


def test_rows_that_begin_with_an_answer_raise_no_false_alarm(copied, capsys, monkeypatch):
    monkeypatch.chdir(copied)
    question, answer = dict(role="user", content="Is it?"), dict(role="assistant", content="It is, sheep sleep.")
    rows = [[answer, question, answer], [question, answer]] * 4
    chats = copied / "chats.jsonl"
    chats.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    found = examined(capsys, *recipe_words(copied, dataset_name=chats, eval_rows=0))["serving prompt"]
    assert found["verdict"] == PASS and found["says"].startswith("8 answers"), found


# ---- the parts


def test_a_check_that_raises_is_a_failure_in_the_errors_words():
    def raises(patient):
        raise ValueError("what was found:\n  mend it")

    table = {"a": Check(raises), "b": Check(lambda patient: Line(PASS, "fine"), ("a",))}
    found = list(examine(None, table))
    assert [(one.check, one.verdict, one.says) for one in found] == [
        ("a", FAIL, "what was found: mend it"),
        ("b", SKIP, "needs: a"),
    ]


def test_drafts_at_every_place_are_those_of_decoding(healthy):
    target = AutoModelForCausalLM.from_pretrained(healthy / "target")
    rows = [json.loads(line)["input_ids"] for line in (healthy / "rows.jsonl").read_text().splitlines()]
    texts = torch.tensor(rows)
    target.generation_config.eos_token_id = None  # as they were written
    drafter = overfit(make_drafter(target, K, taps=TAPS), target, texts, PROMPT, steps=60)

    class Asked:
        frozen = FrozenTarget(target, drafter.config)

        def context(self, number, layers):
            return self.frozen.context(self.texts[number].output)

    patient = Asked()
    patient.drafter = drafter
    patient.texts = [Text(text[None, :PROMPT], text[None]) for text in texts]
    accepted = drafting.drafts_in(patient).accepted
    with attach(target, drafter) as attachment:
        for text in patient.texts:
            target.generate(text.prompt, do_sample=False, max_new_tokens=NEW, assistant_model=drafter)
    at = 0
    for rounds in attachment.generations:
        place = at
        for one in rounds:
            assert one.accepted == min(accepted[place], one.drafted)
            place += one.emitted
        at += NEW - 1
    assert len({*accepted}) > 2


@pytest.mark.parametrize(("words", "said"), [
    ([], "give --drafter and --target"),
    (["--drafter", "x", "--target", "y", "--nonsense", "1"], "unrecognized arguments: --nonsense 1"),
    (["--drafter", "x", "--target", "y", "--count", "0"], "--count is 0"),
    (["--drafter", "x", "--target", "y", "--count", "7"], "6 questions are built in"),
    (["--drafter", "x", "--target", "y", "--rows", "7"], "--rows is for a recipe"),
    (["--config", "r.yaml", "--device", "cpu"], "a key of its own: use_cpu"),
    (["--config", "r.yaml", "--dtype", "float32"], "a key of its own: target_dtype"),
])  # fmt: skip
def test_command_lines_that_make_no_sense_are_refused(words, said, capsys):
    with pytest.raises(SystemExit) as end:
        command.main(words)
    assert end.value.code == 2 and said in capsys.readouterr().err
