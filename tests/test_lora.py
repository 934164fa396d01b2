"""LoRA drafters: adapters on a drafter, and on layers borrowed from the target, from training to `generate`."""

import json
import shutil

import pytest
import torch
from conftest import (
    BASE,
    MASK,
    SHAPE,
    attach,
    load_rows_file,
    make_domino,
    make_drafter,
    make_target,
    overfit,
    random_prompts,
    same,
)
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_convert import z_lab
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from hf_specauf import AUFConfig, AUFTrainer, DFlashDraftModel, add_adapter, from_target, load_drafter
from hf_specauf.identity import target_fingerprint
from hf_specauf.layouts.adapters import AdapterBase, borrow, finish_adapter
from hf_specauf.publishing.card_training import changed_recipe
from hf_specauf.recipe import DrafterArguments, drafter_arguments
from hf_specauf.target import drafter_config
from hf_specauf.train import main

pytestmark = pytest.mark.internals

LORA = dict(use_peft="true", lora_r=4, learning_rate=0.05)


@pytest.fixture(scope="module")
def base(tmp_path_factory, files):
    """A drafter's folder as `train` leaves it."""
    out = tmp_path_factory.mktemp("base")
    keys = dict(target=files / "target", dataset_name=files / "text.jsonl", output_dir=out) | BASE
    main([word for key, value in keys.items() for word in (f"--{key}", *str(value).split())])
    return out


def adapter_on(drafter, folder, seed=0, **keys):
    """An adapter with weights that change the drafts, saved as training saves it."""
    base = AdapterBase.of_drafter(drafter)
    torch.manual_seed(seed)
    model = get_peft_model(drafter, LoraConfig(**dict(target_modules="all-linear", r=4) | keys))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
        if "modules_to_save" in name:
            parameter.data.mul_(1.5)
    model.save_pretrained(folder)
    finish_adapter(folder, base, drafter.config)
    return model.unload()


# ---- adapt


@pytest.mark.own_parameters
@pytest.mark.parametrize(
    "keys", [{}, dict(use_dora="true"), dict(use_rslora="true"), dict(lora_modules_to_save="fc norm")],
    ids=["lora", "dora", "rslora", "fc and norms in full"],
)  # fmt: skip
def test_adapt_trains_an_adapter_and_leaves_the_merged_drafter_beside_it(command, base, tmp_path, capsys, keys):
    main(command(drafter=base, save_steps=2, **LORA, **keys))
    printed = capsys.readouterr().out
    assert f"target_layer_ids: [0, 2] ({base})" not in printed  # the recipe named them, as the base does
    assert f"tau of {base} as it is: " in printed
    out = tmp_path / "out"
    plain, before = AutoModel.from_pretrained(out).state_dict(), AutoModel.from_pretrained(base).state_dict()
    assert plain.keys() == before.keys()
    moved = [name for name in plain if not torch.equal(plain[name], before[name])]
    norms = [name for name in plain if "norm" in name]
    assert {"fc.weight", "layers.0.self_attn.q_proj.weight", "layers.0.mlp.down_proj.weight"} <= set(moved)
    assert bool(set(moved) & set(norms)) == ("lora_modules_to_save" in keys)

    config = json.loads((out / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base) and config["task_type"] is None
    assert not (out / "adapter/README.md").exists()
    for folder in (out / "adapter", out / "checkpoint-3"):
        tensors = load_file(folder / "adapter_model.safetensors")
        assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
        found = load_drafter(folder, dtype=torch.float32)
        assert type(found) is DFlashDraftModel
        for name, tensor in found.state_dict().items():
            torch.testing.assert_close(tensor, plain[name])
    record = json.loads((out / "provenance.json").read_text())
    assert record["base"]["name_or_path"] == str(base) and record["tau_before"] >= 1
    assert record["trainable_parameters"] == sum(t.numel() for t in tensors.values())


def test_a_z_lab_drafter_is_adapted_and_its_adapter_attaches_to_nothing_by_itself(command, base, tmp_path):
    folder, drafter = z_lab_folder(base, tmp_path), load_drafter(base)
    main(command(drafter=folder, **LORA))
    out = tmp_path / "out"
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "specauf_dflash" and config["target_model_name_or_path"].endswith("target")
    assert config["tokenizer_hash"] and config["mask_token_id"] == drafter.config.mask_token_id
    assert json.loads((out / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] is None
    with pytest.raises(OSError):
        AutoModel.from_pretrained(out / "adapter")  # AutoModel would take the base for a plain Qwen3
    found, merged = load_drafter(out / "adapter").state_dict(), load_drafter(out).state_dict()
    assert all(torch.equal(found[name], merged[name]) for name in merged)


@pytest.fixture
def fine_tune(files, tmp_path):
    """The target's folder after a fine-tune: other weights, and another chat template."""
    target, tokenizer = (kind.from_pretrained(files / "target") for kind in (AutoModelForCausalLM, AutoTokenizer))
    for parameter in target.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    tokenizer.chat_template = "{# of the fine-tune #}" + tokenizer.chat_template
    for part in (target, tokenizer):
        part.save_pretrained(tmp_path / "fine-tune")
    return tmp_path / "fine-tune"


def test_an_adapter_knows_the_target_it_was_adapted_to_and_not_its_bases(
    command, base, files, fine_tune, tmp_path, recwarn
):
    keys = dict(target=fine_tune, chat_template_kwargs='{"shout":true}', data="chat")
    main(command(drafter=base, save_steps=3, **LORA, **keys))
    targets = {folder: AutoModelForCausalLM.from_pretrained(folder) for folder in (files / "target", fine_tune)}
    whole = load_drafter(tmp_path / "out").config
    assert whole.target_fingerprint == target_fingerprint(targets[fine_tune])
    assert whole.chat_template_hash != load_drafter(base).config.chat_template_hash
    out = tmp_path / "out"
    on_its_base = add_adapter(load_drafter(base), out / "adapter")
    for found in (load_drafter(out / "adapter"), load_drafter(out / "checkpoint-3"), on_its_base):
        config = found.config
        assert config.target_model_name_or_path == str(fine_tune) and config.chat_template_kwargs == {"shout": True}
        for key in ("target_fingerprint", "tokenizer_hash", "chat_template_hash", "eos_token_id", "pad_token_id"):
            assert getattr(config, key) == getattr(whole, key), key
        recwarn.clear()
        attach(targets[fine_tune], found).detach()
        assert not [w for w in recwarn if "may accept little" in str(w.message)]
        with pytest.warns(UserWarning, match=f"it was trained for {fine_tune}, and the target .* has other weights"):
            attach(targets[files / "target"], found).detach()


def test_trainer_by_itself_records_a_z_lab_base_as_one_that_automodel_cannot_load(
    base, text_target, tokenizer, files, tmp_path
):
    folder = z_lab_folder(base, tmp_path)
    rows = files / "text.jsonl"
    drafter = load_drafter(folder, dtype="float32")
    args = AUFConfig(
        output_dir=str(tmp_path / "out"), max_steps=1, use_cpu=True, anchors_per_row=4, max_length=96,
        per_device_train_batch_size=2, disable_tqdm=True, report_to="none",
    )  # fmt: skip
    target = AutoModelForCausalLM.from_pretrained(files / "target")
    trainer = AUFTrainer(
        model=drafter, target_model=target, args=args, train_dataset=load_rows_file(rows),
        processing_class=tokenizer, peft_config=LoraConfig(r=2, target_modules="all-linear"),
    )  # fmt: skip
    assert (trainer.adapter_base.name_or_path, trainer.adapter_base.loadable) == (str(folder), False)
    trainer.train()
    trainer.save_model()
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None
    assert type(load_drafter(tmp_path / "out")) is DFlashDraftModel


def z_lab_folder(base, tmp_path):
    """The base drafter in z-lab's layout."""
    folder, drafter = tmp_path / "z-lab", load_drafter(base)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(z_lab(drafter)))
    save_file(drafter.state_dict(), folder / "model.safetensors")
    return folder


def test_dtypes_may_be_names(base, files, tmp_path):
    adapter_on(load_drafter(base), tmp_path / "a")
    for folder in (base, tmp_path / "a", z_lab_folder(base, tmp_path)):
        for name in ("float32", "bfloat16"):
            assert load_drafter(folder, dtype=name).dtype == getattr(torch, name)


def test_a_base_by_a_relative_path_is_found_from_anywhere(base, tmp_path, monkeypatch):
    monkeypatch.chdir(base.parents[1])
    name = f"{base.parent.name}/{base.name}"
    for drafter in (load_drafter(name), AutoModel.from_pretrained(name)):
        adapter_on(drafter, tmp_path / "a")
        assert AdapterBase.read(tmp_path / "a").name_or_path == str(base)
    monkeypatch.chdir("/")
    assert load_drafter(tmp_path / "a")


def check_rope(drafter):
    """The frequencies that it was trained with: in bf16 they are off by up to 0.4 %."""
    trained = DFlashDraftModel(drafter.config).rotary_emb.inv_freq
    assert drafter.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(drafter.rotary_emb.inv_freq, trained)


def test_rope_frequencies_stay_in_fp32_where_an_adapter_is_merged_or_layers_are_borrowed(base, tmp_path):
    load_drafter(base, dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    adapter_on(load_drafter(z_lab_folder(tmp_path / "bf16", tmp_path)), tmp_path / "a")
    for dtype in ("auto", torch.bfloat16, torch.float32):
        check_rope(load_drafter(tmp_path / "a", dtype=dtype))
    target = make_target(dtype=torch.bfloat16)
    layers = AdapterBase.of_layers(target, [1, 3])
    drafter = borrow(target, config_for(target), [1, 3], frozen=True)
    get_peft_model(drafter, LoraConfig(target_modules="all-linear", modules_to_save=["fc"])).save_pretrained(
        tmp_path / "b"
    )
    finish_adapter(tmp_path / "b", layers, drafter.config)
    for dtype in ("auto", torch.float32):
        check_rope(from_target(target, tmp_path / "b", dtype=dtype))


def test_unmerged_and_merged_give_the_same_drafts(base, tmp_path):
    drafter = adapter_on(load_drafter(base), tmp_path / "a")
    peft = add_adapter(drafter, tmp_path / "a")
    merged = load_drafter(tmp_path / "a")
    noise, context = torch.randn(1, 4, 32), torch.randn(1, 9, 64)
    with torch.no_grad():
        unmerged = peft(noise, context).last_hidden_state
        torch.testing.assert_close(unmerged, merged(noise, context).last_hidden_state, rtol=1e-4, atol=1e-5)
        with peft.disable_adapter():
            assert not torch.allclose(unmerged, peft(noise, context).last_hidden_state, atol=1e-3)


def test_adapter_resumes_and_refuses_another_base(command, base, tmp_path):
    main(command(drafter=base, save_steps=1, **LORA))
    whole = load_drafter(tmp_path / "out").state_dict()
    for gone in (2, 3):
        shutil.rmtree(tmp_path / f"out/checkpoint-{gone}")
    main(command(drafter=base, save_steps=1, resume_from_checkpoint="true", **LORA))
    again = load_drafter(tmp_path / "out").state_dict()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    with pytest.raises(SystemExit, match="checkpoint-1 adapts .*, and this run starts from other weights"):
        other = tmp_path / "other"
        drafter = load_drafter(base)
        drafter.fc.weight.data += 0.1
        drafter.save_pretrained(other)
        shutil.rmtree(tmp_path / "out/checkpoint-2"), shutil.rmtree(tmp_path / "out/checkpoint-3")
        main(command(drafter=other, save_steps=1, resume_from_checkpoint="true", **LORA))


@pytest.mark.parametrize("make", [make_drafter, make_domino])
def test_adapters_switch_between_generate_calls_and_do_not_leak(tmp_path, make):
    target = make_target()
    texts = target.generate(random_prompts(4, 8), max_new_tokens=24, do_sample=False, suppress_tokens=[MASK])
    drafter = overfit(make(target, dtype=torch.float64), target, texts, 8, steps=60)
    drafter.save_pretrained(tmp_path / "base")
    drafter = load_drafter(tmp_path / "base")
    for name, seed in (("a", 1), ("b", 2)):
        drafter = adapter_on(drafter, tmp_path / name, seed=seed)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    alone = {name: add_adapter(load_drafter(tmp_path / "base"), tmp_path / name) for name in "ab"}
    both = add_adapter(add_adapter(drafter, tmp_path / "a", "a"), tmp_path / "b", "b")
    prompt = texts[:1, :8]
    plain = target.generate(prompt, max_new_tokens=24, do_sample=False)

    def rounds(model) -> list:
        with attach(target, model) as attachment:
            output = target.generate(prompt, max_new_tokens=24, do_sample=False, assistant_model=model)
        assert torch.equal(output, plain)  # lossless, whatever the adapter
        return attachment.rounds

    expected = {"a": rounds(alone["a"]), "b": rounds(alone["b"]), "off": rounds(load_drafter(tmp_path / "base"))}
    assert len({str(found) for found in expected.values()}) == 3
    for name in ("a", "b", "a", "off", "b"):
        if name == "off":
            with both.disable_adapter():
                assert rounds(both) == expected["off"]
        else:
            both.set_adapter(name)
            assert rounds(both) == expected[name]
    assert all(torch.equal(before[name], tensor) for name, tensor in target.state_dict().items())


def test_adapter_of_another_base_is_refused(base, tmp_path):
    drafter = adapter_on(load_drafter(base), tmp_path / "a")
    drafter.norm.weight.data[0] += 1
    with pytest.raises(ValueError, match=f"was trained on {base}, and this drafter has other weights"):
        add_adapter(drafter, tmp_path / "a")
    with_one = add_adapter(load_drafter(base), tmp_path / "a", "one")
    assert isinstance(add_adapter(with_one, tmp_path / "a", "two"), PeftModel)
    with_one.get_base_model().norm.weight.data[0] += 1
    with pytest.raises(ValueError, match="has other weights"):
        add_adapter(with_one, tmp_path / "a", "three")
    (tmp_path / "a/base.json").unlink()
    with pytest.raises(ValueError, match="adapter without base.json"):
        load_drafter(tmp_path / "a")


def refused_beside(first, second, said, name="two") -> None:
    """Adding the second adapter beside the first is refused, and changes nothing."""
    model = add_adapter(load_drafter(AdapterBase.read(first).name_or_path), first, "one")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    config = model.get_base_model().config.to_dict()
    with pytest.raises(ValueError, match=said):
        add_adapter(model, second, name)
    assert same(model.state_dict(), before) and [*model.peft_config] == [model.active_adapter] == ["one"]
    assert model.get_base_model().config.to_dict() == config


def test_an_adapter_under_a_name_that_is_taken_is_refused(base, tmp_path):
    for seed, name in enumerate("ab"):
        adapter_on(load_drafter(base), tmp_path / name, seed)
    refused_beside(tmp_path / "a", tmp_path / "b", "adapter_name is 'one'.*give another name", "one")


@pytest.mark.parametrize("kind, full, beside", [("dflash", ["fc", "norm"], ["norm"]),
                                                ("domino", ["prefix_gru", "embed_proj"], ["prefix_gru"])])  # fmt: skip
def test_adapters_that_train_a_module_in_full_and_by_lora_are_refused_and_others_act_alone(
    tmp_path, kind, full, beside
):
    make = make_domino if kind == "domino" else make_drafter
    make(make_target(dtype=torch.float32)).save_pretrained(tmp_path / "base")
    makes = {"lora": {}, "full": dict(target_modules=["q_proj"], modules_to_save=full),
             "beside": dict(target_modules=["k_proj"], modules_to_save=beside)}  # fmt: skip
    for seed, (name, keys) in enumerate(makes.items()):
        adapter_on(load_drafter(tmp_path / "base"), tmp_path / name, seed, **keys)
    what = "embed_proj.0, embed_proj.2 in full" if kind == "domino" else "fc in full"
    for first, second in (("full", "lora"), ("lora", "full")):
        refused_beside(tmp_path / first, tmp_path / second, f"one adapts {what} and the other by LoRA")

    def output(model) -> torch.Tensor:
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            noise, context = torch.randn(1, 4, 32, generator=generator), torch.randn(1, 9, 64, generator=generator)
            if kind == "dflash":
                return model(noise, context).last_hidden_state
            told = torch.randn(1, 1, 4, 32, generator=generator)
            return model(
                noise, context, prev_embeds=told, reduce=lambda h, rows, project: h.sum() + project(rows)
            ).reduced

    alone = {name: output(load_drafter(tmp_path / name)) for name in ("lora", "beside")}
    model = load_drafter(tmp_path / "base")
    off = output(model)
    for name in alone:
        model = add_adapter(model, tmp_path / name, name)
    for name in ("lora", "beside", "lora", "off", "beside"):
        if name == "off":
            with model.disable_adapter():
                torch.testing.assert_close(output(model), off)
        else:
            model.set_adapter(name)
            torch.testing.assert_close(output(model), alone[name], rtol=1e-4, atol=1e-5)
            assert not torch.allclose(output(model), off, atol=1e-3)


def test_adapters_for_two_targets_are_refused_on_one_drafter(base, tmp_path):
    for seed, name in enumerate("abcd"):
        adapter_on(load_drafter(base), tmp_path / name, seed)
    for name, changes in dict(b=dict(name_or_path="its/copy"), c=dict(fingerprint="0" * 16)).items():
        record = json.loads((tmp_path / name / "base.json").read_text())
        record["trained_for"]["target"] |= changes
        (tmp_path / name / "base.json").write_text(json.dumps(record))
    record = json.loads((tmp_path / "a" / "base.json").read_text())
    record["trained_for"]["target"]["fingerprint"] = None  # of a quantised target: the name decides
    (tmp_path / "d/base.json").write_text(json.dumps(record))
    assert add_adapter(add_adapter(load_drafter(base), tmp_path / "a", "a"), tmp_path / "d", "d")
    both = add_adapter(add_adapter(load_drafter(base), tmp_path / "a", "a"), tmp_path / "b", "b")
    assert both.get_base_model().config.target_model_name_or_path == "its/copy"  # the same weights by another name
    refused_beside(tmp_path / "a", tmp_path / "c", "another target or another prompt.*fingerprint '0000.*Merge one")


# ---- borrow


def test_borrowed_layers_are_the_targets_and_only_the_rest_is_trained(command, files, tmp_path, capsys):
    keys = {key: value for key, value in BASE.items() if key != "num_draft_layers"}
    main(command(base=keys, init_from_target_layers="1 3", save_steps=3, **LORA))
    out, target = tmp_path / "out", AutoModelForCausalLM.from_pretrained(files / "target")
    tensors = load_file(out / "adapter/adapter_model.safetensors")
    assert all("lora_" in name or "norm" in name or name.endswith("fc.weight") for name in tensors)
    assert any("lora_" in name for name in tensors) and any(name.endswith("fc.weight") for name in tensors)
    merged = load_drafter(out)
    assert merged.config.num_hidden_layers == 2 and merged.config.borrowed_layers is None
    for folder in (out / "checkpoint-3", out / "adapter"):
        for rebuilt in (from_target(target, folder), load_drafter(folder, target=target)):
            for name, tensor in rebuilt.state_dict().items():
                torch.testing.assert_close(tensor, merged.state_dict()[name])
            assert rebuilt.config.target_fingerprint == merged.config.target_fingerprint
            assert AdapterBase.of_drafter(rebuilt).name_or_path == str(folder)
    assert from_target(target, out / "adapter", dtype="bfloat16").dtype == torch.bfloat16
    # nothing may attach itself to the target, or load without it
    assert json.loads((out / "checkpoint-3/adapter_config.json").read_text())["base_model_name_or_path"] is None
    with pytest.raises(ValueError, match=r"borrows layers \[1, 3\].*hf_specauf.from_target"):
        AutoModel.from_pretrained(out / "checkpoint-3")
    with pytest.raises(ValueError, match=r"load the target and call hf_specauf.from_target"):
        load_drafter(out / "checkpoint-3")
    with pytest.raises(ValueError, match="use from_target"):
        add_adapter(merged, out / "adapter")
    target.model.norm.weight.data[0] += 1
    with pytest.raises(ValueError, match=r"layers \[1, 3\] are those .* borrows, but other weights of it differ from"):
        from_target(target, out / "checkpoint-3")
    target.get_submodule("model.layers.3.mlp.up_proj").weight.data[0, 0] += 1
    with pytest.raises(ValueError, match=r"borrows layers \[1, 3\] of .*, and this target's layers are other weights"):
        from_target(target, out / "checkpoint-3")


def test_a_domino_drafter_on_borrowed_layers_is_rebuilt_with_the_head_it_was_trained_with(command, files, tmp_path):
    keys = {key: value for key, value in BASE.items() if key != "num_draft_layers"}
    keys |= dict(drafter_type="domino", objective="b_auf", gru_hidden_dim=12, emb_dim=8)
    main(command(base=keys, init_from_target_layers="2", **LORA))
    merged = load_drafter(tmp_path / "out").state_dict()
    target = AutoModelForCausalLM.from_pretrained(files / "target")
    rebuilt = from_target(target, tmp_path / "out/adapter").state_dict()
    assert {"prefix_gru.weight_hh_l0", "embed_proj.2.weight"} <= set(rebuilt)
    for name, tensor in rebuilt.items():
        torch.testing.assert_close(tensor, merged[name])
    with pytest.raises(ValueError, match="lora_modules_to_save lacks prefix_gru, embed_proj"):
        DrafterArguments(
            drafter_type="domino", use_peft=True, init_from_target_layers=[1], lora_modules_to_save=["fc"]
        )
    with pytest.raises(ValueError, match="lora_modules_to_save lacks fc"):
        DrafterArguments(use_peft=True, init_from_target_layers=[1], lora_modules_to_save=["norm"])


def test_a_rebuilt_drafter_never_has_weights_that_were_not_saved(tmp_path):
    target = make_target(dtype=torch.float16)
    base = AdapterBase.of_layers(target, [1, 3])
    for saved in (["fc"], None):
        drafter = borrow(target, config_for(target), [1, 3], frozen=True)
        lora = LoraConfig(target_modules="all-linear", modules_to_save=saved)
        get_peft_model(drafter, lora).save_pretrained(tmp_path)
        finish_adapter(tmp_path, base, drafter.config)
        if saved:  # not in the target's fp16, in which drafters accept nothing
            assert from_target(target, tmp_path).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"neither borrowed nor in the adapter.*fc.weight.*modules_to_save"):
        from_target(target, tmp_path)


def test_layers_of_a_quantised_target_are_not_borrowed():
    target = make_target(dtype=torch.float32)
    target.model.layers[3].mlp.up_proj.weight = torch.nn.Parameter(
        torch.ones(64, 32, dtype=torch.int8), requires_grad=False
    )
    assert borrow(target, config_for(target), [0, 1], frozen=True) is not None
    for frozen in (True, False):
        with pytest.raises(ValueError, match=r"layers of this target are quantised .*mlp.up_proj.weight is .*int8"):
            borrow(target, config_for(target), [1, 3], frozen=frozen)
    target.is_quantized = True  # fp8 codes are floating point numbers too
    with pytest.raises(ValueError, match="quantised"):
        AdapterBase.of_layers(target, [0, 1])


def test_borrowed_layers_start_as_the_targets(capsys):
    target = make_target(dtype=torch.float32)
    drafter = borrow(target, config_for(target), [1, 3], frozen=True)
    for slot, index in enumerate([1, 3]):
        ours, theirs = drafter.layers[slot].state_dict(), target.model.layers[index].state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert capsys.readouterr().out == ""


def config_for(target):
    return drafter_config(target, num_hidden_layers=2, block_size=4, mask_token_id=MASK, target_layer_ids=[0, 2])


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "mixtral"])
def test_other_shapes_are_an_initialisation_that_names_what_is_new(architecture, capsys):
    target = make_target(architecture, dtype=torch.float32)
    with pytest.raises(ValueError, match="does not fit a drafter's layer .*Leave out use_peft"):
        borrow(target, config_for(target), [0, 1], frozen=True)
    drafter = borrow(target, config_for(target), [0, 1], frozen=False)
    printed = capsys.readouterr().out
    assert "new in each layer: [" in printed and "self_attn.q_norm.weight" in printed
    assert torch.equal(drafter.layers[1].self_attn.k_proj.weight, target.model.layers[1].self_attn.k_proj.weight)
    assert torch.equal(drafter.layers[0].input_layernorm.weight, torch.ones(32))  # Gemma keeps its norms less 1
    assert ("mlp.up_proj.weight" in printed) == (architecture == "mixtral")


def test_layers_that_share_nothing_and_layers_that_are_not_there_are_refused():
    target = make_target("gpt2", dtype=torch.float32)
    with pytest.raises(ValueError, match="nothing of GPT2Block fits"):
        borrow(target, config_for(target), [0, 1], frozen=False)
    target = make_target(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"each in 0..3"):
        borrow(target, config_for(target), [1, SHAPE["num_hidden_layers"]], frozen=True)


# ---- recipes


@pytest.mark.parametrize(
    "keys, said",
    [
        (dict(use_peft=True), "needs something to adapt"),
        (dict(lora_r=8), "lora_r would be ignored without use_peft"),
        (dict(use_dora=True), "use_dora would be ignored"),
        (dict(drafter_revision="main"), "without drafter"),
        (dict(drafter="a/b", init_from_target_layers=[1]), "two starts"),
        (dict(drafter="a/b", emb_dim=8), "emb_dim: of a domino drafter"),
    ],
)
def test_keys_that_say_nothing_are_refused(keys, said):
    with pytest.raises(ValueError, match=said):
        drafter_arguments()(**keys)


@pytest.mark.parametrize("names", [["q_proj"], ["q_proj", "fc"]], ids=str)
def test_lora_is_put_on_the_modules_that_are_named(names):
    keys = DrafterArguments(use_peft=True, drafter="a/b", lora_target_modules=names)
    model = get_peft_model(make_drafter(make_target()), keys.peft_config())
    assert {name.split(".")[-1] for name, part in model.named_modules() if hasattr(part, "lora_A")} == set(names)


@pytest.mark.parametrize(
    "keys, said",
    [
        (dict(block_size=16), "block_size is 16, and the drafter .* has 4"),  # also where it is the default
        (dict(num_draft_layers=5), "num_draft_layers is 5, and the drafter .* has 1"),
        (dict(target_layer_ids="0 3"), "target_layer_ids is"),
        (dict(mask_token_id=3), "mask_token_id is 3"),
        (dict(drafter_type="domino"), "drafter_type is domino, and the drafter .* has dflash"),
    ],
)
def test_a_released_drafter_keeps_its_shape(command, base, keys, said):
    with pytest.raises(SystemExit, match=said):
        main(command(drafter=base, **keys))


def test_warm_start_trains_the_released_drafter_in_full(command, base, tmp_path):
    main(command(drafter=base, max_steps=1))
    record = json.loads((tmp_path / "out/provenance.json").read_text())
    assert record["base"]["name_or_path"] == str(base) and record["tau_before"] >= 1
    before, after = load_drafter(base).state_dict(), load_drafter(tmp_path / "out").state_dict()
    assert before.keys() == after.keys() and not torch.equal(before["fc.weight"], after["fc.weight"])
    assert not (tmp_path / "out/adapter").exists()
    torch.testing.assert_close(before["fc.weight"], after["fc.weight"], atol=2e-3, rtol=0)  # one step away


@pytest.mark.own_parameters
@pytest.mark.parametrize("kind", ["dflash", "domino"])
def test_the_recorded_recipe_parses_and_makes_the_same_drafter_again(command, tmp_path, kind):
    own = dict(num_draft_layers=2, block_size=6) | dict(learning_rate=0.05)
    if kind == "domino":
        own |= dict(drafter_type="domino", gru_hidden_dim=12, emb_dim=8, objective="b_auf")
    main(command(output_dir=tmp_path / "base", **own))
    keys = {key: value for key, value in BASE.items() if key not in ("num_draft_layers", "block_size")}
    more = dict(objective="b_auf") if kind == "domino" else {}
    main(command(base=keys, drafter=tmp_path / "base", **LORA, **more))
    recipe = json.loads((tmp_path / "out/provenance.json").read_text())["recipe"]
    assert (recipe["drafter_type"], recipe["num_draft_layers"], recipe["block_size"]) == (kind, 2, 6)
    (tmp_path / "recipe.yaml").write_text(changed_recipe(recipe))
    main(
        ["--config", str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / "again"), "--disable_tqdm", "true"]
    )
    first, again = (load_drafter(tmp_path / name).state_dict() for name in ("out", "again"))
    assert all(torch.equal(first[name], again[name]) for name in first)
    with pytest.raises(
        SystemExit, match="emb_dim is 4, and the drafter" if kind == "domino" else "drafter_type is domino"
    ):
        main(command(base=keys, drafter=tmp_path / "base", drafter_type="domino", emb_dim=4, **LORA, **more))
