"""A config with changes on the command line, for a command that also has other flags."""

import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags
from ml_collections import config_flags

from jaxrobust.runtime.commandline import arguments

if TYPE_CHECKING:  # imports JAX, which reads the environment that `target.prepare` sets
    from jaxrobust.config import Config


def divided(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split words into those of the command itself, and those that change the config.

    >>> divided(["quickstart", "--config.train.epochs=2", "--on", "cpu", "--config.seed", "1"])
    (['quickstart', '--on', 'cpu'], ['--config.train.epochs=2', '--config.seed', '1'])
    """
    remaining, command_words, changes = list(words), [], []
    while remaining:
        word = remaining.pop(0)
        if re.match(r"--?config(=|$)", word):
            arguments.stop("give the config as the first argument, without --config", 2)
        if not re.match(r"--?(no)?config\.", word):
            command_words.append(word)
            continue
        changes.append(word)
        if "=" not in word and remaining and not re.match(r"--?[A-Za-z]", remaining[0]):
            changes.append(remaining.pop(0))
    return command_words, changes


def configured(file: str, changes: Sequence[str]) -> "Config":
    """Read a config, `FILE[:ARGUMENTS]`, with changes, as `jaxrobust train` does, and unlock it.

    A mistake ends the process. Call this only once: absl reads the keys from `sys.argv`, which is
    overwritten.
    """
    if "config" not in flags.FLAGS:
        config_flags.DEFINE_config_file("config", lock_config=True)
    sys.argv[1:] = [f"--config={file}", *changes]
    arguments.parse(sys.argv)
    config: Any = flags.FLAGS["config"].value
    return config.unlock()
