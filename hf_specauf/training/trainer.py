"""AUFTrainer: transformers' Trainer for block drafters. The drafter is the model; the target stands
outside."""

import copy
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import get_peft_model
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModel,
    EvalPrediction,
    PreTrainedTokenizerBase,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import IntervalStrategy

from ..data.rows import RowCollator, fill_up, prepare_rows, prompt_length
from ..drafters.transformers_internals import check_methods
from ..layouts.adapters import AdapterBase, finish_adapter
from ..losses.blocks import EVALUATION_STEP, Blocks, make_blocks, row_inputs, sample_anchors
from ..losses.branches import BranchBalance, branch_denominators, branch_losses
from ..losses.head_loss import HeadLoss
from ..losses.objectives import LossSpec, row_terms
from ..serving.acceptance import summarize
from ..serving.compare import decoding_config
from ..serving.decoding import attach
from ..target import FrozenTarget
from .callbacks import InterruptCallback, TauProgressCallback
from .checkpoints import CompleteCheckpoints
from .config import AUFConfig
from .diagnostics import COUNTERS, StepSums, count_rows, diagnostics, named
from .memory import local, try_largest_batch
from .optimizer import MuonWithAdamW
from .preflight import check_resumed_adapter, check_sharding, check_start
from .publishing import Publishing

# Private methods of Trainer that we override: one that is gone would no longer be called, and
# nothing would say so.
OVERRIDDEN = {
    "_get_output_dir": ("trial",),
    "_save_checkpoint": ("model", "trial"),
    "_save": ("output_dir", "state_dict"),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_push_from_checkpoint": ("checkpoint_folder",),
}


class AUFTrainer(CompleteCheckpoints, Publishing, Trainer):
    """Trains a block drafter on its target's own hidden states.

    Args:
        model (`PreTrainedModel`): the drafter, fp32.
        target_model (`PreTrainedModel` or `PeftModel`): the target; frozen, and moved to the
            drafter's device only where it is neither quantised nor dispatched.
        args (`AUFConfig`).
        train_dataset, eval_dataset (`Dataset`, *optional*): rows of `text`, `messages`,
            `conversations`, or token rows with `input_ids` and `supervised`.
        processing_class (`PreTrainedTokenizerBase`): the target's tokenizer.
        peft_config (`PeftConfig`, *optional*): trains an adapter on the drafter instead.
        callbacks (`list[TrainerCallback]`, *optional*).
        adapter_base (`AdapterBase`, *optional*): what the adapter is trained on, noted in each
            checkpoint; by default the drafter, under the name it was loaded by.

    Raises:
        ValueError: whatever would train a drafter that silently accepts nothing; see
            `FrozenTarget.check` and `prepare_rows`.
    """

    # The division happens once per optimizer step, in training_step
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
        check_start(model, args, processing_class, peft_config, adapter_base)
        config = model.config
        self.args = args
        self.drafter_config = config
        self.block_size = config.block_size
        self.loss_spec = LossSpec.of(
            args.objective, config.block_size, args.gamma,
            normalisation=args.normalisation, rows_per_chunk=args.head_rows_per_chunk,
        )  # fmt: skip
        self.target = FrozenTarget(target_model, config)
        self.tokenizer = processing_class
        self._interrupt = InterruptCallback()
        self._peft_config = peft_config
        self.adapter_base = adapter_base
        if peft_config is not None:
            self.adapter_base = adapter_base or AdapterBase.of_drafter(model)
            set_seed(args.seed)  # the adapter's first weights
            model = get_peft_model(model, peft_config)

        with args.main_process_first(desc="tokenizing"):
            train_dataset, eval_dataset = self._prepare(train_dataset), self._prepare(eval_dataset)
            if train_dataset is not None:
                step_rows = (
                    args.train_batch_size * args.world_size * args.gradient_accumulation_steps
                )
                train_dataset = fill_up(train_dataset, step_rows)
        pad = next(
            i
            for i in (processing_class.pad_token_id, processing_class.eos_token_id, 0)
            if i is not None
        )
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=RowCollator(pad, config.mask_token_id),
            compute_metrics=self._metrics,
            callbacks=[self._interrupt, *(callbacks or [])],
        )
        check_sharding(self)
        if self.is_fsdp_enabled and args.bf16:
            # accelerate's own sums gradients in bf16, and casts what forward returns, also Domino's
            # losses
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = policy
        if self.pop_callback(ProgressCallback) is not None:  # absent with disable_tqdm
            self.add_callback(TauProgressCallback)
        rows = train_dataset if train_dataset is not None else eval_dataset
        self._place_target(next(iter(rows.values())) if isinstance(rows, dict) else rows)
        self._step_sums = StepSums(args.device)
        self._log_sums = torch.zeros(len(COUNTERS), dtype=torch.float64, device=args.device)
        self._balance = BranchBalance(self.loss_spec, self._over_all_processes)
        self._micro_batches: list[dict] = []  # of the step under way, where the balance needs them

    def _over_all_processes(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(tensor, "sum")

    def _place_target(self, rows: Dataset) -> None:
        """Move or shard the target, and check on real rows that it lends what the drafter is
        trained on."""
        device = self.args.device
        if self.args.shard_target:
            self.target.shard(device)
        elif not self.target.dispatched:
            self.target.model.to(device)
        self.target.check(torch.tensor([rows[0]["input_ids"][:64]], device=device))
        if "document_ids" in rows.column_names:
            some = rows.select(np.linspace(0, len(rows) - 1, min(len(rows), 200)).astype(int))
            fullest = max(
                some, key=lambda row: row["document_ids"][-1]
            )  # a row of one document would tell nothing
            packed = [
                torch.tensor([fullest[key]], device=device) for key in ("input_ids", "document_ids")
            ]
            self.target.check_packing(*packed)

    def _prepare(self, rows):
        """Raw rows, or a dict of several sets, as token rows; token rows as they are."""
        if isinstance(rows, dict):
            return {name: self._prepare(part) for name, part in rows.items()}
        if rows is None or "row" in rows.column_names:
            return rows
        config = self.drafter_config
        return prepare_rows(
            rows, self.tokenizer, max_length=self.args.max_length, block_size=self.block_size,
            mask_token_id=config.mask_token_id, chat_template_kwargs=config.chat_template_kwargs,
        )  # fmt: skip

    def train(self, *args, **kwargs):
        """Trainer's own; whatever ends it, Ctrl-C is given back and the next call starts with clean
        sums."""
        self._step_sums.reset()
        self._log_sums.zero_()
        self._balance.reset()
        # a CPU out of memory kills without an exception, and DeepSpeed would step on the trial's
        # gradient
        self._untried_memory = self.args.device.type != "cpu" and not self.is_deepspeed_enabled
        self._clear_unfinished()
        # An evaluation before training leaves whole weights in FSDP2's modules, and the optimizer
        # must get the sharded ones. Newer versions of Trainer do this themselves; twice is
        # harmless.
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        try:
            return super().train(*args, **kwargs)
        finally:
            self._interrupt.release()

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Trainer's own, for raw rows too.

        Raises:
            ValueError: accelerate's FSDP2 has not sharded the drafter yet, which it does together
                with an optimizer.
        """
        if self.is_fsdp_enabled and self.optimizer is None:
            raise ValueError(
                "evaluate before train and accelerate's FSDP2 cannot go together: it shards a"
                " drafter when training starts. Set eval_on_start: true, which evaluates before the"
                " first step."
            )
        named = isinstance(eval_dataset, str)  # one of several sets
        return super().evaluate(
            eval_dataset if named else self._prepare(eval_dataset), ignore_keys, metric_key_prefix
        )

    def create_optimizer(self, model=None):
        """Trainer's own, or Muon for the matrices where `muon_learning_rate` is set."""
        if self.args.muon_learning_rate is None or self.optimizer is not None:
            return super().create_optimizer(model)
        rates = self.args.muon_learning_rate, self.args.learning_rate
        self.optimizer = MuonWithAdamW(
            model or self.model, *rates, weight_decay=self.args.weight_decay
        )
        return self.optimizer

    # ---- the loss

    def _run_blocks(
        self,
        model,
        inputs: dict,
        step: int,
        anchors_per_row: int,
        spec: LossSpec,
        every_prediction: bool = False,
    ) -> tuple[Blocks, HeadLoss, HeadLoss | None]:
        """Draw anchors and fill their blocks -> the blocks, the loss on the logits that decoding
        uses, and that of Domino's base branch."""
        ids, documents = inputs["input_ids"], inputs["document_ids"]
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        anchors, real = sample_anchors(
            inputs["supervised"], documents, anchors_per_row, inputs["row_ids"], seed, step
        )
        count = max(
            int(real.sum(1).max()), 1
        )  # rows with fewer candidates than N cost no more than they have
        anchors, real = anchors[:, :count], real[:, :count]
        mask_token_id = self.drafter_config.mask_token_id
        flex = self.drafter_config._attn_implementation == "flex_attention"
        blocks = make_blocks(
            ids, inputs["supervised"], documents, anchors, real, self.block_size, mask_token_id, flex=flex,
            predictions=self.drafter_config.predictions,
        )  # fmt: skip
        given = dict(
            noise_embeds=self.target.noise_embeds(blocks.noise_ids),
            context_hidden_states=self.target.context(ids, **row_inputs(documents)),
            attention_mask=blocks.attention_mask,
            position_ids=blocks.position_ids,
        )
        if self.drafter_config.reads_previous_tokens:
            given["prev_embeds"] = self.target.noise_embeds(blocks.previous_ids)
        reduce = partial(
            branch_losses, head=self.target.head, labels=blocks.labels, valid=blocks.valid, spec=spec,
            every_prediction=every_prediction,
        )  # fmt: skip
        found, base = model(**given, reduce=reduce).reduced
        return blocks, found, base

    def _counters(
        self, model, inputs: dict, step: int, every_prediction: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss numerator with its graph, and detached counters per row (B, len(COUNTERS)). In
        evaluation a Domino drafter's loss is its final branch's alone, so that it does not move
        with lambda."""
        spec, anchors = self.loss_spec, self.args.anchors_per_row
        blocks, found, base = self._run_blocks(model, inputs, step, anchors, spec, every_prediction)
        valid, numerator = blocks.valid, found.numerator
        numerators, denominators = row_terms(found.losses, found.weights, spec.normalisation)
        if base is not None and step != EVALUATION_STEP:
            of_base = self.base_weight(step)
            of_final = (1 - of_base) * self._balance.ratio(base, found)
            numerator = of_base * base.numerator + of_final * found.numerator
            base_numerators, denominators = row_terms(base.losses, base.weights, spec.normalisation)
            numerators = of_base * base_numerators + of_final * numerators
        # in evaluation and on logging steps every slot is predicted
        judges_all = every_prediction or spec.objective.judges_every_slot
        with torch.no_grad():
            counters = count_rows(
                numerators, denominators, found, base, valid, drafted=self.block_size - 1,
                slots=anchors * valid.shape[2], judges_all=judges_all,
                # a support that the base branch cut hides how far the final branch's prefix goes
                hides_prefix=spec.objective.shared_support and not judges_all,
            )  # fmt: skip
        return numerator, counters

    @property
    def _nominal(self) -> float:
        # keeps gradients near their final size until the true denominator is known; a power of two,
        # which divides without rounding, so that no gradient depends on the size of a micro-batch
        slots = (
            self.args.per_device_train_batch_size
            * self.args.anchors_per_row
            * (self.block_size - 1)
        )
        return 2.0 ** round(math.log2(slots))

    @property
    def _logs_this_step(self) -> bool:
        # accuracy over all slots needs logits that AUF never computes, so it is measured on logging
        # steps alone
        step, args = self.state.global_step + 1, self.args
        if args.logging_strategy == IntervalStrategy.EPOCH:
            return step % max(round(self.state.max_steps / self.state.num_train_epochs), 1) == 0
        if (
            args.logging_strategy == IntervalStrategy.STEPS
            and step % max(self.state.logging_steps, 1) == 0
        ):
            return True
        return step == 1 and args.logging_first_step

    def compute_loss(self, model, inputs, num_items_in_batch=None):
        """Numerator over a fixed constant; `training_step` makes it exact once all micro-batches
        and ranks are in."""
        numerator, counters = self._counters(
            model, inputs, self.state.global_step, self._logs_this_step
        )
        sums = counters.sum(0)
        self._step_sums.add(sums)
        self._log_sums += sums
        loss = numerator / self._nominal
        if self.is_deepspeed_enabled:  # it steps inside backward, so all must be known before
            total, denominator = self.accelerator.reduce(sums[:2].clone(), "sum").tolist()
            if not math.isfinite(total):
                raise self._not_finite("loss")
            loss = numerator * self.accelerator.num_processes / max(denominator, 1.0)
        return loss

    def _not_finite(self, what: str) -> FloatingPointError:
        return FloatingPointError(
            f"the {what} of step {self.state.global_step + 1} is not a finite number; the optimizer"
            " was not stepped. Lower learning_rate, and go on from the last checkpoint in"
            f" {self.args.output_dir} with --resume_from_checkpoint true."
        )

    def training_step(self, model, inputs, num_items_in_batch=None):
        """One micro-batch; on the last of a step, rescale gradients to the exact pooled loss and
        return that loss.

        The denominator (supported slots) is known only after the forward passes, so Trainer's
        `num_items_in_batch`
        cannot carry it (Automodel#3797, verl#785).
        """
        if self._untried_memory:
            self._untried_memory = False
            try_largest_batch(self, model)
        if self._balance.differs and len(self._micro_batches) > 1 and not self._balance.is_known:
            self._balance.begin(self._branch_denominators_of_step(model))
        super().training_step(model, inputs, num_items_in_batch)
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        gradients = (
            []
            if self.is_deepspeed_enabled
            else [p.grad for p in model.parameters() if p.grad is not None]
        )
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
        # DDP and FSDP2 average gradients over ranks
        scale = self._nominal * self.accelerator.num_processes / max(step.denominator, 1.0)
        for gradient in gradients:
            gradient.mul_(scale)
        return torch.tensor(step.numerator / max(step.denominator, 1.0), device=self.args.device)

    def base_weight(self, step: int) -> float:
        """lambda: from 1 at step 0 linearly to 0 at `lambda_decay_ratio` of all steps (arXiv
        2605.29707)."""
        return max(0.0, 1.0 - step / ((self.args.lambda_decay_ratio or 1.0) * self.state.max_steps))

    def get_batch_samples(self, *args, **kwargs):
        """Trainer's own. It keeps a step's micro-batches where the first backward pass needs the
        supports of all."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        self._micro_batches = batches if self._balance.differs else []
        return batches, items

    @torch.no_grad()
    def _branch_denominators_of_step(self, model) -> torch.Tensor:
        """Both branches' denominators over all micro-batches, (2,). It costs a forward pass of
        each. With dropout in an adapter, this pass and the next one differ a little."""
        anchors, step = self.args.anchors_per_row, self.state.global_step
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for inputs in self._micro_batches:
            _, final, base = self._run_blocks(
                model, self._prepare_inputs(inputs), step, anchors, self.loss_spec
            )
            sums += branch_denominators(base, final)
        return sums

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the paper's diagnostics, over all ranks since the last log, to a training log."""
        if "loss" in logs:
            logs |= diagnostics(self._over_all_processes(self._log_sums))
            self._log_sums.zero_()
            if self.loss_spec.objective.base is not None:
                logs["lambda"] = round(self.base_weight(max(self.state.global_step - 1, 0)), 4)
        super().log(logs, start_time)

    # ---- evaluation

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Counters per row, so that the gathered sum is exact whatever the split."""
        with torch.no_grad():
            _, counters = self._counters(
                model, self._prepare_inputs(inputs), EVALUATION_STEP, every_prediction=True
            )
        return None, counters, torch.zeros(len(counters), device=counters.device)

    @staticmethod
    def _metrics(prediction: EvalPrediction) -> dict[str, float]:
        sums = prediction.predictions.sum(0)
        total = named(sums)
        return {"loss": total["numerator"] / max(total["denominator"], 1.0)} | diagnostics(sums)

    def evaluation_loop(self, dataloader, *args, metric_key_prefix="eval", **kwargs):
        """Trainer's loop, then tau by real decoding of a few held-out prompts."""
        output = super().evaluation_loop(
            dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs
        )
        if self.args.eval_prompts > 0:
            output.metrics[f"{metric_key_prefix}_tau"] = self.decoded_tau(dataloader.dataset)
        return output

    def whole_drafter(self):
        """The drafter, or, where its weights are sharded, a copy on the CPU that each rank has by
        itself."""
        drafter = self.accelerator.unwrap_model(self.model)
        state = drafter.state_dict()
        if not any(isinstance(value, DTensor) for value in state.values()):
            return drafter
        config = copy.copy(self.drafter_config)
        for key in (
            "use_cache",
            "distributed_config",
        ):  # Trainer's switch, and what says that it is sharded
            vars(config).pop(key, None)
        whole = AutoModel.from_config(config, dtype=torch.float32)
        if self._peft_config is not None:
            whole = get_peft_model(whole, self._peft_config)
        # each leaves the accelerator before the next is gathered
        whole.load_state_dict(
            {k: (v.full_tensor() if isinstance(v, DTensor) else v).cpu() for k, v in state.items()}
        )
        return whole

    def eval_prompts(self, rows: Dataset | None = None) -> list[torch.Tensor]:
        """Prompts (1, S) of `eval_prompts` held-out rows, evenly spread: the sources of a mixture
        stand in order."""
        rows = self.eval_dataset if rows is None else rows
        rows = next(iter(rows.values())) if isinstance(rows, dict) else rows
        return [
            torch.tensor(
                [row["input_ids"][: prompt_length(row["supervised"])]], device=self.args.device
            )
            for row in rows.select(
                np.linspace(0, len(rows) - 1, min(self.args.eval_prompts, len(rows))).astype(int)
            )
        ]

    def decoded_tau(self, rows: Dataset) -> float:
        """tau over `eval_prompts` rows' prompts, decoded greedily, dealt to the ranks."""
        drafter = self.whole_drafter().to(
            self.args.device
        )  # the ranks decode unequal numbers of passes
        prompts = self.eval_prompts(rows)
        was_training = drafter.training
        if (
            not self.args.shard_target
        ):  # a sharded target runs on all ranks or none, so all decode the same prompts
            prompts = prompts[self.args.process_index :: self.args.world_size]
        generation_config = decoding_config(
            self.target.model, self.args.eval_new_tokens, self.data_collator.pad_token_id
        )
        with attach(self.target.model, drafter) as attachment, torch.no_grad():
            for prompt in prompts:
                self.target.model.generate(
                    prompt, generation_config=generation_config, assistant_model=drafter
                )
        drafter.train(was_training)
        rounds = attachment.rounds if self.args.shard_target else gather_object(attachment.rounds)
        return summarize(rounds, self.block_size).tau

    # ---- saving

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's own; of a sharded drafter a whole copy is saved, so that every checkpoint loads
        anywhere: FSDP also gives the drafter a class of its own, whose name and code would go into
        the folder."""
        model, whole = self.model, self.whole_drafter()
        if whole is self.accelerator.unwrap_model(model):
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            self.model = whole
            try:
                self._save(output_dir)
            finally:
                self.model = model

    def _save(self, output_dir: str | None = None, state_dict=None):
        # Trainer writes its own use_cache switch into the drafter's config
        vars(self.drafter_config).pop("use_cache", None)
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        # a pickle that holds hub_token in clear, and nothing reads it
        (folder / "training_args.bin").unlink(missing_ok=True)
        if self._peft_config is not None and self.args.should_save:
            finish_adapter(folder, self.adapter_base, self.drafter_config)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self._peft_config is not None:
            check_resumed_adapter(
                resume_from_checkpoint, self.model.peft_config["default"], self.adapter_base
            )
        super()._load_from_checkpoint(resume_from_checkpoint, model)
