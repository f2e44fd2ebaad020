"""BagCAMs against the arrays of its released code, and as a post-process of every method on a CNN."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.methods.released import Released, error, read
from wsolkit import build_module, load_config
from wsolkit.errors import ConfigError
from wsolkit.interop.programs import trace
from wsolkit.localization.maps import min_max
from wsolkit.methods.bagcams import bag_map, guided_gradients


@pytest.fixture(params=["reduced", "full"])
def released(request: pytest.FixtureRequest) -> Released:
    return read("bagcams", request)


class Chain(nn.Module):
    """The small network of the arrays, cut after one of its layers."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        shapes = [(state[f"{place}.weight"].shape, stride) for place, stride in ((0, 2), (2, 2), (4, 1))]
        convolutions = [nn.Conv2d(shape[1], shape[0], 3, stride, 1) for shape, stride in shapes]
        layers = [layer for one in convolutions for layer in (one, nn.ReLU(inplace=True))]
        self.extractor = nn.Sequential(*layers)
        self.extractor.load_state_dict({name: value for name, value in state.items() if not name.startswith("c")})

    def split(self, stage: str) -> tuple[nn.Module, nn.Module]:
        place = int(stage) + 1
        return self.extractor[:place], self.extractor[place:]


class Network(nn.Module):
    def __init__(self, released: Released) -> None:
        super().__init__()
        self.backbone = Chain(released.state("state/extractor."))
        weight, bias = released["state/classifier.weight"], released["state/classifier.bias"]
        self.classifier = nn.Conv2d(weight.shape[1], weight.shape[0], 1)
        self.classifier.weight.data, self.classifier.bias.data = weight, bias  # type: ignore[union-attr]

    def classified(self, last: Tensor) -> Tensor:
        return last

    def logits(self, feature: Tensor) -> Tensor:
        return self.classifier(feature).mean(dim=(2, 3))  # type: ignore[no-any-return]


@pytest.mark.parametrize("layer", ["2", "3", "5"])
def test_gradients_and_maps_are_the_released_ones(layer: str, released: Released) -> None:
    label = released["label"][:, None]
    network = Network(released)
    assert error(network.logits(network.backbone.extractor(released["image"])), released["logits"]) < 2e-4
    with torch.inference_mode():  # Lightning evaluates in it.
        feature, gradients = guided_gradients(network, released["image"].clone(), layer, label.clone())  # type: ignore[arg-type]
    assert error(feature, released[f"{layer}/feature"]) < 2e-4
    assert error(gradients[:, 0], released[f"{layer}/gradient"]) < 2e-3
    found = bag_map(released[f"{layer}/feature"], released[f"{layer}/gradient"])
    assert error(min_max(found), min_max(released[f"{layer}/map"])) < 2e-4
    assert all(module.inplace for module in network.modules() if isinstance(module, nn.ReLU))
    assert not any(module._backward_hooks for module in network.modules())


def test_gradient_of_a_logit_that_is_not_positive_is_its_own(released: Released) -> None:
    network = Network(released)
    network.classifier.bias.data -= 100  # type: ignore[union-attr]
    _, gradients = guided_gradients(network, released["image"], "5", released["label"][:, None])  # type: ignore[arg-type]
    own = network.classifier.weight[released["label"], :, 0, 0] / 100  # The mean over 10×10 positions.
    assert torch.allclose(gradients[:, 0, :, 0, 0], own, atol=1e-6)


@pytest.mark.parametrize("method", ["cam", "acol", "calm"])
def test_maps_of_classes_are_the_same_alone_and_together(method: str) -> None:
    torch.manual_seed(0)
    module = build_module(load_config(f"method={method}", "postprocess=bagcams"), ["a", "b", "c"]).eval()
    image = torch.rand(2, 3, 64, 64)
    found = module.localize(image, "all")
    assert found.maps.isfinite().all()
    assert found.maps.amax() > 0
    one = module.localize(image, torch.tensor([[1], [2]]))
    assert torch.allclose(one.maps[:, 0], found.maps[[0, 1], [1, 2]], rtol=1e-4, atol=1e-7)
    assert torch.equal(found.logits, module(image))


def test_programs_cannot_take_gradients() -> None:
    module = build_module(load_config("method=cam", "postprocess=bagcams"), ["a", "b"])
    with pytest.raises(ConfigError, match="postprocess=none"):
        trace(module, 64)
