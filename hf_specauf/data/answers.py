"""A conversation on its way to the target's own answers, and what writes them: the target here, by
continuous batching or in plain batches, or a server of it."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx2
import torch
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl.chat_template_utils import add_response_schema, parse_response

from ..target import default_mask_token_id
from .sources import UnusableRow, chat_messages, row_format, row_text, row_tools

RETRIES, PATIENCE = 5, 2.0  # of requests; seconds, doubled each time
PAGE = 64  # tokens of a page of the cache on a CPU


class Conversation:
    """One row on its way: the turns so far, the questions still to come, and what the target
    answered."""

    def __init__(self, source_row: int, row: dict):
        self.record = {"source_row": source_row}
        self.history: list[dict] = []
        self.coming: list[dict] = []
        self.tools, self.text, self.skipped = None, None, None
        self.pieces: list[
            tuple[list[int], list[int], bool]
        ] = []  # prompt and answer ids of each turn, if it was cut
        self.answers = 0
        try:
            row = {key: value for key, value in row.items() if value is not None}
            tokens = row.pop("input_ids", None)  # as another target wrote them
            try:
                kind = row_format(list(row))
            except ValueError:
                raise UnusableRow(
                    "it has tokens and no text" if tokens else "its columns are empty"
                ) from None
            if kind == "text":
                self.text = row_text(row, "text")
            else:
                self.coming, self.tools = chat_messages(row), row_tools(row)
        except UnusableRow as error:
            self.skipped = str(error)

    def wants_answer(self) -> bool:
        """Go on to the next question. A conversation ends at its first tool turn: what tools
        answered, they answered to another model."""
        if self.text is not None:
            return not self.answers and self.skipped is None
        while self.skipped is None and self.coming:
            turn = self.coming.pop(0)
            if turn["role"] == "tool" or "tool_calls" in (self.history[-1] if self.history else {}):
                self.coming = []
            elif turn["role"] != "assistant":
                self.history.append(turn)
                if turn["role"] == "user" and (
                    not self.coming or self.coming[0]["role"] == "assistant"
                ):
                    return True
        return False

    def take(self, answer: dict) -> None:
        """Keep an answer: `turn`, or why there is none (`skipped`), and the ids where they are
        known."""
        if "skipped" in answer:
            self.coming, self.skipped = [], self.skipped if self.answers else answer["skipped"]
            return
        self.answers += 1
        self.record["truncated"] = answer["truncated"]
        if "ids" in answer:
            self.pieces.append((answer["prompt_ids"], answer["ids"], answer["truncated"]))
        if self.text is None:
            turn = answer["turn"]
            self.history.append(turn)
            if not (
                turn["content"] or turn.get("tool_calls")
            ):  # cut in its thoughts: nothing to go on from
                self.coming = []

    def finished(self) -> list[dict]:
        """The rows as they are written: `input_ids` with `supervised` exactly as the target wrote
        them, `messages` in the last. Where the template writes earlier turns differently (without
        their thoughts, for instance), one row cannot hold all answers as they were written, and
        there are several of one `source_row`."""
        if not self.answers:
            return [self.record | {"skipped": self.skipped or "it asks nothing"}]
        rows: list[dict] = []
        for prompt, answer, truncated in self.pieces:
            goes_on = rows and prompt[: len(rows[-1]["input_ids"])] == rows[-1]["input_ids"]
            before = rows.pop()["supervised"] if goes_on else []
            supervised = before + [0] * (len(prompt) - len(before)) + [1] * len(answer)
            rows.append(
                self.record
                | {
                    "truncated": truncated,
                    "input_ids": prompt + answer,
                    "supervised": supervised,
                }
            )
        rows = rows or [self.record]
        if self.text is None:
            # a question that found no answer is no use
            turns = self.history if self.history[-1]["role"] == "assistant" else self.history[:-1]
            rows[-1] |= {"messages": turns} | ({"tools": self.tools} if self.tools else {})
        return rows


def prompt_ids(
    conversation: Conversation, tokenizer, kwargs: dict | None, text_tokens: int
) -> list[int] | str:
    """The prompt of a conversation's next answer, or why there is none; of plain text its first
    `text_tokens`."""
    if conversation.text is not None:
        return tokenizer(conversation.text)["input_ids"][:text_tokens] or "its text is empty"
    try:
        return tokenizer.apply_chat_template(
            conversation.history, tools=conversation.tools, add_generation_prompt=True, return_dict=True,
            **(kwargs or {}),
        )["input_ids"]  # fmt: skip
    except Exception as error:
        return f"the chat template failed: {' '.join(str(error).split())}"


def sampling(args, target: PreTrainedModel, pad_token_id: int) -> GenerationConfig:
    """Generation settings of a command: nothing but its own, and the target's end tokens."""
    sampled = (
        dict(temperature=args.temperature, top_p=args.top_p, top_k=args.top_k)
        if args.temperature
        else {}
    )
    return GenerationConfig(
        max_new_tokens=args.max_new_tokens, do_sample=args.temperature > 0, pad_token_id=pad_token_id,
        eos_token_id=target.generation_config.eos_token_id, bos_token_id=target.generation_config.bos_token_id,
        **sampled,
    )  # fmt: skip


def generate_continuously(
    target: PreTrainedModel, prompts: list[list[int]], config: GenerationConfig, seed: int
) -> list[list[int]]:
    """Answers by transformers' continuous batching. All requests wait before it starts, so that
    batches, and with them the samples, depend on the prompts and the seed alone.

    Raises:
        RuntimeError: a request failed.
    """
    longest = max(map(len, prompts)) + config.max_new_tokens
    limits = {}
    if target.device.type == "cpu":  # it would take over half of the memory
        limits = dict(
            page_size=PAGE, num_blocks=len(prompts) * (longest // PAGE + 2), max_batch_tokens=2048
        )
    batching = ContinuousBatchingConfig(
        seed=seed, max_requests_per_batch=min(len(prompts), 1024), **limits
    )
    manager = target.init_continuous_batching(
        generation_config=config, continuous_batching_config=batching
    )
    results = {}
    try:
        names = manager.add_requests(prompts, max_new_tokens=config.max_new_tokens)
        manager.start()
        while len(results) < len(prompts):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                if result.error is not None:
                    raise RuntimeError(result.error)
                results[result.request_id] = list(result.generated_tokens)
            elif result is None and not manager.is_running():
                raise RuntimeError("continuous batching ended early")
    finally:
        manager.stop(block=True)
        manager.destroy()
    return [results[name] for name in names]


@torch.no_grad()
def generate_in_batches(
    target: PreTrainedModel,
    prompts: list[list[int]],
    config: GenerationConfig,
    seed: int,
    batch: int = 32,
) -> list[list[int]]:
    """Answers by plain `generate`, prompts of like length together, padded on the left."""
    answers: dict[int, list[int]] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    torch.manual_seed(seed)
    for start in range(0, len(order), batch):
        group = order[start : start + batch]
        width = max(len(prompts[i]) for i in group)
        ids = torch.full((len(group), width), config.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(group):
            ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, width - len(prompts[i]) :] = 1
        output = target.generate(
            ids.to(target.device), attention_mask=mask.to(target.device), generation_config=config
        )
        answers |= dict(zip(group, output[:, width:].tolist()))
    return [answers[i] for i in range(len(prompts))]


def until_end(ids: list[int], ends: set[int]) -> list[int]:
    """An answer up to and including its end token."""
    return next((ids[: i + 1] for i, token in enumerate(ids) if token in ends), ids)


def target_writer(
    args, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[Callable, str]:
    """(write, engine): `write(conversations, seed)` answers the last question of each by the target
    itself.

    Continuous batching where it is wanted and this target and device can do it, else plain batches:
    tried once, and said.
    """
    pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    # `generate` fills what a config leaves open from the target's own (a repetition penalty, min_p,
    # ...)
    config = target.generation_config = sampling(args, target, pad)
    eos = config.eos_token_id
    ends = set(eos if isinstance(eos, list) else [] if eos is None else [eos])
    try:
        config.suppress_tokens = [
            default_mask_token_id(target, tokenizer)
        ]  # no drafter could train on it
    except ValueError:  # every row of the embedding is a word's
        pass
    longest = target.config.get_text_config(decoder=True).max_position_embeddings
    try:  # how thoughts and tool calls are told from the answer
        add_response_schema(tokenizer)
        structured = True
    except ValueError:
        structured = False
    generate, engine = generate_in_batches, "plain batches"
    trial = GenerationConfig(
        max_new_tokens=2, do_sample=False, pad_token_id=pad, eos_token_id=config.eos_token_id
    )
    if args.continuous_batching:
        try:
            generate_continuously(target, [tokenizer("a b")["input_ids"]], trial, 0)
            generate, engine = generate_continuously, "continuous batching"
        except Exception as error:
            print(
                f"continuous batching cannot run this target here ({' '.join(str(error).split())}):"
                " plain batches"
            )

    def answer(conversation, prompt: list[int], ids: list[int]) -> dict:
        """What `Conversation.take` is told of the ids that were generated."""
        ids = until_end(ids, ends)
        whole = bool(ids) and ids[-1] in ends
        # without what the template wrote of the answer's beginning, transformers parses nothing
        turn = {"content": tokenizer.decode(ids, skip_special_tokens=True)}
        if structured and conversation.text is None:
            parsed = parse_response(tokenizer, ids, prefix=prompt, tools=conversation.tools)
            if conversation.tools or not parsed.get(
                "tool_calls"
            ):  # JSON that only looks like a call
                turn = parsed
        return {
            "prompt_ids": prompt,
            "ids": ids,
            "truncated": not whole,
            "turn": {"role": "assistant"} | turn,
        }

    def write(conversations: list, seed: int) -> list[dict]:
        """The next answer of each conversation."""
        prompts = [
            prompt_ids(c, tokenizer, args.chat_template_kwargs, args.prompt_tokens)
            for c in conversations
        ]
        most = longest - args.max_new_tokens
        long = f"its prompt leaves no room for max_new_tokens in the target's {longest} positions"
        prompts = [long if isinstance(p, list) and len(p) > most else p for p in prompts]
        asked = [i for i, prompt in enumerate(prompts) if isinstance(prompt, list)]
        answers: list[dict] = [{"skipped": prompt} for prompt in prompts]
        if asked:
            for i, ids in zip(asked, generate(target, [prompts[i] for i in asked], config, seed)):
                answers[i] = answer(conversations[i], prompts[i], ids)
        return answers

    return write, engine


def endpoint_writer(args) -> Callable:
    """`write(conversations, seed)` by an OpenAI-compatible server; the key is `OPENAI_API_KEY`,
    never a Hub token."""
    key = os.environ.get("OPENAI_API_KEY")
    client = httpx2.Client(timeout=3600, headers={"Authorization": f"Bearer {key}"} if key else {})
    url = args.endpoint.rstrip("/") + "/chat/completions"
    settings = dict(
        model=args.target,
        max_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
    )
    settings |= {"top_k": args.top_k} if args.top_k else {}
    settings |= (
        {"chat_template_kwargs": args.chat_template_kwargs} if args.chat_template_kwargs else {}
    )

    def ask(conversation, seed: int) -> dict:
        """The next answer of one conversation."""
        if conversation.text is not None:
            raise ValueError(
                "rows of plain text are continued token by token, which needs the target itself:"
                " leave out --endpoint"
            )
        body = settings | {"messages": conversation.history, "seed": seed}
        body |= {"tools": conversation.tools} if conversation.tools else {}
        for attempt in range(RETRIES):
            if attempt:
                time.sleep(PATIENCE * 2 ** (attempt - 1))
            try:
                reply = client.post(url, json=body)
            except httpx2.HTTPError as error:
                said = " ".join(str(error).split())
                continue
            said = f"{reply.status_code}: {' '.join(reply.text.split())[:200]}"
            if reply.status_code in (400, 413, 422):  # this question, not the server
                return {"skipped": f"the endpoint refused it ({said})"}
            if reply.status_code in (401, 403, 404):
                raise OSError(
                    f"the endpoint {args.endpoint} refuses every question ({said}): check its"
                    " address, the model's name (--target) and OPENAI_API_KEY. What was answered"
                    " is kept"
                )
            if reply.status_code == 200:
                break
        else:
            raise OSError(
                f"the endpoint {args.endpoint} failed {RETRIES} times ({said}). What was answered"
                " is kept: start the same command again when it is back"
            )
        try:
            choice = reply.json()["choices"][0]
            message, truncated = choice["message"], choice["finish_reason"] == "length"
        except (ValueError, LookupError, TypeError) as error:
            raise OSError(
                f"the endpoint {args.endpoint} answered without choices[0].message and"
                f" finish_reason ({said}): it must speak OpenAI's chat completions. What was"
                " answered is kept"
            ) from error
        turn = {"role": "assistant", "content": message.get("content") or ""}
        thoughts = message.get("reasoning_content") or message.get(
            "reasoning"
        )  # servers differ in the name,
        turn |= (
            {"reasoning_content": thoughts, "thinking": thoughts} if thoughts else {}
        )  # so do templates
        turn |= {"tool_calls": message["tool_calls"]} if message.get("tool_calls") else {}
        return {"turn": turn, "truncated": truncated}

    def write(conversations: list, seed: int) -> list[dict]:
        with ThreadPoolExecutor(args.concurrency) as pool:
            return list(
                pool.map(lambda pair: ask(pair[1], seed + pair[0]), enumerate(conversations))
            )

    return write
