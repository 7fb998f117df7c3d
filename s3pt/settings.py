"""The settings of DINO, CrIBo and S3PT as S3PT's Tables 5 to 7 print them, and the flags for them.

The bare command is Table 7's first column, S3PT with ViT-S/16.
"""
from argparse import BooleanOptionalAction

import models
from plumbing import training
from plumbing.arguments import COUNT, POSITIVE, RATE, Parser, real, whole
from plumbing.errors import InputError
from s3pt.depth import FILLS
from vit import ViT

# What all tables share, what differs by encoder, what by objective
SHARED = {"batch": 256, "warmup_epochs": 10, "weight_decay": 0.04, "end_weight_decay": 0.4,
          "drop_path": 0.1, "momentum": 0.996, "crop": 224, "local_crop": 96,
          "local_scale": [0.05, 0.25], "hidden": 2048, "bottleneck": 256, "prototypes": 65536,
          "teacher_temp": 0.07, "first_teacher_temp": 0.04, "student_temp": 0.1}
SMALL = {"epochs": 500, "lr": 5e-4, "end_lr": 1e-5, "freeze_epochs": 1, "temp_epochs": 30,
         "clip": 0.0, "scale": [0.25, 1.0]}
BASE = {"epochs": 100, "lr": 7.5e-4, "end_lr": 2e-6, "freeze_epochs": 3, "temp_epochs": 50,
        "clip": 0.3, "scale": [0.32, 1.0]}
DINO = {"vmf": False, "center": "logits", "unit_prototypes": False, "local_crops": 10}
CRIBO = DINO | {"local_crops": 0, "clusters": 32, "rounds": 5, "sinkhorn_steps": 5,
                "sinkhorn_lambda": 20.0, "alpha": 1.0, "beta": 0.0, "marginal": "following",
                "queue": 25000}
S3PT = CRIBO | {"vmf": True, "center": "probability", "clusters": 128, "sinkhorn_steps": 1,
                "beta": 4.0, "queue": 2500}
OBJECTIVES = {"dino": DINO, "cribo": CRIBO, "s3pt": S3PT}
OF_OBJECTS = CRIBO.keys() - DINO.keys()


def paper(objective, row):
    """The papers' settings of an objective for an encoder, a row of the table of encoders."""
    settings = SHARED | (BASE if row.dim >= 768 else SMALL) | OBJECTIVES[objective]
    if row.dim >= 768 and objective == "dino":
        settings["scale"] = SMALL["scale"]
    if row.dim >= 768 and objective != "s3pt":
        settings["unit_prototypes"] = True
    if row.patch_size >= 32 and objective == "s3pt":
        settings["clusters"] = 32  # Sec. 4.1: there are only 98 tokens
    return settings


# ---- arguments -----------------------------------------------------------------------------------

def parse(description, argv=None):
    parser = Parser(description)
    add = parser.add_argument
    training.add_arguments(parser, versions="+")
    add("--objective", choices=OBJECTIVES, default="s3pt",
        help="DINO, which CrIBo adds objects to, which S3PT adds depth to (default: %(default)s; "
             "Tables 5, 6, 7)")
    add("--encoder", default="vit_small16", metavar="NAME",
        help="a vision transformer that `python models.py` lists (default: %(default)s)")
    add("--weights", help="file of weights to begin with (default: random ones)")
    add("--image-size", type=COUNT, nargs=2, default=models.IMAGE_SIZE, metavar=("H", "W"),
        help="what other scripts resize images to for this encoder (default: 224 448)")
    add_pictures(add)
    add_head(add)
    add_objects(add)
    add_run(add)
    args = parser.parse_args(argv)
    settle(args)
    return args


def add_pictures(add):
    """The flags of pictures and crops."""
    add("--split", choices=("all", "train"), default="all",
        help="all has val's pictures too, and test's where --version names it; train is for "
             "whoever evaluates on val (default: %(default)s, Sec. 4.1)")
    add("--percent", type=int, choices=(1, 10, 25, 50, 100), default=100,
        help="of the scenes, evenly spread (default: 100; Fig. 7)")
    add("--crop", type=COUNT, help="side of a global crop in pixels (default: 224, Table 7)")
    add("--scale", type=real(above=0, most=1), nargs=2, metavar=("LEAST", "MOST"),
        help="part of a picture's area in a global crop (default: 0.25 1, of ViT-B with objects "
             "0.32 1)")
    add("--local-crops", type=whole(0), help="small crops (default: DINO 10, others 0)")
    add("--local-crop", type=COUNT, help="side of a small crop in pixels (default: 96, DINO)")
    add("--local-scale", type=real(above=0, most=1), nargs=2, metavar=("LEAST", "MOST"),
        help="part of a picture's area in a small crop (default: 0.05 0.25, Table 7)")


def add_head(add):
    """The flags of the head, its prototypes and temperatures."""
    add("--prototypes", type=whole(2, 2**24),
        help="of crops, and as many of objects (default: 65536, Table 7)")
    add("--hidden", type=COUNT, help="width of the head's inner layers (default: 2048, Table 7)")
    add("--bottleneck", type=COUNT, help="width of the head's output (default: 256, Table 7)")
    add("--vmf", action=BooleanOptionalAction,
        help="prototypes' lengths say how sure they are, Eq. 2 (default: S3PT only, Table 7)")
    add("--unit-prototypes", action=BooleanOptionalAction,
        help="prototypes' lengths stay 1 (default: ViT-B of DINO and CrIBo only)")
    add("--center", choices=("logits", "probability"),
        help="the space of the teacher's centring (default: S3PT probability, Sec. 3.1; others "
             "logits)")
    add("--center-momentum", type=real(0, 1), default=0.9,
        help="of the centre, a step (default: %(default)s, DINO)")
    add("--student-temp", type=POSITIVE,
        help="temperature of the student's probabilities (default: 0.1, Table 7)")
    add("--teacher-temp", type=POSITIVE,
        help="of the teacher's, after --temp-epochs (default: 0.07, Table 7)")
    add("--first-teacher-temp", type=POSITIVE,
        help="of the teacher's in the first epoch (default: 0.04, Table 7)")
    add("--temp-epochs", type=whole(0),
        help="epochs from the first temperature to the last (default: 30, ViT-B 50, Table 7)")


def add_objects(add):
    """The flags of clusters, depth and the queue."""
    add("--clusters", type=COUNT,
        help="of a picture's tokens (default: S3PT 128, of patches of 32 pixels 32; CrIBo 32; "
             "Tables 6, 7)")
    add("--rounds", type=COUNT, help="of assigning tokens to clusters (default: 5, CrIBo)")
    add("--sinkhorn-steps", type=COUNT,
        help="iterations in a round (default: S3PT 1, CrIBo 5; Tables 6, 7)")
    add("--sinkhorn-lambda", type=POSITIVE, help="how hard assignments are (default: 20, Table 7)")
    add("--marginal", choices=("following", "fixed"),
        help="clusters' sizes that a round asks for: the last round's, or equal ones (default: "
             "following, CrIBo's code)")
    add("--alpha", type=RATE, help="weight of the distance in the picture (default: 1, Table 7)")
    add("--beta", type=RATE,
        help="weight of the difference in depth (default: S3PT 4, without LiDAR 0; CrIBo 0)")
    add("--queue", type=COUNT,
        help="pictures whose objects are kept (default: S3PT 2500, CrIBo 25000; Tables 6, 7)")
    add("--depth-maps", metavar="DIR",
        help="a .npy (metres) or 16-bit .png (millimetres) for each picture under the same path "
             "(default: LiDAR's points, completed)")
    add("--depth-fill", choices=FILLS,
        help="how LiDAR's points become a map, IP-Basic (default: fast, Sec. 3.3)")


def add_run(add):
    """The flags of the optimizer and of the teacher."""
    add("--epochs", type=COUNT, help="over the pictures (default: 500, ViT-B 100, Table 7)")
    add("--batch", type=COUNT,
        help="pictures in a batch, over all processes (default: 256, Table 7)")
    add("--lr", type=POSITIVE,
        help="peak learning rate for a batch of 256, to which it is in proportion (default: 5e-4, "
             "ViT-B 7.5e-4, Table 7)")
    add("--end-lr", type=RATE, help="at the end of the cosine (default: 1e-5, ViT-B 2e-6, Table 7)")
    add("--warmup-epochs", type=whole(0),
        help="from 0 to --lr, at most a tenth of the run (default: 10, Table 7)")
    add("--weight-decay", type=RATE, help="of AdamW, at the beginning (default: 0.04, Table 7)")
    add("--end-weight-decay", type=RATE, help="and at the end (default: 0.4, Table 7)")
    add("--clip", type=RATE,
        help="most of a gradient's norm, each parameter for itself; 0: none (default: 0, ViT-B "
             "0.3)")
    add("--freeze-epochs", type=whole(0),
        help="in which the prototypes stay as they are (default: 1, ViT-B 3, Table 7)")
    add("--recompute", action=BooleanOptionalAction, default=False,
        help="compute the blocks again in the backward pass instead of keeping them: the same "
             "result, a fraction of the memory, a third more time")
    add("--momentum", type=real(0, 1),
        help="of the teacher, a step; it rises to 1 (default: 0.996, Table 7)")
    add("--drop-path", type=real(0, below=1),
        help="of leaving out a branch of the student's last block (default: 0.1, Table 7)")


def refuse_without_use(args, settings):
    """Raise InputError for a flag that was given and would do nothing beside the others."""
    beta = settings.get("beta", 0) if args.beta is None else args.beta
    small = args.local_crops or settings["local_crops"] and args.local_crops is None
    without = {  # flags: whether they are of no use, and why
        ("local_crop", "local_scale"): (not small, "there are no --local-crops"),
        (*OF_OBJECTS, "depth_maps", "depth_fill"): (
            args.objective == "dino", "--objective dino has no objects; take cribo or s3pt"),
        ("depth_maps", "depth_fill"): (not beta, "--beta 0 makes no use of depth"),
        ("depth_fill",): (args.depth_maps, "--depth-maps are complete")}
    for names, (useless, why) in without.items():
        for name in sorted(names):
            if useless and getattr(args, name) is not None:
                raise InputError(f"--{name.replace('_', '-')}: {why}; leave it out")


def settle(args):
    """Fill in the paper's settings. Raises InputError for flags that cannot be, or do nothing."""
    row = models.ENCODERS.get(args.encoder)
    if row is None or row.network is not ViT:
        raise InputError(f"--encoder {args.encoder}: not one of the vision transformers that "
                         "`python models.py` lists")
    settings = paper(args.objective, row)
    args.beta_given = args.beta is not None
    refuse_without_use(args, settings)
    for name in settings.keys() | OF_OBJECTS:
        if getattr(args, name) is None:
            setattr(args, name, settings.get(name))
    if not args.depth_maps and args.beta:
        args.depth_fill = args.depth_fill or "fast"

    for name in ("crop", "local_crop"):
        side = getattr(args, name)
        if side % row.patch_size and (name == "crop" or args.local_crops):
            near = max(1, round(side / row.patch_size)) * row.patch_size
            raise InputError(f"--{name.replace('_', '-')} {side}: {row.name} has patches of "
                             f"{row.patch_size} pixels, which do not divide it; give {near}")
    for name in ("scale", "local_scale"):
        least, most = getattr(args, name)
        if least > most:
            raise InputError(f"--{name.replace('_', '-')} {least:g} {most:g}: the smaller one "
                             "comes first")
    if args.vmf and args.bottleneck < 32:
        raise InputError(f"--bottleneck {args.bottleneck}: the vMF constant is not exact below "
                         "32; raise it, or add --no-vmf")
    tokens = 2 * (args.crop // row.patch_size)**2
    if args.clusters and args.clusters > tokens:
        raise InputError(f"--clusters {args.clusters}: two crops of {args.crop} pixels have only "
                         f"{tokens} tokens; lower it, or raise --crop")
    if args.queue and args.queue < args.batch:
        raise InputError(f"--queue {args.queue}: smaller than --batch {args.batch}; a step's "
                         "pictures would push one another out")
