"""A raw row through the target's own chat template -> token ids, and which of them the assistant
wrote."""

from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from .messages import UnusableRow, chat_messages, row_format, row_text, row_tools, text_ids

# Token ids of a row, and its supervised mask of the same length: 1 where the target's words are.
Encoded = tuple[list[int], list[int]]


def _ids_in_spans(
    text: str, spans: list[tuple[int, int]], tokenizer: PreTrainedTokenizerBase
) -> Encoded:
    """The tokens of a text. Supervised are those that begin inside of one of the spans of
    characters."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = []
    for first, _ in encoded["offset_mapping"]:
        mask.append(int(any(start <= first < stop for start, stop in spans)))
    return encoded["input_ids"], mask


def _supervised_spans(mask: list[int]) -> list[tuple[int, int]]:
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


class RowEncoder:
    """Turns raw rows into token rows; a picklable callable for `Dataset.map(batched=True,
    with_indices=True)`.

    Each token row comes with the `reason` it is of no use (empty: none), the number `source` of its
    raw row, and whether it was `cut` at the row length.

    Args:
        columns (`list[str]`): of the raw rows.
        max_length (`int`): most tokens of a token row.
        chat_template_kwargs (`dict`, *optional*): for the chat template.

    Raises:
        ValueError: the columns are unknown, or need what the tokenizer does not have.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        columns: list[str],
        max_length: int,
        chat_template_kwargs: dict | None,
    ):
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.kwargs = chat_template_kwargs or {}
        self.kind = row_format(columns)
        # Turns end with one of these.
        self.special = {
            token for token, content in tokenizer.added_tokens_decoder.items() if content.special
        }
        if self.kind == "tokens" and "supervised" not in columns:
            raise ValueError(
                "token rows need a `supervised` column beside `input_ids`: 1 where the target's"
                " words are, else 0"
            )
        self.template = tokenizer.chat_template
        if self.template is None and self.kind not in ("tokens", "text", "prompt_completion"):
            raise ValueError(
                "the rows are conversations, but the target's tokenizer has no chat template: give"
                " `text` rows"
            )
        self.by_prefix = False
        self.prompted: list[int] = []
        if self.template is not None and self.kind != "text":
            self.template = self._training_template()
            # Without markers transformers returns a mask of zeros and says nothing (marin#7237).
            self.by_prefix = not has_generation_markers(self.template)
            self.prompted = self._generation_prompt()

    def _training_template(self) -> str:
        """The chat template, with markers added by trl where it knows the template."""
        try:
            known = get_training_chat_template(self.tokenizer)
        except ValueError:  # trl does not know it; the author may have put markers in
            known = None
        return known or self.tokenizer.get_chat_template()

    def _generation_prompt(self) -> list[int]:
        """What the template itself writes at the start of an answer, e.g. an empty thought where
        thinking is off."""
        asked = [{"role": "user", "content": "a"}]
        try:
            before = self._render(asked, self.kwargs, with_prompt=False)
            after = self._render(asked, self.kwargs, with_prompt=True)
        except Exception:
            # The template does not like this conversation (it wants a system turn, for instance).
            # If it does not like the rows either, each of them will say so.
            return []
        if not after.startswith(before):
            return []
        return self.tokenizer(after[len(before) :], add_special_tokens=False)["input_ids"]

    def _render(self, turns: list[dict], kwargs: dict, with_prompt: bool) -> str:
        """A conversation as text, with the generation prompt at its end or without."""
        return self.tokenizer.apply_chat_template(
            turns,
            chat_template=self.template,
            tokenize=False,
            add_generation_prompt=with_prompt,
            **kwargs,
        )

    def __call__(self, batch: dict, indices: list[int]) -> dict:
        rows = {"input_ids": [], "supervised": [], "reason": [], "source": [], "cut": []}
        size = self.max_length
        is_text = self.kind == "text"
        for i, index in enumerate(indices):
            # Arrow fills the columns that a row does not have with nulls.
            row = {column: values[i] for column, values in batch.items() if values[i] is not None}
            ids, mask, reason = self._encode_or_say_why(row)
            # Text goes on in the next token row. A conversation is cut.
            starts = range(0, max(len(ids), 1), size) if is_text else [0]
            for start in starts:
                rows["input_ids"].append(ids[start : start + size])
                rows["supervised"].append(mask[start : start + size])
                rows["reason"].append(reason)
                rows["source"].append(index)
                rows["cut"].append(len(ids) > size and not is_text)
        return rows

    def _encode_or_say_why(self, row: dict) -> tuple[list[int], list[int], str]:
        """(ids, mask, ""), or ([], [], reason) where the row is of no use."""
        try:
            ids, mask = self.encode(row)
        except UnusableRow as error:
            return [], [], str(error)
        if not any(mask):
            return [], [], "no token of it is supervised"
        if self.kind != "text" and not any(mask[: self.max_length]):
            return [], [], f"its prompt alone fills the {self.max_length} tokens of a row"
        return ids, mask, ""

    def encode(self, row: dict) -> Encoded:
        """Token ids and the supervised mask of one row, uncut.

        Raises:
            UnusableRow: the row holds nothing to train on, or the template refuses it.
        """
        # Not `self.kind`: rows of several formats may lie in one file.
        try:
            kind = row_format(list(row))
        except ValueError:
            raise UnusableRow("its columns are empty") from None
        if kind == "tokens":
            if len(row["input_ids"]) != len(row.get("supervised", ())):
                raise UnusableRow("its input_ids and supervised differ in length")
            return row["input_ids"], row["supervised"]
        if kind == "text":
            ids = text_ids(self.tokenizer, row_text(row, "text"))
            mask = [1] * len(ids)
        elif kind == "prompt_completion" and self.template is None:
            ids, mask = self._completion(row)
        else:
            return self._conversation(row)
        if not ids:
            raise UnusableRow("its text is empty")
        # Texts are written without an end token, and what the target writes ends with one.
        eos = self.tokenizer.eos_token_id
        if eos is not None and ids[-1] != eos:
            ids, mask = [*ids, eos], [*mask, 1]
        return ids, mask

    def _completion(self, row: dict) -> Encoded:
        """A prompt and its completion as one text, for a target without a chat template."""
        prompt = row_text(row, "prompt")
        text = prompt + row_text(row, "completion")
        ids, mask = _ids_in_spans(text, [(len(prompt), len(text))], self.tokenizer)
        whole = text_ids(self.tokenizer, text)
        return whole, [0] * (len(whole) - len(ids)) + mask

    def _conversation(self, row: dict) -> Encoded:
        turns, tools = chat_messages(row), row_tools(row)
        if not any(turn["role"] == "assistant" for turn in turns):
            raise UnusableRow("it has no assistant turn")
        # A template that knows no calls would leave them out and say nothing.
        if any("tool_calls" in turn for turn in turns) and "tool_calls" not in self.template:
            raise UnusableRow("the chat template does not render tool calls")
        kwargs = self.kwargs | ({"tools": tools} if tools else {})
        encode = self._encode_by_prefix if self.by_prefix else self._encode_by_markers
        try:
            ids, mask = encode(turns, kwargs)
        except UnusableRow:
            raise
        except Exception as error:  # a template raises what its author likes
            said = " ".join(str(error).split())[:120]
            raise UnusableRow(f"the chat template failed: {said}") from error
        # What the template writes is not the target's answer, and drafting it is no skill.
        for start, stop in _supervised_spans(mask):
            answer = self._end_of_prompt(ids, start)
            mask[start:answer] = [0] * (answer - start)
            end = self._end_of_answer(ids, start, stop)
            mask[end:stop] = [0] * (stop - end)
        return ids, mask

    def _encode_by_markers(self, turns: list[dict], kwargs: dict) -> Encoded:
        """A conversation whose template marks by `{% generation %}` what the assistant wrote."""
        out = self.tokenizer.apply_chat_template(
            turns,
            chat_template=self.template,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **kwargs,
        )
        return list(out["input_ids"]), list(out["assistant_masks"])

    def _encode_by_prefix(self, turns: list[dict], kwargs: dict) -> Encoded:
        """A conversation whose template has no markers: the assistant wrote what each of its turns
        adds to the text."""
        text = self._render(turns, kwargs, with_prompt=False)
        spans = []
        for i, turn in enumerate(turns):
            # Templates refuse to render no turn at all. So what a template writes before a first
            # assistant turn cannot be told from that turn, and neither is supervised.
            if turn["role"] != "assistant" or i == 0:
                continue
            before = self._render(turns[:i], kwargs, with_prompt=True)
            through = self._render(turns[: i + 1], kwargs, with_prompt=False)
            if not (text.startswith(through) and through.startswith(before)):
                raise UnusableRow(
                    "the chat template renders a conversation's beginning differently once it goes"
                    " on, so the assistant's tokens cannot be told apart: use a template with {%"
                    " generation %} markers"
                )
            spans.append((len(before), len(through)))
        # The template has written the begin token into the text, if there is one.
        return _ids_in_spans(text, spans, self.tokenizer)

    def _end_of_prompt(self, ids: list[int], start: int) -> int:
        """Where the generation prompt ends that covers the beginning of a supervised span, or
        `start` if none does.

        Serving hands over to the target only after all of that prompt. It may begin before the
        span, because markers enclose what its author took for the answer.
        """
        size = len(self.prompted)
        for begin in range(start, max(start - size, -1), -1):
            if ids[begin : begin + size] == self.prompted:
                return begin + size
        return start

    def _end_of_answer(self, ids: list[int], start: int, stop: int) -> int:
        """Where a supervised span ends without the white space after its end token, or `stop`."""
        end = stop
        for i in range(stop, start, -1):
            if ids[i - 1] in self.special:
                end = i
                break
        if self.tokenizer.decode(ids[end:stop]).strip():
            return stop
        return end
