"""NNX modules: the parameters of the kernels, named as in timm."""
