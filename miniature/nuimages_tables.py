"""The miniature world in nuImages' layout: pictures, with masks of objects and road in the tables.

It has the same names as `nuscenes_tables.py`. Each picture is a sample of its own.
"""
import base64

import numpy as np
from PIL import Image
from pycocotools import mask as run_lengths

from miniature import nuscenes_tables
from miniature.scenes import (CAMERAS, JPEG, calibration_row, log_row, picture, plan_scene,
                              sensor_rows, token_of)
from miniature.street import CATEGORIES, ROAD

TABLES = """attribute calibrated_sensor category ego_pose log object_ann sample sample_data sensor
surface_ann""".split()
KINDS_OF_OBJECTS = ("animal", "human", "movable", "static_object", "vehicle")
OBJECTS = [name for name in CATEGORIES
           if name.startswith(KINDS_OF_OBJECTS) and name != "vehicle.ego"]


def version_of(split):
    """The folder of a split's tables."""
    return f"v1.0-{split}"


def names_of(options):
    """The names that scenes can have, by split: nuScenes', which nobody sees."""
    return nuscenes_tables.names_of(options)


def channels_of(options):
    return list(CAMERAS)[:options["cameras"]]


def folders_of(options):
    """The folders below the root in which `write_scene` writes."""
    return [f"samples/{channel}" for channel in channels_of(options)]


def write_scene(job):
    """Write one scene's pictures below `out`; returns its rows of the tables."""
    out, options, split, number, condition, name = job
    plan = plan_scene(options, split, number, condition)
    height, width = options["image_size"]
    rows = {table: [] for table in TABLES}

    def token(*parts):
        return token_of("/".join(map(str, (options["seed"], "nuimages", name, *parts))))

    # the scene's rows, then its sensors', then its pictures'
    log = log_row(plan, token("log"), "n013")
    rows["log"].append(log)
    for channel in channels_of(options):
        calibration = token("calibration", channel)
        row = calibration_row(plan, calibration, channel, options["image_size"])
        rows["calibrated_sensor"].append(dict(row, camera_distortion=[0.] * 5))
        for k, views in enumerate(plan["frames"]):
            view = views[channel]
            key, sample = token("data", k, channel), token("sample", k, channel)
            file = f"samples/{channel}/{log['logfile']}__{channel}__{view['time']}.jpg"
            image, kinds, _ = picture(options, plan, k, channel)
            Image.fromarray(image).save(out / file, **JPEG)
            rows["ego_pose"].append(dict(
                token=key, timestamp=view["time"], **view["pose"], speed=0.,
                acceleration=[0.] * 3, rotation_rate=[0.] * 3))
            rows["sample"].append(dict(
                token=sample, timestamp=view["time"], log_token=log["token"], key_camera_token=key))
            rows["sample_data"].append(dict(
                token=key, sample_token=sample, ego_pose_token=key, timestamp=view["time"],
                prev="", next="", calibrated_sensor_token=calibration, fileformat="jpg",
                is_key_frame=True, height=height, width=width, filename=file))
            annotate(rows, kinds, key, lambda what, *parts: token(what, k, channel, *parts))
    return rows


def annotate(rows, kinds, key, token):
    """Add the rows of one picture's road and objects; kinds [H, W]: its pixels' fine classes."""
    from scipy.ndimage import label as connected_parts  # here: it takes long to import
    for kind in np.unique(kinds):
        mask, category = kinds == kind, CATEGORIES[kind]
        common = dict(sample_data_token=key, category_token=token_of(category))
        if kind == ROAD:
            rows["surface_ann"].append(dict(token=token("surface"), mask=packed(mask), **common))
        elif category in OBJECTS:
            # two cars that overlap in the picture are one annotation
            parts, count = connected_parts(mask)
            for part in range(1, count + 1):
                mask = parts == part
                rows["object_ann"].append(dict(
                    token=token("object", kind, part), mask=packed(mask), attribute_tokens=[],
                    bbox=bounds(mask), **common))


def packed(mask):
    """A mask [H, W] as nuImages stores it: run lengths as pycocotools packs them, in base64."""
    runs = run_lengths.encode(np.asfortranarray(mask, np.uint8))
    return dict(size=list(mask.shape), counts=base64.b64encode(runs["counts"]).decode())


def bounds(mask):
    """The box [x0, y0, x1, y1] around a mask [H, W]; its ends lie one pixel beyond."""
    ys, xs = np.nonzero(mask)
    return [int(v) for v in (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)]


def finish(out, tables, options):
    """Fill the tables that are not about one scene, and return all of them.

    nuImages' categories have no index.
    """
    tables["sensor"] = sensor_rows(channels_of(options))
    for name in CATEGORIES:
        if name in OBJECTS or name in ("flat.driveable_surface", "vehicle.ego"):
            tables["category"].append(dict(token=token_of(name), name=name, description=""))
    return tables
