"""A recipe: one YAML file, or the same keys on the command line, parsed into dataclasses. Unknown
keys fail.

The keys of the target and of the drafter are here. Those of the data are `DataArguments`
(`data/config.py`), those of training are `AUFConfig` (`training/config.py`).
"""

import os
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any

import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available
from trl import TrlParser

from .cli import OneSpelling
from .data.config import DataArguments
from .drafters import DRAFTERS
from .drafters.configuration_dflash import DFlashConfig
from .keys import ONE_OR_MORE, Numbers, check_keys, template_arguments
from .target import check_device, check_target
from .training.config import AUFConfig

# Keys that take one of a few words. They are no `choices` in the fields' metadata: argparse would
# answer a wrong word with its whole usage, and it never looks at what YAML gives.
CHOICES = {
    "target_dtype": ("auto", "bfloat16", "float32"),
    "target_quantization": ("bnb-4bit", "bnb-8bit"),
    "drafter_type": DRAFTERS,
    "draft_attn_implementation": ("sdpa", "eager", "flex_attention"),
    "save_dtype": ("auto", "bfloat16", "float32"),
}
# Of target_device_map, the words that are no device.
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
# Keys that take a number, of single drafters too. What depends on the target is checked later.
NUMBERS = {
    "num_draft_layers": ONE_OR_MORE,
    "block_size": Numbers(2, whole=True, hint=": an anchor and at least one drafted slot"),
    "mask_token_id": Numbers(0, whole=True),
    "draft_intermediate_size": ONE_OR_MORE,
    "target_layer_ids": Numbers(0, whole=True),
    "init_from_target_layers": Numbers(0, whole=True),
    "gru_hidden_dim": ONE_OR_MORE,
    "emb_dim": ONE_OR_MORE,
    "pure_draft_prefix_len": Numbers(0, whole=True),
    "lora_r": ONE_OR_MORE,
    "lora_alpha": Numbers(0, inside=True),
    "lora_dropout": Numbers(0, 0.999999),
}


@dataclass
class TargetArguments:
    """The frozen target."""

    target: str = field(metadata={"help": "Hub id or folder of the causal LM to draft for."})
    target_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the target."}
    )
    target_dtype: str = field(
        default="auto", metadata={"help": "auto (as stored), bfloat16 or float32."}
    )
    target_attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa, eager, flash_attention_2, ..."}
    )
    target_device_map: str | None = field(
        default=None,
        metadata={
            "help": (
                "auto: spread a target too large for one GPU; cuda: each process its own GPU, for"
                " weights stored quantised. It is then never moved."
            )
        },
    )
    target_quantization: str | None = field(
        default=None,
        metadata={"help": "bnb-4bit or bnb-8bit: load the target in so many bits (bitsandbytes)."},
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run the target repository's own code; give target_revision with it."},
    )

    def __post_init__(self):
        check_keys(self, choices=CHOICES)
        # Before the data is read, which may take long.
        check_target("target", self.target, self.target_revision)
        is_folder = os.path.isdir(self.target)
        if self.trust_remote_code and not self.target_revision and not is_folder:
            raise ValueError(
                "trust_remote_code: true needs target_revision, so that the code cannot change"
                " under you"
            )

    def loading(self) -> dict[str, Any]:
        """What `from_pretrained` is told, beside name and revision.

        Raises:
            ValueError: quantisation is asked for and bitsandbytes is not installed, or a device
                that is not here.
        """
        # Only now, because a recipe may be read on another machine than it runs on.
        if self.target_device_map not in (None, *DEVICE_MAPS):
            check_device(self.target_device_map, "target_device_map")
        found = {
            "dtype": self.target_dtype,
            "attn_implementation": self.target_attn_implementation,
            "device_map": self.target_device_map,
            "trust_remote_code": self.trust_remote_code,
        }
        if self.target_quantization is not None:
            found["quantization_config"] = self._quantization()
        return found

    def _quantization(self) -> BitsAndBytesConfig:
        if not is_bitsandbytes_available():
            raise ValueError(
                f"target_quantization: {self.target_quantization} needs bitsandbytes: `pip install"
                " bitsandbytes`, or remove the key"
            )
        if self.target_quantization == "bnb-8bit":
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            # the usual format of 4-bit weights
            bnb_4bit_quant_type="nf4",
            # its scales in 8 bits, which saves another 0.4 bits a weight
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )


@dataclass
class DrafterArguments:
    """The drafter. A key that is left out has the value of the drafter that `drafter` names. Else
    it is derived from the target once, printed, and stored in the drafter's config.json."""

    drafter_type: str | None = field(
        default=None, metadata={"help": f"One of {', '.join(DRAFTERS)} (default dflash)."}
    )
    num_draft_layers: int | None = field(
        default=None, metadata={"help": "Layers of the drafter (default 5)."}
    )
    block_size: int | None = field(
        default=None,
        metadata={"help": "K, slots of a block, anchor included: 2 or more (default 16)."},
    )
    target_layer_ids: list[int] | None = field(
        default=None,
        metadata={"help": "Taps: 0-based target layers whose output is read; never the last one."},
    )
    mask_token_id: int | None = field(
        default=None,
        metadata={"help": "By default the tokenizer's, else the first unused embedding row."},
    )
    draft_intermediate_size: int | None = field(
        default=None, metadata={"help": "By default the target's."}
    )
    chat_template_kwargs: str | None = field(
        default=None,
        metadata={"help": 'Arguments of the chat template, e.g. {"enable_thinking": false}.'},
    )
    draft_attn_implementation: str = field(
        default="sdpa",
        metadata={"help": "sdpa, eager, or flex_attention (block-sparse masks, for CUDA)."},
    )
    save_dtype: str = field(
        default="auto",
        metadata={"help": "Dtype of the final folder: auto (the target's), bfloat16 or float32."},
    )
    drafter: str | None = field(
        default=None,
        metadata={
            "help": "Start from this drafter (ours, z-lab or SpecForge layout), keeping its shape."
        },
    )
    drafter_revision: str | None = field(
        default=None, metadata={"help": "Its branch, tag or commit on the Hub."}
    )
    init_from_target_layers: list[int] | None = field(
        default=None,
        metadata={
            "help": (
                "Start the drafter's layers as copies of these target layers. With use_peft they"
                " stay frozen."
            )
        },
    )
    # LoRA's keys, with the names that trl's `ModelConfig` gives them. They are not inherited from
    # there, because a recipe would then also take a dozen keys of a model that we load ourselves
    # (dtype, load_in_4bit, ...), and ignore them.
    use_peft: bool = field(
        default=False,
        metadata={"help": "Train LoRA on drafter, or on the layers of init_from_target_layers."},
    )
    lora_r: int = field(default=16, metadata={"help": "LoRA's rank."})
    lora_alpha: int = field(
        default=32, metadata={"help": "LoRA's alpha; its product is scaled by alpha / r."}
    )
    lora_dropout: float = field(
        default=0.0,
        metadata={
            "help": "Dropout before LoRA; it blurs what the drafter gets right, and so AUF's slots."
        },
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Modules with LoRA; by default all linear ones (attention, MLP, fc)."},
    )
    lora_modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Trained in full beside LoRA, e.g. fc norm; default on borrowed layers."},
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale by alpha / sqrt(r) (rsLoRA)."})
    use_dora: bool = field(default=False, metadata={"help": "Weight-decomposed LoRA (DoRA)."})

    def __post_init__(self):
        check_keys(self, NUMBERS, CHOICES)
        self.chat_template_kwargs = template_arguments(self.chat_template_kwargs)
        if self.use_peft and self.init_from_target_layers and self.lora_modules_to_save is None:
            # What starts at random, because nothing but the adapter's folder would hold it. And the
            # norms, because they see other inputs than they saw in the target.
            self.lora_modules_to_save = [*self._config_class.starts_at_random, "norm"]
        self._check_shape()
        self._check_start()
        self._check_lora()

    def _check_shape(self) -> None:
        for kind in DRAFTERS:
            given = self._given_own_keys(kind)
            if given and kind != self.kind:
                raise ValueError(
                    f"{', '.join(given)}: of a {kind} drafter; a {self.kind} drafter has no such"
                    f" thing and would ignore it. Set drafter_type: {kind}, or remove what is named"
                )

    def _check_start(self) -> None:
        if self.drafter and self.init_from_target_layers:
            raise ValueError("drafter and init_from_target_layers are two starts: give one of them")
        if self.drafter_revision and not self.drafter:
            raise ValueError("drafter_revision without drafter says nothing: add or remove one")
        if self.use_peft and not (self.drafter or self.init_from_target_layers):
            raise ValueError(
                "use_peft: true needs something to adapt, and random weights are not it: give"
                " drafter (a released drafter) or init_from_target_layers (the target's own layers)"
            )

    def _check_lora(self) -> None:
        if not self.use_peft:
            # use_peft is among them, and has its default here.
            lora_keys = [key for key in fields(self) if key.name.startswith(("lora_", "use_"))]
            given = [key.name for key in lora_keys if getattr(self, key.name) != key.default]
            if given:
                raise ValueError(f"{', '.join(given)} would be ignored without use_peft: true")
            return
        if self.init_from_target_layers:
            at_random = self._config_class.starts_at_random
            lacking = [name for name in at_random if name not in self.lora_modules_to_save]
            if lacking:
                raise ValueError(
                    f"lora_modules_to_save lacks {', '.join(lacking)}, which are not borrowed,"
                    " start at random and would not be saved: the drafter could not be rebuilt."
                    " Add what is named."
                )

    def peft_config(self) -> LoraConfig | None:
        """LoRA's configuration, or `None` for full training."""
        if not self.use_peft:
            return None
        modules = self.lora_target_modules
        if modules is None or modules == ["all-linear"]:
            # PEFT takes this word alone. In a list it would be the name of a module.
            modules = "all-linear"
        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=modules,
            modules_to_save=self.lora_modules_to_save,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
        )

    @property
    def kind(self) -> str:
        """The drafter's name in the table `DRAFTERS`."""
        return self.drafter_type or "dflash"

    @property
    def own_keys(self) -> dict[str, Any]:
        """The given ones of the keys that only this kind of drafter has."""
        return self._given_own_keys(self.kind)

    @property
    def _config_class(self) -> type[DFlashConfig]:
        config, _ = DRAFTERS[self.kind]
        return config

    def _given_own_keys(self, kind: str) -> dict[str, Any]:
        config, _ = DRAFTERS[kind]
        # Only the class that `drafter_arguments` makes has these fields.
        values = {key: getattr(self, key, None) for key in config.own_keys}
        return {key: value for key, value in values.items() if value is not None}


def drafter_arguments() -> type[DrafterArguments]:
    """`DrafterArguments` with the own keys of every drafter in the table as further fields, so that
    a recipe may have them and `--help` explains them."""
    own = []
    for kind, (config, _) in DRAFTERS.items():
        for key, says in config.own_keys.items():
            key_field = field(default=None, metadata={"help": f"{kind}: {says}"})
            own.append((key, config.__annotations__[key] | None, key_field))
    return make_dataclass("DrafterArguments", own, bases=(DrafterArguments,))


# ---- parsing

# Keys that had another name in 0.1.0. Recipes and records written then are still read.
RENAMED_KEYS = {"target_model_name_or_path": "target", "drafter_name_or_path": "drafter"}


def renamed_keys(recipe: dict) -> dict[str, str]:
    """The keys of a recipe that have another name now -> that name."""
    renamed = {old: new for old, new in RENAMED_KEYS.items() if old in recipe}
    # `drafter` was the kind of drafter in 0.1.0, which had no `drafter_type`.
    if recipe.get("drafter") in DRAFTERS and "drafter_type" not in recipe:
        renamed["drafter"] = "drafter_type"
    return renamed


def under_new_names(recipe: dict) -> dict:
    """A recipe with every key by the name it has now."""
    renamed = renamed_keys(recipe)
    return {renamed.get(key, key): value for key, value in recipe.items()}


class RecipeParser(OneSpelling, TrlParser):
    """trl's parser of a recipe and of flags. It reads 0.1.0's keys too, and names the new ones."""

    def parse_args_and_config(self, args: list[str], **options):
        """trl's own, once the keys have the names of today."""
        words = list(args)
        for i, word in enumerate(words):
            flag, equals, value = word.partition("=")
            new = RENAMED_KEYS.get(flag.removeprefix("--").replace("-", "_"))
            if new is not None and flag.startswith("--"):
                print(f"{flag} is called --{new} now")
                words[i] = f"--{new}{equals}{value}"
            if words[i] == "--drafter" and i + 1 < len(words) and words[i + 1] in DRAFTERS:
                print("--drafter with a kind of drafter is called --drafter_type now")
                words[i] = "--drafter_type"
        return super().parse_args_and_config(words, **options)

    def set_defaults_with_config(self, **recipe) -> list[str]:
        for old, new in renamed_keys(recipe).items():
            print(f"the recipe's key {old} is called {new} now")
        return super().set_defaults_with_config(**under_new_names(recipe))


def parse(argv: list[str]) -> tuple[TargetArguments, DrafterArguments, DataArguments, AUFConfig]:
    """Parse `--config recipe.yaml` and command-line overrides (the command line wins).

    Raises:
        ValueError: a key no dataclass knows, or a value that is not allowed.
    """
    parser = RecipeParser(
        (TargetArguments, drafter_arguments(), DataArguments, AUFConfig),
        prog="specauf train",
        description=(
            "Train an Accept-Until-Fail drafter for a causal LM. Give a recipe with --config"
            " recipe.yaml; any of its keys can be overridden here, e.g. --objective decay"
            " --max_steps 100."
        ),
    )
    if argv[-1:] == ["--config"]:
        raise ValueError(
            "--config needs the path of a recipe, e.g. --config recipes/qwen3-8b/dflash_auf.yaml"
        )
    return parser.parse_args_and_config(argv)
