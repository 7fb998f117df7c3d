"""The image encoders that teach stage 1: one, or several side by side (ScaLR, supplement B.2).

`--encoder A B` has two teachers, and `--weights` and `--feature` a value for each. A point's target
is all their features at its pixel, each taken from that teacher's own map and L2-normalised, one
after the other in [M, D1 + D2]. With one teacher it is the teacher's features as they are.
"""
import math
from argparse import Namespace

import torch
import torch.nn.functional as F

import models
from distill import features_at_pixels
from heads import part_of
from plumbing.errors import InputError
from plumbing.fingerprint import digest, words


class Teachers:
    """One or several image encoders. dims: their widths; dim: of all together."""

    def __init__(self, encoders):
        self.encoders = encoders
        self.dims = [encoder.dim for encoder in encoders]
        self.dim = sum(self.dims)
        self.names = [encoder.spec["name"] for encoder in encoders]
        # Of the parts that are normalised one by one, for `distillation_loss`
        self.widths = self.dims if len(encoders) > 1 else None

    def image_size(self, given=None):
        """The size (H, W) of the images: the one given, or the teachers' own, or the paper's.

        Raises InputError where the teachers' own differ, and where a patch does not divide it.
        """
        own = {tuple(encoder.spec["image_size"]) for encoder in self.encoders
               if "image_size" in encoder.spec}
        if len(own) > 1 and not given:
            sizes = " and ".join(f"{h} {w}" for h, w in sorted(own))
            raise InputError(f"--encoder {' '.join(self.names)}: trained on images of {sizes}; "
                             "give one --image-size for all")
        size = given or next(iter(own), models.IMAGE_SIZE)
        if len(self.encoders) > 1:
            self.check_patches(size)
        return self.encoders[0].check_size(size)

    def check_patches(self, size):
        """Raise InputError, naming the teacher, where its patches do not divide the images."""
        of_all = math.lcm(*(encoder.multiple for encoder in self.encoders))
        for name, encoder in zip(self.names, self.encoders):
            if any(side < 1 or side % encoder.multiple for side in size):
                raise InputError(f"--image-size {size[0]} {size[1]}: {name} has patches of "
                                 f"{encoder.multiple} pixels, which do not divide it; multiples "
                                 f"of {of_all} suit all teachers")

    def features_at_pixels(self, batch):
        """Their features [M, D] at a batch's pixels."""
        if len(self.encoders) == 1:
            return features_at_pixels(self.encoders[0], batch)
        parts = []
        for encoder in self.encoders:
            # What a teacher has made is gone before the next one runs, so memory does not add up
            parts.append(F.normalize(features_at_pixels(encoder, batch).float(), dim=1))
        return torch.cat(parts, dim=1)

    def fingerprint(self):
        """One for all of them: the encoder's own, or one that joins theirs in their order."""
        each = [encoder.fingerprint() for encoder in self.encoders]
        if len(each) == 1:
            return each[0]
        joined = {name: " + ".join(one[name] for one in each) for name in ("name", "feature")}
        return joined | {"weights": digest(words(one).encode() for one in each)}

    def about(self, args):
        """What stage 1's checkpoint says of them: of one its source, of several a list."""
        sources = [models.source_of(one) for one in one_by_one(args)]
        if len(sources) == 1:
            return {"encoder": sources[0]}
        several = []
        for source, encoder, dim in zip(sources, self.encoders, self.dims):
            several.append({"source": source, "name": encoder.spec["name"], "dim": dim,
                            "fingerprint": encoder.fingerprint()})
        return {"teachers": several}


# ---- flags ---------------------------------------------------------------------------------------

def settle(args):
    """Make --encoder, --weights and --feature lists of one length; of one encoder single values.

    "-" becomes None, the default. Raises InputError where their numbers differ.
    """
    encoders = [args.encoder] if isinstance(args.encoder, str) else args.encoder
    # Of one encoder single values, as in the checkpoints of such runs
    for name in ("weights", "feature"):
        values = getattr(args, name)
        if values and len(values) != len(encoders):
            raise InputError(f"--{name} {' '.join(values)}: {len(values)} for {len(encoders)} of "
                             "--encoder; give one for each in the same order, - for its default")
        values = [None if value == "-" else value for value in values or ["-"] * len(encoders)]
        setattr(args, name, values if len(values) > 1 else values[0])
    args.encoder = encoders if len(encoders) > 1 else encoders[0]


def one_by_one(args):
    """The flags of each teacher for itself, as `models.source_of` takes them."""
    each = [value if isinstance(value, list) else [value]
            for value in (args.encoder, args.weights, args.feature)]
    return [Namespace(encoder=encoder, weights=weights, feature=feature, hub=args.hub, out=args.out)
            for encoder, weights, feature in zip(*each)]


def load_teachers(args, device):
    """The Teachers of stage 1's flags, frozen. Raises InputError as `load_image_encoder` does."""
    encoders = []
    for one in one_by_one(args):
        encoder = models.load_image_encoder(one.encoder, one.weights, one.hub, one.feature,
                                            careful=False)
        encoders.append(encoder.to(device).requires_grad_(False))
    prints = [encoder.fingerprint() for encoder in encoders] if len(encoders) > 1 else []
    for number, one in enumerate(prints):
        if one in prints[:number]:
            raise InputError(f"--encoder {' '.join(args.encoder)}: {one['name']} stands there "
                             "twice with the same weights and feature; give it once")
    return Teachers(encoders)


# ---- the part of one teacher, for stage 2 --------------------------------------------------------

def source_in(stage1, path, encoder=None):
    """Arguments of `load_image_encoder` for stage 1's teacher, of several the one called `encoder`.

    stage1: its checkpoint, at `path`. Empty where no single one has that name. Raises InputError
    where stage 1 had several and none is named.
    """
    teachers = stage1.get("teachers")
    if not teachers:
        return models.source_in(stage1, path)
    # Which of several? A name may be two teachers', of other weights or features
    if not encoder:
        raise InputError(f"--stage1 {path}: it had several teachers, "
                         f"{' and '.join(one['name'] for one in teachers)}; say with --encoder "
                         "which one of them this is for")
    names = [one["name"] for one in teachers]
    if encoder in models.ENCODERS and encoder not in names:
        raise InputError(f"--encoder {encoder}: the teachers of --stage1 {path} are "
                         f"{' and '.join(names)}; give one of them")
    named = [one for one in teachers if one["name"] == encoder]
    if len(named) != 1:
        return {}
    return models.source_in({"encoder": named[0]["source"]}, path)


def keep_part(point_encoder, stage1, path, encoder):
    """Leave of a 3D encoder's head what it learnt of this one of stage 1's several teachers.

    Raises InputError, naming the teachers, where the image encoder is none of them.
    """
    teachers = stage1["teachers"]
    known = [one["fingerprint"] for one in teachers]
    mine = encoder.fingerprint()
    if mine not in known:
        raise InputError(f"--encoder {encoder.spec['name']} ({words(mine)}): the teachers of "
                         f"--stage1 {path} are {'; '.join(map(words, known))}; give one of them, "
                         "with its --weights and --feature")
    dims = [one["dim"] for one in teachers]
    number = known.index(mine)
    point_encoder.head = part_of(point_encoder.head, dims, number)
    point_encoder.spec["out_channels"] = dims[number]
