"""ScaLR's claims in miniature, for experiments/reproduce.py: datasets, mixtures, teachers, ScaLR+.

All are linear probes on frozen 3D features. Every stage 1 has the same number of steps, whatever
its data, teachers, width or head. The worlds of other datasets have other streets, sensors and
scales of intensity (miniature/README.md).
"""
import demo
from experiments.claims import OCCURRING, Claim, Number

STEPS = 400
POINTS = "--fov 48 48 8 --cell 1 --voxel 0.4 --neighbors 6"
BASE = "--channels 64 --depth 4"
MIXTURE = "nuscenes={world},semantickitti={kitti},pandaset64={pandaset},pandasetgt={pandaset}"
KITTI = "semantickitti={kitti}"
# Beside ScaLR+'s three changes that have a row of their own: LayerNorm and the schedule. The images
# stay small: enlarged ones of this world would show nothing more.
PLUS = {"drop-path": "--drop-path 0.2", "gelu": "--activation gelu",
        "mlp": "--head mlp --hidden 128"}
ALL_PLUS = " ".join([*PLUS.values(), "--norm layernorm --schedule rsqrt"])
WORLDS = ("kitti", "pandaset")


def _world(dataset):
    return f"miniature/world.py --dataset {dataset} --out {{here}} --seed {{seed}}"


def _on(data):
    return f"--data {data} --seed {{seed}} --workers 0 --restart"


def _stage1(data="{world}", encoder="{base}", network=BASE, more=""):
    return (f"stage1.py {_on(data)} --encoder {encoder} --out {{here}} {network} {POINTS} "
            f"--conditions all --steps {STEPS} {more}").strip()


def _pretrain(more=""):
    """A stand-in encoder from this world's clear days, without labels, of another seed."""
    return ("miniature/pretrain.py --data {world} --out {here}/encoder.pth --seed {seed} "
            f"{more}").strip()


COMMANDS = {
    "kitti": _world("semantickitti"),
    "pandaset": _world("pandaset"),
    "weak": _pretrain("--epochs 2"),
    "other": _pretrain(),
    "scalr": _stage1(),
    "scalr-narrow": _stage1(network="--channels 24 --depth 4"),
    "scalr-weak": _stage1(encoder="{weak}/encoder.pth"),
    "scalr-kitti": _stage1(KITTI),
    "scalr-mixture": _stage1(MIXTURE),
    "scalr-mlp2": _stage1(more="--head mlp2"),
    "scalr-other": _stage1(encoder="{other}/encoder.pth", more="--head mlp2"),
    "scalr-two": _stage1(encoder="{base} {other}/encoder.pth"),
    **{f"scalr-{name}": _stage1(more=flags) for name, flags in PLUS.items()},
    "scalr-plus": _stage1(more=ALL_PLUS),
}

# A probe on each dataset, and the same with twice the epochs. Rate and length were chosen on the
# worlds of seed 9, where the demo's 8 epochs at 1e-2 are far from the end.
PROBE = f"{demo.PROBE} --cameras all --lr 1e-1 --epochs 64"
TWICE = f"{demo.PROBE} --cameras all --lr 1e-1 --epochs 128"
TASKS = {}
for _name, _data in (("nuscenes", "{world}"), ("semantickitti", KITTI)):
    for _more, _flags in (("", PROBE), ("-twice", TWICE)):
        TASKS[f"seg3d-{_name}{_more}"] = f"probe.py {_on(_data)} --task seg3d {_flags}"


# ---- claims --------------------------------------------------------------------------------------

NUSCENES, OTHER = "seg3d-nuscenes", "seg3d-semantickitti"
CLASSES = {NUSCENES: OCCURRING,
           OTHER: ("car", "truck", "other-vehicle", "person", "road", "sidewalk", "building",
                   "fence", "vegetation", "terrain")}


def _mean(run, task, more=""):
    """Mean IoU of a run's probe, with twice the epochs where `more` says so."""
    return Number(run, task + more, CLASSES[task])


def _against(name, table, sentence, better, worse, paper, task=NUSCENES, says="better"):
    """A claim that one run is better than another on a task."""
    return Claim(name, table, sentence, _mean(better, task), _mean(worse, task), paper, says)


CLAIMS = (
    _against("wider", "3", "a wider 3D encoder is better, after as many steps",
             "scalr", "scalr-narrow", (61.1, 54.4)),
    _against("better-teacher", "3", "a better image encoder gives better 3D features",
             "scalr", "scalr-weak", (61.6, 47.8)),
    _against("gap", "4", "pre-trained on the dataset of the probe is better than on another one: "
             "SemanticKITTI", "scalr-kitti", "scalr", (46.6, 28.8), OTHER),
    _against("gap-back", "4", "the same: nuScenes", "scalr", "scalr-kitti", (54.4, 39.5)),
    _against("mixture-own", "4", "the mixture of four is not worse than nuScenes alone on nuScenes",
             "scalr-mixture", "scalr", (54.6, 54.4), says="not worse"),
    _against("mixture-own-kitti", "4", "nor than SemanticKITTI alone on SemanticKITTI",
             "scalr-mixture", "scalr-kitti", (50.6, 46.6), OTHER, says="not worse"),
    _against("mixture-other", "4", "the mixture is better than nuScenes alone on SemanticKITTI",
             "scalr-mixture", "scalr", (50.6, 28.8), OTHER),
    _against("two-teachers", "7", "two teachers are better than the first alone, both with the "
             "two-layer head", "scalr-two", "scalr-mlp2", (62.5, 61.6)),
    _against("two-teachers-other", "7", "two teachers are better than the second alone, both with "
             "the two-layer head", "scalr-two", "scalr-other", (62.5, 59.4)),
    _against("head", "-", "the two-layer head is better than the linear one, with one teacher",
             "scalr-mlp2", "scalr", None),
    _against("drop-path", "+", "drop path 0.2 in stage 1 is better than none", "scalr-drop-path",
             "scalr", None),
    _against("gelu", "+", "GELU in the layers is better than ReLU", "scalr-gelu", "scalr", None),
    _against("mlp-head", "+", "ScaLR+'s MLP head is better than the linear one", "scalr-mlp",
             "scalr", None),
    _against("scalr+", "+", "all changes of ScaLR+ together are better than ScaLR", "scalr-plus",
             "scalr", (70.4, 67.8)),
    Claim("converged", "-", "the probe has converged: twice its epochs give the same, nuScenes",
          _mean("scalr", NUSCENES, "-twice"), _mean("scalr", NUSCENES), None, "the same"),
    Claim("converged-kitti", "-", "the same, SemanticKITTI",
          _mean("scalr-mixture", OTHER, "-twice"), _mean("scalr-mixture", OTHER), None,
          "the same"),
)
