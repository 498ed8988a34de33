import importlib, json, random, sys, textwrap, time

import numpy as np
import pytest
import torch

from plasticity.results import (Result, Table, _execute, dependencies, did_you_mean, differences, essence, generator, method, pick_device,
                                project_root, random_state, recheck, results_state, saved_run, seeded, set_random_state, stream_seed,
                                write_atomic)

@pytest.fixture
def module(tmp_path, monkeypatch):
    "Write a module of this name (it counts as ours) and import it"
    monkeypatch.syspath_prepend(tmp_path)
    import plasticity
    def make(source, name='scratch_module'):
        monkeypatch.setattr(plasticity, '__path__', [*plasticity.__path__, str(tmp_path)])
        (tmp_path/f'{name}.py').write_text(textwrap.dedent(source))
        sys.modules.pop(f'plasticity.{name}', None)
        importlib.invalidate_caches()
        import linecache
        linecache.clearcache()
        return importlib.import_module(f'plasticity.{name}')
    yield make
    sys.modules.pop('plasticity.scratch_module', None)

BASE = '''
    SCALE = 3
    class Helper:
        "Helps"
        def go(self, x): return inner(x)*SCALE
    def inner(x):
        "Doc"
        return x + 1   # one more
    def run(n=2, seed=0, device=None): return dict(v=Helper().go(n), seed=seed)
    def unrelated(): return 1
'''

def test_prose_and_layout_do_not_count(module):
    a = dependencies(module(BASE).run)
    prose = BASE.replace('"Doc"', '"Other words, ä €"').replace('# one more', '# really').replace('return x + 1', 'return x  +  1')
    b = dependencies(module(prose).run)
    assert a == b
    assert {k.rsplit('.', 1)[1] for k in a} == {'run', 'Helper', 'inner', 'SCALE'}

CHANGES = [('x + 1', 'x + 2', 'inner'), ('SCALE = 3', 'SCALE = 4', 'SCALE'), ('(x)*SCALE', '(x)*SCALE*1', 'Helper')]

@pytest.mark.parametrize('old, new, name', CHANGES)
def test_what_runs_counts(module, old, new, name):
    a, b = dependencies(module(BASE).run), dependencies(module(BASE.replace(old, new)).run)
    assert [k.rsplit('.', 1)[1] for k in a if a[k] != b[k]] == [name]

def test_an_added_method_counts(module):
    src = BASE + '''
    from plasticity.results import method
    @method(Helper)
    def more(self): return 1
    def run2(): return dict(v=Helper().more())
    '''
    a, b = dependencies(module(src).run2), dependencies(module(src.replace('return 1\n    def run2', 'return 2\n    def run2')).run2)
    assert [k for k in a if a[k] != b[k]] == ['plasticity.scratch_module.Helper.more']

def test_saved_run_round_trip_and_stale(module, results):
    m = module(BASE)
    r = saved_run(m.run, run=True, n=5, device='cpu')
    assert r == dict(v=18, seed=0) and not r.stale and r.meta['settings'] == dict(n=5)
    assert saved_run([m.run], n=5) == r and 'stale' not in repr(r)
    m2 = module(BASE.replace('x + 1', 'x + 2'))
    old = saved_run([m2.run], n=5)
    assert old == r and old.stale == ('plasticity.scratch_module.inner',) and '**stale**' in old._repr_markdown_()

def test_saved_run_refuses(module, results):
    m = module(BASE)
    with pytest.raises(FileNotFoundError, match='run=True'): saved_run(m.run)
    saved_run(m.run, run=True, n=5)
    with pytest.raises(ValueError, match='asked for'): saved_run(m.run, n=6)
    with pytest.raises(ValueError, match='seed 0'): saved_run(m.run, n=5, seed=1)
    with pytest.raises(TypeError, match='returns a dict'): saved_run(m.unrelated, run=True)
    with pytest.raises(TypeError, match='fns'): saved_run(['run'], run=True, name='x')
    def bad(): return dict(a=[object()])
    with pytest.raises(TypeError, match=r"result\['a'\]\[0\]"): saved_run(bad, run=True)
    assert not (results/'bad.json').exists() and not list(results.glob('.*.tmp'))

def test_saved_run_by_environment(module, results, monkeypatch):
    monkeypatch.setenv('PLASTICITY_RUN', 'other,run')
    assert saved_run(module(BASE).run, n=1)['v'] == 6

def notebook(path, *cells):
    code = [dict(cell_type='code', id=f'c{i}', source=c.splitlines(keepends=True)) for i, c in enumerate(cells)]
    path.write_text(json.dumps(dict(cells=code)))
    return path

def test_results_state(module, results, tmp_path):
    m = module(BASE)
    saved_run(m.run, run=True)
    saved_run(m.run, run=True, name='lonely')
    notebook(tmp_path/'a.ipynb', '%matplotlib inline\nimport x', 'r = saved_run([run])\nsaved_run(run, name="gone")',
             'from contextlib import suppress\nwith suppress(FileNotFoundError): late = saved_run(run, name="later")')
    state = {r['name']: r['state'] for r in results_state(tmp_path)}
    assert state == dict(run='current', gone='missing', later='not run', lonely='unused')
    module(BASE.replace('x + 1', 'x + 2'))
    assert results_state(tmp_path).where(name='run')[0]['state'] == 'stale'

# %% rechecked
MENDED = BASE.replace('return x + 1', 'return whole(x) + 1') + '    def whole(x): return x if x < 100 else 100\n'
AGAIN = MENDED.replace('x < 100', 'x <= 100')

def small(m, n=3): return _execute([m.run], 'run', 0, 'cpu', dict(n=n))

def test_rechecked_and_stale_again(module, results, tmp_path):
    notebook(tmp_path/'a.ipynb', 'saved_run([run], n=5)')
    def state(): return next((r['state'], r['why']) for r in results_state(tmp_path))
    m = module(BASE)
    first, old = saved_run(m.run, run=True, n=5, device='cpu'), small(m)
    assert first.state == 'current' == state()[0]
    new = module(MENDED)
    assert saved_run(new.run, n=5).state == 'stale' == state()[0]
    note = recheck('run', old, small(new), 'after', 'before', dict(n=3))
    changed = {'plasticity.scratch_module.inner', 'plasticity.scratch_module.whole'}
    assert note['dependencies'].keys() == changed and note['settings'] == dict(n=3) and note['date'] == time.strftime('%Y-%m-%d')
    r = saved_run(new.run, n=5)
    assert r == first and r.state == 'rechecked' and r.stale == () and r.meta['dependencies'] == first.meta['dependencies']
    assert 'a small run gives the same at commit after as at before' in r.provenance and '**stale**' not in r._repr_markdown_()
    assert state()[0] == 'rechecked' and note['date'] in state()[1]
    r = saved_run(module(AGAIN).run, n=5)
    assert r.state == 'stale' == state()[0] and r.stale == ('plasticity.scratch_module.whole',) and 'rechecked' not in r.provenance
    assert saved_run(module(BASE).run, n=5).state == 'current' == state()[0]

def test_a_function_that_is_gone_may_be_rechecked(module, results):
    m = module(MENDED)
    saved_run(m.run, run=True)
    old, new = small(m), module(BASE)
    assert recheck('run', old, small(new), 'b', 'a', {})['dependencies']['plasticity.scratch_module.whole'] is None
    assert saved_run(new.run).state == 'rechecked' and saved_run(module(MENDED).run).state == 'current'

def test_a_repeated_run_is_current(module, results):
    m = module(BASE)
    saved_run(m.run, run=True)
    old, new = small(m), module(MENDED)
    recheck('run', old, small(new), 'b', 'a', {})
    assert saved_run(new.run, run=True).state == 'current' and 'rechecked' not in saved_run(new.run).meta

def test_a_note_goes_when_other_settings_see_a_difference(module, results):
    m = module(BASE)
    saved_run(m.run, run=True)
    old, far, new = small(m), small(m, 200), module(MENDED)
    recheck('run', old, small(new), 'b', 'a', {})
    with pytest.raises(ValueError, match='differ'): recheck('run', far, small(new, 200), 'b', 'a', {}, dry=True)
    assert saved_run(new.run).state == 'rechecked'
    with pytest.raises(ValueError, match='differ'): recheck('run', far, small(new, 200), 'b', 'a', {})
    assert saved_run(new.run).state == 'stale' and 'rechecked' not in saved_run(new.run).meta

def test_recheck_refuses_other_numbers_and_other_sources(module, results):
    m = module(BASE)
    saved_run(m.run, run=True)
    before, old = (results/'run.json').read_text(), small(m)
    off = module(BASE.replace('x + 1', 'x + 2'))
    with pytest.raises(ValueError, match=r"run: 1 numbers differ: result\['v'\]: 12 -> 15"): recheck('run', old, small(off), 'b', 'a', {})
    with pytest.raises(ValueError, match='not made with the source at a, where plasticity.scratch_module.inner'):
        recheck('run', small(off), small(off), 'b', 'a', {})
    mended = module(MENDED)
    recheck('run', old, small(mended), 'b', 'a', {}, dry=True)
    assert (results/'run.json').read_text() == before and saved_run(mended.run).state == 'stale'

def test_differences_to_the_last_bit_but_no_times():
    a = dict(loss=[.1, float('nan')], text='x', seconds=1.5, rows=[dict(us_a_step=3., together_ms=2., company=dict(load=1), n=1)])
    b = dict(a, seconds=2.5, rows=[dict(us_a_step=4., together_ms=5., company={}, n=1)])
    assert differences(a, b) == [] and len(differences(a, dict(b, loss=[.1 + 2e-17, float('nan')]))) == 1
    assert differences(a, dict(b, rows=[dict(b['rows'][0], n=2)])) == ["result['rows'][0]['n']: 1 -> 2"]
    assert differences(dict(a=1), {}) == ["result['a']: 1 -> \"not there\""] and differences([1], [1, 2]) == ['result: [1] -> [1, 2]']
    assert differences(1, 1.) and differences(0., -0.) and differences(dict(text='a'), dict(text='b')) and not differences('a', 'a')

def test_small_runs_of_a_notebook(tmp_path, monkeypatch):
    "In a process of its own: definitions run, examples do not, and what differs in its seed alone runs once"
    root = project_root(__file__)
    monkeypatch.syspath_prepend(root/'tools')
    import recheck as tool
    path = notebook(tmp_path/'a.ipynb', 'from plasticity.results import saved_run\nN = max(2, 3)',
                    'def half(n): return n/2\ndef run(n, seed=0, device=None): return dict(v=half(n), seed=seed, device=str(device))',
                    'FEW = dict(n=2)\nSMALL = dict(one=FEW, two=FEW, bad=dict(x=1))', 'raise ValueError("an example")',
                    'fns = [run]\na = saved_run(fns, name="one", n=N)\nif a: b = saved_run(fns, name="two", n=N, seed=7)\n'
                    'c = saved_run(fns, name="bad", n=N), saved_run(fns, name="other", n=N)')
    settings = tool.small_settings(path)
    assert settings == dict(one=dict(n=2), two=dict(n=2), bad=dict(x=1)) and tool.short('0'*40) is None
    done = tool.played(root, str(path), {k: (v, ['__main__.half', '__main__.gone']) for k, v in settings.items()}, str(tmp_path))
    assert done.keys() == {'one', 'two'} and done['one']['result'] == done['two']['result'] == dict(v=1., seed=0, device='cpu')
    assert done['one']['meta']['dependencies'].keys() == {'__main__.run', '__main__.half'} and not (tmp_path/'one.json').exists()

def test_essence_handles_strings_and_unicode():
    assert essence('def f():\n    "d"\n    return "# no comment"  # é\n') == 'deff():return"#nocomment"'
    assert essence('x = 1') == 'x=1'

def test_streams_differ_and_repeat():
    seeds = {stream_seed(s, w, i) for s in range(20) for w in 'ab' for i in range(20)}
    assert len(seeds) == 800 and all(0 <= s < 2**63 for s in seeds)
    assert torch.equal(torch.rand(3, generator=generator(1, 'x')), torch.rand(3, generator=generator(1, 'x')))
    with pytest.raises(TypeError, match='seed'): generator('a')
    with pytest.raises(TypeError, match='seed'): generator(True)

def test_seeded_restores_everything_also_after_an_error():
    before = random_state()
    with pytest.raises(KeyError), seeded(3): torch.rand(2); random.random(); np.random.rand(); raise KeyError  # noqa: NPY002
    assert random_state() == before

def test_random_state_through_json():
    state = json.loads(json.dumps(random_state()))
    a = torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
    set_random_state(state)
    b = torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
    assert torch.equal(a[0], b[0]) and a[1:] == b[1:]

def test_pick_device():
    assert pick_device('cpu').type == 'cpu' and pick_device(torch.device('cpu')).type == 'cpu'
    for bad in ('gpu', 'cudaa', None, 3.5):
        with pytest.raises(ValueError, match='device: got'): pick_device(bad)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match='this machine has only'): pick_device('cuda')

def test_table():
    t = Table([dict(a=1, b='x|y'), dict(a=torch.tensor(2.5), c=None)])
    assert t.columns == ['a', 'b', 'c'] and 'x\\|y' in t._repr_markdown_() and '2.5' in repr(t)
    assert repr(Table()) == 'an empty table' and Table().column('a') == []
    assert 'more' not in repr(t) and repr(Table([dict(i=i) for i in range(100)], limit=3)).count('\n') == 4
    with pytest.raises(KeyError, match="no column 'd'"): t.column('d')
    with pytest.raises(KeyError): t.where(zz=1)
    assert t.where(a=1) == [dict(a=1, b='x|y')]

def test_method_and_suggestions():
    class A: pass
    @method(A)
    def go(self): return 3
    assert A().go() == 3 and go.__qualname__.endswith('A.go')
    assert "did you mean 'relu'" in did_you_mean('rellu', ['relu', 'tanh']) and 'there are: a, b' in did_you_mean('zzz', 'ab')
    assert did_you_mean('zzz', []) == '' and "'redo'" in did_you_mean('ReDo', ['none', 'redo']) and "'b'" in did_you_mean('b.', ['ab', 'b'])
    words = ['optimizer', 'optimizer.lr', 'optimizer.reinit_optimizer', 'optimizer.amsgrad', 'training.epochs']
    for said, meant in dict(lr='optimizer.lr', Epochs='training.epochs', optimzer='optimizer').items():
        assert did_you_mean(said, words) == f'; did you mean {meant!r}?'
    assert did_you_mean('optimizer.learning_rate', words[1:4]) == '; there are: ' + ', '.join(words[1:4])
    assert did_you_mean('optimizer.amsgard', words[1:4]) == "; did you mean 'optimizer.amsgrad'?"

def test_write_atomic_keeps_the_old_file_on_failure(tmp_path):
    write_atomic(tmp_path/'f', 'one')
    with pytest.raises(TypeError): write_atomic(tmp_path/'f', 3)
    assert (tmp_path/'f').read_text() == 'one' and len(list(tmp_path.iterdir())) == 1

def test_result_is_a_dict():
    r = Result(dict(a=1), dict(name='n', seed=0, device='cpu', torch='2', seconds=1., commit='c', date='d'))
    assert r['a'] == 1 and 'n: seed 0' in repr(r)

def test_the_list_is_whole(monkeypatch, capsys):
    "However many results there are"
    from plasticity import results
    rows = results.Table(dict(name=f'result{i}', state='current') for i in range(100))
    monkeypatch.setattr(results, 'results_state', lambda: rows)
    with pytest.raises(SystemExit): results.main()
    assert 'result99' in capsys.readouterr().out
