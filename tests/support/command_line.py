"""Flags as `jaxrobust.main` reads them, and what it says where it does not."""

import contextlib
import io
import sys
import warnings
from unittest import mock

import jax
from absl import flags
from ml_collections import config_flags

from jaxrobust.runtime.commandline import arguments


def parsed(*words):
    """The flags of a command with these words, as `jaxrobust.main` defines them."""
    known = flags.FlagValues()
    sys.modules.pop("config_config", None)  # the module that ml_collections made of the last one
    config_flags.DEFINE_config_file("config", flag_values=known, lock_config=True)
    flags.DEFINE_string("norm", None, "", flag_values=known)
    flags.DEFINE_bool("multihost", False, "", flag_values=known)
    argv = ["main", *words]
    with (
        mock.patch.object(flags, "FLAGS", known),
        mock.patch.object(sys, "argv", argv),
        mock.patch.object(sys, "path", [*sys.path]),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", ".*load_module", DeprecationWarning)  # ml_collections'
        arguments.parse(argv)
    return known


def refused(call) -> str:
    """What a command that exits with 2 says."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            call()
        except SystemExit as stopped:
            assert stopped.code == 2, stopped.code
            return said.getvalue()
    raise AssertionError("it is not refused")


def called(command, *words) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command's `main`."""
    out, said = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(said),
        jax.numpy_dtype_promotion("standard"),  # as a user has it
    ):
        try:
            code = command.main([str(word) for word in words])
        except SystemExit as stopped:
            code = int(stopped.code or 0)
    return code, out.getvalue(), said.getvalue()
