"""Checkpoints that appear under their name only when they are complete."""

import os
import shutil
import time
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import sort_checkpoints

SAVED_AT = "saved_at"  # seconds since 1970, which copying a folder does not change


def checkpoints_by_age(output_dir: str | Path) -> list[str]:
    """Checkpoints, the oldest first: by when they were written, and not by their step, since an
    output folder may hold those of an earlier, longer run."""

    def written(checkpoint: str) -> float:
        path = Path(checkpoint, SAVED_AT)
        return float(path.read_text()) if path.is_file() else 0.0

    return sorted(sort_checkpoints(output_dir), key=written)


class CompleteCheckpoints:
    """Mixed into a Trainer: it writes checkpoints in place and finds the last one by its name, so a
    kill in the middle of a save would leave a folder that looks like a checkpoint and is not
    one."""

    _is_saving = False

    @property
    def _saving_folder(self) -> str:
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
        kept = self.args.save_total_limit, self.args.push_to_hub
        self.args.save_total_limit, self.args.push_to_hub = (
            None,
            False,
        )  # done below, by its final name
        self._is_saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._is_saving = False
            self.args.save_total_limit, self.args.push_to_hub = kept
        self.accelerator.wait_for_everyone()
        name, folder = f"checkpoint-{self.state.global_step}", str(Path(self.args.output_dir))
        newest = os.path.join(folder, name)
        if self.state.best_global_step:
            best = os.path.join(folder, f"checkpoint-{self.state.best_global_step}")
            if self.state.best_global_step == self.state.global_step or os.path.isdir(best):
                self.state.best_model_checkpoint = best
        if self.args.should_save:
            written = os.path.join(self._saving_folder, name)
            self.state.save_to_json(
                os.path.join(written, TRAINER_STATE_NAME)
            )  # with the best checkpoint's final name
            Path(written, SAVED_AT).write_text(str(time.time()))
            self._remove(newest)  # of an earlier run; this one is newer
            os.rename(written, newest)
            self._remove_old_checkpoints(newest)
            shutil.rmtree(self._saving_folder)
        if self.args.push_to_hub:
            self._push_from_checkpoint(newest)
        self.accelerator.wait_for_everyone()

    def _remove(self, checkpoint: str) -> None:
        if os.path.isdir(checkpoint):
            doomed = os.path.join(self._saving_folder, os.path.basename(checkpoint) + ".old")
            os.rename(checkpoint, doomed)
            shutil.rmtree(doomed)

    def _remove_old_checkpoints(self, newest: str) -> None:
        """Keep `save_total_limit` checkpoints, the newest and the best among them; the oldest go
        first."""
        checkpoints = checkpoints_by_age(self.args.output_dir)
        others = [
            path for path in checkpoints if path not in (newest, self.state.best_model_checkpoint)
        ]
        excess = len(checkpoints) - (self.args.save_total_limit or len(checkpoints))
        for checkpoint in others[: max(excess, 0)]:
            self._remove(checkpoint)
