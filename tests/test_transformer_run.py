"A language model on the command line: the words, the run, its resume, the chat with it"
import pytest

from plasticity.chat import open_chat
from plasticity.experiments import ConfigError, read_run, run_line

WORDS = ('model=gpt', 'dataset=text', 'model.hidden_size=16', 'model.num_layers=2', 'model.num_heads=4', 'training.batch_size=2',
         'model.max_seq_length=24', 'training.steps_per_epoch=6', 'training.test_stretches=4', 'training.epochs=2', 'device=cpu',
         'logging.progress=false')

@pytest.fixture
def text(tmp_path):
    path = tmp_path/'my.txt'
    path.write_text('the cat sat on the mat, and the dog sat on the log. ' * 60)
    return path

def test_the_words_make_a_run_to_talk_to(tmp_path, text):
    root = f'root={tmp_path}'
    run = run_line(*WORDS, f'data.path={text}', 'dataset.tokenizer=characters', root, f'hydra.run.dir={tmp_path}/run')
    config, history, layers = read_run(run)
    assert config['optimizer']['name'] == 'adamw' and config['training']['name'] == 'language' and config['dataset']['path'] == str(text)
    losses = [r['loss'] for r in history if r.get('split') == 'test']
    assert history[-1]['step'] == 12 and len(losses) == 3 and losses[-1] < losses[0] and layers and (run/'report.html').exists()
    chat = open_chat(run)
    assert chat.model.room == 24 and chat.about['step'] == 12 and 'my' in chat.about['data'] and chat.tokenizer.size < 40

def test_heads_are_pruned_on_the_way_and_the_run_resumes(tmp_path, text):
    run = run_line(*WORDS, f'data.path={text}', f'root={tmp_path}', f'hydra.run.dir={tmp_path}/run', 'policy=heads', 'policy.every=4',
                   'policy.ratio=.99', 'policy.at_most=1')
    heads = open_chat(run).model.heads
    assert sum(heads) < 8
    resumed = run_line(f'resume={run}', f'root={tmp_path}')
    assert open_chat(resumed).model.heads == heads

def test_wrong_words(tmp_path, text):
    with pytest.raises(ConfigError, match='hidden_size'): run_line(*WORDS, 'model.hiden_size=3')
    with pytest.raises(ConfigError, match='no file'): run_line(*WORDS, 'data.path=/nowhere', f'root={tmp_path}')
    with pytest.raises(ConfigError, match='num_heads'): run_line(*WORDS, 'model.num_heads=5', f'data.path={text}', f'root={tmp_path}')
