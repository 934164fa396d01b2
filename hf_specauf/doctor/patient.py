"""What the doctor looks at: a target, a drafter, and a few texts that the target wrote."""

import copy
from dataclasses import dataclass
from functools import cached_property

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.conversation import stop_at_both_ends
from ..drafters.draft_length import Round
from ..evaluation.ways import decoding_config
from ..identity import Origin, cached_commit, note_origin
from ..identity.multimodal import load_language_model, load_tokenizer
from ..serving.acceptance import summarize
from ..serving.benchmarks import Wording, encode_prompts, load_prompts
from ..serving.decoding import attach
from ..target import FrozenTarget, check_target, room_for_prompt
from ..target.loading import load

# A few questions of different kinds. `--prompts` replaces them.
QUESTIONS = (
    "Write a Python function that returns the n-th Fibonacci number, and explain it briefly.",
    "What are three ways to save energy at home?",
    "Tell me the story of a lighthouse keeper who finds a message in a bottle.",
    "A train leaves at 9:40 and arrives at 13:05. How long does the journey take?",
    "Summarise in two sentences why the sky is blue.",
    "List the planets of the solar system, from the sun outwards, with one fact each.",
)


TEXT_PROMPT = 128  # tokens of a row of plain text that are the prompt


@dataclass(frozen=True)
class Text:
    """A prompt, and what the target wrote after it greedily."""

    prompt: torch.Tensor  # (1, S)
    output: torch.Tensor  # (1, T), the prompt included

    @property
    def first(self) -> int:
        """The position of the first new token."""
        return self.prompt.shape[1]


@dataclass(frozen=True)
class Decoded:
    """The texts, written again with drafts."""

    outputs: list[torch.Tensor]  # (1, T) each
    rounds: list[Round]  # the passes of all


class Patient:
    """A target and a drafter. Whatever takes time is made once, when a check first asks for it.

    Args:
        target (`str`): Hub id or folder.
        revision (`str`, *optional*): of the target.
        loading (`dict`): for the target's `from_pretrained`.
        device (`str`): where both models run.
        prompts (`str`, *optional*): a benchmark, data set or file; a few built-in questions by
            default.
        count (`int`): prompts that the target continues.
        max_new_tokens (`int`): tokens that it writes after each.
    """

    def __init__(
        self,
        target: str,
        revision: str | None,
        loading: dict,
        *,
        device: str,
        prompts: str | None,
        count: int,
        max_new_tokens: int,
    ):
        self.target_name, self.revision, self.loading = target, revision, loading
        self.device = torch.device(device)
        self.prompts_name, self.count, self.max_new_tokens = prompts, count, max_new_tokens
        # Of the target, read by `load_target`.
        self.target: PreTrainedModel | None = None
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.lacking: list[str] = []  # weights that its checkpoint does not hold
        self.ends: list[int] | None = None  # where the chat's end is not the model's
        self.drafter: PreTrainedModel | None = None

    def load_target(self) -> None:
        """Load target and tokenizer, as `load_target` of the package does, and note what weights
        the checkpoint lacks."""
        name, revision = self.target_name, self.revision
        check_target("--target", name, revision, on_hub=True)
        trust = {"trust_remote_code": self.loading.get("trust_remote_code", False)}
        self.tokenizer = load(load_tokenizer, "--target", name, revision, **trust)
        kwargs = {"dtype": "auto"} | self.loading | {"output_loading_info": True}
        target, found = load(load_language_model, "--target", name, revision, **kwargs)
        self.lacking = sorted(found["missing_keys"])
        note_origin(target, Origin(name, cached_commit(name, revision)))
        if not getattr(target, "is_quantized", False):
            target = target.to(self.device)
        self.target = target.eval()

    @property
    def template_kwargs(self) -> dict | None:
        """Arguments of the chat template that the drafter serves with."""
        return self.drafter.config.chat_template_kwargs

    @cached_property
    def frozen(self) -> FrozenTarget:
        """The target as a drafter's training reads it."""
        return FrozenTarget(self.target, self.drafter.config)

    @property
    def pad_token_id(self) -> int:
        """For `generate`; a batch of one row has no padding."""
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return next((token for token in (pad, eos) if token is not None), 0)

    @cached_property
    def prompts(self) -> list[torch.Tensor]:
        """Prompts (1, S), as serving renders them."""
        rows, wording = (
            Dataset.from_list([{"asked": one} for one in QUESTIONS]),
            Wording(("asked",)),
        )
        if self.prompts_name is not None:
            source = load_prompts(self.prompts_name)
            rows, wording = source.rows, source.wording
        room = room_for_prompt(self.target, self.max_new_tokens)
        found = encode_prompts(
            rows, self.tokenizer, self.count, TEXT_PROMPT, self.template_kwargs, wording, room
        )
        return [prompt.to(self.device) for prompt in found]

    @cached_property
    def texts(self) -> list[Text]:
        """What the target writes after each prompt, plainly and greedily."""
        if self.ends is None:
            stop_at_both_ends(self.target, self.tokenizer, self.template_kwargs)
        return [Text(prompt, self.continued(prompt)) for prompt in self.prompts]

    @cached_property
    def states(self) -> list[dict[int, torch.Tensor]]:
        """Of each text, what the tapped layers and those beside them put out: layer -> (1, S, H).
        One pass of a text tells how the drafter would draft with other taps."""
        config = self.drafter.config
        taps = set(config.target_layer_ids)
        layers = sorted(
            layer
            for layer in taps | {tap + 1 for tap in taps} | {tap - 1 for tap in taps}
            if 0 <= layer <= config.num_target_layers - 2
        )
        size = config.hidden_size
        frozen = FrozenTarget(self.target, copy.copy(config))
        frozen.target_layer_ids = layers
        found = []
        for text in self.texts:
            states = frozen.context(text.output).split(size, dim=-1)
            found.append(dict(zip(layers, states)))
        return found

    def context(self, number: int, layers: list[int]) -> torch.Tensor:
        """Of a text, the states of some layers, concatenated, (1, S, L * H)."""
        return torch.cat([self.states[number][layer] for layer in layers], dim=-1)

    @cached_property
    def decoded(self) -> "Decoded":
        """The texts, written again in whole blocks of drafts."""
        attachment = attach(self.target, self.drafter, draft_length=None, lookup=False)
        with attachment:
            outputs = [self.continued(text.prompt, self.drafter) for text in self.texts]
        return Decoded(outputs, attachment.rounds)

    @property
    def decoded_tau(self) -> float:
        """Tokens a pass, where the texts are written with drafts."""
        return summarize(self.decoded.rounds, self.drafter.config.block_size).tau

    @torch.no_grad()
    def continued(self, prompt: torch.Tensor, drafter=None) -> torch.Tensor:
        """A prompt (1, S) and what the target writes after it, (1, T); with a drafter that is
        attached, by its drafts."""
        return self.target.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=decoding_config(self.target, self.max_new_tokens, self.pad_token_id),
            assistant_model=drafter,
        )
