"""What a frozen target lends to a drafter: noise embeddings, tapped hidden states, head. Its
weights are never changed."""

import inspect

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import PreTrainedModel

from ..drafters import target_parts
from ..drafters.configuration_dflash import DFlashConfig, check_target_layer_ids
from ..drafters.target_parts import apply_head, device_of, embed_noise
from ..identity import check_pair, innermost, refuse_activated_lora
from ..identity.multimodal import on_all_axes, placeholder_tokens
from .shape import positions_of


def decoder_layers(target: PreTrainedModel | PeftModel) -> nn.ModuleList:
    """The list of a target's decoder layers, also of one in a wrapper."""
    return target_parts.decoder_layers(innermost(target))


class FrozenTarget:
    """What a drafter borrows from its target. The target stays outside the drafter's module tree:
    frozen, in eval mode, in its own dtype and on its own device(s); never moved, copied, resized or
    saved.

    Args:
        model (`PreTrainedModel` or `PeftModel`): any `AutoModelForCausalLM`, also quantised or
            dispatched.
        config (`DFlashConfig`): of the drafter.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, config: DFlashConfig):
        self.model = innermost(model)
        check_pair(model, config)
        refuse_activated_lora(model)
        self.model.eval().requires_grad_(False)
        self.target_layer_ids = config.target_layer_ids
        self.backbone = self.model.base_model
        self.embedding = self.model.get_input_embeddings()
        self.head = self.model.get_output_embeddings()
        self.placeholders = placeholder_tokens(self.model.config)
        self.positions = positions_of(self.model)
        # Set by `ask_target`, which asks once whether it can be decoded with.
        self.was_asked = False
        # What kept states depend on, noted before the target is sharded.
        self.states_settings: dict | None = None

    @torch.no_grad()
    def noise_embeds(self, noise_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings of anchors and masks. (B, Q) -> (B, Q, H)"""
        # A dispatched target may keep its embedding on another device than the drafter's.
        ids = noise_ids.to(device_of(self.embedding))
        return embed_noise(self.embedding, ids).to(noise_ids.device)

    @property
    def dispatched(self) -> bool:
        """Whether the target was placed by quantisation, a device map or offloading, and must not
        be moved."""
        # from_pretrained sets both attributes only where it has something to say.
        quantized = getattr(self.model, "is_quantized", False)
        mapped = getattr(self.model, "hf_device_map", None) is not None
        # accelerate's cpu_offload and disk_offload leave no map.
        offloaded = any(parameter.is_meta for parameter in self.model.parameters())
        return quantized or mapped or offloaded

    def place(self, device: torch.device, *, shard: bool) -> None:
        """Bring the target to a device, or spread it over all processes. What was placed stays."""
        if shard:
            self.shard(device)
        elif not self.dispatched:
            self.model.to(device)

    def shard(self, device: torch.device) -> None:
        """Spread the decoder layers' weights over all processes (FSDP2), gathered layer by layer
        when they run.

        Embedding, final norm and head stay whole everywhere: drafters use them outside the target's
        forward. All processes must call the target equally often from then on.
        """
        if self.dispatched:
            raise ValueError(
                "shard_target: true and a quantised or dispatched target cannot go together: leave"
                " out shard_target, or target_device_map and quantisation"
            )
        if isinstance(decoder_layers(self.model)[0], FSDPModule):
            return
        mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
        for layer in decoder_layers(self.model):
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        self.model.to(device)

    @torch.no_grad()
    def context(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Tapped hidden states, concatenated. (B, S) -> (B, S, L * H). The backbone is called,
        never the head, and it keeps the taps alone. `attention_mask` or `position_ids` as from
        `blocks.row_inputs`."""
        # Some backbones have no such argument (BLOOM). Only packed rows need it.
        positions = {}
        if position_ids is not None:
            positions["position_ids"] = on_all_axes(position_ids, self.model.config)
        # State 0 is the embedding, so the output of layer i is state i + 1.
        taps = [i + 1 for i in self.target_layer_ids]
        states = self.backbone(
            input_ids=input_ids.to(device_of(self.embedding)),
            attention_mask=attention_mask,
            **positions,
            use_cache=False,
            # Only these are kept. `True` would keep the states of all layers in memory.
            output_hidden_states=taps,
        ).hidden_states
        # A dispatched target leaves each state on its layer's device.
        tapped = [states[i].to(input_ids.device) for i in taps]  # L of (B, S, H)
        return torch.cat(tapped, dim=-1)  # (B, S, L * H)

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The target's head, in the target's dtype. (..., H) -> (..., V)

        These are raw: some targets multiply them by a positive factor afterwards, or cap them by
        tanh (Granite, Cohere, Gemma-2). Neither moves the best token. Training's loss and
        decoding's drafts both take the raw ones, so that the loss is the cross-entropy of the
        distribution that drafts are drawn from.
        """
        return apply_head(self.head, hidden_states)

    @torch.no_grad()
    def own_logits(
        self, input_ids: torch.Tensor, positions: torch.Tensor, **inputs: torch.Tensor
    ) -> torch.Tensor:
        """The logits that the target itself writes by, at some positions of a text. (1, S), (N,) ->
        (N, V)

        Not the head's alone, after which some targets scale or cap them (vllm-project/vllm#52158).
        """
        if "position_ids" in inputs:
            inputs["position_ids"] = on_all_axes(inputs["position_ids"], self.model.config)
        kept = {}
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            # The logits of a whole text would fill the memory.
            kept["logits_to_keep"] = positions
        output = self.model(input_ids=input_ids, use_cache=False, **inputs, **kept)
        logits = output.logits[0]
        if not kept:
            logits = logits[positions.to(logits.device)]
        return logits

    @torch.no_grad()
    def check(self, probe_ids: torch.Tensor) -> None:
        """Compare, on a few real tokens, taps with hooks on the layers and the lent head with the
        target's logits.

        A tap off by one or an untied head never breaks text, it only pins acceptance at 1.0
        (onnxruntime-genai#2460, SpecForge#473), so it is checked at every start.

        Args:
            probe_ids (`torch.LongTensor` of shape `(1, S)`).
        """
        check_target_layer_ids(self.target_layer_ids, len(decoder_layers(self.model)))
        hooked, context = self._hooked_context(probe_ids)
        if not torch.equal(hooked.reshape(context.shape), context):
            raise ValueError(
                f"the hidden states transformers returns for taps {self.target_layer_ids} are not"
                " those layers' outputs: the drafter would be trained on the wrong layers. Report"
                " this target."
            )
        probe = probe_ids.to(device_of(self.embedding))
        logits = self.model(input_ids=probe, use_cache=False).logits
        lent = self.logits(self.backbone(input_ids=probe, use_cache=False).last_hidden_state)
        agreement = (lent.argmax(-1) == logits.argmax(-1)).float().mean().item()
        # Ties may flip in bf16. An untied head agrees almost nowhere.
        if agreement < 0.9:
            raise ValueError(
                "the target's output embedding reproduces its own predictions on only"
                f" {agreement:.0%} of tokens: the head is not the trained one (a tied head that was"
                " not tied?). Load the target with its own class."
            )

    def _hooked_context(self, probe_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(what hooks on the tapped layers see, `context`) of one forward."""
        outputs: dict[int, torch.Tensor] = {}

        def keep(index):
            def hook(module, args, output):
                # Some architectures' layers return a tuple, whose first entry is the hidden states.
                hidden_states = output[0] if isinstance(output, tuple) else output
                outputs[index] = hidden_states.detach()

            return hook

        layers = decoder_layers(self.model)[: self.target_layer_ids[-1] + 1]
        handles = [layer.register_forward_hook(keep(i)) for i, layer in enumerate(layers)]
        try:
            context = self.context(probe_ids)
        finally:
            for handle in handles:
                handle.remove()
        for i in range(len(layers)):
            if i not in outputs:
                raise ValueError(
                    f"{type(self.model).__name__} skips decoder layer {i} on text, as it is for"
                    " images, and taps behind it are other layers'. Choose another target."
                )
        hooked = [outputs[i].to(context.device) for i in self.target_layer_ids]
        return torch.cat(hooked, dim=-1), context
