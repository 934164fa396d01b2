"""What a person meets while a drafter trains: Ctrl-C and SIGTERM that lose nothing, and a progress
bar that shows tau."""

import signal
from typing import Any

from transformers import ProgressCallback, TrainerCallback


class Interruption:
    """Ctrl-C and SIGTERM are noted, so that the work under way is finished and saved first.

    A person stops at once by a second Ctrl-C. A second SIGTERM changes nothing: launchers and
    schedulers send several, and kill whoever takes too long.

    Args:
        finishing (`str`): what is finished first, in words.

    Attributes:
        noted (`bool`): this process was told to stop.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, finishing: str):
        self.finishing = finishing
        self.noted = False
        self._previous: dict[int, Any] = {}  # the handlers that were there before

    def take(self) -> None:
        """Take both signals over."""
        self.noted = False
        try:
            for number in self.SIGNALS:
                self._previous[number] = signal.signal(number, self._note)
        except ValueError:  # not in the main thread, which alone may set handlers
            pass

    def _note(self, number, frame):
        if self.noted and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.noted:
            return
        self.noted = True
        print(
            f"\ninterrupted: finishing {self.finishing}; press Ctrl-C again to stop at once",
            flush=True,
        )

    def release(self) -> None:
        """Give both back, also after an error; calling it twice is harmless."""
        for number, previous in self._previous.items():
            # None was set by no Python code, and cannot be set by any
            if previous is not None:
                signal.signal(number, previous)
        self._previous = {}

    def __enter__(self) -> "Interruption":
        self.take()
        return self

    def __exit__(self, *exception) -> None:
        self.release()


class InterruptCallback(TrainerCallback):
    """Ctrl-C or SIGTERM finishes the step, saves a checkpoint and stops; a second Ctrl-C stops at
    once.

    Attributes:
        agreed (`bool`, *optional*): of several processes: whether any was, as all of them know it.
            All must stop at the same step, because the others would wait for one that has gone.
    """

    agreed: bool | None = None

    def __init__(self):
        self._interruption = Interruption("this step and saving")

    @property
    def interrupted(self) -> bool:
        """Whether this process was."""
        return self._interruption.noted

    def on_train_begin(self, args, state, control, **kwargs):
        """Take the signals over for the time of training."""
        self.agreed = None
        self._interruption.take()

    def on_step_end(self, args, state, control, **kwargs):
        """Ask for a checkpoint and the end."""
        told = self.interrupted if self.agreed is None else self.agreed
        if told:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        """Give the signals back."""
        self.release()

    def release(self) -> None:
        """Give the signals back, also after an error; calling it twice is harmless."""
        self._interruption.release()


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
