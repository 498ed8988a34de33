"Random sequences of edits and training steps: PLASTICITY_EXAMPLES=1000 runs more of them"
import os
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn

import zoo
from plasticity.edits import edit, replay, twin_attention
from plasticity.trial import tensors_in
from plasticity.units import EditError, units
from sequences import MODELS, MOVES, OPT, Elsewhere, by_hand, close, sequence

EXAMPLES, SEEN = int(os.environ.get('PLASTICITY_EXAMPLES', 10)), Counter()

@pytest.fixture(scope='module')
def elsewhere(tmp_path_factory):
    with Elsewhere(tmp_path_factory.mktemp('records')) as e: yield e

@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(list(MODELS)), st.sampled_from(list(OPT)), st.integers(0, 10**6),
       st.lists(st.sampled_from(MOVES), min_size=1, max_size=8))
def test_sequences(elsewhere, name, opt, seed, moves): sequence(elsewhere, name, opt, seed, moves, SEEN)

def test_every_kind_of_edit_is_done(elsewhere):
    sequence(elsewhere, 'dense', 'adam', 4, MOVES, seen := Counter())
    assert set(seen) >= {'copy', 'zero', 'clone', 'prune', 'reset', 'deepen'}, seen

# ---- the rule behind the moments, on the zoo: what makes copied units gets its share of the gradient, what reads them all of it

def gradients(model, x):
    model.train(any(isinstance(m, nn.RNNBase) for m in model.modules()))
    for m in model.modules():
        if isinstance(m, nn.Dropout): m.p = 0.
        if isinstance(getattr(m, 'dropout', None), float): m.dropout = 0.
    torch.manual_seed(3); g = torch.Generator().manual_seed(4)
    ys = [y for y in tensors_in(zoo.call(model, x)) if y.is_floating_point()]
    loss = sum((y * torch.randn(y.shape, generator=g, dtype=y.dtype)).sum() + y.square().mean() for y in ys)
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return {(n, 'grad'): torch.zeros_like(p) if v is None else v for (n, p), v in zip(model.named_parameters(), grads, strict=True)}

@pytest.mark.parametrize('name', zoo.names())
def test_gradients_after_copying(name):
    model, x = zoo.build(name, torch.float64)
    model, tried = twin_attention(model), 0
    for i, verb in enumerate(('widen', 'clone')):
        found = [g.name for g in units(model, x) if verb not in g.blocked]
        for g in [units(model, x)[n] for n in found[i::2][:2]]:
            was, before = {k: v.detach().clone() for k, v in [*model.named_parameters(), *model.named_buffers()]}, gradients(model, x)
            try:
                with edit(model, None, x) as e: e.widen(g, 2, seed=i) if verb == 'widen' else e.clone(g, 2)
            except EditError: continue
            hand = by_hand(before | was, g, e.record.new[g.name], .6 if verb == 'widen' else .5)
            close(hand, gradients(model, x), 'gradients', 1e-6, 1e-2 * max(v.abs().max().item() for v in before.values()))
            close(hand, {**dict(model.named_parameters()), **dict(model.named_buffers())}, 'values', 1e-7)
            replay(model, e.record.inverse()); tried += 1
    if not tried: pytest.skip('nothing here can be copied')
