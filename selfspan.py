"""Run any command line of the project: the console command `selfspan`.

selfspan generate checkpoints/arithmetic-tiny "((51+75)-(95*3))"
selfspan data arithmetic --num-examples 1000 --out corpora/arithmetic
selfspan train arithmetic-tiny --run-dir runs/tiny
"""

import importlib
import importlib.metadata
import importlib.util
import sys
from pathlib import Path

# The module of each command, which alone knows its options, and what `selfspan --help` says of it.
COMMANDS = {
    "generate": ("decode", "Decode a response to a prompt, and show each step with what it read."),
    "eval": ("decode", "Decode examples of a task, score the responses, and count right answers per second."),
    "bench": ("decode", "Time decode steps against the bytes that they must move."),
    "serve": ("decode", "Serve a model over HTTP: OpenAI's API, metrics, and a page on which steps appear with what they read."),
    "train": ("train", "Train a model, or fine-tune a pretrained one."),
    "data": ("data.__main__", "Write a corpus."),
}


def put_first_on_path() -> None:
    """Let `train`, `decode`, `benchmarks` and `data` be ours, whatever PYTHONPATH leads to."""
    library = importlib.util.find_spec("selfspan_jax")
    assert library is not None and library.origin is not None
    sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(library.origin).parents[1])]


def main() -> None:
    """Run the command that the command line names; its module parses the options."""
    put_first_on_path()
    import data.interrupts  # noqa: F401  # before what takes seconds
    from data import commandline

    sys.argv[0] = "selfspan"
    if sys.argv[1:] == ["--version"]:
        print("selfspan", importlib.metadata.version("selfspan"))
        return
    with commandline.exit_on_user_error():
        summaries = {name: summary for name, (_, summary) in COMMANDS.items()}
        name, words = commandline.choose(summaries, __doc__ or "")
    module, _ = COMMANDS[name]
    if module != "decode":  # which has several commands, and reads the name again
        sys.argv = [f"selfspan {name}", *words]
    importlib.import_module(module).main()


if __name__ == "__main__":
    main()
