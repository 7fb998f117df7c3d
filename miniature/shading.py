"""The light in a street: weather, the colour of surfaces, shadows, and what a camera's ray sees.

Colours are linear where nothing else is said. A colour "as seen" is the linear one's square root.
Arrays over rays are written [R]; `rays.py` says what a rig is.
"""
import numpy as np

from miniature.ground import LANE
from miniature.rays import cast, dot, lattice, noise, surface
from miniature.street import GROUND, LOOK, ROAD


def draw_weather(rng, condition):
    """The light and air of one scene. Colours are as seen; haze is per m."""
    cloud, height, way = rng.random(), rng.uniform(.6, 1.1), rng.uniform(0, 2 * np.pi)
    up = np.array([0, 0, 1])
    if condition == "day-clear":
        flat = np.cos(height)
        sun = np.array([flat * np.cos(way), flat * np.sin(way), np.sin(height)])
        sky = np.array([.36, .52, .80]) * (1 - cloud) + np.array([.70, .74, .78]) * cloud
        light = dict(sun=sun, sunlight=(1 - .55 * cloud) * np.array([1, .95, .86]), sky=sky,
                     ambient=.30 + .3 * sky, air=sky * .5 + .4, haze=1 / 500,
                     exposure=rng.uniform(.85, 1.1), noise=.008, shadow=.5 + .3 * cloud)
    elif condition == "day-rain":
        grey = np.array([.61, .64, .67]) * rng.uniform(.88, 1.05)
        light = dict(sun=up, sunlight=np.zeros(3), sky=grey,
                     ambient=grey * .85, air=grey * .95, haze=1 / rng.uniform(60, 95),
                     exposure=rng.uniform(.8, 1.0), noise=.012, shadow=.75)
    else:
        tint = np.array([.17, .20, .28]) * rng.uniform(.8, 1.2)
        light = dict(sun=up, sunlight=np.zeros(3), sky=tint * .6,
                     ambient=tint, air=tint * .8, haze=1 / 250,
                     exposure=rng.uniform(.85, 1.1), noise=.02, shadow=.8)
    return {key: np.float32(value) for key, value in light.items()}


# ---- surfaces ------------------------------------------------------------------------------------
def albedo(street, look, who, point, across, local, face, pixel):
    """Colour [R, 3] of the surface, and what of it shines at night [R, 3].

    look: the things' rows of LOOK; pixel: a ray's footprint [R], m; for the rest see `surface`.
    """
    # u, v: the place on the surface, m
    x, y, z = local.T
    along = point[:, 0]
    ground = look["shape"] == GROUND
    top, front, back, round_ = (face == number for number in (0, 2, 3, 6))
    u = np.where(front | back, y, x + round_ * y)
    u = np.where(ground, along, u)
    v = np.where(ground, across, np.where(top, y, z))

    # cells; where they are finer than a ray, their mean
    pu, pv, fu, fv = (look[key] for key in ("pu", "pv", "fu", "fv"))
    cell_v = v / pv
    row = np.floor(cell_v)
    cell_u = u / pu + look["shift"] * row + look["slant"] * v
    covered = (v > look["v0"]) & (v < look["v1"]) & (ground | ~top)
    inside = covered & (cell_u % 1 < fu) & (cell_v - row < fv)
    sharp = np.clip(1.5 - 2 * pixel / np.minimum(pu, pv), 0, 1)
    ink = inside * sharp + covered * fu * fv * (1 - sharp)
    ink = ink[:, None]
    color = look["color"] * (1 - ink) + look["ink"] * ink

    # spots: fine ones, which vanish with the distance, and coarse ones
    fine = 1 / look["scale"]
    seed = who * np.float32(7.31)  # each thing's spots are its own
    spots = noise(u * fine + seed, v * fine) * np.clip(1.5 - pixel * fine, 0, 1)
    spots += .6 * noise(u * fine * .23 - seed, v * fine * .23)
    color *= np.clip(1 + look["grain"] * spots, .15, 2)[:, None]

    # lane markings, wheels, lights
    marked = (look["kind"] == ROAD) & lane_marking(street, along, across, pixel)
    color[marked] = (.78, .77, .72)
    wheel, (half_x, half_y, _) = look["wheel"], look["half"].T
    beside = np.abs(x) - .62 * half_x  # of the hub, m
    above = z + .2 - wheel
    in_wheel = beside ** 2 + above ** 2 < wheel ** 2
    color[(wheel > 0) & (face >= 4) & in_wheel] = .06
    aside = np.abs(y) / np.maximum(half_y, .1)  # 1 at the side
    lamp = (look["lights"] > 0) & (front | back)
    lamp &= (np.abs(z - .45) < .13) & (np.abs(aside - .74) < .17)
    color[lamp] = np.where(front[lamp, None], (.9, .9, .85), (.6, .05, .04))

    # at night: some windows, the vehicles' lights and the street lamps
    color = color ** 2
    glow = look["glow"]
    lit = inside & (glow > 0) & (lattice(cell_u, row, who) < glow)
    lamp |= glow > 1
    shine = lit[:, None] * np.float32([.75, .55, .28]) + lamp[:, None] * color * 2.2
    return color.astype(np.float32), shine.astype(np.float32)


def lane_marking(street, x, across, pixel):
    """Which places [R] of the road are on a line between two lanes; the middle line is solid."""
    from_line = (across + LANE / 2) % LANE - LANE / 2  # m
    near_line = np.abs(from_line) < .09 + .25 * pixel
    left, right = street.lanes
    between = (across < (left - .5) * LANE) & (across > (.5 - right) * LANE)
    dashed = (x % 6 < 3) | (np.abs(across) < .5)
    return near_line & between & dashed


def shadows(street, rig, weather, near, who):
    """Which rays [R] end on ground that is in a shadow.

    A shadow is the thing's outline, laid flat and moved away from the sun.
    """
    things = street.things
    half_height = things["half"][:, 2]
    top = things["at"][:, 2] + half_height
    throws = (top < 6) & (half_height > .2)
    flat = {key: value[throws] for key, value in things.items()}
    at, half = flat["at"], flat["half"]
    slope = -weather["sun"][:2] / weather["sun"][2]
    at[:, :2] += slope * np.minimum(at[:, 2:], 3)
    half[:, :2] += .12 + .3 * np.abs(slope).mean() * np.minimum(half[:, 2:], 1.5)
    at[:, 2] = .08
    half[:, 2] = .1
    for key in ("front", "back", "side", "rough"):
        flat[key] = np.zeros(throws.sum(), np.float32)
    ground = (who >= 0) & (things["shape"][who] == GROUND)
    near = np.where(ground, near, 0).astype(np.float32)
    _, shadow = cast(flat, rig, near, np.full(len(who), -1), ground)
    return shadow >= 0


# ---- what rays see -------------------------------------------------------------------------------
def shade(street, condition, weather, rig, near, who, dark, ahead):
    """Colour [R, 3] of a camera's rays.

    near, who [R]: see `first_hit`; dark [R]: in a shadow; ahead [3]: where head lights point.
    """
    color = sky_color(weather, rig["rays"])
    hit = np.flatnonzero(who >= 0)
    near, who, rays = near[hit], who[hit], rig["rays"][hit]
    point = rig["eye"] + near[:, None] * rays
    local, face, normal = surface(street.things, who, point)
    look = {key: street.things[key][who] for key in ("shape", "kind", "half", *LOOK)}
    across = street.zone_at(point[:, 0], point[:, 1])[1]
    grazing = np.where(look["shape"] == GROUND, np.maximum(-rays[:, 2], .05), 1)
    pixel = near * rig["pixel"] / grazing
    base, shine = albedo(street, look, who, point, across, local, face, pixel)

    light = weather["ambient"] * (.7 + .3 * normal[:, 2:])
    light = light + weather["sunlight"] * np.maximum(normal @ weather["sun"], 0)[:, None]
    light = light * np.where(dark[hit], weather["shadow"], np.float32(1))[:, None]
    if condition == "night":
        base = base * lamp_light(street, rig["eye"], point, light, ahead) + shine
    else:
        base = base * light
    clear = np.exp(-near * weather["haze"])[:, None]
    color[hit] = base * clear + weather["air"] ** 2 * (1 - clear)
    return color


def sky_color(weather, rays):
    """Colour [R, 3] of the sky with its clouds; at the horizon it is the air's."""
    up = np.maximum(rays[:, 2], 0) + .25
    cloud = noise(rays[:, 0] / up * 2.2 + 9, rays[:, 1] / up * 2.2)
    horizon = np.exp(4 * (.25 - up))[:, None]
    color = weather["sky"] + (weather["air"] - weather["sky"]) * horizon
    return (color * (1 + .08 * cloud[:, None])) ** 2


def lamp_light(street, eye, point, light, ahead):
    """`light` [R, 3] at points [R, 3] plus the head lights' and the eight nearest lamps'."""
    away = point - eye
    far = np.sqrt(dot(away, away)) + .1
    straight = np.clip(away @ ahead / far, 0, 1)
    low = np.where(point[:, 2] < 1.6, 1.1, .4)  # head lights are dimmed above 1.6 m
    beam = straight ** 12 / (1 + (far / 16) ** 2) * low
    light = light + beam[:, None] * np.float32([1, .95, .8])
    to_lamps = np.hypot(*(street.lamps[:, :2] - eye[:2]).T)
    for lamp in street.lamps[np.argsort(to_lamps)[:8]]:
        away = point - lamp
        bright = .75 / (1 + dot(away, away) / 14)
        light = light + bright[:, None] * np.float32([1, .72, .4])
    return light
