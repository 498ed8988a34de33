"A command in a process of its own that does not start Python and import everything again: a fork of this one"
import os
import subprocess
import sys
import tempfile
import time
import traceback

def _enter(call, argv, cwd, files, encoding, errors):
    "What the child does; it never returns"
    code = 1
    try:
        for i, f in enumerate(files): os.dup2(f.fileno(), i)
        for i, name in enumerate(('stdin', 'stdout', 'stderr')):
            setattr(sys, name, open(i, 'w' if i else 'r', encoding=encoding, errors=errors, closefd=False)) # noqa: SIM115
        if cwd: os.chdir(cwd)
        sys.argv = [str(v) for v in argv]
        try: code = call() or 0
        except SystemExit as e: code = e.code if isinstance(e.code, int) else int(e.code is not None)
        except BaseException: traceback.print_exc()
        sys.stdout.flush(); sys.stderr.flush()
    finally: os._exit(code)

def forked(call, *argv, cwd=None, stdin=b'', encoding='utf-8', errors='strict', timeout=90):
    "Call a command's `main` in a fork with these `sys.argv` and standard streams; like `subprocess.run(..., capture_output=True)` on bytes"
    files = [tempfile.TemporaryFile() for _ in range(3)]  # noqa: SIM115
    files[0].write(stdin); files[0].seek(0)
    sys.stdout.flush(); sys.stderr.flush()
    pid = os.fork()
    if not pid: _enter(call, argv, cwd, files, encoding, errors)
    end = time.monotonic() + timeout
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > end: os.kill(pid, 9); os.waitpid(pid, 0); raise subprocess.TimeoutExpired(argv, timeout)
        time.sleep(.01)
    out = []
    for f in files[1:]: f.seek(0); out.append(f.read())
    for f in files: f.close()
    return subprocess.CompletedProcess(argv, os.waitstatus_to_exitcode(ended[1]), *out)
