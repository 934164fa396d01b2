"""The DFlash drafter: one forward for training and decoding. Travels to the Hub."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.modeling_outputs import BaseModelOutput

from .configuration_dflash import DFlashConfig
from .generation_block import BlockCandidateGenerator
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


class DFlashAttention(nn.Module):
    """Queries from the block; keys and values from the context and the block (arXiv 2602.06036)."""

    def __init__(self, config: DFlashConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.is_causal = False
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(
            config.hidden_size, config.num_attention_heads * config.head_dim, bias=False
        )
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(
            config.num_attention_heads * config.head_dim, config.hidden_size, bias=False
        )
        self.q_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(
        self,
        block: torch.Tensor,  # (B, Q, H)
        context: torch.Tensor,  # (B, C, H), new context only: earlier context is in the cache
        cos: torch.Tensor,  # (B, 1, C + Q, head_dim)
        sin: torch.Tensor,
        attention_mask: torch.Tensor | tuple[torch.Tensor, ...] | None,
        cache: Cache | None,
    ) -> torch.Tensor:
        """What the block's slots read, (B, Q, H); masks as of [`DFlashDraftModel.forward`]."""
        batch, slots, _ = block.shape
        both = torch.cat([context, block], dim=1)
        heads = (batch, -1, self.head_dim)
        query = self.q_norm(self.q_proj(block).view(heads[0], slots, -1, heads[2])).transpose(1, 2)
        key = self.k_norm(self.k_proj(both).view(heads[0], both.shape[1], -1, heads[2])).transpose(
            1, 2
        )
        value = self.v_proj(both).view(heads[0], both.shape[1], -1, heads[2]).transpose(1, 2)
        query = query * cos[:, :, -slots:] + rotate_half(query) * sin[:, :, -slots:]
        key = key * cos + rotate_half(key) * sin
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        key = key.to(query.dtype)
        if not isinstance(attention_mask, tuple):
            return self.o_proj(
                self._attend(query, key, value, attention_mask).reshape(batch, slots, -1)
            )
        outputs, start, length = [], 0, context.shape[1]
        for mask in attention_mask:
            size = mask.shape[2]
            seen, own = mask.shape[3] - size, slice(length + start, length + start + size)
            keys, values = (
                torch.cat([part[:, :, :seen], part[:, :, own]], dim=2) for part in (key, value)
            )
            outputs.append(self._attend(query[:, :, start : start + size], keys, values, mask))
            start += size
        return self.o_proj(torch.cat(outputs, dim=1).reshape(batch, slots, -1))

    def _attend(self, query, key, value, mask) -> torch.Tensor:  # (B, Q, heads, head_dim)
        name = self.config._attn_implementation
        if name == "flex_attention" and not isinstance(mask, BlockMask):
            name = "sdpa"  # flex serves training's block masks; decoding's few slots are SDPA's
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        return attend(self, query, key, value, mask, dropout=0.0, scaling=self.scaling)[0]


class DFlashDecoderLayer(GradientCheckpointingLayer):
    """Attention over context and block, and Qwen3's MLP, before each a norm."""

    def __init__(self, config: DFlashConfig, layer_idx: int):
        super().__init__()
        self.self_attn = DFlashAttention(config, layer_idx)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states, context, cos, sin, attention_mask=None, cache=None):
        """The block's hidden states, (B, Q, H) -> (B, Q, H); the rest as of
        [`DFlashAttention.forward`]."""
        hidden_states = hidden_states + self.self_attn(
            self.input_layernorm(hidden_states), context, cos, sin, attention_mask, cache
        )
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


@dataclass
class DraftOutput(BaseModelOutput):
    """`last_hidden_state` of shape `(B, Q, H)`, and what `reduce` returned."""

    reduced: Any = None


class DFlashDraftModel(PreTrainedModel):
    """A masked block drafter that reads the target's hidden states (DFlash, arXiv 2602.06036).

    It has neither embedding nor head: both are the target's own. Tensor names are the z-lab layout,
    which vLLM and SGLang read.
    """

    config_class = DFlashConfig
    base_model_prefix = "model"
    main_input_name = "noise_embeds"
    supports_gradient_checkpointing = True
    correct = None  # a causal head's step in decoding; see `DominoDraftModel`
    accepts_loss_kwargs = False  # Trainer must not think that forward divides by num_items_in_batch
    _no_split_modules = ["DFlashDecoderLayer"]
    _skip_keys_device_placement = [
        "past_key_values",
        "cache",
    ]  # a cache stays where it is, under either name
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: DFlashConfig):
        warn_if_newer_than_tested()
        super().__init__(config)
        self.fc = nn.Linear(
            len(config.target_layer_ids) * config.hidden_size, config.hidden_size, bias=False
        )
        self.hidden_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.layers = nn.ModuleList(
            DFlashDecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = Qwen3RotaryEmbedding(config=config)
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
        """Fill the blocks: the five arguments transformers' own DFlash generator passes, used in
        training too.

        Args:
            noise_embeds (`torch.Tensor` of shape `(B, Q, H)`): target embeddings of the block(s):
                anchor and masks.
            context_hidden_states (`torch.Tensor` of shape `(B, C, L * H)`): tapped hidden states of
                the new context.
            attention_mask (`torch.Tensor` or tuple, *optional*): bool; `(B, kv)` padding mask over
                cached context, new context and block, or `(B, 1, Q, kv)`. `None`: every slot sees
                everything. A tuple (training) holds one mask `(B, 1, Q_g, C_g + Q_g)` for each
                group of Q_g consecutive slots, whose keys are the first C_g context positions and
                the group's own slots; a `BlockMask` (training with `flex_attention`) covers all.
            position_ids (`torch.LongTensor` of shape `(B, C + Q)`, *optional*): by default counts
                on from the cache.
            past_key_values, cache (`Cache`, *optional*): keys and values of earlier context, under
                the name of either transformers version, not both; the block's own are appended too,
                and the caller crops them.
            prev_embeds (`torch.Tensor` of shape `(B, N, P, H)`, *optional*): target embeddings of
                the true tokens before each prediction, for drafters with a causal head; this one
                reads none.
            reduce (`Callable`, *optional*): in training, what makes losses of the hidden rows (B,
                N, P, H) that predict. It runs inside the forward, because a drafter's own head may
                be sharded. It is also given low-rank rows and the module that makes corrections of
                them, where a causal head corrects logits.

        Returns:
            [`DraftOutput`] with `last_hidden_state` of shape `(B, Q, H)` in `noise_embeds`' dtype.
        """
        cache = the_cache(cache, past_key_values)
        dtype = self.norm.weight.dtype
        if dtype == torch.float16:
            raise ValueError(
                "fp16 drafters accept nothing (vllm#55250): load the drafter in bfloat16 or float32"
            )
        batch, slots, _ = noise_embeds.shape
        if position_ids is None:
            past = cache.get_seq_length() if cache is not None else 0
            new = context_hidden_states.shape[1] + slots
            position_ids = torch.arange(past, past + new, device=noise_embeds.device).expand(
                batch, -1
            )
        hidden_states = noise_embeds.to(dtype)
        context = self.hidden_norm(self.fc(context_hidden_states.to(dtype)))
        cos, sin = (table.unsqueeze(1) for table in self.rotary_emb(hidden_states, position_ids))
        mask = self._prepare_mask(attention_mask, dtype)
        for layer in self.layers:
            hidden_states = layer(hidden_states, context, cos, sin, mask, cache)
        hidden_states = self.norm(hidden_states).to(noise_embeds.dtype)
        # without the cache, which is changed in place: nobody reads it off a drafter
        output = DraftOutput(last_hidden_state=hidden_states)
        if reduce is not None:
            blocks = hidden_states.view(batch, -1, self.config.block_size, hidden_states.shape[-1])
            output.reduced = self.reduce_rows(
                blocks[:, :, self.config.predicting_slots], prev_embeds, reduce
            )
        return output

    def reduce_rows(
        self, rows: torch.Tensor, prev_embeds: torch.Tensor | None, reduce: Callable
    ) -> Any:
        """Give `reduce` the rows (B, N, P, H) that predict, and whatever corrects their logits:
        here nothing."""
        return reduce(rows, None, None)

    def _prepare_mask(self, mask, dtype: torch.dtype):
        if mask is None:
            return None
        if isinstance(mask, BlockMask):
            return mask
        if isinstance(mask, tuple):
            return tuple(self._prepare_mask(part, dtype) for part in mask)
        mask = mask.bool() if mask.dim() == 4 else mask.bool()[:, None, None, :]
        if self.config._attn_implementation == "eager":  # eager adds its mask to the scores
            return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(
                ~mask, torch.finfo(dtype).min
            )
        return mask

    @property
    def is_gradient_checkpointing(self) -> bool:
        """transformers' own property by its old name, without its warning: peft 0.21 still asks by
        that name."""
        return self.is_activation_checkpointing

    def get_input_embeddings(self) -> None:
        """There is none, which accelerate's FSDP asks for: embeddings are the target's."""

    def get_candidate_generator(
        self, target, generation_config, **kwargs
    ) -> BlockCandidateGenerator:
        """Our candidate generator for this drafter; see [`BlockCandidateGenerator`]."""
        return BlockCandidateGenerator(self, target, generation_config, **kwargs)


__all__ = ["DFlashDraftModel"]
