"""A door to `python -m jaxrobust.convert.import_torch`, which says in --help what it does."""

from jaxrobust.convert.import_torch import main

if __name__ == "__main__":
    main()
