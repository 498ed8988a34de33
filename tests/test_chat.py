"The chat: knobs, commands, undo, streams, interrupts, the command in a pipe"
import io, os, signal, subprocess, sys, time

import pytest
import torch
from hypothesis import given, settings, strategies as st

from plasticity.chat import Chat, main, open_chat, read_words
from plasticity.models import make_model
from plasticity.text import Bytes
from plasticity.transformer import save_language_model
from processes import forked

def chat(**options):
    from rich.console import Console
    m = make_model('gpt', 32, 256, seed=0, hidden_size=24, num_layers=2, num_heads=4, **options)
    return Chat(m, Bytes(), dict(data='noise', step=3), console=Console(file=io.StringIO(), width=120))

def said(c, *lines):
    c.console.file.seek(0); c.console.file.truncate()
    for line in lines: assert c.say(line)
    return c.console.file.getvalue()

def test_answers_are_what_generate_gives():
    from plasticity.generation import generate
    c = chat()
    out = said(c, 'temp=.7 length=30 top_p=1 seed=5', 'hello').split('\n', 1)[1]
    want = generate(c.model, 'hello', 30, Bytes(), temperature=.7, seed=5).rstrip('\ufffd')
    assert out == want + '\n' and c.text == 'hello' + want and c.knobs['seed'] == 6

def test_seed_repeats_and_goes_on():
    c = chat()
    a, b = said(c, 'seed=1', 'abc'), said(c, 'abc')
    assert said(c, 'seed=1', 'abc') == a and b not in a

def test_letters_of_several_tokens_are_whole():
    c = chat()
    out = said(c, 'temp=2 length=200', 'x')
    assert '\ufffd' not in out.splitlines()[-1][-1:]

def screen(text, width):
    "What a terminal of this width shows: lines, written letter by letter; it breaks what reaches past its end"
    lines, at = [''], 0
    for c in text:
        if c == '\n': lines.append(''); at = 0
        elif c == '\b': at = max(0, at - 1)
        else:
            if at == width: lines.append(''); at = 0
            lines[-1] = lines[-1][:at] + c + lines[-1][at + 1:]; at += 1
    return [line.rstrip() for line in lines]

@settings(max_examples=60, deadline=None)
@given(st.lists(st.text('abc \n', max_size=30), max_size=6), st.integers(4, 14))
def test_lines_are_broken_between_words(pieces, width):
    from rich.console import Console
    c = chat()
    c.console = Console(file=io.StringIO(), width=width, force_terminal=True)
    for piece in pieces: c.write(piece)
    got, text = screen(c.console.file.getvalue(), width), ''.join(pieces)
    assert ''.join(got).replace(' ', '') == ''.join(text.split()) and all(len(line) < width for line in got)
    if max(map(len, text.split()), default=0) < width: assert ' '.join(got).split() == text.split()

def test_wide_letters_and_pipes():
    from rich.console import Console
    c = chat()
    c.console = Console(file=io.StringIO(), width=9, force_terminal=True)
    c.write('日本語 a日本語')
    assert c.console.file.getvalue().replace('\b', '').replace(' ', '') == '日本語a\na日本語'
    c.console = Console(file=io.StringIO(), width=5)
    c.write('no line is broken'); c.tell('nor is this one')
    assert c.console.file.getvalue() == 'no line is brokennor is this one\n'

def test_help_says_what_is_off():
    out = said(chat(), 'top_p=1', 'help')
    assert 'top_k=0' in out and 'top_p=1 ' in out and 'None' not in out

def test_prune_heads_regrow_quantize_undo():
    c = chat()
    before = {k: v.clone() for k, v in c.model.state_dict().items()}
    out = said(c, 'hello', '/prune 0.1 1.3', '/heads', '/quantize 4', '/regrow 0.1', '/prune 2', '/regrow 1 fresh')
    assert 'pruned 0.1 1.3' in out and '· ' in out and '12%' in out and 'regrown 0.1' in out and 'as new' in out
    for _ in range(5): said(c, '/undo')
    assert all(torch.equal(v, before[k]) for k, v in c.model.state_dict().items())
    assert 'nothing' in said(c, '/undo') and 'no head' in said(c, '/regrow')

def test_weakest_leave_one_head_a_layer():
    c = chat()
    said(c, '/prune 99')
    assert c.model.heads == [1, 1] and said(c, 'hi')

def test_where_no_head_can_go_nothing_is_done():
    c = chat()
    said(c, '/prune 99', '/undo', '/prune 99')
    assert len(c.past) == 1 and 'no head can go' in said(c, '/prune') and len(c.past) == 1

def test_a_want_of_memory_costs_a_line(monkeypatch):
    c = chat()
    def broken(*args): raise RuntimeError('not enough memory')
    monkeypatch.setattr(c, 'answer', broken)
    assert 'memory' in said(c, 'hello')

@pytest.mark.parametrize('line', ['temp=hot', 'temp=-1', 'top_p=0', 'top_k=-3', 'length=0', 'length=1000000000000', 'tmep=1', '/prune x',
                                  '/prune 0.7', '/prune 9.0', '/regrow 0.0',
                                  '/nothing', '/prune 0', '/regrow 0', '/quantize a', '/quantize 1', '/save', '/quantize 1 2 3', '/'])
def test_mistakes_cost_a_line(line):
    c = chat()
    knobs, state = dict(c.knobs), {k: v.clone() for k, v in c.model.state_dict().items()}
    assert 0 < said(c, line).count('\n') <= 2 and c.knobs == knobs and not c.past
    assert all(torch.equal(v, state[k]) for k, v in c.model.state_dict().items())

def test_what_is_a_knob():
    assert read_words('temp=1 top_k=') == dict(temp='1', top_k='') and read_words('x == y') is None and read_words('') is None
    assert read_words('def f(x=3): return') is None

def test_stop_and_no_letters():
    from plasticity.text import Characters
    c = chat()
    free = said(c, 'seed=0 length=60', 'hello').split('\n', 1)[1]
    end = next(ch for ch in free[5:] if ch.isascii() and ch.isalnum())
    assert said(c, f'seed=0 stop={end}', 'hello').split('\n', 1)[1] == free[:free.find(end)] + '\n'
    c.tokenizer = Characters('xyz')
    assert 'vocabulary' in said(c, 'abc')

def test_interrupt_stops_the_answer_only(monkeypatch):
    c = chat()
    write = c.write
    def interrupted(text):
        write(text)
        if len(c.console.file.getvalue()) > 20: monkeypatch.setattr(c, 'write', write); raise KeyboardInterrupt
    monkeypatch.setattr(c, 'write', interrupted)
    assert '...' in said(c, 'hello there') and said(c, 'again')

def test_save_and_open(tmp_path):
    c = chat()
    said(c, '/prune 3', f'/save {tmp_path/"m"}')
    again = open_chat(tmp_path/'m', console=c.console)
    assert again.model.heads == c.model.heads and again.about['step'] == 3 and again.about['data'] == 'noise'
    again.introduce()
    assert 'noise' in c.console.file.getvalue() and '3 steps' in c.console.file.getvalue()

def test_wrong_folder(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith('plasticity-chat: ') and err.count('\n') == 1

def run_of(tmp_path):
    c = chat()
    save_language_model(tmp_path, c.model, Bytes().to_json(), c.about)
    return [sys.executable, '-m', 'plasticity.chat', str(tmp_path), '--device', 'cpu']

def test_in_a_pipe(tmp_path):
    done = forked(main, *run_of(tmp_path)[2:], stdin=b'length=5\nhello\n/heads\n/quit\nnever')
    assert done.returncode == 0 and b'layer  1' in done.stdout and b'never' not in done.stdout and b'Traceback' not in done.stderr
    assert b'\x1b[' not in done.stdout and b'> ' not in done.stdout

def test_bytes_that_are_no_letters_in_a_pipe(tmp_path):
    done = forked(main, *run_of(tmp_path)[2:], stdin=b'length=5\nh\xff\xfeo\n/heads\n', encoding='utf-8', errors='strict')
    assert done.returncode == 0 and b'layer  1' in done.stdout and b'Traceback' not in done.stderr

@pytest.mark.skipif(os.name != 'posix', reason='needs signals')
def test_ctrl_c_in_a_pipe(tmp_path):
    p = subprocess.Popen(run_of(tmp_path), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
    p.stdin.write(b'length=100000\nhello\n')
    seen = b''
    while seen.count(b'\n') < 5: seen += os.read(p.stdout.fileno(), 1000)
    time.sleep(.5); p.send_signal(signal.SIGINT)
    out, err = p.communicate(b'length=3\nafter\n', timeout=60)
    assert p.returncode == 0 and b' ...' in out and b'length=3' in out and b'Traceback' not in err

def test_interrupts_between_answers(monkeypatch):
    c, typed = chat(), iter(['/quantize 4', KeyboardInterrupt, '/heads', '/quit'])
    def lines(sign):
        line = next(typed)
        if line is KeyboardInterrupt: raise line
        return line
    monkeypatch.setattr('builtins.input', lines); monkeypatch.setattr('sys.stdin', type('Terminal', (), dict(isatty=lambda self: True))())
    monkeypatch.setattr('plasticity.chat.fake_quantize', lambda p, bits: (_ for _ in ()).throw(KeyboardInterrupt))
    c.talk()
    out = c.console.file.getvalue()
    assert 'stopped' in out and '/quit or Ctrl-D' in out and 'layer  1' in out and next(typed, None) is None

@pytest.mark.skipif(os.name != 'posix', reason='needs a pseudo-terminal')
def test_in_a_terminal(tmp_path):
    import fcntl, pty, select, termios
    ours, theirs = pty.openpty()
    p = subprocess.Popen(run_of(tmp_path), stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
                         env={**os.environ, 'TERM': 'xterm', 'COLUMNS': '60'}, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
    os.close(theirs)
    seen = b''
    end = time.time() + 120
    def more():
        nonlocal seen
        assert time.time() < end, seen
        if select.select([ours], [], [], 1)[0]: seen += os.read(ours, 1000)
    def until(what, start=0):
        while what not in seen[start:]: more()
        return seen.index(what, start) + len(what)
    at = until(b'> '); os.write(ours, b'length=100000\n'); at = until(b'> ', until(b'seed=0', at))  # earlier keys are the terminal's
    os.write(ours, b'hello\n'); at = until(b'\n', until(b'hello', at))
    while len(seen) < at + 20: more()
    os.write(ours, b'\x03'); at = until(b'> ', until(b' ...', at))
    os.write(ours, b'/heads\n'); at = until(b'> ', until(b'gone', at))
    os.write(ours, b'\x04')
    assert p.wait(30) == 0
    os.close(ours)
