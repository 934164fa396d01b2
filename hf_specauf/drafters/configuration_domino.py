"""Configuration of a Domino drafter. Travels to the Hub: imports only torch and its sibling."""

from typing import Any

import torch

from .configuration_dflash import REQUIRED_KEYS, DFlashConfig


class DominoConfig(DFlashConfig):
    r"""Configuration of a [`DominoDraftModel`] (Domino, arXiv 2605.29707): a DFlash backbone and a
    causal head.

    The keys are those SpecForge writes and SGLang reads.

    Args:
        gru_hidden_dim (`int`, *optional*, defaults to 1024): G, size of the state that the head
            keeps of drafted tokens.
        emb_dim (`int`, *optional*, defaults to 256): E, rank of the correction of the logits.
        pure_draft_prefix_len (`int`, *optional*, defaults to 1): the first predictions of a block
            that are left to the backbone alone, without correction; SGLang serves 1.
        shift_label (`bool`, *optional*, defaults to `True`): label alignment. `True`: slot k
            predicts the token at anchor + 1 + k, and a block has K predictions. `False`: that at
            anchor + k, K - 1 predictions (DFlash).

    The other arguments are those of [`DFlashConfig`].
    """

    # What differs from a DFlash drafter's answers. `DFlashConfig` says what is asked.
    model_type = "specauf_domino"
    kind = "domino"
    required_keys = (*REQUIRED_KEYS, "gru_hidden_dim", "emb_dim", "pure_draft_prefix_len")
    own_keys = {
        "gru_hidden_dim": "size of the causal head's state (default 1024).",
        "emb_dim": "rank of the correction of the logits (default 256).",
        "pure_draft_prefix_len": "first predictions of a block left uncorrected (default 1).",
        "shift_label": "slot k predicts the token after its own (default true).",
    }
    branches = 2
    reads_previous_tokens = True
    starts_at_random = ("fc", "prefix_gru", "embed_proj")
    owns_vocabulary = True
    runs_in_native_generator = False
    card_tags = ("domino", "arxiv:2605.29707")
    card_method = (
        "Domino, a causal head ([arXiv 2605.29707](https://arxiv.org/abs/2605.29707)) on DFlash, "
    )

    gru_hidden_dim: int = 1024
    emb_dim: int = 256
    pure_draft_prefix_len: int = 1
    shift_label: bool = True

    def probe(self) -> dict[str, torch.Tensor]:
        """As of the backbone, and the previous tokens for the causal head, (1, 1, P, H)."""
        generator = torch.Generator().manual_seed(1)
        shape = (1, 1, self.predictions, self.hidden_size)
        return super().probe() | {"prev_embeds": torch.randn(shape, generator=generator)}

    @classmethod
    def card_rows(cls, config: dict[str, Any]) -> dict[str, str]:
        """The causal head's shape."""
        said = (
            "state {gru_hidden_dim}, rank {emb_dim}, {pure_draft_prefix_len} uncorrected,"
            " shift_label {shift_label}"
        )
        return {"causal head": said.format(**config)}

    @property
    def dflash_config(self) -> dict[str, Any]:
        """The same fields in the shape SpecForge writes and SGLang reads."""
        own = {key: getattr(self, key) for key in sorted(self.own_keys)}
        return super().dflash_config | {"projector_type": self.kind} | own

    def _check(self, mirrored: dict[str, Any]) -> None:
        if min(self.gru_hidden_dim, self.emb_dim) < 1:
            raise ValueError(
                f"gru_hidden_dim is {self.gru_hidden_dim} and emb_dim {self.emb_dim}: the causal"
                " head needs 1 or more of each; published drafters have 1024 and 256"
            )
        if not 0 <= self.pure_draft_prefix_len < self.predictions:
            raise ValueError(
                f"pure_draft_prefix_len is {self.pure_draft_prefix_len}: it must be in"
                f" 0..{self.predictions - 1}, or no prediction of a block would be corrected and"
                " the head never trained. Published drafters have 1."
            )
        super()._check(mirrored)


__all__ = ["DominoConfig"]
