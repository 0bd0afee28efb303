"""Checks of the command line; each refusal names the flag, the rule and the way out."""

import argparse

from sso_megatron.mcore.compat import versions
from sso_megatron.mcore.flags.optimizers import (
    OPTIMIZERS,
    OptimizerSpec,
    config_classes,
    flag_fields,
    flags_of,
    names_with,
)


def check_request(args: argparse.Namespace) -> None:
    """Refuse arguments that cannot work with a spectral optimizer.

    Raises:
        ValueError: such an argument is given; the message names the flag, the rule and the way out.
    """
    refused = {
        "fp16": "float16 gradients overflow the spectral step; use --bf16",
        "use_torch_fsdp2": "FSDP cuts matrices where no spectral step can see them; leave it out",
        "use_megatron_fsdp": "FSDP cuts matrices where no spectral step can see them; leave it out",
        "optimizer_cuda_graph": "a replay cannot skip a step whose gradient norm is not finite; leave it "
        "out",
        "optimizer_cpu_offload": "the spectral step runs on the device; leave it out",
        "use_precision_aware_optimizer": "gradients would be clipped for AdamW alone; leave it out",
        "fp8_param_gather": "matrices are gathered in the precision they are kept in; leave it out",
        "fp4_param_gather": "matrices are gathered in the precision they are kept in; leave it out",
        "overlap_param_gather_with_optimizer_step": "all parts of the optimizer step before parameters "
        "are gathered; use --overlap-param-gather alone",
        "init_model_with_meta_device": "Megatron then forgets which weights tensor "
        "parallelism cuts, and which is the output layer; leave it out",
        "rampup_batch_size": "Megatron does not read it, and the whole batch would be trained with from "
        "the start; use --step-batch-size-schedule",
        "loss_scale": "bf16 and fp32 need none, and the spectral step has none; leave it out",
    }
    for name, rule in refused.items():
        if getattr(args, name, False):
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} with --optimizer {args.optimizer}: {rule}")
    _check_sharding(args)
    _check_experts(args)
    _check_combinations(args, OPTIMIZERS[args.optimizer])


def _check_experts(args: argparse.Namespace) -> None:
    """Refuse experts that Megatron-Core 0.18 shards in another way but gives no groups of their own."""
    tp, etp = args.tensor_model_parallel_size, args.expert_tensor_parallel_size
    is_apart = args.num_experts and etp is not None and etp != tp and args.expert_model_parallel_size == 1
    if is_apart and versions.is_0_18():
        raise ValueError(
            f"--expert-tensor-parallel-size {etp} with --tensor-model-parallel-size {tp}: megatron-core "
            f"{versions.megatron_version()} does not sum the gradients of such experts over their ranks; "
            "add --expert-model-parallel-size, or use megatron-core 0.19"
        )


def _check_combinations(args: argparse.Namespace, spec: OptimizerSpec) -> None:
    """Refuse our own settings that contradict each other or do nothing."""
    if args.spectral_mup_init and args.sso_radius_mode == "from_weights":
        raise ValueError(
            "--sso-radius-mode from_weights with --spectral-mup-init: weights are drawn for radii that "
            "the weights themselves would give; leave one out"
        )
    if spec.has_spheres and getattr(args, "qk_clip", False):
        raise ValueError(
            f"--qk-clip with --optimizer {args.optimizer}: it scales weights of Q and K after the step, "
            "off their spheres, and the next step would scale them back; leave it out (--qk-layernorm "
            "bounds attention's logits, too)"
        )
    stages = args.pipeline_model_parallel_size
    is_tied = not args.untie_embeddings_and_output_weights
    if getattr(args, "mtp_num_layers", None) and is_tied and stages > 1 and args.save is not None:
        raise ValueError(
            f"--mtp-num-layers {args.mtp_num_layers} with --pipeline-model-parallel-size {stages} and tied "
            "embeddings: Megatron cannot save their copies; add --untie-embeddings-and-output-weights"
        )
    if not spec.has_spheres:
        unknown = {
            "spectral_mup_init": "it keeps weights on no spheres",
            "use_mup": "its learning rates under muP are not known",
        }
        for name, rule in unknown.items():
            if getattr(args, name, False):
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} with --optimizer {args.optimizer}: {rule}; leave it out")
    if args.spectral_tp_mode == "distributed" and not spec.optimizer_cls.works_on_shards:
        raise ValueError(
            f"--spectral-tp-mode distributed with --optimizer {args.optimizer}: its step takes whole "
            "matrices; use auto, owner or duplicated"
        )
    if args.optimizer == "spectral_adam" and args.spectral_tp_mode == "owner":
        raise ValueError(
            "--spectral-tp-mode owner with --optimizer spectral_adam: its averages stay with the shards; "
            "use distributed"
        )
    if spec.prefix == "spectra_clip":
        base = spec.fixed["base"]
        idle = [n for n in _changed(args, spec.prefix) if base not in _BASES.get(n, (base,))]
        if idle:
            flags = flags_of(spec.prefix, idle)
            raise ValueError(f"{flags} with --optimizer {args.optimizer}: has no effect; leave it out")
    if args.optimizer == "muon_sphere":
        idle = [n for n in _changed(args, "sso") if n == "tangent" or n.startswith("solver")]
        if idle:
            raise ValueError(
                f"{flags_of('sso', idle)} with --optimizer muon_sphere: MuonSphere does not look at "
                "the tangent space; leave it out, or use --optimizer sso"
            )
    for prefix in ("spectral", spec.prefix):
        for name in _changed(args, prefix):
            other, needed = _READ_ONLY_WITH.get(prefix, {}).get(
                name, (name, getattr(args, f"{prefix}_{name}"))
            )
            if getattr(args, f"{prefix}_{other}") != needed:
                flag, wanted = flags_of(prefix, [name]), flags_of(prefix, [other])
                raise ValueError(
                    f"{flag} has an effect only with {wanted} {needed}; leave one out, or give the other"
                )


# Megatron's settings of AdamW that --optimizer spectra_clip_... has flags of its own for.
_OF_ADAMW = ("adam_beta1", "adam_beta2", "adam_eps", "weight_decay", "weight_decay_incr_style")


def unread_flags(args: argparse.Namespace) -> str | None:
    """Return a note on flags for AdamW that are given where AdamW gets no parameter; None without any."""
    spec = OPTIMIZERS.get(args.optimizer)
    if spec is None or spec.prefix != "spectra_clip" or args.spectral_exclude:
        return None
    from megatron.training.arguments import add_megatron_arguments

    default = add_megatron_arguments(argparse.ArgumentParser(add_help=False)).get_default
    ours = {name: getattr(args, f"spectra_clip_{name.removeprefix('adam_')}", None) for name in _OF_ADAMW}
    given = [name for name in _OF_ADAMW if getattr(args, name) not in (default(name), ours[name])]
    if not given:
        return None
    flags = " ".join(f"--{name} {getattr(args, name)}".replace("_", "-") for name in given)
    return (
        f"{flags}: not read, since --optimizer {args.optimizer} takes every parameter; it has "
        "--spectra-clip-beta1, --spectra-clip-weight-decay and so on"
    )


def _check_sharding(args: argparse.Namespace) -> None:
    """Refuse ways to shard that would split matrices, lose state or stop half-way."""
    using = f"with --optimizer {args.optimizer}"
    if not args.use_layer_wise_param_layout:
        raise ValueError(
            f"--no-use-layer-wise-param-layout {using}: whole matrices need that layout; leave it out"
        )
    for kind in ("tensor", "expert_tensor"):
        name = f"{kind}_parallel_num_weight_shards"
        ranks = args.expert_tensor_parallel_size if kind == "expert_tensor" else None
        shards = getattr(args, name, None)
        if shards is not None and shards > (ranks or args.tensor_model_parallel_size):
            raise ValueError(
                f"--{name.replace('_', '-')} {shards} {using}: matrices must not be cut beyond tensor "
                "parallelism; leave it out"
            )
    if args.num_distributed_optimizer_instances != 1:
        raise ValueError(
            f"--num-distributed-optimizer-instances {args.num_distributed_optimizer_instances} {using}: "
            "matrices are sharded over all data-parallel ranks; use 1"
        )
    saves = args.save is not None and not args.no_save_optim
    loads = args.load is not None and not (args.no_load_optim or args.finetune)
    if args.use_distributed_optimizer and args.ckpt_format == "torch" and (args.save is not None or loads):
        raise ValueError(
            f"--ckpt-format torch with --use-distributed-optimizer {using}: Megatron keeps its optimizer's "
            "state in files of single ranks then; use --ckpt-format torch_dist"
        )
    for name in ("mla_down_proj_fusion", "moe_single_grouped_weight"):
        if getattr(args, name, False) and (saves or loads):
            raise ValueError(
                f"--{name.replace('_', '-')} {using}: Megatron stores that weight in pieces, and the "
                "optimizer's state cannot be stored so yet; leave it out, or keep the model alone with "
                "--no-save-optim and --no-load-optim"
            )


# Settings that have no effect unless another setting has this value.
_READ_ONLY_WITH = {
    "spectral": {"flops_per_byte": ("tp_mode", "auto")},
    "sso": {
        "solver": ("tangent", "solve"),
        "solver_trials": ("solver", "tracking"),
        "solver_tolerance": ("solver", "bisection"),
        "solver_max_iterations": ("solver", "bisection"),
        "retract_alpha": ("retract_mode", "dynamic"),
        "symmetric_kernel": ("msign_precision", "bf16"),
    },
    "spectra_clip": {"one_dimensional": ("apply_to", "all")},
}
# Settings of spectral clipping that only some of its base optimizers read.
_BASES = {
    "beta2": ("adamw",),
    **dict.fromkeys(("beta1", "eps"), ("adamw", "ademamix")),
    **dict.fromkeys(("momentum", "nesterov"), ("signum",)),
    **{f"ademamix_{name}": ("ademamix",) for name in ("beta2", "beta3", "alpha", "warmup_steps")},
}


# Settings that --log-spectral-criterion reads with any optimizer.
_READ_BY_CRITERION = ("qkv_split", "mlp_split", "workspace_mib")


def refuse_idle_flags(args: argparse.Namespace) -> None:
    """Refuse our flags with an optimizer that does not read them.

    Raises:
        ValueError: such a flag is given; the message names the flags and the way out.
    """
    spec = OPTIMIZERS.get(args.optimizer)
    for prefix in config_classes():
        is_read = spec is not None and prefix in ("spectral", spec.prefix)
        changed = [] if is_read else _changed(args, prefix)
        if prefix == "spectral" and args.log_spectral_criterion is not None:
            changed = [name for name in changed if name not in _READ_BY_CRITERION]
        if changed:
            raise ValueError(
                f"{flags_of(prefix, changed)} with --optimizer {args.optimizer}: has no effect; leave it "
                f"out, or use --optimizer {names_with(prefix)}"
            )


def _changed(args: argparse.Namespace, prefix: str) -> list[str]:
    return [f.name for f in flag_fields(prefix) if getattr(args, f"{prefix}_{f.name}") != f.default]


def check_loading(args: argparse.Namespace) -> None:
    """Refuse values of ``--dist-ckpt-strictness`` with which Megatron cannot load any checkpoint.

    Raises:
        ValueError: such a value is given, and a checkpoint is to be loaded.
    """
    strictness = getattr(args, "dist_ckpt_strictness", None)
    refused = {
        "raise_all": "Megatron itself leaves entries of every checkpoint unread; use raise_unexpected",
        "return_unexpected": "is for programs that call Megatron; use log_unexpected",
        "return_all": "is for programs that call Megatron; use log_unexpected",
    }
    if args.load is not None and strictness in refused:
        raise ValueError(f"--dist-ckpt-strictness {strictness}: {refused[strictness]}")


def check_criterion(args: argparse.Namespace) -> None:
    """Refuse arguments with which ``--log-spectral-criterion`` cannot measure or write anything.

    Raises:
        ValueError: such an argument is given; the message names the flag, the rule and the way out.
    """
    if args.log_spectral_criterion is None:
        return
    flag = f"--log-spectral-criterion {args.log_spectral_criterion}"
    if args.log_spectral_criterion < 1:
        raise ValueError(f"{flag} must be at least 1; leave it out to measure nothing")
    if args.spectral_run_dir is None:
        raise ValueError(f"{flag} is written into a folder of records; name one with --spectral-run-dir")
    refused = {
        "use_torch_fsdp2": "gradients are not whole on any rank",
        "use_megatron_fsdp": "gradients are not whole on any rank",
        "enable_cuda_graph": "a replayed forward pass cannot be looked at",
        "external_cuda_graph": "a replayed forward pass cannot be looked at",
    }
    for name, rule in refused.items():
        if getattr(args, name, False):
            raise ValueError(f"{flag} with --{name.replace('_', '-')}: {rule}; leave one out")
    if getattr(args, "cuda_graph_impl", "none") != "none":
        raise ValueError(
            f"{flag} with --cuda-graph-impl {args.cuda_graph_impl}: a replayed forward pass cannot be "
            "looked at; leave one out"
        )


def check_metrics(args: argparse.Namespace) -> None:
    """Refuse measurements that cannot be made, or whose results would be written nowhere.

    Raises:
        ValueError: such measurements are asked for; the message names the flag and the way out.
    """
    health = f"--spectral-health {args.spectral_health}"
    if args.spectral_health not in ("off", "warn", "stop"):
        raise ValueError(f"{health} must be one of off, warn, stop")
    if args.log_spectral_metrics is None:
        if args.spectral_health == "stop":
            raise ValueError(f"{health} goes by what is measured; give --log-spectral-metrics N")
        return
    flag = f"--log-spectral-metrics {args.log_spectral_metrics}"
    if args.log_spectral_metrics < 1:
        raise ValueError(f"{flag} must be at least 1; leave it out to measure nothing")
    if not (args.spectral_run_dir or args.tensorboard_dir or args.wandb_project):
        raise ValueError(
            f"{flag} has nowhere to write; name --spectral-run-dir, --tensorboard-dir or --wandb-project"
        )
    for name in ("use_torch_fsdp2", "use_megatron_fsdp"):
        if getattr(args, name, False):
            raise ValueError(f"{flag} with --{name.replace('_', '-')}: is not known to work; leave one out")
