"""Checkpoints that appear under their name only when they are complete, and hold a whole drafter
that loads anywhere."""

import copy
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import sort_checkpoints

from ..drafters.configuration_dflash import DFlashConfig
from ..layouts.adapters import finish_adapter
from ..records import write_record
from .config import AUFConfig
from .preflight import check_resumed_adapter
from .waiting import everyone_comes, wait_for_everyone

# Where one process fails, the others fail at the same work soon after, or not at all.
SECONDS_TO_FAIL_TOO = 30
SAVED_AT = "saved_at"  # seconds since 1970, which copying a folder does not change


def checkpoints_by_age(output_dir: str | Path) -> list[str]:
    """Checkpoints, the oldest first: by when they were written, and not by their step, since an
    output folder may hold those of an earlier, longer run."""

    def written(checkpoint: str) -> float:
        path = Path(checkpoint, SAVED_AT)
        return float(path.read_text()) if path.is_file() else 0.0

    return sorted(sort_checkpoints(output_dir), key=written)


def resume_folder(args: AUFConfig) -> str | None:
    """The checkpoint that `resume_from_checkpoint` means: `true` is the newest of `output_dir`."""
    resume = args.resume_from_checkpoint
    # YAML gives a bool, the command line a word.
    if isinstance(resume, str) and resume.lower() in ("true", "false"):
        resume = resume.lower() == "true"
    if resume is True:
        resume = next(reversed(checkpoints_by_age(args.output_dir)), None)
        if resume is None:
            print(
                f"resume_from_checkpoint: there is no checkpoint in {args.output_dir} yet, so"
                " training starts afresh"
            )
    if isinstance(resume, str) and not os.path.isdir(resume):
        raise ValueError(
            f"resume_from_checkpoint: there is no folder {resume!r}; `true` takes the newest of"
            " output_dir"
        )
    return resume or None


def whole_copy(drafter, config: DFlashConfig, peft_config: PeftConfig | None):
    """A drafter, or, where its weights are sharded, a copy on the CPU that each rank has by itself.

    All ranks must call it, because they gather the weights together.

    Args:
        drafter (`PreTrainedModel` or `PeftModel`): without accelerate's wrapper.
        config (`DFlashConfig`): its own.
        peft_config (`PeftConfig`, *optional*): of the adapter on it.
    """
    state = drafter.state_dict()
    if not any(isinstance(tensor, DTensor) for tensor in state.values()):
        return drafter
    config = copy.copy(config)
    # Trainer's switch, and what says that the drafter is sharded
    for key in ("use_cache", "distributed_config"):
        vars(config).pop(key, None)
    whole = AutoModel.from_config(config, dtype=torch.float32)
    if peft_config is not None:
        whole = get_peft_model(whole, peft_config)
    gathered = {}
    for name, tensor in state.items():
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        gathered[name] = tensor.cpu()  # each leaves the accelerator before the next is gathered
    whole.load_state_dict(gathered)
    return whole


def shard_again(model: nn.Module) -> None:
    """Put FSDP2's weights back where an optimizer finds them: an evaluation before training leaves
    whole ones in its modules. Newer versions of Trainer do this themselves; twice is harmless."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class CompleteCheckpoints:
    """Mixed into a Trainer: it writes checkpoints in place and finds the last one by its name, so a
    kill in the middle of a save would leave a folder that looks like a checkpoint and is not
    one."""

    _is_saving = False

    @property
    def _saving_folder(self) -> str:
        # Trainer looks for checkpoints by their name, and this one begins otherwise
        return os.path.join(self.args.output_dir, ".saving")

    def _clear_unfinished(self) -> None:
        """Remove what a run that was killed while it saved has left."""
        shutil.rmtree(self._saving_folder, ignore_errors=True)

    def _get_output_dir(self, trial) -> str:
        return self._saving_folder if self._is_saving else super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial) -> None:
        """Trainer's own, written beside and renamed when every rank is done: whatever is called
        `checkpoint-*` is complete, also after a kill in the middle of saving or of deleting an old
        one."""
        self._write_beside(model, trial)
        # no rank may still be writing when the folder gets its name
        wait_for_everyone()
        # Checkpoints are found by Path, which writes "./out" as "out", and compared as strings.
        folder = str(Path(self.args.output_dir))
        name = f"checkpoint-{self.state.global_step}"
        newest = os.path.join(folder, name)
        if self.state.best_global_step:
            best = os.path.join(folder, f"checkpoint-{self.state.best_global_step}")
            if self.state.best_global_step == self.state.global_step or os.path.isdir(best):
                self.state.best_model_checkpoint = best
        if self.args.should_save:
            written = os.path.join(self._saving_folder, name)
            # once more, with the best checkpoint's final name
            self.state.save_to_json(os.path.join(written, TRAINER_STATE_NAME))
            Path(written, SAVED_AT).write_text(str(time.time()))
            self._remove(newest)  # of an earlier run; this one is newer
            os.rename(written, newest)
            self._remove_old_checkpoints(newest)
            shutil.rmtree(self._saving_folder)
        if self.args.push_to_hub:
            self._push_from_checkpoint(newest)
        # No rank may look for the checkpoint before it is there, nor give up while it is uploaded.
        wait_for_everyone()

    def _evaluate(self, trial, ignore_keys_for_eval, skip_scheduler: bool = False):
        """Trainer's own, in the middle of training. It comes before the save of the same step, so
        where it fails, what was trained is saved first."""
        try:
            return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        except Exception:
            self._save_before_the_end(trial)
            raise

    def _save_before_the_end(self, trial) -> None:
        step = self.state.global_step
        # A process that failed alone cannot save: the others are at other work.
        if step == 0 or not everyone_comes(SECONDS_TO_FAIL_TOO):
            return
        self._save_checkpoint(self.model, trial)
        if not self.is_world_process_zero():
            return
        print(
            f"the evaluation failed; step {step} is saved in {self.args.output_dir}. Go on with"
            " --resume_from_checkpoint true; eval_prompts: 0 leaves decoding out"
        )

    def _write_beside(self, model, trial) -> None:
        """Trainer's own, into the saving folder. It neither deletes old checkpoints nor pushes this
        one: both come later, by its final name."""
        args = self.args
        limit, push = args.save_total_limit, args.push_to_hub
        args.save_total_limit, args.push_to_hub = None, False
        self._is_saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._is_saving = False
            args.save_total_limit, args.push_to_hub = limit, push

    def _remove(self, checkpoint: str) -> None:
        """Delete a checkpoint. It loses its name first, so that a kill leaves no half of it."""
        if os.path.isdir(checkpoint):
            doomed = os.path.join(self._saving_folder, os.path.basename(checkpoint) + ".old")
            os.rename(checkpoint, doomed)
            shutil.rmtree(doomed)

    def _remove_old_checkpoints(self, newest: str) -> None:
        """Keep `save_total_limit` checkpoints, the newest and the best among them; the oldest go
        first."""
        limit = self.args.save_total_limit
        if not limit:
            return
        checkpoints = checkpoints_by_age(self.args.output_dir)
        kept = (newest, self.state.best_model_checkpoint)
        others = [path for path in checkpoints if path not in kept]
        excess = max(len(checkpoints) - limit, 0)
        for checkpoint in others[:excess]:
            self._remove(checkpoint)


class DrafterCheckpoints(CompleteCheckpoints):
    """Mixed into `AUFTrainer`: what a checkpoint of a drafter holds. It reads the trainer's
    `drafter_config` and, of an adapter, `peft_config` and `adapter_base`."""

    def whole_drafter(self):
        """The drafter, or, where its weights are sharded, a copy on the CPU that each rank has by
        itself."""
        drafter = self.accelerator.unwrap_model(self.model)
        return whole_copy(drafter, self.drafter_config, self.peft_config)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's own; of a sharded drafter a whole copy is saved, so that every checkpoint loads
        anywhere. FSDP also gives the drafter a class of its own, whose name and code would go into
        the folder."""
        model, whole = self.model, self.whole_drafter()
        if whole is self.accelerator.unwrap_model(model):
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            self.model = whole
            try:
                self._save(output_dir)
            finally:
                self.model = model

    def _save(self, output_dir: str | None = None, state_dict=None):
        # Trainer writes its own use_cache switch into the drafter's config
        vars(self.drafter_config).pop("use_cache", None)
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        # a pickle that holds hub_token in clear, and nothing reads it
        (folder / "training_args.bin").unlink(missing_ok=True)
        if self.peft_config is not None and self.args.should_save:
            finish_adapter(folder, self.adapter_base, self.drafter_config)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.peft_config is not None:
            own = self.model.peft_config["default"]
            check_resumed_adapter(resume_from_checkpoint, own, self.adapter_base)
        super()._load_from_checkpoint(resume_from_checkpoint, model)


def save_final(trainer, save_dtype: str, record: dict[str, Any]) -> None:
    """The trained drafter in the dtype it will serve in, and `provenance.json`, in the root of
    `output_dir`; of a LoRA drafter the adapter too, in `adapter/`. What an earlier run measured
    there is removed.

    Args:
        trainer (`AUFTrainer`): done with training. All ranks call it.
        save_dtype (`str`): of the recipe; `auto` is the target's.
        record (`dict`): of what was run.
    """
    drafter, out = trainer.whole_drafter(), Path(trainer.args.output_dir)
    if trainer.is_world_process_zero():
        shutil.rmtree(out / "adapter", ignore_errors=True)
        for path in [*out.glob("eval*.json"), out / "alpha.png"]:
            path.unlink(missing_ok=True)
        # Merging and another dtype change a drafter in place, and this one is still measured.
        final = copy.deepcopy(drafter)
        if trainer.adapter_base is not None:
            drafter.save_pretrained(out / "adapter")
            finish_adapter(out / "adapter", trainer.adapter_base, trainer.drafter_config)
            final = final.merge_and_unload()
        # Trainer writes a switch of its own into the config of what it trains.
        vars(final.config).pop("use_cache", None)
        final.to(_serving_dtype(save_dtype, trainer.target.model.dtype)).save_pretrained(out)
        write_record(out / "provenance.json", record)
        print(f"drafter saved to {out}")
    wait_for_everyone()


def _serving_dtype(save_dtype: str, of_target: torch.dtype) -> torch.dtype:
    if save_dtype != "auto":
        return getattr(torch, save_dtype)
    # In fp16 drafters accept nothing (vllm#55250).
    return torch.bfloat16 if of_target == torch.float16 else of_target
