"""The help of `jaxrobust evaluate`: the usual flags, or all of them in groups."""

import textwrap

from absl import flags

USUAL = "dataset split n norm epsilon threat attack version corruptions out"
GROUPS = {
    "The network": "workdir phase selected weights model options num_classes function torch "
    "torch_args torch_output",
    "Images": "dataset split classes data_dir image_size preprocessing n",
    "The threat": "norm epsilon threat ladder worst_case union_only",
    "Attacks": "attack version finish steps targets restarts relative_step step start l1_rule "
    "rule draws points replay noreplay search_dtype batch seed",
    "In place of attacks": "corruptions frost certify",
    "Stopping early": "against tie until_width alpha",
    "Output": "out bundle again",
    "Several hosts": "multihost coordinator_address coordinator_timeout num_processes process_id",
}
_REPEAT = ";\n    repeat this option to specify a list of values"  # as absl says it


def text(doc: str, *, everything: bool) -> str:
    """Write the usual flags, or all of them in groups."""
    rows = GROUPS if everything else {"The usual flags": USUAL}
    lines = [doc]
    if everything:
        describe_attacks()
    for title, names in rows.items():
        lines.append(f"{title}:")
        for flag in (flags.FLAGS[name] for name in names.split()):
            default = "" if flag.default in (None, False) else f" (default: {flag.default})"
            first, *others = flag.help.replace(_REPEAT, " May be repeated.").split("\n")
            first = textwrap.fill(
                f"  --{flag.name}  {first}{default}", 100, subsequent_indent=" " * 6
            )
            lines += [first, *(f"      {line}" for line in others)]
        lines.append("")
    return "\n".join(
        lines if everything else [*lines, "jaxrobust evaluate --help-all lists all flags."]
    )


def describe_attacks() -> None:
    """Write the attacks and data sets that there are into the help of their flags."""
    try:
        from jaxrobust.attacks import registry  # which needs JAX: --help alone waits for it
    except ImportError:  # without JAX there is help, too
        return
    from jaxrobust.data.source import KINDS
    from jaxrobust.data.sources.registry import written

    defined = flags.FLAGS
    defined["attack"].help += f" Of K steps:\n{registry.described(registry.fixed)}"
    defined["attack"].help += f"\nOf AutoAttack:\n{registry.described(registry.searching)}"
    rows = registry.fixed().values()
    lengths = [f"{row.length:g} of {row.written}" for row in rows]
    starts = [f"{row.fixed.start} of {row.written}" for row in rows if row.fixed]
    kinds = [f"{kind.written}: {kind.help}" for kind in KINDS.values()]
    defined["dataset"].help += "\n".join([f" Names are {written()}, or TFDS's.", *kinds])
    defined["relative_step"].help += f" These are {', '.join(lengths)}."
    defined["start"].help += f" These are {', '.join(starts)}."
