"Sweeps: nothing twice, nothing lost. The Ray test plays two machines on one; PLASTICITY_SWEEP_RUNS=200 is its full size."
import json, os, signal, subprocess, sys, time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plasticity.sweeps import (Sweep, SweepError, alike, config_key, line_configs, read_sweep, run_experiment, sweep, sweep_line, train,
                               train_together, variations)

pytestmark = pytest.mark.timeout(280)
ROOT = Path(__file__).resolve().parents[1]
BASE = dict(model=dict(name='mlp', hidden_sizes=[4]), dataset=dict(name='synthetic_classification', n=60),
            training=dict(epochs=1, batch_size=16, device='cpu'))
RUNS = int(os.environ.get('PLASTICITY_SWEEP_RUNS', 16))

def square(config): return dict(y=config['x']**2)

json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
                           lambda s: st.lists(s, max_size=3) | st.dictionaries(st.text(max_size=3), s, max_size=3), max_leaves=8)

@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(max_size=3), json_values, max_size=4))
def test_key_is_of_the_content(c):
    again = json.loads(json.dumps(dict(reversed(list(c.items())))))
    assert config_key(again) == config_key(c)
    assert config_key(c | {'another': 1}) != config_key(c) or c.get('another') == 1

def test_once_each_and_resumed(tmp_path):
    seen, configs = [], [dict(x=i) for i in (1, 2, 3, 2, 1)]
    def note(config): seen.append(config['x']); return square(config)
    rows = sweep(configs, note, tmp_path)
    assert seen == [1, 2, 3] and rows.column('y') == [1, 4, 9, 4, 1]
    (tmp_path/f'{config_key(configs[1])}.json').unlink()
    sweep(configs, note, tmp_path)
    assert seen == [1, 2, 3, 2] and len(list(tmp_path.iterdir())) == 3
    assert [r['y'] for r in sorted(read_sweep(tmp_path), key=lambda r: r['x.'] if 'x.' in r else r['y'])] == [1, 4, 9]

def test_failures(tmp_path):
    tries, mended = [], []
    def shaky(config):
        tries.append(config['x'])
        if config['x'] == 1 and not mended or tries.count(config['x']) < 3 and config['x'] == 2: raise ValueError('no luck')
        return square(config)
    configs = [dict(x=i) for i in range(4)]
    with pytest.raises(SweepError, match=r'1 of 4 runs failed.*ValueError: no luck'): sweep(configs, shaky, tmp_path)
    assert tries.count(1) == 3 and tries.count(2) == 3 and tries.count(3) == 1
    mended.append(True)
    rows = sweep(configs, shaky, tmp_path, strict=False)
    assert rows.column('state') == ['done']*4 and not list(tmp_path.glob('*.failed'))
    assert json.loads((tmp_path/f'{config_key(configs[2])}.json').read_text())['about']['tries'] == 3

def test_another_functions_results_are_not_taken(tmp_path):
    configs = [dict(x=i) for i in range(3)]
    def cube(config): return dict(y=config['x']**3)
    sweep(configs, square, tmp_path)
    says = r'folder: .* holds results of test_sweeps:square, .* test_sweeps:.*cube'
    with pytest.raises(ValueError, match=says): sweep(configs, cube, tmp_path)
    with pytest.raises(ValueError, match='folder: '): sweep([*configs, dict(x=9)], partial(cube), tmp_path)
    assert sweep(configs, 'test_sweeps:square', tmp_path).column('y') == sweep(configs, partial(square), tmp_path).column('y') == [0, 1, 4]
    for p in tmp_path.glob('*.json'): # as written before functions were noted
        told = json.loads(p.read_text())
        del told['about']['fn']
        p.write_text(json.dumps(told))
    assert sweep(configs, cube, tmp_path).column('y') == [0, 1, 4]

def test_a_result_that_json_cannot_hold_fails_alone(tmp_path):
    def run(config): return dict(good=1, loss=[np.float32(.5), torch.tensor(.5), .5][config['x']])
    rows = sweep([dict(x=i) for i in range(3)], run, tmp_path, strict=False, retries=0)
    assert rows.column('state') == ['failed', 'failed', 'done'] and rows[2]['loss'] == .5
    for r, kind in zip(rows, ('float32', 'Tensor'), strict=False): assert f"TypeError: fn: returned 'loss' of type {kind}" in r['error']

def test_results_named_as_the_columns(tmp_path):
    rows = sweep([dict(x=1)], lambda c: dict(seconds=-1., state='on', key='k', y=2), tmp_path, retries=0)
    assert rows == read_sweep(tmp_path) and rows[0] == dict(key=config_key(dict(x=1)), state='done', seconds=-1., y=2)
    assert list(sweep([dict(x=1)], square, tmp_path/'plain')[0]) == ['key', 'state', 'y', 'seconds']

def test_one_bad_member_does_not_take_the_others(tmp_path):
    def run(config): return dict(y=1/config['training']['seed'])
    run.alike, run.together = alike, lambda configs: [run(c) for c in configs]
    configs = variations(BASE, training__seed=[1, 2, 0, 4])
    rows = sweep(configs, run, tmp_path, members=4, strict=False)
    assert rows.column('state') == ['done', 'done', 'failed', 'done'] and 'ZeroDivisionError' in rows[2]['error']

def test_packing():
    configs = variations(BASE, optimizer__lr=[.1, .01], training__seed=[0, 1, 2]) + variations(BASE, model__hidden_sizes=[[5]])
    configs += variations(BASE, optimizer__name=['rmsprop'], training__seed=[0, 1])
    tasks = Sweep(configs, train, '/nowhere', members=4).tasks()
    assert sorted(map(len, tasks)) == [1, 1, 1, 2, 4] and sum(map(len, Sweep(configs, train, '/nowhere').tasks())) == len(configs)
    both = variations(BASE, optimizer__lr=[.1, .01], training__seed=[5])
    for a, b in zip(train_together(both), map(train, both), strict=True):
        assert a.keys() == b.keys() and all(abs(a[k] - b[k]) < 1e-5 for k in a)

@pytest.mark.parametrize('options, message', [
    (dict(engine='rai'), "engine: got 'rai'; did you mean 'ray'"), (dict(members=0), 'members: got 0'),
    (dict(retries=-1), 'retries: got -1'), (dict(fn='nothing'), "fn: got 'nothing', takes a function or 'module:name'")])
def test_wrong_arguments(tmp_path, options, message):
    with pytest.raises(ValueError, match=message): sweep([dict(x=1)], folder=tmp_path, **options)
    with pytest.raises(TypeError, match='configs: got a int'): sweep([1], folder=tmp_path)
    with pytest.raises(ValueError, match="config: no group 'modell'; did you mean 'model'"): train(dict(modell=1))

def test_ray_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'ray', None)
    with pytest.raises(ImportError, match=r"pip install 'plasticity\[ray\]'"): sweep([dict(x=1)], square, tmp_path, engine='ray')

def test_command_line(tmp_path):
    words = ('training=standard', 'training.epochs=1', 'training.seed=1,2', 'model.hidden_sizes=[4]', 'dataset=synthetic_classification',
             'device=cpu', 'logging.progress=false', 'metrics.metrics_frequency=0')
    configs = line_configs(*words)
    assert [c['training']['seed'] for c in configs] == [1, 2]
    rows = sweep_line(*words, folder=tmp_path)
    assert rows.column('state') == ['done', 'done'] and rows[0]['test_loss'] != rows[1]['test_loss']
    key = config_key(configs[0])
    assert (tmp_path/key/'report.html').exists() and (tmp_path/key/'checkpoint.json').exists()
    assert run_experiment(configs[0], str(tmp_path/key))['test_loss'] == rows[0]['test_loss'] # goes on from the end: the same

@pytest.mark.parametrize('word, says', [('optimizer.lrr=1', "optimizer.lrr: no such option; did you mean 'optimizer.lr'"),
                                        ('model=mlpp', "model: no 'mlpp'; did you mean 'mlp'"),
                                        ('training.epochs=x', "training.epochs: got 'x'")])
def test_a_wrong_word_gets_one_line(word, says, monkeypatch, capsys):
    from plasticity import experiments as ex
    from plasticity import sweeps
    with pytest.raises(ex.ConfigError, match=says): line_configs('training=standard', 'training.seed=1,2', word)
    for main, name, flags in ((sweeps.main, 'plasticity.sweeps', ()), (ex.main, 'plasticity', ('--engine', 'local'))):
        monkeypatch.setattr(sys, 'argv', [name, *flags, 'training=standard', 'training.seed=1,2', word])
        with pytest.raises(SystemExit) as e: main()
        said = capsys.readouterr()
        assert e.value.code == 2 and said.err.startswith(f'{name}: {says}') and said.err.count('\n') == 1 and not said.out

@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_a_step_size_that_is_not_finite_is_refused_together_and_alone(bad, tmp_path):
    configs = variations(BASE, optimizer__lr=[.1, bad])
    with pytest.raises(ValueError, match=f'lr: got {bad}'): train_together(configs)
    rows = sweep(configs, folder=tmp_path, members=2, retries=1, strict=False)
    assert [r['state'] for r in rows] == ['done', 'failed'] and f'lr: got {bad}' in rows[1]['error']

def test_runs_that_fail_end_a_line_in_one(tmp_path, monkeypatch, capsys):
    from plasticity import experiments as ex
    from plasticity import sweeps
    for main, name, flags in ((sweeps.main, 'plasticity.sweeps', ()), (ex.main, 'plasticity', ('--engine', 'local'))):
        monkeypatch.setattr(sys, 'argv', [name, *flags, '--folder', str(tmp_path/name), 'training=standard', 'optimizer.lr=-1'])
        with pytest.raises(SystemExit) as e: main()
        said = capsys.readouterr().err + (e.value.code if isinstance(e.value.code, str) else '')
        assert e.value.code not in (0, 2, None) and f'{name}: 1 of 1 runs failed' in said and 'Traceback' not in said

DRIVER = '''
import os, signal, sys
from plasticity.sweeps import sweep, variations
import json
configs, folder, address = json.loads(open(sys.argv[1]).read()), sys.argv[2], sys.argv[3]
def note(config, result):
    print('done', flush=True)
sweep(configs, 'test_sweeps:tiny', folder, engine='ray', address=address, on_result=note, resources=dict(num_cpus=1))
'''

def tiny(config):
    "A run that notes its process; in the run that is told to, that process is killed, once"
    mark = Path(config['notes'])/f'{os.getpid()}-{config_key(config)}'
    mark.touch()
    if config.get('die') and not (dead := Path(config['notes'])/'dead').exists():
        dead.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return train({k: v for k, v in config.items() if k in BASE})

@pytest.fixture
def cluster():
    "Two nodes on this machine"
    pytest.importorskip('ray', reason="Ray is missing: pip install 'plasticity[ray]'")
    from ray.cluster_utils import Cluster
    os.environ['PYTHONPATH'] = os.pathsep.join([str(ROOT), str(ROOT/'tests'), os.environ.get('PYTHONPATH', '')])
    os.environ |= dict(RAY_DISABLE_IMPORT_WARNING='1', RAY_USAGE_STATS_ENABLED='0', OMP_NUM_THREADS='1')
    node = dict(num_cpus=1, object_store_memory=80*2**20)
    c = Cluster(initialize_head=True, head_node_args=node | dict(include_dashboard=False))
    c.add_node(**node)
    yield c
    import ray
    ray.shutdown()
    c.shutdown()

def wait_for(f, seconds):
    end = time.monotonic() + seconds
    while not f() and time.monotonic() < end: time.sleep(.05)
    return f()

def test_ray_two_nodes_worker_and_driver_killed(tmp_path, cluster):
    "All runs are there once, equal to local ones, though a worker was killed, and then the driver"
    notes, folder = tmp_path/'notes', tmp_path/'sweep'
    notes.mkdir()
    configs = variations(BASE | dict(notes=str(notes)), training__seed=list(range(RUNS)))
    configs[1]['die'] = True
    (tmp_path/'configs.json').write_text(json.dumps(configs)); (tmp_path/'driver.py').write_text(DRIVER)
    run = [sys.executable, str(tmp_path/'driver.py'), str(tmp_path/'configs.json'), str(folder), cluster.address]
    with open(tmp_path/'log', 'w') as log:
        driver = subprocess.Popen(run, stdout=log, stderr=log)
        def done(): return len(list(folder.glob('*.json'))) if folder.exists() else 0
        def enough(): return driver.poll() is not None or (done() >= RUNS//3 and (notes/'dead').exists())
        try: assert wait_for(enough, 120) and driver.poll() is None, (tmp_path/'log').read_text()
        finally: driver.kill()
        driver.wait(20)
        first = done()
        assert RUNS//3 <= first < RUNS
        kept = {p.name: p.stat().st_mtime_ns for p in folder.glob('*.json')}
        subprocess.run(run, stdout=log, stderr=log, timeout=200, check=True)
    files = {p.name: json.loads(p.read_text()) for p in folder.glob('*.json')}
    assert sorted(files) == sorted(f'{config_key(c)}.json' for c in configs) and not list(folder.glob('*.failed'))
    assert all((folder/k).stat().st_mtime_ns == t for k, t in kept.items()) # what was there was not run again
    assert len({p.name.split('-')[0] for p in notes.glob('*-*')}) >= 3 # two nodes' workers, and one in the place of the dead one
    import ray
    ray.init(address=cluster.address, log_to_driver=False, logging_level='ERROR')
    assert len([n for n in ray.nodes() if n['Alive']]) == 2
    sweep([{k: v for k, v in c.items() if k in BASE} for c in configs], train, tmp_path/'local')
    for c in configs:
        local = json.loads((tmp_path/'local'/f'{config_key({k: v for k, v in c.items() if k in BASE})}.json').read_text())
        assert files[f'{config_key(c)}.json']['result'] == local['result']

QUICK = 'training=standard', 'training.epochs=1', 'model.hidden_sizes=[4]', 'dryrun=true', 'logging.progress=false', 'device=cpu'

def test_errors_come_back_from_other_processes(tmp_path, monkeypatch):
    "A launcher's worker has a copy of the driver's lists: what fails there has to come back as an exception"
    from plasticity import experiments as ex
    from plasticity.training import Callback
    monkeypatch.setattr(ex, 'POLICIES', dict(ex.POLICIES))
    @ex.register_policy('trips')
    class Trips(Callback):
        def __init__(self, over:int=0): self.over = over
        def after_step(self, t):
            if self.over: raise OSError(f'fell over {self.over}')
    words = '--multirun', *QUICK, 'policy=trips'
    with pytest.raises(OSError, match='fell over 3'): ex.run_line(*words, 'policy.over=0,3', f'hydra.sweep.dir={tmp_path}/here')
    at = iter([('host', 1)] + [('other', 2)]*9)
    monkeypatch.setattr(ex, '_process', lambda: next(at))
    with pytest.raises(OSError, match='fell over 3'): ex.run_line(*words, 'policy.over=0,3', f'hydra.sweep.dir={tmp_path}/there')
    at = iter([('host', 1)] + [('other', 2)]*9)
    assert ex.run_line(*words, 'policy.over=0', f'hydra.sweep.dir={tmp_path}/well') is None
    assert (tmp_path/'well'/'0'/'report.html').exists()

def test_a_worker_imports_what_the_line_imports(tmp_path):
    "Nothing of the driver's registries is in a process that starts anew"
    (tmp_path/'tiny_mine.py').write_text(
        'from torch import nn\nfrom plasticity.models import register_model\n'
        "@register_model('tiny_mine')\nclass TinyMine(nn.Sequential):\n"
        '    def __init__(self, in_shape, num_classes, k:int=3):\n'
        '        super().__init__(nn.Flatten(), nn.Linear(64, k), nn.Linear(k, num_classes))\n')
    words = '--import', str(tmp_path/'tiny_mine.py'), *[w for w in QUICK if not w.startswith('model')], 'model=tiny_mine', 'model.k=5'
    config, = line_configs(*words)
    script = ('import json, sys\nfrom plasticity.sweeps import run_experiment\n'
              'print(run_experiment(json.loads(sys.argv[1]), sys.argv[2], [sys.argv[3]])["steps"])')
    args = [sys.executable, '-c', script, json.dumps(config), str(tmp_path/'run'), str(tmp_path/'tiny_mine.py')]
    done = subprocess.run(args, cwd=ROOT, env=os.environ | dict(PYTHONPATH=str(ROOT)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 0 and sweep_line(*words, folder=tmp_path/'s').column('state') == ['done']

def test_a_damaged_result_is_named(tmp_path):
    configs = [dict(x=i) for i in range(3)]
    sweep(configs, _square, tmp_path)
    cut = Sweep(configs, _square, tmp_path, 1, 0, None).file(configs[1])
    cut.write_text(cut.read_text()[:20])
    for ask in (lambda: sweep(configs, _square, tmp_path), lambda: read_sweep(tmp_path), lambda: read_sweep(tmp_path, configs)):
        with pytest.raises(ValueError, match=f'{cut.name}: is no result file'): ask()
    cut.unlink()
    assert sweep(configs, _square, tmp_path).column('y') == [0, 1, 4]

def _square(config): return dict(y=config['x']**2)

def _leaves(config):
    if config['x'] == 1: sys.exit(3)
    return dict(y=config['x'])

def test_a_run_that_exits_is_a_run_that_fails(tmp_path):
    rows = sweep([dict(x=i) for i in range(3)], _leaves, tmp_path, retries=0, strict=False)
    assert rows.column('state') == ['done', 'failed', 'done'] and 'SystemExit: 3' in rows[1]['error']
