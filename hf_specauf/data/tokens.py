"""A raw row through the target's own chat template -> token ids, and which of them the assistant
wrote."""

from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from .sources import UnusableRow, chat_messages, row_format, row_text, row_tools


def _chat_ids(turns: list[dict], tokenizer: PreTrainedTokenizerBase, template: str, kwargs: dict):
    """Token ids of a conversation and which of them the assistant wrote, by the template's
    generation markers."""
    out = tokenizer.apply_chat_template(
        turns,
        chat_template=template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        **kwargs,
    )
    return list(out["input_ids"]), list(out["assistant_masks"])


def _chat_ids_by_prefix(
    turns: list[dict], tokenizer: PreTrainedTokenizerBase, template: str, kwargs: dict
):
    """The same for templates without markers: the assistant wrote what each of its turns adds to
    the rendering."""

    def render(turns: list[dict], prompt: bool) -> str:
        return tokenizer.apply_chat_template(
            turns, chat_template=template, tokenize=False, add_generation_prompt=prompt, **kwargs
        )

    text, spans = render(turns, False), []
    for i, turn in enumerate(turns):
        # templates refuse an empty conversation: of a first turn, their own words cannot be told
        # from the assistant's
        if turn["role"] == "assistant" and i:
            before = render(turns[:i], True)
            through = render(turns[: i + 1], False)
            if not (text.startswith(through) and through.startswith(before)):
                raise UnusableRow(
                    "the chat template renders a conversation's beginning differently once it goes"
                    " on, so the assistant's tokens cannot be told apart: use a template with {%"
                    " generation %} markers"
                )
            spans.append((len(before), len(through)))
    return _ids_in_spans(text, spans, tokenizer)


def _spans(mask: list[int]) -> list[tuple[int, int]]:
    """(start, stop) of each run of ones."""
    edges = [i for i, (a, b) in enumerate(zip([0, *mask], [*mask, 0])) if a != b]
    return list(zip(edges[::2], edges[1::2]))


def _ids_in_spans(text: str, spans: list[tuple[int, int]], tokenizer, special: bool = False):
    """Token ids of a text, and which of them begin inside one of the spans of characters."""
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    mask = [int(any(a <= start < b for a, b in spans)) for start, _ in encoded["offset_mapping"]]
    return encoded["input_ids"], mask


class RowEncoder:
    """Turns raw rows into token rows; a picklable callable for `Dataset.map(batched=True,
    with_indices=True)`.

    Each row comes with the `reason` it is of no use (empty: none), the number `source` of its raw
    row, and whether it was `cut` at the row length.
    """

    def __init__(
        self, tokenizer, columns: list[str], max_length: int, chat_template_kwargs: dict | None
    ):
        self.tokenizer, self.max_length = tokenizer, max_length
        self.kwargs = chat_template_kwargs or {}
        self.kind = row_format(columns)
        self.special = {
            token for token, content in tokenizer.added_tokens_decoder.items() if content.special
        }
        self.template, self.by_prefix, self.prompted = tokenizer.chat_template, False, []
        if self.kind == "tokens" and "supervised" not in columns:
            raise ValueError(
                "token rows need a `supervised` column beside `input_ids`: 1 where the target's"
                " words are, else 0"
            )
        if self.template is None and self.kind not in ("tokens", "text", "prompt_completion"):
            raise ValueError(
                "the rows are conversations, but the target's tokenizer has no chat template: give"
                " `text` rows"
            )
        if self.template is not None and self.kind != "text":
            try:
                self.template = (
                    get_training_chat_template(tokenizer) or tokenizer.get_chat_template()
                )
            except ValueError:  # trl knows no training version of it; markers may still be in it
                self.template = tokenizer.get_chat_template()
            # without markers transformers returns an all-zero mask, silently (marin#7237)
            self.by_prefix = not has_generation_markers(self.template)
            self.prompted = self._generation_prompt()

    def _generation_prompt(self) -> list[int]:
        """What the template itself writes at the start of an answer, e.g. an empty thought where
        thinking is off."""
        asked, texts = [{"role": "user", "content": "a"}], []
        try:
            for prompt in (False, True):
                texts.append(
                    self.tokenizer.apply_chat_template(
                        asked,
                        chat_template=self.template,
                        tokenize=False,
                        add_generation_prompt=prompt,
                        **self.kwargs,
                    )
                )
        except Exception:  # rows will say what the template does not like
            return []
        if not texts[1].startswith(texts[0]):
            return []
        return self.tokenizer(texts[1][len(texts[0]) :], add_special_tokens=False)["input_ids"]

    def __call__(self, batch: dict, indices: list[int]) -> dict:
        rows = {"input_ids": [], "supervised": [], "reason": [], "source": [], "cut": []}
        for i, index in enumerate(indices):
            row = {column: values[i] for column, values in batch.items() if values[i] is not None}
            ids, mask, reason = [], [], ""
            try:
                ids, mask = self.encode(row)
                if not any(mask):
                    reason = "no token of it is supervised"
                elif self.kind != "text" and not any(mask[: self.max_length]):
                    reason = f"its prompt alone fills the {self.max_length} tokens of a row"
            except UnusableRow as error:
                reason = str(error)
            if reason:
                ids, mask = [], []
            size = self.max_length
            # text goes on in the next row, a conversation is cut
            stop = max(len(ids), 1) if self.kind == "text" else 1
            for start in range(0, stop, size):
                rows["input_ids"].append(ids[start : start + size])
                rows["supervised"].append(mask[start : start + size])
                rows["reason"].append(reason)
                rows["source"].append(index)
                rows["cut"].append(self.kind != "text" and len(ids) > size)
        return rows

    def encode(self, row: dict) -> tuple[list[int], list[int]]:
        """Token ids and the supervised mask of one row, uncut.

        Raises:
            UnusableRow: the row holds nothing to train on, or the template refuses it.
        """
        try:
            kind = row_format(list(row))
        except ValueError:
            raise UnusableRow("its columns are empty") from None
        eos = self.tokenizer.eos_token_id
        if kind == "tokens":
            if len(row["input_ids"]) != len(row.get("supervised", ())):
                raise UnusableRow("its input_ids and supervised differ in length")
            return row["input_ids"], row["supervised"]
        if kind == "text":
            ids, mask = self.tokenizer(row_text(row, "text"))["input_ids"], None
        elif kind == "prompt_completion" and self.template is None:
            prompt, completion = row_text(row, "prompt"), row_text(row, "completion")
            ids, mask = _ids_in_spans(
                prompt + completion, [(len(prompt), 10**9)], self.tokenizer, special=True
            )
        else:
            return self._conversation(row)
        if not ids:
            raise UnusableRow("its text is empty")
        mask = [1] * len(ids) if mask is None else mask
        return (ids + [eos], mask + [1]) if eos is not None and ids[-1] != eos else (ids, mask)

    def _conversation(self, row: dict) -> tuple[list[int], list[int]]:
        turns, tools = chat_messages(row), row_tools(row)
        if not any(turn["role"] == "assistant" for turn in turns):
            raise UnusableRow("it has no assistant turn")
        if any("tool_calls" in turn for turn in turns) and "tool_calls" not in self.template:
            raise UnusableRow("the chat template does not render tool calls")
        kwargs = self.kwargs | ({"tools": tools} if tools else {})
        try:
            encode = _chat_ids_by_prefix if self.by_prefix else _chat_ids
            ids, mask = encode(turns, self.tokenizer, self.template, kwargs)
        except UnusableRow:
            raise
        except Exception as error:
            raise UnusableRow(
                f"the chat template failed: {' '.join(str(error).split())[:120]}"
            ) from error
        # what the template writes is not the target's answer, and drafting it is no skill
        prompted, size = self.prompted, len(self.prompted)
        for start, stop in _spans(mask):
            for known in range(size):
                if start >= known and ids[start - known : start - known + size] == prompted:
                    mask[start : start - known + size] = [0] * (size - known)
                    break
            # nor the newline after its end token
            end = next((i for i in range(stop, start, -1) if ids[i - 1] in self.special), stop)
            if not self.tokenizer.decode(ids[end:stop]).strip():
                mask[end:stop] = [0] * (stop - end)
        return ids, mask
