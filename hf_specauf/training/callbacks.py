"""What a person meets while a drafter trains: Ctrl-C that loses nothing, and a progress bar that
shows tau."""

import signal

from transformers import ProgressCallback, TrainerCallback


class InterruptCallback(TrainerCallback):
    """Ctrl-C finishes the step, saves a checkpoint and stops; a second Ctrl-C stops at once.

    Attributes:
        interrupted (`bool`): this process was.
        agreed (`bool`, *optional*): of several processes: whether any was, as all of them know it.
            All must stop at the same step, because the others would wait for one that has gone.
    """

    interrupted = False
    agreed: bool | None = None
    _previous = None  # the handler of SIGINT that was there before

    def on_train_begin(self, args, state, control, **kwargs):
        """Take over SIGINT for the time of training."""
        self.interrupted, self.agreed = False, None
        try:
            self._previous = signal.signal(signal.SIGINT, self._note)
        except ValueError:  # not in the main thread, which alone may set handlers
            self._previous = None

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
        told = self.interrupted if self.agreed is None else self.agreed
        if told:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        """Give SIGINT back."""
        self.release()

    def release(self) -> None:
        """Give SIGINT back, also after an error; calling it twice is harmless."""
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None


class TauProgressCallback(ProgressCallback):
    """Trainer's progress bar with loss and tau beside it, instead of a line of JSON for every
    log."""

    # what is logged, and its name on the bar, where there is little room
    SHOWN = {
        "loss": "loss",
        "teacher_forced_tau": "tf_tau",
        "eval_tau": "tau",
        "active_ratio": "active",
    }

    def __init__(self):
        super().__init__()
        self.newest: dict[str, str] = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Show the newest figures: a log of training and one of evaluation have different ones."""
        if not state.is_world_process_zero or self.training_bar is None:
            return
        for name, short in self.SHOWN.items():
            if name in (logs or {}):
                self.newest[short] = f"{logs[name]:.3f}"
        self.training_bar.set_postfix(self.newest)
