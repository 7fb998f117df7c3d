"""A release's weights: where they come from, how files wrap them, and what is refused."""
import sys
from urllib.error import URLError

import pytest
import torch
from test_encoders import shrink
from upstream import Upstream, released_file, released_state, write_hub

from models import load_image_encoder
from plumbing.errors import InputError
from vit import interpolate_positions


@pytest.fixture
def small(monkeypatch):
    """dinov2_vits14 with two blocks, and what its release gives for it."""
    shrink(monkeypatch, "dinov2_vits14")
    return released_state("dinov2_vits14")


def loaded(path, name="dinov2_vits14"):
    """The weights that an encoder has, loaded from this file."""
    return load_image_encoder(name, weights=str(path)).backbone.state_dict()


# ---- where they come from ------------------------------------------------------------------------

def test_local_clone_or_weights_file(small, tmp_path):
    clone = str(write_hub(tmp_path / "clone", "dinov2_vits14", "dinov2_vits14", small))
    weights = str(tmp_path / "weights.pth")
    torch.save({key: -value for key, value in small.items()}, weights)
    from_hub = load_image_encoder("dinov2_vits14", hub=clone)
    from_file = load_image_encoder("dinov2_vits14", weights=weights)
    assert torch.equal(from_hub.backbone.cls_token, small["cls_token"])
    assert from_hub.spec["feature"] == "prenorm"
    assert torch.equal(from_file.backbone.cls_token, -small["cls_token"])
    both = load_image_encoder("dinov2_vits14", weights=weights, hub=clone)  # the file decides
    assert torch.equal(both.backbone.cls_token, -small["cls_token"])
    assert from_hub(torch.rand(1, 3, 28, 56)).shape == (1, 384, 2, 4)


def test_a_release_s_file_is_downloaded_once(monkeypatch, tmp_path):
    row = shrink(monkeypatch, "depth_anything_v2_vits")
    state = released_state(row.name)
    asked = []

    def download(url, path):
        asked.append(url)
        torch.save(released_file(row.name, state), path)
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    for _ in range(2):
        norm = load_image_encoder(row.name).backbone.norm
        assert torch.equal(norm.weight, state["norm.weight"])
    assert asked == [row.url]
    assert row.url.endswith("Depth-Anything-V2-Small/resolve/main/depth_anything_v2_vits.pth")


def test_torch_hub_is_asked_for_the_release_s_entry(monkeypatch):
    row = shrink(monkeypatch, "clip_vitb16")
    state = released_state(row.name)
    asked = []

    def load(repository, entry, source, **_):
        asked.append((repository, entry, source))
        return Upstream(released_file(row.name, state)), "a transform"
    monkeypatch.setattr(torch.hub, "load", load)
    encoder = load_image_encoder(row.name)
    assert asked == [("openai/CLIP", "ViT_B_16", "github")]
    assert torch.equal(encoder.backbone.proj, state["proj"].half().float())


def test_what_cannot_be_reached_names_the_offline_way(monkeypatch, tmp_path):
    def unreachable(*args, **kwargs):
        raise URLError("no route to host")
    monkeypatch.setattr(torch.hub, "urlopen", unreachable)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    message = ("cannot be loaded from facebookresearch/dinov2"
               ".*--weights FILE.*clone .*--hub DIR")
    with pytest.raises(InputError, match=message):
        load_image_encoder("dinov2_vitl14_reg")
    message = ("cannot be loaded from facebookresearch/moco"
               ".*--weights FILE from https://dl.fbai.*pth.tar$")
    with pytest.raises(InputError, match=message):
        load_image_encoder("mocov2_resnet50")


def test_a_training_checkpoint_of_dino_with_its_arguments(monkeypatch, tmp_path):
    """DINO's checkpoints hold an argparse.Namespace, the teacher and the student."""
    row = shrink(monkeypatch, "dino_vits16")
    state = released_state(row.name)
    torch.save(released_file(row.name, state), tmp_path / "checkpoint.pth")
    found = loaded(tmp_path / "checkpoint.pth", row.name)
    assert all(torch.equal(found[key], value) for key, value in state.items())  # the teacher's


def test_what_a_hub_or_an_installation_lacks_is_one_line(monkeypatch, tmp_path):
    (tmp_path / "hubconf.py").write_text("def dinov2_vits14():\n    return None\n")
    with pytest.raises(InputError, match="cannot be loaded from .*AttributeError"):
        load_image_encoder("dinov2_vits14", hub=str(tmp_path))
    message = "no entry for torch.hub; download https.*and pass --weights FILE"
    with pytest.raises(InputError, match=message):
        load_image_encoder("ibot_vitl16", hub=str(tmp_path))
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(InputError, match="pip install torchvision"):
        load_image_encoder("dino_resnet50", weights="random")
    torch.save({"norm.weight": torch.ones(2)}, tmp_path / "weights.pth")
    with pytest.raises(InputError, match="--encoder NAME --weights"):
        load_image_encoder(str(tmp_path / "weights.pth"))


# ---- how files wrap them -------------------------------------------------------------------------

def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


def teacher_before_student(state):
    teacher = prefixed(state, "module.backbone.") | {"module.head.mlp.0.weight": torch.ones(1)}
    return {"teacher": teacher, "student": {key: value + 1 for key, value in state.items()}}


def names_of_both(state):
    student = {"student.backbone.norm.bias": torch.ones(1)}
    return {"model": prefixed(state, "teacher.backbone.") | student}


def blocks_in_chunks(state):
    """DINOv2's training code numbers the blocks inside chunks: blocks.3.1 is block 1."""
    def chunked(key):
        return key.replace("blocks.1.", "blocks.3.1.").replace("blocks.0.", "blocks.0.0.")
    state = {chunked(key): value for key, value in state.items()}
    return {"teacher": prefixed(state, "backbone.")}


def fsdp_and_checkpointed(state):
    inner = "blocks.0._fsdp_wrapped_module._checkpoint_wrapped_module."
    state = {key.replace("blocks.", inner): value for key, value in state.items()}
    return {"teacher": prefixed(state, "backbone._fsdp_wrapped_module.")}


WRAPPERS = {
    "DataParallel": lambda state: prefixed(state, "module."),
    "student": lambda state: {"student": state},
    "teacher before student": teacher_before_student,
    "names of both": names_of_both,
    "blocks in chunks": blocks_in_chunks,
    "a head": lambda state: state | {"head.weight": torch.ones(2, 2)},
    "compiled": lambda state: prefixed(state, "_orig_mod."),
    "Lightning": lambda state: {"state_dict": prefixed(state, "_forward_module.model.")},
    "compiled and DDP": lambda state: {"model": prefixed(state, "module._orig_mod.")},
    "FSDP and checkpointed": fsdp_and_checkpointed,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrapped_weights_are_recognised(small, tmp_path, wrap):
    torch.save(wrap(small), tmp_path / "weights.pth")
    found = loaded(tmp_path / "weights.pth")
    assert all(torch.equal(found[key], value) for key, value in small.items())


def test_after_unwrapping_the_load_is_strict(small, tmp_path):
    path = str(tmp_path / "weights.pth")
    other = {key: value for key, value in small.items() if not key.startswith("blocks.1.attn")}
    torch.save(other | {"extra": torch.ones(1)}, path)
    message = ("weights of another encoder than dinov2_vits14: missing blocks.1.attn.qkv.weight; "
               "missing .*; missing .*; unexpected extra; missing .*proj.bias; give the --encoder ")
    with pytest.raises(InputError, match=message):
        load_image_encoder("dinov2_vits14", weights=path)
    torch.save(released_state("dino_vitb16"), path)
    with pytest.raises(InputError, match="weights of another .*and .* more; give the --encoder"):
        load_image_encoder("dinov2_vits14", weights=path)
    torch.save([1, 2], path)
    with pytest.raises(InputError, match="holds a list and no state dict"):
        load_image_encoder("dinov2_vits14", weights=path)


# ---- what is interpolated, what is refused -------------------------------------------------------

@pytest.mark.parametrize("grid", [(16, 16), (74, 74), (8, 4)])
def test_positions_of_another_grid_are_interpolated_once_and_said(small, tmp_path, capsys, grid):
    """DINOv2 trains at 224 pixels, on 16 x 16 patches. What is neither square nor of the release's
    shape is refused."""
    h, w = grid
    other = small | {"pos_embed": torch.randn(1, 1 + h * w, 384)}
    torch.save({"teacher": prefixed(other, "backbone.")}, tmp_path / "w.pth")
    if grid == (8, 4):
        message = r"pos_embed has shape \(1, 33, 384\) instead of \(1, 1370, 384\)"
        with pytest.raises(InputError, match=message):
            load_image_encoder("dinov2_vits14", weights=str(tmp_path / "w.pth"))
        return
    encoder = load_image_encoder("dinov2_vits14", weights=str(tmp_path / "w.pth"))
    said = f"w.pth: positions of {h} x {w} patches, interpolated once to 37 x 37"
    assert said in capsys.readouterr().out
    expected = interpolate_positions(other["pos_embed"], grid, 37, 37, False)
    torch.testing.assert_close(encoder.backbone.pos_embed.data, expected, atol=1e-4, rtol=0)
    assert torch.equal(encoder.backbone.cls_token, small["cls_token"])


def test_weights_that_are_no_numbers_or_twice_are_refused(small, tmp_path):
    path = str(tmp_path / "w.pth")
    nan = torch.full_like(small["norm.weight"], torch.nan)
    eight_bits = torch.ones(384, dtype=torch.int8)
    for change, message in (
            ({"norm.weight": nan}, "norm.weight holds numbers that are not finite"),
            ({"norm.bias": eight_bits}, "norm.bias is of type torch.int8, no weights"),
            ({"module.norm.bias": small["norm.bias"] + 1},
             "holds some weights twice, wrapped and not")):
        torch.save(small | change, path)
        with pytest.raises(InputError, match=f"w.pth: .*{message}"):
            load_image_encoder("dinov2_vits14", weights=path)


def test_a_pickle_with_code_is_refused(tmp_path):
    torch.save({"kind": "image_encoder", "model": print}, tmp_path / "code.pth")
    with pytest.raises(InputError, match=r"the file asks for \S*print"):
        load_image_encoder(str(tmp_path / "code.pth"))
    with pytest.raises(InputError, match=r"the file asks for \S*print"):
        load_image_encoder("vit_mini8", weights=str(tmp_path / "code.pth"))
