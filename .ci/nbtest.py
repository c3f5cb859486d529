"""Run every notebook in a forked process of its own: isolated, timed, killable; cells are skipped as nbdev_test does.

    nbtest.py [NB|FOLDER ...] [-j N] [--timeout SECONDS] [--flags "slow gpu"]

torch is imported once, in the parent, so a notebook costs little more than its own cells. Nothing that one notebook
changes (default dtype, environment, patches) reaches another, and one that hangs is killed and named.
"""
import argparse
import importlib
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import test_nb

PRELOAD = "torch._dynamo", "matplotlib.pyplot"            # what most notebooks import; must not start CUDA or threads


def arguments():
    "The command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", help="notebooks or folders; all of nbs by default")
    parser.add_argument("-j", "--jobs", type=int, default=os.cpu_count(), help="notebooks at a time")
    parser.add_argument("--timeout", type=float, default=120, help="seconds that one notebook may take")
    parser.add_argument("--flags", default="", help="test flags whose cells run too")
    return parser.parse_args()


def child(path, skip, force, root):
    "One notebook, in a process group of its own, so that what it starts ends with it."
    os.setpgrp()
    passed, _ = test_nb(path, skip_flags=skip, force_flags=force, basepath=root)
    sys.exit(0 if passed else 1)


def end(process):
    "Kill a child and all that it started."
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:                            # it has not come as far as setpgrp, or is gone
        process.kill()
    process.join()


def verdict(process, seconds, timeout):
    "None while the notebook runs within its time, else `ok` or what went wrong; the process has then ended."
    if process.is_alive():
        if seconds <= timeout:
            return None
        end(process)
        return f"TIMEOUT after {timeout:.0f}s"
    process.join()
    return "ok" if process.exitcode == 0 else f"FAILED (exit {process.exitcode})"


def run(paths, jobs, timeout, skip, force, root):
    "Run the notebooks, `jobs` at a time, with a line for each that ends; returns those that failed."
    fork, waiting, running, failed = multiprocessing.get_context("fork"), list(paths), {}, []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                path = waiting.pop(0)
                process = fork.Process(target=child, args=(path, skip, force, root))
                process.start()
                running[path] = process, time.monotonic()
            for path, (process, start) in list(running.items()):
                seconds = time.monotonic() - start
                if (said := verdict(process, seconds, timeout)) is None:
                    continue
                del running[path]
                if said != "ok":
                    failed.append(path)
                done = len(paths) - len(waiting) - len(running)
                print(f"[{done}/{len(paths)}] {seconds:6.1f}s {said} {os.path.relpath(path, root)}", flush=True)
            time.sleep(0.02)
    finally:
        for process, _ in running.values():
            end(process)
    return failed


def main():
    "Find the notebooks, run them, close with the count."
    args, config = arguments(), get_config()
    os.environ.setdefault("MPLBACKEND", "agg")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folders = [Path(path) for path in args.paths or [config.nbs_path]]
    if missing := [str(path) for path in folders if not path.exists()]:
        sys.exit(f"no such notebook or folder: {', '.join(missing)}")
    paths = [path.absolute() for folder in folders for path in sorted(nbglob(folder, as_path=True))]
    paths = [path for path in dict.fromkeys(paths) if not (path.parent / ".notest").exists()]
    for module in PRELOAD:
        importlib.import_module(module)
    start = time.monotonic()
    failed = run(paths, args.jobs, args.timeout, config.tst_flags.split(), args.flags.split(), config.config_path)
    print(f"notebooks took {time.monotonic() - start:.1f}s")
    print(f"{len(paths) - len(failed)} passed, {len(failed)} failed")
    sys.exit(1 if failed or not paths else 0)


if __name__ == "__main__":
    main()
