"""A door to `python -m jaxrobust.convert.export_torch`, which says in --help what it does."""

from jaxrobust.convert.export_torch import main

if __name__ == "__main__":
    main()
