"""A door to `python -m jaxrobust.convert.certificate`, which says in --help what it does."""

from jaxrobust.convert.certificate import main

if __name__ == "__main__":
    main()
