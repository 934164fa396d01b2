"""An answer on a terminal while it is written: its text, which of its tokens a drafter proposed,
and how fast it came."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from rich.console import RenderableType
from rich.panel import Panel
from rich.text import Text
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

ACCEPTED = "bold green"  # how a drafted token that the target accepted is shown


@dataclass
class Answer:
    """What one way of decoding has written so far.

    Attributes:
        title (`str`): which way.
        pieces (`list[tuple[str, bool]]`): text, and whether a drafter proposed it.
        passes (`int`): passes of the target, the prompt's among them.
        tokens (`int`): written so far.
        seconds (`float`): since the call began.
    """

    title: str
    pieces: list[tuple[str, bool]] = field(default_factory=list)
    passes: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def panel(self) -> RenderableType:
        """The answer in a frame, its rate below."""
        text = Text(overflow="fold")
        for piece, drafted in self.pieces:
            text.append(piece, style=ACCEPTED if drafted else "")
        rate = ""
        if self.seconds > 0:
            rate = f"{self.tokens / self.seconds:.1f} tokens/s, {self.passes} passes"
        return Panel(text, title=self.title, subtitle=rate)


class AnswerStreamer(BaseStreamer):
    """Fills an `Answer` while `generate` runs.

    `generate` hands over what each pass of the target commits. With a drafter that is the accepted
    draft and one token of the target's own, which comes last. (A pass that an end cut short may end
    in an accepted token, which is then shown as the target's.)

    Args:
        tokenizer (`PreTrainedTokenizerBase`): of the target.
        answer (`Answer`): is filled.
        shown (`Callable`, *optional*): called after each pass.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        answer: Answer,
        shown: Callable[[], None] | None = None,
    ):
        self.tokenizer, self.answer, self.shown = tokenizer, answer, shown
        self.ids: list[int] = []
        self.text = ""
        self.prompt_seen = False
        self.start = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        """Take the tokens of one pass. (n,) or (1, n)"""
        if not self.prompt_seen:
            # The first call brings the prompt.
            self.prompt_seen = True
            return
        committed = value.flatten().tolist()
        for token in committed[:-1]:
            self._add(token, drafted=True)
        self._add(committed[-1], drafted=False)
        self.answer.passes += 1
        self.answer.tokens = len(self.ids)
        self.answer.seconds = time.perf_counter() - self.start
        if self.shown is not None:
            self.shown()

    def _add(self, token: int, drafted: bool) -> None:
        """Append the text that one more token makes."""
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        # A character of several tokens is whole only with its last one.
        if text.endswith("\ufffd"):
            return
        self.answer.pieces.append((text[len(self.text) :], drafted))
        self.text = text

    def end(self) -> None:
        """Take the time of the whole call."""
        self.answer.seconds = time.perf_counter() - self.start
