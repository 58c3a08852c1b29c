"""A config as what runs from it sees it: its phases, with their changes, and its plain values."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from jaxrobust.config import CHANGES, Config, DataSection, base, phase
from jaxrobust.runtime.processes import launch
from jaxrobust.runtime.text.spelling import meant

SPARED = 4  # cores of a host that do not decode by default: they feed its devices, and write


class Values(dict):
    """A config as plain values; its keys read as attributes, which is how `build` reads it."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


def plain(config: Any) -> dict[str, Any]:
    """Copy a config, or a section of one, as values that JSON has."""
    return json.loads(json.dumps(config) if isinstance(config, dict) else config.to_json())


def attributes(config: dict[str, Any]) -> Any:
    """Let the keys of plain values, and of sections in them, be read as attributes."""
    return json.loads(json.dumps(config), object_hook=Values)


def completed(config: dict[str, Any]) -> dict[str, Any]:
    """Give a run's config the defaults of keys that are younger than the run."""
    defaults = plain(base())
    log = dict(config.get("log", {}))
    if log.pop("tensorboard", False):  # `spelling.MOVED`
        log["to"] = "tensorboard"
    config = config | {"log": log}
    names = config.get("phases", defaults["phases"])
    defaults |= {name: plain(phase()) for name in names if name in config}
    return _merged(defaults, config)


def _merged(old: Any, new: Any) -> Any:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return old | {key: _merged(old.get(key), value) for key, value in new.items()}


def decoders(data: DataSection) -> int:
    """Count this host's processes that decode: as the config says, or by its cores.

    By default none where JAX computes on these cores, which then has them all.
    """
    if data.workers is not None:
        return data.workers
    return 0 if jax.default_backend() == "cpu" else max(launch.own_cores() - SPARED, 0)


def phases(config: Config) -> list[str]:
    """List the names of the phases that happen, in their order."""
    names = list(config.phases)
    for name in names:
        if name not in config or "objective" not in config[name]:
            raise ValueError(
                f"phases={names} names {name!r}, for which the config has no section; write "
                f"config.{name} = phase(...) in it"
            )
        if names.count(name) > 1:
            raise ValueError(f"phases={names} names {name!r} twice; give the second another name")
    happen = [name for name in names if config[name].epochs != 0]
    if not happen:
        zeros = " and ".join(f"{name}.epochs=0" for name in names) or "phases=()"
        raise ValueError(f"{zeros}: there is nothing to train")
    return happen


def of_phase(config: Config, name: str) -> Config:
    """Give the config as a phase sees it: with its own `changes`."""
    changes = plain(config[name].changes)
    if not changes:
        return config
    seen = plain(config)
    for keys, value in _leaves(changes):
        _change(seen, keys, value, f"{name}.changes.")
    return attributes(seen)


def _leaves(tree: Mapping[str, Any], keys: tuple[str, ...] = ()) -> Iterator[tuple[Any, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and (*keys, key) != ("model", "options"):
            yield from _leaves(value, (*keys, key))
        else:
            yield (*keys, key), value


def _change(config: dict[str, Any], keys: tuple[str, ...], value: Any, prefix: str) -> None:
    section, known = config, list(CHANGES)
    for depth, key in enumerate(keys):
        known = known if depth == 0 else list(section)
        if key not in known:
            whole = f"{prefix}{'.'.join(keys[: depth + 1])}"
            raise ValueError(f"{whole} is no key; {meant(key, known)}")
        if depth < len(keys) - 1:
            if not isinstance(section[key], dict):
                raise ValueError(f"{prefix}{'.'.join(keys)}: {key} is no section, but a value")
            section = section[key]
    if isinstance(section[keys[-1]], dict) and not isinstance(value, dict):
        raise ValueError(f"{prefix}{'.'.join(keys)} is a section, and {value!r} is a value")
    section[keys[-1]] = value
