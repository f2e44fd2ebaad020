from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.conftest import METHODS
from wsolkit import build_module, load_config
from wsolkit.errors import ConfigError
from wsolkit.methods.parameters import weight_decay_groups
from wsolkit.training.optimization import Schedule


def schedule(name: str, warmup_epochs: float = 0, milestones: tuple[int, ...] = (), final: float = 0) -> Schedule:
    return Schedule(name, warmup_epochs, milestones, 0.1, final)  # type: ignore[arg-type]


def test_constant() -> None:
    assert [schedule("constant")(epoch, 10) for epoch in (0, 5, 10)] == [1, 1, 1]


def test_steps_decay_at_the_start_of_their_epoch() -> None:
    factors = [schedule("step", milestones=(10, 12))(epoch, 20) for epoch in (0, 9.99, 10, 11.9, 12, 20)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_cosine_goes_from_one_to_its_end() -> None:
    factors = [schedule("cosine", final=0.2)(epoch, 10) for epoch in (0, 5, 10)]
    assert factors == pytest.approx([1, 0.6, 0.2])


def test_warmup_is_linear_and_the_cosine_follows_it() -> None:
    factors = [schedule("cosine", warmup_epochs=2)(epoch, 10) for epoch in (0, 1, 2, 6, 10)]
    assert factors == pytest.approx([0, 0.5, 1, 0.5, 0])
    with pytest.raises(ConfigError, match="warmup_epochs is -1"):
        schedule("cosine", warmup_epochs=-1)


def test_frozen_parameters_are_left_out() -> None:
    module = nn.Linear(2, 2)
    module.weight.requires_grad = False
    decay, no_decay = weight_decay_groups(module)
    assert decay["params"] == []
    assert no_decay["params"][0] is module.bias
    assert (
        torch.optim.AdamW(weight_decay_groups(nn.Linear(2, 2)), weight_decay=0.3).param_groups[0]["weight_decay"] == 0.3
    )


@pytest.mark.parametrize("method", METHODS)
def test_groups_hold_what_checkpoints_hold_in_their_order(method: str) -> None:
    """Each in the order of the module's parameters: an optimizer's state in a checkpoint goes by this order."""
    module = build_module(load_config(f"method={method}"))
    exempt = {"pos_embed", "cls_token"}
    expected: dict[str, list[str]] = {"decay": [], "no_decay": []}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            free = parameter.ndim <= 1 or name.rsplit(".", 1)[-1] in exempt
            expected["no_decay" if free else "decay"].append(name)
    names = {parameter: name for name, parameter in module.named_parameters()}
    groups = weight_decay_groups(module, exempt)
    assert [group["name"] for group in groups] == list(expected)
    assert [[names[parameter] for parameter in group["params"]] for group in groups] == list(expected.values())
