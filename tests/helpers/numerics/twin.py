"""Parameters that are matrices of their own, beside one that fuses them."""

import torch


class Twin:
    """The same six gradients for every copy of some parameters."""

    def __init__(self, *values: torch.Tensor) -> None:
        self.values = values
        gen = torch.Generator().manual_seed(7)
        self.gradients = [
            [torch.randn(v.shape, generator=gen).to(v.dtype) for v in values] for _ in range(6)
        ]

    def params(self) -> list[torch.nn.Parameter]:
        return [torch.nn.Parameter(v.clone()) for v in self.values]

    def train(self, params, optimizers, steps, lrs=None) -> None:
        for step in steps:
            for p, g in zip(params, self.gradients[step], strict=True):
                p.grad = g.clone()
            for optimizer in optimizers:
                if lrs:
                    for group in optimizer.param_groups:
                        group["lr"] *= lrs[step]
                optimizer.step()


def random_values(*dtypes: torch.dtype) -> list[torch.Tensor]:
    """Larger than the power iteration's block, which would otherwise be square and never change."""
    gen = torch.Generator().manual_seed(0)
    return [torch.randn(24, 40, generator=gen).to(dtype) for dtype in dtypes]
