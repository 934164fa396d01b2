"""The ways to decode that an evaluation compares, as a table, and how a prompt is decoded in one.

ways = choose_ways(["plain", "drafter", "native"])
with opened(ways, target, {GIVEN: drafter}) as decoders:
    decoded = decoders["native"](prompt, config, seed=0)
"""

import copy
import functools
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from ..drafters.draft_length import Round
from ..drafters.transformers_internals import drop_capture_hooks
from ..identity import innermost, unwrapped
from ..serving.decoding import AUTO, Attachment, attach

# Tokens of transformers' own prompt lookup, which needs no drafter: what a drafter has to beat.
LOOKED_UP = 10
# Whose drafts a way takes: the drafter that is measured, or a small model of the target's family.
GIVEN, ASSISTANT = "given", "assistant"


@dataclass(frozen=True)
class Way:
    """A way to decode.

    Attributes:
        says (`str`): its name for people.
        model (`str`, *optional*): the name of the model that drafts; `None` where none does.
        ours (`bool`): decoded by this package's loop; else by transformers alone.
        draft_length, lookup: of this package's loop, as for `attach`.
        call (`dict`): settings of `generate`.
        copies (`int`): rows of the batch, all of them the prompt.
    """

    says: str
    model: str | None = None
    ours: bool = False
    draft_length: int | str | None = AUTO
    lookup: int | str | bool = AUTO
    call: dict = field(default_factory=dict)
    copies: int = 1


WAYS = {
    "plain": Way("plain"),
    # whole blocks, whatever they cost: tau is measured by it
    "drafter": Way("drafter alone", GIVEN, ours=True, draft_length=None, lookup=False),
    "prompt_lookup": Way("prompt lookup", call={"prompt_lookup_num_tokens": LOOKED_UP}),
    # what `attach` and `generate` do by default
    "drafter_and_lookup": Way("drafter and lookup", GIVEN, ours=True),
    "lookup_alone": Way("lookup alone", ours=True),
    "native": Way("transformers' generator", GIVEN, call={"speculation_type": "dflash"}),
    "assistant": Way("assistant model", ASSISTANT),
    # no faster, but it shows what rounding alone does to an output
    "plain_in_a_pair": Way("plain, beside a copy", copies=2),
}
ALWAYS = ("plain", "drafter")  # ratios are over the one, and tau is the other's
DEFAULT_WAYS = (*ALWAYS, "prompt_lookup", "drafter_and_lookup")


def choose_ways(
    names: Iterable[str] = DEFAULT_WAYS,
    *,
    draft_length: int | str | None = None,
    lookup: int | str | bool = AUTO,
    draft_lengths: Iterable[int] = (),
    others: Iterable[str] = (),
) -> dict[str, Way]:
    """The ways of an evaluation by name, plain decoding and the drafter always among them.

    Args:
        names (`Iterable[str]`): keys of `WAYS`.
        draft_length, lookup: as for `attach`, of the given drafter.
        draft_lengths (`Iterable[int]`): fixed ones, a way for each.
        others (`Iterable[str]`): names of other drafters, a way for each.

    Raises:
        ValueError: there is no way of some name.
    """
    names = list(names)
    unknown = [name for name in names if name not in WAYS]
    if unknown:
        raise ValueError(f"there is no way {', '.join(unknown)}: choose from {', '.join(WAYS)}")
    found = {name: WAYS[name] for name in WAYS if name in names or name in ALWAYS}
    found["drafter"] = replace(found["drafter"], draft_length=draft_length)
    if "drafter_and_lookup" in found:
        # tau is that of whole blocks, and people decode by what pays
        length = AUTO if draft_length is None else draft_length
        way = replace(found["drafter_and_lookup"], draft_length=length, lookup=lookup)
        found["drafter_and_lookup"] = way
    if "lookup_alone" in found:
        found["lookup_alone"] = replace(found["lookup_alone"], lookup=lookup)
    for length in draft_lengths:
        says = f"drafter, {length} drafted"
        found[f"draft_{length}"] = replace(found["drafter"], says=says, draft_length=length)
    for other in others:
        found[f"also:{other}"] = replace(found["drafter"], says=other, model=other)
    return found


def usual_ways(
    draft_length: int | str | None = None, lookup: int | str | bool = False
) -> dict[str, Way]:
    """Plain decoding and the drafter, and with `lookup` all of `DEFAULT_WAYS`."""
    names = ALWAYS if lookup is False else DEFAULT_WAYS
    return choose_ways(names, draft_length=draft_length, lookup=lookup)


def names_of(drafters: list[str]) -> list[str]:
    """A short name for each of some drafters, no two of them the same."""
    names = []
    for drafter in drafters:
        name = Path(drafter).name
        names.append(f"{name} ({len(names) + 1})" if name in names else name)
    return names


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


# ---- the clock


@dataclass(frozen=True)
class PassTime:
    """Seconds of one `generate` call, by who took them. What is left is neither model's: choosing
    tokens, and Python.

    Attributes:
        passes (`int`): of the target, after the prefill.
        prefill, target, drafter (`float`): of the target's pass over the prompt, of its other
            passes, and of drafting.
    """

    passes: int
    prefill: float
    target: float
    drafter: float


class Stopwatch:
    """Times the passes of the target and the drafting of one `generate` call.

    On a GPU a mark is an event of its stream: to wait for the GPU at each mark would slow down what
    is timed.

    Args:
        target (`PreTrainedModel`): the target, no wrapper.
        assistant (`torch.nn.Module`, *optional*): a model that transformers' loop drafts with.
    """

    def __init__(self, target: PreTrainedModel, assistant: torch.nn.Module | None = None):
        self.models = {"target": target, "drafter": assistant}
        self.on_gpu = next(target.parameters()).is_cuda
        self.marks: dict[str, list] = {name: [] for name in self.models}

    @property
    def works(self) -> bool:
        """Whether passes can be timed. Compiled code would be compiled anew for that."""
        return getattr(self.models["target"], "_compiled_call_impl", None) is None

    def mark(self, name: str) -> None:
        """Note this moment, as the begin or the end of what has the name."""
        if self.on_gpu:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = time.perf_counter()
        self.marks[name].append(moment)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time what happens inside."""
        with ExitStack() as stack:
            for name, model in self.models.items():
                if model is not None and self.works:
                    stack.enter_context(self._passes_of(name, model))
            yield

    @contextmanager
    def _passes_of(self, name: str, model: torch.nn.Module) -> Iterator[None]:
        """Time each pass of a model.

        Its `forward` is wrapped. A hook would slow down what is timed, because passes of a model
        with hooks do not run in inference mode (`pass_mode`).
        """
        own = vars(model).get("forward")  # of an object that accelerate has wrapped
        forward = model.forward

        @functools.wraps(forward)
        def timed_forward(*args, **kwargs):
            self.mark(name)
            output = forward(*args, **kwargs)
            self.mark(name)
            return output

        model.forward = timed_forward
        try:
            yield
        finally:
            del model.forward
            if own is not None:
                model.forward = own

    def watch(self, drafts) -> None:
        """Time the drafting of this package's loop: all of it, head and causal head included."""
        propose = drafts.propose

        def timed_propose(*args):
            self.mark("drafter")
            draft = propose(*args)
            self.mark("drafter")
            return draft

        drafts.propose = timed_propose

    def read(self) -> PassTime | None:
        """What was timed; `None` where nothing can be. The GPU has to be done."""
        if not self.works or not self.marks["target"]:
            return None
        prefill, *passes = self._spans("target")
        return PassTime(len(passes), prefill, sum(passes), sum(self._spans("drafter")))

    def _spans(self, name: str) -> list[float]:
        marks = self.marks[name]
        pairs = zip(marks[::2], marks[1::2])
        if self.on_gpu:
            return [begin.elapsed_time(end) / 1000 for begin, end in pairs]
        return [end - begin for begin, end in pairs]


# ---- decoding


@dataclass(frozen=True)
class Decoded:
    """One output of `generate`.

    Attributes:
        output (`torch.LongTensor` of shape `(1, T)`): the prompt included.
        seconds (`float`): that it took.
        rounds (`list[Round]`): verification passes, where this package's loop decoded.
        time (`PassTime`, *optional*): the seconds by who took them.
    """

    output: torch.Tensor
    seconds: float
    rounds: list[Round] = field(default_factory=list)
    time: PassTime | None = None


def timed(
    target,
    prompt: torch.Tensor,
    assistant,
    config: GenerationConfig,
    seed: int,
    streamer: BaseStreamer | None = None,
) -> Decoded:
    """Generate after a prompt (1, S), plainly where `assistant` is `None`. Of a batch of copies the
    first one's output is taken."""
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
    return Decoded(output[:1], time.perf_counter() - start)


@dataclass
class Decoder:
    """A way on one target, ready to be called.

    Attributes:
        way (`Way`): the way.
        target: the target, whose `generate` is called.
        assistant: what is given to it as `assistant_model`.
        attachment (`Attachment`, *optional*): where this package's loop decodes.
    """

    way: Way
    target: torch.nn.Module
    assistant: torch.nn.Module | None = None
    attachment: Attachment | None = None

    def __call__(self, prompt: torch.Tensor, config: GenerationConfig, seed: int) -> Decoded:
        """Decode a prompt (1, S)."""
        config = copy.deepcopy(config)
        config.update(**self.way.call)
        stopwatch = Stopwatch(innermost(self.target), None if self.way.ours else self.assistant)
        if self.attachment is not None:
            self.attachment.on_drafts = stopwatch.watch
        # Another way, or a text that was read, may have left some, and each way is timed alone.
        drop_capture_hooks(innermost(self.target))
        prompt = prompt.expand(self.way.copies, -1)
        with stopwatch.running():
            decoded = timed(self.target, prompt, self.assistant, config, seed)
        rounds = [] if self.attachment is None else self.attachment.generations[-1]
        return replace(decoded, rounds=rounds, time=stopwatch.read())


@contextmanager
def opened(ways: dict[str, Way], target, models: dict) -> Iterator[dict[str, Decoder]]:
    """What decodes in each way, by the ways' names; the target is its old self afterwards.

    Args:
        ways (`dict[str, Way]`): from [`choose_ways`].
        target: as for `attach`.
        models (`dict`): what drafts, by the names that ways give it.
    """
    target = unwrapped(target)
    with ExitStack() as stack:
        decoders = {}
        for name, way in ways.items():
            assistant = None if way.model is None else models[way.model]
            if assistant is not None and assistant is models.get(GIVEN) and name != "drafter":
                # An attachment knows its drafter by the object. This is another one with the same
                # weights.
                assistant = copy.copy(assistant)
            attachment = None
            if way.ours:
                options = {"draft_length": way.draft_length, "lookup": way.lookup}
                attachment = stack.enter_context(attach(target, assistant, **options))
                assistant = attachment.drafter
            decoders[name] = Decoder(way, target, assistant, attachment)
        yield decoders
