"Small things that many tests use"
import os
import signal

import pytest
import torch

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler) # a job in the background is started with Ctrl-C ignored
os.environ.setdefault('MPLBACKEND', 'agg')

@pytest.fixture
def results(tmp_path, monkeypatch):
    "An empty folder for saved results"
    monkeypatch.setenv('PLASTICITY_RESULTS', str(tmp_path/'results'))
    return tmp_path/'results'
