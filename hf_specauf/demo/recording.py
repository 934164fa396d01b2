"""A recording of a terminal as an animated GIF, drawn from what rich would print."""

import time
from pathlib import Path

from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont
from rich.cells import cell_len
from rich.color import Color
from rich.console import Console, RenderableType
from rich.segment import Segment
from rich.style import Style
from rich.terminal_theme import MONOKAI, TerminalTheme

from ..records import check_can_write

THEME: TerminalTheme = MONOKAI
# All in pixels. The font's characters are 0.6 of its size wide, and its lines 1.17 of it high.
FONT_SIZE, CELL_WIDTH, CELL_HEIGHT = 15, 9, 18
MARGIN = 12
LAST_FRAME_SECONDS = 6.0  # the end is there to be read


def check_record(path: str) -> None:
    """Raise where a recording could not be written, before anything is shown.

    Raises:
        ValueError: what is in the way.
    """
    if not path.lower().endswith(".gif"):
        raise ValueError(f"--record is {path}; it must end in .gif, which is what is written")
    check_can_write("--record", path, is_file=True)


class Recording:
    """Frames with the times at which they were shown.

    Args:
        console (`Console`): whose width the frames have.
        frames_per_second (`float`, *optional*, defaults to 3): at most so many are kept.
    """

    def __init__(self, console: Console, frames_per_second: float = 3.0):
        self.console = console
        self.pause = 1 / frames_per_second
        self.frames: list[tuple[float, list[list[Segment]]]] = []

    def add(self, renderable: RenderableType, force: bool = False) -> None:
        """Keep a frame, unless the last one is too young.

        Args:
            force (`bool`, *optional*): keep it in any case.
        """
        now = time.perf_counter()
        if not force and self.frames and now - self.frames[-1][0] < self.pause:
            return
        options = self.console.options.update(height=None)
        self.frames.append((now, self.console.render_lines(renderable, options)))

    def save(self, path: Path) -> None:
        """Write all frames as a GIF that plays as fast as it was recorded."""
        # matplotlib brings a font of fixed width.
        fonts = Path(get_data_path()) / "fonts" / "ttf"
        regular = ImageFont.truetype(str(fonts / "DejaVuSansMono.ttf"), FONT_SIZE)
        bold = ImageFont.truetype(str(fonts / "DejaVuSansMono-Bold.ttf"), FONT_SIZE)
        rows = max(len(lines) for _, lines in self.frames)
        images = [self._draw(lines, rows, regular, bold) for _, lines in self.frames]
        times = [at for at, _ in self.frames]
        lasting = [later - at for at, later in zip(times, times[1:])] + [LAST_FRAME_SECONDS]
        path.parent.mkdir(parents=True, exist_ok=True)
        images[0].save(
            path,
            save_all=True,
            append_images=images[1:],
            duration=[round(1000 * seconds) for seconds in lasting],
            loop=0,
            optimize=True,
        )

    def _draw(self, lines: list[list[Segment]], rows: int, regular, bold) -> Image.Image:
        """One frame."""
        size = (
            self.console.width * CELL_WIDTH + 2 * MARGIN,
            rows * CELL_HEIGHT + 2 * MARGIN,
        )
        image = Image.new("RGB", size, tuple(THEME.background_color))
        draw = ImageDraw.Draw(image)
        for row, line in enumerate(lines):
            column = 0
            for segment in line:
                style = segment.style or Style()
                font = bold if style.bold else regular
                # Each character has its cell, because a whole text drifts off the grid.
                for character in segment.text:
                    at = (MARGIN + column * CELL_WIDTH, MARGIN + row * CELL_HEIGHT)
                    draw.text(at, character, font=font, fill=_colour(style.color))
                    column += cell_len(character)
        # Sixteen colours are plenty for a terminal, and keep the file small. By the usual way to
        # choose them, one green word among many white ones would be white, too.
        return image.quantize(16, method=Image.Quantize.MAXCOVERAGE)


def _colour(color: Color | None) -> tuple[int, int, int]:
    """The RGB values of a colour; the theme's own where there is none."""
    if color is None:
        return tuple(THEME.foreground_color)
    return tuple(color.get_truecolor(THEME))
