"""The reference's weights in the policy's modules, and out of them again."""

import pytest
import torch

from framework.megatron.reference import Reference


@pytest.mark.parametrize("on_host", [True, False])
def test_a_pass_sees_the_first_weights_and_the_policy_keeps_its_own(on_host):
    model = torch.nn.Linear(3, 2)
    x = torch.randn(4, 3)
    before = model(x).detach()
    reference = Reference([model], on_host=on_host)
    with torch.no_grad():
        model.weight += 1
    trained, storage = model(x).detach(), model.weight.data_ptr()
    with reference.swapped_in():
        again = model(x)
    assert torch.equal(again, before)
    assert not again.requires_grad
    assert torch.equal(model(x), trained)
    assert model.weight.data_ptr() == storage  # still the optimizer's buffer
    assert reference.size_bytes == 4 * (6 + 2)


def test_a_refreshed_reference_is_the_policy_of_that_moment():
    model = torch.nn.Linear(3, 2)
    x = torch.randn(4, 3)
    reference = Reference([model], on_host=True)
    with torch.no_grad():
        model.weight += 1
    trained = model(x).detach()
    reference.refresh()
    with torch.no_grad():
        model.weight += 1
    with reference.swapped_in():
        assert torch.equal(model(x), trained)


def test_the_policy_comes_back_when_a_pass_fails():
    model = torch.nn.Linear(3, 2)
    reference = Reference([model], on_host=True)
    storage = model.weight.data_ptr()
    with pytest.raises(ZeroDivisionError), reference.swapped_in():
        raise ZeroDivisionError
    assert model.weight.data_ptr() == storage
