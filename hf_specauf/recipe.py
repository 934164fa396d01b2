"""A recipe: one YAML file, or the same keys on the command line, parsed into dataclasses. Unknown
keys fail."""

import json
from dataclasses import dataclass, field, fields, make_dataclass

import torch
from peft import PeftConfig
from transformers import BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available
from trl import ModelConfig, TrlParser, get_peft_config

from .drafters import DRAFTERS
from .training.config import AUFConfig

# Keys that had another name in 0.1.0. Recipes and records written then are still read.
RENAMED_KEYS = {"target_model_name_or_path": "target", "drafter_name_or_path": "drafter"}


def under_new_names(recipe: dict) -> dict:
    """A recipe with every key by the name it has now.

    `drafter` meant the kind of drafter in 0.1.0. It means the drafter to start from now.
    """
    found = dict(recipe)
    if found.get("drafter") in DRAFTERS:
        found["drafter_type"] = found.pop("drafter")
    for old, new in RENAMED_KEYS.items():
        if old in found:
            found[new] = found.pop(old)
    return found


class RecipeParser(TrlParser):
    """trl's parser of `--config recipe.yaml` and flags. It reads 0.1.0's keys too, and names the
    new ones."""

    def parse_args_and_config(self, args: list[str], **options):
        words = []
        for word in args:
            flag, equals, value = word.partition("=")
            new = RENAMED_KEYS.get(flag.removeprefix("--")) if flag.startswith("--") else None
            if new is not None:
                print(f"{flag} is called --{new} now")
            words.append(f"--{new}{equals}{value}" if new else word)
        if "--drafter" in words[:-1] and words[words.index("--drafter") + 1] in DRAFTERS:
            print("--drafter with a kind of drafter is called --drafter_type now")
            words[words.index("--drafter")] = "--drafter_type"
        return super().parse_args_and_config(words, **options)

    def set_defaults_with_config(self, **recipe) -> list[str]:
        found = under_new_names(recipe)
        for old in recipe.keys() - found.keys():
            print(f"the recipe's key {old} is called {RENAMED_KEYS.get(old, 'drafter_type')} now")
        if recipe.get("drafter") in DRAFTERS and "drafter" in found:
            print("the recipe's key drafter is called drafter_type now")
        return super().set_defaults_with_config(**found)


def json_mapping(key: str, value: str | dict | None) -> dict | None:
    """A mapping as YAML gives it, or as JSON text from the command line.

    Raises:
        ValueError: the text is no JSON object.
    """
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{key} is {value!r}, which is no JSON object ({error}): write it like"
            ' {"enable_thinking": false}'
        ) from error
    if found is not None and not isinstance(found, dict):
        raise ValueError(
            f'{key} is {value!r}, which is no JSON object: write it like {{"enable_thinking":'
            " false}"
        )
    return found


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

    def loading(self) -> dict:
        """What `from_pretrained` is told, beside name and revision.

        Raises:
            ValueError: quantisation is asked for and bitsandbytes is not installed.
        """
        found = dict(
            dtype=self.target_dtype, attn_implementation=self.target_attn_implementation,
            device_map=self.target_device_map, trust_remote_code=self.trust_remote_code,
        )  # fmt: skip
        if self.target_quantization is None:
            return found
        if not is_bitsandbytes_available():
            raise ValueError(
                f"target_quantization: {self.target_quantization} needs bitsandbytes: `pip install"
                " bitsandbytes`, or remove the key"
            )
        four = self.target_quantization == "bnb-4bit"
        # the usual 4-bit format; scales in 8 bits save another 0.4 bits a weight
        bits = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        bits |= dict(bnb_4bit_compute_dtype=torch.bfloat16)
        return found | {
            "quantization_config": BitsAndBytesConfig(**bits if four else dict(load_in_8bit=True))
        }

    def __post_init__(self):
        if self.target_dtype not in ("auto", "bfloat16", "float32"):
            raise ValueError(
                f"target_dtype is {self.target_dtype!r}; it must be auto, bfloat16 or float32"
            )
        if self.target_quantization not in (None, "bnb-4bit", "bnb-8bit"):
            raise ValueError(
                f"target_quantization is {self.target_quantization!r}; it must be bnb-4bit or"
                " bnb-8bit"
            )
        if self.trust_remote_code and self.target_revision is None:
            raise ValueError(
                "trust_remote_code: true needs target_revision, so that the code cannot change"
                " under you"
            )


@dataclass
class DrafterArguments:
    """The drafter. What is left out is `drafter`'s own, or else derived from the
    target once, printed, and stored in its config.json."""

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
        metadata={
            "help": "By default the tokenizer's mask token, else the first unused embedding row."
        },
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
        metadata={
            "help": "sdpa, eager, or flex_attention (block-sparse training masks, for CUDA)."
        },
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
    use_peft: bool = field(
        default=False,
        metadata={"help": ("Train LoRA on drafter, or on the layers of init_from_target_layers.")},
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
        metadata={
            "help": "Modules LoRA is put on; by default all linear ones (attention, MLP, fc)."
        },
    )
    lora_modules_to_save: list[str] | None = field(
        default=None,
        metadata={
            "help": (
                "Modules trained in full beside LoRA, e.g. fc norm; the default on borrowed layers."
            )
        },
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale by alpha / sqrt(r) (rsLoRA)."})
    use_dora: bool = field(default=False, metadata={"help": "Weight-decomposed LoRA (DoRA)."})

    def __post_init__(self):
        self.chat_template_kwargs = json_mapping("chat_template_kwargs", self.chat_template_kwargs)
        if self.draft_attn_implementation not in ("sdpa", "eager", "flex_attention"):
            raise ValueError(
                f"draft_attn_implementation is {self.draft_attn_implementation!r}; it must be sdpa,"
                " eager or flex_attention"
            )
        if self.drafter_type not in (None, *DRAFTERS):
            raise ValueError(
                f"drafter_type is {self.drafter_type!r}; it must be one of {', '.join(DRAFTERS)}"
            )
        for kind, (config, _) in DRAFTERS.items():
            given = [key for key in config.own_keys if getattr(self, key, None) is not None]
            if given and kind != self.drafter_type:
                raise ValueError(
                    f"{', '.join(given)}: of a {kind} drafter; a {self.kind} drafter has no such"
                    f" thing and would ignore it. Set drafter_type: {kind}, or remove what is named"
                )
        if self.save_dtype not in ("auto", "bfloat16", "float32"):
            raise ValueError(
                f"save_dtype is {self.save_dtype!r}; it must be auto, bfloat16 or float32"
            )
        if self.block_size is not None and self.block_size < 2:
            raise ValueError(
                f"block_size is {self.block_size}; a block needs an anchor and at least one drafted"
                " slot"
            )
        if self.num_draft_layers is not None and self.num_draft_layers < 1:
            raise ValueError(
                f"num_draft_layers is {self.num_draft_layers}; a drafter needs at least one layer"
            )
        self._check_start()

    def _check_start(self) -> None:
        if self.drafter and self.init_from_target_layers:
            raise ValueError("drafter and init_from_target_layers are two starts: give one of them")
        if self.drafter_revision and not self.drafter:
            raise ValueError("drafter_revision without drafter says nothing: add or remove one")
        if self.use_peft and not (self.drafter or self.init_from_target_layers):
            raise ValueError(
                "use_peft: true needs something to adapt, and random weights are not it: give"
                " drafter (a released drafter) or init_from_target_layers (the"
                " target's own layers)"
            )
        if not self.use_peft:
            given = [f.name for f in fields(self) if f.name.startswith(("lora_", "use_"))
                     and getattr(self, f.name) != f.default]  # fmt: skip
            if given:
                raise ValueError(f"{', '.join(given)} would be ignored without use_peft: true")
        if self.use_peft and self.init_from_target_layers:
            # start at random, and nothing but the adapter would hold them
            random = DRAFTERS[self.kind][0].starts_at_random
            if self.lora_modules_to_save is None:
                self.lora_modules_to_save = [
                    *random,
                    "norm",
                ]  # the norms see other inputs than theirs
            if lacking := [name for name in random if name not in self.lora_modules_to_save]:
                raise ValueError(
                    f"lora_modules_to_save lacks {', '.join(lacking)}, which are not borrowed,"
                    " start at random and would not be saved: the drafter could not be rebuilt."
                    " Add what is named."
                )

    def peft_config(self) -> PeftConfig | None:
        """LoRA's configuration by trl's own reading of these keys, or `None` for full training."""
        config = get_peft_config(
            ModelConfig(
                use_peft=self.use_peft, lora_r=self.lora_r, lora_alpha=self.lora_alpha, lora_dropout=self.lora_dropout,
                lora_target_modules=self.lora_target_modules or ["all-linear"],
                lora_modules_to_save=self.lora_modules_to_save, use_rslora=self.use_rslora, use_dora=self.use_dora,
                lora_task_type=None,  # CAUSAL_LM asks for a model that generates by itself
            )
        )  # fmt: skip
        if config is not None and self.lora_target_modules not in (None, ["all-linear"]):
            # trl makes a single name a string, for PEFT a regex of the whole path
            config.target_modules = set(self.lora_target_modules)
        return config

    @property
    def kind(self) -> str:
        """The drafter's name in the table `DRAFTERS`."""
        return self.drafter_type or "dflash"

    @property
    def own_keys(self) -> dict:
        """The given ones of the keys that only this kind of drafter has."""
        own = {key: getattr(self, key, None) for key in DRAFTERS[self.kind][0].own_keys}
        return {key: value for key, value in own.items() if value is not None}


def drafter_arguments() -> type[DrafterArguments]:
    """`DrafterArguments` with the own keys of every drafter in the table as further fields, so that
    a recipe may have them and `--help` explains them."""
    own = [
        (
            key,
            config.__annotations__[key] | None,
            field(default=None, metadata={"help": f"{kind}: {says}"}),
        )
        for kind, (config, _) in DRAFTERS.items()
        for key, says in config.own_keys.items()
    ]
    return make_dataclass("DrafterArguments", own, bases=(DrafterArguments,))


@dataclass
class DataArguments:
    """The training text: Hub datasets or local files with `messages`, ShareGPT `conversations`,
    Alpaca's `instruction`, `input` and `output`, `prompt` and `completion`, `text`, or token
    rows."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Hub id, or a local .jsonl, .json, .parquet, .csv or .txt file."},
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a Hub dataset."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of a Hub dataset."})
    dataset_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a Hub dataset."}
    )
    dataset_mixture: list[str] | None = field(
        default=None,
        metadata={
            "help": (
                "Several sources instead of dataset_name: a list of {name, weight, config, split,"
                " revision}. Rows stand in the ratio of the weights, none is taken twice."
            )
        },
    )
    dataset_streaming: bool = field(
        default=False,
        metadata={
            "help": (
                "Read only the first max_train_rows (and held-out) rows, without downloading the"
                " rest."
            )
        },
    )
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Processes that tokenize; one by default."}
    )
    packing: bool = field(
        default=False,
        metadata={
            "help": (
                "Put short rows together into rows of up to max_length tokens; they do not see each"
                " other."
            )
        },
    )
    eval_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Held-out rows; by default the last eval_rows of the training rows."},
    )
    eval_dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of the held-out dataset."}
    )
    eval_dataset_split: str = field(
        default="train", metadata={"help": "Split of the held-out rows."}
    )
    eval_dataset_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the held-out dataset."}
    )
    eval_rows: int = field(
        default=64, metadata={"help": "At most this many held-out rows; 0 for none."}
    )
    max_train_rows: int | None = field(
        default=None, metadata={"help": "Use only the first rows, for a trial run."}
    )

    def __post_init__(self):
        if self.eval_rows < 0:
            raise ValueError(
                f"eval_rows is {self.eval_rows}; it must be 0 (no held-out rows) or more"
            )
        for key in ("max_train_rows", "dataset_num_proc"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise ValueError(
                    f"{key} is {getattr(self, key)}; it must be at least 1, or left out"
                )
        if (self.dataset_name is None) == (self.dataset_mixture is None):
            raise ValueError(
                "give the training text as dataset_name (one source) or as dataset_mixture"
                " (several), and not both"
            )
        if self.dataset_mixture is not None:
            self.dataset_mixture = [mixture_source(source) for source in self.dataset_mixture]
            alone = (
                self.dataset_config,
                self.dataset_revision,
                None if self.dataset_split == "train" else 1,
            )
            if any(value is not None for value in alone):
                raise ValueError(
                    "dataset_config, dataset_split and dataset_revision belong to dataset_name:"
                    " with dataset_mixture write config, split and revision into its entries"
                )
        if self.eval_dataset_name is not None and not self.eval_rows:
            raise ValueError("eval_rows: 0 would ignore eval_dataset_name: remove one of them")
        for key in ("eval_dataset_config", "eval_dataset_split", "eval_dataset_revision"):
            if self.eval_dataset_name is None and getattr(self, key) not in (None, "train"):
                raise ValueError(
                    f"{key} belongs to eval_dataset_name, and would be ignored: give that too, or"
                    " remove it"
                )
        if self.dataset_streaming and not self.max_train_rows:
            raise ValueError("dataset_streaming: true needs max_train_rows, how many rows to read")

    def sources(self) -> list[dict]:
        """The training sources as mappings with name, weight, config, split, revision."""
        alone = dict(
            config=self.dataset_config, split=self.dataset_split, revision=self.dataset_revision
        )
        return self.dataset_mixture or [dict(name=self.dataset_name, weight=1.0) | alone]

    def __str__(self) -> str:
        return " + ".join(source["name"] for source in self.sources())


def mixture_source(source: str | dict) -> dict:
    """One entry of `dataset_mixture`, JSON on the command line, with its defaults.

    Raises:
        ValueError: it is no mapping, has no name, an unknown key, or a weight that is not above 0.
    """
    known = {"name": None, "weight": 1.0, "config": None, "split": "train", "revision": None}
    try:
        found = known | (json.loads(source) if isinstance(source, str) else source)
    except (ValueError, TypeError):
        found = known
    if not found["name"] or set(found) != set(known):
        raise ValueError(
            f"dataset_mixture has the entry {source!r}: it must be a mapping with name and, if need"
            f" be, {', '.join(list(known)[1:])}"
        )
    weight = found["weight"]
    if not (isinstance(weight, int | float) and 0 < weight < float("inf")):
        raise ValueError(
            f"dataset_mixture: the weight of {found['name']} is {weight!r}; it must be a number"
            " above 0"
        )
    return found


def parse(argv: list[str]) -> tuple[TargetArguments, DrafterArguments, DataArguments, AUFConfig]:
    """Parse `--config recipe.yaml` and command-line overrides (the command line wins).

    Raises:
        ValueError: a key no dataclass knows, or a value that is not allowed.
    """
    parser = RecipeParser(
        (TargetArguments, drafter_arguments(), DataArguments, AUFConfig),
        prog="python -m hf_specauf.train",
    )
    parser.description = (
        "Train an Accept-Until-Fail drafter for a causal LM. Give a recipe with --config"
        " recipe.yaml; any of its keys can be overridden here, e.g. --objective decay --max_steps"
        " 100."
    )
    if argv[-1:] == ["--config"]:
        raise ValueError(
            "--config needs the path of a recipe, e.g. --config recipes/qwen3-8b/dflash_auf.yaml"
        )
    return parser.parse_args_and_config(argv)
