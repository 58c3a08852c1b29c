"""What the processes of a pod do together, by one that plays several."""

import pickle
from unittest import mock

import jax
import numpy as np
from absl.testing import parameterized

from jaxrobust.runtime.processes import hosts
from tests.support import sweeps


def gathered(values: list):
    """What processes with these values send each other, piece by piece; the last is this one."""
    sent = [pickle.dumps(each) for each in enumerate(values)]
    at = [0]

    def gather(piece: np.ndarray) -> np.ndarray:
        rows = np.zeros((len(sent), len(piece)), np.uint8)
        for row, text in zip(rows, sent, strict=True):
            part = text[at[0] : at[0] + len(piece)]
            row[: len(part)] = np.frombuffer(part, np.uint8)
        at[0] += len(piece)
        np.testing.assert_array_equal(rows[-1], piece)
        return rows

    return mock.patch.multiple(
        hosts, process_allgather=gather, _lengths=lambda mine: [len(text) for text in sent]
    )


def pod(index: int, count: int):
    return mock.patch.multiple(jax, process_index=lambda: index, process_count=lambda: count)


class PodTest(parameterized.TestCase):
    @sweeps.rows((0, [0, 3, 6]), (1, [1, 4]), (2, [2, 5]))
    def test_each_takes_its_share(self, index, share):
        with pod(index, 3):
            self.assertEqual(hosts.share(np.arange(7)).tolist(), share)

    def test_numbers_of_all(self):
        with pod(1, 3), mock.patch.object(hosts, "process_allgather") as gather:
            gather.return_value = np.array([5, 9, 1])
            self.assertEqual((hosts.first(9), hosts.total(9), hosts.largest(9)), (5, 15, 9))
            gather.return_value = np.array([False, True, True])
            self.assertIs(hosts.first(True), False)

    @sweeps.rows(3, 2**14, 2**14 + 1, 2**20 + 7)
    def test_values_of_all_in_their_order_however_long(self, length):
        values = [{"a": 1}, "x" * length, [2.5]]
        with pod(2, 3), gathered(values):
            self.assertEqual(hosts.everyone([2.5]), values)

    def test_alone_nothing_is_sent(self):
        self.assertEqual(hosts.everyone("mine"), ["mine"])
        self.assertEqual(hosts.together(lambda: 3), 3)
        self.assertEqual((hosts.first(4), hosts.total(4), hosts.largest(4)), (4, 4, 4))
        hosts.agree({"seed": 1})

    @sweeps.rows((["theirs", None], "theirs"), ([None, "mine"], "mine"))
    def test_a_mistake_of_one_is_raised_in_all(self, mistakes, said):
        own = mock.Mock(side_effect=ValueError("mine") if mistakes[-1] else None)
        with pod(1, 2), gathered(mistakes), self.assertRaisesRegex(ValueError, f"^{said}$"):
            hosts.together(own)

    def test_others_that_evaluate_something_else_are_named(self):
        theirs, ours = {"seed": 1, "norm": "l2"}, {"seed": 2, "norm": "l2"}
        said = (
            "process 0 evaluates something different than process 1: seed is 1 there, 2 here. Give"
        )
        with pod(1, 2), gathered([theirs, ours]), self.assertRaisesRegex(ValueError, said):
            hosts.agree(ours)
        with pod(1, 2), gathered([ours, ours]):
            hosts.agree(ours)

    def lengths(self, *answers) -> list[int]:
        """Collect the lengths of two processes, of which the other one answers so."""
        client = mock.Mock()
        client.blocking_key_value_get.side_effect = ["7", *answers]
        state = mock.Mock(client=client)
        with pod(0, 2), mock.patch.object(hosts.distributed, "global_state", state):
            found = hosts._lengths(7)
        ((key, value),) = (call.args for call in client.key_value_set.call_args_list)
        self.assertEqual((key[-2:], value), ("/0", "7"))
        keys = [call.args[0] for call in client.blocking_key_value_get.call_args_list]
        self.assertEqual(keys[0], key)
        self.assertEqual(set(keys[1:]), {f"{key[:-1]}1"})
        return found

    def test_a_process_is_waited_for_as_long_as_it_lives(self):
        late = jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: 60 s")
        self.assertEqual(self.lengths("9"), [7, 9])
        self.assertEqual(self.lengths(late, late, "9"), [7, 9])
        with self.assertRaisesRegex(jax.errors.JaxRuntimeError, "UNAVAILABLE"):
            self.lengths(late, jax.errors.JaxRuntimeError("UNAVAILABLE: it is gone"))

    def test_a_pod_that_was_not_joined(self):
        state = mock.Mock(client=None)
        alone = mock.patch.object(hosts.distributed, "global_state", state)
        said = "call jax.distributed.initialize"
        with pod(0, 2), alone, self.assertRaisesRegex(ValueError, said):
            hosts._lengths(7)

    def test_only_short_values_go_in_short_pieces(self):
        sizes = []
        for length in (10, 2**14 + 1):
            piece = mock.Mock(side_effect=lambda piece: sizes.append(len(piece)) or 1 / 0)
            with (
                pod(0, 2),
                mock.patch.object(hosts, "_lengths", return_value=[length, 3]),
                mock.patch.object(hosts, "process_allgather", piece),
                self.assertRaises(ZeroDivisionError),
            ):
                hosts.everyone(1)
        self.assertEqual(sizes, [2**14, 2**20])

    @sweeps.rows(
        ({"a": 1}, {"a": 1}, ""),
        ({"a": 1}, {}, "a is 1 there, null here"),
        ({}, {"b": [1], "c": "x"}, 'b is null there, [1] here; c is null there, "x" here'),
        ({"a": "x" * 78}, {"a": 1}, f'a is "{"x" * 78}" there, 1 here'),
        ({"a": "x" * 79}, {"a": 1}, f'a is "{"x" * 76}... there, 1 here'),
    )
    def test_differences(self, theirs, ours, words):
        self.assertEqual(hosts.differences(theirs, ours), words)
