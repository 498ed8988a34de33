"Growth from the command line, interrupted and resumed"
import pytest

from plasticity import experiments as ex
from plasticity.training import Callback

GROWS = ('growth=loss', 'growth.patience=1', 'growth.cooldown=1', 'growth.min_delta=.5', 'model.hidden_sizes=[4,4]',
         'logging.progress=false',
         'training.epochs=6', 'metrics.metrics_frequency=0')

class Stop(Callback):
    armed, order = False, 200  # after everything else of the epoch
    def after_epoch(self, trainer):
        if self.armed and trainer.epoch == 4: raise KeyboardInterrupt

def test_growth_and_resume(tmp_path, monkeypatch):
    monkeypatch.setitem(ex.POLICIES, 'none', Stop)
    a = ex.run_line(*GROWS, f'hydra.run.dir={tmp_path}/a')
    monkeypatch.setattr(Stop, 'armed', True)
    with pytest.raises(KeyboardInterrupt): ex.run_line(*GROWS, f'hydra.run.dir={tmp_path}/b')
    monkeypatch.setattr(Stop, 'armed', False)
    b = ex.run_line(f'resume={tmp_path}/b', 'logging.progress=false')
    ha, hb = (ex.read_run(f)[1] for f in (a, b))
    assert ha == hb and sum('edit' in r for r in ha) >= 2

@pytest.mark.parametrize('name', ['gradient', 'activity', 'adaptive'])
def test_every_strategy_from_the_command_line(name, tmp_path):
    folder = ex.run_line(f'growth={name}', 'growth.patience=1', 'dryrun=true', 'logging.progress=false', f'hydra.run.dir={tmp_path}/a')
    assert ex.read_run(folder)[1]

def test_wrong_words(tmp_path):
    with pytest.raises(ex.ConfigError, match='loss'): ex.run_line('growth=los', f'hydra.run.dir={tmp_path}/a')
    with pytest.raises(ex.ConfigError, match='patience'): ex.run_line('growth=loss', 'growth.patience=0', f'hydra.run.dir={tmp_path}/a')
