"""What the criterion looks at, captured whole and by other means, in one process."""

import itertools
from typing import Any

import torch

from helpers import probes


def capture() -> None:
    """Save activations and gradients of the second iteration, by the names of modules."""

    def before(model: Any, optimizer: Any) -> None:
        (chunk,) = model
        seen: dict[str, list[torch.Tensor]] = {}
        step = optimizer.step
        count = 0

        def hook(name: str) -> Any:
            def note(module: Any, args: Any) -> None:
                seen.setdefault(name, []).append(args[0].detach().clone())

            return note

        for name, module in _modules(chunk):
            module.register_forward_pre_hook(hook(name))

        def step_captured() -> Any:
            nonlocal count
            count += 1
            if count == 2:
                probes.save(
                    "captured",
                    {
                        name: (
                            torch.cat([x.flatten(0, 1) for x in inputs]),
                            module.weight.main_grad.clone(),
                        )
                        for name, module in _modules(chunk)
                        if (inputs := seen.get(name))
                    },
                )
            seen.clear()
            return step()

        optimizer.step = step_captured

    probes.around_train(before, None)


def spoil() -> None:
    """One NaN in what a layer puts out in the second iteration."""

    def before(model: Any, optimizer: Any) -> None:
        calls = itertools.count(1)

        def hook(module: Any, args: Any, out: Any) -> Any:
            first, *rest = out
            if next(calls) == 3:  # two microbatches an iteration
                first = first.clone()
                first.view(-1)[0] = torch.nan
            return (first, *rest)

        (chunk,) = model
        module = next(m for name, m in chunk.named_modules() if name.endswith("layers.0.mlp.linear_fc1"))
        module.register_forward_hook(hook)

    probes.around_train(before, None)


def _modules(chunk: Any) -> list[tuple[str, Any]]:
    """Modules with a matrix of their own."""
    return [
        (name.removeprefix("module."), module)
        for name, module in chunk.named_modules()
        if getattr(getattr(module, "weight", None), "ndim", 0) == 2
    ]
