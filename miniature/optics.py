"""Rays through a street: sensors, the first thing along each ray, light, pictures in three conditions, LiDAR sweeps.

A rig is one sensor at one moment, as a dict: `turn` [3, 3] (its axes, as columns, in the street's frame), `eye` [3]
(its place), `grid` (rows, columns), `rays` float32 [rows * columns, 3] in the street's frame and `window`, a function
that gives the rows and columns in which each thing of a set can be seen. Arrays over rays are written [R].
"""
import numpy as np

from miniature.street import AHEAD, BOX, CURB, ELLIPSOID, GROUND, LANE, LOOK, ROAD

BEAM_TOP, BEAM_BOTTOM, REACH = 10.67, -30.67, 75.0  # the LiDAR's highest and lowest beam, degrees; its range, m
FAR = np.float32(1e4)  # the sky's distance, m


# ---- sensors
def corners(things, turn, eye):
    """Corners x, y, z, each [8, T], m, of the things' bounding boxes in the frame of a sensor at eye [3] with axes turn."""
    sign = np.array([[i, j, k] for i in (-1, 1) for j in (-1, 1) for k in (-1, 1)], np.float32)
    x, y, z = (sign[:, axis, None] * things["half"][:, axis] for axis in range(3))
    cos, sin, at = np.cos(things["yaw"]), np.sin(things["yaw"]), things["at"] - eye
    x, y, z = cos * x - sin * y + at[:, 0], sin * x + cos * y + at[:, 1], z + at[:, 2]
    return [x * a + y * b + z * c for a, b, c in turn.T.astype(np.float32)]


def camera_rig(turn, eye, size, sample=1):
    """A camera (x right, y down, z forward) of size (height, width) pixels, 90 degrees wide, sample x sample rays each.

    With one sample, ray (row, col) goes through the pixel's centre, which has those whole numbers as coordinates.
    """
    (height, width), turn = (size[0] * sample, size[1] * sample), turn.astype(np.float32)
    row, col = np.mgrid[:height, :width].astype(np.float32)
    row, col = (row - (height - 1) / 2) * 2 / width, (col - (width - 1) / 2) * 2 / width
    col, row = col.ravel(), row.ravel()
    rays = np.stack([col * a + row * b + c for a, b, c in turn], -1)

    def window(things):
        x, y, z = corners(things, turn, eye)
        crossing, z = z.min(0) < .2, np.maximum(z, .2)  # the camera's plane, where a corner's column bounds one side only
        ranges = []
        for across, count in ((y, height), (x, width)):
            at = across / z * width / 2 + count / 2
            ranges += [np.where(crossing & (across.min(0) <= 0), 0, at.min(0) - 1),
                       np.where(crossing & (across.max(0) >= 0), count, at.max(0) + 1)]
        ranges[1] = np.where(z.max(0) <= .2, 0, ranges[1])  # behind the camera: no rows
        return ranges
    return dict(turn=turn, eye=eye.astype(np.float32), grid=(height, width), rays=rays, window=window, pixel=2 / width)


def lidar_rig(turn, eye, beams, azimuths, fov):
    """A LiDAR (x right, y forward, z up); azimuths steps over fov degrees around the front; row 0 is the top beam."""
    fov, up, step = np.radians(fov), np.radians(BEAM_TOP), np.radians(BEAM_TOP - BEAM_BOTTOM) / max(beams - 1, 1)
    left, lift = np.meshgrid(fov / 2 - (np.arange(azimuths) + .5) * fov / azimuths, up - np.arange(beams) * step)
    rays = np.stack([-np.sin(left) * np.cos(lift), np.cos(left) * np.cos(lift), np.sin(lift)], -1).reshape(-1, 3)

    def window(things):
        x, y, z = corners(things, turn, eye)
        middle, size = (things["at"] - eye) @ turn, np.hypot(*things["half"][:, :2].T) + .1
        flat, left = np.hypot(middle[:, 0], middle[:, 1]), np.arctan2(-middle[:, 0], middle[:, 1])
        off = (np.arctan2(-x, y) - left + np.pi) % (2 * np.pi) - np.pi
        low, high = left + off.min(0), left + off.max(0)
        around = (flat < size) | (low < -np.pi) | (high > np.pi)  # it surrounds the sensor or lies across the back
        top, bottom, close = z.max(0), z.min(0), np.maximum(flat - size, .3)
        top = np.arctan2(top, np.where(top > 0, close, flat + size))
        bottom = np.arctan2(bottom, np.where(bottom < 0, close, flat + size))
        first, last = ((fov / 2 - angle) / fov * azimuths for angle in (high, low))
        return ((up - top) / step - 1, (up - bottom) / step + 2,
                np.where(around, 0, first - 1), np.where(around, azimuths, last + 1))
    return dict(turn=turn, eye=eye.astype(np.float32), grid=(beams, azimuths), window=window,
                rays=(rays @ turn.T).astype(np.float32))


# ---- geometry
def dot(a, b):
    """Row by row: [R, 3] and [R, 3] to [R]."""
    return a[:, 0] * b[:, 0] + a[:, 1] * b[:, 1] + a[:, 2] * b[:, 2]


def lattice(x, y, z=0):
    """A number in [0, 1) for each cell of the integer lattice, as good as random."""
    value = sum(np.floor(axis).astype(np.int32).view(np.uint32) * np.uint32(prime)
                for axis, prime in ((x, 0x9E3779B1), (y, 0x85EBCA77), (z, 0xC2B2AE3D)) if np.ndim(axis))
    for shift, prime in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
        value = (value ^ (value >> np.uint32(shift))) * np.uint32(prime)
    return (value >> np.uint32(8)).astype(np.float32) / np.float32(1 << 24)


def noise(u, v):
    """Smooth noise in [-1, 1] that changes over a distance of about one."""
    i, j = np.floor(u), np.floor(v)
    a, b = u - i, v - j
    low, high = (lattice(i, j + k) * (1 - a) + lattice(i + 1, j + k) * a for k in (0, 1))
    return 2 * (low * (1 - b) + high * b) - 1


def first_hit(street, rig, wanted=None):
    """Distance along each ray (in ray lengths) and index of the first thing, -1 for the sky: [R], [R]."""
    eye, last = rig["eye"], len(street.things["kind"]) - 3
    some = slice(None) if wanted is None else np.flatnonzero(wanted)
    near, who = np.full(len(rig["rays"]), FAR), np.full(len(rig["rays"]), -1)
    x, y, z = (rig["rays"][some, axis] for axis in range(3))
    steep = np.minimum(z, -1e-3)
    low, high = -eye[2] / steep, (CURB - eye[2]) / steep  # the road lies lower than all else
    raised, _ = street.zone_at(eye[0] + high * x, eye[1] + high * y)
    sunk, _ = street.zone_at(eye[0] + low * x, eye[1] + low * y)
    down = z < -1e-3
    near[some] = np.where(down, np.where(raised > 0, high, low), FAR)
    who[some] = np.where(down, last + np.where(raised > 0, raised, sunk > 0), -1)  # neither: the curb's face, sidewalk
    return cast(street.things, rig, near, who, wanted)


def cast(things, rig, near, who, wanted=None):
    """`near` and `who` [R] after these things came in the way of the rays (only of those that are `wanted` [R])."""
    (height, width), eye, rays, near, who = rig["grid"], rig["eye"], rig["rays"], near.copy(), who.copy()
    row0, row1, col0, col1 = (np.clip(value, 0, limit).astype(np.int32)
                              for value, limit in zip(rig["window"](things), (height, height, width, width)))
    offset, shape, (hx, hy, hz) = eye - things["at"], things["shape"], things["half"].T
    cos, sin = np.cos(things["yaw"]), np.sin(things["yaw"])
    ox, oy, oz = cos * offset[:, 0] + sin * offset[:, 1], cos * offset[:, 1] - sin * offset[:, 0], offset[:, 2]
    seen = (np.hypot(ox, oy) < AHEAD + 10) & (shape != GROUND)
    for solid, kept in (("box", seen & (shape == BOX)), ("round", seen & (shape != BOX))):
        # one entry for each pair of a thing and a ray of its window
        wide = np.maximum(col1 - col0, 0) * kept
        area = wide * np.maximum(row1 - row0, 0)
        thing = np.repeat(np.arange(len(area), dtype=np.int32), area)
        step = np.arange(len(thing), dtype=np.int32) - np.repeat((np.cumsum(area) - area).astype(np.int32), area)
        down = step // wide[thing]
        ray = (row0 * width + col0)[thing] + down * width + step - down * wide[thing]
        if wanted is not None:
            some = wanted[ray]
            thing, ray = thing[some], ray[some]
        x, y, z = (rays[:, axis][ray] for axis in range(3))
        x, y = cos[thing] * x + sin[thing] * y, cos[thing] * y - sin[thing] * x  # in the thing's own frame
        with np.errstate(divide="ignore", invalid="ignore"):
            if solid == "box":  # inside: speed * distance <= gap, for each of its six planes
                planes = [(z, (hz - oz)[thing]), (-z, (hz + oz)[thing])]
                for sign, way, start, half, taper in ((1, x, ox, hx, "front"), (-1, x, ox, hx, "back"),
                                                      (1, y, oy, hy, "side"), (-1, y, oy, hy, "side")):
                    taper = things[taper]
                    planes.append((sign * way + taper[thing] * z, (half - sign * start - taper * (hz + oz))[thing]))
                enter, leave = np.full(len(ray), -np.inf, np.float32), np.full(len(ray), np.inf, np.float32)
                for speed, gap in planes:
                    at = gap / speed
                    np.maximum(enter, np.where(speed < 0, at, -np.inf), out=enter)
                    np.minimum(leave, np.where(speed > 0, at, np.inf), out=leave)
                hit = (enter < leave) & (enter > .1) & (enter < near[ray])
            else:  # a unit sphere after scaling; a cylinder does not scale z
                ball = (shape == ELLIPSOID).astype(np.float32)
                ex, ey, ez = ox / hx, oy / hy, oz / hz * ball
                x, y, w = x / hx[thing], y / hy[thing], z * (ball / hz)[thing]
                a, b = x * x + y * y + w * w, x * ex[thing] + y * ey[thing] + w * ez[thing]
                root = b * b - a * (ex * ex + ey * ey + ez * ez - 1)[thing]
                enter = (-b - np.sqrt(root)) / a
                hit = (root > 0) & (enter > .1) & (enter < near[ray])
                hit &= np.abs(oz[thing] + enter * z) <= hz[thing] * 1.001
                some = np.flatnonzero(hit & (things["rough"][thing] > 0))
                one, far = thing[some], enter[some]  # foliage has holes, more of them towards its outline
                px, py = (x[some] * far + ex[one]) * hx[one], (y[some] * far + ey[one]) * hy[one]
                hit[some] = lattice(px * 5, py * 5, (z[some] * far + oz[one]) * 5) < .45 + 1.2 * root[some] / a[some]
        hit = np.flatnonzero(hit)
        np.minimum.at(near, ray[hit], enter[hit])
        hit = hit[enter[hit] == near[ray[hit]]]
        who[ray[hit]] = thing[hit]
    return near, who


def surface(things, who, point):
    """Of points [R, 3] on things: place in the thing's frame, z from its bottom [R, 3]; face [R] (0 top, 1 bottom,
    2 front, 3 back, 4 left, 5 right, 6 round); outward normal in the street's frame [R, 3]."""
    local, (hx, hy, hz), shape = point - things["at"][who], things["half"][who].T, things["shape"][who]
    cos, sin = np.cos(things["yaw"])[who], np.sin(things["yaw"])[who]
    x, y, z = cos * local[:, 0] + sin * local[:, 1], cos * local[:, 1] - sin * local[:, 0], local[:, 2] + hz
    front, back, side = (things[key][who] for key in ("front", "back", "side"))
    gaps = np.stack([z - 2 * hz, z, x + front * z - hx, back * z - x - hx, y + side * z - hy, side * z - y - hy])
    face = np.where(shape == BOX, np.abs(gaps).argmin(0), np.where(shape == GROUND, 0, 6))
    ball, one = shape == ELLIPSOID, np.ones_like(x)
    nx = np.choose(face, [0 * x, 0 * x, one, -one, 0 * x, 0 * x, x / np.maximum(hx, .01) ** 2])
    ny = np.choose(face, [0 * x, 0 * x, 0 * x, 0 * x, one, -one, y / np.maximum(hy, .01) ** 2])
    nz = np.choose(face, [one, -one, front, back, side, side, ball * (z - hz) / np.maximum(hz, .01) ** 2])
    normal = np.stack([cos * nx - sin * ny, sin * nx + cos * ny, nz], -1)
    return np.stack([x, y, z], -1), face, normal / np.sqrt(dot(normal, normal))[:, None]


# ---- light
def draw_weather(rng, condition):
    """The light and air of one scene. Colours are as seen (gamma 2); haze is per m."""
    cloud, height, way = rng.random(), rng.uniform(.6, 1.1), rng.uniform(0, 2 * np.pi)
    sun = np.array([np.cos(height) * np.cos(way), np.cos(height) * np.sin(way), np.sin(height)])
    if condition == "day-clear":
        blue = np.array([.36, .52, .80]) * (1 - cloud) + np.array([.70, .74, .78]) * cloud
        light = dict(sun=sun, sunlight=(1 - .55 * cloud) * np.array([1, .95, .86]), ambient=.30 + .3 * blue, sky=blue,
                     air=blue * .5 + .4, haze=1 / 500, exposure=rng.uniform(.85, 1.1), noise=.008,
                     shadow=.5 + .3 * cloud)
    elif condition == "day-rain":
        grey = np.array([.61, .64, .67]) * rng.uniform(.88, 1.05)
        light = dict(sun=np.array([0, 0, 1]), sunlight=np.zeros(3), ambient=grey * .85, sky=grey, air=grey * .95,
                     haze=1 / rng.uniform(60, 95), exposure=rng.uniform(.8, 1.0), noise=.012, shadow=.75)
    else:
        tint = np.array([.17, .20, .28]) * rng.uniform(.8, 1.2)
        light = dict(sun=np.array([0, 0, 1]), sunlight=np.zeros(3), ambient=tint, sky=tint * .6, air=tint * .8,
                     haze=1 / 250, exposure=rng.uniform(.85, 1.1), noise=.02, shadow=.8)
    return {key: np.float32(value) for key, value in light.items()}


def albedo(street, look, who, point, across, local, face, pixel):
    """Linear colour [R, 3] of the surface, and what of it shines at night [R, 3]; pixel: a ray's footprint [R], m."""
    ground = look["shape"] == GROUND
    u = np.where((face == 2) | (face == 3), local[:, 1], local[:, 0] + (face == 6) * local[:, 1])
    u = np.where(ground, point[:, 0], u)
    v = np.where(ground, across, np.where(face == 0, local[:, 1], local[:, 2]))
    # cells; where they are finer than a ray, their mean
    cell_v = v / look["pv"]
    row = np.floor(cell_v)
    cell_u = u / look["pu"] + look["shift"] * row + look["slant"] * v
    covered = (v > look["v0"]) & (v < look["v1"]) & (ground | (face != 0))
    inside = covered & (cell_u % 1 < look["fu"]) & (cell_v - row < look["fv"])
    sharp = np.clip(1.5 - 2 * pixel / np.minimum(look["pu"], look["pv"]), 0, 1)
    ink = (inside * sharp + covered * look["fu"] * look["fv"] * (1 - sharp))[:, None]
    color = look["color"] * (1 - ink) + look["ink"] * ink
    # spots: fine ones, which vanish with the distance, and coarse ones
    fine, seed = 1 / look["scale"], who * np.float32(7.31)
    spots = noise(u * fine + seed, v * fine) * np.clip(1.5 - pixel * fine, 0, 1)
    spots += .6 * noise(u * fine * .23 - seed, v * fine * .23)
    color *= np.clip(1 + look["grain"] * spots, .15, 2)[:, None]
    # lane markings, wheels, lights
    near_line = np.abs((across + LANE / 2) % LANE - LANE / 2) < .09 + .25 * pixel
    between = (across < (street.lanes[0] - .5) * LANE) & (across > (.5 - street.lanes[1]) * LANE)
    dashed = (point[:, 0] % 6 < 3) | (np.abs(across) < .5)
    color[(look["kind"] == ROAD) & near_line & between & dashed] = (.78, .77, .72)
    hub = (np.abs(local[:, 0]) - .62 * look["half"][:, 0]) ** 2 + (local[:, 2] + .2 - look["wheel"]) ** 2
    color[(look["wheel"] > 0) & (face >= 4) & (hub < look["wheel"] ** 2)] = .06
    lamp = (look["lights"] > 0) & ((face == 2) | (face == 3)) & (np.abs(local[:, 2] - .45) < .13)
    lamp &= np.abs(np.abs(local[:, 1]) / np.maximum(look["half"][:, 1], .1) - .74) < .17
    color[lamp] = np.where((face == 2)[lamp, None], (.9, .9, .85), (.6, .05, .04))
    color = color ** 2
    lit = inside & (look["glow"] > 0) & (lattice(cell_u, row, who) < look["glow"])
    shine = lit[:, None] * np.float32([.75, .55, .28]) + (lamp | (look["glow"] > 1))[:, None] * color * 2.2
    return color.astype(np.float32), shine.astype(np.float32)


def shadows(street, rig, weather, near, who):
    """Which rays [R] end on ground that is in a shadow: every thing's outline, laid flat and moved away from the sun."""
    things = street.things
    throws = (things["at"][:, 2] + things["half"][:, 2] < 6) & (things["half"][:, 2] > .2)
    flat = {key: value[throws] for key, value in things.items()}
    slope = -weather["sun"][:2] / weather["sun"][2]
    flat["at"][:, :2] += slope * np.minimum(flat["at"][:, 2:], 3)
    flat["half"][:, :2] += .12 + .3 * np.abs(slope).mean() * np.minimum(flat["half"][:, 2:], 1.5)
    flat["at"][:, 2], flat["half"][:, 2] = .08, .1
    flat["front"] = flat["back"] = flat["side"] = flat["rough"] = np.zeros(throws.sum(), np.float32)
    ground = (who >= 0) & (things["shape"][who] == GROUND)
    return cast(flat, rig, np.where(ground, near, 0).astype(np.float32), np.full(len(who), -1), ground)[1] >= 0


def shade(street, condition, weather, rig, near, who, dark, rays, ahead):
    """Linear colour [R, 3] of some of a camera's rays; dark [R]: in a shadow; ahead [3]: where head lights point."""
    rays, color = rig["rays"][rays], np.empty((len(who), 3), np.float32)
    clear, hit = np.exp(-near * weather["haze"])[:, None], np.flatnonzero(who >= 0)
    # the sky
    up = np.maximum(rays[:, 2], 0) + .25
    cloud = noise(rays[:, 0] / up * 2.2 + 9, rays[:, 1] / up * 2.2)
    color = weather["sky"] + (weather["air"] - weather["sky"]) * np.exp(4 * (.25 - up))[:, None]
    color = (color * (1 + .08 * cloud[:, None])) ** 2
    # the street
    near, who, rays = near[hit], who[hit], rays[hit]
    point = rig["eye"] + near[:, None] * rays
    local, face, normal = surface(street.things, who, point)
    look = {key: street.things[key][who] for key in ("shape", "kind", "half", *LOOK)}
    across = street.zone_at(point[:, 0], point[:, 1])[1]
    pixel = near * rig["pixel"] / np.where(look["shape"] == GROUND, np.maximum(-rays[:, 2], .05), 1)
    base, shine = albedo(street, look, who, point, across, local, face, pixel)
    light = weather["ambient"] * (.7 + .3 * normal[:, 2:])
    light = light + weather["sunlight"] * np.maximum(normal @ weather["sun"], 0)[:, None]
    light = light * np.where(dark[hit], weather["shadow"], np.float32(1))[:, None]
    if condition == "night":
        away = point - rig["eye"]
        far = np.sqrt(dot(away, away)) + .1
        beam = np.clip(away @ ahead / far, 0, 1) ** 12 / (1 + (far / 16) ** 2) * np.where(point[:, 2] < 1.6, 1.1, .4)
        light = light + beam[:, None] * np.float32([1, .95, .8])
        closest = np.argsort(np.hypot(*(street.lamps[:, :2] - rig["eye"][:2]).T))[:8]
        for lamp in street.lamps[closest]:
            light = light + (.75 / (1 + dot(point - lamp, point - lamp) / 14))[:, None] * np.float32([1, .72, .4])
        base = base * light + shine
    else:
        base = base * light
    color[hit] = base * clear[hit] + weather["air"] ** 2 * (1 - clear[hit])
    return color


# ---- pictures and sweeps
def render(street, condition, weather, turn, eye, size, ahead, rng):
    """A camera's picture uint8 [H, W, 3], the fine class in each pixel's middle (0: sky) [H, W], its depth [H, W], m."""
    height, width = size
    rig, fine = camera_rig(turn, eye, size), camera_rig(turn, eye, size, 2)
    near, who = first_hit(street, rig)
    dark = shadows(street, rig, weather, near, who)
    color = shade(street, condition, weather, rig, near, who, dark, slice(None), ahead).reshape(height, width, 3)
    # four rays instead of one where the picture has edges
    tone, mark = np.sqrt(color @ np.float32([.3, .4, .3])), (who + 1000 * dark).reshape(size)
    edge = np.zeros(size, bool)
    for a, b in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        differs = (mark[a] != mark[b]) | (np.abs(tone[a] - tone[b]) > .1)
        edge[a] |= differs
        edge[b] |= differs
    wanted = edge.repeat(2, 0).repeat(2, 1).ravel()
    some = np.flatnonzero(wanted)
    near2, who2 = (value[some] for value in first_hit(street, fine, wanted))
    dark2 = dark.reshape(size).repeat(2, 0).repeat(2, 1).ravel()[some]
    four = np.zeros((4 * height * width, 3), np.float32)
    four[some] = shade(street, condition, weather, fine, near2, who2, dark2, some, ahead)
    four = four.reshape(height, 2, width, 2, 3)
    color[edge] = ((four[:, 0, :, 0] + four[:, 0, :, 1] + four[:, 1, :, 0] + four[:, 1, :, 1]) / 4)[edge]

    kind = np.where(who < 0, 0, street.things["kind"][who]).reshape(size)
    zone = np.where(who < 0, -1, who - len(street.things["kind"]) + 3).reshape(size)  # 0 road, 1 sidewalk, 2 terrain
    if condition == "day-rain":
        # a wet street mirrors what stands on it: rows upwards from its foot appear downwards from there
        wet, rows = np.choose(np.maximum(zone, -1) + 1, [0, 1, .4, 0])[..., None], np.arange(height)[:, None]
        foot = np.maximum.accumulate(np.where(zone >= 0, 0, rows), 0)
        mirror = sum(color[np.clip(2 * foot - rows + k, 0, height - 1), np.arange(width)] for k in (-2, 0, 2)) / 3
        color = color * (1 - .5 * wet) + .45 * wet * mirror
    color = np.sqrt(np.clip(color * weather["exposure"], 0, 1.2))
    if condition == "day-rain":
        color = .75 * color + .25 * (color @ np.float32([1, 1, 1]) / 3)[..., None]  # paler
        count, long = height * width // 160, np.arange(round(height / 10))  # and streaked
        top, left = rng.uniform(-8, height, (count, 1)), rng.uniform(0, width, (count, 1))
        rows, cols = (top + long).astype(int), (left + .15 * long).astype(int)
        bright = rng.uniform(.03, .12, (count, 1)).repeat(len(long), 1)
        there = (rows >= 0) & (rows < height) & (cols < width)
        color[rows[there], cols[there]] += bright[there, None]
    color = color + weather["noise"] * rng.standard_normal(color.shape, np.float32)
    return (np.clip(color, 0, 1) * 255 + .5).astype(np.uint8), kind, near.reshape(size)


def scan(street, condition, rig, rng):
    """One LiDAR sweep: points float32 [N, 5] (x, y, z in m, intensity 0..255, ring) and their fine classes uint8 [N]."""
    things, rain = street.things, condition == "day-rain"
    near, who = first_hit(street, rig)
    normal = surface(things, who, rig["eye"] + near[:, None] * rig["rays"])[2]
    straight = np.abs(dot(normal, rig["rays"]))
    lost, fading, spread, blur = (rng.random(len(near)), rng.normal(0, .18, len(near)), rng.normal(0, .02, len(near)),
                                  rng.standard_normal(len(near)))
    echo = things["echo"][who] * (.6 + .4 * straight) * np.exp(fading - near / 150) * (.95 if rain else 1)
    back = (who >= 0) & (near < REACH) & (lost > (.09 if rain else .03))
    near = near + spread + things["rough"][who] * blur
    ring = rig["grid"][0] - 1 - np.arange(len(near)) // rig["grid"][1]  # ring 0 is the lowest beam
    points = np.column_stack([(rig["rays"] @ rig["turn"]) * near[:, None], np.clip(np.round(echo), 0, 255), ring])
    order = np.arange(len(near)).reshape(rig["grid"])[::-1].T.ravel()  # column by column, as the device turns
    order = order[back[order]]
    return points[order].astype(np.float32), things["kind"][who[order]].astype(np.uint8)
