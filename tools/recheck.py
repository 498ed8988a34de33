"""Run stale results in miniature, with the source of then and with that of now, and note those whose numbers are the same.

    python tools/recheck.py [NAME ...] [--against COMMIT] [--dry]

NAME: results (all that are stale if there is none). COMMIT: where the result was current (that of its run if not given).
--dry: compare and write nothing. Both sources are committed ones, that of now is HEAD, unpacked in a temporary folder. The small
settings are those that the notebook says in a cell `SMALL = dict(RESULT=dict(...))`; what holds times only has none. A notebook's
cells run up to the results asked for: of the others only imports, functions, classes and plain assignments, no examples.
"""
import ast, json, os, re, subprocess, sys, tarfile, tempfile, time, traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'tools'))
from study import cells

def git(*args): return subprocess.run(['git', '-C', str(ROOT), *args], capture_output=True, check=True).stdout

def small_settings(notebook):
    "result -> settings that differ, as the notebook's cell with `SMALL` says, which needs nothing else"
    space = dict(__builtins__=dict(dict=dict))
    for name, source in cells(notebook):
        if re.search(r'^SMALL = ', source, re.M): exec(compile(source, name, 'exec'), space)
    return space.get('SMALL', {})

def unpacked(commit, folder):
    "The source at a commit"
    tree = Path(folder)/commit
    if not tree.exists():
        with tempfile.TemporaryFile() as f:
            f.write(git('archive', commit)); f.seek(0)
            with tarfile.open(fileobj=f) as tar: tar.extractall(tree, filter='data')
    return tree

# %% in the process that runs a source
def is_definition(n):
    "Whether a statement only says what something is"
    if isinstance(n, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)): return True
    calls = [c for c in ast.walk(n) if isinstance(c, ast.Call) and getattr(c.func, 'id', '') not in ('dict', 'tuple', 'range')]
    return isinstance(n, ast.Assign) and (not calls or all(getattr(t, 'id', '').isupper() for t in n.targets))

def play(notebook, jobs, to):
    "Small runs of results (name -> settings, dependencies) of one notebook, as files of them would hold them"
    from plasticity import results
    if not Path(results.__file__).is_relative_to(Path.cwd()): sys.exit(f'{results.__file__} is not of {Path.cwd()}')
    space, made, done, defs = sys.modules['__main__'].__dict__, {}, {}, results._definitions(results._code(notebook))
    def small_run(fns, run=False, name=None, seed=0, device=None, **settings):
        fns = list(fns) if isinstance(fns, (list, tuple)) else [fns]
        name = name or fns[0].__name__
        if name not in jobs or name in done: return
        small, saved = jobs[name]
        depends = {k: h for k in saved if (h := results._now(k, defs))} | results.dependencies(*fns)
        key = fns[0].__name__, json.dumps(results._plain(settings | small), sort_keys=True)   # another seed, the same small run
        if key not in made: made[key] = results._execute(fns, name, seed, 'cpu', settings | small)
        done[name] = made[key] | dict(meta=made[key]['meta'] | dict(dependencies=depends))
        Path(to).write_text(json.dumps(done))
    for name, source in cells(notebook):
        if jobs.keys() <= done.keys(): continue
        body = ast.parse(source).body
        if source.startswith('#| export'): body = [n for n in body if isinstance(n, (ast.Import, ast.ImportFrom))] # the module has the rest
        for n in filter(is_definition, body):
            try: exec(compile(ast.Module([n], []), name, 'exec'), space)
            except (NameError, TypeError): pass # it needs what an example made
        space['saved_run'] = small_run
        for n in (c for m in body for c in ast.walk(m) if isinstance(c, ast.Call) and getattr(c.func, 'id', '') == 'saved_run'):
            try: exec(compile(ast.Expression(n), name, 'eval'), space)
            except Exception: traceback.print_exc()

def played(tree, notebook, jobs, folder):
    "The same in a process of its own with the source of `tree`; what failed is told"
    asked, out = Path(folder)/'jobs.json', Path(folder)/'out.json'
    asked.write_text(json.dumps(jobs)); out.write_text('{}')
    env = os.environ | dict(PYTHONPATH=f'{tree}:{ROOT/"tools"}', PLASTICITY_RESULTS=folder, OMP_NUM_THREADS='1', MPLBACKEND='agg',
                            CUDA_VISIBLE_DEVICES='')
    code = 'import json, recheck, sys; recheck.play(sys.argv[1], json.load(open(sys.argv[2])), sys.argv[3])'
    p = subprocess.run([sys.executable, '-c', code, notebook, asked, out], cwd=tree, env=env, capture_output=True, text=True)
    done = json.loads(out.read_text())
    if jobs.keys() - done.keys(): print(f'{notebook} at {tree.name}:\n{p.stderr[-3000:]}', flush=True)
    return done

# %% what is asked for
def short(commit):
    "A commit's short name, None if it is not in the repository"
    try: return git('rev-parse', '--short=10', '--verify', f'{commit}^{{commit}}').decode().strip()
    except subprocess.CalledProcessError: return None

def main(*names, against=None, dry=False):
    "Print a line for each result; how many could not be rechecked"
    os.chdir(ROOT); sys.path.insert(0, str(ROOT))
    from plasticity.results import recheck, results_folder, results_state
    rows = [r for r in results_state() if (r['name'] in names if names else r['state'] == 'stale')]
    if off := set(names) - {r['name'] for r in rows}: sys.exit(f"no result {', '.join(sorted(off))}")
    groups, left, here = {}, 0, short('HEAD')
    def say(name, text): print(f'{name:28} {text}', flush=True)
    for r in rows:
        notebook = next(p for p in sorted((ROOT/'nbs').rglob(r['notebook'])) if '.ipynb_checkpoints' not in p.parts).relative_to(ROOT)
        meta = json.loads((results_folder()/f"{r['name']}.json").read_text())['meta']
        small, then = small_settings(notebook).get(r['name']), short(against or meta['commit'].rstrip('+'))
        if small and then: groups.setdefault((then, str(notebook)), {})[r['name']] = small, list(meta['dependencies'])
        else:
            left, why = left + 1, 'its commit is not in this repository: say --against' if small else 'no small settings (times have none)'
            say(r['name'], f"stays {r['state']}: {why}")
    with tempfile.TemporaryDirectory() as folder:
        for (then, notebook), jobs in groups.items():
            t = time.perf_counter()
            old, new = (played(unpacked(c, folder), notebook, jobs, folder) for c in (then, here))
            for name, (small, _) in jobs.items():
                try:
                    if name not in old or name not in new: raise ValueError(f'{name}: could not be run')
                    recheck(name, old[name], new[name], here, then, small, dry)
                    took = [round(v[name]['meta']['seconds'], 1) for v in (old, new)]
                    say(name, f"{'the same' if dry else 'rechecked'}: {here} gives what {then} gave, in {took[1]} s and in {took[0]} s")
                except ValueError as e: left += 1; say(name, f"stays {'as it is' if dry else 'stale'}: {str(e).partition(': ')[2]}")
            print(f'    {notebook}: {time.perf_counter() - t:.0f} s', flush=True)
    return left

if __name__ == '__main__':
    import argparse
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('names', nargs='*', metavar='NAME')
    p.add_argument('--against', metavar='COMMIT')
    p.add_argument('--dry', action='store_true')
    a = p.parse_args()
    sys.exit(bool(main(*a.names, against=a.against, dry=a.dry)))
