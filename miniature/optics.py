"""How the sensors see a street: a camera's pictures in three conditions, and the LiDAR's sweeps.

`rays.py` finds what each ray meets, `shading.py` its colour.
"""
import numpy as np

from miniature.rays import camera_rig, dot, first_hit, surface
from miniature.shading import shade, shadows


# ---- pictures ------------------------------------------------------------------------------------
def render(street, condition, weather, view, size, rng):
    """A camera's picture uint8 [H, W, 3].

    Also returns, of each pixel's middle, the fine class [H, W] (0: sky) and the depth [H, W], m.
    view: a dict of turn [3, 3], eye [3] and wide (see `camera_rig`), ahead [3] (where head lights
    point).
    """
    height, width = size
    turn, eye, wide, ahead = (view[key] for key in ("turn", "eye", "wide", "ahead"))
    rig = camera_rig(turn, eye, size, wide=wide)
    near, who = first_hit(street, rig)
    dark = shadows(street, rig, weather, near, who)
    color = shade(street, condition, weather, rig, near, who, dark, ahead)
    color = color.reshape(height, width, 3)

    # four rays instead of one where the picture has edges
    edge = edges(color, (who + 1000 * dark).reshape(size))
    fine = camera_rig(turn, eye, size, 2, wide)
    wanted = doubled(edge)
    some = np.flatnonzero(wanted)
    near2, who2 = (value[some] for value in first_hit(street, fine, wanted))
    dark2 = doubled(dark.reshape(size))[some]
    fine = dict(fine, rays=fine["rays"][some])
    four = np.zeros((4 * height * width, 3), np.float32)
    four[some] = shade(street, condition, weather, fine, near2, who2, dark2, ahead)
    four = four.reshape(height, 2, width, 2, 3)
    mean = (four[:, 0, :, 0] + four[:, 0, :, 1] + four[:, 1, :, 0] + four[:, 1, :, 1]) / 4
    color[edge] = mean[edge]

    kind = np.where(who < 0, 0, street.things["kind"][who]).reshape(size)
    zone = np.where(who < 0, -1, who - len(street.things["kind"]) + 3).reshape(size)
    if condition == "day-rain":
        color = mirrored(color, zone)
    color = np.sqrt(np.clip(color * weather["exposure"], 0, 1.2))  # as seen
    if condition == "day-rain":
        color = streaked(color, rng)
    color = color + weather["noise"] * rng.standard_normal(color.shape, np.float32)
    return (np.clip(color, 0, 1) * 255 + .5).astype(np.uint8), kind, near.reshape(size)


def edges(color, mark):
    """Which pixels [H, W] differ in mark [H, W] or brightness from one above, below or beside."""
    tone = np.sqrt(color @ np.float32([.3, .4, .3]))
    edge = np.zeros(mark.shape, bool)
    for a, b in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        differs = (mark[a] != mark[b]) | (np.abs(tone[a] - tone[b]) > .1)
        edge[a] |= differs
        edge[b] |= differs
    return edge


def doubled(pixels):
    """Values [H, W] of pixels for their 2 x 2 rays each: [4 H W]."""
    return pixels.repeat(2, 0).repeat(2, 1).ravel()


def mirrored(color, zone):
    """A wet street: what stands on it appears upside down below its foot.

    zone [H, W]: -1 or less is no ground, 0 road, 1 sidewalk, 2 terrain.
    """
    height, width = zone.shape
    wet = np.choose(np.maximum(zone, -1) + 1, [0, 1, .4, 0])[..., None]
    rows = np.arange(height)[:, None]
    foot = np.maximum.accumulate(np.where(zone >= 0, 0, rows), 0)
    mirror = 0
    for blur in (-2, 0, 2):
        above = np.clip(2 * foot - rows + blur, 0, height - 1)
        mirror = mirror + color[above, np.arange(width)]
    return color * (1 - .5 * wet) + .45 * wet * (mirror / 3)


def streaked(color, rng):
    """A picture in the rain: paler, and with bright streaks, one per 160 pixels."""
    height, width = color.shape[:2]
    color = .75 * color + .25 * (color @ np.float32([1, 1, 1]) / 3)[..., None]
    count, long = height * width // 160, np.arange(round(height / 10))
    top, left = rng.uniform(-8, height, (count, 1)), rng.uniform(0, width, (count, 1))
    rows, cols = (top + long).astype(int), (left + .15 * long).astype(int)
    bright = rng.uniform(.03, .12, (count, 1)).repeat(len(long), 1)
    there = (rows >= 0) & (rows < height) & (cols < width)
    color[rows[there], cols[there]] += bright[there, None]
    return color


# ---- sweeps --------------------------------------------------------------------------------------
def scan(street, condition, rig, rng, lidar):
    """One LiDAR sweep. lidar: its entry in `domains.py`.

    Returns of the rays that come back, in the rig's order: their numbers [N], places [N, 3] in
    the sensor's frame, m, echoes [N] (whatever unit; not negative) and things' numbers [N].
    """
    things = street.things
    near, who = first_hit(street, rig)
    _, _, normal = surface(things, who, rig["eye"] + near[:, None] * rig["rays"])
    straight = np.abs(dot(normal, rig["rays"]))

    # the noise
    lost = rng.random(len(near))  # a return is lost where this is small
    fading = rng.normal(0, .18, len(near))  # of the intensity, as the logarithm of a factor
    spread = rng.normal(0, .02, len(near))  # of the range, m
    blur = rng.standard_normal(len(near))  # of the range, in units of the thing's roughness
    if condition == "day-rain":
        loss, wet = .09, .95
    else:
        loss, wet = .03, 1
    dim = np.exp(fading - near / lidar["fade"])
    echo = things["echo"][who] * (.6 + .4 * straight) * dim * wet
    back = np.flatnonzero((who >= 0) & (near < lidar["reach"]) & (lost > loss))
    near = near + spread + things["rough"][who] * blur
    place = (rig["rays"] @ rig["turn"]) * near[:, None]  # in the sensor's frame
    return back, place[back], echo[back], who[back]
