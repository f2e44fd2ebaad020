"""C²AM against released code, and how it learns without labels which region is the background."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.methods.released import Released, error, read
from tests.methods.test_cam import batch, build, image
from wsolkit.methods.base import WSOLModule
from wsolkit.methods.c2am import (
    C2AM,
    ActivationHead,
    FrozenC2AM,
    dissimilarity_loss,
    edge_share,
    embeddings,
    similarity_loss,
)


@pytest.fixture(params=["reduced", "full"])
def released(request: pytest.FixtureRequest) -> Released:
    return read("c2am", request)


def head_of(released: Released) -> ActivationHead:
    head = ActivationHead(released["feature"].shape[1])
    state = released.state("state/")
    names = {"activation_head": "conv", "bn_head": "norm"}
    own = {f"{names[name.split('.')[0]]}.{name.split('.')[1]}": value for name, value in state.items()}
    head.load_state_dict({**own, "inverted": torch.tensor(False)})
    return head


def test_regions_and_losses_are_the_released_ones(released: Released) -> None:
    head, alpha = head_of(released), released.number("alpha")
    activation = head.train()(released["feature"])
    assert error(activation, released["activation"]) < 2e-4
    # The released module is evaluated after its running statistics have seen this batch.
    assert error(head.eval()(released["feature"]), released["eval_activation"]) < 2e-4
    foreground, background = embeddings(released["feature"], activation)
    assert error(foreground, released["fg"]) < 2e-4
    assert error(background, released["bg"]) < 2e-4
    foreground.retain_grad()
    background.retain_grad()
    losses = {
        "loss_background": similarity_loss(background, alpha),
        "loss_between": dissimilarity_loss(background, foreground),
        "loss_foreground": similarity_loss(foreground, alpha),
    }
    for name, value in losses.items():
        assert error(value, released[name]) < 2e-4, name
    torch.stack(list(losses.values())).sum().backward()
    assert error(foreground.grad, released["grad_fg"]) < 5e-3
    assert error(background.grad, released["grad_bg"]) < 5e-3
    assert error(head.conv.weight.grad, released["grad/activation_head.weight"]) < 5e-3


def test_clamped_pairs_are_the_released_ones(released: Released) -> None:
    first, second = (released[name].requires_grad_() for name in ("first", "second"))
    alike = similarity_loss(first, released.number("alpha"))
    alike.backward()
    assert error(alike, released["similar_first"]) < 2e-4
    assert error(first.grad, released["grad_similar_first"]) < 5e-3
    first.grad = None
    apart = dissimilarity_loss(first, second)
    apart.backward()
    assert error(apart, released["dissimilar"]) < 2e-4
    assert error(first.grad, released["grad_dissimilar_first"]) < 5e-3
    assert error(second.grad, released["grad_dissimilar_second"]) < 5e-3


def test_embeddings_are_those_of_the_equations_on_a_map_that_is_not_square() -> None:
    torch.manual_seed(0)
    feature, activation = torch.randn(2, 3, 2, 5), torch.rand(2, 2, 5)
    foreground, background = embeddings(feature, activation)
    torch.testing.assert_close(foreground, (feature * activation[:, None]).sum(dim=(2, 3)) / 10)
    torch.testing.assert_close(foreground + background, feature.mean(dim=(2, 3)))


def bright_edges(inner: float, edge: float) -> Tensor:
    maps = torch.full((2, 4, 6), edge)
    maps[:, 1:-1, 1:-1] = inner
    return maps


def test_background_is_what_covers_the_edges() -> None:
    assert edge_share(bright_edges(0.9, 0.1)).tolist() == [0, 0]
    assert edge_share(bright_edges(0.1, 0.9)).tolist() == [1, 1]
    head = ActivationHead(3)
    for maps, inverted in ((bright_edges(0.1, 0.9), True), (bright_edges(0.9, 0.1), False)):
        head.tell_background(maps)
        assert bool(head.inverted) == inverted
        assert torch.equal(head.foreground(maps)[:, 0, 1:-1, 1:-1], torch.full((2, 2, 4), 0.9))


def epoch(module: WSOLModule, monkeypatch: pytest.MonkeyPatch, number: int) -> WSOLModule:
    monkeypatch.setattr(type(module), "current_epoch", number)
    return module


@pytest.mark.parametrize("method", ["c2am", "frozen_c2am"])
def test_only_the_first_epoch_tells_the_background(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = build(method).train()
    assert isinstance(module, C2AM | FrozenC2AM)
    head = module.network.activation
    for number, share, training, inverted in (
        (0, 1.0, False, False),  # An evaluation of the losses changes nothing.
        (0, 1.0, True, True),
        (1, 0.0, True, True),
        (0, 0.0, True, False),
    ):
        monkeypatch.setattr("wsolkit.methods.c2am.edge_share", lambda maps, share=share: share + 0 * maps.mean((1, 2)))
        epoch(module.train(training), monkeypatch, number).losses(batch())
        assert bool(head.inverted) == inverted
    assert "network.activation.inverted" in module.state_dict()
    before = module.eval().localize(image()).maps
    head.inverted.fill_(True)
    torch.testing.assert_close(module.localize(image()).maps, 1 - before)


@pytest.mark.parametrize("method", ["c2am", "frozen_c2am"])
def test_labels_reach_the_classifier_only(method: str) -> None:
    module = build(method).train()
    module.losses(batch())["loss_cls"].backward()
    reached = {name for name, parameter in module.named_parameters() if parameter.grad is not None}
    assert reached == {"network.classifier.weight", "network.classifier.bias"}


def test_classifier_has_a_learning_rate_of_its_own() -> None:
    module = build("c2am", "method.classifier_lr_factor=7", "method.head_channels=[5]")
    assert isinstance(module, C2AM)
    groups = {group["name"]: group for group in module.parameter_groups()}
    assert {id(one) for one in groups["classifier"]["params"]} == {
        id(one) for part in (module.network.head, module.network.classifier) for one in part.parameters()
    }
    assert groups["classifier"]["lr_factor"] == 7
    everything = [id(one) for group in groups.values() for one in group["params"]]
    assert sorted(everything) == sorted(id(one) for one in module.parameters())
