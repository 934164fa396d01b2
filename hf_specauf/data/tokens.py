"""A raw row through the target's own chat template -> token ids, and which of them the assistant
wrote."""

from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from .findings import AnswerEnds, cut_turns, made_by, supervised_spans, was_cut
from .messages import (
    ChatTemplate,
    UnusableRow,
    apply_template,
    chat_messages,
    row_format,
    row_text,
    row_tools,
    split_thought,
    text_ids,
)

# Token ids of a row, and its supervised mask of the same length: 1 where the target's words are.
Encoded = tuple[list[int], list[int]]


@dataclass
class EncodedRow:
    """What one raw row became.

    Attributes:
        parts: its token rows. A template may write earlier turns differently once a conversation
            goes on. One row then cannot hold all answers after what serving writes before them.
        answers: of a conversation, the numbers of the turns that its supervised spans are.
        cut: whether parts were left out because their prompts are too long.
        apart: whether the answers of its conversation are in several parts.
        thoughts: answers whose thought was left out, because the template's prompt is past it.
        unseen_tools: whether it has tools that the template never mentions.
        unended: whether an answer of it was cut, so that no end of it is supervised.
    """

    parts: list[Encoded]
    answers: list[int] = field(default_factory=list)
    cut: bool = False
    apart: bool = False
    thoughts: int = 0
    unseen_tools: bool = False
    unended: bool = False


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


# Of what `RowEncoder` returns.
COLUMNS = (
    "input_ids",
    "supervised",
    "reason",
    "source",
    "cut",
    "apart",
    "thoughts",
    "unseen_tools",
    "unended",
)


class RowEncoder:
    """Turns raw rows into token rows; a picklable callable for `Dataset.map(batched=True,
    with_indices=True)`.

    Each token row comes with the `reason` it is of no use (empty: none), the number `source` of its
    raw row, and whether it was `cut` at the row length. The first of a raw row says whether its
    answers stand `apart`, how many `thoughts` were left out, and whether it has `unseen_tools` or
    an `unended` answer.

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
            token: added.content
            for token, added in tokenizer.added_tokens_decoder.items()
            if added.special
        }
        self.ends = AnswerEnds(tokenizer, self.special)
        if self.kind == "tokens" and "supervised" not in columns:
            raise ValueError(
                "token rows need a `supervised` column beside `input_ids`: 1 where the target's"
                " words are, else 0"
            )
        self.made_by = made_by()
        self.has_template = tokenizer.chat_template is not None
        if not self.has_template and self.kind not in ("tokens", "text", "prompt_completion"):
            raise ValueError(
                "the rows are conversations, but the target's tokenizer has no chat template: give"
                " `text` rows"
            )
        # By whether a row has tools.
        self.templates: dict[bool, ChatTemplate] = {}
        if self.has_template and self.kind != "text":
            for with_tools in (False, True):
                try:
                    template = ChatTemplate(tokenizer, self.kwargs, with_tools)
                except ValueError:  # there are several by name, and none of them is the default
                    continue
                self.templates[with_tools] = template

    def __call__(self, batch: dict, indices: list[int]) -> dict:
        rows = {name: [] for name in COLUMNS}
        for i, index in enumerate(indices):
            # Arrow fills the columns that a row does not have with nulls.
            row = {column: values[i] for column, values in batch.items() if values[i] is not None}
            reason = ""
            try:
                found = self._cut(self.encode(row))
            except UnusableRow as error:
                found, reason = EncodedRow([([], [])]), str(error)
            for number, (ids, mask) in enumerate(found.parts):
                is_first, is_last = number == 0, number == len(found.parts) - 1
                rows["input_ids"].append(ids[: self.max_length])
                rows["supervised"].append(mask[: self.max_length])
                rows["reason"].append(reason)
                rows["source"].append(index)
                rows["cut"].append(len(ids) > self.max_length or (is_last and found.cut))
                rows["apart"].append(found.apart and is_first)
                rows["thoughts"].append(found.thoughts if is_first else 0)
                rows["unseen_tools"].append(found.unseen_tools and is_first)
                rows["unended"].append(found.unended and is_first)
        return rows

    def _cut(self, found: EncodedRow) -> EncodedRow:
        """Text in rows of `max_length`, and a conversation's parts that have an answer in theirs.

        Raises:
            UnusableRow: not one token would be supervised.
        """
        size = self.max_length
        if not any(any(mask) for _, mask in found.parts):
            raise UnusableRow("no token of it is supervised")
        if self.kind == "text":
            # Text goes on in the next token row. A conversation is cut.
            [(ids, mask)] = found.parts
            starts = range(0, len(ids), size)
            parts = [(ids[at : at + size], mask[at : at + size]) for at in starts]
            return replace(found, parts=parts)
        parts = [(ids, mask) for ids, mask in found.parts if any(mask[:size])]
        if not parts:
            raise UnusableRow(f"its prompt alone fills the {size} tokens of a row")
        cut = len(parts) < len(found.parts)
        return replace(found, parts=parts, cut=cut)

    def encode(self, row: dict) -> EncodedRow:
        """Token ids and the supervised mask of one row, uncut. A conversation may end after the
        first answer whose prompt leaves no room for it in a token row.

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
            ids, mask = row["input_ids"], row["supervised"]
            return self._text(row, ids, mask)
        if kind == "text":
            ids = text_ids(self.tokenizer, row_text(row, "text"))
            mask = [1] * len(ids)
        elif kind == "prompt_completion" and not self.has_template:
            ids, mask = self._completion(row)
        else:
            return self._conversation(row)
        if not ids:
            raise UnusableRow("its text is empty")
        # Texts are written without an end token, and what the target writes ends with one.
        eos = self.tokenizer.eos_token_id
        if eos is not None and ids[-1] != eos:
            ids, mask = [*ids, eos], [*mask, 1]
        return self._text(row, ids, mask)

    def _text(self, row: dict, ids: list[int], mask: list[int]) -> EncodedRow:
        """A row of tokens or text; where it was cut, its end token is not supervised."""
        spans = supervised_spans(mask)
        if not (spans and was_cut(row)):
            return EncodedRow([(ids, mask)])
        start, stop = spans[-1]
        end = self.ends.of_words(ids, start, stop)
        return EncodedRow([(ids, mask[:end] + [0] * (stop - end) + mask[stop:])], unended=True)

    def _completion(self, row: dict) -> Encoded:
        """A prompt and its completion as one text, for a target without a chat template."""
        prompt = row_text(row, "prompt")
        text = prompt + row_text(row, "completion")
        ids, mask = _ids_in_spans(text, [(len(prompt), len(text))], self.tokenizer)
        whole = text_ids(self.tokenizer, text)
        return whole, [0] * (len(whole) - len(ids)) + mask

    def _conversation(self, row: dict) -> EncodedRow:
        turns, tools = chat_messages(row), row_tools(row)
        if not any(turn["role"] == "assistant" for turn in turns):
            raise UnusableRow("it has no assistant turn")
        template = self.templates.get(tools is not None)
        if template is None:
            raise UnusableRow(
                "the tokenizer has several chat templates, and none called default: name one so in"
                " a copy of its folder"
            )
        # A template that knows no calls would leave them out and say nothing.
        if any("tool_calls" in turn for turn in turns) and "tool_calls" not in template.serving:
            raise UnusableRow("the chat template does not render tool calls")
        try:
            found = self._answers(template, turns, tools)
        except UnusableRow:
            raise
        except Exception as error:  # a template raises what its author likes
            said = " ".join(str(error).split())[:120]
            raise UnusableRow(f"the chat template failed: {said}") from error
        cut = cut_turns(row, turns)
        self._leave_ends_out(found, cut)
        found.unended = bool(cut)
        found.unseen_tools = tools is not None and "tools" not in template.serving
        return found

    def _leave_ends_out(self, found: EncodedRow, cut: dict[int, dict]) -> None:
        """Supervise no end of an answer that was cut.

        Args:
            cut (`dict[int, dict]`): the turns that were cut, by their numbers.
        """
        if not cut:
            return
        spans = [(ids, mask, span) for ids, mask in found.parts for span in supervised_spans(mask)]
        turns = [cut.get(number) for number in found.answers]
        if len(turns) != len(spans):
            # Which span is whose is not known, so none of them teaches an end. Without a content,
            # only a special token is taken for one.
            turns = [{"content": ""}] * len(spans)
        for (ids, mask, (start, stop)), turn in zip(spans, turns):
            if turn is not None:
                end = self.ends.of_cut(ids, start, stop, turn)
                mask[end:stop] = [0] * (stop - end)

    def _answers(
        self, template: ChatTemplate, turns: list[dict], tools: list[dict] | None
    ) -> EncodedRow:
        """A conversation, each answer after the very ids that serving gives to the target."""
        turns = list(turns)
        prompts: dict[int, tuple[str, list[int]]] = {}  # text and ids, by the answer's turn
        found = EncodedRow([])
        for i, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            text = template.prompt(turns[:i], tools)
            if text is None:
                continue
            if template.thinking_is_off(text):
                # The target would not have written that thought.
                thought, turns[i] = split_thought(turn)
                found.thoughts += bool(thought)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            prompts[i] = text, ids
            if len(ids) >= self.max_length:  # no token row can hold what comes after it
                break
        found.answers = list(prompts)
        whole = self._whole(template, turns, tools, prompts)
        if whole is not None:
            found.parts = [whole]
        else:
            found.parts = self._apart(template, turns, tools, prompts)
            found.apart = len(found.parts) > 1
        return found

    def _whole(
        self,
        template: ChatTemplate,
        turns: list[dict],
        tools: list[dict] | None,
        prompts: dict[int, tuple[str, list[int]]],
    ) -> Encoded | None:
        """The conversation in one row, if that holds every answer after its prompt."""
        text = template.render(turns, tools, template=template.marked)
        spans = []
        for i, (prompt, _) in prompts.items():
            through = template.render(turns[: i + 1], tools, template=template.marked)
            if template.marked is not None:
                # Some templates end the last turn otherwise than the turns before.
                through = self._without_end_token(through)
            elif not through.startswith(prompt):
                return None
            if not text.startswith(through):
                return None
            spans.append((len(prompt), len(through)))
        if template.marked is not None:
            ids, mask = self._by_markers(template, turns, tools)
        else:
            # The assistant wrote what each of its turns adds to the text. The template has written
            # the begin token into it, if there is one.
            ids, mask = _ids_in_spans(text, spans, self.tokenizer)
        sizes = [len(before) for _, before in prompts.values()]
        if any(ids[: len(before)] != before for _, before in prompts.values()):
            return None
        # What the template writes is not the target's answer, and drafting it is no skill. Markers
        # enclose what their author took for the answer, an empty thought for instance.
        for start, stop in supervised_spans(mask):
            answer = max((size for size in sizes if size < stop), default=stop)
            answer = max(answer, start)
            mask[start:answer] = [0] * (answer - start)
            end = self.ends.of_answer(ids, answer, stop)
            mask[end:stop] = [0] * (stop - end)
        return ids, mask

    def _by_markers(
        self, template: ChatTemplate, turns: list[dict], tools: list[dict] | None
    ) -> Encoded:
        """A conversation whose template marks by `{% generation %}` what the assistant wrote."""
        out = apply_template(
            self.tokenizer,
            turns,
            tools,
            template.marked,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **self.kwargs,
        )
        return list(out["input_ids"]), list(out["assistant_masks"])

    def _without_end_token(self, text: str) -> str:
        """A text without the special token that ends it, and without white space around that."""
        text = text.rstrip()
        for token in self.special.values():
            if text.endswith(token):
                return text.removesuffix(token).rstrip()
        return text

    def _apart(
        self,
        template: ChatTemplate,
        turns: list[dict],
        tools: list[dict] | None,
        prompts: dict[int, tuple[str, list[int]]],
    ) -> list[Encoded]:
        """Each answer after its prompt, in as few rows as hold them unchanged."""
        parts: list[Encoded] = []
        for i, (prompt, before) in prompts.items():
            answer = template.answer(turns[: i + 1], tools, prompt)
            ids = self.tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]
            size = len(before)
            if ids[:size] != before:
                # A token would span the place where serving hands over.
                ids = before + self.tokenizer(answer, add_special_tokens=False)["input_ids"]
            mask = [0] * size + [1] * (len(ids) - size)
            end = self.ends.of_answer(ids, size, len(ids))
            mask[end:] = [0] * (len(ids) - end)
            if parts:
                earlier, supervised = parts[-1]
                # Without what the template writes behind an answer.
                stop = supervised_spans(supervised)[-1][1]
                if before[:stop] == earlier[:stop]:  # then that row goes on
                    mask[:stop] = supervised[:stop]
                    parts.pop()
            parts.append((ids, mask))
        return parts
