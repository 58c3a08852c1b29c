"""Residual networks that stand on RobustBench's lists of CIFAR-10 and CIFAR-100."""
