"""The attacks that there are, in the help of `jaxrobust evaluate`."""

import sys

from absl import flags


def describe_attacks() -> None:
    """Write the attacks that there are into the help of the flags, if that is asked for."""
    if not {"--help", "-help", "--helpfull", "--helpshort", "-h", "--h", "-?"} & set(sys.argv[1:]):
        return
    try:
        from jaxrobust.attacks import registry  # which needs JAX: --help alone waits for it
    except ImportError:  # without JAX there is help, too
        return
    from jaxrobust.data.source import KINDS
    from jaxrobust.data.sources.registry import written

    known = flags.FLAGS
    known["attack"].help += f" Of K steps:\n{registry.described(registry.fixed)}"
    known["attack"].help += f"\nOf AutoAttack:\n{registry.described(registry.searching)}"
    rows = registry.fixed().values()
    lengths = [f"{row.length:g} of {row.written}" for row in rows]
    starts = [f"{row.fixed.start} of {row.written}" for row in rows if row.fixed]
    kinds = [f"{kind.written}: {kind.help}" for kind in KINDS.values()]
    known["dataset"].help += "\n".join([f" Names are {written()}, or TFDS's.", *kinds])
    known["relative_step"].help += f" These are {', '.join(lengths)}."
    known["start"].help += f" These are {', '.join(starts)}."
