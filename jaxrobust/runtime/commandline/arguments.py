"""Parses flags and configs as users write them; a mistake becomes a one-sentence error."""

import argparse
import ast
import contextlib
import difflib
import functools
import json
import logging
import re
import runpy
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict

from jaxrobust.runtime.commandline import functions
from jaxrobust.runtime.commandline import help as help_page
from jaxrobust.runtime.files import folders
from jaxrobust.runtime.files.whole import DiskFull
from jaxrobust.runtime.processes import launch
from jaxrobust.runtime.text import patience, terminal
from jaxrobust.runtime.text.spelling import MOVED, dataset, meant, network, norm

# In a wheel the recipes are inside the package, in a checkout next to it.
_PACKAGE = Path(__file__).resolve().parents[2]
RECIPES = next(p for p in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if p.is_dir())

program: str | None = None  # what the user typed, if not the script's name

KEYS = "jaxrobust/config.py lists the keys"  # the end of an error about a config
CONFIG_HELP = "Config: FILE or FILE:ARGUMENTS; --config.KEY=VALUE changes one of its keys."

flags.disclaim_key_flags()  # each command's --help decides which of the flags below it shows


def quiet_libraries() -> None:
    """Stop Orbax and Grain from logging 30 lines per checkpoint, unless --verbosity is given.

    Both log through absl. JAX does not, so its warnings (no plug-in for an accelerator) remain.
    """
    if not flags.FLAGS["verbosity"].present:
        logging.getLogger().setLevel(logging.WARNING)
        absl_logging.get_absl_logger().setLevel(logging.CRITICAL)
        # Hides one traceback per array, logged next to the error, if a checkpoint does not fit.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def stop(message: object, code: int) -> NoReturn:
    """Exit the process with a sentence on stderr."""
    patience.end()
    show(message)
    sys.exit(code)


def show(message: object) -> None:
    """Print a sentence on stderr, wrapped to the terminal."""
    terminal.tell(terminal.fitted(f"jaxrobust: {message}", terminal.width(sys.stderr)))


@contextlib.contextmanager
def ending(interrupted: str, solved: str = "") -> Iterator[None]:
    """Exit with one sentence if the block fails.

    Codes: 2, a wrong input; 130, Ctrl-C; 3, a file cannot be read or written (`solved` follows).
    """
    try:
        yield
    except KeyboardInterrupt:
        stop(f"interrupted; {interrupted}", 130)
    except ValueError as error:
        stop(functions.of_users(error) or error, 2)
    except BrokenPipeError:  # of stdout, whose reader has exited
        raise
    except (OSError, MemoryError) as error:
        stop(f"{unable(error)}{solved}", 3)
    except Exception as error:
        if users := functions.of_users(error):
            stop(users, 2)
        raise


def unable(error: OSError | MemoryError) -> str:
    """Return the sentence for a lack of memory, disk or network on this machine."""
    if isinstance(error, OSError):
        has_file = error.filename and error.strerror and not isinstance(error, DiskFull)
        return (
            f"{error.filename}: {error.strerror}" if has_file else str(error)
        )  # without the errno
    wanted = str(error).partition(" for an array")[0] or "the amount is unknown"
    return f"this machine has too little memory ({wanted}); use smaller images, or fewer"


def answer(run: Callable[[Any], Any], args: Any, interrupted: str) -> Any:
    """Run a command and return its result; with --json, also print it.

    Failures are handled by `ending`.
    """
    with ending(interrupted):
        done = run(args)
    if args.json:
        print(terminal.fitted(json.dumps(done), None))
    return done


def number(flag: str, text: str) -> float:
    """Parse a flag that is a number or a fraction (`4/255`)."""
    try:
        return _fraction(text) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(
            f"--{flag}={text} is not a number; write one, or a fraction such as 4/255"
        ) from error


def how_many(flag: str, text: str | int) -> int:
    """Parse a number of images, or the word `all`; 0 means all."""
    if text == "all":
        return 0
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise ValueError(f"--{flag}={text} is not a number of images; give 1 or more, or all")
    return count


def mapping(flag: str, text: str | None) -> dict[str, Any] | None:
    """Parse a flag that is a Python or JSON dict; None: not given."""
    if text is None:
        return None
    value = _literal(text)
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return value
    raise ValueError(f"--{flag}={text} is not a dict; write one such as \"{{'dims': (32, 64)}}\"")


def check_once(
    argv: Sequence[str], more: Sequence[str] = (), *, several: Container[str] = ()
) -> None:
    """Exit with an error if a flag or one of `more` repeats, unless it takes `several` values."""
    names = []
    for match in filter(None, (_FLAG.fullmatch(str(word)) for word in argv)):
        name = match[1].replace("-", "_")
        other = name.removeprefix("no")
        is_negated = name not in flags.FLAGS and (other in flags.FLAGS or "." in other)
        names.append(other if is_negated else name)
    for name, count in Counter([*names, *more]).items():
        if count > 1 and name not in several:
            stop(f"--{name} is given more than once; give it once", 2)


class _Help(argparse.Action):
    """Prints the usual flags, or all of them for `--help-all`, and exits."""

    def __call__(self, parser: Any, namespace: Any, values: Any, typed: Any = None) -> None:
        print(parser.page("" if typed in help_page.ALL else parser.usual))
        parser.exit()


class Arguments(argparse.ArgumentParser):
    """argparse with both spellings of each flag, no repeated flags, and one-sentence errors.

    `usual`: the flags that `--help` shows if all of them do not fit on a screen; empty: all.
    """

    def __init__(self, doc: str, *, usual: str = "", **options: Any) -> None:
        about = {"prog": program, "description": doc, "allow_abbrev": False, "add_help": False}
        super().__init__(**(about | options))
        self.usual = usual
        spellings = sorted(help_page.USUAL | help_page.ALL)
        self.add_argument(*spellings, nargs=0, action=_Help, dest="help", default=argparse.SUPPRESS)

    def page(self, usual: str) -> str:
        """Format usage, description and flags."""
        words = [action for action in self._actions if not action.option_strings]
        wanted = [action for action in self._actions if action.option_strings and action.required]
        usage = [help_page.word(action) for action in words]
        usage += [f"--{one.dest} {one.metavar or one.dest.upper()}" for one in wanted]
        text = self.usage or " ".join(["%(prog)s", *usage, "[flags]"])
        head = f"usage: {text % {'prog': self.prog}}\n\n{self.description}"
        return help_page.page(head, help_page.of_argparse(self), usual=usual)

    def format_help(self) -> str:
        """Format the help with all flags."""
        return self.page("")

    def flag(self, name: str, **options: Any) -> None:
        """Add a flag such as `image_size`, which may also be spelled `image-size`."""
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        self.add_argument(*spellings, dest=name, **options)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the arguments; on an error, exit with one sentence and code 2."""
        check_once(sys.argv[1:] if args is None else args)
        launch.without_tpu()
        patience.end()  # loading is over
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Exit with one sentence."""
        if unknown := re.match(r"unrecognized arguments: (\S+)", message):
            word = unknown[1].partition("=")[0]
            names = [n.lstrip("-") for action in self._actions for n in action.option_strings]
            near = difflib.get_close_matches(word[2:], names, 1) if word.startswith("--") else []
            message = _no_flag(word, [f"--{name}" for name in near])
        stop(message, 2)


def config_first() -> None:
    """Turn a first word that is not a flag into --config."""
    first, *others = sys.argv[1:] or ["-"]
    if first.startswith("-"):
        return
    for word in {"--config", "-config"} & {other.partition("=")[0] for other in others}:
        stop(f"{first} and {word} both name the config; leave {word} out", 2)
    sys.argv[1] = f"--config={first}"


def _no_flag(word: str, near: Sequence[str]) -> str:
    meant = f"; did you mean {' or '.join(near)}?" if near else ";"
    return f"{word} is not a flag{meant} --help-all lists all flags"


def run(
    main: Callable[[list[str]], None],
    doc: str | None,
    *,
    usual: str,
    hint: str = KEYS,
    groups: Mapping[str, str] = help_page.GROUPS,
    describe: Callable[[], None] = lambda: None,
) -> None:
    """Run a command that uses absl's flags, or print its help.

    Args:
      usual: the flags that `--help` shows.
      hint: the end of an error about an unknown flag.
      groups: the titles and flags of `--help-all`.
      describe: what to look up only for `--help-all`.
    """
    asked = {*sys.argv[1:]} & (help_page.USUAL | help_page.ALL)
    if not asked:
        app.run(main, flags_parser=functools.partial(parse, hint=hint))
        return
    if asked & help_page.ALL:
        describe()
        usual = ""
    names = [flag.name for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0])]
    print(help_page.page(doc or "", help_page.of_absl(names), usual=usual, groups=groups))


def parse(argv: list[str], *, hint: str = KEYS) -> list[str]:
    """Parse absl's flags, allowing hyphens and fractions such as 4/255; errors are one sentence.

    A dict updates the section that it is assigned to; `--config.model.options.KEY` sets any field.
    """
    path = Path()
    try:
        defined = flags.FLAGS
        typed = defined.read_flags_from_files(argv[1:], force_gnu=False)
        words, changes = _changes([_underscores(word) for word in typed])
        several = {name for name in defined if isinstance(defined[name], flags.MultiFlag)}
        check_once(words, [key for key, _ in changes], several=several)
        for word in words:  # such as --workdir=$UNSET
            if re.fullmatch(r"--?[a-z_]+=", word):
                raise ValueError(f"{word} is empty; give a value, or leave it out")
        at = next((i for i, word in enumerate(words) if re.match(r"--?config(=|$)", word)), None)
        if at is not None:  # replace the value of --config by the file that it means
            name, _, value = words[at].partition("=")
            last = at + (1 if value or at + 1 == len(words) else 2)
            path, config_arguments = split_config(value or "".join(words[at + 1 : last]))
            file = f"{path}:{config_arguments}" if config_arguments else path
            words[at:last] = [f"{name}={file}"]
            _find_neighbours(path)
        argv[1:] = words  # in place, since config_flags looks for the keys in sys.argv
        defined.set_gnu_getopt()  # a target may precede flags
        positional = defined(argv)
        if path.name:
            config = defined["config"].value
            if not isinstance(config, ConfigDict):
                kind = type(config).__name__
                raise ValueError(f"get_config() of {path} returns a {kind}; return a ConfigDict")
            for key, value in changes:
                _change(config, key.split(".")[1:], value)
            _spell(config)
        return positional
    except BrokenPipeError:  # of stdout, whose reader has exited
        raise
    except Exception as error:
        stop(_reason(error, path, hint), 2)


def split_config(text: str) -> tuple[Path, str]:
    """Split a config written as `FILE[:ARGUMENTS]`."""
    file, _, arguments = text.partition(":")
    return config_file(file), arguments


def load_config(text: str) -> Any:
    """Call `get_config` of the config `FILE[:ARGUMENTS]`; return it unlocked."""
    path, arguments = split_config(text)
    _find_neighbours(path)
    try:
        get_config = runpy.run_path(str(path))["get_config"]
        config = get_config(*[arguments] * bool(arguments)).unlock()
        _spell(config)
        return config
    except Exception as error:
        raise ValueError(_reason(error, path, text)) from error


def _find_neighbours(path: Path) -> None:
    """Let a config import its neighbors, under either name."""
    sys.path += [str(path.resolve().parent), str(path.resolve().parent.parent)]


def config_name(text: str) -> str:
    """Return a config's file name and arguments as text for file names."""
    path, arguments = split_config(text)
    return run_name(f"{path}:{arguments}")


def run_name(text: str) -> str:
    """Return the folder name for runs of a config, which need not exist.

    >>> run_name("configs/revisiting_at.py:vit_s_cvst,epochs=300")
    'revisiting_at-vit_s_cvst-epochs=300'
    """
    file, _, arguments = text.partition(":")
    return "-".join([Path(file).stem, *re.findall(r"[\w.=]+", arguments)])


class NoConfigError(ValueError):
    """There is no such config; the message is one sentence."""


def config_file(text: str) -> Path:
    """Find a config: the file of that name, else the package's recipe."""
    recipes = {path.stem: path for path in sorted(RECIPES.glob("[a-z]*.py"))}
    path, name = Path(text), text.removeprefix("configs/").removesuffix(".py")
    if path.is_file():
        return path
    python_file = path if path.suffix == ".py" else Path(f"{text}.py")
    if name in recipes:
        if python_file.is_file() and not python_file.samefile(recipes[name]):
            raise NoConfigError(
                f"{text} is both a bundled recipe and a file here; write configs/{name}.py for "
                f"the recipe, or {python_file} for the file"
            )
        return recipes[name]
    if text and path.is_dir():
        config = python_file if python_file.is_file() else "a config such as birds.py"
        raise NoConfigError(
            f"{text} is a folder; name {config}, or repeat the command that began the run"
        )
    if not text:
        raise NoConfigError(f"no config given; {meant(name, recipes, give='give a file, or ')}")
    near = folders.similar(path) or f"; {meant(name, recipes, give='give a file, or ')}"
    raise NoConfigError(f"{text}: no such file{near}")


def _reason(error: Exception, path: Path, hint: str) -> str:
    message = " ".join(str(error).replace("\\n", " ").split())
    if isinstance(error, NoConfigError):
        return message
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: {error.msg}; correct the file"
    if isinstance(error, flags.UnrecognizedFlagError) and not error.flagname.startswith("config."):
        near = re.findall(r"Did you mean: (\w+)", message)
        return _no_flag(f"--{error.flagname}", [f"--{name}" for name in near])
    if number := re.match(
        r"flag (--\S+): (?:invalid literal|could not convert) .*(int|float)", message
    ):
        return f"{number[1]} is not a {'whole ' if number[2] == 'int' else ''}number"
    if "has no attribute 'get_config'" in message:
        return f"{path} defines no get_config(); see {RECIPES / 'quickstart.py'}"
    reason = f"{type(error).__name__}: {message}"
    if "Error whilst parsing config file" in message:
        reason = re.findall(r"\w+Error: .*", message)[-1]  # the end of the contained traceback
    if re.search(r"get_config\(\) takes 0 positional arguments", reason):
        return f"{path} takes no arguments; leave out what follows the colon"
    if reason.startswith("ArgumentError: "):
        return f"{path}: {reason.partition(': ')[2]}"
    if typo := re.search(r'Did you mean "(.+?)" instead of "(.+?)"', message):
        reason = message = f"unknown config key {typo[2]!r}; did you mean {typo[1]!r}?"
    elif gone := [old for old in MOVED if re.search(rf"['\"]{old.split('.')[-1]}['\"]", message)]:
        reason = message = f"config.{gone[0]} was removed; write config.{MOVED[gone[0]]}"
    elif isinstance(error, (KeyError, AttributeError)):
        message = f"unknown config key {message.strip(chr(34))}"
    places = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)]
    places += re.findall(r'File "(.+?)", line (\d+)', str(error))
    lines = [line for file, line in places if Path(file).absolute() == path.absolute()]
    return f"{path}, line {lines[-1]}: {reason}" if lines else f"{message} ({hint})"


_FLAG = re.compile(r"--?([A-Za-z][\w.-]*)(?:=(.*))?", re.DOTALL)
# A single value, or one per norm.
_SEVERAL = ("config.attack.norm", "config.attack.epsilon", "config.attack.step_size")
# Sections that accept new keys.
_OPEN = re.compile(r"config\.(model\.options|\w+\.changes)\.")


def _underscores(word: str) -> str:
    """Replace the hyphens of a flag by underscores, for absl; leave other words alone."""
    match = _FLAG.fullmatch(word)
    if not match or match[1].startswith("config."):
        return word
    start, end = match.span(1)
    return word[:start] + match[1].replace("-", "_") + word[end:]


def _changes(words: list[str]) -> tuple[list[str], list[tuple[str, Any]]]:
    """Split words into absl's and the config changes, as (dotted key, value)."""
    words, others = list(words), []
    changes: list[tuple[str, Any]] = []
    while words:
        word = words.pop(0)
        match = _FLAG.fullmatch(word)
        if not (match and match[1].startswith("config.")):
            others.append(word)
            continue
        name, value = match.groups()
        if value is None and words and not _FLAG.fullmatch(words[0]):
            value = words.pop(0)
        if value is None:  # a boolean
            others.append(word)
        elif value == "None":
            changes.append((name, None))
        elif value.lstrip().startswith("{"):
            changes += flat(mapping(name, value) or {}, f"{name}.").items()
        elif _OPEN.match(name) or (name in _SEVERAL and "," in value):
            if name in _SEVERAL:  # comma-separated, perhaps with parentheses and quotes
                parts = value.strip().removeprefix("(").removesuffix(")").split(",")
                changes.append((name, tuple(_value(p.strip()) for p in parts if p.strip())))
            else:
                changes.append((name, _value(value)))
        else:
            others.append(f"--{name}={_as_number(value)}")
    return others, changes


def _value(text: str) -> Any:
    return _literal(_as_number(text))


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a tree of sections into values by dotted key."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        is_section = isinstance(value, Mapping)
        values |= flat(value, f"{prefix}{key}.") if is_section else {f"{prefix}{key}": value}
    return values


def _change(config: Any, keys: list[str], value: Any) -> None:
    """Set one key of a locked config; open sections also accept new keys."""
    is_open = _OPEN.match(".".join(["config", *keys]))
    place = keys[:2] if is_open else keys[:-1]
    section = config
    for key in place:
        section = section[key]
    if value is None and not is_open and not isinstance(section[keys[-1]], str | None):
        name = ".".join(["config", *keys])
        raise ValueError(f"--{name}=None: only text keys can be unset; give a value")
    for key in reversed(keys[len(place) :]):
        value = {key: value}
    if is_open:
        with section.unlocked(), section.ignore_type():
            section.update(value)
        config.lock()
    else:
        section.update(value)


def _spell(config: Any) -> None:
    """Normalize the names in a config, and those that its phases override."""
    names = (("attack", "norm", norm), ("model", "name", network), ("data", "name", dataset))
    sections = (value for value in config.values() if isinstance(value, ConfigDict))
    for section in (config, *(value.get("changes") for value in sections)):
        for part, key, spelled in names:
            values = section.get(part) if isinstance(section, ConfigDict) else None
            if not isinstance(values, ConfigDict):
                continue
            written = values.get(key)
            if isinstance(written, str):
                values[key] = spelled(written)
            elif isinstance(written, list | tuple):  # several norms
                values[key] = tuple(map(spelled, written))


def _literal(text: str) -> Any:
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return read(text.strip())
    return text


_FRACTION = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)\s*/\s*(\d+\.?\d*|\.\d+)\s*")


def _as_number(text: str) -> str:
    with contextlib.suppress(ZeroDivisionError):
        return str(_fraction(text)) if _FRACTION.fullmatch(text) else text
    return text


def _fraction(text: str) -> float:
    over, under = map(float, text.split("/"))
    return over / under
