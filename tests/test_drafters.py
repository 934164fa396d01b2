"""The drafter on disk and in memory: its config, its files, and one forward for training and decoding."""

import ast
import json
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import MASK, VOCAB, attach, make_domino, make_drafter, make_target, overfit, random_prompts, warm_python
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, DynamicCache
from transformers.cache_utils import DFlashCache
from transformers.models.muse_glimmer_assistant.configuration_muse_glimmer_assistant import MuseGlimmerAssistantConfig
from transformers.models.muse_glimmer_assistant.modeling_muse_glimmer_assistant import MuseGlimmerAssistantModel

from hf_specauf.drafters.configuration_dflash import REQUIRED_KEYS, DFlashConfig
from hf_specauf.drafters.modeling_dflash import DFlashDraftModel
from hf_specauf.drafters.target_parts import embed_noise
from hf_specauf.losses.blocks import make_blocks
from hf_specauf.target import FrozenTarget

pytestmark = pytest.mark.internals

K, H, TAPS = 4, 32, (0, 2)
BLOCK = dict(dtype=torch.float64, block_size=K, layers=2, taps=TAPS)
SMALL = dict(
    hidden_size=H, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    vocab_size=VOCAB, mask_token_id=MASK, target_layer_ids=[0, 2], num_target_layers=4, block_size=K,
)  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 1e4}


# ---- rope


@pytest.mark.parametrize("make", [make_drafter, make_domino])
@pytest.mark.parametrize(
    "cast",
    [
        lambda drafter: drafter.to(torch.bfloat16),
        lambda drafter: drafter.bfloat16().float(),
        lambda drafter: drafter.half(),
        lambda drafter: drafter.double(),
        lambda drafter: torch.nn.ModuleList([drafter]).to("cpu", torch.bfloat16)[0],
    ],
    ids=["to", "there and back", "half", "double", "inside another module"],
)
def test_no_cast_of_a_whole_drafter_reaches_its_rope_frequencies(cast, make):
    drafter = make(make_target())
    before = {name: buffer.clone() for name, buffer in drafter.rotary_emb.named_buffers()}
    after = dict(cast(drafter).rotary_emb.named_buffers())
    assert after.keys() == before.keys() == {"inv_freq", "original_inv_freq"}
    for name, frequencies in after.items():
        assert frequencies.dtype == torch.float32 and torch.equal(frequencies, before[name])


def test_rope_frequencies_move_with_the_drafter():
    drafter = make_drafter(make_target()).to("meta", torch.bfloat16)
    assert all(buffer.is_meta for buffer in drafter.rotary_emb.buffers())


# ---- the config


@pytest.mark.parametrize(
    ("wrong", "advice"),
    [
        (dict(target_layer_ids=[0, 9]), r"allowed range 0\.\.2 of a target with 4 layers"),
        (dict(target_layer_ids=[0, 3]), "Layer 3 is the last one.*after the final norm"),
        (dict(target_layer_ids=[-1]), r"allowed range 0\.\.2"),
        (dict(target_layer_ids=[2, 0]), r"Use target_layer_ids: \[0, 2\]"),
        (dict(target_layer_ids=[1, 1]), r"without repeats.*Use target_layer_ids: \[1\]"),
        (dict(target_layer_ids=[]), "give at least one integer"),
        (dict(target_layer_ids=["1"]), "give at least one integer"),
        (dict(target_layer_ids=[True]), "give at least one integer"),
        (dict(block_size=1), "use >= 2"),
        (dict(pad_token_id=MASK), "equals pad_token_id.*Give mask_token_id"),
        (dict(bos_token_id=MASK), "equals bos_token_id"),
        (dict(eos_token_id=MASK), "equals eos_token_id"),
        (dict(eos_token_id=[0, MASK]), "equals eos_token_id"),
        (dict(pad_token_id=MASK, eos_token_id=MASK), "equals pad_token_id and eos_token_id"),
        (dict(mask_token_id=VOCAB), f"outside the target's embedding of {VOCAB} rows"),
        (dict(mask_token_id=-1), "outside the target's embedding"),
        (dict(block_sizee=3), r"Unknown key\(s\) \['block_sizee'\].*Known keys"),
        (dict(rope_theta=1e4), r"Unknown key\(s\) \['rope_theta'\]"),
        (dict(sliding_window=16), r"Unknown key\(s\) \['sliding_window'\]"),
        (dict(rope_parameters=ROPE | {"factor": 2.0}), "would not honour other keys; give exactly"),
        (dict(rope_parameters=ROPE | {"rope_type": "linear", "factor": 2.0}), "give exactly"),
        (dict(layer_types=["full_attention", "sliding_attention"]), 'use "full_attention" for all layers'),
        (dict(layer_types=["full_attention"]), 'use "full_attention" for all layers'),
        (dict(dtype="float16"), "use bfloat16 or float32"),
        (dict(dtype=torch.float16), "use bfloat16 or float32"),
        (dict(shift_label=True), "Domino's alignment"),
        (dict(dflash_config={"mask_token_id": 3}), f"dflash_config.mask_token_id is 3 but the top level says {MASK}"),
        (dict(dflash_config={"target_layer_ids": [1]}), r"dflash_config.target_layer_ids is \[1\].*both must agree"),
        (dict(dflash_config={"block_size": 8}), "dflash_config.block_size is 8 but the top level says 4"),
        (dict(dflash_config={"projector_type": "domino"}), "dflash_config.projector_type is 'domino'"),
    ],
    ids=str,
)
def test_a_value_that_would_cost_acceptance_is_an_error_with_advice(wrong, advice):
    DFlashConfig(**SMALL)  # what differs is the one key
    with pytest.raises(ValueError, match=advice):
        DFlashConfig(**SMALL | wrong)


def own_keys() -> set[str]:
    return set(DFlashConfig.__annotations__) - {"model_type"}


def test_config_json_holds_every_own_key_and_both_shapes_agree(tmp_path):
    DFlashConfig(**SMALL).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert own_keys() <= set(written)
    assert written["shift_label"] is False and written["hidden_act"] == "silu"  # defaults are written too
    assert written["layer_types"] == ["full_attention"] * 2
    assert written["rope_parameters"] == {"rope_type": "default", "rope_theta": 1_000_000.0}
    assert written["model_type"] == "specauf_dflash"
    assert written["dflash_config"] == {"mask_token_id": MASK, "target_layer_ids": [0, 2]}
    assert {key: written[key] for key in written["dflash_config"]} == written["dflash_config"]
    assert written["auto_map"]["AutoConfig"] == "configuration_dflash.DFlashConfig"
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is DFlashConfig
    assert {key: getattr(again, key) for key in own_keys()} == {key: written[key] for key in own_keys()}


@pytest.mark.parametrize("key", REQUIRED_KEYS)
def test_a_config_json_without_a_key_that_decides_acceptance_is_refused_by_name(tmp_path, key):
    DFlashConfig(**SMALL).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    edited = json.loads(path.read_text())
    del edited[key]
    path.write_text(json.dumps(edited))
    with pytest.raises(ValueError, match=rf"lacks \['{key}'\].*never guessed"):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("edit", "advice"),
    [(dict(block_sizee=3), "Unknown key"), (dict(dflash_config={"mask_token_id": 3}), "Correct config.json")],
    ids=str,
)
def test_an_edited_config_json_is_refused(tmp_path, edit, advice):
    DFlashConfig(**SMALL).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    with pytest.raises(ValueError, match=advice):
        AutoConfig.from_pretrained(tmp_path)


# ---- the weights


def z_lab_layout(layers: int, taps: int) -> dict[str, tuple]:
    """Names and shapes vLLM, SGLang and llama.cpp read (checkpoints of z-lab/dflash); 4 heads, 2 of them kv, of 8."""
    shapes = {"fc.weight": (H, taps * H), "hidden_norm.weight": (H,), "norm.weight": (H,)}
    of_a_layer = {
        "input_layernorm": (H,), "post_attention_layernorm": (H,),
        "self_attn.q_proj": (32, H), "self_attn.k_proj": (16, H), "self_attn.v_proj": (16, H),
        "self_attn.o_proj": (H, 32), "self_attn.q_norm": (8,), "self_attn.k_norm": (8,),
        "mlp.gate_proj": (64, H), "mlp.up_proj": (64, H), "mlp.down_proj": (H, 64),
    }  # fmt: skip
    return shapes | {f"layers.{i}.{n}.weight": s for i in range(layers) for n, s in of_a_layer.items()}


@pytest.mark.parametrize(("layers", "taps"), [(1, (1,)), (3, (0, 1, 2))])
def test_saved_tensors_are_exactly_the_z_lab_layout(tmp_path, layers, taps):
    make_drafter(make_target(), layers=layers, taps=taps).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert {name: tuple(t.shape) for name, t in saved.items()} == z_lab_layout(layers, len(taps))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_drafter_comes_back_from_disk_bit_for_bit(tmp_path, dtype):
    drafter = make_drafter(make_target(), layers=2, dtype=dtype)
    drafter.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is DFlashDraftModel and again.dtype == dtype and not again.training
    before, after = drafter.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert all(getattr(again.config, key) == getattr(drafter.config, key) for key in own_keys())
    # no part of the checkpoint, so it is made anew: exact, whatever the dtype of the weights
    assert torch.equal(again.rotary_emb.inv_freq, DFlashDraftModel(drafter.config).rotary_emb.inv_freq)


# ---- one forward for training and decoding


@pytest.fixture(scope="module")
def row():
    """A float64 pair, one row, and every block at five anchors: the first possible, neighbours, and far apart."""
    target = make_target()
    ids = random_prompts(1, 24)
    anchors = torch.tensor([[1, 2, 5, 13, 20]])
    documents, flags = torch.zeros_like(ids), torch.ones_like(ids, dtype=torch.bool)
    drafter = make_drafter(target, **BLOCK)
    frozen = FrozenTarget(target, drafter.config)
    blocks = make_blocks(ids, flags, documents, anchors, torch.ones_like(anchors).bool(), K, MASK)
    return SimpleNamespace(
        target=target, anchors=anchors[0].tolist(), blocks=blocks, noise=frozen.noise_embeds(blocks.noise_ids),
        context=frozen.context(ids), drafter=drafter,
    )  # fmt: skip


def all_blocks(row, drafter) -> torch.Tensor:  # (N, K, H)
    """The training-mode forward: every block of the row at once, under the block mask."""
    output = drafter(row.noise, row.context, row.blocks.attention_mask, row.blocks.position_ids)
    return output.last_hidden_state.view(len(row.anchors), K, -1)


def block_after_block(row, drafter, cache, padding_mask: bool = False) -> torch.Tensor:  # (N, K, H)
    """The decoding loop: each pass is fed the context since the last one, and the block's own entries are cropped."""
    outputs, seen = [], 0
    noise = row.noise.view(len(row.anchors), 1, K, -1)
    for anchor, block in zip(row.anchors, noise):
        if isinstance(cache, DFlashCache):  # the way transformers' generator keeps it: crops before, not after
            cache.set_previous_accepted_tokens(anchor - seen)
            if seen:
                cache.crop(-K)
        output = drafter(
            noise_embeds=block,
            context_hidden_states=row.context[:, seen:anchor],
            position_ids=torch.arange(seen, anchor + K)[None],
            attention_mask=torch.ones(1, anchor + K, dtype=torch.long) if padding_mask else None,
            past_key_values=cache,
        )
        if not isinstance(cache, DFlashCache):
            cache.crop(-K)
        outputs.append(output.last_hidden_state)
        seen = anchor
    return torch.cat(outputs)


@pytest.mark.parametrize("padding_mask", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("cache_class", [DynamicCache, DFlashCache])
def test_a_block_in_training_equals_the_block_in_decoding(row, cache_class, attention, padding_mask):
    drafter = make_drafter(row.target, **BLOCK)
    drafter.set_attn_implementation(attention)
    cache = cache_class(config=drafter.config)
    cache.activate_past_recording()
    with torch.no_grad():
        trained = all_blocks(row, drafter.train())
        decoded = block_after_block(row, drafter.eval(), cache, padding_mask)
    # transformers' eager attention takes its softmax in fp32
    torch.testing.assert_close(decoded, trained, rtol=0, atol=1e-12 if attention == "sdpa" else 2e-6)
    others = [trained[i] for i in range(1, len(trained))]
    assert all((trained[0] - other).abs().max() > 1e-2 for other in others)  # the claim is not about one output


def test_default_positions_count_on_from_the_cache(row):
    cache = DynamicCache(config=row.drafter.config)
    first, second = row.noise[:, :K], row.noise[:, K : 2 * K]
    with torch.no_grad():
        row.drafter(first, row.context[:, :9], past_key_values=cache)
        cache.crop(-K)
        given = torch.arange(9, 15 + K)[None]
        at_once = row.drafter(second, row.context[:, :15])
        default = row.drafter(second, row.context[:, 9:15], past_key_values=cache)
        cache.crop(-K - 6)
        explicit = row.drafter(second, row.context[:, 9:15], position_ids=given, past_key_values=cache)
    assert torch.equal(default.last_hidden_state, explicit.last_hidden_state)
    torch.testing.assert_close(default.last_hidden_state, at_once.last_hidden_state, rtol=0, atol=1e-12)


@pytest.mark.parametrize("padded", [0, 3])
def test_the_native_assistant_of_transformers_gives_the_same_output_with_our_weights(row, padded):
    drafter = make_drafter(row.target, layers=3, taps=TAPS, block_size=K)
    own = drafter.config
    same = {key: getattr(own, key) for key in set(vars(MuseGlimmerAssistantConfig())) & own_keys()}
    native = MuseGlimmerAssistantModel(MuseGlimmerAssistantConfig(**same)).eval()
    renamed = {"fc.weight": "encoder.fc.weight", "hidden_norm.weight": "encoder.output_norm_enc.weight"}
    native.load_state_dict({renamed.get(name, name): t for name, t in drafter.state_dict().items()})
    mask = torch.ones(1, 24 + K, dtype=torch.long)
    mask[:, :padded] = 0
    noise, context = row.noise[:, :K].float(), row.context.float()
    with torch.no_grad():
        ours, theirs = (model(noise, context, attention_mask=mask).last_hidden_state for model in (drafter, native))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
    assert ours.std() > 0.1


@pytest.mark.parametrize("make", [make_drafter, make_domino], ids=["dflash", "domino"])
def test_a_cache_goes_by_either_name_and_never_by_both(row, make):
    drafter = make(row.target, block_size=K, taps=TAPS, dtype=torch.float64)
    noise, context = row.noise[:, :K], row.context[:, :9]
    one, other, fifth = (DynamicCache(config=drafter.config) for _ in range(3))
    with torch.no_grad():
        found = [
            drafter(noise, context, cache=one).last_hidden_state,
            drafter(noise, context, past_key_values=other).last_hidden_state,
            drafter(noise, context, None, None, fifth).last_hidden_state,
        ]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert [cache.get_seq_length() for cache in (one, other, fifth)] == [9 + K] * 3
    with pytest.raises(TypeError, match="two names for one argument"):
        drafter(noise, context, cache=one, past_key_values=other)
    # a drafter that accelerate spread over devices must leave its cache where it is
    assert {"cache", "past_key_values"} <= set(drafter._skip_keys_device_placement)


def test_gradient_checkpointing_recomputes_each_layer_and_changes_no_gradient(row):
    gradients, calls = [], []
    for checkpointing in (False, True):
        drafter = make_drafter(row.target, **BLOCK).train()
        if checkpointing:
            drafter.activation_checkpointing_enable()
        drafter.layers[0].mlp.register_forward_pre_hook(lambda *_, on=checkpointing: calls.append(on))
        weights = torch.linspace(-1, 1, K * H, dtype=torch.float64).view(K, H)
        (all_blocks(row, drafter) * weights).sum().backward()
        gradients.append({name: p.grad for name, p in drafter.named_parameters()})
    assert (calls.count(False), calls.count(True)) == (1, 2)
    assert all(g.abs().max() > 0 for g in gradients[0].values())
    for name in gradients[0]:
        torch.testing.assert_close(gradients[1][name], gradients[0][name], rtol=1e-12, atol=1e-12, msg=name)


def test_a_bf16_drafter_casts_fp32_inputs_in_and_its_output_back(row):
    drafter = make_drafter(row.target, **BLOCK | {"dtype": torch.bfloat16})
    noise, context = row.noise[:, :K].float(), row.context[:, :9].float()
    with torch.no_grad():
        mixed = drafter(noise, context).last_hidden_state
        by_hand = drafter(noise.bfloat16(), context.bfloat16()).last_hidden_state
    assert (mixed.dtype, by_hand.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(mixed, by_hand.float())


def test_norms_under_bf16_autocast_are_taken_in_fp32_without_a_warning(row):
    drafter = make_drafter(row.target, **BLOCK | {"dtype": torch.float32})
    norm = drafter.layers[0].self_attn.q_norm
    torch.nn.init.normal_(norm.weight, 1.0, 0.1)
    rows = torch.randn(64, norm.weight.numel()).bfloat16()
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # torch would warn once a process, perhaps in another test
    try:
        with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            warnings.simplefilter("error")
            found = norm(rows)
            drafter(row.noise[:, :K].float(), row.context[:, :9].float())
    finally:
        torch.set_warn_always(always)
    assert found.dtype == torch.float32 and torch.equal(found, norm(rows.float()))


def test_an_fp16_forward_is_refused(row):
    drafter = make_drafter(row.target, **BLOCK | {"dtype": torch.float16})
    with pytest.raises(ValueError, match="use bfloat16 or float32"):
        drafter(row.noise[:, :K].half(), row.context[:, :9].half())


def test_noise_embeddings_leave_the_targets_own_embedding_norm_out_and_put_it_back():
    embedding = torch.nn.Embedding(8, 4)
    ids = torch.tensor([[1, 7]])
    plain = embed_noise(embedding, ids)
    assert torch.equal(plain, embedding(ids))

    class Normed(torch.nn.Embedding):  # as Muse Glimmer's targets have it
        def forward(self, input_ids):
            return self.embed_norm(super().forward(input_ids))

    normed = Normed(8, 4, _weight=embedding.weight.detach())
    norm = normed.embed_norm = torch.nn.LayerNorm(4)
    assert torch.equal(embed_noise(normed, ids), plain)
    assert normed.embed_norm is norm and not torch.allclose(normed(ids), plain)


# ---- the saved folder, where this package is absent

CLEAN = """
import importlib.util, json, sys
sys.modules["hf_specauf"] = None  # blocks every way to it: the editable install, its .pth file, a working directory
assert importlib.util.find_spec("hf_specauf") is None
import torch
from transformers import AutoModel, AutoModelForCausalLM
target = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
refusals = []
for trust in (None, False):
    try:
        refusals.append(type(AutoModel.from_pretrained(sys.argv[2], trust_remote_code=trust)).__name__)
    except ValueError as error:
        refusals.append("trust_remote_code" in str(error))
drafter = AutoModel.from_pretrained(sys.argv[2], trust_remote_code=True, dtype="auto")
prompt = torch.tensor(json.loads(sys.argv[3]))
ones = torch.ones_like(prompt)
passes = []
handle = target.register_forward_hook(lambda *_: passes.append(1))
both = [
    target.generate(prompt, attention_mask=ones, max_new_tokens=30, do_sample=False, **more)[0].tolist()
    for more in (dict(assistant_model=drafter, speculation_type="dflash"), {})
]
print("\\n" + json.dumps(dict(
    refusals=refusals, module=type(drafter).__module__, dtype=str(drafter.dtype), assisted=both[0], plain=both[1],
    passes=len(passes), ours=[name for name, m in sys.modules.items() if name.startswith("hf_specauf") and m],
)))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A pair saved to disk: float64, a drafter that helps, and the prompt it helps with."""
    folder = tmp_path_factory.mktemp("saved")
    target = make_target()
    prompt = random_prompts(2)
    texts = target.generate(prompt, max_new_tokens=30, do_sample=False)
    drafter = overfit(make_drafter(target, dtype=torch.float64), target, texts, prompt.shape[1], steps=60)
    target.save_pretrained(folder / "target")
    drafter.save_pretrained(folder / "drafter")
    return SimpleNamespace(folder=folder, target=target, drafter=drafter, prompt=prompt[:1])


def test_a_process_without_the_package_generates_the_same_with_the_saved_files(saved, tmp_path):
    (tmp_path / "clean.py").write_text(CLEAN)
    arguments = [str(saved.folder / "target"), str(saved.folder / "drafter"), json.dumps(saved.prompt.tolist())]
    done = subprocess.run(
        [warm_python().executable, "-I", "clean.py", *arguments], cwd=tmp_path, timeout=400, capture_output=True,
        text=True, stdin=subprocess.DEVNULL, env=os.environ | {"HF_HOME": str(tmp_path / "hf")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    with attach(saved.target, saved.drafter) as attachment:
        here = saved.target.generate(saved.prompt, max_new_tokens=30, do_sample=False, assistant_model=saved.drafter)
    assert result["assisted"] == result["plain"] == here[0].tolist()
    # 30 plain passes, and as many assisted ones as here: the files draft what the package drafts
    assert result["passes"] - 30 == len(attachment.rounds) + 1
    assert attachment.acceptance().tau > 1.5
    assert result["refusals"] == [True, True]  # never a wrong class
    assert result["module"].startswith("transformers_modules.") and result["ours"] == []
    assert result["dtype"] == "torch.float64"


def test_saved_python_files_import_only_torch_transformers_and_each_other(saved):
    files = {path.stem: path for path in (saved.folder / "drafter").glob("*.py")}
    assert set(files) == {
        "configuration_dflash", "draft_length", "drafts", "lookup", "modeling_dflash", "target_parts",
        "transformers_internals", "verification",
    }  # fmt: skip
    allowed = {"torch", "transformers"} | set(sys.stdlib_module_names)
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, name
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.split(".")[0] in allowed, name
            elif isinstance(node, ast.ImportFrom):  # `from . import x` and deeper paths are not copied to the Hub
                assert node.level == 1 and node.module in files, name
