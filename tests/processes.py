"""Scripts in processes of their own that begin as forks of one that has imported what `train.py` imports: five seconds less for each."""

import atexit
import multiprocessing
import os
import runpy
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[1]


def _run(words, variables, num_devices, out, err):
    """Be `python WORDS` with these variables, on CPU devices; JAX is imported and knows no device yet."""
    import jax

    for number, name in ((1, out), (2, err)):
        with open(name, "wb", buffering=0) as file:
            os.dup2(file.fileno(), number)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)
    os.environ.update(variables)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", num_devices)
    # Processes share kept programs. JAX writes those in place: what another reads half written it compiles again, with a warning.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"jax\._src\.compiler")
    os.chdir(ROOT)
    sys.argv = [*words]
    status = None
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        status = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    atexit._run_exitfuncs()  # which `multiprocessing` leaves out
    sys.exit(status)


class Script:
    """What `subprocess.Popen` would be of `python WORDS`, its output kept in new files of a directory."""

    def __init__(self, words, directory, variables=(), num_devices=1):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["train", "tests.processes"])
        own = Path(tempfile.mkdtemp(dir=directory))
        self._files = [own / "out", own / "err"]
        self._process = context.Process(target=_run, args=([*words], dict(variables), num_devices, *map(str, self._files)))
        self._process.start()
        self.pid = self._process.pid
        self.kill = self._process.kill

    @property
    def returncode(self):
        """As of `Popen`: None while it runs, what `exit` was given, or minus the signal that ended it."""
        return self._process.exitcode

    def printed(self):
        """(standard output, standard error) so far."""
        return tuple(file.read_text() if file.exists() else "" for file in self._files)

    def communicate(self, timeout):
        """Wait for its end: (standard output, standard error)."""
        self._process.join(timeout)
        assert self.returncode is not None, self.printed()
        return self.printed()
