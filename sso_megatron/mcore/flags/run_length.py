"""Settings of an optimizer that default to the length and the warmup of the run."""

import argparse

from sso_megatron.mcore.flags.optimizers import OptimizerSpec, flags_of


def from_run_length(spec: OptimizerSpec, args: argparse.Namespace) -> dict[str, int]:
    """Return the settings that are 0, with values from the run's own length and warmup.

    Args:
        spec: the chosen optimizer.
        args: Megatron's arguments, parsed and not validated yet.

    Raises:
        ValueError: the length of the run is given in samples, and not all batches have as many of them.
    """
    names = ("train_steps", "c_warmup_steps")
    missing = [name for name in names if spec.prefix == "spectra_clip" and not _of_clip(args, name)]
    if not missing:
        return {}
    if args.step_batch_size_schedule and args.train_samples:
        wanted = flags_of(spec.prefix, missing)
        raise ValueError(
            "--train-samples with --step-batch-size-schedule: does not tell the number of steps, which "
            f"--optimizer {args.optimizer} goes by; give {wanted} (1 for no warmup of c)"
        )
    batch = _batch_size(args)

    def steps(count: int | None, samples: int | None) -> int:
        return count or (samples // batch if samples and batch else 0)

    length = steps(args.train_iters, args.train_samples)
    if args.lr_warmup_fraction is not None:
        decay = steps(args.lr_decay_iters, args.lr_decay_samples) or length
        warmup = int(args.lr_warmup_fraction * decay)
    else:
        warmup = steps(args.lr_warmup_iters, args.lr_warmup_samples)
    known = {"train_steps": length, "c_warmup_steps": min(warmup, length)}
    return {name: known[name] for name in missing}


def _of_clip(args: argparse.Namespace, name: str) -> int:
    return int(getattr(args, f"spectra_clip_{name}"))


def _batch_size(args: argparse.Namespace) -> int:
    """Return the samples of a step that Megatron will find; 0 where it will refuse the arguments."""
    if args.global_batch_size:
        return int(args.global_batch_size)
    ranks = args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size
    return int((args.micro_batch_size or 0) * (args.world_size // ranks))
