"""A door to `python -m jaxrobust.exchange.export_torch`, which says in --help what it does."""

from jaxrobust.exchange.export_torch import main

if __name__ == "__main__":
    main()
