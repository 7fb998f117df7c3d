"""Heads on feature maps: their sizes, what the mask transformer makes of a map, heads side by side.

Linear heads on points are in test_models.py.
"""
import pytest
import torch
from torch import nn

from heads import LinearMap, MaskTransformer, SideBySide


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def test_sizes_for_vit_small_and_19_classes():
    # 384 * 19 + 19
    assert parameters(LinearMap(384, 19)) == 7_315
    # A block: qkv 384 * 1152 + 1152 = 443 520, proj 384 * 384 + 384 = 147 840, two norms of 768,
    # MLP 384 * 1536 + 1536 = 591 360 and 1536 * 384 + 384 = 590 208: in all 1 774 464
    # Embedding 147 840, classes 19 * 384 = 7 296, two blocks 3 548 928, norm 768, two projections
    # 2 * 147 456 = 294 912, norm over classes 38
    assert parameters(MaskTransformer(384, 19)) == 3_999_782


@pytest.mark.parametrize("dim, heads", [(384, 6), (96, 1), (48, 1), (200, 2), (130, 2)])
def test_attention_heads_are_as_near_to_64_channels_as_divides_the_width(dim, heads):
    assert [block.attn.heads for block in MaskTransformer(dim, 3).blocks] == [heads, heads]


def test_first_weights():
    head = MaskTransformer(384, 19)
    for name, value in head.named_parameters():
        if value.ndim == 2:
            assert value.std().item() == pytest.approx(0.02, rel=0.1), name
        else:
            assert set(value.tolist()) == {0.0 if name.endswith("bias") else 1.0}, name
    assert LinearMap(384, 19).weight.std().item() == pytest.approx(0.01, rel=0.1)


def test_masks_without_blocks_by_hand():
    """Two channels after a LayerNorm are (1, -1) or (-1, 1): patches and classes point either to
    the same side or to opposite ones, and a LayerNorm of the cosines 1 and -1 leaves them."""
    head = MaskTransformer(2, 2)
    head.blocks = nn.ModuleList()
    for layer in (head.embed, head.of_patches, head.of_classes):
        nn.init.eye_(layer.weight)
    with torch.no_grad():
        head.classes.copy_(torch.tensor([[5.0, 1.0], [0.0, 2.0]]))
    maps = torch.tensor([[3.0, 1.0, -4.0], [1.0, 7.0, 2.0]]).view(1, 2, 1, 3)  # [1, D, h, w]
    expected = torch.tensor([[1.0, -1.0, -1.0], [-1.0, 1.0, 1.0]]).view(1, 2, 1, 3)
    torch.testing.assert_close(head(maps), expected, atol=1e-4, rtol=0)


def test_before_the_last_norm_there_are_cosines():
    torch.manual_seed(0)
    head = MaskTransformer(32, 5)
    for p in head.parameters():
        nn.init.normal_(p, std=0.5)
    head.over_classes = nn.Identity()
    masks = head(torch.randn(2, 32, 3, 4))
    assert 0.1 < masks.abs().max() <= 1 + 1e-6  # without a norm about 2


def test_patches_and_classes_may_be_put_in_another_order():
    torch.manual_seed(0)
    head = MaskTransformer(32, 5)
    for p in head.parameters():
        nn.init.normal_(p, std=0.3)
    maps = torch.randn(2, 32, 3, 4)
    masks = head(maps)
    assert masks.shape == (2, 5, 3, 4)
    torch.testing.assert_close(head(maps.flip(3)), masks.flip(3))  # it knows no places
    assert not torch.allclose(masks[:, :, :, 0], masks[:, :, :, 1])
    order = torch.tensor([2, 0, 4, 1, 3])
    with torch.no_grad():
        for p in (head.classes, head.over_classes.weight, head.over_classes.bias):
            p.copy_(p[order])
    torch.testing.assert_close(head(maps), masks[:, order])


def test_the_second_block_alone_is_left_out_at_random():
    torch.manual_seed(0)
    head = MaskTransformer(16, 3)
    for p in head.parameters():
        nn.init.normal_(p, std=0.3)
    maps = torch.randn(2, 16, 2, 2)
    draws = torch.tensor([0.05, 0.95]).expand(head.DRAWS, 2)  # left out of the first image
    found = head(maps, draws)
    second = head.blocks.pop(-1)
    torch.testing.assert_close(found[0], head(maps)[0])
    # Of the other image both branches are kept, and the larger by as much as they are rarer
    second.attn.proj.weight.data /= 0.9
    second.attn.proj.bias.data /= 0.9
    second.mlp.fc2.weight.data /= 0.9
    second.mlp.fc2.bias.data /= 0.9
    head.blocks.append(second)
    torch.testing.assert_close(found[1], head(maps)[1])


@pytest.mark.parametrize("kind", [LinearMap, MaskTransformer])
def test_heads_side_by_side_begin_alike_and_learn_alone(kind):
    torch.manual_seed(0)
    heads = SideBySide(kind(8, 3), 2)
    maps = torch.randn(2, 8, 2, 3)
    logits = heads(maps)
    assert logits.shape == (2, 2, 3, 2, 3)
    assert torch.equal(logits[:, 0], logits[:, 1])
    logits[:, 1].square().sum().backward()
    gradients = [sum(p.grad.abs().sum() for p in head.parameters()) for head in heads]
    assert gradients[0] == 0 and gradients[1] > 0
