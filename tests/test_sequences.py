"Random sequences of edits and training steps: PLASTICITY_EXAMPLES=1000 runs more of them"
import os
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from sequences import MODELS, MOVES, OPT, Elsewhere, sequence

EXAMPLES, SEEN = int(os.environ.get('PLASTICITY_EXAMPLES', 10)), Counter()

@pytest.fixture(scope='module')
def elsewhere(tmp_path_factory):
    with Elsewhere(tmp_path_factory.mktemp('records')) as e: yield e

@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(list(MODELS)), st.sampled_from(list(OPT)), st.integers(0, 10**6),
       st.lists(st.sampled_from(MOVES), min_size=1, max_size=8))
def test_sequences(elsewhere, name, opt, seed, moves): sequence(elsewhere, name, opt, seed, moves, SEEN)

def test_every_kind_of_edit_is_done(elsewhere):
    sequence(elsewhere, 'dense', 'adam', 4, MOVES, seen := Counter())
    assert set(seen) >= {'copy', 'zero', 'clone', 'prune', 'reset', 'deepen'}, seen
