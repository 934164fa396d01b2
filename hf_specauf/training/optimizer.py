"""Muon for a model's matrices, AdamW for the rest, as one optimizer for Trainer: far fewer steps to
the same tau."""

from collections import defaultdict

import torch
from torch.optim.adamw import adamw

# Jordan 2024: a, b, c of x <- a x + (b x x^T + c (x x^T)^2) x. They are chosen to lift small
# singular values fast, and to leave all of them near 1.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
MOMENTUM = 0.95


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Push all singular values of each matrix towards 1 by the quintic Newton-Schulz iteration of
    Muon (Jordan 2024).

    In the matrices' own dtype: torch's `optim.Muon` iterates in bf16, which is forty times slower
    on processors without bf16 arithmetic.

    Args:
        matrices (`torch.Tensor` of shape `(M, rows, columns)`).
    """
    a, b, c = NEWTON_SCHULZ
    # x @ x.mT is smaller where rows are the shorter side
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    # the iteration needs singular values of at most 1, and none exceeds this norm
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x if wide else x.mT


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
    """

    def __init__(
        self,
        model: torch.nn.Module,
        learning_rate: float,
        adam_learning_rate: float,
        weight_decay: float = 0.0,
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
