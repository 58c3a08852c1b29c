"""Flags and configs as people write them, and mistakes in them as one sentence."""

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

# In a wheel the recipes are inside of the package, in a checkout next to it.
_PACKAGE = Path(__file__).resolve().parents[2]
RECIPES = next(p for p in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if p.is_dir())

program: str | None = None  # what people typed, if it is not the file that runs: jaxrobust import

KEYS = "jaxrobust/config.py lists the keys"  # the end of a message about a config
CONFIG_HELP = "Config: FILE or FILE:ARGUMENTS; --config.KEY=VALUE changes one of its keys."

flags.disclaim_key_flags()  # the flags below are in the --help of the command that asks for them


def quiet_libraries() -> None:
    """Keep Orbax and Grain from logging 30 lines a checkpoint, unless --verbosity is given.

    Both log through absl. JAX does not, whose warnings (no plug-in for an accelerator) stay.
    """
    if not flags.FLAGS["verbosity"].present:
        logging.getLogger().setLevel(logging.WARNING)
        absl_logging.get_absl_logger().setLevel(logging.CRITICAL)
        # Of a checkpoint that does not fit, each array's own traceback next to the error.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def stop(message: object, code: int) -> NoReturn:
    """End the process with a sentence on stderr."""
    patience.end()
    show(message)
    sys.exit(code)


def show(message: object) -> None:
    """Print a sentence on stderr, as wide as the terminal."""
    terminal.tell(terminal.fitted(f"jaxrobust: {message}", terminal.width(sys.stderr)))


@contextlib.contextmanager
def ending(interrupted: str, solved: str = "") -> Iterator[None]:
    """End with a sentence where what is done inside fails: 2 for a wrong input, 130 for Ctrl-C,

    and 3, with `solved` after the sentence, for a file that cannot be read or written.
    """
    try:
        yield
    except KeyboardInterrupt:
        stop(f"interrupted; {interrupted}", 130)
    except ValueError as error:
        stop(functions.of_users(error) or error, 2)
    except BrokenPipeError:  # of stdout, whose reader is gone
        raise
    except (OSError, MemoryError) as error:
        stop(f"{unable(error)}{solved}", 3)
    except Exception as error:
        if users := functions.of_users(error):
            stop(users, 2)
        raise


def unable(error: OSError | MemoryError) -> str:
    """Return the sentence for what this machine has no memory, no disk or no network for."""
    if isinstance(error, OSError):
        named = error.filename and error.strerror and not isinstance(error, DiskFull)
        return f"{error.filename}: {error.strerror}" if named else str(error)  # without the number
    wanted = str(error).partition(" for an array")[0] or "it is not said how much was wanted"
    return f"the memory of this machine is too small ({wanted}); take smaller images, or fewer"


def answer(run: Callable[[Any], Any], args: Any, interrupted: str) -> Any:
    """Run a command, print what it returns if --json asks for it, and return it too.

    It fails as `ending` says.
    """
    with ending(interrupted):
        done = run(args)
    if args.json:
        print(json.dumps(done))
    return done


def number(flag: str, text: str) -> float:
    """Read a flag that is written as a number or a fraction (`4/255`)."""
    try:
        return _fraction(text) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(
            f"--{flag}={text} is not a number; write one, or a fraction such as 4/255"
        ) from error


def how_many(flag: str, text: str | int) -> int:
    """Read a number of images, where `all` is a word; 0: all of them."""
    if text == "all":
        return 0
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise ValueError(f"--{flag}={text} is not a number of images: 1 or more, or --{flag}=all")
    return count


def mapping(flag: str, text: str | None) -> dict[str, Any] | None:
    """Read a flag that is written as a dict, Python's or JSON's; None: it is not given."""
    if text is None:
        return None
    value = _literal(text)
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return value
    raise ValueError(f"--{flag}={text} is not a dict; write one such as \"{{'dims': (32, 64)}}\"")


def check_once(
    argv: Sequence[str], more: Sequence[str] = (), *, several: Container[str] = ()
) -> None:
    """Stop where a flag or one of `more` is given twice, unless it takes `several` values."""
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
    """Prints the usual flags, or all of them for `--help-all`, and ends."""

    def __call__(self, parser: Any, namespace: Any, values: Any, typed: Any = None) -> None:
        print(parser.page("" if typed in help_page.ALL else parser.usual))
        parser.exit()


class Arguments(argparse.ArgumentParser):
    """argparse with both spellings of a flag, each of them once, and mistakes as one sentence.

    `usual`: the flags that `--help` shows, where they are more than a screen; empty: all.
    """

    def __init__(self, doc: str, *, usual: str = "", **options: Any) -> None:
        about = {"prog": program, "description": doc, "allow_abbrev": False, "add_help": False}
        super().__init__(**(about | options))
        self.usual = usual
        spellings = sorted(help_page.USUAL | help_page.ALL)
        self.add_argument(*spellings, nargs=0, action=_Help, dest="help", default=argparse.SUPPRESS)

    def page(self, usual: str) -> str:
        """Write usage, document and flags."""
        words = [action for action in self._actions if not action.option_strings]
        wanted = [action for action in self._actions if action.option_strings and action.required]
        usage = [help_page.word(action) for action in words]
        usage += [f"--{one.dest} {one.metavar or one.dest.upper()}" for one in wanted]
        text = self.usage or " ".join(["%(prog)s", *usage, "[flags]"])
        head = f"usage: {text % {'prog': self.prog}}\n\n{self.description}"
        return help_page.page(head, help_page.of_argparse(self), usual=usual)

    def format_help(self) -> str:
        """Write the help with all flags."""
        return self.page("")

    def flag(self, name: str, **options: Any) -> None:
        """Add a flag, such as `image_size`, that is also written `image-size`."""
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        self.add_argument(*spellings, dest=name, **options)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse; stop with one sentence and exit code 2 where that cannot be."""
        check_once(sys.argv[1:] if args is None else args)
        launch.without_tpu()
        patience.end()  # of loading, which is over
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Stop with one sentence."""
        if unknown := re.match(r"unrecognized arguments: (\S+)", message):
            word = unknown[1].partition("=")[0]
            names = [n.lstrip("-") for action in self._actions for n in action.option_strings]
            near = difflib.get_close_matches(word[2:], names, 1) if word.startswith("--") else []
            message = _no_flag(word, [f"--{name}" for name in near])
        stop(message, 2)


def _no_flag(word: str, near: Sequence[str]) -> str:
    meant = f"; did you mean {' or '.join(near)}?" if near else ";"
    return f"{word} is not a flag{meant} --help-all lists them"


def run(
    main: Callable[[list[str]], None],
    doc: str | None,
    *,
    usual: str,
    hint: str = KEYS,
    groups: Mapping[str, str] = help_page.GROUPS,
    describe: Callable[[], None] = lambda: None,
) -> None:
    """Run a command that has absl's flags, or print its help.

    Args:
      usual: the flags that `--help` shows.
      hint: the end of a message about a flag that is not known.
      groups: the titles and flags of `--help-all`.
      describe: what is to be looked up for `--help-all` alone.
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
    """Parse absl's flags, with mistakes as one sentence, hyphens, and fractions such as 4/255.

    A dict changes the keys of a section that it names, `--config.model.options.KEY` any field.
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
        if at is not None:  # the file that --config means takes its place in the words
            name, _, value = words[at].partition("=")
            last = at + (1 if value or at + 1 == len(words) else 2)
            path, config_arguments = split_config(value or "".join(words[at + 1 : last]))
            file = f"{path}:{config_arguments}" if config_arguments else path
            words[at:last] = [f"{name}={file}"]
            _find_neighbours(path)
        argv[1:] = words  # the same list as sys.argv, where config_flags looks for the keys
        defined.set_gnu_getopt()  # a target may stand before flags
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
    except BrokenPipeError:  # of stdout, whose reader is gone
        raise
    except Exception as error:
        stop(_reason(error, path, hint), 2)


def split_config(text: str) -> tuple[Path, str]:
    """Split a config that is written `FILE[:ARGUMENTS]`."""
    file, _, arguments = text.partition(":")
    return config_file(file), arguments


def load_config(text: str) -> Any:
    """Call `get_config` of a config, `FILE[:ARGUMENTS]`; return the config unlocked."""
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
    """Let a config import its neighbours, by one name or the other."""
    sys.path += [str(path.resolve().parent), str(path.resolve().parent.parent)]


def config_name(text: str) -> str:
    """Name a config for names of files: by its own name and its arguments."""
    path, arguments = split_config(text)
    return run_name(f"{path}:{arguments}")


def run_name(text: str) -> str:
    """Name the folder of a run by its config, which need not be there.

    >>> run_name("configs/revisiting_at.py:vit_s_cvst,epochs=300")
    'revisiting_at-vit_s_cvst-epochs=300'
    """
    file, _, arguments = text.partition(":")
    return "-".join([Path(file).stem, *re.findall(r"[\w.=]+", arguments)])


class NoConfigError(ValueError):
    """There is no such config, in one sentence."""


def config_file(text: str) -> Path:
    """Find the file of a config: the one of that name, else the recipe of the package."""
    recipes = {path.stem: path for path in sorted(RECIPES.glob("[a-z]*.py"))}
    path, name = Path(text), text.removeprefix("configs/").removesuffix(".py")
    if path.is_file():
        return path
    python_file = path if path.suffix == ".py" else Path(f"{text}.py")
    if name in recipes:
        if python_file.is_file() and not python_file.samefile(recipes[name]):
            raise NoConfigError(
                f"{text} is a recipe of the package, and {python_file} is here too; write "
                f"configs/{name}.py for the recipe, or {python_file}"
            )
        return recipes[name]
    if text and path.is_dir():
        raise NoConfigError(
            f"{text} is a folder; name a config such as birds.py, or repeat the command that began "
            "the run"
        )
    if not text:
        raise NoConfigError(f"no config is named; {meant(name, recipes, give='give a file, or ')}")
    near = folders.similar(path) or f"; {meant(name, recipes, give='give one, or ')}"
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
        reason = re.findall(r"\w+Error: .*", message)[-1]  # the end of the traceback in it
    if re.search(r"get_config\(\) takes 0 positional arguments", reason):
        return f"{path} takes no arguments; leave out what follows the colon"
    if reason.startswith("ArgumentError: "):
        return f"{path}: {reason.partition(': ')[2]}"
    if typo := re.search(r'Did you mean "(.+?)" instead of "(.+?)"', message):
        reason = message = f"unknown config key {typo[2]!r}; did you mean {typo[1]!r}?"
    elif gone := [old for old in MOVED if re.search(rf"['\"]{old.split('.')[-1]}['\"]", message)]:
        reason = message = f"there is no config.{gone[0]} any more; write config.{MOVED[gone[0]]}"
    elif isinstance(error, (KeyError, AttributeError)):
        message = f"unknown config key {message.strip(chr(34))}"
    places = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)]
    places += re.findall(r'File "(.+?)", line (\d+)', str(error))
    lines = [line for file, line in places if Path(file).absolute() == path.absolute()]
    return f"{path}, line {lines[-1]}: {reason}" if lines else f"{message} ({hint})"


_FLAG = re.compile(r"--?([A-Za-z][\w.-]*)(?:=(.*))?", re.DOTALL)
# One value, or one of each norm.
_SEVERAL = ("config.attack.norm", "config.attack.epsilon", "config.attack.step_size")
# Sections that take keys which are not there yet.
_OPEN = re.compile(r"config\.(model\.options|\w+\.changes)\.")


def _underscores(word: str) -> str:
    """Write a flag that has hyphens as absl knows it; other words stay as they are."""
    match = _FLAG.fullmatch(word)
    if not match or match[1].startswith("config."):
        return word
    start, end = match.span(1)
    return word[:start] + match[1].replace("-", "_") + word[end:]


def _changes(words: list[str]) -> tuple[list[str], list[tuple[str, Any]]]:
    """Split words into absl's and the (dotted key, value) of changes of a config."""
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
            if name in _SEVERAL:  # with commas, and perhaps parentheses and quotes
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
    """Give the values of a tree of sections by their dotted keys."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        is_section = isinstance(value, Mapping)
        values |= flat(value, f"{prefix}{key}.") if is_section else {f"{prefix}{key}": value}
    return values


def _change(config: Any, keys: list[str], value: Any) -> None:
    """Set one key of a locked config; of a section that is open, also one that is not there yet."""
    is_open = _OPEN.match(".".join(["config", *keys]))
    place = keys[:2] if is_open else keys[:-1]
    section = config
    for key in place:
        section = section[key]
    if value is None and not is_open and not isinstance(section[keys[-1]], str | None):
        name = ".".join(["config", *keys])
        raise ValueError(f"--{name}=None: only keys of text can be unset; give a value")
    for key in reversed(keys[len(place) :]):
        value = {key: value}
    if is_open:
        with section.unlocked(), section.ignore_type():
            section.update(value)
        config.lock()
    else:
        section.update(value)


def _spell(config: Any) -> None:
    """Write names in a config as we do: its own, and those of phases with some of their own."""
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
