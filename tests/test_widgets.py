"Films, stills and live views: what they hold, what they cost, and that acting does what was shown before"
import json, math, re, shutil, subprocess, tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

pytest.importorskip('anywidget')
import plasticity.filming as filming_module
from plasticity.data import get_data
from plasticity.film import NOTHING, Column, Film, aligned, cells, in_order, numbers_of, shades, tensor_columns, unpack
from plasticity.filming import Filming, film_of
from plasticity.growing import grow
from plasticity.models import make_model
from plasticity.monitors import Monitor
from plasticity.plots import png
from plasticity.policies import Growth, LossBasedGrowth
from plasticity.results import seeded
from plasticity.snapshots import SnapshotManager
from plasticity.sparse_network import MinimalNetwork
from plasticity.stills import plot_health_film, plot_topology, plot_widths, short_names
from plasticity.training import Callback, Trainer
from plasticity.widgets import ACTS, STATIC, TopologyView, _moved, script

NODE = shutil.which('node')

@pytest.fixture(scope='module')
def digits(): return get_data('digits').subset(train=320, test=40)

def trainer_of(digits, name='mlp', callbacks=(), seed=0, optimizer='adam', **options):
    with seeded(seed): model = make_model(name, digits.shape, 10, **(options or dict(hidden_sizes=[12, 9])))
    return Trainer(model, digits, optimizer=optimizer, lr=3e-3, seed=seed, device='cpu', eval_every=0, callbacks=list(callbacks))

def everything(trainer):
    "All tensors of a model and of its optimizer, by place"
    state = trainer.optimizer.state_dict()['state']
    moments = {f'{i} {k}': v for i, s in state.items() for k, v in s.items() if isinstance(v, torch.Tensor)}
    return {k: v.clone() for k, v in (dict(trainer.model.state_dict()) | moments).items()}

def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def synthetic(frames=30, widths=(5, 7), metrics=('active', 'incoming'), seed=0, **options):
    film, rng = Film(**options), np.random.default_rng(seed)
    for s in range(frames):
        columns = [Column(f'layers.{i}.linear', w) for i, w in enumerate(widths)]
        values = {m: {c.name: rng.random(c.n) for c in columns} for m in metrics}
        film.add(s, columns, values, [dict(layer=c.name, metric='dead_fraction', value=.5, units=c.n) for c in columns])
    return film

# ---- cells and numbers

@given(n=st.integers(1, 400), most=st.integers(1, 130), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_cells_are_means_of_neighbours(n, most, seed):
    v = np.random.default_rng(seed).normal(size=n).astype(np.float32)
    got = cells(v, most)
    assert len(got) == min(n, most)
    if n <= most: assert np.array_equal(got, v)
    else:
        cut = [i*n//most for i in range(most + 1)]
        assert np.allclose(got, [v[a:b].mean() for a, b in zip(cut, cut[1:], strict=False)], atol=1e-5)

def test_cells_of_unknown_units():
    assert np.isnan(cells([math.nan]*10, 3)).all()
    assert cells([1, math.nan, math.inf, 3], 2).tolist() == [1, 3]

@given(v=st.lists(st.floats(1e-4, 10), min_size=1, max_size=50), log=st.booleans())
@settings(max_examples=60, deadline=None)
def test_shades_come_back(v, log):
    v = np.array([*v, math.nan])
    s = shades(v, 1e-4, 10., log)
    back = numbers_of(s, 1e-4, 10., log)
    assert s[-1] == NOTHING and np.isnan(back[-1]) and (s[:-1] < 64).all()
    step = np.log(1e5)/63 if log else 10/63
    gap = np.abs(np.log(back/v)) if log else np.abs(back - v)
    assert (gap[:-1] <= step/2*1.001).all()

@given(n=st.integers(2, 30), seed=st.integers(0, 999), data=st.data())
@settings(max_examples=80, deadline=None)
def test_units_are_followed_through_edits(n, seed, data):
    rng = np.random.default_rng(seed)
    old = rng.normal(size=(n, 3))
    keep = sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=n)))
    assert aligned(old, old[keep]).tolist() == keep
    k = data.draw(st.integers(1, 10))
    where = np.sort(rng.integers(0, n + 1, k))
    new = np.insert(old, where, 50 + rng.normal(size=(k, 3)), axis=0)
    assert aligned(old, new).tolist() == np.insert(np.arange(n), where, -1).tolist()

def test_ids_stay_with_units():
    film, columns = Film(), [Column('a', 4)]
    film.add(0, columns, dict(incoming=dict(a=np.array([1., 2, 3, 4]))))
    film.add(1, [Column('a', 3)], dict(incoming=dict(a=np.array([1., 3, 4]))))
    film.add(2, [Column('a', 4)], dict(incoming=dict(a=np.array([1., 9, 3, 4]))))
    assert [f['ids']['a'] for f in film.frames] == [[0, 1, 2, 3], [0, 2, 3], [0, 4, 2, 3]]
    packed = film.pack()
    assert packed['ids'] == [[1, 0, [[0, 1], [2, 2]]], [2, 0, [[0, 1], [4, 1], [2, 2]]]]

# ---- films: room and size

def test_a_film_does_not_grow():
    film, columns = Film(most=64), [Column('a', 40), Column('b', 30)]
    values = {m: {c.name: np.random.rand(c.n) for c in columns} for m in ('active', 'incoming')}  # noqa: NPY002
    tracemalloc.start()
    sizes = []
    for s in range(10_000):
        film.add(s, columns, values, [dict(layer='a', metric='dead_fraction', value=.1, units=40)])
        assert len(film) <= 64
        if s in (5000, 9999): sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert sizes[1] - sizes[0] < 50_000
    steps = [f['step'] for f in film.frames]
    assert steps[0] == 0 and steps[-1] == 9999 and len(steps) > 30
    assert max(np.diff(steps[:-1])) <= 2*min(np.diff(steps[:-1]))

def test_a_film_keeps_to_its_room():
    film = synthetic(frames=50, widths=(100, 100), room=4000)
    assert film.numbers() <= 4000 and film.frames[-1]['step'] == 49

@pytest.mark.parametrize('layers, units, frames', [(1, 1, 1), (2, 3, 1000), (3, 300, 200), (30, 700, 60)])
@pytest.mark.parametrize('limit', [20_000, 60_000])
def test_a_packed_film_keeps_to_its_size(layers, units, frames, limit):
    rng, film, columns = np.random.default_rng(0), Film(), [Column(f'layers.{i}', units) for i in range(layers)]
    for s in range(frames):
        film.add(s, columns, {m: {c.name: rng.random(units) for c in columns} for m in ('active', 'size', 'incoming')})
    p = film.pack(limit)
    assert len(json.dumps(p)) <= limit and p['steps'][0] == 0 and p['steps'][-1] == frames - 1
    assert unpack(p)['n'].shape == (layers, len(p['steps'])) and (unpack(p)['n'] == units).all()

def test_a_hundred_layers_of_4096_units_a_thousand_times():
    rng, film, columns = np.random.default_rng(0), Film(), [Column(f'layers.{i}', 4096) for i in range(100)]
    values = {m: {c.name: rng.random(4096) for c in columns} for m in ('active', 'size', 'gradient', 'incoming')}
    for s in range(1000): # the cells of a frame are made once, to be quick
        if s < 3: film.add(s, columns, values)
        else: film.add(s, columns, {m: {k: film.frames[-1]['values'][m][k] for k in by} for m, by in values.items()})
    p = film.pack(48_000)
    view = TopologyView(p)
    assert len(json.dumps(p)) <= 48_000 and len(p['steps']) >= 4 and p['columns'][0]['cells'] >= 4
    saved = {k: v for k, v in view.get_state().items() if isinstance(v, (str, int, bool, list, dict))}
    assert len(json.dumps(saved, default=str)) < 100_000

def test_widths_beyond_two_bytes():
    film = Film()
    film.add(0, [Column('a', 70_000)], dict(incoming=dict(a=np.ones(70_000))))
    assert unpack(film.pack())['n'].tolist() == [[70_000]]

@given(st.lists(st.permutations(range(6)).map(lambda p: p[:4]), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_columns_are_in_the_order_of_the_last_frame(rows):
    order = in_order(rows)
    assert sorted(order) == sorted({k for r in rows for k in r}) and [k for k in order if k in rows[-1]] == list(rows[-1])

def test_a_layer_that_comes_between_is_drawn_between(digits):
    f, net = Filming(steps=1), grow(make_model('mlp', digits.shape, 10, hidden_sizes=[4, 5]))
    t = Trainer(net, digits, lr=3e-3, device='cpu', eval_every=0, callbacks=[f]).fit(steps=3)
    net.attach(t.optimizer); net.expand_depth(1, 6)
    t.fit(steps=3)
    p = f.film.pack()
    d, names = unpack(p), [c['name'] for c in p['columns']]
    assert d['n'][:, -1].tolist() == [4, 6, 5, 10] and d['n'][:, 0].tolist() == [4, 0, 5, 10]
    assert sorted(map(tuple, p['arrows'])) == [(0, 1), (1, 2), (2, 3)]
    assert p['layers'] == [k for k in names if k in p['layers']] and len(p['layers']) == 4

def test_an_empty_film_has_nothing_to_pack():
    with pytest.raises(ValueError, match='film: it has no frames'): Film().pack()
    with pytest.raises(ValueError, match='most: got 2'): Film(most=2)

@pytest.mark.skipif(NODE is None, reason='no node')
def test_the_page_reads_what_was_packed(tmp_path, digits):
    f = Filming(every=0, share=1.)
    net = grow(make_model('mlp', digits.shape, 10, hidden_sizes=[4, 4]))
    growth = Growth(LossBasedGrowth(patience=1, cooldown=1, min_delta=.5))
    Trainer(net, digits, lr=3e-3, device='cpu', eval_every=0, callbacks=[growth, f]).fit(6)
    p = f.film.pack()
    d = unpack(p)
    (tmp_path/'topology.mjs').write_text((STATIC/'topology.js').read_text() + '\nexport { unpack }\n')
    (tmp_path/'film.json').write_text(json.dumps(p))
    (tmp_path/'run.mjs').write_text("import { unpack } from './topology.mjs'\nimport fs from 'fs'\n"
        "const f = await unpack(JSON.parse(fs.readFileSync('film.json')))\n"
        "const lists = by => Object.fromEntries(Object.entries(by).map(([k, v]) => [k, Array.from(v)]))\n"
        "const all = x => Object.fromEntries(Object.entries(x.values).map(([m, by]) => [m, lists(by)]))\n"
        "console.log(JSON.stringify(f.frames.map(x => ({n: x.n, ids: x.ids, health: x.health, values: all(x)}))))\n")
    out = json.loads(subprocess.run([NODE, 'run.mjs'], cwd=tmp_path, capture_output=True, text=True, check=True).stdout)
    assert len(out) == len(p['steps'])
    for t, frame in enumerate(out):
        for i, c in enumerate(p['columns']):
            assert frame['n'][c['name']] == d['n'][i, t]
            for m in p['metrics']:
                mine = d['values'][m['name']][i][:min(c['cells'], d['n'][i, t]), t]
                theirs = np.array([math.nan if v is None else v for v in frame['values'][m['name']][c['name']]])
                assert np.allclose(mine, theirs, rtol=1e-5, equal_nan=True)
        for m in p['health']:
            theirs = [math.nan if v is None else v for v in frame['health'][m['name']]]
            assert np.allclose(d['health'][m['name']][:, t], theirs, rtol=1e-5, equal_nan=True)
    assert out[-1]['ids'][p['columns'][0]['name']] in (None, f.film.frames[-1]['ids'][p['columns'][0]['name']])

# ---- filming

def test_filming_changes_nothing(digits):
    plain = trainer_of(digits).fit(2)
    watched = trainer_of(digits, callbacks=[Filming(every=0, share=1.)]).fit(2)
    assert same(everything(plain), everything(watched))
    assert plain.history == watched.history

class Clock:
    "A time that passes when a step is made"
    def __init__(self): self.now = 0.
    def perf_counter(self): return self.now

@pytest.mark.parametrize('step, cost, share, per_second', [(.001, 0., .025, 4), (.001, .004, .025, 4), (.001, .05, .025, .5),
                                                           (.5, .001, .025, 2)])
def test_frames_keep_to_the_rate_and_to_the_share(digits, monkeypatch, step, cost, share, per_second):
    clock, taken = Clock(), []
    monkeypatch.setattr(filming_module, 'time', clock)
    f = Filming(share=share)
    real = f.film.add
    def add(*args, **options): clock.now += cost; taken.append(clock.now); return real(*args, **options)
    f.film.add = add
    class Passes(Callback):
        def after_backward(self, trainer): clock.now += step*(10 if f.wanted else 1) # a measured step takes longer
    trainer_of(digits, callbacks=[Passes(), f]).fit(steps=400)
    total = 400*step + (cost + 9*step)*len(taken)
    inside = taken[1:-1]
    assert len(inside) <= per_second*total + 1 and (cost + 9*step)*len(inside) <= share*total + cost + 9*step
    assert all(b - a >= .25 - 1e-9 for a, b in zip(inside, inside[1:], strict=False))

def test_numbers_are_those_of_the_monitor_and_the_weights(digits):
    f = Filming(every=1e9, monitor=None)
    t = trainer_of(digits, callbacks=[f])
    m = Monitor(t.model, every=1, rows=None)
    f.monitor = m
    t.callbacks.insert(0, m)
    t.fit(1)
    frame, stats = f.film.frames[-1], m['layers.0.act']
    assert np.allclose(frame['values']['active']['layers.0.linear'], (stats.active/stats.samples).numpy(), atol=1e-6)
    w = t.model.layers[1].linear.weight.detach()
    assert np.allclose(frame['values']['incoming']['layers.1.linear'], w.norm(dim=1).numpy(), atol=1e-5)
    assert np.allclose(frame['values']['outgoing']['layers.0.linear'], w.norm(dim=0).numpy(), atol=1e-5)
    partner, like = frame['twins']['layers.0.linear']
    assert len(partner) == 12 and (partner != np.arange(12)).all() and (like <= 1 + 1e-9).all()

def test_a_run_that_diverges_is_filmed_to_its_end(digits):
    f = Filming(steps=1)
    with seeded(0): model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 9), torch.nn.Linear(9, 10))
    t = Trainer(model, digits, 'sgd', lr=1e8, device='cpu', callbacks=[f]).fit(2)
    assert not model[1].weight.isfinite().any()
    assert f.film.frames[-1]['step'] == t.step and f.film.pack()

def test_twins_are_found(digits):
    f = Filming(every=0, share=1.)
    t = trainer_of(digits, callbacks=[f])
    with torch.no_grad():
        for p in (t.model.layers[0].linear.weight, t.model.layers[0].linear.bias): p[7] = p[2]
    t.optimizer.param_groups[0]['initial_lr'] = 0.
    t.fit(6)
    partner, like = f.film.frames[-1]['twins']['layers.0.linear']
    assert partner[7] == 2 and partner[2] == 7 and like[2] > .999

def test_heads_of_a_transformer_are_units(digits):
    f = Filming(every=0, share=1.)
    t = trainer_of(digits, 'vit', [f], embed_dim=16, depth=2, num_heads=4).fit(steps=3)
    heads = {k: n for k, n in f.film.frames[-1]['n'].items() if f.film.frames[-1]['axis'][k] == 'head'}
    assert list(heads.values()) == [4, 4]
    w = t.model.blocks[0].attn.proj.weight.detach()
    norms = w.unflatten(1, (4, 4)).norm(dim=(0, 2)).numpy()
    assert np.allclose(f.film.frames[-1]['values']['outgoing']['blocks.0.attn.heads'], norms, atol=1e-5)

def test_a_sparse_network_has_links(digits):
    with seeded(0): net = MinimalNetwork([64, 12, 12, 10], sparsity=.1)
    f = Filming(every=0, share=1.)
    Trainer(net, digits, lr=1e-2, device='cpu', eval_every=0, callbacks=[f]).fit(steps=4)
    assert list(f.film.frames[-1]['n'].values()) == [64, 12, 12, 10]
    links = f.film.frames[-1]['links']
    assert len(links) == net.n_links and set(map(tuple, links[:, [0, 2]])) <= {(0, 1), (1, 2), (2, 3)}
    assert len(next(iter(unpack(f.film.pack())['links'].values()))) == len(links)

def test_edits_are_marked_once(digits):
    f, growth = Filming(every=0, share=1.), Growth(LossBasedGrowth(patience=1, cooldown=1, min_delta=.5))
    with seeded(1): net = grow(make_model('mlp', digits.shape, 10, hidden_sizes=[4, 4]))
    Trainer(net, digits, lr=3e-3, device='cpu', eval_every=0, callbacks=[growth, f]).fit(8)
    assert growth.events and len(f.film.edits) == len(growth.events)
    assert {e['column'] for e in f.film.edits} <= set(f.film.frames[-1]['n'])

def test_a_frame_every_so_many_steps(digits):
    steps = {}
    for k in (1, 3):
        f = Filming(steps=k)
        trainer_of(digits, callbacks=[f]).fit(steps=10)
        steps[k] = [r['step'] for r in f.film.frames]
    assert steps == {1: list(range(11)), 3: [0, 3, 6, 9, 10]}

@pytest.mark.parametrize('options', [dict(every=-1), dict(share=0), dict(share=2), dict(steps=0)])
def test_filming_says_what_it_takes(options):
    with pytest.raises(ValueError, match=f'{next(iter(options))}: got'): Filming(**options)

# ---- sources

def test_sources(tmp_path, digits):
    manager = SnapshotManager(tmp_path/'s', steps=4)
    with seeded(1): net = grow(make_model('mlp', digits.shape, 10, hidden_sizes=[6, 6]))
    growth = Growth(LossBasedGrowth(patience=1, cooldown=1, min_delta=.5))
    t = Trainer(net, digits, lr=3e-3, device='cpu', callbacks=[growth, manager]).fit(6)
    manager.close()
    seen = film_of(tmp_path/'s')
    assert list(seen.frames[-1]['n'].values())[:2] == net.get_layer_sizes() and seen.edits
    assert np.allclose(seen.frames[-1]['values']['incoming']['body.head'], net.heads.weight.detach().norm(dim=1).numpy(), atol=1e-5)
    rows = film_of(t.history)
    assert list(rows.frames[-1]['n'].values()) == net.get_layer_sizes()
    for s in (tmp_path/'s', str(tmp_path/'s'), t.history, list(t.history), seen, seen.pack(), t): assert TopologyView(s).state['columns']

def test_the_folder_of_a_run(tmp_path):
    from plasticity.experiments import run_line
    folder = run_line('model.hidden_sizes=[8,8]', 'training.epochs=2', 'training=standard', 'logging.progress=false',
                      f'hydra.run.dir={tmp_path}/run')
    view = TopologyView(folder)
    assert [c['name'] for c in view.state['columns']] == ['layers.0.linear', 'layers.1.linear', 'head']
    assert unpack(view.state)['n'][:, -1].tolist() == [8, 8, 10] and view.state['health']
    kept = synthetic(frames=5).pack()
    (folder/'topology.json').write_text(json.dumps(kept))
    assert film_of(folder) == kept

def test_a_sparse_snapshot_has_links(tmp_path, digits):
    with seeded(0): net = MinimalNetwork([64, 12, 10], sparsity=.1)
    columns, arrows = tensor_columns(net.state_dict())
    assert [c.n for c in columns] == [64, 12, 10] and (0, 1) in arrows and (1, 2) in arrows

@pytest.mark.parametrize('source, error', [(3, TypeError), (None, TypeError), ([], TypeError), ('nowhere/at/all', ValueError),
                                           ([dict(loss=1.)], ValueError), (torch.nn.Linear(2, 2), TypeError)])
def test_a_wrong_source_is_named(source, error):
    with pytest.raises(error, match='source: '): TopologyView(source)

def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(ValueError, match='source: .*metrics.jsonl'): TopologyView(tmp_path)

@pytest.mark.parametrize('options', [dict(view='tree'), dict(metric='beauty')])
def test_wrong_options_are_named(options):
    with pytest.raises(ValueError, match=f'{next(iter(options))}: got'): TopologyView(synthetic(), **options)

# ---- a live view

def test_frames_are_sent_one_by_one(digits):
    t = trainer_of(digits)
    view, sent = TopologyView(t, every=0, share=1.), []
    view.send = sent.append
    t.fit(steps=3)
    assert not sent # nobody looks
    view._told = True
    t.fit(steps=7)
    assert len(sent) >= 2 and all(m['type'] == 'frame' and len(m['frame']['steps']) == 1 for m in sent)
    assert max(len(json.dumps(m)) for m in sent) < 10_000
    assert view.state['steps'][-1] == 10 and view.time == len(view.state['steps']) - 1 and view.live

def test_ten_thousand_updates_take_no_room(digits):
    t = trainer_of(digits, hidden_sizes=[4])
    view = TopologyView(t)
    view._told, view.send = True, lambda message: None
    mine = view.filming
    mine.film.most = 40
    for _ in range(100): mine.take(t)
    tracemalloc.start()
    sizes = []
    for s in range(10_000):
        t.step = s + 1
        mine.film.add(t.step, mine.columns, mine.film.frames[-1]['values'])
        if s % 100 == 0: view._frame(mine.film.frames[-1])
        if s in (2000, 9999): sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert sizes[1] - sizes[0] < 100_000 and len(mine.film) <= 40

# ---- acting

def live(digits, name='mlp', optimizer='adam', **options):
    t = trainer_of(digits, name, optimizer=optimizer, **options).fit(steps=12)
    return TopologyView(t), t

CASES = [('mlp', dict(hidden_sizes=[12, 9]), 'layers.0.linear', [3]), ('mlp', dict(hidden_sizes=[12, 9]), 'layers.1.linear', [0, 5]),
         ('cnn', dict(channels=(6, 8), hidden_sizes=(10,)), 'layers.1.conv', [2]),
         ('vit', dict(embed_dim=16, depth=1, num_heads=4), 'blocks.0.mlp.fc1', [7]),
         ('vit', dict(embed_dim=16, depth=1, num_heads=4), 'blocks.0.attn.heads', [1])]

@pytest.mark.parametrize('verb', ACTS)
@pytest.mark.parametrize('name, options, column, index', CASES)
def test_what_is_shown_is_what_is_done(digits, verb, name, options, column, index):
    view, t = live(digits, name, **options)
    before = everything(t)
    shown = view.preview(verb, column, index)
    assert same(before, everything(t))
    old, was = view.state_of()
    width = view.filming.film.frames[-1]['n'][column]
    view.act(verb, column, index)
    new, now = view.state_of()
    for r in shown[1:]: assert r['before'] == was[r['what']] and r['after'] == now[r['what']]
    moved = (new[0] - old[0]).abs().max()/old[0].abs().max()
    assert abs(shown[0]['after'] - moved.item()) <= 1e-6 + 1e-3*moved.item()
    assert view.filming.film.frames[-1]['n'][column] == width + dict(prune=-len(index), clone=len(index), reset=0, regrow=1)[verb]
    if verb in ('clone', 'regrow'): assert shown[0]['after'] < 1e-4
    else: assert shown[0]['after'] > 1e-4
    place = [c['name'] for c in view.state['columns']].index(column)
    assert unpack(view.state)['n'][place, -1] == view.filming.film.frames[-1]['n'][column]
    shown = view.preview('undo')
    assert [r['after'] for r in shown[1:]] == [was[r['what']] for r in shown[1:]]
    view.act('undo')
    assert same(before, everything(t)) and not view.done
    assert view.filming.film.frames[-1]['ids'] == view.filming.film.frames[0]['ids']

@pytest.mark.parametrize('optimizer', ['sgd', 'adam', 'rmsprop'])
def test_undo_of_several_acts_is_exact(digits, optimizer):
    view, t = live(digits, optimizer=optimizer)
    before = everything(t)
    for verb, column, index in (('prune', 'layers.0.linear', [1, 4]), ('clone', 'layers.1.linear', [0]), ('reset', 'layers.0.linear', [2]),
                                ('regrow', 'layers.1.linear', [])): view.act(verb, column, index)
    assert len(view.done) == 4
    for _ in range(4): view.act('undo')
    assert same(before, everything(t))
    with pytest.raises(ValueError, match='undo: nothing'): view.act('undo')

def test_regrowing_brings_back_what_was_pruned(digits):
    view, t = live(digits)
    before, row = everything(t), t.model.layers[0].linear.weight[3].detach().clone()
    view.act('prune', 'layers.0.linear', [3])
    t.fit(steps=5) # the others learn on
    view.act('regrow', 'layers.0.linear')
    assert torch.equal(t.model.layers[0].linear.weight[3], row) and t.model.layers[0].linear.weight.shape[0] == 12
    assert view.filming.film.frames[-1]['ids']['layers.0.linear'] == list(range(12))
    view.act('regrow', 'layers.0.linear') # nothing more to bring back: a new one
    assert t.model.layers[0].linear.weight.shape[0] == 13
    view.act('undo'); view.act('undo')
    assert t.model.layers[0].linear.weight.shape[0] == 11
    view.act('regrow', 'layers.0.linear')
    assert torch.equal(t.model.layers[0].linear.weight[3], row)
    t.fit(steps=3)
    assert not same(before, everything(t))

def test_acts_that_cannot_be(digits):
    view, t = live(digits)
    before = everything(t)
    for args, words in ((('grow', 'layers.0.linear', [1]), 'verb: got'), (('prune', 'layer', [1]), 'column: got'),
                        (('prune', 'head', [1]), 'column: '), (('prune', 'layers.0.linear', []), 'index: got no unit'),
                        (('prune', None, [1]), 'column: got None'), (('undo',), 'undo: nothing')):
        for how in (view.preview, view.act):
            with pytest.raises(ValueError, match=re.escape(words)): how(*args)
    for index in ([99], list(range(12))):
        with pytest.raises((ValueError, RuntimeError)): view.act('prune', 'layers.0.linear', index)
    shown = TopologyView(view.filming.film)
    with pytest.raises(ValueError, match='source: this view shows a film'): shown.act('prune', 'layers.0.linear', [1])
    assert same(before, everything(t)) and not view.done

def test_no_act_while_training(digits):
    view, t = live(digits)
    class Acts(Callback):
        def after_step(self, trainer):
            with pytest.raises(ValueError, match='source: the trainer is training'): view.act('prune', 'layers.0.linear', [1])
    t.callbacks.append(Acts())
    t.fit(steps=1)

def test_the_buttons(digits):
    view, t = live(digits)
    sent = []
    view.send = sent.append
    view._hear(view, dict(type='preview', verb='prune', column='layers.0.linear', index=[3]), None)
    assert sent[-1]['ask'] and sent[-1]['index'] == [3] and 'outputs change by' in sent[-1]['text']
    view._hear(view, dict(type='do', verb='prune', column='layers.0.linear', index=[3]), None)
    assert t.model.layers[0].linear.weight.shape[0] == 11 and sent[-1]['text'] == 'prune: done'
    assert view.filming.film.edits[-1]['units'] == [3]
    view._hear(view, dict(type='preview', verb='prune', column='head', index=[3]), None)
    assert sent[-1]['error']
    view.selected = ['layers.1.linear', 2]
    row = view.preview('prune').where(what='parameters')[0]
    assert row['after'] < row['before']

def test_change_of_outputs_that_were_zero():
    zero, one, two = torch.zeros(2, 3), torch.ones(2, 3), torch.full((2, 3), 2.)
    assert _moved([zero], [zero]) == ('relative change', 0) and _moved([two], [one]) == ('relative change', 1)
    assert _moved([two], [zero]) == ('change from zero', 2) and _moved([one, two], [zero, two]) == ('change from zero', 1)
    assert _moved([two, zero], [one, zero]) == ('relative change', 1) and _moved([], []) == ('relative change', 0)

def test_a_preview_where_outputs_were_zero(digits):
    view, t = live(digits)
    with torch.no_grad():
        for p in t.model.parameters(): p.zero_()
    row = view.preview('prune', 'layers.0.linear', [3])[0]
    assert row['what'] == 'outputs, relative change' and row['after'] == 0

def test_training_goes_on_after_acts(digits):
    view, t = live(digits)
    view.act('prune', 'layers.0.linear', [0, 1]); view.act('clone', 'layers.1.linear', [3])
    t.fit(1)
    assert math.isfinite(t.history[-1]['loss']) and view.state['steps'][-1] == t.step

# ---- stills and pages

def test_stills(tmp_path):
    view = TopologyView(synthetic())
    for v in ('topology', 'health', 'river'):
        for kind in ('png', 'svg'):
            a, b = view.save_still(tmp_path/f'a.{kind}', v), view.save_still(tmp_path/f'b.{kind}', v)
            assert a.stat().st_size > 2000 and (kind == 'svg' or a.read_bytes() == b.read_bytes())
    with pytest.raises(ValueError, match='path: got'): view.save_still(tmp_path/'a.gif')
    with pytest.raises(ValueError, match='view: got'): view.still('tree')
    with pytest.raises(ValueError, match='metric: got'): plot_topology(view.state, 'beauty')
    with pytest.raises(ValueError, match='times: got'): plot_topology(view.state, times=99)
    with pytest.raises(TypeError, match='film: got'): plot_widths([1])
    film = Film()
    film.add(0, [Column('a', 3)], {})
    with pytest.raises(ValueError, match='film: it holds no metrics'): plot_health_film(film)
    assert png(plot_topology(film)) and png(plot_widths(film)) # one frame, nothing measured

def test_short_names():
    assert short_names(['a.0.w', 'a.1.w']) == ['a.0', 'a.1'] and short_names(['x']) == ['x']
    assert short_names(['body.layers.0.linear', 'body.layers.1.linear', 'body.head']) == ['layers.0', 'layers.1', 'head']
    assert len(set(short_names([f'blocks.{i}.mlp.fc1' for i in range(30)]))) == 30

def test_a_page_has_everything_inside(tmp_path):
    film = synthetic()
    film.title = '</script><b>"x"</b>'
    film.edits = [dict(step=3, text='</script><img src=x onerror=alert(1)>', column=None)]
    page = TopologyView(film).page(tmp_path/'page.html')
    assert (tmp_path/'page.html').read_text() == page
    assert page.count('</script>') == 1 and page.count('<img') == 1 and '<b>' not in page
    assert not re.search(r'(src|href)="(?!data:)', page) and 'import(' not in page and 'fetch(' not in page

def test_two_fragments_have_names_of_their_own():
    view = TopologyView(synthetic())
    a, b = (re.search(r'id="(plv-[^"]+)"', view.fragment())[1] for _ in range(2))
    assert a != b

def test_the_script_is_small_and_sound():
    text = script()
    assert len(text) + len((STATIC/'topology.css').read_text()) < 52_000
    assert not re.search(r'\b(import|require|fetch|XMLHttpRequest|eval|innerHTML|document\.write)\b', text)
    if NODE: subprocess.run([NODE, '--check', '--input-type=module'], input=text, text=True, check=True)

def test_saved_state_is_small(digits):
    view, _ = live(digits)
    state = {k: v for k, v in view.get_state().items() if isinstance(v, (str, int, bool, list, dict))}
    assert len(json.dumps(state, default=str)) < 100_000

def test_growth_of_links_is_on_the_time_line(digits):
    from plasticity.credits import GrowthScheduler
    from plasticity.extrema import Growth as Wiring
    from plasticity.sparse_network import MinimalNetwork
    f, wiring = Filming(steps=20), Wiring('random', GrowthScheduler(stabilization_epochs=1, growth_threshold=1, limits=False), patience=0)
    Trainer(MinimalNetwork([64, 12, 10], .05), digits, lr=.05, device='cpu', callbacks=[wiring, f]).fit(8)
    assert wiring.events
    assert [e['text'] for e in f.film.edits] == [f"{e['connections_added']:+} links" for e in wiring.events]
    assert len(f.film.pack()['edits']) == len(wiring.events)
