"""Show how many of a network's weights are near zero: one PNG and one CSV.

`jaxrobust sparsity --workdir RUN` (or --weights, as `jaxrobust evaluate` takes them). The ratio of
a set of weights is the share below a hundredth of the set's largest weight. Sets are the whole
network, its convolutions, its projections to queries, keys and values, and its feed-forward parts.
Source: Tang et al. 2022 (arXiv 2209.14105), section 4.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from jaxrobust.commands.flags.shared import NetworkFlags, shared
from jaxrobust.runtime.commandline import fields
from jaxrobust.runtime.commandline.arguments import ending, quiet_libraries
from jaxrobust.runtime.text import patience


@dataclass(frozen=True, kw_only=True)
class SparsityFlags(NetworkFlags):
    """A network, and where the files go."""

    out: Path | None = shared("out")


def main(argv: list[str] | None = None) -> None:
    """Read the command line, count, write both files."""
    quiet_libraries()
    network_flags = asdict(fields.read(SparsityFlags, __doc__, argv))
    with ending("run the same command to start again"):
        with patience.of(patience.LOADING):
            from jaxrobust.papers.networks import sparsity

        print("\n".join(map(str, sparsity.written(network_flags, network_flags.pop("out")))))
