"""One HTML page about an evaluation: nothing is fetched, everything is in it, the verdict first."""

from html import escape

from ..serving.acceptance import TAU_DEFINITION, number
from .plots import PICTURES, svg
from .table import COLUMNS, counts, details, table_rows, verdict

# Light and dark follow the reader's system. Wide tables scroll inside themselves.
CSS = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --faint: #6b7280;
  --line: #d9dde3; --box: #f4f6f9; --key: #1f5fa8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --paper: #14171c; --faint: #9aa3b0;
  --line: #343a44; --box: #1d2229; --key: #7db6ef; } }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.2rem 4rem; color: var(--ink);
  background: var(--paper); font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.4rem 0 .6rem; }
.about { color: var(--faint); margin: 0 0 1.4rem; overflow-wrap: anywhere; }
.verdict { background: var(--box); border-left: 4px solid var(--key); padding: .8rem 1.1rem; }
.verdict p { margin: .3rem 0; }
.verdict p:first-child { font-size: 1.25rem; font-weight: 600; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { text-align: left; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { color: var(--faint); font-weight: 500; }
.pictures { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.pictures svg { width: 100%; height: auto; }
td.long { overflow-wrap: anywhere; }
"""


def page(record: dict) -> str:
    """The page of a record from `evaluation_record`."""
    target = record["target"]["name_or_path"]
    drafter = record.get("drafter", {}).get("name_or_path")
    conditions = record["conditions"]
    about = (
        f"{len(record['prompts'])} prompts of {conditions['prompts']}, temperature"
        f" {conditions.get('temperature')}, at most {conditions.get('max_new_tokens')} new tokens,"
        f" {conditions['dtype']}, {conditions['hardware']}"
    )
    title = f"{drafter} on {target}" if drafter else f"A drafter on {target}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="about">{escape(about)}</p>',
        f'<div class="verdict">{paragraphs(verdict(record))}</div>',
        "<h2>Ways to decode</h2>",
        table(COLUMNS, table_rows(record)),
        "<h2>Pictures</h2>",
        f'<div class="pictures">{"".join(svg(name, record) for name in PICTURES)}</div>',
        "<h2>More about tau</h2>",
        paragraphs([*details(record), f"{TAU_DEFINITION}."]),
        places(record),
        "<h2>Are the outputs the target's own?</h2>",
        differences(record),
        "<h2>Conditions</h2>",
        table(("", ""), facts(record)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def paragraphs(lines: list[str]) -> str:
    """Each line as a paragraph."""
    return "".join(f"<p>{escape(line)}</p>" for line in lines)


def table(columns: tuple[str, ...], rows: list[list]) -> str:
    """A table, its cells as text."""
    head = ""
    if any(columns):
        head = "<tr>" + "".join(f"<th>{escape(column)}</th>" for column in columns) + "</tr>"
    body = ""
    for row in rows:
        cells = "".join(f'<td class="long">{escape(str(cell))}</td>' for cell in row)
        body += f"<tr>{cells}</tr>"
    return f'<div class="wide"><table>{head}{body}</table></div>'


def places(record: dict) -> str:
    """tau by context length and by position in the answer."""
    rows = []
    for key, says in (("by_position", "of the answer"), ("by_context", "of prompt and answer")):
        for one in record["tau"][key]:
            where = f"up to {one['upto']} tokens {says}"
            rows.append([where, number(one["tau"]), one["passes"], one["prompts"]])
    return table(("before the pass", "tau", "passes", "prompts"), rows)


def differences(record: dict) -> str:
    """The first differences of every way."""
    rows = []
    for name, way in record["ways"].items():
        if name == "plain":
            continue
        gaps = way["largest_gaps"] or {}
        found = [f"{gaps[key]:.3g}" if gaps.get(key) is not None else "" for key in GAPS]
        rows.append([way["says"], counts(way["lossless"]), *found])
    said = (
        "Every output is compared with plain decoding's, token by token. Where one parts from it,"
        " the target's own logits tell whether two of them were closer than rounding (a near-tie)."
    )
    columns = ("way", "outputs", *GAPS.values())
    return paragraphs([said]) + table(columns, rows)


GAPS = {
    "top2_gap": "largest gap of the two best logits",
    "below_best": "a committed token below the best, at most",
}


# of a record that its page lists, with what is written before their keys
PARTS = {"conditions": "", "measuring": "", "target": "target: ", "drafter": "drafter: "}


def facts(record: dict) -> list[list]:
    """What the figures were found under."""
    found = []
    for part, prefix in PARTS.items():
        for key, value in record.get(part, {}).items():
            if value not in (None, {}):
                found.append([f"{prefix}{key.replace('_', ' ')}", value])
    for key, value in record["environment"]["packages"].items():
        found.append([f"package: {key}", value])
    return found
