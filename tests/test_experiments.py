"The command line, from outside: folders, words, errors, resuming."
import json, os, signal, subprocess, sys, time, warnings
from pathlib import Path

import numpy as np
import pytest

from plasticity import experiments as ex
from plasticity.training import Callback, load_state
from processes import forked

QUICK = 'dryrun=true', 'logging.progress=false'

def run(*words, folder, quick=QUICK): return ex.run_line(*quick, *words, f'hydra.run.dir={folder}')

def command(*words, cwd):
    "What `plasticity` does with these words, in a process of its own"
    r = forked(ex.main, 'plasticity', *words, cwd=cwd)
    r.stdout, r.stderr = r.stdout.decode(), r.stderr.decode()
    return r

def test_a_run_leaves_its_folder(tmp_path):
    folder = run('training.seed=7', folder=tmp_path/'r')
    files = {p.name for p in folder.iterdir() if p.suffix != '.safetensors'}
    assert files == {'config.json', 'metrics.jsonl', 'checkpoint.json', 'report.html', 'topology.json'}
    config, history, layers = ex.read_run(folder)
    assert config['training']['seed'] == 7 and config['model']['name'] == 'mlp' and config['dryrun'] is True
    assert {r['split'] for r in history} == {'train', 'test'} and 'dead_fraction' in set(layers.column('metric'))
    page = (folder/'report.html').read_text()
    assert page.count('src="data:image/') == 5 and page.count('The network over time</h2>') == 1
    assert 'http' not in page.replace('http://www.w3.org', '')

@pytest.mark.parametrize('model', ['mlp', 'cnn', 'resnet', 'vit'])
def test_every_model_on_small_images(model, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    parts = ('train', 40), ('test', 10)
    np.savez(tmp_path/'tiny.npz', **{f'x_{s}': rng.integers(0, 255, (n, 16, 16, 3), dtype=np.uint8) for s, n in parts},
             **{f'y_{s}': rng.integers(0, 3, n) for s, n in parts})
    monkeypatch.setenv('PLASTICITY_DATA', str(tmp_path))
    small = dict(resnet=['model.channels=8'], vit=['model.depth=2']).get(model, [])
    folder = run(f'model={model}', *small, 'dataset=tiny', 'training.batch_size=8', folder=tmp_path/model)
    assert ex.read_run(folder)[1][-1]['epoch'] == 1

@pytest.mark.parametrize('words, says', [
    (['model=mpl'], "did you mean 'mlp'"), (['modle=mlp'], "did you mean 'model'"), (['training.epoch=3'], 'training.epochs'),
    (['training.epochs=many'], 'training.epochs'), (['optimizer=adm'], "'adam'"), (['optimizer.lr=fast'], 'optimizer.lr'),
    (['model.activation=rellu'], 'relu'), (['+model.foo=3'], 'foo'), (['dataset=mnst'], 'mnist'), (['training.batch_size=0'], 'batch_size'),
    (['device=gpu'], 'device'), (['training.schedule=cosin'], 'schedule'), (['--config', 'nowhere.json'], 'nowhere.json'),
    (['resume=nowhere'], 'resume'), (['--import', 'nowhere.py'], 'nowhere.py'), (['model.normalization=instance'], 'instance'),
    (['training=standrad'], 'standard'), (['metrics.dead_treshold=.9'], 'metrics.dead_threshold'),
    (['optimizer=sgd', 'optimizer.momentum=x'], 'momentum'), (['dryrun=maybe'], 'dryrun'), (['model.hidden_sizes=[8'], 'hidden_sizes'),
    (['training.epochs=-1'], 'epochs: got -1'), (['metrics.probe=0'], 'metrics.probe: got 0'),
    (['training=standard', 'training.warmup=-5'], 'warmup: got -5'),
    (['metrics.dead_threshold=2'], 'metrics.dead_threshold: got 2.0, takes 0 to 1'),
    (['metrics.saturation_threshold=-1'], 'metrics.saturation_threshold: got -1.0'),
    (['training=cloning', 'training.num_expansions=-1'], 'num_expansions: got -1'),
    (['training=adaptive', 'training.prune_every=-5'], 'prune_every: got -5'),
    (['training=adaptive', 'training.grow_ratio=-1'], 'ratio: got -1'),
    (['training=extrema', 'training.sparsity=3'], 'sparsity: got 3.0'),
    (['training=extrema', 'training.dense_from=0'], 'dense_from: got 0.0'),
    (['training=extrema', 'training.hidden_sizes=8'], 'hidden_sizes: got 8'),
    (['training=extrema', 'training.patience=-3'], 'patience: got -3'),
    (['training=extrema', 'training.hidden_sizes=[]'], 'hidden_sizes: got []'),
    (['training=extrema', 'training.router=foo'], 'random'),
    (['training=extrema', 'training.hidden_sizes=[a]'], "hidden_sizes: got ['a']"),
    (['training=extrema', 'training.hidden_sizes=[0]'], 'hidden_sizes: got [0]'),
    (['training=extrema', 'model=cnn'], "model: got cnn; training=extrema makes its network by training.hidden_sizes"),
    (['training=extrema', 'model.hidden_sizes=[8]'], "model: got {'hidden_sizes': [8]}; training=extrema"),
    (['training=extrema', 'growth=loss'], 'growth: got a strategy; training=extrema grows as training.router says'),
    (['training=extrema', 'policy=redo'], 'no units of this MinimalNetwork can be replaced'),
    (['training=extrema', 'policy=head_reset'], 'this MinimalNetwork has no linear or convolution layer'),
    (['policy=heads'], 'model: got a MLP, takes one of attention heads'),
    (['training=adaptive', 'policy=heads'], 'model: got a AdaptiveMLP, takes one of attention heads'),
    (['optimizer.lr=-1'], 'optimizer: got Adam with'), (['optimizer.betas=3'], 'betas=3'),
    (['model=vae', 'training=vae', 'training.warmup_kl=-5'], 'warmup_kl: got -5'),
    (['training=vae'], 'takes model=vae, got model=mlp'), (['training=language'], 'takes dataset=text, got dataset=digits')])
def test_wrong_words_get_one_line(words, says, tmp_path):
    with pytest.raises(ex.ConfigError) as e: run(*words, folder=tmp_path/'r')
    text = str(e.value)
    assert says in text and '\n' not in text and len(text) < 600
    assert not (tmp_path/'r'/'metrics.jsonl').exists()

def test_exit_status_and_no_traceback(tmp_path):
    r = subprocess.run([sys.executable, '-c', 'from plasticity.experiments import main; main()', 'model=mpl'], cwd=tmp_path, text=True,
                       capture_output=True, timeout=120)
    assert r.returncode == 2 and r.stdout == '' and r.stderr.count('\n') == 1 and r.stderr.startswith('plasticity: model')
    ok = command('--help', cwd=tmp_path)
    assert ok.returncode == 0 and 'dataset: digits' in ok.stdout and 'hidden_sizes' in ok.stdout and '_target_' not in ok.stdout

def test_config_file_round_trip(tmp_path):
    first = run('model.hidden_sizes=[12]', 'optimizer=sgd', 'optimizer.lr=.05', "model.activation='tanh'", folder=tmp_path/'a')
    again = ex.run_line('--config', f'{first}/config.json', f'hydra.run.dir={tmp_path}/b')
    assert ex.read_run(first)[0] == ex.read_run(again)[0] and ex.read_run(first)[1] == ex.read_run(again)[1]
    (tmp_path/'part.json').write_text(json.dumps(dict(model=dict(name='cnn', channels=[4]), training=dict(seed=3))))
    third = ex.read_run(ex.run_line(f'--config={tmp_path}/part.json', 'model=mlp', *QUICK, f'hydra.run.dir={tmp_path}/c'))[0]
    assert third['model']['name'] == 'mlp' and third['training']['seed'] == 3

def test_words_round_trip():
    tree = dict(model=dict(name='mlp', activation="it's \\ odd", sizes=[1, [2, 'x']], none=None, f=1e-5), dryrun=True, root='a b')
    from hydra.core.override_parser.overrides_parser import OverridesParser
    values = {o.key_or_group: o.value() for o in OverridesParser.create().parse_overrides(ex.as_words(tree))}
    assert values == {'model': 'mlp', 'model.activation': "it's \\ odd", 'model.sizes': [1, [2, 'x']], 'model.none': None, 'model.f': 1e-5,
                      'dryrun': True, 'root': 'a b'}

def test_the_same_folder_is_not_overwritten(tmp_path):
    assert run(folder=tmp_path/'r').name == 'r' and run(folder=tmp_path/'r').name == 'r-2'

def test_resume_equals_the_unbroken_run(tmp_path):
    words = 'logging.progress=false', 'training.epochs=3', 'model.hidden_sizes=[16]'
    whole = run(*words, folder=tmp_path/'whole', quick=())
    @ex.register_policy('break')
    class Break(Callback):
        def __init__(self, at:int=0): self.at = at
        def after_step(self, trainer):
            if trainer.step == self.at: os.kill(os.getpid(), signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt): run(*words, 'policy=break', 'policy.at=30', folder=tmp_path/'part', quick=())
        config = json.loads((tmp_path/'part'/'config.json').read_text())
        assert len(ex.read_run(tmp_path/'part')[1]) < len(ex.read_run(whole)[1])
        assert config['policy'] == dict(name='break', at=30)
        resumed = ex.run_line(f"resume={tmp_path}/part")
    finally: ex.POLICIES.pop('break')
    for a, b in zip(ex.read_run(whole)[1:], ex.read_run(resumed)[1:], strict=True): assert a == b

def test_a_finished_run_goes_further(tmp_path):
    words = 'logging.progress=false', 'model.hidden_sizes=[8]', 'training.schedule=constant'
    whole = run(*words, 'training.epochs=3', folder=tmp_path/'whole', quick=())
    run(*words, 'training.epochs=2', folder=tmp_path/'part', quick=())
    further = ex.run_line(f'resume={tmp_path}/part', 'training.epochs=3')
    last = [ex.read_run(f)[1].where(split='test')[-1] for f in (whole, further)]
    assert last[0]['epoch'] == last[1]['epoch'] == 3 and last[0]['loss'] == last[1]['loss']

def test_ctrl_c_leaves_a_resumable_run(tmp_path):
    words = 'training.epochs=3000', 'model.hidden_sizes=[16]', 'metrics.metrics_frequency=0', f'hydra.run.dir={tmp_path}/r'
    p = subprocess.Popen([sys.executable, '-c', 'from plasticity.experiments import main; main()', *words], cwd=tmp_path, text=True,
                         stderr=subprocess.PIPE)
    for _ in range(600):
        if (tmp_path/'r'/'checkpoint.json').exists(): break
        time.sleep(.1)
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=60)
    assert p.returncode == 130 and 'go on with: plasticity resume=' in err and 'Traceback' not in err
    done = json.loads((tmp_path/'r'/'metrics.jsonl').read_text().splitlines()[-1])['epoch']
    assert 0 < done < 3000

def test_continual(tmp_path):
    words = 'training=continual', 'task.tasks=3', 'training.epochs_per_task=2', 'logging.progress=false', 'model.hidden_sizes=[8]'
    folder = run(*words, 'metrics.metrics_frequency=0', 'optimizer.reinit_optimizer=true', folder=tmp_path/'r', quick=())
    tasks = json.loads((folder/'tasks.json').read_text())
    assert len(tasks['matrix']) == 3 and ex.read_run(folder)[1][-1]['epoch'] == 6 and 'average_accuracy' in tasks['summary']
    with pytest.raises(ex.ConfigError, match='classes'): run(*words, 'task.classes_per_task=7', folder=tmp_path/'s', quick=())

@pytest.mark.parametrize('model', ['mlp', 'cnn', 'resnet', 'vit'])
def test_cloning(model, tmp_path):
    small = dict(resnet=['model.channels=8'], vit=['model.depth=2']).get(model, [])
    folder = run(f'model={model}', *small, 'training=cloning', 'metrics.metrics_frequency=0', folder=tmp_path/model)
    assert ex.read_run(folder)[0]['training']['expansion_factor'] == 2 and (folder/'checkpoint.json').exists()

def test_presets(tmp_path):
    assert ex.as_words(ex.PRESETS['cnn-cifar10'])[:4] == ['model=cnn', 'dataset=cifar10', 'training=cloning', 'training.initial_epochs=30']
    folder = run('+preset=multi-expansion', 'dataset=digits', 'metrics.metrics_frequency=0', folder=tmp_path/'r')
    assert ex.read_run(folder)[0]['training']['num_expansions'] == 3
    with pytest.raises(ex.ConfigError, match='mlp-mnist'): run('+preset=mlp-mnst', folder=tmp_path/'s')

def test_multirun(tmp_path):
    ex.run_line('--multirun', 'training.seed=1,2', *QUICK, f'hydra.sweep.dir={tmp_path}/m')
    assert sorted(p.parent.name for p in Path(tmp_path/'m').glob('*/report.html')) == ['0', '1']

MINE = '''
from torch import nn
from plasticity.models import register_model
@register_model('mine')
def mine(in_shape, num_classes, width:int=4):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, num_classes))
'''

def test_import_registers(tmp_path):
    (tmp_path/'my.py').write_text(MINE)
    r = command('--import', 'my.py', 'model=mine', 'model.width=7', 'dryrun=true', 'hydra.run.dir=r', cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    assert ex.read_run(tmp_path/'r')[0]['model'] == dict(name='mine', width=7)

def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip('wandb'); pytest.importorskip('accelerate')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    folder = run('logging.use_wandb=true', 'logging.wandb_project=test', folder=tmp_path/'r')
    assert list(folder.glob('wandb/offline-run-*/*.wandb'))

def test_tensorboard(tmp_path):
    pytest.importorskip('tensorboard'); pytest.importorskip('accelerate')
    folder = run('logging.use_tensorboard=true', folder=tmp_path/'r')
    assert list(folder.rglob('events.out.tfevents*'))

def test_a_missing_tracker_gives_the_install_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    with pytest.raises(ex.ConfigError, match=r"pip install 'plasticity\[wandb\]'"): run('logging.use_wandb=true', folder=tmp_path/'r')

def test_thresholds_reach_the_metrics(tmp_path):
    strict, loose = (ex.read_run(run(f'metrics.corr_threshold={t}', folder=tmp_path/f't{t}'))[2] for t in (.999999, .01))
    mean = lambda rows: np.mean([r['value'] for r in rows if r['metric'] == 'duplicate_fraction'])
    assert mean(loose) > mean(strict)

def test_a_run_that_diverges_has_a_report(tmp_path):
    words = 'optimizer=sgd', 'optimizer.lr=1e30', 'model.hidden_sizes=[8]', 'model.activation=linear'
    with pytest.warns(UserWarning, match='not measured at step .*NaN or infinite'): folder = run(*words, folder=tmp_path/'r')
    config, history, layers = ex.read_run(folder)
    assert np.isnan(history[-1]['loss']) and {r['step'] for r in layers} == {0}
    assert (folder/'report.html').exists() and (folder/'topology.json').exists()

def test_read_run_names_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match='not a run'): ex.read_run(tmp_path)

def test_no_words_is_the_continual_run(tmp_path, monkeypatch, capsys):
    "Fewer tasks, else what `plasticity` does: the folder's files, and the continual curves in the report"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(ex.PRESETS, 'permuted-digits', ex.PRESETS['permuted-digits'] | dict(task=dict(name='default', tasks=3),
                                                                                            logging=dict(name='default', progress=False)))
    monkeypatch.setattr(sys, 'argv', ['plasticity'])
    ex.main()
    folder = next((tmp_path/'outputs').iterdir())
    assert {p.name for p in folder.iterdir() if p.suffix != '.safetensors'} == {'config.json', 'metrics.jsonl', 'checkpoint.json',
                                                                                'report.html', 'tasks.json', 'topology.json'}
    page = (folder/'report.html').read_text()
    assert page.count('src="data:image/') == 7 and 'Task by task' in page and 'What became of each task' in page
    assert len(json.loads((folder/'tasks.json').read_text())['tasks']) == 3 and 'report.html' in capsys.readouterr().out

@pytest.mark.parametrize('words', [('policy=redo', 'policy.every=3', 'policy.threshold=.5'), ('policy=head_reset', 'training=continual'),
                                   ('policy=continual_backprop', 'policy.rate=.01', 'policy.maturity=1'), ('optimizer=upgd',)])
def test_remedies_are_policies(words, tmp_path):
    config = ex.read_run(run(*words, folder=tmp_path/'r'))[0]
    assert config[words[0].partition('=')[0]]['name'] == words[0].partition('=')[2]

def test_a_film_is_in_no_checkpoint_and_old_runs_go_on(tmp_path):
    words = 'logging.progress=false', 'model.hidden_sizes=[16]', 'training.epochs=2'
    folder = run(*words, folder=tmp_path/'r', quick=())
    film = json.loads((folder/'topology.json').read_text())
    assert film['steps'][0] == 0 and film['steps'][-1] == ex.read_run(folder)[1][-1]['step']
    assert [name for name, _ in load_state(folder)['callbacks']] == ['Record', 'Checkpoint']  # as before there were films
    (folder/'topology.json').unlink()
    ex.run_line(f'resume={folder}', 'training.epochs=2')
    assert not (folder/'topology.json').exists() and 'The network over time</h2>' in (folder/'report.html').read_text()  # from its rows

def test_a_film_that_lacks_a_part_is_not_shown(tmp_path):
    folder = run(folder=tmp_path/'r')
    film = json.loads((folder/'topology.json').read_text())
    assert ex.film_of_folder(folder) == film
    (folder/'topology.json').write_text(json.dumps(film | dict(steps=[s + 1 for s in film['steps']])))
    assert not isinstance(ex.film_of_folder(folder), dict)

def test_a_report_without_layers_or_with_a_failing_view_is_the_report_without(tmp_path, monkeypatch):
    from plasticity.widgets import TopologyView
    folder = run('metrics.metrics_frequency=0', folder=tmp_path/'r')
    assert 'The network over time</h2>' in ex.write_report(folder).read_text()
    def fails(self): raise RuntimeError('no picture')
    with monkeypatch.context() as m:
        m.setattr(TopologyView, 'fragment', fails)
        with pytest.warns(UserWarning, match='no picture'): page = ex.write_report(folder).read_text()
    assert 'The network over time' not in page and 'Learning curves' in page and 'Configuration' in page
    (folder/'topology.json').unlink()
    assert 'The network over time' not in ex.write_report(folder).read_text()
    for bad in ('', '{}', '[1'):
        (folder/'topology.json').write_text(bad)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            assert 'The network over time' not in ex.write_report(folder).read_text()

@pytest.mark.parametrize('event', ['before_fit', 'before_step', 'after_step', 'after_fit', 'take'])
def test_a_run_outlives_its_film(event, tmp_path, monkeypatch):
    def fails(self, *args, **options): raise RuntimeError('no film')
    monkeypatch.setattr(ex.Filming, event, fails)
    with pytest.warns(UserWarning, match='no film'): folder = run(folder=tmp_path/'r')
    assert ex.read_run(folder)[1][-1]['epoch'] == 1 and (folder/'report.html').exists()

def test_a_sweep_from_the_command_line(tmp_path, capsys):
    from plasticity.experiments import ConfigError, run_line
    words = ['--multirun', '--engine', 'local', '--folder', str(tmp_path/'s'), 'training.seed=1,2', 'training=standard',
             'training.epochs=1', 'model.hidden_sizes=[4]', 'logging.progress=false', 'dryrun=true', 'device=cpu']
    assert run_line(*words) is None
    said = capsys.readouterr().out
    files = sorted((tmp_path/'s').rglob('*.json'))
    assert len(files) >= 2 and 'done' in said
    times = [f.stat().st_mtime_ns for f in files]
    run_line(*words)
    assert [f.stat().st_mtime_ns for f in files] == times     # nothing is run twice
    with pytest.raises(ConfigError, match="--engine: got 'rya'; did you mean 'ray'"): run_line('--engine', 'rya', 'training.seed=1,2')

def test_a_run_goes_on_with_what_it_was_made_with(tmp_path):
    folder = run('training=standard', 'training.epochs=1', folder=tmp_path/'r', quick=QUICK[1:])
    for word in ('optimizer.lr=.5', 'optimizer=sgd', 'model.hidden_sizes=[8]', 'policy=redo', 'dataset=mnist', 'training.seed=3',
                 'training.batch_size=7'):
        with pytest.raises(ex.ConfigError, match=f"^{word.partition('=')[0]}: the run in .* takes no .* beside resume="):
            run(f'resume={folder}', word, folder=folder, quick=QUICK[1:])
    assert json.loads((folder/'config.json').read_text())['optimizer']['name'] == 'adam'
    run(f'resume={folder}', 'dataset=digits', 'optimizer=adam', 'training.epochs=2', folder=folder, quick=QUICK[1:])
    assert ex.read_run(folder)[1][-1]['epoch'] == 2

KINDS = dict(standard=['training.schedule=cosine', 'training.clip=1.'], adaptive=['training.grow_every=7', 'training.max_width=99'],
             cloning=['training.num_expansions=1', 'training.initial_epochs=3'], continual=['training.epochs_per_task=2'],
             extrema=['training.hidden_sizes=[9]', 'training.sparsity=.3', 'training.activation=relu', 'training.router=random',
                      'training.dense_from=.2', 'training.patience=3', 'training.limits=false'], vae=['training.warmup_kl=3'])

@pytest.mark.parametrize('kind', KINDS)
def test_no_option_of_a_run_that_goes_on_is_lost(kind, tmp_path):
    epochs = {'cloning': ['training.initial_epochs=1', 'training.epochs_per_expansion=1', 'training.num_expansions=0'],
              'continual': ['training.epochs_per_task=1', 'task.tasks=2']}.get(kind, ['training.epochs=1'])
    model = dict(extrema=['training.hidden_sizes=[8]', 'training.sparsity=.05'],
                 vae=['model=vae', 'model.channels=[2,2]', 'model.latent_dim=2'])
    words = f'training={kind}', *epochs, *model.get(kind, ['model.hidden_sizes=[8]']), 'dryrun=false', 'metrics.probe=64'
    folder = run(*words, folder=tmp_path/'r', quick=('logging.progress=false',))
    kept = (folder/'config.json').read_text()
    for word in KINDS[kind]:
        with pytest.raises(ex.ConfigError, match=f"^{word.partition('=')[0]}: the run in .* takes no .* beside resume="):
            run(f'resume={folder}', word, folder=folder, quick=())
    assert (folder/'config.json').read_text() == kept
    for word in f'++{KINDS[kind][0]}', '~training.seed', 'dryrun=true', 'task.tasks=9', 'dataset.x=3':
        with pytest.raises(ex.ConfigError, match='takes no .* beside resume='): run(f'resume={folder}', word, folder=folder, quick=())
    if 'training.epochs=1' in epochs:
        with pytest.raises(ex.ConfigError, match='epochs: got 0, but the run has done 1'):
            run(f'resume={folder}', 'training.epochs=0', folder=folder, quick=())
    assert (folder/'config.json').read_text() == kept
    run(f'resume={folder}', *words, 'optimizer=adam', folder=folder, quick=()) # what it was made with may be said again
    now = json.loads((folder/'config.json').read_text())
    assert now | dict(resume=None) == json.loads(kept)
    if 'training.epochs=1' in epochs:
        run(f'resume={folder}', 'training.epochs=2', folder=folder, quick=())
        assert ex.read_run(folder)[1][-1]['epoch'] == 2 == json.loads((folder/'config.json').read_text())['training']['epochs']

def test_a_film_changes_no_bit(tmp_path, monkeypatch):
    "Frames are taken by the clock: what a run computes must not depend on them"
    words = ('training=extrema', 'dataset=digits', 'training.hidden_sizes=[24,16]', 'training.sparsity=.1', 'training.limits=false',
             'optimizer.lr=.01', 'training.batch_size=64', 'training.epochs=3')
    film, got = ex.Filming, []
    for name, make in dict(none=lambda **k: None, now_and_then=lambda **k: film(**k | dict(steps=7)),
                           always=lambda **k: film(**k | dict(steps=1))).items():
        monkeypatch.setattr(ex, 'Filming', make)
        folder = run(*words, folder=tmp_path/name, quick=('logging.progress=false',))
        got.append(((folder/'growth.json').read_text(), (folder/'metrics.jsonl').read_text()))
        assert name == 'none' or len(json.loads((folder/'topology.json').read_text())) > 0
    assert got[0] == got[1] == got[2]

def test_a_run_that_patience_ended_stays_ended(tmp_path):
    folder = run('training=extrema', 'training.router=none', 'training.patience=2', 'training.epochs=20', 'training.hidden_sizes=[8]',
                 'optimizer.lr=1e-9', folder=tmp_path/'r', quick=('logging.progress=false',))
    done = ex.read_run(folder)[1][-1]['epoch']
    run(f'resume={folder}', folder=folder, quick=())
    assert ex.read_run(folder)[1][-1]['epoch'] == done < 20

def test_a_fault_in_the_midst_is_no_wrong_word(tmp_path):
    @ex.register_policy('broken')
    class Broken(Callback):
        def after_step(self, trainer): raise ValueError('a fault of its own')
    try:
        with pytest.raises(ValueError, match='a fault of its own') as e: run('policy=broken', folder=tmp_path/'r')
        assert not isinstance(e.value, ex.ConfigError)
    finally: ex.POLICIES.pop('broken')

def test_a_folder_of_any_name_goes_on(tmp_path):
    folder = tmp_path/"lr=0.1, it's (1)"
    run('training=standard', 'training.epochs=1', folder=tmp_path/'r', quick=QUICK[1:]).rename(folder)
    ex.run_line('logging.progress=false', f'resume={folder}', 'training.epochs=2')
    assert ex.read_run(folder)[1][-1]['epoch'] == 2

def test_names_alone_in_a_config_file_and_data_in_the_root(tmp_path, monkeypatch):
    monkeypatch.delenv('PLASTICITY_DATA', raising=False)
    rng = np.random.default_rng(0)
    (tmp_path/'data').mkdir()
    np.savez(tmp_path/'data'/'mine.npz', x_train=rng.random((40, 6), np.float32), y_train=np.arange(40) % 2,
             x_test=rng.random((8, 6), np.float32), y_test=np.arange(8) % 2)
    (tmp_path/'c.json').write_text(json.dumps(dict(model='mlp', dataset='mine', root=str(tmp_path/'data'))))
    r = command('root=data', 'dataset=mine', 'training=standard', 'dryrun=true', cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    r = command('--config', 'c.json', f'root={tmp_path/"data"}', 'training=standard', 'dryrun=true', cwd=tmp_path)
    assert r.returncode == 0, r.stderr

def test_a_model_whose_default_is_a_class(tmp_path):
    (tmp_path/'my.py').write_text('from torch import nn\nfrom plasticity.models import register_model\n'
                                  '@register_model("my-net")\ndef my_net(in_shape, num_classes, width:int=16, act=nn.ReLU):\n'
                                  '    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), act(), nn.Linear(width, num_classes))\n')
    r = command('--import', 'my.py', 'model=my-net', 'model.width=8', 'training=standard', 'dryrun=true', cwd=tmp_path)
    assert r.returncode == 0, r.stderr

def test_a_file_means_what_its_words_mean(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('some.txt').write_text('one two three four five six. '*400)
    tree = dict(model=dict(name='gpt', hidden_size=16, num_layers=1, num_heads=2), dataset=dict(name='text', path='some.txt', length=16))
    Path('gpt.json').write_text(json.dumps(tree))
    got = ex.read_run(ex.run_line('--config', 'gpt.json', 'dryrun=true', f'hydra.run.dir={tmp_path}/a'))[0]
    assert (got['training']['name'], got['optimizer']['name'], got['optimizer']['lr']) == ('language', 'adamw', 3e-4)

def test_flags_with_a_value(capsys):
    for flag in ('--cfg', 'job'), ('-c', 'job'), ('--cfg=job',), ('-c', 'job', '-p', 'model'):
        ex.run_line('training=standard', *flag)
        assert 'hidden_sizes' in capsys.readouterr().out

def test_no_tasks_are_refused_in_a_dry_run_too(tmp_path):
    with pytest.raises(ex.ConfigError, match='tasks: got 0'): run('training=continual', 'task.tasks=0', 'dryrun=true', folder=tmp_path/'r')
