"""S3PT's claims in miniature, for experiments/reproduce.py: its parts, its rivals, transfer.

Every encoder is `vit_mini8`, trained for 1,495 steps of 32 pictures. DINO sees its small crops
beside the two large ones, so it takes nearly twice the time. The pictures, of clear days, are of a
world that is used nowhere else; what is probed is the world of all other claims.
"""
from experiments.claims import OCCURRING, Claim, Number
from plumbing.atomic import read_json

# Sizes for pictures of 80 x 160 pixels; lengths in proportion to Sec. 4.1's 100 epochs. Rate and
# temperature were chosen on the worlds of seed 0, by S3PT's runs (docs/s3pt.md), and hold for all
SIZES = ("--encoder vit_mini8 --image-size 80 160 --crop 64 --hidden 256 --bottleneck 64 "
         "--prototypes 1024 --batch 32")
RATES = "--lr 8e-3 --momentum 0.99 --first-teacher-temp 0.02 --teacher-temp 0.02"
LENGTH = f"--epochs 23 --warmup-epochs 2 --freeze-epochs 1 {RATES}"
# As many steps on a quarter of the pictures, whose epochs have 16 steps and not 65. No flag says
# when the queue is first searched: after an epoch, so 49 steps earlier
OF_QUARTER = f"--percent 25 --steps 1495 --warmup-epochs 8 --freeze-epochs 4 {RATES}"
OBJECTS = "--queue 256"
RARE = ("pedestrian", "barrier", "bus", "truck")  # with the fewest points that train a probe
WORLDS = ("streets", "cities")


def _train(objective, more="", data="--data {streets} --split train", length=LENGTH):
    """The command of a pre-training, without labels."""
    return (f"-m s3pt.train {data} --out {{here}} --seed {{seed}} --workers 0 --restart "
            f"--objective {objective} {SIZES} {length} {more}").strip()


CRIBO = f"{OBJECTS} --clusters 8"
VMF = f"{CRIBO} --vmf --center probability"
FEW = f"{OBJECTS} --clusters 32 --sinkhorn-steps 1 --vmf --center probability"
S3PT = f"{OBJECTS} --clusters 32"

COMMANDS = {
    "streets": "miniature/world.py --out {here} --seed {streets_seed} --train 700 0 0 --val 0 "
               "--frames 3",
    "cities": "miniature/world.py --dataset cityscapes --out {here} --seed {images_seed}",
    "s3pt-dino": _train("dino", "--local-crop 32"),
    "s3pt-cribo": _train("cribo", CRIBO),
    "s3pt-vmf": _train("cribo", VMF),
    "s3pt-few": _train("cribo", FEW),
    "s3pt": _train("s3pt", S3PT),
    "s3pt-quarter": _train("s3pt", S3PT, length=OF_QUARTER),
    # Nothing learnt: as it begins
    "s3pt-random": _train("s3pt", S3PT, length="--steps 1 --lr 1e-12 --end-lr 0"),
}
TRAININGS = ("s3pt-dino", "s3pt-cribo", "s3pt-vmf", "s3pt-few", "s3pt", "s3pt-quarter")
# Segmenter's heads, without --encoder and --out; and --data of the other dataset
_HEADS = ("-m s3pt.segmenter --data nuimages={images} --seed {seed} --workers 0 --restart "
          "--scale 160 80 --crop 80 --steps 1200 --batch 8")
TASKS = {"mask": f"{_HEADS} --head mask --lr 1e-3",
         "transfer": f"{_HEADS} --head linear --lr 1e-1"}
ELSEWHERE = {"transfer": "--data cityscapes={cities} --scale 160 80"}
TRANSFERRED = "transfer-cityscapes"  # the file, beside results.json
_SHARED = ("bus", "car", "pedestrian", "truck")
CLASSES = {"seg": OCCURRING, "transfer": (*_SHARED, "road"),
           "mask": (*_SHARED, "barrier", "driveable_surface", "background")}


def judged(run, task):
    """The result of a segmenter's run, as eval.py would give it: {"IoU": {"full": percents}}."""
    file, column = "results", "nuimages"
    if task in ELSEWHERE:
        file, column = TRANSFERRED, "nuimages to cityscapes"
    return {"IoU": {"full": read_json(f"{run}/{file}.json")["heads"][0]["columns"][column]}}


# ---- claims --------------------------------------------------------------------------------------

def _against(name, table, sentence, better, worse, paper, task="seg", classes=None):
    """A claim that one encoder is better than another on a task."""
    sides = [Number(run, task, classes or CLASSES[task])
             for run in (better, worse, "s3pt-random")]
    return Claim(name, table, sentence, *sides[:2], paper, floor=sides[2])


CLAIMS = (
    _against("s3pt-vmf", "1", "prototypes of free lengths, and centring of probabilities, help",
             "s3pt-vmf", "s3pt-cribo", (26.07, 20.50)),
    _against("s3pt-clusters", "1", "more clusters and one Sinkhorn iteration help", "s3pt-few",
             "s3pt-vmf", (28.10, 26.07)),
    _against("s3pt-depth", "1", "depth in the clusters' cost helps", "s3pt", "s3pt-few",
             (38.06, 28.10)),
    _against("s3pt-over-cribo", "2", "S3PT is better than CrIBo", "s3pt", "s3pt-cribo",
             (42.13, 37.94)),
    _against("s3pt-over-dino", "2", "S3PT is better than DINO", "s3pt", "s3pt-dino",
             (42.13, 35.27)),
    _against("cribo-over-dino-linear", "2", "CrIBo is better than DINO", "s3pt-cribo", "s3pt-dino",
             (37.94, 35.27)),
    _against("dino-over-cribo-mask", "2", "DINO is better than CrIBo under the mask transformer",
             "s3pt-dino", "s3pt-cribo", (58.19, 50.31), "mask"),
    _against("s3pt-scenes", "F7", "all scenes are better than a quarter, as many steps", "s3pt",
             "s3pt-quarter", None),
    _against("s3pt-rare", "F8", "S3PT is better than CrIBo on the four rarest classes", "s3pt",
             "s3pt-cribo", None, classes=RARE),
    _against("s3pt-transfer", "3", "S3PT's head transfers to Cityscapes better than CrIBo's",
             "s3pt", "s3pt-cribo", (22.57, 18.61), "transfer"),
    _against("s3pt-over-random", "-", "S3PT is better than the same network untrained", "s3pt",
             "s3pt-random", None),
    _against("s3pt-over-mae", "-", "S3PT is better than the masked autoencoder of the demo", "s3pt",
             "base", None),
    _against("s3pt-cd", "-", "collaborative distillation that begins from S3PT's encoder helps it",
             "s3pt-stage2", "s3pt", None),
    *(Claim(f"{name}-converged", "-", f"the probe of {words} has converged: twice its epochs give "
            "the same", Number(name, "seg-twice", OCCURRING), Number(name, "seg", OCCURRING), None,
            "the same")
      for name, words in (("s3pt", "S3PT"), ("s3pt-cribo", "CrIBo"), ("s3pt-dino", "DINO"))),
)
