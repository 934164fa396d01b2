"""Muon for a model's matrices, AdamW for the rest, as one optimizer for Trainer: far fewer steps to
the same tau."""

from collections import defaultdict

import torch
from torch.optim.adamw import adamw


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Push all singular values of each matrix towards 1 by the quintic Newton-Schulz iteration of
    Muon (Jordan 2024).

    In the matrices' own dtype: torch's `optim.Muon` iterates in bf16, which is forty times slower
    on processors without bf16 arithmetic.

    Args:
        matrices (`torch.Tensor` of shape `(M, rows, columns)`).
    """
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(
            x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445
        )
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
        names = {name: p for name, p in model.named_parameters() if p.requires_grad}
        matrices = [p for name, p in names.items() if p.dim() == 2 and "embed" not in name]
        others = [p for name, p in names.items() if p.dim() != 2 or "embed" in name]
        groups = [
            {"params": matrices, "lr": learning_rate},
            {"params": others, "lr": adam_learning_rate},
        ]
        super().__init__(groups, {"weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        """One step; `closure` is not supported."""
        for group, update in zip(self.param_groups, (self._muon, self._adamw)):
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                update(parameters, group["lr"], group["weight_decay"])

    def _muon(
        self, parameters: list, rate: float, weight_decay: float, momentum: float = 0.95
    ) -> None:
        by_shape = defaultdict(list)  # those of one shape are orthogonalised as one batch
        for p in parameters:
            buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
            buffer.lerp_(p.grad, 1 - momentum)
            by_shape[p.shape].append((p, p.grad.lerp(buffer, momentum)))
        for (rows, columns), pairs in by_shape.items():
            for (p, _), update in zip(
                pairs, orthogonalize(torch.stack([direction for _, direction in pairs]))
            ):
                p.mul_(1 - rate * weight_decay).add_(
                    update, alpha=-rate * max(1, rows / columns) ** 0.5
                )

    def _adamw(self, parameters: list, rate: float, weight_decay: float) -> None:
        for p in parameters:
            if not self.state[p]:
                zeros = torch.zeros_like(p)
                self.state[p] |= {"mean": zeros, "square": zeros.clone(), "step": torch.tensor(0.0)}
        states = [self.state[p] for p in parameters]
        adamw(
            parameters, [p.grad for p in parameters], [state["mean"] for state in states],
            [state["square"] for state in states], [], [state["step"] for state in states], amsgrad=False, beta1=0.9,
            beta2=0.95, lr=rate, weight_decay=weight_decay, eps=1e-8, maximize=False,
        )  # fmt: skip
