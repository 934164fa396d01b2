"""One rank of a real training run, started by torchrun: `distributed_worker.py FOLDER OUT key=value ...`.

FOLDER holds target/, drafter/, domino/ and rows.jsonl. Writes OUT/logs.json: what was logged, evaluated, and how many
ran.
"""

import json
import sys
from pathlib import Path

import torch
from conftest import load_rows_file
from peft import LoraConfig
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig

from hf_specauf import AUFConfig, AUFTrainer

FIXED = dict(
    use_cpu=True, anchors_per_row=6, max_steps=4, learning_rate=0.05, optim="sgd", lr_scheduler_type="constant",
    logging_steps=1, eval_prompts=3, eval_new_tokens=12, disable_tqdm=True, save_only_model=True, save_steps=4,
    eval_strategy="steps", eval_steps=4, ddp_timeout=120,
)  # fmt: skip


def main(folder: Path, out: Path, lora: bool = False, sharded: bool = False, drafter: str = "drafter", **keys) -> None:
    torch.set_num_threads(1)
    args = AUFConfig(output_dir=str(out), **FIXED | keys)
    target = AutoModelForCausalLM.from_pretrained(folder / "target")
    more = {}
    if sharded:
        more["distributed_config"] = DistributedConfig(fsdp_size=args.world_size)
    drafter = AutoModel.from_pretrained(folder / drafter, **more)
    rows = load_rows_file(folder / "rows.jsonl")
    trainer = AUFTrainer(
        model=drafter, target_model=target, args=args, train_dataset=rows, eval_dataset=rows.select(range(5)),
        processing_class=AutoTokenizer.from_pretrained(folder / "target"),
        peft_config=LoraConfig(r=4, target_modules="all-linear") if lora else None,
    )  # fmt: skip
    trainer.train()
    if trainer.is_world_process_zero():
        record = {"logs": trainer.state.log_history, "processes": trainer.accelerator.num_processes}
        for name, model in (("drafter", trainer.model), ("target", target)):
            record[name] = sorted({type(p).__name__ for p in model.parameters()})
        (out / "logs.json").write_text(json.dumps(record))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()  # takes the process group down in order


if __name__ == "__main__":
    pairs = [word.split("=") for word in sys.argv[3:]]
    main(Path(sys.argv[1]), Path(sys.argv[2]), **{key: json.loads(value) for key, value in pairs})
