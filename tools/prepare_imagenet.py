"""A door to `python -m jaxrobust.data.prepare imagenet`, which says in --help what it does."""

from jaxrobust.data.prepare.imagenet import main

if __name__ == "__main__":
    main()
