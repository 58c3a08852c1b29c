"""Numbers that claim more than was done: each fault that a rival, forger or defender found."""

from absl.testing import absltest, parameterized


class IdentityTest(parameterized.TestCase):
    """An evaluation is continued, compared and called done by what it computes, and by that alone.

    (cases: networks, imports, images)
    """


# --- bundles ---


# --- selection, comparison ---


# --- randomised networks, numbers that are none ---


# --- PyTorch's networks ---


if __name__ == "__main__":
    absltest.main()
