"""NNX modules that hold the kernels' parameters, named as in timm."""
