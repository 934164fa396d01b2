"""What decides about token rows: where answers in them end, which rows are trained on, and why
others are not."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

HELD_OUT = "it is a held-out row too"
REASONS_SHOWN = 5

# Servers' words for an answer that the target ended itself: OpenAI's, TGI's, Anthropic's, Cohere's
# and others'. At any other (length, max_tokens, content_filter, vLLM's abort and repetition, none
# at all) the answer was cut.
ENDED = (
    "stop",
    "stop_sequence",
    "stop_token",
    "eos",
    "eos_token",
    "end_turn",
    "end_of_turn",
    "complete",
    "completed",
    "tool_calls",
    "tool_call",
    "tool_use",
    "function_call",
)
# The keys of a row or a turn that hold such a word, and those that say it was cut.
REASONS = ("finish_reason", "finish_reasons", "finishReason", "done_reason", "stop_reason")
MARKS = ("truncated", "is_truncated")
NOT_TRUE = ("none", "", "false", "0", "0.0", "no", "null")
# Where data sets keep these keys instead.
DETAILS = ("metadata", "meta", "meta_info", "response_metadata", "choices")
# The last characters of an answer that was cut are looked for in its tokens.
TAIL = 40


def made_by() -> dict[str, str]:
    """What decides about token rows beside the data: `datasets` would reuse those of an older
    version (datasets#3297), because it looks at the names of functions and not into them."""
    packages = ("hf-specauf", "trl", "transformers", "tokenizers")
    versions = {name: version(name) for name in packages}
    # An installation from a checkout changes without its version.
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return versions | {"code": digest.hexdigest()}


def supervised_spans(mask: list[int]) -> list[tuple[int, int]]:
    """(start, stop) of each run of ones."""
    spans = []
    start = None
    for i, flag in enumerate([*mask, 0]):
        if flag and start is None:
            start = i
        elif not flag and start is not None:
            spans.append((start, i))
            start = None
    return spans


# What `prepare_rows` gives, and raw rows have not.
PREPARED = {"input_ids", "supervised", "row"}


def are_prepared(rows: Dataset, positions: int | None) -> bool:
    """Whether rows are token rows as `prepare_rows` gives them.

    Args:
        positions (`int`, *optional*): the most tokens of a document that the target has positions
            for.

    Raises:
        ValueError: they are, and a document in them is longer.
    """
    if not PREPARED <= {*rows.column_names}:
        return False
    if positions is None:
        return True
    # What somebody made by hand may lack the lengths.
    lengths = rows["length"][:] if "length" in rows.column_names else map(len, rows["input_ids"])
    for number, size in enumerate(lengths):
        # A packed row may be longer than each of its documents.
        if size > positions and "document_ids" in rows.column_names:
            size = int(np.unique(rows[number]["document_ids"], return_counts=True)[1].max())
        if size > positions:
            raise ValueError(
                f"row {number} holds a document of {size} tokens, and the target has {positions}"
                f" positions: give prepare_rows positions={positions}, or AUFTrainer the rows"
                " without their column row. Both cut documents there"
            )
    return True


def ended_itself(reason) -> bool:
    """Whether a server's word for the end of an answer says that the target ended it. At any other
    word the answer was cut."""
    # vLLM's stop_reason is the id of the token that ended it.
    if isinstance(reason, int) and not isinstance(reason, bool):
        return True
    if isinstance(reason, dict):  # SGLang's
        reason = reason.get("type")
    said = str(reason).strip().lower()
    return said in ENDED or said.isdigit()


def was_cut(part: dict) -> bool:
    """Whether a row or a turn says that its answer was cut, by `regenerate`'s key or in a server's
    words. A cut answer has no end that a drafter could learn (speculators#835)."""
    return any(_says_cut(said) for said in (part, *_details(part)))


def _details(part: dict) -> list[dict]:
    """What a row or a turn keeps apart of its answer, which may be written as JSON text."""
    found = []
    for key in DETAILS:
        value = part.get(key)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                continue
        if isinstance(value, list) and value:
            value = value[-1]
        if isinstance(value, dict):
            found.append(value)
    return found


def _says_cut(said: dict) -> bool:
    if any(str(said.get(key)).strip().lower() not in NOT_TRUE for key in MARKS):
        return True
    for key in REASONS:
        reason = said.get(key)
        if isinstance(reason, list):  # of several answers, a row's mark is about the last
            reason = reason[-1] if reason else None
        # The first that is filled tells it: beside `finish_reason: stop`, vLLM's stop_reason is the
        # very text that it stopped at.
        if reason not in (None, ""):
            return not ended_itself(reason)
    return False


def cut_turns(row: dict, turns: list[dict]) -> dict[int, dict]:
    """The assistant's turns that were cut, by their numbers."""
    answers = {i: turn for i, turn in enumerate(turns) if turn["role"] == "assistant"}
    cut = {i: turn for i, turn in answers.items() if was_cut(turn)}
    # A row's own mark is about its last answer.
    if was_cut(row):
        last = max(answers)
        cut[last] = answers[last]
    return cut


@dataclass(frozen=True)
class AnswerEnds:
    """Where the target's own words end in a supervised span, which a template has closed.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the target's.
        special (`dict[int, str]`): its special tokens. Turns end with one of these.
    """

    tokenizer: PreTrainedTokenizerBase
    special: dict[int, str]

    def of_answer(self, ids: list[int], start: int, stop: int) -> int:
        """Where a supervised span ends without the white space after its end token, or `stop`."""
        end = stop
        for i in range(stop, start, -1):
            if ids[i - 1] in self.special:
                end = i
                break
        if self.tokenizer.decode(ids[end:stop]).strip():
            return stop
        return end

    def of_words(self, ids: list[int], start: int, stop: int) -> int:
        """Where a supervised span ends without the end token behind it, and the white space behind
        that, or `stop`."""
        for i in range(stop - 1, start - 1, -1):
            if ids[i] in self.special:
                return i
            if not self.tokenizer.decode([ids[i]]).isspace():
                break
        return stop

    def of_cut(self, ids: list[int], start: int, stop: int, turn: dict) -> int:
        """Where the target's own words end in the span of an answer that was cut.

        The template wrote the rest: the end, and where the answer was cut in its thoughts the end
        of these.
        """
        end = self.of_words(ids, start, stop)
        said = turn["content"] or turn.get("reasoning_content") or turn.get("thinking") or ""
        # A server cuts between two tokens of a character too, and its half becomes U+FFFD.
        tail = said.strip().rstrip("\ufffd").strip()[-TAIL:]
        at = self.tokenizer.decode(ids[start:end]).rfind(tail)
        if at < 0:  # the template writes it in another way
            return end
        while end > start and len(self.tokenizer.decode(ids[start:end])) > at + len(tail):
            end -= 1
        return end


def longest_run(supervised: list[int]) -> int:
    """Longest run of supervised tokens in a row."""
    # 1 where a run starts, -1 behind its end.
    edges = np.diff(np.concatenate([[0], supervised, [0]]))
    lengths = np.flatnonzero(edges < 0) - np.flatnonzero(edges > 0)
    return int(np.max(lengths, initial=0))


def token_digest(ids: list[int]) -> int:
    """A hash of a token row, of 64 bits."""
    digest = hashlib.blake2b(np.asarray(ids, np.int64).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _measured(
    rows: Dataset,
    mask_token_id: int,
    vocab_size: int,
    placeholders: dict[int, str],
    num_proc: int | None,
) -> dict[str, np.ndarray]:
    """What is to be known of each encoded row, as columns, beside those that it came with."""

    def measure(batch: dict, made_by: dict) -> dict:
        # `made_by` only tells the cache which code this is.
        every = batch["input_ids"]
        return {
            "run": [longest_run(flags) for flags in batch["supervised"]],
            "tokens": [len(ids) for ids in every],
            "has_mask": [mask_token_id in ids for ids in every],
            "is_foreign": [any(not 0 <= token < vocab_size for token in ids) for ids in every],
            "digest": [token_digest(ids) for ids in every],
            "placeholder": [
                next((placeholders[token] for token in ids if token in placeholders), "")
                for ids in every
            ],
        }

    measured = rows.map(
        measure,
        batched=True,
        remove_columns=["input_ids", "supervised"],
        fn_kwargs={"made_by": made_by()},
        num_proc=num_proc,
        desc="Checking rows",
    )
    return measured.with_format("numpy")[:]


@dataclass(frozen=True)
class Findings:
    """What decides about token rows. Each array has an entry for every one of them.

    Attributes:
        dataset: number of the source it comes from, from 0.
        source: number of its raw row in that source.
        reason: why it is of no use; empty where it is of use.
        refused: whether the raw row was refused: it has no tokens at all, or some that the target
            does not have.
        keep: whether it is trained on.
        cut: whether it was cut at `max_length`.
        apart: whether it is the first of a conversation's several rows.
        thoughts: thoughts that its raw row lost, because the template's prompt is past them.
        unseen_tools: whether its raw row has tools that the template never mentions.
        unended: whether its raw row has an answer that was cut.
        has_mask: whether the mask token occurs in it.
        tokens: its length.
        run: its longest run of supervised tokens.
        digest: a hash of its tokens: rows of one digest are the same.
    """

    dataset: np.ndarray
    source: np.ndarray
    reason: np.ndarray
    refused: np.ndarray
    keep: np.ndarray
    cut: np.ndarray
    apart: np.ndarray
    thoughts: np.ndarray
    unseen_tools: np.ndarray
    unended: np.ndarray
    has_mask: np.ndarray
    tokens: np.ndarray
    run: np.ndarray
    digest: np.ndarray

    @classmethod
    def of(
        cls,
        rows: Dataset,
        sizes: list[int],
        *,
        mask_token_id: int,
        vocab_size: int,
        num_proc: int | None,
        placeholders: dict[int, str],
    ) -> "Findings":
        """Look at the encoded rows of all sources, one source after the other.

        Args:
            sizes (`list[int]`): encoded rows of each source.
            vocab_size (`int`): rows of the target's embedding.
            placeholders (`dict[int, str]`): tokens that stand for what is no text, and for what.
        """

        columns = _measured(rows, mask_token_id, vocab_size, placeholders, num_proc)
        reason = columns.pop("reason").astype(object)
        # Token rows may be another tokenizer's. A tokenizer may have more tokens than its target:
        # a [PAD] that somebody added, for instance.
        is_foreign = columns.pop("is_foreign")
        reason[is_foreign] = f"a token of it is none of the target's {vocab_size}"
        placeholder = columns.pop("placeholder").astype(object)
        refused = reason != ""
        # The smallest row that teaches anything: a token of context, an anchor and its label.
        keep = (columns["run"] >= 2) & (columns["tokens"] >= 3) & ~is_foreign
        reason[~keep & ~refused] = "fewer than 2 supervised tokens in a row"
        # A real token would look like a slot to fill.
        reason[columns["has_mask"]] = f"the mask token (id {mask_token_id}) occurs in it"
        keep &= ~columns["has_mask"]
        # The target would see an image there in serving, and sees none here.
        for i in np.flatnonzero(placeholder != ""):
            reason[i] = f"the target's placeholder of {placeholder[i]} occurs in it"
        keep &= placeholder == ""
        dataset = np.repeat(np.arange(len(sizes)), sizes)
        return cls(dataset=dataset, reason=reason, refused=refused, keep=keep, **columns)

    def leave_out(self, digests: np.ndarray) -> None:
        """Keep none of the rows with these digests: they are held out."""
        also = self.keep & np.isin(self.digest, digests)
        self.reason[also] = HELD_OUT
        self.keep[also] = False

    def doubled(self) -> dict[int, int]:
        """Kept rows that are the same as an earlier kept one -> the first such one."""
        kept = np.flatnonzero(self.keep)
        _, first, which = np.unique(self.digest[kept], return_index=True, return_inverse=True)
        firsts = kept[first][which]
        again = firsts != kept
        return dict(zip(kept[again].tolist(), firsts[again].tolist()))

    def name(self, index: int) -> str:
        """`row 7`, and of which source where there are several."""
        name = f"row {self.source[index]}"
        if self.dataset[-1] > 0:
            name += f" of source {self.dataset[index] + 1}"
        return name

    def first(self, flags: np.ndarray) -> str:
        """The name of the first row that has a flag."""
        return self.name(int(np.flatnonzero(flags)[0]))

    def reasons(self, number: int | None = None) -> str:
        """`it has no assistant turn (3, first: row 7), ...`, the most frequent first; of one source
        or of all."""
        rows = np.flatnonzero(self.reason != "")
        if number is not None:
            rows = rows[self.dataset[rows] == number]
        counts, first = Counter(self.reason[rows]), {}
        for index in rows:
            first.setdefault(self.reason[index], index)
        words = [
            f"{reason} ({times}, first: {self.name(first[reason])})"
            for reason, times in counts.most_common(REASONS_SHOWN)
        ]
        if len(counts) > REASONS_SHOWN:
            words.append("and other reasons")
        return ", ".join(words)
