"""Scenes of the miniature world: where the ego drives, when, with which sensors, and what they see.

`options` are the arguments of `world.make_world` as it writes them into world.json.
"""
import hashlib
from datetime import datetime, timedelta, timezone

import numpy as np
from pyquaternion import Quaternion

from miniature.domains import CONDITIONS, NUSCENES, domain_of, intensity
from miniature.ground import LANE
from miniature.optics import render, scan
from miniature.rays import elevations, lidar_rig
from miniature.shading import draw_weather
from miniature.street import OFTEN, Street

CAMERAS = NUSCENES["cameras"]
SINGAPORE = timezone(timedelta(hours=8))
JPEG = dict(quality=92, subsampling=0)


# ---- plans ---------------------------------------------------------------------------------------
def about(axis, degrees):
    return Quaternion(axis=np.eye(3)["xyz".index(axis)], degrees=degrees)


def mount(domain, cameras, rng):
    """The sensors by channel: place on the vehicle [3], m; rotation; seconds after the LiDARs."""
    sensors = {}
    for channel, lidar in domain["lidars"].items():
        sensors[channel] = np.array(lidar["at"]), about("z", -90), 0.
    late, per_degree = domain["late"]
    for channel in list(domain["cameras"])[:cameras]:
        yaw, *at = domain["cameras"][channel]
        turn = about("z", yaw) * Quaternion(.5, -.5, .5, -.5)  # and from z up to z forward
        sensors[channel] = np.array(at), turn, late + per_degree * yaw
    # nothing is mounted quite straight
    for channel, (at, turn, late) in sensors.items():
        tilt = about("z", rng.normal(0, .2)) * about("y", rng.normal(0, .2))
        sensors[channel] = at, tilt * turn, late
    return sensors


def plan_scene(options, split, number, condition, vehicle=None):
    """Street, weather, sensors, frames and the ego's speed (m/s) in one scene, as a dict.

    vehicle: its number, where several scenes are to have the same one; else each has its own.
    frames: a dict per keyframe; by channel, the sensor's `time` (microseconds), `turn` and `eye`
    (see `rays.py`), `ahead` [3] (the vehicle's direction), `wide` (see `domains.py`) and `pose`
    (of the vehicle in the city).
    """
    domain = domain_of(options)
    layout = number // len(domain["conditions"]) if split == "val" else number
    seed = [options["seed"], int(split == "val") + 2 * domain["place"], layout]

    # what the conditions of a layout share: street, poses, sensors
    rng = np.random.default_rng([*seed, 0])
    steps = rng.uniform(8, 20, options["frames"] - 1)
    stops = np.concatenate([[0], np.cumsum(steps)])  # x of the keyframes, m
    street = Street(rng, stops[-1], OFTEN | domain["often"])
    city = rng.uniform(0, 360)  # from the street's frame to the city's, degrees
    origin = np.append(rng.uniform(300, 1800, 2), 0)
    speed = rng.uniform(4, 11)  # m/s
    sway = rng.normal(0, (1.5, .3, .3), (len(stops), 3))  # of the ego: yaw, pitch, roll, degrees
    if vehicle is not None:
        rng = np.random.default_rng([options["seed"], domain["place"], 1, vehicle])
    sensors = mount(domain, options["cameras"], rng)

    # what they do not share: weather and time
    rng = np.random.default_rng([*seed, 1 + CONDITIONS.index(condition)])
    weather = draw_weather(rng, condition)
    weather["exposure"] = weather["exposure"] * np.float32(domain.get("tint", 1))
    day, slot = divmod(number + 700 * (split == "val"), 20)
    start = datetime(2018, 7, 2, 20 if condition == "night" else 11, tzinfo=SINGAPORE)
    start += timedelta(days=day, minutes=8 * slot, microseconds=int(rng.integers(60_000_000)))

    frames = []
    for stop, (yaw, pitch, roll) in zip(stops, sway):
        views = {}
        for channel, (at, turn, late) in sensors.items():
            x = stop + late * speed
            place = np.array([x, street.middle(x) - LANE / 2, 0])  # in the middle of the right lane
            heading = np.degrees(street.heading(x)) + yaw
            body = about("z", heading) * about("y", pitch) * about("x", roll)
            moment = start + timedelta(seconds=float(stop / speed + late))
            view = dict(time=round(moment.timestamp() * 1e6), turn=(body * turn).rotation_matrix,
                        eye=place + body.rotate(at),
                        ahead=body.rotate(np.array([1., 0, 0])).astype(np.float32),
                        wide=domain["wide"].get(channel, 1.))
            view["pose"] = dict(
                rotation=(about("z", city) * body).elements.tolist(),
                translation=(about("z", city).rotate(place) + origin).tolist())
            views[channel] = view
        frames.append(views)
    return dict(street=street, weather=weather, sensors=sensors, frames=frames,
                condition=condition, seed=seed, speed=speed)


# ---- what the sensors see ------------------------------------------------------------------------
def noise_of(plan, frame, sensor):
    """The generator of one sensor's noise at one keyframe."""
    condition = CONDITIONS.index(plan["condition"])
    return np.random.default_rng([*plan["seed"], 1 + condition, frame, sensor])


def picture(options, plan, frame, channel):
    """One camera's picture at one keyframe, as `optics.render` gives it.

    Returns uint8 [H, W, 3]; of the pixels' centres, fine class [H, W] (0: sky) and depth [H, W], m.
    """
    view = plan["frames"][frame][channel]
    rng = noise_of(plan, frame, 1 + [*domain_of(options)["cameras"]].index(channel))
    return render(plan["street"], plan["condition"], plan["weather"], view, options["image_size"],
                  rng)


def pose_of(plan, frame, channel):
    """A sensor's axes, as columns [3, 3], and place [3], m, in the city at one keyframe."""
    at, turn, _ = plan["sensors"][channel]
    pose = plan["frames"][frame][channel]["pose"]
    body = Quaternion(pose["rotation"])
    return (body * turn).rotation_matrix, body.rotate(at) + pose["translation"]


def sweep(options, plan, frame, channel):
    """A LiDAR's sweep at one keyframe, in the order of its rig: beam by beam, the top one first.

    Returns a dict: beam [N], from the top, and step [N], from the left, of the rays that came back
    and how many there are of each, `grid`; place [N, 3] in the sensor's frame (x right, y forward,
    z up), m; intensity [N]; and of the things that were hit their fine class `kind` [N], `instance`
    [N] and `moves` [N].
    """
    domain, view = domain_of(options), plan["frames"][frame][channel]
    lidar = domain["lidars"][channel]
    beams = max(2, round(options["beams"] * lidar.get("beams", 1)))
    steps = max(2, round(options["azimuths"] * lidar.get("azimuths", 1)))
    rig = lidar_rig(view["turn"], view["eye"], elevations(lidar["knots"], beams), steps,
                    lidar.get("fov", options["lidar_fov"]))
    # the pictures' generators have numbers from 1 on
    number = [*domain["lidars"]].index(channel)
    rng = noise_of(plan, frame, number + number * len(domain["cameras"]))
    ray, place, echo, who = scan(plan["street"], plan["condition"], rig, rng, lidar)
    things = {key: plan["street"].things[key][who] for key in ("kind", "instance", "moves")}
    return dict(beam=ray // steps, step=ray % steps, grid=(beams, steps), place=place,
                intensity=intensity(echo, lidar), **things)


# ---- what both dataset layouts write -------------------------------------------------------------
def token_of(name):
    return hashlib.md5(name.encode()).hexdigest()


def log_row(plan, token, vehicle):
    """A scene's row of the table `log`."""
    first = plan["frames"][0]["LIDAR_TOP"]["time"]
    first = datetime.fromtimestamp(first / 1e6, SINGAPORE)
    return dict(token=token, logfile=f"{vehicle}-{first:%Y-%m-%d-%H-%M-%S}+0800", vehicle=vehicle,
                date_captured=f"{first:%Y-%m-%d}", location="singapore-onenorth")


def calibration_row(plan, token, channel, image_size):
    """A sensor's row of the table `calibrated_sensor`."""
    at, turn, _ = plan["sensors"][channel]
    height, width = image_size
    matrix = []
    if channel in CAMERAS:  # 90 degrees from left to right
        matrix = [[width / 2, 0., (width - 1) / 2], [0., width / 2, (height - 1) / 2], [0., 0., 1.]]
    return dict(token=token, sensor_token=token_of(channel), translation=at.tolist(),
                rotation=turn.elements.tolist(), camera_intrinsic=matrix)


def sensor_rows(channels):
    """The table `sensor`."""
    rows = []
    for channel in channels:
        modality = "camera" if channel in CAMERAS else "lidar"
        rows.append(dict(token=token_of(channel), channel=channel, modality=modality))
    return rows
