"""Decoding without a drafter: drafts are looked up in the text, and nothing was trained.

It takes the place of a block drafter in our loop, with the same costs and the same account.
"""

from types import SimpleNamespace

import torch

from ..drafters.drafts import UNSET_ASSISTANT_TOKENS, BlockDrafts
from ..drafters.lookup import Lookup
from ..drafters.transformers_internals import DynamicCache
from ..drafters.verification import Draft


class LookupDrafts(BlockDrafts):
    """Drafts for one `generate` call, all of them looked up.

    Args:
        drafter ([`NoDrafter`]): what stands in its place.
        target: not needed.
        generation_config (`GenerationConfig`): of the call.
        lookup, draft_length, skip_round, rounds: as of [`BlockDrafts`].
        not_needed: its others, which are about a drafter. A looked-up token was drawn from nothing,
            so that no logits processor touches it.
    """

    def __init__(
        self,
        drafter,
        target,
        generation_config,
        *,
        lookup,
        draft_length=None,
        skip_round=None,
        rounds: list | None = None,
        **not_needed,
    ):
        self.drafter = drafter
        self.run = None  # there is no drafter that could run
        self.taps = []
        self.lookup = lookup
        self.index = Lookup()
        self.draft_length = draft_length
        self.skip_round = skip_round
        self.rounds = rounds if rounds is not None else []
        # A drafter would have read the text into these.
        self.cache, self.pending = DynamicCache(), []
        self.confidences = self.drafting_seconds = None
        self.mode = torch.inference_mode  # there is no model that could mind
        self.longest = lookup.longest
        if generation_config.num_assistant_tokens not in (None, UNSET_ASSISTANT_TOKENS):
            self.longest = generation_config.num_assistant_tokens

    def begin(self, taps, positions, mask, ids, tokens, past=None) -> None:
        """Take in the prompt and the token after it."""
        self.index.extend(tokens)

    def keep(self, taps) -> None:
        """Nothing is drafted from hidden states."""

    def _propose(self, ids: torch.LongTensor, room: int) -> Draft | None:
        self.found, self.looked_up = None, False
        if room <= 0 or (self.skip_round is not None and self.skip_round(self.rounds)):
            return None
        tokens = self._look_up(min(room, self.longest), 0)
        if not tokens:
            return None
        self.looked_up = True
        return Draft(torch.tensor([tokens], device=ids.device))


class NoDrafter:
    """What is given as `assistant_model` where there is no drafter."""

    config = SimpleNamespace(block_size=1)

    def get_drafts(self, target, generation_config, **kwargs) -> LookupDrafts:
        """What drafts for one `generate` call of a target."""
        return LookupDrafts(self, target, generation_config, **kwargs)

    def eval(self) -> "NoDrafter":
        """As a module's, because whoever attaches calls it."""
        return self


# One for all, so that a cache which one call left can be given to another.
NO_DRAFTER = NoDrafter()

__all__ = ["NO_DRAFTER", "LookupDrafts", "NoDrafter"]
