"""The miniature world: a small, ray-cast driving world, written in a genuine dataset's layout.

It embeds what collaborative distillation is about: LiDAR tells the classes apart in every
condition, while day-clear, day-rain and night pictures of a street differ in appearance (light,
colour, contrast, haze) more than in content.

    python miniature/world.py --out data/world-1 --seed 1              # 820 scenes, 1640 frames
    python miniature/world.py --out data/tiny --train 4 2 2 --val 2    # a look at it
    python miniature/world.py --out data/images-1 --dataset nuimages   # its pictures, as nuImages
    python miniature/world.py --out data/ring --cameras 6 --lidar-fov 360 --azimuths 640
    python miniature/world.py --dataset semantickitti --out data/kitti-1   # or pandaset, ...

Everything in a scene is a function of the seed, its split, its number and its condition, so the
same arguments give the same bytes. The three scenes of a validation layout share street and poses.
SemanticKITTI, PandaSet, SemanticPOSS and Cityscapes have other streets and other sensors, and clear
days only.

`ground.py` and `street.py` say what stands in a street; `rays.py`, `shading.py` and `optics.py` how
the sensors see it; `scenes.py` where the ego drives and when; `domains.py` what differs between the
datasets; each dataset's own file writes it.
"""
import json
import multiprocessing
import os
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where it is run as a script
from miniature import (cityscapes_files, nuimages_tables, nuscenes_tables,  # noqa: E402
                       pandaset_scenes, semantickitti_sequences, semanticposs_sequences)
from miniature.domains import CONDITIONS, DOMAINS, domain_of  # noqa: E402
from plumbing.arguments import COUNT, SEED, WORKERS, Parser, real, whole  # noqa: E402
from plumbing.errors import InputError, one_line_errors  # noqa: E402

FORMAT = 1  # of the content: count up when the same arguments give other bytes
LAYOUTS = {"nuscenes": nuscenes_tables, "nuimages": nuimages_tables,
           "semantickitti": semantickitti_sequences, "pandaset": pandaset_scenes,
           "semanticposs": semanticposs_sequences, "cityscapes": cityscapes_files}
# what an unfinished world may consist of
FOLDERS = ("samples", "lidarseg", "maps", "v1.0-*", "dataset", "[0-9][0-9][0-9]", "leftImg8bit",
           "gtFine")


# ---- arguments -----------------------------------------------------------------------------------
def options_of(dataset, seed, given):
    """All options, as world.json has them, from those that were given: others are None."""
    domain = DOMAINS[dataset]
    unknown = given.keys() - domain["defaults"].keys()
    if unknown:
        raise TypeError(f"a world has no option {', '.join(unknown)}")
    given = {name: value for name, value in given.items() if value is not None}
    for name, reason in domain["refused"].items():
        if given.get(name, domain["defaults"][name]) != domain["defaults"][name]:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag}: not for --dataset {dataset}, {reason}; leave it out")
    options = dict(format=FORMAT, seed=seed, train=0, val=0, frames=0)  # for their order
    options |= domain["defaults"] | given
    for name in ("train", "image_size"):
        options[name] = list(options[name])
    if len(domain["conditions"]) == 1 and options["train"][1:] != [0, 0]:
        options["train"] = [sum(options["train"]), 0, 0]
        print(f"--train: {dataset} states no weather, so all {options['train'][0]} have clear days")
    options["lidar_fov"] = float(options["lidar_fov"])
    if dataset != "nuscenes":
        options["dataset"] = dataset
    return options


def check(options):
    """Refuse options that are out of range, as the command line does."""
    domain = domain_of(options)
    good = dict(
        seed=options["seed"] >= 0,
        train=len(options["train"]) == 3 and min(options["train"]) >= 0,
        val=options["val"] >= 0,
        frames=options["frames"] >= 1,
        image_size=min(options["image_size"]) >= 16,
        beams=options["beams"] >= 2,
        azimuths=options["azimuths"] >= 2,
        lidar_fov=0 < options["lidar_fov"] <= 360,
        cameras=min(1, len(domain["cameras"])) <= options["cameras"] <= len(domain["cameras"]))
    for name, fine in good.items():
        if not fine:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag}: {options[name]} is out of range; see --help")


def interleaved(counts):
    """The conditions of the training scenes, so that any prefix of the names holds its share."""
    places = []
    for condition, count in enumerate(counts):
        places += [((k + .5) / count, condition) for k in range(count)]
    return [CONDITIONS[condition] for _, condition in sorted(places)]


def list_jobs(out, options):
    """One job per scene: (out, options, split, number in the split, condition, name)."""
    domain, dataset = domain_of(options), options.get("dataset", "nuscenes")
    names = LAYOUTS[dataset].names_of(options)
    conditions = {"train": interleaved(options["train"]) + ["day-clear"] * domain["unlabelled"],
                  "val": list(domain["conditions"]) * options["val"]}
    jobs = []
    for split in ("train", "val"):
        asked, there = len(conditions[split]), len(names[split])
        if asked > there:
            several = split == "val" and len(domain["conditions"]) > 1
            note = " (three per layout)" if several else ""
            raise InputError(f"--{split} asks for {asked} scenes{note}, "
                             f"{dataset} has {there} {split} names; ask for fewer")
        for number, condition in enumerate(conditions[split]):
            jobs.append((out, options, split, number, condition, names[split][number]))
    return jobs


# ---- files ---------------------------------------------------------------------------------------
def make_world(out, seed=1, workers=None, dataset="nuscenes", **given):
    """Write the dataset below `out`, or do nothing if it is there already. Returns `out` as a Path.

    given: of train, val, frames, image_size, beams, azimuths, lidar_fov and cameras those that are
    not the dataset's default. The command line's help says what the arguments mean.
    Raises InputError if an argument is out of range or `out` holds something else.
    """
    out = Path(out)
    options = options_of(dataset, seed, given)
    check(options)
    jobs = list_jobs(out, options)
    if not any(options["train"]) and not options["val"]:
        raise InputError("--train and --val ask for no scene at all")

    # a finished world has a world.json, an unfinished one a world.unfinished.json
    done, begun = out / "world.json", out / "world.unfinished.json"
    if done.exists():
        refuse_other_arguments(out, done, options)
        print(f"{out}: finished already, nothing to do")
        return out
    if begun.exists():
        print(f"{out}: unfinished, written again")
        for pattern in FOLDERS:
            for folder in out.glob(pattern):
                shutil.rmtree(folder, ignore_errors=True)
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is no world of this script; give another --out")

    # the scenes' files, then the tables
    layout = LAYOUTS[dataset]
    versions = sorted({layout.version_of(split) for _, _, split, *_ in jobs})
    for folder in (*versions, *layout.folders_of(options)):
        (out / folder).mkdir(parents=True, exist_ok=True)
    begun.write_text(json.dumps(options))
    written = write_scenes(layout, versions, jobs, workers or os.cpu_count())
    for version, tables in written.items():
        for table, content in layout.finish(out, tables, options).items():
            (out / version / f"{table}.json").write_text(json.dumps(content, indent=0))
    begun.replace(done)  # last: now it is finished
    return out


def refuse_other_arguments(out, done, options):
    """Raise InputError if the finished world below `out` was made with other options."""
    try:
        there = json.loads(done.read_text())
    except ValueError:
        message = f"{done}: damaged; remove the folder {out}, or give another --out"
        raise InputError(message) from None
    if there != options:
        other = [key for key in options | there if there.get(key) != options.get(key)]
        differ = ", ".join(f"{key} {there.get(key)} there, {options.get(key)} now" for key in other)
        raise InputError(f"{out} holds a world made with other arguments ({differ}): "
                         "another --out, or remove it")


def write_scenes(layout, versions, jobs, workers):
    """Write all scenes' files. Returns {version: {table: rows}}."""
    out, start = jobs[0][0], time.time()
    tables = {version: {table: [] for table in layout.TABLES} for version in versions}
    for number, rows in enumerate(each_written(layout.write_scene, jobs, workers), 1):
        _, _, split, *_ = jobs[number - 1]
        for table in rows:
            tables[layout.version_of(split)][table] += rows[table]
        if number % 100 == 0 or number == len(jobs):
            seconds = time.time() - start
            print(f"{out}: {number} of {len(jobs)} scenes, {seconds:.0f} s", flush=True)
    return tables


def each_written(write, jobs, workers):
    """What `write` returns for each job, in the jobs' order; so many processes do the work."""
    if workers <= 1:
        yield from map(write, jobs)
        return
    # An executor tells of a process that dies, where a Pool would wait for ever
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context) as executor:
        yield from executor.map(write, jobs, chunksize=4)


@one_line_errors
def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--out", required=True, help="folder of the dataset")
    add("--dataset", choices=tuple(LAYOUTS), default="nuscenes",
        help="nuscenes: v1.0-trainval. nuimages: v1.0-train and v1.0-val, pictures with masks of "
             "objects and road. semantickitti, pandaset, semanticposs, cityscapes: as they are "
             "downloaded (default: nuscenes)")
    add("--seed", type=SEED, default=1, help="another seed is another world (default 1)")
    add("--train", type=whole(0), nargs=3, metavar=("DAY", "RAIN", "NIGHT"),
        help="training scenes per condition, of nuScenes at most 700 in all; of datasets that "
             f"state none all are by day (default 400 150 150{theirs('train')})")
    add("--val", type=whole(0),
        help="validation layouts, each in all conditions; of nuScenes at most 50 "
             f"(default 40{theirs('val')})")
    add("--frames", type=COUNT, help="keyframes per scene, 8 to 20 m apart (default 2)")
    add("--image-size", type=COUNT, nargs=2, metavar=("H", "W"), help="pixels (default 80 160)")
    add("--beams", type=whole(2),
        help="LiDAR beams between the device's lowest and highest one; PandaSet's second LiDAR has "
             f"5/8 of them (default 32{theirs('beams')})")
    add("--azimuths", type=whole(2),
        help="LiDAR steps over its field of view; PandaSet's second LiDAR has 2/5 of them "
             f"(default 180{theirs('azimuths')})")
    add("--lidar-fov", type=real(1, 360),
        help="LiDAR's field of view around the front, degrees; PandaSet's second LiDAR has 60 "
             f"(default 100{theirs('lidar_fov')})")
    for_each = "; ".join(", ".join(DOMAINS[name]["cameras"]) for name in ("nuscenes", "pandaset"))
    add("--cameras", type=whole(1, 6),
        help=f"1 to 6, in this order: {for_each} (default 1{theirs('cameras')})")
    add("--workers", type=WORKERS,
        help="processes; the result does not depend on it (default: one per core)")
    make_world(**vars(parser.parse_args()))


def theirs(option):
    """The other datasets' defaults of an option, where they are not nuScenes', for the help."""
    found = ""
    for name, domain in DOMAINS.items():
        value = domain["defaults"][option]
        if value and value != DOMAINS["nuscenes"]["defaults"][option]:
            value = " ".join(map(str, value)) if isinstance(value, list) else f"{value:g}"
            found += f", {name} {value}"
    return found


if __name__ == "__main__":
    main()
