"""Compiled, wrapped and shared modules, next to PyTorch's own."""

import numpy as np
import pytest
from absl.testing import parameterized

from tests.support import paths, sweeps

torch = pytest.importorskip("torch", reason=paths.PARITY)
from torch import nn  # noqa: E402

from jaxrobust.pytorch.networks import torch_modules  # noqa: E402
from jaxrobust.pytorch.reading import refusals, training_mode, wrappers  # noqa: E402
from jaxrobust.pytorch.torch import from_module  # noqa: E402
from jaxrobust.runtime import pytorch  # noqa: E402
from tests.support.torch_passes import IMAGE, images, largest_difference  # noqa: E402


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


class CompiledPart(Net):
    def __init__(self):
        super().__init__()
        self.body = torch.compile(self.body)


class CompiledMethod(Net):
    @torch.compile
    def inner(self, x):
        return self.body(x)

    def forward(self, x):
        return self.head(self.inner(x).mean((2, 3)))


class CompiledForward(Net):
    @torch.compile
    def forward(self, x):
        return super().forward(x)


@torch.compile
def doubled(x):
    return torch.relu(x) * 2


class CompiledFunction(Net):
    def forward(self, x):
        return self.head(doubled(self.body(x)).mean((2, 3)))


class TwoNames(Net):
    """A batch norm that is called under each of its names, and another one of its statistics."""

    def __init__(self):
        super().__init__()
        self.again = self.body[1]
        self.third = nn.BatchNorm2d(4)
        self.third.running_mean = self.again.running_mean

    def forward(self, x):
        return self.head(self.third(self.again(self.body(x) * 2 + 1)).mean((2, 3)))


class SharedPart(Net):
    def __init__(self):
        super().__init__()
        self.more = nn.Sequential(nn.Conv2d(4, 4, 1), self.body[1])

    def forward(self, x):
        return self.head(self.more(self.body(x)).mean((2, 3)))


class CalledTwice(Net):
    def forward(self, x):
        x = self.body[1](self.body(x) * 2 + 1)
        return self.head(x.mean((2, 3)))


class OneOfTwoNames(Net):
    def __init__(self):
        super().__init__()
        self.again = self.body[1]

    def forward(self, x):
        return self.head(self.again(self.body[0](x)).mean((2, 3)))


class NotKept(Net):
    """Two names of statistics that no state dict has."""

    def __init__(self):
        super().__init__()
        for name in ("running_mean", "running_var"):
            self.body[1].register_buffer(name, getattr(self.body[1], name), persistent=False)
        self.again = self.body[1]

    def forward(self, x):
        return self.head(self.again(self.body(x)).mean((2, 3)))


def called_compile():
    module = Net()
    module.compile()
    return module


def parametrised():
    module = Net()
    nn.utils.parametrizations.weight_norm(module.head)
    return module


def averaged():
    return torch.optim.swa_utils.AveragedModel(Net())


def distributed(self):
    file = f"file://{self.create_tempdir().full_path}/init"
    torch.distributed.init_process_group("gloo", init_method=file, rank=0, world_size=1)
    self.addCleanup(torch.distributed.destroy_process_group)


WRAPPED = {
    "compiled": lambda: torch.compile(Net()),
    "module.compile": called_compile,
    "a part": CompiledPart,
    "a method": CompiledMethod,
    "forward": CompiledForward,
    "a function": CompiledFunction,
    "parallel": lambda: nn.DataParallel(Net()),
    "both": lambda: torch.compile(nn.DataParallel(torch.compile(Net()))),
    "averaged": averaged,
    "of averaged": lambda: torch.compile(averaged()),
    "parametrised": lambda: torch.compile(parametrised()),
}
SHARED = (TwoNames, SharedPart, CalledTwice, OneOfTwoNames, NotKept)


class WrappersTest(parameterized.TestCase):
    """Before, `torch.compile` ended in PyTorch's tracebacks, and wrappers were of one image."""

    @sweeps.rows(*WRAPPED)
    def test_evaluated_and_trained_as_the_module_inside(self, kind):
        module = WRAPPED[kind]().eval()
        from_module(module, images(4))
        refusals.without_gradient(wrappers.inside(module), images(2), ["apgd-ce"])
        network = training_mode.trainable(module, IMAGE)
        inside = wrappers.inside(module)
        self.assertEqual(list(network.names), list(inside.state_dict()))
        with wrappers.uncompiled():
            self.assertLess(largest_difference(inside, network), 1e-5)

    def test_distributed(self):
        distributed(self)
        wrapped = nn.parallel.DistributedDataParallel(Net())
        self.assertIs(wrappers.inside(wrapped), wrapped.module)

    def test_sharded(self):
        distributed(self)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        module = fully_shard(Net(), mesh=init_device_mesh("cpu", (1,)))
        with self.assertRaisesRegex(
            ValueError, "^it is wrapped in FSDP, which .*its .* full state"
        ):
            from_module(module.eval(), images(2))

    def test_hooks_of_a_wrapper(self):
        module = nn.DataParallel(Net())
        module.register_forward_hook(lambda part, given, made: 2 * made)
        with self.assertRaisesRegex(ValueError, "^the DataParallel around it has hooks; register"):
            from_module(module.eval(), images(2))

    def test_modules_by_name_are_those_inside(self):
        place = f"{__name__}:wrapped"
        self.assertIsInstance(torch_modules.module(pytorch.PREFIX + place, {}), Net)


def wrapped():
    return torch.compile(Net())


class SharedTest(parameterized.TestCase):
    """Before, a batch norm under two names was an AssertionError of `torch.export` in training."""

    @sweeps.rows(*SHARED)
    def test_as_pytorch(self, kind):
        module = kind()
        from_module(module.eval(), images(4))
        network = training_mode.trainable(module, IMAGE)
        self.assertLess(largest_difference(module, network, updates=3), 1e-5)
        norm = module.body[1]
        times = 1 if kind is OneOfTwoNames else 2
        self.assertEqual(norm.num_batches_tracked, 3 * times)
        self.assertGreater(np.abs(norm.running_mean.numpy()).max(), 0)
