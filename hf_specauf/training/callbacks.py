"""What a person meets while a drafter trains: Ctrl-C that loses nothing, and a progress bar that
shows tau."""

import signal

from transformers import ProgressCallback, TrainerCallback


class InterruptCallback(TrainerCallback):
    """Ctrl-C finishes the step, saves a checkpoint and stops; a second Ctrl-C stops at once."""

    previous = None
    agreed: bool | None = (
        None  # of several processes: whether any was interrupted, as all of them know it
    )

    def on_train_begin(self, args, state, control, **kwargs):
        """Take over SIGINT for the time of training."""
        self.interrupted, self.agreed = False, None
        try:
            self.previous = signal.signal(signal.SIGINT, self._note)
        except ValueError:  # not in the main thread
            self.previous = None

    def _note(self, signum, frame):
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        print(
            "\ninterrupted: finishing this step and saving; press Ctrl-C again to stop at once",
            flush=True,
        )

    def on_step_end(self, args, state, control, **kwargs):
        """Ask for a checkpoint and the end."""
        if self.interrupted if self.agreed is None else self.agreed:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        """Give SIGINT back."""
        self.release()

    def release(self) -> None:
        """Give SIGINT back, also after an error; calling it twice is harmless."""
        if self.previous is not None:
            signal.signal(signal.SIGINT, self.previous)
            self.previous = None


class TauProgressCallback(ProgressCallback):
    """Trainer's progress bar with loss and tau beside it, instead of a line of JSON for every
    log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Show the newest figures."""
        if state.is_world_process_zero and self.training_bar is not None:
            names = {
                "loss": "loss",
                "teacher_forced_tau": "tf_tau",
                "eval_tau": "tau",
                "active_ratio": "active",
            }
            self.shown = getattr(self, "shown", {}) | {
                short: f"{logs[name]:.3f}" for name, short in names.items() if name in (logs or {})
            }
            self.training_bar.set_postfix(self.shown)
