"""The miniature world: a small, ray-cast driving world, written as a genuine nuScenes dataset.

It embeds what collaborative distillation is about: LiDAR tells the classes apart in every condition, while day-clear,
day-rain and night pictures of a street differ in appearance (light, colour, contrast, haze) more than in content.
`street.py` says what stands in a street, `optics.py` how the sensors see it; here stand scenes, poses and files.

    python miniature/world.py --out data/world-1 --seed 1                                   # 820 scenes, 1640 frames
    python miniature/world.py --out data/tiny --seed 1 --train 4 2 2 --val 2                # a look at it
    python miniature/world.py --out data/ring --cameras 6 --lidar-fov 360 --azimuths 640    # all around
    python miniature/world.py --out data/images-1 --dataset nuimages                        # its pictures, as nuImages

Everything in a scene is a function of the seed, its split, its number and its condition, so the same arguments give
the same bytes. The three scenes of a validation layout share street and poses.
"""
import base64
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as run_lengths
from pyquaternion import Quaternion
from scipy.ndimage import label as connected_parts

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script: the repository's root
from plumbing.arguments import COUNT, SEED, WORKERS, Parser, real, whole  # noqa: E402
from errors import InputError, one_line_errors  # noqa: E402
from miniature.optics import draw_weather, lidar_rig, render, scan  # noqa: E402
from miniature.street import BARRIER, BUS, CAR, CATEGORIES, LANE, PEDESTRIAN, ROAD, TRUCK, Street  # noqa: E402

FORMAT = 1  # of the content: count up when the same arguments give other bytes
VERSION = "v1.0-trainval"  # of nuScenes; nuImages has v1.0-train and v1.0-val
CONDITIONS = ("day-clear", "day-rain", "night")
TABLES = ("attribute calibrated_sensor category ego_pose instance lidarseg log map sample sample_annotation sample_data "
          "scene sensor visibility").split()
NUIMAGES_TABLES = "attribute calibrated_sensor category ego_pose log object_ann sample sample_data sensor surface_ann".split()
NUIMAGES_OBJECTS = [name for name in CATEGORIES if name.startswith(("animal", "human", "movable", "static_object", "vehicle"))
                    and name != "vehicle.ego"]
CAMERAS = {"CAM_FRONT": (0, 1.70, 0.0, 1.51), "CAM_FRONT_LEFT": (55, 1.52, 0.49, 1.51),  # yaw, degrees; x, y, z, m
           "CAM_FRONT_RIGHT": (-55, 1.55, -0.49, 1.50), "CAM_BACK": (-180, 0.03, 0.0, 1.58),
           "CAM_BACK_LEFT": (110, 1.04, 0.48, 1.59), "CAM_BACK_RIGHT": (-110, 1.01, -0.48, 1.56)}


# ---------------------------------------------------------------- scenes
def about(axis, degrees):
    return Quaternion(axis=np.eye(3)["xyz".index(axis)], degrees=degrees)


def plan_scene(options, split, number, condition):
    """Street, weather, sensors and, per keyframe and channel, time (microseconds) and poses of one scene."""
    seed = [options["seed"], int(split == "val"), number // len(CONDITIONS) if split == "val" else number]
    rng = np.random.default_rng([*seed, 0])  # what the conditions of a layout share
    stops = np.concatenate([[0], np.cumsum(rng.uniform(8, 20, options["frames"] - 1))])  # of the keyframes, m
    street = Street(rng, stops[-1])
    city, origin, speed = rng.uniform(0, 360), np.append(rng.uniform(300, 1800, 2), 0), rng.uniform(4, 11)
    sway = rng.normal(0, (1.5, .3, .3), (len(stops), 3))  # of the ego: yaw, pitch, roll, degrees
    sensors = {"LIDAR_TOP": (np.array([.94, 0, 1.84]), about("z", -90), 0.)}  # place, rotation, seconds after the LiDAR
    for channel in list(CAMERAS)[:options["cameras"]]:
        yaw, *at = CAMERAS[channel]
        sensors[channel] = np.array(at), about("z", yaw) * Quaternion(.5, -.5, .5, -.5), -.035 - .00014 * yaw
    for channel, (at, turn, late) in sensors.items():  # nothing is mounted quite straight
        sensors[channel] = at, about("z", rng.normal(0, .2)) * about("y", rng.normal(0, .2)) * turn, late

    rng = np.random.default_rng([*seed, 1 + CONDITIONS.index(condition)])
    weather = draw_weather(rng, condition)
    day, slot = divmod(number + 700 * (split == "val"), 20)
    start = datetime(2018, 7, 2, 20 if condition == "night" else 11, tzinfo=timezone(timedelta(hours=8)))
    start += timedelta(days=day, minutes=8 * slot, microseconds=int(rng.integers(60_000_000)))
    frames = []
    for stop, (yaw, pitch, roll) in zip(stops, sway):
        views = {}
        for channel, (at, turn, late) in sensors.items():
            x = stop + late * speed
            place = np.array([x, street.middle(x) - LANE / 2, 0])
            body = about("z", np.degrees(street.heading(x)) + yaw) * about("y", pitch) * about("x", roll)
            views[channel] = dict(
                time=round((start + timedelta(seconds=float(stop / speed + late))).timestamp() * 1e6),
                turn=(body * turn).rotation_matrix, eye=place + body.rotate(at),
                ahead=body.rotate(np.array([1., 0, 0])).astype(np.float32),
                pose=dict(rotation=(about("z", city) * body).elements.tolist(),
                          translation=(about("z", city).rotate(place) + origin).tolist()))
        frames.append(views)
    return dict(street=street, weather=weather, sensors=sensors, frames=frames, condition=condition, seed=seed)


def noise_of(plan, frame, sensor):
    """The generator of one sensor's noise at one keyframe."""
    return np.random.default_rng([*plan["seed"], 1 + CONDITIONS.index(plan["condition"]), frame, sensor])


def picture(options, plan, frame, channel):
    """One camera's picture uint8 [H, W, 3], fine class (0: sky) [H, W] and depth in m [H, W] at its pixels' centres."""
    view = plan["frames"][frame][channel]
    rng = noise_of(plan, frame, 1 + [*CAMERAS].index(channel))
    return render(plan["street"], plan["condition"], plan["weather"], view["turn"], view["eye"], options["image_size"],
                  view["ahead"], rng)


def sweep(options, plan, frame):
    """The LiDAR's points float32 [N, 5] (x, y, z in m, intensity, ring) and fine classes uint8 [N] at one keyframe."""
    view = plan["frames"][frame]["LIDAR_TOP"]
    rig = lidar_rig(view["turn"], view["eye"], options["beams"], options["azimuths"], options["lidar_fov"])
    return scan(plan["street"], plan["condition"], rig, noise_of(plan, frame, 0))


def describe(plan):
    """A description in nuScenes' manner, from which the condition is read: night, else rain, else day-clear."""
    names = {CAR: "parked cars", TRUCK: "truck", BUS: "bus", PEDESTRIAN: "peds on sidewalk", BARRIER: "barriers"}
    things = plan["street"].things
    near = np.abs(things["at"][:, 0] - plan["street"].length - 15) < 15
    words = [word for kind, word in names.items() if kind in things["kind"][near]]
    words += ["intersection"] * (0 < plan["street"].cross_half) + ["street lamps"] * (len(plan["street"].lamps) > 6)
    text = ", ".join(words) or "empty street"
    return {"day-clear": text.capitalize(), "day-rain": f"Rain, {text}", "night": f"Night, {text}"}[plan["condition"]]


# ---------------------------------------------------------------- files
def write_scene(job):
    """Write one scene's pictures, sweeps and labels below `out`; returns its rows of the tables."""
    out, options, split, number, condition, name = job
    plan = plan_scene(options, split, number, condition)
    height, width = options["image_size"]
    first = datetime.fromtimestamp(plan["frames"][0]["LIDAR_TOP"]["time"] / 1e6, timezone(timedelta(hours=8)))
    vehicle, rows = ("n008", "n015")[number % 2], {table: [] for table in TABLES}

    def token(*parts):
        return hashlib.md5("/".join(map(str, (options["seed"], name, *parts))).encode()).hexdigest()

    def linked(kind, *parts):
        """Tokens of the keyframe before and of the one after; nuScenes writes an empty string at the ends."""
        return lambda k: dict(prev=token(kind, k - 1, *parts) if k else "",
                              next=token(kind, k + 1, *parts) if k + 1 < len(plan["frames"]) else "")

    log = dict(token=token("log"), logfile=f"{vehicle}-{first:%Y-%m-%d-%H-%M-%S}+0800", vehicle=vehicle,
               date_captured=f"{first:%Y-%m-%d}", location="singapore-onenorth")
    rows["log"].append(log)
    rows["scene"].append(dict(token=token("scene"), log_token=log["token"], nbr_samples=len(plan["frames"]), name=name,
                              first_sample_token=token("sample", 0), description=describe(plan),
                              last_sample_token=token("sample", len(plan["frames"]) - 1)))
    for channel, (at, turn, _) in plan["sensors"].items():
        rows["calibrated_sensor"].append(dict(
            token=token("calibration", channel), sensor_token=sensor_token(channel), translation=at.tolist(),
            rotation=turn.elements.tolist(), camera_intrinsic=[] if channel == "LIDAR_TOP" else intrinsic(width, height)))
    for k, views in enumerate(plan["frames"]):
        rows["sample"].append(dict(token=token("sample", k), timestamp=views["LIDAR_TOP"]["time"],
                                   scene_token=token("scene"), **linked("sample")(k)))
        for channel, view in views.items():
            key, lidar = token("data", k, channel), channel == "LIDAR_TOP"
            file = f"samples/{channel}/{log['logfile']}__{channel}__{view['time']}.{'pcd.bin' if lidar else 'jpg'}"
            if lidar:
                points, kinds = sweep(options, plan, k)
                points.tofile(out / file)
                labels = f"lidarseg/{VERSION}/{key}_lidarseg.bin"
                kinds.tofile(out / labels)
                rows["lidarseg"].append(dict(token=key, sample_data_token=key, filename=labels))
            else:
                Image.fromarray(picture(options, plan, k, channel)[0]).save(out / file, quality=92, subsampling=0)
            rows["ego_pose"].append(dict(token=key, timestamp=view["time"], **view["pose"]))
            rows["sample_data"].append(dict(
                token=key, sample_token=token("sample", k), ego_pose_token=key, timestamp=view["time"],
                calibrated_sensor_token=token("calibration", channel), fileformat="pcd" if lidar else "jpg",
                is_key_frame=True, height=0 if lidar else height, width=0 if lidar else width, filename=file,
                **linked("data", channel)(k)))
    return rows


def write_images(job):
    """Write one scene's pictures as nuImages; returns its rows of the tables. Each picture is a sample of its own."""
    out, options, split, number, condition, name = job
    plan = plan_scene(options, split, number, condition)
    height, width = options["image_size"]
    first = datetime.fromtimestamp(plan["frames"][0]["LIDAR_TOP"]["time"] / 1e6, timezone(timedelta(hours=8)))
    rows = {table: [] for table in NUIMAGES_TABLES}

    def token(*parts):
        return hashlib.md5("/".join(map(str, (options["seed"], "nuimages", name, *parts))).encode()).hexdigest()

    log = dict(token=token("log"), logfile=f"n013-{first:%Y-%m-%d-%H-%M-%S}+0800", vehicle="n013",
               date_captured=f"{first:%Y-%m-%d}", location="singapore-onenorth")
    rows["log"].append(log)
    for channel in list(CAMERAS)[:options["cameras"]]:
        at, turn, _ = plan["sensors"][channel]
        rows["calibrated_sensor"].append(dict(
            token=token("calibration", channel), sensor_token=sensor_token(channel), translation=at.tolist(),
            rotation=turn.elements.tolist(), camera_intrinsic=intrinsic(width, height), camera_distortion=[0.] * 5))
        for k, views in enumerate(plan["frames"]):
            key, view = token("data", k, channel), views[channel]
            file = f"samples/{channel}/{log['logfile']}__{channel}__{view['time']}.jpg"
            colors, kinds, _ = picture(options, plan, k, channel)
            Image.fromarray(colors).save(out / file, quality=92, subsampling=0)
            rows["ego_pose"].append(dict(token=key, timestamp=view["time"], **view["pose"], speed=0., acceleration=[0.] * 3,
                                         rotation_rate=[0.] * 3))
            rows["sample"].append(dict(token=token("sample", k, channel), timestamp=view["time"], log_token=log["token"],
                                       key_camera_token=key))
            rows["sample_data"].append(dict(
                token=key, sample_token=token("sample", k, channel), ego_pose_token=key, timestamp=view["time"], prev="", next="",
                calibrated_sensor_token=token("calibration", channel), fileformat="jpg", is_key_frame=True, height=height,
                width=width, filename=file))
            for kind in np.unique(kinds):
                common = dict(sample_data_token=key, category_token=sensor_token(CATEGORIES[kind]))
                if kind == ROAD:
                    rows["surface_ann"].append(dict(token=token("surface", k, channel), mask=packed(kinds == kind), **common))
                elif CATEGORIES[kind] in NUIMAGES_OBJECTS:
                    parts, count = connected_parts(kinds == kind)  # two cars that overlap in the picture are one annotation
                    for part in range(1, count + 1):
                        ys, xs = np.nonzero(parts == part)
                        rows["object_ann"].append(dict(
                            token=token("object", k, channel, kind, part), mask=packed(parts == part), attribute_tokens=[],
                            bbox=[int(v) for v in (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)], **common))
    return rows


def packed(mask):
    """A mask [H, W] as nuImages stores it: its run lengths as pycocotools packs them, in base64."""
    runs = run_lengths.encode(np.asfortranarray(mask, np.uint8))
    return dict(size=list(mask.shape), counts=base64.b64encode(runs["counts"]).decode())


def intrinsic(width, height):
    """A camera's matrix: 90 degrees from left to right."""
    return [[width / 2, 0., (width - 1) / 2], [0., width / 2, (height - 1) / 2], [0., 0., 1.]]


def sensor_token(channel):
    return hashlib.md5(channel.encode()).hexdigest()


def list_jobs(out, options):
    """One job per scene. The training conditions are interleaved, so that any prefix of the names holds its share."""
    from nuscenes.utils import splits  # slow to import, and no worker needs it
    train = sorted((((k + .5) / count, c) for c, count in enumerate(options["train"]) for k in range(count)))
    names = {"train": splits.train, "val": splits.val}
    conditions = {"train": [CONDITIONS[c] for _, c in train], "val": list(CONDITIONS) * options["val"]}
    for split in names:
        asked, there = len(conditions[split]), len(names[split])
        if asked > there:
            note = " (three per layout)" if split == "val" else ""
            raise InputError(f"--{split} asks for {asked} scenes{note}, nuScenes has {there} {split} names; ask for fewer")
    return [(out, options, split, number, condition, names[split][number])
            for split in ("train", "val") for number, condition in enumerate(conditions[split])]


def make_world(out, seed=1, train=(400, 150, 150), val=40, frames=2, image_size=(80, 160), beams=32, azimuths=180,
               lidar_fov=100., cameras=1, workers=None, dataset="nuscenes"):
    """Write the dataset below `out`, or do nothing if it is there already. Returns `out` as a Path."""
    out, workers = Path(out), workers or os.cpu_count()
    options = dict(format=FORMAT, seed=seed, train=list(train), val=val, frames=frames, image_size=list(image_size),
                   beams=beams, azimuths=azimuths, lidar_fov=float(lidar_fov), cameras=cameras)
    as_images = dataset == "nuimages"
    if as_images:
        options["dataset"] = dataset
    for flag, good in (("seed", seed >= 0), ("train", len(train) == 3 and min(train) >= 0), ("val", val >= 0),
                       ("frames", frames >= 1), ("image-size", min(image_size) >= 16), ("beams", beams >= 2),
                       ("azimuths", azimuths >= 2), ("lidar-fov", 0 < lidar_fov <= 360), ("cameras", 1 <= cameras <= 6)):
        if not good:
            raise InputError(f"--{flag}: {options[flag.replace('-', '_')]} is out of range; see --help")
    jobs = list_jobs(out, options)
    if not jobs:
        raise InputError("--train and --val ask for no scene at all")
    done, begun = out / "world.json", out / "world.unfinished.json"
    if done.exists():
        try:
            there = json.loads(done.read_text())
        except ValueError:
            raise InputError(f"{done}: damaged; remove the folder {out}, or give another --out") from None
        if there != options:
            differ = ", ".join(f"{key} {there.get(key)} there, {options.get(key)} now" for key in options | there
                               if there.get(key) != options.get(key))
            raise InputError(f"{out} holds a world made with other arguments ({differ}): another --out, or remove it")
        print(f"{out}: finished already, nothing to do")
        return out
    if begun.exists():
        print(f"{out}: unfinished, written again")
        for folder in ("samples", "lidarseg", "maps", VERSION, "v1.0-train", "v1.0-val"):
            shutil.rmtree(out / folder, ignore_errors=True)
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is no world of this script; give another --out")

    channels = ["LIDAR_TOP", *list(CAMERAS)[:cameras]][as_images:]
    versions = sorted({f"v1.0-{job[2]}" if as_images else VERSION for job in jobs})
    for folder in (*versions, *(f"samples/{channel}" for channel in channels), *(["maps", f"lidarseg/{VERSION}"] * (not as_images))):
        (out / folder).mkdir(parents=True, exist_ok=True)
    begun.write_text(json.dumps(options))
    start, write = time.time(), write_images if as_images else write_scene
    tables = {version: {table: [] for table in (NUIMAGES_TABLES if as_images else TABLES)} for version in versions}
    with multiprocessing.get_context("spawn").Pool(workers) if workers > 1 else SerialPool() as pool:
        for number, rows in enumerate(pool.imap(write, jobs, chunksize=4), 1):
            of_version = tables[f"v1.0-{jobs[number - 1][2]}" if as_images else VERSION]
            for table in rows:
                of_version[table] += rows[table]
            if number % 100 == 0 or number == len(jobs):
                print(f"{out}: {number} of {len(jobs)} scenes, {time.time() - start:.0f} s", flush=True)
    for version, of_version in tables.items():
        finish_tables(out, of_version, channels, as_images)
        for table, content in of_version.items():
            (out / version / f"{table}.json").write_text(json.dumps(content, indent=0))
    begun.replace(done)  # last: now it is finished
    return out


def finish_tables(out, tables, channels, as_images):
    """Fill the tables that are not about one scene."""
    tables["sensor"] = [dict(token=sensor_token(channel), channel=channel, modality="camera" if channel in CAMERAS else "lidar")
                        for channel in channels]
    tables["category"] = [dict(token=sensor_token(name), name=name, description="", index=index)
                          for index, name in enumerate(CATEGORIES)]
    if as_images:
        names = {*NUIMAGES_OBJECTS, "flat.driveable_surface", "vehicle.ego"}  # its categories have no index
        tables["category"] = [dict(token=sensor_token(name), name=name, description="") for name in CATEGORIES if name in names]
        return
    Image.new("L", (8, 8)).save(out / "maps/blank.png")
    tables["visibility"] = [dict(token=str(k), level=level, description="")
                            for k, level in enumerate(("v0-40", "v40-60", "v60-80", "v80-100"), 1)]
    tables["map"] = [dict(token=sensor_token("map"), category="semantic_prior", filename="maps/blank.png",
                          log_tokens=[log["token"] for log in tables["log"]])]


class SerialPool:
    """The part of a process pool that is needed here, in this process."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def imap(self, function, jobs, chunksize):
        return map(function, jobs)


@one_line_errors
def main():
    parser = Parser(__doc__)
    parser.add_argument("--out", required=True, help="folder of the dataset; opens as nuScenes v1.0-trainval, or as nuImages")
    parser.add_argument("--dataset", choices=("nuscenes", "nuimages"), default="nuscenes",
                        help="nuimages: v1.0-train and v1.0-val, pictures with masks of objects and road (default: nuscenes)")
    parser.add_argument("--seed", type=SEED, default=1, help="another seed is another world (default 1)")
    parser.add_argument("--train", type=whole(0), nargs=3, default=(400, 150, 150), metavar=("DAY", "RAIN", "NIGHT"),
                        help="training scenes per condition, at most 700 in all (default 400 150 150)")
    parser.add_argument("--val", type=whole(0), default=40,
                        help="validation layouts, each in all three conditions; at most 50 (default 40)")
    parser.add_argument("--frames", type=COUNT, default=2, help="keyframes per scene, 8 to 20 m apart (default 2)")
    parser.add_argument("--image-size", type=COUNT, nargs=2, default=(80, 160), metavar=("H", "W"),
                        help="pixels; the horizontal field of view is 90 degrees (default 80 160)")
    parser.add_argument("--beams", type=whole(2), default=32, help="LiDAR beams from -30.67 to 10.67 degrees (default 32)")
    parser.add_argument("--azimuths", type=whole(2), default=180, help="LiDAR steps over its field of view (default 180)")
    parser.add_argument("--lidar-fov", type=real(1, 360), default=100.,
                        help="LiDAR's field of view around the front, degrees (default 100)")
    parser.add_argument("--cameras", type=whole(1, 6), default=1,
                        help="1 to 6, in this order: " + ", ".join(CAMERAS) + " (default 1)")
    parser.add_argument("--workers", type=WORKERS, help="processes; the result does not depend on it (default: one per core)")
    make_world(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
