"""A target from the GGUF file of a registry package, saved as an ordinary bf16 folder.

    python tests/gpu/dequantize.py FOLDER FILE.gguf OUT

transformers reads a GGUF file and keeps its weights packed, and a packed model cannot be saved. So the weights are
unpacked to bf16 here, once. Needs the package `gguf`.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel


def unpacked(model: PreTrainedModel) -> LlamaForCausalLM:
    """The same Llama in bf16, without what its config says about packing.

    Raises:
        RuntimeError: a weight of the packed model is missing, or has another name.
    """
    keys = model.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "model_type", "architectures", "transformers_version"):
        keys.pop(key, None)
    ordinary = LlamaForCausalLM(LlamaConfig(**keys)).to(torch.bfloat16)
    # strict, so that no layer is left with random weights
    ordinary.load_state_dict(model.state_dict())
    ordinary.tie_weights()
    ordinary.generation_config = model.generation_config
    return ordinary.eval()


def main(folder: str, name: str, out: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = unpacked(AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.bfloat16))
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    # An answer that makes sense shows that the weights lie where they belong.
    ask = [{"role": "user", "content": "Write a Python function that reverses a string."}]
    prompt = tokenizer.apply_chat_template(ask, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=40, do_sample=False)
    print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :]))


if __name__ == "__main__":
    main(*sys.argv[1:])
