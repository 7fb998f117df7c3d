"""The vision transformer against published code: DINOv2's and CLIP's outputs, and timm's DINO."""
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import nn

from models import ENCODERS
from releases.clip import clip_name
from vit import Block, MaskCLIP, RotaryPositions, ViT, interpolate_positions, rotate, survivors

# Random weights of the published names, images, and what published code gives for them: PyPI's
# dinov2 0.0.1.dev2 (Meta's code) and clip-anytorch 2.6.0 (OpenAI's). DINOv2's images have another
# grid than it was built for, so its interpolation is in the outputs. Float16, to be small.
GOLDEN = torch.load(ROOT / "tests" / "golden" / "published_vits.pt", weights_only=True)


def close(found, expected, atol):
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def noise(module):
    """Make all parameters random, so that nothing is tested at the zeros and ones of a start."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            around = 1 if parameter.ndim == 1 else 0
            parameter.copy_(around + 0.1 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


@pytest.mark.parametrize("mlp, hidden", [("gelu", 96), ("swiglu12", 64)])
def test_dinov2_s_published_code(mlp, hidden):
    golden = GOLDEN["dinov2_mlp" if mlp == "gelu" else "dinov2_swiglu"]
    vit = ViT(14, 24, 2, 2, hidden=hidden, mlp=mlp, grid=(4, 4), layer_scale=True, mask_token=True)
    vit.load_state_dict(golden["state_dict"], strict=True)
    for feature in ("prenorm", "norm"):
        close(vit.feature_map(golden["images"], feature), golden[feature], 2e-5)


def test_clip_s_published_code():
    golden = GOLDEN["clip"]
    vit = ViT(8, 64, 1, 1, grid=(4, 4), antialias=True, mlp="quick_gelu", clip=True)
    theirs, ours = golden["state_dict"], vit.state_dict()

    # ours by their names and shapes
    names = {name: clip_name(name, value.shape) for name, value in ours.items()}
    shapes = {name: tuple(value.shape) for name, value in theirs.items()}
    assert dict(names.values()) == shapes

    vit.load_state_dict({name: theirs[their_name].reshape(ours[name].shape)
                         for name, (their_name, _) in names.items()})
    for feature in ("prenorm", "norm"):
        close(vit.feature_map(golden["images"], feature), golden[feature], 2e-5)


def clip_block(weights, prefix, x, mask):
    """A block of CLIP by torch's own modules and CLIP's names. x: [B, T, D]."""
    D = x.shape[2]
    parts = {"ln_1": nn.LayerNorm(D), "ln_2": nn.LayerNorm(D), "mlp.c_fc": nn.Linear(D, 4 * D),
             "mlp.c_proj": nn.Linear(4 * D, D),
             "attn": nn.MultiheadAttention(D, 2, batch_first=True)}
    for name, part in parts.items():
        start = f"{prefix}{name}."
        part.load_state_dict({key.removeprefix(start): value for key, value in weights.items()
                              if key.startswith(start)})
    y = parts["ln_1"](x)
    x = x + parts["attn"](y, y, y, attn_mask=mask, need_weights=False)[0]
    y = parts["mlp.c_fc"](parts["ln_2"](x))
    return x + parts["mlp.c_proj"](y * torch.sigmoid(1.702 * y))


def test_maskclip_is_clip_whose_last_tokens_attend_to_themselves():
    """Attending to oneself alone gives one's own value, projected: that is MaskCLIP's change."""
    D, grid = 32, (3, 4)
    torch.manual_seed(0)
    vit = noise(MaskCLIP(8, D, 2, 2, grid=grid, antialias=True, mlp="quick_gelu", clip=True))
    weights = {}
    for name, value in vit.state_dict().items():
        their_name, shape = clip_name(name, value.shape)
        weights[their_name] = value.reshape(shape)
    images = torch.randn(2, 3, 24, 32)

    def layernorm(x, name):
        return F.layer_norm(x, (D,), weights[f"{name}.weight"], weights[f"{name}.bias"])
    patches = F.conv2d(images, weights["conv1.weight"], stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([weights["class_embedding"].expand(2, 1, D), patches], 1)
    x = layernorm(x + weights["positional_embedding"], "ln_pre")
    x = clip_block(weights, "transformer.resblocks.0.", x, mask=None)
    itself = torch.full((13, 13), -torch.inf).fill_diagonal_(0)
    values = layernorm(clip_block(weights, "transformer.resblocks.1.", x, itself), "ln_post")
    for feature, tokens in (("values", values), ("projected", values @ weights["proj"])):
        expected = tokens[:, 1:].transpose(1, 2).unflatten(2, grid)
        close(vit.feature_map(images, feature), expected, 1e-5)
    # CLIP's own features are others
    clip = layernorm(clip_block(weights, "transformer.resblocks.1.", x, None), "ln_post")
    assert (clip - values).abs().max() > 0.01


@pytest.mark.parametrize("patch_size", [8, 14, 16])
def test_names_and_maths_are_timm_s(patch_size):
    timm = pytest.importorskip("timm")
    size = 4 * patch_size
    theirs = noise(timm.models.vision_transformer.VisionTransformer(
        img_size=(size, size), patch_size=patch_size, embed_dim=48, depth=3, num_heads=3,
        num_classes=0))
    ours = ViT(patch_size, 48, 3, 3, grid=(4, 4))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(2, 3, size, size)

    # before and after the last norm
    features = theirs.forward_intermediates(
        images, indices=1, norm=False, intermediates_only=True)[0]  # [B, D, h, w]
    close(ours.feature_map(images, "prenorm"), features, 1e-5)
    tokens = theirs.forward_features(images)[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    close(ours.feature_map(images, "norm"), tokens, 1e-5)

    # the last block's keys: the second third of its qkv
    kept = []
    theirs.blocks[-1].attn.qkv.register_forward_hook(lambda _, args, output: kept.append(output))
    theirs.forward_features(images)
    keys = kept[0][:, 1:, 48:96].transpose(1, 2).unflatten(2, (4, 4))
    close(ours.feature_map(images, "keys"), keys, 1e-5)


# ---- positions -----------------------------------------------------------------------------------

def test_positions_of_the_trained_grid_are_untouched_and_constant_ones_stay():
    positions = torch.randn(1, 25, 12)
    assert interpolate_positions(positions, (4, 6), 4, 6, False) is positions
    constant = torch.full((1, 25, 12), 0.5)
    for antialias in (False, True):
        resized = interpolate_positions(constant, (4, 6), 5, 9, antialias)
        assert (resized - 0.5).abs().max() < 1e-5


def test_the_cls_token_s_position_is_kept():
    positions = torch.randn(1, 17, 3)
    for antialias in (False, True):
        resized = interpolate_positions(positions, (4, 4), 6, 2, antialias)
        assert torch.equal(resized[:, 0], positions[:, 0])


def test_the_tenth_of_a_cell_moves_the_samples():
    """On a ramp 0, 1, 2, ... an interpolated value is its sample's place.

    It is so nearly: PyTorch's bicubic kernel bends a ramp by 0.04.
    """
    ramp = torch.arange(32.0).repeat_interleave(32)  # row number of a 32 x 32 grid
    positions = torch.cat([torch.zeros(1), ramp]).view(1, -1, 1)

    def rows(antialias):
        resized = interpolate_positions(positions, (32, 32), 16, 16, antialias)
        return resized[0, 1:, 0].view(16, 16)[2:14, 5]
    centres = torch.arange(2, 14) + 0.5  # of cells of a 16 x 16 grid
    close(rows(True), centres * 32 / 16 - 0.5, 1e-4)
    close(rows(False), centres * 32 / 16.1 - 0.5, 0.05)
    assert rows(True)[-1] - rows(False)[-1] > 0.1


def test_antialias_averages_where_the_grid_shrinks():
    checkerboard = (torch.arange(32)[:, None] + torch.arange(32)).remainder(2).float().flatten()
    positions = torch.cat([torch.zeros(1), checkerboard]).view(1, -1, 1)
    averaged = interpolate_positions(positions, (32, 32), 8, 8, True)[:, 1:]
    assert (averaged - 0.5).abs().max() < 0.05
    sampled = interpolate_positions(positions, (32, 32), 8, 8, False)[:, 1:]
    assert (sampled - 0.5).abs().max() > 0.1


def test_rotation_keeps_lengths_and_depends_on_differences_only():
    """After rotation q · k depends only on how far apart two patches are.

    Su et al., RoFormer, Eq. 3.
    """
    rotation = RotaryPositions(32)(5, 5)
    q, k = torch.randn(2, 1, 1, 1, 32)

    # a cls token before 25 patches stays as it is
    tokens = torch.cat([torch.randn(1, 1, 1, 32), q.expand(1, 1, 25, 32)], 2)
    turned_tokens = rotate(tokens, rotation)
    assert torch.equal(turned_tokens[:, :, 0], tokens[:, :, 0])

    turned_q = turned_tokens[0, 0, 1:]
    turned_k = rotate(k.expand(1, 1, 25, 32), rotation)[0, 0]
    torch.testing.assert_close(turned_q.norm(dim=1), q.norm().expand(25))
    products = (turned_q @ turned_k.T).view(5, 5, 5, 5)  # [row, col of q, row, col of k]
    torch.testing.assert_close(products[0, 0, 1, 2], products[2, 1, 3, 3], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(products[3, 4, 0, 0], products[4, 4, 1, 0], atol=1e-4, rtol=1e-4)
    # the two axes are told apart
    assert (products[0, 0, 1, 2] - products[0, 0, 2, 1]).abs() > 1e-3


def test_masked_key_bias_and_registers():
    vit = noise(ViT(16, 64, 1, 1, hidden=32, mlp="swiglu", grid=None, layer_scale=True,
                    registers=("storage_tokens", 4)))
    images = torch.randn(1, 3, 32, 48)
    before = vit.feature_map(images, "prenorm")
    assert before.shape == (1, 64, 2, 3)

    # the keys' bias does not matter, the registers do
    with torch.no_grad():
        vit.blocks[0].attn.qkv.bias[64:128] += 5
    assert torch.equal(vit.feature_map(images, "prenorm"), before)
    with torch.no_grad():
        vit.storage_tokens *= -1
    assert not torch.allclose(vit.feature_map(images, "prenorm"), before)


# ---- stochastic depth ----------------------------------------------------------------------------

def test_a_block_whose_branches_are_left_out_is_not_there():
    torch.manual_seed(0)
    model = ViT(8, 16, 3, 2, grid=(2, 2))
    images = torch.randn(2, 3, 16, 16)
    keep = torch.ones(3, 2, 2)
    assert torch.equal(model.tokens(images, "norm", keep), model.tokens(images, "norm"))
    keep[1:, :, 0] = 0  # the first image goes through the first block alone
    found = model.tokens(images, "prenorm", keep)
    whole = model.tokens(images, "prenorm")
    model.blocks = model.blocks[:1]
    assert torch.allclose(found[0], model.tokens(images, "prenorm")[0], atol=1e-6)
    assert torch.equal(found[1], whole[1])


def test_both_branches_of_a_block_are_left_out_for_themselves():
    block = Block(16, 2, 32)
    x = torch.randn(1, 5, 16)
    after_attention = x + block.attn(block.norm1(x), None)
    keep = torch.tensor([[1.0], [0.0]])
    assert torch.allclose(block(x, keep=keep), after_attention, atol=1e-6)
    after_mlp = x + 2 * block.mlp(block.norm2(x))
    assert torch.allclose(block(x, keep=torch.tensor([[0.0], [2.0]])), after_mlp, atol=1e-6)


def test_survivors_grow_rarer_with_depth_and_make_up_for_the_others():
    draws = torch.rand(5, 2, 20_000, generator=torch.Generator().manual_seed(0))
    keep = survivors(draws, 0.4)
    assert torch.equal(keep[0], torch.ones(2, 20_000))
    gone = (keep == 0).float().mean((1, 2))
    assert gone.tolist() == pytest.approx([0, 0.1, 0.2, 0.3, 0.4], abs=0.01)
    assert keep.mean((1, 2)).tolist() == pytest.approx([1] * 5, abs=0.01)
    assert keep[4].max().item() == pytest.approx(1 / 0.6)


def test_recomputing_leaves_out_the_same_branches():
    torch.manual_seed(0)
    model = ViT(8, 16, 3, 2, grid=(2, 2))
    images = torch.randn(4, 3, 16, 16)
    keep = survivors(torch.rand(3, 2, 4), 0.5)
    found = []
    for model.recompute in (False, True):
        model.zero_grad()
        model.tokens(images, "norm", keep).square().mean().backward()
        found.append(model.patch_embed["proj"].weight.grad.clone())
    assert torch.allclose(*found, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name, theirs", [("vit_small16", "vit_small_patch16_224"),
                                          ("vit_base16", "vit_base_patch16_224")])
def test_timm_gives_the_same_features_with_our_weights(name, theirs):
    timm = pytest.importorskip("timm")
    row = ENCODERS[name]
    ours = noise(row.network(row.patch_size, **row.arguments))
    other = timm.create_model(theirs, num_classes=0).eval()
    other.load_state_dict(ours.state_dict(), strict=True)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        close(ours.tokens(images, "norm"), other.forward_features(images), 1e-5)
