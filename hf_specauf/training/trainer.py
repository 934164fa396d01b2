"""AUFTrainer: transformers' Trainer for block drafters. The drafter is the model; the target stands
outside.

What happens in one optimizer step:

1. `BlockForward` (forward.py), for each micro-batch of token rows: draw anchors, and make blocks at
   them. Run the frozen target once over the rows; its hidden states are the blocks' context. Run
   the drafter, which computes the head's loss inside its forward.
2. `_counters`: the loss numerator, with its graph, and what the batch counts, by name.
3. `compute_loss`: the numerator over a constant goes into the backward pass. The denominator, the
   weights of all supported slots, is not known yet: other micro-batches and ranks are still out.
4. `training_step`, on the step's last micro-batch: one reduction adds up all numerators and
   denominators. Multiply the gradients by the constant over the denominator. They are then those of
   the exact loss, however the step was split.
5. Trainer clips, steps the optimizer and logs; `log` adds the paper's figures.
"""

import math

import torch
from datasets import Dataset
from peft import get_peft_model
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import (
    PreTrainedTokenizerBase,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    set_seed,
)

from ..data.conversation import stop_at_both_ends
from ..data.findings import are_prepared
from ..data.rows import RowCollator, fill_up, pad_token_id, prepare_rows
from ..drafters.transformers_internals import check_methods
from ..layouts.adapters import AdapterBase
from ..losses.blocks import EVALUATION_STEP
from ..losses.branches import BranchBalance, branch_denominators, row_loss_terms
from ..target import FrozenTarget, room_for_prompt
from ..target_states.kept import KeptStates
from . import preflight
from .callbacks import InterruptCallback, RateCallback, TauProgressCallback
from .checkpoints import DrafterCheckpoints, shard_again, whole_copy
from .config import AUFConfig
from .diagnostics import (
    StepSums,
    count_rows,
    diagnostics,
    empty_counters,
    evaluation_metrics,
    loss_terms_of,
    will_log,
)
from .evaluation import decoded_tau, evenly_spread, first_set, prompts_of
from .forward import BlockForward
from .memory import local, try_largest_batch
from .optimizer import MuonWithAdamW
from .publishing import Publishing
from .waiting import first_process_first, wait_for_everyone

# Private methods of Trainer that we override: one that is gone would no longer be called, and
# nothing would say so.
OVERRIDDEN = {
    "_get_output_dir": ("trial",),
    "_save_checkpoint": ("model", "trial"),
    "_save": ("output_dir", "state_dict"),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_evaluate": ("trial", "ignore_keys_for_eval", "skip_scheduler"),
    "_push_from_checkpoint": ("checkpoint_folder",),
}


class AUFTrainer(DrafterCheckpoints, Publishing, Trainer):
    """Trains a block drafter on its target's own hidden states.

    Args:
        model (`PreTrainedModel`): the drafter, fp32.
        target_model (`PreTrainedModel`, `PeftModel` or `FrozenTarget`): the target; frozen, and
            moved only where it is neither quantised nor dispatched. Its generation config gets the
            end token of its chat template, where it names another.
        args (`AUFConfig`).
        train_dataset, eval_dataset (`Dataset`, *optional*): rows of `text`, `messages`,
            `conversations`, or token rows with `input_ids` and `supervised`.
        processing_class (`PreTrainedTokenizerBase`): the target's tokenizer.
        peft_config (`PeftConfig`, *optional*): trains an adapter on the drafter instead.
        callbacks (`list[TrainerCallback]`, *optional*).
        adapter_base (`AdapterBase`, *optional*): what the adapter is trained on, noted in each
            checkpoint; by default the drafter, under the name it was loaded by.

    Raises:
        ValueError: what would silently accept nothing; see `preflight` and `prepare_rows`.
    """

    # Trainer would divide each micro-batch's loss by their number; training_step divides once.
    loss_is_scaled_for_ga = True
    _untried_memory = False  # set by train, where a trial can tell something

    def __init__(
        self,
        model,
        target_model,
        args: AUFConfig,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config=None,
        callbacks: list[TrainerCallback] | None = None,
        adapter_base: AdapterBase | None = None,
    ):
        check_methods(Trainer, OVERRIDDEN)
        preflight.check_start(model, args, processing_class, peft_config, adapter_base)
        self.args, self.tokenizer = args, processing_class
        self.drafter_config = config = model.config
        self.block_size = config.block_size
        self.loss_spec = args.loss_spec(config.block_size)
        self.target = self._asked(target_model, model, measured=eval_dataset is not None)
        self.kept_states = kept = KeptStates.of(self.target, args)
        self.forward_blocks = BlockForward(self.target, config, args, kept)
        self.adapter_base, self.peft_config = adapter_base, peft_config
        if peft_config is not None:
            # before PEFT changes the drafter: the base is the drafter as it was loaded
            self.adapter_base = adapter_base or AdapterBase.of_drafter(model)
            set_seed(args.seed)  # the adapter's first weights
            model = get_peft_model(model, peft_config)
        with first_process_first():
            train_dataset, eval_dataset = self._prepare(train_dataset), self._prepare(eval_dataset)
            if train_dataset is not None:
                rows = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
                train_dataset = fill_up(train_dataset, rows)
        pad = pad_token_id(processing_class, config.vocab_size)
        self._interrupt = InterruptCallback()  # read in training_step, so that all ranks agree
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=RowCollator(pad, config.mask_token_id, keyed=kept is not None),
            compute_metrics=evaluation_metrics,
            callbacks=[self._interrupt, RateCallback(), *(callbacks or [])],
        )
        wait_for_everyone()  # with push_to_hub, the first process has just asked the Hub
        preflight.check_best_metric(args, self.block_size, eval_dataset)
        preflight.check_sharding(self)
        self._keep_sharded_sums_in_fp32()
        # None is popped with disable_tqdm, where there is no bar to replace
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(TauProgressCallback)
        preflight.check_target(self, first_set(train_dataset or eval_dataset))
        self._step_sums = StepSums(args.device)
        self._log_sums = empty_counters(self.block_size, args.device)
        self._balance = BranchBalance(self.loss_spec, self._over_all_processes)
        self._micro_batches: list[dict] = []  # of the step under way, where the balance needs them

    def _asked(self, target, drafter, measured: bool) -> FrozenTarget:
        """The target, once it is known to serve this drafter, and both stop where a chat does."""
        config = self.drafter_config
        # The copy of a sharded drafter draws random weights before it gets its own.
        with torch.random.fork_rng(devices=[]):
            whole = whole_copy(drafter, config, None)
        target = preflight.ask_target(target, whole, self.args, measured=measured)
        stop_at_both_ends(target.model, self.tokenizer, config.chat_template_kwargs)
        config.eos_token_id = target.model.generation_config.eos_token_id
        return target

    def _prepare(self, rows):
        """Raw rows, or a dict of several sets, as token rows; token rows as they are."""
        if isinstance(rows, dict):
            return {name: self._prepare(part) for name, part in rows.items()}
        if rows is None or are_prepared(rows, self.target.positions):
            return rows
        return prepare_rows(
            rows,
            self.tokenizer,
            max_length=self.args.max_length,
            block_size=self.block_size,
            mask_token_id=self.drafter_config.mask_token_id,
            vocab_size=self.drafter_config.vocab_size,
            chat_template_kwargs=self.drafter_config.chat_template_kwargs,
            placeholders=self.target.placeholders,
            positions=self.target.positions,
        )

    def _keep_sharded_sums_in_fp32(self) -> None:
        # accelerate's own policy sums gradients in bf16, and casts a Domino drafter's losses too
        if self.is_fsdp_enabled and self.args.bf16:
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = policy

    def _over_all_processes(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(tensor, "sum")

    def train(self, *args, **kwargs):
        """Trainer's own; whatever ends it, the signals are given back and the next call starts with
        clean sums."""
        self._step_sums.reset()
        self._log_sums.zero_()
        self._balance.reset()
        # A CPU out of memory kills without an exception, and DeepSpeed would step on the trial's
        # gradient.
        self._untried_memory = self.args.device.type != "cpu" and not self.is_deepspeed_enabled
        self._clear_unfinished()
        if self.kept_states is not None:
            self.kept_states.fill(self.train_dataset, self.eval_dataset)
        shard_again(self.model)
        try:
            return super().train(*args, **kwargs)
        finally:
            self._interrupt.release()

    def create_optimizer(self, model=None):
        """Trainer's own, or Muon for the matrices where `muon_learning_rate` is set."""
        muon, adam = self.args.muon_learning_rate, self.args.learning_rate
        if muon is None or self.optimizer is not None:
            return super().create_optimizer(model)
        options = {"weight_decay": self.args.weight_decay, "bf16": self.args.bf16}
        self.optimizer = MuonWithAdamW(model or self.model, muon, adam, **options)
        return self.optimizer

    # ---- one optimizer step, from the outside in

    def get_batch_samples(self, *args, **kwargs):
        """Trainer's own, which fetches all micro-batches of a step. They are kept where the first
        backward pass needs the supports of all."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        self._micro_batches = batches if self._balance.differs else []
        return batches, items

    def training_step(self, model, inputs, num_items_in_batch=None):
        """One micro-batch; on the last of a step, rescale gradients to the exact pooled loss and
        return that loss.

        The denominator (weights of supported slots) is known only after the forward passes, so
        Trainer's `num_items_in_batch` cannot carry it (Automodel#3797, verl#785).
        """
        if self._untried_memory:
            self._untried_memory = False
            try_largest_batch(self, model)
        if self._balance.differs and len(self._micro_batches) > 1 and not self._balance.is_known:
            self._balance.begin(self._branch_denominators_of_step(model))
        super().training_step(model, inputs, num_items_in_batch)
        if not self.accelerator.sync_gradients:  # more micro-batches of this step will come
            return torch.zeros((), device=self.args.device)
        gradients = []
        if not self.is_deepspeed_enabled:  # it has stepped already, by a loss that was exact
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([local(gradient) for gradient in gradients])
        # every rank sees the same totals, and so all stop at the same step
        step = self._step_sums.agree(
            self._over_all_processes,
            unsound=not torch.isfinite(norm),
            told_to_stop=self._interrupt.interrupted,
        )
        self._balance.reset()
        if not math.isfinite(step.numerator):
            raise self._not_finite("loss")
        if step.unsound:
            raise self._not_finite("gradient")
        if self.args.world_size > 1:
            self._interrupt.agreed = step.told_to_stop
        # a step without a supported slot has numerator and gradients 0, whatever divides them
        denominator = max(step.denominator, 1.0)
        # DDP and FSDP2 average gradients over ranks, and the loss is a sum over them
        scale = self._nominal * self.accelerator.num_processes / denominator
        for gradient in gradients:
            gradient.mul_(scale)
        return torch.tensor(step.numerator / denominator, device=self.args.device)

    def compute_loss(self, model, inputs, num_items_in_batch=None):
        """Numerator over a fixed constant; `training_step` makes it exact once all micro-batches
        and ranks are in."""
        step = self.state.global_step
        numerator, counters = self._counters(
            model, inputs, step, every_prediction=will_log(self.args, self.state)
        )
        sums = counters.sum(0)
        self._step_sums.add(sums)
        self._log_sums += sums
        if not self.is_deepspeed_enabled:
            return numerator / self._nominal
        # DeepSpeed steps inside backward, so all must be known before
        total, denominator = self._over_all_processes(loss_terms_of(sums)).tolist()
        if not math.isfinite(total):
            raise self._not_finite("loss")
        return numerator * self.accelerator.num_processes / max(denominator, 1.0)

    @property
    def _nominal(self) -> float:
        """What a numerator is divided by until the step's denominator is known.

        It is about a micro-batch's number of slots, so that gradients are near their final size
        meanwhile. It is a power of two, because dividing by one does not round: no gradient then
        depends on the size of a micro-batch.
        """
        args = self.args
        slots = args.per_device_train_batch_size * args.anchors_per_row * (self.block_size - 1)
        return 2.0 ** round(math.log2(slots))

    def _not_finite(self, what: str) -> FloatingPointError:
        return FloatingPointError(
            f"the {what} of step {self.state.global_step + 1} is not a finite number; the optimizer"
            " was not stepped. Lower learning_rate, and go on from the last checkpoint in"
            f" {self.args.output_dir} with --resume_from_checkpoint true."
        )

    def base_weight(self, step: int) -> float:
        """lambda: from 1 at step 0 linearly to 0 at `lambda_decay_ratio` of all steps (arXiv
        2605.29707)."""
        ratio = self.args.lambda_decay_ratio or 1.0
        return max(0.0, 1.0 - step / (ratio * self.state.max_steps))

    def _counters(
        self, model, inputs: dict, step: int, every_prediction: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss numerator with its graph, and detached counters per row, see [`count_rows`].

        In evaluation a Domino drafter's loss is its final branch's alone, so that it does not move
        with lambda.
        """
        spec, anchors_per_row = self.loss_spec, self.args.anchors_per_row
        losses = self.forward_blocks(
            model, inputs, step, anchors_per_row, spec, every_prediction=every_prediction
        )
        if losses.base is None or step == EVALUATION_STEP:
            terms = row_loss_terms(losses.final, spec)
        else:
            terms = self._balance.mix(losses.base, losses.final, self.base_weight(step))
        with torch.no_grad():
            counters = count_rows(
                terms,
                losses,
                spec,
                block_size=self.block_size,
                anchors_per_row=anchors_per_row,
                every_prediction=every_prediction,
            )
        return terms.numerator, counters

    @torch.no_grad()
    def _branch_denominators_of_step(self, model) -> torch.Tensor:
        """Both branches' denominators over all micro-batches, (2,). It costs a forward pass of
        each. With dropout in an adapter, this pass and the next one differ a little."""
        anchors, step = self.args.anchors_per_row, self.state.global_step
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for inputs in self._micro_batches:
            inputs = self._prepare_inputs(inputs)
            losses = self.forward_blocks(model, inputs, step, anchors, self.loss_spec)
            sums += branch_denominators(losses.base, losses.final)
        return sums

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the paper's diagnostics, over all ranks since the last log, to a training log."""
        if "loss" in logs:
            logs |= diagnostics(self._over_all_processes(self._log_sums))
            self._log_sums.zero_()
            if self.loss_spec.objective.base is not None:
                # Trainer logs after it has counted the step up
                last_step = max(self.state.global_step - 1, 0)
                logs["lambda"] = round(self.base_weight(last_step), 4)
        super().log(logs, start_time)

    # ---- evaluation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Trainer's own, for raw rows too. An error where `check_evaluation` raises one."""
        preflight.check_evaluation(self)
        if not isinstance(eval_dataset, str):  # the name of one of several sets
            eval_dataset = self._prepare(eval_dataset)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Counters per row, so that the gathered sum is exact whatever the split."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            _, counters = self._counters(model, inputs, EVALUATION_STEP, every_prediction=True)
        # Trainer computes metrics only where there are labels too
        labels = torch.zeros(len(counters), device=counters.device)
        return None, counters, labels

    def evaluation_loop(self, dataloader, *args, metric_key_prefix="eval", **kwargs):
        """Trainer's loop, then tau by real decoding of a few held-out prompts."""
        if self.kept_states is not None:  # of rows that were given only now
            self.kept_states.fill(dataloader.dataset)
        output = super().evaluation_loop(
            dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs
        )
        if self.args.eval_prompts > 0:
            output.metrics[f"{metric_key_prefix}_tau"] = self.decoded_tau(dataloader.dataset)
        return output

    def eval_prompts(self, rows: Dataset | None = None) -> list[torch.Tensor]:
        """Prompts (1, S) of `eval_prompts` held-out rows, evenly spread."""
        rows = first_set(self.eval_dataset if rows is None else rows)
        room = room_for_prompt(self.target.model, self.args.eval_new_tokens, "eval_new_tokens")
        return list(prompts_of(evenly_spread(rows, self.args.eval_prompts), self.args.device, room))

    def decoded_tau(self, rows: Dataset) -> float:
        """tau over `eval_prompts` rows' prompts, decoded greedily, dealt to the ranks."""
        drafter = self.whole_drafter().to(self.args.device)
        prompts, pad = self.eval_prompts(rows), self.data_collator.pad_token_id
        return decoded_tau(self.target.model, drafter, prompts, self.args, pad)
