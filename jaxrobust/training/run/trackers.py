"""Where to view a run besides its workdir: TensorBoard and Weights & Biases.

A tracker receives the content of `metrics.jsonl`, and pictures. It cannot stop a run. Its methods,
all of which may raise anything: `begin(phase, start, earlier_steps, logged)` continues a phase
after its step `start` and discards what was logged for later steps; `logged`: the last step of each
scalar so far; `scalars(step, values)`; `image(step, name, PNG file)`; `close(ended=)`: whether the
run has finished.
"""

import importlib
import io
import json
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from jaxrobust.runtime.commandline import arguments
from jaxrobust.runtime.files import jsonl
from jaxrobust.runtime.text import raster
from jaxrobust.runtime.text.progress import say

_PATIENCE_S = 30  # for W&B to start a run, and to send the rest at the end
Draw = Callable[[Path, str], Mapping[str, str]]  # workdir, phase -> SVG files' texts by name


class _TensorBoard:
    """Event files under WORKDIR/tensorboard/PHASE, written in the caller's thread.

    tensorboardX's own `SummaryWriter` writes in another thread. On a full disk that thread dies,
    and its queue then blocks.
    """

    def __init__(self, workdir: Path, about: Mapping[str, Any]) -> None:
        self._folder, self._about = workdir / "tensorboard", arguments.flat(about)
        self._events: Any = None

    def begin(self, phase: str, start: int, earlier_steps: int, logged: Mapping[str, int]) -> None:
        """Start a file; readers forget what earlier files said about later steps."""
        from tensorboardX.event_file_writer import EventsWriter

        self.close(ended=False)
        folder = self._folder / phase
        folder.mkdir(parents=True, exist_ok=True)
        files = len(list(folder.iterdir()))  # names hold the second, and then this number
        self._events = EventsWriter(str(folder / "events"), f".{files:04d}")
        if files:
            self._write(start + 1, session_log={"status": 1})  # START
        for summary in self._hyperparameters():
            self._write(start, summary=summary)
        self._events.flush()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._write(step, [{"tag": name, "simple_value": v} for name, v in values.items()])
        self._events.flush()

    def image(self, step: int, name: str, picture: bytes) -> None:
        width, height = (int.from_bytes(picture[at : at + 4], "big") for at in (16, 20))
        size = {"width": width, "height": height, "colorspace": 4}  # RGBA
        self._write(step, [{"tag": name, "image": {**size, "encoded_image_string": picture}}])
        self._events.flush()

    def close(self, *, ended: bool) -> None:
        if self._events is not None:
            self._events.close()
        self._events = None

    def _hyperparameters(self) -> Sequence[Any]:
        """Make the entries of TensorBoard's hyper-parameter table, one per config key."""
        from tensorboardX.summary import hparams

        plain = (bool, int, float, str)
        shown = {k: v if isinstance(v, plain) else json.dumps(v) for k, v in self._about.items()}
        return hparams(shown, {})

    def _write(self, step: int, values: list[dict] | None = None, **more: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        if values is not None:
            more["summary"] = {"value": values}
        self._events.write_event(Event(wall_time=time.time(), step=step, **more))


class _WandB:
    """A W&B run; `step` counts the steps of all phases, and names begin with the phase.

    A continued run stays the same there: its ID is in WORKDIR/wandb_id. W&B cannot remove rows, so
    nothing is logged twice.
    """

    def __init__(self, workdir: Path, about: Mapping[str, Any]) -> None:
        import wandb

        if not (identity := workdir / "wandb_id").exists():
            jsonl.replace(identity, f"{secrets.token_hex(6)}\n")
        settings: dict[str, Any] = {
            "project": os.environ.get("WANDB_PROJECT", "jaxrobust"),
            "name": os.environ.get("WANDB_NAME", workdir.absolute().name),
            "dir": os.environ.get("WANDB_DIR", str(workdir)),
            "id": identity.read_text().strip(),
            "resume": "allow",
            "config": dict(about),
            "allow_val_change": True,  # for example, the commit of a continued run
            "settings": wandb.Settings(init_timeout=_PATIENCE_S, finish_timeout=_PATIENCE_S),
        }
        try:
            self._run = wandb.init(**settings)
        except (wandb.errors.CommError, TimeoutError) as error:
            say(f"WARNING: W&B cannot be reached ({_short(error)}); this run is logged offline")
            wandb.teardown()  # its service holds the ID of the run that did not start
            self._run = wandb.init(**settings, mode="offline")
        self._image, self._first = wandb.Image, True
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def begin(self, phase: str, start: int, earlier_steps: int, logged: Mapping[str, int]) -> None:
        self._phase, self._before = phase, earlier_steps
        self._seen, self._reached = dict(logged), max(logged.values(), default=0)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        new = {name: value for name, value in values.items() if step > self._seen.get(name, -1)}
        self._seen |= dict.fromkeys(new, step)
        if new:
            self._log(step, new)

    def image(self, step: int, name: str, picture: bytes) -> None:
        """Send a picture, unless a later step was reached earlier."""
        if step >= self._reached:
            self._log(step, {name: self._image(Image.open(io.BytesIO(picture)))})

    def close(self, *, ended: bool) -> None:
        """Wait a limited time until everything is sent; `wandb sync` sends the rest."""
        self._run.finish(exit_code=0 if ended else 1)

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        total = self._before + step
        scalars = {f"{self._phase}/{name}": value for name, value in values.items()}
        # Its own row numbers continue after those of a part that was written offline.
        row = max(total, self._run.step) if self._first else None
        self._run.log({"step": total, f"{self._phase}/step": step} | scalars, step=row, commit=True)
        self._first = False


def _logged_in() -> None:
    import wandb

    if os.environ.get("WANDB_MODE", "online") != "online":
        return
    try:
        wandb.login(verify=False)
    except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
        raise ValueError(
            f"log.to=wandb: W&B reports: {' '.join(str(error).split())} Set WANDB_MODE=offline to "
            "log without a login; `wandb sync` uploads it later"
        ) from error


class TrackerKind(NamedTuple):
    """A kind of tracker: its package, what else it needs of the user (or raises), how it opens."""

    package: str
    wants: Callable[[], None]
    opened: Callable[[Path, Mapping[str, Any]], Any]


KINDS = {
    "tensorboard": TrackerKind("tensorboardX", lambda: None, _TensorBoard),
    "wandb": TrackerKind("wandb", _logged_in, _WandB),
}


def named(text: str) -> list[str]:
    """List the trackers named in `log.to`."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def check(text: str, *, first: bool = True) -> None:
    """Reject a tracker that is unknown or cannot start; the `first` process logs in."""
    if unknown := [name for name in named(text) if name not in KINDS]:
        there = ", ".join(KINDS)
        raise ValueError(
            f"log.to={text!r} names the unknown tracker {unknown[0]!r}; choose from {there}"
        )
    for name in named(text):
        try:
            importlib.import_module(KINDS[name].package)
        except ImportError as error:
            needed = f"log.to={name} needs an extra: pip install 'jaxrobust[{name}]'"
            raise ValueError(needed) from error
        if first:
            KINDS[name].wants()


class Trackers:
    """The trackers of a run; one that fails is dropped with a warning."""

    def __init__(
        self,
        workdir: Path,
        names: list[str],
        about: Mapping[str, Any] | None = None,
        draw: Draw | None = None,
    ) -> None:
        self._workdir, self._names, self._about = workdir, names, about or {}
        self._draw = draw if names else None
        self._open: dict[str, Any] | None = None
        self._at: tuple[str, int] | None = None  # the phase, and the number of steps before it
        self._shown: dict[str, tuple[str, int]] = {}  # picture -> its last phase and step

    def open(self) -> None:
        """Open trackers that are not open yet."""
        if self._open is not None:
            return
        self._open = {}
        for name in self._names:
            try:
                self._open[name] = KINDS[name].opened(self._workdir, self._about)
            except Exception as error:
                _warn(name, error)
        try:
            sentence = raster.lacking() if self._draw else ""
        except Exception as error:
            sentence, self._draw = str(error), None
        if sentence:
            say(f"WARNING: log.to={','.join(self._names)}: {sentence}")

    def begin(self, phase: str, start: int, earlier_steps: int) -> None:
        """Continue a phase after its step `start`, before `metrics.jsonl` drops the rest."""
        self._at = phase, earlier_steps
        if not self._open:
            return
        logged: dict[str, int] = {}
        for row in jsonl.read(self._workdir / "metrics.jsonl"):
            if row["phase"] == phase:
                logged |= {name: max(row["step"], logged.get(name, 0)) for name in row}
        self._each("begin", phase, start, earlier_steps, logged)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values of a phase's step that are numbers."""
        numbers = {name: v for name, v in values.items() if isinstance(v, (int, float))}
        self._each("scalars", step, numbers)

    def pictures(self, step: int) -> None:
        """Log the current figures of the phase, at most once per step."""
        if not (self._open and self._draw and self._at):
            return
        try:
            drawn = self._draw(self._workdir, self._at[0])
            new = [name for name in drawn if self._shown.get(name) != (self._at[0], step)]
            pictures = {name: raster.png(drawn[name]) for name in new}
        except Exception as error:
            say(f"WARNING: pictures are no longer logged: {_short(error)}")
            self._draw = None
            return
        self._shown |= dict.fromkeys(pictures, (self._at[0], step))
        for name, picture in pictures.items():
            self._each("image", step, f"figures/{name}", picture)

    def tested(
        self, phase: str, step: int, earlier_steps: int, scores: Mapping[str, float]
    ) -> None:
        """Log the test accuracy of a phase's weights; `step`: its last."""
        if self._at != (phase, earlier_steps):
            self.begin(phase, step, earlier_steps)
        self.scalars(step, {f"test_{name}": value for name, value in scores.items()})
        self.pictures(step)

    def _each(self, method: str, *args: Any, **options: Any) -> None:
        for name, one in list((self._open or {}).items()):
            try:
                getattr(one, method)(*args, **options)
            except Exception as error:
                _warn(name, error)
                assert self._open is not None
                del self._open[name]
                with suppress(Exception):
                    one.close(ended=False)

    def close(self, *, ended: bool) -> None:
        """Close all."""
        self._each("close", ended=ended)
        self._open = None

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, kind: object, *unused: object) -> None:
        self.close(ended=kind is None)


NONE = Trackers(Path(), [])


def _warn(name: str, error: Exception) -> None:
    say(
        f"WARNING: {name} is disabled from here on, and training continues: {_short(error)}. "
        "metrics.jsonl has everything, and running the same command tries again"
    )


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no reason given"
    return f"{type(error).__name__}: {text[:300]}"
