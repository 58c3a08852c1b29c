"""Commands of `jaxrobust`, each in a process of its own that has imported everything already.

This file as a program reads lines [words, folder, settings] and answers each with a line
{"code", "out", "error"}. It knows nothing of `tests`, whose settings are not a user's, and
starts no threads: it forks.
"""

import atexit
import functools
import importlib
import io
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

_ROOT = Path(__file__).resolve().parents[2]
_IMPORTED = (
    *(
        "jaxrobust.training.run.run",
        "jaxrobust.evaluation.questions.command",
        "jaxrobust.models.table",
    ),
    *("jaxrobust.publish.import_torch", "jaxrobust.publish.export_torch"),
)


def foreign_flags(typed: str, error: str, help_text: str) -> set[str]:
    """Flags that a message names, and that its command lacks; those of others may be shown."""
    own = re.sub(r"`?(jaxrobust [a-z]+|tfds|gcsfuse) [^;`]*", "", error)  # another command
    named, known = (
        {word.replace("-", "_") for word in re.findall(r"(?<![\w-])--([a-z][\w-]*)", text)}
        for text in (own, f"{typed} {help_text} --help --help-all --multihost")
    )
    return named - known


class Answer(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    error: str


class Commands:
    """A process that runs commands one after the other."""

    def __init__(self) -> None:
        # As a user starts it: not with the settings of the tests.
        own = ("JAX_", "XLA_", "TFDS_")
        environment = {k: v for k, v in os.environ.items() if not k.startswith(own)}
        environment |= {"JAX_PLATFORMS": "cpu", "JAXROBUST_ALLOCATOR": "system"}
        environment["PYTHONPATH"] = str(_ROOT)
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__],  # not with the folder of this file, and its names
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, words: Sequence[str], folder: Path, settings: dict[str, str]) -> Answer:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps([list(words), str(folder), settings]) + "\n")
        self._process.stdin.flush()
        return Answer(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@functools.cache
def _running() -> Commands:
    """Start the process that runs the commands of all tests."""
    running = Commands()
    atexit.register(running.close)
    return running


def run_command(words: Sequence[str], folder: Path, **settings: str) -> Answer:
    """Run `jaxrobust *words`, or a program `tools/NAME.py`, with `settings` in the environment."""
    return _running()(words, folder, settings)


def _run(words: list[str], folder: str, settings: dict[str, str], out: Any, error: Any) -> int:
    """Run a command in this process, a fork, with its own standard files; return its code."""
    os.dup2(out.fileno(), 1)
    os.dup2(error.fileno(), 2)
    os.chdir(folder)
    os.environ.update(settings)
    sys.stdin = io.StringIO()
    from jaxrobust.__main__ import main

    program = words[0].endswith(".py") if words else False
    sys.argv = words if program else ["jaxrobust", *words]
    try:
        if program:
            runpy.run_path(words[0], run_name="__main__")
        else:
            main()
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else 1 if left.code else 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _answer(words: list[str], folder: str, settings: dict[str, str]) -> Answer:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as error:
        child = os.fork()
        if not child:
            code = 1
            try:
                code = _run(words, folder, settings, out, error)
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0)
        error.seek(0)
        return Answer(code, out.read(), error.read())


def _serve() -> None:
    for name in _IMPORTED:
        importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        answers.write(json.dumps(_answer(*json.loads(line))._asdict()) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
