"""One optimizer out of two, for Trainer: far fewer steps to the same tau than AdamW alone."""

import torch


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (Newton-Schulz orthogonalised momentum) for the matrices, AdamW for embedding and norms, as one optimizer.

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
            torch.optim.Muon(matrices, lr=learning_rate, weight_decay=weight_decay),
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
