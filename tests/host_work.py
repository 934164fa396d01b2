"""What the host does beside the models' passes: operations that are no views, and looks at a tensor."""

from collections import Counter
from contextlib import contextmanager

import torch
from pytest import MonkeyPatch
from torch.utils._python_dispatch import TorchDispatchMode

# Ways in which the host looks at a tensor, and on a GPU waits for it.
LOOKS = ("tolist", "item", "__int__", "__bool__", "__float__", "__index__", "nonzero", "cpu", "numpy")


class HostWork(TorchDispatchMode):
    """Counts while it is entered.

    Args:
        modules (`torch.nn.Module`): whose passes are left out.
    """

    def __init__(self, *modules):
        super().__init__()
        self.modules = modules
        self.inside = 0
        self.operations: Counter = Counter()
        self.looks = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.inside == 0 and not func.is_view:
            self.operations[str(func)] += 1
        return func(*args, **kwargs or {})

    @contextmanager
    def leaving_out(self):
        """Know when the modules run. To be entered before they are asked for anything."""

        def enter(*_):
            self.inside += 1

        def leave(*_):
            self.inside -= 1

        handles = [module.register_forward_pre_hook(enter) for module in self.modules]
        handles += [module.register_forward_hook(leave) for module in self.modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def counting(self):
        """Count operations and looks."""
        with MonkeyPatch.context() as patch:
            for name in LOOKS:
                own = getattr(torch.Tensor, name)

                def look(tensor, *args, own=own, **kwargs):
                    self.looks += self.inside == 0
                    return own(tensor, *args, **kwargs)

                patch.setattr(torch.Tensor, name, look)
            with self:
                yield
