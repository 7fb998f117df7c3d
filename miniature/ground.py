"""The ground of a street: its course, its road, the strips beside it, a crossing road.

A street has its own frame: x along it, y to the left, z up, metres. Its middle line meanders
around y = 0; `across` is the offset to the left of that line, m. Either side is cut into blocks,
each with strips of its own.
"""
import numpy as np

LANE = 3.1  # a lane's width, m
BLOCK = 20.0  # a block's length, m
CURB = 0.15  # the curb's height, m
BEHIND = 60.0  # from the street's end behind the ego to the ego's first place, m
AHEAD = 90.0  # from the ego's last place to the street's end ahead, m


class Ground:
    """The ground of a street in which the ego moves from x = 0 to x = length, m.

    often: how often there is what, see `street.OFTEN`.

    edges [2, blocks, 3]: where road, first and second strip end, from the middle to the left and
    to the right, m. zones [2, blocks, 3]: the materials of the three strips beside the road,
    1 sidewalk, 2 terrain. The third strip has no end.
    """

    def __init__(self, rng, length, often):
        self.length = float(length)
        self.often = often
        # the course: a sine of this period over 2 pi (m), phase and largest slope
        self.wave = rng.uniform(25, 60)
        self.phase = rng.uniform(0, 6.3)
        self.bend = rng.uniform(-.2, .2)

        # the road: one or two lanes a side, in some blocks with room to park
        blocks = int((BEHIND + self.length + AHEAD) / BLOCK) + 1
        self.lanes = 1 + (rng.random(2) < often["lanes"])  # on the left and on the right side
        self.parking = rng.random((2, blocks)) < often["parking"]
        road = self.lanes[:, None] * LANE + 2.4 * self.parking

        # the strips beside it: mostly sidewalk, terrain, sidewalk, or the other way round
        first = road + rng.uniform(1.8, 5, (2, blocks))
        second = first + rng.uniform(2, 7, (2, blocks))
        self.edges = np.stack([road, first, second], -1).astype(np.float32)
        paved = rng.random((2, blocks, 1)) < often["sidewalk"]
        order = np.where(paved, [[[1, 2, 1]]], [[[2, 1, 2]]])
        swapped = rng.random((2, blocks, 3)) < .15
        self.zones = np.where(swapped, 3 - order, order)

        # the crossing road: its middle and its half width, m, which is 0 where there is none
        self.cross = rng.uniform(18, self.length + 55)
        self.cross_half = rng.uniform(3.5, 6) * (rng.random() < .6)

    def middle(self, x):
        """y of the street's middle line at x, m."""
        return self.bend * self.wave * np.sin(x / self.wave + self.phase)

    def heading(self, x):
        """Direction of the street at x, radians to the left of the x axis."""
        return np.arctan(self.bend * np.cos(x / self.wave + self.phase))

    def zone_at(self, x, y):
        """What lies at x, y [R], and how far across the street that is.

        Returns zone [R]: 0 road, 1 sidewalk, 2 terrain; and across [R], m.
        """
        across = y - self.middle(x)
        far = np.abs(across)
        # side and block of a point are one row of the flattened arrays
        blocks = self.edges.shape[1]
        block = np.clip((x + BEHIND) / BLOCK, 0, blocks - 1).astype(np.int32)
        row = block + (across < 0) * blocks
        road, first, second = self.edges.reshape(-1, 3).T
        strip = (far > first[row]).astype(np.int32) + (far > second[row])
        zone = np.where(far < road[row], 0, self.zones.ravel()[row * 3 + strip])

        # the crossing road, with 2 m of sidewalk along it
        if self.cross_half:
            beside = np.abs(x - self.cross) - self.cross_half
            with_sidewalk = np.where((beside < 2) & (zone > 0), 1, zone)
            zone = np.where(beside < 0, 0, with_sidewalk)
        return zone, across
