"""Muon for a model's matrices, AdamW for the rest, as one optimizer for Trainer: far fewer steps to
the same tau."""

from collections import defaultdict

import torch
from torch.optim.adamw import adamw
from transformers import Trainer, get_scheduler

# Jordan 2024: a, b, c of x <- a x + (b x x^T + c (x x^T)^2) x. They are chosen to lift small
# singular values fast, and to leave all of them near 1.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
MOMENTUM = 0.95


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Push all singular values of each matrix towards 1 by the quintic Newton-Schulz iteration of
    Muon (Jordan 2024), in the matrices' own dtype.

    Args:
        matrices (`torch.Tensor` of shape `(M, rows, columns)`).
    """
    # x @ x.mT is smaller where rows are the shorter side
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    # the iteration needs singular values of at most 1, and none exceeds this norm
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    rows, columns = x.shape[1:]
    # Where a matrix is nearly square the small products are as dear as the wide ones. In bf16 they
    # would lose the small singular values, because a gram matrix holds their squares.
    if columns >= 2 * rows and x.dtype != torch.bfloat16:
        x = _iterate_on_grams(x, steps)
    else:
        x = _iterate(x, steps)
    return x if wide else x.mT


def _iterate(x: torch.Tensor, steps: int) -> torch.Tensor:
    """The iteration as it is defined. (M, rows, columns) -> (M, rows, columns)"""
    a, b, c = NEWTON_SCHULZ
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def _iterate_on_grams(x: torch.Tensor, steps: int) -> torch.Tensor:
    """[`_iterate`] by products of (rows, rows) alone, but for the first and the last.

    Each step multiplies x from the left by p = a + b g + c g^2 of its gram matrix g = x x^T. So the
    next gram matrix is p g p, and x is needed again only for the product of all p.
    """
    a, b, c = NEWTON_SCHULZ
    gram = x @ x.mT
    product = None
    for step in range(steps):
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=1, dim2=2).add_(a)
        product = polynomial if product is None else polynomial @ product
        if step < steps - 1:
            gram = polynomial @ gram @ polynomial
    return product @ x


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (Jordan 2024) with Nesterov momentum for the matrices, AdamW (betas 0.9, 0.95) for
    embedding and norms.

    A matrix with `embed` in its name is AdamW's: so is Domino's `embed_proj`, which ends in a row
    for each token as a head does, and heads are left to AdamW. Our Domino study ran so.

    Args:
        model (`nn.Module`): its trainable parameters are taken; either group may be empty.
        learning_rate (`float`): of Muon, for matrices that are no embedding.
        adam_learning_rate (`float`): of AdamW, for the rest.
        weight_decay (`float`, *optional*, defaults to 0): decoupled, of both.
        bf16 (`bool`, *optional*, defaults to `False`): orthogonalise in bf16, as torch's
            `optim.Muon` does. It is for devices that multiply faster in bf16, where training runs
            under autocast too. A processor without bf16 arithmetic is forty times slower in it.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        learning_rate: float,
        adam_learning_rate: float,
        weight_decay: float = 0.0,
        bf16: bool = False,
    ):
        matrices, others = [], []
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if parameter.dim() == 2 and "embed" not in name:
                matrices.append(parameter)
            else:
                others.append(parameter)
        groups = [
            {"params": matrices, "lr": learning_rate},
            {"params": others, "lr": adam_learning_rate},
        ]
        super().__init__(groups, {"weight_decay": weight_decay})
        self.bf16 = bf16

    @torch.no_grad()
    def step(self, closure=None):
        """One step; `closure` is not supported."""
        matrices, others = self.param_groups
        self._muon(matrices)
        self._adamw(others)

    def _muon(self, group: dict) -> None:
        rate, shrink = group["lr"], 1 - group["lr"] * group["weight_decay"]
        # those of one shape are orthogonalised as one batch
        by_shape = defaultdict(list)
        for parameter in _with_gradient(group):
            by_shape[parameter.shape].append(parameter)
        for (rows, columns), parameters in by_shape.items():
            directions = torch.stack([self._nesterov(parameter) for parameter in parameters])
            if self.bf16:
                directions = directions.bfloat16()
            # an orthogonal update of a tall matrix spreads over more outputs, so each moves less
            scale = max(1, rows / columns) ** 0.5
            for parameter, update in zip(parameters, orthogonalize(directions), strict=True):
                parameter.mul_(shrink).add_(update, alpha=-rate * scale)

    def _nesterov(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """Step the momentum, and look one step of it ahead."""
        state, gradient = self.state[parameter], parameter.grad
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        return gradient.lerp(state["momentum"], MOMENTUM)

    def _adamw(self, group: dict) -> None:
        parameters = _with_gradient(group)
        if not parameters:  # an adapter of matrices alone has none
            return
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["mean"] = torch.zeros_like(parameter)
                state["square"] = torch.zeros_like(parameter)
                state["step"] = torch.tensor(0.0)
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            params=parameters,
            grads=[parameter.grad for parameter in parameters],
            exp_avgs=[state["mean"] for state in states],
            exp_avg_sqs=[state["square"] for state in states],
            max_exp_avg_sqs=[],
            state_steps=[state["step"] for state in states],
            amsgrad=False,
            beta1=0.9,
            beta2=0.95,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=1e-8,
            maximize=False,
        )


def _with_gradient(group: dict) -> list[torch.nn.Parameter]:
    return [parameter for parameter in group["params"] if parameter.grad is not None]


def check_optimizer(drafter, args) -> None:
    """Raise where Trainer could not make the optimizer or its schedule, which it does only when
    training starts.

    Args:
        drafter (`PreTrainedModel`): some optimizers want its modules.
        args (`AUFConfig`).

    Raises:
        ValueError: what transformers says, and the key.
    """
    if args.muon_learning_rate is None:
        try:
            Trainer.get_optimizer_cls_and_kwargs(args, drafter)
        except Exception as error:  # each library fails in a way of its own
            raise ValueError(
                f"optim is {args.optim.value}, which cannot be made here ({error}): install what it"
                " names, mend optim_args or optim_target_modules, or leave optim out"
            ) from error
    # No step of it is taken, so that any parameter will do.
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate or 1.0)
    try:
        get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=0,
            # where epochs decide, nobody knows them yet
            num_training_steps=args.max_steps if args.max_steps > 0 else 10**6,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
    except Exception as error:
        raise ValueError(
            f"lr_scheduler_type is {args.lr_scheduler_type.value}, which cannot be made with"
            f" lr_scheduler_kwargs: {args.lr_scheduler_kwargs} ({error}): give what it needs"
            " there, or another lr_scheduler_type"
        ) from error
