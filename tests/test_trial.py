"The trial: what counts as different, what would hide a mistake, what is left as it was"
import math

import pytest
import torch
from torch import nn

from plasticity.edits import Deepen
from plasticity.trial import HardCodedShape, Trial, constant, quiet, relative, stand_ins

INF, NAN = math.inf, math.nan

@pytest.mark.parametrize('new,old,want', [
    ([1., 2.], [1., 2.], 0.), ([1., 2.2], [1., 2.], .1), ([1., NAN], [1., 2.], INF), ([1., NAN], [1., NAN], 0.), ([INF, 1.], [INF, 1.], 0.),
    ([-INF, 1.], [INF, 1.], INF), ([NAN, 1.], [INF, 1.], INF), ([0., 0.], [0., 0.], 0.), ([0., 1e-30], [0., 0.], INF), ([NAN], [NAN], 0.)])
def test_relative(new, old, want):
    assert relative([torch.tensor(new)], [torch.tensor(old)]) == pytest.approx(want, rel=1e-5)
    both = relative([torch.ones(3), torch.tensor(new).bfloat16().double()], [torch.ones(3), torch.tensor(old).bfloat16().double()])
    assert both == pytest.approx(want, rel=.1)

def test_relative_of_other_outputs():
    i, c, none = torch.tensor([1, 2]), torch.tensor([1 + 1j, 2.]), torch.zeros(0)
    assert relative([i], [i.clone()]) == 0 and relative([i], [i + 1]) == INF and relative([i, i], [i]) == INF
    assert relative([none], [none]) == 0 and relative([none, torch.ones(2)], [none, torch.ones(2)]) == 0
    assert relative([c], [c]) == 0 and relative([c + .2], [c]) == pytest.approx(.1) and relative([i.float()], [i]) == INF

def test_constant():
    last = torch.zeros(4, 4, 3, 3).to(memory_format=torch.channels_last); last[3, 3, 2, 2] = 1
    ts = [torch.zeros(5), last, torch.ones(1), torch.full((20,), NAN), torch.cat([torch.zeros(16), torch.ones(1)]),
          torch.full((2, 3), -1.5).bfloat16(), torch.randn(3, 4).t(), torch.ones(30, 2)[::2], torch.ones(()), torch.zeros(0)]
    assert constant(ts) == {0: 0., 5: -1.5, 7: 1.} and constant([]) == {}

def test_stand_ins_differ_everywhere_and_keep_the_sign():
    m = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(4, 4))
    nn.init.zeros_(m[2].weight); nn.init.constant_(m[2].bias, -3.)
    for dtype in (None, torch.float64):
        got = stand_ins(m, dtype)
        assert all(len(v.unique()) == v.numel() and v.shape == t.shape and v.dtype == (dtype or t.dtype) for t, v in got.items() if t is not
                   m[0].weight)
        assert (got[m[2].bias] < -1).all() and (got[m[1].weight] > .4).all() and len(got) == (6 if dtype is None else 8)
        again = stand_ins(m, dtype)
        assert all(torch.equal(v, again[t]) and v.data_ptr() != t.data_ptr() for t, v in got.items())
    assert m[2].weight.abs().max() == 0

class Counts(nn.Module):
    "Writes to its buffers, attributes and the random state in every mode"
    def __init__(self):
        super().__init__(); self.l, self.calls, self.seen = nn.Linear(3, 3), 0, None
        self.register_buffer('n', torch.zeros(2, dtype=torch.long))
        self.register_buffer('x', torch.ones(3)); self.register_buffer('none', None)
    def forward(self, x):
        self.calls += 1; self.n += 1; self.x = self.x * 2; self.seen = x; self.new = 3
        return self.l(x) + torch.rand(3) * 0 + self.x

def test_a_quiet_run_leaves_no_trace():
    m, x = Counts(), torch.randn(2, 3); buffers, state = dict(m.named_buffers()), torch.get_rng_state()
    with quiet(m): a = m(x)
    with quiet(m): b = m(x)
    assert torch.equal(a, b) and m.calls == 0 and m.seen is None and not hasattr(m, 'new') and m.training and m.l.training
    assert all(v is buffers[k] for k, v in m.named_buffers()) and m.n.tolist() == [0, 0] and m.x.tolist() == [1, 1, 1]
    assert torch.equal(torch.get_rng_state(), state)

def test_stand_ins_stay_where_float64_fails():
    class Single(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2); nn.init.zeros_(self.b.weight)
        def forward(self, x): return self.b(self.a(x).float() * 1e6) + torch.rand(2).round() * 1e-9
    t = Trial(Single(), torch.randn(5, 3)).settle()
    assert t.blind and not t.as_is and t.tol > 0

def test_a_module_that_is_read_says_so():
    class Tied(nn.Module):
        def __init__(self): super().__init__(); self.emb = nn.Embedding(7, 4)
        def forward(self, i): return self.emb(i) @ self.emb.weight.T
    with pytest.raises(HardCodedShape, match='only called'): Deepen('emb').apply(Tied(), None, torch.arange(5))
