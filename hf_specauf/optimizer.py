"""Muon for a model's matrices, AdamW for the rest, as one optimizer for Trainer: far fewer steps to the same tau."""

from collections import defaultdict

import torch


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Push all singular values of each matrix towards 1 by the quintic Newton-Schulz iteration of Muon (Jordan 2024).

    In the matrices' own dtype: torch's `optim.Muon` iterates in bf16, which is forty times slower on processors
    without bf16 arithmetic.

    Args:
        matrices (`torch.Tensor` of shape `(M, rows, columns)`).
    """
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Muon (Jordan 2024) with Nesterov momentum for matrices; those of one shape are orthogonalised as one batch."""

    def __init__(self, parameters, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        """One step; `closure` is not supported."""
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for (rows, columns), parameters in by_shape.items():
                directions = []
                for p in parameters:
                    buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                    directions.append(p.grad.lerp(buffer, group["momentum"]))
                rate = group["lr"] * max(1, rows / columns) ** 0.5
                for p, update in zip(parameters, orthogonalize(torch.stack(directions))):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the matrices, AdamW (betas 0.9, 0.95) for embedding and norms, as one optimizer.

    Args:
        model (`nn.Module`): its trainable parameters are taken.
        learning_rate (`float`): of Muon, for matrices that are no embedding.
        adam_learning_rate (`float`): of AdamW, for the rest.
        weight_decay (`float`, *optional*, defaults to 0): decoupled, of both.
    """

    def __init__(
        self, model: torch.nn.Module, learning_rate: float, adam_learning_rate: float, weight_decay: float = 0.0
    ):
        names = {name: p for name, p in model.named_parameters() if p.requires_grad}
        super().__init__(names.values(), {})
        matrices = [p for name, p in names.items() if p.dim() == 2 and "embed" not in name]
        others = [p for name, p in names.items() if p.dim() != 2 or "embed" in name]
        self.parts = [
            Muon(matrices, learning_rate, weight_decay=weight_decay),
            torch.optim.AdamW(others, lr=adam_learning_rate, betas=(0.9, 0.95), weight_decay=weight_decay),
        ]
        self._share_groups()

    def _share_groups(self) -> None:
        # the very dicts of the parts, so that a learning-rate scheduler reaches them
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure=None):
        """One step of both."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict:
        """State of both."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore both."""
        for part, state in zip(self.parts, state_dict["parts"]):
            part.load_state_dict(state)
        self._share_groups()
