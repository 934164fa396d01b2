"""The demo: a real chat model answers with and without a drafter, side by side.

`specauf demo` fetches SmolLM2-135M-Instruct and streams its answers to a few prompts. Tokens that
were drafted and that the model accepted are green. Drafts come from a drafter, in a checkout by
default from the one in `model_cards/`, or are looked up in the text where its last tokens occurred
before. A table follows: tokens/s of both, tokens a pass, and whether the answers are identical.
`--chat` takes your own prompts.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..cli import errors_in_one_line, under_new_spelling
from ..data.messages import apply_template
from ..drafters.draft_length import Round
from ..evaluation.differences import first_difference
from ..evaluation.rows import accepted_by_source, prompt_row
from ..evaluation.summary import totals
from ..evaluation.ways import decoding_config, timed
from ..keys import Numbers, check_keys
from ..layouts.load import load_drafter
from ..serving.acceptance import number
from ..serving.decoding import AUTO, Attachment, attach
from ..target import load_target, room_for_prompt
from .recording import Recording, check_record
from .smollm2 import shipped_drafter, smollm2
from .stream import Answer, AnswerStreamer

# Share of tokens that were drafted and accepted, below which drafts did not decide the speed.
FEW = 0.1
# flags that take a number
NUMBERS = {
    # the first token comes from the prefill, so one token says nothing of a drafter
    "new_tokens": Numbers(2, whole=True),
}
# Two whose answers say again what stands in the prompt, code, and prose.
PROMPTS = (
    "Explain this code line by line:\n\nclass Stack:\n    def __init__(self):\n"
    "        self.items = []\n\n    def push(self, item):\n        self.items.append(item)\n",
    "Write this as a list of bullet points: Wash the apples. Peel the apples and cut them into"
    " small pieces. Mix the pieces with sugar and cinnamon. Put them into the oven for forty"
    " minutes.",
    "Write a Python function that checks whether a string is a palindrome. Add a docstring.",
    "Why is the sky blue? Explain it to a child.",
)


@dataclass(frozen=True)
class Pair:
    """A target and its drafter at work.

    Args:
        target (`PreTrainedModel`): the model that answers.
        tokenizer (`PreTrainedTokenizerBase`): its own.
        attachment (`Attachment`): of the drafter.
        config (`GenerationConfig`): greedy, with a limit of new tokens.
    """

    target: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    attachment: Attachment
    config: GenerationConfig

    def prompt(self, messages: list[dict]) -> torch.Tensor:
        """The ids that serving makes of a conversation. (1, S)"""
        options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        return apply_template(self.tokenizer, messages, **options)["input_ids"]

    def lack_of_room(self, prompt: torch.Tensor) -> str | None:
        """Why the target has no positions for the answer to a prompt (1, S); `None` where it
        has."""
        new = self.config.max_new_tokens
        room = room_for_prompt(self.target, new, "--new_tokens")
        if room is None or prompt.shape[1] <= room:
            return None
        return (
            f"the prompt has {prompt.shape[1]} tokens, and --new_tokens {new} leaves {room} of the"
            " target's positions to it"
        )

    def write(self, prompt: torch.Tensor, assistant, streamer: AnswerStreamer | None = None):
        """Answer a prompt (1, S), plainly where `assistant` is `None`; a `Decoded`."""
        return timed(self.target, prompt, assistant, self.config, seed=0, streamer=streamer)


# ---- side by side


def side_by_side(question: str, plain: Answer, drafted: Answer) -> Group:
    """Both answers to a question, as they stand."""
    columns = Table.grid(expand=True)
    columns.add_column(ratio=1)
    columns.add_column(ratio=1)
    columns.add_row(plain.panel(), drafted.panel())
    return Group(Text(f"> {question}", style="bold"), columns)


def answer_both(pair: Pair, question: str, console: Console, recording: Recording | None) -> dict:
    """Stream the plain answer, then the drafted one beside it. Returns a row as `compare`'s."""
    prompt = pair.prompt([{"role": "user", "content": question}])
    plain, drafted = Answer("plain"), Answer("drafted")
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:

        def shown(force: bool = False) -> None:
            picture = side_by_side(question, plain, drafted)
            live.update(picture, refresh=True)
            if recording is not None:
                recording.add(picture, force)

        decoded = pair.write(prompt, None, AnswerStreamer(pair.tokenizer, plain, shown))
        assisted = pair.write(
            prompt, pair.attachment.drafter, AnswerStreamer(pair.tokenizer, drafted, shown)
        )
        shown(force=True)
    # A file has no cursor that the next answer could go on from.
    console.print()
    difference = first_difference(pair.target, decoded.output, assisted.output)
    rounds = pair.attachment.generations[-1]
    row = prompt_row(prompt, decoded, assisted, rounds, difference)
    # Of all passes: the row's tau is of those that nothing was looked up for.
    tokens = sum(one.emitted for one in rounds)
    return row | {"tokens_per_pass": tokens / len(rounds) if rounds else None}


def verdict(row: dict) -> str:
    """Whether two answers are identical, in words."""
    difference = row["difference"]
    if difference is None:
        return "identical"
    written = difference["position"] - row["prompt_tokens"]
    where = f"from token {written + 1} on"
    if difference["near_tie"]:
        return f"near-tie {where}"
    return f"DIFFERENT {where}"


def by_source(rounds: list[Round]) -> str:
    """How many tokens were drafted and accepted, by where drafts came from, in words."""
    words = []
    for source, of in accepted_by_source(rounds).items():
        counts = f"{of['accepted']} of {of['drafted']} tokens in {of['rounds']} passes"
        words.append(f"{source} {counts}")
    return f"Accepted: {', '.join(words)}, of {len(rounds)} passes."


def summary(rows: list[dict], rounds: list[Round], dtype: torch.dtype) -> Group:
    """A line for each prompt, and what they say together."""
    table = Table(title=f"greedy, {str(dtype).removeprefix('torch.')}, batch size 1")
    table.add_column("prompt")
    for column in ("plain tokens/s", "drafted", "speed-up", "tokens a pass", "answers"):
        table.add_column(column, justify="right")
    for at, row in enumerate(rows, start=1):
        plain_rate = row["plain_new_tokens"] / row["plain_seconds"]
        rate = row["new_tokens"] / row["assisted_seconds"]
        table.add_row(
            str(at),
            f"{plain_rate:.1f}",
            f"{rate:.1f}",
            f"{rate / plain_rate:.2f}x",
            number(row["tokens_per_pass"]),
            verdict(row),
        )
    whole = totals(rows, greedy=True)
    faster = "faster" if whole["speedup"] > 1 else "SLOWER than plain decoding"
    words = [f"{faster}: {whole['speedup']:.2f}x. {by_source(rounds)}"]
    if sum(one.accepted for one in rounds) < FEW * sum(one.emitted for one in rounds):
        words.append(
            "Hardly a token was drafted and accepted, because drafts cost more than they bring"
            " here: what differs between the two is the clock."
        )
    if whole["lossless"]["near_tie"]:
        words.append(
            "A near-tie is no identical answer: two of the model's logits are closer there than"
            f" {str(dtype).removeprefix('torch.')} rounds, and a pass over several tokens rounds"
            " otherwise than a pass over one. With --dtype float32 answers are identical."
        )
    if whole["lossless"]["different"]:
        words.append("DIFFERENT answers are a fault: please report them.")
    return Group(table, Text(" ".join(words)))


# ---- chat


def chat(pair: Pair, console: Console) -> None:
    """Answer what is typed, with the drafter, until an empty line or the input's end."""
    console.print("Ask something. An empty line ends the chat.")
    messages = []
    while True:
        try:
            question = console.input("\n[bold]> [/]").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if not question:
            return
        messages.append({"role": "user", "content": question})
        prompt = pair.prompt(messages)
        if len(messages) > 1 and pair.lack_of_room(prompt):
            console.print("The target has no positions left: what was said before is forgotten.")
            messages = messages[-1:]
            prompt = pair.prompt(messages)
        lack = pair.lack_of_room(prompt)
        if lack:
            console.print(f"No answer: {lack}. Ask something shorter, or lower --new_tokens.")
            messages = []
            continue
        answer = Answer("drafted")
        with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:

            def shown(live=live, answer=answer) -> None:
                live.update(answer.panel(), refresh=True)

            streamer = AnswerStreamer(pair.tokenizer, answer, shown)
            pair.write(prompt, pair.attachment.drafter, streamer)
        messages.append({"role": "assistant", "content": streamer.text})


# ---- the command


def command_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(prog="specauf demo", description=__doc__)
    add = parser.add_argument
    add(
        "--drafter",
        help="folder or Hub id (default: the checkout's own for SmolLM2; without any, drafts are"
        " looked up alone)",
    )
    add("--no_drafter", action="store_true", help="only look drafts up")
    add("--target", help="folder or Hub id (default: SmolLM2-135M-Instruct, fetched)")
    add(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="default: bfloat16, in which the model is stored, where the processor knows it, else"
        " float32; in float32 answers are identical to the last token",
    )
    add("--no_lookup", action="store_true", help="let the drafter alone draft")
    add("--new_tokens", type=int, default=96, help="tokens of each answer at most (default 96)")
    add("--chat", action="store_true", help="answer what you type instead")
    add("--record", metavar="FILE.gif", help="also write what is shown as an animated GIF")
    return parser


def fast_dtype() -> str:
    """The dtype that this machine's processor decodes fastest in: a CPU without bf16 arithmetic
    takes several times as long for it."""
    if torch.cpu._is_avx512_bf16_supported():
        return "bfloat16"
    return "float32"


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The flags as they are meant, once they are known to go together."""
    parser = command_parser()
    args = parser.parse_args(under_new_spelling(argv))
    check_keys(args, NUMBERS)
    if args.drafter and args.no_drafter:
        parser.error("--drafter and --no_drafter: leave one of them out")
    # Only for the target that it was trained for.
    if args.drafter is None and args.target is None and not args.no_drafter:
        args.drafter = shipped_drafter()
    if args.drafter is None and args.no_lookup:
        parser.error("--no_lookup leaves nothing to draft with: give --drafter, or leave it out")
    if args.record and args.chat:
        parser.error("--record keeps the demo's own prompts, and --chat asks yours: leave one out")
    if args.record:
        check_record(args.record)
    return args


@errors_in_one_line()
def main(argv: list[str] | None = None) -> None:
    """Command line of `specauf demo`."""
    args = arguments(argv)
    console = Console()
    if args.drafter is None:
        console.print("There is no drafter, so drafts are looked up in the text alone.")
    else:
        console.print(f"drafter: {args.drafter}", markup=False, soft_wrap=True)
    path = args.target or str(smollm2())
    target, tokenizer = load_target(
        path, key="--target", dtype=getattr(torch, args.dtype or fast_dtype())
    )
    if tokenizer.chat_template is None:
        raise ValueError(
            f"--target: {path!r} has no chat template, and the demo asks questions: give a chat"
            " model"
        )
    drafter = None
    if args.drafter is not None:
        drafter = load_drafter(args.drafter, dtype=target.dtype, key="--drafter")
    config = decoding_config(target, args.new_tokens, tokenizer.pad_token_id)
    with (
        torch.no_grad(),
        attach(
            target,
            drafter,
            tokenizer=tokenizer,
            lookup=False if args.no_lookup else AUTO,
        ) as attachment,
    ):
        pair = Pair(target, tokenizer, attachment, config)
        if args.chat:
            chat(pair, console)
            return
        for question in PROMPTS:
            lack = pair.lack_of_room(pair.prompt([{"role": "user", "content": question}]))
            if lack:
                raise ValueError(f"{lack}: lower --new_tokens, or give another --target")
        recording = Recording(console) if args.record else None
        # The first calls of a process are slow, so that neither way may be the first.
        warm_up = pair.prompt([{"role": "user", "content": "Hello"}])
        pair.write(warm_up, None)
        pair.write(warm_up, attachment.drafter)
        attachment.generations.clear()
        rows = [answer_both(pair, question, console, recording) for question in PROMPTS]
        table = summary(rows, attachment.rounds, target.dtype)
    console.print(table)
    if recording is not None:
        recording.add(table, force=True)
        recording.save(Path(args.record))
        console.print(f"written: {args.record}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
