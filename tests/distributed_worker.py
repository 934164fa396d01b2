"""One rank of a real training run, started by torchrun: `distributed_worker.py FOLDER OUT key=value ...`.

FOLDER holds target/, drafter/, domino/ and rows.jsonl. Writes OUT/logs.json: what was logged, evaluated, and how many
ran.
"""

import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.distributed import DistributedConfig

from hf_specauf import AUFConfig, AUFTrainer
from hf_specauf.training import trainer as trainer_module

ROOT = Path(__file__).parents[1]
FIXED = dict(
    use_cpu=True, anchors_per_row=6, max_steps=4, learning_rate=0.05, optim="sgd", lr_scheduler_type="constant",
    logging_steps=1, eval_prompts=3, eval_new_tokens=6, disable_tqdm=True, save_only_model=True, save_steps=4,
    eval_strategy="steps", eval_steps=4, ddp_timeout=120,
)  # fmt: skip


def as_launched_with(recipe: str) -> None:
    """Set what `accelerate launch --config_file recipes/accelerate/...` sets."""
    words = ["--config_file", str(ROOT / "recipes/accelerate" / recipe), "a_script.py"]
    args = _validate_launch_command(launch_command_parser().parse_args(words))[0]
    args.deepspeed_fields_from_accelerate_config = "zero_stage,gradient_accumulation_steps"  # as the launcher notes
    os.environ |= prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)


class InterruptOneRank(TrainerCallback):
    """A signal to the last process alone, at the beginning of its second step."""

    def __init__(self, name: str):
        self.signal = signal.Signals[name]

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1 and args.process_index == args.world_size - 1:
            os.kill(os.getpid(), self.signal)


class TryMemory(TrainerCallback):
    """Tries the largest micro-batch before the first step, which a CPU leaves out."""

    def __init__(self, trainer: AUFTrainer):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer._untried_memory = state.global_step == 0


def prepare_slowly(rank: int, seconds: float) -> None:
    """Let one process take so long to tokenize."""
    prepare_rows = trainer_module.prepare_rows

    def slowly(*args, **kwargs):
        if int(os.environ["RANK"]) == rank:
            time.sleep(seconds)
        return prepare_rows(*args, **kwargs)

    trainer_module.prepare_rows = slowly


def main(
    folder: Path, out: Path, lora: bool = False, sharded: bool = False, drafter: str = "drafter",
    launched_with: str | None = None, try_memory: bool = False, interrupt: str | None = None,
    resume: str | None = None, evaluate_first: bool = False, slow: list | None = None,
    undecodable: bool = False, **keys,
) -> None:  # fmt: skip
    torch.set_num_threads(1)
    if slow is not None:
        # Trainer gives its ddp_timeout to torch only without use_cpu
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=keys["ddp_timeout"]))
        prepare_slowly(*slow)
    if launched_with is not None:
        as_launched_with(launched_with)
    args = AUFConfig(output_dir=str(out), **FIXED | keys)
    if launched_with is not None and not args.deepspeed_plugin:
        # accelerate shards on accelerators only; all that it then does runs on CPUs as well
        PartialState().distributed_type = DistributedType.MULTI_GPU
    target = AutoModelForCausalLM.from_pretrained(folder / "target")
    if undecodable:
        target.prepare_inputs_for_generation = None
    more = {}
    if sharded:
        more["distributed_config"] = DistributedConfig(fsdp_size=args.world_size)
    drafter = AutoModel.from_pretrained(folder / drafter, **more)
    rows = Dataset.from_list([json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()])
    trainer = AUFTrainer(
        model=drafter, target_model=target, args=args, train_dataset=rows, eval_dataset=rows.select(range(5)),
        processing_class=AutoTokenizer.from_pretrained(folder / "target"),
        peft_config=LoraConfig(r=4, target_modules="all-linear") if lora else None,
        callbacks=[InterruptOneRank(interrupt)] if interrupt else None,
    )  # fmt: skip
    if try_memory:
        trainer.add_callback(TryMemory(trainer))
    if evaluate_first:
        trainer.evaluate()
    try:
        trainer.train(resume_from_checkpoint=resume)
    except FloatingPointError:
        print("steps of DeepSpeed:", trainer.deepspeed.global_steps, file=sys.stderr)
        raise
    if trainer.is_world_process_zero():
        record = {"logs": trainer.state.log_history, "processes": trainer.accelerator.num_processes}
        for name, model in (("drafter", trainer.model), ("target", target)):
            record[name] = sorted({type(p).__name__ for p in model.parameters()})
        if trainer.is_fsdp_enabled:
            policy = trainer.model._get_fsdp_state()._mp_policy
            record["dtypes"] = [str(policy.param_dtype), str(policy.reduce_dtype), str(policy.output_dtype)]
        (out / "logs.json").write_text(json.dumps(record))
    trainer.accelerator.wait_for_everyone()
    sys.stdout.flush()
    sys.stderr.flush()
    # The process group is not destroyed: torch deadlocks where gloo's thread lets go of the last collective meanwhile.
    os._exit(0)


if __name__ == "__main__":
    pairs = [word.split("=") for word in sys.argv[3:]]
    main(Path(sys.argv[1]), Path(sys.argv[2]), **{key: json.loads(value) for key, value in pairs})
