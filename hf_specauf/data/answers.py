"""Answers written by the target here, by continuous batching or in plain batches."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from functools import partial

import torch
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl.chat_template_utils import add_response_schema, parse_response

from ..identity import embedding_rows, innermost
from ..identity.multimodal import placeholder_tokens
from ..target import default_mask_token_id, positions_of, room_for_prompt
from .conversation import Answer, Conversation, Sampling, prompt_ids, unwatched
from .rows import pad_token_id

# Limits of continuous batching. The first two are for CPUs.
PAGE = 64  # tokens of a page of the cache
MOST_TOKENS_OF_A_PASS = 2048
MOST_REQUESTS_OF_A_PASS = 1024
ROWS_PER_BATCH = 32  # of plain batches
# Another file, because answers of two engines are not mixed in one.
WITHOUT_CONTINUOUS_BATCHING = (
    "What was answered is kept: start the same command again, or do without by"
    " --continuous_batching false and another --out"
)


def generation_config(
    sampling: Sampling, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> GenerationConfig:
    """Generation settings of a command: nothing but its own, and the target's begin and end tokens.

    The mask token is never written, because no drafter could train on a row that holds it.
    """
    sampled = {}
    if sampling.temperature > 0:
        sampled = dict(temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k)
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=sampling.temperature > 0,
        pad_token_id=pad_token_id(tokenizer, embedding_rows(target)),
        eos_token_id=target.generation_config.eos_token_id,
        bos_token_id=target.generation_config.bos_token_id,
        **sampled,
    )
    # Nor placeholders of images, which no drafter is taught.
    suppressed = [*placeholder_tokens(innermost(target).config)]
    try:
        suppressed.append(default_mask_token_id(target, tokenizer))
    except ValueError:  # every row of the embedding is a word's: there is no mask token to suppress
        pass
    config.suppress_tokens = suppressed or None
    return config


@contextmanager
def generation_defaults(target: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Meanwhile a target has no generation settings but these.

    `generate` fills what a config leaves open from the target's own settings (a repetition penalty,
    min_p, ...), and what the target writes would depend on them.
    """
    own = target.generation_config
    target.generation_config = config
    try:
        yield
    finally:
        target.generation_config = own


def generate_continuously(
    target: PreTrainedModel,
    prompts: list[list[int]],
    config: GenerationConfig,
    seed: int,
    answered: Callable[[int, int], None] = unwatched,
) -> list[list[int]]:
    """Answers by transformers' continuous batching. All requests wait before it starts, so that
    batches, and with them the samples, depend on the prompts and the seed alone.

    Raises:
        RuntimeError: a request failed.
    """
    limits = {}
    if target.device.type == "cpu":
        # By itself it would take over half of the memory. So the cache gets the pages that prompts
        # and answers can fill, and one more for each.
        longest = max(map(len, prompts)) + config.max_new_tokens
        limits = dict(
            page_size=PAGE,
            num_blocks=len(prompts) * (longest // PAGE + 2),
            max_batch_tokens=MOST_TOKENS_OF_A_PASS,
        )
    batching = ContinuousBatchingConfig(
        seed=seed, max_requests_per_batch=min(len(prompts), MOST_REQUESTS_OF_A_PASS), **limits
    )
    manager = target.init_continuous_batching(
        generation_config=config, continuous_batching_config=batching
    )
    results = {}  # in the order in which they are finished
    try:
        names = manager.add_requests(prompts, max_new_tokens=config.max_new_tokens)
        manager.start()
        while len(results) < len(prompts):
            # One second at most, so that we notice if its thread has ended.
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                if result.error is not None:
                    raise RuntimeError(f"{result.error}. {WITHOUT_CONTINUOUS_BATCHING}")
                results[result.request_id] = list(result.generated_tokens)
                answered(len(results), len(prompts))
            elif result is None and not manager.is_running():
                raise RuntimeError(
                    f"continuous batching ended early. {WITHOUT_CONTINUOUS_BATCHING}"
                )
    finally:
        # Give back the memory of the cache, and the attention that the target had before.
        manager.stop(block=True)
        manager.destroy()
    return [results[name] for name in names]


@torch.no_grad()
def generate_in_batches(
    target: PreTrainedModel,
    prompts: list[list[int]],
    config: GenerationConfig,
    seed: int,
    answered: Callable[[int, int], None] = unwatched,
    batch: int = ROWS_PER_BATCH,
) -> list[list[int]]:
    """Answers by plain `generate`, prompts of like length together, padded on the left."""
    answers: dict[int, list[int]] = {}
    # By length, so that little of a batch is padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    torch.manual_seed(seed)
    for start in range(0, len(order), batch):
        group = order[start : start + batch]
        width = max(len(prompts[i]) for i in group)
        ids = torch.full((len(group), width), config.pad_token_id)  # (B, S)
        mask = torch.zeros_like(ids)
        # On the left, because answers go on at the right end.
        for row, i in enumerate(group):
            begin = width - len(prompts[i])
            ids[row, begin:] = torch.tensor(prompts[i])
            mask[row, begin:] = 1
        output = target.generate(
            ids.to(target.device), attention_mask=mask.to(target.device), generation_config=config
        )
        answers |= dict(zip(group, output[:, width:].tolist()))
        answered(len(answers), len(prompts))
    return [answers[i] for i in range(len(prompts))]


def until_end(ids: list[int], ends: set[int]) -> list[int]:
    """An answer up to and including its end token."""
    for i, token in enumerate(ids):
        if token in ends:
            return ids[: i + 1]
    return ids


def reader_of(
    tokenizer: PreTrainedTokenizerBase, has_tools: bool
) -> PreTrainedTokenizerBase | None:
    """A tokenizer that tells thoughts and tool calls from an answer, which trl can for many
    templates; `None` for others."""
    reader = copy(tokenizer)
    try:
        # trl knows no tokenizer with several templates by name. Serving takes one of them.
        reader.chat_template = tokenizer.get_chat_template(tools=[] if has_tools else None)
        return add_response_schema(reader)
    except ValueError:
        return None


class TargetWriter:
    """Writes the next answer of conversations by the target itself.

    Args:
        chat_template_kwargs (`dict`, *optional*): for the chat template of the prompts.
        prompt_tokens (`int`): plain text is continued after so many tokens.
        continuous_batching (`bool`): use it where this target and device can do it. That is tried
            once, and said if it fails.
        rows_per_batch (`int`): of plain batches.

    Attributes:
        engine (`str`): how answers are generated. It changes the words, so settings keep it.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        *,
        chat_template_kwargs: dict | None,
        prompt_tokens: int,
        continuous_batching: bool,
        rows_per_batch: int = ROWS_PER_BATCH,
    ):
        self.target = target
        self.tokenizer = tokenizer
        self.chat_template_kwargs = chat_template_kwargs
        self.prompt_tokens = prompt_tokens
        self.room = room_for_prompt(target, sampling.max_new_tokens)
        self.config = generation_config(sampling, target, tokenizer)
        end = self.config.eos_token_id
        if end is None:
            end = []
        self.ends = set(end) if isinstance(end, list) else {end}
        # By whether a conversation has tools, a tokenizer that reads what was written.
        self.readers = {has_tools: reader_of(tokenizer, has_tools) for has_tools in (False, True)}
        self.answered = unwatched
        self.generate = partial(generate_in_batches, batch=rows_per_batch)
        self.engine = "plain batches"
        if rows_per_batch != ROWS_PER_BATCH:
            # Samples depend on who shares a batch.
            self.engine += f" of {rows_per_batch}"
        if continuous_batching and self._can_batch_continuously():
            self.generate, self.engine = generate_continuously, "continuous batching"

    def _can_batch_continuously(self) -> bool:
        """Try it on two tokens. Some targets have no pages, and some devices no kernels for it."""
        trial = GenerationConfig(
            max_new_tokens=2,
            do_sample=False,
            pad_token_id=self.config.pad_token_id,
            eos_token_id=self.config.eos_token_id,
        )
        prompt = self.tokenizer("a b")["input_ids"]
        try:
            with generation_defaults(self.target, self.config):
                generate_continuously(self.target, [prompt], trial, seed=0)
        except Exception as error:  # each architecture and each attention fails in a way of its own
            said = " ".join(str(error).split())
            print(f"continuous batching cannot run this target here ({said}): plain batches")
            return False
        return True

    def __call__(self, conversations: list[Conversation], seed: int) -> list[Answer]:
        """An answer to the last question of each conversation."""
        prompts: dict[int, list[int]] = {}
        answers: dict[int, Answer] = {}
        for i, conversation in enumerate(conversations):
            prompt = self._prompt(conversation)
            if isinstance(prompt, str):
                answers[i] = Answer(skipped=prompt)
            else:
                prompts[i] = prompt
        if prompts:
            with generation_defaults(self.target, self.config):
                written = self.generate(
                    self.target, list(prompts.values()), self.config, seed, self.answered
                )
            for i, ids in zip(prompts, written):
                answers[i] = self._answer(conversations[i], prompts[i], ids)
        return [answers[i] for i in range(len(conversations))]

    def _prompt(self, conversation: Conversation) -> list[int] | str:
        """The prompt of the next answer, or why there is none."""
        prompt = prompt_ids(
            conversation, self.tokenizer, self.chat_template_kwargs, self.prompt_tokens
        )
        if isinstance(prompt, str):
            return prompt
        if self.room is not None and len(prompt) > self.room:
            most = positions_of(self.target)
            return f"its prompt leaves no room for max_new_tokens in the target's {most} positions"
        tokens = embedding_rows(self.target)
        if max(prompt, default=0) >= tokens:
            return f"a token of its prompt is none of the target's {tokens}"
        return prompt

    def _answer(self, conversation: Conversation, prompt: list[int], ids: list[int]) -> Answer:
        """What was generated after a prompt, read as a turn."""
        ids = until_end(ids, self.ends)
        turn = {"content": self.tokenizer.decode(ids, skip_special_tokens=True)}
        reader = self.readers[conversation.tools is not None]
        if reader is not None and conversation.text is None:
            # The template may have written the beginning of the answer (an open thought). Without
            # it in `prefix`, transformers parses nothing.
            parsed = parse_response(reader, ids, prefix=prompt, tools=conversation.tools)
            # Where no tool was given, JSON that looks like a call is an answer.
            if conversation.tools or not parsed.get("tool_calls"):
                turn = parsed
        return Answer(
            turn={"role": "assistant"} | turn,
            truncated=not ids or ids[-1] not in self.ends,
            prompt_ids=prompt,
            ids=ids,
        )
