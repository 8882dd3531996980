"""Segmentation networks: any size in, the same size out; weights of a classifier; conversion; checkpoints."""

import sys
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import torch
from model_helpers import largest_difference, random_tensor, randomised
from torch.utils.flop_counter import FlopCounterMode

from models import create_model
from models.checkpoints import read_checkpoint
from models.files import write_checkpoint
from models.reparam import is_reparameterizable, to_deploy
from models.segmentation import SegmentationNetwork, describe_segmentation, segmentation_from, window_starts

# RepMLPNet-D256, much smaller: four stages of 16x16 to 2x2 maps.
STRUCTURE = {"channels": [4, 8, 8, 16], "blocks": [1, 1, 2, 1], "share_sets": [1, 2, 4, 8]}
SMALL = {"arch": "RepMLPNet-D256", "num_classes": 5, "width": 8, "img_size": (64, 64), **STRUCTURE}
CASES = {
    "upernet": SMALL,
    "upernet conv3": SMALL | {"downsample": "conv3"},
    "pspnet": SMALL | {"decoder": "pspnet"},
    "two stages": {"arch": "RepMLPNet-Digits", "num_classes": 3, "decoder": "pspnet", "width": 8},
}


def network(case: str) -> SegmentationNetwork:
    return randomised(SegmentationNetwork(**CASES[case])).eval()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [(64, 64), (50, 99), (128, 64)])
def test_every_pixel_gets_its_logits(case: str, size: tuple[int, int]) -> None:
    model = network(case)
    assert model(random_tensor(1, 3, *size)).shape == (1, CASES[case]["num_classes"], *size)


def test_it_is_the_library_s_network_on_our_backbone() -> None:
    model, x = network("upernet"), random_tensor(1, 3, 64, 128)
    options = {k: v for k, v in SMALL.items() if k not in ("arch", "num_classes", "width")}
    expected = smp.UPerNet("tu-repmlpnet_d256", encoder_weights=None, classes=5, decoder_channels=8, **options)
    expected.double().eval().load_state_dict(model.model.state_dict())
    assert torch.equal(model(x), expected(x))


@pytest.mark.parametrize("case", CASES)
def test_conversion_keeps_every_logit(case: str) -> None:
    model, x = network(case), random_tensor(1, 3, 64, 96)
    deploy = to_deploy(model)
    assert not is_reparameterizable(deploy)
    assert largest_difference(model(x), deploy(x)) < 1e-12


@pytest.mark.parametrize("decoder", ["upernet", "pspnet"])
def test_a_step_of_training_reaches_every_weight(decoder: str) -> None:
    torch.manual_seed(0)
    model = SegmentationNetwork(**SMALL | {"decoder": decoder, "downsample": "conv3"})
    loss = torch.nn.functional.cross_entropy(model(torch.randn(2, 3, 192, 192)), torch.randint(5, (2, 192, 192)))
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_architectures_of_timm_are_backbones_too() -> None:
    model = SegmentationNetwork("resnet18", 4, width=8).eval()
    assert model(torch.zeros(1, 3, 70, 64)).shape == (1, 4, 70, 64)
    with pytest.raises(ValueError, match="another structure than this resnet18"):
        model.load_backbone(create_model("resnet34", 1, pretrained=False))


@pytest.mark.parametrize("arch", ["resnet18", "resnet101c", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_a_classifier_of_timm_becomes_the_backbone(arch: str) -> None:
    with torch.device("meta"):  # names and shapes
        model, trained = SegmentationNetwork(arch, 4, width=8), create_model(arch, 3)
    if arch != "resnet18":
        model.load_backbone(trained)
        return
    model = SegmentationNetwork(arch, 4, width=8).double().eval()
    trained = randomised(create_model(arch, 3)).eval()
    model.load_backbone(trained)
    x = random_tensor(1, 3, 64, 64)
    last = model.backbone(x)[-1]
    assert largest_difference(last, trained.forward_features(x)) < 1e-13


@pytest.mark.parametrize("case", CASES)
def test_an_auxiliary_head_is_for_training_alone(case: str) -> None:
    torch.manual_seed(0)
    plain = SegmentationNetwork(**CASES[case])
    torch.manual_seed(0)
    model = SegmentationNetwork(**CASES[case], auxiliary=True)
    x = torch.randn(2, 3, 50, 99)
    with torch.no_grad():
        torch.manual_seed(1)  # of dropout
        logits, auxiliary = model(x)
        assert logits.shape == auxiliary.shape == (2, CASES[case]["num_classes"], 50, 99)
        torch.manual_seed(1)
        assert torch.equal(logits, plain(x))
        assert torch.equal(model.eval()(x), plain.eval()(x))
    assert {name for name in model.state_dict() if name not in plain.state_dict()} == {
        f"auxiliary.{name}" for name in model.auxiliary.state_dict()
    }
    assert model.auxiliary[0].conv.weight.shape[0] == 256
    assert model.auxiliary[0].conv.in_channels == model.model.encoder.out_channels[-2]
    deploy = to_deploy(model)
    assert model.auxiliary is not None
    assert deploy.state_dict().keys() == to_deploy(plain).state_dict().keys()
    assert deploy.arguments == plain.arguments
    assert model.arguments == plain.arguments | {"auxiliary": True}


def test_a_step_of_training_reaches_the_auxiliary_head_and_what_is_below_it() -> None:
    torch.manual_seed(0)
    model = SegmentationNetwork(**SMALL, auxiliary=True)
    model(torch.randn(2, 3, 192, 192))[1].sum().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert {name for name, _ in model.named_parameters() if name.startswith("auxiliary")} < reached
    assert "model.encoder.model.model.stages.2.0.repmlp_block.fc3.weight" in reached
    assert not [name for name in reached if "stages.3" in name or "decoder" in name]


@pytest.mark.parametrize(
    ("arguments", "partition"),
    [
        (SMALL, (64, 64)),
        (SMALL | {"img_size": (64, 96)}, (64, 96)),
        ({"arch": "RepMLP-Res50-light-224"}, (56, 56)),
        ({"arch": "RepMLP-Res50-light-224", "reductions": (0, 0, 8, 0)}, (112, 112)),
        ({"arch": "RepMLP-Res50-light-224", "reductions": (0, 0, 0, 0)}, None),
        ({"arch": "RepMLP-Res50-light-224", "reductions": (0, 8, 8, 0), "blocks": (3, 1, 6, 3)}, (112, 112)),
        ({"arch": "resnet18"}, None),
    ],
)
def test_the_partitions_in_pixels_of_the_image(arguments: dict, partition: tuple[int, int] | None) -> None:
    with torch.device("meta"):
        assert SegmentationNetwork(**{"num_classes": 2, "width": 8} | arguments).partition == partition


def test_what_a_network_is_unless_it_is_told_otherwise() -> None:
    with torch.device("meta"):
        model = SegmentationNetwork("resnet18", 4)
    assert model.arguments == {"arch": "resnet18", "num_classes": 4, "decoder": "upernet", "width": 512, "in_chans": 3}
    assert isinstance(model.model, smp.UPerNet)
    assert (model.num_classes, model.model.segmentation_head[0].in_channels) == (4, 512)


def test_a_classifier_that_had_inserted_batch_norms_becomes_the_backbone() -> None:
    options = {k: v for k, v in SMALL.items() if k in ("img_size", *STRUCTURE)} | {"insert_bn": True}
    trained = to_deploy(randomised(create_model("RepMLPNet-D256", **options)).eval())
    SegmentationNetwork(**SMALL, insert_bn=True, deploy=True).double().eval().load_backbone(trained)


@pytest.mark.parametrize("deploy", [False, True])
@pytest.mark.parametrize("downsample", [None, "conv5"])
def test_a_trained_classifier_becomes_the_backbone(downsample: str | None, deploy: bool) -> None:
    options = {k: v for k, v in SMALL.items() if k in ("img_size", *STRUCTURE)}
    trained, x = randomised(create_model("RepMLPNet-D256", **options)).eval(), random_tensor(1, 3, 64, 128)
    trained = to_deploy(trained) if deploy else trained
    expected = trained.forward_intermediates(x, intermediates_only=True)
    model = SegmentationNetwork(**SMALL, downsample=downsample, deploy=deploy).double().eval()
    model.load_backbone(trained)
    for before, after in zip(expected, model.backbone(x), strict=True):
        assert largest_difference(before, after) < 1e-13


def test_a_classifier_that_does_not_fit_is_refused() -> None:
    model = SegmentationNetwork(**SMALL)
    with pytest.raises(ValueError, match="another structure than this RepMLPNet-D256"):
        model.load_backbone(create_model("RepMLPNet-D256", img_size=64, **STRUCTURE | {"blocks": [1, 1, 1, 1]}))
    with pytest.raises(ValueError, match="the training structure and the weights the deploy structure"):
        model.load_backbone(create_model("RepMLPNet-D256", img_size=64, deploy=True, **STRUCTURE))
    with pytest.raises(ValueError, match="the deploy structure and the weights the training structure"):
        to_deploy(model).load_backbone(create_model("RepMLPNet-D256", img_size=64, **STRUCTURE))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", ["train", "deploy"])
def test_a_checkpoint_tells_all_that_is_needed(case: str, form: str, tmp_path: Path) -> None:
    model = network(case).float()
    model = to_deploy(model) if form == "deploy" else model
    meta = describe_segmentation(model, form)
    write_checkpoint(tmp_path / "a.pth", {"model": model.state_dict(), "meta": meta})
    found = segmentation_from(read_checkpoint(tmp_path / "a.pth"))
    x = torch.randn(1, 3, 64, 64)
    assert not found.training
    assert torch.equal(found(x), model(x))
    assert describe_segmentation(found, form)["network"] | {"deploy": None} == meta["network"] | {"deploy": None}


def test_metadata_take_more() -> None:
    model = network("two stages")
    meta = describe_segmentation(model, "train", dataset="cityscapes", metric="mIoU", task=None)
    assert meta == describe_segmentation(model, "train") | {"dataset": "cityscapes", "metric": "mIoU"}
    assert meta["task"] == "segmentation"


def test_a_classifier_s_checkpoint_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a.pth", {"model": create_model("RepMLPNet-Digits").state_dict()})
    with pytest.raises(ValueError, match="a.pth is no checkpoint of a segmentation network"):
        segmentation_from(read_checkpoint(tmp_path / "a.pth"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decoder": "unet"}, "unknown decoder 'unet': choose upernet or pspnet"),
        ({"arch": "RepMLPNet-D255"}, "did you mean RepMLPNet-D256"),
        ({"downsample": "conv7"}, "unknown downsample 'conv7'"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SegmentationNetwork(**SMALL | arguments)


def test_two_levels_are_too_few_for_upernet() -> None:
    with pytest.raises(ValueError, match="depth for UPerNet decoder cannot be less than 3, got 2"):
        SegmentationNetwork("RepMLPNet-Digits", 3)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(ValueError, match="the extra `seg`: pip install segmentation-models-pytorch"):
        SegmentationNetwork(**SMALL)


@pytest.mark.parametrize("decoder", ["upernet", "pspnet"])
@pytest.mark.parametrize("arch", ["RepMLP-Res50-light-224", "RepMLP-Res50-bottleneck-224"])
def test_repmlp_resnet_as_the_backbone(arch: str, decoder: str) -> None:
    structure = {"channels": [8, 16, 32, 64], "blocks": [1, 2, 2, 1], "reductions": [0, 1, 2, 0], "groups": 2}
    options = {"width": 8, "img_size": (64, 96), "partition": 2, **structure}
    model = randomised(SegmentationNetwork(arch, 5, decoder, **options)).eval()
    deploy = to_deploy(model)
    assert not is_reparameterizable(deploy)
    for size in ((64, 96), (50, 91)):  # its Global Perceptrons are made for one size, smaller ones are padded
        x = random_tensor(1, 3, *size)
        logits = model(x)
        assert logits.shape == (1, 5, *size)
        assert largest_difference(logits, deploy(x)) < 1e-12


@pytest.mark.parametrize("decoder", ["upernet", "pspnet"])
def test_a_backbone_of_timm_at_a_size_that_its_strides_do_not_divide(decoder: str) -> None:
    torch.manual_seed(0)
    model = SegmentationNetwork("convnext_atto", 5, decoder, width=8).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 70, 90)).shape == (1, 5, 70, 90)


# RepMLP-Res50 much smaller, with partitions of 2x2: a classifier for 64x64 pixels, and the backbone of PSPNet that it
# becomes for 48x80.
RESNET = {
    "channels": [8, 16, 32, 64],
    "blocks": [1, 2, 2, 2],
    "reductions": [0, 1, 2, 0],
    "groups": [1, 2, 2, 1],
    "partition": 2,
}
PSPNET = RESNET | {"img_size": (48, 80), "output_stride": 8, "gp_reduction": [1, 4, 8, 1]}


def pspnet(**options: object) -> SegmentationNetwork:
    return SegmentationNetwork("RepMLP-Res50-g4-8-320", 5, "pspnet", width=8, **PSPNET | options)


def test_a_dilated_repmlp_resnet_below_pspnet() -> None:
    """Sec. 4.4 of the first paper: c4 and c5 keep the size of c3's maps, and only c5, without RepMLP, is dilated."""
    model = randomised(pspnet()).eval()
    x, deploy = random_tensor(1, 3, 47, 80), to_deploy(model)
    assert [m.shape[1:] for m in model.backbone(x)] == [(8, 12, 20), (16, 6, 10), (32, 6, 10), (64, 6, 10)]
    assert model(x).shape == (1, 5, 47, 80)
    assert largest_difference(model(x), deploy(x)) < 1e-12
    network = model.backbone.model
    convs = {n: m for n, m in network.named_modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)}
    dilated = {name for name, conv in convs.items() if conv.dilation != (1, 1)}
    assert dilated == {f"stage4.{block}.conv2.conv" for block in range(2)}
    assert {(conv.dilation, conv.padding, conv.stride) for name, conv in convs.items() if name in dilated} == {
        ((4, 4), (4, 4), (1, 1))
    }
    assert network.stage3[0].conv2.conv.stride == (1, 1)
    assert network.stage3[0].shortcut.conv.stride == (1, 1)
    fc1 = [network.get_submodule(f"stage{i}.1.btnk_repmlp.fc1_fc2.fc1") for i in (2, 3)]
    assert [tuple(layer.weight.shape) for layer in fc1] == [(4 * 15 // 4, 4 * 15), (4 * 15 // 8, 4 * 15)]


def test_a_dilated_stage_samples_as_it_did_with_its_stride() -> None:
    """On every fourth position of the maps that c5 is given, dilated convolutions see what strided ones saw."""
    options = {k: v for k, v in RESNET.items() if k != "partition"} | {"reductions": [0, 0, 0, 0], "img_size": 128}
    strided, dilated = (
        randomised(create_model("RepMLP-Res50-bottleneck-224", **options, output_stride=stride)).eval()
        for stride in (32, 16)
    )
    x = random_tensor(1, 3, 128, 128)
    whole, part = dilated.forward_features(x), strided.forward_features(x)
    assert (whole.shape, part.shape) == ((1, 64, 8, 8), (1, 64, 4, 4))
    # The first 3x3 of the stage is dilated too, as in PSPNet: only that of a trained stride is not.
    dilated.stage4[0].conv2.conv.dilation = dilated.stage4[0].conv2.conv.padding = (1, 1)
    assert largest_difference(part, dilated.forward_features(x)[..., ::2, ::2]) < 1e-12
    assert largest_difference(part, whole[..., ::2, ::2]) > 1e-3


def test_global_perceptrons_for_maps_of_another_size_are_drawn_anew() -> None:
    trained = randomised(create_model("RepMLP-Res50-g4-8-320", img_size=64, **RESNET))
    pretrained = {name: value.clone() for name, value in trained.state_dict().items()}
    model = pspnet()
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    fresh = model.load_backbone(trained)
    layers = [f"{fc}.{kind}" for fc in ("fc1", "fc2") for kind in ("weight", "bias")]
    assert fresh == [f"model.stage{i}.1.btnk_repmlp.fc1_fc2.{layer}" for i in (2, 3) for layer in layers]
    for name, value in model.backbone.state_dict().items():
        expected = before[name] if name in fresh else pretrained[name.removeprefix("model.")].to(value)
        assert torch.equal(value, expected), name


def test_a_global_perceptron_of_the_same_size_is_kept() -> None:
    trained = randomised(create_model("RepMLP-Res50-g4-8-320", img_size=64, **RESNET))
    model = SegmentationNetwork("RepMLP-Res50-g4-8-320", 5, "pspnet", width=8, img_size=(64, 64), **RESNET)
    assert model.load_backbone(trained) == []
    trained = randomised(create_model("RepMLP-Res50-g4-8-320", img_size=64, **RESNET))
    narrower = RESNET | {"img_size": (64, 64), "gp_reduction": [1, 2, 1, 1]}
    fresh = SegmentationNetwork("RepMLP-Res50-g4-8-320", 5, "pspnet", width=8, **narrower).load_backbone(trained)
    layers = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    assert fresh == [f"model.stage2.1.btnk_repmlp.fc1_fc2.{layer}" for layer in layers]
    with pytest.raises(ValueError, match="another structure than this RepMLP-Res50-g4-8-320"):
        model.load_backbone(create_model("RepMLP-Res50-g4-8-320", img_size=64, **RESNET | {"groups": [1, 4, 2, 1]}))


def test_images_larger_than_the_backbone_takes_are_cut_into_windows() -> None:
    model = randomised(pspnet()).eval()
    x = random_tensor(2, 3, 50, 99)
    (rows, columns), (h, w) = ((0, 2), (0, 19)), (48, 80)
    total, count = torch.zeros(2, 5, 50, 99, dtype=torch.float64), torch.zeros(50, 99, dtype=torch.float64)
    for top in rows:
        for left in columns:
            total[..., top : top + h, left : left + w] += model(x[..., top : top + h, left : left + w])
            count[top : top + h, left : left + w] += 1
    assert largest_difference(total / count, model(x)) < 1e-12
    with pytest.raises(ValueError, match="larger than the 48x80 that the backbone is made for"):
        model.train()(x)


@pytest.mark.parametrize(
    ("side", "window", "starts"),
    [(5, 9, [0]), (9, 9, [0]), (10, 9, [0, 1]), (15, 9, [0, 6]), (16, 9, [0, 3, 7]), (2048, 720, [0, 442, 885, 1328])],
)
def test_windows_overlap_by_a_third_at_least(side: int, window: int, starts: list[int]) -> None:
    assert window_starts(side, window) == starts


def test_architectures_of_timm_take_an_output_stride_where_they_can() -> None:
    model = SegmentationNetwork("resnet18", 4, "pspnet", width=8, output_stride=8).eval()
    assert [m.shape[-1] for m in model.backbone(torch.zeros(1, 3, 64, 64))] == [32, 16, 8, 8, 8]
    assert model(torch.zeros(1, 3, 60, 64)).shape == (1, 4, 60, 64)
    with pytest.raises(ValueError, match="stride of swin_tiny_patch4_window7_224 can't be changed"):
        SegmentationNetwork("swin_tiny_patch4_window7_224", 4, output_stride=8)
    with pytest.raises(ValueError, match="RepMLPNet-D256 has no output_stride to change"):
        SegmentationNetwork(**SMALL, output_stride=8)


@pytest.mark.parametrize(
    ("arch", "options", "parameters", "multiply_adds"),
    [
        ("resnet50", {}, 29_891_667, 214.848e9),
        (
            "RepMLP-Res50-g4-8-320",
            {"img_size": (720, 720), "gp_reduction": [1, 4, 8, 1], "deploy": True},
            158_713_963,
            207.540e9,
        ),
    ],
)
def test_the_cost_of_pspnet_at_713_pixels(arch: str, options: dict, parameters: int, multiply_adds: float) -> None:
    """The paper counts 46.56 M and 350.004 G over ResNet-50; with its decoder's 3x3 in place of the library's 1x1."""
    with torch.device("meta"):
        model = SegmentationNetwork(arch, 19, "pspnet", output_stride=8, **options).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 713, 713))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert counter.get_total_flops() / 2 == pytest.approx(multiply_adds, rel=1e-5)
    if arch == "resnet50":
        taps = 8 * 4096 * 512  # that the decoder's convolution lacks
        assert (parameters + taps) / 1e6 == pytest.approx(46.56, rel=3e-3)
        assert (multiply_adds + 90 * 90 * taps) / 1e9 == pytest.approx(350.004, rel=3e-3)
