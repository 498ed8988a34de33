"Edge cases of plasticity.plots: empty, NaN, one point, many layers, nothing left behind"
import base64, io, math, pickle, subprocess, sys, warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from plasticity import plots
from plasticity.plots import HEALTH, img, picture, plot_health, plot_hist, plot_history, plot_layers, png, style, unhealth
from plasticity.results import Table

mpl = pytest.importorskip('matplotlib')
pytestmark = pytest.mark.filterwarnings('error')
number = st.one_of(st.floats(allow_nan=True, allow_infinity=True, width=32), st.none(), st.integers(-1000, 1000))

def history(n=5):
    return [dict(step=10 * e, epoch=e, split=s, loss=1 / (1 + e), accuracy=e / n) for e in range(n) for s in ('train', 'test')]

def layer_rows(n=3, steps=(0, 10)):
    return [dict(layer=f'layers.{i}.act', metric=m, step=s, value=v, units=10, definition='default') for i in range(n) for s in steps
            for m, v in dict(dead_fraction=i / n, effective_rank=5. + i + s).items()]
def drawn(fig):
    "The picture as an array (height, width, 3), which fails if drawing does"
    from matplotlib.image import imread
    return imread(io.BytesIO(png(fig, 60)))[..., :3]
def texts(fig): return [t.get_text() for a in fig.axes for t in a.texts]
def data_lines(a): return [ln for ln in a.lines if ln.get_linestyle() == '-' and len(ln.get_xdata())]

CALLS = [lambda **k: plot_history(history(), metrics='loss', **k), lambda **k: plot_layers(layer_rows(), 'dead_fraction', **k),
         lambda **k: plot_health(layer_rows(), **k), lambda **k: plot_hist({'a': [1., 2., 3.], 'b': torch.randn(4, 5)}, **k)]

# ---- nothing left behind

@pytest.mark.parametrize('call', CALLS)
def test_no_global_state(call):
    before = dict(mpl.rcParams)
    loaded = 'matplotlib.pyplot' in sys.modules
    fig = call()
    drawn(fig)
    assert dict(mpl.rcParams) == before and ('matplotlib.pyplot' in sys.modules) == loaded
    if loaded: assert not sys.modules['matplotlib.pyplot'].get_fignums()
    assert fig._repr_png_().startswith(b'\x89PNG') and isinstance(fig, mpl.figure.Figure)
    assert len(pickle.loads(pickle.dumps(fig)).axes) == len(fig.axes)

@pytest.mark.parametrize('call', CALLS)
def test_draws_into_given_axes(call):
    fig = mpl.figure.Figure()
    ax = fig.subplots(1, 2)[1]
    assert call(ax=ax) is fig and (ax.lines or ax.patches)
    with pytest.raises(ValueError, match='takes 1 axes'): call(ax=list(fig.axes[:2]))
    with pytest.raises(ValueError, match='ax'): call(ax='here')

def test_two_panels_in_given_axes():
    fig = mpl.figure.Figure()
    axes = fig.subplots(2, 1)
    assert plot_history(history(), ax=axes) is fig and [a.get_ylabel() for a in axes] == ['loss', 'accuracy']

def test_importing_it_imports_no_matplotlib():
    code = "import sys, plasticity.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code], timeout=60).returncode == 0

def test_says_how_to_get_matplotlib(monkeypatch):
    def gone(name): raise ImportError(name)
    monkeypatch.setattr(plots.importlib, 'import_module', gone)
    with pytest.raises(ImportError, match='pip install matplotlib'): plot_history(history())

def test_style_ends_also_after_an_error():
    size = mpl.rcParams['font.size']
    with pytest.raises(RuntimeError), style(font_size=31): raise RuntimeError
    assert mpl.rcParams['font.size'] == size
    with style(**{'lines.linewidth': 7}): assert mpl.rcParams['lines.linewidth'] == 7
    with pytest.raises(KeyError), style(no_such_thing=1): pass

# ---- rows

@pytest.mark.parametrize('call', [plot_history, lambda r: plot_layers(r, 'dead_fraction'), plot_health, plot_hist])
@pytest.mark.parametrize('rows,says', [([], 'nothing to draw'), (None, 'NoneType'), ('abc', 'str'), (3, 'int'), ([1, 2], 'int'),
                                       ([None], 'list with NoneType'), ([{}], 'no row has'), ([dict(a=1)], 'no row has')])
def test_what_cannot_be_drawn_says_why(call, rows, says):
    with pytest.raises(ValueError, match=says): call(rows)

def test_errors_name_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'accuracy'"): plot_history(history(), metrics=['acuracy'])
    with pytest.raises(ValueError, match="did you mean 'epoch'"): plot_history(history(), x='epochs')
    with pytest.raises(ValueError, match="did you mean 'effective_rank'"): plot_layers(layer_rows(), 'effectiv_rank')
    with pytest.raises(ValueError, match='layers.1.act'): plot_health(layer_rows(), layers=['layers.1'])
    with pytest.raises(ValueError, match="did you mean 'dead_fraction'"): plot_health(layer_rows(), metrics=['dead_fracton'])
    with pytest.raises(ValueError, match='step: got 7, there are: 0, 10'): plot_health(layer_rows(), step=7)
    with pytest.raises(ValueError, match="loss: got 'high'"): plot_history([dict(epoch=0, loss='high')])
    with pytest.raises(ValueError, match='format'): picture(plot_history(history()), format='jpg')
    with pytest.raises(ValueError, match='no value'): plot_layers([dict(layer='a', metric='m', value=None, step=0)], 'm')

@pytest.mark.parametrize('wrap', [list, Table, tuple, iter, lambda r: type('T', (), dict(history=r))()])
def test_rows_of_any_kind(wrap):
    fig = plot_history(wrap(history()))
    assert len(fig.axes) == 2 and list(data_lines(fig.axes[0])[0].get_ydata()) == [1 / (1 + e) for e in range(5)]

def test_dataframe():
    pandas = pytest.importorskip('pandas')
    drawn(plot_history(pandas.DataFrame(history())))

# ---- learning curves

def test_history_defaults():
    assert [a.get_ylabel() for a in plot_history([dict(step=1, loss=2.)]).axes] == ['loss']
    fig = plot_history(history())
    assert [t.get_text() for t in fig.axes[0].get_legend().get_texts()] == ['train', 'test'] and fig.axes[1].get_legend() is None
    assert [ln.get_color() for ln in data_lines(fig.axes[0])] == ['#0072B2', '#D55E00']
    flipped = plot_history(list(reversed(history())))
    assert [t.get_text() for t in flipped.axes[0].get_legend().get_texts()] == ['train', 'test']
    assert plot_history([dict(step=1, loss=2.)], metrics='loss').axes[0].get_xlabel() == 'step'
    with pytest.raises(ValueError, match="no row has 'loss'"): plot_history([dict(step=1, mse=2.)])

def test_one_point_is_seen():
    for fig in (plot_history(history()[:1], metrics='loss'), plot_layers(layer_rows(1, (3,)), 'dead_fraction')):
        assert any(ln.get_marker() == 'o' and len(ln.get_xdata()) == 1 for ln in fig.axes[0].lines)
        drawn(fig)

def test_what_is_no_number_is_marked():
    rows = [dict(step=s, loss=v) for s, v in enumerate([1., math.nan, .5, math.inf, None, .2])]
    a = plot_history(rows).axes[0]
    crosses = [ln for ln in a.lines if ln.get_marker() == 'x']
    assert len(crosses) == 1 and list(crosses[0].get_xdata()) == [1, 3]
    line = a.lines[0].get_ydata()
    assert np.isnan(line[1]) and np.isnan(line[3]) and len(line) == 5
    drawn(plot_history([dict(step=s, loss=math.nan) for s in range(3)]))
    drawn(plot_history([dict(step=s, loss=math.nan) for s in range(3)], log='loss'))

def test_mean_and_spread_over_runs():
    rows = [dict(step=s, loss=float(seed), seed=seed) for s in range(4) for seed in (1, 2, 6)]
    a = plot_history(rows).axes[0]
    band = a.collections[0].get_paths()[0].vertices[:, 1]
    assert set(a.lines[0].get_ydata()) == {3.} and band.max() - 3 == pytest.approx(np.std([1, 2, 6], ddof=1))
    assert len(data_lines(plot_history(rows, by='seed').axes[0])) == 3

def test_marks_and_tasks():
    rows = [dict(r, task=r['epoch'] // 2) for r in history(8)]
    a = plot_history(rows, marks={1: 'widen', 3: 'prune'}).axes[0]
    assert texts(a.figure)[:2] == ['widen', 'prune'] and len(a.patches) == 2
    assert not plot_history(rows, tasks=False).axes[0].patches
    assert texts(plot_history([*history(), dict(epoch=2, edit='clone x2')], metrics='loss')) == ['clone x2']
    assert texts(plot_history(history(), metrics='loss', marks=[dict(epoch=1, edit='reset'), ])) == ['reset']
    many = plot_history(history(), metrics='loss', marks=[(i / 10, 'x') for i in range(40)])
    assert not texts(many) and sum(ln.get_linestyle() == ':' for ln in many.axes[0].lines) == 40

@given(rows=st.lists(st.fixed_dictionaries(dict(step=st.integers(0, 10**6), split=st.sampled_from(['train', 'test', None]), loss=number),
                                           optional=dict(accuracy=number, task=st.integers(0, 3))), min_size=1, max_size=12))
@settings(max_examples=12, deadline=None)
def test_any_history_can_be_drawn(rows):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # numbers near the largest float overflow in matplotlib's own axis
        assert drawn(plot_history(rows)).std() > 0

# ---- layers

@pytest.mark.parametrize('n', [1, 10, 11, 60])
def test_any_number_of_layers(n):
    fig = plot_layers(layer_rows(n), 'effective_rank')
    drawn(fig)
    assert len(data_lines(fig.axes[0])) == n and (len(fig.axes) == 2) == (n > 10) == (fig.axes[0].get_legend() is None)
    if n > 10: assert [t.get_text() for t in fig.axes[1].get_yticklabels()][::5] == ['layers.0.act', f'layers.{n-1}.act']
    assert drawn(plot_health(layer_rows(n))).shape[0] > 10 * n
    assert drawn(plot_hist({f'layers.{i}': torch.randn(30) for i in range(n)})).shape[0] > 10 * n

def test_layers_in_the_order_asked_for():
    fig = plot_layers(layer_rows(), 'dead_fraction', layers=['layers.2.act', 'layers.0.act'])
    assert [ln.get_label() for ln in data_lines(fig.axes[0])] == ['layers.2.act', 'layers.0.act']
    fig = plot_health(layer_rows(), metrics=['effective_rank'], layers=['layers.2.act', 'layers.0.act'])
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == ['layers.2.act', 'layers.0.act'] and texts(fig) == ['17.0', '15.0']
    with pytest.raises(ValueError, match='layers'): plot_layers(layer_rows(), 'dead_fraction', layers=['x'])

def test_stairs_hold_a_value():
    fig = plot_layers([dict(layer='a', metric='width', value=w, step=s) for s, w in ((0, 4), (5, 8))], 'width', stairs=True)
    assert fig.axes[0].lines[0].get_drawstyle() == 'steps-post'

# ---- health

def test_direction_of_health():
    for m, d in HEALTH.items():
        bad = unhealth(m, [.1, .9])
        assert (bad[0] < bad[1]) == (d == 'low') and ((bad >= 0) & (bad <= 1)).all()
    assert np.isnan(unhealth('weight_norms', [1., 2.])).all()
    assert unhealth('effective_rank', [5., 50.], [10, 100]).tolist() == [.25, .25]
    assert unhealth('stable_rank', [2., 1.], [100, 100]).tolist() == [0, .25] == unhealth('effective_rank', [2., 1.]).tolist()
    assert np.isnan(unhealth('effective_rank', [math.nan, 4.])[0]) and unhealth('effective_rank', [math.nan, 4.])[1] == 0
    assert np.isnan(unhealth('effective_rank', [0., 0.])).all() or (unhealth('effective_rank', [0., 0.]) == 1).all()

def colour(fig, i): return fig.axes[0].patches[i].get_facecolor()[:3]

def test_colours_follow_health():
    fig = plot_health([dict(layer=k, metric='dead_fraction', value=v) for k, v in dict(a=0., b=1.).items()])
    good, bad = colour(fig, 0), colour(fig, 1)
    assert good[2] > good[0] and bad[0] > bad[2] + .3  # blue, orange
    fig = plot_health([dict(layer=k, metric='effective_rank', value=v) for k, v in dict(a=1., b=50.).items()])
    assert colour(fig, 0)[0] > colour(fig, 0)[2] + .3 and colour(fig, 1) == pytest.approx(good)
    r, g, b = colour(plot_health([dict(layer='a', metric='weight_norms', value=3.)]), 0)
    assert r == g == b
    grey = [.3 * c[0] + .59 * c[1] + .11 * c[2] for c in (good, bad)]
    assert grey[0] - grey[1] > .3  # told apart without any colour

def test_cells():
    cells = [('a', 'm', 1.), ('b', 'm', math.nan), ('c', 'n', -math.inf), ('c', 'm', None)]
    rows = [dict(layer=k, metric=m, value=v) for k, m, v in cells]
    fig = plot_health(rows)
    drawn(fig)
    assert sorted(texts(fig)) == ['-inf', '1.00', 'nan', 'nan']  # b and c have no n, a no n: no text at all
    shown = {v: plots.cell_text(v) for v in (0., .5, 17.31, 123.4, 1e-5, 1e9, -.25)}
    assert shown == {0.: '0', .5: '0.50', 17.31: '17.3', 123.4: '123', 1e-5: '1e-05', 1e9: '1e+09', -.25: '-0.25'}

def test_last_step_and_definitions():
    assert '17.0' in texts(plot_health(layer_rows())) and '7.00' in texts(plot_health(layer_rows(), step=0))
    assert '17.0' in texts(plot_health(list(reversed(layer_rows()))))
    two = [dict(layer='a', metric='dead_fraction', value=v, definition=d) for d, v in dict(default=.1, joudaki=.4).items()]
    fig = plot_health([*two, dict(layer='a', metric='effective_rank', value=3., definition='default')])
    names = [t.get_text().replace('\n', ' ') for t in fig.axes[0].get_xticklabels()]
    assert names == ['dead fraction (default)', 'dead fraction (joudaki)', 'effective rank']
    assert texts(fig) == ['0.10', '0.40', '3.00']

a_cell = st.fixed_dictionaries(dict(layer=st.sampled_from('abc'), metric=st.sampled_from([*HEALTH, 'x']), value=number),
                               optional=dict(units=st.integers(1, 99), step=st.integers(0, 3), definition=st.sampled_from('de')))

@given(st.lists(a_cell, min_size=1, max_size=12))
@settings(max_examples=12, deadline=None)
def test_any_health_can_be_drawn(rows): assert drawn(plot_health(rows)).std() > 0

# ---- histograms

a_value = st.one_of(st.floats(-1e6, 1e6), st.sampled_from([math.nan, math.inf, 0.]))

@given(st.dictionaries(st.sampled_from('abcd'), st.lists(a_value, max_size=20), min_size=1))
@settings(max_examples=12, deadline=None)
def test_any_values_can_be_drawn(values): assert drawn(plot_hist(values)).std() > 0

def test_hist_of_anything_shaped_like_numbers():
    values = dict(conv=torch.randn(2, 3, 4, requires_grad=True), half=torch.ones(3, dtype=torch.bfloat16), ints=np.arange(4), one=3.)
    fig = plot_hist(values)
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == ['conv', 'half', 'ints', 'one']
    rows = plot_hist([dict(layer=k, value=v) for k in 'ab' for v in range(5)])
    assert texts(rows) == ['20 % zero'] * 2

def test_what_a_histogram_hides_is_written():
    assert texts(plot_hist({'a': [0.] * 6 + [1.] * 3 + [math.nan]})) == ['60 % zero, 10 % not finite']
    v = torch.cat([torch.linspace(0, 1, 9999) + .1, torch.tensor([1e6])])
    fig = plot_hist({'a': v}, clip=.001)
    assert fig.axes[0].get_xlim()[1] < 2 and 'off axis' in texts(fig)[0] and texts(plot_hist({'a': v}, clip=0)) == ['']

def test_histogram_heights():
    a = plot_hist({'a': [0.] * 90 + [1.] * 4 + [2.] * 2}, bins=10, clip=0).axes[0]
    heights = sorted(set((1 - a.patches[0].get_data().values).round(6)))
    assert heights == [0, .44, .88]  # the zeros are written, not drawn

# ---- into a report

def test_pictures_are_self_contained_and_repeatable():
    fig = plot_history(history())
    for format, start in (('png', b'\x89PNG'), ('svg', b'<?xml')):
        uri = picture(fig, format)
        head, data = uri.split(',', 1)
        assert base64.b64decode(data).startswith(start) and head.startswith('data:image/')
    assert picture(plot_history(history())) == picture(fig)
    assert 'http' not in img(fig, 'a') and 'alt="loss &lt; &quot;1&quot;"' in img(fig, 'loss < "1"')
    assert len(picture(fig, dpi=50)) < len(picture(fig, dpi=150))
