"""What the criterion looks at, captured whole and by other means, in one process."""

from typing import Any

import probes
import torch


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


def _modules(chunk: Any) -> list[tuple[str, Any]]:
    """Modules with a matrix of their own."""
    return [
        (name.removeprefix("module."), module)
        for name, module in chunk.named_modules()
        if getattr(getattr(module, "weight", None), "ndim", 0) == 2
    ]
