"""A trainer whose largest micro-batch is tried under limits on memory: arguments TOKENIZER OUT MEGABYTES ..."""

import resource
import sys

import psutil
import torch
from conftest import MASK, make_drafter, make_target, random_prompts
from datasets import Dataset
from transformers import AutoTokenizer

from hf_specauf.training.memory import try_largest_batch
from hf_specauf.training.trainer import AUFConfig, AUFTrainer


def main(folder: str, out: str, spares: list[int]) -> None:
    torch.set_num_threads(1)
    target = make_target(dtype=torch.float32, intermediate_size=1000)
    drafter = make_drafter(target, block_size=32, layers=6)  # AdamW's moments alone exceed a megabyte
    texts = random_prompts(2, 200).tolist()
    rows = Dataset.from_dict({"input_ids": texts, "supervised": [[1] * 200] * 2})
    args = AUFConfig(
        output_dir=out, use_cpu=True, anchors_per_row=64, per_device_train_batch_size=2, disable_tqdm=True,
        eval_prompts=0, max_steps=1,
    )  # fmt: skip
    assert MASK == drafter.config.mask_token_id
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trainer = AUFTrainer(drafter, target, args, train_dataset=rows, processing_class=tokenizer)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    random_state = torch.get_rng_state()
    for spare in spares:
        limit = psutil.Process().memory_info().vms + spare * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        try:
            try_largest_batch(trainer, trainer.model)
            print(spare, "fits")
        except ValueError as error:
            print(spare, error)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(p.grad is None for p in trainer.model.parameters())
    assert all(torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], list(map(int, sys.argv[3:])))
