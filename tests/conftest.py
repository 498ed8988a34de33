"Small things that many tests use"
import gc
import os
import signal
from types import SimpleNamespace

import pytest
import torch

torch.set_num_threads(1)
for kind in (torch.cuda, torch.xpu, torch.mtia): # where there is none, each seed would keep a printed stack: more than a millisecond
    if not kind.is_available() and hasattr(kind, 'traceback'): kind.traceback = SimpleNamespace(format_stack=list)
signal.signal(signal.SIGINT, signal.default_int_handler) # a job in the background is started with Ctrl-C ignored
os.environ.setdefault('MPLBACKEND', 'agg')

@pytest.fixture(scope='module', autouse=True)
def settled():
    "What was there before a file's tests is passed over by the garbage collector, and by whoever asks it for all objects"
    gc.collect(); gc.freeze()

@pytest.fixture
def results(tmp_path, monkeypatch):
    "An empty folder for saved results"
    monkeypatch.setenv('PLASTICITY_RESULTS', str(tmp_path/'results'))
    return tmp_path/'results'
