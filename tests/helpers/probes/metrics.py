"""What --log-spectral-metrics measures, captured whole and by other means, in one process."""

import itertools
from typing import Any

from torch import Tensor

from helpers import probes
from sso_megatron.optimizers.base import SpectralOptimizer


def capture_steps() -> None:
    """Save of each step every logical matrix before and after it, its direction, and Spectra's vectors."""
    steps: list[dict[str, tuple[Tensor | None, ...]]] = []
    step, directions, vectors = SpectralOptimizer.step, {}, {}

    def step_captured(self: Any, closure: Any = None) -> Any:
        update = self.update_batch_

        def update_captured(batch: Any, W: Tensor, N: Tensor) -> None:
            directions.update(zip((m.name for m in batch.here), N.clone(), strict=True))
            if hasattr(batch.cache, "V"):
                vectors.update(zip((m.name for m in batch.here), batch.cache.V.clone(), strict=True))
            update(batch, W, N)

        self.update_batch_ = update_captured
        before = _weights(self)
        result = step(self, closure)
        del self.update_batch_
        after = _weights(self)
        steps.append({n: (before[n], after[n], directions[n], vectors.get(n)) for n in before})
        probes.save("steps", steps)
        return result

    SpectralOptimizer.step = step_captured


def _weights(optimizer: Any) -> dict[str, Tensor]:
    return {
        member.name: weight.clone()
        for batch in optimizer.batches
        for member, weight in zip(batch.members, batch.whole(batch.weights()), strict=True)
    }


def capture_activations() -> None:
    """Save of each iteration what leaves layers, attention and MLPs, queries, keys, experts' tokens."""

    def before(model: Any, optimizer: Any) -> None:
        (chunk,) = model
        seen: list[dict[str, list[Tensor]]] = [{}]

        def note(name: str, x: Tensor) -> None:
            seen[-1].setdefault(name, []).append(x.detach().clone())

        def output(name: str) -> Any:
            return lambda module, args, out: note(name, out[0] if isinstance(out, tuple) else out)

        def inputs(name: str, number: int) -> Any:
            def hook(module: Any, args: Any) -> None:
                for k in range(number):
                    note(f"{name} {k}", args[k])

            return hook

        for name, module in chunk.named_modules():
            name = name.removeprefix("module.")
            last = name.rpartition(".")[2]
            if last in ("self_attention", "mlp") or (name.startswith("decoder.layers.") and last.isdigit()):
                module.register_forward_hook(output(name))
            if last == "core_attention":
                module.register_forward_pre_hook(inputs(name, 2))
            if last == "linear_fc1" and "local_experts" in name:
                module.register_forward_pre_hook(inputs(name, 1))

        step = optimizer.step

        def next_step() -> Any:
            probes.save("activations", seen)
            seen.append({})
            return step()

        optimizer.step = next_step

    probes.around_train(before, None)


def count_iterations() -> None:
    """Save the collectives of each iteration, from its first forward pass to the next one's."""
    from megatron.training import training

    train_step, counted = training.train_step, probes.Collectives()
    counted.__enter__()

    def step_counted(*args: Any, **kwargs: Any) -> Any:
        counted.next_step()
        probes.save("collectives", counted.steps[:-1])
        return train_step(*args, **kwargs)

    training.train_step = step_counted


def report_nothing() -> None:
    """A loss function that reports no loss."""
    from sso_megatron.cli.train import pretrain_gpt

    loss = pretrain_gpt._loss
    pretrain_gpt._loss = lambda *args: (*loss(*args)[:2], {})


def spoil_all() -> None:
    """NaN in what a layer puts out, from the second iteration on."""

    def before(model: Any, optimizer: Any) -> None:
        calls = itertools.count(1)

        def hook(module: Any, args: Any, out: Any) -> Any:
            return (out[0] * float("nan"), *out[1:]) if next(calls) > 2 else out

        for name, module in model[0].named_modules():
            if name.endswith("layers.0.mlp.linear_fc1"):
                module.register_forward_hook(hook)

    probes.around_train(before, None)


def grow_activations() -> None:
    """From the seventh iteration on a layer puts out a hundred times what it should."""

    def before(model: Any, optimizer: Any) -> None:
        count = 0
        step = optimizer.step

        def counted() -> Any:
            nonlocal count
            count += 1
            return step()

        def hook(module: Any, args: Any, out: Any) -> Any:
            return (100 * out[0], *out[1:]) if count >= 6 else out

        optimizer.step = counted
        for name, module in model[0].named_modules():
            if name.endswith("decoder.layers.1.mlp"):
                module.register_forward_hook(hook)

    probes.around_train(before, None)


def use_wandb_offline() -> None:
    """Weights & Biases writes into a folder of its own, and asks no server."""
    import os

    os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
