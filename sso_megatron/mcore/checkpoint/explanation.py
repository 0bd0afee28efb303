"""Says in one line why a checkpoint cannot be loaded, and the way out, where Megatron's error does not."""

from sso_megatron.mcore.errors.collective_exit import CheckpointError, cause_of


def describe(error: BaseException) -> str:
    """Return the line for an error that ends a load."""
    if isinstance(error, CheckpointError):
        return str(error)
    if isinstance(error, AssertionError) and str(error).startswith("OptimizerParamScheduler: "):
        what = str(error).removeprefix("OptimizerParamScheduler: ")
        return (
            f"the checkpoint has another schedule ({what}): give the flags that it was saved with; or "
            "--override-opt-param-scheduler, to go on with those of this run, or "
            "--use-checkpoint-opt-param-scheduler, with those of the checkpoint"
        )
    if isinstance(error, ValueError) and str(error).startswith("Could not find parameter group"):
        return (
            "the checkpoint's optimizer has parameter groups with other settings, such as --lr, --min-lr "
            "or --weight-decay: give those that it was saved with, or --no-load-optim to start the "
            "optimizer and its learning rate schedule anew"
        )
    return f"the checkpoint cannot be loaded: {cause_of(error)}"
