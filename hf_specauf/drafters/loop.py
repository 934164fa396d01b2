"""The loop that decodes with drafts: a pass of the target verifies a draft, and commits what it
accepts.

Travels to the Hub with Domino drafters: imports only torch, transformers and its siblings.

It stands in for `_assisted_decoding` of transformers (see `overrides.py`), which hands over what it
has prepared: processors, criteria, streamer, config, cache. Beside the two models' passes a greedy
round takes at most 12 tensor operations and one look at the device, where that loop takes 45 and 4.
All state belongs to one call, so threads may decode with one target.

Letters: S tokens of the text, d drafted tokens, V vocabulary.
"""

from contextlib import nullcontext

import torch
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMixin

from .drafts import BlockDrafts, Extended, counted, ones, padding
from .target_parts import Mixers, Taps, decoder_layers, device_of, pass_mode
from .transformers_internals import (
    CACHE,
    cache_of,
    decode_step_of,
    keep_past,
    longer_kwargs,
    take_past,
)
from .verification import Ends, Verifier, few_rows

# Arguments that our own passes know how to go on with. Others are left to the target's own methods.
PLAIN_INPUTS = {CACHE, "attention_mask", "position_ids", "use_cache", "logits_to_keep"}
# Tokens of a compiled pass. It is compiled, and recorded as a CUDA graph, for each of them.
WIDTHS = (1, 2, 4, 8, 16)


class Passes:
    """The target's passes of one call, by transformers' own preparation of each.

    Args:
        target (`PreTrainedModel`): the target.
        generation_config (`GenerationConfig`): of the call.
        model_kwargs (`dict`): of the prefill.
    """

    def __init__(self, target, generation_config, model_kwargs: dict):
        self.target = target
        self.config = generation_config
        self.kwargs = model_kwargs
        self.cache = cache_of(model_kwargs)
        # Where the target's inputs belong. `target.device` may be `meta` (offloaded weights).
        self.device = device_of(target.get_input_embeddings())
        self.outputs = None  # of the last pass
        self.mode = nullcontext  # see `pass_mode`
        # Of a hybrid target: what keeps a state instead of keys and values.
        self.mixers = Mixers(target, self.cache) if target._is_stateful else None
        self.step = target.__call__
        if self.mixers is None:
            self.step = decode_step_of(target, model_kwargs, generation_config)
        self.is_compiled = self.step != target.__call__

    def room(self, most: int) -> int:
        """How many tokens a draft may have, where the text leaves room for `most`."""
        if not self.is_compiled or most >= WIDTHS[-1]:
            return most
        # The last pass of a text has a width that was compiled before, too.
        return max(width for width in WIDTHS if width <= max(most, 0) + 1) - 1

    def width(self, count: int) -> int:
        """The tokens of a pass over `count`. More follow where that width is compiled: they come
        behind, so that no other token sees them, and `cut` takes them off."""
        if not self.is_compiled:
            return count
        return min((width for width in WIDTHS if width >= count), default=count)

    def prefill(self, ids: torch.LongTensor, **more) -> torch.Tensor:
        """Read the prompt. (1, S) -> its last logits (1, 1, V)"""
        outputs = self.target._prefill(ids, self.config, self.kwargs | more)
        # Only now: before, sliding layers would keep the whole prompt.
        self.cache.activate_past_recording()
        if self.mixers is None and not getattr(self.cache, "is_croppable", True):
            raise ValueError(
                f"{type(self.target).__name__}'s cache cannot be cut back to the accepted tokens:"
                " its output would be silently wrong. Generate without assistant_model."
            )
        # Those of a cache that was given back recorded it, and drop what they do not need.
        self.cache.crop(0)
        self.outputs = outputs
        self.commit(1)
        return outputs.logits[:, -1:]

    def run(self, ids: torch.LongTensor, count: int, **more) -> torch.Tensor:
        """Verify: read the last `count` tokens of a text. (1, S) -> (1, count, V)"""
        # The state after one token is never taken back.
        with self.mixers if self.mixers is not None and count > 1 else nullcontext():
            return self.read(ids, count, **more)

    def read(self, ids: torch.LongTensor, count: int, **more) -> torch.Tensor:
        """As `run`, with nothing around it."""
        kwargs = longer_kwargs(self.kwargs, ids.shape[1])
        inputs = self.target.prepare_inputs_for_generation(
            ids.to(self.device), next_sequence_length=count, is_first_iteration=False, **kwargs
        )
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = count
        # Not with the experts' kernels that plain decoding takes: those are for one token.
        self.outputs = self.step(**(inputs | more))
        return self.outputs.logits[:, -count:]

    def cut(self, rows: int, kept: int) -> None:
        """Forget all but the first `kept` of the last pass's rows, as if they alone were read."""
        self.cache.crop(kept - rows)
        if self.mixers is not None and kept < rows:
            self.mixers.read_again(rows, kept)

    def commit(self, count: int) -> None:
        """Go on behind so many new tokens."""
        self.kwargs = self.target._update_model_kwargs_for_generation(
            self.outputs, self.kwargs, num_new_tokens=count
        )


class LeanPasses(Passes):
    """Passes of a target that prepares them in transformers' common way, from plain text and with a
    cache that grows: a pass then takes ids, positions, mask and cache, all of them parts of what is
    there already."""

    @staticmethod
    def serve(target, model_kwargs: dict) -> bool:
        """Whether a call's passes may be made so."""
        # A target's class may have such methods of its own, and so may the object.
        prepare = getattr(target.prepare_inputs_for_generation, "__func__", None)
        update = getattr(target._update_model_kwargs_for_generation, "__func__", None)
        given = {key for key, value in model_kwargs.items() if value is not None}
        return (
            prepare is GenerationMixin.prepare_inputs_for_generation
            and update is GenerationMixin._update_model_kwargs_for_generation
            and not target.is_remote_code()
            and not cache_of(model_kwargs).is_compileable
            and given <= PLAIN_INPUTS
        )

    def __init__(self, target, generation_config, model_kwargs: dict):
        super().__init__(target, generation_config, model_kwargs)
        self.mode = pass_mode(target)
        # From the prompt's on, these two go on by themselves.
        self.rows = {}
        positions, mask = model_kwargs.get("position_ids"), model_kwargs.get("attention_mask")
        if positions is not None:
            self.rows["position_ids"] = Extended(positions.to(self.device), counted)
            # Some targets without positions count them by the mask.
            mask = padding(mask)
        if mask is not None:
            self.rows["attention_mask"] = Extended(mask.to(self.device), ones)

    def commit(self, count: int) -> None:
        """Nothing is to be made longer."""

    def read(self, ids: torch.LongTensor, count: int, **more) -> torch.Tensor:
        """As of [`Passes`]."""
        inputs = {CACHE: self.cache, "use_cache": True}
        for name, rows in self.rows.items():
            inputs[name] = rows.upto(ids.shape[1])
        if "position_ids" in inputs:
            inputs["position_ids"] = inputs["position_ids"][..., -count:]
        ids = ids[:, -count:].to(self.device)
        with self.mode():
            self.outputs = self.target(input_ids=ids, **inputs, **more)
        return self.outputs.logits


class Decoding:
    """One `generate` call with drafts.

    Args:
        target (`PreTrainedModel`): the target, no wrapper.
        drafts (`BlockDrafts`): of this call.
        input_ids (`torch.LongTensor` of shape `(1, S)`): the prompt.
        logits_processor, stopping_criteria, generation_config, synced_gpus, streamer: as
            transformers has prepared them.
        model_kwargs (`dict`): of the target's passes.
    """

    def __init__(
        self,
        target,
        drafts: BlockDrafts,
        input_ids: torch.LongTensor,
        *,
        logits_processor,
        stopping_criteria,
        generation_config,
        model_kwargs: dict,
        synced_gpus: bool = False,
        streamer=None,
    ):
        config = generation_config
        self.target = target
        self.drafts = drafts
        self.config = config
        self.synced_gpus = synced_gpus
        self.streamer = streamer
        kind = LeanPasses if LeanPasses.serve(target, model_kwargs) else Passes
        self.passes = kind(target, config, model_kwargs)
        # Of a chat that goes on with a cache. The loop leaves it there anew at the end.
        self.past = take_past(self.passes.cache)
        self.ends = Ends(stopping_criteria, config.max_length)
        returns = config.return_dict_in_generate
        # of each committed token, (1, V) in fp32; `None` where nobody asked
        self.scores = [] if returns and config.output_scores else None
        self.logits = [] if returns and config.output_logits else None
        self.verify = Verifier(logits_processor, config.do_sample, self.scores is not None)
        # Where the prompt is, because processors were made for that device.
        self.text = Extended(input_ids.long(), lambda last, steps: steps * 0)
        self.length = input_ids.shape[1]  # S, committed tokens
        self.done = False
        # What brings the taps of a pass: hooks, or arguments of the pass.
        self.taps: Taps | None = None
        self.asked = {}
        self._tap()

    @torch.no_grad()
    def run(self):
        """Decode to the end.

        Returns:
            What `generate` returns: ids (1, S), or a `GenerateDecoderOnlyOutput`.
        """
        with nullcontext() if self.taps is None else self.taps.hooked(), self._products():
            self._prefill()
            goes_on, device = self.target._has_unfinished_sequences, self.text.rows.device
            with self._mode():
                while goes_on(self.done, self.synced_gpus, device=device):
                    if self.done:
                        # Another process is not done, and its passes need all processes.
                        self._idle()
                    else:
                        self._round()
        if self.streamer is not None:
            self.streamer.end()
        # All but the last token were read.
        keep_past(self.passes.cache, self.drafts.past(self.text.upto(self.length - 1)))
        sequences = self.text.upto(self.length).clone()
        if not self.config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=None if self.scores is None else tuple(self.scores),
            logits=None if self.logits is None else tuple(self.logits),
            **{CACHE: self.passes.cache},
        )

    def _mode(self):
        """What rounds run in: inference mode, where both models' passes do and nobody else's code
        sees a tensor. It makes what the loop does between the passes a fifth faster."""
        seen = self.ends.others or self.streamer or self.config.return_dict_in_generate
        if seen or not self.verify.scores_alone:
            return nullcontext()
        if nullcontext in (self.passes.mode, self.drafts.mode):
            return nullcontext()
        return torch.inference_mode()

    def _products(self):
        """How both models multiply. Compiled passes are left as they are."""
        if self.taps is None:
            return nullcontext()
        return few_rows(self.target, self.drafts.run)

    def _tap(self) -> None:
        """Decide what brings the taps."""
        ids = self.drafts.taps
        within = (self.target, self.target.base_model, self.target.get_decoder())
        compiled = any(getattr(one, "_compiled_call_impl", None) is not None for one in within)
        if not compiled and not self.passes.is_compiled:
            layers = decoder_layers(self.target)
            self.taps = Taps([layers[i] for i in ids])
            return
        if self.passes.mixers is not None:
            raise ValueError(
                f"a compiled {type(self.target).__name__} and a drafter cannot go together: its"
                " recurrent state is put back by hooks, which compiled code does not see. Attach"
                " the target without torch.compile"
            )
        self.passes.mode = nullcontext  # nor should it be compiled twice
        # Compiled code does not see hooks that are new. Entry 0 is the embedding.
        self.asked = {"output_hidden_states": [i + 1 for i in ids]}
        if self.config.prefill_chunk_size is not None:
            raise ValueError(
                "a compiled target and prefill_chunk_size leave the drafter the last chunk's hidden"
                " states alone: leave prefill_chunk_size out"
            )

    def _pass(self, run, *args) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """A pass of the target: logits (1, rows, V) where the text is, and of each tapped layer
        what it put out (1, rows, H)."""
        with self.taps or nullcontext():
            logits = run(*args, **self.asked)
        if self.taps is not None:
            taps = self.taps.take()
        else:
            taps = [self.passes.outputs.hidden_states[i + 1] for i in self.drafts.taps]
        return logits.to(self.text.rows.device), taps

    def _prefill(self) -> None:
        """Read the prompt, and choose the token after it."""
        ids = self.text.upto(self.length)
        first = self.passes.kwargs
        positions, mask = first.get("position_ids"), padding(first.get("attention_mask"))
        logits, taps = self._pass(self.passes.prefill, ids)
        verdict = self.verify(logits, None, ids)
        tokens = ids[0].tolist() + verdict.tokens if self.drafts.lookup is not None else []
        self.drafts.begin(taps, positions, mask, ids, tokens, self.past)
        self._commit(logits, verdict)

    def _round(self) -> None:
        """Draft, verify, commit."""
        # A pass commits one token more than it accepts, and that one must fit too.
        # Built-in: drafts past the length limit, and so past the end of a static cache.
        room = self.passes.room(self.ends.max_length - self.length - 1)
        draft = self.drafts.propose(self.text.upto(self.length), room)
        drafted = 0
        if draft is not None:
            drafted = draft.length
            self.text.upto(self.length + drafted)[:, self.length :] = draft.tokens
        ids = self.text.upto(self.length + drafted)
        width = self.passes.width(drafted + 1)
        read = self.text.upto(self.length + width - 1)
        logits, taps = self._pass(self.passes.run, read, width)
        logits = logits[:, : drafted + 1]  # (1, d + 1, V)
        verdict = self.verify(logits, draft, ids)
        count = self._commit(logits, verdict)
        # The last committed token was not read yet, and what was rejected is to be forgotten.
        self.passes.cut(width, count)
        self.passes.commit(count)
        self.drafts.learn(verdict.tokens[:count], verdict.accepted, draft)
        self.drafts.keep([one[:, :count] for one in taps])

    def _commit(self, logits: torch.Tensor, verdict) -> int:
        """Take tokens into the text, up to its end -> how many."""
        tokens, start = verdict.tokens, self.length
        # The drafted ones are there already.
        self.text.upto(start + len(tokens))[:, -1] = tokens[-1]

        def scores(count: int):
            if self.scores is None:
                return None
            return (*self.scores, *verdict.scores[:count])

        count, self.done = self.ends.first(self.text, start, tokens, scores)
        self.length += count
        if self.scores is not None:
            self.scores += verdict.scores[:count]
        if self.logits is not None:
            self.logits += logits[0, :count].to(torch.float32, copy=True).split(1)
        if self.streamer is not None:
            self.streamer.put(torch.tensor([tokens[:count]], device="cpu"))
        return count

    def _idle(self) -> None:
        """A pass whose result is not used."""
        self.passes.run(self.text.upto(self.length), 1, **self.asked)
        # A state stays one token ahead. Nothing reads it any more.
        self.passes.cache.crop(-1)


__all__ = ["Decoding"]
