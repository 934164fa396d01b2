"""How a prompt is decoded while it is measured, and how long that takes."""

import copy
import time
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from ..serving.decoding import AUTO, Attachment, attach

# Tokens of transformers' own prompt lookup, which needs no drafter: what a drafter has to beat.
LOOKED_UP = 10
# what `compare` measures beside plain decoding and the drafter, where it is asked to look up
LOOKUP_WAYS = ("prompt_lookup", "drafter_and_lookup")


def decoding_config(
    target: PreTrainedModel, max_new_tokens: int, pad_token_id: int | None, temperature: float = 0.0
) -> GenerationConfig:
    """Generation settings for measuring: transformers' defaults and the target's end-of-sequence
    tokens, past which nothing may be drafted.

    Sampling settings that the target ships with (a repetition penalty, top-p) are ignored.

    Args:
        temperature (`float`, *optional*, defaults to 0): 0 is greedy.
    """
    sampling = {"do_sample": False}
    if temperature > 0:
        # all tokens, where transformers' default keeps 50
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_token_id,
        eos_token_id=target.generation_config.eos_token_id,
        **sampling,
    )
    # `generate` fills a field that is None from the target's own config, so none may stay None.
    defaults = GenerationConfig._get_default_generation_params()
    # max_new_tokens stands in its place
    defaults.pop("max_length", None)
    config.update(**defaults, defaults_only=True)
    return config


@dataclass(frozen=True)
class Decoded:
    """One output of `generate`."""

    output: torch.Tensor  # (1, T), the prompt included
    seconds: float


def timed(
    target,
    prompt: torch.Tensor,
    assistant,
    config: GenerationConfig,
    seed: int,
    streamer: BaseStreamer | None = None,
) -> Decoded:
    """Generate after a prompt (1, S), plainly where `assistant` is `None`."""
    torch.manual_seed(seed)
    start = time.perf_counter()
    output = target.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        generation_config=config,
        assistant_model=assistant,
        streamer=streamer,
    )
    # the clock would else stop before the GPU does
    if output.is_cuda:
        torch.cuda.synchronize()
    return Decoded(output, time.perf_counter() - start)


def config_of(way: str, config: GenerationConfig) -> GenerationConfig:
    """What a way of `compare` decodes by."""
    if way != "prompt_lookup":
        return config
    config = copy.deepcopy(config)
    config.prompt_lookup_num_tokens = LOOKED_UP
    return config


def attached_ways(
    stack: ExitStack, target, drafter, draft_length, lookup
) -> tuple[dict, Attachment, Attachment]:
    """The ways that `compare` decodes in, each with the assistant of its calls, and the attachments
    of the drafter alone and with lookup (the same one where nothing is looked up)."""
    alone = attach(target, drafter, draft_length=draft_length, lookup=False)
    stack.enter_context(alone)
    calls = {"plain": None, "drafter": drafter}
    if lookup is False:
        return calls, alone, alone
    # Another object with the same weights, because an attachment knows its drafter by the object.
    twin = copy.copy(drafter)
    # tau is that of whole blocks, and people decode by what pays.
    length = AUTO if draft_length is None else draft_length
    both = stack.enter_context(attach(target, twin, draft_length=length, lookup=lookup))
    calls["prompt_lookup"] = None
    calls["drafter_and_lookup"] = twin
    return calls, alone, both
