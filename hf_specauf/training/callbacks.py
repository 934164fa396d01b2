"""What a person meets while a drafter trains: Ctrl-C and other signals that lose nothing, a word on
a learning rate that trains nothing, and a progress bar that shows tau."""

import os
import signal
from typing import Any

from transformers import ProgressCallback, TrainerCallback


def signals() -> dict[str, int]:
    """The signals that ask a run to end, by name. Windows has the first two alone.

    Ctrl-C; what spot machines, containers and schedulers send; a terminal that is closed; and what
    Slurm sends before a job's time is over, in many people's launch files (`--signal=USR1@300`).
    """
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    return {name: getattr(signal, name) for name in names if hasattr(signal, name)}


class Interruption:
    """Ctrl-C and the other [`signals`] are noted, so that the work under way is finished and saved
    first.

    A person stops at once by a second Ctrl-C. A second one of the others changes nothing: launchers
    and schedulers send several, and kill whoever takes too long.

    Args:
        finishing (`str`): what is finished first, in words.

    Attributes:
        noted (`bool`): this process was told to stop.
    """

    def __init__(self, finishing: str):
        self.finishing = finishing
        self.noted = False
        self._previous: dict[int, Any] = {}  # the handlers that were there before
        self._terminals: list[int] = []  # of stdout and stderr, those that are one

    def take(self) -> None:
        """Take the signals over."""
        self.noted = False
        self._terminals = [stream for stream in (1, 2) if os.isatty(stream)]
        try:
            for name, number in signals().items():
                # `nohup` asks that the run goes on when its terminal is closed
                if name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN:
                    continue
                self._previous[number] = signal.signal(number, self._note)
        except ValueError:  # not in the main thread, which alone may set handlers
            pass

    def _note(self, number, frame):
        if self.noted and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.noted:
            return
        self.noted = True
        if number == signals().get("SIGHUP"):
            self._leave_terminals()
        print(
            f"\ninterrupted: finishing {self.finishing}; press Ctrl-C again to stop at once",
            flush=True,
        )

    def _leave_terminals(self) -> None:
        """Write no more to a terminal that was closed, because that would raise before anything is
        saved."""
        with open(os.devnull, "w") as nothing:
            for stream in self._terminals:
                os.dup2(nothing.fileno(), stream)

    def release(self) -> None:
        """Give them back, also after an error; calling it twice is harmless."""
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
    """Ctrl-C, or another of the [`signals`], finishes the step, saves a checkpoint and stops; a
    second Ctrl-C stops at once.

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


class RateCallback(TrainerCallback):
    """Says, as training begins, that its learning rate trains nothing, or is never reached. Only
    then is it known how many steps there are."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Print at most one line."""
        if not state.is_world_process_zero:
            return
        warmup = args.get_warmup_steps(state.max_steps)
        if args.learning_rate == 0:
            untrained = "the drafter"
            if args.muon_learning_rate is not None:
                untrained = "all of the drafter but the matrices, which Muon trains,"
            print(
                f"learning_rate is 0: {untrained} stays as it is. To train it, raise learning_rate"
                " (6e-4 by default)"
            )
        elif warmup >= state.max_steps:
            reached = (state.max_steps - 1) / warmup
            print(
                f"the warm-up takes {warmup} steps and the run has {state.max_steps}: it ends at"
                f" {reached:.0%} of the learning rate. Lower warmup_steps (now"
                f" {args.warmup_steps:g}), or train longer"
            )


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
