"""What the doctor finds: a line for each check, in the order of a table.

A check is a function of a patient. It returns one `Line`. What it raises is a FAIL in the words of
the error, because this package's errors name what mends them.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

PASS, WARN, FAIL = "PASS", "WARN", "FAIL"
# What cannot be asked, because something that it needs has failed, or does not apply.
SKIP = "SKIP"


@dataclass(frozen=True)
class Line:
    """What one check found.

    Attributes:
        verdict (`str`): PASS, WARN (it may cost acceptance), FAIL (it does), or SKIP.
        says (`str`): what was found, with its number.
        mend (`str`): the one key or command to change; empty where nothing is to be mended.
    """

    verdict: str
    says: str
    mend: str = ""


@dataclass(frozen=True)
class Finding(Line):
    """A line, and the name of its check."""

    check: str = ""

    def record(self) -> dict[str, str]:
        """What `--json` prints of it."""
        return asdict(self)


@dataclass(frozen=True)
class Check:
    """An entry of a table of checks.

    Attributes:
        ask (`Callable`): a patient -> its line.
        needs (`tuple[str, ...]`): checks that must not have failed or been skipped.
    """

    ask: Callable[[Any], Line]
    needs: tuple[str, ...] = ()


def examine(patient, checks: dict[str, Check]) -> Iterator[Finding]:
    """Ask every check of a table -> what it found, one by one.

    Args:
        patient: what the checks look at.
        checks (`dict[str, Check]`): by name, in order.
    """
    missing: set[str] = set()
    for name, check in checks.items():
        lacking = [need for need in check.needs if need in missing]
        if lacking:
            line = Line(SKIP, f"needs: {', '.join(lacking)}")
        else:
            line = _asked(patient, check)
        if line.verdict in (FAIL, SKIP):
            missing.add(name)
        yield Finding(line.verdict, line.says, line.mend, name)


def _asked(patient, check: Check) -> Line:
    try:
        return check.ask(patient)
    except Exception as error:  # any fault of a patient is a finding
        words = " ".join(str(error).split()) or type(error).__name__
        if not isinstance(error, ValueError | TypeError | OSError):
            words = f"{type(error).__name__}: {words}"
        return Line(FAIL, words)
