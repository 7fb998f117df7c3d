"""A street of the miniature world: what stands where, of which class, colour, texture and LiDAR reflectivity.

A street has its own frame: x along it, y to the left, z up, metres. Everything in it is a "thing" (box with tapered
sides, ellipsoid, upright cylinder); the last three things are the ground's materials: road, sidewalk, terrain.
Colours of the classes overlap on purpose: texture, shape and place tell them apart, and the LiDAR's intensity.
"""
import numpy as np

CATEGORIES = """noise animal human.pedestrian.adult human.pedestrian.child human.pedestrian.construction_worker
human.pedestrian.personal_mobility human.pedestrian.police_officer human.pedestrian.stroller
human.pedestrian.wheelchair movable_object.barrier movable_object.debris movable_object.pushable_pullable
movable_object.trafficcone static_object.bicycle_rack vehicle.bicycle vehicle.bus.bendy vehicle.bus.rigid vehicle.car
vehicle.construction vehicle.emergency.ambulance vehicle.emergency.police vehicle.motorcycle vehicle.trailer
vehicle.truck flat.driveable_surface flat.other flat.sidewalk flat.terrain static.manmade static.other
static.vegetation vehicle.ego""".split()  # nuScenes' categories in the order of their lidarseg index
PEDESTRIAN, BARRIER, BUS, CAR, TRUCK, ROAD, SIDEWALK, TERRAIN, MANMADE, VEGETATION = map(CATEGORIES.index, (
    "human.pedestrian.adult", "movable_object.barrier", "vehicle.bus.rigid", "vehicle.car", "vehicle.truck",
    "flat.driveable_surface", "flat.sidewalk", "flat.terrain", "static.manmade", "static.vegetation"))
BOX, ELLIPSOID, CYLINDER, GROUND = range(4)
LANE, BLOCK, CURB, BEHIND, AHEAD = 3.1, 20.0, 0.15, 60.0, 90.0  # m: lane's width, block's length, curb's height, ends

# What a thing has besides its place and half size. `front`, `back`, `side`: m that the side moves in per m of height.
# Texture: noise of strength `grain` and period `scale` m; and cells of pu x pv m (shifted by `shift` from row to row,
# sheared by `slant`), whose first fu x fv part shows `ink`, at heights v0..v1. `glow`: share of cells lit at night.
# `wheel`: radius, m. `lights`: has tail lights. `echo`: mean LiDAR intensity. `rough`: spread of the LiDAR's range, m.
LOOK = dict(color=(.5, .5, .5), ink=(.1, .1, .1), pu=1., pv=1., shift=0., slant=0., fu=0., fv=0., v0=-9., v1=99.,
            grain=.1, scale=.3, glow=0., wheel=0., lights=0., echo=40., rough=0., front=0., back=0., side=0.)
PAINT = {"grey": (.52, .52, .52), "light": (.72, .71, .69), "dark": (.30, .30, .32), "white": (.88, .88, .86),
         "black": (.14, .14, .15), "beige": (.72, .65, .52), "brick": (.58, .34, .27), "brown": (.44, .35, .26),
         "green": (.30, .46, .22), "olive": (.42, .45, .26), "moss": (.22, .34, .20), "blue": (.27, .37, .58),
         "red": (.64, .20, .17), "yellow": (.80, .68, .25), "orange": (.76, .46, .18)}
CHOICES = {ROAD: "grey grey dark dark brown", SIDEWALK: "grey light beige brick olive dark",  # repeats are weights
           TERRAIN: "green green olive brown moss grey beige", VEGETATION: "green green moss moss olive brown orange",
           MANMADE: "grey light beige brick brick brown white green olive blue dark",
           CAR: "grey light white dark black red blue green moss olive beige brick",
           TRUCK: "white grey light green blue beige red olive brick orange",
           BUS: "red yellow blue white green light grey orange olive",
           BARRIER: "grey light white orange red olive yellow",
           PEDESTRIAN: "dark grey blue red green brown white black beige orange"}


class Street:
    """Everything that stands in a street in which the ego moves from x = 0 to x = length, m; a function of rng.

    things: dict of arrays, one row per thing; lamps [L, 3]: street lamps; edges [2, blocks, 3]: where, to the left and
    to the right of the middle, road, first and second strip end; zones [2, blocks, 3]: the strips' materials.
    """

    def __init__(self, rng, length):
        self.rng, self.length = rng, float(length)
        self.wave, self.phase, self.bend = rng.uniform(25, 60), rng.uniform(0, 6.3), rng.uniform(-.2, .2)
        blocks = int((BEHIND + self.length + AHEAD) / BLOCK) + 1
        self.lanes = 1 + (rng.random(2) < .25)  # on the left and on the right side
        self.parking = rng.random((2, blocks)) < .45
        road = self.lanes[:, None] * LANE + 2.4 * self.parking
        first = road + rng.uniform(1.8, 5, (2, blocks))
        self.edges = np.stack([road, first, first + rng.uniform(2, 7, (2, blocks))], -1).astype(np.float32)
        order = np.where(rng.random((2, blocks, 1)) < .55, [[[1, 2, 1]]], [[[2, 1, 2]]])  # 1 sidewalk, 2 terrain
        self.zones = np.where(rng.random((2, blocks, 3)) < .15, 3 - order, order)
        self.cross = rng.uniform(18, self.length + 55)  # a crossing road's middle; its half width may be 0
        self.cross_half = rng.uniform(3.5, 6) * (rng.random() < .6)
        self.things, self.taken, self.lamps = [], {}, []
        for block in range(blocks):
            for side in (0, 1):
                self.fill_road(block, side)
                self.fill_edge(block, side)
                self.fill_land(block, side)
        self.pave()
        self.things = {key: np.array([thing[key] for thing in self.things],
                                     np.int32 if key in ("shape", "kind") else np.float32) for key in self.things[0]}
        self.lamps = np.array(self.lamps, np.float32).reshape(-1, 3)
        del self.rng

    def middle(self, x):
        return self.bend * self.wave * np.sin(x / self.wave + self.phase)

    def heading(self, x):
        return np.arctan(self.bend * np.cos(x / self.wave + self.phase))

    def zone_at(self, x, y):
        """The ground at x, y [R]: 0 road, 1 sidewalk, 2 terrain; and the offset to the street's middle [R], m."""
        across = y - self.middle(x)
        block = np.clip((x + BEHIND) / BLOCK, 0, self.edges.shape[1] - 1).astype(np.int32)
        row = block + (across < 0) * self.edges.shape[1]
        edges, zones, far = self.edges.reshape(-1, 3), self.zones.reshape(-1, 3), np.abs(across)
        strip = (far > edges[:, 1][row]).astype(np.int32) + (far > edges[:, 2][row])
        zone = np.where(far < edges[:, 0][row], 0, zones.ravel()[row * 3 + strip])
        if self.cross_half:
            beside = np.abs(x - self.cross) - self.cross_half
            zone = np.where(beside < 0, 0, np.where((beside < 2) & (zone > 0), 1, zone))
        return zone, across

    # ---- placing
    def free(self, x, across, half_x, half_across, roadside=True):
        """Claim a place; False if it is taken, in the ego's way or (for roadside things) on the crossing road."""
        if roadside and self.cross_half and abs(x - self.cross) < self.cross_half + half_x + .5:
            return False
        if -12 < x + half_x and x - half_x < self.length + 9 and abs(across + LANE / 2) < 1.4 + half_across:
            return False
        block = int(x // BLOCK)  # nothing is longer than a block, so that only the neighbours matter
        for a, b, c, d in (place for near in (block - 1, block, block + 1) for place in self.taken.get(near, ())):
            if abs(x - a) < half_x + c and abs(across - b) < half_across + d:
                return False
        self.taken.setdefault(block, []).append((x, across, half_x, half_across))
        return True

    def pick(self, names):
        return names[self.rng.integers(len(names))]

    def paint(self, kind, name=None):
        color = np.array(PAINT[name or self.pick(CHOICES[kind].split())])
        return np.clip(color * self.rng.uniform(.82, 1.15) + self.rng.normal(0, .025, 3), .03, .95)

    def add(self, kind, shape, x, across, z, size, turn=0., ahead=0., **look):
        """A thing of size (length, width, height) m with its bottom at z, `ahead` m before (x, across) of the street."""
        yaw, half = self.heading(x) + turn, np.array(size) / 2
        at = (x + ahead * np.cos(yaw), self.middle(x) + across + ahead * np.sin(yaw), z + half[2])
        self.things.append(dict(LOOK, shape=shape, kind=kind, at=at, yaw=yaw, half=half, **look))

    # ---- kinds of things
    def car(self, x, across, turn, roadside=False):
        rng, length, width, high = self.rng, self.rng.uniform(3.9, 4.8), 1.85, self.rng.uniform(.62, .8)
        if self.claim(x, across, turn, length, width, roadside):
            echo = rng.uniform(44, 62)
            look = dict(turn=turn, color=self.paint(CAR), ink=self.glass(), grain=.04, scale=.8)
            self.add(CAR, BOX, x, across, .2, (length, width, high), front=.12, back=.08, side=.05, wheel=.34, lights=1,
                     echo=echo, **look)
            cabin = length * rng.uniform(.52, .68), width - .12, rng.uniform(.5, .68)
            self.add(CAR, BOX, x, across, .2 + high, cabin, ahead=rng.uniform(-.7, -.1), front=.75, back=.4, side=.22,
                     pu=1.15, pv=5, fu=.88, fv=1, v0=.06, v1=.48, echo=echo * .7, **look)

    def truck(self, x, across, turn, roadside=False):
        rng, length, width = self.rng, self.rng.uniform(6.5, 8.5), 2.45
        if self.claim(x, across, turn, length, width, roadside):
            cab, look = rng.uniform(1.9, 2.3), dict(turn=turn, grain=.04, scale=.8)
            pattern = self.pick([{}, dict(pu=.5, pv=9, fu=.4, fv=1), dict(pu=30, pv=9, fu=1, fv=1, v0=.9, v1=1.5)])
            self.add(TRUCK, BOX, x, across, .95, (length - cab - .3, width, rng.uniform(2.1, 2.7)), echo=78,
                     ahead=-cab / 2 - .15, color=self.paint(TRUCK), ink=self.paint(TRUCK), **look, **pattern)
            self.add(TRUCK, BOX, x, across, .3, (length, width - .2, .65), wheel=.48, lights=1, echo=70,
                     color=self.paint(TRUCK, "dark"), **look)
            self.add(TRUCK, BOX, x, across, .6, (cab, width - .1, rng.uniform(1.75, 2.1)), ahead=(length - cab) / 2,
                     front=.2, color=self.paint(TRUCK), ink=self.glass(), pu=9, pv=9, fu=1, fv=1, v0=.85, v1=1.5,
                     echo=74, **look)

    def bus(self, x, across, turn, roadside=False):
        rng, length, width, high = self.rng, self.rng.uniform(9.5, 12), 2.55, self.rng.uniform(2.6, 2.9)
        if self.claim(x, across, turn, length, width, roadside):
            look = dict(turn=turn, color=self.paint(BUS), grain=.04, scale=.8)
            self.add(BUS, BOX, x, across, .3, (length, width, high), ink=self.glass(), pu=rng.uniform(1.1, 1.7), pv=9,
                     fu=.86, fv=1, v0=.85, v1=1.9, wheel=.46, lights=1, glow=.7, echo=116, **look)
            self.add(BUS, BOX, x, across, .3 + high, (length * .45, 1.7, .3), echo=110, **look)

    def claim(self, x, across, turn, length, width, roadside):
        if abs(np.sin(turn)) > .5:
            length, width = width, length
        return self.free(x, across, length / 2 + .5, width / 2 + .1, roadside)

    def glass(self):
        return np.array(PAINT["black"]) * self.rng.uniform(.8, 1.6)

    def pedestrian(self, x, across):
        if self.free(x, across, .3, .3, roadside=False):
            rng, tall, turn = self.rng, self.rng.uniform(.92, 1.08), self.rng.uniform(0, 6.3)
            z = CURB * (self.zone_at(np.array([x]), np.array([self.middle(x) + across]))[0][0] > 0)
            self.add(PEDESTRIAN, BOX, x, across, z, (.32, .38, .86 * tall), turn, color=self.paint(PEDESTRIAN), echo=13,
                     pu=.5, pv=9, fu=.1, fv=1)
            self.add(PEDESTRIAN, BOX, x, across, z + .84 * tall, (.34, .56, .62 * tall), turn, front=.06, back=.06,
                     side=.1, color=self.paint(PEDESTRIAN), echo=13)
            self.add(PEDESTRIAN, ELLIPSOID, x, across, z + 1.46 * tall, (.25, .23, .30), turn, echo=13,
                     color=self.paint(PEDESTRIAN, "beige") * rng.uniform(.5, 1.1))

    def tree(self, x, across):
        if self.free(x, across, .8, .8):
            trunk, crown, color = self.rng.uniform(1.6, 2.6), self.rng.uniform(1.1, 2.0), self.paint(VEGETATION)
            self.add(VEGETATION, CYLINDER, x, across, 0, (.38, .38, trunk + 1), grain=.35, scale=.12, echo=21,
                     color=self.paint(VEGETATION, "brown") * .7)
            for lift, part in ((0, 1), (crown * .9, .72))[:self.rng.integers(1, 3)]:
                self.add(VEGETATION, ELLIPSOID, x, across, trunk + lift, np.array([2, 2, 2.1]) * crown * part,
                         ahead=self.rng.normal(0, .2), color=color, grain=.55, scale=.32, echo=21, rough=.18)

    def bush(self, x, across):
        if self.free(x, across, 1, .8):
            wide, high = self.rng.uniform(1, 1.9), self.rng.uniform(1.1, 1.8)
            self.add(VEGETATION, ELLIPSOID, x, across, -.2, (wide, wide, high), color=self.paint(VEGETATION), grain=.5,
                     scale=.22, echo=21, rough=.1)

    def building(self, x, across, long, deep):
        if self.free(x, across, long / 2, deep / 2):
            rng, high = self.rng, self.rng.uniform(3.5, 12)
            ink = self.paint(MANMADE, self.pick(["black", "dark", "blue", "light"]))
            self.add(MANMADE, BOX, x, across, 0, (long, deep, high), color=self.paint(MANMADE), ink=ink, grain=.12,
                     pu=rng.uniform(1.8, 3.2), pv=rng.uniform(2.4, 3.2), fu=rng.uniform(.35, .7), v0=.7, glow=.35,
                     fv=rng.uniform(.4, .6), scale=rng.uniform(.15, .6), echo=rng.uniform(34, 44))
            if rng.random() < .45:  # a gable roof
                self.add(MANMADE, BOX, x, across, high, (long + .6, deep + .6, deep * .35), side=1.2, pu=40, pv=.5,
                         fu=1, fv=.25, color=self.paint(MANMADE), ink=self.paint(MANMADE, "dark"), echo=38)

    # ---- filling one block of one side
    def fill_road(self, block, side):
        """Parked along it, driving on its lanes, waiting on the crossing road, walking across."""
        rng, start, sign, edge = self.rng, block * BLOCK - BEHIND, (1, -1)[side], self.edges[side, block, 0]
        turn = side * np.pi + np.pi
        if self.parking[side, block]:
            if rng.random() < .3:
                self.pick([self.truck, self.bus])(start + 10, sign * (edge - 1.25), turn, True)
            for slot in (3.3, 10, 16.7):
                if rng.random() < .6:
                    self.car(start + slot, sign * (edge - 1.15), turn, True)
        for lane in range(self.lanes[side]):
            if rng.random() < .45:
                drive = self.pick([self.car, self.car, self.car, self.truck, self.truck, self.bus])
                drive(start + rng.uniform(2, 18), sign * (lane + .5) * LANE, turn)
        if start <= self.cross < start + BLOCK and self.cross_half and rng.random() < .7:
            self.pick([self.car, self.truck, self.bus])(self.cross - sign * 1.7, sign * (edge + 9), sign * np.pi / 2)
        if rng.random() < .12:
            for _ in range(2):
                self.pedestrian(start + rng.uniform(8, 10), sign * rng.uniform(.5, edge - 1))

    def fill_edge(self, block, side):
        """Along the curb: barriers, groups of pedestrians, lamp posts, signs."""
        rng, start, sign, edge = self.rng, block * BLOCK - BEHIND, (1, -1)[side], self.edges[side, block, 0]
        if rng.random() < .55:
            ink = self.paint(BARRIER, self.pick(["red", "orange", "white", "dark"]))
            look = dict(color=self.paint(BARRIER), ink=ink, pu=.7, pv=9, slant=self.pick([0., .7]), fv=1, v0=.35, side=.12,
                        fu=.5 * (rng.random() < .75))
            low, across = start + rng.uniform(0, 8), sign * (edge - .4)
            for x in low + 2.1 * np.arange(rng.integers(3, 7)):
                if self.free(x, across, 1, .3):
                    self.add(BARRIER, BOX, x, across, 0, (1.95, .55, 1.), grain=.08, echo=160, **look)
        if rng.random() < .6:
            x, across = start + rng.uniform(1, 19), sign * (edge + rng.uniform(.5, 1.9))
            for _ in range(rng.integers(2, 6)):
                self.pedestrian(x + rng.normal(0, 1.2), across + rng.normal(0, .5))
        across = sign * (edge + .5)
        metal = dict(color=self.paint(MANMADE, "grey"), echo=62, grain=.05)
        if rng.random() < .7 and self.free(x := start + rng.uniform(1, 19), across, .3, .3):
            self.add(MANMADE, CYLINDER, x, across, 0, (.26, .26, 5.6), **metal)
            self.add(MANMADE, BOX, x, across - sign * .8, 5.5, (.3, 1.9, .16), glow=2., **metal)
            self.lamps.append((x, self.middle(x) + across - sign * 1.3, 5.4))
        if rng.random() < .5 and self.free(x := start + rng.uniform(1, 19), across, .3, .3):
            self.add(MANMADE, CYLINDER, x, across, 0, (.14, .14, 2.4), **metal)
            self.add(MANMADE, BOX, x, across, 2., (.08, .8, .8), pu=3, pv=9, fu=1, fv=1, v0=.3, v1=.5, echo=70,
                     color=self.paint(MANMADE, self.pick(["red", "blue", "yellow"])), ink=self.paint(MANMADE, "white"))

    def fill_land(self, block, side):
        """Beside the road: trees, bushes, hedges, two rows of buildings (the second closes the first one's gaps)."""
        rng, start, sign, (edge, one, two) = self.rng, block * BLOCK - BEHIND, (1, -1)[side], self.edges[side, block]
        for low, high, zone in zip((edge + 1, one, two), (one, two, two + 4), self.zones[side, block]):
            for _ in range(rng.integers(0, zone + 1)):
                plant = self.tree if rng.random() < .55 else self.bush
                plant(start + rng.uniform(1, 19), sign * rng.uniform(low, max(high, low + .5)))
        if rng.random() < .3 and self.free(start + 10, sign * (two + .6), 7.5, .5):
            self.add(VEGETATION, BOX, start + 10, sign * (two + .6), 0, (15, .9, rng.uniform(1., 1.7)), grain=.5,
                     color=self.paint(VEGETATION), scale=.22, echo=21, rough=.1)
        deep = rng.uniform(6, 10)
        self.building(start + 10, sign * (two + rng.uniform(1.6, 6) + deep / 2), rng.uniform(12, 18.5), deep)
        self.building(start + 10, sign * (two + 26), 18, 9)

    def pave(self):
        """The ground's three materials, last of the things."""
        rng, nowhere = self.rng, dict(shape=GROUND, at=(0, 0, 0), yaw=0., half=(0, 0, 0), v0=-1e4, v1=1e4)
        slab, tile = self.paint(SIDEWALK), rng.uniform(.6, 1.3)
        for kind, look in ((ROAD, dict(color=self.paint(ROAD), grain=.16, scale=.12, echo=7)),
                           (SIDEWALK, dict(color=slab * .6, ink=slab, pu=tile, pv=tile * rng.uniform(.5, 1), fu=.9,
                                           fv=.88, shift=self.pick([0., .5]), grain=.06, scale=.5, echo=15)),
                           (TERRAIN, dict(color=self.paint(TERRAIN), grain=.6, scale=.35, rough=.03, echo=28))):
            look["echo"] *= rng.uniform(.92, 1.08)
            self.things.append(dict(LOOK, kind=kind, **{**nowhere, **look}))
