"""What the target makes of a draft: which of its tokens are committed, which comes after them, and
whether the text ends there. And how CPUs multiply the few rows of such a pass.

Travels to the Hub: imports torch, transformers and its sibling.

Greedy: a drafted token is committed while it is the target's own choice. Sampled (Leviathan et al.,
arXiv 2211.17192, algorithm 1), with q the drafter's probability of a drafted token and p the
target's:

    p >= q: always accept the drafted token
    p <  q: accept it with probability p / q
    at the first rejection: draw a token from max(p - q, 0), normalised, and drop the rest
    without a rejection: draw the bonus token from p

The text then follows p exactly, whatever the drafter says. This holds only if q is the distribution
that the token was really drawn from.

Letters: d drafted tokens, V vocabulary. Row j of d + 1 is what the target says after j of them.
"""

import time
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers.generation import logits_process

from .transformers_internals import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria

# Processors that look at scores alone, so that all rows may go through them in one call.
SCORES_ALONE = (
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "TopHLogitsWarper",
    "MinPLogitsWarper",
    "TypicalLogitsWarper",
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "SuppressTokensLogitsProcessor",
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
)


class Draft(NamedTuple):
    """Drafted tokens, and what each was drawn from.

    Attributes:
        tokens (`torch.LongTensor` of shape `(1, d)`).
        logits (`torch.Tensor` of shape `(1, d, V)`, *optional*): after causal head and processors,
            in fp32. Greedy verification compares tokens, and needs none. Looked-up tokens have
            none: they were drawn from nothing.
    """

    tokens: torch.LongTensor
    logits: torch.Tensor | None = None

    def probabilities(self, like: torch.Tensor) -> torch.Tensor:
        """q of each slot, in fp32, on the device of `like` (..., V). -> (d, V)"""
        if self.logits is not None:
            return self.logits[0].to(like.device).softmax(-1)
        # All the mass on the one token. It is then accepted with the chance p, and after a
        # rejection a token is drawn from p without it.
        shape = self.length, like.shape[-1]
        q = torch.zeros(shape, dtype=torch.float32, device=like.device)
        return q.scatter_(1, self.tokens.to(like.device).T, 1.0)

    @property
    def length(self) -> int:
        """d"""
        return self.tokens.shape[1]


class Verdict(NamedTuple):
    """What a pass commits.

    Attributes:
        tokens (`list[int]`): the accepted tokens, and one of the target's own after them.
        scores (`list[torch.Tensor]`, *optional*): of each committed token the processed logits it
            was chosen by, (1, V) in fp32; `None` where nobody asked.
    """

    tokens: list[int]
    scores: list[torch.Tensor] | None = None

    @property
    def accepted(self) -> int:
        """Drafted tokens that were accepted, A."""
        return len(self.tokens) - 1


class Verifier:
    """Verifies the drafts of one `generate` call.

    Args:
        processor (`LogitsProcessorList`): of the call.
        do_sample (`bool`): sampled, else greedy.
        keeps_scores (`bool`): whether a verdict holds the processed logits of its tokens.
    """

    def __init__(self, processor, do_sample: bool, keeps_scores: bool):
        self.processor = processor
        self.do_sample = do_sample
        self.keeps_scores = keeps_scores
        known = {getattr(logits_process, name, None) for name in SCORES_ALONE}
        self.scores_alone = all(type(one) in known for one in processor)

    def __call__(self, logits: torch.Tensor, draft: Draft | None, ids: torch.Tensor) -> Verdict:
        """The verdict on a draft.

        Args:
            logits (`torch.Tensor` of shape `(1, d + 1, V)`): of the target's pass.
            draft (`Draft`, *optional*): what it verified.
            ids (`torch.LongTensor` of shape `(1, S + d)`): the text, and the draft after it.
        """
        if not self.do_sample and not self.keeps_scores and len(self.processor) == 0:
            return greedy(logits, draft)
        # A sort of all rows is dear on CPUs, and most rows come after a rejection.
        if self.do_sample and self.scores_alone and logits.device.type != "cpu":
            return self.all_at_once(logits, draft, ids)
        return self.one_by_one(logits, draft, ids)

    def one_by_one(self, logits, draft: Draft | None, ids) -> Verdict:
        """Row by row, each with the text that it would see, up to the first rejection."""
        drafted, probabilities = [], None
        if draft is not None:
            drafted = draft.tokens[0].tolist()
            if self.do_sample:
                probabilities = draft.probabilities(logits)  # (d, V)
        start = ids.shape[1] - len(drafted)
        tokens, scores = [], []
        for j in range(len(drafted) + 1):
            row = self._processed(ids[:, : start + j], logits[:, j])  # (1, V)
            scores.append(row)
            q = None
            if probabilities is not None and j < len(drafted):
                q = probabilities[j]  # (V,)
            tokens.append(self._choose(row[0], q, *drafted[j : j + 1]))
            if tokens[-1:] != drafted[j : j + 1]:
                break
        return Verdict(tokens, scores if self.keeps_scores else None)

    def _processed(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Logits as tokens are chosen by them, in fp32. (rows, V) -> (rows, V)"""
        # A copy even of fp32: processors may write in place, and raw logits are kept.
        scores = scores.to(torch.float32, copy=True)
        if len(self.processor) > 0:
            scores = self.processor(ids, scores)
        return scores

    def _choose(self, row: torch.Tensor, q: torch.Tensor | None, drafted: int | None = None) -> int:
        """The token after a text: the drafted one where it is accepted. `row`, `q`: (V,)"""
        if not self.do_sample:
            return int(row.argmax())
        p = row.softmax(-1)
        if q is None:
            return int(torch.multinomial(p, 1))
        # fp32, whatever torch's default is: of coarser draws small p are accepted too often.
        coin = torch.rand((), dtype=p.dtype, device=p.device)
        if float(coin * q[drafted]) < float(p[drafted]):
            return drafted
        return int(torch.multinomial(rest(p, q), 1))

    def all_at_once(self, logits, draft: Draft | None, ids) -> Verdict:
        """All rows in a few calls, and one look at the result: on GPUs a look is dear. For sampling
        with processors that look at scores alone."""
        scores = self._processed(ids, logits[0])  # (d + 1, V)
        p = scores.softmax(-1)
        if draft is None:
            tokens = [int(torch.multinomial(p[0], 1))]
        else:
            q = draft.probabilities(p)  # (d, V)
            drafted = draft.tokens[0].to(p.device)  # (d,)
            column = drafted[:, None]
            coins = torch.rand(column.shape, dtype=p.dtype, device=p.device)
            accepted = coins * q.gather(1, column)
            accepted = (accepted < p[:-1].gather(1, column)).view(-1)  # (d,)
            # what comes instead, row by row, and the bonus token
            own = torch.cat([rest(p[:-1], q), p[-1:]])  # (d + 1, V)
            own = torch.multinomial(own, 1).view(-1)  # (d + 1,)
            looked = torch.cat([accepted.long(), drafted, own]).tolist()
            d = draft.length
            flags, drafted, own = looked[:d], looked[d : 2 * d], looked[2 * d :]
            kept = (flags + [0]).index(0)
            tokens = drafted[:kept] + [own[kept]]
        kept_scores = None
        if self.keeps_scores:
            kept_scores = list(scores[: len(tokens)].split(1))
        return Verdict(tokens, kept_scores)


def rest(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """What a token is drawn from after a rejection: max(p - q, 0), not normalised. (..., V)"""
    over = (p - q).clamp(min=0)
    # Nothing is left where the two are equal. Then nothing is rejected, but for rounding.
    return torch.where(over.sum(-1, keepdim=True) > 0, over, p)


def greedy(logits: torch.Tensor, draft: Draft | None) -> Verdict:
    """The target's own choices, as far as the draft had them: a few operations, and one look.

    Args:
        logits (`torch.Tensor` of shape `(1, d + 1, V)`): in the target's dtype. Plain decoding
            looks at a copy in fp32, which has the same best token in bf16, fp16 and fp32.
    """
    chosen = logits[0].argmax(-1)  # (d + 1,)
    if draft is None:
        return Verdict(chosen.tolist())
    looked = torch.cat([chosen, draft.tokens[0].to(chosen.device)]).tolist()
    chosen, drafted = looked[: draft.length + 1], looked[draft.length + 1 :]
    kept = 0
    while kept < len(drafted) and chosen[kept] == drafted[kept]:
        kept += 1
    return Verdict(chosen[: kept + 1])


class Ends:
    """Where a text ends. Asked of every committed token, as plain decoding asks.

    Length, end tokens and time are looked at here, without a look at the device. All other criteria
    are called.

    Args:
        criteria (`StoppingCriteriaList`): of the call.
        max_length (`int`): of the text, prompt included, where no criterion says it.
    """

    def __init__(self, criteria, max_length: int):
        self.tokens: set[int] = set()
        lengths, self.times, self.others = [], [], []
        for one in criteria:
            # Not `isinstance`, because a user's own kind may do more.
            if type(one) is MaxLengthCriteria:
                lengths.append(one.max_length)
            elif type(one) is EosTokenCriteria:
                self.tokens.update(one.eos_token_id.flatten().tolist())
            elif type(one) is MaxTimeCriteria:
                self.times.append(one)
            else:
                self.others.append(one)
        # A user's own criterion for length stands in the place of the call's.
        self.max_length = min(lengths, default=max_length)

    def first(self, text, length: int, tokens: list[int], scores) -> tuple[int, bool]:
        """How many of the new tokens belong to the text, and whether it ends with them.

        Args:
            text (`Extended` of drafts.py): ids, the new tokens among them.
            length (`int`): of the text before them.
            tokens (`list[int]`): the new ones.
            scores (`Callable[[int], tuple | None]`): the scores of the call after so many of them.
        """
        for count, token in enumerate(tokens, start=1):
            done = length + count >= self.max_length or token in self.tokens
            for one in self.others:
                done |= bool(torch.as_tensor(one(text.upto(length + count), scores(count))).all())
            if done:
                return count, True
        now = time.time()
        done = any(now - one.initial_timestamp > one.max_time for one in self.times)
        return len(tokens), done


# Rows of x up to which one form of a product may be far slower than the other.
FEW = 16
# Products of each form before the faster is chosen. A target's head has one of them a pass.
TRIED = 4
# The turned form must be so much faster, lest noise choose it.
WORTH = 0.9


class Trial:
    """Finds the faster form of products of one shape: they take both by turns at first.

    Attributes:
        turned (`bool`, *optional*): the form that was chosen; `None` before.
    """

    def __init__(self):
        self.seconds: tuple[list[float], list[float]] = [], []
        self.turned: bool | None = None

    def turn(self) -> bool:
        """The form that the next product takes."""
        if self.turned is not None:
            return self.turned
        return len(self.seconds[True]) < len(self.seconds[False])

    def learn(self, turned: bool, seconds: float) -> None:
        """Take in what a product took."""
        self.seconds[turned].append(seconds)
        plain, other = self.seconds
        # More than these where two threads come at once.
        if len(other) >= TRIED:
            # The least of each, because a stall of the machine is no matter of the form.
            self.turned = min(other) < WORTH * min(plain)


# (rows, columns of both sides, dtype, threads) -> its trial. One for the whole process, because
# they are a matter of its processor.
TRIALS: dict[tuple, Trial] = {}


class FewRows:
    """Stands in for `nn.Linear.forward` where x has few rows and the weight W is on a CPU: x W^T or
    (W x^T)^T, whichever is faster. They are the same numbers, but for rounding.

    A pass over a draft has few rows, and BLAS libraries may take much longer for the one form than
    for the other: MKL on an AMD processor, in fp32 with 4 rows, 2.1 times as long
    (docs/results.md). `torch.use_deterministic_algorithms` leaves all products as they are.

    Args:
        linear (`nn.Linear`): whose method it is.
    """

    def __init__(self, linear: nn.Linear):
        self.linear = linear

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)"""
        weight = self.linear.weight
        rows = x.numel() // weight.shape[1]
        if not 1 < rows <= FEW or torch.are_deterministic_algorithms_enabled():
            return self.product(x, turned=False)
        key = (rows, *weight.shape, weight.dtype, torch.get_num_threads())
        trial = TRIALS.get(key)
        if trial is None:
            trial = TRIALS.setdefault(key, Trial())
        turned = trial.turn()
        if trial.turned is not None:
            return self.product(x, turned)
        began = time.perf_counter()
        y = self.product(x, turned)
        trial.learn(turned, time.perf_counter() - began)
        return y

    def product(self, x: torch.Tensor, turned: bool) -> torch.Tensor:
        """x W^T + b, by one of the two forms. (..., in) -> (..., out)"""
        weight, bias = self.linear.weight, self.linear.bias
        if not turned:
            return F.linear(x, weight, bias)
        columns = x.reshape(-1, weight.shape[1]).T  # (in, rows)
        if bias is None:
            y = torch.mm(weight, columns)  # (out, rows)
        else:
            y = torch.addmm(bias[:, None], weight, columns)
        # A model's code may rely on rows that lie one after another.
        return y.T.contiguous().view(*x.shape[:-1], weight.shape[0])


@contextmanager
def few_rows(*models):
    """Let models multiply few rows by the faster form, inside `with`. What is no module, or is
    compiled together with its products, stays as it is."""
    taken = []
    for model in models:
        modules = list(model.modules()) if isinstance(model, nn.Module) else []
        if not any(map(_is_compiled, modules)):
            taken += [module for module in modules if _may_turn(module)]
    try:
        for module in taken:
            module.forward = FewRows(module)
        yield
    finally:
        for module in taken:
            # Another thread that decodes with this target may have taken it off already.
            module.__dict__.pop("forward", None)


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules


def _may_turn(module: nn.Module) -> bool:
    """Whether a module's products may take either form."""
    # Not `isinstance`: quantised and adapted layers multiply in their own way. Others have put
    # their own method in the place of this one (accelerate does).
    if type(module) is not nn.Linear or "forward" in module.__dict__:
        return False
    weight = module.weight
    # Not DTensor and its like. And fp8, of one byte, has no such products.
    plain = type(weight) in (nn.Parameter, torch.Tensor)
    return plain and weight.device.type == "cpu" and weight.dtype.itemsize > 1


__all__ = ["Draft", "Ends", "Verdict", "Verifier", "few_rows"]
