"""The parallel layouts of the support matrix, by the names that docs/parallelism.md has."""

ITERATIONS = 10
DENSE = ["--num-layers", 4]
SP = "--sequence-parallel"
DIST = "--use-distributed-optimizer"
GROUPED = "--moe-grouped-gemm"
PP2 = ["--pipeline-model-parallel-size", 2]
VPP2 = ["--num-layers-per-virtual-pipeline-stage", 1]
CP2 = ["--context-parallel-size", 2]
EP2 = ["--expert-model-parallel-size", 2]
ETP1 = ["--expert-tensor-parallel-size", 1]
ETP2 = ["--expert-tensor-parallel-size", 2]


# Name: ranks, tensor-parallel size, further flags. The model has two query groups and four heads:
# with TP 4 every group is cut.
DENSE_LAYOUTS: dict[str, tuple[int, int, list[object]]] = {
    "tp2": (2, 2, []),
    "tp4": (4, 4, []),
    "tp2-sp": (2, 2, [SP]),
    "pp2": (2, 1, PP2),
    "pp2-vpp2": (2, 1, [*PP2, *VPP2]),
    "cp2": (2, 1, CP2),
    "tp2-cp2-sp": (4, 2, [*CP2, SP]),
    "dp2": (2, 1, []),
    "dp2-dist": (2, 1, [DIST]),
    "dp4-dist": (4, 1, ["--micro-batch-size", 1, DIST]),
    "pp2-dp2-dist": (4, 1, [*PP2, DIST]),
    "cp2-dist": (2, 1, [*CP2, DIST]),
    "tp2-pp2-dp2": (8, 2, PP2),
    "tp2-pp2-dp2-dist": (8, 2, [*PP2, DIST]),
    "uneven-pp2": (2, 1, [*PP2, "--decoder-first-pipeline-num-layers", 1]),
}


MOE_LAYOUTS: dict[str, tuple[int, int, list[object]]] = {
    "ep2": (2, 1, EP2),
    "ep2-pp2": (4, 1, [*EP2, *PP2]),
    "tp2-ep2-etp1": (2, 2, [SP, *EP2, *ETP1]),
    "tp2-etp2": (2, 2, [SP, *ETP2]),
    "tp2-ep2-etp2": (4, 2, [SP, *EP2, *ETP2]),
    "moe-dp2-dist": (2, 1, [DIST]),
    "ep2-dist": (2, 1, [*EP2, DIST]),
    "ep2-dp2-dist": (4, 1, ["--micro-batch-size", 1, *EP2, DIST]),
    "tp2-etp1-dist": (2, 2, [SP, *ETP1, DIST]),
    "grouped": (1, 1, [GROUPED]),
    "grouped-ep2": (2, 1, [GROUPED, *EP2]),
    "grouped-tp2-ep2-etp2": (4, 2, [GROUPED, SP, *EP2, *ETP2]),
    "grouped-ep2-dp2-dist": (4, 1, ["--micro-batch-size", 1, GROUPED, *EP2, DIST]),
}
TP_MODES = ["duplicated", "owner", "distributed"]
