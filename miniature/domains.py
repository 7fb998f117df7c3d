"""What differs between the worlds of the datasets: devices and their places, the streets.

A domain is a dict; `world.py` fills in the options that are not given from its `defaults`.

    place       part of the seed: no two datasets share a street
    conditions  of its pictures; a dataset that states none has clear days only
    unlabelled  so many more training scenes have no labels
    often       where its streets differ from `street.OFTEN`
    cameras     {channel: yaw, degrees; x, y, z on the vehicle, m}
    tint        of its cameras: factors of red, green and blue; without it 1
    wide        {channel: tangent of half its horizontal field of view}; without it 1, 90 degrees
    late        when a camera takes its picture: seconds after the scan, seconds per degree of yaw
    lidars      {channel: LiDAR}, the one that turns first
    refused     {option: why it cannot be given}
    defaults    the other options' values where they are not given

A LiDAR is a dict: at [3] (on the vehicle, m), knots (see `rays.elevations`), reach (m), fade (m in
which an echo gets weaker by a factor e), and the law by which an echo becomes its intensity, see
`intensity`. One that does not turn has its fov, degrees, and the parts that its beams and steps
are of the options.
"""
import numpy as np

from miniature.street import (BUS, CAR, MANMADE, PEDESTRIAN, ROAD, SIDEWALK, TERRAIN, TRUCK,
                              VEGETATION)

CONDITIONS = ("day-clear", "day-rain", "night")
SENSORS = dict(image_size=[80, 160], beams=32, azimuths=180, lidar_fov=100., cameras=1)
AROUND = dict(SENSORS, train=[180, 0, 0], val=35, frames=2, azimuths=450, lidar_fov=360.)

# nuScenes: a city, with sensors as on its cars
NUSCENES = dict(
    place=0, conditions=CONDITIONS, unlabelled=0, late=(-.035, -.00014),
    often={}, wide={}, refused={},
    cameras={
        "CAM_FRONT": (0, 1.70, 0.0, 1.51),
        "CAM_FRONT_LEFT": (55, 1.52, 0.49, 1.51), "CAM_FRONT_RIGHT": (-55, 1.55, -0.49, 1.50),
        "CAM_BACK": (-180, 0.03, 0.0, 1.58),
        "CAM_BACK_LEFT": (110, 1.04, 0.48, 1.59), "CAM_BACK_RIGHT": (-110, 1.01, -0.48, 1.56)},
    lidars={"LIDAR_TOP": dict(
        at=(.94, 0, 1.84), knots=((0, 10.67), (1, -30.67)), reach=75., fade=150,
        gain=1, gamma=1, step=1, top=255)},
    defaults=dict(SENSORS, train=[400, 150, 150], val=40, frames=2))

# SemanticKITTI: the outskirts. Parked cars, hedges and trees, few people, hardly a truck
SEMANTICKITTI = dict(
    place=1, conditions=("day-clear",), unlabelled=0, late=(0., 0.),
    often=dict(lanes=.1, parking=.85, sidewalk=.4, parked_big=.05, parked=.75, driving=.25,
               jaywalkers=.05, barriers=.35, groups=.25, group=(1, 3), lamps=.4, signs=.5,
               hedges=.5, gaps=.3, plants=2, trees=.65,
               drivers="car car car car car car truck bus", waiting="car car car truck bus"),
    cameras={"image_2": (0, .27, .06, 1.65)}, wide={"image_2": .86},
    lidars={"velodyne": dict(
        at=(0., 0., 1.73), knots=((0, 2.), (.5, -8.6), (1, -24.8)), reach=80., fade=90.,
        gain=.079, gamma=.5, step=.01, top=.99)},
    refused=dict(cameras="it has one camera"),
    defaults=dict(AROUND, beams=64))

# PandaSet: a wide road. Trucks, buses and barriers
PANDASET = dict(
    place=2, conditions=("day-clear",), unlabelled=1, late=(-.05, -.00028),
    often=dict(lanes=.8, parking=.3, sidewalk=.75, parked_big=.35, parked=.5, driving=.5,
               jaywalkers=.1, barriers=.75, groups=.5, group=(2, 4), trees=.8, hedges=.1,
               drivers="car car truck truck bus", waiting="car truck truck bus"),
    cameras={
        "front_camera": (0, .85, 0., 1.81),
        "front_left_camera": (58, 1.51, .64, 1.53), "front_right_camera": (-58, 1.48, -.60, 1.60),
        "left_camera": (91, .54, .53, 1.58), "right_camera": (-89, .59, -.70, 1.55),
        "back_camera": (180, -.26, -.03, 1.65)},
    wide=dict(front_camera=.487, front_left_camera=1.03, front_right_camera=1.03, left_camera=1.03,
              right_camera=1.04, back_camera=1.03),
    lidars={
        "pandar64": dict(
            at=(0., 0., 1.75), knots=((0, 15.), (.12, 2.), (.75, -7.), (1, -25.)), reach=95.,
            fade=150., gain=.09, gamma=1.4, step=1, top=255),
        "pandar_gt": dict(
            at=(.95, .1, 1.62), knots=((0, 6.), (1, -11.)), reach=95., fade=250., fov=60.,
            beams=5 / 8, azimuths=2 / 5, gain=3.2, gamma=.6, step=1, top=255)},
    refused={},
    defaults=dict(AROUND, train=[150, 0, 0], val=30, beams=64, cameras=6))

# SemanticPOSS: a campus. Many people, few cars, no pictures
SEMANTICPOSS = dict(
    place=3, conditions=("day-clear",), unlabelled=0, often=dict(
        lanes=0, parking=.2, sidewalk=.6, parked_big=0, parked=.4, driving=.15, jaywalkers=.6,
        barriers=.3, groups=1, group=(3, 9), lamps=.5, signs=.3, hedges=.4, gaps=.2, plants=2,
        trees=.7, drivers="car", waiting="car"),
    cameras={}, wide={}, late=(0., 0.),
    lidars={"velodyne": dict(
        at=(.2, 0., 1.5), knots=((0, 7.), (.13, 2.), (.75, -6.), (1, -16.)), reach=90., fade=60.,
        gain=.6, gamma=1.1, step=1, top=255)},
    refused=dict(cameras="it has no pictures", image_size="it has no pictures"),
    defaults=dict(AROUND, beams=40, cameras=0))

# Cityscapes: old towns. Tall plastered houses, a narrow lens, greenish pictures
CITYSCAPES = dict(
    place=4, conditions=("day-clear",), unlabelled=0, late=(0., 0.), tint=(.72, .86, .70),
    often=dict(lanes=.3, parking=.7, sidewalk=.9, parked_big=.1, parked=.7, driving=.4,
               jaywalkers=.2, barriers=.1, groups=.8, group=(2, 5), lamps=.8, signs=.9, hedges=.1,
               trees=.9, high=(9, 19), gables=.9, drivers="car car car car truck bus",
               paints={
                   ROAD: "slate slate dark", SIDEWALK: "slate grey dark rose",
                   TERRAIN: "pine moss moss brown", VEGETATION: "pine pine moss brown",
                   MANMADE: "cream cream ochre ochre rose rose white brick",
                   CAR: "black black slate dark grey white blue", TRUCK: "slate blue ochre cream",
                   BUS: "cream rose ochre", PEDESTRIAN: "black slate dark rose cream"}),
    cameras={"left": (0, 1.70, .10, 1.22)}, wide={"left": .4526}, lidars={},
    refused=dict(dict.fromkeys(("beams", "azimuths", "lidar_fov"), "it has no LiDAR"),
                 cameras="it has one camera"),
    defaults=dict(SENSORS, train=[360, 0, 0], val=70, frames=1))

DOMAINS = dict(nuscenes=NUSCENES, nuimages=NUSCENES, semantickitti=SEMANTICKITTI,
               pandaset=PANDASET, semanticposs=SEMANTICPOSS, cityscapes=CITYSCAPES)


def domain_of(options):
    """The domain of a world with these options."""
    return DOMAINS[options.get("dataset", "nuscenes")]


def intensity(echo, lidar):
    """Echoes as this LiDAR writes them: a power law, in whole steps, up to its top."""
    value = lidar["gain"] * echo ** lidar["gamma"]
    steps = np.clip(np.round(value / lidar["step"]), 0, round(lidar["top"] / lidar["step"]))
    return steps * lidar["step"]
