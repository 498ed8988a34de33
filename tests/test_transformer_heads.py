"Heads: measured, pruned, regrown; growth"
import copy

import pytest
import torch
from hypothesis import given, settings, strategies as st

from plasticity.edits import Deepen, Prune, Widen
from plasticity.generation import generate
from plasticity.heads import HeadPruning, Heads, grow_language_model, head_importance, weak_heads
from plasticity.models import make_model
from plasticity.results import Table
from plasticity.schedules import Schedule, Scheduled
from plasticity.text import Bytes, TextData
from plasticity.training import Trainer
from plasticity.transformer import load_language_model, token_loss
from plasticity.units import EditError, LastUnits

def small(seed=0, **options):
    m = make_model('gpt', 24, 40, seed=seed, **(dict(hidden_size=24, num_layers=2, num_heads=4) | options))
    for n, p in m.named_parameters():
        if p.dim() == 1: torch.nn.init.normal_(p, float('norm' in n and n.endswith('weight')), .3)
    return m.eval()

def tokens(n=12, rows=2): return torch.randint(40, (rows, n), generator=torch.Generator().manual_seed(n))

def trained(m, optimizer='AdamW'):
    o = getattr(torch.optim, optimizer)(m.parameters(), lr=1e-2)
    for _ in range(3):
        o.zero_grad(); token_loss(m(tokens()), tokens().roll(-1, 1)).backward(); o.step()
    return o

def everything(m, o): return [v.clone() for v in m.state_dict().values()] + [
    v.clone() for p in m.parameters() for k, v in o.state[p].items()]

@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 3)), min_size=1, max_size=5, unique=True), st.randoms(use_true_random=False))
def test_pruned_is_masked_and_regrown_is_before(which, random):
    m, x = small(), tokens()
    if any(sum(l == i for l, _ in which) == 4 for i in (0, 1)): which = which[:3]
    o = trained(m)
    before, masked = everything(m, o), copy.deepcopy(m)
    for l, h in which: masked.blocks[l].attn.proj.weight.data[:, 6*h:6*h + 6] = 0
    heads = Heads(m, o)
    heads.prune(which, x)
    with torch.no_grad(): assert (m(x) - masked(x)).abs().max() < 1e-5
    assert heads.gone == sorted(which) and sum(m.heads) == 8 - len(which)
    random.shuffle(which)
    for pair in which: heads.regrow([pair])
    assert all(torch.equal(a, b) for a, b in zip(everything(m, o), before, strict=True))

def test_regrown_after_training_keeps_what_the_others_learned():
    m, x = small(), tokens()
    o = trained(m)
    heads, row = Heads(m, o), m.blocks[0].attn.proj.weight.data[:, 6:12].clone()
    heads.prune([(0, 1)], x)
    token_loss(m(x), x).backward(); o.step()
    learned = m.blocks[0].attn.proj.weight.data[:, :6].clone()
    heads.regrow()
    w = m.blocks[0].attn.proj.weight.data
    assert torch.equal(w[:, 6:12], row) and torch.equal(w[:, :6], learned) and heads.alive == [[0, 1, 2, 3]]*2
    token_loss(m(x), x).backward(); o.step()  # the optimizer goes on

def test_fresh_heads_are_not_listened_to_and_learn():
    m, x = small(), tokens()
    o = trained(m)
    heads = Heads(m, o)
    heads.prune([(1, 0), (1, 3)], x)
    with torch.no_grad(): before = m(x)
    heads.regrow(fresh=True, seed=1)
    with torch.no_grad(): assert (m(x) - before).abs().max() < 1e-5
    o.zero_grad(); token_loss(m(x), x).backward()
    assert m.blocks[1].attn.proj.weight.grad[:, :6].abs().max() > 0
    a, b = small(), small()
    for net in (a, b): h = Heads(net); h.prune([(0, 0)], x); h.regrow(fresh=True, seed=4)
    assert torch.equal(a.blocks[0].attn.qkv.weight, b.blocks[0].attn.qkv.weight)

def test_undo_goes_back_through_everything():
    m, x = small(), tokens()
    o = trained(m)
    before, heads = everything(m, o), Heads(m, o)
    heads.prune([(0, 0), (1, 2)], x); heads.regrow([(1, 2)]); heads.prune([(1, 0)], x); heads.regrow([(0, 0)], fresh=True)
    while heads.past: heads.undo()
    assert all(torch.equal(a, b) for a, b in zip(everything(m, o), before, strict=True)) and heads.gone == []
    with pytest.raises(ValueError, match='nothing'): heads.undo()

def test_refusals_change_nothing():
    m, x = small(), tokens()
    heads, before = Heads(m), copy.deepcopy(m.state_dict())
    with pytest.raises(LastUnits): heads.prune([(0, h) for h in range(4)], x)
    with pytest.raises(ValueError, match='0.9'): heads.prune([(1, 1), (0, 9)], x)
    with pytest.raises(ValueError, match='layer'): heads.prune([(7, 0)], x)
    with pytest.raises(ValueError, match='is there'): heads.regrow([(0, 0)])
    with pytest.raises(ValueError, match='fresh'): heads.regrow([(0, 9)])
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items()) and heads.alive == [[0, 1, 2, 3]]*2

@pytest.mark.parametrize('options', [{}, dict(positions='rotary'), dict(tied=False), dict(bias=False),
                                     dict(positions='rotary', bias=False)])
def test_growth_keeps_the_function(options):
    m, x = small(**options), tokens()
    o = trained(m)
    with torch.no_grad(): before = m(x)
    record = grow_language_model(m, x, hidden_size=48, ff_size=150, num_heads=7, num_layers=4, optimizer=o)
    with torch.no_grad(): assert (m(x) - before).abs().max() < 1e-5*max(1, before.abs().max())
    want = dict(hidden_size=48, num_layers=4, ff_size=150)
    assert {k: m.sizes()[k] for k in want} == want and m.heads == [7]*4
    assert m.head.in_features == 48 and m.tied == options.get('tied', True)
    o.zero_grad(); token_loss(m(x), x.roll(-1, 1)).backward(); o.step()
    assert len(record.edits) >= 4 and {id(p) for g in o.param_groups for p in g['params']} == {id(p) for p in m.parameters()}

def test_growth_from_a_single_head():
    m, x = small(num_heads=1), tokens()
    o = trained(m)
    with torch.no_grad(): before = m(x)
    state = everything(m, o)
    record = grow_language_model(m, x, hidden_size=48, num_heads=4, num_layers=3, optimizer=o)
    with torch.no_grad(): assert (m(x) - before).abs().max() < 1e-5 and m.heads == [4]*3
    from plasticity.edits import replay
    replay(m, record.inverse(), o)
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-12) for a, b in zip(everything(m, o), state, strict=True))

def test_growth_can_be_taken_back():
    from plasticity.edits import replay
    m, x = small(), tokens()
    o = trained(m)
    before = everything(m, o)
    record = grow_language_model(m, x, hidden_size=72, num_heads=5, optimizer=o)
    replay(m, record.inverse(), o)
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-12) for a, b in zip(everything(m, o), before, strict=True))

def test_uneven_copies_do_not_stay_twins():
    m, x = small(), tokens()
    grow_language_model(m, x, hidden_size=48)
    o = torch.optim.AdamW(m.parameters(), lr=1e-2)
    for _ in range(5): o.zero_grad(); token_loss(m(x), x.roll(-1, 1)).backward(); o.step()
    w = m.blocks[0].fc1.weight.data
    assert (w[:, 0::2]/w[:, 0::2].norm() - w[:, 1::2]/w[:, 1::2].norm()).abs().max() > 1e-4

@pytest.mark.parametrize('options,word', [(dict(hidden_size=36), 'multiple'), (dict(hidden_size=12), 'already'),
                                          (dict(num_heads=3), 'already'), (dict(num_layers=1), 'already')])
def test_growth_refuses(options, word):
    m = small()
    before = copy.deepcopy(m.state_dict())
    with pytest.raises((ValueError, EditError), match=word): grow_language_model(m, tokens(), **options)
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())

def test_generation_after_edits():
    m, x = small(), tokens()
    heads = Heads(m)
    def same():
        two = [x[0, :5], x[1, :3]]
        return generate(m, two, 40, seed=2) == generate(m, two, 40, seed=2, cache=False)
    assert same()
    heads.prune([(0, 1), (0, 2), (1, 3)], x); assert same()
    heads.regrow([(0, 1)]); heads.regrow([(1, 3)], fresh=True); assert same()
    grow_language_model(m, x, hidden_size=48, ff_size=130, num_heads=5, num_layers=3); assert same()

def test_importance_finds_the_silent_head():
    m = small()
    m.blocks[1].attn.proj.weight.data[:, 6:12] = 0
    for how in ('norm', 'taylor'):
        rows = head_importance(m, how, [(tokens(), tokens().roll(-1, 1))])
        assert min(rows, key=lambda r: r['importance']) == dict(layer=1, head=1, importance=0.)
    even = small()
    even.blocks[0].attn.qkv.weight.data[:6] = 0; even.blocks[0].attn.qkv.bias.data[:6] = 0  # queries of the first head
    rows = head_importance(even, 'entropy', [(tokens(), None)])
    assert abs(rows[0]['importance']) < 1e-5 and rows[1]['importance'] > 1e-5
    with pytest.raises(ValueError, match='batches'): head_importance(m, 'taylor')
    with pytest.raises(ValueError, match='norm'): head_importance(m, 'norms')

def test_frozen_attention_has_an_importance():
    m, batches = small(), [(tokens(), tokens().roll(-1, 1))]
    a = head_importance(m, 'taylor', batches)
    m.blocks[0].attn.requires_grad_(False)
    assert head_importance(m, 'taylor', batches) == a and not m.blocks[0].attn.proj.weight.requires_grad

def test_weak_heads_leave_one():
    rows = Table(dict(layer=i, head=j, importance=v) for i, vs in enumerate(([1., .1, .2], [.05, .04, .03])) for j, v in enumerate(vs))
    assert weak_heads(rows, .5) == [(0, 2), (0, 1), (1, 2), (1, 1)] and weak_heads(rows, .5, 1) == [(1, 2)] and weak_heads(rows, 0.) == []

def test_heads_are_pruned_beside_other_edits_of_heads():
    text = torch.randint(40, (2000,), generator=torch.Generator().manual_seed(0))
    model = make_model('gpt', 16, 256, seed=0, hidden_size=16, num_layers=2, num_heads=4)
    grow = Scheduled(Schedule(4, limit=1), lambda t: [Widen('blocks.0.attn.heads', 2), Deepen('blocks.1', kind='block')])
    thin = Scheduled(Schedule(6, limit=1), lambda t: Prune('blocks.1.attn.heads', [0]))
    p = HeadPruning(5, .99, at_most=1)
    data = TextData('noise', text[:1500], text[1500:], Bytes(), 16)
    Trainer(model, data, batch_size=8, device='cpu', callbacks=[grow, thin, p]).fit(steps=15)
    assert len(p.events) == 3 and list(map(len, p.alive)) == model.heads and len(model.heads) == 3
    assert [list(map(len, r['alive'])) for r in p.diary][:2] == [[4, 4], [6, 4, 4]] and p.diary[-1]['alive'] == p.alive

def test_pruning_run_resumes(tmp_path):
    text = torch.randint(40, (2000,), generator=torch.Generator().manual_seed(0))
    data = TextData('noise', text[:1500], text[1500:], Bytes(), 16)
    def run():
        model = make_model('gpt', 16, 256, seed=0, hidden_size=16, num_layers=2, num_heads=4)
        return Trainer(model, data, 'adamw', batch_size=8, seed=0, device='cpu', callbacks=[HeadPruning(5, .99, at_most=1)])
    whole, first = run().fit(steps=16), run()
    first.fit(epochs=2, steps=8).save(tmp_path)
    assert sum(first.model.heads) < 8
    again = run().load(tmp_path)
    assert again.model.heads == first.model.heads
    again.goal = ['step', 16]; again.fit()
    assert again.model.heads == whole.model.heads and again.callbacks[0].alive == whole.callbacks[0].alive
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True))
    model, _, about = load_language_model(tmp_path)
    assert model.heads == first.model.heads and about['step'] == 8
