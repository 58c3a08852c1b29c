"""Residual networks on RobustBench's leaderboards of CIFAR-10 and CIFAR-100."""
