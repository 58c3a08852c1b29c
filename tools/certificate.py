"""A door to `python -m jaxrobust.exchange.certificate`, which says in --help what it does."""

from jaxrobust.exchange.certificate import main

if __name__ == "__main__":
    main()
