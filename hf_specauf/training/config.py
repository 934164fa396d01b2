"""AUFConfig: the arguments of a training run, checked before anything is loaded."""

from dataclasses import dataclass, field, fields

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import TrainingArguments
from transformers.integrations import is_deepspeed_available
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.trainer_utils import SchedulerType
from transformers.utils import is_torch_bf16_gpu_available

from ..keys import ONE_OR_MORE, SEED, Numbers, check_keys
from ..losses.branches import check_domino_keys
from ..losses.objectives import OBJECTIVES, LossSpec, check_normalisation, find_objective
from ..records import check_can_write, check_no_model_is_lost

# Keys of TrainingArguments that would be accepted and ignored, or break the exact loss, and their
# harmless values.
INAPPLICABLE = {
    "label_smoothing_factor": 0.0,
    "neftune_noise_alpha": None,
    "use_liger_kernel": False,
    "batch_eval_metrics": False,
    "prediction_loss_only": False,
    "remove_unused_columns": False,
    "auto_find_batch_size": False,
    "bf16_full_eval": False,
    "fp16_full_eval": False,
    "eval_do_concat_batches": True,
    "include_num_input_tokens_seen": "no",
}
# Keys of other optimizers, which the one of `muon_learning_rate` would ignore.
OPTIMIZER_KEYS = ("optim", "adam_beta1", "adam_beta2", "adam_epsilon")
# Schedules that begin at the whole learning rate, whatever the warm-up.
WITHOUT_WARMUP = (
    SchedulerType.CONSTANT,
    SchedulerType.REDUCE_ON_PLATEAU,
    SchedulerType.GREEDY,
)
USE_FSDP2 = "use FSDP2 (recipes/accelerate/fsdp2.yaml)"


NOT_NEGATIVE = Numbers(0)
# A mean that forgets nothing never moves.
DECAY = Numbers(0, 0.999999)
# Trainer's own keys among them: it takes most of these numbers, and trains on them, divides by them
# or ignores them.
NUMBERS = {
    "per_device_train_batch_size": ONE_OR_MORE,
    "per_device_eval_batch_size": ONE_OR_MORE,
    "gradient_accumulation_steps": ONE_OR_MORE,
    "eval_accumulation_steps": ONE_OR_MORE,
    "torch_empty_cache_steps": ONE_OR_MORE,
    "dataloader_num_workers": Numbers(0, whole=True),
    "dataloader_prefetch_factor": ONE_OR_MORE,
    "ddp_bucket_cap_mb": ONE_OR_MORE,
    "ddp_timeout": ONE_OR_MORE,
    "num_train_epochs": Numbers(0, inside=True),
    "max_steps": Numbers(1, whole=True, hint=", or left out: num_train_epochs then decides"),
    "learning_rate": NOT_NEGATIVE,
    "muon_learning_rate": Numbers(0, inside=True, hint=", or left out: AdamW then trains all"),
    "warmup_steps": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "adam_beta1": DECAY,
    "adam_beta2": DECAY,
    "adam_epsilon": NOT_NEGATIVE,
    "max_grad_norm": NOT_NEGATIVE,
    "lambda_decay_ratio": Numbers(0, 1),
    "gamma": Numbers(0, inside=True, hint=": the weight exp(-(k-1)/gamma) needs gamma > 0"),
    "logging_steps": Numbers(0, inside=True, hint="; logging_strategy: no leaves logs out"),
    "eval_steps": Numbers(0, inside=True, hint="; eval_strategy: no leaves evaluations out"),
    "eval_delay": NOT_NEGATIVE,
    "save_steps": Numbers(0, inside=True, hint="; save_strategy: no leaves checkpoints out"),
    "save_total_limit": Numbers(1, whole=True, hint=", or left out to keep all"),
    "seed": SEED,
    "data_seed": SEED,
    "anchors_per_row": ONE_OR_MORE,
    "max_length": Numbers(2, whole=True),
    "head_rows_per_chunk": ONE_OR_MORE,
    "eval_prompts": Numbers(0, whole=True),
    "eval_new_tokens": Numbers(0, whole=True),
    "target_states_cache_gb": Numbers(0, inside=True),
}
STATES_DTYPES = {"target_states_cache_dtype": ("auto", "bfloat16")}


@dataclass
class AUFConfig(TrainingArguments):
    """Arguments of [`AUFTrainer`], beside all of [`~transformers.TrainingArguments`].

    The objective is Accept-Until-Fail unless told otherwise (Spec-AUF, arXiv 2607.01893).
    """

    objective: str = field(
        default="auf",
        metadata={
            "help": (
                "Which valid slots the loss supports. "
                + "; ".join(f"{name}: {entry.says}" for name, entry in OBJECTIVES.items())
                + ". Those with a base branch are for Domino drafters."
            )
        },
    )
    gamma: float | None = field(
        default=None,
        metadata={
            "help": (
                "Decay length in slots, for decay and auf_decay; by default 7, 5, 4 for block size"
                " 16, 10, 8."
            )
        },
    )
    lambda_decay_ratio: float | None = field(
        default=None,
        metadata={
            "help": (
                "Share of training over which a Domino drafter's base loss gives way to the final"
                " one (default 1)."
            )
        },
    )
    normalisation: str = field(
        default="pooled",
        metadata={
            "help": (
                "pooled: one division by all weights of an optimizer step. per_block: mean of block"
                " means."
            )
        },
    )
    anchors_per_row: int = field(
        default=512,
        metadata={
            "help": (
                "N, blocks drawn from each row at each step. A micro-batch holds"
                " per_device_train_batch_size times as many; that product, at the longest row, is"
                " what is tried for memory at the start."
            )
        },
    )
    max_length: int = field(
        default=3072, metadata={"help": "S, tokens of a row; longer conversations are cut."}
    )
    head_rows_per_chunk: int = field(
        default=256,
        metadata={"help": "Slots whose logits are held at once; lower it to save memory."},
    )
    shard_target: bool = field(
        default=False,
        metadata={
            "help": (
                "Spread the target's decoder layers over all processes, where one GPU cannot"
                " hold it."
            )
        },
    )
    target_states_cache: str | None = field(
        default=None,
        metadata={
            "help": (
                "A folder that keeps the target's hidden states of all rows, so that the target"
                " runs once over each and not at each step. Runs share it. The size is printed"
                " first."
            )
        },
    )
    target_states_cache_gb: float = field(
        default=50, metadata={"help": "The most that this run's rows may take there, in GB."}
    )
    target_states_cache_dtype: str = field(
        default="auto",
        metadata={
            "help": (
                "auto (as the target gives them, so that the loss is the same) or bfloat16, half"
                " of float32's size; with bf16: true the loss is the same too."
            )
        },
    )
    eval_prompts: int = field(
        default=8,
        metadata={"help": "Held-out prompts decoded at each evaluation for eval_tau; 0 for none."},
    )
    eval_new_tokens: int = field(default=64, metadata={"help": "Tokens decoded for each of them."})
    per_device_eval_batch_size: int | None = field(
        default=None,
        metadata={"help": "Held-out rows at once; by default per_device_train_batch_size."},
    )
    learning_rate: float = field(default=6e-4, metadata={"help": "Peak learning rate."})
    muon_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": (
                "Train the drafter's matrices by Muon at this rate (try 0.02), the rest, and those"
                " with embed in their name (Domino's embed_proj), by AdamW at learning_rate; by"
                " default AdamW (or optim) trains all."
            )
        },
    )
    logging_steps: float = field(
        default=10, metadata={"help": "Log every this many steps (a share of them if < 1)."}
    )
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": (
                "bf16 autocast over fp32 drafter weights; by default on where a GPU supports it."
            )
        },
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay false: rows carry more than ids."}
    )

    def __post_init__(self):
        self._check_own_keys()
        if self.deepspeed and not is_deepspeed_available():
            raise ValueError(
                "deepspeed is given, and DeepSpeed is not installed: `pip install deepspeed`, or"
                f" {USE_FSDP2}"
            )
        self._fill_in_defaults()
        super().__post_init__()
        # known only now: Trainer's own arguments have read the launcher's settings
        self._check_deepspeed()
        self._check_reports()
        if self.warmup_steps and self.lr_scheduler_type in WITHOUT_WARMUP:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps:g}, and lr_scheduler_type:"
                f" {self.lr_scheduler_type.value} would ignore it: remove the key, or set"
                " lr_scheduler_type: constant_with_warmup"
            )
        for key, harmless in INAPPLICABLE.items():
            if getattr(self, key) != harmless:
                raise ValueError(
                    f"{key}: {getattr(self, key)} does not apply to block drafters and would be"
                    " ignored or do harm: remove the key"
                )

    def loss_spec(self, block_size: int) -> LossSpec:
        """The loss of a drafter with blocks of `block_size` slots.

        Raises:
            ValueError: `gamma` is missing, or would be ignored; see `resolve_gamma`.
        """
        return LossSpec.of(
            self.objective,
            block_size,
            self.gamma,
            normalisation=self.normalisation,
            rows_per_chunk=self.head_rows_per_chunk,
        )

    def _fill_in_defaults(self) -> None:
        """Values that depend on other keys or on the machine."""
        if self.per_device_eval_batch_size is None:
            self.per_device_eval_batch_size = self.per_device_train_batch_size
        if self.bf16 is None:
            on_gpu = not self.use_cpu and torch.cuda.is_available()
            self.bf16 = on_gpu and is_torch_bf16_gpu_available()
        if self.ddp_find_unused_parameters is None:
            # every parameter is used in every forward, and DDP would search for nothing
            self.ddp_find_unused_parameters = False
        # SIGTERM always saves a checkpoint and stops (callbacks.py). Trainer's own callback would
        # do half of it: it writes the checkpoint in place, under its final name.
        self.enable_jit_checkpoint = False
        if self.label_names is None:
            # PeftModel hides forward's argument names, from which Trainer reads them (peft#1881)
            self.label_names = []

    def _check_own_keys(self) -> None:
        if self.fp16:
            raise ValueError(
                "fp16: true would train a drafter that accepts nothing (vllm#55250): use bf16: true"
            )
        allowed = dict(NUMBERS)
        if self.max_steps == -1:  # Trainer's word for a key that is left out
            del allowed["max_steps"]
        check_keys(self, allowed, STATES_DTYPES)
        self._check_places()
        find_objective(self.objective)
        check_domino_keys(self.objective, self.normalisation, self.lambda_decay_ratio)
        check_normalisation(self.normalisation)
        if self.eval_prompts and self.eval_new_tokens < 2:
            raise ValueError(
                f"eval_new_tokens is {self.eval_new_tokens}: the first token comes from the"
                " prefill, so tau needs 2 or more; eval_prompts: 0 leaves decoding out"
            )
        if self.muon_learning_rate is not None:
            self._check_nothing_is_ignored_by_muon()
        if self.target_states_cache is None:
            defaults = {field.name: field.default for field in fields(self)}
            for key in ("target_states_cache_gb", "target_states_cache_dtype"):
                if getattr(self, key) != defaults[key]:
                    raise ValueError(
                        f"{key} is {getattr(self, key)}, and would be ignored without"
                        " target_states_cache: give the folder, or remove the key"
                    )

    def _check_places(self) -> None:
        """Where things are written, here and on the Hub."""
        out = self.output_dir or "trainer_output"
        check_can_write("output_dir", out)
        check_no_model_is_lost("output_dir", out)
        if self.target_states_cache is not None:
            check_can_write("target_states_cache", self.target_states_cache)
        if self.hub_model_id is not None:
            try:
                validate_repo_id(self.hub_model_id)
            except HFValidationError as error:
                raise ValueError(
                    f"hub_model_id is {self.hub_model_id!r}, which no repository can be called:"
                    f" write OWNER/NAME ({error})"
                ) from error

    def _check_reports(self) -> None:
        for name in self.report_to:
            if name not in INTEGRATION_TO_CALLBACK:
                raise ValueError(
                    f"report_to names {name!r}, and Trainer reports to none but"
                    f" {', '.join(INTEGRATION_TO_CALLBACK)}: name one of these, or none"
                )
            # transformers does not ask whether the other two are installed
            here = name in (*get_available_reporting_integrations(), "azure_ml", "flyte")
            if not here:
                raise ValueError(
                    f"report_to names {name}, which is not installed: `pip install {name}`, or"
                    " report_to: none"
                )

    def _check_nothing_is_ignored_by_muon(self) -> None:
        defaults = {field.name: field.default for field in fields(self)}
        for key in OPTIMIZER_KEYS:
            if getattr(self, key) != defaults[key]:
                raise ValueError(
                    f"{key} is {getattr(self, key)}, and muon_learning_rate brings an optimizer of"
                    " its own that would ignore it: remove one of the two keys"
                )

    def _check_deepspeed(self) -> None:
        if self.deepspeed_plugin is None:
            return
        if self.gradient_accumulation_steps > 1:
            raise ValueError(
                f"gradient_accumulation_steps is {self.gradient_accumulation_steps}, and DeepSpeed"
                " divides each micro-batch's loss before all are known: set it to 1, or"
                f" {USE_FSDP2}"
            )
        if self.deepspeed_plugin.zero_stage == 3:
            raise ValueError(
                "zero_stage is 3, which shards the target too, and reading its hidden states and"
                f" saving the drafter need whole weights: set it to 2, or {USE_FSDP2}"
            )
