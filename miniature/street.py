"""A street of the miniature world: what stands where, and how it looks to a camera and a LiDAR.

Everything in a street is a "thing": a box with tapered sides, an ellipsoid or an upright cylinder.
The last three things are the ground's materials: road, sidewalk, terrain; `ground.py` says where
they lie. The classes' colours overlap on purpose: texture, shape and place tell them apart, and so
does the LiDAR's intensity.
"""
import numpy as np

from miniature.ground import BEHIND, BLOCK, CURB, LANE, Ground

# nuScenes' categories in the order of their lidarseg index
CATEGORIES = """noise animal human.pedestrian.adult human.pedestrian.child
human.pedestrian.construction_worker human.pedestrian.personal_mobility
human.pedestrian.police_officer human.pedestrian.stroller human.pedestrian.wheelchair
movable_object.barrier movable_object.debris movable_object.pushable_pullable
movable_object.trafficcone static_object.bicycle_rack vehicle.bicycle vehicle.bus.bendy
vehicle.bus.rigid vehicle.car vehicle.construction vehicle.emergency.ambulance
vehicle.emergency.police vehicle.motorcycle vehicle.trailer vehicle.truck flat.driveable_surface
flat.other flat.sidewalk flat.terrain static.manmade static.other static.vegetation
vehicle.ego""".split()
PEDESTRIAN = CATEGORIES.index("human.pedestrian.adult")
BARRIER = CATEGORIES.index("movable_object.barrier")
BUS = CATEGORIES.index("vehicle.bus.rigid")
CAR = CATEGORIES.index("vehicle.car")
TRUCK = CATEGORIES.index("vehicle.truck")
ROAD = CATEGORIES.index("flat.driveable_surface")
SIDEWALK = CATEGORIES.index("flat.sidewalk")
TERRAIN = CATEGORIES.index("flat.terrain")
MANMADE = CATEGORIES.index("static.manmade")
VEGETATION = CATEGORIES.index("static.vegetation")
BOX, ELLIPSOID, CYLINDER, GROUND = range(4)  # a thing's shape
POLE, SIGN = 1, 2  # parts of what is manmade; 0: a building

# What a thing has besides its place and half size.
LOOK = dict(
    # the texture's cells of pu x pv m, shifted by `shift` from row to row, sheared by `slant`;
    # their first fu x fv part shows `ink`, at heights from v0 to v1 m
    color=(.5, .5, .5), ink=(.1, .1, .1), pu=1., pv=1., fu=0., fv=0., shift=0., slant=0.,
    v0=-9., v1=99.,
    grain=.1, scale=.3,  # strength and period (m) of the noise on the colour
    glow=0., wheel=0., lights=0.,  # share of cells lit at night; wheels' radius, m; has tail lights
    echo=40., rough=0.,  # mean LiDAR intensity; spread of the LiDAR's range, m
    part=0,  # of what is manmade
    front=0., back=0., side=0.)  # m that this side moves inwards per m of height
PAINT = {
    "grey": (.52, .52, .52), "light": (.72, .71, .69), "dark": (.30, .30, .32),
    "white": (.88, .88, .86), "black": (.14, .14, .15), "beige": (.72, .65, .52),
    "brick": (.58, .34, .27), "brown": (.44, .35, .26), "green": (.30, .46, .22),
    "olive": (.42, .45, .26), "moss": (.22, .34, .20), "blue": (.27, .37, .58),
    "red": (.64, .20, .17), "yellow": (.80, .68, .25), "orange": (.76, .46, .18),
    "cream": (.86, .80, .66), "ochre": (.74, .58, .32), "rose": (.76, .54, .50),
    "slate": (.24, .28, .33), "pine": (.14, .24, .18)}
CHOICES = {  # the paints of a class; repeats are weights
    ROAD: "grey grey dark dark brown",
    SIDEWALK: "grey light beige brick olive dark",
    TERRAIN: "green green olive brown moss grey beige",
    VEGETATION: "green green moss moss olive brown orange",
    MANMADE: "grey light beige brick brick brown white green olive blue dark",
    CAR: "grey light white dark black red blue green moss olive beige brick",
    TRUCK: "white grey light green blue beige red olive brick orange",
    BUS: "red yellow blue white green light grey orange olive",
    BARRIER: "grey light white orange red olive yellow",
    PEDESTRIAN: "dark grey blue red green brown white black beige orange"}
OFTEN = dict(  # how often there is what, in nuScenes' streets; `domains.py` has the others'
    # shares: sides with a second lane, blocks with room to park, blocks that begin with a sidewalk
    lanes=.25, parking=.45, sidewalk=.55,
    # shares: parked trucks or buses, parked cars, lanes with a vehicle, blocks with a jaywalker
    parked_big=.3, parked=.6, driving=.45, jaywalkers=.12,
    # shares of blocks: with barriers, a group of pedestrians, a lamp, a sign, a hedge, no building
    barriers=.55, groups=.6, lamps=.7, signs=.5, hedges=.3, gaps=0.,
    group=(2, 6), plants=1, trees=.55,  # pedestrians a group; a factor of plants, trees among them
    # buildings: height, m, share with a gable; {class: paints in the place of CHOICES}
    high=(3.5, 12), gables=.45, paints={},
    # which vehicles park, drive and wait at a crossing; repeats are weights
    big="truck bus", drivers="car car car truck truck bus", waiting="car truck bus")


class Street(Ground):
    """Everything in a street in which the ego moves from x = 0 to x = length, m; a function of rng.

    things: dict of arrays, one row per thing: LOOK's keys, shape, kind (its category), at [T, 3]
    (its centre, m), yaw [T] (radians) and half [T, 3] (half its length, width and height, m);
    instance (a number that the things of one car share, 0: ground) and moves (0 or 1).
    lamps [L, 3]: places of the street lamps, m.
    """

    def __init__(self, rng, length, often=OFTEN):
        super().__init__(rng, length, often)
        self.rng = rng
        self.things, self.lamps = [], []
        self.taken = {}  # block: the places claimed in it
        self.instance, self.moves = 0, 0  # of the things that are added now
        for block in range(self.edges.shape[1]):
            for side in (0, 1):
                self.fill_road(block, side)
                self.fill_edge(block, side)
                self.fill_land(block, side)
        self.pave()
        self.things = columns(self.things)
        self.lamps = np.array(self.lamps, np.float32).reshape(-1, 3)
        del self.rng

    # ---- placing
    def free(self, x, across, half_x, half_across, roadside=True):
        """Claim a place, m. False if it is taken, in the ego's way or on the crossing road.

        Things that are not `roadside` may stand on the crossing road.
        """
        if roadside and self.cross_half:
            if abs(x - self.cross) < self.cross_half + half_x + .5:
                return False
        along_ego = -12 < x + half_x and x - half_x < self.length + 9
        if along_ego and abs(across + LANE / 2) < 1.4 + half_across:
            return False
        block = int(x // BLOCK)  # nothing is longer than a block: only the neighbours matter
        for near in (block - 1, block, block + 1):
            for a, b, c, d in self.taken.get(near, ()):
                if abs(x - a) < half_x + c and abs(across - b) < half_across + d:
                    return False
        self.taken.setdefault(block, []).append((x, across, half_x, half_across))
        self.instance += 1
        return True

    def claim(self, x, across, turn, length, width, roadside):
        """Claim a vehicle's place, with some room around it."""
        if abs(np.sin(turn)) > .5:  # it stands across the street
            length, width = width, length
        return self.free(x, across, length / 2 + .5, width / 2 + .1, roadside)

    def pick(self, choices):
        return choices[self.rng.integers(len(choices))]

    def vehicle(self, choices):
        """The method that adds one of these vehicles, names with spaces between."""
        return getattr(self, self.pick(choices.split()))

    def paint(self, kind, name=None):
        """A colour [3] of this class, or a shade of the paint `name`."""
        name = name or self.pick((CHOICES | self.often["paints"])[kind].split())
        brightness = self.rng.uniform(.82, 1.15)
        tint = self.rng.normal(0, .025, 3)
        return np.clip(np.array(PAINT[name]) * brightness + tint, .03, .95)

    def glass(self):
        return np.array(PAINT["black"]) * self.rng.uniform(.8, 1.6)

    def add(self, kind, shape, place, size, turn=0., ahead=0., **look):
        """Add a thing of `size` (length, width, height), m, turned to the left by `turn`, radians.

        place: (x, across, z), m, from which its bottom lies `ahead` m in its own direction.
        look: where it differs from LOOK.
        """
        x, across, z = place
        half = np.array(size) / 2
        yaw = self.heading(x) + turn
        along = x + ahead * np.cos(yaw)
        left = self.middle(x) + across + ahead * np.sin(yaw)
        at = (along, left, z + half[2])
        self.things.append(dict(LOOK, shape=shape, kind=kind, at=at, yaw=yaw, half=half,
                                instance=self.instance, moves=self.moves, **look))

    # ---- vehicles
    def car(self, x, across, turn, roadside=False):
        rng = self.rng
        length, width = rng.uniform(3.9, 4.8), 1.85
        high = rng.uniform(.62, .8)  # of the body, without the cabin
        if not self.claim(x, across, turn, length, width, roadside):
            return
        echo = rng.uniform(44, 62)
        look = dict(turn=turn, color=self.paint(CAR), ink=self.glass(), grain=.04, scale=.8)
        self.add(CAR, BOX, (x, across, .2), (length, width, high), echo=echo,
                 front=.12, back=.08, side=.05, wheel=.34, lights=1, **look)
        cabin = (length * rng.uniform(.52, .68), width - .12, rng.uniform(.5, .68))
        windows = dict(pu=1.15, pv=5, fu=.88, fv=1, v0=.06, v1=.48)
        self.add(CAR, BOX, (x, across, .2 + high), cabin, ahead=rng.uniform(-.7, -.1),
                 front=.75, back=.4, side=.22, echo=echo * .7, **look, **windows)

    def truck(self, x, across, turn, roadside=False):
        rng = self.rng
        length, width = rng.uniform(6.5, 8.5), 2.45
        if not self.claim(x, across, turn, length, width, roadside):
            return
        cab = rng.uniform(1.9, 2.3)  # its length, m
        look = dict(turn=turn, grain=.04, scale=.8)
        stripes = dict(pu=.5, pv=9, fu=.4, fv=1)
        band = dict(pu=30, pv=9, fu=1, fv=1, v0=.9, v1=1.5)
        pattern = self.pick([{}, stripes, band])
        # the box, the chassis below it, the driver's cab in front of it
        size = (length - cab - .3, width, rng.uniform(2.1, 2.7))
        self.add(TRUCK, BOX, (x, across, .95), size, ahead=-cab / 2 - .15, echo=78,
                 color=self.paint(TRUCK), ink=self.paint(TRUCK), **look, **pattern)
        self.add(TRUCK, BOX, (x, across, .3), (length, width - .2, .65), echo=70,
                 color=self.paint(TRUCK, "dark"), wheel=.48, lights=1, **look)
        size = (cab, width - .1, rng.uniform(1.75, 2.1))
        windows = dict(pu=9, pv=9, fu=1, fv=1, v0=.85, v1=1.5)
        self.add(TRUCK, BOX, (x, across, .6), size, ahead=(length - cab) / 2, echo=74,
                 color=self.paint(TRUCK), ink=self.glass(), front=.2, **look, **windows)

    def bus(self, x, across, turn, roadside=False):
        rng = self.rng
        length, width = rng.uniform(9.5, 12), 2.55
        high = rng.uniform(2.6, 2.9)
        if not self.claim(x, across, turn, length, width, roadside):
            return
        look = dict(turn=turn, color=self.paint(BUS), grain=.04, scale=.8)
        windows = dict(ink=self.glass(), pu=rng.uniform(1.1, 1.7), pv=9, fu=.86, fv=1,
                       v0=.85, v1=1.9)
        self.add(BUS, BOX, (x, across, .3), (length, width, high), echo=116,
                 wheel=.46, lights=1, glow=.7, **look, **windows)
        self.add(BUS, BOX, (x, across, .3 + high), (length * .45, 1.7, .3), echo=110, **look)

    # ---- what else there is
    def pedestrian(self, x, across):
        if not self.free(x, across, .3, .3, roadside=False):
            return
        rng = self.rng
        tall, turn = rng.uniform(.92, 1.08), rng.uniform(0, 6.3)
        zone, _ = self.zone_at(np.array([x]), np.array([self.middle(x) + across]))
        z = CURB * (zone[0] > 0)
        legs, trunk, head = (.32, .38, .86 * tall), (.34, .56, .62 * tall), (.25, .23, .30)
        self.add(PEDESTRIAN, BOX, (x, across, z), legs, turn, echo=13,
                 color=self.paint(PEDESTRIAN), pu=.5, pv=9, fu=.1, fv=1)
        self.add(PEDESTRIAN, BOX, (x, across, z + .84 * tall), trunk, turn, echo=13,
                 color=self.paint(PEDESTRIAN), front=.06, back=.06, side=.1)
        self.add(PEDESTRIAN, ELLIPSOID, (x, across, z + 1.46 * tall), head, turn, echo=13,
                 color=self.paint(PEDESTRIAN, "beige") * rng.uniform(.5, 1.1))

    def tree(self, x, across):
        if not self.free(x, across, .8, .8):
            return
        rng = self.rng
        trunk = rng.uniform(1.6, 2.6)  # its height, m
        crown = rng.uniform(1.1, 2.0)  # its radius, m
        color = self.paint(VEGETATION)
        self.add(VEGETATION, CYLINDER, (x, across, 0), (.38, .38, trunk + 1), grain=.35, scale=.12,
                 echo=21, color=self.paint(VEGETATION, "brown") * .7)
        balls = ((0, 1), (crown * .9, .72))  # how much higher, and of which part of the size
        for lift, part in balls[:rng.integers(1, 3)]:
            size = np.array([2, 2, 2.1]) * crown * part
            self.add(VEGETATION, ELLIPSOID, (x, across, trunk + lift), size,
                     ahead=rng.normal(0, .2), color=color, grain=.55, scale=.32, echo=21, rough=.18)

    def bush(self, x, across):
        if self.free(x, across, 1, .8):
            wide, high = self.rng.uniform(1, 1.9), self.rng.uniform(1.1, 1.8)
            self.add(VEGETATION, ELLIPSOID, (x, across, -.2), (wide, wide, high),
                     color=self.paint(VEGETATION), grain=.5, scale=.22, echo=21, rough=.1)

    def building(self, x, across, long, deep):
        if not self.free(x, across, long / 2, deep / 2):
            return
        rng = self.rng
        high = rng.uniform(*self.often["high"])
        ink = self.paint(MANMADE, self.pick(["black", "dark", "blue", "light"]))
        color = self.paint(MANMADE)
        windows = dict(ink=ink, pu=rng.uniform(1.8, 3.2), pv=rng.uniform(2.4, 3.2),
                       fu=rng.uniform(.35, .7), fv=rng.uniform(.4, .6), v0=.7, glow=.35)
        self.add(MANMADE, BOX, (x, across, 0), (long, deep, high), color=color, grain=.12,
                 scale=rng.uniform(.15, .6), echo=rng.uniform(34, 44), **windows)
        if rng.random() < self.often["gables"]:
            gable = (long + .6, deep + .6, deep * .35)
            self.add(MANMADE, BOX, (x, across, high), gable, side=1.2, pu=40, pv=.5, fu=1, fv=.25,
                     color=self.paint(MANMADE), ink=self.paint(MANMADE, "dark"), echo=38)

    def lamp_post(self, x, across, sign, metal):
        if self.free(x, across, .3, .3):
            self.add(MANMADE, CYLINDER, (x, across, 0), (.26, .26, 5.6), **metal)
            self.add(MANMADE, BOX, (x, across - sign * .8, 5.5), (.3, 1.9, .16), glow=2., **metal)
            self.lamps.append((x, self.middle(x) + across - sign * 1.3, 5.4))

    def traffic_sign(self, x, across, metal):
        if self.free(x, across, .3, .3):
            self.add(MANMADE, CYLINDER, (x, across, 0), (.14, .14, 2.4), **metal)
            color = self.paint(MANMADE, self.pick(["red", "blue", "yellow"]))
            band = dict(ink=self.paint(MANMADE, "white"), pu=3, pv=9, fu=1, fv=1, v0=.3, v1=.5)
            self.add(MANMADE, BOX, (x, across, 2.), (.08, .8, .8), color=color, echo=70, part=SIGN,
                     **band)

    # ---- filling one block of one side
    def corner(self, block, side):
        """Where a block begins (m), its side's sign (+1 left, -1 right), the road's edge (m)."""
        return block * BLOCK - BEHIND, (1, -1)[side], self.edges[side, block, 0]

    def fill_road(self, block, side):
        """Parked along it, driving on its lanes, waiting on the crossing road, walking across."""
        rng, often = self.rng, self.often
        start, sign, edge = self.corner(block, side)
        turn = side * np.pi + np.pi
        if self.parking[side, block]:
            if rng.random() < often["parked_big"]:
                park = self.vehicle(often["big"])
                park(start + 10, sign * (edge - 1.25), turn, True)
            for slot in (3.3, 10, 16.7):
                if rng.random() < often["parked"]:
                    self.car(start + slot, sign * (edge - 1.15), turn, True)
        self.moves = 1
        for lane in range(self.lanes[side]):
            if rng.random() < often["driving"]:
                drive = self.vehicle(often["drivers"])
                drive(start + rng.uniform(2, 18), sign * (lane + .5) * LANE, turn)
        self.moves = 0
        crossed = start <= self.cross < start + BLOCK and self.cross_half
        if crossed and rng.random() < .7:
            wait = self.vehicle(often["waiting"])
            wait(self.cross - sign * 1.7, sign * (edge + 9), sign * np.pi / 2)
        if rng.random() < often["jaywalkers"]:
            self.moves = 1
            for _ in range(2):
                self.pedestrian(start + rng.uniform(8, 10), sign * rng.uniform(.5, edge - 1))
            self.moves = 0

    def fill_edge(self, block, side):
        """Along the curb: barriers, groups of pedestrians, lamp posts, signs."""
        rng, often = self.rng, self.often
        start, sign, edge = self.corner(block, side)
        if rng.random() < often["barriers"]:
            ink = self.paint(BARRIER, self.pick(["red", "orange", "white", "dark"]))
            color, slant = self.paint(BARRIER), self.pick([0., .7])
            inked = .5 * (rng.random() < .75)
            look = dict(color=color, grain=.08, side=.12, echo=160,
                        ink=ink, pu=.7, pv=9, fu=inked, fv=1, slant=slant, v0=.35)
            first = start + rng.uniform(0, 8)
            across = sign * (edge - .4)
            for x in first + 2.1 * np.arange(rng.integers(3, 7)):
                if self.free(x, across, 1, .3):
                    self.add(BARRIER, BOX, (x, across, 0), (1.95, .55, 1.), **look)
        if rng.random() < often["groups"]:
            x = start + rng.uniform(1, 19)
            across = sign * (edge + rng.uniform(.5, 1.9))
            for _ in range(rng.integers(*often["group"])):
                self.pedestrian(x + rng.normal(0, 1.2), across + rng.normal(0, .5))
        across = sign * (edge + .5)
        metal = dict(color=self.paint(MANMADE, "grey"), echo=62, grain=.05, part=POLE)
        if rng.random() < often["lamps"]:
            self.lamp_post(start + rng.uniform(1, 19), across, sign, metal)
        if rng.random() < often["signs"]:
            self.traffic_sign(start + rng.uniform(1, 19), across, metal)

    def fill_land(self, block, side):
        """Beside the road: trees, bushes, hedges, two rows of buildings."""
        rng, often = self.rng, self.often
        start, sign, edge = self.corner(block, side)
        _, first, second = self.edges[side, block]
        strips = ((edge + 1, first), (first, second), (second, second + 4))
        for (low, high), zone in zip(strips, self.zones[side, block]):
            for _ in range(rng.integers(0, often["plants"] * zone + 1)):
                plant = self.tree if rng.random() < often["trees"] else self.bush
                plant(start + rng.uniform(1, 19), sign * rng.uniform(low, max(high, low + .5)))
        across = sign * (second + .6)
        if rng.random() < often["hedges"] and self.free(start + 10, across, 7.5, .5):
            size = (15, .9, rng.uniform(1., 1.7))
            self.add(VEGETATION, BOX, (start + 10, across, 0), size, grain=.5, scale=.22,
                     color=self.paint(VEGETATION), echo=21, rough=.1)
        if often["gaps"] and rng.random() < often["gaps"]:
            return
        # the second row of buildings closes the gaps of the first
        deep = rng.uniform(6, 10)
        across = sign * (second + rng.uniform(1.6, 6) + deep / 2)
        self.building(start + 10, across, rng.uniform(12, 18.5), deep)
        self.building(start + 10, sign * (second + 26), 18, 9)

    def pave(self):
        """The ground's three materials, last of the things."""
        rng = self.rng
        slab = self.paint(SIDEWALK)  # a slab's colour
        tile = rng.uniform(.6, 1.3)  # and length, m
        road = dict(color=self.paint(ROAD), grain=.16, scale=.12, echo=7)
        slabs = dict(ink=slab, pu=tile, pv=tile * rng.uniform(.5, 1), fu=.9, fv=.88,
                     shift=self.pick([0., .5]))
        sidewalk = dict(color=slab * .6, grain=.06, scale=.5, echo=15, **slabs)
        terrain = dict(color=self.paint(TERRAIN), grain=.6, scale=.35, rough=.03, echo=28)
        for kind, look in ((ROAD, road), (SIDEWALK, sidewalk), (TERRAIN, terrain)):
            look["echo"] *= rng.uniform(.92, 1.08)
            nowhere = dict(shape=GROUND, at=(0, 0, 0), yaw=0., half=(0, 0, 0), v0=-1e4, v1=1e4,
                           instance=0, moves=0)
            self.things.append(dict(LOOK, kind=kind, **nowhere, **look))


def columns(things):
    """A list of things as a dict of arrays, one row per thing."""
    table = {}
    for key in things[0]:
        dtype = np.int32 if key in ("shape", "kind", "instance", "moves") else np.float32
        table[key] = np.array([thing[key] for thing in things], dtype)
    return table
