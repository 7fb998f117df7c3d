"""The miniature world: a small, ray-cast driving world, written as a genuine nuScenes dataset.

It embeds what collaborative distillation is about: LiDAR tells the classes apart in every
condition, while day-clear, day-rain and night pictures of a street differ in appearance (light,
colour, contrast, haze) more than in content.

    python miniature/world.py --out data/world-1 --seed 1              # 820 scenes, 1640 frames
    python miniature/world.py --out data/tiny --train 4 2 2 --val 2    # a look at it
    python miniature/world.py --out data/images-1 --dataset nuimages   # its pictures, as nuImages
    python miniature/world.py --out data/ring --cameras 6 --lidar-fov 360 --azimuths 640

Everything in a scene is a function of the seed, its split, its number and its condition, so the
same arguments give the same bytes. The three scenes of a validation layout share street and poses.

`ground.py` and `street.py` say what stands in a street; `rays.py`, `shading.py` and `optics.py` how
the sensors see it; `scenes.py` where the ego drives and when; `nuscenes_tables.py` and
`nuimages_tables.py` write it.
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
from miniature import nuimages_tables, nuscenes_tables  # noqa: E402
from miniature.scenes import CAMERAS, CONDITIONS  # noqa: E402
from plumbing.arguments import COUNT, SEED, WORKERS, Parser, real, whole  # noqa: E402
from plumbing.errors import InputError, one_line_errors  # noqa: E402

FORMAT = 1  # of the content: count up when the same arguments give other bytes
LAYOUTS = {"nuscenes": nuscenes_tables, "nuimages": nuimages_tables}


# ---- arguments -----------------------------------------------------------------------------------
def sensor_options(image_size=(80, 160), beams=32, azimuths=180, lidar_fov=100., cameras=1):
    """The part of the options that is about the sensors."""
    return dict(image_size=list(image_size), beams=beams, azimuths=azimuths,
                lidar_fov=float(lidar_fov), cameras=cameras)


def check(options):
    """Refuse options that are out of range, as the command line does."""
    good = dict(
        seed=options["seed"] >= 0,
        train=len(options["train"]) == 3 and min(options["train"]) >= 0,
        val=options["val"] >= 0,
        frames=options["frames"] >= 1,
        image_size=min(options["image_size"]) >= 16,
        beams=options["beams"] >= 2,
        azimuths=options["azimuths"] >= 2,
        lidar_fov=0 < options["lidar_fov"] <= 360,
        cameras=1 <= options["cameras"] <= len(CAMERAS))
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
    from nuscenes.utils import splits  # slow to import, and no worker needs it
    names = {"train": splits.train, "val": splits.val}
    conditions = {"train": interleaved(options["train"]),
                  "val": list(CONDITIONS) * options["val"]}
    jobs = []
    for split in ("train", "val"):
        asked, there = len(conditions[split]), len(names[split])
        if asked > there:
            note = " (three per layout)" if split == "val" else ""
            raise InputError(f"--{split} asks for {asked} scenes{note}, "
                             f"nuScenes has {there} {split} names; ask for fewer")
        for number, condition in enumerate(conditions[split]):
            jobs.append((out, options, split, number, condition, names[split][number]))
    return jobs


# ---- files ---------------------------------------------------------------------------------------
def make_world(out, seed=1, train=(400, 150, 150), val=40, frames=2, workers=None,
               dataset="nuscenes", **sensors):
    """Write the dataset below `out`, or do nothing if it is there already. Returns `out` as a Path.

    sensors: see `sensor_options`. The command line's help says what the arguments mean.
    Raises InputError if an argument is out of range or `out` holds something else.
    """
    out = Path(out)
    options = dict(format=FORMAT, seed=seed, train=list(train), val=val, frames=frames,
                   **sensor_options(**sensors))
    if dataset != "nuscenes":
        options["dataset"] = dataset
    check(options)
    jobs = list_jobs(out, options)
    if not jobs:
        raise InputError("--train and --val ask for no scene at all")

    # a finished world has a world.json, an unfinished one a world.unfinished.json
    done, begun = out / "world.json", out / "world.unfinished.json"
    if done.exists():
        refuse_other_arguments(out, done, options)
        print(f"{out}: finished already, nothing to do")
        return out
    if begun.exists():
        print(f"{out}: unfinished, written again")
        for folder in ("samples", "lidarseg", "maps", "v1.0-trainval", "v1.0-train", "v1.0-val"):
            shutil.rmtree(out / folder, ignore_errors=True)
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
        layout.finish(out, tables, options)
        for table, content in tables.items():
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
    add("--out", required=True,
        help="folder of the dataset; opens as nuScenes v1.0-trainval, or as nuImages")
    add("--dataset", choices=tuple(LAYOUTS), default="nuscenes",
        help="nuimages: v1.0-train and v1.0-val, pictures with masks of objects and road "
             "(default: nuscenes)")
    add("--seed", type=SEED, default=1, help="another seed is another world (default 1)")
    add("--train", type=whole(0), nargs=3, default=(400, 150, 150),
        metavar=("DAY", "RAIN", "NIGHT"),
        help="training scenes per condition, at most 700 in all (default 400 150 150)")
    add("--val", type=whole(0), default=40,
        help="validation layouts, each in all three conditions; at most 50 (default 40)")
    add("--frames", type=COUNT, default=2,
        help="keyframes per scene, 8 to 20 m apart (default 2)")
    add("--image-size", type=COUNT, nargs=2, default=(80, 160), metavar=("H", "W"),
        help="pixels; the horizontal field of view is 90 degrees (default 80 160)")
    add("--beams", type=whole(2), default=32,
        help="LiDAR beams from -30.67 to 10.67 degrees (default 32)")
    add("--azimuths", type=whole(2), default=180,
        help="LiDAR steps over its field of view (default 180)")
    add("--lidar-fov", type=real(1, 360), default=100.,
        help="LiDAR's field of view around the front, degrees (default 100)")
    add("--cameras", type=whole(1, 6), default=1,
        help="1 to 6, in this order: " + ", ".join(CAMERAS) + " (default 1)")
    add("--workers", type=WORKERS,
        help="processes; the result does not depend on it (default: one per core)")
    make_world(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
