"""Drafters from other layouts: the same weights bit for bit, or a clear refusal."""

import json

import pytest
import torch
from conftest import make_domino, make_drafter, make_target
from safetensors.torch import load_file, save_file

from hf_specauf import DFlashConfig, DFlashDraftModel, DominoDraftModel, load_drafter
from hf_specauf.convert import main
from hf_specauf.layouts import LAYOUTS, Layout
from hf_specauf.layouts.load import layout_of
from hf_specauf.layouts.zlab import our_config

RENAMED = {"fc.weight": "encoder.fc.weight", "hidden_norm.weight": "encoder.output_norm_enc.weight"}


def z_lab(drafter) -> dict:
    """The config.json that z-lab's trainer writes for such a drafter."""
    config = drafter.config
    shape = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "head_dim", "rms_norm_eps", "max_position_embeddings", "vocab_size", "num_target_layers", "block_size",
             "eos_token_id", "pad_token_id", "bos_token_id")  # fmt: skip
    return {key: getattr(config, key) for key in shape} | {
        "architectures": ["DFlashDraftModel"], "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
        "model_type": "qwen3", "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu",
        "initializer_range": 0.02, "rope_scaling": None, "rope_theta": config.rope_parameters["rope_theta"],
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False,
        "sliding_window": None, "max_window_layers": 5, "layer_types": ["full_attention"] * config.num_hidden_layers,
        "dflash_config": {"mask_token_id": config.mask_token_id, "target_layer_ids": config.target_layer_ids},
    }  # fmt: skip


@pytest.fixture
def drafter():
    return make_drafter(make_target(), layers=2, dtype=torch.bfloat16)


@pytest.fixture
def folder(drafter, tmp_path):
    """A folder in z-lab's layout."""
    path = tmp_path / "z-lab"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(z_lab(drafter)))
    save_file(drafter.state_dict(), path / "model.safetensors")
    return path


def change(folder, **keys) -> None:
    config = json.loads((folder / "config.json").read_text())
    nested = keys.pop("dflash_config", {})
    config |= keys
    config["dflash_config"] = config["dflash_config"] | nested
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "gone"}))


def test_z_lab_folder_is_converted_bit_for_bit_and_serves(folder, drafter):
    found = load_drafter(folder)
    assert type(found) is DFlashDraftModel and found.dtype == torch.bfloat16
    ours, theirs = found.state_dict(), drafter.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    for key in ("target_layer_ids", "mask_token_id", "block_size", "num_target_layers", "rope_parameters"):
        assert getattr(found.config, key) == getattr(drafter.config, key)
    noise, context = torch.randn(1, 4, 32), torch.randn(1, 9, 64)
    with torch.no_grad():
        assert torch.equal(found(noise, context).last_hidden_state, drafter(noise, context).last_hidden_state)


@pytest.mark.parametrize("dtype", ["auto", torch.float32])
def test_rope_frequencies_of_a_bf16_folder_stay_in_fp32(folder, drafter, dtype):
    found = load_drafter(folder, dtype=dtype)
    trained = DFlashDraftModel(drafter.config).rotary_emb
    for name, frequencies in found.rotary_emb.named_buffers():
        assert frequencies.dtype == torch.float32 and torch.equal(frequencies, getattr(trained, name))


def test_newer_files_may_keep_the_block_size_inside_and_name_two_tensors_as_transformers_does(folder, drafter):
    change(folder, block_size="gone", rope_theta="gone", rope_scaling="gone",
           rope_parameters=drafter.config.rope_parameters,
           dflash_config={"block_size": 4, "causal": False, "projector_type": "dflash"})  # fmt: skip
    state = {RENAMED.get(name, name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(state, folder / "model.safetensors")
    found = load_drafter(folder, dtype=torch.float32)
    assert found.config.rope_parameters == drafter.config.rope_parameters
    change(folder, rope_parameters={"rope_type": "default"}, rope_theta=2e6)
    assert load_drafter(folder).config.rope_parameters == {"rope_type": "default", "rope_theta": 2e6}
    assert found.config.block_size == 4 and found.dtype == torch.float32
    assert torch.equal(found.fc.weight, drafter.fc.weight.float())


@pytest.mark.parametrize(
    "keys, said",
    [
        (dict(dflash_config={"shift_label": True}), "dflash_config.shift_label"),
        (dict(dflash_config={"attention_mode": "mla"}), "dflash_config.attention_mode"),
        (dict(dflash_config={"selector_rank": 8}), "dflash_config.selector_rank"),
        (dict(dflash_config={"projector_type": "domino"}), "says nothing about emb_dim"),
        (dict(dflash_config={"block_size": 8}), "gives block_size twice, as 4 and 8"),
        (dict(dflash_config={"mask_token_id": None}), "says nothing about mask_token_id"),
        (
            dict(num_target_layers="gone"),
            "says nothing about num_target_layers.*Where you know it, write num_target_layers into",
        ),
        (dict(rope_theta="gone"), "says nothing about rope_theta"),
        (
            dict(rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
            "rope_theta twice, as 10000.0 and 500000.0",
        ),
        (dict(domino_config={"emb_dim": 8}), "domino_config.emb_dim"),
        (dict(rope_scaling={"type": "yarn", "factor": 4}), "rope_scaling"),
        (dict(attention_bias=True), "attention_bias.*Serve it by the engine that it was made for"),
        (dict(layer_types=["sliding_attention"] * 2), "sliding window"),
        (dict(final_logit_softcapping=30.0), "final_logit_softcapping"),
    ],
)
def test_what_would_be_guessed_or_ignored_is_refused(folder, keys, said):
    change(folder, **keys)
    with pytest.raises(ValueError, match=said):
        load_drafter(folder)


@pytest.mark.parametrize("shift", [True, False])
def test_specforge_domino_folder_is_converted_with_its_alignment(tmp_path, shift):
    head = dict(gru_hidden_dim=12, emb_dim=8, pure_draft_prefix_len=1, shift_label=shift)
    drafter = make_domino(make_target(), layers=2, dtype=torch.bfloat16, **head)
    nested = dict(mask_token_id=drafter.config.mask_token_id, target_layer_ids=[0, 2], projector_type="domino", **head)
    config = z_lab(drafter) | dict(architectures=["DominoDraftModel"], emb_dim=8, dflash_config=nested)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(drafter.state_dict(), tmp_path / "model.safetensors")
    found = load_drafter(tmp_path)
    assert type(found) is DominoDraftModel and found.config.shift_label is shift
    assert found.config.dflash_config == drafter.config.dflash_config
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in drafter.state_dict().items())
    # or with the head's keys in a block of their own
    own = dict(mask_token_id=nested["mask_token_id"], target_layer_ids=[0, 2], projector_type="domino")
    (tmp_path / "config.json").write_text(json.dumps(config | dict(dflash_config=own, domino_config=head)))
    assert load_drafter(tmp_path).config.dflash_config == drafter.config.dflash_config
    (tmp_path / "config.json").write_text(json.dumps(config | dict(domino_config=head | dict(gru_hidden_dim=13))))
    with pytest.raises(ValueError, match="gives gru_hidden_dim twice, as 12 and 13"):
        load_drafter(tmp_path)
    del nested["shift_label"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="says nothing about shift_label"):
        load_drafter(tmp_path)


def test_unknown_missing_and_pickled_tensors_are_refused(folder, drafter):
    state = drafter.state_dict()
    save_file(state | {"embed_tokens.weight": torch.zeros(2, 2)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="embed_tokens.weight"):
        load_drafter(folder)
    save_file({name: t for name, t in state.items() if name != "fc.weight"}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="1 tensors are unknown, missing.*fc.weight"):
        load_drafter(folder)
    for where in ("model.safetensors", "model-2.safetensors"):  # one tensor under both of its names
        save_file(state, folder / "model.safetensors")
        more = {"encoder.fc.weight": state["fc.weight"] * 2}
        save_file(more | (state if where == "model.safetensors" else {}), folder / where)
        with pytest.raises(ValueError, match="holds fc.weight twice"):
            load_drafter(folder)
    (folder / "model-2.safetensors").unlink()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled weights are not loaded.*save them once more by safetensors"):
        load_drafter(folder)


def test_the_dtype_of_a_folder_of_several_is_the_widest(folder, drafter):
    state = drafter.state_dict()
    save_file(state | {"fc.weight": state["fc.weight"].float() / 3}, folder / "model.safetensors")
    found = load_drafter(folder)
    assert found.dtype == torch.float32 and torch.equal(found.fc.weight, state["fc.weight"].float() / 3)
    with pytest.raises(ValueError, match="dtype is 'bf16'; it must be auto .as stored., bfloat16, float32"):
        load_drafter(folder, dtype="bf16")


def test_a_folder_of_ours_with_other_tensors_than_its_config_asks_for_is_refused(drafter, tmp_path):
    drafter.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    lacking = {name: tensor for name, tensor in state.items() if name != "fc.weight"}
    more, narrow = (state | {name: torch.zeros(2, 2)} for name in ("head.weight", "fc.weight"))
    for odd, name in ((lacking, "fc.weight"), (more, "head.weight"), (narrow, "fc.weight")):
        save_file(odd, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(
            ValueError, match=f"the weights in .* its config asks for: {name} missing, unknown or of another"
        ):
            load_drafter(tmp_path, key="--drafter")


def test_what_is_no_drafter_is_named(tmp_path):
    make_target().save_pretrained(tmp_path / "target")
    with pytest.raises(ValueError, match="says nothing about"):
        load_drafter(tmp_path / "target")
    with pytest.raises(ValueError, match="holds no config.json. Name the folder that train left"):
        load_drafter(tmp_path)
    with pytest.raises(OSError, match="name_or_path: 'no/such/folder' is neither a folder nor a Hub id"):
        load_drafter("no/such/folder")
    with pytest.raises(SystemExit, match="error: --drafter: 'no/such/folder' is neither"):
        main(["--drafter", "no/such/folder", "--out", "nowhere"])
    with pytest.raises(ValueError, match="which has no revision 'main'"):
        load_drafter(tmp_path / "target", "main")


def test_command_writes_our_layout(folder, drafter, tmp_path, capsys):
    main(["--drafter", str(folder), "--target", "Qwen/Qwen3-8B", "--out", str(tmp_path / "ours")])
    assert "block size 4, taps [0, 2], mask token 95" in capsys.readouterr().out
    found = load_drafter(tmp_path / "ours")
    assert isinstance(found.config, DFlashConfig) and found.config.target_model_name_or_path == "Qwen/Qwen3-8B"
    assert torch.equal(found.fc.weight, drafter.fc.weight)
    assert our_config(z_lab(drafter)).to_dict() | {"dtype": "", "architectures": ""} == our_config(
        z_lab(found)
    ).to_dict() | {"dtype": "", "architectures": ""}


# ---- the table of layouts


def test_a_layout_added_by_one_entry_is_recognised_read_and_written(drafter, tmp_path, monkeypatch, capsys):
    def write(found, folder):
        folder.mkdir()
        (folder / "toy.json").write_text(json.dumps(found.config.to_dict(), default=str))
        save_file(found.state_dict(), folder / "toy.safetensors")

    def read(folder, config, dtype):
        found = DFlashDraftModel(DFlashConfig(**json.loads((folder / "toy.json").read_text()))).to(torch.bfloat16)
        found.load_state_dict(load_file(folder / "toy.safetensors"))
        return found if dtype == "auto" else found.to(dtype)

    toy = Layout("a toy's", lambda folder, config: (folder / "toy.json").is_file(), read, write)
    monkeypatch.setitem(LAYOUTS, "toy", toy)
    drafter.save_pretrained(tmp_path / "ours")
    main(["--drafter", str(tmp_path / "ours"), "--to", "toy", "--out", str(tmp_path / "toy")])
    found = load_drafter(tmp_path / "toy", dtype="float32")
    assert found.dtype == torch.float32 and torch.equal(found.fc.weight, drafter.fc.weight.float())
    assert found.config._name_or_path == ""  # AutoModel cannot load it, so nothing may name it as a base
    main(["--drafter", str(tmp_path / "toy"), "--out", str(tmp_path / "again")])
    assert torch.equal(load_drafter(tmp_path / "again").fc.weight, drafter.fc.weight)
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "specauf, specforge, zlab, toy" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "to, said", [("zlab", "it is only read"), ("gguf", "it is no layout that this package knows")]
)
def test_a_layout_that_nothing_writes_is_refused_with_those_that_can_be_written(folder, tmp_path, to, said):
    with pytest.raises(SystemExit, match=f"--to {to}: {said}. What can be written: specauf$"):
        main(["--drafter", str(folder), "--to", to, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_each_layout_is_told_from_the_others(folder, drafter, tmp_path):
    drafter.save_pretrained(tmp_path / "ours")
    config = json.loads((folder / "config.json").read_text())
    head = {"dflash_config": config["dflash_config"] | {"projector_type": "domino"}}
    for name, found in {
        "specauf": json.loads((tmp_path / "ours/config.json").read_text()),
        "zlab": config,
        "specforge": config | head,
    }.items():
        assert layout_of(folder, found, "it") is LAYOUTS[name]
    assert layout_of(folder, config | {"domino_config": {"emb_dim": 8}}, "it") is LAYOUTS["specforge"]
    plain = config["dflash_config"] | {"projector_type": "dflash"}
    assert layout_of(folder, config | {"dflash_config": plain}, "it") is LAYOUTS["zlab"]
    with pytest.raises(ValueError, match="it says nothing about block_size.*These are read: specauf .this package's"):
        layout_of(folder, {"model_type": "llama"}, "it")


def test_old_spelling_of_the_revision_is_read_and_named(folder, tmp_path, capsys):
    with pytest.raises(SystemExit, match="is a folder, which has no revision 'v1'"):
        main(["--drafter", str(folder), "--revision", "v1", "--out", str(tmp_path / "out")])
    assert "--revision is spelt --drafter_revision now" in capsys.readouterr().out
