"""Rays through a street: the sensors' rays, the first thing along each, and where it is hit.

A rig is one sensor at one moment, as a dict: `turn` [3, 3] (its axes, as columns, in the street's
frame), `eye` [3] (its place, m), `grid` (rows, columns), `rays` float32 [rows * columns, 3] in the
street's frame and `window`, a function of some things [T] that gives the rows and columns in which
each can be seen: first row, end of rows, first column, end of columns, each [T].
Arrays over rays are written [R].
"""
from itertools import product

import numpy as np

from miniature.ground import AHEAD, CURB
from miniature.street import BOX, ELLIPSOID, GROUND

FAR = np.float32(1e4)  # the sky's distance, m


# ---- sensors -------------------------------------------------------------------------------------
def corners(things, turn, eye):
    """Corners of the things' bounding boxes in the frame of a sensor at eye [3] with axes turn.

    Returns x, y, z, each [8, T], m.
    """
    sign = np.array(list(product((-1, 1), repeat=3)), np.float32)
    x, y, z = (sign[:, axis, None] * things["half"][:, axis] for axis in range(3))
    # from the thing's frame to the street's, seen from the eye
    cos, sin = np.cos(things["yaw"]), np.sin(things["yaw"])
    at = things["at"] - eye
    along = cos * x - sin * y + at[:, 0]
    left = sin * x + cos * y + at[:, 1]
    up = z + at[:, 2]
    return [along * a + left * b + up * c for a, b, c in turn.T.astype(np.float32)]


def camera_rig(turn, eye, size, sample=1, wide=1.):
    """A camera (x right, y down, z forward) of size (height, width) pixels.

    wide: the tangent of half its horizontal field of view, 1 for 90 degrees.
    It has sample x sample rays a pixel. With one sample, ray (row, col) goes through the pixel's
    centre, which has those whole numbers as coordinates.
    """
    height, width = size[0] * sample, size[1] * sample
    turn = turn.astype(np.float32)
    row, col = np.mgrid[:height, :width].astype(np.float32)
    down = ((row - (height - 1) / 2) * (2 * wide) / width).ravel()
    right = ((col - (width - 1) / 2) * (2 * wide) / width).ravel()
    rays = np.stack([right * a + down * b + c for a, b, c in turn], -1)

    def window(things):
        x, y, z = corners(things, turn, eye)
        # the corners of a thing that reaches behind the camera bound it on one side only
        crossing = z.min(0) < .2
        z = np.maximum(z, .2)
        ranges = []
        for across, count in ((y, height), (x, width)):
            at = across / z * width / (2 * wide) + count / 2
            first = np.where(crossing & (across.min(0) <= 0), 0, at.min(0) - 1)
            end = np.where(crossing & (across.max(0) >= 0), count, at.max(0) + 1)
            ranges += [first, end]
        ranges[1] = np.where(z.max(0) <= .2, 0, ranges[1])  # wholly behind the camera: no rows
        return ranges
    return dict(turn=turn, eye=eye.astype(np.float32), grid=(height, width), rays=rays,
                window=window, pixel=2 * wide / width)


def elevations(knots, beams):
    """Elevations [beams] of a LiDAR's beams, radians, the highest first.

    knots: pairs of a share of the beams and the elevation, degrees, down to which they go: the
    beams between two knots have equal steps.
    """
    shares, degrees = zip(*knots)
    if len(knots) == 2:
        top, bottom = degrees
        return np.radians(top) - np.arange(beams) * (np.radians(top - bottom) / (beams - 1))
    return np.radians(np.interp(np.linspace(0, 1, beams), shares, degrees))


def lidar_rig(turn, eye, lifts, azimuths, fov):
    """A LiDAR (x right, y forward, z up) of azimuths steps over fov degrees around the front.

    lifts [beams]: see `elevations`. Row 0 is the top beam, column 0 the leftmost step.
    """
    fov, beams = np.radians(fov), len(lifts)
    azimuth = fov / 2 - (np.arange(azimuths) + .5) * fov / azimuths
    left, lift = np.meshgrid(azimuth, lifts)
    flat = np.cos(lift)
    rays = np.stack([-np.sin(left) * flat, np.cos(left) * flat, np.sin(lift)], -1)
    rays = rays.reshape(-1, 3)

    def window(things):
        x, y, z = corners(things, turn, eye)
        right, forward, _ = ((things["at"] - eye) @ turn).T
        size = np.hypot(*things["half"][:, :2].T) + .1
        flat = np.hypot(right, forward)  # the horizontal distance

        # azimuths from the middle's, so that they do not jump at the back
        left = np.arctan2(-right, forward)
        off = (np.arctan2(-x, y) - left + np.pi) % (2 * np.pi) - np.pi
        low, high = left + off.min(0), left + off.max(0)
        # a thing that surrounds the sensor or lies across the back: all columns
        around = (flat < size) | (low < -np.pi) | (high > np.pi)
        first = (fov / 2 - high) / fov * azimuths
        last = (fov / 2 - low) / fov * azimuths

        # the steepest and the flattest angle between which the thing can lie
        top, bottom = z.max(0), z.min(0)
        close, distant = np.maximum(flat - size, .3), flat + size
        top = np.arctan2(top, np.where(top > 0, close, distant))
        bottom = np.arctan2(bottom, np.where(bottom < 0, close, distant))
        upwards, rows = lifts[::-1], np.arange(beams)[::-1]
        return (np.interp(top, upwards, rows) - 1, np.interp(bottom, upwards, rows) + 2,
                np.where(around, 0, first - 1), np.where(around, azimuths, last + 1))
    return dict(turn=turn, eye=eye.astype(np.float32), grid=(beams, azimuths), window=window,
                rays=(rays @ turn.T).astype(np.float32))


# ---- small maths ---------------------------------------------------------------------------------
def dot(a, b):
    """Row by row: [R, 3] and [R, 3] to [R]."""
    ax, ay, az = a.T
    bx, by, bz = b.T
    return ax * bx + ay * by + az * bz


def unturned(x, y, cos, sin):
    """x, y in the frame of a thing whose yaw has this cosine and sine."""
    return cos * x + sin * y, cos * y - sin * x


def lattice(x, y, z=0):
    """A number in [0, 1) for each cell of the integer lattice, as good as random."""
    value = 0
    for axis, prime in ((x, 0x9E3779B1), (y, 0x85EBCA77), (z, 0xC2B2AE3D)):
        if np.ndim(axis):
            cell = np.floor(axis).astype(np.int32).view(np.uint32)
            value = value + cell * np.uint32(prime)
    for shift, prime in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
        value = (value ^ (value >> np.uint32(shift))) * np.uint32(prime)
    return (value >> np.uint32(8)).astype(np.float32) / np.float32(1 << 24)


def noise(u, v):
    """Smooth noise in [-1, 1] that changes over a distance of about one."""
    i, j = np.floor(u), np.floor(v)
    a, b = u - i, v - j  # the place in its cell
    low = lattice(i, j) * (1 - a) + lattice(i + 1, j) * a
    high = lattice(i, j + 1) * (1 - a) + lattice(i + 1, j + 1) * a
    return 2 * (low * (1 - b) + high * b) - 1


# ---- the first thing along each ray --------------------------------------------------------------
def first_hit(street, rig, wanted=None):
    """Distance along each ray (in ray lengths) and number of the first thing, -1 for the sky.

    Both are [R]. Rays that are not `wanted` [R] keep the sky.
    """
    eye = rig["eye"]
    road = len(street.things["kind"]) - 3  # the ground's materials are the last three things
    some = slice(None) if wanted is None else np.flatnonzero(wanted)
    near = np.full(len(rig["rays"]), FAR)
    who = np.full(len(rig["rays"]), -1)
    # the ground on two levels: the road lies lower than all else, by the curb
    x, y, z = (rig["rays"][some, axis] for axis in range(3))
    steep = np.minimum(z, -1e-3)
    low, high = -eye[2] / steep, (CURB - eye[2]) / steep
    eye_x, eye_y, _ = eye
    raised, _ = street.zone_at(eye_x + high * x, eye_y + high * y)
    sunk, _ = street.zone_at(eye_x + low * x, eye_y + low * y)
    down = z < -1e-3
    near[some] = np.where(down, np.where(raised > 0, high, low), FAR)
    # road above and something else below: the ray meets the curb's face, which is sidewalk
    zone = np.where(raised > 0, raised, sunk > 0)
    who[some] = np.where(down, road + zone, -1)
    return cast(street.things, rig, near, who, wanted)


def cast(things, rig, near, who, wanted=None):
    """`near` and `who` [R] after these things came in the way of the rays that are `wanted` [R]."""
    near, who = near.copy(), who.copy()
    height, width = rig["grid"]
    limits = (height, height, width, width)
    windows = [np.clip(value, 0, limit).astype(np.int32)
               for value, limit in zip(rig["window"](things), limits)]
    # the eye in each thing's own frame
    x, y, z = (rig["eye"] - things["at"]).T
    cos, sin = np.cos(things["yaw"]), np.sin(things["yaw"])
    x, y = unturned(x, y, cos, sin)
    eye = (x, y, z)
    shape = things["shape"]
    seen = (np.hypot(x, y) < AHEAD + 10) & (shape != GROUND)
    box = shape == BOX

    for kept, entered in ((seen & box, entered_boxes), (seen & ~box, entered_rounds)):
        thing, ray = pairs(windows, width, kept)
        if wanted is not None:
            some = wanted[ray]
            thing, ray = thing[some], ray[some]
        x, y, z = (rig["rays"][:, axis][ray] for axis in range(3))
        x, y = unturned(x, y, cos[thing], sin[thing])
        way = (x, y, z)
        with np.errstate(divide="ignore", invalid="ignore"):
            enter, hit = entered(things, thing, eye, way, near[ray])
        hit = np.flatnonzero(hit)
        np.minimum.at(near, ray[hit], enter[hit])
        nearest = hit[enter[hit] == near[ray[hit]]]
        who[ray[nearest]] = thing[nearest]
    return near, who


def pairs(windows, width, kept):
    """Each pair [P] of a kept thing and a ray of its window: the things' numbers and the rays'."""
    row0, row1, col0, col1 = windows
    wide = np.maximum(col1 - col0, 0) * kept
    area = wide * np.maximum(row1 - row0, 0)
    thing = np.repeat(np.arange(len(area), dtype=np.int32), area)
    # a pair's place in its window: how many steps from the window's first ray, how many rows down
    first = (np.cumsum(area) - area).astype(np.int32)
    step = np.arange(len(thing), dtype=np.int32) - np.repeat(first, area)
    down = step // wide[thing]
    right = step - down * wide[thing]
    corner = row0 * width + col0
    return thing, corner[thing] + down * width + right


def entered_boxes(things, thing, eye, way, near):
    """Of pairs [P] of a box and a ray: where the ray enters it [P]; is that before `near` [P].

    eye: x, y, z [T] in the things' frames; way: the rays' x, y, z [P] in there.
    A place at distance t is inside where speed * t <= gap for each of the box's six planes.
    """
    (ox, oy, oz), (x, y, z) = eye, way
    hx, hy, hz = things["half"].T
    planes = [(z, (hz - oz)[thing]), (-z, (hz + oz)[thing])]
    for name, sign, along, start, half in (("front", 1, x, ox, hx), ("back", -1, x, ox, hx),
                                           ("side", 1, y, oy, hy), ("side", -1, y, oy, hy)):
        taper = things[name]
        speed = sign * along + taper[thing] * z
        gap = half - sign * start - taper * (hz + oz)
        planes.append((speed, gap[thing]))

    enter = np.full(len(thing), -np.inf, np.float32)
    leave = np.full(len(thing), np.inf, np.float32)
    for speed, gap in planes:
        at = gap / speed
        np.maximum(enter, np.where(speed < 0, at, -np.inf), out=enter)
        np.minimum(leave, np.where(speed > 0, at, np.inf), out=leave)
    return enter, (enter < leave) & (enter > .1) & (enter < near)


def entered_rounds(things, thing, eye, way, near):
    """The same of ellipsoids and cylinders: both are unit spheres after scaling.

    A cylinder's z is left out of the scaled distance. Foliage has holes.
    """
    (ox, oy, oz), (x, y, z) = eye, way
    hx, hy, hz = things["half"].T
    ball = (things["shape"] == ELLIPSOID).astype(np.float32)
    ex, ey, ez = ox / hx, oy / hy, oz / hz * ball
    x, y, w = x / hx[thing], y / hy[thing], z * (ball / hz)[thing]
    # |e + t (x, y, w)| = 1: the smaller root of a t^2 + 2 b t + c = 0
    a = x * x + y * y + w * w
    b = x * ex[thing] + y * ey[thing] + w * ez[thing]
    c = ex * ex + ey * ey + ez * ez - 1
    root = b * b - a * c[thing]
    enter = (-b - np.sqrt(root)) / a
    hit = (root > 0) & (enter > .1) & (enter < near)
    hit &= np.abs(oz[thing] + enter * z) <= hz[thing] * 1.001

    # foliage: cells of 0.2 m are open, more of them towards the outline
    some = np.flatnonzero(hit & (things["rough"][thing] > 0))
    leaf, far = thing[some], enter[some]
    px = (x[some] * far + ex[leaf]) * hx[leaf]
    py = (y[some] * far + ey[leaf]) * hy[leaf]
    pz = z[some] * far + oz[leaf]
    dense = .45 + 1.2 * root[some] / a[some]
    hit[some] = lattice(px * 5, py * 5, pz * 5) < dense
    return enter, hit


# ---- where it is hit -----------------------------------------------------------------------------
def surface(things, who, point):
    """Where points [R, 3], in the street's frame, lie on their things `who` [R].

    Returns the place in the thing's frame, z from its bottom [R, 3]; face [R] (0 top, 1 bottom,
    2 front, 3 back, 4 left, 5 right, 6 round); outward normal in the street's frame [R, 3].
    """
    hx, hy, hz = things["half"][who].T
    shape = things["shape"][who]
    cos, sin = np.cos(things["yaw"])[who], np.sin(things["yaw"])[who]
    x, y, z = (point - things["at"][who]).T
    x, y = unturned(x, y, cos, sin)
    z = z + hz

    # the face is the one whose plane is nearest
    front, back, side = (things[key][who] for key in ("front", "back", "side"))
    gaps = np.stack([z - 2 * hz, z, x + front * z - hx, back * z - x - hx,
                     y + side * z - hy, side * z - y - hy])
    face = np.where(shape == BOX, np.abs(gaps).argmin(0), np.where(shape == GROUND, 0, 6))

    # normals in the thing's frame: per face, and for round things the gradient of the sphere
    one, zero = np.ones_like(x), 0 * x
    round_x = x / np.maximum(hx, .01) ** 2
    round_y = y / np.maximum(hy, .01) ** 2
    round_z = (shape == ELLIPSOID) * (z - hz) / np.maximum(hz, .01) ** 2
    nx = np.choose(face, [zero, zero, one, -one, zero, zero, round_x])
    ny = np.choose(face, [zero, zero, zero, zero, one, -one, round_y])
    nz = np.choose(face, [one, -one, front, back, side, side, round_z])
    normal = np.stack([cos * nx - sin * ny, sin * nx + cos * ny, nz], -1)
    return np.stack([x, y, z], -1), face, normal / np.sqrt(dot(normal, normal))[:, None]
