from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from tests.conftest import CNN_METHODS, or_slow, targets
from tests.methods.released import Released, error, read
from wsolkit import build_module, load_config
from wsolkit.errors import ConfigError
from wsolkit.localization.maps import min_max
from wsolkit.methods.base import WSOLModule
from wsolkit.methods.cam import CAM, CAMNetwork, thresholded_average
from wsolkit.training.evaluator import Evaluator
from wsolkit.training.optimization import Optimization, Schedule


def build(method: str, *overrides: str) -> WSOLModule:
    torch.manual_seed(0)
    return build_module(load_config(f"method={method}", *overrides))


def network(module: WSOLModule) -> CAMNetwork:
    assert isinstance(module.network, CAMNetwork)
    return module.network


def image(count: int = 2, side: int = 64) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def batch(count: int = 4) -> Any:
    return {"image": image(count), "label": torch.arange(count) % 8, **targets(count)}


def awake(module: WSOLModule) -> WSOLModule:
    """With all scales at 1: timm starts the last one of each ResNet block at 0, which hides the block."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d | FrozenBatchNorm2d):
            nn.init.ones_(layer.weight)
    return module


def test_both_forms_are_equal() -> None:
    """The same logits, and the same maps but for the bias, which min-max removes."""
    classic, convolution = (build("cam", f"method.form={form}").eval() for form in ("average_first", "maps_first"))
    convolution.load_state_dict(classic.state_dict())
    bias = network(classic).classifier.bias
    assert bias is not None
    nn.init.normal_(bias)
    convolution.load_state_dict(classic.state_dict())
    torch.testing.assert_close(classic(image()), convolution(image()))
    classes = torch.tensor([[0, 3, 5], [7, 0, 1]])
    maps, others = (module.localize(image(), classes).maps for module in (classic, convolution))
    torch.testing.assert_close(others - maps, bias.detach()[classes][:, :, None, None].expand_as(maps))
    torch.testing.assert_close(min_max(maps), min_max(others))


def test_map_weighs_features_by_the_classifier() -> None:
    """Written out: CAM_c(u) = Σ_d w_cd F_d(u), and its mean with the bias is the logit."""
    module = build("cam").eval()
    own = network(module)
    with torch.no_grad():
        feature = own.features(image())
    logits, maps = module.localize(image(), torch.tensor([[2], [5]]))
    for row, label in enumerate((2, 5)):
        weight = own.classifier.weight[label, :, 0, 0]
        expected = (weight[:, None, None] * feature[row]).sum(dim=0)
        torch.testing.assert_close(maps[row, 0], expected)
        assert own.classifier.bias is not None
        torch.testing.assert_close(maps[row, 0].mean() + own.classifier.bias[label], logits[row, label])


@pytest.mark.parametrize("method", CNN_METHODS)
def test_localize_gives_the_maps_that_are_asked_for(method: str) -> None:
    module = build(method).eval()
    logits, maps = module.localize(image())
    side = {"ornet": 16, "psol": 64}.get(method, 8)  # ORNet makes its map after the first stage, PSOL draws a box.
    assert (logits.shape, maps.shape) == ((2, 8), (2, 1, side, side))
    torch.testing.assert_close(logits, module(image()).detach())
    all_maps = module.localize(image(), torch.arange(8).expand(2, -1)).maps
    torch.testing.assert_close(maps[:, 0], all_maps[torch.arange(2), logits.argmax(dim=1)])
    asked = module.localize(image(), lambda logits: logits.topk(2).indices).maps
    torch.testing.assert_close(asked[:, 0], maps[:, 0])


@pytest.mark.parametrize("method", CNN_METHODS)
def test_every_parameter_learns(method: str) -> None:
    module = build(method, "method.fine_tuning.new_from=layer4", *(["method.start_epoch=0"] if method == "spa" else []))
    losses = awake(module).train().losses(batch())
    losses["loss"].backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("method", or_slow(CNN_METHODS, ("cam", "bridging_gap")))
@pytest.mark.parametrize("backbone", ["vgg16", "mobilenetv2", "inception_v3"])
def test_every_method_goes_with_every_backbone(method: str, backbone: str) -> None:
    module = build(method, f"backbone={backbone}", "backbone.pretrained=false", "dataset.image_size=80")
    module.train().losses(batch(2) | {"image": image(2, 80)})["loss"].backward()
    maps = module.eval().localize(image(2, 80)).maps
    assert maps.shape[:2] == (2, 1)
    assert maps.isfinite().all()


def test_classifier_of_the_weights_can_be_kept(tmp_path: Any) -> None:
    import timm

    torch.manual_seed(1)
    options = {"layers": [1, 1, 1, 1], "channels": [32, 64, 128, 256]}
    pretrained = timm.create_model("resnet18", num_classes=20, **options).eval()
    torch.save(pretrained.state_dict(), tmp_path / "weights.pth")
    weights = f"backbone.weights={tmp_path / 'weights.pth'}"
    rows = [3, 1, 4, 15, 9, 2, 6, 5]
    module = build("cam", weights, "backbone.stride=32", f"method.keep_classifier={rows}").eval()
    with torch.no_grad():
        torch.testing.assert_close(module(image()), pretrained(image())[:, rows])
    for wrong, message in (
        ("[1,2]", "has 2 class indices: expected one for each of the 8 classes, from 0 to 19"),
        ("[0,1,2,3,4,5,6,20]", "has 8 class indices: expected one for each of the 8 classes, from 0 to 19"),
    ):
        with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
            build("cam", weights, f"method.keep_classifier={wrong}")
    with pytest.raises(ConfigError, match="needs backbone weights with a linear classifier on the last map"):
        build("cam", weights, f"method.keep_classifier={rows}", "method.head_channels=[16]")
    with pytest.raises(ConfigError, match="needs backbone weights with a linear classifier"):
        build("cam", f"method.keep_classifier={rows}")


def test_head_is_drawn_as_spa_says() -> None:
    own = network(build("spa", "method.head_channels=[16,12]"))
    convolutions = [layer for layer in [*own.head, own.classifier] if isinstance(layer, nn.Conv2d)]
    assert [(layer.in_channels, layer.out_channels, layer.kernel_size[0]) for layer in convolutions] == [
        *((256, 16, 3), (16, 12, 3), (12, 8, 1)),
    ]
    for layer in convolutions:
        assert layer.bias is not None
        assert not layer.bias.any()
        fan = (layer.in_channels + layer.out_channels) * layer.kernel_size[0] ** 2
        assert 0.9 * (6 / fan) ** 0.5 < layer.weight.abs().max() <= (6 / fan) ** 0.5  # Glorot's uniform


def learning_rates(module: WSOLModule, lr: float = 0.001) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of each parameter."""
    schedule = Schedule("constant", 0, (), 1.0, 1.0)
    create = Optimization(lambda groups: torch.optim.SGD(groups, lr=lr, weight_decay=0.5), schedule)
    optimizer = create.optimizer(module)
    names = {id(parameter): name for name, parameter in module.network.named_parameters()}
    rates = {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert len(rates) == len(names)
    return rates


def test_new_layers_and_biases_learn_faster() -> None:
    """SPA's groups: lr, biases twice, new layers ten times, their biases twenty times."""
    rates = learning_rates(build("spa", "method.head_channels=[16]"))
    for name, (rate, decay) in rates.items():
        factor = (1 if name.startswith("backbone.") else 10) * (2 if name.endswith("bias") else 1)
        assert rate == pytest.approx(0.001 * factor), name
        assert decay == 0.5, name


def test_new_layers_can_start_at_a_stage() -> None:
    module = build("bridging_gap", "method.fine_tuning.new_from=layer4", "method.fine_tuning.decay_biases=false")
    places = network(module).backbone.places("layer4")
    for name, (rate, decay) in learning_rates(module).items():
        stage = name.split(".")[2] if name.startswith("backbone.") else "head"
        assert rate == pytest.approx(0.01 if stage == "head" or int(stage) >= places[0] else 0.001), name
        assert decay == (0.5 if dict(module.network.named_parameters())[name].ndim > 1 else 0), name
    with pytest.raises(ConfigError, match="no stage 'layer9'"):
        build("bridging_gap", "method.fine_tuning.new_from=layer9").parameter_groups()


def test_transformers_and_networks_are_not_mixed_up() -> None:
    with pytest.raises(ConfigError, match=r"method=cam needs a CNN, and backbone=vit_tiny is a ViT; choose from: cnn_"):
        build("cam", "backbone=vit_tiny")
    with pytest.raises(
        ConfigError, match=r"method=sat needs a Transformer, and backbone=vgg16 is a CNN; .*: conformer_"
    ):
        build("sat", "backbone=vgg16")
    with pytest.raises(ConfigError, match="postprocess=scg refines the maps of methods on convolutional networks"):
        build("sat", "+postprocess=scg")


def test_stages_of_a_postprocess_are_checked_before_training() -> None:
    with pytest.raises(ConfigError, match="the backbone has no stage 'conv5'"):
        build("cam", "+postprocess=scg", "postprocess.stages=[conv5]")


def test_nested_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"method\.fine_tuning\.new_lr_factor='much': Input should be a valid number"):
        build("cam", "method.fine_tuning.new_lr_factor=much")


MAP_METHODS = [name for name in CNN_METHODS if name != "psol"]  # PSOL makes a box and no map.


@pytest.mark.parametrize("method", MAP_METHODS)
def test_norm_and_similarity_make_the_map(method: str) -> None:
    """CAM_c(u) = ‖w_c‖ ‖F_u‖ cos(F_u, w_c), up to the bias that SPA's form adds."""
    module = build(method, "postprocess=scg").eval()
    own, label = network(module), torch.tensor([3, 6])
    maps = module.inside(image(), label)
    assert set(maps) == {"norm", "similarity", "CAM", "refined"}
    with torch.no_grad():
        lengths = own.features(image()).norm(dim=1)
        product = own.classifier.weight[label].flatten(1).norm(dim=1)[:, None, None] * lengths
        assert own.classifier.bias is not None
        bias = own.classifier.bias[label][:, None, None] if own.form == "maps_first" else 0
    torch.testing.assert_close(maps["CAM"][:, 0], product * maps["similarity"][:, 0] + bias)
    torch.testing.assert_close(maps["norm"][:, 0], min_max(lengths))
    torch.testing.assert_close(module.norms(image()), maps["norm"][:, 0])
    torch.testing.assert_close(maps["refined"], module.localize(image(), label[:, None]).maps)


def test_untrained_network_is_an_image_net_cam(shared: Any) -> None:
    """MobileNetV2 as it was pretrained: its CAM finds more than the baselines do, and it knows its classes."""
    rows = [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]
    root = shared / "data" / "ilsvrc10"
    cfg = load_config(
        *("method=cam", "backbone=mobilenetv2", "backbone.options.pad_type=same", "backbone.stride=32"),
        *("backbone.mean=[0.5,0.5,0.5]", "backbone.std=[0.5,0.5,0.5]", f"method.keep_classifier={rows}"),
        f"backbone.weights={shared / 'data' / 'weights' / 'mobilenetv2_100.dequantised_in1k.safetensors'}",
        *("dataset=listed", f"dataset.root={root}", "dataset.num_classes=10"),
    )
    from wsolkit import build_datamodule

    module, datamodule = build_module(cfg).eval(), build_datamodule(cfg)
    assert isinstance(module, CAM)
    datamodule.setup("test")
    from wsolkit.data.dataset import evaluation_batch

    dataset, evaluation = datamodule.dataset("test"), module.attached(Evaluator).evaluation
    for start in range(0, 60, 30):
        chosen = evaluation_batch([dataset[0, index * 5] for index in range(start, start + 30)])
        with torch.inference_mode():
            evaluation.update(chosen, module.localize, module)
    values = evaluation.compute()
    assert values["top1_cls"] > 85
    assert values["maxboxacc/max_box_acc"] > values["maxboxacc/full_image/max_box_acc"] + 10


@pytest.mark.parametrize("method", MAP_METHODS)
def test_maps_can_be_aligned_with_the_image(method: str) -> None:
    """All maps alike, twice as fine; the logits stay."""
    plain, aligned = (build(method, "+postprocess=scg", f"backbone.align={align}").eval() for align in (False, True))
    move, classes = network(aligned).backbone.aligned, torch.tensor([[0], [3]])
    stage = getattr(network(aligned), "place", None)  # ORNet's map comes early.
    before, after = (module.localize(image(), classes) for module in (plain, aligned))
    assert torch.equal(before.logits, after.logits)
    assert after.maps.shape[-1] == 2 * before.maps.shape[-1]
    assert torch.equal(after.maps, move(before.maps, stage))
    norms = plain.norms(image())
    assert norms is not None
    torch.testing.assert_close(aligned.norms(image()), move(norms[:, None])[:, 0])
    for name, part in plain.inside(image(), classes[:, 0]).items():
        moved = move(part, stage if name == "refined" else None)
        torch.testing.assert_close(aligned.inside(image(), classes[:, 0])[name], moved)


@pytest.fixture(params=["reduced", "full"])
def thresholded(request: pytest.FixtureRequest) -> Released:
    return read("tap", request)


def test_thresholded_average_and_clamped_weights_are_the_released_ones(thresholded: Released) -> None:
    """TAP and NWC, on a feature map in place of a backbone's."""
    released = thresholded
    threshold = released.number("threshold")
    feature, label = released["feature"].requires_grad_(), released["label"]
    assert error(thresholded_average(feature, threshold), released["pooled"]) < 1e-5
    settings = ("method.pooling=thresholded", f"method.pooling_threshold={threshold}")
    for clamp in (False, True):
        own = network(build("cam", *settings, f"method.clamp_weights={clamp}"))
        own.classifier = nn.Conv2d(8, 5, 1)
        state = released.state("state/")
        own.classifier.load_state_dict({"weight": state["weight"][:, :, None, None], "bias": state["bias"]})
        assert error(own.logits(feature), released["logits"]) < 1e-5  # NWC leaves the logits as they are.
        maps = own.score_maps(feature, None)
        assert error(maps, released["truncated_maps" if clamp else "maps"]) < 1e-5
        torch.testing.assert_close(own.score_maps(feature, label[:, None])[:, 0], maps[torch.arange(3), label])
    loss = nn.functional.cross_entropy(own.logits(feature), label)
    assert error(loss, released["loss"]) < 1e-5
    loss.backward()
    assert error(feature.grad, released["grad_feature"]) < 1e-4


def test_thresholded_average_of_zeros_is_zero() -> None:
    feature = torch.zeros(1, 2, 3, 3, requires_grad=True)
    pooled = thresholded_average(feature, 0.1)
    pooled.sum().backward()
    assert not pooled.any()
    assert feature.grad is not None
    assert feature.grad.isfinite().all()


def test_settings_of_pooling_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"method\.pooling=thresholded averages features, so it needs method\.form"):
        build("cam", "method.pooling=thresholded", "method.form=maps_first")
    with pytest.raises(ConfigError, match=r"method\.pooling_threshold=1\.0: expected a share"):
        build("cam", "method.pooling_threshold=1.0")
