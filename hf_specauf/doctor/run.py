"""A recipe that is about to be trained: the checks of its start, on its real target and data."""

import resource
import sys
import tempfile
from functools import cached_property

import torch
from datasets import Dataset

from ..data.config import DataArguments
from ..data.on_policy import on_policy_score
from ..data.sources import load_data
from ..identity import Identity
from ..layouts.adapters import AdapterBase
from ..losses.blocks import make_blocks, sample_anchors
from ..losses.branches import branch_losses
from ..losses.objectives import LossSpec
from ..recipe import DrafterArguments, TargetArguments, parse
from ..regenerate import CLEARLY_FOREIGN
from ..serving.acceptance import accepted_prefix, summarize
from ..serving.replay import accepted_at, blocks_in, walk
from ..train import ask_first, start_drafter, token_rows
from ..training.config import AUFConfig
from ..training.trainer import AUFTrainer
from .findings import FAIL, PASS, WARN, Line
from .patient import Patient
from .words import serving_prompt

# What a step of a checkup does not do.
ONE_STEP = {
    "max_steps": "1",
    "warmup_steps": "0",
    "gradient_accumulation_steps": "1",
    "logging_steps": "1",
    "save_strategy": "no",
    "eval_strategy": "no",
    "load_best_model_at_end": "false",
    "push_to_hub": "false",
    "report_to": "none",
    "disable_tqdm": "true",
}
FEW = 0.02  # of a row's tokens; a drafter hardly learns from fewer
USED = 0.8  # of the raw rows; where more are left out, something is wrong with them
FIRST_TOKENS = 128  # of each row's answers, that are compared with the target's own choice
PLACES = 4  # at which a leak is looked for


class Run(Patient):
    """A recipe.

    Args:
        words (`list[str]`): of the command line of `specauf train`.
        rows (`int`): raw rows of each source that are read.
        options: `prompts`, `count` and `max_new_tokens` of [`Patient`].
    """

    def __init__(self, words: list[str], rows: int, **options):
        self.words, self.most_rows, self.options = words, rows, options
        # Read by `recipe`.
        self.target_args: TargetArguments | None = None
        self.draft: DrafterArguments | None = None
        self.data: DataArguments | None = None
        self.args: AUFConfig | None = None
        self.base: AdapterBase | None = None  # of the drafter that training starts from
        self.raw: list[Dataset] = []  # the first rows of each source
        self.rows: Dataset | None = None  # token rows

    def read(self) -> None:
        """Parse the recipe, which names the target."""
        self.target_args, self.draft, self.data, self.args = parse(self.words)
        target, device = self.target_args, str(self.args.device)
        super().__init__(
            target.target,
            target.target_revision,
            target.loading(),
            device=device,
            **self.options,
        )

    @cached_property
    def identity(self) -> Identity:
        """Of the target."""
        return Identity.of(self.target, self.tokenizer, revision=self.revision)


def recipe(run: Run) -> Line:
    """Read the recipe."""
    run.read()
    return Line(PASS, f"{run.args.objective} on {run.target_name}, {run.device}")


def data(run: Run) -> Line:
    """Read the first rows of each source."""
    train, _ = load_data(run.data)
    run.raw = [rows.select(range(min(len(rows), run.most_rows))) for rows in train]
    whole = sum(len(rows) for rows in train)
    return Line(PASS, f"{whole} rows, of which {sum(map(len, run.raw))} are looked at")


def drafter(run: Run) -> Line:
    """Make the drafter that training starts from."""
    drafter, run.base = start_drafter(
        run.draft, run.target, run.tokenizer, run.identity, run.args.seed
    )
    drafter.set_attn_implementation(run.draft.draft_attn_implementation)
    run.drafter = drafter.to(run.device).eval()
    config = drafter.config
    word = run.tokenizer.convert_ids_to_tokens(config.mask_token_id)
    return Line(
        PASS,
        f"{config.kind}, {config.num_hidden_layers} layers, block size {config.block_size}, taps"
        f" {config.target_layer_ids}, mask token {config.mask_token_id} ({word!r})",
    )


def decoding(run: Run) -> Line:
    """Whether evaluations will be able to decode."""
    run.frozen = ask_first(
        run.draft, run.base, run.target, run.tokenizer, run.drafter, run.args, True
    )
    return Line(PASS, "a few tokens were decoded with the new drafter")


def supervision(run: Run) -> Line:
    """How much of the rows is learned from."""
    run.rows, _ = token_rows(
        run.raw, None, run.tokenizer, run.frozen, run.drafter, run.data, run.args
    )
    masks = run.rows["supervised"]
    supervised, tokens = sum(map(sum, masks)), sum(map(len, masks))
    share = supervised / max(tokens, 1)
    raw = sum(map(len, run.raw))
    used = raw
    if not run.data.packing:
        used = len({*run.rows["row"]})
    said = f"{share:.0%} of {tokens} tokens in {len(run.rows)} rows are supervised"
    if used < USED * raw:
        return Line(
            WARN,
            f"{said}; {raw - used} of {raw} raw rows are left out (the reasons stand above)",
            "what the reasons name: max_length, mask_token_id, or rows of another dataset_name",
        )
    if share < FEW:
        return Line(WARN, said, "look at a row: specauf train prints the first one")
    return Line(PASS, said)


def prompts_of_training(run: Run) -> Line:
    """Whether answers in the data follow what serving renders."""
    rows = [row for source in run.raw for row in source.select(range(min(len(source), 20)))]
    return serving_prompt(run, rows)


def on_policy(run: Run) -> Line:
    """Whether the answers are the target's own."""
    score = on_policy_score(run.frozen, run.rows, count=16, most=FIRST_TOKENS)
    said = (
        f"the target's own first choice on {score['agreement']:.0%} of the tokens; had it written"
        f" them, on {score['agreement_if_own']:.0%}"
    )
    if score["agreement"] < CLEARLY_FOREIGN * score["agreement_if_own"]:
        return Line(WARN, said, "specauf regenerate, and dataset_name: its file")
    return Line(PASS, said)


@torch.no_grad()
def context_leak(run: Run) -> Line:
    """Whether a block of training sees what decoding will not have: each context position from its
    anchor on is changed, and must not be noticed."""
    config = run.drafter.config
    row = max(run.rows, key=lambda row: sum(row["supervised"][:256]))
    ids = torch.tensor([row["input_ids"][:256]], device=run.device)
    supervised = torch.tensor([row["supervised"][:256]], device=run.device).bool()
    documents = torch.tensor([row.get("document_ids", [0] * 256)[:256]], device=run.device)
    documents = documents[:, : ids.shape[1]]
    number = torch.zeros(1, dtype=torch.long, device=run.device)
    anchors, real = sample_anchors(supervised, documents, 64, number, run.args.seed, 0)
    anchors, real = anchors[:, : int(real.sum())], real[:, : int(real.sum())]
    blocks = make_blocks(
        ids, supervised, documents, anchors, real, config.block_size, config.mask_token_id,
        flex=config._attn_implementation == "flex_attention", predictions=config.predictions,
    )  # fmt: skip
    embeds = run.frozen.noise_embeds(blocks.noise_ids)
    context = run.frozen.context(ids)

    def block_with(states: torch.Tensor, n: int) -> torch.Tensor:
        hidden = run.drafter(embeds, states, blocks.attention_mask, blocks.position_ids)
        return hidden.last_hidden_state.view(-1, config.block_size, config.hidden_size)[n]

    count = anchors.shape[1]
    places = sorted({count * i // PLACES for i in range(PLACES)})
    for n in places:
        anchor = int(anchors[0, n])
        own = block_with(context, n)
        changed = context.clone()
        changed[:, anchor:] = changed[:, anchor:].roll(1, -1) + 1
        if not torch.equal(block_with(changed, n), own):
            return Line(FAIL, f"the block at {anchor} sees what stands behind it", "report this")
        changed = context.clone()
        changed[:, anchor - 1] += 1
        if torch.equal(block_with(changed, n), own):
            return Line(FAIL, f"the block at {anchor} does not see {anchor - 1}", "report this")
    return Line(PASS, f"{len(places)} blocks see what stands before their anchor, and nothing else")


@torch.no_grad()
def label_alignment(run: Run) -> Line:
    """Whether slots are compared with the right tokens: a drafter that knows the target's next
    tokens must reach K, and a random one about 1."""
    config = run.drafter.config
    spec = LossSpec.of("auf", config.block_size)
    copied, random = [], []
    most = config.block_size - 1
    for text in run.texts:
        output = text.output
        copied += walk(_copied(run, text, spec), run.max_new_tokens, most)
        accepted = accepted_at(run.frozen, run.drafter, output, first=text.first)
        random += walk(accepted, run.max_new_tokens, most)
    # A text's end cuts its last block, whoever drafts.
    best = []
    for text in run.texts:
        left = text.output.shape[1] - text.first - 1
        best += walk([left - i for i in range(left)], run.max_new_tokens, most)
    found, highest = (summarize(rounds, config.block_size).tau for rounds in (copied, best))
    own = summarize(random, config.block_size).tau
    said = (
        f"tau {found:.2f} of a drafter that knows the answer, {highest:.2f} at most;"
        f" {own:.2f} of this one"
    )
    if found < 0.9 * highest:
        return Line(FAIL, said, "report this target")
    return Line(PASS, said)


def _copied(run: Run, text, spec: LossSpec) -> list[int]:
    """Accepted tokens at each place of a text, of a drafter whose slots hold the states by which
    the target itself chose the tokens."""
    output, config = text.output, run.drafter.config
    anchors = torch.arange(text.first, output.shape[1] - 1, device=run.device)[None]
    blocks = blocks_in(output, anchors, config)
    states = run.frozen.backbone(input_ids=output, use_cache=False).last_hidden_state[0]
    slots = torch.arange(config.predictions, device=run.device)
    # The token behind position p is chosen by the state of p.
    rows = states[(anchors[0, :, None] + slots).clamp(max=output.shape[1] - 1)][None]
    final, _ = branch_losses(
        rows, None, None, head=run.frozen.head, labels=blocks.labels, valid=blocks.valid, spec=spec
    )
    return accepted_prefix(final.correct, blocks.valid)[0].tolist()


def first_step(run: Run) -> Line:
    """Make one step of the recipe, and see what memory it takes. On a GPU the largest micro-batch
    that can come is tried before it, and named where it does not fit."""
    with tempfile.TemporaryDirectory() as scratch:
        words = list(run.words)
        for key, value in (ONE_STEP | {"output_dir": scratch}).items():
            words += [f"--{key}", value]
        _, draft, _, args = parse(words)
        # It would keep the states of all rows.
        args.target_states_cache = None
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        trainer = AUFTrainer(
            model=run.drafter.float(),
            target_model=run.frozen,
            args=args,
            train_dataset=run.rows,
            processing_class=run.tokenizer,
            peft_config=draft.peft_config(),
            adapter_base=run.base if draft.use_peft else None,
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Line(PASS, f"loss {losses[0]:.2f}, at most {peak_memory(run.device):.1f} GiB in use")


def peak_memory(device: torch.device) -> float:
    """Most memory in use so far, in GiB: of a GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # in KiB, and on macOS in bytes
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
