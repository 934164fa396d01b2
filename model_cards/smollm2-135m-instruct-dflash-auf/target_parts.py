"""The target's embedding, head, tapped layers and recurrent mixers, as training and decoding use
them alike.

Travels to the Hub: imports torch and its sibling alone.

Letters: B rows, C and Q tokens, H hidden size, V vocabulary.
"""

import copy
import inspect
import threading
from contextlib import contextmanager, nullcontext
from weakref import WeakSet

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .transformers_internals import CACHE, DynamicCache, PreTrainedModel


def decoder_layers(target) -> nn.ModuleList:
    """The list of a target's decoder layers. `target` (`PreTrainedModel`): no wrapper.

    Raises:
        ValueError: it has none of the length that its config names.
    """
    depth = target.config.get_text_config(decoder=True).num_hidden_layers
    # Architectures give the list different names. Its length is what they have in common. Beside
    # the decoder a vision tower may have a list as long.
    for module in target.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ValueError(
        f"{type(target).__name__} has no list of {depth} decoder layers, as its config says, so"
        " its layers cannot be tapped: load it with AutoModelForCausalLM.from_pretrained, or take"
        " another target"
    )


class Taps:
    """Keeps what some decoder layers put out in the passes inside a `with` block: a user's own
    criterion may call the target between two. The hooks that do it last as long as `hooked`.

    Only passes of the thread that made it are kept, so that several may decode with one target.
    transformers' own way (`output_hidden_states`) leaves hooks on every layer for good, which slow
    plain decoding down.

    Args:
        layers (`list[nn.Module]`): the tapped layers, in order.
    """

    def __init__(self, layers: list[nn.Module]):
        self.layers = layers
        self.kept: list[list[torch.Tensor]] = [[] for _ in layers]
        self.thread = threading.get_ident()
        self.is_open = False

    @contextmanager
    def hooked(self):
        """Hold the hooks, for a whole call: to put them on for each pass would take longer."""
        handles = []
        try:
            for layer, kept in zip(self.layers, self.kept):
                handles.append(layer.register_forward_hook(self._keep_in(kept)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __enter__(self) -> None:
        self.is_open = True

    def __exit__(self, *exception) -> None:
        self.is_open = False

    def _keep_in(self, kept: list[torch.Tensor]):
        def keep(module, args, output):
            if self.is_open and threading.get_ident() == self.thread:
                # Some architectures' layers return a tuple, whose first entry is the hidden states.
                kept.append(output[0] if isinstance(output, tuple) else output)

        return keep

    def take(self) -> list[torch.Tensor]:
        """Of each layer what it put out since the last call, (B, C, H) each.

        Raises:
            RuntimeError: the target left a tapped layer out.
        """
        taken = []
        for layer, kept in zip(self.layers, self.kept):
            if not kept:
                raise RuntimeError(
                    f"a tapped {type(layer).__name__} did not run in the target's pass, so there is"
                    " nothing to draft from: generate without assistant_model"
                )
            # several only where a long prompt is read in chunks
            taken.append(kept[0] if len(kept) == 1 else torch.cat(kept, dim=1))
            kept.clear()
        return taken


class Mixers:
    """The recurrent mixers of a hybrid target (Mamba-2, gated delta rule): they keep a state that
    cannot be cut back to the accepted tokens, as keys and values can.

    Inside `with` a pass notes what each mixer reads, and what its state was before. Where a part of
    the draft is rejected, `read_again` puts the states back and runs the mixers, and nothing else
    of the target, over the rows that stay. Cheaper than another pass of the target, and exact.

    Args:
        target (`PreTrainedModel`): the target, no wrapper.
        cache (`Cache`): of the call, dynamic.
    """

    def __init__(self, target, cache):
        self.modules = recurrent_mixers(target)
        self.layers = with_state(cache)
        self.thread = threading.get_ident()
        self.handles = []
        # Of the last pass: the calls of mixers, and of each layer its states before it.
        self.calls: list[tuple] = []
        self.before: list[tuple[dict, dict]] = []

    def __enter__(self) -> "Mixers":
        self.calls, self.before = [], []
        for layer in self.layers:
            self.before.append((dict(layer.conv_states), layer.recurrent_states))
            # A pass writes into these in place. Convolution states it replaces.
            layer.recurrent_states = {
                i: None if state is None else state.clone()
                for i, state in layer.recurrent_states.items()
            }
        for module in self.modules:
            handle = module.register_forward_pre_hook(self._note, with_kwargs=True)
            self.handles.append(handle)
        return self

    def __exit__(self, *exception) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def _note(self, module, args, kwargs) -> None:
        if threading.get_ident() == self.thread:
            self.calls.append((module, args, kwargs))

    def read_again(self, rows: int, kept: int) -> None:
        """Bring the states to where they are behind the first rows of the last pass.

        Args:
            rows (`int`): of the pass.
            kept (`int`): rows that stay. The cache was cropped to them.
        """
        # Cropping has cut the convolution states rightly.
        convolutions = [layer.conv_states for layer in self.layers]
        for layer, (convolution, recurrent) in zip(self.layers, self.before):
            layer.conv_states, layer.recurrent_states = convolution, recurrent
        for module, args, kwargs in self.calls:
            args = [rows_of(value, rows, 0, kept) for value in args]
            kwargs = {name: rows_of(value, rows, 0, kept) for name, value in kwargs.items()}
            module(*args, **kwargs)
        for layer, convolution in zip(self.layers, convolutions):
            layer.conv_states = convolution


def with_state(cache) -> list:
    """Layers of a cache that hold a recurrent state, or none yet."""
    return [layer for layer in cache.layers if hasattr(layer, "recurrent_states")]


def rows_of(value, rows: int, start: int, end: int):
    """Some rows of what has a row for each token of a pass, (B, rows, ...); else what was given."""
    if torch.is_tensor(value) and value.dim() > 1 and value.shape[1] == rows:
        return value[:, start:end]
    return value


def recurrent_mixers(target) -> list[nn.Module]:
    """Mixers with a recurrent state. All families that cache one have this parameter in them."""
    return [one for one in target.get_decoder().modules() if "A_log" in one._parameters]


# Targets whose states were tried, so that each is tried once.
TRIED = WeakSet()
# How far states and logits may be off in fp32, of how far their entries lie apart.
WRONG = 1e-3


@torch.no_grad()
def check_state(target) -> None:
    """Raise where a target keeps a state that cannot be brought back to the accepted tokens.

    It is tried, on 14 tokens, because some architectures read several tokens on top of a state
    wrongly (Jamba starts from none), which their output may not show for long.

    Args:
        target (`PreTrainedModel`): the target, no wrapper.

    Raises:
        ValueError: names the target, and what was found.
    """
    if not target._is_stateful or target in TRIED:
        return
    # Dropout would make two passes differ.
    training = [module for module in target.modules() if module.training]
    target.eval()
    try:
        _try_state(target)
    finally:
        for module in training:
            module.training = True
    TRIED.add(target)


def _try_state(target) -> None:
    name = type(target).__name__
    advice = "so drafted output would be silently wrong. Generate without assistant_model"
    if not recurrent_mixers(target):
        raise ValueError(f"{name} keeps a state that cannot be put back, {advice}")
    embedding = target.get_input_embeddings()
    # Special tokens lie at a vocabulary's ends, so these are words.
    ids = torch.arange(14, device=device_of(embedding))[None] + embedding.weight.shape[0] // 4
    whole = _empty_cache(target)
    mixers = Mixers(target, whole)
    with mixers:
        logits = _read(target, ids, whole)
    allowed = max(WRONG, 24 * torch.finfo(target.dtype).eps)
    found = {
        "rows of a mixer": _mixers_error(target, mixers.calls, whole),
        "logits": (_distance(_read_by_parts(target, ids), logits), allowed),
    }
    for what, (error, allowed) in found.items():
        if not error <= allowed:  # nor a NaN
            raise ValueError(
                f"{name} reads several tokens on top of its recurrent state otherwise than a text"
                f" at once ({what} differ by {error:.1%}), {advice}"
            )


def _empty_cache(target) -> DynamicCache:
    return DynamicCache(config=target.config.get_text_config(decoder=True))


def _read(target, ids: torch.LongTensor, cache, start: int = 0) -> torch.Tensor:
    """Logits of a pass over tokens, the first of which is the text's token `start`.
    (1, rows) -> (1, rows, V)"""
    given = {"input_ids": ids, "use_cache": True, CACHE: cache}
    if "position_ids" in inspect.signature(target.forward).parameters:
        # As `generate` does. Some count them wrongly by themselves (Bamba).
        given["position_ids"] = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
    return target(**given).logits


def _distance(found: torch.Tensor, right: torch.Tensor) -> float:
    """How far two tensors lie apart, of how far the right one's entries do."""
    found, right = found.float(), right.float()
    return float((found - right).norm() / (right - right.mean()).norm())


def _mixers_error(target, calls: list[tuple], cache) -> tuple[float, float]:
    """How far outputs and states are off by 9, 4 and 1 rows, and how far they may be. One mixer of
    each kind runs alone, in fp32 where it can be copied: no rounding hides a small error then.

    Args:
        calls (`list[tuple]`): of mixers, in a pass over 14 rows: module, args, kwargs.
        cache (`Cache`): of that pass.
    """
    errors, allowed = [], WRONG
    first_calls = {type(module): (module, *given) for module, *given in reversed(calls)}
    for module, args, kwargs in first_calls.values():
        if all(one.is_floating_point() and not one.is_meta for one in module.parameters()):
            module = copy.deepcopy(module).float()
        else:
            # Quantised, or its weights lie elsewhere.
            allowed = max(WRONG, 2.5 * torch.finfo(target.dtype).eps)
        whole = _after(target, module, args, kwargs, cache, [(0, 14)])
        parts = _after(target, module, args, kwargs, cache, [(0, 9), (9, 13), (13, 14)])
        errors += [_distance(found, right) for found, right in zip(parts, whole)]
    # Where no mixer was seen to run, nothing is known.
    return max(errors, default=float("inf")), allowed


def _after(target, module, args, kwargs, cache, parts) -> list[torch.Tensor]:
    """What a mixer puts out, and the states that it leaves in a new cache, where it reads its rows
    by parts."""
    new, outputs = _empty_cache(target), []

    def part_of(value, start: int, end: int):
        """An argument of the call, for some of its rows."""
        if value is cache:
            return new
        if torch.is_tensor(value) and value.is_floating_point():
            value = value.to(module.A_log.dtype)
        return rows_of(value, 14, start, end)

    for part in parts:
        some = [part_of(value, *part) for value in args]
        named = {name: part_of(value, *part) for name, value in kwargs.items()}
        output = module(*some, **named)
        outputs.append(output[0] if isinstance(output, tuple) else output)
    states = [state for layer in with_state(new) for state in layer.recurrent_states.values()]
    return [torch.cat(outputs, dim=1), *(state for state in states if state is not None)]


def _read_by_parts(target, ids: torch.LongTensor) -> torch.Tensor:
    """Logits of 14 tokens as the loop reads them: a prompt of 9, a draft of which half is rejected,
    one that is accepted, a token. -> (1, 14, V)"""
    cache = _empty_cache(target)
    logits = [_read(target, ids[:, :9], cache)]
    cache.activate_past_recording()
    mixers = Mixers(target, cache)
    for start, rows, kept in ((9, 4, 2), (11, 2, 2), (13, 1, 1)):
        read = ids[:, start : start + rows].clone()
        read[:, kept:] += 1
        with mixers:
            logits.append(_read(target, read, cache, start)[:, :kept])
        cache.crop(kept - rows)
        if kept < rows:
            mixers.read_again(rows, kept)
    return torch.cat(logits, dim=1)


def pass_mode(model):
    """What a model's passes run in: inference mode, a twentieth less work of the host than
    `no_grad`. Autograd refuses tensors that were made in it. So it is not for passes in which a
    model, or a user's hook, makes tensors that stay: shards that are gathered, weights that are
    fetched, states that are written into, frequencies that are made anew, compiled code.

    Args:
        model (`nn.Module`): target or drafter, as it is called.
    """
    if (
        not isinstance(model, PreTrainedModel)
        or model._compiled_call_impl is not None
        or model._is_stateful
        or positions_move(model)
        or any(isinstance(one, DTensor) for one in model.parameters())
        or any(has_hooks(one) for one in model.modules())
    ):
        return nullcontext
    return torch.inference_mode


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody else's code runs with a module: hooks, or accelerate's around it."""
    return bool(module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"))


def positions_move(model) -> bool:
    """Whether a model's RoPE depends on how far a pass reaches (dynamic NTK, LongRoPE)."""
    rope = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    return rope.get("rope_type") in ("dynamic", "longrope")


def device_of(module: nn.Module) -> torch.device:
    """The device on which a target's embedding or head runs.

    accelerate keeps an offloaded module's weights elsewhere, and leaves `meta` tensors in their
    place (huggingface/transformers#48409). Its hook brings them to this device for each run.
    """
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):
        device = getattr(one, "execution_device", None)
        if device is not None:
            # It may be a number.
            return torch.device(device)
    return module.weight.device


def embed_noise(embedding: nn.Module, noise_ids: torch.Tensor) -> torch.Tensor:
    """Embed noise ids with the target's embedding. (B, Q) -> (B, Q, H)

    A norm of the target's own inside its embedding module (`embed_norm`, Muse Glimmer) is left out,
    because transformers' generator leaves it out too.

    Args:
        embedding (`nn.Module`): `target.get_input_embeddings()`.
        noise_ids (`torch.LongTensor` of shape `(B, Q)`): anchors and mask tokens.
    """
    if getattr(embedding, "embed_norm", None) is None:
        return embedding(noise_ids)
    # Not by taking the norm away for a moment: another thread may be decoding with this target.
    return nn.Embedding.forward(embedding, noise_ids)


def apply_head(head: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """Apply the target's head in its own dtype and on its own device. (..., H) -> (..., V)"""
    weight = head.weight
    # Numbers of one byte are codes, whole or fp8.
    if weight.is_floating_point() and weight.element_size() > 1:
        # Under autocast accelerate hands out fp32 hidden states, whatever the target's dtype.
        dtype = weight.dtype
    else:
        # A quantised head casts by itself.
        dtype = hidden_states.dtype
    return head(hidden_states.to(device_of(head), dtype)).to(hidden_states.device)
