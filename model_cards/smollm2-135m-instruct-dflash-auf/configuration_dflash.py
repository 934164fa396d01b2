"""Configuration of a DFlash drafter. Travels to the Hub: imports only torch and transformers."""

from inspect import get_annotations
from typing import Any

import torch
from transformers.configuration_utils import PreTrainedConfig

# Never guessed when a folder is loaded: each of them decides acceptance (z-lab#156,
# speculators#613).
REQUIRED_KEYS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "vocab_size", "rms_norm_eps", "rope_parameters",
    "max_position_embeddings", "target_layer_ids", "block_size", "mask_token_id",
    "num_target_layers", "shift_label",
)  # fmt: skip
# What transformers itself puts into a config or passes to its constructor.
_TRANSFORMERS_KEYS = {
    "name_or_path", "_name_or_path", "_commit_hash", "auto_map", "model_type",
    "attn_implementation", "torch_dtype", "output_attentions", "use_cache", "num_labels",
    "_attn_implementation_autoset",
}  # fmt: skip


def check_dtype(dtype: torch.dtype | str | None) -> None:
    """Raise for fp16, as a config stores it or as weights have it.

    Raises:
        ValueError: names the dtypes that work.
    """
    if dtype in (torch.float16, "float16", "torch.float16"):
        raise ValueError(
            "fp16 drafters accept nothing (vllm#55250): use bfloat16 or float32 instead of float16,"
            " e.g. load the drafter with dtype=torch.bfloat16"
        )


def check_target_layer_ids(target_layer_ids: list[int], num_target_layers: int) -> None:
    """Raise unless the taps are sorted, unique and name layers whose output is read before the
    final norm.

    Args:
        target_layer_ids (`list[int]`): 0-based decoder layers whose *output* is read
            (`hidden_states[id + 1]`).
        num_target_layers (`int`): decoder layers of the target.
    """
    ids = target_layer_ids
    last = num_target_layers - 2
    # Not `isinstance`, because True is an int, too.
    if not ids or any(type(i) is not int for i in ids):
        raise ValueError(
            f"target_layer_ids is {ids!r}: give at least one integer, e.g. target_layer_ids: [1,"
            f" {last}]"
        )
    if any(i < 0 or i > last for i in ids):
        raise ValueError(
            f"target_layer_ids {ids} leaves the allowed range 0..{last} of a target with"
            f" {num_target_layers} layers. Layer {num_target_layers - 1} is the last one:"
            " transformers returns it after the final norm, engines read it before, and the"
            " drafter would lose acceptance silently. Change target_layer_ids."
        )
    if ids != sorted(set(ids)):
        raise ValueError(
            f"target_layer_ids {ids} must be sorted and without repeats: the order is the layout of"
            f" fc.weight, and other engines sort it. Use target_layer_ids: {sorted(set(ids))}"
        )


class DFlashConfig(PreTrainedConfig):
    r"""Configuration of a [`DFlashDraftModel`] (DFlash, arXiv 2602.06036).

    The defaults are the shapes of the Spec-AUF paper's Qwen3-8B drafter (arXiv 2607.01893). A
    folder that is loaded must name every key that decides acceptance.

    Args:
        hidden_size (`int`, *optional*, defaults to 4096): H, equal to the target's.
        num_hidden_layers (`int`, *optional*, defaults to 5): layers of the drafter.
        target_layer_ids (`list[int]`, *optional*): taps, 0-based target layers whose output is
            read.
        block_size (`int`, *optional*, defaults to 16): K, slots of a block, anchor included.
        mask_token_id (`int`, *optional*, defaults to 151669): token of slots 1..K-1; never pad, eos
            or bos.
        num_target_layers (`int`, *optional*, defaults to 36): decoder layers of the target.
        shift_label (`bool`, *optional*, defaults to `False`): label alignment. `False`: slot k
            predicts the token at anchor + k (DFlash). `True` exists only for Domino drafters.
        vocab_size (`int`, *optional*, defaults to 151936): rows of the target's embedding.
        rope_parameters (`dict`, *optional*): exactly `{"rope_type": "default", "rope_theta":
            float}`.
        max_position_embeddings (`int`, *optional*, defaults to 40960): the target's, never the
            training length.
        chat_template_kwargs (`dict`, *optional*): arguments of the target's chat template used in
            training.
        target_model_name_or_path, target_revision (`str`, *optional*): the target this drafter was
            trained for.
        target_fingerprint (`str`, *optional*): of the target's weights.
        tokenizer_hash, chat_template_hash (`str`, *optional*): of the target's, as they were in
            training.
        borrowed_layers (`list[int]`, *optional*): the folder holds no layers, they are the target's
            own; only `hf_specauf.from_target` loads it.
        eos_token_id, pad_token_id, bos_token_id (*optional*): the target's.
    """

    # For transformers' own FSDP2: each layer is gathered for its use, and freed after it.
    base_model_fsdp_plan = {"layers.*": "free_full_weight"}

    # ---- What the rest of the package asks of a drafter, instead of asking which one it is. A new
    # drafter's config answers these, in this order: the first two always, and of the others those
    # whose answer differs. None has a type annotation, because whatever has one becomes a field of
    # config.json.

    model_type = "specauf_dflash"  # what config.json calls it
    kind = "dflash"  # what recipes call it: its name in `DRAFTERS`
    required_keys = REQUIRED_KEYS  # without which no config.json is loaded
    own_keys = {}  # recipe keys that no other drafter has: {key: what --help says}
    branches = 1  # of logits; 2 where a causal head corrects the backbone's
    reads_previous_tokens = False  # whether training tells each slot the true tokens before it
    starts_at_random = ("fc",)  # modules that no layer of a target can be copied into
    owns_vocabulary = False  # whether it has weights of its own for each token
    runs_in_native_generator = True  # by `speculation_type="dflash"`, without this package
    card_tags = ("dflash",)
    card_method = "DFlash, "  # how its card's sentence on the method begins

    @property
    def predictions(self) -> int:
        """P, the tokens a block predicts in training. Decoding drafts K - 1 in either alignment."""
        if self.shift_label:
            return self.block_size
        # The anchor's own slot predicts nothing.
        return self.block_size - 1

    @property
    def predicting_slots(self) -> slice:
        """The slots of a block whose hidden states predict: the last P."""
        return slice(self.block_size - self.predictions, None)

    def probe(self) -> dict[str, torch.Tensor]:
        """Arguments of a forward on which two drafters of this shape can be compared.

        Random numbers from a fixed seed, so that two processes make the same.
        """
        generator = torch.Generator().manual_seed(0)
        taps = len(self.target_layer_ids) * self.hidden_size
        return {
            "noise_embeds": torch.randn(1, self.block_size, self.hidden_size, generator=generator),
            "context_hidden_states": torch.randn(1, 7, taps, generator=generator),
        }

    @property
    def dflash_config(self) -> dict[str, Any]:
        """The same fields in the shape z-lab, vLLM and SGLang read; written beside the top-level
        ones."""
        return {"mask_token_id": self.mask_token_id, "target_layer_ids": self.target_layer_ids}

    @classmethod
    def card_rows(cls, config: dict[str, Any]) -> dict[str, str]:
        """Lines of a card's table that only this drafter has, from its config.json."""
        return {}

    # ---- The fields of config.json.

    hidden_size: int = 4096
    intermediate_size: int = 12288
    num_hidden_layers: int = 5
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    vocab_size: int = 151936
    max_position_embeddings: int = 40960
    rope_parameters: dict | None = None
    layer_types: list[str] | None = None
    block_size: int = 16
    mask_token_id: int = 151669
    target_layer_ids: list[int] | None = None
    num_target_layers: int = 36
    shift_label: bool = False
    chat_template_kwargs: dict | None = None
    target_model_name_or_path: str | None = None
    target_revision: str | None = None
    target_fingerprint: str | None = None
    tokenizer_hash: str | None = None
    chat_template_hash: str | None = None
    borrowed_layers: list[int] | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, dflash_config: dict[str, Any] | None = None, **kwargs):
        """Fill in what was left out, and check everything; `kwargs` are keys that are no fields."""
        unknown = sorted(set(kwargs) - _TRANSFORMERS_KEYS)
        if unknown:
            raise ValueError(
                f"Unknown key(s) {unknown} in a {self.model_type} config: they would be ignored and"
                " the drafter would not be what its config says. Correct or remove them. Known"
                f" keys: {sorted(self._own_keys())}"
            )
        if self.target_layer_ids is None:
            self.target_layer_ids = [1, 9, 17, 25, 33]
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 1_000_000.0}
        if self.layer_types is None:
            self.layer_types = ["full_attention"] * self.num_hidden_layers
        super().__post_init__(**kwargs)
        self._check(dflash_config or {})

    # ---- Checks: whatever is refused here would cost acceptance silently.

    def _check(self, mirrored: dict[str, Any]) -> None:
        """Raise unless all fields can be meant.

        Args:
            mirrored (`dict`): `dflash_config` as the folder has it.
        """
        check_target_layer_ids(self.target_layer_ids, self.num_target_layers)
        check_dtype(self.dtype)
        if self.block_size < 2:
            raise ValueError(
                f"block_size is {self.block_size}: a block is an anchor and at least one drafted"
                " slot; use >= 2"
            )
        if self.shift_label and self.kind == "dflash":
            raise ValueError(
                "shift_label: true is Domino's alignment; a DFlash drafter predicts the token of"
                " its own slot: leave shift_label out, or use a DominoConfig"
            )
        self._check_mask_token()
        self._check_layers()
        # z-lab's folders also repeat the block size there.
        known = self.dflash_config | {"block_size": self.block_size}
        for key, value in mirrored.items():
            if value != known.get(key):
                raise ValueError(
                    f"dflash_config.{key} is {value!r} but the top level says"
                    f" {known.get(key, 'nothing')!r}: engines read one or the other, so both must"
                    " agree. Correct config.json."
                )

    def _check_mask_token(self) -> None:
        special = {
            "pad_token_id": [self.pad_token_id],
            "bos_token_id": [self.bos_token_id],
            "eos_token_id": [self.eos_token_id],
        }
        if isinstance(self.eos_token_id, list):
            special["eos_token_id"] = self.eos_token_id
        clash = [key for key, tokens in special.items() if self.mask_token_id in tokens]
        if clash:
            raise ValueError(
                f"mask_token_id {self.mask_token_id} equals {' and '.join(clash)}: real tokens"
                " would look like slots to fill. Give mask_token_id an id that never occurs in"
                " text, e.g. an unused row of the embedding."
            )
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(
                f"mask_token_id {self.mask_token_id} is outside the target's embedding of"
                f" {self.vocab_size} rows. Choose an unused row; resizing the embedding would add a"
                " row that is neither trained nor shipped."
            )

    def _check_layers(self) -> None:
        rope = self.rope_parameters
        if set(rope) != {"rope_type", "rope_theta"} or rope["rope_type"] != "default":
            raise ValueError(
                f"rope_parameters is {rope}: the drafter uses plain RoPE and would not honour other"
                ' keys; give exactly {"rope_type": "default", "rope_theta": <float>}'
            )
        if self.layer_types != ["full_attention"] * self.num_hidden_layers:
            raise ValueError(
                f"layer_types is {self.layer_types}: a sliding window is served differently by"
                ' every engine; use "full_attention" for all layers'
            )

    # ---- Reading and writing config.json.

    @classmethod
    def _own_keys(cls) -> set[str]:
        """The fields that this class and its parents up to `DFlashConfig` declare."""
        keys = set()
        for declaring in cls.__mro__:
            if issubclass(declaring, DFlashConfig):
                keys |= set(get_annotations(declaring))
        return keys

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As transformers' own. Every key that decides acceptance must be in the folder's config.

        Raises:
            ValueError: one is missing, or the folder borrows its layers from the target.
        """
        missing = [key for key in cls.required_keys if config_dict.get(key) is None]
        if missing:
            raise ValueError(
                f"config.json lacks {missing}. They decide what the drafter sees and are never"
                f" guessed: the folder is not a {cls.model_type} drafter, or its config was edited."
                " Restore the keys from the training run."
            )
        if config_dict.get("borrowed_layers") is not None:
            raise ValueError(
                f"this drafter borrows layers {config_dict['borrowed_layers']} of its target"
                f" {config_dict.get('target_model_name_or_path')}, and its folder does not hold"
                " them: load the target, then call hf_specauf.from_target(target, folder_or_repo)"
            )
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"dflash_config": self.dflash_config}

    def to_diff_dict(self) -> dict[str, Any]:
        """What config.json holds. Engines read it without our defaults, so it has every own key."""
        full = self.to_dict()
        own = {key: full[key] for key in self._own_keys()}
        return super().to_diff_dict() | own | {"dflash_config": self.dflash_config}


__all__ = ["DFlashConfig"]
