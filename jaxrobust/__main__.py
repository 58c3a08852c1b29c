"""`python -m jaxrobust`: what there is."""

from jaxrobust import __version__

COMMANDS = {
    "python -m jaxrobust.main --config FILE": "trains a network, or continues to",
    "python -m jaxrobust.evaluate --workdir RUN": "attacks a network and keeps the record",
    "python -m jaxrobust.models": "lists the architectures and the checkpoints that load",
    "python -m jaxrobust.convert.import_torch SOURCE": "takes weights from PyTorch's files",
    "python -m jaxrobust.convert.export_torch": "writes weights for PyTorch, timm or RobustBench",
    "python -m jaxrobust.convert.certificate": "compares a network with its reference",
}


def main() -> None:
    """Print the commands; each has a --help."""
    width = max(map(len, COMMANDS))
    print(f"jaxrobust {__version__}, adversarially robust image classifiers in JAX\n")
    for command, does in COMMANDS.items():
        print(f"{command:{width}}  {does}")
    print("\nEach command says more with --help; README.md shows them in the order of their use.")


if __name__ == "__main__":
    main()
