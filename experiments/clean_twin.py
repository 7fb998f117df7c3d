"""The control without LiDAR: an encoder learns its own clear-day features from corrupted images.

    python -m experiments.clean_twin --data pandaset64=CLEAN,pandaset64=FOG --stage1 runs/s1 \
        --out runs/twin

Stage 2 with another teacher. The frozen encoder as it was sees the same view in the first entry of
--data, which must hold the same frames uncorrupted; its features take the place of the 3D
encoder's. Pixels, loss, schedule and flags are stage2.py's. Of --stage1 only its image encoder and
the choice of points are used. What stage 2 gains beyond this is the LiDAR's. A real night has no
clean twin, so this is no method for real data.
"""
import copy
import os
from pathlib import Path

import torch
from torch import nn

import models
import stage2
from data import Frames, select, set_sampling
from distill import distillation_loss, features_at_pixels
from experiments.copies import COPY
from experiments.corruptions import CLEAN
from experiments.loop import train
from plumbing import training
from plumbing.atomic import read_json
from plumbing.errors import InputError, one_line_errors, say
from plumbing.fingerprint import of_frames
from readers.files import read_image
from readers.table import hold_out, open_tables


class WithTwin(Frames):
    """Frames whose `image` is [2, 3, H, W]: the view, and the same one in the first table."""

    def view(self, key):
        _, frame, camera, _ = self.locate(key)
        item = super().view(key)
        clean = self.tables[0]
        twin = read_image(clean.path("image", frame, camera), self.image_size,
                          clean["image_size"][frame, camera])
        return item | {"image": torch.stack([item["image"], twin])}


class Twins(nn.Module):
    """A batch -> the learner's features of the views and the teacher's of their twins, [M, D]."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.teacher = copy.deepcopy(encoder).eval().requires_grad_(False)

    def forward(self, batch):
        images, twins = batch["image"].unbind(1)  # [B, 3, H, W]
        with torch.no_grad():
            clean = features_at_pixels(self.teacher, batch | {"image": twins})
        return features_at_pixels(self.encoder, batch | {"image": images}), clean


def check_twins(tables):
    """Raise InputError unless the first table has each frame of the others, in the same row.

    And where it is a corrupted copy itself.
    """
    first = tables[0]
    made = (read_json(Path(first.root, COPY)) or {}).get("corruption", CLEAN)
    if made != CLEAN:
        raise InputError(f"--data: {first.root}, the first, is a copy with {made}; give the "
                         "dataset itself first, and then its corrupted copies")

    def scan(table, row):
        return os.path.realpath(table.path("scan", row))

    for table in tables[1:]:
        for row in table.rows:
            if row >= len(first["scan"]) or scan(table, row) != scan(first, row):
                raise InputError(f"--data: {first.root}, the first, has not {table.root}'s frame "
                                 f"{table.path('scan', row)}; give a dataset and the copies that "
                                 "`experiments.corruptions make` wrote of it")


@one_line_errors
def main(argv=None):
    args = stage2.parse(argv)
    args.ablation = "clean-twin"
    device = training.start(args)

    # ---- image encoder ----
    encoder, point_encoder, stage1, made_from = stage2.both_encoders(args, device)
    if not stage1:
        raise InputError(f"--stage1 {args.stage1}: released weights say no image size; give what "
                         "stage1.py wrote")
    image_size = encoder.check_size(args.image_size or stage1["image_size"])
    args.lr = models.of_family(args.lr, encoder)

    # ---- data ----
    with training.first_process_first():
        tables = open_tables(args.data, args.version, look=False)
    tables = hold_out(tables, args.val_scenes)
    for table in tables:
        say(table.summary())
    skip_bad = args.on_bad_frame == "skip"
    tables = select(tables, "train", args.conditions, args.limit, skip_bad=skip_bad)
    check_twins(tables)
    samplings = set_sampling(tables, stage1["samplings"], flags=stage1.get("sampling_flags"))
    point_encoder.use(samplings)
    frames = WithTwin(tables, args.cameras, image_size, point_encoder.prepare, points="random",
                      skip_bad=skip_bad, seed=args.seed)
    made_from["frames"] = of_frames(tables)
    made_from["input"] = {"image_size": image_size} | samplings

    # ---- training ----
    def loss_of(features, batch, step):
        return distillation_loss(*features, "3d_to_2d"), len(batch["view"])

    encoder.train(args.train_batchnorm)
    model = Twins(encoder)
    train(args, device, frames, model, loss_of, peaks=[(encoder, args.lr)],
          parts={"model": encoder.backbone},
          content={"kind": "image_encoder", "encoder": encoder.spec | {"image_size": image_size},
                   "made_from": made_from})


if __name__ == "__main__":
    main()
