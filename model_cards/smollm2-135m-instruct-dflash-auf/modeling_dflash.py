"""The DFlash drafter: one forward for training and decoding. Travels to the Hub."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import rms_norm

from .configuration_dflash import DFlashConfig, check_dtype
from .drafts import BlockDrafts
from .transformers_internals import (
    ALL_ATTENTION_FUNCTIONS,
    Cache,
    GradientCheckpointingLayer,
    PreTrainedModel,
    Qwen3MLP,
    Qwen3RotaryEmbedding,
    eager_attention_forward,
    rotate_half,
    the_cache,
    warn_if_newer_than_tested,
)


class RMSNorm(nn.RMSNorm):
    """torch's, with rows and weight of one dtype.

    Under autocast a projection's rows are bf16 and the weight is fp32. On GPUs autocast then takes
    the norm in fp32. On CPUs it leaves the two as they are, and torch warns that it has no fused
    kernel for them. Here both are of the wider dtype everywhere.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension. (..., H) -> (..., H)"""
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        wide = torch.promote_types(x.dtype, self.weight.dtype)
        return rms_norm(x.to(wide), self.normalized_shape, self.weight.to(wide), self.eps)


class RotaryEmbedding(Qwen3RotaryEmbedding):
    """Qwen3's, whose frequencies stay in fp32 when a whole module is cast, as they were trained.

    They are buffers, and `module.to(torch.bfloat16)` casts those too. In bf16 they are off by up to
    0.4 %, which is whole turns far into a text (NVIDIA-NeMo/Automodel#2549).
    """

    def _apply(self, fn, recurse=True):
        # Every cast and move of a module comes through here: `to`, `half`, `bfloat16`, `to_empty`.
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self


class DFlashAttention(nn.Module):
    """Queries from the block; keys and values from the context and the block (arXiv 2602.06036)."""

    def __init__(self, config: DFlashConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        # transformers' attention functions read these three.
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.is_causal = False
        # Read off here once: transformers' configs take their time for each.
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(
        self,
        block: torch.Tensor,  # (B, Q, H)
        context: torch.Tensor,  # (B, C, H), new context only: earlier context is in the cache
        cos: torch.Tensor,  # (B, 1, C + Q, head_dim)
        sin: torch.Tensor,  # (B, 1, C + Q, head_dim)
        attention_mask: torch.Tensor | tuple[torch.Tensor, ...] | BlockMask | None,
        cache: Cache | None,
    ) -> torch.Tensor:
        """What the block's slots read, (B, Q, H); masks as of [`DFlashDraftModel`]."""
        batch, slots, _ = block.shape
        heads, kv_heads, head_dim = self.heads, self.kv_heads, self.head_dim
        both = torch.cat([context, block], dim=1)  # (B, C + Q, H)
        query = self.q_proj(block).view(batch, -1, heads, head_dim)
        key = self.k_proj(both).view(batch, -1, kv_heads, head_dim)
        value = self.v_proj(both).view(batch, -1, kv_heads, head_dim)
        query = self.q_norm(query).transpose(1, 2)  # (B, heads, Q, head_dim)
        key = self.k_norm(key).transpose(1, 2)  # (B, kv_heads, C + Q, head_dim)
        value = value.transpose(1, 2)  # (B, kv_heads, C + Q, head_dim)
        # Queries stand at the last Q positions.
        query = query * cos[:, :, -slots:] + rotate_half(query) * sin[:, :, -slots:]
        key = key * cos + rotate_half(key) * sin
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)  # (B, kv_heads, kv, head_dim)
        if isinstance(attention_mask, tuple):
            read = self._attend_in_groups(query, key, value, attention_mask)
        else:
            read = self._attend(query, key, value, attention_mask)
        return self.o_proj(read.reshape(batch, slots, -1))  # (B, Q, H)

    def _attend_in_groups(self, query, key, value, masks: tuple) -> torch.Tensor:
        """Training's groups of blocks, one by one. (B, heads, Q, ...) -> (B, Q, heads, ...)

        A group reads a prefix of the context and its own slots. One mask over all slots would be
        mostly about other blocks, which a slot may not see.
        """
        length = key.shape[2] - query.shape[2]  # of the context
        outputs, start = [], 0
        for mask in masks:  # (B, 1, Q_g, C_g + Q_g)
            size = mask.shape[2]
            seen = mask.shape[3] - size
            own = slice(length + start, length + start + size)
            keys = torch.cat([key[:, :, :seen], key[:, :, own]], dim=2)
            values = torch.cat([value[:, :, :seen], value[:, :, own]], dim=2)
            outputs.append(self._attend(query[:, :, start : start + size], keys, values, mask))
            start += size
        return torch.cat(outputs, dim=1)

    def _attend(self, query, key, value, mask) -> torch.Tensor:  # (B, Q, heads, head_dim)
        name = self.config._attn_implementation
        if name == "flex_attention" and not isinstance(mask, BlockMask):
            # Flex serves training's block masks. In decoding a block is a few slots: SDPA's.
            name = "sdpa"
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        return attend(self, query, key, value, mask, dropout=0.0, scaling=self.scaling)[0]


class DFlashDecoderLayer(GradientCheckpointingLayer):
    """Attention over context and block, and Qwen3's MLP, before each a norm."""

    def __init__(self, config: DFlashConfig, layer_idx: int):
        super().__init__()
        self.self_attn = DFlashAttention(config, layer_idx)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states, context, cos, sin, attention_mask=None, cache=None):
        """The block's hidden states, (B, Q, H) -> (B, Q, H); the rest as of
        [`DFlashAttention.forward`]."""
        # The norm is the block's alone: the context has had its own, once for all layers.
        hidden_states = hidden_states + self.self_attn(
            self.input_layernorm(hidden_states), context, cos, sin, attention_mask, cache
        )
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class DraftOutput(NamedTuple):
    """`last_hidden_state` of shape `(B, Q, H)`, and what `reduce` returned.

    No `ModelOutput`, because to make one takes longer than a norm, and decoding makes one a pass.
    """

    last_hidden_state: torch.Tensor
    reduced: Any = None


class DFlashDraftModel(PreTrainedModel):
    """A masked block drafter that reads the target's hidden states (DFlash, arXiv 2602.06036).

    It has neither embedding nor head: both are the target's own. Tensor names are the z-lab layout,
    which vLLM and SGLang read.

    Shapes: B rows, N blocks a row of K slots each (Q = N * K slots in all), P slots of a block that
    predict, C positions of new context, kv all keys (cached context, new context and slots), H
    hidden size, L taps. Decoding has B = N = 1.

    Attention masks are bool and say what a slot sees:

        `None`                everything
        `(B, kv)`             a padding mask, the same for all slots (decoding)
        `(B, 1, Q, kv)`       a mask a slot
        tuple (training)      for each group of Q_g consecutive slots a mask `(B, 1, Q_g, C_g +
                              Q_g)`: its keys are the first C_g context positions and its own slots
        `BlockMask`           covers all slots (training with `flex_attention`)
    """

    config_class = DFlashConfig
    base_model_prefix = "model"
    main_input_name = "noise_embeds"
    supports_gradient_checkpointing = True
    # A causal head's step in decoding; see `DominoDraftModel.correct`.
    correct = None
    # Or Trainer would think that forward divides by num_items_in_batch.
    accepts_loss_kwargs = False
    _no_split_modules = ["DFlashDecoderLayer"]
    # accelerate leaves a cache where it is, under either name.
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: DFlashConfig):
        warn_if_newer_than_tested()
        super().__init__(config)
        taps = len(config.target_layer_ids)
        self.fc = nn.Linear(taps * config.hidden_size, config.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.layers = nn.ModuleList(
            DFlashDecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        noise_embeds: torch.Tensor,
        context_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | tuple[torch.Tensor, ...] | BlockMask | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        *,
        cache: Cache | None = None,
        prev_embeds: torch.Tensor | None = None,
        reduce: Callable[[torch.Tensor, torch.Tensor | None, nn.Module | None], Any] | None = None,
    ) -> DraftOutput:
        """Fill the blocks. Training passes what transformers' own DFlash generator passes, too.

        Args:
            noise_embeds (`(B, Q, H)`): target embeddings of anchors and mask tokens.
            context_hidden_states (`(B, C, L * H)`): tapped hidden states of the new context.
            attention_mask (*optional*): what each slot sees; its forms stand at the class.
            position_ids (`(B, C + Q)`, *optional*): by default counted on from the cache.
            past_key_values, cache (*optional*): keys and values of earlier context, by either name.
                The block's own are appended too, and the caller crops them.
            prev_embeds (`(B, N, P, H)`, *optional*): target embeddings of the true tokens before
                each prediction, for drafters with a causal head. This one reads none.
            reduce (*optional*): in training, makes losses of what [`reduce_rows`] gives it. It runs
                inside the forward, because a drafter's own head may be sharded.

        Returns:
            [`DraftOutput`] with `last_hidden_state` of shape `(B, Q, H)` in `noise_embeds`' dtype.
        """
        cache = the_cache(cache, past_key_values)
        dtype = self.norm.weight.dtype
        check_dtype(dtype)
        # transformers' own generator cuts M-RoPE's positions (4, 1, S) along their second axis, so
        # that nothing is left of them.
        if position_ids is None or position_ids.numel() == 0:
            position_ids = self._count_on(noise_embeds, context_hidden_states, cache)
        hidden_states = noise_embeds.to(dtype)
        context = self.hidden_norm(self.fc(context_hidden_states.to(dtype)))  # (B, C, H)
        cos, sin = self.rotary_emb(hidden_states, position_ids)  # (B, C + Q, head_dim)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # (B, 1, C + Q, head_dim)
        mask = self._prepare_mask(attention_mask, dtype)
        for layer in self.layers:
            hidden_states = layer(hidden_states, context, cos, sin, mask, cache)
        hidden_states = self.norm(hidden_states).to(noise_embeds.dtype)
        # Without the cache, which was changed in place: nobody reads it off a drafter's output.
        if reduce is None:
            return DraftOutput(hidden_states)
        batch, _, size = hidden_states.shape
        blocks = hidden_states.view(batch, -1, self.config.block_size, size)  # (B, N, K, H)
        rows = blocks[:, :, self.config.predicting_slots]  # (B, N, P, H)
        return DraftOutput(hidden_states, self.reduce_rows(rows, prev_embeds, reduce))

    def reduce_rows(
        self, rows: torch.Tensor, prev_embeds: torch.Tensor | None, reduce: Callable
    ) -> Any:
        """Call `reduce` with the rows that predict, and with what corrects their logits.

        Args:
            rows (`torch.Tensor` of shape `(B, N, P, H)`): hidden states of the predicting slots.
            prev_embeds (`torch.Tensor` of shape `(B, N, P, H)`, *optional*): as of `forward`.
            reduce (`Callable`): (rows, low-rank rows, the module that makes corrections of those).
                The last two are `None` here, because nothing corrects DFlash's logits.
        """
        return reduce(rows, None, None)

    @staticmethod
    def _count_on(noise_embeds, context_hidden_states, cache) -> torch.LongTensor:  # (B, C + Q)
        """Positions of new context and slots, where the cache ends."""
        past = cache.get_seq_length() if cache is not None else 0
        new = context_hidden_states.shape[1] + noise_embeds.shape[1]
        positions = torch.arange(past, past + new, device=noise_embeds.device)
        return positions.expand(noise_embeds.shape[0], -1)

    def _prepare_mask(self, mask, dtype: torch.dtype):
        """A mask as the attention implementation takes it: (B, 1, Q or 1, kv), or as it came."""
        if mask is None or isinstance(mask, BlockMask):
            return mask
        if isinstance(mask, tuple):
            return tuple(self._prepare_mask(part, dtype) for part in mask)
        mask = mask.bool()
        if mask.dim() == 2:
            mask = mask[:, None, None, :]
        if self.config._attn_implementation != "eager":
            return mask
        # Eager attention adds its mask to the scores.
        scores = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        return scores.masked_fill(~mask, torch.finfo(dtype).min)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """transformers' own property by its old name, which peft 0.21 still asks for. transformers'
        own warns."""
        return self.is_activation_checkpointing

    def get_input_embeddings(self) -> None:
        """None, for accelerate's FSDP, which asks: the embedding is the target's."""

    def get_drafts(self, target, generation_config, **kwargs) -> BlockDrafts:
        """What drafts for one `generate` call of a target; see [`BlockDrafts`]."""
        return BlockDrafts(self, target, generation_config, **kwargs)


__all__ = ["DFlashDraftModel"]
