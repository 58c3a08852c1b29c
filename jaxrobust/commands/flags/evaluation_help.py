"""The help of `jaxrobust evaluate`: the usual flags, groups, and lists of attacks and data sets."""

from absl import flags

from jaxrobust.runtime.commandline import help

USUAL = "dataset split n norm epsilon threat attack version corruptions out"  # of --help
GROUPS = help.GROUPS | {  # of --help-all
    "The threat": "norm epsilon threat radius_at ladder worst_case union_only",
    "Attacks": "attack version finish steps targets restarts relative_step step start l1_rule "
    "rule draws points replay noreplay search_dtype batch seed",
    "In place of attacks": "corruptions frost certify",
    "Stopping early": "against tie until_width alpha",
    "Output": "out bundle again",
}


def describe_attacks() -> None:
    """Add the available attacks and data sets to the help of their flags."""
    try:
        from jaxrobust.attacks import ensembles, registry  # JAX: they are imported only for --help
    except ImportError:  # help also works without JAX
        return
    from jaxrobust.data.source import KINDS
    from jaxrobust.data.sources.registry import written

    defined = flags.FLAGS
    defined["attack"].help += f"\nAttacks with K steps:\n{registry.described(registry.fixed)}"
    defined["attack"].help += f"\nParts of AutoAttack:\n{registry.described(ensembles.searching)}"
    rows = registry.fixed().values()
    lengths = [f"{row.length:g} for {row.written}" for row in rows]
    starts = [f"{row.fixed.start} for {row.written}" for row in rows if row.fixed]
    kinds = [f"{kind.written}: {kind.help}" for kind in KINDS.values()]
    defined["dataset"].help += "\n".join([f" Names: {written()}, or any name from TFDS.", *kinds])
    defined["relative_step"].help += f" Defaults: {', '.join(lengths)}."
    defined["start"].help += f" Defaults: {', '.join(starts)}."
