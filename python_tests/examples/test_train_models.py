"""The networks of the examples: published sizes, the shapes that the benchmarks measure, and what the blocks do."""

import pytest
import torch
from models import MODELS, build_model, needs_two_images
from models.preactivation import PyramidBlock, WideBlock
from models.resnet import Bottleneck
from models.vit import HEADS, LAYER_NORM_EPS, WIDTH, Block

from benchmarks import cases

# As published: (model, classes, parameters). ResNet-50 and -101: torchvision's; ViT-S/16: timm's vit_small_patch16_224.
PUBLISHED = [
    ("resnet18", 10, 11_173_962),
    ("resnet18", 100, 11_220_132),
    ("wrn28-10", 10, 36_479_194),
    ("wrn28-10", 100, 36_536_884),
    ("resnet50", 1000, 25_557_032),
    ("resnet101", 1000, 44_549_160),
    ("vit-s16", 1000, 22_050_664),
]
SHAPES = [
    ("resnet18", 32, cases.resnet18(10)),
    ("wrn28-10", 32, cases.wide_resnet(classes=10)),
    ("pyramidnet110", 32, cases.pyramidnet(classes=10)),
    ("resnet50", 224, cases.resnet50(10)),
    ("vit-s16", 224, cases.vit_small(classes=10)),
]


def parameters(name, size, classes):
    with torch.device("meta"):
        return list(build_model(name, 3, size, classes).parameters())


def num_parameters(name, classes):
    return sum(parameter.numel() for parameter in parameters(name, 224 if name == "vit-s16" else 32, classes))


@pytest.mark.parametrize(("name", "classes", "expected"), PUBLISHED)
def test_models_have_the_published_number_of_parameters(name, classes, expected):
    assert num_parameters(name, classes) == expected


def test_pyramidnet_has_the_parameters_of_its_authors_code():
    assert num_parameters("pyramidnet110", 10) == 28_485_477
    assert len(parameters("pyramidnet110", 32, 10)) == 439


@pytest.mark.parametrize(("name", "size", "shapes"), SHAPES, ids=[name for name, *_ in SHAPES])
def test_benchmarks_measure_the_shapes_of_the_models(name, size, shapes):
    assert sorted(tuple(parameter.shape) for parameter in parameters(name, size, 10)) == sorted(shapes)


@pytest.mark.parametrize(
    ("name", "channels", "size"), [("cnn", 1, 8), ("resnet18", 1, 8), *((name, 3, 32) for name in MODELS)]
)
def test_models_return_logits_and_have_finite_gradients(name, channels, size):
    torch.manual_seed(0)
    model = build_model(name, channels, size, 7)
    logits = model(torch.rand(2, channels, size, size))
    assert logits.shape == (2, 7)
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 6])).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    assert model.classifier.weight.grad.abs().max() > 0.0


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("resnet18", 32, (2, 512, 4, 4)),
        ("wrn28-10", 32, (2, 640, 8, 8)),
        ("pyramidnet110", 32, (2, 286, 8, 8)),
        ("resnet50", 224, (2, 2048, 7, 7)),
        ("vit-s16", 224, (2, 197, 384)),
    ],
)
def test_models_have_the_resolution_of_the_originals(name, size, expected):
    with torch.device("meta"):
        model = build_model(name, 3, size, 10)
        seen = []
        model.blocks.register_forward_hook(lambda *arguments: seen.append(tuple(arguments[2].shape)))
        model(torch.empty(2, 3, size, size))
    assert seen == [expected]


def test_pyramid_shortcut_is_an_average_padded_with_zeros():
    block = PyramidBlock(2, 5, stride=2)
    torch.nn.init.zeros_(block.norm3.weight)
    maps = torch.rand(3, 2, 4, 4)
    expected = torch.zeros(3, 5, 2, 2)
    for row in range(2):
        for column in range(2):
            patch = maps[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            expected[:, :2, row, column] = patch.mean(dim=(2, 3))
    torch.testing.assert_close(block(maps), expected)


def test_wide_block_projects_the_activated_maps_and_passes_on_the_others():
    maps = torch.randn(3, 4, 4, 4)
    changing, same = WideBlock(4, 8, stride=2), WideBlock(4, 4)
    for block in (changing, same):
        torch.nn.init.zeros_(block.conv2.weight)
    active = torch.relu((maps - maps.mean((0, 2, 3), keepdim=True)) / maps.std((0, 2, 3), correction=0, keepdim=True))
    expected = torch.einsum("oc,bchw->bohw", changing.shortcut.weight[:, :, 0, 0], active[:, :, ::2, ::2])
    torch.testing.assert_close(changing(maps), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(same(maps), maps)


def test_bottleneck_projects_only_where_the_shape_changes():
    maps = torch.rand(3, 8, 4, 4)
    block = Bottleneck(8, 2)
    torch.nn.init.zeros_(block.residual[-1].weight)
    assert torch.equal(block(maps), maps)
    assert [module.stride for module in Bottleneck(8, 4, stride=2).residual[::3]] == [(1, 1), (2, 2), (1, 1)]


def test_transformer_block_is_that_of_torch():
    block = Block().eval()
    layer = torch.nn.TransformerEncoderLayer(
        WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", LAYER_NORM_EPS, batch_first=True, norm_first=True
    ).eval()
    pairs = [
        *((block.norm1, layer.norm1), (block.norm2, layer.norm2), (block.projection, layer.self_attn.out_proj)),
        *((block.mlp[0], layer.linear1), (block.mlp[2], layer.linear2)),
    ]
    for ours, theirs in pairs:
        theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        layer.self_attn.in_proj_weight.copy_(block.qkv.weight)
        layer.self_attn.in_proj_bias.copy_(block.qkv.bias)
        tokens = torch.randn(2, 5, WIDTH)
        torch.testing.assert_close(block(tokens), layer(tokens), rtol=1e-5, atol=1e-5)


def test_class_token_alone_is_classified_and_positions_matter():
    torch.manual_seed(0)
    model = build_model("vit-s16", 3, 32, 7).eval()
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        logits = model(images)
        assert (model(images.flip(3)) - logits).abs().max() > 1e-4
        model.positions.zero_()
        permuted = torch.cat([images[..., 16:], images[..., :16]], dim=3)  # the same patches elsewhere
        torch.testing.assert_close(model(permuted), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "size", "message"), [("vit-s16", 40, "multiple of 16"), ("lenet", 32, "model must be one of cnn, ")]
)
def test_what_cannot_be_built_is_refused(name, size, message):
    with pytest.raises(ValueError, match=message):
        build_model(name, 3, size, 10)


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [("resnet18", 8, True), ("resnet50", 32, True), ("wrn28-10", 8, False), ("vit-s16", 16, False), ("cnn", 8, False)],
)
def test_networks_that_end_at_one_pixel_need_two_images(name, size, expected):
    assert needs_two_images(name, size) is expected
    if expected:
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            build_model(name, 3, size, 10)(torch.rand(1, 3, size, size))
    else:
        build_model(name, 3, size, 10)(torch.rand(1, 3, size, size))
