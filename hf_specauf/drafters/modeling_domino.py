"""The Domino drafter: the DFlash backbone and a causal head on top. Travels to the Hub."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from .configuration_domino import DominoConfig
from .modeling_dflash import DFlashDraftModel, DraftOutput
from .overrides import generate_with_drafter
from .transformers_internals import Cache, DFlashCache, the_cache

# A whole Python file, which `save_pretrained` writes to custom_generate/generate.py of a drafter's
# folder: transformers runs it for `target.generate(custom_generate="owner/repo", ...)`.
# It is text in here, because a drafter that was loaded from the Hub must be able to save it again,
# and transformers copies to the Hub and back no file but the model's and those that it imports.
# It imports nothing. The drafter object brings the code, so that this code is of the revision which
# the user loaded.
CUSTOM_GENERATE = '''\
"""What target.generate(custom_generate="owner/repo", ...) runs: a Domino drafter as assistant."""


def generate(
    model,
    assistant_model=None,
    revision=None,
    token=None,
    cache_dir=None,
    local_files_only=None,
    force_download=None,
    proxies=None,
    **kwargs,
):
    """Generate with a Domino drafter: the target's own output, faster. `revision`, `token` and the
    other arguments of a download have served to find this file.

    Raises:
        ValueError: `assistant_model` is no drafter with a causal head.
    """
    if not hasattr(assistant_model, "generate_for"):
        raise ValueError(
            f"assistant_model is {type(assistant_model).__name__}: load the drafter with "
            "AutoModel.from_pretrained(..., trust_remote_code=True) and give it as assistant_model"
        )
    return assistant_model.generate_for(model, **kwargs)
'''

WHAT_TO_CALL = (
    "Call hf_specauf.generate(target, drafter, ...), or without that package target.generate(...,"
    ' custom_generate="<this repository>", trust_remote_code=True, assistant_model=drafter)'
)


def add_correction(logits: torch.Tensor, correction: torch.Tensor) -> torch.Tensor:
    """Domino's final logits (arXiv 2605.29707): base logits plus correction, both (..., V).

    They are added in the wider of their dtypes, and in fp32 at least.
    """
    wide = torch.promote_types(torch.promote_types(logits.dtype, correction.dtype), torch.float32)
    return logits.to(wide) + correction.to(wide)


class LowRankHead(nn.Sequential):
    """W2 SiLU(W1 x), in two halves where training needs the rows between them.

    The halves are properties. Where PEFT has wrapped this module, a property reaches the trained
    copy, and an index does not.
    """

    @property
    def down(self) -> nn.Module:
        """W1: (..., H + G) -> (..., E)"""
        return self[0]

    @property
    def up(self) -> nn.Module:
        """W2: (..., E) -> (..., V)"""
        return self[2]


class DominoDraftModel(DFlashDraftModel):
    """A DFlash drafter with a causal head (Domino, arXiv 2605.29707): the tokens drafted before a
    slot correct the backbone's logits of it.

    Prediction j is that of the token at anchor + 1 + j.

        state S_j        a GRU (one layer, no bias, zero at first) over the target's embeddings of
                         the tokens at anchor .. anchor + j
        correction       W2 SiLU(W1 [hidden ; S_j]), added to the base logits of prediction j
        hidden           that of slot j with `shift_label`, and of slot j + 1 without
        uncorrected      the first `pure_draft_prefix_len` predictions

    Letters are those of [`DFlashDraftModel`], and G the size of the state, E the correction's rank,
    V the vocabulary. Tensor names are SpecForge's, which SGLang reads.
    """

    config_class = DominoConfig

    def __init__(self, config: DominoConfig):
        super().__init__(config)
        self.prefix_gru = nn.GRU(
            config.hidden_size, config.gru_hidden_dim, bias=False, batch_first=True
        )
        self.embed_proj = LowRankHead(
            nn.Linear(config.hidden_size + config.gru_hidden_dim, config.emb_dim, bias=False),
            nn.SiLU(),
            nn.Linear(config.emb_dim, config.vocab_size, bias=False),
        )
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, nn.GRU):
            # By fan-in: the two things that a GRU reads, embedding and state, differ in width.
            for weight in module.parameters():
                init.normal_(weight, std=weight.shape[1] ** -0.5)

    def forward(
        self,
        noise_embeds: torch.Tensor,
        context_hidden_states: torch.Tensor,
        attention_mask=None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        *,
        cache: Cache | None = None,
        prev_embeds: torch.Tensor | None = None,
        reduce: Callable[[torch.Tensor, torch.Tensor | None, nn.Module | None], Any] | None = None,
    ) -> DraftOutput:
        """Fill the blocks as [`DFlashDraftModel`] does and, with `reduce`, run the causal head too.

        Args:
            noise_embeds, context_hidden_states, attention_mask, position_ids, past_key_values,
                cache: as of the backbone.
            prev_embeds (`torch.Tensor` of shape `(B, N, P, H)`, *optional*): target embeddings of
                the true tokens at anchor .. anchor + P - 1, P = `config.predictions` (teacher
                forcing); needed by `reduce`.
            reduce (`Callable`, *optional*): called by [`reduce_rows`]. What it returns is the
                output's `reduced`.

        Raises:
            ValueError: transformers' own DFlash generator runs a drafter whose slots are off by one
                for it. Where they are not, it leaves the causal head out, and we warn.
        """
        cache = the_cache(cache, past_key_values)
        # The cache of that generator, and of no other.
        if isinstance(cache, DFlashCache):
            if self.config.shift_label:
                raise ValueError(
                    'speculation_type="dflash" reads slot k as the token at anchor + k, but this'
                    " Domino drafter (shift_label: true) predicts the one after it: nothing would"
                    f" be accepted. {WHAT_TO_CALL}"
                )
            warnings.warn(
                f'speculation_type="dflash" leaves the causal head out. {WHAT_TO_CALL}',
                stacklevel=2,
            )
        return super().forward(
            noise_embeds,
            context_hidden_states,
            attention_mask,
            position_ids,
            cache=cache,
            prev_embeds=prev_embeds,
            reduce=reduce,
        )

    def reduce_rows(self, rows: torch.Tensor, prev_embeds: torch.Tensor, reduce: Callable) -> Any:
        """Call `reduce` with the rows that predict, and with what corrects their logits.

        Args:
            rows (`torch.Tensor` of shape `(B, N, P, H)`): hidden states of the predicting slots.
            prev_embeds (`torch.Tensor` of shape `(B, N, P, H)`): as of `forward`.
            reduce (`Callable`): (rows, low-rank rows (B, N, P, E), W2). W2 makes corrections
                (..., V) of the low-rank rows, a few slots at a time: all at once would fill the
                memory.
        """
        return reduce(rows, self.low_rank(rows, prev_embeds), self.embed_proj.up)

    def low_rank(self, hidden: torch.Tensor, prev_embeds: torch.Tensor) -> torch.Tensor:
        """SiLU(W1 [hidden ; S]) of all predictions at once, zero where nothing is corrected.

        Args:
            hidden, prev_embeds (`torch.Tensor` of shape `(B, N, P, H)`).

        Returns:
            `torch.Tensor` of shape `(B, N, P, E)`.
        """
        dtype = self.norm.weight.dtype
        batch, blocks, predictions, _ = hidden.shape
        tokens = prev_embeds.flatten(0, 1).to(dtype)  # (B * N, P, H)
        # A recurrence multiplies rounding errors, so it is no place to save bits.
        with torch.autocast(hidden.device.type, enabled=False):
            states, _ = self.prefix_gru(tokens)  # (B * N, P, G)
        states = states.view(batch, blocks, predictions, -1)  # (B, N, P, G)
        rows = torch.cat([hidden.to(dtype), states], dim=-1)  # (B, N, P, H + G)
        rows = nn.functional.silu(self.embed_proj.down(rows))  # (B, N, P, E)
        index = torch.arange(predictions, device=hidden.device)
        corrected = index >= self.config.pure_draft_prefix_len  # (P,)
        # A zero row makes a zero correction, because W2 has no bias.
        return (rows * corrected[:, None]).to(dtype)

    def correct(
        self,
        logits: torch.Tensor,
        hidden: torch.Tensor,
        prev_embed: torch.Tensor,
        state: torch.Tensor | None,
        j: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One step of the causal head in decoding, where tokens are drafted one after the other.

        Args:
            logits (`torch.Tensor` of shape `(1, V)`): base logits.
            hidden (`torch.Tensor` of shape `(1, H)`): of the slot that predicts.
            prev_embed (`torch.Tensor` of shape `(1, H)`): target embedding of the token at
                anchor + j.
            state (`torch.Tensor` of shape `(1, G)`, *optional*): from the call before; `None` at
                the first.
            j (`int`): index of the prediction.

        Returns:
            The corrected logits of prediction j `(1, V)`, and the state S_j `(1, G)`.
        """
        dtype = self.norm.weight.dtype
        prev_embed = prev_embed.to(dtype)
        if state is None:
            state = prev_embed.new_zeros(1, self.config.gru_hidden_dim)
        # One step of the same GRU, at half the cost of calling the module for a sequence of one.
        gru = self.prefix_gru
        state = torch.gru_cell(prev_embed, state, gru.weight_ih_l0, gru.weight_hh_l0)  # (1, G)
        if j >= self.config.pure_draft_prefix_len:
            correction = self.embed_proj(torch.cat([hidden.to(dtype), state], dim=-1))
            logits = add_correction(logits, correction.to(logits.device))
        return logits, state

    def generate_for(self, target, *args, **kwargs):
        """`target.generate(...)` with this drafter: the same output, faster. See
        [`generate_with_drafter`]."""
        return generate_with_drafter(target, self, *args, **kwargs)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """transformers' own, and `custom_generate/generate.py`.

        Raises:
            ValueError: `push_to_hub=True`, which would upload the folder before that file is in it.
        """
        if kwargs.get("push_to_hub"):
            raise ValueError(
                "save_pretrained(push_to_hub=True) would publish a Domino drafter without"
                " custom_generate/: save it, then call drafter.push_to_hub(repo), or python -m"
                " hf_specauf.hub push"
            )
        super().save_pretrained(save_directory, *args, **kwargs)
        path = Path(save_directory, "custom_generate", "generate.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(CUSTOM_GENERATE)


__all__ = ["DominoDraftModel"]
