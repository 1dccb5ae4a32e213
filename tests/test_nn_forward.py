"""A call of `DeltaMemory` as a module, which wrappers and hooks see."""

from __future__ import annotations

import pytest
import torch
from test_nn import memory

from deltamem_kernels.nn.memory import is_plain
from deltamem_kernels.testing import relative_error


@pytest.mark.parametrize("tokens", [1, 6])
def test_a_call_of_the_module_gives_what_read_and_correct_give(tokens):
    """With gradients, in place of them, through hooks and through a parametrization."""
    module = memory(delta_o_rmsnorm=True, couple_lambda=False)
    x, state = torch.randn(2, tokens, module.hidden_size), torch.randn(2, 1, 8, 8)
    mask = torch.rand(2, tokens) < 0.7
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            exact = module.read(x, state, mask=mask)
            out = module(x, state, mask=mask)
            assert relative_error(out.reads, exact.reads) <= 1e-6
            assert relative_error(out.state, exact.state) <= 1e-6
            assert out.corrections.keys() == set("qkvo")
            for head, correction in out.corrections.items():
                base = torch.randn_like(correction)
                assert relative_error(base + correction, module.correct(base, exact.reads, head)) <= 1e-6
    called = []
    assert is_plain(module)
    hook = module.register_forward_hook(lambda *call: called.append(call))
    assert not is_plain(module)
    module(x, state)
    hook.remove()
    assert len(called) == 1
    torch.nn.utils.parametrize.register_parametrization(module, "memory_v_proj", Doubled())
    assert not is_plain(module)
    with torch.no_grad():
        doubled = module(x).state
        torch.nn.utils.parametrize.remove_parametrizations(module, "memory_v_proj", leave_parametrized=False)
        assert relative_error(doubled, 2 * module(x).state) <= 1e-6


class Doubled(torch.nn.Module):
    def forward(self, x):
        return 2 * x
