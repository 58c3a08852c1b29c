"""How a network is compared with its module: which passes are made, and where the bars are."""

import random
from types import SimpleNamespace
from unittest import mock

import numpy as np
from absl.testing import parameterized

from jaxrobust.pytorch import agreement
from jaxrobust.pytorch.agreement import FEW, Agreement
from tests.support import sweeps

# Of four images: logits whose largest is 2, and a gradient of length 10.
LOGITS = np.array([[2.0, 0.5], [-1.0, 0.0], [0.25, 0.5], [1.0, 1.5]])
GRADIENT = np.array([6.0, 8.0, 0.0, 0.0])
IMAGES = np.arange(24.0).reshape(4, 2, 1, 3)


def network(single=False, draws=()):
    return SimpleNamespace(program=SimpleNamespace(single=single, draws=draws))


class Side:
    """A pass that gives the numbers above, off by what a test says, and notes its calls."""

    def __init__(self, logits=0.0, gradient=0.0, exact=None):
        self.logits, self.gradient, self.exact, self.calls = logits, gradient, exact, []

    def __call__(self, images, dtype):
        self.calls.append((len(images), dtype))
        if dtype == "float64" and self.exact is not None:
            return self.exact(images)
        count = len(images)
        return LOGITS[:count] + 2 * self.logits, GRADIENT[:count] + 10 * self.gradient * ALONG[
            :count
        ]


ALONG = np.array([1.0, 0.0, 0.0, 0.0])


class MeasuresTest(parameterized.TestCase):
    def test_logits_by_the_largest_and_gradients_by_their_length(self):
        theirs = np.array([[4.0, -8.0]]), np.array([[3.0, 4.0]])
        ours = np.array([[4.0, -6.0]]), np.array([[3.0, 4.5]])
        self.assertEqual(agreement._apart(ours, theirs), (0.25, 0.1))
        self.assertEqual(agreement._apart(theirs, theirs), (0.0, 0.0))
        nothing = np.zeros((1, 2)), np.zeros((1, 2))
        self.assertEqual(agreement._apart(nothing, nothing), (0.0, 0.0))
        self.assertGreater(min(agreement._apart(theirs, nothing)), 1e29)

    def test_equal_infinities_and_nans_are_equal(self):
        """They were refused as differing "by nan", also where PyTorch has the same."""
        inf, nan = np.inf, np.nan
        theirs = np.array([[nan, -8.0, inf]]), np.array([[3.0, 4.0, nan, -inf]])
        ours = np.array([[nan, -6.0, inf]]), np.array([[3.0, 4.5, nan, -inf]])
        self.assertEqual(agreement._apart(theirs, theirs), (0.0, 0.0))
        self.assertEqual(agreement._apart(ours, theirs), (0.25, 0.1))
        for other in (np.array([[1.0, -8.0, inf]]), np.array([[nan, -8.0, -inf]])):
            self.assertEqual(agreement._apart((other, theirs[1]), theirs), (inf, 0.0))
            self.assertEqual(agreement._apart((theirs[0], other), (theirs[0], other)), (0.0, 0.0))
        numbers = np.zeros((1, 4))
        self.assertEqual(agreement._apart((theirs[0], numbers), theirs), (0.0, inf))
        self.assertEqual(agreement._apart(theirs, (theirs[0], numbers)), (0.0, inf))

    def test_of_an_operator(self):
        torch = SimpleNamespace
        made = torch(detach=lambda: torch(numpy=lambda: np.array([1.0, -4.0, np.inf])))
        self.assertEqual(agreement._error(np.array([1.0, -4.0, np.inf]), made), 0.0)
        made = torch(detach=lambda: torch(numpy=lambda: np.array([np.nan, -4.0])))
        self.assertEqual(agreement._error(np.array([np.nan, -3.0]), made), 0.25)
        finite = torch(detach=lambda: torch(numpy=lambda: np.array([1.0, -4.0])))
        self.assertEqual(agreement._error(np.array([2.0, -4.0]), finite), 0.25)
        self.assertEqual(agreement._error(np.array([1.0]), finite), np.inf)
        several = [finite, finite, 7]
        found = (np.array([1.0, -4.0]), None, 7)  # the second is read by nobody
        self.assertEqual(agreement._error(found, several), 0.0)
        self.assertEqual(agreement._error((np.array([1.0, -2.0]), None, 7), several), 0.5)
        self.assertEqual(agreement._error((), []), 0.0)
        empty = torch(detach=lambda: torch(numpy=lambda: np.zeros((0, 2))))
        self.assertEqual(agreement._error(np.zeros((0, 2)), empty), 0.0)

    @sweeps.rows((FEW, ""), (2 * FEW, "; batches of 16 cost less per image"))
    def test_words(self, at_once, more):
        found = Agreement(5, 1.5e-6, 3e-5, (0.0125, 2.0), at_once)
        self.assertEqual(
            found.words(),
            "JAX and PyTorch agree on 5 images (relative difference of the logits 1.5e-06, of the "
            "input gradients 3.0e-05); a forward and backward pass on them takes 12.5 ms in JAX, "
            "2000.0 ms in PyTorch" + more,
        )

    @sweeps.rows(
        (FEW, 0.5, 0.89, 2 * FEW),
        (FEW, 0.5, 0.9, FEW),  # not less than nine tenths for each
        (FEW, 0.01, 0.001, 2 * FEW),
        (FEW - 1, 0.5, 0.001, FEW),
        (FEW, 0.0099, 0.001, FEW),  # mostly dispatch
    )
    def test_twice_as_many_at_once(self, count, seconds, twice, expected):
        images = np.zeros((count, 1, 1, 1))
        times = {count: seconds, 2 * count: twice}
        with mock.patch.multiple(
            agreement,
            check=lambda *operands: (0.0, 0.0),
            _torch_pass=lambda network: "PyTorch",
            _jax_pass=lambda network, rewrite: "JAX",
            _seconds=lambda side, images: times[len(images)] if side == "JAX" else 2.0,
        ):
            agreed = agreement.compared(network(), images)
        self.assertEqual((agreed.at_once, agreed.seconds), (expected, (seconds, 2.0)))

    def test_seconds_are_the_least_of_three(self):
        times, calls = iter((0.0, 5.0, 5.0, 7.0, 10.0, 13.0)), []
        with mock.patch.object(agreement.time, "perf_counter", lambda: next(times)):
            seconds = agreement._seconds(lambda *operands: calls.append(operands), "images")
        self.assertEqual((seconds, calls), (2.0, [("images", "float32")] * 3))


class CheckedTest(parameterized.TestCase):
    def test_passes_that_are_made(self):
        theirs, ours = Side(), Side(logits=0.9e-5, gradient=0.9e-4)
        found = agreement.check(network(), IMAGES, (theirs, ours))
        np.testing.assert_allclose(found, (0.9e-5, 0.9e-4), rtol=1e-6)
        half = (2, "float32")
        self.assertEqual(theirs.calls, [(4, "float32")] * 2 + [(4, "float64"), half])
        self.assertEqual(ours.calls, [(4, "float32")])

    @sweeps.rows({"logits": 1.1e-5}, {"gradient": 1.1e-4}, {"logits": float("nan")})
    def test_beyond_a_bar_float64_decides(self, **off):
        right = Side(**off, exact=lambda images: (LOGITS, GRADIENT))
        agreement.check(network(), IMAGES, (Side(), right))
        self.assertEqual(right.calls, [(4, "float32"), (4, "float64")])
        for shares in ((1.1e-9, 0), (0, 1.1e-7)):
            for draws, first in (((), "relu"), ((), None), (("draw",), "relu")):
                wrong = Side(**off, exact=lambda images, s=shares: Side(*s)(images, "float32"))
                named = (
                    "operator whose values differ is relu$"
                    if first and not draws
                    else "All operators"
                )
                with (
                    mock.patch.object(agreement, "first_difference", lambda *given: first),  # noqa: B023
                    self.assertRaisesRegex(ValueError, f"JAX and PyTorch differ: logits.*{named}"),
                ):
                    agreement.check(network(draws=draws), IMAGES, (Side(), wrong))

    def test_nan_on_one_side_only_is_said(self):
        none = Side(exact=lambda images: (LOGITS, np.full(4, np.nan)), gradient=np.nan)
        agreement.check(network(), IMAGES, (none, none))
        said = "gradients by inf and inf, because only one of them has NaN or infinity."
        with (
            mock.patch.object(agreement, "first_difference", lambda *given: None),
            self.assertRaisesRegex(ValueError, said),
        ):
            agreement.check(network(), IMAGES, (Side(), none))

    def test_pytorchs_own_error_moves_the_bars(self):
        """Twice that of its logits, four times that of its gradients."""
        theirs = Side(logits=3e-5, gradient=1e-3, exact=lambda images: (LOGITS, GRADIENT))
        near = Side(logits=5.9e-5, gradient=3.9e-3)
        agreement.check(network(), IMAGES, (theirs, near))
        self.assertLen(near.calls, 1)
        for off in ({"logits": 6.1e-5}, {"gradient": 4.1e-3}):
            far = Side(**off, exact=lambda images: (LOGITS, GRADIENT))
            agreement.check(network(), IMAGES, (theirs, far))
            self.assertLen(far.calls, 2)

    def test_code_that_says_float32_is_its_own_reference(self):
        def refuses(images):
            raise RuntimeError("expected Float")

        found = agreement.check(network(), IMAGES, (Side(exact=refuses), Side(logits=0.5e-5)))
        np.testing.assert_allclose(found, (0.5e-5, 0), rtol=1e-6)

    def test_images_one_by_one_are_passed_at_once_too(self):
        made = []

        def at_once(net, at_once=False):
            made.append(at_once)
            return Side(logits=made_off)

        with mock.patch.object(agreement, "_torch_pass", at_once):
            made_off = 0.0
            agreement.check(network(single=True), IMAGES, (Side(), Side()))
            self.assertEqual(made, [True])
            for one in (network(), network(single=True, draws=("draw",))):
                agreement.check(one, IMAGES, (Side(), Side()))
            self.assertEqual(made, [True])
            made_off = 2e-5
            with self.assertRaisesRegex(ValueError, "depends on the other images of its batch"):
                agreement.check(network(single=True), IMAGES, (Side(), Side()))


class RefusedTest(parameterized.TestCase):
    @sweeps.rows(({"logits": 1.1e-6}, "logits by 1.1e-06"), ({"gradient": 1.1e-5}, ""))
    def test_two_passes_that_differ(self, off, message):
        def second(**errors):
            passes = iter([Side(), Side(**errors)])
            return lambda images, dtype: next(passes, Side())(images, dtype)

        for near in ({}, {"logits": 0.9e-6}, {"gradient": 0.9e-5}):
            agreement.check(network(), IMAGES, (second(**near), Side()))
        with self.assertRaisesRegex(ValueError, f"the same images differ: {message}"):
            agreement.check(network(), IMAGES, (second(**off), Side()))

    @parameterized.parameters(lambda: random.random(), lambda: np.random.rand())
    def test_numbers_that_others_draw(self, draw):
        state = random.getstate(), np.random.get_state()
        self.addCleanup(random.setstate, state[0])
        self.addCleanup(np.random.set_state, state[1])

        def drawing(images, dtype):
            draw()
            return Side()(images, dtype)

        with self.assertRaisesRegex(ValueError, "differ in their random draws: logits by 0.0e"):
            agreement.check(network(), IMAGES, (drawing, Side()))

    @sweeps.rows((4, 2), (3, 1), (2, 1), (1, 2))
    def test_a_batch_is_halved_and_one_image_doubled(self, count, other):
        batches = []

        def torch_pass(images, dtype):
            batches.append(images)
            return LOGITS[:1].repeat(len(images), 0), GRADIENT[:1].repeat(len(images), 0)

        images = IMAGES[:count]
        agreement.check(network(), images, (torch_pass, torch_pass))
        self.assertLen(batches[-1], other)
        np.testing.assert_array_equal(batches[-1][0], images[0])
        if count == 1:
            np.testing.assert_array_equal(batches[-1][1], images[0, ::-1])

    def test_what_depends_on_the_others_of_its_batch(self):
        def of_half(logits):
            return lambda images, dtype: Side(logits if len(images) == 2 else 0)(images, dtype)

        agreement.check(network(), IMAGES, (of_half(0.99e-5), Side()))
        message = "with 4 and with 2 images, .* differ by 1.1e-05 "
        with self.assertRaisesRegex(ValueError, message):
            agreement.check(network(), IMAGES, (of_half(1.1e-5), Side()))
