"""Targets that also see images: loaded, drafted for and trained on their text, and what is no text is named."""

import json
import warnings
from pathlib import Path

import pytest
import torch
import trl
from conftest import MASK, PAD, attach, byte_level_tokenizer, make_drafter, overfit, random_prompts
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    MllamaForCausalLM,
    set_seed,
)

from hf_specauf.data.answers import generation_config
from hf_specauf.data.conversation import Sampling
from hf_specauf.data.rows import prepare_rows
from hf_specauf.evaluate import main as evaluate
from hf_specauf.identity import target_fingerprint
from hf_specauf.identity.multimodal import auto_class, placeholder_tokens
from hf_specauf.publishing.card import render
from hf_specauf.regenerate import main as regenerate
from hf_specauf.target import FrozenTarget, decoder_layers, default_mask_token_id, drafter_config, load_target
from hf_specauf.train import main as train
from hf_specauf.training.preflight import check_packing

pytestmark = pytest.mark.internals
SHIPPED = Path(trl.__file__).parent / "chat_templates"
ROWS, IMAGE = 400, 390  # of the embedding; the placeholder of images
TEXT = dict(
    hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=4,
    head_dim=8, vocab_size=ROWS, max_position_embeddings=256, eos_token_id=0, pad_token_id=PAD, bos_token_id=None,
)  # fmt: skip
# As deep as the text's decoder, so that its list of layers could be taken for the decoder's.
TOWER = dict(hidden_size=32, intermediate_size=32)
SIGLIP = TOWER | dict(num_attention_heads=2, num_hidden_layers=4, image_size=32, patch_size=8)
QWEN = TOWER | dict(depth=4, num_heads=2, out_hidden_size=32, patch_size=4, temporal_patch_size=1)
MROPE = dict(rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]})
QWEN_IDS = dict(image_token_id=IMAGE, video_token_id=391, vision_start_token_id=392, vision_end_token_id=393)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
FAMILIES = {
    "gemma3": dict(
        text_config=TEXT | dict(query_pre_attn_scalar=8, sliding_window=16), mm_tokens_per_image=4,
        vision_config=SIGLIP | dict(vision_use_head=False), image_token_index=IMAGE,
    ),
    "qwen2_5_vl": dict(
        text_config=TEXT | MROPE, vision_config=QWEN | dict(fullatt_block_indexes=[1], window_size=16), **QWEN_IDS
    ),
    "qwen3_vl": dict(
        text_config=TEXT | MROPE, **QWEN_IDS,
        vision_config=QWEN | dict(deepstack_visual_indexes=[1], num_position_embeddings=16),
    ),
    "qwen3_vl_moe": dict(
        text_config=TEXT | MROPE | EXPERTS, **QWEN_IDS,
        vision_config=QWEN | dict(deepstack_visual_indexes=[1], num_position_embeddings=16),
    ),
    "mistral3": dict(
        text_config=TEXT | dict(model_type="mistral"), image_token_index=IMAGE,
        vision_config=SIGLIP | dict(model_type="pixtral", head_dim=16),
    ),
    "smolvlm": dict(
        text_config=TEXT | dict(model_type="llama"), vision_config=SIGLIP, image_token_id=IMAGE, scale_factor=2
    ),
    "llava": dict(
        text_config=TEXT | dict(model_type="llama"), image_token_index=IMAGE,
        vision_config=SIGLIP | dict(model_type="clip_vision_model"),
    ),
}  # fmt: skip
KEYS = dict(max_new_tokens=16, do_sample=False)
PROMPTS = random_prompts(2, 20)


def make_vlm(family: str, dtype: torch.dtype = torch.float64):
    """A tiny target of a family with random weights, as `make_target` makes them of text alone."""
    set_seed(0)
    config = AutoConfig.for_model(family, **FAMILIES[family])
    target = AutoModelForImageTextToText.from_config(config, experts_implementation="eager")
    for parameter in target.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(4.0)
    target.generation_config.eos_token_id = None
    target.generation_config.pad_token_id = PAD
    return target.to(dtype).eval()


def image(family: str, prompt: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """A prompt (1, S) with an image in it, and its pixels."""
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    prompt = prompt.clone()
    if family == "gemma3":
        prompt[:, 3:7] = IMAGE
        return prompt, dict(pixel_values=pixels, token_type_ids=(prompt == IMAGE).long())
    prompt[:, 2:8] = torch.tensor([392, IMAGE, IMAGE, IMAGE, IMAGE, 393])
    more = dict(image_grid_thw=torch.tensor([[1, 4, 4]]), mm_token_type_ids=(prompt == IMAGE).long())
    return prompt, dict(pixel_values=pixels.flatten()[: 16 * 48].view(16, 48)) | more


# ---- what is lent, and decoding


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_of_a_target_that_sees_images_is_drafted_for(family):
    target = make_vlm(family)
    drafter = make_drafter(target)
    assert drafter.config.hidden_size == 32 and drafter.config.num_target_layers == 4
    frozen = FrozenTarget(target, drafter.config)
    frozen.check(PROMPTS[:1])
    assert decoder_layers(target)[0] in list(target.get_decoder().modules())
    check_packing(frozen, PROMPTS, torch.tensor([[0] * 8 + [1] * 7 + [2] * 5, [0] * 20]))
    text = target.generate(PROMPTS[:1], **KEYS)
    overfit(drafter, target, text, 20, steps=25).double()
    with attach(target, drafter) as attachment:
        assert target.generate(PROMPTS[:1], assistant_model=drafter, **KEYS).equal(text)
    assert attachment.acceptance().tau > 1.2
    # Qwen-VL keeps what it knows of positions on the model, from one call to the next.
    assert target.generate(PROMPTS[:1], **KEYS).equal(text)
    # transformers' own generator, which cuts M-RoPE's positions along another axis.
    assert target.generate(PROMPTS[:1], assistant_model=drafter, speculation_type="dflash", **KEYS).equal(text)


@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl"])
def test_a_prompt_with_an_image_is_said_to_be_no_text_and_its_output_stays_the_targets_own(family):
    target = make_vlm(family)
    drafter = make_drafter(target, dtype=torch.float64)
    prompt, more = image(family, PROMPTS[:1])
    plain, text = target.generate(prompt, **more, **KEYS), target.generate(PROMPTS[:1], **KEYS)
    assert not target.generate(prompt, **KEYS).equal(plain)  # the image was looked at
    with attach(target, drafter):
        with pytest.warns(UserWarning, match=r"more than text \(image\).*learned from text alone"):
            assert target.generate(prompt, assistant_model=drafter, **more, **KEYS).equal(plain)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            # Nothing of the image is left on the target.
            assert target.generate(PROMPTS[:1], assistant_model=drafter, **KEYS).equal(text)


def test_a_target_with_layers_for_images_alone_is_refused_in_one_line():
    text = {key: value for key, value in TEXT.items() if key not in ("head_dim", "bos_token_id")}
    text["cross_attention_layers"] = [1]
    target = MllamaForCausalLM(AutoConfig.for_model("mllama_text_model", **text)).double().eval()
    with pytest.raises(ValueError, match=r"MllamaForCausalLM skips decoder layer 1 on text.*another target"):
        FrozenTarget(target, make_drafter(target, taps=[0, 2]).config).check(PROMPTS[:1])


# ---- loading, training, measuring, and answers


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of targets with a tokenizer each, whose chat templates are the published ones."""
    made = {}
    for family, template in (("qwen2_5_vl", "qwen2_5_vl.jinja"), ("smolvlm", "smolvlm.jinja")):
        target, folder = make_vlm(family, torch.float32), tmp_path_factory.mktemp(family)
        tokenizer = byte_level_tokenizer((SHIPPED / template).read_text())
        tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "<end_of_utterance>"], special_tokens=True)
        target.generation_config.eos_token_id = tokenizer.eos_token_id
        target.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        made[family] = folder
    return made


def test_a_checkpoint_that_no_causal_lm_class_has_is_loaded_by_the_class_that_has_it(folders):
    target, _ = load_target(str(folders["qwen2_5_vl"]))
    assert type(target).__name__ == "Qwen2_5_VLForConditionalGeneration" and not target.training
    own = AutoModelForImageTextToText.from_pretrained(folders["qwen2_5_vl"])
    assert target_fingerprint(target) == target_fingerprint(own)  # what a user loads is the same target
    assert auto_class(target) == "AutoModelForImageTextToText"
    assert auto_class(make_vlm("gemma3")) == "AutoModelForCausalLM"


def test_a_chat_template_in_the_processors_own_file_is_the_tokenizers(folders, tmp_path):
    AutoConfig.from_pretrained(folders["smolvlm"]).save_pretrained(tmp_path)
    AutoModelForImageTextToText.from_pretrained(folders["smolvlm"]).save_pretrained(tmp_path)
    byte_level_tokenizer().save_pretrained(tmp_path)
    assert load_target(str(tmp_path))[1].chat_template is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert load_target(str(tmp_path))[1].chat_template == "{{ messages }}"


def test_a_drafter_is_trained_on_packed_rows_measured_and_served_by_the_commands(folders, command, tmp_path, capsys):
    target = folders["qwen2_5_vl"]
    train(command("chat", target=target, packing="true", max_length=128, max_steps=1))
    assert "packed them" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "eval.json").read_text())["lossless"]["different"] == 0
    evaluate(
        ["--target", str(target), "--drafter", str(tmp_path / "out"), "--prompts", str(command("chat")[3]),
         "--count", "1", "--max_new_tokens", "8", "--out", str(tmp_path / "eval"), "--device", "cpu"]
    )  # fmt: skip
    assert json.loads((tmp_path / "eval" / "eval.json").read_text())["lossless"]["different"] == 0
    card = render(tmp_path / "out", "alice/drafter").text
    assert card.count("AutoModelForImageTextToText.from_pretrained(") == 2 and "CausalLM" not in card


def test_a_drafter_is_trained_where_the_template_reads_parts_alone(folders, command, capsys):
    train(command("chat", target=folders["smolvlm"], max_length=128, max_steps=1, eval_rows=0))
    assert "<|im_start|>User: Question 0?<end_of_utterance>\nAssistant:⟦ To be read" in capsys.readouterr().out


def test_answers_are_written_to_rows_of_text_and_rows_with_images_are_counted(folders, tmp_path):
    asked = {"role": "user", "content": "What does the fox do?"}
    seen = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}
    rows = [{"messages": [asked]}, {"messages": [seen]}, {"messages": [asked], "images": ["fox.jpg"]}]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    regenerate(
        ["--target", str(folders["smolvlm"]), "--dataset_name", str(tmp_path / "asked.jsonl"), "--device", "cpu",
         "--out", str(tmp_path / "own.jsonl"), "--max_new_tokens", "8", "--continuous_batching", "false"]
    )  # fmt: skip
    [answered] = [json.loads(line) for line in (tmp_path / "own.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(folders["smolvlm"])
    text = tokenizer.decode(answered["input_ids"])
    assert text.startswith("<|im_start|>User: What does the fox do?<end_of_utterance>\nAssistant:")
    skipped = [json.loads(line) for line in (tmp_path / "own.skipped.jsonl").read_text().splitlines()]
    assert [row["skipped"] for row in skipped] == [
        "a turn holds more than text ('image'): drafting is for text alone",
        "its column 'images' is filled: drafting is for text alone",
    ]


# ---- placeholders


def test_a_placeholder_is_no_mask_token_and_is_never_written(tokenizer):
    target = make_vlm("qwen2_5_vl")
    assert placeholder_tokens(target.config) == {IMAGE: "image", 391: "video"}
    with pytest.raises(ValueError, match="mask_token_id 390 is the target's placeholder of image"):
        drafter_config(target, num_hidden_layers=1, block_size=4, mask_token_id=IMAGE, target_layer_ids=[0])
    plain = byte_level_tokenizer()
    plain.mask_token = None
    target.config.image_token_id = len(plain)  # the first row that the tokenizer leaves unused
    assert default_mask_token_id(target, plain) == len(plain) + 1
    suppressed = generation_config(Sampling(8, 0.0), target, plain).suppress_tokens
    assert sorted(suppressed) == [len(plain), len(plain) + 1, 391]


def test_a_row_with_a_placeholder_is_left_out_and_counted(tokenizer, capsys):
    rows = [{"input_ids": list(range(20, 40)), "supervised": [1] * 20}] * 3
    rows.append({"input_ids": [*range(20, 30), IMAGE, *range(30, 40)], "supervised": [1] * 21})
    kept = prepare_rows(
        Dataset.from_list(rows), tokenizer, max_length=32, block_size=4, mask_token_id=MASK,
        vocab_size=len(tokenizer), placeholders={IMAGE: "image"},
    )  # fmt: skip
    assert len(kept) == 3
    printed = capsys.readouterr().out
    assert "dropped 1 of 4 rows: the target's placeholder of image occurs in it (1, first: row 3)" in printed
