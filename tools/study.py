"""Run a study notebook's code with plain Python and save its results, on a machine that has PyTorch and no Jupyter.

    python tools/study.py nbs/studies/NAME.ipynb [RESULT ...]     # no RESULT: all of them

Cells run in order, hidden ones too; line magics are skipped. A cell that fails is reported and the rest goes on, so that
a check which does not hold costs no result. Results go to nbs/results (or PLASTICITY_RESULTS).
"""
import json, linecache, os, sys, time, traceback
from pathlib import Path

def cells(path):
    "(name, source) of a notebook's code cells; under these names `inspect` finds the sources"
    for cell in json.loads(Path(path).read_text())['cells']:
        if cell['cell_type'] != 'code': continue
        source = ''.join(line for line in cell['source'] if not line.lstrip().startswith(('%', '!')))
        name = f"<{Path(path).stem} {cell['id']}>"
        linecache.cache[name] = len(source), None, source.splitlines(keepends=True), name
        yield name, source

def main(path, *names):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    os.environ['PLASTICITY_RUN'] = ','.join(names) or 'all'
    os.environ.setdefault('MPLBACKEND', 'agg')
    space, failed = sys.modules['__main__'].__dict__, 0
    for name, source in list(cells(path)):
        t = time.perf_counter()
        try: exec(compile(source, name, 'exec'), space)
        except Exception: failed += 1; traceback.print_exc()
        if time.perf_counter() - t > 1: print(f"{name}: {time.perf_counter() - t:.1f} s", flush=True)
    return failed

if __name__ == '__main__':
    if len(sys.argv) < 2: sys.exit(__doc__)
    sys.exit(1 if main(*sys.argv[1:]) else 0)
