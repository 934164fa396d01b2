"""Trainer's `push_to_hub` and model card, by this package's own `hub` and `model_card`."""

from pathlib import Path

from httpx2 import HTTPError
from huggingface_hub import CommitInfo
from transformers.trainer_utils import HubStrategy

from ..publishing.card import render
from ..publishing.hub import push
from .waiting import wait_for_everyone


class Publishing:
    """Mixed into `AUFTrainer`, in the place of Trainer's own methods."""

    def push_to_hub(self, commit_message: str = "Upload drafter", **kwargs) -> CommitInfo | None:
        """Publish `output_dir` by [`hub.push`]; Trainer would upload all of it, a pickle with the
        token among it."""
        # without prompts nothing could be measured, and nobody asked for it
        unmeasured = not self.args.eval_prompts
        info = self._push(self.args.output_dir, commit_message, allow_unmeasured=unmeasured)
        # the upload may take longer than a collective waits
        wait_for_everyone()
        return info

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Publish the drafter of a checkpoint, as unmeasured, where `hub_strategy` asks for it."""
        if self.args.hub_strategy == HubStrategy.END:
            return
        message = f"Training in progress, step {self.state.global_step}"
        try:
            self._push(checkpoint_folder, message, allow_unmeasured=True)
        except (ValueError, OSError, HTTPError) as error:
            # no reason to stop training: the checkpoint is on the disk
            print(f"{checkpoint_folder} was not published: {' '.join(str(error).split())}")

    def _push(self, folder: str, message: str, allow_unmeasured: bool) -> CommitInfo | None:
        """Publish a folder from the first process; `None` in the others."""
        if not self.is_world_process_zero():
            return None
        args = self.args
        info = push(
            folder,
            self.hub_model_id or args.hub_model_id,
            private=args.hub_private_repo,
            token=args.hub_token,
            revision=args.hub_revision,
            commit_message=message,
            allow_unmeasured=allow_unmeasured,
            target_model=self.target.model,
        )
        print(f"published: {info.commit_url}")
        return info

    def create_model_card(self, **kwargs) -> None:
        """Render our card into `output_dir`."""
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir)
        repo = self.hub_model_id or self.args.hub_model_id or f"you/{folder.name}"
        render(folder, repo).save(folder / "README.md")
