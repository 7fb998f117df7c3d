"""The miniature world in PandaSet's layout: scenes of two LiDARs and six cameras.

It has the same names as `nuscenes_tables.py`. Scans are in the world's frame, which begins where
the vehicle is at its scene's first frame. The vehicle's frame, x right, y forward and z up, has its
origin on the road.
"""
import json

import numpy as np
from PIL import Image
from pyquaternion import Quaternion

from miniature.domains import PANDASET
from miniature.pandaset_files import write_frame
from miniature.scenes import JPEG, about, picture, plan_scene, pose_of, sweep
from miniature.street import (BARRIER, BUS, CAR, MANMADE, PEDESTRIAN, ROAD, SIDEWALK, TERRAIN,
                              TRUCK, VEGETATION)

TABLES = ()
LIDARS = tuple(PANDASET["lidars"])
RAW = {VEGETATION: 5, TERRAIN: 6, ROAD: 7, SIDEWALK: 11, CAR: 13, TRUCK: 15, BUS: 23,
       PEDESTRIAN: 30, BARRIER: 35, MANMADE: 41}
NAMES = """Smoke, Exhaust, Spray or rain, Reflection, Vegetation, Ground, Road, Lane Line Marking,
Stop Line Marking, Other Road Marking, Sidewalk, Driveway, Car, Pickup Truck, Medium-sized Truck,
Semi-truck, Towed Object, Motorcycle, Other Vehicle - Construction Vehicle,
Other Vehicle - Uncommon, Other Vehicle - Pedicab, Emergency Vehicle, Bus,
Personal Mobility Device, Motorized Scooter, Bicycle, Train, Trolley, Tram / Subway, Pedestrian,
Pedestrian with Object, Animals - Bird, Animals - Other, Pylons, Road Barriers, Signs, Cones,
Construction Signs, Temporary Construction Barriers, Rolling Containers, Building,
Other Static Object""".replace("\n", " ").split(", ")  # of the raw ids from 1 on
# San Francisco trains, El Camino Real validates: readers tell them apart by the latitude
LATITUDE, LONGITUDE = {"train": 37.76, "val": 37.41}, -122.4
DEGREE = 111_195., 88_100.  # m in a degree of latitude and of longitude there
TURN = .1  # seconds of a sweep, at whose end it has its time


def version_of(split):
    """The folder of the tables; here the scenes' folders are in it."""
    return "."


def folders_of(options):
    """None beside the scenes', which `write_scene` makes."""
    return []


def names_of(options):
    """By split a name per scene: three digits with gaps, and the splits mixed, as in PandaSet."""
    counts = {"train": sum(options["train"]) + PANDASET["unlabelled"], "val": options["val"]}
    places = sorted(((k + .5) / count, split)
                    for split, count in counts.items() for k in range(count))
    names = {"train": [], "val": []}
    numbers = [number for number in range(1, 1000) if number % 4]
    for (_, split), number in zip(places, numbers):
        names[split].append(f"{number:03d}")
    return names


def write_scene(job):
    """Write one scene's files below `out`."""
    out, options, split, number, condition, name = job
    plan = plan_scene(options, split, number, condition)
    origin = plan["frames"][0][LIDARS[0]]["pose"]["translation"]
    cameras = list(PANDASET["cameras"])[:options["cameras"]]
    labelled = split == "val" or number < sum(options["train"])
    folders = ["lidar", "meta", *(f"camera/{camera}" for camera in cameras)]
    for folder in [*folders, "annotations/semseg"][:None if labelled else -1]:
        (out / name / folder).mkdir(parents=True)

    for k in range(options["frames"]):
        columns, kinds = frame_of(options, plan, k, origin)
        write_frame(out / name / f"lidar/{k:02d}.pkl.gz", columns, "index")
        if labelled:
            raw = np.zeros(256, np.int64)
            raw[list(RAW)] = list(RAW.values())
            file = out / name / f"annotations/semseg/{k:02d}.pkl.gz"
            write_frame(file, {"class": raw[kinds]})
        for camera in cameras:
            image, _, _ = picture(options, plan, k, camera)
            Image.fromarray(image).save(out / name / f"camera/{camera}/{k:02d}.jpg", **JPEG)

    for file, content in lists_of(options, plan, origin, cameras, LATITUDE[split]).items():
        (out / name / f"{file}.json").write_text(json.dumps(content))
    if labelled:
        classes = {str(k): text for k, text in enumerate(NAMES, 1)}
        file = out / name / "annotations/semseg/classes.json"
        file.write_text(json.dumps(classes, indent=2))
    return {}


def frame_of(options, plan, frame, origin):
    """A frame's columns {name: [N]} and fine classes [N]; the turning LiDAR's points come first."""
    parts = []
    for device, channel in enumerate(LIDARS):
        found = sweep(options, plan, frame, channel)
        turn, eye = pose_of(plan, frame, channel)
        place = found["place"] @ turn.T + (eye - origin)
        # step by step, as the device turns: from the back, around to the left
        _, steps = found["grid"]
        time = stamp(plan, frame, channel) - TURN + TURN * found["step"] / steps
        order = np.lexsort((found["beam"], found["step"]))
        part = dict(zip("xyz", place.T), i=found["intensity"], t=time,
                    d=np.full(len(place), device), kind=found["kind"])
        parts.append({key: value[order] for key, value in part.items()})
    columns = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    kinds = columns.pop("kind")
    return columns, kinds


def stamp(plan, frame, channel):
    """The time of a sensor's frame, seconds."""
    return plan["frames"][frame][channel]["time"] / 1e6


def pose_row(rotation, position):
    """A pose as PandaSet's lists have it: a quaternion and a place [3], m."""
    return dict(position=dict(zip("xyz", np.asarray(position).tolist())),
                heading=dict(zip("wxyz", rotation.elements.tolist())))


def lists_of(options, plan, origin, cameras, latitude):
    """{path without .json: content}: poses, times, intrinsics and GPS of a scene."""
    count = range(len(plan["frames"]))
    found = {}
    poses, gps = [], []
    for k in count:
        # the vehicle's pose, here with x to the right
        pose = plan["frames"][k][LIDARS[0]]["pose"]
        heading = Quaternion(pose["rotation"]) * about("z", -90)
        poses.append(pose_row(heading, np.subtract(pose["translation"], origin)))
        east, north, up = pose["translation"]
        ahead = heading.rotate([0., plan["speed"], 0.])
        gps.append(dict(lat=latitude + north / DEGREE[0], long=LONGITUDE + east / DEGREE[1],
                        height=3 + up, xvel=ahead[0], yvel=ahead[1]))
    times = [stamp(plan, k, LIDARS[0]) for k in count]
    found |= {"lidar/poses": poses, "lidar/timestamps": times, "meta/gps": gps,
              "meta/timestamps": times}
    height, width = options["image_size"]
    for camera in cameras:
        at, turn, _ = plan["sensors"][camera]
        focal = width / 2 / PANDASET["wide"][camera]
        poses = []
        for k in count:
            pose = plan["frames"][k][camera]["pose"]
            body = Quaternion(pose["rotation"])
            poses.append(pose_row(body * turn, body.rotate(at) + pose["translation"] - origin))
        found |= {f"camera/{camera}/poses": poses,
                  f"camera/{camera}/timestamps": [stamp(plan, k, camera) for k in count],
                  f"camera/{camera}/intrinsics": dict(
                      fx=focal, fy=focal, cx=(width - 1) / 2, cy=(height - 1) / 2)}
    return found


def finish(out, tables, options):
    """Nothing is left to do, and there are no tables."""
    return {}
