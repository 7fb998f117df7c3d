"""S3PT's flags: the paper's tables read back from the parser, and what is refused before a run."""
import pytest

from plumbing.errors import InputError
from s3pt.clustering import Clustering
from s3pt.crops import Views
from s3pt.settings import parse

# Tables 5, 6 and 7, as they are printed: ViT-S, ViT-B
SHARED = {"batch": 256, "warmup_epochs": 10, "weight_decay": 0.04, "end_weight_decay": 0.4,
          "drop_path": 0.1, "momentum": 0.996, "hidden": 2048, "bottleneck": 256,
          "prototypes": 65536, "first_teacher_temp": 0.04, "teacher_temp": 0.07,
          "student_temp": 0.1, "crop": 224, "center_momentum": 0.9}
BY_SIZE = {"epochs": (500, 100), "lr": (5e-4, 7.5e-4), "freeze_epochs": (1, 3),
           "end_lr": (1e-5, 2e-6), "clip": (0, 0.3), "temp_epochs": (30, 50)}
TABLES = {
    "dino": BY_SIZE | {"local_crops": (10, 10), "scale": ([0.25, 1], [0.25, 1]),
                       "local_scale": ([0.05, 0.25],) * 2, "unit_prototypes": (False, True),
                       "vmf": (False, False), "center": ("logits", "logits")},
    "cribo": BY_SIZE | {"local_crops": (0, 0), "scale": ([0.25, 1], [0.32, 1]),
                        "unit_prototypes": (False, True), "sinkhorn_lambda": (20, 20),
                        "sinkhorn_steps": (5, 5), "alpha": (1, 1), "clusters": (32, 32),
                        "queue": (25000, 25000), "vmf": (False, False),
                        "center": ("logits", "logits"), "rounds": (5, 5), "beta": (0, 0)},
    "s3pt": BY_SIZE | {"local_crops": (0, 0), "scale": ([0.25, 1], [0.32, 1]),
                       "unit_prototypes": (False, False), "sinkhorn_lambda": (20, 20),
                       "sinkhorn_steps": (1, 1), "alpha": (1, 1), "clusters": (128, 128),
                       "queue": (2500, 2500), "vmf": (True, True), "rounds": (5, 5),
                       "beta": (4, 4),
                       "center": ("probability", "probability")}}
RUN = ["--data", "x", "--out", "y"]


def parsed(*more):
    return parse("", [*RUN, *more])


@pytest.mark.parametrize("objective", TABLES)
def test_the_defaults_are_the_papers_tables(objective):
    for column, encoder in enumerate(("vit_small16", "vit_base16")):
        found = vars(parsed("--objective", objective, "--encoder", encoder))
        of_table = SHARED | {name: values[column] for name, values in TABLES[objective].items()}
        assert {name: found[name] for name in of_table} == of_table, encoder


def test_the_defaults_of_crops_and_clusters_are_the_scripts():
    args = parsed()
    assert Clustering(*(getattr(args, name) for name in Clustering._fields)) == Clustering()
    settled = {name: getattr(args, name) for name in Views._fields if hasattr(args, name)}
    settled = {name: tuple(v) if isinstance(v, list) else v for name, v in settled.items()}
    assert {name: getattr(Views(), name) for name in settled} == settled and len(settled) >= 6


def test_the_bare_command_is_s3pt_with_vit_small():
    assert vars(parsed()) == vars(parsed("--objective", "s3pt", "--encoder", "vit_small16"))
    assert parsed().split == "all"
    assert parsed().depth_fill == "fast"


def test_patches_of_32_pixels_have_fewer_clusters():
    assert parsed("--encoder", "vit_small32").clusters == 32


def test_each_row_of_table_1_is_one_command():
    """From CrIBo, one change after the other."""
    cribo = ["--objective", "cribo", "--epochs", "100"]
    vmf = [*cribo, "--vmf", "--center", "probability"]
    few = [*vmf, "--sinkhorn-steps", "1", "--clusters", "128"]
    last = parsed(*few, "--beta", "4", "--queue", "2500")
    s3pt = parsed("--epochs", "100")
    differ = {name for name, value in vars(last).items() if vars(s3pt)[name] != value}
    assert differ == {"objective", "beta_given"}


def test_what_is_given_stays():
    args = parsed("--no-vmf", "--clusters", "7", "--scale", "0.3", "0.5", "--clip", "0",
                  "--encoder", "vit_base16")
    assert (args.vmf, args.clusters, args.scale, args.clip) == (False, 7, [0.3, 0.5], 0)


REFUSED = {
    "--encoder resnet": "vision transformers",
    "--encoder dino_resnet50": "vision transformers",
    "--clusters 393": "only 392 tokens",
    "--crop 100": "patches of 16",
    "--local-crops 2 --local-crop 90": "patches of 16",
    "--objective dino --beta 1": "--beta: --objective dino has no objects",
    "--objective dino --clusters 8": "--clusters: --objective dino has no objects",
    "--objective dino --depth-maps d": "--depth-maps: --objective dino has no objects",
    "--depth-maps d --beta 0": "--beta 0 makes no use",
    "--depth-fill fast --objective cribo": "--depth-fill: --beta 0 makes no use",
    "--depth-fill extended --depth-maps d": "--depth-fill: --depth-maps are complete",
    "--local-crop 64": "--local-crop: there are no --local-crops",
    "--local-scale 0.1 0.2": "--local-scale: there are no --local-crops",
    "--scale 0.5 0.2": "smaller one comes first",
    "--local-crops 2 --local-scale 0.5 0.2": "smaller one comes first",
    "--scale 0.5 1.2": "--scale 1.2",
    "--bottleneck 16": "--no-vmf",
    "--queue 100": "smaller than --batch 256",
    "--percent 30": "--percent",
    "--momentum 1.5": "--momentum"}


@pytest.mark.parametrize("flags", REFUSED)
def test_what_cannot_be_is_refused_at_once(flags):
    with pytest.raises(InputError) as error:
        parsed(*flags.split())
    assert REFUSED[flags] in str(error.value)
    assert "\n" not in str(error.value)


def test_a_narrow_bottleneck_is_fine_without_vmf():
    assert parsed("--bottleneck", "16", "--no-vmf").bottleneck == 16
